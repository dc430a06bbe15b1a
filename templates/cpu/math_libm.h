// Functions of the vocabulary (math.h) that have no vector code here: one call of the C library per
// lane. Scalars call it directly.
#pragma once
#include "cpu/math_core.h"

namespace ae {

// Not inlined: one loop per function and type, however often generated code calls it.
template <class F, class T>
__attribute__((noinline)) void call_lanes(T* x, int n) {
  for (int i = 0; i < n; ++i) x[i] = F::of(x[i]);
}
template <class F, class T>
__attribute__((noinline)) void call_lanes(T* x, const T* y, int n) {
  for (int i = 0; i < n; ++i) x[i] = F::of(x[i], y[i]);
}

template <class F, class X>
AE_INLINE X map_lanes(X x) {
  if constexpr (Scalar<X>) {
    return F::of(x);
  } else {
    alignas(X) ElemOf<X> lanes[kLanes<X>];
    __builtin_memcpy(lanes, &x, sizeof(X));
    call_lanes<F>(lanes, kLanes<X>);
    __builtin_memcpy(&x, lanes, sizeof(X));
    return x;
  }
}
template <class F, class X>
AE_INLINE X map_lanes(X x, X y) {
  if constexpr (Scalar<X>) {
    return F::of(x, y);
  } else {
    alignas(X) ElemOf<X> lanes[kLanes<X>], other[kLanes<X>];
    __builtin_memcpy(lanes, &x, sizeof(X));
    __builtin_memcpy(other, &y, sizeof(X));
    call_lanes<F>(lanes, other, kLanes<X>);
    __builtin_memcpy(&x, lanes, sizeof(X));
    return x;
  }
}

#define AE_LIBM_FUNCTOR(name)                                             \
  struct name##_libm {                                                    \
    static AE_INLINE float of(float x) { return __builtin_##name##f(x); } \
    static AE_INLINE double of(double x) { return __builtin_##name(x); }  \
  };
#define AE_LIBM_UNARY(name)           \
  AE_LIBM_FUNCTOR(name)               \
  template <class X>                  \
  AE_INLINE X name(X x) {             \
    return map_lanes<name##_libm>(x); \
  }
AE_LIBM_UNARY(log2)
AE_LIBM_UNARY(log10)
AE_LIBM_UNARY(sin)
AE_LIBM_UNARY(cos)
AE_LIBM_UNARY(tan)
AE_LIBM_UNARY(asin)
AE_LIBM_UNARY(acos)
AE_LIBM_UNARY(atan)
AE_LIBM_UNARY(sinh)
AE_LIBM_UNARY(cosh)
AE_LIBM_UNARY(asinh)
AE_LIBM_UNARY(acosh)
AE_LIBM_UNARY(atanh)
AE_LIBM_UNARY(erf)
AE_LIBM_UNARY(erfc)
AE_LIBM_FUNCTOR(exp)
AE_LIBM_FUNCTOR(exp2)
AE_LIBM_FUNCTOR(expm1)
AE_LIBM_FUNCTOR(log)
AE_LIBM_FUNCTOR(log1p)
AE_LIBM_FUNCTOR(tanh)
#undef AE_LIBM_UNARY
#undef AE_LIBM_FUNCTOR

// The reentrant form: plain lgamma writes the global signgam.
struct lgamma_libm {
  static AE_INLINE float of(float x) {
    int sign;
    return __builtin_lgammaf_r(x, &sign);
  }
  static AE_INLINE double of(double x) {
    int sign;
    return __builtin_lgamma_r(x, &sign);
  }
};
template <class X>
AE_INLINE X lgamma(X x) {
  return map_lanes<lgamma_libm>(x);
}

#define AE_LIBM_BINARY(name)                                                          \
  struct name##_libm {                                                                \
    static AE_INLINE float of(float x, float y) { return __builtin_##name##f(x, y); } \
    static AE_INLINE double of(double x, double y) { return __builtin_##name(x, y); } \
  };                                                                                  \
  template <class A, class B>                                                         \
  AE_INLINE auto name(A a, B b) {                                                     \
    using V = Common<A, B>;                                                           \
    return map_lanes<name##_libm>(splat<V>(a), splat<V>(b));                          \
  }
AE_LIBM_BINARY(pow)
AE_LIBM_BINARY(atan2)
AE_LIBM_BINARY(hypot)
#undef AE_LIBM_BINARY

template <class A, class B>
AE_INLINE auto copysign(A a, B b) {
  using V = Common<A, B>;
  using Int = std::conditional_t<sizeof(ElemOf<V>) == 8, uint64_t, uint32_t>;
  constexpr Int kSign = Int{1} << (8 * sizeof(Int) - 1);
  auto x = bits_as<Int>(splat<V>(a)), y = bits_as<Int>(splat<V>(b));
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) {  // one operation: y where the mask has ones, else x
    __m512i mask = (__m512i)splat<decltype(x)>(kSign);
    return (V)_mm512_ternarylogic_epi64(mask, (__m512i)y, (__m512i)x, 0xca);
  }
#endif
  return bits_as<ElemOf<V>>((x & ~kSign) | (y & kSign));
}

}  // namespace ae
