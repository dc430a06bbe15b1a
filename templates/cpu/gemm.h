// Small matrix products on packed tiles: C[m x N] = A[m x k] * B[k x N], the only two multiply
// loops of every CPU kernel.
//
//   gemm<Acc, M, N, mode>(m, steps, a, a_row, a_step, b, ldb, c, ldc, factor)
//
// M is the multiply type. M = Acc (float or double): fused multiply-add, one step = one k.
// M = bf16 (needs kHasBf16Dot, Acc = float): bf16 dot products, one step = two consecutive k.
//
//   a       element (i, step) at a + i * a_row + step * a_step, in elements of M; for bf16 the two
//           elements of the pair are adjacent. So a natural [m][lda] tile is (a_row = lda,
//           a_step = 1), or a_step = 2 for bf16; a transposed tile [k][lda] is (1, lda); and
//           transposed bf16 pairs [k/2][lda][2] are (2, 2 * lda).
//   b       [k][ldb], or pairs [k/2][ldb][2] for bf16; ldb counts columns in both.
//   c       row-major Acc, ldc elements between rows.
//   mode    kOverwrite: C = AB. kAccumulate: C += AB. kScale: row i of C = C * factor[i] + AB.
//
// m and steps are any number >= 0 (steps = 0 gives AB = 0); N is a multiple of the lane count W.
// Padding of k must be zero in A and finite in B, or the other way round.
#pragma once
#include "cpu/memory.h"
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace ae {

enum class GemmMode { kOverwrite, kAccumulate, kScale };

// The main shape: rows x vector registers. 24 accumulators + 4 B + 1 A of 32 registers, or 12 + 2 +
// 1 of 16. Without fused multiply-add the product needs one register more.
#if defined(__AVX512F__)
constexpr int kGemmRows = 6, kGemmRegs = 4;
#elif defined(__FMA__)
constexpr int kGemmRows = 6, kGemmRegs = 2;
#else
constexpr int kGemmRows = 4, kGemmRegs = 2;
#endif

template <class Acc, class M>
struct GemmStep;

template <class Acc>
struct GemmStep<Acc, Acc> {
  using V = typename Lanes<Acc>::Acc;
  static constexpr int kPair = 1;
  // x - 0 is x, also for -0: a plain broadcast.
  static AE_INLINE V broadcast(const Acc* a) { return *a - V{}; }
  static AE_INLINE V multiply_add(V c, V a, V b) { return a * b + c; }
};

#if defined(__AVX512BF16__)
template <>
struct GemmStep<float, bf16> {
  using V = typename Lanes<float>::Acc;
  static constexpr int kPair = 2;
  // The pair is broadcast into a register once: as a memory operand of each product it would cost a
  // quarter of the rate (measured).
  static AE_INLINE V broadcast(const bf16* a) {
    int32_t pair;
    __builtin_memcpy(&pair, a, sizeof pair);
    return (V)_mm512_set1_epi32(pair);
  }
  static AE_INLINE V multiply_add(V c, V a, V b) {
    return (V)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// W values of the accumulator type in the multiply type: how weights become an A operand. The bf16
// instruction rounds to nearest even and flushes subnormals, as the product would.
template <class M, class V>
AE_INLINE void store_multiply(M* p, V x) {
#if defined(__AVX512BF16__)
  if constexpr (__is_same(M, bf16)) {
    store_vector(p, _mm512_cvtneps_pbh((__m512)x));
    return;
  }
#endif
  store_vector(p, x);
}
template <class V, class M>
AE_INLINE void store_zeros(M* p, int n) {
  for (int j = 0; j < n; j += int(sizeof(V) / sizeof(V{}[0]))) store_multiply(p + j, V{});
}

// Whether one of n accumulator values is NaN.
template <class V, class A>
AE_INLINE bool any_nan(const A* p, int n) {
  bool found = false;
  for (int j = 0; j < n; ++j) found |= p[j] != p[j];
  return found;
}

// kRows x (kRegs * W) of C, held in registers over all steps.
template <class Acc, class M, int kRows, int kRegs, GemmMode kMode>
AE_INLINE void gemm_block(int64_t steps, const M* a, int64_t a_row, int64_t a_step, const M* b,
                          int64_t ldb, Acc* c, int64_t ldc, const Acc* factor) {
  using Step = GemmStep<Acc, M>;
  using V = typename Step::V;
  constexpr int W = Lanes<Acc>::W;
  V sum[kRows][kRegs];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kRegs; ++j) {
      if constexpr (kMode == GemmMode::kOverwrite) {
        sum[i][j] = V{};
      } else {
        sum[i][j] = load_vector<V>(c + i * ldc + j * W);
        if constexpr (kMode == GemmMode::kScale) sum[i][j] *= factor[i];
      }
    }
  }
  for (int64_t s = 0; s < steps; ++s, a += a_step, b += ldb * Step::kPair) {
    V bv[kRegs];
#pragma GCC unroll 8
    for (int j = 0; j < kRegs; ++j) {
      bv[j] = load_vector<V>(b + j * int64_t(sizeof(V) / sizeof(M)));
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const V av = Step::broadcast(a + i * a_row);
#pragma GCC unroll 8
      for (int j = 0; j < kRegs; ++j) sum[i][j] = Step::multiply_add(sum[i][j], av, bv[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kRegs; ++j) store_vector(c + i * ldc + j * W, sum[i][j]);
  }
}

// All m rows of one panel of kRegs * W columns, so that the panel of B stays in the first cache.
template <class Acc, class M, int kRegs, GemmMode kMode>
__attribute__((noinline)) void gemm_panel(int m, int64_t steps, const M* a, int64_t a_row,
                                          int64_t a_step, const M* b, int64_t ldb, Acc* c,
                                          int64_t ldc, const Acc* factor) {
  int i = 0;
  const auto rows = [&]<int kRows>() {
    for (; i + kRows <= m; i += kRows) {
      gemm_block<Acc, M, kRows, kRegs, kMode>(steps, a + i * a_row, a_row, a_step, b, ldb,
                                              c + i * ldc, ldc, factor + i);
    }
  };
  rows.template operator()<kGemmRows>();
  if constexpr (kGemmRows > 4) rows.template operator()<4>();
  rows.template operator()<2>();
  rows.template operator()<1>();
}

// Panels of C that start at or after `columns` are left alone.
template <class Acc, class M, int N, GemmMode kMode>
AE_INLINE void gemm(int m, int64_t steps, const M* a, int64_t a_row, int64_t a_step, const M* b,
                    int64_t ldb, Acc* c, int64_t ldc, const Acc* factor = nullptr,
                    int columns = N) {
  constexpr int W = Lanes<Acc>::W, kPair = GemmStep<Acc, M>::kPair;
  constexpr int kPanel = kGemmRegs * W;
  constexpr int kRest = N % kPanel / W;
  static_assert(N % W == 0, "columns must be padded to whole vectors");
  int j = 0;
  for (; j + kPanel <= N && j < columns; j += kPanel) {
    gemm_panel<Acc, M, kGemmRegs, kMode>(m, steps, a, a_row, a_step, b + j * kPair, ldb, c + j, ldc,
                                         factor);
  }
  if constexpr (kRest > 0) {
    if (j >= columns) return;
    gemm_panel<Acc, M, kRest, kMode>(m, steps, a, a_row, a_step, b + j * kPair, ldb, c + j, ldc,
                                     factor);
  }
}

}  // namespace ae
