// What a thread of sm80/forward.cuh holds and where it stands: sizes of its share of a tile, sums,
// states, its rows, and the segment of keys that its block works on.
#pragma once
#include "common/env.h"
#include "cuda/capture.cuh"
#include "cuda/combine.cuh"
#include "cuda/key_rows.cuh"
#include "cuda/key_tiles.cuh"
#include "cuda/row_tile.cuh"
#include "sm80/forward_shared.cuh"

namespace ae {

template <class Plan, class Fn>
class ForwardThread {
 public:
  static constexpr int kCaptures = Fn::kCaptures > 0 ? Fn::kCaptures : 1;
  static constexpr int kThreads = 32 * Plan::kWarps;
  using Params = KernelParams<kCaptures>;

 protected:
  using Elem = typename Plan::Elem;
  using Shared = ForwardShared<Plan>;
  using QTile = typename Shared::Q;
  using KTile = typename Shared::K;
  using VTile = typename Shared::V;

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

  __device__ __forceinline__ ForwardThread(const Params& params, char* shared, Small& small)
      : params_(params),
        p_(params.p),
        env_{params.cap, params.p.fault, params.p.S},
        shared_(shared),
        small_(small),
        lane_(int(threadIdx.x) % 32),
        warp_row_(int(threadIdx.x) / 32 % kRowWarps * kWarpRows) {}

 protected:
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

  __device__ __forceinline__ int keys_in(int tile) const {
    const int64_t left = keys() - int64_t(tile) * kBlockN;
    return int(left < kBlockN ? left : kBlockN);
  }
};

}  // namespace ae
