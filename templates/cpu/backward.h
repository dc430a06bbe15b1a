// Backward attention on the CPU: dQ, dK, dV and the gradients of captured tensors, from Q, K, V, O,
// dO and the row statistics that the forward pass saved. Scores are recomputed tile by tile and
// never leave the caches.
//
// A generated unit defines Plan (every decision) and Fn (the traced functors), then
// AE_EXPORT_BACKWARD(Plan, Fn). One wave = BackwardCut::heads pairs (batch, kv head), each with the
// query rows of its whole group. Per wave:
//   pack    operands in the layouts of gemm.h; row scalars r = begin(stats, dstats, rowsum(dO * O))
//   passes  kPasses sweeps of every row tile over its keys, which complete r
//   rows    gradients of captured tensors that a row contributes once (kHasRowGrads)
//   main    per row tile x KV tile: S = Q K^T, dP = dO V^T, Fn::tile_row turns them into the
//   weights
//           W and dS, then dV += W^T dO, dK += dS^T Q, dQ += dS K
//   store   accumulators, through the operand mods, into dq, dk, dv
// Deterministic: every accumulator element receives its terms in an order that depends on sizes
// only. The cut and the memory are in backward_work.h, the views of both in backward_launch.h, pack
// and store in backward_operands.h, what happens to single rows in backward_tile.h.
//
// AE_EXPORT_BACKWARD_EITHER has a second struct of functors, with fewer passes, for launches in
// which the statistics have no gradient.
#pragma once
#include "cpu/backward_operands.h"
#include "cpu/gemm.h"
#include "cpu/module.h"

namespace ae {

template <class Plan, class Fn>
class Backward {
  using Launch = BackwardLaunch<Plan, Fn>;
  using E = typename Launch::E;
  using A = typename Launch::A;
  using M = typename Launch::M;
  using Head = typename Launch::Head;
  using KeyTile = typename Launch::KeyTile;
  using Scratch = typename Launch::Scratch;
  using Grads = typename Launch::Grads;
  static constexpr int kM = Launch::kM, kN = Launch::kN, kPair = Launch::kPair;
  static constexpr int kD = Launch::kD, kDv = Launch::kDv;

  static_assert(!Plan::kBf16Dot || (kHasBf16Dot && std::is_same_v<A, float>),
                "bf16 products need AVX512_BF16 and float sums");
  static_assert(kM % 2 == 0, "kBlockM: rows are rounded in pairs");
  static_assert(kN % (2 * Lanes<A>::W) == 0, "kBlockN: keys come in pairs of vectors");
  static_assert(Plan::kScratchBytes == backward_scratch_bytes<Plan>(),
                "the plan's scratch formula");

 public:
  explicit Backward(const ae_params& params) : x_(params) {}

  int64_t workspace_bytes() const { return x_.workspace_bytes(); }

  void run(void* workspace, ae_parallel_for parallel_for) {
    const BackwardOperands<Plan, Fn> operands(x_);
    x_.for_waves(workspace, parallel_for, [&] {
      operands.pack();
      passes<0>();
      if constexpr (Fn::kHasRowGrads) row_grads();
      for (int64_t phase = 0; phase < x_.cut.phases(); ++phase) main_phase(phase);
      operands.store();
    });
  }

 private:
  // ---- passes: row tiles are independent of each other ----
  template <int P>
  void passes() const {
    if constexpr (P < Fn::kPasses) {
      x_.parallel(x_.wave * x_.sizes.row_tiles, [this](int64_t i, int32_t worker) {
        const int64_t tiles = x_.sizes.row_tiles;
        pass<P>(x_.head(i / tiles), i % tiles, x_.scratch(worker));
      });
      passes<P + 1>();
    }
  }

  template <int P>
  void pass(const Head& h, int64_t t, const Scratch& scratch) const {
    constexpr int kAccs = Fn::kPassAccs[P] > 0 ? Fn::kPassAccs[P] : 1;
    const RowTile<Plan> tile(x_.sizes, t);
    const A scale = A(x_.p.scale);
    A acc[kM][kAccs];
    for (int i = 0; i < tile.count; ++i) Fn::template begin_pass<P>(acc[i]);
    x_.for_keys_of(h, t, [&](int64_t j, bool mask_full) {
      const KeyTile keys = x_.key_tile(j);
      scores(h, t, tile.count, keys, scratch);
      if constexpr (Fn::kPassNeedsDP[P]) weight_gradients(h, t, tile.count, keys, scratch);
      const bool full = mask_full && keys.count == kN;
      for (int i = 0; i < tile.count; ++i) {
        const auto row = x_.row(h, tile, i);
        const A* r = x_.scalars(h, t, i);
        A *s = scratch.s + i * kN, *dp = scratch.dp + i * kN;
        if (full) {
          Fn::template pass_row<P, false>(x_.env(), row, scale, s, dp, r, acc[i], keys.first, kN,
                                          true);
        } else {
          Fn::template pass_row<P, true>(x_.env(), row, scale, s, dp, r, acc[i], keys.first,
                                         keys.count, mask_full);
        }
      }
    });
    for (int i = 0; i < tile.count; ++i) {
      Fn::template end_pass<P>(x_.env(), x_.row(h, tile, i), acc[i], x_.scalars(h, t, i));
    }
  }

