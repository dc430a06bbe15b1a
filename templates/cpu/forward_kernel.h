// The forward kernel itself; forward.h tells what it computes and what Plan and Fn must hold.
#pragma once
#include "common/policy.h"
#include "common/segments.h"
#include "cpu/diagonal.h"
#include "cpu/forward_keys.h"

namespace ae {

template <class Plan, class Fn>
class Forward {
  using Elem = typename Plan::Elem;
  using Acc = typename Plan::Acc;
  using M = Multiply<Plan>;
  using L = Lanes<Acc>;
  using V = typename L::Acc;
  using Scratch = ForwardScratch<Plan>;
  using Cut = ForwardCut<Plan>;
  using Tile = ForwardTile<Plan>;
  using Output = ForwardOutput<Plan>;
  using Workspace = ForwardWorkspace<Plan, Fn>;
  using Keys = ForwardKeys<Plan, Fn>;
  using KeyTile = typename Keys::Tile;
  static constexpr int kBlockM = Plan::kBlockM, kBlockN = Plan::kBlockN;
  static constexpr int kD = Plan::kD, kDv = Plan::kDv, kOutPitch = Scratch::kOutPitch;
  static constexpr int kStates = Fn::kStates > 0 ? Fn::kStates : 1;
  static constexpr int64_t kMergeRows = 8;  // of a task

  static_assert(Plan::kScratchBytes == Scratch::kBytes, "the plan's scratch total is wrong");
  static_assert(kBlockN % (2 * L::W) == 0, "a tile row must be whole pairs of vectors");
  static_assert(!Plan::kBf16Dot || (kHasBf16Dot && __is_same(Elem, bf16)),
                "bf16 dot products need bf16 operands and AVX512_BF16");

 public:
  static constexpr bool kCanSplit = Plan::kSplitKV && Fn::kHasMerge;

  static int64_t workspace_bytes(const ae_params& p) {
    return Workspace(Cut(p, Fn::kMaskUsesH), kCanSplit, shared_bytes(p)).bytes;
  }

  Forward(const ae_params& p, void* workspace)
      : p_(p),
        cut_(p, Fn::kMaskUsesH),
        at_(cut_, kCanSplit, shared_bytes(p)),
        base_((char*)round_up((int64_t)workspace, kCacheLine)),
        env_{p.captures, p.fault, p.S},
        keys_(p, env_) {}

  void run(ae_parallel_for parallel_for) {
    if (at_.outputs == 0) return;
    interval_env_ = build_tables(p_, Fn::kMaskCaptures, base_ + at_.tables, parallel_for);
    diagonals_.build(p_, interval_env_, base_ + at_.tables + mask_bytes(p_), parallel_for);
    env_.tables = diagonals_.tables();
    number_outputs();
    if (cut_.pack_ahead) {
      const int64_t tiles = first_tile()[cut_.key_batches()] * p_.Hkv;
      parallel_for(tiles, p_.threads, &pack_task, this);
    }
    parallel_for(schedule_.workers, p_.threads, &work_task, this);
    if (schedule_.policy != kTiles) {
      const int64_t chunks = (at_.rows + kMergeRows - 1) / kMergeRows;
      parallel_for(at_.outputs * chunks, p_.threads, &merge_task, this);
    }
  }

