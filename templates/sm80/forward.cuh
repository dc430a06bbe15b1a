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
#include "cuda/key_tiles.cuh"
#include "cuda/math.cuh"
#include "cuda/rows.cuh"
#include "cuda/tables.cuh"
#include "sm80/forward_results.cuh"
#include "sm80/forward_unit.cuh"
#include "sm80/nonfinite.cuh"
#include "sm80/product.cuh"

namespace ae {

template <class Plan, class Fn>
class Forward : public ForwardResults<Plan, Fn> {
  using Base = ForwardResults<Plan, Fn>;
  using Base::params_, Base::p_, Base::env_, Base::shared_, Base::small_, Base::lane_,
      Base::warp_row_, Base::rows_, Base::state_, Base::o_, Base::alive_, Base::kBlockN,
      Base::kStages, Base::kColumnWarps, Base::kRowWarps, Base::kAtoms, Base::kRows, Base::kKeys,
      Base::kColumns, Base::kSums, Base::kSteps, Base::kOwnSteps, Base::kHoldQ, Base::row_tile,
      Base::keys, Base::slot, Base::column_warp, Base::keys_in, Base::start, Base::fill_slot,
      Base::store, Base::add_nonfinite;
  using typename Base::Elem, typename Base::Shared, typename Base::QTile, typename Base::KTile,
      typename Base::VTile;

 public:
  using Base::Base, Base::kThreads;
  using typename Base::Params, typename Base::Small;

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
};

}  // namespace ae