  // ---- rows ----
  void row_grads() const {
    x_.parallel(x_.wave * x_.cut.n, [this](int64_t task, int32_t) {
      const Head h = x_.head(task / x_.cut.n);
      const Grads grads = x_.grads(task);
      const TileRange tiles = chunk_of(x_.sizes.row_tiles, x_.cut.n, task % x_.cut.n);
      for (int64_t t = tiles.begin; t < tiles.end; ++t) {
        const RowTile<Plan> tile(x_.sizes, t);
        for (int i = 0; i < tile.count; ++i) {
          Fn::row_grads(x_.env(), x_.row(h, tile, i), x_.scalars(h, t, i), grads.at);
        }
      }
    });
  }

  // ---- main: task i of a head is KV chunk i, or row chunk i when there is one KV chunk ----
  void main_phase(int64_t phase) const {
    x_.parallel(x_.wave * x_.cut.n, [this, phase](int64_t task, int32_t worker) {
      const BackwardCut& cut = x_.cut;
      const int64_t i = task % cut.n;
      Head h = x_.head(task / cut.n);
      int64_t kv_chunk = i, row_chunk = 0;
      switch (cut.grid) {
        case BackwardGrid::kCyclic:
          row_chunk = (i + phase) % cut.n;
          break;
        case BackwardGrid::kPrivateDq:
          h.dq += i * x_.sizes.padded_rows() * kD;
          break;
        case BackwardGrid::kPrivateDkv:
          kv_chunk = 0;
          row_chunk = i;
          h.dk += i * x_.sizes.padded_keys() * kD;
          h.dv += i * x_.sizes.padded_keys() * kDv;
          break;
      }
      const Grads grads = x_.grads(task);
      const Scratch scratch = x_.scratch(worker);
      const TileRange tiles = chunk_of(x_.sizes.kv_tiles, cut.kv_chunks(), kv_chunk);
      const TileRange rows = chunk_of(x_.sizes.row_tiles, cut.row_chunks(), row_chunk);
      for (int64_t j = tiles.begin; j < tiles.end; ++j) {
        const KeyTile keys = x_.key_tile(j);
        x_.for_rows_of(h, keys, rows, [&](int64_t t, bool mask_full) {
          tile(h, t, keys, mask_full, grads, scratch);
        });
      }
    });
  }

  void tile(const Head& h, int64_t t, const KeyTile& whole, bool mask_full, const Grads& grads,
            const Scratch& scratch) const {
    const RowTile<Plan> tile(x_.sizes, t);
    const KeyTile keys = mask_full ? whole : x_.live_part(h, t, whole);
    if (keys.count == 0) return;
    scores(h, t, tile.count, keys, scratch);
    weight_gradients(h, t, tile.count, keys, scratch);

    const A scale = A(x_.p.scale);
    const bool full = mask_full && keys.count == kN;
    for (int i = 0; i < tile.count; ++i) {
      const auto row = x_.row(h, tile, i);
      const A* r = x_.scalars(h, t, i);
      A *s = scratch.s + i * kN, *dp = scratch.dp + i * kN;
      if (full) {
        Fn::template tile_row<false>(x_.env(), row, scale, r, s, dp, grads.at, keys.first, kN,
                                     true);
      } else {
        Fn::template tile_row<true>(x_.env(), row, scale, r, s, dp, grads.at, keys.first,
                                    keys.count, mask_full);
      }
      if constexpr (Plan::kBf16Dot) {
        round_rows(i, tile.count, int(round_up(keys.count, 32)), scratch);
      }
    }
    add_products(h, t, tile.count, keys, !full || score_can_die<Fn>(), scratch);
  }

  // S = Q K^T and dP = dO V^T of a tile.
  void scores(const Head& h, int64_t t, int rows, const KeyTile& keys,
              const Scratch& scratch) const {
    constexpr int kSteps = (Plan::kD + kPair - 1) / kPair;
    gemm<A, M, kN, GemmMode::kOverwrite>(
        rows, kSteps, h.q + t * kM * kD, kD, kPair,
        h.k_by_column + keys.index * Launch::kKColumns + keys.offset * kPair, kN, scratch.s, kN,
        nullptr, keys.count);
  }
  void weight_gradients(const Head& h, int64_t t, int rows, const KeyTile& keys,
                        const Scratch& scratch) const {
    constexpr int kSteps = (Plan::kDv + kPair - 1) / kPair;
    gemm<A, M, kN, GemmMode::kOverwrite>(
        rows, kSteps, h.dout + t * kM * kDv, kDv, kPair,
        h.v_by_column + keys.index * Launch::kVColumns + keys.offset * kPair, kN, scratch.dp, kN,
        nullptr, keys.count);
  }

