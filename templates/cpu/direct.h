// Scores of few query rows from keys as they lie in memory. A packed K tile pays when many rows
// read it; for a row or a few of them (decoding) reading K once, in order, is all there is to do.
#pragma once
#include "cpu/gemm.h"
#include "cpu/pack.h"

namespace ae {

// Lane i of the result is the sum of the lanes of x[i]: log2(W) rounds that halve the vectors.
template <int kDistance, class V, int W>
AE_INLINE V sum_each(V (&x)[W]) {
  if constexpr (kDistance < W) {
    using I = decltype(x[0] < x[0]);
    I low{}, high{};
    for (int i = 0; i < W; ++i) {
      low[i] = (i & kDistance) ? W + i - kDistance : i;
      high[i] = (i & kDistance) ? W + i : i + kDistance;
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; i += 2 * kDistance) {
      const V a = x[i], b = x[i + kDistance];
      x[i] = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
    }
    return sum_each<2 * kDistance>(x);
  } else {
    return x[0];
  }
}

// One vector of keys as they are multiplied: M as it lies, narrower elements widened.
template <class Acc, class M, class E>
AE_INLINE typename GemmStep<Acc, M>::V load_key(const E* p) {
  if constexpr (__is_same(M, E)) {
    return load_vector<typename GemmStep<Acc, M>::V>(p);
  } else {
    return load_widened<Acc>(p);
  }
}

// scores[i][j] = q_i . k_j for rows i < m, keys j < n (n a multiple of W). Row i of q is at
// q + i * q_row, key j at k + j * k_row; D elements each, a whole number of vectors. Fetches ahead
// the keys that follow n keys later.
template <class Acc, class M, int D, class E>
__attribute__((noinline)) void direct_scores(int m, const M* q, int64_t q_row, const E* k,
                                             int64_t k_row, int n, Acc* scores, int64_t ld) {
  using Step = GemmStep<Acc, M>;
  using V = typename Step::V;
  constexpr int W = Lanes<Acc>::W, kLanes = W * Step::kPair;
  static_assert(D % kLanes == 0, "rows must be whole vectors");
  for (int j = 0; j < n; j += W, k += W * k_row) {
    for (int j1 = 0; j1 < W; ++j1) {
      for (int d = 0; d < D; d += kLanes) __builtin_prefetch(k + (n + j1) * k_row + d, 0, 2);
    }
    for (int i = 0; i < m; ++i) {
      V sum[W];
#pragma GCC unroll 16
      for (int j1 = 0; j1 < W; ++j1) sum[j1] = V{};
      for (int d = 0; d < D; d += kLanes) {
        const V x = load_vector<V>(q + i * q_row + d);
#pragma GCC unroll 16
        for (int j1 = 0; j1 < W; ++j1) {
          sum[j1] = Step::multiply_add(sum[j1], x, load_key<Acc, M>(k + j1 * k_row + d));
        }
      }
      store_vector(scores + i * ld + j, sum_each<1>(sum));
    }
  }
}

}  // namespace ae
