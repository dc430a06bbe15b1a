// The forward kernel itself; forward.h tells what it computes and what Plan and Fn must hold.
#pragma once
#include "common/env.h"
#include "common/segments.h"
#include "cpu/diagonal.h"
#include "cpu/direct.h"
#include "cpu/forward_work.h"
#include "cpu/module.h"

namespace ae {

// Up to this many rows, keys and values are read where they lie; beyond, packing a tile pays off.
constexpr int kDirectRows = 8;
// And so many keys later is what they fetch, into the second cache.
constexpr int kDirectAhead = 64;

// Packing fetches what it reads this many rows later.
constexpr int64_t kPackAhead = 48;

template <class Plan, class Fn>
class Forward {
  using Elem = typename Plan::Elem;
  using Acc = typename Plan::Acc;
  using M = Multiply<Plan>;
  using L = Lanes<Acc>;
  using V = typename L::Acc;
  using Scratch = ForwardScratch<Plan>;
  static constexpr int kBlockM = Plan::kBlockM, kBlockN = Plan::kBlockN;
  static constexpr int kD = Plan::kD, kDv = Plan::kDv, kOutPitch = Scratch::kOutPitch;
  static constexpr int kPair = GemmStep<Acc, M>::kPair;
  static constexpr int kStates = Fn::kStates > 0 ? Fn::kStates : 1;

  static_assert(Plan::kScratchBytes == Scratch::kBytes, "the plan's scratch total is wrong");
  static_assert(kBlockN % (2 * L::W) == 0, "a tile row must be whole pairs of vectors");
  static_assert(!Plan::kBf16Dot || (kHasBf16Dot && __is_same(Elem, bf16)),
                "bf16 dot products need bf16 operands and AVX512_BF16");

 public:
  static constexpr bool kCanSplit = Plan::kSplitKV && Fn::kHasMerge;

  static int64_t workspace_bytes(const ae_params& p) {
    const ForwardSizes<Plan> sizes(p, kCanSplit);
    return ForwardWorkspace<Plan, Fn>(sizes, p.threads, shared_bytes(p)).bytes;
  }

  Forward(const ae_params& p, void* workspace)
      : p_(p),
        sizes_(p, kCanSplit),
        at_(sizes_, p.threads, shared_bytes(p)),
        base_((char*)round_up((int64_t)workspace, kCacheLine)),
        env_{p.captures, p.fault, p.S} {}

  void run(ae_parallel_for parallel_for) {
    if (sizes_.tiles() == 0) return;
    interval_env_ = build_tables(p_, Fn::kMaskCaptures, base_ + at_.tables, parallel_for);
    diagonals_.build(p_, interval_env_, base_ + at_.tables + mask_bytes(p_), parallel_for);
    env_.tables = diagonals_.tables();
    if (sizes_.pack_ahead) {
      parallel_for(sizes_.kv_heads() * sizes_.kv_tiles, p_.threads, &pack_task, this);
    }
    parallel_for(sizes_.tiles() * sizes_.splits, p_.threads, &tile_task, this);
    if (sizes_.splits > 1) parallel_for(sizes_.tiles(), p_.threads, &merge_task, this);
  }

  // The indices of the rows of a tile.
  struct Box {
    Interval b, h, q;
    explicit Box(const ForwardTile<Plan>& tile) {
      const int64_t q0 = tile.q(0), q1 = tile.q(tile.count - 1);
      const bool one = q0 == q1;
      const int64_t h0 = one ? tile.h(0) : tile.block * tile.interleave;
      const int64_t h1 = one ? tile.h(tile.count - 1) : h0 + tile.interleave - 1;
      b = iv::range(double(tile.b), double(tile.b));
      h = iv::range(double(h0), double(h1));
      q = iv::range(double(q0), double(q1));
    }
  };

  // The runs of kv tiles of one tile of query rows.
  static int64_t runs(const ForwardTile<Plan>& tile, const IntervalEnv& env, int64_t S, ae_run* out,
                      int64_t capacity) {
    const Box box(tile);
    return row_segments<Fn>(env, box.b, box.h, box.q, S, kBlockN, out, capacity);
  }

 private:
  const ae_params& p_;
  const ForwardSizes<Plan> sizes_;
  const ForwardWorkspace<Plan, Fn> at_;
  char* const base_;
  Env env_;
  IntervalEnv interval_env_{};
  DiagonalTables<Fn, Acc> diagonals_;

