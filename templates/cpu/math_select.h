// Comparisons, boolean logic and selection of the vocabulary (math.h). On AVX-512 the compiler
// turns a Mask that goes from a comparison into a select back into a mask register.
#pragma once
#include "cpu/math_core.h"

namespace ae {

#define AE_COMPARE(name, op)            \
  template <class A, class B>           \
  AE_INLINE auto name(A a, B b) {       \
    using V = Common<A, B>;             \
    V x = splat<V>(a), y = splat<V>(b); \
    if constexpr (Scalar<V>) {          \
      return x op y;                    \
    } else {                            \
      return to_mask(x op y);           \
    }                                   \
  }
AE_COMPARE(eq, ==)
AE_COMPARE(ne, !=)
AE_COMPARE(lt, <)
AE_COMPARE(le, <=)
AE_COMPARE(gt, >)
AE_COMPARE(ge, >=)
#undef AE_COMPARE

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
    using V = std::conditional_t<std::is_same_v<T, bool>, C,
                                 std::conditional_t<Vec<T>, T, Retype<C, ElemOf<T>>>>;
    return mask_for<V>(c) ? splat<V>(a) : splat<V>(b);
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

// The hardware minimum: b when either operand is NaN.
template <class V>
AE_INLINE V min_or_second(V a, V b) {
  return a < b ? a : b;
}
template <class V>
AE_INLINE V max_or_second(V a, V b) {
  return a > b ? a : b;
}

// Of floats, NaN when either operand is, as torch.
template <class A, class B>
AE_INLINE auto minimum(A a, B b) {
  using V = Common<A, B>;
  V x = splat<V>(a), y = splat<V>(b);
  V r = min_or_second(x, y);
  if constexpr (FloatLike<V>) r = x == x ? r : x;
  return r;
}
template <class A, class B>
AE_INLINE auto maximum(A a, B b) {
  using V = Common<A, B>;
  V x = splat<V>(a), y = splat<V>(b);
  V r = max_or_second(x, y);
  if constexpr (FloatLike<V>) r = x == x ? r : x;
  return r;
}

}  // namespace ae
