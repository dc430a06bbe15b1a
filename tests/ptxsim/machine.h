// The state of a simulated grid, and what an instruction is once decoded. A warp executes one
// instruction for a mask of its lanes at a time. Every operand of an instruction is a row of 32
// 64-bit slots, one per lane: a register, an immediate (its value repeated) or a special register
// (filled when the warp starts), so that an instruction's function only sees rows.
//
// Values are zero-extended into their slot: .b16 and narrower floats as bits, .f32 as bits, .s32 as
// its 32-bit pattern, predicates as 0 or 1.
#pragma once
#include <bit>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace ptxsim {

using Mask = uint32_t;  // bit l: lane l takes part
constexpr int kLanes = 32;
constexpr Mask kAll = ~Mask{0};

using Row = uint64_t[kLanes];

// A PTX text that cannot be decoded: names the opcode or directive and its line.
struct DecodeError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Ends the launch: what the program did wrong, where, and who did it. `kind` is one word that tests
// look for, such as "out-of-bounds", "misaligned", "uninitialized", "race", "deadlock",
// "divergence", "cp.async", "trap".
struct Fault : std::runtime_error {
  Fault(std::string kind, const std::string& text)
      : std::runtime_error(kind + ": " + text), kind(std::move(kind)) {}
  std::string kind;
};

struct Warp;
struct Cta;
struct Instr;

// Executes one instruction for the lanes of `mask` (never empty), which hold its guard.
using Exec = void (*)(Warp&, const Instr&, Mask mask);

struct Operand {
  enum Kind : uint8_t {
    kNone,
    kRow,      // a register, immediate or special register: `row`
    kSink,     // "_": a destination that is dropped
    kVector,   // {a, b, ...}: `items`
    kAddress,  // [row + offset]: `row` (-1: none) and `offset`, which holds a symbol's address
    kLabel,    // a branch target: `offset` is the index of an instruction
    kSymbol,   // a variable or function: `offset` is its address or index, `name` its name
  };
  Kind kind = kNone;
  bool negated = false;  // "!p"
  uint8_t bytes = 0;     // width of a register as declared; 0: not a register
  int32_t row = -1;      // >= 0: a row of the warp; < 0 of kind kRow: constant row ~row
  int64_t offset = 0;
  std::string_view name;
  std::vector<Operand> items;
};

// One decoded instruction. `attr` is for the function's own use: its meaning is known where `exec`
// is chosen.
struct Instr {
  Exec exec = nullptr;
  std::vector<Operand> op;  // destinations first, as written
  int64_t attr[6] = {};
  int32_t guard = -1;  // row of the guard predicate
  bool guard_negated = false;
  // Lanes named by this operand must all be here before it runs (shfl.sync, mma.sync, ...); -1:
  // none; -2: all lanes of the warp that have not exited.
  int16_t members = -1;
  // Class of instruction (counters.h). decode.cpp sets that of the family first; a decoder that
  // knows better changes it.
  int16_t counter = 0;
  int32_t line = 0;   // of the PTX text
  int32_t flops = 0;  // of the whole warp, for the counters: matrix instructions set it
  // What runs it where that is not `exec`, which is then null: branches, calls, returns, exits.
  enum Control : uint8_t { kNone, kBranch, kBranchIndexed, kCall, kReturn, kExit };
  Control control = kNone;
  bool pair = false;      // the destination is written "d|p": op[0] is d, op[1] is p
  int32_t location = 0;   // in the CUDA source (-lineinfo): Kernel::locations; 0: not known
  std::string_view text;  // the opcode as written, "add.rn.f32"
};

// An opcode split at its dots: "ld.global.nc.v4.f32" -> {"ld", "global", "nc", "v4", "f32"}.
struct Opcode {
  std::string_view text;
  std::vector<std::string_view> part;
  int line = 0;

  std::string_view name() const { return part[0]; }
  bool has(std::string_view modifier) const {
    for (size_t i = 1; i < part.size(); ++i)
      if (part[i] == modifier) return true;
    return false;
  }
  std::string_view last(size_t from_end = 0) const { return part[part.size() - 1 - from_end]; }
};

// A family of instructions: looks at the opcode, and if it is one of its own sets exec, attr,
// members and counter of `instr` (whose operands are decoded already) and returns true. Modifiers
// that it does not know are an error, never ignored: throw DecodeError through unknown().
using Decoder = bool (*)(const Opcode& opcode, Instr& instr);

[[noreturn]] void unknown(const Opcode& opcode, std::string_view why);

