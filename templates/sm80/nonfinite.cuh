// Inf and NaN in V at keys that a row must not see. A weight of 0 times Inf is NaN, so a product
// would let them through. A block assumes that V is finite. If one of its sums is not, it computes
// them again with 0 in place of the elements of V that are not, and stores them; then it goes over
// the keys a third time, without products, and adds such elements to the outputs of the rows where
// their key is live.
#pragma once
#include "sm80/tile.cuh"

namespace ae {

template <class Elem>
__device__ __forceinline__ bool is_nonfinite(uint16_t x) {
  return (x & kExponentBits<Elem>) == kExponentBits<Elem>;
}

// Applies f to each element of a tile, the block's threads sharing them: f(row, column, element&).
template <class Tile, int kThreads, class F>
__device__ __forceinline__ void each_element(char* tile, const F& f) {
#pragma unroll 1
  for (int i = int(threadIdx.x); i < Tile::kRows * Tile::kChunks * kChunkElements; i += kThreads) {
    const int row = i / (Tile::kChunks * kChunkElements);
    const int column = i % (Tile::kChunks * kChunkElements);
    f(*reinterpret_cast<uint16_t*>(tile + Tile::at(row, column / kChunkElements) +
                                   column % kChunkElements * 2));
  }
}

// Puts 0 in place of Inf and NaN.
template <class Tile, class Elem, int kThreads>
__device__ __forceinline__ void clear_nonfinite(char* tile) {
  each_element<Tile, kThreads>(tile, [](uint16_t& x) {
    if (is_nonfinite<Elem>(x)) x = 0;
  });
}

// Whether any element of a tile is Inf or NaN: the same answer in every thread of the block.
template <class Tile, class Elem, int kThreads>
__device__ __forceinline__ bool any_nonfinite(char* tile) {
  bool found = false;
  each_element<Tile, kThreads>(tile, [&](uint16_t& x) { found |= is_nonfinite<Elem>(x); });
  return __syncthreads_or(found) != 0;
}

// Calls add(row, column, x) with what Inf and NaN in a tile of V contribute to a row of the block:
// x is one of them. weights[step][m] is the A operand of rows 16 m and keys 16 step of the warp;
// row_of(r) the number of the thread's row r. `scratch` is kScratchBytes of shared memory.
//
// Threads find the rows and keys and agree on codes of two bits for each output (1: +Inf, 2: -Inf,
// 3: NaN) in a plane in shared memory, for as many columns at a time as it takes.
template <class Tile, class Elem, int kBlockM, int kThreads, int kScratchBytes, int kSteps,
          int kAtoms, class RowOf, class Add>
__device__ __forceinline__ void each_nonfinite(char* tile, char* scratch,
                                               const uint32_t (&weights)[kSteps][kAtoms][4],
                                               const RowOf& row_of, const Add& add, int lane) {
  constexpr int kColumns = Tile::kChunks * kChunkElements;
  constexpr int kFit = kScratchBytes / 4 / kBlockM * 16;  // columns: 16 codes in a word
  constexpr int kWidth = kFit < kColumns ? kFit : kColumns;
  constexpr int kWords = kWidth / 16;
  static_assert(kWords > 0, "the scratch memory holds no plane of codes");
  uint32_t* plane = reinterpret_cast<uint32_t*>(scratch);
#pragma unroll 1
  for (int first = 0; first < kColumns; first += kWidth) {
    for (int i = int(threadIdx.x); i < kBlockM * kWords; i += kThreads) plane[i] = 0;
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 2 * kAtoms; ++r) {
      uint32_t live = 0, negative = 0;  // bit c: key column(c)
#pragma unroll
      for (int c = 0; c < 4 * kSteps; ++c) {
        const uint32_t pair = weights[c / 4][r / 2][c % 4 / 2 * 2 + r % 2];
        const uint32_t x = c % 2 == 0 ? pair & 0xffff : pair >> 16;
        live |= uint32_t((x & 0x7fff) != 0) << c;
        negative |= (x >> 15) << c;
      }
#pragma unroll 1
      for (; live != 0; live &= live - 1) {
        const int c = __ffs(int(live)) - 1, key = column(c, lane);
#pragma unroll 1
        for (int d = 0; d < kWidth && first + d < kColumns; ++d) {
          const int at = first + d;
          const uint16_t x = *reinterpret_cast<const uint16_t*>(
              tile + Tile::at(key, at / kChunkElements) + at % kChunkElements * 2);
          if (!is_nonfinite<Elem>(x)) continue;
          const bool minus = (x >> 15 != 0) != ((negative >> c & 1) != 0);
          const bool nan = (x & 0x7fff) != kExponentBits<Elem>;
          const uint32_t code = nan ? 3u : minus ? 2u : 1u;
          atomicOr(&plane[row_of(r) * kWords + d / 16], code << d % 16 * 2);
        }
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int i = int(threadIdx.x); i < kBlockM * kWidth; i += kThreads) {
      const int row = i / kWidth, d = i % kWidth;
      const uint32_t code = plane[row * kWords + d / 16] >> d % 16 * 2 & 3;
      if (code == 0) continue;
      add(row, first + d,
          __uint_as_float(code == 1   ? 0x7f800000
                          : code == 2 ? 0xff800000
                                      : 0x7fc00000));
    }
    __syncthreads();
  }
}

}  // namespace ae
