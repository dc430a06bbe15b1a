// exp, exp2, expm1, log, log1p, tanh and sigmoid. Float vectors have code of their own here, float
// scalars use it too (four lanes), doubles call the C library. Polynomials are minimax fits of the
// relative error, the short ones refined for the rounding of their own steps;
// tests/cpp/math_test.cpp states and checks the bounds in units in the last place (ulp).
#pragma once
#include "cpu/math_libm.h"
#include "cpu/math_round.h"

namespace ae {

// x limited to [lo, hi]; NaN passes.
template <Vec V>
AE_INLINE V clamp_keep_nan(V x, float lo, float hi) {
  return max_or_second(splat<V>(lo), min_or_second(splat<V>(hi), x));
}

// p * 2^n for an integer-valued n in [-252, 254], rounded once. AVX-512 takes any n.
template <Vec V>
AE_INLINE V scale_by_exp2(V p, V n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return (V)_mm512_scalef_ps((__m512)p, (__m512)n);
#endif
#if defined(__AVX512VL__)
  if constexpr (sizeof(V) == 32) return (V)_mm256_scalef_ps((__m256)p, (__m256)n);
  if constexpr (sizeof(V) == 16) return (V)_mm_scalef_ps((__m128)p, (__m128)n);
#endif
  auto e = to_i32(n);
  auto half = e >> 1;  // two factors, so that neither leaves the normal range
  return p * bits_as<float>((half + 127) << 23) * bits_as<float>((e - half + 127) << 23);
}

// 1/d within 1 ulp for d from 1 to 2^64; NaN passes.
template <Vec V>
AE_INLINE V fast_reciprocal(V d) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) {
    V r = (V)_mm512_rcp14_ps((__m512)d);
    return r + r * (1.0f - d * r);
  }
#endif
  return 1.0f / d;
}

#if defined(__FMA__)
constexpr bool kHasFma = true;
#else
constexpr bool kHasFma =
    false;  // every step rounds twice, so the shorter polynomials are too coarse
#endif

// exp(x) for x in [-104, 89]; NaN passes. The polynomial alone is within 1.5 half-ulps for kShort,
// within 0.04 otherwise.
template <bool kShort = kHasFma, Vec V>
AE_INLINE V exp_in_range(V x) {
  V n = round_to<kNearestEven>(x * 1.44269504f);
  V r = x - n * 0.693359375f;  // ln 2 in two parts; n times the first is exact
  r = r + n * 2.12194440e-4f;
  V p;
  if constexpr (kShort) {
    p = 0.008289670572f * r + 0.04189969972f;
    p = p * r + 0.166677326f;
    p = p * r + 0.4999913573f;
    p = p * r + 0.9999996424f;
  } else {
    p = 0.001384364441037178f * r + 0.008374162949621677f;
    p = p * r + 0.04166800156235695f;
    p = p * r + 0.16666431725025177f;
    p = p * r + 0.4999999403953552f;
    p = p * r + 1.0f;
  }
  p = p * r + 1.0f;
  return scale_by_exp2(p, n);
}

// x = n ln 2 + r and p = expm1(r).
template <class V>
struct ReducedExpm1 {
  V n, p;
  AE_INLINE explicit ReducedExpm1(V x) {
    n = round_to<kNearestEven>(x * 1.44269504f);
    V r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    p = 0.0013882521307095885f * r + 0.008366520516574383f;
    p = p * r + 0.04166720062494278f;
    p = p * r + 0.1666654348373413f;
    p = p * r + 0.4999999701976776f;
    p = p * (r * r) + r;
  }
};

struct exp_vector {
  template <class V>
  static AE_INLINE V of(V x) {
    return exp_in_range(clamp_keep_nan(x, -104.0f, 89.0f));  // beyond these: 0 and infinity
  }
};

struct exp2_vector {
  template <class V>
  static AE_INLINE V of(V x) {
    x = clamp_keep_nan(x, -151.0f, 129.0f);
    V n = round_to<kNearestEven>(x);
    V r = x - n;
    V p;
    if constexpr (kHasFma) {
      p = 0.0013264724984765053f * r + 0.009671313688158989f;
      p = p * r + 0.05550740286707878f;
      p = p * r + 0.24022242426872253f;
      p = p * r + 0.6931469440460205f;
    } else {
      p = 0.00015353360504377633f * r + 0.001339887734502554f;
      p = p * r + 0.00961843691766262f;
      p = p * r + 0.055503323674201965f;
      p = p * r + 0.24022647738456726f;
      p = p * r + 0.6931471824645996f;
    }
    p = p * r + 1.0f;
    return scale_by_exp2(p, n);
  }
};

