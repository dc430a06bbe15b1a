// What forward and backward of linear attention share of a chunk:
//
//   linear_work.h     types, sizes, where a chunk is (LinearTypes, LinearAt)
//   linear_operand.h  operands, decays and beta through their hooks (LinearInputs); sums as
//   operands linear_decay.h    scalar decay: e, f, D (LinearGates, each_lower, decay_matrix), M and
//   -A linear_channel.h  channel decay: the same, in 16-token blocks (LinearChannel) linear_solve.h
//   (I + A) X = B and its transpose here              operands of q and k, raw products below the
//   diagonal, the packed state
//
//   r = v - (k e) S,  (I + A) Vn = beta r,  A_ts = beta_t (k_t . k_s) D_ts          s < t
//   O = scale ((q e) S + M Vn),  M_ts = (q_t . k_s) D_ts                            s <= t
//   S' = total S + (k f)^T Vn
//
// Tiles, with T = LinearTypes<Plan> and M its multiply type:
//   by row        [kChunk][kDPitch], natural rows: A operand (kDPitch, kPair)
//   transposed    [kDSteps][kChunk][kPair]: B operand over channels, ldb = kChunk
//   over tokens   [kChunk / kPair][kDPitch][kPair]: B operand over tokens, and as A operand its
//                 transpose (kPair, kPair * kDPitch). With kPair = 1 the same as by row.
#pragma once
#include "cpu/linear_channel.h"
#include "cpu/linear_decay.h"
#include "cpu/linear_operand.h"
#include "cpu/linear_solve.h"

namespace ae {

// Tiles of q or k. Rows past n are zero, up to the whole chunk.
template <class Plan, class Rows>
__attribute__((noinline)) void tile_by_row(const Rows& rows, int n,
                                           typename LinearTypes<Plan>::M* dst) {
  using T = LinearTypes<Plan>;
  pack_rows<typename T::Acc, typename T::M, T::kD>(dst, rows, rows.col, n, T::kChunk, NoMod{});
}
template <class Plan, class Rows>
__attribute__((noinline)) void tile_over_tokens(const Rows& rows, int n,
                                                typename LinearTypes<Plan>::M* dst) {
  using T = LinearTypes<Plan>;
  pack_by_row<typename T::Acc, typename T::M, T::kD>(dst, rows, rows.col, n, T::kChunk, NoMod{});
}
// The same as accumulators; `dst` may be the rows themselves.
template <class Plan, class Rows>
__attribute__((noinline)) void tile_sums(const Rows& rows, int n,
                                         typename LinearTypes<Plan>::Acc* dst) {
  using T = LinearTypes<Plan>;
  pack_rows<typename T::Acc, typename T::Acc, T::kD>(dst, rows, rows.col, n, T::kChunk, NoMod{});
}
// Columns of whole vectors past n are not written, nor read by lower_product.
template <class Plan, class Rows>
__attribute__((noinline)) void tile_by_channel(const Rows& rows, int n,
                                               typename LinearTypes<Plan>::M* dst) {
  using T = LinearTypes<Plan>;
  pack_by_column<typename T::Acc, typename T::M, T::kD>(dst, rows, rows.col, n, T::kChunk, NoMod{});
}

// The raw products x_t . k_s of all s of t's 16-token block and of those before, [C][C]; what lies
// above the diagonal is anything. x: by row; k: transposed.
template <class Plan>
__attribute__((noinline)) void lower_product(const typename LinearTypes<Plan>::M* x,
                                             const typename LinearTypes<Plan>::M* k, int n,
                                             typename LinearTypes<Plan>::Acc* p) {
  using T = LinearTypes<Plan>;
  const auto block = [&]<int kBlock>() {
    constexpr int first = kBlock * kLinearBlock;
    if (first >= n) return;
    gemm<typename T::Acc, typename T::M, first + kLinearBlock, GemmMode::kOverwrite>(
        n - first < kLinearBlock ? n - first : kLinearBlock, T::kDSteps, x + first * T::kDPitch,
        T::kDPitch, T::kPair, k, T::kChunk, p + int64_t(first) * T::kChunk, T::kChunk);
  };
  [&]<int... I>(std::integer_sequence<int, I...>) {
    (block.template operator()<I>(), ...);
  }(std::make_integer_sequence<int, T::kBlocks>());
}

// One panel of a state, [kD][kPanel] sums, as a B operand over channels.
template <class Plan>
__attribute__((noinline)) void pack_state(const typename LinearTypes<Plan>::Acc* s,
                                          typename LinearTypes<Plan>::M* dst) {
  using T = LinearTypes<Plan>;
  pack_sums<typename T::Acc, typename T::M, T::kPanel>(dst, s, T::kD,
                                                       [](int) { return typename T::Acc(1); });
}

}  // namespace ae
