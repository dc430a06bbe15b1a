// Which policy of schedule.h a launch takes: the one with the smallest predicted makespan on
// `slots` workers that run at a time. Hardware and thread pools hand out work in order, so a worker
// per output (or per part of one) is list scheduling, simulated here exactly up to a bound;
// stream-K's workers all run at once, and its makespan is that of the most loaded one. Nothing is
// allocated; up to 512 outputs take less than 20 us. docs/scheduling.md has the model and what it
// was checked against.
#pragma once
#include "common/schedule.h"

namespace ae {

// In any one unit: cycles, nanoseconds, tiles.
struct PolicyCosts {
  double tile;     // of a tile of keys, at the rate that one of `slots` busy workers gets
  double segment;  // of a segment beside its tiles: Q is loaded, the pipeline filled, O finished
  double part;     // of a partial result: half to write it, half to read it in the merge
  double combine;  // of having a combine step at all: its launch
};

struct PolicyChoice {
  int32_t policy;
  int32_t splits;   // of kSplit, else 1
  int64_t workers;  // for Schedule::make
  // Predicted makespan of each policy at its best, infinite where it is not legal. The search
  // stops counting at the best so far, so a policy that is not chosen may cost more than said.
  double cost[3];
};

namespace policy {

constexpr int64_t kMostSlots = 1024;  // of the simulation: 8 KB of stack
constexpr int64_t kSimulated = 2048;  // pieces of one policy: 50 us at 25 ns each
constexpr int64_t kSearched = 512;    // pieces of all the splits that are tried
constexpr int32_t kMostSplits = 128;  // as FlashAttention's
constexpr double kTie = 0.99;         // a policy must save 1 % to replace a simpler one
constexpr double kStop = 1.02;        // beyond the best by more than a tie: not counted further
constexpr double kNever = __builtin_huge_val();

AE_HD inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
AE_HD inline double most(double a, double b) { return a > b ? a : b; }

// What the predictions need to know of all outputs.
struct Work {
  int64_t outputs;
  const int64_t* prefix;
  int64_t slots;
  PolicyCosts costs;
  int64_t tiles, live, longest;  // of all, outputs that have any, of one output
  bool equal;                    // all outputs have the same number

  AE_HD Work(int64_t outputs, const int64_t* prefix, int64_t slots, const PolicyCosts& costs)
      : outputs(outputs),
        prefix(prefix),
        slots(slots),
        costs(costs),
        tiles(prefix[outputs]),
        live(0),
        longest(0),
        equal(true) {
    for (int64_t o = 0; o < outputs; ++o) {
      const int64_t n = prefix[o + 1] - prefix[o];
      live += n > 0;
      equal = equal && n == prefix[1];
      if (n > longest) longest = n;
    }
  }
  AE_HD double piece(int64_t n) const { return double(n) * costs.tile + costs.segment; }
};

// What the combine step merges.
struct Merging {
  int64_t parts, deepest;  // partial results in all, of one output

  AE_HD double cost(const Work& w) const {
    return w.costs.combine +
           w.costs.part / 2 * most(double(deepest), double(parts) / double(w.slots));
  }
};

// Every output in at most `splits` pieces of a tile or more. One that is a piece by itself is no
// part; one without tiles is a worker's own only where there is no combine step.
struct Pieces {
  int64_t count;
  Merging merging;