  // What all tasks read: the tables of the mask, then those of the diagonals.
  static int64_t mask_bytes(const ae_params& p) {
    return round_up(table_bytes(p, Fn::kMaskCaptures), kCacheLine);
  }
  static int64_t shared_bytes(const ae_params& p) {
    return mask_bytes(p) + DiagonalTables<Fn, Acc>::bytes(p);
  }

  // The row states of one tile.
  struct Rows {
    typename Fn::Row row[kBlockM];
    Acc state[kBlockM][kStates];
    Acc factor[kBlockM];
    bool alive[kBlockM];
  };

  static void pack_task(void* self, int64_t index, int32_t) {
    static_cast<Forward*>(self)->pack_ahead(index);
  }
  static void tile_task(void* self, int64_t index, int32_t worker) {
    static_cast<Forward*>(self)->attend(index, worker);
  }
  static void merge_task(void* self, int64_t index, int32_t) {
    static_cast<Forward*>(self)->merge(index);
  }

  // ---- packing ----
  auto q_mod() const {
    if constexpr (Fn::kHasQMod) {
      return [this](V x) { return Fn::q_mod(env_, x); };
    } else {
      return NoMod{};
    }
  }
  auto k_mod() const {
    if constexpr (Fn::kHasKMod) {
      return [this](V x) { return Fn::k_mod(env_, x); };
    } else {
      return NoMod{};
    }
  }
  auto v_mod() const {
    if constexpr (Fn::kHasVMod) {
      return [this](V x) { return Fn::v_mod(env_, x); };
    } else {
      return NoMod{};
    }
  }

  int keys_in(int64_t kv_tile) const {
    const int64_t left = sizes_.S - kv_tile * kBlockN;
    return int(left < kBlockN ? left : kBlockN);
  }

  static StridedRows<Elem> rows_of(const void* data, const int64_t* stride, int64_t b, int64_t h,
                                   int64_t first) {
    return {(const Elem*)data + b * stride[0] + h * stride[1] + first * stride[2], stride[2]};
  }
  __attribute__((noinline)) void pack_k(int64_t b, int64_t h, int64_t kv_tile, M* k) const {
    const int64_t* s = p_.k_stride;
    pack_by_column<Acc, M, kD>(k, rows_of(p_.k, s, b, h, kv_tile * kBlockN), s[3], keys_in(kv_tile),
                               kBlockN, k_mod(), kPackAhead * s[2]);
  }
  // Returns whether the tile holds Inf or NaN.
  __attribute__((noinline)) bool pack_v(int64_t b, int64_t h, int64_t kv_tile, M* v) const {
    const int64_t* s = p_.v_stride;
    return pack_by_row<Acc, M, kDv>(v, rows_of(p_.v, s, b, h, kv_tile * kBlockN), s[3],
                                    keys_in(kv_tile), kBlockN, v_mod(), kPackAhead * s[2]);
  }

  M* packed_k(int64_t tile) const { return (M*)(base_ + at_.k) + tile * Scratch::kKTile; }
  M* packed_v(int64_t tile) const { return (M*)(base_ + at_.v) + tile * Scratch::kVTile; }

  void pack_ahead(int64_t tile) {
    const int64_t head = tile / sizes_.kv_tiles, kv_tile = tile % sizes_.kv_tiles;
    const int64_t b = head / sizes_.Hkv, h = head % sizes_.Hkv;
    pack_k(b, h, kv_tile, packed_k(tile));
    base_[at_.bad + tile] = pack_v(b, h, kv_tile, packed_v(tile));
  }

  // The rows of a tile as A operand: where they lie, when they lie as packed rows would.
  const M* query_rows(const ForwardTile<Plan>& tile, M* scratch) const {
    const int64_t* s = p_.q_stride;
    if constexpr (__is_same(M, Elem) && !Fn::kHasQMod && kD == Scratch::kQPitch) {
      if (sizes_.interleave == 1 && s[3] == 1 && s[2] == kD) {
        return (const M*)p_.q + tile.b * s[0] + tile.h(0) * s[1] + tile.q(0) * s[2];
      }
    }
    pack_q(tile, scratch);
    return scratch;
  }