  // Introspection: how run() shares the work. False: no memory.
  static bool describe(const ae_params& p, ae_cut& cut, int64_t* prefix, int64_t capacity) {
    const auto bytes = uint64_t(workspace_bytes(p));
    void* memory = __builtin_malloc(bytes);
    if (memory == nullptr) return false;
    Forward(p, memory).describe_cut(cut, prefix, capacity);
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

 private:
  const ae_params& p_;
  const Cut cut_;
  const Workspace at_;
  char* const base_;
  Env env_;
  const Keys keys_;
  IntervalEnv interval_env_{};
  DiagonalTables<Fn, Acc> diagonals_;
  Schedule schedule_{};

  // What all tasks read: the tables of the mask, then those of the diagonals.
  static int64_t mask_bytes(const ae_params& p) {
    return round_up(table_bytes(p, Fn::kMaskCaptures), kCacheLine);
  }
  static int64_t shared_bytes(const ae_params& p) {
    return mask_bytes(p) + DiagonalTables<Fn, Acc>::bytes(p);
  }

  // The row states of an output, or of a part of it.
  struct Rows {
    typename Fn::Row* row;
    Acc (*state)[kStates];
    Acc* factor;
    bool* alive;

    Rows from(int64_t i) const { return {row + i, state + i, factor + i, alive + i}; }
  };
  Rows rows_of(char* scratch) const {
    return {(typename Fn::Row*)(scratch + at_.row), (Acc(*)[kStates])(scratch + at_.state),
            (Acc*)(scratch + at_.factor), (bool*)(scratch + at_.row_alive)};
  }

  static void pack_task(void* self, int64_t index, int32_t) {
    static_cast<Forward*>(self)->pack_ahead(index);
  }
  static void work_task(void* self, int64_t index, int32_t worker) {
    static_cast<Forward*>(self)->work(index, worker);
  }
  static void merge_task(void* self, int64_t index, int32_t) {
    static_cast<Forward*>(self)->merge(index);
  }

  // ---- who does what ----
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
    const PolicyChoice choice =
        choose_policy(at_.outputs, prefix, Plan::kVirtualWorkers, kCanSplit, costs());
    if (choice.policy == kTiles) return;
    const bool room = choice.policy == kStreamK ||
                      Schedule::slots(kSplit, at_.outputs, 0, choice.splits) <= at_.slots;
    schedule_ = Schedule::make(room ? choice.policy : kStreamK, at_.outputs, prefix,
                               choice.policy == kStreamK ? choice.workers : Plan::kVirtualWorkers,
                               choice.splits);
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
    if (capacity > at_.outputs) count_tiles(prefix);
  }

  // Cycles of a core, for the choice of a policy: what the tile of an output reads at 5 bytes a
  // cycle (18 GB/s), or its products, if they take longer; packing Q and finishing rows; a partial
  // result written and read; the second start of the pool.
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

  // The live tiles of a segment, in order.
  struct LiveTile {
    int64_t index;  // -1: no more
    bool full;
  };
  class LiveTiles {
   public:
    LiveTiles(const ae_run* runs, int64_t n, const Segment& s)
        : run_(runs), end_(runs + n), skip_(s.begin), left_(s.end - s.begin) {}
    LiveTile next() {
      while (left_ > 0 && run_ != end_) {
        const int64_t tile = run_->begin + at_, size = run_->end - run_->begin;
        if (at_ >= size || skip_ >= size - at_) {
          skip_ -= size - at_;
          ++run_;
          at_ = 0;
          continue;
        }
        at_ += skip_ + 1;
        const LiveTile found{tile + skip_, !Fn::kHasMask || run_->tile_class == AE_TILE_FULL};
        skip_ = 0;
        --left_;
        return found;
      }
      return {-1, false};
    }

   private:
    const ae_run *run_, *end_;
    int64_t at_ = 0, skip_, left_;
  };

  // ---- packing ahead ----
  M* packed_k(int64_t tile) const { return (M*)(base_ + at_.k) + tile * Scratch::kKTile; }
  M* packed_v(int64_t tile) const { return (M*)(base_ + at_.v) + tile * Scratch::kVTile; }

