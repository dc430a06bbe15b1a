// How the backward pass of one launch is cut and where its memory lies: sizes only, no arithmetic
// on data. The order of every sum, and with it every bit of the result, depends on the tensor sizes
// and Plan::kVirtualWorkers, never on the threads: they only decide how many heads are in flight,
// and that only where no captured tensor sums over heads.
#pragma once
#include "common/sequences.h"
#include "cpu/pack.h"

namespace ae {

// What is known of the gradient of one captured tensor. owned_x: every scatter into it uses index x
// plainly, so tasks with different x never touch the same element.
struct GradInfo {
  bool needs, owned_b, owned_h, owned_q, owned_k;
};

// The heads in flight and the private copies of captured gradients together take at most this many
// times the bytes of q, k and v, where one head in flight allows it.
constexpr int64_t kWorkspacePerOperand = 2;

// Bytes that all private copies of captured gradients may take whatever the operands do.
constexpr int64_t kMinPrivateGradBytes = int64_t(1) << 20;

// Captured gradients fix the number of heads in flight; it serves this many threads at least.
constexpr int64_t kFixedWorkers = 8;

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

// Which tasks that run at the same time never add to the same element of this captured gradient.
struct GradOwners {
  bool heads;  // tasks of different heads
  bool tasks;  // tasks of one head

  GradOwners(const GradInfo& g, const BackwardCut& cut, const ae_params& p) {
    heads = cut.heads == 1 || ((g.owned_b || p.B == 1) && (g.owned_h || p.Hkv == 1));
    // A negative query index reads from the tensor's end, where another row's may be.
    const bool rows = g.owned_q && p.q_first >= 0 && cut.grid != BackwardGrid::kPrivateDq;
    const bool keys = g.owned_k && cut.grid != BackwardGrid::kPrivateDkv;
    tasks = cut.n == 1 || rows || keys;
  }
  bool share() const { return heads && tasks; }  // one accumulator serves all
  // Private copies otherwise, and the one that task `slot` of those that run together adds to.
  int64_t copies(const BackwardCut& cut) const {
    return (heads ? 1 : cut.heads) * (tasks ? 1 : cut.n);
  }
  int64_t copy_of(int64_t slot, const BackwardCut& cut) const {
    const int64_t head = heads ? 0 : slot / cut.n, task = tasks ? 0 : slot % cut.n;
    return head * (tasks ? 1 : cut.n) + task;
  }
};

inline int64_t capture_elements(const ae_capture& c) {
  int64_t n = 1;
  for (int i = 0; i < c.rank; ++i) n *= c.size[i];
  return n;
}

// Sections start on cache lines.
inline int64_t take_section(int64_t& end, int64_t bytes) {
  const int64_t begin = end;
  end += round_up(bytes, 64);
  return begin;
}

// Byte offsets in the memory of one head in flight.
template <class Plan, class Fn>
struct BackwardHeadMemory {
  int64_t q, q_by_row, dout, dout_by_row;      // packed row tiles: A operands, B operands over rows
  int64_t k_by_row, k_by_column, v_by_column;  // packed KV tiles: B operands
  int64_t dq, dk, dv;                          // accumulators [copies][padded rows or keys][pitch]
  int64_t scalars;                             // [padded rows][kRowScalars]
  int64_t q_bad, dout_bad, k_bad;              // a byte per tile: some packed value is Inf or NaN
  int64_t bytes = 0;

  BackwardHeadMemory(const BackwardSizes<Plan>& s, const BackwardCut& cut) {
    using A = typename Plan::Acc;
    constexpr int64_t kAcc = sizeof(A), kMul = Plan::kBf16Dot ? 2 : sizeof(A);
    constexpr int64_t kD = row_pitch<A>(Plan::kD), kDv = row_pitch<A>(Plan::kDv);
    const int64_t rows = s.padded_rows(), keys = s.padded_keys();
    const auto take = [&](int64_t n) { return take_section(bytes, n); };
    q = take(rows * kD * kMul);
    dout = take(rows * kDv * kMul);
    q_by_row = Plan::kBf16Dot ? take(rows * kD * kMul) : q;
    dout_by_row = Plan::kBf16Dot ? take(rows * kDv * kMul) : dout;
    k_by_row = take(keys * kD * kMul);
    k_by_column = take(keys * kD * kMul);
    v_by_column = take(keys * kDv * kMul);
    dq = take(cut.dq_copies() * rows * kD * kAcc);
    dk = take(cut.dkv_copies() * keys * kD * kAcc);
    dv = take(cut.dkv_copies() * keys * kDv * kAcc);
    scalars = take(rows * Fn::kRowScalars * kAcc);
    q_bad = take(s.row_tiles);
    dout_bad = take(s.row_tiles);
    k_bad = take(s.kv_tiles);
  }
};

// The cut, within kWorkspacePerOperand, and which captured gradients have private copies (bit per
// capture). A cut is tried with private copies first; when they take too much, one head at a time,
// then tasks that cannot collide, and at last one task at a time.
template <class Plan, class Fn>
struct BackwardDecision {
  BackwardCut cut;
  uint64_t private_grads = 0;

