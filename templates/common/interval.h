// Interval arithmetic for mask analysis: the traced mask is evaluated once per box of indices
// (b, h, q, k) instead of once per element, with the functions below in place of those of math.h.
//
// Contract. An Interval {lo, hi, maybe_nan} encloses the value of a node at every point of the box:
// it is NaN only if maybe_nan, else in [lo, hi]. Bounds may be infinite. A bool is {0,0} false,
// {1,1} true, {0,1} unknown. Nothing here can prove more than the kernel computes:
//  - int functions (add, sub, ...) are exact up to 2^53, rounded outward beyond, and give up past
//    2^63. Generated code guarantees that 32-bit arithmetic does not wrap.
//  - float functions (prefix f: fadd, fsub, ...) hold for fp32 and fp64 evaluation, with or without
//    contraction to FMA: rounded outward by 2^-20 (four times the error of the vector functions)
//    unless the bound is exact in fp32. A constant must be given in its node's precision.
//  - compare, logical, select, minimum and maximum serve both kinds.
// Functions without a useful rule return top(). Must not be built with -ffast-math or
// --use_fast_math.
#pragma once
#include <stdint.h>

#include "common/host_device.h"

namespace ae {

struct Interval {
  double lo, hi;
  bool maybe_nan;
};

namespace iv {

constexpr double kInf = __builtin_inf();
constexpr double kExactInt = 9007199254740992.0;  // 2^53: every int up to here is a double
constexpr double kInt64 = 9223372036854775808.0;  // 2^63
constexpr double kFloatMax = 3.4028234663852886e38;
constexpr double kFloatMin = 1.1754943508222875e-38;  // smallest normal; below, kernels may flush

AE_HD constexpr Interval top() { return {-kInf, kInf, true}; }
AE_HD constexpr Interval int_top() { return {-kInt64, kInt64, false}; }
// A literal of any type; an int too large for a double is enclosed.
template <class T>
AE_HD constexpr Interval constant(T x) {
  const double d = double(x), size = d < 0 ? -d : d;
  const double slack = T(0.5) == T(0) && size >= kExactInt ? size * 0x1p-52 : 0;
  return d == d ? Interval{d - slack, d + slack, false} : top();
}
AE_HD constexpr Interval range(double lo, double hi) { return {lo, hi, false}; }
AE_HD constexpr Interval boolean(bool x) {
  return x ? Interval{1, 1, false} : Interval{0, 0, false};
}
AE_HD constexpr Interval unknown() { return {0, 1, false}; }

// ---- truth of a bool (or, like C, of a number: NaN counts as true) ----
AE_HD constexpr bool is_true(Interval a) { return a.lo > 0 || a.hi < 0; }
AE_HD constexpr bool is_false(Interval a) { return a.lo == 0 && a.hi == 0 && !a.maybe_nan; }
AE_HD constexpr Interval truth(bool yes, bool no) {
  return {yes ? 1.0 : 0.0, no ? 0.0 : 1.0, false};
}
AE_HD constexpr Interval to_bool(Interval a) { return truth(is_true(a), is_false(a)); }

AE_HD constexpr Interval logical_not(Interval a) { return truth(is_false(a), is_true(a)); }
AE_HD constexpr Interval logical_and(Interval a, Interval b) {
  return truth(is_true(a) && is_true(b), is_false(a) || is_false(b));
}
AE_HD constexpr Interval logical_or(Interval a, Interval b) {
  return truth(is_true(a) || is_true(b), is_false(a) && is_false(b));
}
AE_HD constexpr Interval logical_xor(Interval a, Interval b) {
  return truth((is_true(a) && is_false(b)) || (is_false(a) && is_true(b)),
               (is_true(a) && is_true(b)) || (is_false(a) && is_false(b)));
}

// ---- compare: a NaN makes every comparison false, and ne true ----
AE_HD constexpr bool has_nan(Interval a, Interval b) { return a.maybe_nan || b.maybe_nan; }
AE_HD constexpr bool disjoint(Interval a, Interval b) { return a.hi < b.lo || b.hi < a.lo; }
AE_HD constexpr bool same_point(Interval a, Interval b) {
  return a.lo == a.hi && b.lo == b.hi && a.lo == b.lo && !has_nan(a, b);
}
AE_HD constexpr Interval lt(Interval a, Interval b) {
  return truth(a.hi < b.lo && !has_nan(a, b), a.lo >= b.hi);
}
AE_HD constexpr Interval le(Interval a, Interval b) {
  return truth(a.hi <= b.lo && !has_nan(a, b), a.lo > b.hi);
}
AE_HD constexpr Interval gt(Interval a, Interval b) { return lt(b, a); }
AE_HD constexpr Interval ge(Interval a, Interval b) { return le(b, a); }
AE_HD constexpr Interval eq(Interval a, Interval b) {
  return truth(same_point(a, b), disjoint(a, b));
}
AE_HD constexpr Interval ne(Interval a, Interval b) {
  return truth(disjoint(a, b), same_point(a, b));
}

// ---- selection ----
AE_HD constexpr double smaller(double a, double b) { return b < a ? b : a; }
AE_HD constexpr double larger(double a, double b) { return b > a ? b : a; }
AE_HD constexpr Interval hull(Interval a, Interval b) {
  return {smaller(a.lo, b.lo), larger(a.hi, b.hi), has_nan(a, b)};
}
AE_HD constexpr Interval select(Interval c, Interval a, Interval b) {
  return is_true(c) ? a : is_false(c) ? b : hull(a, b);
}
AE_HD constexpr Interval minimum(Interval a, Interval b) {
  return {smaller(a.lo, b.lo), smaller(a.hi, b.hi), has_nan(a, b)};
}
AE_HD constexpr Interval maximum(Interval a, Interval b) {
  return {larger(a.lo, b.lo), larger(a.hi, b.hi), has_nan(a, b)};
}

// ---- shared by the int and the float functions ----
AE_HD constexpr bool contains(Interval a, double x) { return a.lo <= x && x <= a.hi; }
AE_HD constexpr bool unbounded(Interval a) { return a.lo == -kInf || a.hi == kInf; }
AE_HD constexpr double magnitude(Interval a) { return larger(-a.lo, a.hi); }
AE_HD constexpr Interval negated(Interval a) { return {-a.hi, -a.lo, a.maybe_nan}; }
AE_HD constexpr Interval absolute(Interval a) {
  return a.lo >= 0 ? a : a.hi <= 0 ? negated(a) : Interval{0, larger(-a.lo, a.hi), a.maybe_nan};
}

}  // namespace iv
}  // namespace ae

#include "common/interval_int.h"
// Floats last: they use nothing of the ints, and the unary functions end the vocabulary.
#include "common/interval_float.h"
