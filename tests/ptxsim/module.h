// A module: the parsed text with its variables, and its kernels decoded. The text is read in two
// steps: module.cpp reads what stands outside of bodies; body.cpp decodes one kernel with all the
// functions that it calls, so that shared and local memory are laid out per kernel.
#pragma once
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "lexer.h"
#include "machine.h"

namespace ptxsim {

// Addresses of shared, local and parameter memory in the generic space: a tag in the top byte, far
// from any address of the host. Constant memory, like global memory, has host addresses.
constexpr uint64_t kWindow = 0xFF00'0000'0000'0000u;
constexpr uint64_t kSharedWindow = 0x5100'0000'0000'0000u;
constexpr uint64_t kLocalWindow = 0x5200'0000'0000'0000u;
constexpr uint64_t kParamWindow = 0x5300'0000'0000'0000u;
// In the parameter space: the kernel's parameters start at 0, those of functions, which lie in each
// thread's own memory, here.
constexpr uint64_t kCallParams = 0x10'0000;

struct Variable {
  Space space = Space::kGlobal;
  std::string_view name;
  uint64_t address = 0;  // in its space
  uint64_t bytes = 0;
  uint32_t align = 1;
  bool dynamic = false;  // extern .shared x[]
};

struct Parameter {
  std::string_view name;
  uint32_t offset = 0, bytes = 0, align = 1;
  bool in_register = false;  // .reg: of device functions
  std::string_view type;
};

// A function's head, and where its body is among the module's tokens.
struct Function {
  std::string_view name;
  bool entry = false;
  std::vector<Parameter> results, parameters;
  size_t body = 0;  // index of its "{"; 0: declared only
  size_t body_end = 0;
  uint32_t max_threads = 0;                  // .maxntid, .reqntid: their product; 0: no bound
  uint32_t required_threads[3] = {0, 0, 0};  // .reqntid
  int line = 0;
};

struct Location {
  int file = 0, line = 0;
  int inlined_file = 0, inlined_line = 0;
};

struct Special {
  enum Kind : uint8_t { kFixed, kClock, kClock64, kTimer } kind = kFixed;
  std::string_view name;
  int32_t row = 0;
};

struct Module;

struct Kernel {
  const Module* module = nullptr;
  const Function* function = nullptr;
  std::vector<Instr> code;
  int32_t start = 0;                // where the kernel itself begins, after the functions it calls
  std::vector<uint64_t> constants;  // rows
  int32_t rows = 1;                 // row 0 is scratch
  std::vector<Special> specials;
  std::vector<std::vector<int32_t>> branch_tables;
  std::vector<Variable> shared;  // in order of address; dynamic ones start at static_shared
  uint32_t static_shared = 0;    // bytes
  uint32_t dynamic_offset = 0;   // where dynamic shared memory starts
  bool dynamic_shared = false;   // the code names it
  uint32_t local_bytes = 0, call_bytes = 0;  // per thread: variables, and functions' parameters
  uint32_t parameter_bytes = 0;
  std::vector<Location> locations{Location{}};
  static constexpr int32_t kDefaultDynamicShared = 48 * 1024;
  int32_t max_dynamic_shared = kDefaultDynamicShared;  // the function attribute
};

struct Module {
  std::string text;
  std::vector<Token> tokens;  // while it is read
  int target = 0;             // 80 of sm_80
  std::map<std::string_view, Function> functions;
  std::map<std::string_view, Variable> variables;
  std::map<int, std::string_view> files;
  std::map<std::string_view, std::unique_ptr<Kernel>> kernels;
  std::unique_ptr<uint8_t[]> storage;  // of .global and .const variables
  std::vector<uint8_t> initial;        // what storage holds after loading
  uint64_t storage_bytes = 0;

  explicit Module(std::string_view ptx);  // throws DecodeError
  void reset();                           // as if loaded anew
};

// body.cpp: called while the module is read, for each of its kernels.
std::unique_ptr<Kernel> decode_kernel(const Module& module, const Function& function);
// Rows while a kernel is decoded: special registers and what calls need are numbered from 1 and
// stay; registers of the function being decoded are numbered from kVirtualRows, and once it is
// complete they get rows from kSharedRows on, shared by registers that are never alive together.
constexpr int32_t kSharedRows = 1 << 20;
constexpr int32_t kVirtualRows = 1 << 21;
// allocate.cpp: does that for code[first..], where `count` registers were declared and `taken` rows
// belong to other functions. Returns the number of rows that it took.
int32_t allocate_rows(std::vector<Instr>& code, int32_t first,
                      const std::vector<std::vector<int32_t>>& branch_tables, int32_t count,
                      int32_t taken);

// "u32" -> 4, "v4" -> 0: bytes of a type, 0 if it is none (.pred is 1).
int type_bytes(std::string_view type);
constexpr uint64_t align_up(uint64_t x, uint64_t to) { return (x + to - 1) / to * to; }

// decode.cpp: chooses the instruction's function. Throws DecodeError.
void decode(const Opcode& opcode, Instr& instr);

}  // namespace ptxsim
