// The output rows of a chunk: O = factor (Q S) + M V in one pass over registers.
#pragma once
#include "cpu/linear_operand.h"

namespace ae {

// Sums as they are, or as elements of the output.
template <class T, class Out, class V>
AE_INLINE void store_result(Out* to, V x) {
  if constexpr (__is_same(Out, typename T::Acc)) {
    store_vector(to, x);
  } else if constexpr (__is_same(Out, typename T::M)) {
    store_multiply(to, x);
  } else {
    store_narrowed<Out, typename T::Acc>(to, x);
  }
}

// kRows x (kRegs W) of O, `pitch` elements between rows. q by row, s [..][N] as a B operand, m
// [kChunk][kChunk], v over tokens.
template <class T, int kRows, int kRegs, class Out>
AE_INLINE void output_block(int64_t q_steps, const typename T::M* q, const typename T::M* s,
                            const typename T::Acc* factor, int64_t m_steps, const typename T::M* m,
                            const typename T::M* v, Out* o, int64_t pitch, LinearFetch& next) {
  using Step = GemmStep<typename T::Acc, typename T::M>;
  using V = typename Step::V;
  constexpr int N = T::kPanel, W = T::W, kPair = T::kPair;
  V sum[kRows][kRegs]{};
  const auto multiply = [&](int64_t steps, const typename T::M* a, int64_t a_row,
                            const typename T::M* b) __attribute__((always_inline)) {
    while (steps > 0) {
      LinearRun run = next.take(steps, b);
      steps -= run.steps;
      for (; run.steps > 0; --run.steps, a += kPair, b += N * kPair) {
        run.fetch();
        V bv[kRegs];
#pragma GCC unroll 8
        for (int j = 0; j < kRegs; ++j) bv[j] = load_vector<V>(b + j * W * kPair);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
          const V av = Step::broadcast(a + i * a_row);
#pragma GCC unroll 8
          for (int j = 0; j < kRegs; ++j) sum[i][j] = Step::multiply_add(sum[i][j], av, bv[j]);
        }
      }
    }
  };
  multiply(q_steps, q, T::kDPitch, s);
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kRegs; ++j) sum[i][j] *= factor[i];
  }
  multiply(m_steps, m, T::kChunk, v);
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kRegs; ++j) store_result<T>(o + i * pitch + j * W, sum[i][j]);
  }
}

// With 32 registers, blocks of so many vectors have twelve rows.
constexpr int kOutputNarrow = kGemmRegs == 4 ? 2 : -1;

// n rows of kRegs W columns. Rows of M end at the diagonal: 0 beyond, which is not multiplied
// further than these rows go. `products` false: without M V.
template <class T, int kRegs, class Out>
__attribute__((noinline)) void output_panel(int n, int64_t q_steps, const typename T::M* q,
                                            const typename T::M* s, const typename T::Acc* factor,
                                            bool products, const typename T::M* m,
                                            const typename T::M* v, Out* o, int64_t pitch,
                                            LinearFetch& next) {
  int i = 0;
  const auto rows = [&]<int kRows>() {
    for (; i + kRows <= n; i += kRows) {
      const int64_t steps = products ? (i + kRows + T::kPair - 1) / T::kPair : 0;
      output_block<T, kRows, kRegs>(q_steps, q + i * int64_t(T::kDPitch), s, factor + i, steps,
                                    m + i * int64_t(T::kChunk), v, o + i * pitch, pitch, next);
    }
  };
  if constexpr (kRegs == kOutputNarrow) {
    rows.template operator()<12>();
    rows.template operator()<8>();
  } else {
    rows.template operator()<kGemmRows>();
  }
  if constexpr (kGemmRows > 4) rows.template operator()<4>();
  rows.template operator()<2>();
  rows.template operator()<1>();
}

// All columns of a panel.
template <class T, class Out>
void output_rows(int n, int64_t q_steps, const typename T::M* q, const typename T::M* s,
                 const typename T::Acc* factor, bool products, const typename T::M* m,
                 const typename T::M* v, Out* o, int64_t pitch, LinearFetch& next) {
  // A state that does not stay in the first cache is read by more rows at once.
  constexpr bool kLarge =
      kGemmRegs == 4 && T::kPanelState * int64_t(sizeof(typename T::M)) > (16 << 10);
  constexpr int kRegs = kLarge ? kOutputNarrow : kGemmRegs;
  constexpr int kColumns = kRegs * T::W, kRest = T::kPanel % kColumns / T::W;
  int j = 0;
  for (; j + kColumns <= T::kPanel; j += kColumns) {
    output_panel<T, kRegs, Out>(n, q_steps, q, s + j * T::kPair, factor, products, m,
                                v + j * T::kPair, o + j, pitch, next);
  }
  if constexpr (kRest > 0) {
    output_panel<T, kRest, Out>(n, q_steps, q, s + j * T::kPair, factor, products, m,
                                v + j * T::kPair, o + j, pitch, next);
  }
}

