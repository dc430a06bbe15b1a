// The tiles of keys that a thread block visits. Before anything else its warps classify them with
// the mask's intervals, 32 per vote, and leave two bits of each in shared memory: the loop over the
// keys then reads one word for 32 tiles.
#pragma once
#include "common/host_device.h"
#include "common/segments.h"
#include "cuda/row_tile.cuh"

namespace ae {

// One entry stands for 2^shift tiles: more than one only beyond kEntries tiles (524288 keys in
// tiles of 64), where tiles of one entry share its class.
struct KeyTileClasses {
  static constexpr int kEntries = 8192;
  uint32_t live[kEntries / 32];  // not empty
  uint32_t full[kEntries / 32];  // the mask holds for every pair
};

// A tile of keys that is not empty; none: index < 0.
struct KeyTile {
  int index;
  bool full;
};

template <class Plan, class Fn>
class KeyTiles {
  static constexpr int kBlockN = Plan::kBlockN;

 public:
  __device__ __forceinline__ KeyTiles(const ae_params& p, const KeyTileClasses& classes)
      : classes_(classes), tiles_(int((p.S + kBlockN - 1) / kBlockN)) {}

  // The next tile in order: the same in every thread.
  __device__ __forceinline__ KeyTile next() {
    if constexpr (!Fn::kHasMask) {
      return next_ < tiles_ ? KeyTile{next_++, true} : KeyTile{-1, true};
    } else {
      const int shift = shift_of(tiles_);
      while (live_ == 0) {
        if (next_ << shift >= tiles_) return {-1, true};
        live_ = classes_.live[next_ / 32];
        full_ = classes_.full[next_ / 32];
        next_ += 32;
      }
      const int bit = __ffs(int(live_)) - 1;
      const int tile = ((next_ - 32 + bit) << shift) + within_;
      if (++within_ >> shift != 0 || tile + 1 == tiles_) {
        live_ &= live_ - 1;
        within_ = 0;
      }
      return {tile, (full_ >> bit & 1) != 0};
    }
  }

  // Fills `classes` for the rows of this thread block, with all its threads; the caller
  // synchronises.
  template <class Params>
  __device__ static __forceinline__ void classify(const Params& params, KeyTileClasses& classes) {
    if constexpr (Fn::kHasMask) {
      const Classifier<Params> classifier(params);
      const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
      const int words = (classifier.entries + 31) / 32;
      for (int first = 0; first < words; first += 32) {
        // 32 words at once: long stretches that are empty or full take one vote for 1024 entries.
        const int32_t c = classifier(32 * (first + lane), 32);
        const uint32_t some = __ballot_sync(~0u, c != AE_TILE_EMPTY);
        const uint32_t all = __ballot_sync(~0u, c == AE_TILE_FULL);
#pragma unroll 1
        for (int i = warp; i < 32 && first + i < words; i += Plan::kWarps) {
          uint32_t live = 0, full = 0;
          if ((all >> i & 1) != 0) {
            live = full = ~0u;
          } else if ((some >> i & 1) != 0) {
            const int32_t own = classifier(32 * (first + i) + lane, 1);
            live = __ballot_sync(~0u, own != AE_TILE_EMPTY);
            full = __ballot_sync(~0u, own == AE_TILE_FULL);
          }
          if (lane == 0) {
            const int left = classifier.entries - 32 * (first + i);
            const uint32_t exist = left < 32 ? (1u << left) - 1 : ~0u;
            classes.live[first + i] = live & exist;
            classes.full[first + i] = full & exist;
          }
        }
      }
    }
  }

 private:
  __device__ static __forceinline__ int shift_of(int tiles) {
    int shift = 0;
    while ((tiles - 1) >> shift >= KeyTileClasses::kEntries) ++shift;
    return shift;
  }

  // The class of a range of entries for the rows of this thread block.
  template <class Params>
  struct Classifier {
    const IntervalEnv env;
    int b, q0, q1, h0, h1, tiles, shift, entries;

    __device__ __forceinline__ explicit Classifier(const Params& params)
        : env{params.cap, params.p.S, params.p.L, Fn::kMaskCaptures != 0 ? params.tables : nullptr,
              Fn::kCaptures} {
      const RowTile rows = RowTile::of_block<Plan::kBlockM, Plan::kPackGroup>(params.p);
      rows.bounds(q0, q1, h0, h1);
      b = rows.b;
      tiles = int((params.p.S + kBlockN - 1) / kBlockN);
      shift = shift_of(tiles);
      entries = (tiles + (1 << shift) - 1) >> shift;
    }
    __device__ __forceinline__ int32_t operator()(int first, int count) const {
      if (first >= entries) return AE_TILE_EMPTY;
      const int end = (first + count) << shift;
      const int last = end < tiles ? end - 1 : tiles - 1;
      return tile_class(Fn::classify(env, iv::range(b, b), iv::range(h0, h1), iv::range(q0, q1),
                                     tile_keys(first << shift, last, env.S, kBlockN)));
    }
  };

  const KeyTileClasses& classes_;
  const int tiles_;
  int next_ = 0, within_ = 0;
  uint32_t live_ = 0, full_ = 0;
};

}  // namespace ae
