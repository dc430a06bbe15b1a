// How the backward pass of one launch is cut and where its memory lies: sizes only, no arithmetic
// on data. Everything here depends on the tensor sizes and Plan::kVirtualWorkers, never on the
// threads, so that the order of every sum, and with it every bit of the result, is fixed.
#pragma once
#include "cpu/pack.h"

namespace ae {

// What is known of the gradient of one captured tensor. owned_x: every scatter into it uses index x
// plainly, so tasks with different x never touch the same element.
struct GradInfo {
  bool needs, owned_b, owned_h, owned_q, owned_k;
};

// Bytes that all private copies of captured gradients may take together; beyond it the tasks that
// would collide run one after the other.
constexpr int64_t kPrivateGradBytes = int64_t(64) << 20;

// Chunks have at least this many tiles when there is a choice: operands stay in the second cache
// while they are used, yet the workspace of the heads in flight stays small.
constexpr int64_t kChunkTiles = 4;

// The tiles of one (batch, kv head). The query rows of the whole group belong to it, cut into
// `parts`: one part with rows (q, head of the group) interleaved, or one part per head of the
// group.
template <class Plan>
struct BackwardSizes {
  int64_t B, Hq, Hkv, L, S, heads;
  int64_t group, interleave, parts, part_rows, part_tiles, row_tiles, kv_tiles;

  explicit BackwardSizes(const ae_params& p)
      : B(p.B), Hq(p.Hq), Hkv(p.Hkv), L(p.L), S(p.S), heads(p.B * p.Hkv) {
    group = Hkv > 0 ? Hq / Hkv : 0;
    interleave = Plan::kPackGroup ? group : 1;
    parts = Plan::kPackGroup ? 1 : group;
    part_rows = L * interleave;
    part_tiles = (part_rows + Plan::kBlockM - 1) / Plan::kBlockM;
    row_tiles = parts * part_tiles;
    kv_tiles = (S + Plan::kBlockN - 1) / Plan::kBlockN;
  }
  int64_t padded_rows() const { return row_tiles * Plan::kBlockM; }
  int64_t padded_keys() const { return kv_tiles * Plan::kBlockN; }
};

// A row tile: rows [first, first + count) of one part.
template <class Plan>
struct RowTile {
  int64_t part, first, interleave;
  int count;

  RowTile(const BackwardSizes<Plan>& s, int64_t tile)
      : part(tile / s.part_tiles),
        first(tile % s.part_tiles * Plan::kBlockM),
        interleave(s.interleave) {
    const int64_t left = s.part_rows - first;
    count = int(left < Plan::kBlockM ? left : Plan::kBlockM);
  }
  int64_t q(int i) const { return (first + i) / interleave; }
  int64_t head_of_group(int i) const { return part + (first + i) % interleave; }
};

// The n x n grid of (kv chunk, row chunk) of one (batch, kv head).
enum class BackwardGrid {
  kCyclic,      // n phases; phase p pairs kv chunk w with row chunk (w + p) % n
  kPrivateDq,   // few rows: one phase, n kv chunks, each adds into its own copy of dQ
  kPrivateDkv,  // few keys: one phase, n row chunks, each adds into its own copy of dK and dV
};

struct BackwardCut {
  BackwardGrid grid;
  int64_t n;      // tasks of one (batch, kv head) that run at the same time
  int64_t heads;  // (batch, kv head) pairs that run at the same time: one wave

  int64_t slots() const { return n * heads; }
  int64_t phases() const { return grid == BackwardGrid::kCyclic ? n : 1; }
  int64_t row_chunks() const { return grid == BackwardGrid::kPrivateDq ? 1 : n; }
  int64_t kv_chunks() const { return grid == BackwardGrid::kPrivateDkv ? 1 : n; }
  int64_t dq_copies() const { return grid == BackwardGrid::kPrivateDq ? n : 1; }
  int64_t dkv_copies() const { return grid == BackwardGrid::kPrivateDkv ? n : 1; }
};

struct TileRange {
  int64_t begin, end;
};
constexpr TileRange chunk_of(int64_t tiles, int64_t chunks, int64_t i) {
  return {tiles * i / chunks, tiles * (i + 1) / chunks};
}

// Enough tasks for `workers`, from as few heads at a time as that allows: the workspace is per head
// in flight. `serial_heads` forces one head at a time, in the grid whose tasks share the fewest
// elements.
inline BackwardCut cut_backward(int64_t workers, int64_t heads, int64_t row_tiles, int64_t kv_tiles,
                                bool serial_heads) {
  const int64_t fewer = row_tiles < kv_tiles ? row_tiles : kv_tiles;
  const int64_t more = row_tiles < kv_tiles ? kv_tiles : row_tiles;
  const auto at_most = [](int64_t a, int64_t b) { return a < b ? a : b; };
  const auto at_least = [](int64_t a, int64_t b) { return a < b ? b : a; };
  const int64_t together = serial_heads ? 1 : at_least(heads, 1);
  const int64_t needed = (workers + together - 1) / together;
  int64_t n = at_least(needed, at_most(workers, fewer / kChunkTiles));
  BackwardGrid grid = BackwardGrid::kCyclic;
  if (serial_heads || 2 * fewer >= n || fewer == 0) {
    n = at_most(n, fewer);
  } else {
    grid = row_tiles < kv_tiles ? BackwardGrid::kPrivateDq : BackwardGrid::kPrivateDkv;
    n = at_most(n, more);
  }
  n = at_least(n, 1);
  return {grid, n, at_most(together, (workers + n - 1) / n)};
}

// Whether tasks that run at the same time may add into one accumulator of this captured gradient.
inline bool adds_apart(const GradInfo& g, const BackwardCut& cut, int64_t B, int64_t Hkv) {
  const bool heads = cut.heads == 1 || ((g.owned_b || B == 1) && (g.owned_h || Hkv == 1));
  const bool rows = g.owned_q && cut.grid != BackwardGrid::kPrivateDq;
  const bool keys = g.owned_k && cut.grid != BackwardGrid::kPrivateDkv;
  return heads && (cut.n == 1 || rows || keys);
}

inline int64_t capture_elements(const ae_capture& c) {
  int64_t n = 1;
  for (int i = 0; i < c.rank; ++i) n *= c.size[i];
  return n;
}

// The cut, and which captured gradients get one private copy per task slot (bit per capture).
template <class Plan, class Fn>
struct BackwardDecision {
  BackwardCut cut;
  uint64_t private_grads = 0;

