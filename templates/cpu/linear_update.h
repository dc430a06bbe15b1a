// The state after a chunk: S = factor S + K^T V, and the copy of it that products read.
#pragma once
#include "cpu/linear_operand.h"

namespace ae {

// kRows x (kRegs W) of S, N elements between rows. Meanwhile the rows below are fetched: a state
// comes from the second cache. `packed` null: no copy.
template <class T, int kRows, int kRegs>
AE_INLINE void update_block(int64_t steps, const typename T::M* a, int64_t a_row, int64_t a_step,
                            const typename T::M* b, typename T::Acc* s,
                            const typename T::Acc* factor, typename T::M* packed,
                            LinearFetch& next) {
  using Step = GemmStep<typename T::Acc, typename T::M>;
  using V = typename Step::V;
  constexpr int N = T::kPanel, W = T::W, kPair = T::kPair;
  V sum[kRows][kRegs];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kRegs; ++j) {
      sum[i][j] = load_vector<V>(s + i * N + j * W);
      if constexpr (T::kDecay != DecayKind::kNone) sum[i][j] *= factor[i];
      __builtin_prefetch(s + (i + kRows) * N + j * W);
    }
  }
  while (steps > 0) {
    LinearRun run = next.take(steps, b);
    steps -= run.steps;
    for (; run.steps > 0; --run.steps, a += a_step, b += N * kPair) {
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
    for (int j = 0; j < kRegs; ++j) store_vector(s + i * N + j * W, sum[i][j]);
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

template <class T, int kRegs>
__attribute__((noinline)) void update_panel(int64_t steps, const typename T::M* a, int64_t a_row,
                                            int64_t a_step, const typename T::M* b,
                                            typename T::Acc* s, const typename T::Acc* factor,
                                            typename T::M* packed, LinearFetch& next) {
  int i = 0;
  const auto rows = [&]<int kRows>() {
    for (; i + kRows <= T::kD; i += kRows) {
      update_block<T, kRows, kRegs>(steps, a + i * a_row, a_row, a_step, b,
                                    s + int64_t(i) * T::kPanel, factor + i,
                                    packed ? packed + int64_t(i) * T::kPanel : nullptr, next);
    }
  };
  rows.template operator()<kGemmRows>();
  if constexpr (kGemmRows > 4) rows.template operator()<4>();
  rows.template operator()<2>();
  rows.template operator()<1>();
}

// A panel of a state, [kD][kPanel]: rows times `factor` (where there is a decay) plus A B over
// `steps` steps of tokens; a as gemm.h has it, b with rows of kPanel. `packed`, if not null, gets
// the new state as pack_state has it.
template <class T>
void update_state(int64_t steps, const typename T::M* a, int64_t a_row, int64_t a_step,
                  const typename T::M* b, typename T::Acc* s, const typename T::Acc* factor,
                  typename T::M* packed, LinearFetch& next) {
  constexpr int kColumns = kGemmRegs * T::W, kRest = T::kPanel % kColumns / T::W;
  const auto panel = [&]<int kRegs>(int j) {
    update_panel<T, kRegs>(steps, a, a_row, a_step, b + j * T::kPair, s + j, factor,
                           packed ? packed + j * T::kPair : nullptr, next);
  };
  int j = 0;
  for (; j + kColumns <= T::kPanel; j += kColumns) panel.template operator()<kGemmRegs>(j);
  if constexpr (kRest > 0) panel.template operator()<kRest>(j);
}

}  // namespace ae
