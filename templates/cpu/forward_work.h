// How the forward pass of one launch is cut and where its memory lies: sizes only, no arithmetic on
// data. The cut depends on the tensor sizes and Plan::kVirtualWorkers, never on the threads, so
// that every bit of the result is the same at any thread count.
#pragma once
#include "common/schedule.h"
#include "common/sequences.h"
#include "cpu/pack.h"

namespace ae {

constexpr int64_t kCacheLine = 64;  // bytes; every block of memory starts on its own line

// Up to this many rows, keys and values are read where they lie; beyond, packing a tile pays off.
constexpr int kDirectRows = 8;

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

// How one launch is cut. An output is a set of query rows that walk the keys together:
//
//   few rows   all rows of some kv heads of one sequence: each tile of keys is read once, head
//   after
//              head, in the order of the memory (decoding)
//   many rows  one tile of rows; K and V are packed ahead, once for all of them
//
// The rows of an output are parts of at most kBlockM rows of one head block.
template <class Plan>
class ForwardCut {
  static constexpr int kBlockM = Plan::kBlockM, kBlockN = Plan::kBlockN;
  using Elem = typename Plan::Elem;

 public:
  const ae_params& p;
  int64_t group;           // query heads per kv head
  int64_t interleave;      // query heads that share a row tile: row R is q = R / interleave
  int64_t blocks;          // head blocks per kv head
  bool pack_ahead;         // many rows
  bool shared_keys;        // one K and V for the whole batch
  int64_t tile_keys;       // keys of a tile, at most kBlockN
  int64_t heads_together;  // kv heads of an output
  int64_t head_groups;     // outputs of a sequence of few rows

  // `head_masks`: the mask depends on the head, so heads do not share their tiles.
  ForwardCut(const ae_params& params, bool head_masks) : p(params) {
    group = p.Hkv > 0 ? p.Hq / p.Hkv : 0;
    interleave = Plan::kPackGroup ? group : 1;
    blocks = interleave > 0 ? group / interleave : 0;
    const ae_sequences& s = p.sequences;
    shared_keys = p.B > 1 && p.k_stride[0] == 0 && p.v_stride[0] == 0 && s.q_start == nullptr &&
                  s.key_start == nullptr && s.key_end == nullptr && s.pages == nullptr &&
                  s.kv_row == nullptr;
    const int64_t rows = p.L * group;  // of a kv head
    pack_ahead = shared_keys || (rows > kBlockM && (rows > kFewRows || p.S < kLongKeys));
    tile_keys = kBlockN;
    heads_together = 1;
    if (rows <= kDirectRows && !pack_ahead && !head_masks && heads_adjoin()) {
      // Few keys of many heads lie together: their tile stays in the second cache, beside the next,
      // and their pages in the first level of the TLB.
      int64_t keys = kBlockN, heads = p.Hkv;
      const int64_t row_bytes = (Plan::kD + Plan::kDv) * int64_t(sizeof(Elem));
      while (keys > kTileKeys && keys * heads * row_bytes > kTileBytes) keys /= 2;
      if (keys * heads * row_bytes > kTileBytes) heads = kTileBytes / (keys * row_bytes);
      if (heads < 1) heads = 1;
      // Each task must have some tiles, or heads are shared out instead.
      const int64_t tiles = p.B * ((p.S + keys - 1) / keys) * ((p.Hkv + heads - 1) / heads);
      if (tiles >= 2 * Plan::kVirtualWorkers) tile_keys = keys, heads_together = heads;
    }
    head_groups = p.Hkv > 0 ? (p.Hkv + heads_together - 1) / heads_together : 0;
  }

