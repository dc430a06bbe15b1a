// What the matrix instructions share (matrix.cpp, mma.cpp).
#pragma once
#include "machine.h"

namespace ptxsim {

// A fault unless all lanes are here, as .aligned demands.
void need_all_lanes(Warp& warp, const Instr& instr, Mask mask);

// An operand of one register may be written without braces.
inline const Operand& vector_item(const Operand& o, size_t i) {
  return o.kind == Operand::kVector ? o.items[i] : o;
}

bool decode_mma(const Opcode& opcode, Instr& instr);

}  // namespace ptxsim
