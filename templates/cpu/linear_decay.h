// Scalar decay inside a chunk. D: products of a_t = exp(g_t) <= 1, each grown by one factor from
// the last. Nothing is divided and no exponents are subtracted, so a decay of 0 is like any other.
// From and to the ends of the chunk: exp of sums of g_t <= 0, since products of one rounded a,
// chunk after chunk, would round the same way each time (retention over 8192 tokens in fp32: 4e-5).
#pragma once
#include "cpu/linear_work.h"
#include "cpu/math.h"

namespace ae {

// Of a chunk of n live tokens; past them a = 1.
template <class Acc, int C>
struct LinearGates {
  alignas(64) Acc a[C];  // exp(g_t)
  alignas(64) Acc e[C];  // product of a_r, r <= t: what is left of the state before the chunk
  alignas(64) Acc f[C];  // product of a_r, r > t: what is left of token t after the chunk
  Acc total;             // product of all

  // e holds g.
  void accumulate() {
    using V = typename Lanes<Acc>::Acc;
    Acc before = 0, after = 0;
    for (int t = C - 1; t >= 0; --t) {
      f[t] = after;
      after += e[t];
    }
    for (int t = 0; t < C; ++t) e[t] = before += e[t];
    for (int t = 0; t < C; t += Lanes<Acc>::W) {
      store_vector(e + t, ae::exp(load_vector<V>(e + t)));
      store_vector(f + t, ae::exp(load_vector<V>(f + t)));
    }
    total = e[C - 1];
  }
  void set_ones() {
    for (int t = 0; t < C; ++t) a[t] = e[t] = f[t] = 1;
    total = 1;
  }
};

// Visits the lower triangle in vectors, row by row: visit(t, j, d, live), where lane i of d is
// D_ts = product of a_r, s < r <= t, for s = j W + i <= t, and 0 past it; live is the number of
// lanes up to and with s = t, at most W. `a` null: no decay, D is 1.
template <class Acc, int C, class Visit>
AE_INLINE void each_lower(const Acc* a, int n, const Visit& visit) {
  using V = typename Lanes<Acc>::Acc;
  using I = decltype(V{} < V{});
  constexpr int W = Lanes<Acc>::W;
  alignas(64) Acc left[C];  // the last row, of the blocks before this
  I lane{};
  for (int i = 0; i < W; ++i) lane[i] = i;
  for (int j = 0; j * W < n; ++j) {
    V here{};
    for (int i = 0; i < W && j * W + i < n; ++i) {
      const int t = j * W + i;
      const V at = a == nullptr ? splat<V>(Acc(1)) : splat<V>(a[t]);
      for (int b = 0; b < j; ++b) {
        const V d = load_vector<V>(left + b * W) * at;
        store_vector(left + b * W, d);
        visit(t, b, d, W);
      }
      const V grown = lane < i ? here * at : V{};
      here = lane == i ? splat<V>(Acc(1)) : grown;
      visit(t, j, here, i + 1);
    }
    store_vector(left + j * W, here);
  }
}

// D itself, [C][C], 0 above the diagonal in the vectors that hold it.
template <class Acc, int C>
void decay_matrix(const Acc* a, int n, Acc* d) {
  using V = typename Lanes<Acc>::Acc;
  each_lower<Acc, C>(a, n, [=](int t, int j, V x, int) {
    store_vector(d + int64_t(t) * C + j * Lanes<Acc>::W, x);
  });
}

// M_ts = scale * p_ts * D_ts for s <= t, 0 for s > t within the vector: [C][C] of the multiply
// type. p: raw products [C][C]. Whatever p holds above the diagonal reaches nothing. With `sums`,
// sums[t] = sum of M_ts before rounding.
template <class Acc, class M, int C>
__attribute__((noinline)) void lower_weights(const Acc* p, const Acc* a, Acc scale, int n, M* m,
                                             Acc* sums) {
  using V = typename Lanes<Acc>::Acc;
  constexpr int W = Lanes<Acc>::W;
  V sum{};
  each_lower<Acc, C>(a, n, [&](int t, int j, V d, int live) {
    const int64_t at = int64_t(t) * C + j * W;
    V x = load_vector<V>(p + at) * d * scale;
    if (live < W) x = first_lanes<Acc>(x, live);
    store_multiply(m + at, x);
    if (sums != nullptr) {
      sum = j == 0 ? x : sum + x;
      if (j == t / W) sums[t] = hsum(sum);
    }
  });
}

// -A_ts = -beta_t * p_ts * D_ts for s < t, 0 on and above the diagonal within the vector: [C][C].
template <class Acc, int C>
__attribute__((noinline)) void delta_weights(const Acc* p, const Acc* a, const Acc* beta, int n,
                                             Acc* m) {
  using V = typename Lanes<Acc>::Acc;
  constexpr int W = Lanes<Acc>::W;
  each_lower<Acc, C>(a, n, [=](int t, int j, V d, int live) {
    const int64_t at = int64_t(t) * C + j * W;
    V x = load_vector<V>(p + at) * d * -beta[t];
    if (j == t / W) x = first_lanes<Acc>(x, live - 1);
    store_vector(m + at, x);
  });
}

}  // namespace ae
