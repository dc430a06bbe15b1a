// The forward pass on Ampere and later: cp.async rings of K and V tiles, m16n8k16 products, scores,
// weights and row states in registers.
//
//   for each tile of query rows (one thread block):
//     Q -> shared memory
//     for each tile of keys that the mask does not empty, kStages - 1 of them on their way:
//       S = Q K^T                           each warp its own rows, all keys of the tile
//       W, state, factor = tile_row(S)      the traced functor, row by row, reduced over 4 lanes
//       O = O * factor + W V
//     O * out_factor, statistics
//
// A key is dead when it is masked, past the end, or scored -inf: its weight is exactly 0, and
// nothing stored in K or V there reaches the result (sm80/nonfinite.cuh). A row that meets no live
// key gives 0 and the statistics of its initial state.
//
// With kSequences, rows and keys are those of ae_params.sequences: packed, in a cache or its pages,
// of any lengths. With kScheduled a thread block walks its segments (cuda/work.cuh): of an output
// that it has whole it writes the result, of others partial results, which ae_combine merges.
//
// What the generated unit defines, Plan and Fn, is in sm80/forward_unit.cuh.
#pragma once
#include "common/env.h"
#include "cuda/capture.cuh"
#include "cuda/combine.cuh"
#include "cuda/key_rows.cuh"
#include "cuda/key_tiles.cuh"
#include "cuda/math.cuh"
#include "cuda/row_tile.cuh"
#include "cuda/rows.cuh"
#include "cuda/tables.cuh"
#include "sm80/forward_shared.cuh"
#include "sm80/forward_unit.cuh"
#include "sm80/nonfinite.cuh"
#include "sm80/product.cuh"
#include "sm80/store.cuh"

namespace ae {

template <class Plan, class Fn>
class Forward {
  using Elem = typename Plan::Elem;
  using Shared = ForwardShared<Plan>;
  using QTile = typename Shared::Q;
  using KTile = typename Shared::K;
  using VTile = typename Shared::V;

 public:
  static constexpr int kCaptures = Fn::kCaptures > 0 ? Fn::kCaptures : 1;
  static constexpr int kThreads = 32 * Plan::kWarps;
  using Params = KernelParams<kCaptures>;

 private:
  static constexpr int kBlockM = Plan::kBlockM, kBlockN = Plan::kBlockN, kStages = Plan::kStages;
  static constexpr int kColumnWarps = Plan::kColumnWarps;
  static constexpr int kRowWarps = Plan::kWarps / kColumnWarps;
  static constexpr int kWarpRows = kBlockM / kRowWarps;
  static constexpr int kAtoms = kWarpRows / 16;                       // blocks of 16 rows of a warp
  static constexpr int kRows = 2 * kAtoms;                            // rows of a thread
  static constexpr int kKeys = kBlockN / 4;                           // keys of a row and thread
  static constexpr int kColumns = VTile::kChunks * 8 / kColumnWarps;  // of the output, of a warp
  static constexpr int kSums = kColumns / 4;         // output columns of a row and thread
  static constexpr int kSteps = QTile::kChunks / 2;  // of 16 columns of Q and K
  static constexpr int kOwnSteps = (kSteps + kColumnWarps - 1) / kColumnWarps;  // of a warp
  static constexpr int kStates = Fn::kStates > 0 ? Fn::kStates : 1;
  // Q as operands of the products stays in registers where the plan found room.
  static constexpr bool kHoldQ = Plan::kHoldQ;

  static_assert(Plan::kSharedBytes == Shared::kBytes, "the plan's shared memory total is wrong");
  static_assert(kBlockM % (16 * kRowWarps) == 0, "warps split the rows in blocks of 16");
  static_assert(kColumnWarps == 1 || Plan::kDv % (16 * kColumnWarps) == 0,
                "warps that share rows split the columns in blocks of 16");
  static_assert(!Plan::kSharedKV || (kColumnWarps > 1 && Plan::kDv <= Plan::kD),
                "a tile of V within K is cleared of Inf after an exchange of scores");
  static_assert(!Plan::kSharedKV || !(Fn::kHasKMod || Fn::kHasVMod), "mods change K, or V, alone");
  static_assert(kBlockN % 16 == 0 && kStages >= 2, "a tile of keys is whole steps of 16");
  static_assert(kKeys <= 32, "a thread's keys of a row are the bits of a word");
  static_assert(Plan::kSequences || !Plan::kScheduled, "a schedule is of sequences");

