// The forward kernel itself; forward.h tells what it computes and what Plan and Fn must hold.
#pragma once
#include "cpu/forward_keys.h"
#include "cpu/forward_results.h"

namespace ae {

template <class Plan, class Fn>
class Forward : ForwardResults<Plan, Fn> {
  using Base = ForwardResults<Plan, Fn>;
  using typename Base::Acc;
  using typename Base::Elem;
  using typename Base::L;
  using typename Base::M;
  using typename Base::Output;
  using typename Base::Rows;
  using typename Base::Scratch;
  using typename Base::Tile;
  using Keys = ForwardKeys<Plan, Fn>;
  using KeyTile = typename Keys::Tile;
  using Base::at_, Base::base_, Base::cut_, Base::env_, Base::interval_env_, Base::p_;
  using Base::first_tile, Base::output_of, Base::runs_of, Base::sequence_of;
  using Base::kBlockM, Base::kBlockN, Base::kD, Base::kOutPitch, Base::kStates;
  using Base::partial_alive, Base::partial_out, Base::partial_state, Base::rows_of;

 public:
  using Base::describe, Base::runs, Base::workspace_bytes;
  using typename Base::Box;

  Forward(const ae_params& p, void* workspace) : Base(p, workspace), keys_(p, env_) {}

  void run(ae_parallel_for parallel_for) {
    if (at_.outputs == 0) return;
    this->prepare(parallel_for);
    if (cut_.pack_ahead) {
      const int64_t tiles = first_tile()[cut_.key_batches()] * p_.Hkv;
      parallel_for(tiles, p_.threads, &pack_task, this);
    }
    parallel_for(this->schedule_.workers, p_.threads, &work_task, this);
    if (this->schedule_.policy != kTiles) {
      const int64_t chunks = (at_.rows + Base::kMergeRows - 1) / Base::kMergeRows;
      parallel_for(at_.outputs * chunks, p_.threads, &merge_task, this);
    }
  }

 private:
  const Keys keys_;

  static void pack_task(void* self, int64_t index, int32_t) {
    static_cast<Forward*>(self)->pack_ahead(index);
  }
  static void work_task(void* self, int64_t index, int32_t worker) {
    static_cast<Forward*>(self)->work(index, worker);
  }
  static void merge_task(void* self, int64_t index, int32_t) {
    static_cast<Forward*>(self)->merge(index);
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
  void work(int64_t worker, int32_t thread) {
    char* scratch = base_ + thread * at_.worker_bytes;
    if (this->schedule_.prefix == nullptr) {
      attend(Segment{worker, 0, int64_t(1) << 62, -1}, scratch);
    } else {
      this->schedule_.each_segment(worker, [&](const Segment& s) { attend(s, scratch); });
    }
  }

  void attend(const Segment& segment, char* scratch) {
    const Output output = output_of(segment.output);
    const Rows rows = rows_of(scratch);
    M* q = (M*)(scratch + at_.q);
    // Sums of a part grow where they are merged from.
    const bool whole = segment.slot < 0;
    Acc* sums = whole ? (Acc*)(scratch + at_.sums) : partial_out(segment.slot * at_.rows);
    ae_run* runs_here = (ae_run*)(scratch + at_.runs);
    output.each_part(cut_, [&](const Tile& tile, int64_t at) {
      if (!queries_in_place()) {
        keys_.pack_q(tile, query_base(output), q + at * Scratch::kQPitch);
      }
      this->start_rows(tile, rows.from(at));
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
    if (whole) return this->finish(output, rows, sums);
    output.each_part(cut_, [&](const Tile& tile, int64_t at) {
      const uint64_t n = uint64_t(tile.count);
      const int64_t to = segment.slot * at_.rows + at;
      __builtin_memcpy(partial_state(to), rows.state + at, sizeof(Acc) * n * kStates);
      __builtin_memcpy(partial_alive(to), rows.alive + at, n);
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
};

}  // namespace ae
