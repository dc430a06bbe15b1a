// Where the spaces of a thread block lie in the host's memory.
#pragma once
#include "cta.h"
#include "module.h"

namespace ptxsim {

// A thread's own bytes: variables in local memory, then functions' parameters.
inline uint8_t* local_memory(const Warp& warp, int lane) {
  const Kernel& kernel = *warp.cta->launch->kernel;
  uint64_t each = kernel.local_bytes + kernel.call_bytes;
  return warp.cta->local + (uint64_t(warp.index) * kLanes + uint64_t(lane)) * each;
}
inline uint8_t* call_memory(const Warp& warp, int lane) {
  return local_memory(warp, lane) + warp.cta->launch->kernel->local_bytes;
}

}  // namespace ptxsim
