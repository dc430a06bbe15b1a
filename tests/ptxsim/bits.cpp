// Logic, shifts, and instructions on fields of bits.
#include <bit>

#include "integer.h"

namespace ptxsim {
namespace {

struct And {
  template <class T>
  T operator()(T a, T b) const {
    return a & b;
  }
};
struct Or {
  template <class T>
  T operator()(T a, T b) const {
    return a | b;
  }
};
struct Xor {
  template <class T>
  T operator()(T a, T b) const {
    return a ^ b;
  }
};
struct Not {
  template <class T>
  T operator()(T a) const {
    return T(~a);
  }
};
struct NotPredicate {
  uint64_t operator()(uint64_t a) const { return ~a & 1; }
};
struct LogicalNot {
  template <class T>
  T operator()(T a) const {
    return a == 0;
  }
};

// Shifts beyond the width give zero, or the sign.
template <class T>
void shift_left(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t* a = warp.in(instr.op[1]);
  const uint64_t* b = warp.in(instr.op[2]);
  constexpr uint32_t kBits = 8 * sizeof(T);
  write_lanes(warp.out(instr.op[0]), mask, [&](int l) {
    uint32_t by = uint32_t(b[l]);
    return by < kBits ? uint64_t(T(a[l] << (by & 63))) : 0;
  });
}
template <class T>
void shift_right(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t* a = warp.in(instr.op[1]);
  const uint64_t* b = warp.in(instr.op[2]);
  constexpr uint32_t kBits = 8 * sizeof(T);
  constexpr uint32_t kMost = std::is_signed_v<T> ? kBits - 1 : 63;
  write_lanes(warp.out(instr.op[0]), mask, [&](int l) {
    uint32_t by = uint32_t(b[l]);
    uint32_t within = by < kBits ? by : kMost;
    uint64_t shifted = slot(T(T(a[l]) >> (within & (kBits - 1))));
    return std::is_signed_v<T> || by < kBits ? shifted : 0;
  });
}

// attr: left; wraps (otherwise clamps).
void funnel(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t* low = warp.in(instr.op[1]);
  const uint64_t* high = warp.in(instr.op[2]);
  const uint64_t* c = warp.in(instr.op[3]);
  bool left = instr.attr[0], wraps = instr.attr[1];
  write_lanes(warp.out(instr.op[0]), mask, [&](int l) {
    uint32_t by = wraps ? uint32_t(c[l]) & 31 : std::min<uint32_t>(uint32_t(c[l]), 32);
    uint64_t both = uint64_t(uint32_t(high[l])) << 32 | uint32_t(low[l]);
    return uint64_t(uint32_t(left ? both << by >> 32 : both >> by));
  });
}

void lop3(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t* a = warp.in(instr.op[1]);
  const uint64_t* b = warp.in(instr.op[2]);
  const uint64_t* c = warp.in(instr.op[3]);
  uint64_t table = warp.in(instr.op[4])[0];
  write_lanes(warp.out(instr.op[0]), mask, [&](int l) {
    uint64_t result = 0;
    for (int i = 0; i < 8; ++i) {
      uint64_t term = (i & 4 ? a[l] : ~a[l]) & (i & 2 ? b[l] : ~b[l]) & (i & 1 ? c[l] : ~c[l]);
      result |= table >> i & 1 ? term : 0;
    }
    return uint64_t(uint32_t(result));
  });
}

template <class T>
struct CountOnes {
  uint32_t operator()(T a) const { return uint32_t(std::popcount(a)); }
};
template <class T>
struct LeadingZeros {
  uint32_t operator()(T a) const { return uint32_t(std::countl_zero(a)); }
};
struct Reverse {
  template <class T>
  T operator()(T a) const {
    T result = 0;
    for (size_t i = 0; i < 8 * sizeof(T); ++i) result = T(result << 1 | (a >> i & 1));
    return result;
  }
};

// The highest bit that differs from the sign; attr: as a count of leading bits.
template <class T>
void find_bit(Warp& warp, const Instr& instr, Mask mask) {
  using U = std::make_unsigned_t<T>;
  const uint64_t* a = warp.in(instr.op[1]);
  uint64_t* out = warp.out(instr.op[0]);
  bool shift_amount = instr.attr[0];
  each_lane(mask, [&](int l) {
    T x = T(a[l]);
    U bits = U(std::is_signed_v<T> && x < 0 ? ~x : x);
    int leading = std::countl_zero(bits);
    bool none = bits == 0;
    out[l] =
        none ? 0xffffffffu : uint64_t(shift_amount ? leading : int(8 * sizeof(T)) - 1 - leading);
  });
}

template <class T>
void extract(Warp& warp, const Instr& instr, Mask mask) {
  using U = std::make_unsigned_t<T>;
  const uint64_t* a = warp.in(instr.op[1]);
  const uint64_t* b = warp.in(instr.op[2]);
  const uint64_t* c = warp.in(instr.op[3]);
  constexpr uint32_t kBits = 8 * sizeof(T);
  uint64_t* out = warp.out(instr.op[0]);
  each_lane(mask, [&](int l) {
    uint32_t position = b[l] & 0xff, length = c[l] & 0xff;
    if (length == 0) {
      out[l] = 0;
      return;
    }
    U x = U(a[l]);
    U sign = U(std::is_signed_v<T> ? x >> std::min(position + length - 1, kBits - 1) & 1 : 0);
    U fill = sign ? U(~U{0}) : U{0};
    uint32_t taken = position >= kBits ? 0 : std::min(length, kBits - position);
    U keep = taken == kBits ? U(~U{0}) : U((U{1} << taken) - 1);
    U field = taken == 0 ? U{0} : U(x >> position);
    out[l] = U((field & keep) | (fill & ~keep));
  });
}

template <class U>
void insert(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t* a = warp.in(instr.op[1]);
  const uint64_t* b = warp.in(instr.op[2]);
  const uint64_t* c = warp.in(instr.op[3]);
  const uint64_t* d = warp.in(instr.op[4]);
  constexpr uint32_t kBits = 8 * sizeof(U);
  uint64_t* out = warp.out(instr.op[0]);
  each_lane(mask, [&](int l) {
    uint32_t position = c[l] & 0xff, length = d[l] & 0xff;
    uint32_t taken = position >= kBits ? 0 : std::min(length, kBits - position);
    U keep = taken == 0 ? U{0} : taken == kBits ? U(~U{0}) : U(((U{1} << taken) - 1) << position);
    U moved = taken == 0 ? U{0} : U(U(a[l]) << position);
    out[l] = U((U(b[l]) & ~keep) | (moved & keep));
  });
}

// attr: wraps (otherwise clamps).
void make_mask(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t* a = warp.in(instr.op[1]);
  const uint64_t* b = warp.in(instr.op[2]);
  bool wraps = instr.attr[0];
  write_lanes(warp.out(instr.op[0]), mask, [&](int l) {
    uint32_t at = uint32_t(a[l]), width = uint32_t(b[l]);
    if (wraps) at &= 31, width &= 31;
    uint64_t ones = width >= 32 ? 0xffffffffu : (uint64_t{1} << width) - 1;
    return at >= 32 ? 0 : uint64_t(uint32_t(ones << at));
  });
}

// Extends from bit b - 1; attr: signed, wraps (otherwise clamps).
void extend(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t* a = warp.in(instr.op[1]);
  const uint64_t* b = warp.in(instr.op[2]);
  bool is_signed = instr.attr[0], wraps = instr.attr[1];
  write_lanes(warp.out(instr.op[0]), mask, [&](int l) {
    uint32_t x = uint32_t(a[l]), width = wraps ? uint32_t(b[l]) & 31 : uint32_t(b[l]);
    if (width == 0) return uint64_t{0};
    if (width >= 32) return uint64_t{x};
    uint32_t up = 32 - width;
    return uint64_t(is_signed ? uint32_t(int32_t(x << up) >> up) : x << up >> up);
  });
}

// attr: signedness of a and of b; halves (dp2a): 0 none, 1 the low two bytes of b, 2 the high ones.
void dot(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t* a = warp.in(instr.op[1]);
  const uint64_t* b = warp.in(instr.op[2]);
  const uint64_t* c = warp.in(instr.op[3]);
  bool a_signed = instr.attr[0], b_signed = instr.attr[1];
  int half = int(instr.attr[2]);
  write_lanes(warp.out(instr.op[0]), mask, [&](int l) {
    int64_t sum = int64_t(c[l]);
    for (int i = 0; i < (half ? 2 : 4); ++i) {
      uint32_t y = uint32_t(b[l] >> 8 * (half == 2 ? i + 2 : i));
      uint32_t x = uint32_t(a[l] >> (half ? 16 : 8) * i);
      int64_t xi =
          half ? (a_signed ? int16_t(x) : uint16_t(x)) : (a_signed ? int8_t(x) : uint8_t(x));
      sum += xi * (b_signed ? int8_t(y) : uint8_t(y));
    }
    return uint64_t(uint32_t(sum));
  });
}

bool decode_logic(const Opcode& opcode, Instr& instr) {
  std::string_view name = opcode.name();
  bool one = name == "not" || name == "cnot";
  Modifiers modifiers(opcode);
  int type = modifiers.required({"b16", "b32", "b64", "pred"}, "type");
  modifiers.finish();
  expect_operands(opcode, instr, one ? 2 : 3);
  auto of = [&]<class F>(F) {
    static constexpr Exec kOf[] = {binary<uint16_t, F>, binary<uint32_t, F>, binary<uint64_t, F>,
                                   binary<bool, F>};
    return kOf[type];
  };
  auto of_one = [&]<class F>(F) {
    static constexpr Exec kOf[] = {unary<uint16_t, F>, unary<uint32_t, F>, unary<uint64_t, F>,
                                   unary<uint64_t, NotPredicate>};
    return kOf[type];
  };
  if (name == "and")
    instr.exec = of(And{});
  else if (name == "or")
    instr.exec = of(Or{});
  else if (name == "xor")
    instr.exec = of(Xor{});
  else if (name == "not")
    instr.exec = of_one(Not{});
  else if (type == 3)
    unknown(opcode, "cnot of a predicate");
  else
    instr.exec = of_one(LogicalNot{});
  return true;
}

bool decode_shift(const Opcode& opcode, Instr& instr) {
  Modifiers modifiers(opcode);
  bool left = opcode.name() == "shl";
  int type = left ? modifiers.required({"b16", "b32", "b64"}, "type")
                  : modifiers.required(
                        {"b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64"}, "type");
  modifiers.finish();
  expect_operands(opcode, instr, 3);
  static constexpr Exec kLeft[] = {shift_left<uint16_t>, shift_left<uint32_t>,
                                   shift_left<uint64_t>};
  static constexpr Exec kRight[] = {
      shift_right<uint16_t>, shift_right<uint32_t>, shift_right<uint64_t>,
      shift_right<uint16_t>, shift_right<uint32_t>, shift_right<uint64_t>,
      shift_right<int16_t>,  shift_right<int32_t>,  shift_right<int64_t>};
  instr.exec = left ? kLeft[type] : kRight[type];
  return true;
}

bool decode_field(const Opcode& opcode, Instr& instr) {
  std::string_view name = opcode.name();
  Modifiers modifiers(opcode);
  size_t operands = 2;
  if (name == "popc" || name == "clz") {
    bool wide = modifiers.required({"b32", "b64"}, "type");
    if (name == "popc")
      instr.exec =
          wide ? unary<uint64_t, CountOnes<uint64_t>> : unary<uint32_t, CountOnes<uint32_t>>;
    else
      instr.exec =
          wide ? unary<uint64_t, LeadingZeros<uint64_t>> : unary<uint32_t, LeadingZeros<uint32_t>>;
  } else if (name == "brev") {
    instr.exec = modifiers.required({"b32", "b64"}, "type") ? unary<uint64_t, Reverse>
                                                            : unary<uint32_t, Reverse>;
  } else if (name == "bfind") {
    instr.attr[0] = modifiers.take("shiftamt");
    static constexpr Exec kOf[] = {find_bit<uint32_t>, find_bit<int32_t>, find_bit<uint64_t>,
                                   find_bit<int64_t>};
    instr.exec = kOf[modifiers.required({"u32", "s32", "u64", "s64"}, "type")];
  } else if (name == "bfe") {
    static constexpr Exec kOf[] = {extract<uint32_t>, extract<int32_t>, extract<uint64_t>,
                                   extract<int64_t>};
    instr.exec = kOf[modifiers.required({"u32", "s32", "u64", "s64"}, "type")];
    operands = 4;
  } else if (name == "bfi") {
    instr.exec = modifiers.required({"b32", "b64"}, "type") ? insert<uint64_t> : insert<uint32_t>;
    operands = 5;
  } else if (name == "bmsk") {
    instr.attr[0] = modifiers.required({"clamp", "wrap"}, "mode");
    modifiers.required({"b32"}, "type");
    instr.exec = make_mask;
    operands = 3;
  } else if (name == "szext") {
    instr.attr[1] = modifiers.required({"clamp", "wrap"}, "mode");
    instr.attr[0] = modifiers.required({"u32", "s32"}, "type");
    instr.exec = extend;
    operands = 3;
  } else {
    return false;
  }
  modifiers.finish();
  expect_operands(opcode, instr, operands);
  return true;
}

}  // namespace

bool decode_bits(const Opcode& opcode, Instr& instr) {
  std::string_view name = opcode.name();
  if (name == "and" || name == "or" || name == "xor" || name == "not" || name == "cnot")
    return decode_logic(opcode, instr);
  if (name == "shl" || name == "shr") return decode_shift(opcode, instr);
  Modifiers modifiers(opcode);
  if (name == "shf") {
    instr.attr[0] = modifiers.required({"r", "l"}, "direction");
    instr.attr[1] = modifiers.required({"clamp", "wrap"}, "mode");
    modifiers.required({"b32"}, "type");
    instr.exec = funnel;
    expect_operands(opcode, instr, 4);
  } else if (name == "lop3") {
    modifiers.required({"b32"}, "type");
    instr.exec = lop3;
    expect_operands(opcode, instr, 5);
  } else if (name == "dp4a" || name == "dp2a") {
    if (name == "dp2a") instr.attr[2] = 1 + modifiers.required({"lo", "hi"}, "half");
    for (size_t i = 0; i < 2; ++i) {  // the types of a and of b
      std::string_view type = opcode.last(1 - i);
      if (type != "s32" && type != "u32") unknown(opcode, "a type that is not known");
      instr.attr[i] = type == "s32";
      modifiers.take(type);
    }
    instr.exec = dot;
    expect_operands(opcode, instr, 4);
  } else {
    return decode_field(opcode, instr);
  }
  modifiers.finish();
  return true;
}

}  // namespace ptxsim
