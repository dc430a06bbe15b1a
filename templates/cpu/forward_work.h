// How the forward pass of one launch is cut and where its memory lies: sizes only, no arithmetic on
// data. The cut depends on the tensor sizes and Plan::kVirtualWorkers, never on the threads, so
// that every bit of the result is the same at any thread count.
#pragma once
#include "common/sequences.h"
#include "cpu/pack.h"

namespace ae {

constexpr int64_t kCacheLine = 64;  // bytes; every block of memory starts on its own line

// Split work has at least this many keys per chunk: below it the merge costs more than it gains.
constexpr int64_t kMinSplitKeys = 256;

// The multiply type of a plan.
template <bool kBf16Dot, class Acc>
struct MultiplyOf {
  using type = Acc;
};
template <class Acc>
struct MultiplyOf<true, Acc> {
  using type = bf16;
};
template <class Plan>
using Multiply = typename MultiplyOf<Plan::kBf16Dot, typename Plan::Acc>::type;

// Byte offsets of one worker's scratch: operand tiles, scores, weights and the output accumulator.
// With a = sizeof(Acc), m = 2 if kBf16Dot else a, W = register bytes / a, line(x) = x rounded up to
// 64, and Dw, Dvw = D, Dv rounded up to W, the total is
//   line(kBlockM * Dw * m) + line(kBlockM * kBlockN * a) + (kBf16Dot ? line(kBlockM * kBlockN * 2)
//   : 0)
//   + line(kBlockM * Dvw * a) + line(kBlockN * (D rounded up to 2 if kBf16Dot) * m)
//   + line(kBlockN * Dvw * m)
template <class Plan>
struct ForwardScratch {
  using Acc = typename Plan::Acc;
  using M = Multiply<Plan>;
  static constexpr int kQPitch = row_pitch<Acc>(Plan::kD);
  static constexpr int kOutPitch = row_pitch<Acc>(Plan::kDv);
  static constexpr int64_t kKTile = by_column_elements<Acc, M>(Plan::kBlockN, Plan::kD);
  static constexpr int64_t kVTile = by_row_elements<Acc, M>(Plan::kBlockN, Plan::kDv);
  static constexpr int64_t line(int64_t bytes) { return round_up(bytes, kCacheLine); }

  static constexpr int64_t kQ = 0;
  static constexpr int64_t kScores = kQ + line(int64_t(sizeof(M)) * Plan::kBlockM * kQPitch);
  static constexpr int64_t kWeights =
      kScores + line(int64_t(sizeof(Acc)) * Plan::kBlockM * Plan::kBlockN);
  static constexpr int64_t kOut =
      kWeights + (Plan::kBf16Dot ? line(int64_t(sizeof(M)) * Plan::kBlockM * Plan::kBlockN) : 0);
  static constexpr int64_t kK = kOut + line(int64_t(sizeof(Acc)) * Plan::kBlockM * kOutPitch);
  static constexpr int64_t kV = kK + line(int64_t(sizeof(M)) * kKTile);
  static constexpr int64_t kBytes = kV + line(int64_t(sizeof(M)) * kVTile);
};

template <class Plan>
constexpr int64_t forward_scratch_bytes() {
  return ForwardScratch<Plan>::kBytes;
}

// Tiles of query rows, and how often a packed tile of K and V is read.
template <class Plan>
struct ForwardSizes {
  int64_t B, Hq, Hkv, L, S;
  int64_t group;            // query heads per kv head
  int64_t interleave;       // query heads that share a row tile: row R is q = R / interleave
  int64_t blocks;           // head blocks per batch
  int64_t rows, row_tiles;  // per head block
  int64_t kv_tiles;         // per kv head
  int64_t kv_batches;       // 1 when K and V are broadcast over the batch
  bool pack_ahead;          // K and V are packed once into the workspace, not by each task
  int64_t splits;           // chunks of kv tiles, each its own task

