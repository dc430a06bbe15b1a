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

// Rows of q or k that lie as a tile by row does.
template <class Plan, class Rows>
auto rows_in_place(const Rows& rows) {
  using T = LinearTypes<Plan>;
  using E = std::remove_cvref_t<decltype(*rows.base)>;
  const typename T::M* none = nullptr;
  if constexpr (__is_same(E, typename T::M) && T::kD == T::kDPitch) {
    return rows.col == 1 && rows.stride == T::kDPitch ? rows.base : none;
  } else {
    return none;
  }
}

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
  if constexpr (T::kPair == 1) {
    tile_by_row<Plan>(rows, n, dst);
  } else {
    using V = typename T::V;
    int first = 0;
    if (rows.col == 1 && T::kD == T::kDPitch) {
      for (; first + 2 <= n; first += 2) {
        each_pair<typename T::Acc, typename T::M, T::kDPitch>(
            rows(first), rows(first + 1), dst + int64_t(first) * T::kDPitch, [](int, V, V) {});
      }
    }
    for (int i = first; i < T::kChunk; i += 2) {
      const int live = n - i < 0 ? 0 : n - i < 2 ? n - i : 2;
      const auto* even = rows(live > 0 ? i : 0);
      const auto* odd = rows(live > 1 ? i + 1 : 0);
      for (int d = 0; d < T::kDPitch; d += T::W) {
        const int count = T::kD - d < T::W ? T::kD - d : T::W;
        const auto x =
            load_lanes<typename T::Acc>(even + d * rows.col, rows.col, live > 0 ? count : 0);
        const auto y =
            load_lanes<typename T::Acc>(odd + d * rows.col, rows.col, live > 1 ? count : 0);
        store_pairs(dst + int64_t(i) * T::kDPitch + 2 * d, x, y);
      }
    }
  }
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
  using Acc = typename T::Acc;
  using E = std::remove_cvref_t<decltype(*rows.base)>;
  using Unit = Vector<decltype(mask_element<Acc>()), T::W>;
  constexpr int W = T::W, kPair = T::kPair;
  for (int i = 0; i < n; i += W) {
    for (int u = 0; u < T::kDSteps; u += W) {
      Unit block[W];
      const E* from = rows(i) + u * kPair * rows.col;
      auto* to = dst + (int64_t(u) * T::kChunk + i) * kPair;
      if ((__is_same(E, typename T::M) || kPair == 1) && rows.col == 1 && i + W <= n &&
          (u + W) * kPair <= T::kD) {
#pragma GCC unroll 16
        for (int r = 0; r < W; ++r) {
          if constexpr (kPair == 1) {
            block[r] = (Unit)load_widened<Acc>(from + r * rows.stride);
          } else {
            block[r] = load_vector<Unit>(from + r * rows.stride);
          }
        }
        transpose<1>(block);
#pragma GCC unroll 16
        for (int c = 0; c < W; ++c) {
          store_vector(to + int64_t(c) * T::kChunk * kPair, block[c]);
        }
        continue;
      }
      for (int r = 0; r < W; ++r) {
        typename T::M part[W * kPair];
        for (int h = 0; h < kPair; ++h) {
          const int left = i + r < n ? T::kD - u * kPair - h * W : 0;
          const int count = left < 0 ? 0 : left < W ? left : W;
          const E* row = i + r < n ? from + r * rows.stride : from;
          store_multiply(part + h * W, load_lanes<Acc>(row + h * W * rows.col, rows.col, count));
        }
        block[r] = load_vector<Unit>(part);
      }
      transpose<1>(block);
      for (int c = 0; c < W && u + c < T::kDSteps; ++c) {
        store_vector(to + int64_t(c) * T::kChunk * kPair, block[c]);
      }
    }
  }
}

// Of one 16-token block of x. Narrow products are tall, to keep the multipliers busy.
template <class T, int kBlock>
__attribute__((noinline)) void lower_rows(const typename T::M* x, const typename T::M* k,
                                          typename T::Acc* p) {
  constexpr int kColumns = (kBlock + 1) * kLinearBlock;
  const auto panel = [&]<int kRegs>(int j) {
    constexpr int kRows = kRegs < 4 ? 8 : 4;
    for (int i = 0; i < kLinearBlock; i += kRows) {
      gemm_block<typename T::Acc, typename T::M, kRows, kRegs, GemmMode::kOverwrite>(
          T::kDSteps, x + i * T::kDPitch, T::kDPitch, T::kPair, k + j * T::kPair, T::kChunk,
          p + i * T::kChunk + j, T::kChunk, nullptr);
    }
  };
  constexpr int kPanel = 4 * T::W, kRest = kColumns % kPanel / T::W;
  int j = 0;
  for (; j + kPanel <= kColumns; j += kPanel) panel.template operator()<4>(j);
  if constexpr (kRest > 0) panel.template operator()<kRest>(j);
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
    if constexpr (kGemmRegs == 4) {
      if (first + kLinearBlock <= n) {
        lower_rows<T, kBlock>(x + first * T::kDPitch, k, p + int64_t(first) * T::kChunk);
        return;
      }
    }
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
