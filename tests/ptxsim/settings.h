// What a test may set, and what the latest launch of a thread left: the state behind driver.cpp.
#pragma once
#include <atomic>
#include <cstdint>
#include <string>

#include "counters.h"

namespace ptxsim {

struct Settings {
  std::atomic<uint64_t> seed{0};
  std::atomic<int> threads{0};  // host threads of a launch; 0: as many as the machine has
  // Of a thread block, in instructions of its warps: beyond is a program that does not end.
  // Half a minute or so.
  static constexpr uint64_t kInstructionLimit = 300'000'000;
  std::atomic<uint64_t> instruction_limit{kInstructionLimit};
  std::atomic<int> capability{80};  // the device: 80 is sm_80
  std::atomic<int> multiprocessors{108};
};
Settings& settings();

// Shared memory that a thread block may have, with the attribute set, in bytes.
int shared_limit(int capability);

struct LastLaunch {
  Counters counters;
  std::vector<std::string> regions;  // names, as the counters number them
  std::string report;                // of the failure; empty after success
  std::string json;                  // what the C functions return
};
LastLaunch& last_launch();  // of the calling thread

}  // namespace ptxsim