  void pack_q(const ForwardTile<Plan>& tile, M* q) const {
    const int64_t* s = p_.q_stride;
    for (int i = 0; i < tile.count; ++i) {
      const Elem* row = (const Elem*)p_.q + tile.b * s[0] + tile.h(i) * s[1] + tile.q(i) * s[2];
      pack_row<Acc, M, kD>(q + i * Scratch::kQPitch, row, s[3], q_mod());
    }
  }

  // ---- one tile of rows against its tiles of keys ----
  void attend(int64_t index, int32_t worker) {
    const ForwardTile<Plan> tile(sizes_, index / sizes_.splits);
    const int64_t split = index % sizes_.splits;
    char* scratch = base_ + worker * at_.worker_bytes;
    const M* q = query_rows(tile, (M*)(scratch + Scratch::kQ));
    Acc* out = (Acc*)(scratch + Scratch::kOut);
    ae_run* runs_of_tile = (ae_run*)(scratch + Scratch::kBytes);
    Rows rows;

    if (sizes_.splits > 1) out = partial_out(index);
    start_rows(tile, rows);
    __builtin_memset(out, 0, sizeof(Acc) * uint64_t(tile.count) * kOutPitch);
    const int64_t begin = sizes_.kv_tiles * split / sizes_.splits;
    const int64_t end = sizes_.kv_tiles * (split + 1) / sizes_.splits;
    const int64_t n = runs(tile, interval_env_, sizes_.S, runs_of_tile, sizes_.kv_tiles);
    for (int64_t r = 0; r < n; ++r) {
      const ae_run& run = runs_of_tile[r];
      const int64_t from = run.begin < begin ? begin : run.begin;
      const int64_t to = run.end > end ? end : run.end;
      const bool full = !Fn::kHasMask || run.tile_class == AE_TILE_FULL;
      for (int64_t t = from; t < to; ++t) add_keys(tile, rows, q, t, full, scratch, out);
    }
    if (sizes_.splits > 1) {
      __builtin_memcpy(partial_state(index), rows.state, sizeof(Acc) * Fn::kStates * tile.count);
      __builtin_memcpy(partial_alive(index), rows.alive, uint64_t(tile.count));
    } else {
      for (int i = 0; i < tile.count; ++i) {
        finish_row(tile, i, rows.row[i], rows.state[i], rows.alive[i], out + i * kOutPitch);
      }
    }
  }

  void start_rows(const ForwardTile<Plan>& tile, Rows& rows) const {
    for (int i = 0; i < tile.count; ++i) {
      rows.row[i] = Fn::make_row(env_, tile.b, tile.h(i), tile.q(i));
      Fn::init(env_, rows.row[i], rows.state[i]);
      rows.alive[i] = false;
    }
  }

  // Whether a few rows may read K, or V, where they lie.
  static constexpr bool kDirectK = !Fn::kHasKMod && kD % (L::W * kPair) == 0;
  static constexpr bool kDirectV = !Fn::kHasVMod && kDv % (L::W * kPair) == 0;
  bool direct(const int64_t* stride, int rows) const {
    return !sizes_.pack_ahead && rows <= kDirectRows && stride[3] == 1;
  }

  // The columns of a kv tile in which some key of these rows may be live.
  Columns columns_of(const ForwardTile<Plan>& tile, int64_t kv_tile, int ncols, bool full) const {
    if constexpr (Fn::kHasMask) {
      if (!full) {
        const Box box(tile);
        return live_columns(kv_tile * kBlockN, ncols, kGemmRegs * L::W, [&](Interval k) {
          return Fn::classify(interval_env_, box.b, box.h, box.q, k);
        });
      }
    }
    return {0, ncols};
  }

