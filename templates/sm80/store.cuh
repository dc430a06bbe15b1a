// Rows of sums from the registers of a warp to global memory.
#pragma once
#include "cuda/packed.cuh"

namespace ae {

// After it, lane t of a quad has in w[j] what lane j had in w[t].
__device__ __forceinline__ void transpose_quad(uint32_t (&w)[4], int lane) {
  const bool odd = (lane & 1) != 0, high = (lane & 2) != 0;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t given = odd ? w[i] : w[i + 1];
    const uint32_t taken = __shfl_xor_sync(~0u, given, 1);
    if (odd) {
      w[i] = taken;
    } else {
      w[i + 1] = taken;
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t given = high ? w[i] : w[i + 2];
    const uint32_t taken = __shfl_xor_sync(~0u, given, 2);
    if (high) {
      w[i] = taken;
    } else {
      w[i + 2] = taken;
    }
  }
}

// Stores the kWidth columns of one row, of which each lane of a quad has two of every eight. All
// lanes of the warp call it together. `vectors`: rows start at multiples of 16 bytes and are
// contiguous. `exists` is false for a row that is not stored.
template <class Elem, int kWidth, int kSums>
__device__ __forceinline__ void store_row(uint16_t* row, int64_t column_stride, bool vectors,
                                          bool exists, const float (&sums)[kSums], int lane) {
  const int t = lane % 4;
  if (kWidth % 8 == 0 && vectors) {
    constexpr int kBlocks = kWidth / 8;
#pragma unroll
    for (int block = 0; block < kBlocks; block += 4) {
      uint32_t w[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int c = 2 * (block + j);
        w[j] = block + j < kBlocks ? pack2<Elem>(sums[c], sums[c + 1]) : 0;
      }
      transpose_quad(w, lane);
      if (exists && block + t < kBlocks) {
        *reinterpret_cast<uint4*>(row + (block + t) * 8) = make_uint4(w[0], w[1], w[2], w[3]);
      }
    }
  } else if (exists) {
#pragma unroll
    for (int c = 0; c < kSums; ++c) {
      const int d = c / 2 * 8 + t * 2 + c % 2;
      if (d < kWidth) row[d * column_stride] = narrow<Elem>(sums[c]);
    }
  }
}

}  // namespace ae
