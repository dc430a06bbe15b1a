// Decodes the body of a kernel and of the functions that it calls, in one sequence of instructions:
// callees first, so that lanes inside a call run before those that wait behind it.
#pragma once
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "module.h"
#include "reader.h"

namespace ptxsim {

class KernelDecoder {
 public:
  KernelDecoder(const Module& module, Kernel& kernel);
  void decode_all();

 private:
  // Names of a function's body; an inner "{ }" has its own.
  struct Scope {
    struct Range {  // ".reg .b32 %r<10>": %r0 ... %r9
      std::string_view prefix;
      uint32_t count;
      int32_t row;
      uint8_t bytes;
    };
    struct Register {
      int32_t row;
      uint8_t bytes;
    };
    std::vector<Range> ranges;
    std::unordered_map<std::string_view, Register> registers;
    std::unordered_map<std::string_view, Variable> variables;
  };
  // A function whose code is there: where it begins, where lanes find their way back, where its
  // parameters lie.
  struct Compiled {
    int32_t start = 0;
    int32_t return_row = -1;
    std::vector<Variable> results, parameters;
    std::vector<int32_t> result_rows, parameter_rows;  // -1: in parameter space
  };
  struct Fixup {  // an operand that names a label
    size_t instruction;
    size_t operand;
    std::string_view label;
    int line;
  };

  void function(const Function& f);
  void lay_out_shared(const Function& f);
  void declare_parameters(const Function& f, Compiled& compiled);
  void block(const Function& f, Compiled& compiled);
  void statement(const Function& f, Compiled& compiled);
  bool directive(const Token& token);
  void registers();
  void variable(Space space);
  void location();
  void instruction(const Compiled& compiled);
  void call(Instr& instr);
  void copy_parameter(const Instr& like, const Variable& from, const Variable& to);
  void branch(Instr& instr);
  void patch_labels(const Compiled& compiled, size_t first_table);

  // operand.cpp
  struct Types {  // of the opcode being decoded, for its immediates
    std::string_view last;
    bool wide_addend = false;  // mad.wide: the third source has twice the width
  };
  Operand operand(const Types& types, size_t index);
  Operand address(const Types& types, size_t index);
  Operand immediate(const Types& types, size_t index);
  Operand named(const Token& token);
  bool find_register(std::string_view name, Operand& out) const;
  const Variable* find_variable(std::string_view name);
  Operand constant(uint64_t value);
  bool special(std::string_view name, Operand& out);

  Instr& emit(Instr instr);

  const Module& module_;
  Kernel& kernel_;
  Reader in_;
  std::vector<Scope> scopes_;
  std::map<std::string_view, Compiled> compiled_;
  std::vector<std::string_view> calling_;  // functions being compiled, to find recursion
  std::unordered_map<std::string_view, int32_t> labels_;
  std::vector<Fixup> fixups_;
  std::vector<std::vector<std::pair<std::string_view, int>>> tables_;  // of .branchtargets
  std::unordered_map<std::string_view, size_t> table_names_;
  std::unordered_map<uint64_t, int32_t> constant_rows_;
  std::map<std::string_view, Variable> shared_;  // variables of the module that this kernel uses
  std::map<size_t, Variable> inner_shared_;      // those of bodies, by where they are declared
  std::vector<std::string_view> laid_out_;       // functions
  int32_t location_ = 0;
  int32_t next_row_ = 1;      // kept
  int32_t next_virtual_ = 0;  // of the function being decoded
  int32_t taken_ = 0;         // shared rows of the functions decoded so far
  uint32_t call_bytes_ = 0;   // of parameter space, in the scope being decoded
  Opcode opcode_;
};

}  // namespace ptxsim
