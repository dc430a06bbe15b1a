// The runs of key tiles that a tile of query rows walks (and, for the backward pass, the runs of
// row tiles that a range of keys walks), found by classifying boxes of indices with the generated
// Fn::classify and halving the undecided ones down to single tiles.
//
// Contract. All index intervals are inclusive and must hold only indices that exist: q.hi <= L - 1
// (a packed tile passes its rows' q and its heads as h), k.hi <= S - 1. Runs come out in order,
// neighbours of one class are merged, empty tiles are left out; PARTIAL means "evaluate the mask".
// The last tile may be ragged: it keeps its class and the kernel masks the missing columns or rows.
#pragma once
#include "common/block_tables.h"

namespace ae {

// Merges consecutive tiles of one class into runs. Counts all runs, stores the first `capacity`.
struct RunWriter {
  ae_run* out;
  int64_t capacity;
  int64_t count = 0;
  ae_run run = {0, 0, AE_TILE_EMPTY};

  // Called for all ranges in order, without gaps.
  AE_HD void add(int64_t begin, int64_t end, int32_t tile_class) {
    if (tile_class == run.tile_class) {
      run.end = int32_t(end);
      return;
    }
    flush();
    run = {int32_t(begin), int32_t(end), tile_class};
  }
  AE_HD void flush() {
    if (run.tile_class == AE_TILE_EMPTY) return;
    if (count < capacity) out[count] = run;
    ++count;
  }
};

AE_HD inline int32_t tile_class(Interval mask) {
  return iv::is_true(mask) ? AE_TILE_FULL : iv::is_false(mask) ? AE_TILE_EMPTY : AE_TILE_PARTIAL;
}

// Runs of `tiles` tiles; classify(first, last) gives the mask over tiles first..last inclusive.
// Ranges are split at powers of two, so that they stay aligned with the block tables.
template <class Classify>
AE_HD inline int64_t segments(int64_t tiles, const Classify& classify, ae_run* out,
                              int64_t capacity) {
  RunWriter writer{out, capacity};
  struct Range {
    int64_t begin, end;
  };
  Range stack[64];  // the right halves yet to do: at most one per bit of `tiles`
  int depth = 0;
  if (tiles > 0) stack[depth++] = {0, tiles};
  while (depth > 0) {
    const Range r = stack[--depth];
    const int32_t c = tile_class(classify(r.begin, r.end - 1));
    const int64_t size = r.end - r.begin;
    if (c != AE_TILE_PARTIAL || size == 1) {
      writer.add(r.begin, r.end, c);
      continue;
    }
    const int64_t left = int64_t(1) << (63 - __builtin_clzll(uint64_t(size - 1)));
    stack[depth++] = {r.begin + left, r.end};
    stack[depth++] = {r.begin, r.begin + left};
  }
  writer.flush();
  return writer.count;
}

AE_HD inline Interval tile_keys(int64_t first, int64_t last, int64_t S, int block_n) {
  const int64_t end = (last + 1) * block_n;
  return iv::range(double(first * block_n), double((end < S ? end : S) - 1));
}

// Columns [begin, end) of a tile.
struct Columns {
  int begin, end;
};

// The columns of an undecided tile of `count` keys from `first` on, without the whole panels at
// either end in which no key is live. classify(keys interval) is the mask over the tile's rows.
template <class Classify>
AE_HD inline Columns live_columns(int64_t first, int count, int panel, const Classify& classify) {
  Columns c{0, count};
  const auto dead = [&](int begin) {
    const int end = begin + panel < count ? begin + panel : count;
    return iv::is_false(classify(iv::range(double(first + begin), double(first + end - 1))));
  };
  while (c.begin < count && dead(c.begin)) c.begin += panel;
  if (c.begin >= count) return {0, 0};
  while (dead((c.end - 1) / panel * panel)) c.end = (c.end - 1) / panel * panel;
  return c;
}

// Runs of key tiles (block_n keys each, ceil(S / block_n) of them) for the rows b, h, q. Returns
// their number, which never exceeds the number of tiles, and stores the first `capacity`.
template <class Fn>
AE_HD inline int64_t row_segments(const IntervalEnv& env, Interval b, Interval h, Interval q,
                                  int64_t S, int block_n, ae_run* out, int64_t capacity) {
  return segments((S + block_n - 1) / block_n,
                  [&](int64_t first, int64_t last) {
                    if constexpr (Fn::kHasMask)
                      return Fn::classify(env, b, h, q, tile_keys(first, last, S, block_n));
                    else
                      return iv::boolean(true);
                  },
                  out, capacity);
}

// Runs of row tiles for the keys k. q_of(first_tile, last_tile) gives the q interval of the row
// tiles first..last inclusive.
template <class Fn, class QOf>
AE_HD inline int64_t column_segments(const IntervalEnv& env, Interval b, Interval h, Interval k,
                                     int64_t row_tiles, const QOf& q_of, ae_run* out,
                                     int64_t capacity) {
  return segments(
      row_tiles,
      [&](int64_t first, int64_t last) {
        if constexpr (Fn::kHasMask)
          return Fn::classify(env, b, h, q_of(first, last), k);
        else
          return iv::boolean(true);
      },
      out, capacity);
}

}  // namespace ae
