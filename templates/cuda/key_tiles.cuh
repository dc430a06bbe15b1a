// The tiles of keys that a thread block visits: each lane classifies one tile of the mask, and the
// warp keeps the votes of 32 of them in two registers. Every warp of the block comes to the same
// answer by itself, so that nothing is stored and nobody waits.
#pragma once
#include "common/host_device.h"
#include "common/segments.h"
#include "cuda/row_tile.cuh"

namespace ae {

// A tile of keys that is not empty; none: index < 0.
struct KeyTile {
  int index;
  bool full;  // the mask holds for every pair
};

template <class Plan, class Fn>
class KeyTiles {
  static constexpr int kBlockN = Plan::kBlockN;

 public:
  // For the rows of this thread block.
  template <class Params>
  __device__ __forceinline__ KeyTiles(const Params& params, int lane)
      : p_(params.p),
        env_{params.cap, params.p.S, params.p.L, Fn::kMaskCaptures != 0 ? params.tables : nullptr,
             Fn::kCaptures},
        lane_(lane),
        tiles_(int((params.p.S + kBlockN - 1) / kBlockN)) {}

  // The next tile in order. All lanes of the warp call it together.
  __device__ __forceinline__ KeyTile next() {
    if constexpr (!Fn::kHasMask) {
      return next_ < tiles_ ? KeyTile{next_++, true} : KeyTile{-1, true};
    } else {
      while (live_ == 0) {
        if (!refill()) return {-1, true};
      }
      const int bit = __ffs(int(live_)) - 1;
      live_ &= live_ - 1;
      return {first_ + bit, (full_ >> bit & 1) != 0};
    }
  }

 private:
  // Groups of 32 tiles are classified 32 at a time first, so that long empty or full stretches cost
  // one vote for 1024 tiles.
  __device__ __forceinline__ bool refill() {
    while (groups_ == 0) {
      if (next_ >= tiles_) return false;
      group_first_ = next_;
      next_ += 32 * 32;
      const int32_t c = classify(group_first_ + lane_ * 32, 32);
      groups_ = __ballot_sync(~0u, c != AE_TILE_EMPTY);
      full_groups_ = __ballot_sync(~0u, c == AE_TILE_FULL);
    }
    const int group = __ffs(int(groups_)) - 1;
    groups_ &= groups_ - 1;
    first_ = group_first_ + group * 32;
    if ((full_groups_ >> group & 1) != 0) {
      const int left = tiles_ - first_;
      live_ = left < 32 ? (1u << left) - 1 : ~0u;
      full_ = live_;
    } else {
      const int32_t c = classify(first_ + lane_, 1);
      live_ = __ballot_sync(~0u, c != AE_TILE_EMPTY);
      full_ = __ballot_sync(~0u, c == AE_TILE_FULL);
    }
    return true;
  }

  __device__ __forceinline__ int32_t classify(int first, int count) const {
    if (first >= tiles_) return AE_TILE_EMPTY;
    const int last = first + count < tiles_ ? first + count - 1 : tiles_ - 1;
    const RowTile rows = RowTile::of_block<Plan::kBlockM, Plan::kPackGroup>(p_);
    int q0, q1, h0, h1;
    rows.bounds(q0, q1, h0, h1);
    return tile_class(Fn::classify(env_, iv::range(rows.b, rows.b), iv::range(h0, h1),
                                   iv::range(q0, q1), tile_keys(first, last, env_.S, kBlockN)));
  }

  const ae_params& p_;
  const IntervalEnv env_;
  const int lane_, tiles_;
  int next_ = 0, group_first_ = 0, first_ = 0;
  uint32_t groups_ = 0, full_groups_ = 0, live_ = 0, full_ = 0;
};

}  // namespace ae
