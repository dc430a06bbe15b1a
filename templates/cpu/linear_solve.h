// (I + A) X = B for a strictly lower triangular A of a chunk, by 16 x 16 blocks: the diagonal
// blocks are inverted once, the rest are products. All in the accumulator type.
#pragma once
#include "cpu/linear_work.h"

namespace ae {

// inverse[b] = (I + A_bb)^-1, [C / 16][16][16], from `minus` = -A [C][C]. Rows past n are those of
// the identity. All blocks advance together: a row waits for the one before.
template <class Acc, int C>
__attribute__((noinline)) void invert_diagonal(const Acc* minus, int n, Acc* inverse) {
  using V = typename Lanes<Acc>::Acc;
  constexpr int W = Lanes<Acc>::W, kBlock = kLinearBlock;
  const int blocks = (n + kBlock - 1) / kBlock;
  for (int i = 0; i < kBlock; ++i) {
    for (int b = 0; b < blocks; ++b) {
      Acc* x = inverse + b * kBlock * kBlock;
      const Acc* row = minus + int64_t(b * kBlock + i) * C + b * kBlock;
      const int before = b * kBlock + i < n ? i : 0;
      V sum[kBlock / W]{};
      for (int j = 0; j < before; ++j) {
        for (int c = 0; c < kBlock / W; ++c) {
          sum[c] += row[j] * load_vector<V>(x + j * kBlock + c * W);
        }
      }
      sum[i / W][i % W] = 1;
      for (int c = 0; c < kBlock / W; ++c) store_vector(x + i * kBlock + c * W, sum[c]);
    }
  }
}

// X [n][N]: in: right sides, changed; out: solutions in `out` (another array). kTransposed: (I +
// A)^T, of which rows past n count as zero; out and x then hold whole blocks of rows.
template <class Acc, int C, int N, bool kTransposed = false>
__attribute__((noinline)) void solve_unit_lower(const Acc* minus, const Acc* inverse, int n, Acc* x,
                                                Acc* out) {
  constexpr int kBlock = kLinearBlock;
  const int blocks = (n + kBlock - 1) / kBlock;
  for (int i = 0; i < blocks; ++i) {
    const int b = kTransposed ? blocks - 1 - i : i;
    const int first = b * kBlock, rows = n - first < kBlock ? n - first : kBlock;
    Acc* here = x + int64_t(first) * N;
    const Acc* t = inverse + b * kBlock * kBlock;
    if constexpr (kTransposed) {
      const int after = first + kBlock;
      if (after < n) {
        gemm<Acc, Acc, N, GemmMode::kAccumulate>(rows, n - after,
                                                 minus + int64_t(after) * C + first, 1, C,
                                                 out + int64_t(after) * N, N, here, N);
      }
      gemm<Acc, Acc, N, GemmMode::kOverwrite>(rows, rows, t, 1, kBlock, here, N,
                                              out + int64_t(first) * N, N);
    } else {
      if (b > 0) {
        gemm<Acc, Acc, N, GemmMode::kAccumulate>(rows, first, minus + int64_t(first) * C, C, 1, out,
                                                 N, here, N);
      }
      gemm<Acc, Acc, N, GemmMode::kOverwrite>(rows, rows, t, kBlock, 1, here, N,
                                              out + int64_t(first) * N, N);
    }
  }
}

// The same, row after row and only from rows before: where X holds Inf or NaN, products with the
// zeros above the diagonal would carry them back in time.
template <class Acc, int C, int N>
__attribute__((noinline)) void solve_by_rows(const Acc* minus, int n, const Acc* x, Acc* out) {
  using V = typename Lanes<Acc>::Acc;
  for (int t = 0; t < n; ++t) {
    for (int j = 0; j < N; j += Lanes<Acc>::W) {
      V sum = load_vector<V>(x + int64_t(t) * N + j);
      for (int s = 0; s < t; ++s) {
        sum += minus[int64_t(t) * C + s] * load_vector<V>(out + int64_t(s) * N + j);
      }
      store_vector(out + int64_t(t) * N + j, sum);
    }
  }
}

}  // namespace ae