  int64_t row_tiles(const Sequence& s) const {
    return (s.rows * interleave + kBlockM - 1) / kBlockM;
  }
  int64_t key_tiles(const Sequence& s) const { return (s.keys + tile_keys - 1) / tile_keys; }
  int64_t outputs(const Sequence& s) const {
    if (s.rows == 0 || p.Hq == 0) return 0;
    return pack_ahead ? p.Hkv * blocks * row_tiles(s) : head_groups;
  }
  // The most rows of an output.
  int64_t output_rows() const {
    const int64_t rows = p.L * group;
    if (!pack_ahead) return heads_together * rows;
    return rows < kBlockM ? rows : kBlockM;
  }
  // Keys after those of a tile whose addresses are known too: they are fetched meanwhile.
  int64_t keys_ahead() const { return heads_together > 1 ? tile_keys : kAheadKeys; }
  int64_t most_key_tiles() const { return (p.S + tile_keys - 1) / tile_keys; }
  // Batches of packed keys.
  int64_t key_batches() const { return shared_keys ? 1 : p.B; }

 private:
  // Whether the rows of a key's heads lie closer together than those of a head's keys.
  bool heads_adjoin() const {
    const auto near = [](const int64_t* stride) { return stride[1] > 0 && stride[1] < stride[2]; };
    return p.Hkv > 1 && near(p.k_stride) && near(p.v_stride);
  }

  static constexpr int64_t kFewRows = 256;    // rows whose sums stay in the second cache
  static constexpr int64_t kLongKeys = 2048;  // so many keys have work for every task without them
  static constexpr int64_t kTileKeys = 32;    // at least, where heads share a tile
  static constexpr int64_t kTileBytes = 128 << 10;
  static constexpr int64_t kAheadKeys = 64;
};

// Rows [first, first + count) of head block `block` of a sequence.
template <class Plan>
struct ForwardTile {
  int64_t b;  // as the user's functions see it
  int64_t block, first, interleave, first_query;
  int count;

  ForwardTile(const ForwardCut<Plan>& c, const Sequence& s, int64_t sequence, int64_t head_block,
              int64_t row_tile)
      : b(sequence + c.p.b_first),
        block(head_block),
        first(row_tile * Plan::kBlockM),
        interleave(c.interleave),
        first_query(s.first_query) {
    const int64_t left = s.rows * interleave - first;
    count = int(left < Plan::kBlockM ? left : Plan::kBlockM);
  }
  int64_t row(int i) const { return (first + i) / interleave; }  // of the sequence
  int64_t q(int i) const { return first_query + row(i); }        // as the user's functions see it
  int64_t h(int i) const { return block * interleave + (first + i) % interleave; }
};

// The rows of one output.
template <class Plan>
struct ForwardOutput {
  int64_t sequence;
  Sequence s;
  int64_t head, heads;      // kv heads
  int64_t block, row_tile;  // with many rows: the one part

  ForwardOutput(const ForwardCut<Plan>& c, int64_t b, int64_t index) : sequence(b), s(c.p, b) {
    if (c.pack_ahead) {
      // The last rows of a block come first: under a causal mask they have the most work.
      const int64_t n = c.row_tiles(s);
      row_tile = n - 1 - index % n;
      block = index / n;
      head = block / c.blocks, heads = 1;
    } else {
      row_tile = block = 0;
      head = index * c.heads_together;
      heads = c.p.Hkv - head < c.heads_together ? c.p.Hkv - head : c.heads_together;
    }
  }
  // Calls visit(tile, first row of the output that is in it) for the parts of one kv head.
  template <class Visit>
  void each_part(const ForwardCut<Plan>& c, int64_t kv_head, const Visit& visit) const {
    if (c.pack_ahead) {
      visit(ForwardTile<Plan>(c, s, sequence, block, row_tile), int64_t(0));
      return;
    }
    const int64_t tiles = c.row_tiles(s), rows = s.rows * c.interleave;
    for (int64_t i = 0; i < c.blocks; ++i) {
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t at = ((kv_head - head) * c.blocks + i) * rows + t * Plan::kBlockM;
        visit(ForwardTile<Plan>(c, s, sequence, kv_head * c.blocks + i, t), at);
      }
    }
  }
  template <class Visit>
  void each_part(const ForwardCut<Plan>& c, const Visit& visit) const {
    for (int64_t h = head; h < head + heads; ++h) each_part(c, h, visit);
  }
};