 public:
  // What a block needs of shared memory beside its tiles.
  struct Small {
    KeyTileClasses classes;
    float out_factors[kBlockM];
    KeyRows<Plan> rows;
    Walk<Plan::kScheduled> walk;
  };

  __device__ __forceinline__ Forward(const Params& params, char* shared, Small& small)
      : params_(params),
        p_(params.p),
        env_{params.cap, params.p.fault, params.p.S},
        shared_(shared),
        small_(small),
        lane_(int(threadIdx.x) % 32),
        warp_row_(int(threadIdx.x) / 32 % kRowWarps * kWarpRows) {}

  // Every thread of the block calls it.
  __device__ __forceinline__ void run() {
    if constexpr (!Plan::kScheduled) {
      attend_rows();
    } else {
      if (threadIdx.x == 0) small_.walk.start(params_.work, blockIdx.x);
#pragma unroll 1
      while (true) {
        if (threadIdx.x == 0) small_.walk.next(params_.work, blockIdx.x);
        __syncthreads();
        if (!small_.walk.more) break;
        // What follows from them is computed anew: else the compiler holds places of Q and of the
        // results through the loop over the keys, and spills (D = 128: 24 bytes for 128 rows).
        asm volatile("" : "+r"(lane_), "+r"(warp_row_));
        attend_rows();
        __syncthreads();  // nobody reads what the next segment overwrites
      }
    }
  }

 private:
  // One tile of rows, and all or some of its tiles of keys.
  __device__ __forceinline__ void attend_rows() {
    {
      const RowTile rows = row_tile();
      int64_t keys = p_.S;
      if constexpr (Plan::kSequences) {
        if (rows.count <= 0) return;  // the sequence has fewer rows than the longest
        keys = Sequence(p_, rows.b).keys;
        small_.rows.start(p_, rows.b);
      }
      KeyTiles<Plan, Fn>::classify(params_, rows, keys, small_.classes);
    }
    if constexpr (Plan::kScheduled) {
      if (params_.work.policy == kSplit) {
        __syncthreads();  // the classes are there
        if (threadIdx.x < 32) {
          const int tiles = KeyTiles<Plan, Fn>::count(keys(), small_.classes);
          if (threadIdx.x == 0) small_.walk.cut(params_.work, tiles);
        }
      }
    }
    start();
    __syncthreads();  // the classes are there, and the segment
#pragma unroll 1
    for (Mode mode = kFinite;;) {
      pass(mode);
      if (mode == kAdd) break;
      if (mode == kFinite && sums_nonfinite()) {
        mode = kClear;
        continue;
      }
      store();
      if (mode == kFinite) break;
      mode = kAdd;
      __syncthreads();  // nobody reads the ring that is filled again, and all outputs are stored
    }
  }

  // What a pass over the keys does about Inf and NaN in V (sm80/nonfinite.cuh).
  enum Mode { kFinite, kClear, kAdd };

  const Params& params_;
  const ae_params& p_;
  const Env env_;
  char* const shared_;
  Small& small_;
  int lane_, warp_row_;
  GlobalRows k_, v_;

  typename Fn::Row rows_[kRows];
  float state_[kRows][kStates];
  float o_[kRows][kSums];
  uint32_t alive_;  // bit r: row r has met a live key

  __device__ __forceinline__ RowTile row_tile() const {
    unsigned output = blockIdx.x;
    if constexpr (Plan::kScheduled) output = unsigned(small_.walk.segment.output);
    return RowTile::of_output<Plan>(p_, output);
  }
  __device__ __forceinline__ int64_t keys() const {
    if constexpr (Plan::kSequences) {
      return small_.rows.keys;
    } else {
      return p_.S;
    }
  }
  // Whether the tile of rows has some of its keys alone: its result is a part.
  __device__ __forceinline__ bool is_part() const {
    if constexpr (Plan::kScheduled) {
      return small_.walk.segment.slot >= 0;
    } else {
      return false;
    }
  }
  template <class P = Plan>
  __device__ __forceinline__ PartialSlot<P, Fn> slot() const {
    return {params_.work, small_.walk.segment.slot};
  }