  void add_keys(const ForwardTile<Plan>& tile, Rows& rows, const M* q, int64_t kv_tile, bool full,
                char* scratch, Acc* out) const {
    const Columns columns = columns_of(tile, kv_tile, keys_in(kv_tile), full);
    const int first = columns.begin, ncols = columns.end - columns.begin;
    if (ncols == 0) return;
    Acc* scores = (Acc*)(scratch + Scratch::kScores) + first;
    M* weights = Plan::kBf16Dot ? (M*)(scratch + Scratch::kWeights) + first : (M*)scores;
    const int64_t packed = tile.kv_head * sizes_.kv_tiles + kv_tile;
    score(tile, q, kv_tile, columns, packed, scratch, scores);
    const int64_t key = kv_tile * kBlockN + first;
    const bool ragged = ncols % L::W != 0;
    const bool live = !full || ragged ? weigh<true>(tile, rows, scores, weights, key, ncols, full)
                                      : weigh<false>(tile, rows, scores, weights, key, ncols, full);
    if (!live) return;
    // Dead keys must not be multiplied, so only a tile without any may be read where it lies.
    if constexpr (kDirectV && !score_can_die<Fn>()) {
      if (full && direct(p_.v_stride, tile.count)) {
        return multiply_direct(tile, key, ncols, rows.factor, weights, out);
      }
    }
    M* v = (M*)(scratch + Scratch::kV);
    bool bad_v;
    if (sizes_.pack_ahead) {
      v = packed_v(packed);
      bad_v = base_[at_.bad + packed];
    } else {
      bad_v = pack_v(tile.kv_b, tile.kv_h, kv_tile, v);
    }
    v += int64_t(first) * kOutPitch;
    if (bad_v && (!full || score_can_die<Fn>())) {
      return multiply_live(tile.count, ncols, rows.factor, weights, v, out);
    }
    const int steps = (ncols + kPair - 1) / kPair;  // the weight that fills a pair is 0
    gemm<Acc, M, kOutPitch, GemmMode::kScale>(tile.count, steps, weights, kBlockN, kPair, v,
                                              kOutPitch, out, kOutPitch, rows.factor);
  }

  // Raw dot products of the rows with some columns of one tile of keys; `scores` is the first.
  void score(const ForwardTile<Plan>& tile, const M* q, int64_t kv_tile, Columns columns,
             int64_t packed, char* scratch, Acc* scores) const {
    const int ncols = columns.end - columns.begin;
    if constexpr (kDirectK) {
      if (direct(p_.k_stride, tile.count)) {
        return score_direct(tile, kv_tile * kBlockN + columns.begin, ncols, q, scores);
      }
    }
    M* k = sizes_.pack_ahead ? packed_k(packed) : (M*)(scratch + Scratch::kK);
    if (!sizes_.pack_ahead) pack_k(tile.kv_b, tile.kv_h, kv_tile, k);
    gemm<Acc, M, kBlockN, GemmMode::kOverwrite>(
        tile.count, (kD + kPair - 1) / kPair, q, Scratch::kQPitch, kPair,
        k + int64_t(columns.begin) * kPair, kBlockN, scores, kBlockN, nullptr, ncols);
  }

  // The same from K as it lies. Keys beyond the last whole vector are copied, so that nothing past
  // the end is read.
  void score_direct(const ForwardTile<Plan>& tile, int64_t key, int ncols, const M* q,
                    Acc* scores) const {
    const int64_t row = p_.k_stride[2];
    const Elem* k = rows_of(p_.k, p_.k_stride, tile.kv_b, tile.kv_h, key).base;
    const int whole = ncols / L::W * L::W;
    direct_scores<Acc, M, kD>(tile.count, q, Scratch::kQPitch, k, row, whole, scores, kBlockN,
                              kDirectAhead * row);
    if (whole == ncols) return;
    Elem rest[L::W * kD] = {};
    for (int j = whole; j < ncols; ++j) {
      __builtin_memcpy(rest + (j - whole) * kD, k + j * row, sizeof(Elem) * kD);
    }
    direct_scores<Acc, M, kD>(tile.count, q, Scratch::kQPitch, rest, kD, L::W, scores + whole,
                              kBlockN, 0);
  }

  // O = O * factor + W V from V as it lies; an odd last row is paired with zeros.
  void multiply_direct(const ForwardTile<Plan>& tile, int64_t key, int ncols, const Acc* factor,
                       const M* weights, Acc* out) const {
    using B = typename NaturalLoader<M, Elem, kDirectAhead>::type;
    const int64_t row = p_.v_stride[2];
    const Elem* v = rows_of(p_.v, p_.v_stride, tile.kv_b, tile.kv_h, key).base;
    const int whole = ncols / kPair * kPair;
    gemm<Acc, M, kOutPitch, GemmMode::kScale, B>(tile.count, whole / kPair, weights, kBlockN, kPair,
                                                 v, row, out, kOutPitch, factor);
    if (whole == ncols) return;
    Elem rest[kPair * kOutPitch] = {};
    __builtin_memcpy(rest, v + whole * row, sizeof(Elem) * kDv);
    gemm<Acc, M, kOutPitch, GemmMode::kAccumulate, B>(tile.count, 1, weights + whole, kBlockN,
                                                      kPair, rest, kOutPitch, out, kOutPitch);
  }