  BackwardDecision(const ae_params& p, const BackwardSizes<Plan>& s) {
    cut = cut_backward(Plan::kVirtualWorkers, s.heads, s.row_tiles, s.kv_tiles, false);
    if (private_copies(p) <= kPrivateGradBytes) return;
    private_grads = 0;
    cut = cut_backward(Plan::kVirtualWorkers, s.heads, s.row_tiles, s.kv_tiles, true);
    if (private_copies(p) > 0) cut = {BackwardGrid::kCyclic, 1, 1};
    private_grads = 0;
  }

 private:
  int64_t private_copies(const ae_params& p) {
    int64_t bytes = 0;
    for (int i = 0; i < Fn::kCaptures; ++i) {
      const GradInfo& g = Fn::kGradInfo[i];
      if (!(Fn::kGradMask >> i & 1) || adds_apart(g, cut, p.B, p.Hkv)) continue;
      private_grads |= uint64_t(1) << i;
      bytes += cut.slots() * capture_elements(p.captures[i]) * int64_t(sizeof(typename Plan::Acc));
    }
    return bytes;
  }
};

// Scratch of one worker: a tile of S and one of dP; with bf16 products also the pairs of W^T and
// dS^T and the natural dS.
//   kBlockM * kBlockN * (2 * sizeof(Acc) + (kBf16Dot ? 6 : 0))
template <class Plan>
constexpr int64_t backward_scratch_bytes() {
  return int64_t(Plan::kBlockM) * Plan::kBlockN *
         (2 * int64_t(sizeof(typename Plan::Acc)) + (Plan::kBf16Dot ? 6 : 0));
}

// Byte offsets in the workspace. First `cut.heads` head slots, then the private gradient copies,
// then one scratch per worker.
template <class Plan, class Fn>
struct BackwardMemory {
  // of one head slot
  int64_t q, q_by_row, dout, dout_by_row;      // packed row tiles: A operands, B operands over rows
  int64_t k_by_row, k_by_column, v_by_column;  // packed KV tiles: B operands
  int64_t dq, dk, dv;                          // accumulators [copies][padded rows or keys][pitch]
  int64_t scalars;                             // [padded rows][kRowScalars]
  int64_t q_bad, dout_bad, k_bad;              // a byte per tile: some packed value is Inf or NaN
  int64_t head_bytes = 0;

  int64_t grads[Fn::kCaptures > 0 ? Fn::kCaptures : 1] = {};
  int64_t scratch;
  int64_t total = 0;

  BackwardMemory(const ae_params& p, const BackwardSizes<Plan>& s,
                 const BackwardDecision<Plan, Fn>& decision) {
    using A = typename Plan::Acc;
    constexpr int64_t kAcc = sizeof(A), kMul = Plan::kBf16Dot ? 2 : sizeof(A);
    constexpr int64_t kD = row_pitch<A>(Plan::kD), kDv = row_pitch<A>(Plan::kDv);
    const BackwardCut& cut = decision.cut;
    const int64_t rows = s.padded_rows(), keys = s.padded_keys();
    const auto head = [&](int64_t bytes) { return take(head_bytes, bytes); };
    q = head(rows * kD * kMul);
    dout = head(rows * kDv * kMul);
    q_by_row = Plan::kBf16Dot ? head(rows * kD * kMul) : q;
    dout_by_row = Plan::kBf16Dot ? head(rows * kDv * kMul) : dout;
    k_by_row = head(keys * kD * kMul);
    k_by_column = head(keys * kD * kMul);
    v_by_column = head(keys * kDv * kMul);
    dq = head(cut.dq_copies() * rows * kD * kAcc);
    dk = head(cut.dkv_copies() * keys * kD * kAcc);
    dv = head(cut.dkv_copies() * keys * kDv * kAcc);
    scalars = head(rows * Fn::kRowScalars * kAcc);
    q_bad = head(s.row_tiles);
    dout_bad = head(s.row_tiles);
    k_bad = head(s.kv_tiles);

    total = head_bytes * cut.heads;
    for (int i = 0; i < Fn::kCaptures; ++i) {
      if (!(decision.private_grads >> i & 1)) continue;
      grads[i] = take(total, cut.slots() * capture_elements(p.captures[i]) * kAcc);
    }
    scratch = take(total, round_up(backward_scratch_bytes<Plan>(), 64) * p.threads);
  }

 private:
  // Sections start on cache lines.
  static int64_t take(int64_t& end, int64_t bytes) {
    const int64_t begin = end;
    end += round_up(bytes, 64);
    return begin;
  }
};

}  // namespace ae