  // Tiles of a sequence lie head after head.
  int64_t packed_tile(int64_t b, const Sequence& s, int64_t head, int64_t tile) const {
    return first_tile()[b] * p_.Hkv + head * cut_.key_tiles(s) + tile;
  }
  void pack_ahead(int64_t index) {
    const int64_t b = sequence_of(first_tile(), p_.B, index / p_.Hkv);
    const Sequence s(p_, b);
    const int64_t n = cut_.key_tiles(s), in = index - first_tile()[b] * p_.Hkv;
    const int64_t head = in / n, first = in % n * kBlockN;
    const int count = keys_in(s, in % n);
    const Elem* rows[kBlockN];
    key_addresses(p_, p_.k, p_.k_stride, s, first, count, rows);
    keys_.pack_k(rows, head * p_.k_stride[1], count, packed_k(index));
    key_addresses(p_, p_.v, p_.v_stride, s, first, count, rows);
    base_[at_.bad + index] = keys_.pack_v(rows, head * p_.v_stride[1], count, packed_v(index));
  }

  int keys_in(const Sequence& s, int64_t tile) const {
    const int64_t left = s.keys - tile * cut_.tile_keys;
    return int(left < cut_.tile_keys ? left : cut_.tile_keys);
  }

  // ---- the rows of an output ----
  const Elem* query_base(const Output& o) const {
    return (const Elem*)p_.q + o.sequence * p_.q_stride[0] + o.s.first_row * p_.q_stride[2];
  }
  // Rows lie as packed rows would.
  bool queries_in_place() const {
    const int64_t* s = p_.q_stride;
    return __is_same(M, Elem) && !Fn::kHasQMod && kD == Scratch::kQPitch && cut_.interleave == 1 &&
           s[3] == 1 && s[2] == kD;
  }
  const M* query_rows(const Output& o, const Tile& tile, const M* packed, int64_t at) const {
    if (!queries_in_place()) return packed + at * Scratch::kQPitch;
    return (const M*)(query_base(o) + tile.h(0) * p_.q_stride[1] + tile.row(0) * p_.q_stride[2]);
  }

  void start_rows(const Tile& tile, const Rows& rows) const {
    for (int i = 0; i < tile.count; ++i) {
      rows.row[i] = Fn::make_row(env_, tile.b, tile.h(i), tile.q(i));
      Fn::init(env_, rows.row[i], rows.state[i]);
      rows.alive[i] = false;
    }
  }

  void work(int64_t worker, int32_t thread) {
    char* scratch = base_ + thread * at_.worker_bytes;
    if (schedule_.prefix == nullptr) {
      attend(Segment{worker, 0, int64_t(1) << 62, -1}, scratch);
    } else {
      schedule_.each_segment(worker, [&](const Segment& s) { attend(s, scratch); });
    }
  }

  void attend(const Segment& segment, char* scratch) {
    const Output output = output_of(segment.output);
    const Rows rows = rows_of(scratch);
    M* q = (M*)(scratch + at_.q);
    Acc* sums = (Acc*)(scratch + at_.sums);
    ae_run* runs_here = (ae_run*)(scratch + at_.runs);
    output.each_part(cut_, [&](const Tile& tile, int64_t at) {
      if (!queries_in_place()) {
        keys_.pack_q(tile, query_base(output), q + at * Scratch::kQPitch);
      }
      start_rows(tile, rows.from(at));
      __builtin_memset(sums + at * kOutPitch, 0, sizeof(Acc) * uint64_t(tile.count) * kOutPitch);
    });
    LiveTiles tiles(runs_here, runs_of(output, runs_here), segment);
    LiveTile next = tiles.next();
    bool first = true;
    while (next.index >= 0) {
      const LiveTile tile = next;
      next = tiles.next();
      add_tile(output, tile, next, first, rows, q, sums, scratch);
      first = false;
    }
    if (segment.slot < 0) return finish(output, rows, sums);
    output.each_part(cut_, [&](const Tile& tile, int64_t at) {
      const uint64_t n = uint64_t(tile.count);
      const int64_t to = segment.slot * at_.rows + at;
      __builtin_memcpy(partial_out(to), sums + at * kOutPitch, sizeof(Acc) * n * kOutPitch);
      __builtin_memcpy(partial_state(to), rows.state + at, sizeof(Acc) * n * kStates);
      __builtin_memcpy(partial_alive(to), rows.alive + at, n);
    });
  }

