// Accesses to memory that a launch does not have, or has not filled. Blocks have 64 threads.
#include "twins.cuh"

template <bool kFixed>
__device__ void read_beyond(const Buffers& a) {
  const int i = a.n - 64 + threadIdx.x;
  a.out[i] = a.in[i + (kFixed ? 0 : 1)];  // @read_beyond
}
TWINS(read_beyond)

template <bool kFixed>
__device__ void write_beyond(const Buffers& a) {
  const int i = a.n - 64 + threadIdx.x;
  a.out[i + (kFixed ? 0 : 1)] = a.in[i];  // @write_beyond
}
TWINS(write_beyond)

template <bool kFixed>
__device__ void write_read_only(const Buffers& a) {
  const int t = threadIdx.x;
  float* to = kFixed ? a.out : const_cast<float*>(a.in);
  to[t] = float(t);  // @write_read_only
}
TWINS(write_read_only)

template <bool kFixed>
__device__ void misaligned_vector(const Buffers& a) {
  const int t = threadIdx.x;
  const float4* in = reinterpret_cast<const float4*>(a.in + (kFixed ? 4 : 2));
  a.out[t] = in[t / 2].x + in[t / 2].w;  // @misaligned_vector
}
TWINS(misaligned_vector)

// The launch gives 256 bytes of dynamic shared memory, one float per thread.
template <bool kFixed>
__device__ void shared_beyond(const Buffers& a) {
  extern __shared__ float dynamic[];
  const int t = threadIdx.x;
  dynamic[t + (kFixed ? 0 : 1)] = a.in[t];  // @shared_beyond
  a.out[t] = 1;
}
TWINS(shared_beyond)

template <bool kFixed>
__device__ void uninitialized(const Buffers& a) {
  __shared__ float tile[64];
  const int t = threadIdx.x;
  if (kFixed || t != 37) tile[t] = a.in[t];
  __syncthreads();
  a.out[t] = tile[t ^ 1];  // @uninitialized
}
TWINS(uninitialized)

// Half of a word is written.
template <bool kFixed>
__device__ void uninitialized_half(const Buffers& a) {
  __shared__ unsigned short tile[128];
  const int t = threadIdx.x;
  tile[2 * t] = 1;
  if (kFixed) tile[2 * t + 1] = 2;
  __syncthreads();
  a.out[t] = float(reinterpret_cast<unsigned*>(tile)[63 - t]);  // @uninitialized_half
}
TWINS(uninitialized_half)

// What follows has no broken twin: neighbours write the bytes and halves of one word, without a
// barrier between them.
KERNEL(parts_of_words_fixed) {
  __shared__ uint4 memory[16];
  const int t = threadIdx.x;
  unsigned char* bytes = reinterpret_cast<unsigned char*>(memory);
  unsigned short* halves = reinterpret_cast<unsigned short*>(memory);
  float sum = 0;
  for (int i = 0; i < 3; ++i) {
    if (t < 32) {
      for (int k = 0; k < 4; ++k) bytes[t + 32 * k] = static_cast<unsigned char>(t + i);
    } else {
      for (int k = 0; k < 2; ++k) halves[t + 32 + 32 * k] = static_cast<unsigned short>(t);
    }
    __syncthreads();
    sum += float(memory[t % 16].x & 0xffff) + float(memory[t / 4].w >> 16);
    __syncthreads();
  }
  out[t] = sum;
}

// More accesses than the shadow memory remembers one by one (2^18), part of them in narrow cells,
// then a race with an access that is still remembered.
template <bool kFixed>
__device__ void long_run(const Buffers& a) {
  __shared__ float tile[64];
  __shared__ unsigned short halves[64];
  const int t = threadIdx.x;
  halves[t] = static_cast<unsigned short>(t);
  float x = 0;
#pragma unroll 1
  for (int i = 0; i < 70000; ++i) {
    tile[t] = x + 1;  // @long_run @long_run-other
    if (kFixed || i < 69999) __syncthreads();
    x = tile[t ^ 32];  // @long_run @long_run-other
    __syncthreads();
  }
  a.out[t] = x + float(halves[t ^ 32]);
}
TWINS(long_run)
