// Tiles of the backward pass of linear attention: accumulators as operands of gemm.h, products that
// skip what is above the diagonal, and sums over pairs of tokens that have a third between them.
#pragma once
#include "cpu/linear_backward_work.h"

namespace ae {

template <class Plan>
struct LinearTile {
  using X = LinearBackwardTypes<Plan>;
  using A = typename X::A;
  using M = typename X::M;
  using V = typename X::V;
  static constexpr int W = X::W, C = X::C, kPair = X::kPair;
  static constexpr int kRowBlock = 32;  // of triangular products

  static constexpr int steps(int n) { return (n + kPair - 1) / kPair; }

  // ---- operands, from accumulators or from what is in the multiply type already ----
  // An A operand: `n` elements, rounded into `room` where the types differ.
  template <class E>
  __attribute__((noinline)) static const M* natural(const E* x, M* room, int64_t n) {
    if constexpr (__is_same(E, M)) {
      return x;
    } else {
      for (int64_t i = 0; i < n; i += W) store_multiply(room + i, load_vector<V>(x + i));
      return room;
    }
  }
  // What natural or by_row of `same` has given.
  static const M* pick(const A* same, const M* copy) {
    if constexpr (X::kRounds) {
      return copy;
    } else {
      return same;
    }
  }
  // A B operand over `rows` rows of `kPitch` elements.
  template <int kPitch, class E>
  __attribute__((noinline)) static const M* by_row(const E* x, M* room, int rows) {
    if constexpr (!X::kRounds) {
      return x;
    } else if constexpr (__is_same(E, M)) {
      pack_pairs<A, kPitch>(room, StridedRows<M>{x, kPitch}, 1, rows, rows + rows % 2, NoMod{});
      return room;
    } else {
      pack_sums<A, M, kPitch>(room, x, rows, [](int) { return A(1); });
      return room;
    }
  }
  // The same, row i scaled by factor[i].
  template <int kPitch, class E>
  __attribute__((noinline)) static void by_scaled_row(const E* x, M* room, int rows,
                                                      const A* factor) {
    for (int i = 0; i < rows; i += kPair) {
      const bool whole = i + kPair <= rows;
      const E* p = x + int64_t(i) * kPitch;
      for (int j = 0; j < kPitch; j += W) {
        const V even = load_widened<A>(p + j) * factor[i];
        V odd{};
        if (kPair == 2 && whole) odd = load_widened<A>(p + kPitch + j) * factor[i + 1];
        store_pairs(room + int64_t(i) * kPitch + j * kPair, even, odd);
      }
    }
  }
  // A B operand over the first `kWidth` columns of a natural tile of C rows.
  template <int kWidth>
  static void by_column(const M* x, int pitch, M* dst) {
    pack_transposed<A, M, kWidth>(dst, StridedRows<M>{x, pitch}, 1, C, C, NoMod{});
  }

  static void clear(A* x, int64_t n) { __builtin_memset(x, 0, uint64_t(n) * sizeof(A)); }
  static void copy(A* dst, const A* src, int64_t n) {
    __builtin_memcpy(dst, src, uint64_t(n) * sizeof(A));
  }
  static void clear(M* x, int64_t n)
    requires X::kRounds
  {
    __builtin_memset(x, 0, uint64_t(n) * sizeof(M));
  }

  // ---- products ----
  // c[m x N] from a natural A operand and from the transpose of rows [k][pitch].
  template <int N, GemmMode kMode>
  static void times(int m, int k, const M* a, int pitch, const M* b, int ldb, A* c, int ldc,
                    const A* factor = nullptr) {
    gemm<A, M, N, kMode>(m, steps(k), a, pitch, kPair, b, ldb, c, ldc, factor);
  }
  template <int N, GemmMode kMode>
  static void transposed_times(int m, int k, const M* a, int pitch, const M* b, int ldb, A* c,
                               int ldc, const A* factor = nullptr) {
    gemm<A, M, N, kMode>(m, steps(k), a, kPair, kPair * pitch, b, ldb, c, ldc, factor);
  }
  // Rows of q or k, natural, times a state by row; and state = factor state + rows^T b, from rows
  // of q or k as a B operand holds them.
  static void state_times(int n, const M* rows, const M* state, A* c) {
    times<X::kVWidth, GemmMode::kOverwrite>(n, X::kD, rows, X::kDp, state, X::kVp, c, X::kVp);
  }
  template <GemmMode kMode>
  static void add_to_state(int n, const M* rows, const M* b, A* state, const A* factor) {
    transposed_times<X::kVWidth, kMode>(X::kD, n, rows, X::kDp, b, X::kVp, state, X::kVp, factor);
  }

  // U times rows by column: transposed, [D][C].
  static void adjoint_times(const LinearBackwardHead<Plan>& head, int64_t c, const M* col, M* room,
                            A* out) {
    if (head.ends_empty(c)) return clear(out, int64_t(X::kD) * C);
    const M* u = natural(head.state, room, int64_t(X::kD) * X::kVp);
    times<C, GemmMode::kOverwrite>(X::kD, X::kDv, u, X::kVp, col, C, out, C);
  }

