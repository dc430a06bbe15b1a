// Tiles of chunks in shared memory, and rows of sums back to global memory, where how many columns
// exist is known at run time.
#pragma once
#include "common/env.h"
#include "common/linear.h"
#include "sm80/product.cuh"
#include "sm80/store.cuh"

namespace ae {

// Rows of a tensor of 16-bit elements: `data` is the first element of the first row.
struct Window {
  const uint16_t* data;
  int64_t row_stride, column_stride;  // elements
  int rows, columns;                  // that exist

  __device__ __forceinline__ bool vectors() const {
    return column_stride == 1 && row_stride % kChunkElements == 0 &&
           columns % kChunkElements == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  }
};

struct NoHook {
  static constexpr bool kIdentity = true;
  __device__ __forceinline__ float operator()(int, int, float x) const { return x; }
};

// Calls f(at, x) with where the element stands: `at` is that of the window's first one.
template <class F>
struct HookOf {
  static constexpr bool kIdentity = false;
  HookAt first;
  F f;
  __device__ __forceinline__ float operator()(int row, int column, float x) const {
    return f(HookAt{first.b, first.h, first.t + row, first.d + column, 1}, x);
  }
};
template <class F>
__device__ __forceinline__ HookOf<F> hook_at(const HookAt& first, const F& f) {
  return {first, f};
}

// Fills a tile from a window, 0 where it ends: by asynchronous copies where nothing changes the
// elements and they lie well, else through registers. `hook(row, column, x)` changes an element
// that exists. The caller commits, waits and synchronises.
template <class Tile, class Elem, int kThreads, class Hook>
__device__ __forceinline__ void fill_window(char* tile, const Window& w, const Hook& hook) {
  constexpr int kTotal = Tile::kRows * Tile::kChunks;
  if (Hook::kIdentity && w.vectors()) {
#pragma unroll 4
    for (int i = int(threadIdx.x); i < kTotal; i += kThreads) {
      const int row = i / Tile::kChunks, chunk = i % Tile::kChunks;
      const bool exists = row < w.rows && chunk * kChunkElements < w.columns;
      // What does not exist is filled with 0 and read from nowhere; the address exists all the
      // same.
      const uint16_t* from = exists ? w.data + row * w.row_stride + chunk * kChunkElements : w.data;
      cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<uint4>::copy(
          *reinterpret_cast<const uint4*>(from),
          *reinterpret_cast<uint4*>(tile + Tile::at(row, chunk)), exists);
    }
  } else {
#pragma unroll 1
    for (int i = int(threadIdx.x); i < kTotal; i += kThreads) {
      const int row = i / Tile::kChunks, chunk = i % Tile::kChunks;
      uint32_t packed[4] = {};
      if (row < w.rows) {
#pragma unroll
        for (int e = 0; e < kChunkElements; ++e) {
          const int column = chunk * kChunkElements + e;
          if (column >= w.columns) continue;
          uint16_t x = w.data[row * w.row_stride + column * w.column_stride];
          if constexpr (!Hook::kIdentity) x = narrow<Elem>(hook(row, column, widen<Elem>(x)));
          packed[e / 2] |= uint32_t(x) << e % 2 * 16;
        }
      }
      *reinterpret_cast<uint4*>(tile + Tile::at(row, chunk)) =
          make_uint4(packed[0], packed[1], packed[2], packed[3]);
    }
  }
}

// The same for an operand and its hook; `at` is where the window's first element stands.
#define AE_FILL(name, Hook, hook)                                                                \
  template <class Fn, class Tile, class Elem, int kThreads>                                      \
  __device__ __forceinline__ void name(const Env& env, char* tile, const Window& w, HookAt at) { \
    if constexpr (Fn::Hook) {                                                                    \
      const auto f = [&](const HookAt& own, float x) { return Fn::hook(env, own, x); };          \
      fill_window<Tile, Elem, kThreads>(tile, w, hook_at(at, f));                                \
    } else {                                                                                     \
      fill_window<Tile, Elem, kThreads>(tile, w, NoHook{});                                      \
    }                                                                                            \
  }
AE_FILL(fill_q, kHasQMod, q_mod)
AE_FILL(fill_k, kHasKMod, k_mod)
AE_FILL(fill_v, kHasVMod, v_mod)
#undef AE_FILL

// Stores one row of kColumns sums, of which each lane of a quad has two of every eight; `columns`
// of them exist. All lanes of the warp call it together. `vectors`: rows start at multiples of 16
// bytes and are contiguous, and `columns` is a multiple of 8.
template <class Elem, int kColumns, int kSums>
__device__ __forceinline__ void store_sums(uint16_t* row, int64_t column_stride, bool vectors,
                                           bool exists, int columns, const float (&sums)[kSums],
                                           int lane) {
  static_assert(kSums == kColumns / 4 && kColumns % 8 == 0);
  const int t = lane % 4;
  if (vectors) {
    constexpr int kBlocks = kColumns / 8;
#pragma unroll
    for (int block = 0; block < kBlocks; block += 4) {
      uint32_t w[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int c = 2 * (block + j);
        w[j] = block + j < kBlocks ? pack2<Elem>(sums[c], sums[c + 1]) : 0;
      }
      transpose_quad(w, lane);
      if (exists && (block + t) * 8 < columns && block + t < kBlocks) {
        *reinterpret_cast<uint4*>(row + (block + t) * 8) = make_uint4(w[0], w[1], w[2], w[3]);
      }
    }
  } else if (exists) {
#pragma unroll
    for (int c = 0; c < kSums; ++c) {
      const int d = c / 2 * 8 + t * 2 + c % 2;
      if (d < columns) row[d * column_stride] = narrow<Elem>(sums[c]);
    }
  }
}

// A number's size for `scale_of`, which no Inf or NaN decides.
__device__ __forceinline__ float size_of(float x) {
  return fabsf(x) <= 3.4028235e38f ? fabsf(x) : 0.0f;
}

// The largest of a block's numbers, which are not negative; `tops` is shared memory. All threads
// call it.
template <int kWarps>
__device__ __forceinline__ float block_top(float top, float (&tops)[kWarps]) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
  if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kWarps; ++i) top = fmaxf(top, tops[i]);
  return top;
}

// Powers of two: `down` brings numbers of which `top` is the largest below 2^14, which fp16 holds,
// and `up` back.
struct Scale {
  float down, up;
};
__device__ __forceinline__ Scale scale_of(float top) {
  const int exponent = int(__float_as_uint(top) >> 23);
  int shift = exponent == 0 || exponent == 255 ? 0 : 127 + 13 - exponent;
  shift = shift < 100 ? shift : 100;
  return {__uint_as_float(uint32_t(127 + shift) << 23),
          __uint_as_float(uint32_t(127 - shift) << 23)};
}

// Where a lane reads the A operand of 16 columns of a tile, which are what rows of the product are:
// load_transposed(16 step, chunk) sums over the tile's rows 16 step to 16 step + 15.
template <class Tile>
__device__ __forceinline__ MatrixReader<Tile> read_a_transposed(const char* tile, int lane) {
  return {tile, lane / 16 * 8 + lane % 8, lane / 8 % 2};
}

// Multiplies the two 16-bit floats of a register, and rounds once.
template <class Elem>
__device__ __forceinline__ uint32_t scale_pair(uint32_t pair, float low, float high) {
  return pack2<Elem>(widen<Elem>(uint16_t(pair)) * low, widen<Elem>(uint16_t(pair >> 16)) * high);
}

}  // namespace ae
