// How the tiles of keys of many outputs are shared among workers (thread blocks, or tasks of a CPU
// thread). An output is a tile of query rows; it has a number of tiles of keys, which may be 0. All
// outputs' tiles in order make one line, `prefix` says where each output starts on it:
//
//   kTiles    a worker per output
//   kSplit    `splits` workers per output, each an equal part of it
//   kStreamK  the line in equal pieces, one per worker, wherever outputs end (stream-K;
//             LeanAttention, arXiv 2405.10480): loads differ by one tile at most, whatever the
//             lengths
//
// A worker walks its segments. One that holds an output whole writes the result; the others write
// partial results to slots, and a combine step merges them in the order of the keys and finishes
// the outputs that no segment covered. Nobody waits for anybody, and the order of every sum depends
// on the schedule alone.
#pragma once
#include <stdint.h>

#include "common/host_device.h"

namespace ae {

enum SchedulePolicy : int32_t { kTiles = 0, kSplit = 1, kStreamK = 2 };

// Tiles [begin, end) of an output.
struct Segment {
  int64_t output, begin, end;
  int64_t slot;  // of its partial result; -1: the worker finishes the output
};

// The slots that hold the parts of one output, in the order of its keys.
struct Parts {
  int64_t first, second, step;  // slots: first, then second, second + step, ...
  int64_t count;                // 0: nothing to merge; the output has no tiles
  bool whole;                   // a worker has finished the output

  AE_HD int64_t slot(int64_t i) const { return i == 0 ? first : second + (i - 1) * step; }
};

struct Schedule {
  int32_t policy;
  int32_t splits;  // of kSplit
  int64_t outputs;
  int64_t workers;        // that have work: 0 when there are no tiles (kTiles: one per output)
  const int64_t* prefix;  // [outputs + 1]
  int64_t share, longer;  // kStreamK: workers x < longer take `share` tiles, the others share - 1

  // `workers`: how many there may be; those beyond the number of tiles have nothing to do.
  AE_HD static Schedule make(int32_t policy, int64_t outputs, const int64_t* prefix,
                             int64_t workers, int32_t splits) {
    Schedule s{policy, splits > 1 ? splits : 1, outputs, outputs, prefix, 0, 0};
    const int64_t total = prefix[outputs];
    if (policy == kSplit) s.workers = outputs * s.splits;
    if (policy == kStreamK) {
      s.workers = workers < total ? workers : total;
      if (s.workers > 0) {
        s.share = total / s.workers + (total % s.workers != 0);
        s.longer = total - (s.share - 1) * s.workers;
      }
    }
    return s;
  }

  // How many slots a launch needs at most, whatever the lengths.
  AE_HD static int64_t slots(int32_t policy, int64_t outputs, int64_t workers, int32_t splits) {
    return policy == kSplit ? outputs * splits : policy == kStreamK ? 2 * workers : 0;
  }

  AE_HD int64_t tiles(int64_t output) const { return prefix[output + 1] - prefix[output]; }

  // The first tile of the line that worker x takes (x <= workers).
  AE_HD int64_t start(int64_t x) const {
    return x < longer ? x * share : longer * share + (x - longer) * (share - 1);
  }
  // The worker that takes tile t of the line.
  AE_HD int64_t worker_of(int64_t t) const {
    const int64_t more = longer * share;
    return t < more ? t / share : longer + (t - more) / (share - 1);
  }
  // The output that tile t of the line belongs to.
  AE_HD int64_t output_of(int64_t t) const {
    int64_t low = 0, high = outputs;  // prefix[low] <= t < prefix[high]
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (prefix[middle] <= t) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // Calls visit(segment) for each segment of worker x, in order.
  template <class Visit>
  AE_HD void each_segment(int64_t x, const Visit& visit) const {
    if (x >= workers) return;
    if (policy == kTiles) {
      visit(Segment{x, 0, tiles(x), -1});
    } else if (policy == kSplit) {
      const int64_t output = x / splits, part = x % splits, n = tiles(output), of = pieces(n);
      if (part < of)
        visit(Segment{output, cut(n, part, of), cut(n, part + 1, of), of == 1 ? -1 : x});
    } else {
      const int64_t end = start(x + 1);
      int64_t t = start(x);
      for (int64_t output = output_of(t); t < end; ++output) {
        const int64_t first = prefix[output], last = prefix[output + 1];
        if (last <= t) continue;
        const int64_t stop = last < end ? last : end;
        const bool whole = t == first && stop == last;
        visit(Segment{output, t - first, stop - first, whole ? -1 : 2 * x + (t == first)});
        t = stop;
      }
    }
  }

  // kSplit: parts of an output of n tiles.
  AE_HD int64_t pieces(int64_t n) const { return n < splits ? n : splits; }

  // Where part `part` of `of` begins: the first n % of take a tile more.
  AE_HD static int64_t cut(int64_t n, int64_t part, int64_t of) {
    const int64_t longer = n % of;
    return part * (n / of) + (part < longer ? part : longer);
  }

  // Where the parts of an output are.
  AE_HD Parts parts(int64_t output) const {
    const int64_t n = tiles(output);
    if (policy == kTiles) return {0, 0, 0, 0, true};
    if (n == 0) return {0, 0, 0, 0, false};
    if (policy == kSplit) {
      const int64_t first = output * splits, of = pieces(n);
      if (of == 1) return {0, 0, 0, 0, true};
      return {first, first + 1, 1, of, false};
    }
    const int64_t x = worker_of(prefix[output]), y = worker_of(prefix[output + 1] - 1);
    if (x == y) return {0, 0, 0, 0, true};
    return {2 * x + 1, 2 * (x + 1), 2, y - x + 1, false};
  }
};

}  // namespace ae
