// The vocabulary of generated code on the device: the functions of cpu/math.h over C++ scalars
// (float, double, int32_t, int64_t, bool), with the same meaning. Operands of two types are brought
// to their common type. Call them qualified (ae::remainder): CUDA has other functions of the same
// names.
//
// Errors of float functions. Products, sums, quotients and square roots are rounded to nearest
// (compile without --use_fast_math). exp2, exp and sigmoid use ex2.approx.ftz, within 2^-22.5 of
// the value; the argument's rounding adds |x| 2^-23.7 to exp and sigmoid, and results below 2^-126
// are 0. Weights are rounded to 8 or 11 bits afterwards; a row sum's logarithm keeps the 1e-5 of
// the numerics gate. Everything else is CUDA's own float function: at most 2 ulp but for lgamma,
// tan and pow (4 to 8).
#pragma once
#include "cuda/element.cuh"

namespace ae {

template <class A, class B>
using Common = std::common_type_t<A, B>;
template <class T>
constexpr bool kIsFloat = std::is_floating_point_v<T>;
template <class T>
constexpr bool kIsF32 = std::is_same_v<T, float>;

// ---- conversions ----
template <class X>
AE_DEVICE float to_f32(X x) {
  return static_cast<float>(x);
}
template <class X>
AE_DEVICE double to_f64(X x) {
  return static_cast<double>(x);
}
template <class X>
AE_DEVICE int32_t to_i32(X x) {
  return static_cast<int32_t>(x);
}
template <class X>
AE_DEVICE int64_t to_i64(X x) {
  return static_cast<int64_t>(x);
}
template <class X>
AE_DEVICE bool to_bool(X x) {
  return x != X(0);
}
AE_DEVICE float mask_to_f32(bool m) { return m ? 1.0f : 0.0f; }
AE_DEVICE double mask_to_f64(bool m) { return m ? 1.0 : 0.0; }
AE_DEVICE int32_t mask_to_i32(bool m) { return m; }
AE_DEVICE int64_t mask_to_i64(bool m) { return m; }

// Round to the nearest 16-bit float, ties to even; the result stays float.
AE_DEVICE float round_bf16(float x) { return bf16_to_float(float_to_bf16(x)); }
AE_DEVICE float round_f16(float x) { return f16_to_float(float_to_f16(x)); }

// ---- comparison, logic, choice ----
#define AE_COMPARE(name, op)                       \
  template <class A, class B>                      \
  AE_DEVICE bool name(A a, B b) {                  \
    using T = Common<A, B>;                        \
    return static_cast<T>(a) op static_cast<T>(b); \
  }
AE_COMPARE(eq, ==)
AE_COMPARE(ne, !=)
AE_COMPARE(lt, <)
AE_COMPARE(le, <=)
AE_COMPARE(gt, >)
AE_COMPARE(ge, >=)
#undef AE_COMPARE

AE_DEVICE bool logical_and(bool a, bool b) { return a & b; }
AE_DEVICE bool logical_or(bool a, bool b) { return a | b; }
AE_DEVICE bool logical_xor(bool a, bool b) { return a ^ b; }
AE_DEVICE bool logical_not(bool a) { return !a; }

template <class A, class B>
AE_DEVICE auto select(bool c, A a, B b) {
  using T = Common<A, B>;
  return c ? static_cast<T>(a) : static_cast<T>(b);
}

template <class X>
AE_DEVICE bool isnan(X x) {
  return x != x;
}
AE_DEVICE bool isinf(float x) { return fabsf(x) == __builtin_inff(); }
AE_DEVICE bool isinf(double x) { return ::fabs(x) == __builtin_inf(); }

// The larger one; of a number and NaN the number.
AE_DEVICE float max_or_other(float a, float b) { return fmaxf(a, b); }

// Of floats, NaN when either operand is, as torch.
template <class A, class B>
AE_DEVICE auto maximum(A a, B b) {
  using T = Common<A, B>;
  const T x = a, y = b;
  if constexpr (kIsF32<T>) {
    float r;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(x), "f"(y));
    return r;
  } else if constexpr (kIsFloat<T>) {
    return x != x ? x : y != y ? y : ::fmax(x, y);
  } else {
    return x > y ? x : y;
  }
}
template <class A, class B>
AE_DEVICE auto minimum(A a, B b) {
  using T = Common<A, B>;
  const T x = a, y = b;
  if constexpr (kIsF32<T>) {
    float r;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(x), "f"(y));
    return r;
  } else if constexpr (kIsFloat<T>) {
    return x != x ? x : y != y ? y : ::fmin(x, y);
  } else {
    return x < y ? x : y;
  }
}

