// Integer arithmetic: add sub mul mad min max abs neg div rem sad, with carries and saturation.
#include <bit>
#include <limits>

#include "integer.h"

namespace ptxsim {
namespace {

struct Add {
  template <class T>
  T operator()(T a, T b) const {
    return T(uint64_t(a) + uint64_t(b));
  }
};
struct Sub {
  template <class T>
  T operator()(T a, T b) const {
    return T(uint64_t(a) - uint64_t(b));
  }
};
struct MulLow {
  template <class T>
  T operator()(T a, T b) const {
    return T(uint64_t(a) * uint64_t(b));
  }
};
template <class T>
struct Twice;  // the type of twice the width
template <>
struct Twice<int16_t> {
  using type = int32_t;
};
template <>
struct Twice<uint16_t> {
  using type = uint32_t;
};
template <>
struct Twice<int32_t> {
  using type = int64_t;
};
template <>
struct Twice<uint32_t> {
  using type = uint64_t;
};
template <>
struct Twice<int64_t> {
  using type = __int128;
};
template <>
struct Twice<uint64_t> {
  using type = unsigned __int128;
};

template <class T>
typename Twice<T>::type product(T a, T b) {
  using Wide = typename Twice<T>::type;
  return Wide(Wide(a) * Wide(b));
}
struct MulHigh {
  template <class T>
  T operator()(T a, T b) const {
    return T(product(a, b) >> (8 * sizeof(T)));
  }
};
struct Min {
  template <class T>
  T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};
struct Max {
  template <class T>
  T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};
// By zero, and the one quotient that does not fit: as hardware's code has it.
struct Div {
  template <class T>
  T operator()(T a, T b) const {
    if (b == 0) return T(-1);
    if (std::is_signed_v<T> && b == T(-1)) return T(0 - uint64_t(a));
    return T(a / b);
  }
};
struct Rem {
  template <class T>
  T operator()(T a, T b) const {
    if (b == 0) return a;
    if (std::is_signed_v<T> && b == T(-1)) return 0;
    return T(a % b);
  }
};
struct MadLow {
  template <class T>
  T operator()(T a, T b, T c) const {
    return T(uint64_t(a) * uint64_t(b) + uint64_t(c));
  }
};
struct MadHigh {
  template <class T>
  T operator()(T a, T b, T c) const {
    return T(uint64_t(MulHigh{}(a, b)) + uint64_t(c));
  }
};
struct Sad {
  template <class T>
  T operator()(T a, T b, T c) const {
    return T(uint64_t(c) + (a < b ? uint64_t(b) - uint64_t(a) : uint64_t(a) - uint64_t(b)));
  }
};
struct Abs {
  template <class T>
  T operator()(T a) const {
    return a < 0 ? T(0 - uint64_t(a)) : a;
  }
};
struct Neg {
  template <class T>
  T operator()(T a) const {
    return T(0 - uint64_t(a));
  }
};

int32_t saturated(int64_t x) {
  using Limits = std::numeric_limits<int32_t>;
  return int32_t(std::min<int64_t>(std::max<int64_t>(x, Limits::min()), Limits::max()));
}
struct AddSat {
  int32_t operator()(int32_t a, int32_t b) const { return saturated(int64_t{a} + b); }
};
struct SubSat {
  int32_t operator()(int32_t a, int32_t b) const { return saturated(int64_t{a} - b); }
};
struct MadHighSat {
  int32_t operator()(int32_t a, int32_t b, int32_t c) const {
    return saturated((int64_t{a} * b >> 32) + c);
  }
};

template <class T>
void mul_wide(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t* a = warp.in(instr.op[1]);
  const uint64_t* b = warp.in(instr.op[2]);
  write_lanes(warp.out(instr.op[0]), mask, [&](int l) { return slot(product(T(a[l]), T(b[l]))); });
}
template <class T>
void mad_wide(Warp& warp, const Instr& instr, Mask mask) {
  using Wide = std::make_unsigned_t<typename Twice<T>::type>;
  const uint64_t* a = warp.in(instr.op[1]);
  const uint64_t* b = warp.in(instr.op[2]);
  const uint64_t* c = warp.in(instr.op[3]);
  write_lanes(warp.out(instr.op[0]), mask,
              [&](int l) { return slot(Wide(Wide(product(T(a[l]), T(b[l]))) + Wide(c[l]))); });
}

// The low 24 bits; attr: shift of the 48-bit product, signed, whether there is an addend.
void mul24(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t* a = warp.in(instr.op[1]);
  const uint64_t* b = warp.in(instr.op[2]);
  const uint64_t* c = instr.attr[2] ? warp.in(instr.op[3]) : nullptr;
  int shift = int(instr.attr[0]);
  bool is_signed = instr.attr[1];
  auto low24 = [&](uint64_t x) {
    return is_signed ? int64_t(int32_t(uint32_t(x) << 8) >> 8) : int64_t(x & 0xffffff);
  };
  write_lanes(warp.out(instr.op[0]), mask, [&](int l) {
    uint32_t high = uint32_t(uint64_t(low24(a[l]) * low24(b[l])) >> shift);
    return uint64_t(uint32_t(high + (c ? uint32_t(c[l]) : 0)));
  });
}

// Arithmetic on the carry flag: d = x + y + carry, or x - y - borrow, where x is a, or a part of
// a * b with y the addend.
enum CarryOperation : int64_t { kCarryAdd, kCarrySub, kCarryMadLow, kCarryMadHigh };
template <class T>
void with_carry(Warp& warp, const Instr& instr, Mask mask) {
  using U = std::make_unsigned_t<T>;
  int64_t operation = instr.attr[0];
  bool takes = instr.attr[1], sets = instr.attr[2];
  const uint64_t* a = warp.in(instr.op[1]);
  const uint64_t* b = warp.in(instr.op[2]);
  const uint64_t* c = instr.op.size() > 3 ? warp.in(instr.op[3]) : b;
  uint64_t* out = warp.out(instr.op[0]);
  each_lane(mask, [&](int l) {
    using Wide = unsigned __int128;
    Wide in = takes ? warp.carry >> l & 1 : 0;
    U x = U(a[l]), y = U(c[l]);
    if (operation == kCarryMadLow) x = U(uint64_t(a[l]) * b[l]);
    if (operation == kCarryMadHigh) x = U(MulHigh{}(T(a[l]), T(b[l])));
    Wide sum = operation == kCarrySub ? Wide(x) - Wide(y) - in : Wide(x) + Wide(y) + in;
    out[l] = U(sum);
    if (sets) {
      Mask carry = Mask(sum >> (8 * sizeof(T)) & 1);
      warp.carry = (warp.carry & ~(Mask{1} << l)) | carry << l;
    }
  });
}

bool decode_carry(const Opcode& opcode, Instr& instr) {
  std::string_view name = opcode.name();
  bool mad = name.substr(0, 3) == "mad";
  Modifiers modifiers(opcode);
  instr.attr[1] = name.back() == 'c';
  instr.attr[2] = modifiers.take("cc");
  instr.attr[0] = name.substr(0, 3) == "sub" ? kCarrySub : kCarryAdd;
  if (mad) instr.attr[0] = kCarryMadLow + modifiers.required({"lo", "hi"}, "part");
  int type = modifiers.required({"s32", "u32", "b32", "s64", "u64", "b64"}, "type");
  modifiers.finish();
  expect_operands(opcode, instr, mad ? 4 : 3);
  static constexpr Exec kOf[] = {with_carry<int32_t>, with_carry<uint32_t>, with_carry<uint32_t>,
                                 with_carry<int64_t>, with_carry<uint64_t>, with_carry<uint64_t>};
  instr.exec = kOf[type];
  return true;
}

bool decode_product(const Opcode& opcode, Instr& instr, int type) {
  Modifiers modifiers(opcode);
  bool mad = opcode.name() == "mad";
  modifiers.take(opcode.last());
  int part = modifiers.required({"lo", "hi", "wide"}, "part of the product");
  bool sat = mad && part == 1 && opcode.last() == "s32" && modifiers.take("sat");
  modifiers.finish();
  expect_operands(opcode, instr, mad ? 4 : 3);
  if (part == 2) {
    static constexpr Exec kMul[] = {mul_wide<int16_t>, mul_wide<uint16_t>, mul_wide<int32_t>,
                                    mul_wide<uint32_t>};
    static constexpr Exec kMad[] = {mad_wide<int16_t>, mad_wide<uint16_t>, mad_wide<int32_t>,
                                    mad_wide<uint32_t>};
    if (type > 3) unknown(opcode, "a product of 128 bits");
    instr.exec = (mad ? kMad : kMul)[type];
  } else if (mad) {
    instr.exec = sat         ? ternary<int32_t, MadHighSat>
                 : part == 0 ? integer_ternary<MadLow>(type)
                             : integer_ternary<MadHigh>(type);
  } else {
    instr.exec = part == 0 ? integer_binary<MulLow>(type) : integer_binary<MulHigh>(type);
  }
  return true;
}

bool decode_mul24(const Opcode& opcode, Instr& instr) {
  Modifiers modifiers(opcode);
  instr.attr[2] = opcode.name() == "mad24";
  instr.attr[0] = modifiers.required({"lo", "hi"}, "part of the product") ? 16 : 0;
  instr.attr[1] = modifiers.required({"u32", "s32"}, "type");
  modifiers.finish();
  expect_operands(opcode, instr, instr.attr[2] ? 4 : 3);
  instr.exec = mul24;
  return true;
}

}  // namespace

bool decode_integer(const Opcode& opcode, Instr& instr) {
  std::string_view name = opcode.name();
  if (name == "addc" || name == "subc" || name == "madc" ||
      ((name == "add" || name == "sub" || name == "mad") && opcode.has("cc")))
    return decode_carry(opcode, instr);
  if (name == "mul24" || name == "mad24") return decode_mul24(opcode, instr);
  if (decode_bits(opcode, instr) || decode_compare(opcode, instr)) return true;
  int type = integer_type(opcode.last());
  if (type < 0) return false;
  if (name == "mul" || name == "mad") return decode_product(opcode, instr, type);
  size_t operands = 3;
  Modifiers modifiers(opcode);
  modifiers.take(opcode.last());
  bool sat = (name == "add" || name == "sub") && opcode.last() == "s32" && modifiers.take("sat");
  if (name == "add")
    instr.exec = sat ? binary<int32_t, AddSat> : integer_binary<Add>(type);
  else if (name == "sub")
    instr.exec = sat ? binary<int32_t, SubSat> : integer_binary<Sub>(type);
  else if (name == "min")
    instr.exec = integer_binary<Min>(type);
  else if (name == "max")
    instr.exec = integer_binary<Max>(type);
  else if (name == "div")
    instr.exec = integer_binary<Div>(type);
  else if (name == "rem")
    instr.exec = integer_binary<Rem>(type);
  else if (name == "sad")
    instr.exec = integer_ternary<Sad>(type), operands = 4;
  else if (name == "abs")
    instr.exec = integer_unary<Abs>(type), operands = 2;
  else if (name == "neg")
    instr.exec = integer_unary<Neg>(type), operands = 2;
  else
    return false;
  modifiers.finish();
  expect_operands(opcode, instr, operands);
  return true;
}

}  // namespace ptxsim
