// Comparisons, boolean logic and selection of the vocabulary (math.h). On AVX-512 the compiler
// turns a Mask that goes from a comparison into a select back into a mask register.
#pragma once
#include "cpu/math_core.h"

namespace ae {

#define AE_LOGICAL(name, op)                           \
  template <class A, class B>                          \
  AE_INLINE auto name(A a, B b) {                      \
    using V = Common<A, B>;                            \
    return static_cast<V>(splat<V>(a) op splat<V>(b)); \
  }
AE_LOGICAL(logical_and, &)
AE_LOGICAL(logical_or, |)
AE_LOGICAL(logical_xor, ^)
#undef AE_LOGICAL

template <class X>
AE_INLINE X logical_not(X x) {
  if constexpr (Scalar<X>) {
    return !x;
  } else {
    return ~x;
  }
}

// c ? a : b lane by lane. With scalar a and b a Mask c still gives a vector (a Mask for bools).
template <class C, class A, class B>
AE_INLINE auto select(C c, A a, B b) {
  using T = Common<A, B>;
  if constexpr (Scalar<C>) {
    return c ? splat<T>(a) : splat<T>(b);
  } else {
    using Elem = std::conditional_t<std::is_same_v<T, bool>, int32_t, ElemOf<T>>;
    using V = Retype<C, Elem>;
    return choose_as<V>(c, a, b);
  }
}

template <class X>
AE_INLINE auto isnan(X x) {
  return ne(x, x);
}
template <class X>
AE_INLINE auto isinf(X x) {
  return eq(abs(x), static_cast<ElemOf<X>>(__builtin_inf()));
}

// -1, 0 or 1; 0 for NaN, as torch.
template <class X>
AE_INLINE X sign(X x) {
  return sub(select(gt(x, 0), splat<X>(1), X{}), select(lt(x, 0), splat<X>(1), X{}));
}

// The hardware's minimum and maximum: b when either operand is NaN.
#define AE_EXTREMUM(name, op, intrinsic)       \
  template <class V>                           \
  AE_INLINE V name(V a, V b) {                 \
    AE_EXTREMUM_512(intrinsic)                 \
    AE_EXTREMUM_256(intrinsic)                 \
    return choose(compare<op, V>(a, b), a, b); \
  }
#if defined(__AVX512F__)
#define AE_EXTREMUM_512(intrinsic)                             \
  if constexpr (std::is_same_v<V, Vector<float, 16>>) {        \
    return (V)_mm512_##intrinsic##_ps((__m512)a, (__m512)b);   \
  } else if constexpr (std::is_same_v<V, Vector<double, 8>>) { \
    return (V)_mm512_##intrinsic##_pd((__m512d)a, (__m512d)b); \
  }
#else
#define AE_EXTREMUM_512(intrinsic)
#endif
#if defined(__AVX2__)
#define AE_EXTREMUM_256(intrinsic)                             \
  if constexpr (std::is_same_v<V, Vector<float, 8>>) {         \
    return (V)_mm256_##intrinsic##_ps((__m256)a, (__m256)b);   \
  } else if constexpr (std::is_same_v<V, Vector<double, 4>>) { \
    return (V)_mm256_##intrinsic##_pd((__m256d)a, (__m256d)b); \
  } else if constexpr (std::is_same_v<V, Vector<float, 4>>) {  \
    return (V)_mm_##intrinsic##_ps((__m128)a, (__m128)b);      \
  }
#else
#define AE_EXTREMUM_256(intrinsic)
#endif
AE_EXTREMUM(min_or_second, lt_op, min)
AE_EXTREMUM(max_or_second, gt_op, max)
#undef AE_EXTREMUM
#undef AE_EXTREMUM_512
#undef AE_EXTREMUM_256

// Of floats, NaN when either operand is, as torch.
template <class A, class B>
AE_INLINE auto minimum(A a, B b) {
  using V = Common<A, B>;
  V x = splat<V>(a), y = splat<V>(b);
  V r = min_or_second(x, y);
  if constexpr (FloatLike<V>) r = choose(eq(x, x), r, x);
  return r;
}
template <class A, class B>
AE_INLINE auto maximum(A a, B b) {
  using V = Common<A, B>;
  V x = splat<V>(a), y = splat<V>(b);
  V r = max_or_second(x, y);
  if constexpr (FloatLike<V>) r = choose(eq(x, x), r, x);
  return r;
}

}  // namespace ae
