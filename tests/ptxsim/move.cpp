// mov, selections, permutation of bytes.
#include "counters.h"
#include "cta.h"
#include "lanes.h"
#include "module.h"

namespace ptxsim {
namespace {

uint64_t width_mask(int bytes) {
  return bytes >= 8 ? ~uint64_t{0} : (uint64_t{1} << (8 * bytes)) - 1;
}

void move(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t* a = warp.in(instr.op[1]);
  uint64_t keep = uint64_t(instr.attr[0]);
  write_lanes(warp.out(instr.op[0]), mask, [&](int l) { return a[l] & keep; });
}

// attr[0]: bits of an element.
void pack(Warp& warp, const Instr& instr, Mask mask) {
  int bits = int(instr.attr[0]);
  uint64_t keep = width_mask(bits / 8);
  uint64_t packed[kLanes] = {};
  int shift = 0;
  for (const Operand& item : instr.op[1].items) {
    const uint64_t* a = warp.in(item);
    for (int l = 0; l < kLanes; ++l) packed[l] |= (a[l] & keep) << shift;
    shift += bits;
  }
  write_lanes(warp.out(instr.op[0]), mask, [&](int l) { return packed[l]; });
}

void unpack(Warp& warp, const Instr& instr, Mask mask) {
  int bits = int(instr.attr[0]);
  uint64_t keep = width_mask(bits / 8);
  uint64_t packed[kLanes];  // a copy: the source may be one of the destinations
  const uint64_t* a = warp.in(instr.op[1]);
  for (int l = 0; l < kLanes; ++l) packed[l] = a[l];
  int shift = 0;
  for (const Operand& item : instr.op[0].items) {
    if (item.kind != Operand::kSink)
      write_lanes(warp.out(item), mask, [&](int l) { return packed[l] >> shift & keep; });
    shift += bits;
  }
}

// Clocks count the thread block's instructions: every seed has its own time, always the same.
void read_clock(Warp& warp, const Instr& instr, Mask mask) {
  uint64_t now = warp.cta->executed & uint64_t(instr.attr[0]);
  write_lanes(warp.out(instr.op[0]), mask, [&](int) { return now; });
}

void select(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t* a = warp.in(instr.op[1]);
  const uint64_t* b = warp.in(instr.op[2]);
  const uint64_t* p = warp.in(instr.op[3]);
  uint64_t invert = instr.op[3].negated;
  uint64_t keep = uint64_t(instr.attr[0]);
  write_lanes(warp.out(instr.op[0]), mask,
              [&](int l) { return ((p[l] & 1) ^ invert ? a[l] : b[l]) & keep; });
}

// attr[1]: the third operand is a float, attr[2]: whose subnormals count as zero.
void select_by_sign(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t* a = warp.in(instr.op[1]);
  const uint64_t* b = warp.in(instr.op[2]);
  const uint64_t* c = warp.in(instr.op[3]);
  uint64_t keep = uint64_t(instr.attr[0]);
  bool is_float = instr.attr[1], flush = instr.attr[2];
  write_lanes(warp.out(instr.op[0]), mask, [&](int l) {
    float x = as_float(c[l]);
    bool tiny = flush && (c[l] & 0x7f800000u) == 0;
    bool first = is_float ? x >= 0 || tiny : int32_t(c[l]) >= 0;
    return (first ? a[l] : b[l]) & keep;
  });
}

uint32_t byte_of(uint32_t a, uint32_t b, uint32_t selector) {
  uint64_t both = uint64_t{b} << 32 | a;
  uint32_t byte = uint32_t(both >> (8 * (selector & 7))) & 0xff;
  if (selector & 8) byte = byte & 0x80 ? 0xff : 0;
  return byte;
}

// The selectors of the modes other than the default (PTX ISA, prmt), by the low two bits of c.
constexpr uint16_t kModes[6][4] = {
    {0x3210, 0x4321, 0x5432, 0x6543},  // f4e: forward four extract
    {0x5670, 0x6701, 0x7012, 0x0123},  // b4e: backward
    {0x0000, 0x1111, 0x2222, 0x3333},  // rc8: replicate a byte
    {0x3210, 0x3211, 0x3222, 0x3333},  // ecl: edge clamp left
    {0x0000, 0x1110, 0x2210, 0x3210},  // ecr: edge clamp right
    {0x1010, 0x3232, 0x1010, 0x3232},  // rc16: replicate 16 bits
};

void permute(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t* a = warp.in(instr.op[1]);
  const uint64_t* b = warp.in(instr.op[2]);
  const uint64_t* c = warp.in(instr.op[3]);
  int mode = int(instr.attr[0]);
  write_lanes(warp.out(instr.op[0]), mask, [&](int l) {
    uint32_t selectors = mode < 0 ? uint32_t(c[l]) : kModes[mode][c[l] & 3];
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i)
      result |= byte_of(uint32_t(a[l]), uint32_t(b[l]), selectors >> (4 * i) & 15) << (8 * i);
    return uint64_t{result};
  });
}

bool decode_mov(const Opcode& opcode, Instr& instr) {
  Modifiers modifiers(opcode);
  std::string_view type = opcode.last();
  int bytes = type_bytes(type);
  if (bytes == 0 || bytes > 8) unknown(opcode, "no type that is known");
  modifiers.take(type);
  modifiers.finish();
  expect_operands(opcode, instr, 2);
  const Operand& to = instr.op[0];
  const Operand& from = instr.op[1];
  if (to.kind == Operand::kVector || from.kind == Operand::kVector) {
    bool packs = from.kind == Operand::kVector;
    size_t count = (packs ? from : to).items.size();
    if (count < 2 || count > 4 || 8 * size_t(bytes) % count != 0)
      unknown(opcode, "a vector of " + std::to_string(count));
    instr.attr[0] = int64_t(8 * size_t(bytes) / count);
    instr.exec = packs ? pack : unpack;
    return true;
  }
  instr.attr[0] = int64_t(type == "pred" ? 1 : width_mask(bytes));
  instr.exec = move;
  if (from.name == "%clock" || from.name == "%clock64" || from.name == "%globaltimer")
    instr.exec = read_clock;
  return true;
}

bool decode_select(const Opcode& opcode, Instr& instr) {
  Modifiers modifiers(opcode);
  std::initializer_list<std::string_view> kTypes = {"b16", "b32", "b64", "u16", "u32", "u64",
                                                    "s16", "s32", "s64", "f32", "f64"};
  bool by_sign = opcode.name() == "slct";
  instr.attr[2] = by_sign && modifiers.take("ftz");
  if (opcode.part.size() < 2) unknown(opcode, "no type");
  int bytes = type_bytes(opcode.part[opcode.part.size() - (by_sign ? 2 : 1)]);
  if (by_sign) {
    if (opcode.last() != "f32" && opcode.last() != "s32")
      unknown(opcode, "the third operand's type");
    instr.attr[1] = opcode.last() == "f32";
    modifiers.take(opcode.last());
  }
  modifiers.required(kTypes, "type");
  modifiers.finish();
  expect_operands(opcode, instr, 4);
  instr.attr[0] = int64_t(width_mask(bytes));
  instr.exec = by_sign ? select_by_sign : select;
  return true;
}

bool decode_permute(const Opcode& opcode, Instr& instr) {
  Modifiers modifiers(opcode);
  modifiers.required({"b32"}, "type");
  instr.attr[0] = modifiers.one_of({"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"});
  modifiers.finish();
  expect_operands(opcode, instr, 4);
  instr.exec = permute;
  return true;
}

}  // namespace

bool decode_move(const Opcode& opcode, Instr& instr) {
  std::string_view name = opcode.name();
  if (name == "mov") return decode_mov(opcode, instr);
  if (name == "selp" || name == "slct") return decode_select(opcode, instr);
  if (name == "prmt") return decode_permute(opcode, instr);
  return false;
}

}  // namespace ptxsim