// ---- arithmetic: integers wrap, as in torch ----
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
using Wrap = typename WrapOf<T>::type;

#define AE_ARITHMETIC(name, op)                            \
  template <class A, class B>                              \
  AE_DEVICE auto name(A a, B b) {                          \
    using T = Common<A, B>;                                \
    return static_cast<T>(Wrap<T>(T(a)) op Wrap<T>(T(b))); \
  }
AE_ARITHMETIC(add, +)
AE_ARITHMETIC(sub, -)
AE_ARITHMETIC(mul, *)
#undef AE_ARITHMETIC

template <class A, class B>
AE_DEVICE auto div(A a, B b) {
  using T = Common<A, B>;
  static_assert(kIsFloat<T>, "integers divide with floor_div or trunc_div");
  return static_cast<T>(a) / static_cast<T>(b);
}
template <class X>
AE_DEVICE X neg(X x) {
  return static_cast<X>(-Wrap<X>(x));
}
template <class X>
AE_DEVICE X abs(X x) {
  if constexpr (kIsF32<X>) {
    return fabsf(x);
  } else if constexpr (kIsFloat<X>) {
    return ::fabs(x);
  } else {
    return x < 0 ? neg(x) : x;
  }
}
// -1, 0 or 1; 0 for NaN, as torch.
template <class X>
AE_DEVICE X sign(X x) {
  return X(int(x > X(0)) - int(x < X(0)));
}

// ---- bits. Shift counts outside [0, bits) give what torch gives: 0, or -1 for a negative shr ----
#define AE_BITWISE(name, op)                                       \
  template <class A, class B>                                      \
  AE_DEVICE auto name(A a, B b) {                                  \
    using T = Common<A, B>;                                        \
    return static_cast<T>(static_cast<T>(a) op static_cast<T>(b)); \
  }
AE_BITWISE(bit_and, &)
AE_BITWISE(bit_or, |)
AE_BITWISE(bit_xor, ^)
#undef AE_BITWISE
template <class X>
AE_DEVICE X bit_not(X x) {
  if constexpr (std::is_same_v<X, bool>) {
    return !x;
  } else {
    return static_cast<X>(~x);
  }
}
template <class A, class B>
AE_DEVICE auto shl(A a, B b) {
  using T = Common<A, B>;
  constexpr T kLast = 8 * sizeof(T) - 1;
  const T n = b;
  return (n & kLast) == n ? static_cast<T>(Wrap<T>(T(a)) << (n & kLast)) : T(0);
}
template <class A, class B>
AE_DEVICE auto shr(A a, B b) {
  using T = Common<A, B>;
  constexpr T kLast = 8 * sizeof(T) - 1;
  const T n = b;
  return static_cast<T>(static_cast<T>(a) >> ((n & kLast) == n ? n : kLast));
}

// ---- rounding to integers ----
#define AE_ROUNDING(name, libm)         \
  template <class X>                    \
  AE_DEVICE X name(X x) {               \
    if constexpr (kIsF32<X>) {          \
      return ::libm##f(x);              \
    } else if constexpr (kIsFloat<X>) { \
      return ::libm(x);                 \
    } else {                            \
      return x;                         \
    }                                   \
  }
AE_ROUNDING(floor, floor)
AE_ROUNDING(ceil, ceil)
AE_ROUNDING(trunc, trunc)
AE_ROUNDING(round_even, rint)
#undef AE_ROUNDING

// ---- exp and what is made of it ----
constexpr float kLog2E = 1.44269504f;

