// Floats narrower than 32 bits, and rounding to any format exactly once.
//
// Arithmetic on halves is done in double and rounded to odd on the way down (the last bit of an
// inexact result is set), which makes the final rounding the only one: a format with at least two
// digits more than the target, rounded to odd, keeps what the target's rounding has to know. The
// functions are free of branches, so that loops over the lanes of a warp are compiled to vectors.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace ptxsim {

// The NaN that arithmetic on halves returns; cvt and the approximations return these of 32 bits.
constexpr uint32_t kNanHalf = 0x7fff;
constexpr uint32_t kNanFloat = 0x7fffffff;

inline float half_to_float(uint32_t h) {
  uint32_t magnitude = (h & 0x7fff) << 13;
  // Moves the exponent's bias; exact, and makes subnormal halves normal.
  uint32_t bits = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  bits |= magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return std::bit_cast<float>(bits | (h & 0x8000) << 16);
}

inline float bfloat_to_float(uint32_t h) { return std::bit_cast<float>(h << 16); }

// To nearest, ties to even. NaN becomes 0x7fff.
inline uint32_t float_to_half(float x) {
  uint32_t bits = std::bit_cast<uint32_t>(x);
  uint32_t sign = bits >> 16 & 0x8000;
  uint32_t magnitude = bits & 0x7fffffff;
  uint32_t normal = (magnitude + 0xc8000fffu + (magnitude >> 13 & 1)) >> 13;
  // Below 2^-14, adding 1/2 leaves the rounded number of units of 2^-24 in the last bits.
  uint32_t subnormal =
      std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  return magnitude > 0x7f800000u ? kNanHalf : half | sign;
}

// To nearest, ties to even. NaN becomes 0x7fff.
inline uint32_t float_to_bfloat(float x) {
  uint32_t bits = std::bit_cast<uint32_t>(x);
  uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return (bits & 0x7fffffff) > 0x7f800000u ? kNanHalf : rounded;
}

// To odd: the value cut off, its last bit set where anything was lost.
inline float odd_float(double x) {
  float nearest = float(x);
  double back = nearest;
  uint32_t bits = std::bit_cast<uint32_t>(nearest);
  bits -= std::fabs(back) > std::fabs(x) ? 1u : 0u;
  bits |= back != x ? 1u : 0u;
  return std::bit_cast<float>(bits);
}

// x + y to odd.
inline double odd_sum(double x, double y) {
  double sum = x + y;
  double part = sum - x;
  double lost = (x - (sum - part)) + (y - part);
  int64_t bits = std::bit_cast<int64_t>(sum);
  int64_t away = (lost > 0) == (sum > 0) ? 1 : -1;
  bool inexact = (lost > 0) | (lost < 0);  // false for the NaN that an infinite sum leaves
  bits += inexact && (bits & 1) == 0 ? away : 0;
  return std::bit_cast<double>(bits);
}

// The two half types, for templates over them.
struct Half {
  static constexpr uint32_t kOne = 0x3c00;
  static float widen(uint32_t h) { return half_to_float(h); }
  static uint32_t narrow(float x) { return float_to_half(x); }
  static constexpr uint32_t kSmallestNormal = 0x0400;
};
struct Bfloat {
  static constexpr uint32_t kOne = 0x3f80;
  static float widen(uint32_t h) { return bfloat_to_float(h); }
  static uint32_t narrow(float x) { return float_to_bfloat(x); }
  static constexpr uint32_t kSmallestNormal = 0x0080;
};

// Subnormal values of a half type to zero, keeping the sign.
template <class T>
inline uint32_t flush_half(uint32_t h) {
  return (h & 0x7fff) < T::kSmallestNormal ? h & 0x8000 : h;
}

inline float flush(float x) {
  uint32_t bits = std::bit_cast<uint32_t>(x);
  return std::bit_cast<float>((bits & 0x7f800000u) == 0 ? bits & 0x80000000u : bits);
}

enum class Rounding : uint8_t { kNone, kEven, kAway, kZero, kDown, kUp };

// A binary format: `digits` of the significand, counting the hidden one, the exponent of the
// smallest normal value, and the largest finite value.
struct Format {
  int digits;
  int min_exponent;
  double largest;
};
constexpr Format kFormatHalf{11, -14, 65504.0};
constexpr Format kFormatBfloat{8, -126, 0x1.fep127};
constexpr Format kFormatTf32{11, -126, 0x1.ffcp127};
constexpr Format kFormatFloat{24, -126, 0x1.fffffep127};
constexpr Format kFormatE4M3{4, -6, 448.0};
constexpr Format kFormatE5M2{3, -14, 57344.0};

// x rounded to the format, as a double that it represents exactly. Infinite where the format has
// overflowed, unless `finite`, which stops at the largest value. x may have been rounded to odd.
double round_to(const Format& format, double x, Rounding rounding, bool finite = false);

}  // namespace ptxsim
