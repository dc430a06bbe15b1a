// Arithmetic and comparisons of f16, f16x2, bf16 and bf16x2. Each result is rounded once, to
// nearest even: the operation is done in double and rounded to odd until then (narrow.h).
#include "family.h"
#include "machine.h"
#include "narrow.h"

namespace ptxsim {
namespace {

enum Flag : int64_t { kFtz = 1, kSat = 2, kRelu = 4, kNanWins = 8, kXorSign = 16 };

template <bool kPacked>
inline constexpr int kValues = kPacked ? 2 * kLanes : kLanes;

// Low halves first, then the high ones of packed types.
template <bool kPacked>
inline void unpack(const uint64_t* row, uint32_t* h) {
  for (int l = 0; l < kLanes; ++l) h[l] = row[l] & 0xffff;
  if constexpr (kPacked)
    for (int l = 0; l < kLanes; ++l) h[kLanes + l] = row[l] >> 16 & 0xffff;
}

template <class T, bool kPacked>
inline void unpack(const uint64_t* row, uint32_t* h, bool ftz) {
  unpack<kPacked>(row, h);
  if (ftz)
    for (int k = 0; k < kValues<kPacked>; ++k) h[k] = flush_half<T>(h[k]);
}

template <bool kPacked>
inline void pack(uint64_t* out, Mask mask, const uint32_t* h) {
  write_lanes(out, mask, [&](int l) -> uint64_t {
    if constexpr (kPacked) {
      return h[l] | h[kLanes + l] << 16;
    } else {
      return h[l];
    }
  });
}

struct Add {
  static constexpr int kSources = 2;
  static double apply(double a, double b, double) { return odd_sum(a, b); }
};
struct Sub {
  static constexpr int kSources = 2;
  static double apply(double a, double b, double) { return odd_sum(a, -b); }
};
struct Mul {
  static constexpr int kSources = 2;
  static double apply(double a, double b, double) { return a * b; }
};
struct Fma {
  static constexpr int kSources = 3;
  static double apply(double a, double b, double c) { return odd_sum(a * b, c); }
};

template <class T, bool kPacked, class Op>
void arithmetic(Warp& warp, const Instr& instr, Mask mask) {
  constexpr int n = kValues<kPacked>;
  int64_t flags = instr.attr[0];
  uint32_t a[n], b[n], c[n] = {}, d[n];
  unpack<T, kPacked>(warp.in(instr.op[1]), a, flags & kFtz);
  unpack<T, kPacked>(warp.in(instr.op[2]), b, flags & kFtz);
  if constexpr (Op::kSources == 3) unpack<T, kPacked>(warp.in(instr.op[3]), c, flags & kFtz);
  for (int k = 0; k < n; ++k)
    d[k] = T::narrow(odd_float(Op::apply(T::widen(a[k]), T::widen(b[k]), T::widen(c[k]))));
  if (flags & kFtz)
    for (int k = 0; k < n; ++k) d[k] = flush_half<T>(d[k]);
  if (flags & kSat)  // NaN, which is positive here, becomes +0
    for (int k = 0; k < n; ++k)
      d[k] = d[k] == kNanHalf || d[k] & 0x8000 ? 0 : d[k] < T::kOne ? d[k] : T::kOne;
  if (flags & kRelu)
    for (int k = 0; k < n; ++k) d[k] = d[k] & 0x8000 ? 0 : d[k];
  pack<kPacked>(warp.out(instr.op[0]), mask, d);
}

template <class T>
inline uint32_t infinity() {
  return T::kOne == Half::kOne ? 0x7c00 : 0x7f80;
}

// The order of the values, -0 below +0.
inline int32_t rank(uint32_t h) {
  return h & 0x8000 ? -int32_t(h & 0x7fff) - 1 : int32_t(h & 0x7fff);
}

template <class T, bool kPacked, bool kMax>
void extremum(Warp& warp, const Instr& instr, Mask mask) {
  constexpr int n = kValues<kPacked>;
  int64_t flags = instr.attr[0];
  uint32_t a[n], b[n], sign[n] = {}, d[n];
  unpack<T, kPacked>(warp.in(instr.op[1]), a, flags & kFtz);
  unpack<T, kPacked>(warp.in(instr.op[2]), b, flags & kFtz);
  if (flags & kXorSign) {
    for (int k = 0; k < n; ++k) {
      sign[k] = (a[k] ^ b[k]) & 0x8000;
      a[k] &= 0x7fff;
      b[k] &= 0x7fff;
    }
  }
  bool nan_wins = flags & kNanWins;
  for (int k = 0; k < n; ++k) {
    bool a_nan = (a[k] & 0x7fff) > infinity<T>(), b_nan = (b[k] & 0x7fff) > infinity<T>();
    bool take_a = kMax ? rank(a[k]) > rank(b[k]) : rank(a[k]) < rank(b[k]);
    uint32_t chosen = (take_a || b_nan) && !a_nan ? a[k] : b[k];
    bool nan = (a_nan && b_nan) || (nan_wins && (a_nan || b_nan));
    d[k] = nan ? kNanHalf : chosen | sign[k];
  }
  pack<kPacked>(warp.out(instr.op[0]), mask, d);
}

// attr: 0 flags, 1 bits cleared, 2 bits flipped.
template <class T, bool kPacked>
void change_sign(Warp& warp, const Instr& instr, Mask mask) {
  constexpr int n = kValues<kPacked>;
  uint32_t a[n];
  unpack<T, kPacked>(warp.in(instr.op[1]), a, instr.attr[0] & kFtz);
  uint32_t keep = ~uint32_t(instr.attr[1]), flip = uint32_t(instr.attr[2]);
  for (int k = 0; k < n; ++k) a[k] = (a[k] & keep) ^ flip;
  pack<kPacked>(warp.out(instr.op[0]), mask, a);
}

// A comparison is the set of the relations that make it true.
enum Relation : uint32_t { kLess = 1, kEqual = 2, kGreater = 4, kUnordered = 8 };
constexpr uint32_t kRelations[] = {
    kEqual,                          // eq
    kLess | kGreater,                // ne
    kLess,                           // lt
    kLess | kEqual,                  // le
    kGreater,                        // gt
    kGreater | kEqual,               // ge
    kEqual | kUnordered,             // equ
    kLess | kGreater | kUnordered,   // neu
    kLess | kUnordered,              // ltu
    kLess | kEqual | kUnordered,     // leu
    kGreater | kUnordered,           // gtu
    kGreater | kEqual | kUnordered,  // geu
    kLess | kEqual | kGreater,       // num
    kUnordered,                      // nan
};

enum Combine : int64_t { kAlone = -1, kAnd, kOr, kXor };

// attr: 0 flags, 1 relations, 2 Combine, 3 index of the first source, 4 bits for true, 5 whether
// packed results are one predicate per half.
template <class T, bool kPacked>
void compare(Warp& warp, const Instr& instr, Mask mask) {
  constexpr int n = kValues<kPacked>;
  int64_t flags = instr.attr[0], combine = instr.attr[2], first = instr.attr[3];
  uint32_t relations = uint32_t(instr.attr[1]), yes = uint32_t(instr.attr[4]);
  uint32_t a[n], b[n], d[n];
  unpack<T, kPacked>(warp.in(instr.op[first]), a, flags & kFtz);
  unpack<T, kPacked>(warp.in(instr.op[first + 1]), b, flags & kFtz);
  for (int k = 0; k < n; ++k) {
    float x = T::widen(a[k]), y = T::widen(b[k]);
    uint32_t relation = x < y ? kLess : x > y ? kGreater : x == y ? kEqual : kUnordered;
    d[k] = (relation & relations) != 0;
  }
  if (combine != kAlone) {
    const Operand& c = instr.op[first + 2];
    const uint64_t* other = warp.in(c);
    for (int k = 0; k < n; ++k) {
      uint32_t p = uint32_t(other[k % kLanes] & 1) ^ uint32_t(c.negated);
      d[k] = combine == kAnd ? d[k] & p : combine == kOr ? d[k] | p : d[k] ^ p;
    }
  }
  for (int k = 0; k < n; ++k) d[k] = d[k] ? yes : 0;
  if (instr.attr[5]) {
    pack<false>(warp.out(instr.op[0]), mask, d);
    pack<false>(warp.out(instr.op[1]), mask, d + kLanes * kPacked);
  } else {
    pack<kPacked>(warp.out(instr.op[0]), mask, d);
  }
}

template <class T, bool kPacked>
bool decode_type(const Opcode& opcode, Instr& instr) {
  std::string_view name = opcode.name();
  Modifiers modifier(opcode);
  modifier.take(opcode.last());
  if (name == "setp" || name == "set") {
    int relation = modifier.required({"eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu",
                                      "leu", "gtu", "geu", "num", "nan"},
                                     "comparison");
    int64_t combine = modifier.one_of({"and", "or", "xor"});
    instr.attr[0] = modifier.take("ftz") ? int64_t{kFtz} : 0;
    instr.attr[1] = kRelations[relation];
    instr.attr[2] = combine;
    instr.attr[3] = 1;
    instr.attr[4] = 1;
    if (name == "setp") {
      if (kPacked) instr.attr[3] = 2;
      instr.attr[5] = kPacked;
    } else if (modifier.one_of({"f16", "f16x2", "bf16", "bf16x2"}) >= 0) {
      std::string_view result = opcode.last(1);
      if (result.ends_with("x2") != kPacked) unknown(opcode, "types of different widths");
      instr.attr[4] = result.starts_with("bf16") ? Bfloat::kOne : Half::kOne;
    } else {
      int type = modifier.required({"u32", "s32", "u16", "s16"}, "result type");
      instr.attr[4] = kPacked || type >= 2 ? 0xffff : 0xffffffff;
    }
    modifier.finish();
    expect_operands(opcode, instr, size_t(instr.attr[3]) + 2 + (combine >= 0));
    instr.exec = compare<T, kPacked>;
    return true;
  }
  int64_t& flags = instr.attr[0];
  if (modifier.take("ftz")) flags |= kFtz;
  if (name == "neg" || name == "abs") {
    modifier.finish();
    expect_operands(opcode, instr, 2);
    instr.attr[name == "neg" ? 2 : 1] = 0x8000;
    instr.exec = change_sign<T, kPacked>;
    return true;
  }
  if (name == "min" || name == "max") {
    if (modifier.take("NaN")) flags |= kNanWins;
    if (modifier.take("xorsign")) {
      modifier.required({"abs"}, ".abs beside .xorsign");
      flags |= kXorSign;
    }
    modifier.finish();
    expect_operands(opcode, instr, 3);
    instr.exec = name == "min" ? extremum<T, kPacked, false> : extremum<T, kPacked, true>;
    return true;
  }
  modifier.take("rn");  // the default, and the only one
  if (modifier.take("sat")) flags |= kSat;
  if (name == "fma" && modifier.take("relu")) flags |= kRelu;
  modifier.finish();
  expect_operands(opcode, instr, name == "fma" ? 4 : 3);
  instr.exec = name == "add"   ? arithmetic<T, kPacked, Add>
               : name == "sub" ? arithmetic<T, kPacked, Sub>
               : name == "mul" ? arithmetic<T, kPacked, Mul>
                               : arithmetic<T, kPacked, Fma>;
  return true;
}

}  // namespace

bool decode_half(const Opcode& opcode, Instr& instr) {
  bool known = false;
  for (std::string_view name :
       {"add", "sub", "mul", "fma", "neg", "abs", "min", "max", "setp", "set"})
    known |= opcode.name() == name;
  if (!known) return false;
  std::string_view type = opcode.last();
  if (type == "f16") return decode_type<Half, false>(opcode, instr);
  if (type == "f16x2") return decode_type<Half, true>(opcode, instr);
  if (type == "bf16") return decode_type<Bfloat, false>(opcode, instr);
  if (type == "bf16x2") return decode_type<Bfloat, true>(opcode, instr);
  return false;
}

}  // namespace ptxsim
