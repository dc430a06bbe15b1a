// setp and set, of integers and of floats.
#include <cmath>

#include "integer.h"

namespace ptxsim {
namespace {

// attr: how the result is combined with c, and what a result of set is.
enum Combine : int64_t { kPlain, kAnd, kOr, kXor };
enum { kCombine, kTrue, kFlush };

template <class T>
T operand(uint64_t bits, bool flush) {
  if constexpr (std::is_same_v<T, float>) {
    if (flush && (bits & 0x7f800000u) == 0) bits &= 0x80000000u;
  }
  return value<T>(bits);
}

uint64_t combined(int64_t how, uint64_t holds, uint64_t c) {
  return how == kPlain ? holds : how == kAnd ? holds & c : how == kOr ? holds | c : holds ^ c;
}

template <class T, class F>
void compare(Warp& warp, const Instr& instr, Mask mask) {
  const size_t first = instr.pair ? 2 : 1;
  const uint64_t* a = warp.in(instr.op[first]);
  const uint64_t* b = warp.in(instr.op[first + 1]);
  bool flush = instr.attr[kFlush];
  int64_t how = instr.attr[kCombine];
  uint64_t holds[kLanes];
  for (int l = 0; l < kLanes; ++l) holds[l] = F{}(operand<T>(a[l], flush), operand<T>(b[l], flush));
  uint64_t* out = warp.out(instr.op[0]);
  uint64_t when_true = uint64_t(instr.attr[kTrue]);
  if (how == kPlain && !instr.pair) {
    write_lanes(out, mask, [&](int l) { return holds[l] * when_true; });
    return;
  }
  uint64_t with[kLanes] = {}, other[kLanes];
  if (how != kPlain) {
    const Operand& operand = instr.op[first + 2];
    const uint64_t* c = warp.in(operand);
    for (int l = 0; l < kLanes; ++l) with[l] = (c[l] & 1) ^ uint64_t(operand.negated);
  }
  for (int l = 0; l < kLanes; ++l) other[l] = combined(how, holds[l] ^ 1, with[l]);
  write_lanes(out, mask, [&](int l) { return combined(how, holds[l], with[l]) * when_true; });
  if (instr.pair) write_lanes(warp.out(instr.op[1]), mask, [&](int l) { return other[l]; });
}

template <class T>
bool unordered(T a, T b) {
  if constexpr (std::is_floating_point_v<T>)
    return a != a || b != b;
  else
    return false;
}

#define PTXSIM_COMPARISON(Name, expression) \
  struct Name {                             \
    template <class T>                      \
    bool operator()(T a, T b) const {       \
      return expression;                    \
    }                                       \
  };
PTXSIM_COMPARISON(Eq, a == b)
PTXSIM_COMPARISON(Ne, a != b && !unordered(a, b))
PTXSIM_COMPARISON(Lt, a < b)
PTXSIM_COMPARISON(Le, a <= b)
PTXSIM_COMPARISON(Gt, a > b)
PTXSIM_COMPARISON(Ge, a >= b)
PTXSIM_COMPARISON(Equ, a == b || unordered(a, b))
PTXSIM_COMPARISON(Neu, a != b || unordered(a, b))
PTXSIM_COMPARISON(Ltu, a < b || unordered(a, b))
PTXSIM_COMPARISON(Leu, a <= b || unordered(a, b))
PTXSIM_COMPARISON(Gtu, a > b || unordered(a, b))
PTXSIM_COMPARISON(Geu, a >= b || unordered(a, b))
PTXSIM_COMPARISON(Num, !unordered(a, b))
PTXSIM_COMPARISON(Nan, unordered(a, b))
#undef PTXSIM_COMPARISON

template <class T>
Exec of_float(int comparison) {
  static constexpr Exec kOf[] = {compare<T, Eq>,  compare<T, Ne>,  compare<T, Lt>,  compare<T, Le>,
                                 compare<T, Gt>,  compare<T, Ge>,  compare<T, Equ>, compare<T, Neu>,
                                 compare<T, Ltu>, compare<T, Leu>, compare<T, Gtu>, compare<T, Geu>,
                                 compare<T, Num>, compare<T, Nan>};
  return kOf[comparison];
}
template <class T>
Exec of_integer(int comparison) {
  static constexpr Exec kOf[] = {compare<T, Eq>, compare<T, Ne>, compare<T, Lt>,
                                 compare<T, Le>, compare<T, Gt>, compare<T, Ge>};
  return kOf[comparison];
}

Exec choose(const Opcode& opcode, Modifiers& modifiers, std::string_view type) {
  if (type == "f32" || type == "f64") {
    int comparison = modifiers.required({"eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu",
                                         "leu", "gtu", "geu", "num", "nan"},
                                        "comparison");
    return type == "f32" ? of_float<float>(comparison) : of_float<double>(comparison);
  }
  // lo, ls, hi, hs: unsigned lt, le, gt, ge.
  int comparison = modifiers.required({"eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs"},
                                      "comparison");
  if (type[0] == 'b' && comparison > 1) unknown(opcode, "an order of untyped bits");
  if (comparison >= 6) {
    if (type[0] != 'u') unknown(opcode, "an unsigned comparison of another type");
    comparison -= 4;
  }
  int kind = integer_type(type);
  if (kind < 0) kind = type == "b16" ? 1 : type == "b32" ? 3 : type == "b64" ? 5 : -1;
  switch (kind) {
    case 0:
      return of_integer<int16_t>(comparison);
    case 1:
      return of_integer<uint16_t>(comparison);
    case 2:
      return of_integer<int32_t>(comparison);
    case 3:
      return of_integer<uint32_t>(comparison);
    case 4:
      return of_integer<int64_t>(comparison);
    case 5:
      return of_integer<uint64_t>(comparison);
    default:
      unknown(opcode, "a type that is not known");
  }
}

}  // namespace

bool decode_compare(const Opcode& opcode, Instr& instr) {
  bool is_set = opcode.name() == "set";
  if (!is_set && opcode.name() != "setp") return false;
  std::string_view type = opcode.last();
  if (type == "f16" || type == "bf16" || type == "f16x2" || type == "bf16x2") return false;
  Modifiers modifiers(opcode);
  instr.attr[kTrue] = 1;
  if (is_set) {
    if (opcode.part.size() < 4) unknown(opcode, "a type is missing");
    std::string_view result = opcode.last(1);
    if (result == "f16" || result == "bf16") return false;
    if (result != "u32" && result != "s32" && result != "f32")
      unknown(opcode, "a type of the result");
    instr.attr[kTrue] = result == "f32" ? 0x3f800000 : 0xffffffff;
    modifiers.take(result);
  }
  modifiers.take(type);
  instr.attr[kFlush] = type == "f32" && modifiers.take("ftz");
  instr.exec = choose(opcode, modifiers, type);
  instr.attr[kCombine] = 1 + modifiers.one_of({"and", "or", "xor"});
  modifiers.finish();
  expect_operands(opcode, instr,
                  size_t(3 + (instr.pair ? 1 : 0) + (instr.attr[kCombine] != kPlain ? 1 : 0)));
  return true;
}

}  // namespace ptxsim