AE_DEVICE float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
AE_DEVICE float rcp(float x) {  // within 1 ulp
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
AE_DEVICE float exp2(float x) { return ex2(x); }
AE_DEVICE double exp2(double x) { return ::exp2(x); }
AE_DEVICE float exp(float x) { return ex2(x * kLog2E); }
AE_DEVICE double exp(double x) { return ::exp(x); }
AE_DEVICE float sigmoid(float x) { return rcp(1.0f + ex2(x * -kLog2E)); }
AE_DEVICE double sigmoid(double x) { return 1.0 / (1.0 + ::exp(-x)); }

// exp(x - m), exp(x scale - m) and sigmoid(x scale - m) by one fused multiply-add and ex2. What
// does not change over a row is computed once per row. The rounding of m log2(e) is within that of
// a float score of m's size.
AE_DEVICE float exp_minus(float x, float m) { return ex2(fmaf(x, kLog2E, -(m * kLog2E))); }
AE_DEVICE float exp_scaled_minus(float x, float scale, float m) {
  return ex2(fmaf(x, scale * kLog2E, -(m * kLog2E)));
}
AE_DEVICE float sigmoid_scaled_minus(float x, float scale, float m) {
  return rcp(1.0f + ex2(fmaf(x, -(scale * kLog2E), m * kLog2E)));
}

// ---- CUDA's own functions. tanh.approx (2^-11) is too coarse for a score ----
#define AE_LIBM_UNARY(name)                              \
  AE_DEVICE float name(float x) { return ::name##f(x); } \
  AE_DEVICE double name(double x) { return ::name(x); }
AE_LIBM_UNARY(expm1)
AE_LIBM_UNARY(tanh)
AE_LIBM_UNARY(log)
AE_LIBM_UNARY(log2)
AE_LIBM_UNARY(log10)
AE_LIBM_UNARY(log1p)
AE_LIBM_UNARY(sqrt)
AE_LIBM_UNARY(rsqrt)
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
AE_LIBM_UNARY(lgamma)
#undef AE_LIBM_UNARY

#define AE_LIBM_BINARY(name)                                         \
  template <class A, class B>                                        \
  AE_DEVICE auto name(A a, B b) {                                    \
    using T = Common<A, B>;                                          \
    if constexpr (kIsF32<T>) {                                       \
      return ::name##f(a, b);                                        \
    } else {                                                         \
      return ::name(static_cast<double>(a), static_cast<double>(b)); \
    }                                                                \
  }
AE_LIBM_BINARY(pow)
AE_LIBM_BINARY(atan2)
AE_LIBM_BINARY(hypot)
AE_LIBM_BINARY(copysign)
#undef AE_LIBM_BINARY

template <class X>
AE_DEVICE X reciprocal(X x) {
  return X(1) / x;
}

// ---- division that rounds, and its remainders. Integers: division by zero gives 0 ----
template <bool kFloored, class T>
AE_DEVICE T int_quotient(T a, T b) {
  if (b == 0) return 0;
  if (b == -1) return neg(a);
  T q = a / b;
  if constexpr (kFloored) q -= (a % b != 0) & ((a < 0) != (b < 0));
  return q;
}
AE_DEVICE float fmod_of(float a, float b) { return ::fmodf(a, b); }
AE_DEVICE double fmod_of(double a, double b) { return ::fmod(a, b); }

// Rounds towards minus infinity; of floats as torch.
template <class A, class B>
AE_DEVICE auto floor_div(A a, B b) {
  using T = Common<A, B>;
  const T x = a, y = b;
  if constexpr (!kIsFloat<T>) {
    return int_quotient<true>(x, y);
  } else {
    if (y == 0) return x / y;
    const T r = fmod_of(x, y);
    T q = (x - r) / y;
    if (r != 0 && (y < 0) != (r < 0)) q -= T(1);
    if (q == 0) return T(copysign(T(0), x / y));
    const T whole = floor(q);
    return q - whole > T(0.5) ? whole + T(1) : whole;
  }
}
// Rounds towards zero.
template <class A, class B>
AE_DEVICE auto trunc_div(A a, B b) {
  using T = Common<A, B>;
  if constexpr (!kIsFloat<T>) {
    return int_quotient<false>(T(a), T(b));
  } else {
    return trunc(T(a) / T(b));
  }
}
// The remainder with the sign of the divisor (Python's %).
template <class A, class B>
AE_DEVICE auto remainder(A a, B b) {
  using T = Common<A, B>;
  const T x = a, y = b;
  if constexpr (!kIsFloat<T>) {
    return y == 0 ? T(0) : sub(x, mul(int_quotient<true>(x, y), y));
  } else {
    const T r = fmod_of(x, y);
    return r != 0 && (y < 0) != (r < 0) ? r + y : r;
  }
}
// The remainder with the sign of the dividend (C's %).
template <class A, class B>
AE_DEVICE auto fmod(A a, B b) {
  using T = Common<A, B>;
  const T x = a, y = b;
  if constexpr (!kIsFloat<T>) {
    return y == 0 ? T(0) : sub(x, mul(int_quotient<false>(x, y), y));
  } else {
    return fmod_of(x, y);
  }
}

}  // namespace ae
