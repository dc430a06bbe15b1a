// ldmatrix, stmatrix and movmatrix of 8x8 matrices of 16-bit elements. Lane l holds elements
// 2(l%4) and 2(l%4)+1 of row l/4, or, with .trans, of column l/4.
#include "matrix.h"

#include <cstring>

#include "counters.h"
#include "family.h"
#include "machine.h"

namespace ptxsim {
namespace {

// attr: 0 matrices, 1 .trans, 2 Space. Lanes 8i to 8i+7 have the addresses of matrix i's rows.
void rows(Warp& warp, const Instr& instr, const Operand& place, Access access, uint8_t** host) {
  uint64_t address[kLanes];
  lane_addresses(warp, place, address);
  Mask holders = instr.attr[0] == 4 ? kAll : (Mask{1} << (8 * instr.attr[0])) - 1;
  resolve(warp, instr, holders, Space(instr.attr[2]), address, 16, access, host);
}

void load_matrix(Warp& warp, const Instr& instr, Mask mask) {
  need_all_lanes(warp, instr, mask);
  uint8_t* host[kLanes];
  rows(warp, instr, instr.op[1], Access::kRead, host);
  for (int i = 0; i < instr.attr[0]; ++i) {
    uint16_t tile[8][8];
    for (int r = 0; r < 8; ++r) std::memcpy(tile[r], host[8 * i + r], 16);
    uint64_t* out = warp.out(vector_item(instr.op[0], size_t(i)));
    if (instr.attr[1]) {
      for (int l = 0; l < kLanes; ++l)
        out[l] = tile[2 * (l % 4)][l / 4] | uint32_t(tile[2 * (l % 4) + 1][l / 4]) << 16;
    } else {
      uint32_t packed[kLanes];
      std::memcpy(packed, tile, sizeof(tile));
      for (int l = 0; l < kLanes; ++l) out[l] = packed[l];
    }
  }
}

void store_matrix(Warp& warp, const Instr& instr, Mask mask) {
  need_all_lanes(warp, instr, mask);
  uint8_t* host[kLanes];
  rows(warp, instr, instr.op[0], Access::kWrite, host);
  for (int i = 0; i < instr.attr[0]; ++i) {
    const uint64_t* in = warp.in(vector_item(instr.op[1], size_t(i)));
    uint16_t tile[8][8];
    for (int l = 0; l < kLanes; ++l) {
      for (int j = 0; j < 2; ++j) {
        uint16_t x = uint16_t(in[l] >> (16 * j));
        int major = l / 4, minor = 2 * (l % 4) + j;
        (instr.attr[1] ? tile[minor][major] : tile[major][minor]) = x;
      }
    }
    for (int r = 0; r < 8; ++r) std::memcpy(host[8 * i + r], tile[r], 16);
  }
}

void transpose_matrix(Warp& warp, const Instr& instr, Mask mask) {
  need_all_lanes(warp, instr, mask);
  const uint64_t* in = warp.in(instr.op[1]);
  uint16_t tile[8][8];
  for (int l = 0; l < kLanes; ++l)
    for (int j = 0; j < 2; ++j) tile[l / 4][2 * (l % 4) + j] = uint16_t(in[l] >> (16 * j));
  uint64_t* out = warp.out(instr.op[0]);
  for (int l = 0; l < kLanes; ++l)
    out[l] = tile[2 * (l % 4)][l / 4] | uint32_t(tile[2 * (l % 4) + 1][l / 4]) << 16;
}

void expect_vector(const Opcode& opcode, const Operand& o, size_t items) {
  bool fits = o.kind == Operand::kVector ? o.items.size() == items
                                         : items == 1 && o.kind != Operand::kAddress;
  if (!fits) unknown(opcode, "a vector of another size");
}

}  // namespace

void need_all_lanes(Warp& warp, const Instr& instr, Mask mask) {
  if (mask != kAll)
    fault(warp, instr, mask, "divergence",
          "all 32 lanes of the warp have to execute this instruction together");
}

bool decode_matrix(const Opcode& opcode, Instr& instr) {
  std::string_view name = opcode.name();
  if (name == "mma") return decode_mma(opcode, instr);
  bool load = name == "ldmatrix", store = name == "stmatrix";
  if (!load && !store && name != "movmatrix") return false;
  Modifiers modifier(opcode);
  modifier.required({"sync"}, ".sync");
  modifier.required({"aligned"}, ".aligned");
  modifier.required({"m8n8"}, "shape");
  instr.attr[1] = modifier.take("trans");
  modifier.required({"b16"}, "type");
  expect_operands(opcode, instr, 2);
  instr.members = -2;
  if (!load && !store) {
    if (!instr.attr[1]) unknown(opcode, "no .trans");
    modifier.finish();
    instr.counter = kShuffle;
    instr.exec = transpose_matrix;
    return true;
  }
  instr.attr[0] = int64_t{1} << modifier.required({"x1", "x2", "x4"}, "number of matrices");
  bool shared = modifier.one_of({"shared", "shared::cta"}) >= 0;
  instr.attr[2] = int64_t(shared ? Space::kShared : Space::kGeneric);
  modifier.finish();
  if (instr.op[load ? 1 : 0].kind != Operand::kAddress) unknown(opcode, "no address");
  expect_vector(opcode, instr.op[load ? 0 : 1], size_t(instr.attr[0]));
  instr.counter = load ? kMatrixLoad : kMatrixStore;
  instr.exec = load ? load_matrix : store_matrix;
  return true;
}

}  // namespace ptxsim
