// Comparison, choice, arithmetic and bit operations of the vocabulary (math.h).
#pragma once
#include "cpu/math_convert.h"

namespace ae {

// Op on operands brought to type V: a Mask for vectors, a bool for scalars.
template <class Op, class V, class A, class B>
AE_INLINE BoolOf<V> compare(A a, B b) {
  if constexpr (Scalar<V>) {
    return Op::of(splat<V>(a), splat<V>(b));
  } else if constexpr (kWide<V>) {
    return join(compare<Op, HalfOf<V>>(lower_half(a), lower_half(b)),
                compare<Op, HalfOf<V>>(upper_half(a), upper_half(b)));
  } else {
    V x = splat<V>(a), y = splat<V>(b);
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<V, Vector<double, 8>>) {
      __mmask8 k = _mm512_cmp_pd_mask((__m512d)x, (__m512d)y, Op::kFloatPredicate);
      return (Vector<int32_t, 8>)_mm256_movm_epi32(k);
    } else if constexpr (std::is_same_v<V, Vector<int64_t, 8>>) {
      __mmask8 k = _mm512_cmp_epi64_mask((__m512i)x, (__m512i)y, Op::kIntPredicate);
      return (Vector<int32_t, 8>)_mm256_movm_epi32(k);
    }
#endif
    return convert<int32_t>(Op::of(x, y));
  }
}

// c ? a : b of type V, for a Mask, or for a bool with scalars.
template <class V, class C, class A, class B>
AE_INLINE V choose_as(C c, A a, B b) {
  if constexpr (Scalar<V>) {
    return c ? splat<V>(a) : splat<V>(b);
  } else if constexpr (kWide<V>) {
    return join(choose_as<HalfOf<V>>(lower_half(c), lower_half(a), lower_half(b)),
                choose_as<HalfOf<V>>(upper_half(c), upper_half(a), upper_half(b)));
  } else {
    V x = splat<V>(a), y = splat<V>(b);
#if defined(__AVX512F__)
    if constexpr (sizeof(V) == 64 && kLanes<V> == 8) {
      __mmask8 k = _mm256_movepi32_mask((__m256i)c);
      return (V)_mm512_mask_blend_epi64(k, (__m512i)y, (__m512i)x);
    }
#endif
    using Lane = std::conditional_t<sizeof(ElemOf<V>) == 8, int64_t, int32_t>;
    return convert<Lane>(c) ? x : y;
  }
}
template <class C, class V>
AE_INLINE V choose(C c, V x, V y) {
  return choose_as<V>(c, x, y);
}

// The predicates are those of the AVX-512 comparisons, the ordered ones that raise nothing for NaN.
#define AE_COMPARE(name, op, int_predicate, float_predicate)                               \
  struct name##_op {                                                                       \
    static constexpr int kIntPredicate = int_predicate, kFloatPredicate = float_predicate; \
    template <class V>                                                                     \
    static AE_INLINE auto of(V x, V y) {                                                   \
      return x op y;                                                                       \
    }                                                                                      \
  };                                                                                       \
  template <class A, class B>                                                              \
  AE_INLINE auto name(A a, B b) {                                                          \
    return compare<name##_op, Common<A, B>>(a, b);                                         \
  }
AE_COMPARE(eq, ==, 0, 0x0)
AE_COMPARE(ne, !=, 4, 0x4)
AE_COMPARE(lt, <, 1, 0x11)
AE_COMPARE(le, <=, 2, 0x12)
AE_COMPARE(gt, >, 6, 0x1e)
AE_COMPARE(ge, >=, 5, 0x1d)
#undef AE_COMPARE

template <class X>
AE_INLINE BoolOf<X> to_bool(X x) {
  return ne(x, X{});
}

// Integer arithmetic wraps, as in torch: it is done on the unsigned type.
template <class T>
struct WrapOf {
  using type = T;
};
template <class T>
  requires(std::is_integral_v<T> && !std::is_same_v<T, bool>)