  // Which of the warps that share rows this is.
  __device__ __forceinline__ int column_warp() const {
    if constexpr (kColumnWarps == 1) {
      return 0;
    } else {
      return int(threadIdx.x) / 32 / kRowWarps;
    }
  }

  // The number of the thread's row r in the block.
  __device__ __forceinline__ int row_of(int r) const {
    return warp_row_ + r / 2 * 16 + r % 2 * 8 + lane_ / 4;
  }

  // ---- filling shared memory ----
  // What a mod makes of an element, rounded to the operands' type.
  template <class F>
  struct Mod {
    static constexpr bool kIdentity = false;
    F f;
    __device__ __forceinline__ uint16_t operator()(uint16_t x) const {
      return narrow<Elem>(f(widen<Elem>(x)));
    }
  };
  template <class Tile, bool kModified, class RowOf, class F>
  __device__ __forceinline__ void fill_modified(char* tile, int count, int64_t column_stride,
                                                bool vectors, const RowOf& row_of,
                                                const F& f) const {
    if constexpr (kModified) {
      fill<Tile, Elem, kThreads>(tile, count, column_stride, vectors, row_of, Mod<F>{f});
    } else {
      fill<Tile, Elem, kThreads>(tile, count, column_stride, vectors, row_of, NoMod{});
    }
  }

  // Starts copying Q, and computes what the row function needs of each row.
  __device__ __forceinline__ void start() {
    const RowTile tile = row_tile();
    const auto rows_of = [&](const void* data, const int64_t* stride) {
      const auto* head = static_cast<const uint16_t*>(data) + tile.kv_head * stride[1];
      if constexpr (Plan::kSequences) {
        return GlobalRows{head, stride[2], stride[3]};
      } else {
        return GlobalRows{head + tile.b * stride[0], stride[2], stride[3]};
      }
    };
    k_ = rows_of(p_.k, p_.k_stride);
    v_ = rows_of(p_.v, p_.v_stride);
    const int64_t* s = p_.q_stride;
    const uint16_t* base =
        static_cast<const uint16_t*>(p_.q) + tile.b * s[0] + tile.first_row * s[2];
    const bool vectors = GlobalRows{base, s[2], s[3]}.aligned() && s[1] % kChunkElements == 0;
    const auto row = [&](int i) { return base + tile.h(i) * s[1] + tile.q(i) * s[2]; };
    fill_modified<QTile, Fn::kHasQMod>(shared_, tile.count, s[3], vectors, row,
                                       [&](float x) { return Fn::q_mod(env_, x); });
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = row_of(r) < tile.count ? row_of(r) : tile.count - 1;
      rows_[r] = Fn::make_row(env_, tile.batch, tile.h(i), tile.query(i));
    }
  }

  __device__ __forceinline__ int keys_in(int tile) const {
    const int64_t left = keys() - int64_t(tile) * kBlockN;
    return int(left < kBlockN ? left : kBlockN);
  }

  // Starts copying a tile of K and V into a slot of the ring.
  __device__ __forceinline__ void fill_slot(int tile, int slot) const {
    const int count = keys_in(tile);
    char* k = shared_ + Shared::kK + slot * KTile::kBytes;
    char* v = shared_ + Shared::kV + slot * VTile::kBytes;
    if constexpr (Plan::kSequences) {
      small_.rows.locate(p_.sequences, tile * kBlockN);
      const auto k_row = [&](int i) { return small_.rows.row(k_, p_.k_stride[0], i); };
      const auto v_row = [&](int i) { return small_.rows.row(v_, p_.v_stride[0], i); };
      copy(k, v, count, k_.aligned() && p_.k_stride[0] % kChunkElements == 0,
           v_.aligned() && p_.v_stride[0] % kChunkElements == 0, k_row, v_row);
    } else {
      const int64_t first = int64_t(tile) * kBlockN;
      const uint16_t *k_first = k_.row(first), *v_first = v_.row(first);
      const auto k_row = [&](int i) { return k_first + i * k_.row_stride; };
      const auto v_row = [&](int i) { return v_first + i * v_.row_stride; };
      copy(k, v, count, k_.aligned(), v_.aligned(), k_row, v_row);
    }
  }