  explicit ForwardSizes(const ae_params& p, bool can_split)
      : B(p.B), Hq(p.Hq), Hkv(p.Hkv), L(p.L), S(p.S) {
    group = Hkv > 0 ? Hq / Hkv : 0;
    interleave = Plan::kPackGroup ? group : 1;
    blocks = interleave > 0 ? Hq / interleave : 0;
    rows = L * interleave;
    row_tiles = (rows + Plan::kBlockM - 1) / Plan::kBlockM;
    kv_tiles = (S + Plan::kBlockN - 1) / Plan::kBlockN;
    kv_batches = p.k_stride[0] == 0 && p.v_stride[0] == 0 && B > 0 ? 1 : B;
    const int64_t readers = row_tiles * (Plan::kPackGroup ? 1 : group) * (B / (B ? kv_batches : 1));
    pack_ahead = readers > 1;
    splits = 1;
    if (can_split && tiles() > 0 && tiles() < Plan::kVirtualWorkers) {
      const int64_t wanted = (Plan::kVirtualWorkers + tiles() - 1) / tiles();
      const int64_t possible = S / (kMinSplitKeys > Plan::kBlockN ? kMinSplitKeys : Plan::kBlockN);
      splits = wanted < possible ? wanted : possible;
      if (splits < 1) splits = 1;
    }
  }
  int64_t tiles() const { return B * blocks * row_tiles; }
  int64_t kv_heads() const { return kv_batches * Hkv; }
};

// One tile: rows [first, first + count) of head block `block` of batch b.
template <class Plan>
struct ForwardTile {
  int64_t b, block, first, interleave;
  int64_t kv_head;  // of the kv_batches * Hkv packed ones
  int64_t kv_b, kv_h;
  int count;

  // The last rows of a block come first: under a causal mask they have the most work.
  ForwardTile(const ForwardSizes<Plan>& s, int64_t index)
      : ForwardTile(s, index / s.row_tiles / s.blocks, index / s.row_tiles % s.blocks,
                    s.row_tiles - 1 - index % s.row_tiles) {}

  ForwardTile(const ForwardSizes<Plan>& s, int64_t batch, int64_t head_block, int64_t row_tile)
      : b(batch), block(head_block), first(row_tile * Plan::kBlockM), interleave(s.interleave) {
    count = int(s.rows - first < Plan::kBlockM ? s.rows - first : Plan::kBlockM);
    kv_b = s.kv_batches == 1 ? 0 : b;
    kv_h = block * interleave / s.group;
    kv_head = kv_b * s.Hkv + kv_h;
  }
  int64_t q(int i) const { return (first + i) / interleave; }
  int64_t h(int i) const { return block * interleave + (first + i) % interleave; }
};

// Byte offsets of the workspace of one launch.
template <class Plan, class Fn>
struct ForwardWorkspace {
  using Acc = typename Plan::Acc;
  using M = Multiply<Plan>;
  using Scratch = ForwardScratch<Plan>;
  int64_t worker_bytes;       // scratch, then the runs of one row tile
  int64_t k, v, bad;          // packed tiles, and one flag per V tile: it holds Inf or NaN
  int64_t out, state, alive;  // partial results of each (tile, split)
  int64_t tables;             // block tables of the mask's captured tensors, tables of diagonals
  int64_t bytes;

  ForwardWorkspace(const ForwardSizes<Plan>& s, int64_t threads, int64_t table_bytes) {
    worker_bytes = Scratch::kBytes + Scratch::line(s.kv_tiles * int64_t(sizeof(ae_run)));
    int64_t at = threads * worker_bytes;
    const auto take = [&](int64_t n) {
      const int64_t offset = at;
      at += Scratch::line(n);
      return offset;
    };
    const int64_t packed = s.pack_ahead ? s.kv_heads() * s.kv_tiles : 0;
    k = take(packed * Scratch::kKTile * int64_t(sizeof(M)));
    v = take(packed * Scratch::kVTile * int64_t(sizeof(M)));
    bad = take(packed);
    const int64_t partial_rows = s.splits > 1 ? s.tiles() * s.splits * Plan::kBlockM : 0;
    out = take(partial_rows * Scratch::kOutPitch * int64_t(sizeof(Acc)));
    state = take(partial_rows * Fn::kStates * int64_t(sizeof(Acc)));
    alive = take(partial_rows);
    tables = take(table_bytes);
    bytes = at + kCacheLine;  // room to align the base
  }
};

}  // namespace ae
