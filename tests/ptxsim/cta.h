// A thread block while it runs, and what its launch shares between blocks.
#pragma once
#include <array>
#include <memory>
#include <string>
#include <vector>

#include "counters.h"
#include "machine.h"

namespace ptxsim {

struct Kernel;      // module.h: the decoded code
struct MemoryMap;   // regions.h: what global memory holds
class Shadow;       // shadow.h: who wrote and read each byte of shared memory
class Barriers;     // barrier.h: bar.sync, bar.arrive, mbarrier
class AsyncCopies;  // async.h: copies under way

struct Random {  // splitmix64
  uint64_t state = 0;
  uint64_t operator()() {
    uint64_t z = (state += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
};

struct Launch {
  const Kernel* kernel = nullptr;
  const MemoryMap* memory = nullptr;
  std::array<uint32_t, 3> grid{1, 1, 1}, block{1, 1, 1};
  uint32_t dynamic_shared = 0;
  uint64_t seed = 0;
  uint64_t instruction_limit = 0;   // per thread block, in warp instructions
  std::vector<uint8_t> parameters;  // the kernel's parameter space
  int multiprocessors = 1;          // for %smid, %nsmid
};

struct Cta {
  Launch* launch = nullptr;
  std::array<uint32_t, 3> id{};
  uint64_t linear = 0;  // index in the grid, x fastest
  int threads = 0;
  std::vector<Warp> warps;
  uint8_t* shared = nullptr;
  uint32_t shared_bytes = 0;  // static and dynamic
  uint8_t* local = nullptr;   // [warp][lane][kernel's bytes of local memory]
  Random random;
  Counters counters;
  uint64_t executed = 0;  // warp instructions so far
  // What checks the block: made by begin_checks, gone with the block.
  std::shared_ptr<Shadow> shadow;
  std::shared_ptr<Barriers> barriers;
  std::shared_ptr<AsyncCopies> async;
};

// The checks (shadow.cpp, barrier.cpp, async.cpp), called by the scheduler (execute.cpp):
// Before the first warp runs: makes cta.shadow, cta.barriers, cta.async.
void begin_checks(Cta& cta);
// After the last warp has exited: copies that nobody waited for, ...
void end_checks(Cta& cta);
// Lanes have exited: barriers that count warps expect them no more.
void lanes_exited(Warp& warp, const Instr& instr, Mask lanes);
// The scheduler turns to another warp: a legal moment for copies under way to land.
void at_switch(Warp& warp);
// Every warp waits. Lands something that is under way, or says false: a deadlock.
bool advance(Cta& cta);
// Shared memory is accessed (resolve() has checked bounds and alignment): offset[l] of lanes in the
// mask. Faults: "uninitialized", "race".
void shared_access(Warp& warp, const Instr& instr, Mask mask, const uint32_t* offset, int bytes,
                   Access access);
// What lanes wait for, for the report of a deadlock: "barrier 1: 64 of 128 threads have arrived".
std::string describe_wait(Warp& warp, const Group& group);

}  // namespace ptxsim
