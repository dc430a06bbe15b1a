// One backward launch: its parameters, cut and workspace, and the views that the steps of a wave
// take of them (a head, a tile, a worker's scratch, the accumulators of captured gradients).
#pragma once
#include <type_traits>
#include <utility>

#include "common/env.h"
#include "common/segments.h"
#include "cpu/backward_work.h"
#include "cpu/diagonal.h"
#include "cpu/gemm.h"

namespace ae {

// Calls body(mod) with the operand mod, or with NoMod when there is none.
template <bool kHasMod, class Mod, class Body>
AE_INLINE void with_mod(const Mod& mod, const Body& body) {
  if constexpr (kHasMod) {
    body(mod);
  } else {
    body(NoMod{});
  }
}

template <class Plan, class Fn>
class BackwardLaunch {
 public:
  using E = typename Plan::Elem;
  using A = typename Plan::Acc;
  using M = std::conditional_t<Plan::kBf16Dot, bf16, A>;  // what is multiplied
  static constexpr int kM = Plan::kBlockM, kN = Plan::kBlockN;
  static constexpr int kPair = Plan::kBf16Dot ? 2 : 1;
  static constexpr int kD = row_pitch<A>(Plan::kD), kDv = row_pitch<A>(Plan::kDv);
  static constexpr int64_t kKColumns = by_column_elements<A, M>(kN, Plan::kD);
  static constexpr int64_t kVColumns = by_column_elements<A, M>(kN, Plan::kDv);

  // One (batch, kv head) of the wave with its part of the workspace.
  struct Head {
    int64_t b, kv;
    M *q, *q_by_row, *dout, *dout_by_row, *k_by_row, *k_by_column, *v_by_column;
    A *dq, *dk, *dv, *scalars;
    uint8_t *q_bad, *dout_bad, *k_bad;
  };
  // A KV tile: keys [first, first + count).
  struct KeyTile {
    int64_t index, first;
    int count;
    int offset = 0;  // columns of the packed tile before `first`
  };
  struct Scratch {
    A *s, *dp;
    M *w_pairs, *ds_pairs, *ds;  // W^T, dS^T and dS as A operands
  };
  // Where a task adds the gradients of captured tensors, null for those without; then its sums
  // along diagonals.
  static constexpr int kCaptures = Fn::kCaptures, kSums = diagonal_sums<Fn>();
  struct Grads {
    A* at[kCaptures + kSums > 0 ? kCaptures + kSums : 1] = {};
  };

  explicit BackwardLaunch(const ae_params& params)
      : p(params),
        sizes(p),
        decision(p, sizes),
        memory_(p, sizes, decision),
        sums_(p, sizes.group, cut.slots()) {}

  int64_t workspace_bytes() const { return kAlign + sums_at() + sums_.bytes(); }

  // Runs body() for every wave, between clearing and merging the private gradient copies.
  template <class Body>
  void for_waves(void* workspace, ae_parallel_for parallel_for, const Body& body) {
    parallel_for_ = parallel_for;
    const uint64_t address = reinterpret_cast<uint64_t>(workspace);
    base_ = static_cast<char*>(workspace) + (kAlign - address % kAlign) % kAlign;
    intervals_ = build_tables(p, Fn::kMaskCaptures, base_ + memory_.total, parallel_for);
    diagonals_.build(p, intervals_, base_ + diagonals_at(), parallel_for);
    clear_private_grads();
    for (first_head_ = 0; first_head_ < sizes.heads; first_head_ += cut.heads) {
      wave = sizes.heads - first_head_ < cut.heads ? sizes.heads - first_head_ : cut.heads;
      sums_.clear(base_ + sums_at(), all());
      body();
      scatter_sums();
    }
    merge_private_grads();
  }

  // task(index, worker) for every index in [0, n).
  template <class Task>
  void parallel(int64_t n, Task task) const {
    if (n <= 0) return;
    parallel_for_(
        n, p.threads,
        [](void* arg, int64_t i, int32_t worker) { (*static_cast<Task*>(arg))(i, worker); }, &task);
  }

  Env env() const {
    return {p.captures,
            p.fault,
            p.S,
            diagonals_.tables(),
            {sizes.group, diagonal_pitch<A>(p), last_query(p)}};
  }

  Head head(int64_t slot) const {
    const BackwardHeadMemory<Plan, Fn>& m = memory_.head;
    char* base = base_ + slot * m.bytes;
    const auto mul = [&](int64_t offset) { return reinterpret_cast<M*>(base + offset); };
    const auto acc = [&](int64_t offset) { return reinterpret_cast<A*>(base + offset); };
    const auto flags = [&](int64_t offset) { return reinterpret_cast<uint8_t*>(base + offset); };
    const int64_t index = first_head_ + slot;
    return {index / p.Hkv,      index % p.Hkv,      mul(m.q),          mul(m.q_by_row),
            mul(m.dout),        mul(m.dout_by_row), mul(m.k_by_row),   mul(m.k_by_column),
            mul(m.v_by_column), acc(m.dq),          acc(m.dk),         acc(m.dv),
            acc(m.scalars),     flags(m.q_bad),     flags(m.dout_bad), flags(m.k_bad)};
  }

