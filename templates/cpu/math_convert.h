// Operand types of the vocabulary (math.h), broadcasts and conversions.
#pragma once
#include <cstdint>
#include <type_traits>
#include <utility>

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

// Comparing, selecting and converting vectors that are wider than a register goes by halves: left
// to the compiler it would go lane by lane.
template <class V>
constexpr bool kWide = sizeof(V) > kRegisterBytes;

template <int kFirst, Vec V, int... I>
AE_INLINE auto some_lanes(V v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, (kFirst + I)...);
}
template <bool kUpper, Vec V>
AE_INLINE auto half_of(V v) {
  constexpr int kHalf = kLanes<V> / 2;
  if constexpr (kWide<V>) {  // such a vector lives in memory
    Vector<ElemOf<V>, kHalf> half;
    __builtin_memcpy(&half, reinterpret_cast<const char*>(&v) + kUpper * sizeof(half),
                     sizeof(half));
    return half;
  } else {
    return some_lanes<kUpper * kHalf>(v, std::make_integer_sequence<int, kHalf>());
  }
}
// Both halves of a scalar are the scalar: it is broadcast later.
template <class X>
AE_INLINE auto lower_half(X x) {
  if constexpr (Scalar<X>) {
    return x;
  } else {
    return half_of<false>(x);
  }
}
template <class X>
AE_INLINE auto upper_half(X x) {
  if constexpr (Scalar<X>) {
    return x;
  } else {
    return half_of<true>(x);
  }
}

template <Vec H, int... I>
AE_INLINE auto join_lanes(H lower, H upper, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(lower, upper, I...);
}
template <Vec H>
AE_INLINE auto join(H lower, H upper) {
  using V = Vector<ElemOf<H>, 2 * kLanes<H>>;
  if constexpr (kWide<V>) {
    V v;
    __builtin_memcpy(&v, &lower, sizeof(H));
    __builtin_memcpy(reinterpret_cast<char*>(&v) + sizeof(H), &upper, sizeof(H));
    return v;
  } else {
    return join_lanes(lower, upper, std::make_integer_sequence<int, kLanes<V>>());
  }
}
template <class V>
using HalfOf = Vector<ElemOf<V>, kLanes<V> / 2>;

// The conversions between lanes of different sizes that the compiler would do in several steps.
#define AE_CONVERSION(From, To, W, intrinsic, Register)         \
  AE_INLINE Vector<To, W> resize_lanes(Vector<From, W> x, To) { \
    return (Vector<To, W>)intrinsic((Register)x);               \
  }
template <class V, class T>
void resize_lanes(V, T) = delete;
#if defined(__AVX512F__)
AE_CONVERSION(int32_t, double, 8, _mm512_cvtepi32_pd, __m256i)
AE_CONVERSION(float, double, 8, _mm512_cvtps_pd, __m256)
AE_CONVERSION(int32_t, int64_t, 8, _mm512_cvtepi32_epi64, __m256i)
AE_CONVERSION(int64_t, int32_t, 8, _mm512_cvtepi64_epi32, __m512i)
AE_CONVERSION(uint16_t, uint32_t, 16, _mm512_cvtepu16_epi32, __m256i)
AE_CONVERSION(int16_t, int32_t, 16, _mm512_cvtepi16_epi32, __m256i)
#endif
#if defined(__AVX2__)
AE_CONVERSION(int32_t, double, 4, _mm256_cvtepi32_pd, __m128i)
AE_CONVERSION(float, double, 4, _mm256_cvtps_pd, __m128)
AE_CONVERSION(int32_t, int64_t, 4, _mm256_cvtepi32_epi64, __m128i)
AE_CONVERSION(uint16_t, uint32_t, 8, _mm256_cvtepu16_epi32, __m128i)
AE_CONVERSION(int16_t, int32_t, 8, _mm256_cvtepi16_epi32, __m128i)
AE_INLINE Vector<int32_t, 4> resize_lanes(Vector<int64_t, 4> x, int32_t) {
  const __m256i low_words = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
  return (Vector<int32_t, 4>)_mm256_castsi256_si128(
      _mm256_permutevar8x32_epi32((__m256i)x, low_words));
}
#endif
#undef AE_CONVERSION

