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
  int tiles;                     // of all keys
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
  __device__ __forceinline__ KeyTiles(int64_t keys, const KeyTileClasses& classes)
      : classes_(classes), tiles_(int((keys + kBlockN - 1) / kBlockN)) {}

  // Limits it to tiles [begin, end) of those that are not empty.
  __device__ __forceinline__ void take(int begin, int end) {
    if constexpr (Fn::kHasMask) {
      skip(begin);
      left_ = end - begin;
    } else {
      next_ = begin;
      if (end < tiles_) tiles_ = end;
    }
  }

  // Of all keys. A kernel that walks segments has no register to spare for their number.
  __device__ __forceinline__ int tiles() const {
    if constexpr (Fn::kHasMask && Plan::kScheduled) {
      return classes_.tiles;
    } else {
      return tiles_;
    }
  }

  // The next tile in order: the same in every thread.
  __device__ __forceinline__ KeyTile next() {
    if constexpr (Fn::kHasMask && Plan::kScheduled) {
      if (left_ == 0) return {-1, true};
      --left_;
    }
    return any_next();
  }

  // How many tiles of a tile of rows are not empty: all lanes of a warp call it together.
  template <class Params>
  __device__ static __forceinline__ int count(const Params& params, const RowTile& rows,
                                              int64_t keys) {
    const int tiles = int((keys + kBlockN - 1) / kBlockN);
    if constexpr (!Fn::kHasMask) {
      return tiles;
    } else {
      const Classifier<Params> classifier(params, rows, keys);
      const int words = (classifier.entries + 31) / 32;
      int found = 0;
      for (int first = 0; first < words; first += 32) {
        const Vote vote = classifier.vote(first);
#pragma unroll 1
        for (int i = 0; i < 32 && first + i < words; ++i) {
          uint32_t live = 0, full = 0;
          classifier.word(vote, first, i, live, full);
          found += tiles_of(live, first + i, tiles, classifier.shift);
        }
      }
      return found;
    }
  }

  // The same from `classes`, once they are filled.
  __device__ static __forceinline__ int count(int64_t keys, const KeyTileClasses& classes) {
    const int tiles = int((keys + kBlockN - 1) / kBlockN);
    if constexpr (!Fn::kHasMask) {
      return tiles;
    } else {
      const int shift = shift_of(tiles);
      const int words = ((tiles + (1 << shift) - 1) / (1 << shift) + 31) / 32;
      int found = 0;
      for (int i = int(threadIdx.x) % 32; i < words; i += 32) {
        found += tiles_of(classes.live[i], i, tiles, shift);
      }
      return __reduce_add_sync(~0u, found);
    }
  }

  // Fills `classes` for a tile of rows, with all threads of the block; the caller synchronises.
  template <class Params>
  __device__ static __forceinline__ void classify(const Params& params, const RowTile& rows,
                                                  int64_t keys, KeyTileClasses& classes) {
    if constexpr (Fn::kHasMask) {
      const Classifier<Params> classifier(params, rows, keys);
      if (Plan::kScheduled && threadIdx.x == 0) classes.tiles = classifier.tiles;
      const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
      const int words = (classifier.entries + 31) / 32;
      for (int first = 0; first < words; first += 32) {
        const Vote vote = classifier.vote(first);
#pragma unroll 1
        for (int i = warp; i < 32 && first + i < words; i += Plan::kWarps) {
          uint32_t live = 0, full = 0;
          classifier.word(vote, first, i, live, full);
          if (lane == 0) {
            classes.live[first + i] = live;
            classes.full[first + i] = full;
          }
        }
      }
    }
  }

 private:
  // Of 32 words at once: long stretches that are empty or full take one vote for 1024 entries.
  struct Vote {
    uint32_t some, all;
  };

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

    __device__ __forceinline__ Classifier(const Params& params, const RowTile& rows, int64_t keys)
        : env{params.cap, keys, params.p.L, Fn::kMaskCaptures != 0 ? params.tables : nullptr,
              Fn::kCaptures} {
      rows.bounds(q0, q1, h0, h1);
      b = rows.batch;
      tiles = int((keys + kBlockN - 1) / kBlockN);
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
    // All lanes of a warp vote together.
    __device__ __forceinline__ Vote vote(int first) const {
      const int32_t c = (*this)(32 * (first + int(threadIdx.x) % 32), 32);
      return {__ballot_sync(~0u, c != AE_TILE_EMPTY), __ballot_sync(~0u, c == AE_TILE_FULL)};
    }
    // Word first + i.
    __device__ __forceinline__ void word(Vote vote, int first, int i, uint32_t& live,
                                         uint32_t& full) const {
      if ((vote.all >> i & 1) != 0) {
        live = full = ~0u;
      } else if ((vote.some >> i & 1) != 0) {
        const int32_t own = (*this)(32 * (first + i) + int(threadIdx.x) % 32, 1);
        live = __ballot_sync(~0u, own != AE_TILE_EMPTY);
        full = __ballot_sync(~0u, own == AE_TILE_FULL);
      }
      const int left = entries - 32 * (first + i);
      const uint32_t exist = left < 32 ? (1u << left) - 1 : ~0u;
      live &= exist;
      full &= exist;
    }
  };

  // The tiles of the entries `live` of a word: the last entry may stand for fewer than the others.
  __device__ static __forceinline__ int tiles_of(uint32_t live, int word, int tiles, int shift) {
    const int last = (tiles - 1) >> shift, found = __popc(live) << shift;
    const bool short_one = last / 32 == word && (live >> last % 32 & 1) != 0;
    return short_one ? found - (((last + 1) << shift) - tiles) : found;
  }

  __device__ __forceinline__ KeyTile any_next() {
    if constexpr (!Fn::kHasMask) {
      return next_ < tiles() ? KeyTile{next_++, true} : KeyTile{-1, true};
    } else {
      const int shift = shift_of(tiles());
      while (live_ == 0) {
        if (next_ << shift >= tiles()) return {-1, true};
        live_ = classes_.live[next_ / 32];
        full_ = classes_.full[next_ / 32];
        next_ += 32;
      }
      const int bit = __ffs(int(live_)) - 1;
      const int tile = ((next_ - 32 + bit) << shift) + within_;
      if (++within_ >> shift != 0 || tile + 1 == tiles()) {
        live_ &= live_ - 1;
        within_ = 0;
      }
      return {tile, (full_ >> bit & 1) != 0};
    }
  }

  // Passes over n tiles that are not empty, from the start.
  __device__ __forceinline__ void skip(int n) {
    const int shift = shift_of(tiles());
    for (; next_ << shift < tiles(); next_ += 32) {
      const int found = tiles_of(classes_.live[next_ / 32], next_ / 32, tiles(), shift);
      if (found > n) break;
      n -= found;
    }
#pragma unroll 1
    for (; n > 0; --n) any_next();
  }

  const KeyTileClasses& classes_;
  int tiles_;
  int next_ = 0, within_ = 0;
  int left_ = 0;
  uint32_t live_ = 0, full_ = 0;
};

}  // namespace ae