  void finish(const Output& output, const Rows& rows, const Acc* sums) const {
    output.each_part(cut_, [&](const Tile& tile, int64_t at) {
      const Rows mine = rows.from(at);
      for (int i = 0; i < tile.count; ++i) {
        finish_row(output, tile, i, mine.row[i], mine.state[i], mine.alive[i],
                   sums + (at + i) * kOutPitch);
      }
    });
  }

  // ---- one tile of keys ----
  // Of all heads of an output; meanwhile the rows of `next` are fetched, in the order of the
  // memory.
  void add_tile(const Output& o, LiveTile live, LiveTile next, bool first, const Rows& rows,
                const M* q, Acc* sums, char* scratch) const {
    const auto k_next = (const Elem**)(scratch + at_.k_next);
    const auto v_next = (const Elem**)(scratch + at_.v_next);
    KeyTile keys{};
    keys.first = live.index * cut_.tile_keys;
    keys.count = keys_in(o.s, live.index);
    keys.full = live.full;
    if (!cut_.pack_ahead) {
      keys.k_rows = address(o, p_.k, p_.k_stride, live, next, scratch + at_.k_rows);
      keys.v_rows = address(o, p_.v, p_.v_stride, live, next, scratch + at_.v_rows);
      if (o.heads > 1) {
        in_memory_order(o, keys.k_rows + cut_.tile_keys, p_.k_stride[1], k_next);
        in_memory_order(o, keys.v_rows + cut_.tile_keys, p_.v_stride[1], v_next);
      }
    }
    for (int64_t i = 0; i < o.heads; ++i) {
      const int64_t head = o.head + i;
      keys.k_offset = head * p_.k_stride[1], keys.v_offset = head * p_.v_stride[1];
      if (cut_.pack_ahead) {
        const int64_t packed =
            packed_tile(cut_.shared_keys ? 0 : o.sequence, o.s, head, live.index);
        keys.k = packed_k(packed), keys.v = packed_v(packed);
        keys.k_packed = keys.v_packed = true;
        keys.bad_v = base_[at_.bad + packed];
      } else {
        keys.k = (M*)(scratch + Scratch::kK), keys.v = (M*)(scratch + Scratch::kV);
        keys.k_packed = keys.v_packed = false;
        const int64_t n = cut_.tile_keys, at = i * n;
        if (o.heads == 1) {
          keys.k_fetch = {keys.k_rows + cut_.keys_ahead(), keys.k_offset, nullptr};
          keys.v_fetch = {keys.v_rows + cut_.keys_ahead(), keys.v_offset, nullptr};
        } else if (!first) {
          keys.k_fetch = {k_next + at, 0, nullptr}, keys.v_fetch = {v_next + at, 0, nullptr};
        } else {
          // Nobody has fetched the first tile: each head fetches the next one's keys too.
          const int64_t next_head = i + 1 < o.heads ? head + 1 : head;
          keys.k_fetch = {keys.k_rows, next_head * p_.k_stride[1], k_next + at};
          keys.v_fetch = {keys.v_rows, next_head * p_.v_stride[1], v_next + at};
        }
      }
      o.each_part(cut_, head, [&](const Tile& tile, int64_t at) {
        add_keys(tile, keys, rows.from(at), query_rows(o, tile, q, at), sums + at * kOutPitch,
                 scratch);
      });
    }
  }

