// Returns, exits, traps and hints to the scheduler. Branches and calls are decoded with their
// labels (body.cpp).
#include "counters.h"
#include "family.h"

namespace ptxsim {

bool decode_control(const Opcode& opcode, Instr& instr) {
  std::string_view name = opcode.name();
  Modifiers modifiers(opcode);
  if (name == "ret" || name == "exit") {
    if (name == "ret") modifiers.take("uni");
    instr.control = name == "ret" ? Instr::kReturn : Instr::kExit;
  } else if (name == "trap" || name == "brkpt") {
    instr.exec = [](Warp& warp, const Instr& i, Mask mask) {
      fault(warp, i, mask, "trap", "the program stops itself");
    };
  } else if (name == "nanosleep") {
    modifiers.required({"u32"}, "type");
    modifiers.finish();
    expect_operands(opcode, instr, 1);
    instr.exec = [](Warp& warp, const Instr&, Mask) { warp.yields = true; };
    return true;
  } else if (name == "griddepcontrol") {  // launches run one after another
    modifiers.required({"launch_dependents", "wait"}, "action");
    instr.exec = [](Warp&, const Instr&, Mask) {};
  } else {
    return false;
  }
  modifiers.finish();
  expect_operands(opcode, instr, 0);
  return true;
}

}  // namespace ptxsim
