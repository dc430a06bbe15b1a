// Moving vectors between memory and registers: unaligned loads and stores of whole and partial
// vectors, and widening of stored elements to the accumulator type. Everything inlines to one or
// two instructions.
#pragma once
#include "cpu/math_convert.h"

namespace ae {

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

template <class V>
AE_INLINE V load_vector(const void* p) {
  typedef V U __attribute__((aligned(1), may_alias));
  return *static_cast<const U*>(p);
}
template <class V>
AE_INLINE void store_vector(void* p, V v) {
  typedef V U __attribute__((aligned(1), may_alias));
  *static_cast<U*>(p) = v;
}

// Nearest-even rounding; NaN stays NaN (quiet).
AE_INLINE bf16 bf16_from_float(float x) {
  uint32_t u = __builtin_bit_cast(uint32_t, x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return bf16{uint16_t((u >> 16) | 0x40)};
  return bf16{uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16)};
}

// One stored element as the accumulator type, and back.
template <class A, class E>
AE_INLINE A widen(E x) {
  if constexpr (__is_same(E, bf16)) {
    return A(__builtin_bit_cast(float, uint32_t(x.bits) << 16));
  } else if constexpr (__is_same(E, f16)) {
    return A(f16_to_float(x.bits));
  } else {
    return A(x);
  }
}
template <class E, class A>
AE_INLINE E narrow(A x) {
  if constexpr (__is_same(E, bf16)) {
    return bf16_from_float(float(x));
  } else if constexpr (__is_same(E, f16)) {
    return f16{float_to_f16(float(x))};
  } else {
    return E(x);
  }
}

// W consecutive elements as one accumulator vector, and back.
template <class A, class E>
AE_INLINE typename Lanes<A>::Acc load_widened(const E* p) {
  using L = Lanes<A>;
  if constexpr (__is_same(E, bf16)) {
    using H = Vector<uint16_t, L::W>;
    using U = Vector<uint32_t, L::W>;
    const U u = __builtin_convertvector(load_vector<H>(p), U) << 16;
    return __builtin_convertvector((typename L::F32)u, typename L::Acc);
  } else if constexpr (__is_same(E, f16)) {
    const auto half = load_vector<Vector<uint16_t, L::W>>(p);
    return __builtin_convertvector(f16_to_float(half), typename L::Acc);
  } else {
    return __builtin_convertvector(load_vector<Vector<E, L::W>>(p), typename L::Acc);
  }
}
template <class E, class A, class V>
AE_INLINE void store_narrowed(E* p, V x) {
  constexpr int W = Lanes<A>::W;
  if constexpr (__is_same(E, bf16)) {
    using U = Vector<uint32_t, W>;
    using H = Vector<uint16_t, W>;
#if defined(__AVX512BF16__)
    if constexpr (__is_same(V, Vector<float, 16>)) {
      // The instruction rounds the same way, but takes subnormals for zero.
      constexpr int kSubnormal = 0x20;
      if (_mm512_fpclass_ps_mask((__m512)x, kSubnormal) == 0) [[likely]] {
        store_vector(p, _mm512_cvtneps_pbh((__m512)x));
        return;
      }
    }
#endif
    const U u = (U) __builtin_convertvector(x, Vector<float, W>);
    const U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const U quiet = (u >> 16) | 0x40u;
    const U bits = (U)((u & 0x7fffffffu) > 0x7f800000u) ? quiet : rounded;
    store_vector(p, __builtin_convertvector(bits, H));
  } else if constexpr (__is_same(E, f16)) {
    store_vector(p, float_to_f16(__builtin_convertvector(x, Vector<float, W>)));
  } else {
    store_vector(p, __builtin_convertvector(x, Vector<E, W>));
  }
}

template <class A>
constexpr auto mask_element() {
  if constexpr (sizeof(A) == 8) {
    return int64_t{};
  } else {
    return int32_t{};
  }
}

// Lanes [0, n) of x, zero in the others.
template <class A>
AE_INLINE typename Lanes<A>::Acc first_lanes(typename Lanes<A>::Acc x, int n) {
  using L = Lanes<A>;
  using Bits = Vector<decltype(mask_element<A>()), L::W>;
  Bits lane{};
  for (int i = 0; i < L::W; ++i) lane[i] = i;
  return (typename L::Acc)((Bits)x & (lane < n));
}

}  // namespace ae
