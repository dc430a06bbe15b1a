// The state after a chunk: S = factor S + K^T V, and the copy of it that products read.
#pragma once
#include "cpu/linear_operand.h"

namespace ae {

// What becomes of a state before products are added: nothing, or a factor of each row or column.
enum class StateDecay { kNone, kByRow, kByColumn };

// How a state lies: kRows x kWidth of it are updated, rows kPitch elements apart, from a B operand
// with rows of kOperandPitch.
template <int kRows_, int kWidth_, int kPitch_, int kOperandPitch_, StateDecay kDecay_>
struct LinearStateLayout {
  static constexpr int kRows = kRows_, kWidth = kWidth_, kPitch = kPitch_;
  static constexpr int kOperandPitch = kOperandPitch_;
  static constexpr StateDecay kDecay = kDecay_;
  static constexpr bool kByColumn = kDecay == StateDecay::kByColumn;
};

// kRows x (kRegs W) of S, from `from` to `to`, which may be the same. Meanwhile the rows below are
// fetched: a state comes from the second cache. `packed` null: no copy.
template <class T, class S, int kRows, int kRegs>
AE_INLINE void update_block(int64_t steps, const typename T::M* a, int64_t a_row, int64_t a_step,
                            const typename T::M* b, const typename T::Acc* from,
                            typename T::Acc* to, const typename T::Acc* factor,
                            typename T::M* packed, LinearFetch& next) {
  using Step = GemmStep<typename T::Acc, typename T::M>;
  using V = typename Step::V;
  constexpr int N = S::kPitch, W = T::W, kPair = T::kPair;
  V sum[kRows][kRegs];
#pragma GCC unroll 8
  for (int j = 0; j < kRegs; ++j) {
    V column{};
    if constexpr (S::kByColumn) column = load_vector<V>(factor + j * W);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      sum[i][j] = load_vector<V>(from + i * N + j * W);
      if constexpr (S::kByColumn) sum[i][j] *= column;
      if constexpr (S::kDecay == StateDecay::kByRow) sum[i][j] *= factor[i];
      __builtin_prefetch(from + (i + kRows) * N + j * W);
    }
  }
  while (steps > 0) {
    LinearRun run = next.take(steps, b);
    steps -= run.steps;
    for (; run.steps > 0; --run.steps, a += a_step, b += S::kOperandPitch * kPair) {
      run.fetch();
      V bv[kRegs];
#pragma GCC unroll 8
      for (int j = 0; j < kRegs; ++j) bv[j] = load_vector<V>(b + j * W * kPair);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const V av = Step::broadcast(a + i * a_row);
#pragma GCC unroll 8
        for (int j = 0; j < kRegs; ++j) sum[i][j] = Step::multiply_add(sum[i][j], av, bv[j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kRegs; ++j) store_vector(to + i * N + j * W, sum[i][j]);
  }
  if constexpr (kPair == 2) {
    if (packed == nullptr) return;
#pragma GCC unroll 8
    for (int i = 0; i < kRows; i += 2) {
#pragma GCC unroll 8
      for (int j = 0; j < kRegs; ++j) {
        store_pairs(packed + i * N + j * W * 2, sum[i][j], i + 1 < kRows ? sum[i + 1][j] : V{});
      }
    }
  }
}

template <class T, class S, int kRegs>
__attribute__((noinline)) void update_panel(int64_t steps, const typename T::M* a, int64_t a_row,
                                            int64_t a_step, const typename T::M* b,
                                            const typename T::Acc* from, typename T::Acc* to,
                                            const typename T::Acc* factor, typename T::M* packed,
                                            LinearFetch& next) {
  int i = 0;
  const auto rows = [&]<int kRows>() {
    for (; i + kRows <= S::kRows; i += kRows) {
      const int64_t at = int64_t(i) * S::kPitch;
      update_block<T, S, kRows, kRegs>(steps, a + i * a_row, a_row, a_step, b, from + at, to + at,
                                       S::kByColumn ? factor : factor + i,
                                       packed ? packed + at : nullptr, next);
    }
  };
  rows.template operator()<kGemmRows>();
  if constexpr (kGemmRows > 4) rows.template operator()<4>();
  rows.template operator()<2>();
  rows.template operator()<1>();
}

// A state of the layout S: `to` = `from` times `factor` (unused without decay) plus A B
// over `steps` steps of tokens; a as gemm.h has it. `packed`, if not null, gets the new state as
// pairs of rows, as pack_state has it.
template <class T, class S>
void update_state(int64_t steps, const typename T::M* a, int64_t a_row, int64_t a_step,
                  const typename T::M* b, const typename T::Acc* from, typename T::Acc* to,
                  const typename T::Acc* factor, typename T::M* packed, LinearFetch& next) {
  constexpr int kColumns = kGemmRegs * T::W, kRest = S::kWidth % kColumns / T::W;
  const auto panel = [&]<int kRegs>(int j) {
    update_panel<T, S, kRegs>(steps, a, a_row, a_step, b + j * T::kPair, from + j, to + j,
                              S::kByColumn ? factor + j : factor,
                              packed ? packed + j * T::kPair : nullptr, next);
  };
  int j = 0;
  for (; j + kColumns <= S::kWidth; j += kColumns) panel.template operator()<kGemmRegs>(j);
  if constexpr (kRest > 0) panel.template operator()<kRest>(j);
}

}  // namespace ae