  // Addresses of a tile's keys and of keys_ahead() after them, from the next tile on. With several
  // heads that tile starts at tile_keys.
  const Elem* const* address(const Output& o, const void* data, const int64_t* stride,
                             LiveTile live, LiveTile next, char* memory) const {
    const auto rows = (const Elem**)memory;
    const int64_t count = keys_in(o.s, live.index);
    key_addresses(p_, data, stride, o.s, live.index * cut_.tile_keys, count, rows);
    int64_t filled = count;
    const int64_t wanted = cut_.tile_keys + cut_.keys_ahead();
    if (cut_.heads_together > 1) {
      for (; filled < cut_.tile_keys; ++filled) rows[filled] = rows[count - 1];
    }
    if (next.index >= 0) {
      int64_t more = keys_in(o.s, next.index);
      if (more > wanted - filled) more = wanted - filled;
      key_addresses(p_, data, stride, o.s, next.index * cut_.tile_keys, more, rows + filled);
      filled += more;
    }
    for (; filled < wanted; ++filled) rows[filled] = rows[filled - 1];
    return rows;
  }

  // The rows of all heads of the tile at `rows` as they lie: key after key.
  void in_memory_order(const Output& o, const Elem* const* rows, int64_t head_stride,
                       const Elem** out) const {
    for (int64_t j = 0; j < cut_.tile_keys; ++j) {
      const Elem* row = rows[j] + o.head * head_stride;
      for (int64_t h = 0; h < o.heads; ++h) *out++ = row + h * head_stride;
    }
  }

  // The columns of a tile in which some key of these rows may be live.
  Columns columns_of(const Tile& tile, const KeyTile& keys) const {
    if constexpr (Fn::kHasMask) {
      if (!keys.full) {
        const Box box(tile);
        return live_columns(keys.first, keys.count, kGemmRegs * L::W, [&](Interval k) {
          return Fn::classify(interval_env_, box.b, box.h, box.q, k);
        });
      }
    }
    return {0, keys.count};
  }

  void add_keys(const Tile& tile, KeyTile& keys, const Rows& rows, const M* q, Acc* out,
                char* scratch) const {
    const Columns columns = columns_of(tile, keys);
    const int first = columns.begin, ncols = columns.end - columns.begin;
    if (ncols == 0) return;
    Acc* scores = (Acc*)(scratch + Scratch::kScores) + first;
    M* weights = Plan::kBf16Dot ? (M*)(scratch + Scratch::kWeights) + first : (M*)scores;
    keys_.score(keys, columns, tile.count, q, scores);
    const bool whole = keys.full && ncols % L::W == 0;
    const bool live = whole ? weigh<false>(tile, rows, scores, weights, keys, columns)
                            : weigh<true>(tile, rows, scores, weights, keys, columns);
    if (live) keys_.multiply(keys, columns, tile.count, rows.factor, weights, out);
  }

  // Scores to weights, row by row. Returns whether any row has a live key in this tile.
  template <bool kPartial>
  __attribute__((noinline)) bool weigh(const Tile& tile, const Rows& rows, Acc* scores, M* weights,
                                       const KeyTile& keys, Columns columns) const {
    bool any = false;
    const Acc scale = Acc(p_.scale);
    for (int i = 0; i < tile.count; ++i) {
      Acc* s = scores + int64_t(i) * kBlockN;
      Acc factor = 1;
      M* w = Plan::kBf16Dot ? weights + int64_t(i) * kBlockN : (M*)s;
      const bool live = Fn::template tile_row<kPartial>(
          env_, rows.row[i], scale, s, w, rows.state[i], factor, keys.first + columns.begin,
          columns.end - columns.begin, keys.full);
      rows.factor[i] = factor;
      rows.alive[i] |= live;
      any |= live;
    }
    return any;
  }

  // ---- results ----
  Acc* partial_out(int64_t row) const { return (Acc*)(base_ + at_.out) + row * kOutPitch; }
  Acc* partial_state(int64_t row) const { return (Acc*)(base_ + at_.out_state) + row * kStates; }
  bool* partial_alive(int64_t row) const { return (bool*)(base_ + at_.alive) + row; }