  KeyTile key_tile(int64_t index) const {
    const int64_t first = index * kN, left = p.S - first;
    return {index, first, int(left < kN ? left : kN)};
  }

  Scratch scratch(int32_t worker) const {
    constexpr int64_t kTile = int64_t(kM) * kN;
    char* at = base_ + memory_.scratch + worker * round_up(backward_scratch_bytes<Plan>(), 64);
    A *s = reinterpret_cast<A*>(at), *dp = s + kTile;
    if constexpr (Plan::kBf16Dot) {
      M* pairs = reinterpret_cast<M*>(dp + kTile);
      return {s, dp, pairs, pairs + kTile, pairs + 2 * kTile};
    } else {
      return {s, dp, s, dp, dp};  // unrounded: the tiles themselves, read by columns or by rows
    }
  }

  // Slot = index of the task among those that run at the same time.
  Grads grads(int64_t slot) const {
    Grads g;
    for (int i = 0; i < Fn::kCaptures; ++i) {
      if (!(Fn::kGradMask >> i & 1)) continue;
      g.at[i] = static_cast<A*>(p.captures[i].grad);
      if (is_private(i)) {
        const int64_t copy = decision.owners(i).copy_of(slot, cut);
        g.at[i] = private_grad(i) + copy * capture_elements(p.captures[i]);
      }
    }
    for (int i = 0; i < kSums; ++i) g.at[kCaptures + i] = sums_.at(base_ + sums_at(), i, slot);
    return g;
  }

  int64_t query_head(const Head& h, const RowTile<Plan>& tile, int i) const {
    return h.kv * sizes.group + tile.head_of_group(i);
  }
  // What the user's functions see as b and as the queries of the tiles low..high.
  int64_t sequence(const Head& h) const { return p.b_first + h.b; }
  Interval queries(const RowTile<Plan>& low, const RowTile<Plan>& high) const {
    return iv::range(double(p.q_first + low.q(0)), double(p.q_first + high.q(high.count - 1)));
  }
  typename Fn::Row row(const Head& h, const RowTile<Plan>& tile, int i) const {
    return Fn::make_row(env(), sequence(h), query_head(h, tile, i), p.q_first + tile.q(i));
  }
  A* scalars(const Head& h, int64_t t, int i) const {
    return h.scalars + (t * kM + i) * Fn::kRowScalars;
  }
  // Offset of element 0 of row i of a tile.
  int64_t query_offset(const int64_t (&stride)[4], const Head& h, const RowTile<Plan>& tile,
                       int i) const {
    return h.b * stride[0] + query_head(h, tile, i) * stride[1] + tile.q(i) * stride[2];
  }
  int64_t key_offset(const int64_t (&stride)[4], const Head& h, const KeyTile& tile, int i) const {
    return h.b * stride[0] + h.kv * stride[1] + (tile.first + i) * stride[2];
  }

  // body(kv tile, mask_full) for the tiles that row tile t meets, in order.
  template <class Body>
  void for_keys_of(const Head& h, int64_t t, const Body& body) const {
    const RowTile<Plan> tile(sizes, t);
    const Interval q = queries(tile, tile);
    for_runs({0, sizes.kv_tiles}, body, [&](int64_t first, int64_t last) {
      return Fn::classify(intervals_, iv::constant(double(sequence(h))), heads_of(h, tile, tile), q,
                          tile_keys(first, last, p.S, kN));
    });
  }

  // A KV tile without the panels at its ends that the mask empties for row tile t.
  KeyTile live_part(const Head& h, int64_t t, KeyTile keys) const {
    if constexpr (Fn::kHasMask) {
      const RowTile<Plan> tile(sizes, t);
      const Interval q = queries(tile, tile);
      const Columns c =
          live_columns(keys.first, keys.count, kGemmRegs * Lanes<A>::W, [&](Interval k) {
            return Fn::classify(intervals_, iv::constant(double(sequence(h))),
                                heads_of(h, tile, tile), q, k);
          });
      keys.first += c.begin;
      keys.offset = c.begin;
      keys.count = c.end - c.begin;
    }
    return keys;
  }

  // body(row tile, mask_full) for the row tiles of `rows` that meet a KV tile, in order.
  template <class Body>
  void for_rows_of(const Head& h, const KeyTile& keys, TileRange rows, const Body& body) const {
    const Interval k = tile_keys(keys.index, keys.index, p.S, kN);
    while (rows.begin < rows.end) {  // one part after the other
      const int64_t part = rows.begin / sizes.part_tiles, part_end = (part + 1) * sizes.part_tiles;
      const TileRange here = {rows.begin, rows.end < part_end ? rows.end : part_end};
      for_runs(here, body, [&](int64_t first, int64_t last) {
        const RowTile<Plan> low(sizes, first), high(sizes, last);
        const Interval q = queries(low, high);
        return Fn::classify(intervals_, iv::constant(double(sequence(h))), heads_of(h, low, high),
                            q, k);
      });
      rows.begin = here.end;
    }
  }

