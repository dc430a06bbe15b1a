// Kernels in pairs: `name_broken` has one fault, which the simulator must report at the line marked
// "@name"; the other place that the report names is marked "@name-other". `name_fixed` is right.
#pragma once

struct Buffers {
  const float* in;  // read-only
  float* out;
  int n;  // elements of both
  int extra;
};

#define KERNEL(name) extern "C" __global__ void name(const float* in, float* out, int n, int extra)
#define TWINS(name)                                           \
  KERNEL(name##_broken) { name<false>({in, out, n, extra}); } \
  KERNEL(name##_fixed) { name<true>({in, out, n, extra}); }

__device__ inline int lane_id() { return threadIdx.x % 32; }
__device__ inline int warp_id() { return threadIdx.x / 32; }
__device__ inline unsigned shared_address(const void* pointer) {
  return unsigned(__cvta_generic_to_shared(pointer));
}
