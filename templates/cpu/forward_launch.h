// What all tasks of a forward launch share: how the work is cut and scheduled, the workspace,
// tables of the mask and of diagonals.
#pragma once
#include "common/policy.h"
#include "common/segments.h"
#include "cpu/diagonal.h"
#include "cpu/forward_work.h"
#include "cpu/module.h"

namespace ae {

template <class Plan, class Fn>
class ForwardLaunch {
 protected:
  using Elem = typename Plan::Elem;
  using Acc = typename Plan::Acc;
  using M = Multiply<Plan>;
  using L = Lanes<Acc>;
  using Scratch = ForwardScratch<Plan>;
  using Cut = ForwardCut<Plan>;
  using Tile = ForwardTile<Plan>;
  using Output = ForwardOutput<Plan>;
  using Workspace = ForwardWorkspace<Plan, Fn>;
  static constexpr int64_t kMergeRows = 8;  // of a task that merges

  static_assert(Plan::kScratchBytes == Scratch::kBytes, "the plan's scratch total is wrong");
  static_assert(Plan::kBlockN % (2 * L::W) == 0, "a tile row must be whole pairs of vectors");
  static_assert(!Plan::kBf16Dot || (kHasBf16Dot && __is_same(Elem, bf16)),
                "bf16 dot products need bf16 operands and AVX512_BF16");
  static constexpr int kBlockM = Plan::kBlockM, kBlockN = Plan::kBlockN;
  static constexpr int kD = Plan::kD, kDv = Plan::kDv, kOutPitch = Scratch::kOutPitch;

 public:
  static constexpr bool kCanSplit = Plan::kSplitKV && Fn::kHasMerge;

  static int64_t workspace_bytes(const ae_params& p) {
    return Workspace(Cut(p, Fn::kMaskUsesH), kCanSplit, shared_bytes(p)).bytes;
  }

  // Introspection: how run() shares the work. False: no memory.
  static bool describe(const ae_params& p, ae_cut& cut, int64_t* prefix, int64_t capacity) {
    const auto bytes = uint64_t(workspace_bytes(p));
    void* memory = __builtin_malloc(bytes);
    if (memory == nullptr) return false;
    ForwardLaunch(p, memory).describe_cut(cut, prefix, capacity);
    __builtin_free(memory);
    return true;
  }

  // The indices of some rows, as the user's functions see them.
  struct Box {
    Interval b, h, q;
    explicit Box(const Tile& tile) {
      const int64_t q0 = tile.q(0), q1 = tile.q(tile.count - 1);
      const bool one = q0 == q1;
      const int64_t h0 = one ? tile.h(0) : tile.block * tile.interleave;
      const int64_t h1 = one ? tile.h(tile.count - 1) : h0 + tile.interleave - 1;
      set(tile.b, h0, h1, q0, q1);
    }
    Box(const Cut& c, const Output& o) {
      set(o.sequence + c.p.b_first, o.head * c.group, (o.head + o.heads) * c.group - 1,
          o.s.first_query, o.s.first_query + o.s.rows - 1);
    }

   private:
    void set(int64_t b0, int64_t h0, int64_t h1, int64_t q0, int64_t q1) {
      b = iv::range(double(b0), double(b0));
      h = iv::range(double(h0), double(h1));
      q = iv::range(double(q0), double(q1));
    }
  };

  // The runs of tiles of keys of some rows.
  static int64_t runs(const Box& box, const IntervalEnv& env, int64_t keys, int64_t tile_keys,
                      ae_run* out, int64_t capacity) {
    return row_segments<Fn>(env, box.b, box.h, box.q, keys, int(tile_keys), out, capacity);
  }

 protected:
  const ae_params& p_;
  const Cut cut_;
  const Workspace at_;
  char* const base_;
  Env env_;
  IntervalEnv interval_env_{};
  DiagonalTables<Fn, Acc> diagonals_;
  Schedule schedule_{};

  ForwardLaunch(const ae_params& p, void* workspace)
      : p_(p),
        cut_(p, Fn::kMaskUsesH),
        at_(cut_, kCanSplit, shared_bytes(p)),
        base_((char*)round_up((int64_t)workspace, kCacheLine)),
        env_{p.captures, p.fault, p.S} {}

  void prepare(ae_parallel_for parallel_for) {
    interval_env_ = build_tables(p_, Fn::kMaskCaptures, base_ + at_.tables, parallel_for);
    diagonals_.build(p_, interval_env_, base_ + at_.tables + mask_bytes(p_), parallel_for);
    env_.tables = diagonals_.tables();
    number_outputs();
  }

  int64_t* first_output() const { return (int64_t*)(base_ + at_.first_output); }
  int64_t* first_tile() const { return (int64_t*)(base_ + at_.first_tile); }

