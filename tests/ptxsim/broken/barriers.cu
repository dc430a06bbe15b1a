// Barriers of a thread block: missing, misplaced, miscounted. Blocks have 128 threads.
#include "twins.cuh"

__device__ void named_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ void named_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Each warp reads what another has stored.
template <bool kFixed>
__device__ void store_then_load(const Buffers& a) {
  __shared__ float tile[128];
  const int t = threadIdx.x;
  tile[t] = 0;
  __syncthreads();
  tile[t] = a.in[t];  // @store_then_load @store_then_load-other
  if (kFixed) __syncthreads();
  a.out[t] = tile[t ^ 32];  // @store_then_load @store_then_load-other
}
TWINS(store_then_load)

// One buffer, filled again in each iteration: a barrier before its readers and one after them.
template <bool kFixed>
__device__ void refill(const Buffers& a) {
  __shared__ float tile[128];
  const int t = threadIdx.x;
  float sum = 0;
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {
    tile[t] = a.in[t] * i;  // @refill @refill-other
    __syncthreads();
    sum += tile[t ^ 64];  // @refill @refill-other
    if (kFixed) __syncthreads();
  }
  a.out[t] = sum;
}
TWINS(refill)

// Two buffers and one barrier per iteration are enough; none but every other one is not.
template <bool kFixed>
__device__ void double_buffer(const Buffers& a) {
  __shared__ float tile[2][128];
  const int t = threadIdx.x;
  float sum = 0;
  tile[0][t] = tile[1][t] = 0;
  __syncthreads();
#pragma unroll 1
  for (int i = 0; i < 6; ++i) {
    tile[i & 1][t] = a.in[t] * i;  // @double_buffer @double_buffer-other
    if (kFixed || (i & 1)) __syncthreads();
    sum += tile[i & 1][t ^ 32];  // @double_buffer @double_buffer-other
  }
  a.out[t] = sum;
}
TWINS(double_buffer)

// A producing warp fills a ring of two slots for a consuming one, with a pair of named barriers per
// slot. A producer that waits for an empty slot only after it has written writes into what is still
// being read.
template <bool kFixed>
__device__ void ring(const Buffers& a) {
  __shared__ float slot[2][32];
  const int lane = lane_id();
  if (warp_id() == 0) {
#pragma unroll 1
    for (int i = 0; i < 8; ++i) {
      if (kFixed && i >= 2) named_sync(3 + (i & 1), 64);
      slot[i & 1][lane] = a.in[lane] + i;  // @ring @ring-other
      if (!kFixed && i >= 2) named_sync(3 + (i & 1), 64);
      named_arrive(1 + (i & 1), 64);
    }
  } else if (warp_id() == 1) {
    float sum = 0;
#pragma unroll 1
    for (int i = 0; i < 8; ++i) {
      named_sync(1 + (i & 1), 64);
      sum += slot[i & 1][31 - lane];  // @ring @ring-other
      if (i < 6) named_arrive(3 + (i & 1), 64);
    }
    a.out[lane] = sum;
  }
}
TWINS(ring)

// Half of each warp takes one barrier, the rest another.
template <bool kFixed>
__device__ void divergent_barrier(const Buffers& a) {
  const int t = threadIdx.x;
  float x = a.in[t];
  if (kFixed || lane_id() < 16) {
    asm volatile("bar.sync 0;" ::: "memory");  // @divergent_barrier
    x += 1;
  }
  if (!kFixed && lane_id() >= 16) {
    x *= 2;
    asm volatile("bar.sync 0;" ::: "memory");  // @divergent_barrier
  }
  a.out[t] = x;
}
TWINS(divergent_barrier)

// Lanes of a warp go to barriers of different numbers with one instruction.
template <bool kFixed>
__device__ void divergent_number(const Buffers& a) {
  named_sync(kFixed ? 1 : 1 + (threadIdx.x & 1), 128);
  a.out[threadIdx.x] = a.in[threadIdx.x];
}
TWINS(divergent_number)

// A warp expects 64 threads where the others expect 128.
template <bool kFixed>
__device__ void count_mismatch(const Buffers& a) {
  const int count = kFixed || warp_id() != 2 ? 128 : 96;
  named_sync(5, count);
  a.out[threadIdx.x] = a.in[threadIdx.x];
}
TWINS(count_mismatch)

// a.extra is 48.
template <bool kFixed>
__device__ void count_not_of_warps(const Buffers& a) {
  named_sync(1, kFixed ? 128 : a.extra);
  a.out[threadIdx.x] = a.in[threadIdx.x];
}
TWINS(count_not_of_warps)