// Bytes of the workspace of one launch, and where its parts lie.
template <class Plan, class Fn>
struct ForwardWorkspace {
  using Acc = typename Plan::Acc;
  using Elem = typename Plan::Elem;
  using M = Multiply<Plan>;
  using Scratch = ForwardScratch<Plan>;
  static constexpr int64_t kStateBytes = (Fn::kStates > 0 ? Fn::kStates : 1) * int64_t(sizeof(Acc));

  // Of a worker's scratch: tiles (ForwardScratch), then what depends on the sizes.
  int64_t runs, row, state, factor, row_alive;  // of its rows
  int64_t q, sums;                              // where they do not fit the tiles' own
  int64_t k_next, v_next;                       // of the next tile's keys, of all heads
  int64_t k_rows, v_rows;                       // addresses of a tile's keys and of those after
  int64_t worker_bytes;
  // Of the launch.
  int64_t first_output, first_tile;  // of each sequence
  int64_t prefix;                    // tiles of keys of all outputs before one
  int64_t k, v, bad;                 // packed tiles, and one flag per V tile: it holds Inf or NaN
  int64_t out, out_state, alive;     // partial results, by slot
  int64_t tables;                    // of the mask's captured tensors, and of diagonals
  int64_t bytes;
  int64_t outputs, rows, slots;
  bool may_split;

  ForwardWorkspace(const ForwardCut<Plan>& c, bool can_split, int64_t table_bytes) {
    const ae_params& p = c.p;
    rows = c.output_rows();
    int64_t at = Scratch::kBytes;
    const auto take = [&](int64_t n) {
      const int64_t offset = at;
      at += Scratch::line(n);
      return offset;
    };
    runs = take(c.most_key_tiles() * int64_t(sizeof(ae_run)));
    row = take(rows * int64_t(sizeof(typename Fn::Row)));
    state = take(rows * kStateBytes);
    factor = take(rows * int64_t(sizeof(Acc)));
    row_alive = take(rows);
    q = rows > Plan::kBlockM ? take(rows * Scratch::kQPitch * int64_t(sizeof(M))) : Scratch::kQ;
    sums = rows > Plan::kBlockM ? take(rows * Scratch::kOutPitch * int64_t(sizeof(Acc)))
                                : Scratch::kOut;
    const int64_t addresses = c.pack_ahead ? 0 : int64_t(sizeof(const Elem*));
    k_rows = take((c.tile_keys + c.keys_ahead()) * addresses);
    v_rows = take((c.tile_keys + c.keys_ahead()) * addresses);
    const int64_t together = c.heads_together > 1 ? c.tile_keys * c.heads_together : 0;
    k_next = take(together * addresses);
    v_next = take(together * addresses);
    worker_bytes = at;

    at = p.threads * worker_bytes;
    first_output = take((p.B + 1) * int64_t(sizeof(int64_t)));
    first_tile = take((p.B + 1) * int64_t(sizeof(int64_t)));
    outputs = 0;
    int64_t tiles = 0;
    for (int64_t b = 0; b < p.B; ++b) {
      const Sequence s(p, b);
      outputs += c.outputs(s);
      if (b < c.key_batches()) tiles += c.key_tiles(s);
    }
    may_split = can_split && outputs > 0 &&
                outputs < Plan::kVirtualWorkers * (c.pack_ahead ? 1 : kOutputsPerWorker);
    prefix = take(may_split ? (outputs + 1) * int64_t(sizeof(int64_t)) : 0);
    const int64_t packed = c.pack_ahead ? p.Hkv * tiles : 0;
    k = take(packed * Scratch::kKTile * int64_t(sizeof(M)));
    v = take(packed * Scratch::kVTile * int64_t(sizeof(M)));
    bad = take(packed);
    slots = may_split ? Schedule::slots(kStreamK, outputs, Plan::kVirtualWorkers, 1) : 0;
    out = take(slots * rows * Scratch::kOutPitch * int64_t(sizeof(Acc)));
    out_state = take(slots * rows * kStateBytes);
    alive = take(slots * rows);
    tables = take(table_bytes);
    bytes = at + kCacheLine;  // room to align the base
  }

  // With more outputs than so many per virtual worker, long ones are a small part of the whole.
  static constexpr int64_t kOutputsPerWorker = 16;
};

}  // namespace ae