  void number_outputs() {
    int64_t *output = first_output(), *tile = first_tile();
    output[0] = tile[0] = 0;
    for (int64_t b = 0; b < p_.B; ++b) {
      const Sequence s(p_, b);
      output[b + 1] = output[b] + cut_.outputs(s);
      tile[b + 1] = tile[b] + cut_.key_tiles(s);
    }
    schedule_ = Schedule{kTiles, 1, at_.outputs, at_.outputs, nullptr, 0, 0};
    if (!at_.may_split) return;
    auto* prefix = (int64_t*)(base_ + at_.prefix);
    count_tiles(prefix);
    const int64_t workers = shares(prefix[at_.outputs]);
    const PolicyChoice choice = choose_policy(at_.outputs, prefix, workers, kCanSplit, costs());
    if (choice.policy == kTiles) return;
    const bool room = choice.policy == kStreamK ||
                      Schedule::slots(kSplit, at_.outputs, 0, choice.splits) <= at_.slots;
    schedule_ = Schedule::make(room ? choice.policy : kStreamK, at_.outputs, prefix,
                               choice.policy == kStreamK ? choice.workers : workers, choice.splits);
  }
  void count_tiles(int64_t* prefix) const {
    auto* runs_here = (ae_run*)(base_ + at_.runs);  // the first worker's
    prefix[0] = 0;
    for (int64_t o = 0; o < at_.outputs; ++o) {
      const int64_t n = runs_of(output_of(o), runs_here);
      prefix[o + 1] = prefix[o];
      for (int64_t i = 0; i < n; ++i) prefix[o + 1] += runs_here[i].end - runs_here[i].begin;
    }
  }
  void describe_cut(ae_cut& cut, int64_t* prefix, int64_t capacity) {
    const auto here = [](int64_t n, int32_t, ae_task task, void* arg) {
      for (int64_t i = 0; i < n; ++i) task(arg, i, 0);
    };
    const PolicyCosts c = costs();
    cut = {at_.outputs,
           at_.rows,
           cut_.heads_together,
           cut_.tile_keys,
           Plan::kVirtualWorkers,
           at_.may_split,
           {c.tile, c.segment, c.part, c.combine}};
    interval_env_ = build_tables(p_, Fn::kMaskCaptures, base_ + at_.tables, here);
    number_outputs();
    if (at_.may_split) {
      cut.workers = int32_t(shares(((int64_t*)(base_ + at_.prefix))[at_.outputs]));
    }
    if (capacity > at_.outputs) count_tiles(prefix);
  }

  // Workers that so many tiles are shared among, at most: a worker's first tile is not fetched
  // ahead and its sums are merged, so each has kShare cycles to do. Where 16 MB are read, 8 shares
  // reach 0.82 to 0.89 of the streaming rate, 32 shares 0.61 to 0.68 (Zen 4, two cores).
  static constexpr double kShare = 400e3;
  int64_t shares(int64_t tiles) const {
    const double n = double(tiles) * costs().tile / kShare;
    return n < 2 ? 2 : n < Plan::kVirtualWorkers ? int64_t(n) : Plan::kVirtualWorkers;
  }

  // Cycles of a core, for the choice of a policy: what the tile of an output reads at 5 bytes a
  // cycle (18 GB/s), or its products, if they take longer; packing Q and finishing rows; a
  // partial result written and read; the second start of the pool.
  PolicyCosts costs() const {
    constexpr double kBytes = 5, kProducts = 2 * L::W * GemmStep<Acc, M>::kPair;
    const double rows = double(at_.rows), pairs = double(cut_.tile_keys * cut_.heads_together);
    const double read = pairs * (kD + kDv) * sizeof(Elem) / kBytes;
    const double multiply = rows * double(cut_.tile_keys) * (kD + kDv) / kProducts;
    const double merging = rows > kMergeRows ? kMergeRows / rows : 1;  // by as many tasks
    const double part = rows * kOutPitch * sizeof(Acc) * (1 + merging) / kBytes;
    return {read > multiply ? read : multiply, 1000 + rows * 60, part, 15000};
  }

  // Sequence b with first[b] <= i < first[b + 1].
  static int64_t sequence_of(const int64_t* first, int64_t count, int64_t i) {
    int64_t low = 0, high = count;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first[middle] <= i ? low : high) = middle;
    }
    return low;
  }
  Output output_of(int64_t index) const {
    const int64_t b = sequence_of(first_output(), p_.B, index);
    return Output(cut_, b, index - first_output()[b]);
  }
  int64_t runs_of(const Output& o, ae_run* out) const {
    const int64_t capacity = cut_.most_key_tiles();
    if (cut_.pack_ahead) {
      const Box box(Tile(cut_, o.s, o.sequence, o.block, o.row_tile));
      return runs(box, interval_env_, o.s.keys, cut_.tile_keys, out, capacity);
    }
    return runs(Box(cut_, o), interval_env_, o.s.keys, cut_.tile_keys, out, capacity);
  }

 private:
  // What all tasks read: the tables of the mask, then those of the diagonals.
  static int64_t mask_bytes(const ae_params& p) {
    return round_up(table_bytes(p, Fn::kMaskCaptures), kCacheLine);
  }
  static int64_t shared_bytes(const ae_params& p) {
    return mask_bytes(p) + DiagonalTables<Fn, Acc>::bytes(p);
  }
};

}  // namespace ae