  // Row i of `rows` is ready. Rounds it to bf16 while it is in the first cache: dS as it lies, and
  // each pair of rows interleaved. An odd last row is paired with zeros.
  static void round_rows(int i, int rows, int columns, const Scratch& scratch) {
    round_row(scratch.dp + i * kN, scratch.ds + i * kN, columns);
    if (i % 2 == 0 && i + 1 < rows) return;
    const int even = i & ~1;
    A *s = scratch.s + even * kN, *dp = scratch.dp + even * kN;
    if (i == even) {
      __builtin_memset(s + kN, 0, columns * sizeof(A));
      __builtin_memset(dp + kN, 0, columns * sizeof(A));
    }
    interleave_rows(s, s + kN, scratch.w_pairs + even * kN, columns);
    interleave_rows(dp, dp + kN, scratch.ds_pairs + even * kN, columns);
  }

  // dV += W^T dO, dK += dS^T Q, dQ += dS K. The weight of a dead pair is exactly zero, but zero
  // times a stored Inf or NaN is not: a tile with dead pairs and such values takes the slow
  // product.
  void add_products(const Head& h, int64_t t, int rows, const KeyTile& keys, bool dead_pairs,
                    const Scratch& x) const {
    constexpr GemmMode kAdd = GemmMode::kAccumulate;
    const int row_steps = (rows + kPair - 1) / kPair, key_steps = (keys.count + kPair - 1) / kPair;
    const M *q = h.q_by_row + t * kM * kD, *dout = h.dout_by_row + t * kM * kDv;
    const int64_t key = keys.index * kN + keys.offset;
    const M* k = h.k_by_row + key * kD;
    A *dq = h.dq + t * kM * kD, *dk = h.dk + key * kD, *dv = h.dv + key * kDv;
    if (dead_pairs && h.dout_bad[t]) {
      multiply_nonzero<A, M, kDv>(keys.count, rows, x.s, 1, kN, dout, dv);
    } else {
      gemm<A, M, kDv, kAdd>(keys.count, row_steps, x.w_pairs, kPair, kPair * kN, dout, kDv, dv,
                            kDv);
    }
    if (dead_pairs && h.q_bad[t]) {
      multiply_nonzero<A, M, kD>(keys.count, rows, x.dp, 1, kN, q, dk);
    } else {
      gemm<A, M, kD, kAdd>(keys.count, row_steps, x.ds_pairs, kPair, kPair * kN, q, kD, dk, kD);
    }
    if (dead_pairs && h.k_bad[keys.index]) {
      multiply_nonzero<A, M, kD>(rows, keys.count, x.dp, kN, 1, k, dq);
    } else {
      gemm<A, M, kD, kAdd>(rows, key_steps, x.ds, kN, kPair, k, kD, dq, kD);
    }
  }

  Launch x_;
};

template <class Plan, class Fn>
const ae_module_info* backward_info() {
  static constexpr ae_module_info info = {
      AE_ABI_VERSION, sizeof(ae_params), AE_BACKWARD,   dtype_of<typename Plan::Elem>(),
      Plan::kD,       Plan::kDv,         Fn::kCaptures, Fn::kUserStats,
      Fn::kStats,     Fn::kGradMask,     kIsa,          Plan::kKey};
  return &info;
}

template <class Plan, class Fn>
int32_t backward_launch(const ae_params* p, void* workspace, ae_parallel_for parallel_for) {
  if (!same_abi(*p)) return kWrongAbi;
  for (int i = 0; i < Fn::kCaptures; ++i) {
    const ae_capture& c = p->captures[i];
    if ((Fn::kGradMask >> i & 1) && c.grad == nullptr && capture_elements(c) > 0) {
      return kMissingGrad;
    }
  }
  Backward<Plan, Fn>(*p).run(workspace, parallel_for);
  return kLaunched;
}

}  // namespace ae

#define AE_EXPORT_BACKWARD(Plan, Fn)                                                               \
  AE_EXPORT const ae_module_info* ae_info(void) { return ae::backward_info<Plan, Fn>(); }          \
  AE_EXPORT int64_t ae_workspace_bytes(const ae_params* p) {                                       \
    return ae::Backward<Plan, Fn>(*p).workspace_bytes();                                           \
  }                                                                                                \
  AE_EXPORT int32_t ae_launch(const ae_params* p, void* workspace, ae_parallel_for parallel_for) { \
    return ae::backward_launch<Plan, Fn>(p, workspace, parallel_for);                              \
  }

// The same with functors `Quiet` that need fewer passes and serve launches without dstats.
#define AE_EXPORT_BACKWARD_EITHER(Plan, Fn, Quiet)                                                 \
  AE_EXPORT const ae_module_info* ae_info(void) { return ae::backward_info<Plan, Fn>(); }          \
  AE_EXPORT int64_t ae_workspace_bytes(const ae_params* p) {                                       \
    return p->dstats == nullptr ? ae::Backward<Plan, Quiet>(*p).workspace_bytes()                  \
                                : ae::Backward<Plan, Fn>(*p).workspace_bytes();                    \
  }                                                                                                \
  AE_EXPORT int32_t ae_launch(const ae_params* p, void* workspace, ae_parallel_for parallel_for) { \
    return p->dstats == nullptr ? ae::backward_launch<Plan, Quiet>(p, workspace, parallel_for)     \
                                : ae::backward_launch<Plan, Fn>(p, workspace, parallel_for);       \
  }