  // Row r of an output: its part, and the row there.
  struct Place {
    Tile tile;
    int i;
  };
  Place place_of(const Output& o, int64_t r) const {
    if (cut_.pack_ahead) return {Tile(cut_, o.s, o.sequence, o.block, o.row_tile), int(r)};
    const int64_t rows = o.s.rows * cut_.interleave, row = r % rows;
    const int64_t block = o.head * cut_.blocks + r / rows;
    return {Tile(cut_, o.s, o.sequence, block, row / kBlockM), int(row % kBlockM)};
  }
  int64_t row_count(const Output& o) const {
    if (cut_.pack_ahead) return Tile(cut_, o.s, o.sequence, o.block, o.row_tile).count;
    return o.heads * cut_.blocks * o.s.rows * cut_.interleave;
  }

  // Merges the parts of some rows of an output in the order of its keys; a part without live key is
  // absent.
  void merge(int64_t index) {
    if constexpr (kCanSplit) {
      const int64_t chunks = (at_.rows + kMergeRows - 1) / kMergeRows;
      const Parts parts = schedule_.parts(index / chunks);
      if (parts.whole) return;
      const Output output = output_of(index / chunks);
      const int64_t begin = index % chunks * kMergeRows, rows = row_count(output);
      for (int64_t r = begin; r < rows && r < begin + kMergeRows; ++r) merge_row(output, parts, r);
    }
  }
  void merge_row(const Output& output, const Parts& parts, int64_t r) const {
    if constexpr (kCanSplit) {
      const Place at = place_of(output, r);
      const auto row = Fn::make_row(env_, at.tile.b, at.tile.h(at.i), at.tile.q(at.i));
      Acc state[kStates];
      Acc* out = nullptr;
      for (int64_t part = 0; part < parts.count; ++part) {
        const int64_t from = parts.slot(part) * at_.rows + r;
        if (!*partial_alive(from)) continue;
        const Acc* other = partial_state(from);
        Acc* other_out = partial_out(from);
        if (out == nullptr) {
          out = other_out;
          for (int s = 0; s < Fn::kStates; ++s) state[s] = other[s];
        } else {
          Acc merged[kStates], fa = 1, fb = 1;
          Fn::merge(env_, row, state, other, merged, fa, fb);
          for (int s = 0; s < Fn::kStates; ++s) state[s] = merged[s];
          for (int d = 0; d < kOutPitch; ++d) out[d] = out[d] * fa + other_out[d] * fb;
        }
      }
      if (out == nullptr) Fn::init(env_, row, state);
      finish_row(output, at.tile, at.i, row, state, out != nullptr, out);
    }
  }

  // Writes one output row and its statistics; a row that never met a live key is 0.
  void finish_row(const Output& output, const Tile& tile, int i, const typename Fn::Row& row,
                  const Acc* state, bool alive, const Acc* acc) const {
    constexpr int W = L::W;
    const int64_t q = output.s.first_row + tile.row(i), h = tile.h(i), b = output.sequence;
    const int64_t* s = p_.out_stride;
    Acc stats[Fn::kStats > 0 ? Fn::kStats : 1];
    Acc factor = 1;
    Fn::finalize(env_, row, state, factor, p_.stats != nullptr ? stats : nullptr);
    Elem* out = (Elem*)p_.out + b * s[0] + h * s[1] + q * s[2];
    if (!alive) {
      for (int d = 0; d < kDv; ++d) out[d * s[3]] = Elem{};
    } else if (s[3] == 1) {
      int d = 0;
      for (; d + W <= kDv; d += W) {
        store_narrowed<Elem, Acc>(out + d, load_vector<V>(acc + d) * factor);
      }
      for (; d < kDv; ++d) out[d] = narrow<Elem>(acc[d] * factor);
    } else {
      for (int d = 0; d < kDv; ++d) out[d * s[3]] = narrow<Elem>(acc[d] * factor);
    }
    if (p_.stats == nullptr) return;
    const int64_t* step = p_.stats_stride;
    Acc* to = (Acc*)p_.stats + b * step[1] + h * step[2] + q;
    for (int n = 0; n < Fn::kStats; ++n) to[n * step[0]] = stats[n];
  }
};

}  // namespace ae