  template <class KRow, class VRow>
  __device__ __forceinline__ void copy(char* k, char* v, int count, bool k_vectors, bool v_vectors,
                                       const KRow& k_row, const VRow& v_row) const {
    fill_modified<KTile, Fn::kHasKMod>(k, count, k_.column_stride, k_vectors, k_row,
                                       [&](float x) { return Fn::k_mod(env_, x); });
    if constexpr (!Plan::kSharedKV) {
      fill_modified<VTile, Fn::kHasVMod>(v, count, v_.column_stride, v_vectors, v_row,
                                         [&](float x) { return Fn::v_mod(env_, x); });
    }
  }

  // ---- one pass over the keys ----
  __device__ __forceinline__ void pass(Mode mode) {
    KeyTiles<Plan, Fn> tiles(keys(), small_.classes);
    if constexpr (Plan::kScheduled) {
      tiles.take(int(small_.walk.segment.begin), int(small_.walk.segment.end));
    }
    KeyTile ahead[kStages - 1];  // the tiles in the ring, the next one first
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
      ahead[i] = tiles.next();
      if (ahead[i].index >= 0) fill_slot(ahead[i].index, i);
      cute::cp_async_fence();
    }
    alive_ = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      Fn::init(env_, rows_[r], state_[r]);
#pragma unroll
      for (int c = 0; c < kSums; ++c) o_[r][c] = 0;
    }
    uint32_t q[kOwnSteps][kAtoms][4];
    bool q_loaded = false;
    int slot = 0;
