// What the special function unit computes, and divisions and roots: ex2, lg2, rcp, rsqrt, sqrt,
// sin, cos, tanh, div.
//
// An approximation is computed in double, moved by an amount that the seed and the argument decide,
// and rounded, so that it is anywhere within the error that the PTX ISA allows and another seed
// gives other results: what passes here rests on the promise, not on one chip's tables. The errors
// allowed are
//   ex2.f32 2 ulp, rcp.f32 1 ulp, div.approx.f32 and div.full.f32 2 ulp;
//   lg2.f32 2^-22, absolute within (0.5, 2), relative elsewhere;
//   sqrt.f32 2^-23, rsqrt.f32 2^-22.9, tanh.f32 2^-11, relative;
//   sin.f32, cos.f32 2^-20.5 absolute within 2 pi, 2^-14.7 within 100 pi, and 2^-14.7 of us beyond,
//   where none is promised;
//   ex2.f16 2^-9.9, ex2.bf16 2^-7, relative; tanh.f16 2^-10.987, tanh.bf16 2^-8, absolute.
// Exact are: results for zeros, infinities and NaN as the ISA's tables list them; results that are
// zero, infinite or too small for the ulps they may move; subnormal arguments of tanh. No tanh, sin
// or cos leaves [-1, 1], and no tanh has the wrong sign. With an IEEE rounding (.rn, .rz, .rm, .rp)
// results are exact.
#include <algorithm>
#include <cmath>

#include "counters.h"
#include "family.h"
#include "machine.h"
#include "narrow.h"