  BackwardDecision(const ae_params& p, const BackwardSizes<Plan>& s)
      : p_(p), s_(s), budget_(kWorkspacePerOperand * operand_bytes()) {
    const int64_t fewer = s.row_tiles < s.kv_tiles ? s.row_tiles : s.kv_tiles;
    cut = cut_backward(Plan::kVirtualWorkers, s.heads, s.row_tiles, s.kv_tiles, false);
    BackwardCut one = cut;
    one.heads = 1;
    if (cut.grid != BackwardGrid::kCyclic && heads_bytes(one) > budget_) {
      const int64_t n = fewer < 1 ? 1 : fewer;
      cut = {BackwardGrid::kCyclic, n, cut.heads * cut.n / n};
      cut.heads = cut.heads < s.heads ? cut.heads : s.heads;
    }
    const int64_t workers = Fn::kGradMask != 0 ? kFixedWorkers : p.threads;
    limit_heads(workers);
    if (choose_private()) return;
    cut = cut_backward(Plan::kVirtualWorkers, s.heads, s.row_tiles, s.kv_tiles, true);
    if (choose_private()) return;
    cut = {BackwardGrid::kCyclic, 1,
           s.heads < Plan::kVirtualWorkers ? s.heads : Plan::kVirtualWorkers};
    limit_heads(1);
    if (choose_private() && private_grads == 0) return;
    cut = {BackwardGrid::kCyclic, 1, 1};
    private_grads = 0;
  }

  GradOwners owners(int i) const { return {Fn::kGradInfo[i], cut, p_}; }

 private:
  const ae_params& p_;
  const BackwardSizes<Plan> s_;
  const int64_t budget_;

  int64_t operand_bytes() const {
    const int64_t batches = p_.k_stride[0] == 0 && p_.B > 0 ? 1 : p_.B;
    return int64_t(sizeof(typename Plan::Elem)) *
           (p_.B * p_.Hq * p_.L * Plan::kD + batches * p_.Hkv * p_.S * (Plan::kD + Plan::kDv));
  }
  int64_t heads_bytes(const BackwardCut& c) const {
    return c.heads * BackwardHeadMemory<Plan, Fn>(s_, c).bytes;
  }

  // A power of two of heads within the budget, yet a task for every worker. Where captured tensors
  // get gradients, the order of their sums depends on it, so it must not depend on the threads.
  void limit_heads(int64_t workers) {
    const int64_t needed = (workers + cut.n - 1) / cut.n;
    if (heads_bytes(cut) <= budget_) return;
    BackwardCut less = cut;
    less.heads = 1;
    while (less.heads < needed || 2 * heads_bytes(less) <= budget_) less.heads *= 2;
    if (less.heads < cut.heads) cut = less;
  }

  // Finds the private copies that the cut needs; false when they take too much.
  bool choose_private() {
    private_grads = 0;
    int64_t bytes = 0;
    for (int i = 0; i < Fn::kCaptures; ++i) {
      if (!(Fn::kGradMask >> i & 1) || owners(i).share()) continue;
      private_grads |= uint64_t(1) << i;
      bytes += owners(i).copies(cut) * capture_elements(p_.captures[i]) *
               int64_t(sizeof(typename Plan::Acc));
    }
    if (bytes <= kMinPrivateGradBytes) return true;
    return bytes + heads_bytes(cut) <= budget_;
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
  BackwardHeadMemory<Plan, Fn> head;
  int64_t grads[Fn::kCaptures > 0 ? Fn::kCaptures : 1] = {};
  int64_t scratch;
  int64_t total = 0;

  BackwardMemory(const ae_params& p, const BackwardSizes<Plan>& s,
                 const BackwardDecision<Plan, Fn>& decision)
      : head(s, decision.cut) {
    using A = typename Plan::Acc;
    total = head.bytes * decision.cut.heads;
    for (int i = 0; i < Fn::kCaptures; ++i) {
      if (!(decision.private_grads >> i & 1)) continue;
      const int64_t copies = decision.owners(i).copies(decision.cut);
      grads[i] = take_section(total, copies * capture_elements(p.captures[i]) * int64_t(sizeof(A)));
    }
    scratch = take_section(total, round_up(backward_scratch_bytes<Plan>(), 64) * p.threads);
  }
};

}  // namespace ae
