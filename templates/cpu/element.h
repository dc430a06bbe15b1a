// Elements of captured tensors: how they lie in memory and what they compute as.
#pragma once
#include "cpu/math.h"

namespace ae {

// From an element in memory to the type it computes in: float, double, int64_t, int32_t or bool.
template <class T>
struct MemoryType {
  using Value = T;
};
template <>
struct MemoryType<bf16> {
  using Value = float;
};
template <>
struct MemoryType<f16> {
  using Value = float;
};
template <>
struct MemoryType<int16_t> {
  using Value = int32_t;
};
template <>
struct MemoryType<int8_t> {
  using Value = int32_t;
};
template <>
struct MemoryType<uint8_t> {
  using Value = int32_t;
};
template <class T>
using ValueOf = typename MemoryType<T>::Value;
// What lanes hold: a Mask for bools.
template <class T, int W>
using ValueVector = Vector<std::conditional_t<std::is_same_v<T, bool>, int32_t, ValueOf<T>>, W>;

// Elements as loaded (bit patterns for the 16-bit floats) to values; scalar or vector.
template <class T, class X>
AE_INLINE auto decode(X x) {
  if constexpr (std::is_same_v<T, bf16>) {
    return bits_as<float>(convert<uint32_t>(x) << 16);
  } else if constexpr (std::is_same_v<T, f16>) {
    return f16_to_float(x);
  } else if constexpr (std::is_same_v<T, bool>) {
    return to_bool(convert<int32_t>(x));
  } else {
    return convert<ValueOf<T>>(x);
  }
}

// The arithmetic type that stands for T in memory.
template <class T>
struct RawOf {
  using type = T;
};
template <>
struct RawOf<bf16> {
  using type = uint16_t;
};
template <>
struct RawOf<f16> {
  using type = uint16_t;
};
template <>
struct RawOf<bool> {
  using type = uint8_t;
};
template <class T>
using Raw = typename RawOf<T>::type;

template <class T>
AE_INLINE ValueOf<T> load_one(const void* data, int64_t offset) {
  return decode<T>(static_cast<const Raw<T>*>(data)[offset]);
}

// W consecutive elements.
template <class T, int W>
AE_INLINE auto load_run(const void* data, int64_t offset) {
  const Raw<T>* from = static_cast<const Raw<T>*>(data) + offset;
  if constexpr (kWide<Vector<Raw<T>, W>>) {
    return join(load_run<T, W / 2>(from, 0), load_run<T, W / 2>(from, W / 2));
  } else {
    Vector<Raw<T>, W> x;
    __builtin_memcpy(&x, from, sizeof(x));
    return decode<T>(x);
  }
}

}  // namespace ae
