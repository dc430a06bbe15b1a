// What a launch did, counted per thread block and summed: the measures that need no clock.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace ptxsim {

// Classes of instructions. A family has its class by default (decode.cpp).
enum Class : int16_t {
  kControl,
  kMove,
  kInteger,
  kFloat,
  kHalf,
  kConvert,
  kSpecial,  // the special function unit: lg2, rcp, rsqrt, sqrt, sin, cos, tanh
  kExp,      // ex2
  kLoad,
  kStore,
  kAtomic,
  kShuffle,  // shfl, vote, match, redux
  kMatrixLoad,
  kMatrixStore,
  kMma,
  kAsyncCopy,
  kBarrier,
  kFence,
  kClasses,
};

struct Traffic {
  uint64_t bytes = 0;          // asked for by lanes
  uint64_t sectors = 0;        // of 32 bytes that the warps touched (global memory)
  uint64_t ideal_sectors = 0;  // that the same distinct bytes would fill
};

struct Counters {
  std::array<uint64_t, kClasses> instructions{};  // per warp
  std::array<uint64_t, kClasses> lanes{};         // per thread
  uint64_t mma_flops = 0;
  Traffic global_read, global_write;
  uint64_t shared_read = 0, shared_write = 0;  // bytes
  uint64_t local_read = 0, local_write = 0;
  // Cycles beyond the fewest that the accesses' width allows.
  uint64_t bank_conflicts = 0, matrix_bank_conflicts = 0;
  uint64_t thread_blocks = 0;
  struct Bytes {
    uint64_t read = 0, written = 0;
  };
  std::vector<Bytes> regions;  // of global memory, as the launch's MemoryMap numbers them

  Counters& operator+=(const Counters& other);
  // `names`: of the regions.
  std::string json(const std::vector<std::string>& names) const;
};

}  // namespace ptxsim