template <bool kFixed>
__device__ void count_too_large(const Buffers& a) {
  named_sync(1, kFixed ? 128 : 160);
  a.out[threadIdx.x] = a.in[threadIdx.x];
}
TWINS(count_too_large)

template <bool kFixed>
__device__ void no_such_barrier(const Buffers& a) {
  named_sync(kFixed ? 15 : a.extra, 128);
  a.out[threadIdx.x] = a.in[threadIdx.x];
}
TWINS(no_such_barrier)

// A barrier for two warps that one of them skips.
template <bool kFixed>
__device__ void nobody_comes(const Buffers& a) {
  const int t = threadIdx.x;
  if (warp_id() == 0 || (kFixed && warp_id() == 1)) named_sync(7, 64);  // @nobody_comes
  a.out[t] = a.in[t];
}
TWINS(nobody_comes)

// Each warp waits for what the other would do after its own wait.
template <bool kFixed>
__device__ void deadlock(const Buffers& a) {
  if (warp_id() == 0) {
    if (kFixed) named_arrive(2, 64);
    asm volatile("bar.sync 1, 64;" ::: "memory");  // @deadlock
    if (!kFixed) named_arrive(2, 64);
  } else if (warp_id() == 1) {
    asm volatile("bar.sync 2, 64;" ::: "memory");  // @deadlock
    named_arrive(1, 64);
  }
  a.out[threadIdx.x] = a.in[threadIdx.x];
}
TWINS(deadlock)

// The warp arrives twice before the barrier has completed.
template <bool kFixed>
__device__ void arrive_twice(const Buffers& a) {
  if (warp_id() == 0) {
    named_arrive(1, 128);
    if (!kFixed) named_arrive(1, 128);  // @arrive_twice
    named_arrive(2, 128);
  } else {
    named_sync(2, 128);
    named_sync(1, 128);
  }
  a.out[threadIdx.x] = a.in[threadIdx.x];
}
TWINS(arrive_twice)

// Reductions do not share a barrier with other forms.
template <bool kFixed>
__device__ void mixed_forms(const Buffers& a) {
  unsigned count = 128;
  if (kFixed || warp_id() < 2)
    asm volatile("{.reg .pred p; setp.ne.s32 p, %1, 0; bar.red.popc.u32 %0, 1, 128, p;}"
                 : "=r"(count)
                 : "r"(int(threadIdx.x))
                 : "memory");
  else
    named_sync(1, 128);
  a.out[threadIdx.x] = count;
}
TWINS(mixed_forms)

// A warp whose threads have all exited is not waited for by a barrier without a count; its stores
// are not ordered by one either.
template <bool kFixed>
__device__ void exit_orders_nothing(const Buffers& a) {
  __shared__ float tile[128];
  const int t = threadIdx.x;
  tile[t] = 0;
  __syncthreads();
  if (warp_id() == 3) {
    tile[t] = a.in[t];  // @exit_orders_nothing @exit_orders_nothing-other
    if (kFixed) __syncthreads();
    return;
  }
  __syncthreads();
  a.out[t] = tile[t < 32 ? t + 96 : t];  // @exit_orders_nothing @exit_orders_nothing-other
}
TWINS(exit_orders_nothing)

// What follows has no broken twin.

// Threads of each warp come to one barrier by different instructions, as barrier.sync allows.
KERNEL(unaligned_fixed) {
  __shared__ float tile[128];
  const int t = threadIdx.x;
  tile[t] = in[t];
  if (t & 1)
    asm volatile("barrier.sync 0;" ::: "memory");
  else
    asm volatile("barrier.cta.sync 0, 128;" ::: "memory");
  out[t] = tile[127 - t];
}

KERNEL(reductions_fixed) {
  const int t = threadIdx.x;
  const bool odd = t & 1;
  int result = __syncthreads_count(t < 40);
  result += 1000 * __syncthreads_and(odd) + 2000 * (__syncthreads_or(odd) != 0);
  result += 4000 * (__syncthreads_and(t >= 0) != 0) + 8000 * __syncthreads_or(t < 0);
  out[t] = float(result);
}

// Lanes and warps that exit are not waited for.
KERNEL(early_exit_fixed) {
  __shared__ float tile[128];
  const int t = threadIdx.x;
  if (t >= 70) return;
  tile[t] = in[t];
  __syncthreads();
  out[t] = tile[69 - t];
  __syncthreads();
}