  // Scores to weights, row by row. Returns whether any row has a live key in this tile.
  template <bool kPartial>
  __attribute__((noinline)) bool weigh(const ForwardTile<Plan>& tile, Rows& rows, Acc* scores,
                                       M* weights, int64_t key, int ncols, bool full) const {
    bool any = false;
    const Acc scale = Acc(p_.scale);
    for (int i = 0; i < tile.count; ++i) {
      Acc* s = scores + int64_t(i) * kBlockN;
      Acc factor = 1;
      M* w = Plan::kBf16Dot ? weights + int64_t(i) * kBlockN : (M*)s;
      const bool live = Fn::template tile_row<kPartial>(env_, rows.row[i], scale, s, w,
                                                        rows.state[i], factor, key, ncols, full);
      rows.factor[i] = factor;
      rows.alive[i] |= live;
      any |= live;
    }
    return any;
  }

  // O = O * factor + W V over the keys whose weight is not 0: V may hold Inf or NaN at dead keys.
  __attribute__((noinline)) void multiply_live(int count, int keys, const Acc* factor,
                                               const M* weights, const M* v, Acc* out) const {
    for (int i = 0; i < count; ++i) {
      Acc* o = out + int64_t(i) * kOutPitch;
      for (int d = 0; d < kOutPitch; ++d) o[d] *= factor[i];
      for (int j = 0; j < keys; ++j) {
        const Acc w = widen<Acc>(weights[int64_t(i) * kBlockN + j]);
        if (w == 0) continue;
        const M* row = v + int64_t(j / kPair) * kPair * kOutPitch + j % kPair;
        for (int d = 0; d < kOutPitch; ++d) o[d] += w * widen<Acc>(row[d * kPair]);
      }
    }
  }

  // ---- results ----
  Acc* partial_out(int64_t index) const {
    return (Acc*)(base_ + at_.out) + index * kBlockM * kOutPitch;
  }
  Acc* partial_state(int64_t index) const {
    return (Acc*)(base_ + at_.state) + index * kBlockM * Fn::kStates;
  }
  bool* partial_alive(int64_t index) const { return (bool*)(base_ + at_.alive) + index * kBlockM; }

  // Merges the chunks of one row tile in index order; a chunk without live key is absent.
  void merge(int64_t index) {
    if constexpr (kCanSplit) {
      const ForwardTile<Plan> tile(sizes_, index);
      const int64_t first = index * sizes_.splits;
      for (int i = 0; i < tile.count; ++i) {
        const auto row = Fn::make_row(env_, tile.b, tile.h(i), tile.q(i));
        Acc state[kStates];
        Acc* out = nullptr;
        for (int64_t part = first; part < first + sizes_.splits; ++part) {
          if (!partial_alive(part)[i]) continue;
          const Acc* other = partial_state(part) + i * Fn::kStates;
          Acc* other_out = partial_out(part) + i * kOutPitch;
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
        finish_row(tile, i, row, state, out != nullptr, out);
      }
    }
  }

  // Writes one output row and its statistics; a row that never met a live key is 0.
  void finish_row(const ForwardTile<Plan>& tile, int i, const typename Fn::Row& row,
                  const Acc* state, bool alive, const Acc* acc) const {
    constexpr int W = L::W;
    const int64_t q = tile.q(i), h = tile.h(i), *s = p_.out_stride;
    Acc stats[Fn::kStats > 0 ? Fn::kStats : 1];
    Acc factor = 1;
    Fn::finalize(env_, row, state, factor, p_.stats != nullptr ? stats : nullptr);
    Elem* out = (Elem*)p_.out + tile.b * s[0] + h * s[1] + q * s[2];
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
    Acc* to = (Acc*)p_.stats + tile.b * step[1] + h * step[2] + q;
    for (int n = 0; n < Fn::kStats; ++n) to[n * step[0]] = stats[n];
  }
};

}  // namespace ae
