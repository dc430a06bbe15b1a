// Tiles of the backward pass of linear attention: accumulators as operands of gemm.h, products that
// skip what is above the diagonal, and sums over pairs of tokens that have a third between them.
#pragma once
#include "cpu/linear_backward_work.h"
#include "cpu/linear_update.h"

namespace ae {

template <class Plan>
struct LinearTile {
  using X = LinearBackwardTypes<Plan>;
  using A = typename X::A;
  using M = typename X::M;
  using V = typename X::V;
  static constexpr int W = X::W, C = X::C, kPair = X::kPair;
  static constexpr int kRowBlock = kLinearBlock;  // of triangular products

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
  template <class E>
  static const M* pick(const E* same, const M* copy) {
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
  // The same, of an operand whose first kWidth columns may hold Inf or NaN: says whether they do.
  template <int kWidth, int kPitch, class E>
  static bool checked_by_row(const E* x, M* room, int rows) {
    if constexpr (X::kRounds && __is_same(E, M) && kWidth == kPitch) {
      return checked_pairs<kPitch>(x, room, rows);
    } else {
      by_row<kPitch>(x, room, rows);
      return any_bad<kWidth>(x, rows, kPitch);
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
  // A B operand over the first `kWidth` columns of n natural rows; columns past them, up to whole
  // vectors, are zero, further ones anything.
  template <int kWidth>
  static void by_column(const M* x, int pitch, int n, M* dst) {
    pack_transposed<A, M, kWidth>(dst, StridedRows<M>{x, pitch}, 1, n, C, NoMod{});
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

  // ---- states ----
  // Rows of q or k, natural, times a state by channel; rows of v or dO times one by columns of v.
  static void state_times(int n, const M* rows, const M* state, A* c) {
    times<X::kVWidth, GemmMode::kOverwrite>(n, X::kD, rows, X::kDp, state, X::kVp, c, X::kVp);
  }
  static void times_state(int n, const M* rows, const M* state, A* c) {
    times<X::kDp, GemmMode::kOverwrite>(n, X::kDv, rows, X::kVp, state, X::kSp, c, X::kDp);
  }
  // to = factor from + values^T rows, from rows of v or dO and of q or k as B operands hold them;
  // `packed`, if not null, gets it as one over columns of v. Meanwhile `ahead` is fetched.
  template <bool kDecay>
  static void add_to_state(int n, const M* values, const M* rows, const A* from, A* to,
                           const A* factor, M* packed, LinearFetch& ahead) {
    constexpr auto kBy = kDecay && X::kDecays ? StateDecay::kByColumn : StateDecay::kNone;
    using State = LinearStateLayout<X::kDv, X::kDp, X::kSp, X::kDp, kBy>;
    update_state<X, State>(steps(n), values, kPair, kPair * X::kVp, rows, from, to, factor, packed,
                           ahead);
    if constexpr (X::kDp > X::kD) clear_padding(to, packed);
  }
  // A state by columns of v as one by channel.
  __attribute__((noinline)) static void turn_state(const M* x, M* out) {
    turn([&](int row, int d) { return load_vector<Unit>(unit_at(x, row, d)); }, [](int) {}, out);
  }
  // The operands of U: by_value (unused where nothing is rounded: U itself is one) and by_channel.
  // dots[d]: row d of S, by columns of v, times that of U; `s` null: none.
  __attribute__((noinline)) static void turn_adjoint(const A* u, const M* s, M* by_value,
                                                     M* by_channel, A* dots) {
    V dot{};
    const auto load = [&](int row, int d) __attribute__((always_inline)) {
      const A* p = u + int64_t(row) * kPair * X::kSp + d;
      const V even = load_vector<V>(p), odd = load_vector<V>(p + (kPair - 1) * X::kSp);
      const auto unit = pair_lanes<M>(even, odd);
      if constexpr (X::kRounds) store_vector(unit_at(by_value, row, d), unit);
      if (s != nullptr) {
        if constexpr (kPair == 2) {
          const auto kept = load_vector<Vector<uint32_t, W>>(unit_at(s, row, d));
          dot += (V)(kept << 16) * even + (V)(kept & 0xffff0000u) * odd;
        } else {
          dot += load_vector<V>(unit_at(s, row, d)) * even;
        }
      }
      return (Unit)unit;
    };
    const auto column = [&](int d) {
      store_vector(dots + d, dot);
      dot = V{};
    };
    turn(load, column, by_channel);
  }
  // A state of the caller, [D][kStateColumns], block by block: visit(e, d, x), where x has the
  // lanes of channels d and on of column e, zero past D.
  template <class Visit>
  static void each_turned(const LinearRows<A>& from, const Visit& visit) {
    for (int d = 0; d < X::kDp; d += W) {
      for (int e = 0; e < X::kDv; e += W) {
        const int count = X::kDv - e < W ? X::kDv - e : W;
        V block[W]{};
        for (int i = 0; i < W && d + i < X::kD; ++i) {
          block[i] = load_lanes<A>(from(d + i) + e * from.col, from.col, count);
        }
        transpose<1>(block);
        for (int i = 0; i < count; ++i) visit(e + i, d, block[i]);
      }
    }
  }
  // The same dots of an initial state as it was given: beside one token its rounding would be most
  // of the error.
  __attribute__((noinline)) static void initial_dots(const LinearRows<A>& s, const A* u, A* dots) {
    clear(dots, X::kDp);
    each_turned(s, [&](int e, int d, V x) {
      store_vector(dots + d,
                   load_vector<V>(dots + d) + x * load_vector<V>(u + int64_t(e) * X::kSp + d));
    });
  }

  // Rows of values times U, whose operand turn_adjoint gave.
  static void adjoint_times(int n, const LinearBackwardHead<Plan>& head, int64_t c, const M* values,
                            const M* by_value, A* out) {
    if (head.ends_empty(c)) return clear(out, int64_t(n) * X::kDp);
    times_state(n, values, pick(head.state, by_value), out);
  }
  // d(q e) from dO S^T, in the tile, under a normalizer.
  static void normalize_rows(int n, LinearBackwardScratch<Plan>& x, const A* z) {
    for (int t = 0; t < n; ++t) {
      for (int d = 0; d < X::kDp; d += W) {
        A* p = x.tile + t * X::kDp + d;
        store_vector(p, load_vector<V>(p) * x.inverse_den[t] + load_vector<V>(z + d) * x.dden[t]);
      }
    }
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
  template <int kWidth, class E>
  __attribute__((noinline)) static bool any_bad(const E* x, int n, int pitch) {
    constexpr int kChains = 4;
    V seen[kChains]{};
    for (int i = 0; i < n; ++i) {
      const E* row = x + int64_t(i) * pitch;
      for (int d = 0; d < kWidth; d += kChains * W) {
#pragma GCC unroll 4
        for (int j = 0; j < kChains; ++j) {
          if (d + j * W >= kWidth) break;
          seen[j] += load_widened<A>(row + d + j * W) * A(0);
        }
      }
    }
    return hsum(V(seen[0] + seen[1] + (seen[2] + seen[3]))) != A(0);
  }
  // c[t] += sum of l[t][s] x[s] over s <= t, and c[s] += sum of l[t][s] factor[t] x[t] over t >= s.
  template <int kPitch, class E>
  __attribute__((noinline)) static void lower_by_rows(int n, const A* l, const E* x, A* c) {
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
  using Unit = Vector<decltype(mask_element<A>()), W>;  // elements, or pairs

  template <class E>
  static AE_INLINE E* unit_at(E* x, int row, int d) {
    return x + (int64_t(row) * X::kSp + d) * kPair;
  }
  template <int kPitch>
  __attribute__((noinline)) static bool checked_pairs(const M* x, M* room, int rows) {
    return pack_pairs<A, kPitch>(room, StridedRows<M>{x, kPitch}, 1, rows, rows + rows % 2,
                                 NoMod{});
  }

  // Channels past D: where values hold Inf, their products with zeros are NaN.
  static void clear_padding(A* state, M* packed) {
    constexpr int kPadding = X::kDp - X::kD;
    for (int e = 0; e < X::kDv; ++e) clear(state + int64_t(e) * X::kSp + X::kD, kPadding);
    if (packed == nullptr) return;
    for (int row = 0; row < X::kStateRows / kPair; ++row) {
      clear(unit_at(packed, row, X::kD), kPadding * kPair);
    }
  }

  // A state in units, load(row, d), as an operand over channels; column(d) when all rows of a
  // column of vectors were loaded.
  template <class Load, class Column>
  static AE_INLINE void turn(const Load& load, const Column& column, M* out) {
    constexpr int kRows = X::kStateRows / kPair;
    for (int d = 0; d < X::kDp; d += W) {
      for (int row = 0; row < kRows; row += W) {
        Unit block[W];
        if (row + W <= kRows) {
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) block[i] = load(row + i, d);
        } else {
          for (int i = 0; i < W; ++i) block[i] = row + i < kRows ? load(row + i, d) : Unit{};
        }
        transpose<1>(block);
        const int left = X::kDRows - d, n = left < W ? left : W;
        if constexpr (kPair == 2) {
          using H = Vector<uint16_t, 2 * W>;
#pragma GCC unroll 8
          for (int i = 0; i < W; i += 2) {
            if (i >= n) break;
            const auto pairs = interleaved((H)block[i], (H)block[i + 1]);
            M* to = out + int64_t(d + i) * X::kVp + 4 * row;
            store_vector(to, pairs.low);
            if (2 * row + W < X::kVWidth) store_vector(to + 2 * W, pairs.high);
          }
        } else {
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) {
            if (i >= n) break;
            store_vector(out + int64_t(d + i) * X::kVp + row, block[i]);
          }
        }
      }
      column(d);
    }
  }

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