#pragma unroll 1
    while (ahead[0].index >= 0) {
      cute::cp_async_wait<kStages - 2>();
      __syncthreads();  // this slot is full, and nobody reads the one that is filled next
      const KeyTile next = tiles.next();
      if (next.index >= 0) {
        fill_slot(next.index, slot == 0 ? kStages - 1 : slot - 1);
      }
      cute::cp_async_fence();
      if constexpr (kHoldQ) {
        if (!q_loaded) {
#pragma unroll
          for (int step = 0; step < kOwnSteps; ++step) load_q(own(step), q[step]);
          q_loaded = true;
        }
      }
      attend(ahead[0], slot, mode, q);
#pragma unroll
      for (int i = 0; i + 1 < kStages - 1; ++i) ahead[i] = ahead[i + 1];
      ahead[kStages - 2] = next;
      slot = slot + 1 == kStages ? 0 : slot + 1;
    }
    cute::cp_async_wait<0>();
  }

  __device__ __forceinline__ void load_q(int step, uint32_t (&a)[kAtoms][4]) const {
    const auto reader = read_a<QTile>(shared_, warp_row_, lane_);
#pragma unroll
    for (int m = 0; m < kAtoms; ++m) reader.load(16 * m, 2 * step, a[m]);
  }

  __device__ __forceinline__ void attend(KeyTile tile, int slot, Mode mode,
                                         uint32_t (&q)[kOwnSteps][kAtoms][4]) {
    char* k = shared_ + Shared::kK + slot * KTile::kBytes;
    char* v = shared_ + Shared::kV + slot * VTile::kBytes;
    float s[kRows][kKeys] = {};
    const auto k_reader = read_b<KTile>(k, lane_);
#pragma unroll
    for (int step = 0; step < kOwnSteps; ++step) {
      if (kSteps % kColumnWarps != 0 && own(step) >= kSteps) break;
      if constexpr (!kHoldQ) load_q(own(step), q[0]);
      uint32_t (&a)[kAtoms][4] = q[kHoldQ ? step : 0];
#pragma unroll
      for (int pair = 0; pair < kBlockN / 16; ++pair) {
        uint32_t b[4];
        k_reader.load(16 * pair, 2 * own(step), b);
#pragma unroll
        for (int m = 0; m < kAtoms; ++m) {
          multiply_add<Elem>(s[2 * m], s[2 * m + 1], 2 * pair, a[m], b[0], b[1]);
          multiply_add<Elem>(s[2 * m], s[2 * m + 1], 2 * pair + 1, a[m], b[2], b[3]);
        }
      }
    }

    if constexpr (kColumnWarps > 1) {
      // The tile before has been read: a barrier of the block came since.
      exchange_scores<kRowWarps, kColumnWarps>(shared_ + Shared::kExchange, s);
    }
    const int count = keys_in(tile.index);
    if (tile.full && count == kBlockN) {
      weigh<false>(tile, count, s);
    } else {
      weigh<true>(tile, count, s);
    }
    uint32_t w[kBlockN / 16][kAtoms][4];  // the weights as A operands
#pragma unroll
    for (int step = 0; step < kBlockN / 16; ++step) {
#pragma unroll
      for (int m = 0; m < kAtoms; ++m) {
        const float (&upper)[kKeys] = s[2 * m], (&lower)[kKeys] = s[2 * m + 1];
        w[step][m][0] = pack2<Elem>(upper[4 * step], upper[4 * step + 1]);
        w[step][m][1] = pack2<Elem>(lower[4 * step], lower[4 * step + 1]);
        w[step][m][2] = pack2<Elem>(upper[4 * step + 2], upper[4 * step + 3]);
        w[step][m][3] = pack2<Elem>(lower[4 * step + 2], lower[4 * step + 3]);
      }
    }
    if (mode == kAdd) {
      if (any_nonfinite<VTile, Elem, kThreads>(v)) add_nonfinite(k, v, w);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int c = 0; c < kSums; ++c) o_[r][c] = 0;  // no longer needed: costs no registers here
      }
      return;
    }
    if (mode == kClear) {
      clear_nonfinite<VTile, Elem, kThreads>(v);
      __syncthreads();
    }

    const auto v_reader = read_b_transposed<VTile>(v, lane_);