  const ae_params& p;
  const BackwardSizes<Plan> sizes;
  const BackwardDecision<Plan, Fn> decision;
  const BackwardCut cut = decision.cut;
  int64_t wave = 0;  // heads of the current wave

 private:
  static constexpr uint64_t kAlign = 64;

  // The query heads of the row tiles low..high of one part.
  Interval heads_of(const Head& h, const RowTile<Plan>& low, const RowTile<Plan>& high) const {
    int64_t first = low.part, last = low.part + sizes.interleave - 1;
    if (low.q(0) == high.q(high.count - 1)) {
      first = low.head_of_group(0);
      last = high.head_of_group(high.count - 1);
    }
    const int64_t base = h.kv * sizes.group;
    return iv::range(double(base + first), double(base + last));
  }

  // Runs are found for a block of tiles at a time, so that their list is small and never overflows.
  template <class Body, class Classify>
  void for_runs(TileRange tiles, const Body& body, const Classify& classify) const {
    constexpr int64_t kBlock = 256;
    ae_run runs[kBlock];
    for (int64_t base = tiles.begin; base < tiles.end; base += kBlock) {
      const int64_t n = tiles.end - base < kBlock ? tiles.end - base : kBlock;
      const auto mask = [&](int64_t first, int64_t last) {
        if constexpr (!Fn::kHasMask) return iv::boolean(true);
        return classify(base + first, base + last);
      };
      const int64_t count = segments(n, mask, runs, kBlock);
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t i = runs[r].begin; i < runs[r].end; ++i) {
          body(base + i, runs[r].tile_class == AE_TILE_FULL);
        }
      }
    }
  }

  // ---- private copies of captured gradients ----
  bool is_private(int i) const { return decision.private_grads >> i & 1; }
  A* private_grad(int i) const { return reinterpret_cast<A*>(base_ + memory_.grads[i]); }

  void clear_private_grads() const {
    for (int i = 0; i < Fn::kCaptures; ++i) {
      if (!is_private(i)) continue;
      const int64_t n = capture_elements(p.captures[i]);
      parallel(decision.owners(i).copies(cut), [this, i, n](int64_t copy, int32_t) {
        __builtin_memset(private_grad(i) + copy * n, 0, uint64_t(n) * sizeof(A));
      });
    }
  }

  void merge_private_grads() const {
    constexpr int64_t kBlock = 4096;  // elements of one task
    for (int i = 0; i < Fn::kCaptures; ++i) {
      if (!is_private(i)) continue;
      const int64_t n = capture_elements(p.captures[i]), copies = decision.owners(i).copies(cut);
      parallel((n + kBlock - 1) / kBlock, [this, i, n, copies](int64_t block, int32_t) {
        const int64_t end = (block + 1) * kBlock < n ? (block + 1) * kBlock : n;
        A* sum = static_cast<A*>(p.captures[i].grad);
        for (int64_t c = 0; c < copies; ++c) {
          const A* copy = private_grad(i) + c * n;
          for (int64_t e = block * kBlock; e < end; ++e) sum[e] += copy[e];
        }
      });
    }
  }

  // ---- diagonals ----
  // Behind the planned memory: tables of the mask, of the diagonals, sums along diagonals.
  int64_t diagonals_at() const {
    return memory_.total + round_up(table_bytes(p, Fn::kMaskCaptures), int64_t(kAlign));
  }
  int64_t sums_at() const { return diagonals_at() + DiagonalTables<Fn, A>::bytes(p); }

  // `parallel` as a value.
  auto all() const {
    return [this](int64_t n, auto task) { parallel(n, task); };
  }

  // The total of a wave goes to the gradients themselves: no task runs.
  void scatter_sums() const {
    if constexpr (kSums > 0) {
      A* grads[kCaptures] = {};
      for (int i = 0; i < kCaptures; ++i) grads[i] = static_cast<A*>(p.captures[i].grad);
      sums_.scatter(base_ + sums_at(), env(), p, wave, cut.n, grads, all(), [this](int64_t slot) {
        const int64_t index = first_head_ + slot;
        return std::pair{p.b_first + index / p.Hkv, index % p.Hkv * sizes.group};
      });
    }
  }

  const BackwardMemory<Plan, Fn> memory_;
  const DiagonalSums<Fn, A> sums_;
  DiagonalTables<Fn, A> diagonals_;
  ae_parallel_for parallel_for_ = nullptr;
  char* base_ = nullptr;
  int64_t first_head_ = 0;
  IntervalEnv intervals_ = {};
};

}  // namespace ae
