// Chooses each instruction's function: asks the families in turn.
#include "counters.h"
#include "module.h"

namespace ptxsim {

void unknown(const Opcode& opcode, std::string_view why) {
  throw DecodeError("PTX line " + std::to_string(opcode.line) + ": " + std::string(opcode.text) +
                    ": " + std::string(why));
}

void decode(const Opcode& opcode, Instr& instr) {
  struct Family {
    Decoder decoder;
    Class counter;
  };
  static constexpr Family kFamilies[] = {
      {decode_control, kControl}, {decode_memory, kLoad},     {decode_move, kMove},
      {decode_integer, kInteger}, {decode_float, kFloat},     {decode_convert, kConvert},
      {decode_half, kHalf},       {decode_approx, kSpecial},  {decode_warp, kShuffle},
      {decode_matrix, kMma},      {decode_async, kAsyncCopy}, {decode_barrier, kBarrier},
      {decode_atomic, kAtomic},
  };
  for (const Family& family : kFamilies) {
    instr.counter = family.counter;
    if (family.decoder(opcode, instr)) return;
  }
  unknown(opcode, "an instruction that the simulator does not know");
}

}  // namespace ptxsim