#pragma unroll
    for (int step = 0; step < kBlockN / 16; ++step) {
#pragma unroll
      for (int pair = 0; pair < kColumns / 16; ++pair) {
        uint32_t b[4];
        v_reader.load_transposed(16 * step, column_warp() * (kColumns / 8) + 2 * pair, b);
#pragma unroll
        for (int m = 0; m < kAtoms; ++m) {
          multiply_add<Elem>(o_[2 * m], o_[2 * m + 1], 2 * pair, w[step][m], b[0], b[1]);
          multiply_add<Elem>(o_[2 * m], o_[2 * m + 1], 2 * pair + 1, w[step][m], b[2], b[3]);
        }
      }
    }
  }

  // Step i of the products Q K^T that this warp computes.
  __device__ __forceinline__ int own(int i) const { return column_warp() * kOwnSteps + i; }

  // Scores to weights, row by row; sums so far are scaled by each row's factor.
  template <bool kPartial>
  __device__ __forceinline__ void weigh(KeyTile tile, int count, float (&s)[kRows][kKeys]) {
    const float scale = float(p_.scale);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float factor = 1;
      const bool live =
          Fn::template tile_row<kPartial>(env_, rows_[r], scale, s[r], state_[r], factor,
                                          tile.index * kBlockN, count, tile.full, lane_);
      alive_ |= uint32_t(live) << r;
#pragma unroll
      for (int c = 0; c < kSums; ++c) o_[r][c] *= factor;
    }
  }

  // Whether any sum of the block is Inf or NaN: the same answer in every thread.
  __device__ __forceinline__ bool sums_nonfinite() const {
    bool found = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kSums; ++c) found |= !(fabsf(o_[r][c]) <= 3.402823466e38f);
    }
    return __syncthreads_or(found) != 0;
  }

  // ---- results ----
  __device__ __forceinline__ void store() {
    const RowTile tile = row_tile();
    if constexpr (Plan::kScheduled) {
      if (is_part()) return store_part(tile.count);
    }
    const int64_t* s = p_.out_stride;
    uint16_t* base = static_cast<uint16_t*>(p_.out) + tile.b * s[0] + tile.first_row * s[2];
    const bool vectors = GlobalRows{base, s[2], s[3]}.aligned() && s[1] % kChunkElements == 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const bool exists = row_of(r) < tile.count;
      const int i = exists ? row_of(r) : tile.count - 1;
      const int q = tile.q(i), h = tile.h(i);
      float stats[Fn::kStats > 0 ? Fn::kStats : 1];
      float factor = 1;
      Fn::finalize(env_, rows_[r], state_[r], factor, stats);
      if (lane_ % 4 == 0 && column_warp() == 0) small_.out_factors[row_of(r)] = factor;
      const bool alive = (alive_ >> r & 1) != 0;
#pragma unroll
      for (int c = 0; c < kSums; ++c) o_[r][c] = alive ? o_[r][c] * factor : 0.0f;
      constexpr int kWidth = kColumnWarps == 1 ? Plan::kDv : kColumns;
      store_row<Elem, kWidth>(base + h * s[1] + q * s[2] + column_warp() * kColumns * s[3], s[3],
                              vectors, exists, o_[r], lane_);
      if (p_.stats != nullptr && exists && lane_ % 4 == 0 && column_warp() == 0) {
        const int64_t* step = p_.stats_stride;
        float* to =
            static_cast<float*>(p_.stats) + tile.b * step[1] + h * step[2] + tile.first_row + q;
#pragma unroll
        for (int n = 0; n < Fn::kStats; ++n) to[n * step[0]] = stats[n];
      }
    }
  }

  // Sums that are not normalised, and states: what ae_combine merges.
  __device__ __forceinline__ void store_part(int count) {
    const auto part = slot();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = row_of(r);
      if (row >= count) continue;
      const bool alive = (alive_ >> r & 1) != 0;
      float* to = part.out(row) + column_warp() * kColumns + lane_ % 4 * 2;
#pragma unroll
      for (int c = 0; c < kSums; c += 2) {
        if (kColumnWarps == 1 && 4 * c >= part.kPitch) break;
        *reinterpret_cast<float2*>(to + 4 * c) =
            alive ? make_float2(o_[r][c], o_[r][c + 1]) : make_float2(0.0f, 0.0f);
      }
      if (lane_ % 4 != 0 || column_warp() != 0) continue;
#pragma unroll
      for (int n = 0; n < Fn::kStates; ++n) part.states(row)[n] = state_[r][n];
      part.alive(row) = alive ? 1.0f : 0.0f;
    }
  }

  // Adds what Inf and NaN in a tile of V give to outputs that have been stored.
  template <int kKeySteps>
  __device__ __forceinline__ void add_nonfinite(char* k, char* v,
                                                const uint32_t (&w)[kKeySteps][kAtoms][4]) {
    const RowTile tile = row_tile();
    const int64_t* s = p_.out_stride;
    const auto add = [&](int row, int column, float x) {
      if (row >= tile.count || column >= Plan::kDv) return;
      if constexpr (Plan::kScheduled) {
        if (is_part()) {
          slot().out(row)[column] += x;
          return;
        }
      }
      uint16_t* out = static_cast<uint16_t*>(p_.out) + tile.b * s[0] + tile.h(row) * s[1] +
                      (tile.first_row + tile.q(row)) * s[2] + column * s[3];
      *out = narrow<Elem>(widen<Elem>(*out) + x * small_.out_factors[row]);
    };
    // K is no longer needed, unless V lies in it.
    constexpr int kScratch = Plan::kSharedKV ? Shared::kExchangeBytes : KTile::kBytes;
    char* scratch = Plan::kSharedKV ? shared_ + Shared::kExchange : k;
    each_nonfinite<VTile, Elem, kBlockM, kThreads, kScratch>(
        v, scratch, w, [&](int r) { return row_of(r); }, add, lane_);
  }
};

}  // namespace ae