  // c[n][C] = a b for the columns that rows reach, up to the diagonal; what is above may be
  // anything.
  static void lower_scores(int n, int k, const M* a, int pitch, const M* b, A* c) {
    const auto block = [&]<int kBlock>() {
      constexpr int first = kBlock * kRowBlock, end = first + kRowBlock < C ? first + kRowBlock : C;
      if (first >= n) return;
      gemm<A, M, end, GemmMode::kOverwrite>(n < end ? n - first : end - first, steps(k),
                                            a + int64_t(first) * pitch, pitch, kPair, b, C,
                                            c + int64_t(first) * C, C);
    };
    [&]<int... I>(std::integer_sequence<int, I...>) {
      (block.template operator()<I>(), ...);
    }(std::make_integer_sequence<int, (C + kRowBlock - 1) / kRowBlock>());
  }
  // c[n x N] += L b for a natural lower triangle L.
  template <int N>
  static void lower_times(int n, const M* l, const M* b, int ldb, A* c, int ldc) {
    for (int i = 0; i < n; i += kRowBlock) {
      const int rows = n - i < kRowBlock ? n - i : kRowBlock;
      times<N, GemmMode::kAccumulate>(rows, i + rows, l + i * C, C, b, ldb, c + int64_t(i) * ldc,
                                      ldc);
    }
  }
  // c[n x N] (scaled by `factor`) += L^T b, from the rows of L as a B operand holds them.
  template <int N, GemmMode kMode>
  static void lower_transposed_times(int n, const M* l, const M* b, int ldb, A* c, int ldc,
                                     const A* factor = nullptr) {
    for (int i = 0; i < n; i += kRowBlock) {
      const int rows = n - i < kRowBlock ? n - i : kRowBlock;
      transposed_times<N, kMode>(rows, n - i, l + int64_t(i) * C + i * kPair, C,
                                 b + int64_t(i) * ldb, ldb, c + int64_t(i) * ldc, ldc, factor + i);
    }
  }

  // ---- the same where x holds Inf or NaN ----
  // Products with the zeros above the diagonal would carry those to tokens that they do not reach.
  template <class E>
  static bool any_bad(const E* x, int n, int width, int pitch) {
    V seen{};
    for (int i = 0; i < n; ++i) {
      for (int d = 0; d < width; d += W) seen += load_widened<A>(x + int64_t(i) * pitch + d) * A(0);
    }
    return hsum(seen) != A(0);
  }
  // c[t] += sum of l[t][s] x[s] over s <= t, and c[s] += sum of l[t][s] factor[t] x[t] over t >= s.
  template <int kPitch>
  __attribute__((noinline)) static void lower_by_rows(int n, const A* l, const A* x, A* c) {
    for (int t = 0; t < n; ++t) {
      for (int s = 0; s <= t; ++s) add_row<kPitch>(l[t * C + s], x, s, c, t);
    }
  }
  template <int kPitch, class E>
  __attribute__((noinline)) static void lower_transposed_by_rows(int n, const A* l, const A* factor,
                                                                 const E* x, A* c) {
    for (int s = 0; s < n; ++s) {
      for (int t = s; t < n; ++t) {
        add_row<kPitch>(factor == nullptr ? l[t * C + s] : l[t * C + s] * factor[t], x, t, c, s);
      }
    }
  }
  // x of (I - L)^T x = b, in place.
  template <int kPitch>
  __attribute__((noinline)) static void solve_transposed_by_rows(int n, const A* minus, A* x) {
    for (int s = n - 2; s >= 0; --s) {
      for (int t = s + 1; t < n; ++t) add_row<kPitch>(minus[t * C + s], x, t, x, s);
    }
  }

  // ---- the gradient of decay ----
  // Row d of the state before chunk c times that of U, in lanes. An initial state counts as it was
  // given: beside one token its rounding would be most of the error.
  static AE_INLINE V states_dot(const LinearBackwardHead<Plan>& head, int64_t c, int d) {
    const A* u = head.state + int64_t(d) * X::kVp;
    V sum{};
    if (c > 0 || !X::kRounds) {
      const M* s = head.state_of(c) + int64_t(d) * X::kVp;
      for (int e = 0; e < X::kVWidth; e += W) sum += load_widened<A>(s + e) * load_vector<V>(u + e);
    } else if (head.initial.base != nullptr) {
      const A* s = head.initial(d);
      const int64_t col = head.initial.col;
      for (int e = 0; e < X::kDv; e += W) {
        const int count = X::kDv - e < W ? X::kDv - e : W;
        sum += load_lanes<A>(s + e * col, col, count) * load_vector<V>(u + e);
      }
    }
    return sum;
  }

  // Of scalar decay.
  // sums[r] = sum of w[t][s] over s < r <= t: no term is taken back, so nothing cancels. Rows are
  // filled up to the vector of the diagonal, with zeros behind s = t; a diagonal element counts
  // nowhere.
  __attribute__((noinline)) static void sums_across(int n, const A* w, A* sums) {
    A column[C] = {};
    for (int t = n - 1; t >= 0; --t) {
      const int j = t / W * W;
      V total{};
      for (int i = 0; i < j; i += W) {
        const V x = load_vector<V>(column + i) + load_vector<V>(w + t * C + i);
        store_vector(column + i, x);
        total += x;
      }
      const V x = load_vector<V>(column + j) + load_vector<V>(w + t * C + j);
      store_vector(column + j, x);
      sums[t] = hsum(V(total + first_lanes<A>(x, t - j)));
    }
  }

 private:
  // Row `to` of c += factor times row `from` of x.
  template <int kPitch, class E>
  static AE_INLINE void add_row(A factor, const E* x, int from, A* c, int to) {
    for (int d = 0; d < kPitch; d += W) {
      A* p = c + int64_t(to) * kPitch + d;
      store_vector(p, load_vector<V>(p) + factor * load_widened<A>(x + int64_t(from) * kPitch + d));
    }
  }
};

}  // namespace ae
