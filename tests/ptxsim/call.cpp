// Calls. Functions have their registers and parameters at fixed places (there is no recursion), so
// that a call copies its arguments, leaves each lane's way back in a row, and branches.
#include <cstring>

#include "body.h"
#include "cta.h"
#include "memory.h"

namespace ptxsim {
namespace {

// attr: from and to in the parameter space, bytes.
void copy_parameter_bytes(Warp& warp, const Instr& instr, Mask mask) {
  each_lane(mask, [&](int l) {
    std::memcpy(call_memory(warp, l) + (uint64_t(instr.attr[1]) - kCallParams),
                call_memory(warp, l) + (uint64_t(instr.attr[0]) - kCallParams),
                size_t(instr.attr[2]));
  });
}

void copy_row(Warp& warp, const Instr& instr, Mask mask) {
  uint64_t* to = warp.out(instr.op[0]);
  const uint64_t* from = warp.in(instr.op[1]);
  each_lane(mask, [&](int l) { to[l] = from[l]; });
}

std::string text_at(uint64_t address) {
  const char* text = reinterpret_cast<const char*>(address);
  return text == nullptr ? "?" : std::string(text, strnlen(text, 400));
}

// attr: where the arguments message, file, line and function lie.
void assertion_failed(Warp& warp, const Instr& instr, Mask mask) {
  uint8_t* memory = call_memory(warp, std::countr_zero(mask));
  uint64_t value[4] = {};
  for (int i = 0; i < 4; ++i)
    std::memcpy(&value[i], memory + (uint64_t(instr.attr[i]) - kCallParams), i == 2 ? 4 : 8);
  fault(warp, instr, mask, "trap",
        "assertion failed: " + text_at(value[0]) + " in " + text_at(value[3]) + ", " +
            text_at(value[1]) + ":" + std::to_string(value[2]));
}

}  // namespace

void KernelDecoder::copy_parameter(const Instr& like, const Variable& from, const Variable& to) {
  Instr copy = like;
  copy.op.clear();
  copy.control = Instr::kNone;
  copy.counter = kMove;
  copy.exec = copy_parameter_bytes;
  copy.attr[0] = int64_t(from.address);
  copy.attr[1] = int64_t(to.address);
  copy.attr[2] = int64_t(std::min(from.bytes, to.bytes));
  emit(std::move(copy));
}

void KernelDecoder::call(Instr& instr) {
  auto list = [&] {
    std::vector<const Token*> names;
    in_.expect('(');
    while (!in_.accept(')')) {
      names.push_back(&in_.peek());
      if (in_.peek().kind != Token::kWord) in_.fail("the name of a parameter is expected");
      in_.next();
      if (!in_.peek().is(')')) in_.expect(',');
    }
    return names;
  };
  for (size_t i = 1; i < opcode_.part.size(); ++i)
    if (opcode_.part[i] != "uni") unknown(opcode_, "modifier");
  std::vector<const Token*> results, arguments;
  if (in_.peek().is('(')) {
    results = list();
    in_.expect(',');
  }
  const Token& name = in_.word("a function");
  if (in_.accept(',')) arguments = list();
  in_.expect(';');
  auto declared = module_.functions.find(name.text);
  if (declared == module_.functions.end())
    Reader::fail(
        "a call of a function that is not declared (calls through pointers are not "
        "supported)",
        name);
  auto parameter = [&](const Token& token) -> const Variable& {
    const Variable* v = find_variable(token.text);
    if (v == nullptr || v->space != Space::kParam || v->address < kCallParams)
      Reader::fail("a variable in parameter space is expected", token);
    return *v;
  };
  if (name.text == "__assertfail" && declared->second.body == 0 && arguments.size() == 5) {
    for (int i = 0; i < 4; ++i) instr.attr[i] = int64_t(parameter(*arguments[size_t(i)]).address);
    instr.exec = assertion_failed;
    emit(std::move(instr));
    return;
  }
  auto found = compiled_.find(name.text);
  if (found == compiled_.end())
    Reader::fail("a call of a function that has no body and that the simulator does not know",
                 name);
  const Compiled& callee = found->second;
  if (results.size() != callee.results.size() || arguments.size() != callee.parameters.size())
    Reader::fail("a call with another number of parameters than its function has", name);
  auto move = [&](const Token& outer, const Variable& variable, int32_t row, bool into) {
    if (row < 0) {
      const Variable& mine = parameter(outer);
      return into ? copy_parameter(instr, mine, variable) : copy_parameter(instr, variable, mine);
    }
    Instr copy = instr;
    copy.exec = copy_row;
    copy.counter = kMove;
    Operand theirs;
    theirs.kind = Operand::kRow;
    theirs.row = row;
    copy.op = into ? std::vector{theirs, named(outer)} : std::vector{named(outer), theirs};
    emit(std::move(copy));
  };
  for (size_t i = 0; i < arguments.size(); ++i)
    move(*arguments[i], callee.parameters[i], callee.parameter_rows[i], true);
  Instr jump = instr;
  jump.control = Instr::kCall;
  jump.attr[0] = callee.start;
  jump.attr[1] = callee.return_row;
  emit(std::move(jump));
  for (size_t i = 0; i < results.size(); ++i)
    move(*results[i], callee.results[i], callee.result_rows[i], false);
}

}  // namespace ptxsim