// The families, tried in this order (decode.cpp).
bool decode_control(const Opcode&, Instr&);  // bra, call, ret, exit, trap, brkpt
bool decode_move(const Opcode&, Instr&);     // mov, cvta, selp, prmt, szext, ...
bool decode_integer(const Opcode&, Instr&);  // add.s32, mad.lo, bfi, shf, setp.s32, and.b32, ...
bool decode_float(const Opcode&, Instr&);    // f32 and f64 arithmetic, setp, min, max
bool decode_approx(const Opcode&, Instr&);   // ex2, lg2, rcp, rsqrt, sqrt, sin, cos, tanh, div.full
bool decode_half(const Opcode&, Instr&);     // f16, f16x2, bf16, bf16x2 arithmetic
bool decode_convert(const Opcode&, Instr&);  // cvt of every pair of types
bool decode_memory(const Opcode&, Instr&);   // ld, st, ldu, prefetch, fence, membar
bool decode_atomic(const Opcode&, Instr&);   // atom, red
bool decode_warp(const Opcode&, Instr&);     // shfl, vote, match, redux, activemask, elect
bool decode_matrix(const Opcode&, Instr&);   // ldmatrix, stmatrix, movmatrix, mma
bool decode_async(const Opcode&, Instr&);    // cp.async and its groups
bool decode_barrier(const Opcode&, Instr&);  // bar, barrier, bar.warp

enum class Space : uint8_t { kGeneric, kGlobal, kShared, kLocal, kParam, kConst };
enum class Access : uint8_t { kRead, kWrite, kAtomic };

// Asked whenever the warp's turn comes while lanes wait, once per group of lanes that called
// wait(): may they go on? When it says true it may write the instruction's results (barrier.red).
using Ready = bool (*)(Warp&, const Instr&, Mask lanes, uint64_t token);

// Lanes of a warp that are at the same instruction. They run the lowest pc first and merge where
// they meet.
struct Group {
  Mask mask = 0;
  int32_t pc = 0;
  Ready ready = nullptr;  // set: they wait, having executed the instruction before pc
  uint64_t token = 0;
  const Instr* at = nullptr;  // what they wait in: of `ready`, or of lanes that have not arrived
};

struct Warp {
  Cta* cta = nullptr;
  int index = 0;              // of the thread block's warps
  uint64_t* slots = nullptr;  // rows of 32; row 0 is scratch
  const uint64_t* constants = nullptr;
  Mask present = kAll;  // lanes that hold a thread: the last warp of a block may have fewer
  Mask exited = 0;      // lanes without a thread count as exited
  Mask carry = 0;       // CC.CF of each lane
  std::vector<Group> groups;

  uint64_t* row(int32_t r) { return slots + int64_t{r} * kLanes; }
  const uint64_t* in(const Operand& o) const {
    return o.row >= 0 ? slots + int64_t{o.row} * kLanes : constants + int64_t{~o.row} * kLanes;
  }
  // Where a destination is written; "_" has the scratch row.
  uint64_t* out(const Operand& o) { return slots + int64_t{o.row} * kLanes; }

  // Called by an instruction's function: the lanes that it runs for wait, the instruction done,
  // until ready(warp, instr, lanes, token) says true. Other warps, and this warp's other lanes, go
  // on; if everybody waits, that is a deadlock.
  void wait(Ready ready, uint64_t token = 0) {
    waiting = ready;
    waiting_token = token;
  }
  Ready waiting = nullptr;  // taken by the scheduler after each instruction
  uint64_t waiting_token = 0;
  bool yields = false;  // set by an instruction: another warp's turn (nanosleep)
};

// Ends the launch with a report: `kind` and `what`, then who and where: kernel, thread block, warp,
// lanes, PTX line, opcode, source line (fault.cpp).
[[noreturn]] void fault(const Warp& warp, const Instr& instr, Mask lanes, const std::string& kind,
                        const std::string& what);
// "warp 1, lanes 0-3,8, PTX line 44: bar.sync (kernel.cu:17)"
std::string place(const Warp& warp, const Instr& instr, Mask lanes);
// An address of shared memory as the program names it: "'tile' + 128 (shared 0x480)".
std::string shared_name(const Warp& warp, uint32_t offset);

// Host addresses of `bytes` bytes for each lane of `mask`, checked: in bounds of what the space
// holds, aligned to `bytes`, written before they are read (shared), free of races (shared).
// `address` has the lanes' addresses in `space`. Throws Fault. Counts the access. For ld, st, atom,
// ldmatrix and the source and destination of cp.async alike (memory.cpp).
void resolve(Warp& warp, const Instr& instr, Mask mask, Space space, const uint64_t* address,
             int bytes, Access access, uint8_t* host[kLanes]);

// A stream of random numbers that the launch's seed decides.
uint64_t random_bits(Warp& warp);

// Applies f to each lane of the mask.
template <class F>
inline void each_lane(Mask mask, F f) {
  if (mask == kAll) {
    for (int l = 0; l < kLanes; ++l) f(l);
  } else {
    for (Mask m = mask; m != 0; m &= m - 1) f(std::countr_zero(m));
  }
}

inline float as_float(uint64_t bits) { return std::bit_cast<float>(uint32_t(bits)); }
inline double as_double(uint64_t bits) { return std::bit_cast<double>(bits); }
inline uint64_t bits_of(float x) { return std::bit_cast<uint32_t>(x); }
inline uint64_t bits_of(double x) { return std::bit_cast<uint64_t>(x); }

}  // namespace ptxsim
