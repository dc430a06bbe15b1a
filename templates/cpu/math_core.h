// Types and conversions of the vocabulary (math.h), and its arithmetic and bit operations.
#pragma once
#include <cstdint>
#include <type_traits>

#include "cpu/lanes.h"

#if defined(__SSE4_1__)
#include <immintrin.h>
#endif

// Vectors wider than a register are passed in memory; every function here is inlined, so the
// calling convention that GCC warns about is never used.
#pragma GCC diagnostic ignored "-Wpsabi"

#define AE_INLINE inline __attribute__((always_inline))

namespace ae {

template <class T>
concept Scalar = std::is_arithmetic_v<T>;

template <class T>
concept Vec = !Scalar<T> && requires(T& v) {
  v[0];
  v + v;
};

template <class T>
struct LaneTraits {
  using Elem = T;
  static constexpr int W = 1;
};
template <Vec T>
struct LaneTraits<T> {
  using Elem = std::remove_reference_t<decltype(std::declval<T&>()[0])>;
  static constexpr int W = sizeof(T) / sizeof(Elem);
};
template <class T>
using ElemOf = typename LaneTraits<T>::Elem;
template <class T>
constexpr int kLanes = LaneTraits<T>::W;

// The type with the lanes of V and the element type T: T itself for a scalar V.
template <class V, class T>
struct RetypeOf {
  using type = T;
};
template <Vec V, class T>
struct RetypeOf<V, T> {
  using type = Vector<T, kLanes<V>>;
};
template <class V, class T>
using Retype = typename RetypeOf<V, T>::type;

// The type that operands A and B are brought to: the first vector among them, else C++'s own rule.
template <class A, class B>
struct CommonOf {
  using type = std::conditional_t<Vec<A>, A, B>;
};
template <Scalar A, Scalar B>
struct CommonOf<A, B> {
  using type = std::common_type_t<A, B>;
};
template <class A, class B>
using Common = typename CommonOf<A, B>::type;

template <class T>
concept FloatLike = std::is_floating_point_v<ElemOf<T>>;
template <class T>
concept IntLike = std::is_integral_v<ElemOf<T>>;
template <class T>
using BoolOf = Retype<T, std::conditional_t<Vec<T>, int32_t, bool>>;  // bool or the Mask of T

template <class V, class X>
AE_INLINE V splat(X x) {
  if constexpr (std::is_same_v<V, X>) {
    return x;
  } else if constexpr (Scalar<V>) {
    return static_cast<V>(x);
  } else if constexpr (std::is_same_v<X, bool>) {
    return static_cast<ElemOf<V>>(-static_cast<int>(x)) - V{};
  } else {
    return static_cast<ElemOf<V>>(x) - V{};  // x - 0 is x, also for -0 and NaN
  }
}

template <class T, class X>
AE_INLINE Retype<X, T> convert(X x) {
  if constexpr (std::is_same_v<ElemOf<X>, T>) {
    return x;
  } else if constexpr (Scalar<X>) {
    return static_cast<T>(x);
  } else {
    return __builtin_convertvector(x, Retype<X, T>);
  }
}

// Same bits, other element type of the same size.
template <class T, class X>
AE_INLINE Retype<X, T> bits_as(X x) {
  static_assert(sizeof(T) == sizeof(ElemOf<X>));
  return __builtin_bit_cast(Retype<X, T>, x);
}

template <class X>
AE_INLINE auto to_f32(X x) {
  return convert<float>(x);
}
template <class X>
AE_INLINE auto to_f64(X x) {
  return convert<double>(x);
}
template <class X>
AE_INLINE auto to_i32(X x) {
  return convert<int32_t>(x);
}
template <class X>
AE_INLINE auto to_i64(X x) {
  return convert<int64_t>(x);
}

// Narrows the result of a vector comparison (as wide as its operands) to a Mask, and back.
template <Vec M>
AE_INLINE auto to_mask(M m) {
  return convert<int32_t>(m);
}
template <Vec V, Vec M>
AE_INLINE auto mask_for(M m) {
  using Int = std::conditional_t<sizeof(ElemOf<V>) == 8, int64_t, int32_t>;
  return convert<Int>(m);
}

template <class X>
AE_INLINE BoolOf<X> to_bool(X x) {
  if constexpr (Scalar<X>) {
    return x != 0;
  } else {
    return to_mask(x != X{});
  }
}

template <class X>
AE_INLINE auto mask_to_i32(X m) {
  if constexpr (Scalar<X>) {
    return static_cast<int32_t>(m);
  } else {
    return m & 1;
  }
}
template <class X>
AE_INLINE auto mask_to_i64(X m) {
  return convert<int64_t>(mask_to_i32(m));
}
template <class X>
AE_INLINE auto mask_to_f32(X m) {
  if constexpr (Scalar<X>) {
    return static_cast<float>(m);
  } else {
    return bits_as<float>(m & 0x3f800000);  // the bits of 1.0f
  }
}
template <class X>
AE_INLINE auto mask_to_f64(X m) {
  return convert<double>(mask_to_f32(m));
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
    return x < 0 ? neg(x) : x;
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
  Wrap<V> u = wrap(n);
  return convert<ElemOf<V>>(u < kBits ? wrap(x) << (u & (kBits - 1)) : Wrap<V>{});
}
template <class A, class B>
AE_INLINE auto shr(A a, B b) {
  using V = Common<A, B>;
  constexpr int kBits = 8 * sizeof(ElemOf<V>);
  V x = splat<V>(a);
  Wrap<V> u = wrap(splat<V>(b));
  return x >> convert<ElemOf<V>>(u < kBits ? u : splat<Wrap<V>>(kBits - 1));
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
#if defined(__AVX512F__)
  if constexpr (sizeof(X) == 64) {
    return (X)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
  }
#endif
#if defined(__F16C__)
  if constexpr (sizeof(X) == 32) {
    return (X)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
  }
#endif
  // Adding and subtracting 2^13 times the unit in the last place rounds away the 13 bits that
  // float16 lacks. Below its smallest normal 2^-14 the spacing is constant, 2^-24.
  auto u = bits_as<uint32_t>(x);
  auto sign = u & 0x80000000u;
  auto magnitude = u & 0x7fffffffu;
  auto normal = (magnitude + 0xfff + ((magnitude >> 13) & 1)) & 0xffffe000u;
  auto tiny = bits_as<uint32_t>((bits_as<float>(magnitude) + 0.5f) - 0.5f);
  auto zero = Retype<X, uint32_t>{};
  auto finite = magnitude < 0x38800000u ? tiny : normal;               // 2^-14
  auto bounded = finite >= 0x47800000u ? zero + 0x7f800000u : finite;  // 65536 and above
  return bits_as<float>(sign | (magnitude > 0x7f800000u ? magnitude : bounded));
}

}  // namespace ae
