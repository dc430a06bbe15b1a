// Lanes of one warp. Blocks have 64 threads.
#include "twins.cuh"

template <bool kFixed>
__device__ void missing_syncwarp(const Buffers& a) {
  __shared__ float tile[64];
  const int t = threadIdx.x;
  tile[t] = a.in[t];  // @missing_syncwarp-other
  if (kFixed) __syncwarp();
  a.out[t] = tile[t ^ 1];  // @missing_syncwarp
}
TWINS(missing_syncwarp)

// What a lane reads, another overwrites.
template <bool kFixed>
__device__ void syncwarp_before_write(const Buffers& a) {
  __shared__ float tile[64];
  const int t = threadIdx.x;
  tile[t] = a.in[t];
  __syncwarp();
  float x = tile[t ^ 1];  // @syncwarp_before_write-other
  if (kFixed) __syncwarp();
  tile[t] = x + 1;  // @syncwarp_before_write
  a.out[t] = tile[t];
}
TWINS(syncwarp_before_write)

// shfl brings lanes together and orders no memory.
template <bool kFixed>
__device__ void shuffle_orders_nothing(const Buffers& a) {
  __shared__ float tile[64];
  const int t = threadIdx.x;
  tile[t] = a.in[t];  // @shuffle_orders_nothing-other
  float x = __shfl_xor_sync(0xffffffffu, a.in[t], 1);
  if (kFixed) __syncwarp();
  a.out[t] = x + tile[t ^ 2];  // @shuffle_orders_nothing
}
TWINS(shuffle_orders_nothing)

// Two halves synchronise, each for itself.
template <bool kFixed>
__device__ void half_syncwarp(const Buffers& a) {
  __shared__ float tile[64];
  const int t = threadIdx.x;
  tile[t] = a.in[t];  // @half_syncwarp-other
  if (lane_id() < 16)
    __syncwarp(0x0000ffffu);
  else
    __syncwarp(0xffff0000u);
  a.out[t] = tile[t ^ (kFixed ? 8 : 16)];  // @half_syncwarp
}
TWINS(half_syncwarp)

// Pairs of lanes store to one address.
template <bool kFixed>
__device__ void one_address(const Buffers& a) {
  __shared__ float tile[64];
  const int t = threadIdx.x;
  tile[t / 2] = float(kFixed ? t / 2 : t);  // @one_address
  __syncthreads();
  a.out[t] = tile[t / 2];
}
TWINS(one_address)

template <bool kFixed>
__device__ void one_address_half(const Buffers& a) {
  __shared__ unsigned short tile[64];
  const int t = threadIdx.x;
  tile[t / 2] = static_cast<unsigned short>(kFixed ? t / 2 : t);  // @one_address_half
  __syncthreads();
  a.out[t] = float(tile[t / 2]);
}
TWINS(one_address_half)

__device__ void barrier_of_two_warps() { asm volatile("bar.sync 1, 64;" ::: "memory"); }

// A lane that all name does not come.
template <bool kFixed>
__device__ void shuffle_without_lane(const Buffers& a) {
  const int t = threadIdx.x;
  float x = a.in[t];
  if (kFixed || lane_id() != 5) {
    x = __shfl_xor_sync(0xffffffffu, x, 1);  // @shuffle_without_lane @shuffle_without_lane-other
  } else {
    barrier_of_two_warps();  // @shuffle_without_lane @shuffle_without_lane-other
  }
  a.out[t] = x;
}
TWINS(shuffle_without_lane)

__device__ void load_matrices(unsigned (&r)[4], const uint4* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Rows that lanes have stored are read by ldmatrix, which gives each lane parts of eight rows.
template <bool kFixed>
__device__ void matrix_load(const Buffers& a) {
  __shared__ uint4 rows[64];
  const int t = threadIdx.x;
  rows[t] = make_uint4(t, t, t, t);  // @matrix_load-other
  if (kFixed) __syncwarp();
  unsigned r[4];
  load_matrices(r, &rows[t]);  // @matrix_load
  a.out[t] = float(r[0] + r[1] + r[2] + r[3]);
}
TWINS(matrix_load)

// Atomics do not race with each other, but with a load that nothing orders.
template <bool kFixed>
__device__ void atomics(const Buffers& a) {
  __shared__ float sum;
  const int t = threadIdx.x;
  if (t == 0) sum = 0;
  __syncthreads();
  atomicAdd(&sum, a.in[t]);  // @atomics @atomics-other
  if (kFixed) __syncthreads();
  a.out[t] = sum;  // @atomics @atomics-other
}
TWINS(atomics)

// A flag between warps passes on what was written before it if it is stored with release and loaded
// with acquire; volatile alone does not do that.
template <bool kFixed>
__device__ void flag(const Buffers& a) {
  __shared__ float value;
  __shared__ unsigned ready;
  const int t = threadIdx.x;
  if (t == 0) {
    ready = 0;
    value = 0;
  }
  __syncthreads();
  if (t == 0) {
    value = a.in[0];  // @flag-other
    if (kFixed)
      asm volatile("st.release.cta.shared.u32 [%0], 1;" ::"r"(shared_address(&ready)) : "memory");
    else
      asm volatile("st.volatile.shared.u32 [%0], 1;" ::"r"(shared_address(&ready)) : "memory");
  } else if (t == 32) {
    unsigned seen = 0;
    do {
      if (kFixed)
        asm volatile("ld.acquire.cta.shared.u32 %0, [%1];"
                     : "=r"(seen)
                     : "r"(shared_address(&ready))
                     : "memory");
      else
        asm volatile("ld.volatile.shared.u32 %0, [%1];"
                     : "=r"(seen)
                     : "r"(shared_address(&ready))
                     : "memory");
    } while (seen == 0);
    a.out[0] = value;  // @flag
  }
}
TWINS(flag)