struct WrapOf<T> {
  using type = std::make_unsigned_t<T>;
};
template <class T>
using Wrap = Retype<T, typename WrapOf<ElemOf<T>>::type>;

template <class V>
AE_INLINE Wrap<V> wrap(V x) {
  return convert<ElemOf<Wrap<V>>>(x);
}

#define AE_ARITHMETIC(name, op)                    \
  template <class A, class B>                      \
  AE_INLINE auto name(A a, B b) {                  \
    using V = Common<A, B>;                        \
    V x = splat<V>(a), y = splat<V>(b);            \
    return convert<ElemOf<V>>(wrap(x) op wrap(y)); \
  }
AE_ARITHMETIC(add, +)
AE_ARITHMETIC(sub, -)
AE_ARITHMETIC(mul, *)
#undef AE_ARITHMETIC

template <class A, class B>
AE_INLINE auto div(A a, B b) {
  using V = Common<A, B>;
  static_assert(FloatLike<V>, "integers divide with floor_div or trunc_div");
  return splat<V>(a) / splat<V>(b);
}

template <class X>
AE_INLINE X neg(X x) {
  if constexpr (FloatLike<X>) {
    return -x;
  } else {
    return convert<ElemOf<X>>(-wrap(x));
  }
}

template <class X>
AE_INLINE X abs(X x) {
  if constexpr (std::is_same_v<ElemOf<X>, float>) {
    return bits_as<float>(bits_as<int32_t>(x) & 0x7fffffff);
  } else if constexpr (std::is_same_v<ElemOf<X>, double>) {
    return bits_as<double>(bits_as<int64_t>(x) & 0x7fffffffffffffff);
  } else {
    return choose(lt(x, X{}), neg(x), x);
  }
}

#define AE_BITWISE(name, op)                           \
  template <class A, class B>                          \
  AE_INLINE auto name(A a, B b) {                      \
    using V = Common<A, B>;                            \
    return static_cast<V>(splat<V>(a) op splat<V>(b)); \
  }
AE_BITWISE(bit_and, &)
AE_BITWISE(bit_or, |)
AE_BITWISE(bit_xor, ^)
#undef AE_BITWISE

template <class X>
AE_INLINE X bit_not(X x) {
  if constexpr (std::is_same_v<X, bool>) {
    return !x;
  } else {
    return static_cast<X>(~x);
  }
}

// Shift counts outside [0, bits) give what torch gives: 0, or for shr of a negative number -1.
template <class A, class B>
AE_INLINE auto shl(A a, B b) {
  using V = Common<A, B>;
  constexpr int kBits = 8 * sizeof(ElemOf<V>);
  V x = splat<V>(a), n = splat<V>(b);
  V shifted = convert<ElemOf<V>>(wrap(x) << wrap(n & (kBits - 1)));
  return choose(eq(n & (kBits - 1), n), shifted, V{});
}
template <class A, class B>
AE_INLINE auto shr(A a, B b) {
  using V = Common<A, B>;
  constexpr int kBits = 8 * sizeof(ElemOf<V>);
  V x = splat<V>(a), n = splat<V>(b);
  return V(x >> choose(eq(n & (kBits - 1), n), n, splat<V>(kBits - 1)));
}

// Round to the nearest bfloat16, ties to even; the result stays float.
template <class X>
AE_INLINE X round_bf16(X x) {
  auto u = bits_as<uint32_t>(x);
  auto rounded = (u + 0x7fff + ((u >> 16) & 1)) & 0xffff0000u;
  return x == x ? bits_as<float>(rounded) : bits_as<float>(u | 0x400000u);
}

// Round to the nearest float16, ties to even; the result stays float.
template <class X>
AE_INLINE X round_f16(X x) {
  return f16_to_float(float_to_f16(x));
}

}  // namespace ae
