// cvt between every pair of types of sm_80 and the eight-bit floats of sm_89.
//
// Conversions that kernels do per element have loops of their own; the others go, lane by lane,
// through a double (rounded to odd where 64-bit integers do not fit) and are rounded once.
#include <algorithm>
#include <cmath>

#include "family.h"
#include "machine.h"
#include "narrow.h"

namespace ptxsim {
namespace {

enum Type : int64_t {
  kU8,
  kU16,
  kU32,
  kU64,
  kS8,
  kS16,
  kS32,
  kS64,
  kF16,
  kBF16,
  kF32,
  kF64,
  kTF32,
  kE4M3,
  kE5M2,
  kTypes
};
bool is_integer(int64_t type) { return type <= kS64; }
bool is_signed(int64_t type) { return type >= kS8 && type <= kS64; }
int bits_in(int64_t type) {
  constexpr int kBits[kTypes] = {8, 16, 32, 64, 8, 16, 32, 64, 16, 16, 32, 64, 32, 8, 8};
  return kBits[type];
}
const Format& format_of(int64_t type) {
  switch (type) {
    case kF16:
      return kFormatHalf;
    case kBF16:
      return kFormatBfloat;
    case kTF32:
      return kFormatTf32;
    case kE4M3:
      return kFormatE4M3;
    case kE5M2:
      return kFormatE5M2;
    default:
      return kFormatFloat;
  }
}

enum Flag : int64_t { kFtz = 1, kSat = 2, kRelu = 4, kFinite = 8, kToInteger = 16 };
// attr of every function here.
enum Attribute { kTo, kFrom, kRounding, kFlags };

// The sign bit, exponent and fraction of an eight-bit float of which `digits` - 1 bits are
// fraction. x is exact in the format.
uint32_t encode_eight(const Format& format, double x) {
  uint32_t sign = std::signbit(x) ? 0x80 : 0;
  if (std::isnan(x)) return 0x7f;
  double magnitude = std::fabs(x);
  int fraction_bits = format.digits - 1;
  if (magnitude < std::ldexp(1.0, format.min_exponent))
    return sign | uint32_t(std::ldexp(magnitude, fraction_bits - format.min_exponent));
  int exponent = std::ilogb(magnitude);
  uint32_t fraction =
      uint32_t(std::ldexp(magnitude, fraction_bits - exponent)) & ((1u << fraction_bits) - 1);
  return sign | uint32_t(exponent - format.min_exponent + 1) << fraction_bits | fraction;
}

double decode_eight(int64_t type, uint32_t bits) {
  const Format& format = format_of(type);
  int fraction_bits = format.digits - 1;
  uint32_t magnitude = bits & 0x7f, fraction = magnitude & ((1u << fraction_bits) - 1);
  int exponent = int(magnitude >> fraction_bits);
  double x;
  if (type == kE4M3 ? magnitude == 0x7f : magnitude > 0x7c) {
    x = std::numeric_limits<double>::quiet_NaN();
  } else if (type == kE5M2 && magnitude == 0x7c) {
    x = std::numeric_limits<double>::infinity();
  } else if (exponent == 0) {
    x = std::ldexp(fraction, format.min_exponent - fraction_bits);
  } else {
    x = std::ldexp(fraction + (1 << fraction_bits),
                   exponent - 1 + format.min_exponent - fraction_bits);
  }
  return bits & 0x80 ? -x : x;
}

double decode_float(int64_t type, uint64_t bits, bool ftz) {
  switch (type) {
    case kF16:
      return half_to_float(bits & 0xffff);
    case kBF16:
      return bfloat_to_float(bits & 0xffff);
    case kF32:
      return ftz ? flush(as_float(bits)) : as_float(bits);
    case kF64:
      return as_double(bits);
    default:
      return decode_eight(type, bits & 0xff);
  }
}

// x is exact in the type.
uint64_t encode_float(int64_t type, double x, bool ftz) {
  switch (type) {
    case kF16:
      return float_to_half(float(x));
    case kBF16:
      return float_to_bfloat(float(x));
    case kF32:
    case kTF32:
      if (x != x) return kNanFloat;
      return bits_of(ftz ? flush(float(x)) : float(x));
    case kF64:
      return x == x ? bits_of(x) : 0x7fffffffffffffffu;
    default:
      return encode_eight(format_of(type), x);
  }
}

double to_integral(double x, Rounding rounding) {
  switch (rounding) {
    case Rounding::kZero:
      return std::trunc(x);
    case Rounding::kDown:
      return std::floor(x);
    case Rounding::kUp:
      return std::ceil(x);
    default:
      return std::nearbyint(x);  // threads of the simulator leave the host's mode to nearest
  }
}

__int128 extend(int64_t type, uint64_t bits) {
  int shift = 64 - bits_in(type);
  return is_signed(type) ? __int128(int64_t(bits << shift) >> shift)
                         : __int128(bits << shift >> shift);
}

// A signed result is extended to its register, of attr[4] bits, which is zero-extended in its slot.
uint64_t truncate(const Instr& instr, __int128 x) {
  int cut = 64 - std::max(bits_in(instr.attr[kTo]), int(instr.attr[4]));
  return uint64_t(extend(instr.attr[kTo], uint64_t(x))) << cut >> cut;
}

__int128 clamp_to(int64_t type, __int128 x) {
  __int128 one = 1;
  int bits = bits_in(type);
  __int128 low = is_signed(type) ? -(one << (bits - 1)) : 0;
  __int128 high = is_signed(type) ? (one << (bits - 1)) - 1 : (one << bits) - 1;
  return std::clamp(x, low, high);
}

// The integer as a double: to odd, which is enough for narrower formats, or rounded.
double integer_to_double(__int128 x, bool odd, Rounding rounding) {
  double nearest = double(x);
  __int128 back = __int128(nearest);
  if (back == x) return nearest;
  double infinity = std::numeric_limits<double>::infinity();
  double below = back < x ? nearest : std::nextafter(nearest, -infinity);
  double above = back > x ? nearest : std::nextafter(nearest, infinity);
  if (odd) return std::bit_cast<uint64_t>(below) & 1 ? below : above;
  switch (rounding) {
    case Rounding::kZero:
      return x < 0 ? above : below;
    case Rounding::kDown:
      return below;
    case Rounding::kUp:
      return above;
    default:
      return nearest;
  }
}

uint64_t float_to_integer(const Instr& instr, double x) {
  int64_t to = instr.attr[kTo], from = instr.attr[kFrom];
  int bits = bits_in(to);
  if (x != x) {
    bool zero = from != kF64 && bits < 64;
    return truncate(instr, zero ? 0 : -(__int128(is_signed(to) ? 1 : -1) << (bits - 1)));
  }
  x = std::clamp(to_integral(x, Rounding(instr.attr[kRounding])), -0x1p65, 0x1p65);
  return truncate(instr, clamp_to(to, __int128(x)));
}

uint64_t to_float(const Instr& instr, double x) {
  int64_t to = instr.attr[kTo], flags = instr.attr[kFlags];
  Rounding rounding = Rounding(instr.attr[kRounding]);
  if (flags & kToInteger) {
    x = to_integral(x, rounding);
  } else if (to != kF64) {
    x = round_to(format_of(to), x, rounding, flags & kFinite);
  }
  if (flags & kSat) x = x > 0 ? std::min(x, 1.0) : 0.0;
  if (flags & kRelu && !(x > 0) && x == x) x = 0.0;
  return encode_float(to, x, flags & kFtz);
}

void one_by_one(Warp& warp, const Instr& instr, Mask mask) {
  int64_t to = instr.attr[kTo], from = instr.attr[kFrom], flags = instr.attr[kFlags];
  const uint64_t* in = warp.in(instr.op[1]);
  uint64_t* out = warp.out(instr.op[0]);
  each_lane(mask, [&](int l) {
    if (is_integer(from)) {
      __int128 x = extend(from, in[l]);
      if (is_integer(to)) {
        out[l] = truncate(instr, flags & kSat ? clamp_to(to, x) : x);
      } else {
        out[l] = to_float(instr, integer_to_double(x, to != kF64, Rounding(instr.attr[kRounding])));
      }
    } else {
      double x = decode_float(from, in[l], flags & kFtz);
      out[l] = is_integer(to) ? float_to_integer(instr, x) : to_float(instr, x);
    }
  });
}

// Integer to integer: attr 4 and 5 are shifts that extend the source and cut the result.
template <bool kSigned>
void extend_integer(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t* in = warp.in(instr.op[1]);
  int source = int(instr.attr[4]), cut = int(instr.attr[5]);
  write_lanes(warp.out(instr.op[0]), mask, [=](int l) -> uint64_t {
    uint64_t x = in[l] << source;
    x = kSigned ? uint64_t(int64_t(x) >> source) : x >> source;
    return x << cut >> cut;
  });
}

// To nearest, without other modifiers.
template <class T>
void widen_half(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t* in = warp.in(instr.op[1]);
  write_lanes(warp.out(instr.op[0]), mask, [=](int l) -> uint64_t {
    float x = T::widen(uint32_t(in[l]) & 0xffff);
    return x == x ? bits_of(x) : uint64_t{kNanFloat};
  });
}
template <class T>
void narrow_float(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t* in = warp.in(instr.op[1]);
  write_lanes(warp.out(instr.op[0]), mask,
              [=](int l) -> uint64_t { return T::narrow(as_float(in[l])); });
}
template <class T>
void narrow_pair(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t *high = warp.in(instr.op[1]), *low = warp.in(instr.op[2]);
  write_lanes(warp.out(instr.op[0]), mask, [=](int l) -> uint64_t {
    return T::narrow(as_float(low[l])) | T::narrow(as_float(high[l])) << 16;
  });
}

// 32-bit integers to f32, to nearest.
template <class Integer>
void integer_to_float(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t* in = warp.in(instr.op[1]);
  write_lanes(warp.out(instr.op[0]), mask,
              [=](int l) -> uint64_t { return bits_of(float(Integer(in[l]))); });
}

// To a packed type from two f32, the first of which becomes the upper half.
void pair_of_floats(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t *high = warp.in(instr.op[1]), *low = warp.in(instr.op[2]);
  uint64_t* out = warp.out(instr.op[0]);
  int bits = bits_in(instr.attr[kTo]);
  bool ftz = instr.attr[kFlags] & kFtz;
  each_lane(mask, [&](int l) {
    uint64_t upper = to_float(instr, decode_float(kF32, high[l], ftz));
    out[l] = upper << bits | to_float(instr, decode_float(kF32, low[l], ftz));
  });
}

// To a packed type from a packed one.
void pair_of_halves(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t* in = warp.in(instr.op[1]);
  uint64_t* out = warp.out(instr.op[0]);
  int to = bits_in(instr.attr[kTo]), from = bits_in(instr.attr[kFrom]);
  each_lane(mask, [&](int l) {
    uint64_t upper = to_float(instr, decode_float(instr.attr[kFrom], in[l] >> from, false));
    out[l] = upper << to | to_float(instr, decode_float(instr.attr[kFrom], in[l], false));
  });
}

// The type of one element, and whether there are two.
bool parse_type(std::string_view text, int64_t& type, bool& packed) {
  constexpr std::string_view kNames[kTypes] = {"u8",  "u16", "u32",  "u64",  "s8",
                                               "s16", "s32", "s64",  "f16",  "bf16",
                                               "f32", "f64", "tf32", "e4m3", "e5m2"};
  packed = text.ends_with("x2");
  if (packed) text.remove_suffix(2);
  for (type = 0; type < kTypes; ++type)
    if (kNames[type] == text)
      return packed ? type == kF16 || type == kBF16 || type >= kE4M3 : type < kE4M3;
  return false;
}

void check_rounding(const Opcode& opcode, int64_t to, int64_t from, bool packed, Rounding rounding,
                    bool to_whole) {
  bool whole_needed = is_integer(to) && !is_integer(from);
  bool whole_legal = whole_needed || (to == from && !is_integer(to) && !packed);
  // What the source can hold and the target cannot.
  bool loses = is_integer(from) ? !is_integer(to)
               : is_integer(to) ? false
                                : packed || to == kTF32 || bits_in(to) < bits_in(from) ||
                                      (to != from && bits_in(to) == bits_in(from));
  if (whole_needed && !to_whole) unknown(opcode, "needs .rni, .rzi, .rmi or .rpi");
  if (to_whole && !whole_legal) unknown(opcode, "cannot round to an integer");
  if (loses && rounding == Rounding::kNone) unknown(opcode, "needs a rounding modifier");
  if (!loses && !to_whole && rounding != Rounding::kNone)
    unknown(opcode, "is exact: no rounding modifier");
  if (rounding == Rounding::kAway && to != kTF32) unknown(opcode, ".rna is for .tf32");
}

}  // namespace

bool decode_convert(const Opcode& opcode, Instr& instr) {
  if (opcode.name() != "cvt") return false;
  if (opcode.part.size() < 3) unknown(opcode, "no types");
  int64_t to, from;
  bool to_packed, from_packed;
  if (!parse_type(opcode.last(1), to, to_packed) || !parse_type(opcode.last(), from, from_packed) ||
      (from_packed && !to_packed) || from == kTF32)
    unknown(opcode, "these types");
  bool eight = to >= kE4M3 || from >= kE4M3;
  if (to_packed && (is_integer(from) || from == kF64 || (from_packed && !eight) ||
                    (!from_packed && from != kF32)))
    unknown(opcode, "these types");
  if (to == kTF32 && from != kF32) unknown(opcode, "these types");

  Modifiers modifier(opcode);
  modifier.take(opcode.last());
  modifier.take(opcode.last(1));
  constexpr Rounding kOrder[] = {Rounding::kEven, Rounding::kZero, Rounding::kDown,
                                 Rounding::kUp,   Rounding::kAway, Rounding::kEven,
                                 Rounding::kZero, Rounding::kDown, Rounding::kUp};
  int order = modifier.one_of({"rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi"});
  Rounding rounding = order < 0 ? Rounding::kNone : kOrder[order];
  int64_t flags = order > 4 && !is_integer(to) ? int64_t{kToInteger} : 0;
  check_rounding(opcode, to, from, to_packed, rounding, order > 4);
  if ((to == kF32 || from == kF32) && modifier.take("ftz")) flags |= kFtz;
  if (!to_packed && modifier.take("sat")) flags |= kSat;
  bool narrow = to == kF16 || to == kBF16 || to == kTF32 || to >= kE4M3;
  if (narrow && modifier.take("relu")) flags |= kRelu;
  if (narrow && modifier.take("satfinite")) flags |= kFinite;
  if (to >= kE4M3 && !(flags & kFinite)) unknown(opcode, "needs .satfinite");
  modifier.finish();
  bool two_sources = to_packed && !from_packed;
  expect_operands(opcode, instr, two_sources ? 3 : 2);

  instr.attr[kTo] = to;
  instr.attr[kFrom] = from;
  instr.attr[kRounding] = int64_t(rounding);
  instr.attr[kFlags] = flags;
  bool plain = flags == 0 && rounding == Rounding::kEven;
  if (to_packed) {
    instr.exec = !two_sources ? pair_of_halves : pair_of_floats;
    if (two_sources && plain && to == kF16) instr.exec = narrow_pair<Half>;
    if (two_sources && plain && to == kBF16) instr.exec = narrow_pair<Bfloat>;
    return true;
  }
  int register_bits = 8 * instr.op[0].bytes;
  bool extended = is_integer(to) && is_signed(to) && register_bits > bits_in(to);
  instr.attr[4] = extended ? register_bits : 0;
  instr.exec = one_by_one;
  if (is_integer(to) && is_integer(from) && flags == 0 && !extended) {
    instr.attr[4] = 64 - bits_in(from);
    instr.attr[5] = 64 - bits_in(to);
    instr.exec = is_signed(from) ? extend_integer<true> : extend_integer<false>;
  } else if (to == kF32 && plain && (from == kS32 || from == kU32)) {
    instr.exec = from == kS32 ? integer_to_float<int32_t> : integer_to_float<uint32_t>;
  } else if (from == kF32 && plain && to == kF16) {
    instr.exec = narrow_float<Half>;
  } else if (from == kF32 && plain && to == kBF16) {
    instr.exec = narrow_float<Bfloat>;
  } else if (to == kF32 && from == kF16 && (flags & ~kFtz) == 0) {
    instr.exec = widen_half<Half>;  // no f16 is subnormal as f32
  } else if (to == kF32 && from == kBF16 && flags == 0) {
    instr.exec = widen_half<Bfloat>;
  }
  return true;
}

}  // namespace ptxsim