template <class T, class X>
AE_INLINE Retype<X, T> convert(X x) {
  if constexpr (std::is_same_v<ElemOf<X>, T>) {
    return x;
  } else if constexpr (Scalar<X>) {
    return static_cast<T>(x);
  } else if constexpr (sizeof(T) != sizeof(ElemOf<X>) && (kWide<X> || kWide<Retype<X, T>>)) {
    return join(convert<T>(lower_half(x)), convert<T>(upper_half(x)));
  } else if constexpr (requires { resize_lanes(x, T()); }) {
    return resize_lanes(x, T());
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

// The bits of float16 to float, exact. Without the instruction: rebias the exponent; a subnormal
// number, m * 2^-24, is what m adds to the bits of 0.5, so no operand is a subnormal float.
template <class X>
AE_INLINE Retype<X, float> f16_to_float(X half) {
#if defined(__AVX512F__)
  if constexpr (kLanes<X> == 16) return (Retype<X, float>)_mm512_cvtph_ps((__m256i)half);
#endif
#if defined(__F16C__)
  if constexpr (kLanes<X> == 8) {
    return (Retype<X, float>)_mm256_cvtph_ps((__m128i)half);
  } else if constexpr (kLanes<X> == 4) {
    const __m128i low = _mm_cvtsi64_si128(__builtin_bit_cast(int64_t, half));
    return (Retype<X, float>)_mm_cvtph_ps(low);
  } else if constexpr (Scalar<X>) {
    return _cvtsh_ss(half);
  }
#endif
  const auto u = convert<int32_t>(half);
  const auto magnitude = u & 0x7fff;
  const auto tiny = bits_as<int32_t>(bits_as<float>(magnitude + 0x3f000000) - 0.5f);
  const auto normal = (magnitude << 13) + 0x38000000;   // 112 << 23
  const auto special = (magnitude << 13) | 0x7f800000;  // infinity and NaN
  const auto large = magnitude < 0x7c00 ? normal : special;
  return bits_as<float>((magnitude < 0x400 ? tiny : large) | (u & 0x8000) << 16);
}

// Float to the bits of float16, nearest even, infinite from 65520 on; NaN stays NaN. Without the
// instruction: below 2^-14 the spacing is that of floats at 0.5, 2^-24; above, round away 13 bits.
template <class X>
AE_INLINE Retype<X, uint16_t> float_to_f16(X x) {
  using H [[maybe_unused]] = Retype<X, uint16_t>;
#if defined(__AVX512F__)
  if constexpr (kLanes<X> == 16) {
    return (H)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
  }
#endif
#if defined(__F16C__)
  if constexpr (kLanes<X> == 8) {
    return (H)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
  } else if constexpr (kLanes<X> == 4) {
    const __m128i low = _mm_cvtps_ph((__m128)x, _MM_FROUND_TO_NEAREST_INT);
    return __builtin_bit_cast(H, _mm_cvtsi128_si64(low));
  } else if constexpr (Scalar<X>) {
    return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
  }
#endif
  using I = Retype<X, int32_t>;
  const I u = bits_as<int32_t>(x);
  const I magnitude = u & 0x7fffffff;
  const I tiny = bits_as<int32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000;
  const I normal = (magnitude + (0xfff - 0x38000000) + ((magnitude >> 13) & 1)) >> 13;
  const I finite = magnitude < 0x38800000 ? tiny : normal;
  const I special = magnitude > 0x7f800000 ? I{} + 0x7e00 : I{} + 0x7c00;
  return convert<uint16_t>((magnitude < 0x477ff000 ? finite : special) | (u >> 16 & 0x8000));
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

}  // namespace ae
