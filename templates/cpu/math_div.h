// Division that rounds, and its remainders. Integers: division by zero gives 0 instead of a trap.
// Floats: exactly torch's results, computed lane by lane.
#pragma once
#include "cpu/math_libm.h"
#include "cpu/math_round.h"

namespace ae {

// Quotient of scalar integers, truncated or floored; the most negative number divided by -1 wraps.
template <bool kFloored, class T>
AE_INLINE T int_quotient(T a, T b) {
  if (b == 0) return 0;
  if (b == -1) return neg(a);
  T q = a / b;
  if constexpr (kFloored) q -= (a % b != 0) & ((a < 0) != (b < 0));
  return q;
}
template <bool kFloored>
struct IntQuotient {
  template <class T>
  static AE_INLINE T of(T a, T b) {
    return int_quotient<kFloored>(a, b);
  }
};

// A 32-bit quotient is exact in double: where a/b is not an integer it is at least 1/|b| away from
// one, far more than the rounding error.
template <bool kFloored, Vec V>
AE_INLINE V int32_quotient(V a, V b) {
  if constexpr (kWide<Retype<V, double>>) {
    return join(int32_quotient<kFloored>(lower_half(a), lower_half(b)),
                int32_quotient<kFloored>(upper_half(a), upper_half(b)));
  } else {
    auto q = to_f64(a) / to_f64(b);
    auto whole = round_to<kFloored ? kFloor : kTrunc>(q);
    return choose(eq(b, 0), V{}, to_i32(whole));
  }
}
// The same by one divisor: times its reciprocal. With half added to the dividend the product is
// never within rounding error of an integer.
template <bool kFloored, Vec V>
AE_INLINE V int32_quotient(V a, int32_t b) {
  if (__builtin_constant_p(b) && b > 0 && (b & (b - 1)) == 0) {
    V bias = kFloored ? V{} : (a >> 31) & (b - 1);
    return (a + bias) >> __builtin_ctz(static_cast<uint32_t>(b) | 1u << 31);
  }
  if constexpr (kWide<Retype<V, double>>) {
    return join(int32_quotient<kFloored>(lower_half(a), b),
                int32_quotient<kFloored>(upper_half(a), b));
  } else {
    double inverse = b == 0 ? 0.0 : 1.0 / b;
    auto x = to_f64(a);
    if constexpr (kFloored) {
      return to_i32(round_to<kFloor>((x + (b < 0 ? -0.5 : 0.5)) * inverse));
    } else {
      auto q = round_to<kFloor>((abs(x) + 0.5) * abs(inverse));
      return to_i32(copysign(q, b < 0 ? -x : x));
    }
  }
}

template <bool kFloored, class A, class B>
AE_INLINE auto quotient(A a, B b) {
  using V = Common<A, B>;
  if constexpr (Scalar<V>) {
    return int_quotient<kFloored>(splat<V>(a), splat<V>(b));
  } else if constexpr (sizeof(ElemOf<V>) == 4 && Scalar<B>) {
    return int32_quotient<kFloored>(splat<V>(a), static_cast<int32_t>(b));
  } else if constexpr (sizeof(ElemOf<V>) == 4) {
    return int32_quotient<kFloored>(splat<V>(a), splat<V>(b));
  } else {
    if constexpr (Scalar<B>) {
      if (__builtin_constant_p(b) && b > 0 && (b & (b - 1)) == 0) {
        V bias = kFloored ? V{} : (a >> 63) & (b - 1);
        return (a + bias) >> __builtin_ctzll(static_cast<uint64_t>(b) | uint64_t{1} << 63);
      }
    }
    return map_lanes<IntQuotient<kFloored>>(splat<V>(a), splat<V>(b));
  }
}

struct fmod_lane {
  static AE_INLINE float of(float a, float b) { return __builtin_fmodf(a, b); }
  static AE_INLINE double of(double a, double b) { return __builtin_fmod(a, b); }
};
struct remainder_lane {
  template <class T>
  static AE_INLINE T of(T a, T b) {
    T r = fmod_lane::of(a, b);
    return r != 0 && (b < 0) != (r < 0) ? r + b : r;
  }
};
struct floor_div_lane {
  template <class T>
  static AE_INLINE T of(T a, T b) {
    if (b == 0) return a / b;
    T r = fmod_lane::of(a, b);
    T q = (a - r) / b;
    if (r != 0 && (b < 0) != (r < 0)) q -= T(1);
    if (q == 0) return copysign(T(0), a / b);
    T whole = floor(q);
    return q - whole > T(0.5) ? whole + T(1) : whole;
  }
};

// Rounds towards minus infinity.
template <class A, class B>
AE_INLINE auto floor_div(A a, B b) {
  using V = Common<A, B>;
  if constexpr (IntLike<V>) {
    return quotient<true>(a, b);
  } else {
    return map_lanes<floor_div_lane>(splat<V>(a), splat<V>(b));
  }
}

// Rounds towards zero.
template <class A, class B>
AE_INLINE auto trunc_div(A a, B b) {
  using V = Common<A, B>;
  if constexpr (IntLike<V>) {
    return quotient<false>(a, b);
  } else {
    return trunc(splat<V>(a) / splat<V>(b));
  }
}

// The remainder with the sign of the divisor (Python's %); 0 for an integer divisor of 0.
template <class A, class B>
AE_INLINE auto remainder(A a, B b) {
  using V = Common<A, B>;
  if constexpr (IntLike<V>) {
    V r = sub(a, mul(quotient<true>(a, b), b));
    return select(eq(splat<V>(b), 0), V{}, r);
  } else {
    return map_lanes<remainder_lane>(splat<V>(a), splat<V>(b));
  }
}

// The remainder with the sign of the dividend (C's %); 0 for an integer divisor of 0.
template <class A, class B>
AE_INLINE auto fmod(A a, B b) {
  using V = Common<A, B>;
  if constexpr (IntLike<V>) {
    V r = sub(a, mul(quotient<false>(a, b), b));
    return select(eq(splat<V>(b), 0), V{}, r);
  } else {
    return map_lanes<fmod_lane>(splat<V>(a), splat<V>(b));
  }
}

}  // namespace ae
