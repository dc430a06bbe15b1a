// Elements of operands and captured tensors: how they lie in memory and what they compute as.
#pragma once
#include <cstdint>
#include <type_traits>

#define AE_DEVICE __device__ __forceinline__

namespace ae {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// ---- the 16-bit floats: exact to float, nearest even from it; NaN stays NaN ----
AE_DEVICE float bf16_to_float(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }
AE_DEVICE uint16_t float_to_bf16(float x) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
AE_DEVICE float f16_to_float(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
AE_DEVICE uint16_t float_to_f16(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

template <class Elem>
AE_DEVICE float to_float(Elem x) {
  static_assert(std::is_same_v<Elem, bf16> || std::is_same_v<Elem, f16>);
  if constexpr (std::is_same_v<Elem, bf16>) {
    return bf16_to_float(x.bits);
  } else {
    return f16_to_float(x.bits);
  }
}
template <class Elem>
AE_DEVICE Elem from_float(float x) {
  static_assert(std::is_same_v<Elem, bf16> || std::is_same_v<Elem, f16>);
  if constexpr (std::is_same_v<Elem, bf16>) {
    return {float_to_bf16(x)};
  } else {
    return {float_to_f16(x)};
  }
}

// ---- elements of any type, through the read-only cache ----
template <class T>
AE_DEVICE auto load_element(const void* data, int64_t offset) {
  if constexpr (std::is_same_v<T, bf16>) {
    return bf16_to_float(__ldg(static_cast<const uint16_t*>(data) + offset));
  } else if constexpr (std::is_same_v<T, f16>) {
    return f16_to_float(__ldg(static_cast<const uint16_t*>(data) + offset));
  } else if constexpr (std::is_same_v<T, bool>) {
    return __ldg(static_cast<const uint8_t*>(data) + offset) != 0;
  } else if constexpr (std::is_same_v<T, int64_t>) {  // CUDA's 64-bit loads are of long long
    return int64_t(__ldg(static_cast<const long long*>(data) + offset));
  } else if constexpr (sizeof(T) < 4) {
    return int32_t(__ldg(static_cast<const T*>(data) + offset));
  } else {
    return __ldg(static_cast<const T*>(data) + offset);
  }
}
// float, double, int64_t, int32_t or bool: what an element computes as.
template <class T>
using ValueOf = decltype(load_element<T>(nullptr, 0));

}  // namespace ae