// O += M V row by row and only from tokens up to the row: where V holds Inf or NaN, products with
// the zeros above the diagonal would carry them back in time.
template <class T>
__attribute__((noinline)) void add_by_rows(int n, const typename T::M* m, const typename T::M* v,
                                           typename T::Acc* o) {
  using Acc = typename T::Acc;
  constexpr int N = T::kPanel, kPair = T::kPair;
  for (int t = 0; t < n; ++t) {
    for (int s = 0; s <= t; ++s) {
      const Acc w = widen<Acc>(m[int64_t(t) * T::kChunk + s]);
      const auto* row = v + int64_t(s / kPair) * kPair * N + s % kPair;
      for (int c = 0; c < N; ++c) o[int64_t(t) * N + c] += w * widen<Acc>(row[c * kPair]);
    }
  }
}

// Sums of some columns of where.n tokens, `pitch` apart, as the caller wants them: times `inverse`
// of the token (null: 1), through out_mod, rounded.
template <class Plan, class Fn>
__attribute__((noinline)) void finish_rows(const LinearInputs<Plan, Fn>& in, const LinearAt& where,
                                           int column, int width, const typename Plan::Acc* sums,
                                           int64_t pitch, const typename Plan::Acc* inverse) {
  using T = LinearTypes<Plan>;
  using Elem = typename T::Elem;
  using V = typename T::V;
  constexpr int W = T::W;
  const int64_t* s = in.params().out_stride;
  Elem* out =
      (Elem*)in.params().out + where.b * s[0] + where.h * s[1] + where.t * s[2] + column * s[3];
  HookAt at{where.b, where.h, where.t, column, W};
  for (int t = 0; t < where.n; ++t, ++at.t, out += s[2]) {
    for (int j = 0; j < width; j += W) {
      V x = load_vector<V>(sums + t * pitch + j);
      if (inverse != nullptr) x *= inverse[t];
      at.d = column + j;
      at.count = width - j < W ? width - j : W;
      if constexpr (Fn::kHasOutMod) x = Fn::out_mod(in.env(), at, x);
      if (s[3] == 1 && at.count == W) {
        store_result<T>(out + j, x);
      } else {
        Elem copy[W];
        store_result<T>(copy, x);
        for (int i = 0; i < at.count; ++i) out[(j + i) * s[3]] = copy[i];
      }
    }
  }
}

// 1 / den, den kept away from 0.
template <class Acc>
AE_INLINE Acc normalizer_inverse(Acc den) {
  constexpr Acc kLeast = Acc(1e-6);
  const bool small = den < kLeast && den > -kLeast;
  return Acc(1) / (small ? (den < 0 ? -kLeast : kLeast) : den);
}

// Rows of v as a B operand over tokens, and the same times f_t (left null: not wanted). Returns
// whether a value is Inf or NaN. The row that fills a pair is zero.
template <class T, class Rows>
__attribute__((noinline)) bool pack_values(const Rows& rows, int n, int width,
                                           const typename T::Acc* f, typename T::M* v,
                                           typename T::M* left) {
  using Acc = typename T::Acc;
  using E = std::remove_cvref_t<decltype(*rows.base)>;
  using V = typename T::V;
  constexpr int N = T::kPanel, W = T::W, kPair = T::kPair;
  V seen[N / W]{};
  int first = 0;
  if (rows.col == 1 && width == N) {  // whole vectors
    const auto pass = [&]<bool kLeft>() {
      for (; first + kPair <= n; first += kPair) {
        const E *even = rows(first), *odd = rows(first + kPair - 1);
        const Acc f0 = kLeft ? f[first] : Acc(1), f1 = kLeft ? f[first + kPair - 1] : Acc(1);
        const int64_t at = int64_t(first) * N;
        each_pair<Acc, typename T::M, N>(even, odd, v + at, [&](int j, V x, V y) {
          seen[j / W] += x * Acc(0);
          if (kPair == 2) seen[j / W] += y * Acc(0);
          if (kLeft) store_pairs(left + at + j * kPair, x * f0, y * f1);
        });
      }
    };
    if (left != nullptr) {
      pass.template operator()<true>();
    } else {
      pass.template operator()<false>();
    }
  }
  for (int i = first; i < n; i += kPair) {
    const bool pair = i + kPair <= n;
    const auto *even = rows(i), *odd = rows(pair ? i + kPair - 1 : i);
    const Acc f0 = left != nullptr ? f[i] : Acc(1),
              f1 = left != nullptr && pair ? f[i + kPair - 1] : Acc(1);
    for (int j = 0; j < N; j += W) {
      const int count = width - j < W ? (width - j < 0 ? 0 : width - j) : W;
      const V x = load_lanes<Acc>(even + j * rows.col, rows.col, count);
      V y{};
      if (kPair == 2 && pair) y = load_lanes<Acc>(odd + j * rows.col, rows.col, count);
      seen[0] += x * Acc(0) + y * Acc(0);
      const int64_t at = int64_t(i) * N + j * kPair;
      store_pairs(v + at, x, y);
      if (left != nullptr) store_pairs(left + at, x * f0, y * f1);
    }
  }
  for (int j = 1; j < N / W; ++j) seen[0] += seen[j];
  return hsum(seen[0]) != 0;
}

}  // namespace ae
