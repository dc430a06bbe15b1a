// Kernels that test_core_control.py runs: control flow, calls and memory as nvcc compiles them.
#include <cassert>

#define KERNEL extern "C" __global__ void

__device__ int thread() { return blockIdx.x * blockDim.x + threadIdx.x; }

KERNEL nested_branches(int* out, const int* in, int n) {
  int i = thread();
  if (i >= n) return;
  int x = in[i];
  if (x & 1) {
    if (x & 2) {
      x = x * 3 + 1;
    } else {
      x = x - 7;
      if (x & 8) x ^= 0x55;
    }
  } else if (x & 4) {
    x = ~x;
  }
  out[i] = x;
}

KERNEL loops(int* out, const int* in, int n) {  // every lane its own number of turns
  int i = thread();
  if (i >= n) return;
  unsigned x = in[i];
  int turns = 0;
  while (x != 1 && turns < 300) {
    if (x % 3 == 0 && turns > 100) break;
    if (x & 1) {
      x = 3 * x + 1;
    } else {
      x >>= 1;
      for (unsigned k = x & 3; k > 0; --k) turns += int(k & 1);
    }
    ++turns;
  }
  out[i] = turns;
}

KERNEL switches(int* out, const int* in, int n) {
  int i = thread();
  if (i >= n) return;
  int x = in[i];
  switch (x & 15) {
    case 0:
      x += 11;
      break;
    case 1:
      x *= 5;  // falls through
    case 2:
      x ^= 0x1234;
      break;
    case 3:
      x = -x;
      break;
    case 4:
      x >>= 2;
      break;
    case 5:
      x = x / 7;
      break;
    case 6:
      x = x % 11;
      break;
    case 7:
      x |= 0x40;
      break;
    case 8:
      x &= 0xff;
      break;
    case 9:
      x <<= 3;
      break;
    default:
      x = 99;
      break;
  }
  out[i] = x;
}

struct Pair {
  float sum;
  int count;
  double square;
};
__device__ __noinline__ float step(float x, int k) { return k & 1 ? x * 0.5f : x + float(k); }
__device__ __noinline__ Pair walk(float x, int turns) {
  Pair p = {0.f, 0, 0.0};
  for (int k = 0; k < turns; ++k) {
    x = step(x, k);
    p.sum += x;
    p.square += double(x) * x;
    ++p.count;
  }
  return p;
}
KERNEL calls(float* sums, int* counts, double* squares, const float* in, int n) {
  int i = thread();
  if (i >= n) return;
  Pair p = {-1.f, -1, -1.0};
  if (i % 3 != 0) p = walk(in[i], i % 7);
  if (i % 5 == 0) p.sum += step(in[i], i);
  sums[i] = p.sum;
  counts[i] = p.count;
  squares[i] = p.square;
}

__device__ int table[8] = {3, 1, 4, 1, 5, 9, 2, 6};
__constant__ float weights[4] = {0.5f, 1.5f, 2.5f, 3.5f};
__device__ int* places[2] = {table, table + 3};
__shared__ int fixed[32];
__device__ int ticket;
extern __shared__ int sized[];

// Generic addresses of all spaces.
__device__ __noinline__ int fetch(const int* p) { return *p; }
KERNEL spaces(int* out, const int* in, int n) {
  int i = threadIdx.x;
  int own[16];
  for (int k = 0; k < 16; ++k) own[(k * 5) & 15] = in[i] + k;
  fixed[i] = in[i] * 2;
  sized[i] = in[i] * 3;
  __syncthreads();
  int other = (i + 1) & 31;
  const int* from = i % 4 == 0   ? &own[in[i] & 15]
                    : i % 4 == 1 ? &fixed[other]
                    : i % 4 == 2 ? &sized[other]
                                 : places[i >> 2 & 1] + (i >> 4);
  out[i] = fetch(from) + int(weights[i & 3] * 2.f) + n;
  out[32 + i] =
      __isShared(from) | __isGlobal(from) << 1 | __isLocal(from) << 2 | __isConstant(weights) << 3;
}

struct Big {
  int head;
  double x[3];
  const int* in;
  short tail[2];
};
KERNEL by_value(double* out, const __grid_constant__ Big b, short s, char c, float f) {
  int i = threadIdx.x;
  out[i] = b.head + b.x[i % 3] + b.in[i] + b.tail[i & 1] + s + c + f;
}

KERNEL axes(int* out) {
  int t = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  int size = blockDim.x * blockDim.y * blockDim.z;
  out[block * size + t] = threadIdx.x | threadIdx.y << 4 | threadIdx.z << 8 | blockIdx.x << 12 |
                          blockIdx.y << 16 | blockIdx.z << 20;
}

// Half of the warps wait for the other half at each turn.
KERNEL reduce(int* out, const int* in, int n) {
  int i = threadIdx.x;
  sized[i] = in[blockIdx.x * blockDim.x + i];
  __syncthreads();
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    if (i < half) sized[i] += sized[i + half];
    __syncthreads();
  }
  if (i == 0) out[blockIdx.x] = sized[0] + n;
}

KERNEL forever(int* out) {
  while (*reinterpret_cast<volatile int*>(out) == 0) {
  }
}

KERNEL asserts(int* out) {
  assert(threadIdx.x != 37);
  out[threadIdx.x] = 1;
}

KERNEL carries_counters(int* out) { out[threadIdx.x] = table[threadIdx.x & 7]++; }

// Lanes of one warp hand a lock around: those that hold it must not be starved by those that spin.
KERNEL spin_lock(int* lock, int* count) {
  bool done = false;
  while (!done) {
    if (atomicCAS(lock, 0, 1) == 0) {
      __threadfence();
      *reinterpret_cast<volatile int*>(count) = *reinterpret_cast<volatile int*>(count) + 1;
      __threadfence();
      atomicExch(lock, 0);
      done = true;
    }
  }
}

// Which place in the order of the block's warps each had, turn by turn.
KERNEL order(int* out) {
  for (int turn = 0; turn < 16; ++turn)
    if (threadIdx.x % 32 == 0) out[turn * 8 + threadIdx.x / 32] = atomicAdd(&ticket, 1);
}
