// Asynchronous copies and their groups. Blocks have 64 threads.
#include "twins.cuh"

template <int kBytes>
__device__ void copy(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(to)), "l"(from),
               "n"(kBytes)
               : "memory");
}
__device__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

template <bool kFixed>
__device__ void read_early(const Buffers& a) {
  __shared__ float tile[64];
  const int t = threadIdx.x;
  copy<4>(&tile[t], &a.in[t]);
  commit();
  if (kFixed) wait<0>();
  a.out[t] = tile[t];  // @read_early
  wait<0>();
}
TWINS(read_early)

// Of two groups under way the older one is read: all but one, not all but two, must have landed.
template <bool kFixed>
__device__ void wait_count(const Buffers& a) {
  __shared__ float4 tile[2][64];
  const int t = threadIdx.x;
  const float4* in = reinterpret_cast<const float4*>(a.in);
  copy<16>(&tile[0][t], &in[t]);
  commit();
  copy<16>(&tile[1][t], &in[t]);
  commit();
  wait<kFixed ? 1 : 2>();
  float x = tile[0][t].x;  // @wait_count
  wait<0>();
  a.out[t] = x + tile[1][t].y;
}
TWINS(wait_count)

// A copy that is not in any group yet is not waited for by wait_group.
template <bool kFixed>
__device__ void not_committed(const Buffers& a) {
  __shared__ float tile[64];
  const int t = threadIdx.x;
  copy<4>(&tile[t], &a.in[t]);
  if (kFixed) commit();
  wait<0>();
  a.out[t] = tile[t];  // @not_committed
  asm volatile("cp.async.wait_all;" ::: "memory");
}
TWINS(not_committed)

// The wait makes a thread's own copies visible to itself only.
template <bool kFixed>
__device__ void no_barrier(const Buffers& a) {
  __shared__ float tile[64];
  const int t = threadIdx.x;
  tile[t] = 0;
  __syncthreads();
  copy<4>(&tile[t], &a.in[t]);  // @no_barrier @no_barrier-other
  asm volatile("cp.async.wait_all;" ::: "memory");
  if (kFixed) __syncthreads();
  a.out[t] = tile[t ^ 33];  // @no_barrier @no_barrier-other
}
TWINS(no_barrier)

// The barrier comes before the wait instead of after it.
template <bool kFixed>
__device__ void barrier_before_wait(const Buffers& a) {
  __shared__ float tile[64];
  const int t = threadIdx.x;
  copy<4>(&tile[t], &a.in[t]);  // @barrier_before_wait-other
  commit();
  if (!kFixed) __syncthreads();
  wait<0>();
  if (kFixed) __syncthreads();
  a.out[t] = tile[63 - t];  // @barrier_before_wait
}
TWINS(barrier_before_wait)

// A ring of three slots, two groups ahead. The slot that is filled next was read one iteration ago:
// the barrier must lie between.
template <bool kFixed>
__device__ void slot_too_early(const Buffers& a) {
  __shared__ float4 ring[3][64];
  const int t = threadIdx.x;
  const float4* in = reinterpret_cast<const float4*>(a.in);
  for (int i = 0; i < 2; ++i) {
    copy<16>(&ring[i][t], &in[t]);
    commit();
  }
  float sum = 0;
#pragma unroll 1
  for (int i = 0; i < 7; ++i) {
    wait<1>();
    if (kFixed) __syncthreads();
    if (!kFixed) {
      __syncthreads();
      sum += ring[i % 3][63 - t].x;       // @slot_too_early @slot_too_early-other
      copy<16>(&ring[i % 3][t], &in[t]);  // @slot_too_early @slot_too_early-other
    } else {
      copy<16>(&ring[(i + 2) % 3][t], &in[t]);
      sum += ring[i % 3][63 - t].x;
    }
    commit();
  }
  wait<0>();
  a.out[t] = sum;
}
TWINS(slot_too_early)

// A store to where a copy is under way.
template <bool kFixed>
__device__ void store_meanwhile(const Buffers& a) {
  __shared__ float tile[64];
  const int t = threadIdx.x;
  copy<4>(&tile[t], &a.in[t]);  // @store_meanwhile-other
  commit();
  if (kFixed) wait<0>();
  tile[t] = 1;  // @store_meanwhile
  wait<0>();
  a.out[t] = tile[t];
}
TWINS(store_meanwhile)

template <bool kFixed>
__device__ void exit_with_copies(const Buffers& a) {
  __shared__ float tile[64];
  const int t = threadIdx.x;
  if (t < 64) copy<4>(&tile[t], &a.in[t]);  // @exit_with_copies-other
  commit();
  if (kFixed) wait<0>();
  a.out[t] = 1;
}
TWINS(exit_with_copies)

template <bool kFixed>
__device__ void copy_misaligned(const Buffers& a) {
  __shared__ float4 tile[64];
  const int t = threadIdx.x;
  copy<16>(&tile[t], a.in + 4 * (t / 2) + (kFixed ? 0 : 1));
  asm volatile("cp.async.wait_all;" ::: "memory");
  a.out[t] = tile[t].x;
}
TWINS(copy_misaligned)

// The last thread's copy ends one element behind the input.
template <bool kFixed>
__device__ void copy_out_of_bounds(const Buffers& a) {
  __shared__ float tile[64];
  const int t = threadIdx.x;
  copy<4>(&tile[t], a.in + a.n - 64 + t + (kFixed ? 0 : 1));
  asm volatile("cp.async.wait_all;" ::: "memory");
  a.out[t] = tile[t];
}
TWINS(copy_out_of_bounds)

// What follows has no broken twin.

// Zeros take the place of what the source does not have: out[4 t ...] has the first t % 5 elements
// of in[4 t ...], and none for odd groups of 8 threads, whose source is not even readable.
KERNEL(zero_fill_fixed) {
  __shared__ float4 tile[64];
  const int t = threadIdx.x;
  const bool ignore = t / 8 % 2 == 1;
  if (t < 32) {
    const float* from = ignore ? nullptr : in + 4 * t;
    asm volatile(
        "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(&tile[t])),
        "l"(from), "r"(ignore ? 0 : 4 * (t % 5))
        : "memory");
  } else {
    asm volatile(
        "{.reg .pred p; setp.ne.s32 p, %2, 0; cp.async.ca.shared.global [%0], [%1], 16, p;}" ::"r"(
            shared_address(&tile[t])),
        "l"(in + 4 * t), "r"(int(ignore))
        : "memory");
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
  reinterpret_cast<float4*>(out)[t] = tile[t];
}

// The source is overwritten while the copy is under way: the copy may see either value. No report,
// since global memory is not watched, but seeds differ.
KERNEL(source_changes_fixed) {
  __shared__ float tile[64];
  const int t = threadIdx.x;
  out[t] = 1;
  copy<4>(&tile[t], &out[t]);
  commit();
  out[t] = 2;
  wait<0>();
  out[t] = tile[t];
}
