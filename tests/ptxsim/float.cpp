// Arithmetic of f32 and f64: IEEE, with the roundings, flushing and saturation that PTX names. A
// NaN result of f32 is the canonical one. Approximations (div.full, ex2, ...) are in approx.cpp.
#include <cfenv>
#include <cmath>

#include "lanes.h"

namespace ptxsim {
namespace {

enum { kFlush, kSaturate, kRound };
constexpr uint32_t kNan = 0x7fffffff;

template <class T>
constexpr bool kSingle = std::is_same_v<T, float>;

// Subnormals become zero of their sign.
inline uint64_t flushed(uint64_t bits) {
  return (bits & 0x7f800000u) == 0 ? bits & 0x80000000u : bits;
}

template <class T>
inline T read(uint64_t bits, bool flush) {
  if constexpr (kSingle<T>) return as_float(flush ? flushed(bits) : bits);
  return value<T>(bits);
}

// A result as it is stored: kMode is 0 where neither flushing nor saturation is asked for.
template <class T>
inline uint64_t write(T x, bool flush, bool saturate) {
  if constexpr (!kSingle<T>) {
    return bits_of(x);
  } else {
    uint64_t bits = bits_of(x);
    if (flush) bits = flushed(bits);
    if (saturate) return bits_of(as_float(bits) > 0 ? std::min(as_float(bits), 1.0f) : 0.0f);
    return x != x ? uint64_t{kNan} : bits;
  }
}

struct Plus {
  template <class T>
  T operator()(T a, T b, T) const {
    return a + b;
  }
};
struct Minus {
  template <class T>
  T operator()(T a, T b, T) const {
    return a - b;
  }
};
struct Times {
  template <class T>
  T operator()(T a, T b, T) const {
    return a * b;
  }
};
struct Over {
  template <class T>
  T operator()(T a, T b, T) const {
    return a / b;
  }
};
struct Fma {
  float operator()(float a, float b, float c) const { return __builtin_fmaf(a, b, c); }
  double operator()(double a, double b, double c) const { return __builtin_fma(a, b, c); }
};

template <class T, class F, bool kPlain>
void arithmetic(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t* a = warp.in(instr.op[1]);
  const uint64_t* b = warp.in(instr.op[2]);
  const uint64_t* c = std::is_same_v<F, Fma> ? warp.in(instr.op[3]) : b;
  bool flush = !kPlain && instr.attr[kFlush], saturate = !kPlain && instr.attr[kSaturate];
  write_lanes(warp.out(instr.op[0]), mask, [&](int l) {
    T x = F{}(read<T>(a[l], flush), read<T>(b[l], flush), read<T>(c[l], flush));
    return write(x, flush, saturate);
  });
}

constexpr int kRoundings[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};

// Other roundings than to nearest: rare, one lane at a time under the host's rounding.
template <class T, class F>
void rounded(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t* a = warp.in(instr.op[1]);
  const uint64_t* b = warp.in(instr.op[2]);
  const uint64_t* c = std::is_same_v<F, Fma> ? warp.in(instr.op[3]) : b;
  uint64_t* out = warp.out(instr.op[0]);
  bool flush = instr.attr[kFlush], saturate = instr.attr[kSaturate];
  int before = std::fegetround();
  std::fesetround(kRoundings[instr.attr[kRound]]);
  each_lane(mask, [&](int l) {
    volatile T x = read<T>(a[l], flush), y = read<T>(b[l], flush), z = read<T>(c[l], flush);
    volatile T result = F{}(T(x), T(y), T(z));
    out[l] = write(T(result), flush, saturate);
  });
  std::fesetround(before);
}

template <class F>
Exec choose(const Instr& instr, bool single) {
  bool plain = !instr.attr[kFlush] && !instr.attr[kSaturate];
  if (instr.attr[kRound] != 0) return single ? rounded<float, F> : rounded<double, F>;
  if (!single) return arithmetic<double, F, true>;
  return plain ? arithmetic<float, F, true> : arithmetic<float, F, false>;
}

// attr of minima: flush; NaN wins; the signs are combined (.xorsign.abs).
enum { kMinFlush, kMinNan, kXorSign };
template <class T, bool kMax>
void extremum(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t* a = warp.in(instr.op[1]);
  const uint64_t* b = warp.in(instr.op[2]);
  bool flush = instr.attr[kMinFlush], nan_wins = instr.attr[kMinNan],
       xorsign = instr.attr[kXorSign];
  constexpr uint64_t kSign = kSingle<T> ? uint64_t{1} << 31 : uint64_t{1} << 63;
  write_lanes(warp.out(instr.op[0]), mask, [&](int l) {
    T x = read<T>(a[l], flush), y = read<T>(b[l], flush);
    uint64_t sign = (bits_of(x) ^ bits_of(y)) & kSign;
    if (xorsign) x = std::abs(x), y = std::abs(y);
    // Of two zeros, -0 is the lesser.
    bool x_negative = bits_of(x) & kSign;
    bool first = x == y ? x_negative != kMax : kMax ? x > y : x < y;
    uint64_t bits = bits_of(first || y != y ? x : y);
    if (xorsign) bits = (bits & ~kSign) | sign;
    bool nan = nan_wins ? x != x || y != y : x != x && y != y;
    uint64_t not_a_number = kSingle<T> ? uint64_t{kNan} : 0x7fffffffffffffffu;
    return nan ? not_a_number : bits;
  });
}

// abs, neg and copysign change the sign bit alone; attr: flush, what is kept, what is flipped.
template <class T>
void change_sign(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t* a = warp.in(instr.op[1]);
  bool flush = kSingle<T> && instr.attr[0];
  uint64_t keep = uint64_t(instr.attr[1]), flip = uint64_t(instr.attr[2]);
  write_lanes(warp.out(instr.op[0]), mask,
              [&](int l) { return ((flush ? flushed(a[l]) : a[l]) & keep) ^ flip; });
}
template <class T>
void copy_sign(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t* a = warp.in(instr.op[1]);
  const uint64_t* b = warp.in(instr.op[2]);
  constexpr uint64_t kSign = kSingle<T> ? uint64_t{1} << 31 : uint64_t{1} << 63;
  write_lanes(warp.out(instr.op[0]), mask, [&](int l) { return (b[l] & ~kSign) | (a[l] & kSign); });
}

template <class T>
bool is_of_class(T x, int64_t which) {
  switch (which) {
    case 0:
      return std::isfinite(x);
    case 1:
      return std::isinf(x);
    case 2:
      return !std::isnan(x);
    case 3:
      return std::isnan(x);
    case 4:
      return std::isnormal(x);
    default:
      return std::fpclassify(x) == FP_SUBNORMAL;
  }
}
template <class T>
void test(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t* a = warp.in(instr.op[1]);
  uint64_t* out = warp.out(instr.op[0]);
  each_lane(mask, [&](int l) { out[l] = is_of_class(value<T>(a[l]), instr.attr[0]); });
}

bool decode_arithmetic(const Opcode& opcode, Instr& instr, bool single) {
  std::string_view name = opcode.name();
  Modifiers modifiers(opcode);
  modifiers.take(opcode.last());
  bool fused = name == "fma" || name == "mad";
  int rounding = modifiers.one_of({"rn", "rz", "rm", "rp"});
  if (rounding < 0 && (fused || name == "div")) unknown(opcode, "no rounding");
  instr.attr[kRound] = std::max(rounding, 0);
  instr.attr[kFlush] = single && modifiers.take("ftz");
  instr.attr[kSaturate] = single && name != "div" && modifiers.take("sat");
  modifiers.finish();
  expect_operands(opcode, instr, fused ? 4 : 3);
  instr.exec = name == "add"   ? choose<Plus>(instr, single)
               : name == "sub" ? choose<Minus>(instr, single)
               : name == "mul" ? choose<Times>(instr, single)
               : fused         ? choose<Fma>(instr, single)
                               : choose<Over>(instr, single);
  return true;
}

bool decode_sign(const Opcode& opcode, Instr& instr, bool single) {
  std::string_view name = opcode.name();
  Modifiers modifiers(opcode);
  modifiers.take(opcode.last());
  if (name == "copysign") {
    instr.exec = single ? copy_sign<float> : copy_sign<double>;
  } else {
    uint64_t sign = uint64_t{1} << (single ? 31 : 63);
    instr.attr[0] = single && modifiers.take("ftz");
    instr.attr[1] = int64_t(name == "abs" ? sign - 1 : sign | (sign - 1));
    instr.attr[2] = int64_t(name == "abs" ? 0 : sign);
    instr.exec = single ? change_sign<float> : change_sign<double>;
  }
  modifiers.finish();
  expect_operands(opcode, instr, name == "copysign" ? 3 : 2);
  return true;
}

}  // namespace

bool decode_float(const Opcode& opcode, Instr& instr) {
  std::string_view name = opcode.name();
  std::string_view type = opcode.last();
  bool single = type == "f32";
  if (!single && type != "f64") return false;
  if (name == "add" || name == "sub" || name == "mul" || name == "fma" || name == "mad" ||
      (name == "div" && !opcode.has("approx") && !opcode.has("full"))) {
    // Mixed precision, "fma.rn.f32.f16", is not of this family.
    for (std::string_view other : {"f16", "bf16"})
      if (opcode.has(other)) return false;
    return decode_arithmetic(opcode, instr, single);
  }
  if (name == "abs" || name == "neg" || name == "copysign")
    return decode_sign(opcode, instr, single);
  Modifiers modifiers(opcode);
  if (name == "min" || name == "max") {
    modifiers.take(type);
    instr.attr[kMinFlush] = single && modifiers.take("ftz");
    instr.attr[kMinNan] = single && modifiers.take("NaN");
    instr.attr[kXorSign] = single && modifiers.take("xorsign") && modifiers.take("abs");
    modifiers.finish();
    expect_operands(opcode, instr, 3);
    instr.exec = name == "min" ? (single ? extremum<float, false> : extremum<double, false>)
                               : (single ? extremum<float, true> : extremum<double, true>);
    return true;
  }
  if (name == "testp") {
    modifiers.take(type);
    instr.attr[0] = modifiers.required(
        {"finite", "infinite", "number", "notanumber", "normal", "subnormal"}, "class");
    modifiers.finish();
    expect_operands(opcode, instr, 2);
    instr.exec = single ? test<float> : test<double>;
    return true;
  }
  return false;
}

}  // namespace ptxsim