namespace ptxsim {
namespace {

constexpr double kHalfUlp = 0x1p-24;  // of f32, relative
constexpr float kNan = std::bit_cast<float>(kNanFloat);

// Uniform in [-1, 1].
inline double signed_unit(uint32_t bits) { return double(int32_t(bits)) * 0x1p-31; }

// x moved by up to `ulps` of its last places.
inline float move_ulps(float x, uint32_t random, int ulps) {
  uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffff;
  uint32_t choices = uint32_t(2 * ulps + 1);
  uint32_t step = uint32_t(uint64_t{random} * choices >> 32) - uint32_t(ulps);
  bool movable = magnitude > uint32_t(ulps) && magnitude < 0x7f800000u - uint32_t(ulps);
  return std::bit_cast<float>(bits + (movable ? step : 0u));
}

// 2^x to about 2^-50, for |x| < 2000.
inline double exp2_double(double x) {
  constexpr double kRound = 0x1.8p52;
  double shifted = x + kRound;  // the nearest integer in its last bits
  double f = (x - (shifted - kRound)) * 0.69314718055994530942;
  double p = f * (1.0 / 6227020800) + 1.0 / 479001600;
  p = p * f + 1.0 / 39916800;
  p = p * f + 1.0 / 3628800;
  p = p * f + 1.0 / 362880;
  p = p * f + 1.0 / 40320;
  p = p * f + 1.0 / 5040;
  p = p * f + 1.0 / 720;
  p = p * f + 1.0 / 120;
  p = p * f + 1.0 / 24;
  p = p * f + 1.0 / 6;
  p = p * f + 1.0 / 2;
  p = (p * f + 1.0) * f + 1.0;
  uint64_t exponent = std::bit_cast<uint64_t>(shifted) - std::bit_cast<uint64_t>(kRound);
  return std::bit_cast<double>(std::bit_cast<uint64_t>(p) + (exponent << 52));
}

// NaN or infinite arguments give what exp2 gives; clamped to where the result is 0 or infinite.
inline double exp2_clamped(float x) {
  double bounded = x < -1000.0f ? -1000.0 : x > 1000.0f ? 1000.0 : double(x);
  return exp2_double(x == x ? bounded : 0.0);
}

// Whether attr[0] says .ftz.
inline float argument(const Instr& instr, uint64_t bits) {
  float x = as_float(bits);
  return instr.attr[0] ? flush(x) : x;
}
inline uint64_t result(const Instr& instr, float x) {
  x = instr.attr[0] ? flush(x) : x;
  return x == x ? bits_of(x) : uint64_t{kNanFloat};
}

void ex2(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t* in = warp.in(instr.op[1]);
  uint32_t random[kLanes];
  float y[kLanes];
  random_lanes(warp, in, random);
  for (int l = 0; l < kLanes; ++l) {
    float x = argument(instr, in[l]);
    float exact = float(exp2_clamped(x));
    float moved = move_ulps(exact, random[l], 2);
    y[l] = x != x ? x : x == 0 ? 1.0f : moved;
  }
  write_lanes(warp.out(instr.op[0]), mask, [&](int l) { return result(instr, y[l]); });
}

// An approximation of one f32: value(x, u) returns the result for the argument x, moved as u in
// [-1, 1] and `random` say.
template <class F>
inline void approximate(Warp& warp, const Instr& instr, Mask mask, F value) {
  const uint64_t* in = warp.in(instr.op[1]);
  uint64_t* out = warp.out(instr.op[0]);
  uint32_t random[kLanes];
  random_lanes(warp, in, random);
  each_lane(mask, [&](int l) { out[l] = result(instr, value(argument(instr, in[l]), random[l])); });
}

// x(1 + u error), leaving room for the rounding to f32.
inline float relative(double x, double error, uint32_t random) {
  return float(x * (1 + signed_unit(random) * (error - kHalfUlp)));
}

void lg2(Warp& warp, const Instr& instr, Mask mask) {
  approximate(warp, instr, mask, [](float x, uint32_t random) {
    if (!(x > 0) || std::isinf(x)) return std::log2(x);
    double exact = std::log2(double(x));
    if (x > 0.5f && x < 2.0f) return float(exact + signed_unit(random) * (0x1p-22 - kHalfUlp / 2));
    return relative(exact, 0x1p-22, random);
  });
}

void rcp(Warp& warp, const Instr& instr, Mask mask) {
  approximate(warp, instr, mask, [](float x, uint32_t random) {
    return move_ulps(float(1.0 / double(x)), random, 1);
  });
}

void sqrt_approx(Warp& warp, const Instr& instr, Mask mask) {
  approximate(warp, instr, mask, [](float x, uint32_t random) {
    return relative(std::sqrt(double(x)), 0x1p-23, random);
  });
}

void rsqrt(Warp& warp, const Instr& instr, Mask mask) {
  const double error = std::exp2(-22.9);
  approximate(warp, instr, mask, [error](float x, uint32_t random) {
    return relative(1 / std::sqrt(double(x)), error, random);
  });
}

template <bool kSine>
void wave(Warp& warp, const Instr& instr, Mask mask) {
  constexpr double kTwoPi = 6.283185307179586;
  const double near = std::exp2(-20.5), far = std::exp2(-14.7);
  approximate(warp, instr, mask, [=](float x, uint32_t random) {
    if (x == 0) return kSine ? x : 1.0f;
    double exact = kSine ? std::sin(double(x)) : std::cos(double(x));
    double error = (std::fabs(x) <= float(kTwoPi) ? near : far) - kHalfUlp;
    return float(std::clamp(exact + signed_unit(random) * error, -1.0, 1.0));
  });
}

void tanh_float(Warp& warp, const Instr& instr, Mask mask) {
  approximate(warp, instr, mask, [](float x, uint32_t random) {
    if (std::fpclassify(x) == FP_SUBNORMAL || x == 0 || std::isinf(x) || x != x)
      return std::isinf(x) ? std::copysign(1.0f, x) : x;
    return std::clamp(relative(std::tanh(double(x)), 0x1p-11, random), -1.0f, 1.0f);
  });
}

// Approximations of halves: value(x, u) in double, u in [-1, 1].
template <class T, bool kPacked, class F>
inline void approximate_halves(Warp& warp, const Instr& instr, Mask mask, F value) {
  const uint64_t* in = warp.in(instr.op[1]);
  uint64_t* out = warp.out(instr.op[0]);
  bool ftz = instr.attr[0];
  uint32_t random[2][kLanes];
  for (int half = 0; half < (kPacked ? 2 : 1); ++half) {
    uint64_t bits[kLanes];
    for (int l = 0; l < kLanes; ++l) bits[l] = in[l] >> (16 * half) & 0xffff;
    random_lanes(warp, bits, random[half]);
  }
  each_lane(mask, [&](int l) {
    uint32_t packed = 0;
    for (int half = 0; half < (kPacked ? 2 : 1); ++half) {
      uint32_t bits = in[l] >> (16 * half) & 0xffff;
      if (ftz) bits = flush_half<T>(bits);
      uint32_t y = T::narrow(odd_float(value(T::widen(bits), signed_unit(random[half][l]))));
      packed |= (ftz ? flush_half<T>(y) : y) << (16 * half);
    }
    out[l] = packed;
  });
}

// The relative error of rounding to the type.
template <class T>
constexpr double kRoundoff = T::kOne == Half::kOne ? 0x1p-11 : 0x1p-8;
template <class T>
constexpr double kSmallest = T::kOne == Half::kOne ? 0x1p-14 : 0x1p-126;

template <class T, bool kPacked>
void ex2_half(Warp& warp, const Instr& instr, Mask mask) {
  const double error = (T::kOne == Half::kOne ? std::exp2(-9.9) : 0x1p-7) - kRoundoff<T>;
  approximate_halves<T, kPacked>(warp, instr, mask, [error](float x, double u) {
    if (x == 0) return 1.0;
    if (x != x) return double(x);
    double exact = exp2_clamped(x);
    return exact < kSmallest<T> ? exact : exact * (1 + u * error);
  });
}

template <class T, bool kPacked>
void tanh_half(Warp& warp, const Instr& instr, Mask mask) {
  // Below 1, half a unit in the last place is half the relative error of rounding.
  const double error = (T::kOne == Half::kOne ? std::exp2(-10.987) : 0x1p-8) - kRoundoff<T> / 2;
  approximate_halves<T, kPacked>(warp, instr, mask, [error](float x, double u) {
    if (x == 0 || x != x || std::fabs(x) < kSmallest<T>) return double(x);
    if (std::isinf(x)) return double(std::copysign(1.0f, x));
    double exact = std::tanh(double(x));
    double moved = std::fabs(exact) + u * std::min(error, std::fabs(exact));
    return std::copysign(std::min(moved, 1.0), exact);
  });
}

// attr: 0 .ftz, 1 whether it is div.approx, which is a * (1/b).
void divide_approx(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t *a = warp.in(instr.op[1]), *b = warp.in(instr.op[2]);
  uint64_t* out = warp.out(instr.op[0]);
  uint32_t random[kLanes];
  uint64_t both[kLanes];
  for (int l = 0; l < kLanes; ++l) both[l] = a[l] * 0x9e3779b1u + b[l];
  random_lanes(warp, both, random);
  each_lane(mask, [&](int l) {
    float x = argument(instr, a[l]), y = argument(instr, b[l]);
    float quotient = move_ulps(float(double(x) / double(y)), random[l], 2);
    if (instr.attr[1] && std::fabs(y) > 0x1p126f && !std::isinf(y) && x == x)
      quotient = std::isinf(x) ? kNan : std::copysign(0.0f, quotient);
    out[l] = result(instr, quotient);
  });
}

// IEEE results. attr: 0 .ftz, 1 Rounding, 2 Function.
enum Function : int64_t { kRcp, kSqrt, kDiv };

template <class T>
void exact(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t* a = warp.in(instr.op[1]);
  const uint64_t* b = instr.attr[2] == kDiv ? warp.in(instr.op[2]) : a;
  uint64_t* out = warp.out(instr.op[0]);
  each_lane(mask, [&](int l) {
    auto compute = [&](auto x, auto y) {
      return instr.attr[2] == kRcp ? 1 / x : instr.attr[2] == kSqrt ? std::sqrt(x) : x / y;
    };
    if constexpr (sizeof(T) == 8) {
      double y = compute(as_double(a[l]), as_double(b[l]));
      out[l] = y == y ? bits_of(y) : 0xfff8000000000000u;
    } else {
      // Quotients and roots of f32 are never so close to one, without being one, that rounding to
      // double first would matter.
      double y = compute(double(argument(instr, a[l])), double(argument(instr, b[l])));
      Rounding rounding = Rounding(instr.attr[1]);
      float x = rounding == Rounding::kEven ? float(y) : float(round_to(kFormatFloat, y, rounding));
      out[l] = result(instr, x);
    }
  });
}

void rsqrt_double(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t* in = warp.in(instr.op[1]);
  write_lanes(warp.out(instr.op[0]), mask,
              [&](int l) { return bits_of(1 / std::sqrt(as_double(in[l]))); });
}

Exec half_function(const Opcode& opcode, bool is_ex2) {
  std::string_view type = opcode.last();
  if (type == "f16") return is_ex2 ? ex2_half<Half, false> : tanh_half<Half, false>;
  if (type == "f16x2") return is_ex2 ? ex2_half<Half, true> : tanh_half<Half, true>;
  if (type == "bf16") return is_ex2 ? ex2_half<Bfloat, false> : tanh_half<Bfloat, false>;
  if (type == "bf16x2") return is_ex2 ? ex2_half<Bfloat, true> : tanh_half<Bfloat, true>;
  unknown(opcode, "this type");
}

bool decode_ieee(const Opcode& opcode, Instr& instr, Modifiers& modifier, Function function) {
  constexpr Rounding kOrder[] = {Rounding::kEven, Rounding::kZero, Rounding::kDown, Rounding::kUp};
  Rounding rounding = kOrder[modifier.required({"rn", "rz", "rm", "rp"}, "rounding")];
  bool ftz = modifier.take("ftz"), wide = modifier.take("f64");
  if (!wide) modifier.required({"f32"}, "type");
  modifier.finish();
  if (wide && (rounding != Rounding::kEven || ftz)) unknown(opcode, "of f64, only .rn");
  expect_operands(opcode, instr, function == kDiv ? 3 : 2);
  instr.attr[0] = ftz;
  instr.attr[1] = int64_t(rounding);
  instr.attr[2] = function;
  instr.exec = wide ? exact<double> : exact<float>;
  return true;
}

}  // namespace

bool decode_approx(const Opcode& opcode, Instr& instr) {
  std::string_view name = opcode.name();
  bool is_div = name == "div" && (opcode.last() == "f32" || opcode.last() == "f64");
  if (!(is_div || name == "ex2" || name == "lg2" || name == "rcp" || name == "rsqrt" ||
        name == "sqrt" || name == "sin" || name == "cos" || name == "tanh"))
    return false;
  instr.counter = name == "ex2" ? kExp : kSpecial;
  Modifiers modifier(opcode);
  bool approx = modifier.take("approx"), full = is_div && modifier.take("full");
  if (!approx && !full) {
    if (name != "rcp" && name != "sqrt" && !is_div) unknown(opcode, "neither .approx nor known");
    return decode_ieee(opcode, instr, modifier,
                       name == "rcp"    ? kRcp
                       : name == "sqrt" ? kSqrt
                                        : kDiv);
  }
  instr.attr[0] = modifier.take("ftz");
  instr.attr[1] = approx;
  expect_operands(opcode, instr, is_div ? 3 : 2);
  if (opcode.last().ends_with("f16") || opcode.last().ends_with("f16x2")) {
    if (name != "ex2" && name != "tanh") unknown(opcode, "this type");
    modifier.take(opcode.last());
    modifier.finish();
    instr.exec = half_function(opcode, name == "ex2");
    return true;
  }
  if (name == "rsqrt" && !instr.attr[0] && modifier.take("f64")) {
    modifier.finish();
    instr.exec = rsqrt_double;
    return true;
  }
  modifier.required({"f32"}, "type");
  modifier.finish();
  instr.exec = name == "ex2"     ? ex2
               : name == "lg2"   ? lg2
               : name == "rcp"   ? rcp
               : name == "rsqrt" ? rsqrt
               : name == "sqrt"  ? sqrt_approx
               : name == "sin"   ? wave<true>
               : name == "cos"   ? wave<false>
               : name == "tanh"  ? tanh_float
                                 : divide_approx;
  return true;
}

}  // namespace ptxsim
