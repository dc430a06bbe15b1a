// Integer functions of interval.h, and the conversions to integers.
#pragma once
#include "common/interval.h"

namespace ae::iv {

// An int result from bounds that were computed in double: rounded outward from 2^53 on, anything
// once 64-bit arithmetic may have wrapped. Ints are never NaN.
AE_HD inline Interval int_result(double lo, double hi) {
  if (!(lo > -kInt64 && hi < kInt64)) return int_top();
  if (lo <= -kExactInt || lo >= kExactInt) lo -= __builtin_fabs(lo) * 0x1p-51;
  if (hi <= -kExactInt || hi >= kExactInt) hi += __builtin_fabs(hi) * 0x1p-51;
  return {larger(lo, -kInt64), smaller(hi, kInt64), false};
}

AE_HD inline bool is_int64(Interval a) { return a.lo >= -kInt64 && a.hi <= kInt64; }
AE_HD inline bool is_exact(Interval a) { return a.lo >= -kExactInt && a.hi <= kExactInt; }

AE_HD inline Interval add(Interval a, Interval b) { return int_result(a.lo + b.lo, a.hi + b.hi); }
AE_HD inline Interval sub(Interval a, Interval b) { return int_result(a.lo - b.hi, a.hi - b.lo); }
AE_HD inline Interval neg(Interval a) { return int_result(-a.hi, -a.lo); }
AE_HD inline Interval abs(Interval a) {
  const Interval r = absolute(a);
  return int_result(r.lo, r.hi);
}
AE_HD inline Interval mul(Interval a, Interval b) {
  if (!is_int64(a) || !is_int64(b)) return int_top();
  const double p = a.lo * b.lo, q = a.lo * b.hi, r = a.hi * b.lo, s = a.hi * b.hi;
  return int_result(smaller(smaller(p, q), smaller(r, s)), larger(larger(p, q), larger(r, s)));
}

// ---- division: the kernel gives 0 for a zero divisor ----
AE_HD inline int64_t floor_quotient(int64_t a, int64_t b) {
  const int64_t q = a / b;
  return q - (a % b != 0 && (a < 0) != (b < 0));
}

// Extremes of quotient(a, b) over one sign of the divisor lie in the corners.
template <int64_t (*quotient)(int64_t, int64_t)>
AE_HD inline Interval divide_by(Interval a, double b_lo, double b_hi) {
  const int64_t x = int64_t(a.lo), y = int64_t(a.hi), c = int64_t(b_lo), d = int64_t(b_hi);
  const double p = double(quotient(x, c)), q = double(quotient(x, d)), r = double(quotient(y, c)),
               s = double(quotient(y, d));
  return {smaller(smaller(p, q), smaller(r, s)), larger(larger(p, q), larger(r, s)), false};
}

template <int64_t (*quotient)(int64_t, int64_t)>
AE_HD inline Interval divide(Interval a, Interval b) {
  if (!is_exact(a) || !is_exact(b)) return int_top();
  if (b.lo > 0) return divide_by<quotient>(a, b.lo, b.hi);
  if (b.hi < 0) return divide_by<quotient>(a, b.lo, b.hi);
  Interval r = constant(0);
  if (b.hi > 0) r = hull(r, divide_by<quotient>(a, 1, b.hi));
  if (b.lo < 0) r = hull(r, divide_by<quotient>(a, b.lo, -1));
  return r;
}

AE_HD inline int64_t trunc_quotient(int64_t a, int64_t b) { return a / b; }
AE_HD inline Interval floor_div(Interval a, Interval b) { return divide<floor_quotient>(a, b); }
AE_HD inline Interval trunc_div(Interval a, Interval b) { return divide<trunc_quotient>(a, b); }

// Sign of the divisor. Exact while one period of a constant divisor holds the whole interval.
AE_HD inline Interval remainder(Interval a, Interval b) {
  if (!is_exact(a) || !is_exact(b)) return int_top();
  if (b.lo == b.hi && b.lo != 0) {
    const int64_t d = int64_t(b.lo), q = floor_quotient(int64_t(a.lo), d);
    if (q == floor_quotient(int64_t(a.hi), d)) return {a.lo - q * b.lo, a.hi - q * b.lo, false};
  }
  if (a.lo >= 0 && a.hi < b.lo) return a;
  if (a.hi <= 0 && a.lo > b.hi) return a;
  Interval r = constant(0);  // also the value for a zero divisor
  if (b.hi > 0) r.hi = a.lo >= 0 ? smaller(a.hi, b.hi - 1) : b.hi - 1;
  if (b.lo < 0) r.lo = a.hi <= 0 ? larger(a.lo, b.lo + 1) : b.lo + 1;
  return r;
}

// Sign of the dividend.
AE_HD inline Interval fmod(Interval a, Interval b) {
  if (!is_exact(a) || !is_exact(b)) return int_top();
  if (b.lo == b.hi && b.lo != 0) {
    const int64_t d = int64_t(b.lo), q = int64_t(a.lo) / d;
    const bool one_sign = a.lo >= 0 || a.hi <= 0;
    if (one_sign && q == int64_t(a.hi) / d) return {a.lo - q * b.lo, a.hi - q * b.lo, false};
  }
  const Interval size = absolute(b);
  if (magnitude(a) < size.lo) return a;
  const double most = size.hi > 0 ? size.hi - 1 : 0;
  return {a.lo < 0 ? larger(a.lo, -most) : 0, a.hi > 0 ? smaller(a.hi, most) : 0, false};
}

// ---- bits: the common leading bits of lo and hi are known, the rest may be anything ----
struct Bits {
  int64_t known, free;  // value = known, with any of the `free` bits set as well
};
AE_HD inline Bits bits_of(Interval a) {
  const int64_t lo = int64_t(a.lo), differ = lo ^ int64_t(a.hi);
  const int64_t free = differ == 0 ? 0 : int64_t(~uint64_t(0) >> __builtin_clzll(differ));
  return {lo & ~free, free};
}
// Lowest: free bits clear, highest: set. A free sign bit turns that around.
AE_HD inline Interval from_bits(int64_t known, int64_t free) {
  return free < 0 ? int_top() : int_result(double(known), double(known | free));
}

AE_HD inline Interval bit_and(Interval a, Interval b) {
  if (!is_exact(a) || !is_exact(b)) return int_top();
  const Bits x = bits_of(a), y = bits_of(b);
  const int64_t known = x.known & y.known;
  Interval r = from_bits(known, ((x.known | x.free) & (y.known | y.free)) & ~known);
  if (a.lo >= 0) r = {larger(r.lo, 0), smaller(r.hi, a.hi), false};
  if (b.lo >= 0) r = {larger(r.lo, 0), smaller(r.hi, b.hi), false};
  return r;
}
AE_HD inline Interval bit_or(Interval a, Interval b) {
  if (!is_exact(a) || !is_exact(b)) return int_top();
  const Bits x = bits_of(a), y = bits_of(b);
  const int64_t known = x.known | y.known;
  const Interval r = from_bits(known, (x.free | y.free) & ~known);
  if (a.lo < 0 || b.lo < 0) return r;
  return {larger(r.lo, larger(a.lo, b.lo)), smaller(r.hi, a.hi + b.hi), false};
}
AE_HD inline Interval bit_xor(Interval a, Interval b) {
  if (!is_exact(a) || !is_exact(b)) return int_top();
  const Bits x = bits_of(a), y = bits_of(b);
  const int64_t free = x.free | y.free;
  const Interval r = from_bits((x.known ^ y.known) & ~free, free);
  if (a.lo < 0 || b.lo < 0) return r;
  return {r.lo, smaller(r.hi, a.hi + b.hi), false};
}
AE_HD inline Interval bit_not(Interval a) { return int_result(-1 - a.hi, -1 - a.lo); }

// Shifts by 0..31 are defined for every integer type.
AE_HD inline bool is_shift(Interval s) { return s.lo >= 0 && s.hi <= 31; }
AE_HD inline Interval shl(Interval a, Interval s) {
  if (!is_shift(s)) return int_top();
  return mul(a, range(double(int64_t(1) << int(s.lo)), double(int64_t(1) << int(s.hi))));
}
AE_HD inline Interval shr(Interval a, Interval s) {
  if (!is_shift(s)) return int_top();
  return floor_div(a, range(double(int64_t(1) << int(s.lo)), double(int64_t(1) << int(s.hi))));
}

// ---- conversions to ints: toward zero; a value that does not fit gives any int ----
AE_HD inline Interval to_i32(Interval a) {
  const double lo = __builtin_trunc(a.lo), hi = __builtin_trunc(a.hi);
  const bool fits = !a.maybe_nan && lo >= -2147483648.0 && hi <= 2147483647.0;
  return fits ? range(lo, hi) : range(-2147483648.0, 2147483647.0);
}
AE_HD inline Interval to_i64(Interval a) {
  const double lo = __builtin_trunc(a.lo), hi = __builtin_trunc(a.hi);
  return !a.maybe_nan && lo >= -kInt64 && hi < kInt64 ? range(lo, hi) : int_top();
}
AE_HD inline Interval mask_to_i32(Interval a) { return to_bool(a); }
AE_HD inline Interval mask_to_i64(Interval a) { return to_bool(a); }

}  // namespace ae::iv
