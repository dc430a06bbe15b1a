// Tensor-core products of one warp: fragments of m16n8k16 with fp32 sums.
//
// Lane l of a warp holds, of a 16 x 8 block of sums, rows l / 4 and l / 4 + 8 at columns 2 (l % 4)
// and 2 (l % 4) + 1. Sums of a row lie beside each other here: x[row][2 block + column % 2].
#pragma once
#include <cute/arch/mma_sm80.hpp>

#include "sm80/tile.cuh"

namespace ae {

// Adds a 16 x 16 by 16 x 8 product to block `block` of the sums of rows l / 4 and l / 4 + 8.
template <class Elem, int kColumns>
__device__ __forceinline__ void multiply_add(float (&upper)[kColumns], float (&lower)[kColumns],
                                             int block, const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  float &c0 = upper[2 * block], &c1 = upper[2 * block + 1];
  float &c2 = lower[2 * block], &c3 = lower[2 * block + 1];
  if constexpr (__is_same(Elem, bf16)) {
    cute::SM80_16x8x16_F32BF16BF16F32_TN::fma(c0, c1, c2, c3, a[0], a[1], a[2], a[3], b0, b1, c0,
                                              c1, c2, c3);
  } else {
    cute::SM80_16x8x16_F32F16F16F32_TN::fma(c0, c1, c2, c3, a[0], a[1], a[2], a[3], b0, b1, c0, c1,
                                            c2, c3);
  }
}

}  // namespace ae
