// Float functions of interval.h, and the conversions to floats.
#pragma once
#include "common/interval.h"

namespace ae::iv {

// Rounds to fp32. The empty asm keeps GCC 12 from vectorizing two adjacent conversions double ->
// float -> double, which it then drops as if they were exact.
AE_HD inline double as_float(double x) {
  float f = float(x);
#ifndef __CUDA_ARCH__
  __asm__("" : "+x"(f));
#endif
  return f;
}

// ---- outward rounding of a computed bound ----
// An fp32 number that no kernel flushes or rounds: such a bound, reached without rounding, holds in
// fp32 and fp64 alike because rounding is monotone.
AE_HD inline bool is_float(double x) {
  return as_float(x) == x && (x == 0 || __builtin_fabs(x) >= kFloatMin);
}
// The largest float may stand for an fp32 overflow, so bounds past it become infinite.
AE_HD inline double down(double x) {
  if (!(x < kInf)) return x == kInf ? kFloatMax : -kInf;
  x -= __builtin_fabs(x) * 0x1p-20 + kFloatMin;
  return x < -kFloatMax ? -kInf : x;
}
AE_HD inline double up(double x) { return -down(-x); }

// A corner that is a bound either way: outward, or as it is when exact.
AE_HD inline Interval corner(double x, bool exact) {
  return exact ? Interval{x, x, false} : Interval{down(x), up(x), false};
}
AE_HD inline Interval sum(double a, double b) {
  const double s = a + b;  // also what a sum of floats rounds to when it is a float itself
  return corner(s, is_float(s));
}
AE_HD inline Interval product(double a, double b) {
  if (a == 0 || b == 0) return constant(0);  // 0 * inf is NaN, flagged by the caller
  const double p = a * b;                    // of two floats: exact in double
  return corner(p, is_float(a) && is_float(b) && is_float(p));
}
AE_HD inline Interval quotient(double a, double b) {
  const double q = a / b;
  return corner(q, is_float(q) && is_float(b) && q * b == a);
}

// ---- arithmetic ----
AE_HD inline Interval fadd(Interval a, Interval b) {
  const bool nan = (a.hi == kInf && b.lo == -kInf) || (a.lo == -kInf && b.hi == kInf);
  return {sum(a.lo, b.lo).lo, sum(a.hi, b.hi).hi, has_nan(a, b) || nan};
}
AE_HD inline Interval fneg(Interval a) { return negated(a); }
AE_HD inline Interval fsub(Interval a, Interval b) { return fadd(a, negated(b)); }
AE_HD inline Interval fabs(Interval a) { return absolute(a); }
AE_HD inline Interval fmul(Interval a, Interval b) {
  Interval r = hull(hull(product(a.lo, b.lo), product(a.lo, b.hi)),
                    hull(product(a.hi, b.lo), product(a.hi, b.hi)));
  const bool nan = (contains(a, 0) && unbounded(b)) || (contains(b, 0) && unbounded(a));
  r.maybe_nan = has_nan(a, b) || nan;
  return r;
}
AE_HD inline Interval fdiv(Interval a, Interval b) {
  if (contains(b, 0) || (unbounded(a) && unbounded(b))) return top();
  Interval r = hull(hull(quotient(a.lo, b.lo), quotient(a.lo, b.hi)),
                    hull(quotient(a.hi, b.lo), quotient(a.hi, b.hi)));
  r.maybe_nan = has_nan(a, b);
  return r;
}

// ---- rounding to integers: monotone and exact ----
AE_HD inline Interval floor(Interval a) {
  return {__builtin_floor(a.lo), __builtin_floor(a.hi), a.maybe_nan};
}
AE_HD inline Interval ceil(Interval a) {
  return {__builtin_ceil(a.lo), __builtin_ceil(a.hi), a.maybe_nan};
}
AE_HD inline Interval trunc(Interval a) {
  return {__builtin_trunc(a.lo), __builtin_trunc(a.hi), a.maybe_nan};
}
AE_HD inline Interval round_even(Interval a) {
  return {__builtin_rint(a.lo), __builtin_rint(a.hi), a.maybe_nan};
}

// The float just below an exact integer quotient may be floored either way: fdiv covers both.
AE_HD inline Interval ffloor_div(Interval a, Interval b) {
  return unbounded(a) ? top() : floor(fdiv(a, b));
}
AE_HD inline Interval ftrunc_div(Interval a, Interval b) { return trunc(fdiv(a, b)); }
// Sign of the divisor; rounding may reach the divisor itself.
AE_HD inline Interval fremainder(Interval a, Interval b) {
  if (contains(b, 0) || unbounded(a)) return top();
  if (a.lo >= 0 && a.hi < b.lo) return {a.lo, a.hi, has_nan(a, b)};
  return {smaller(b.lo, 0), larger(b.hi, 0), has_nan(a, b)};
}
// Sign of the dividend; exact, so never larger than either operand.
AE_HD inline Interval ffmod(Interval a, Interval b) {
  if (contains(b, 0) || unbounded(a)) return top();
  const double most = magnitude(b);
  return {a.lo < 0 ? larger(a.lo, -most) : 0, a.hi > 0 ? smaller(a.hi, most) : 0, has_nan(a, b)};
}

// ---- conversions to floats: rounding to nearest is monotone, so the bounds are simply rounded
// ---- To `bits` significant bits with least exponent `e_min`; infinite from `overflow` on.
AE_HD inline double nearest(double x, int bits, int e_min, double overflow) {
  if (__builtin_fabs(x) >= overflow) return x < 0 ? -kInf : kInf;
  if (x == 0) return x;
  const int e = __builtin_ilogb(x), quantum = (e < e_min ? e_min : e) - (bits - 1);
  return __builtin_ldexp(__builtin_rint(__builtin_ldexp(x, -quantum)), quantum);
}
AE_HD inline double nearest_bf16(double x) { return nearest(as_float(x), 8, -126, 0x1.ffp127); }
AE_HD inline double nearest_f16(double x) { return nearest(as_float(x), 11, -14, 65520.0); }

AE_HD inline Interval to_f32(Interval a) { return {as_float(a.lo), as_float(a.hi), a.maybe_nan}; }
AE_HD inline Interval to_f64(Interval a) { return a; }
AE_HD inline Interval round_bf16(Interval a) {
  return {nearest_bf16(a.lo), nearest_bf16(a.hi), a.maybe_nan};
}
AE_HD inline Interval round_f16(Interval a) {
  return {nearest_f16(a.lo), nearest_f16(a.hi), a.maybe_nan};
}
AE_HD inline Interval mask_to_f32(Interval a) { return to_bool(a); }
AE_HD inline Interval mask_to_f64(Interval a) { return to_bool(a); }

// ---- monotone functions ----
template <class F>
AE_HD inline Interval increasing(Interval a, F f) {
  return {down(f(a.lo)), up(f(a.hi)), a.maybe_nan};
}
// Defined from `least` on, NaN below.
template <class F>
AE_HD inline Interval increasing_from(Interval a, double least, F f) {
  if (a.hi < least) return top();
  return {down(f(larger(a.lo, least))), up(f(a.hi)), a.maybe_nan || a.lo < least};
}

AE_HD inline double sigmoid_of(double x) { return 1 / (1 + __builtin_exp(-x)); }

AE_HD inline Interval exp(Interval a) {
  return increasing(a, [](double x) { return __builtin_exp(x); });
}
AE_HD inline Interval exp2(Interval a) {
  return increasing(a, [](double x) { return __builtin_exp2(x); });
}
AE_HD inline Interval expm1(Interval a) {
  return increasing(a, [](double x) { return __builtin_expm1(x); });
}
AE_HD inline Interval tanh(Interval a) {
  return increasing(a, [](double x) { return __builtin_tanh(x); });
}
AE_HD inline Interval sigmoid(Interval a) { return increasing(a, sigmoid_of); }
AE_HD inline Interval sinh(Interval a) {
  return increasing(a, [](double x) { return __builtin_sinh(x); });
}
AE_HD inline Interval asinh(Interval a) {
  return increasing(a, [](double x) { return __builtin_asinh(x); });
}
AE_HD inline Interval atan(Interval a) {
  return increasing(a, [](double x) { return __builtin_atan(x); });
}
AE_HD inline Interval erf(Interval a) {
  return increasing(a, [](double x) { return __builtin_erf(x); });
}
AE_HD inline Interval erfc(Interval a) {
  return negated(increasing(a, [](double x) { return -__builtin_erfc(x); }));
}
AE_HD inline Interval log(Interval a) {
  return increasing_from(a, 0, [](double x) { return __builtin_log(x); });
}
AE_HD inline Interval log2(Interval a) {
  return increasing_from(a, 0, [](double x) { return __builtin_log2(x); });
}
AE_HD inline Interval log10(Interval a) {
  return increasing_from(a, 0, [](double x) { return __builtin_log10(x); });
}
AE_HD inline Interval log1p(Interval a) {
  return increasing_from(a, -1, [](double x) { return __builtin_log1p(x); });
}
AE_HD inline Interval sqrt(Interval a) {
  return increasing_from(a, 0, [](double x) { return __builtin_sqrt(x); });
}
AE_HD inline Interval reciprocal(Interval a) { return fdiv(constant(1), a); }
AE_HD inline Interval rsqrt(Interval a) { return reciprocal(sqrt(a)); }

// ---- the rest ----
AE_HD inline double sign_of(double x) { return x > 0 ? 1.0 : x < 0 ? -1.0 : 0.0; }
AE_HD inline Interval sign(Interval a) {
  const Interval r = {sign_of(a.lo), sign_of(a.hi), a.maybe_nan};
  return a.maybe_nan ? Interval{smaller(r.lo, 0), larger(r.hi, 0), true} : r;
}
AE_HD inline Interval isnan(Interval a) { return truth(false, !a.maybe_nan); }
AE_HD inline Interval isinf(Interval a) { return truth(false, !unbounded(a)); }

AE_HD inline Interval sin(Interval a) { return {down(-1), up(1), a.maybe_nan || unbounded(a)}; }
AE_HD inline Interval cos(Interval a) { return sin(a); }
AE_HD inline Interval tan(Interval) { return top(); }
AE_HD inline Interval asin(Interval) { return top(); }
AE_HD inline Interval acos(Interval) { return top(); }
AE_HD inline Interval cosh(Interval) { return top(); }
AE_HD inline Interval acosh(Interval) { return top(); }
AE_HD inline Interval atanh(Interval) { return top(); }
AE_HD inline Interval lgamma(Interval) { return top(); }
AE_HD inline Interval pow(Interval, Interval) { return top(); }
AE_HD inline Interval atan2(Interval, Interval) { return top(); }
AE_HD inline Interval hypot(Interval, Interval) { return top(); }
AE_HD inline Interval copysign(Interval, Interval) { return top(); }

}  // namespace ae::iv
