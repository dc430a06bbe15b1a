// The dynamic shared memory of a block of sm80/forward.cuh, and what warps that share rows exchange
// through it.
#pragma once
#include "sm80/tile.cuh"

namespace ae {

// The dynamic shared memory of a block: Q, then kStages tiles of K, then kStages tiles of V unless
// they are K's, then what warps that share rows exchange of a tile of scores.
template <class Plan>
struct ForwardShared {
  using Q = SharedTile<Plan::kBlockM, Plan::kD>;
  using K = SharedTile<Plan::kBlockN, Plan::kD>;
  using V = std::conditional_t<Plan::kSharedKV, TilePart<K, Plan::kDv>,
                               SharedTile<Plan::kBlockN, Plan::kDv>>;
  static constexpr int kK = Q::kBytes;
  static constexpr int kV = Plan::kSharedKV ? kK : kK + Plan::kStages * K::kBytes;
  static constexpr int kExchange = kV + Plan::kStages * V::kBytes;
  static constexpr int kExchangeBytes =
      Plan::kColumnWarps > 1 ? Plan::kColumnWarps * Plan::kBlockM * Plan::kBlockN * 4 : 0;
  static constexpr int kBytes = kExchange + kExchangeBytes;
};

// Adds up what the warps that share rows have of a tile of scores: in the same order, so to the
// same bits, in all of them. The block's threads call it together.
template <int kRowWarps, int kColumnWarps, int kRows, int kKeys>
__device__ __forceinline__ void exchange_scores(char* memory, float (&s)[kRows][kKeys]) {
  constexpr int kEach = kRows * kKeys * 32;
  const int warp = int(threadIdx.x) / 32;
  float* all = reinterpret_cast<float*>(memory) + int(threadIdx.x) % 32;
  float* own = all + warp * kEach;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int c = 0; c < kKeys; ++c) own[(r * kKeys + c) * 32] = s[r][c];
  }
  __syncthreads();
  all += warp % kRowWarps * kEach;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int c = 0; c < kKeys; ++c) {
      float sum = all[(r * kKeys + c) * 32];
#pragma unroll
      for (int w = 1; w < kColumnWarps; ++w) {
        sum += all[w * kRowWarps * kEach + (r * kKeys + c) * 32];
      }
      s[r][c] = sum;
    }
  }
}

}  // namespace ae