  AE_HD Pieces(const Work& w, int64_t splits)
      : count(w.outputs), merging{0, splits > 1 && w.longest > 1 ? least(w.longest, splits) : 0} {
    if (splits == 1) return;
    count = 0;
    for (int64_t o = 0; o < w.outputs; ++o) {
      const int64_t parts = least(w.prefix[o + 1] - w.prefix[o], splits);
      count += parts;
      if (parts > 1) merging.parts += parts;
    }
  }
};

// List scheduling of the pieces in order, each onto the slot that is free first. Stops beyond
// `stop`. Of more than `simulated` whole outputs the first are taken as spread evenly; more parts
// get an upper bound, so that a split is never chosen on a guess.
AE_HD inline double list_makespan(const Work& w, int64_t splits, int64_t pieces, double stop,
                                  int64_t simulated) {
  const double write = splits > 1 ? w.costs.part / 2 : 0;
  const int64_t deepest = least(w.longest, splits);
  if (pieces == 0) return 0;
  const int64_t most_tiles = w.longest > 0 ? w.longest / deepest + (w.longest % deepest != 0) : 0;
  const double largest = w.piece(most_tiles) + (deepest > 1 ? write : 0);
  if (pieces <= w.slots) return largest;
  if (w.equal && (splits == 1 || w.longest % splits == 0)) {
    return double(pieces / w.slots + (pieces % w.slots != 0)) * largest;
  }
  const double each = w.costs.segment + write, work = double(w.tiles) * w.costs.tile;
  if (w.slots > kMostSlots || (splits > 1 && pieces > simulated)) {  // Graham's bound
    return (work + double(pieces) * each) / double(w.slots) + largest;
  }
  const int64_t first = pieces > simulated ? w.outputs - simulated : 0;
  const double spread =
      (double(w.prefix[first]) * w.costs.tile + double(first) * each) / double(w.slots);
  double free_at[kMostSlots];  // a heap once it is full: free_at[0] is the earliest
  int64_t used = 0;
  double last = spread;
  const auto sink = [&](int64_t hole, double value) {
    for (int64_t child = 2 * hole + 1; child < used; child = 2 * hole + 1) {
      child += child + 1 < used && free_at[child + 1] < free_at[child];
      if (free_at[child] >= value) break;
      free_at[hole] = free_at[child];
      hole = child;
    }
    free_at[hole] = value;
  };
  for (int64_t o = first; o < w.outputs; ++o) {
    const int64_t n = w.prefix[o + 1] - w.prefix[o];
    const int64_t parts = splits == 1 ? 1 : least(n, splits);
    int64_t size = n, longer = 0;  // parts < longer have a tile more
    if (parts > 1) {
      size = n / parts;
      longer = n % parts;
    }
    for (int64_t part = 0; part < parts; ++part) {
      const double cost = w.piece(size + (part < longer)) + (parts > 1 ? write : 0);
      double end = spread + cost;
      if (used < w.slots) {
        free_at[used++] = end;
        if (used == w.slots) {
          for (int64_t i = used / 2; i-- > 0;) sink(i, free_at[i]);
        }
      } else {
        end = free_at[0] + cost;
        sink(0, end);
      }
      if (end > last) last = end;
      if (last > stop) return last;
    }
  }
  return last;
}

AE_HD inline double tiles_cost(const Work& w, double stop = kNever,
                               int64_t simulated = kSimulated) {
  return list_makespan(w, 1, w.outputs, stop, simulated);
}

AE_HD inline double split_cost(const Work& w, int64_t splits, double stop = kNever,
                               int64_t simulated = kSimulated) {
  const Pieces pieces(w, splits);
  const double merge = pieces.merging.cost(w);
  return list_makespan(w, splits, pieces.count, stop - merge, simulated) + merge;
}

// Exact; one pass over workers and outputs.
AE_HD inline double stream_k_cost(const Work& w, int64_t workers) {
  const Schedule s = Schedule::make(kStreamK, w.outputs, w.prefix, workers, 1);
  Merging merging{0, 0};
  double longest = 0;
  int64_t output = 0, pieces = 0;  // of `output` so far
  for (int64_t x = 0; x < s.workers; ++x) {
    const int64_t begin = s.start(x), end = s.start(x + 1);
    int64_t segments = 0, parts = 0;
    for (int64_t t = begin; t < end;) {
      while (w.prefix[output + 1] <= t) {
        ++output;
        pieces = 0;
      }
      const int64_t stop = least(w.prefix[output + 1], end);
      const bool whole = t == w.prefix[output] && stop == w.prefix[output + 1];
      ++segments;
      parts += !whole;
      if (!whole && ++pieces > merging.deepest) merging.deepest = pieces;
      t = stop;
    }
    merging.parts += parts;
    longest =
        most(longest, double(end - begin) * w.costs.tile + double(segments) * w.costs.segment +
                          double(parts) * w.costs.part / 2);
  }
  return longest + merging.cost(w);
}

// Sets `workers`: fewer than there are slots where merging many small parts costs more than the
// workers save.
AE_HD inline double best_stream_k(const Work& w, int64_t* workers) {
  *workers = least(w.slots, w.tiles);
  double best = stream_k_cost(w, *workers);
  for (int64_t fewer = *workers / 2; fewer > 0; fewer /= 2) {
    if (double(w.tiles) * w.costs.tile >= best * double(fewer)) break;  // the tiles alone
    const double cost = stream_k_cost(w, fewer);
    if (cost >= best) break;
    best = cost;
    *workers = fewer;
  }
  return best;
}

// Sets `splits`: all that fit one wave of slots, what fills two to four, what cuts the longest
// output into a worker's share, its half and its quarter, and powers of two. A number that cannot
// reach `stop` is not simulated: the work of all over the slots, and the largest piece, bound it.
AE_HD inline double best_split(const Work& w, double stop, int32_t* splits) {
  double best = kNever;
  int64_t budget = kSearched;
  const double write = w.costs.part / 2, tiles = double(w.tiles) * w.costs.tile;
  const auto attempt = [&](int64_t s) {
    if (s < 2 || s > kMostSplits || s > w.longest || s == *splits) return;
    const Pieces pieces(w, s);
    const double merge = pieces.merging.cost(w);
    const double spread =
        (tiles + double(pieces.count) * w.costs.segment + double(pieces.merging.parts) * write) /
        double(w.slots);
    const double piece = w.piece(w.longest / s + (w.longest % s != 0)) + write;
    const double limit = best < stop ? best : stop;
    double cost = most(spread, piece) + merge;  // at least
    if (cost <= limit) {
      cost = list_makespan(w, s, pieces.count, limit - merge, budget) + merge;
      if (pieces.count > w.slots && pieces.count <= budget) budget -= pieces.count;
    }
    if (cost < best || (cost == best && s < *splits)) {
      best = cost;
      *splits = int32_t(s);
    }
  };
  *splits = 1;
  const int64_t one_wave = least(w.slots / w.live, kMostSplits);
  for (int64_t s = 2; s <= one_wave; ++s) attempt(s);
  const double shares = double(w.longest) * double(w.slots) / double(w.tiles);
  for (int64_t finer = 1; finer <= 4; finer *= 2) {
    if (shares < kMostSplits) attempt(int64_t(shares * double(finer)) + 1);
  }
  for (int64_t wave = 2; wave <= 4; ++wave) attempt(wave * w.slots / w.live);
  for (int64_t s = 2; s <= kMostSplits; s *= 2) {
    if (s > one_wave) attempt(s);
  }
  return best;
}

}  // namespace policy

// `prefix` as in schedule.h. Without merging (a row function that has no `merge`) every output is
// one worker's. The policy that costs least; a simpler one when it is within 1 %.
AE_HD inline PolicyChoice choose_policy(int64_t outputs, const int64_t* prefix, int64_t slots,
                                        bool can_merge, const PolicyCosts& costs) {
  using namespace policy;
  const Work w(outputs, prefix, slots > 1 ? slots : 1, costs);
  PolicyChoice choice{kTiles, 1, outputs, {kNever, kNever, kNever}};
  if (!can_merge || w.slots == 1 || w.tiles == 0) {
    choice.cost[kTiles] = tiles_cost(w);
    return choice;
  }
  int64_t workers;
  int32_t splits;
  const double stream = best_stream_k(w, &workers);
  const double tiles = tiles_cost(w, stream * kStop);
  const double split = best_split(w, stream < tiles * kTie ? stream : tiles * kTie, &splits);
  choice.cost[kTiles] = tiles;
  choice.cost[kSplit] = split;
  choice.cost[kStreamK] = stream;
  if (split < tiles * kTie && split <= stream) {
    choice.policy = kSplit;
    choice.splits = splits;
    choice.workers = outputs * splits;
  } else if (stream < tiles * kTie) {
    choice.policy = kStreamK;
    choice.workers = workers;
  }
  return choice;
}

// Where lengths are on the device (a launch that must not wait, a CUDA graph that is replayed with
// other lengths): only the number of outputs and the most tiles that one can have are known. The
// lengths are taken as half of that on average, and one as all of it, so that
//   tiles    = the mean load, half an output that the last workers stand alone with, and another
//              for a longest output of twice the mean.
//   split    = a part of the longest, where all parts run at once, and its merging.
//   stream-K = the mean load, two segments and two parts per worker, the merging of the longest,
//              and `count`: before workers know where they begin, somebody counts the tiles of all
//              outputs.
// Stream-K is nearly always less than a worker per output: in the model of `python -m bench
// schedule` that one takes 1.5 to 2.4 times as long at one output per slot, of uniform
// lengths, 1.06 to 1.14 times at 8, and 1.3 times there for 1k to 128k keys; stream-K is never
// slower by 1 %. From `crowded` outputs per slot on, 2 to 8 % are left to win, and outputs stay
// whole. A split pays for short lengths, where counting takes longer than what it saves.
constexpr int64_t kCrowded = 32;

AE_HD inline PolicyChoice choose_policy_bounded(int64_t outputs, int64_t most_tiles, int64_t slots,
                                                bool can_merge, const PolicyCosts& costs,
                                                double count = 0, int64_t crowded = kCrowded) {
  using policy::kNever;
  const int64_t workers = slots > 1 ? slots : 1;
  const double mean = double(most_tiles) / 2 * costs.tile;
  const double work = double(outputs) * (mean + costs.segment), load = work / double(workers);
  PolicyChoice choice{kTiles, 1, outputs, {kNever, kNever, kNever}};
  choice.cost[kTiles] = load < mean ? 2 * mean : load + 1.5 * mean;
  if (!can_merge || outputs >= crowded * workers || outputs == 0 || workers == 1 ||
      most_tiles < 2) {
    return choice;
  }
  int64_t streaming = 0;
  for (int64_t w = policy::least(workers, outputs * most_tiles); w > 0; w /= 2) {
    // The longest output has twice the tiles of the mean, and so twice its share of the workers.
    const int64_t deepest = policy::least(1 + 2 * w / outputs, most_tiles);
    const double cost = work / double(w) + costs.segment + costs.part * (1 + double(deepest) / 2) +
                        costs.combine + count;
    if (cost >= choice.cost[kStreamK]) break;  // fewer workers have less to merge, and more to do
    choice.cost[kStreamK] = cost;
    streaming = w;
  }
  int32_t splits = 1;
  const int64_t one_wave = policy::least(workers / outputs, policy::kMostSplits);
  for (int64_t s = 2; s <= one_wave && s <= most_tiles; ++s) {
    const int64_t tiles = most_tiles / s + (most_tiles % s != 0);
    const double cost =
        double(tiles) * costs.tile + costs.segment + costs.part / 2 * double(1 + s) + costs.combine;
    if (cost >= choice.cost[kSplit]) continue;
    choice.cost[kSplit] = cost;
    splits = int32_t(s);
  }
  const double whole = choice.cost[kTiles] * policy::kTie;
  if (choice.cost[kSplit] < whole && choice.cost[kSplit] <= choice.cost[kStreamK]) {
    choice.policy = kSplit;
    choice.splits = splits;
    choice.workers = outputs * splits;
  } else if (choice.cost[kStreamK] < whole) {
    choice.policy = kStreamK;
    choice.workers = streaming;
  }
  return choice;
}

// What the launcher of CUDA kernels prices with, in cycles of an SM. Not measured.
struct DeviceCosts {
  PolicyCosts policy;
  double count;  // of ae_schedule
};

AE_HD inline DeviceCosts device_costs(int64_t tile_cycles, int64_t slot_bytes) {
  // A segment loads Q and fills its ring before the first product; a part is written to and read
  // from the L2 cache; each kernel more takes 2 to 3 us to launch.
  constexpr double kSegment = 2500, kBytesPerCycle = 16, kLaunch = 4000;
  return {{double(tile_cycles), kSegment, 2 * double(slot_bytes) / kBytesPerCycle, kLaunch},
          kLaunch};
}

}  // namespace ae