// 2^n expm1(r) + 2^n - 1 = 2^n (expm1(r) + (1 - 2^-n)), where the inner difference loses nothing.
struct expm1_vector {
  template <class V>
  static AE_INLINE V of(V x) {
    ReducedExpm1<V> e(clamp_keep_nan(x, -18.0f, 89.0f));  // beyond these: -1 and infinity
    return scale_by_exp2(e.p + (1.0f - scale_by_exp2(splat<V>(1.0f), -e.n)), e.n);
  }
};

// 1 / (1 + exp(-x)) with e = exp(-|x|): 1/(1+e) for positive x, e/(1+e) for negative.
struct sigmoid_vector {
  template <class V>
  static AE_INLINE V of(V x) {
    V e = exp_in_range<false>(max_or_second(splat<V>(-104.0f), -abs(x)));
    V r = fast_reciprocal(1.0f + e);
    return bits_as<int32_t>(x) < 0 ? e * r : r;
  }
};

// tanh |x| = m / (2 - m) with m = 1 - exp(-2|x|). (A rational function would be a few operations
// shorter, but near 1 the rounding of its terms costs 5 ulp.)
struct tanh_vector {
  template <class V>
  static AE_INLINE V of(V x) {
    V y = abs(x);
    y = max_or_second(splat<V>(-18.0f), -(y + y));  // beyond: 1
    ReducedExpm1<V> e(y);
    V power = scale_by_exp2(splat<V>(1.0f), e.n);
    V m = (1.0f - power) - power * e.p;
    return copysign(m * fast_reciprocal(2.0f - m), x);
  }
};

struct log_vector {
  template <class V>
  static AE_INLINE V of(V x) {
    // x = m 2^e with m in [sqrt(1/2), sqrt(2)); numbers below 2^-126 are scaled up first
    V scaled = x < 1.17549435e-38f ? x * 8388608.0f : x;
    auto bits = bits_as<int32_t>(scaled);
    auto exponent = (bits - 0x3f3504f3) >> 23;  // the bits of sqrt(1/2), up to the exponent
    V e = to_f32(x < 1.17549435e-38f ? exponent - 23 : exponent);
    V f = bits_as<float>(bits - (exponent << 23)) - 1.0f;
    V p = 7.0376836292e-2f * f - 1.1514610310e-1f;  // Cephes logf
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    V square = f * f;
    V y = p * (f * square) - e * 2.12194440e-4f - 0.5f * square;
    y = (f + y) + e * 0.693359375f;
    V special = x == 0 ? splat<V>(-__builtin_inff()) : splat<V>(__builtin_nanf(""));
    y = x > 0 ? y : special;
    return x == __builtin_inff() ? x : y;
  }
};

// log(u) and what rounding 1 + x to u lost, as the first term of its series.
struct log1p_vector {
  template <class V>
  static AE_INLINE V of(V x) {
    const V u = 1.0f + x;
    const V lost = ((u - 1.0f) - x) * fast_reciprocal(u);
    const V y = log_vector::of(u);
    return abs(lost) < 1.0f ? y - lost : y;  // not at -1, nor at infinity
  }
};

struct sigmoid_libm {
  static AE_INLINE double of(double x) { return 1.0 / (1.0 + __builtin_exp(-x)); }
};

#define AE_EXP_FAMILY(name)                                    \
  template <class X>                                           \
  AE_INLINE X name(X x) {                                      \
    if constexpr (std::is_same_v<X, float>) {                  \
      return name##_vector::of(splat<Vector<float, 4>>(x))[0]; \
    } else if constexpr (std::is_same_v<ElemOf<X>, float>) {   \
      return name##_vector::of(x);                             \
    } else {                                                   \
      return map_lanes<name##_libm>(x);                        \
    }                                                          \
  }
AE_EXP_FAMILY(exp)
AE_EXP_FAMILY(exp2)
AE_EXP_FAMILY(expm1)
AE_EXP_FAMILY(log)
AE_EXP_FAMILY(log1p)
AE_EXP_FAMILY(tanh)
AE_EXP_FAMILY(sigmoid)
#undef AE_EXP_FAMILY

// exp(x * scale - m) for weights that are rounded to 16 bits: one rounding of the exponent instead
// of three, in base 2. What does not change over a row is computed once per row.
template <Vec V>
AE_INLINE V exp_scaled_minus(V x, float scale, float m) {
  const float slope = scale * 1.44269504f;
  return exp2(x * slope - m * 1.44269504f);
}

// sigmoid(x * scale - m) for the same weights: with 14 bits of the quotient.
template <Vec V>
AE_INLINE V sigmoid_scaled_minus(V x, float scale, float m) {
  const float slope = scale * 1.44269504f;
  const V d = 1.0f + exp2(m * 1.44269504f - x * slope);
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return (V)_mm512_rcp14_ps((__m512)d);
#endif
  return 1.0f / d;
}

}  // namespace ae
