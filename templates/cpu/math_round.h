// Rounding to integers, and square roots: one instruction where the ISA has it.
#pragma once
#include "cpu/math_select.h"

namespace ae {

enum RoundMode { kNearestEven = 0, kFloor = 1, kCeil = 2, kTrunc = 3 };  // encoding of roundps

template <RoundMode kMode, Vec V>
AE_INLINE V round_to(V x) {
  using T = ElemOf<V>;
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64 && sizeof(T) == 4) {
    return (V)_mm512_roundscale_ps((__m512)x, kMode | _MM_FROUND_NO_EXC);
  } else if constexpr (sizeof(V) == 64) {
    return (V)_mm512_roundscale_pd((__m512d)x, kMode | _MM_FROUND_NO_EXC);
  }
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32 && sizeof(T) == 4) {
    return (V)_mm256_round_ps((__m256)x, kMode | _MM_FROUND_NO_EXC);
  } else if constexpr (sizeof(V) == 32) {
    return (V)_mm256_round_pd((__m256d)x, kMode | _MM_FROUND_NO_EXC);
  }
#endif
#if defined(__SSE4_1__)
  if constexpr (sizeof(V) == 16 && sizeof(T) == 4) {
    return (V)_mm_round_ps((__m128)x, kMode | _MM_FROUND_NO_EXC);
  } else if constexpr (sizeof(V) == 16) {
    return (V)_mm_round_pd((__m128d)x, kMode | _MM_FROUND_NO_EXC);
  }
#endif
  if constexpr (kWide<V>)
    return join(round_to<kMode>(lower_half(x)), round_to<kMode>(upper_half(x)));
  // Adding 2^23 (2^52) leaves no bits for a fraction; larger numbers are integers already.
  using Int = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  constexpr T kBig = sizeof(T) == 8 ? T(4503599627370496.0) : T(8388608.0);
  V magnitude = abs(x);
  V near = (magnitude + kBig) - kBig;
  V r = near;
  auto sign_bits = bits_as<Int>(x) ^ bits_as<Int>(magnitude);
  if constexpr (kMode == kTrunc) {
    r = choose(gt(near, magnitude), near - T(1), near);
  } else if constexpr (kMode != kNearestEven) {
    near = bits_as<T>(bits_as<Int>(near) | sign_bits);
    if constexpr (kMode == kFloor) {
      r = choose(gt(near, x), near - T(1), near);
    } else {
      r = choose(lt(near, x), near + T(1), near);
    }
    r = abs(r);
  }
  r = bits_as<T>(bits_as<Int>(r) | sign_bits);
  return choose(lt(magnitude, kBig), r, x);
}

#define AE_ROUNDING(name, mode, libm)                \
  template <class X>                                 \
  AE_INLINE X name(X x) {                            \
    if constexpr (IntLike<X>) {                      \
      return x;                                      \
    } else if constexpr (std::is_same_v<X, float>) { \
      return __builtin_##libm##f(x);                 \
    } else if constexpr (Scalar<X>) {                \
      return __builtin_##libm(x);                    \
    } else {                                         \
      return round_to<mode>(x);                      \
    }                                                \
  }
AE_ROUNDING(floor, kFloor, floor)
AE_ROUNDING(ceil, kCeil, ceil)
AE_ROUNDING(trunc, kTrunc, trunc)
AE_ROUNDING(round_even, kNearestEven, nearbyint)
#undef AE_ROUNDING

template <class X>
AE_INLINE X sqrt(X x) {
  if constexpr (std::is_same_v<X, float>) {
    return __builtin_sqrtf(x);
  } else if constexpr (Scalar<X>) {
    return __builtin_sqrt(x);
  } else {
#if defined(__AVX512F__)
    if constexpr (sizeof(X) == 64 && sizeof(ElemOf<X>) == 4) return (X)_mm512_sqrt_ps((__m512)x);
    if constexpr (sizeof(X) == 64 && sizeof(ElemOf<X>) == 8) return (X)_mm512_sqrt_pd((__m512d)x);
#endif
#if defined(__AVX2__)
    if constexpr (sizeof(X) == 32 && sizeof(ElemOf<X>) == 4) return (X)_mm256_sqrt_ps((__m256)x);
    if constexpr (sizeof(X) == 32 && sizeof(ElemOf<X>) == 8) return (X)_mm256_sqrt_pd((__m256d)x);
#endif
    X y = x;
    for (int i = 0; i < kLanes<X>; ++i) y[i] = sqrt(x[i]);
    return y;
  }
}

template <class X>
AE_INLINE X reciprocal(X x) {
  return splat<X>(1) / x;
}
template <class X>
AE_INLINE X rsqrt(X x) {
  return splat<X>(1) / sqrt(x);
}

}  // namespace ae
