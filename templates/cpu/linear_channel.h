// Channel decay inside a chunk: D_ts becomes a vector over channels. All factors are products of
// a_t <= 1, or exp of sums of g_t <= 0, never quotients:
//
//   s and t in one block of 16      x_t . k_s with x_t multiplied by a_t, a_t-1, .. on the way
//   t in a later block I            (x_t inside) . (k_s rest whole_J+1 .. whole_I-1): a product of
//                                   matrices for each I
//
//   inside_t   product of a_r from the start of t's block to t
//   rest_s     product of a_r after s to the end of s's block
//   whole_I    product over block I;  before_I: over all blocks before I
#pragma once
#include "cpu/linear_operand.h"

namespace ae {

template <class Plan>
class LinearChannel {
  using T = LinearTypes<Plan>;
  using Acc = typename T::Acc;
  using M = typename T::M;
  using V = typename T::V;
  static constexpr int W = T::W, C = T::kChunk, kBlock = kLinearBlock, kPitch = T::kDPitch;

 public:
  static constexpr int64_t kTile = int64_t(C) * kPitch;
  static constexpr int blocks(int n) { return (n + kBlock - 1) / kBlock; }

  // From a [C][kDPitch], 1 past token n up to a whole block: inside and rest [C][kDPitch], whole
  // [kBlocks][kDPitch], before [kBlocks + 1][kDPitch], whose row blocks(n) is the whole chunk's.
  // `rest` comes with g, whose sums give `whole` and `before`: products of so many rounded factors
  // would drift from chunk to chunk.
  static __attribute__((noinline)) void products(const Acc* a, int n, Acc* inside, Acc* rest,
                                                 Acc* whole, Acc* before) {
    for (int d = 0; d < kPitch; d += W) {
      V all{};
      store_vector(before + d, splat<V>(Acc(1)));
      for (int b = 0; b < blocks(n); ++b) {
        const int64_t first = int64_t(b) * kBlock * kPitch + d;
        V sum{};
        for (int i = 0; i < kBlock; ++i) sum += load_vector<V>(rest + first + i * kPitch);
        all += sum;
        store_vector(whole + b * kPitch + d, ae::exp(sum));
        store_vector(before + (b + 1) * kPitch + d, ae::exp(all));
        V grown = splat<V>(Acc(1)), left = grown;
        for (int i = 0; i < kBlock; ++i) {
          grown *= load_vector<V>(a + first + i * kPitch);
          store_vector(inside + first + i * kPitch, grown);
          const int64_t back = first + (kBlock - 1 - i) * kPitch;
          store_vector(rest + back, left);
          left *= load_vector<V>(a + back);
        }
      }
    }
  }

  // x inside, and x times all decay since the start of the chunk: A operands by row. x [C][kDPitch]
  // is zero past n.
  static __attribute__((noinline)) void decay_rows(const Acc* x, const Acc* inside,
                                                   const Acc* before, int n, M* in, M* start) {
    for (int t = 0; t < n; ++t) {
      const int64_t at = int64_t(t) * kPitch;
      const Acc* since = before + t / kBlock * kPitch;
      for (int d = 0; d < kPitch; d += W) {
        const V y = load_vector<V>(x + at + d) * load_vector<V>(inside + at + d);
        store_multiply(in + at + d, y);
        store_multiply(start + at + d, y * load_vector<V>(since + d));
      }
    }
  }

  // (k rest) transposed, [kDRows][C], zero past n up to a whole block. `rest` is changed.
  static __attribute__((noinline)) void decay_keys(const Acc* k, Acc* rest, int n, Acc* out) {
    const int rows = blocks(n) * kBlock;
    for (int64_t i = 0; i < int64_t(rows) * kPitch; i += W) {
      store_vector(rest + i, load_vector<V>(k + i) * load_vector<V>(rest + i));
    }
    transpose_tile(out, C, rest, kPitch, rows, T::kD);
    if (T::kDRows > T::kD) __builtin_memset(out + int64_t(T::kD) * C, 0, sizeof(Acc) * C);
  }

  // p_ts = sum over channels of x_t D_ts k_s for s <= t, [C][C], for one or two x (x2 null: one).
  // `in`: x inside, by row. keys: of decay_keys; afterwards they are decayed to the end of the
  // chunk. pairs: room for [kDRows][C] of M, unused where M is the accumulator type.
  static void lower_product(const Acc* x, const M* in, Acc* p, const Acc* x2, const M* in2, Acc* p2,
                            const Acc* k, const Acc* a, const Acc* whole, int n, Acc* keys,
                            M* pairs) {
    const int count = blocks(n);
    const auto block = [&]<int I>() {
      if (I >= count) return;
      const int first = I * kBlock, rows = n - first < kBlock ? n - first : kBlock;
      diagonal(x, k, a, first, rows, p);
      if (x2 != nullptr) diagonal(x2, k, a, first, rows, p2);
      if constexpr (I > 0) {
        const M* b = advance(keys, I > 1 ? whole + (I - 1) * kPitch : nullptr, I - 1, I, pairs);
        const int64_t at = int64_t(first) * kPitch;
        gemm<Acc, M, I * kBlock, GemmMode::kOverwrite>(rows, T::kDSteps, in + at, kPitch, T::kPair,
                                                       b, C, p + int64_t(first) * C, C);
        if (x2 != nullptr) {
          gemm<Acc, M, I * kBlock, GemmMode::kOverwrite>(
              rows, T::kDSteps, in2 + at, kPitch, T::kPair, b, C, p2 + int64_t(first) * C, C);
        }
      }
    };
    [&]<int... I>(std::integer_sequence<int, I...>) {
      (block.template operator()<I>(), ...);
    }(std::make_integer_sequence<int, T::kBlocks>());
    advance(keys, whole + (count - 1) * kPitch, count - 1, 0, pairs);
  }

  // Keys decayed to the end of the chunk as the A operand of (k f)^T Vn: rows of channels, [kD][C].
  static const M* update_operand(const Acc* keys, int n, M* room) {
    if constexpr (__is_same(M, Acc)) {
      return keys;
    } else {
      for (int d = 0; d < T::kD; ++d) {
        for (int t = 0; t < blocks(n) * kBlock; t += W) {
          store_multiply(room + int64_t(d) * C + t, load_vector<V>(keys + int64_t(d) * C + t));
        }
      }
      return room;
    }
  }

 private:
  // Multiplies the keys of the first `old` blocks by `factor` of their channel (null: 1), and
  // returns the keys of the first `used` blocks as a B operand.
  static __attribute__((noinline)) const M* advance(Acc* keys, const Acc* factor, int old, int used,
                                                    M* pairs) {
    if (factor != nullptr) {
      for (int d = 0; d < T::kD; ++d) {
        Acc* row = keys + int64_t(d) * C;
        for (int t = 0; t < old * kBlock; t += W) {
          store_vector(row + t, load_vector<V>(row + t) * factor[d]);
        }
      }
    }
    if constexpr (__is_same(M, Acc)) {
      return keys;
    } else {
      for (int d = 0; d < T::kDRows; d += 2) {
        const Acc* row = keys + int64_t(d) * C;
        for (int t = 0; t < used * kBlock; t += W) {
          store_pairs(pairs + int64_t(d) * C + 2 * t, load_vector<V>(row + t),
                      load_vector<V>(row + C + t));
        }
      }
      return pairs;
    }
  }

  // Vectors of channels that stay in registers: x decays there from token to token.
  static constexpr int vectors_together() {
    for (int n = 8; n > 1; --n) {
      if (kPitch / W % n == 0) return n;
    }
    return 1;
  }

  // The products of one block.
  static __attribute__((noinline)) void diagonal(const Acc* x, const Acc* k, const Acc* a,
                                                 int first, int rows, Acc* p) {
    V sums[2][kBlock]{};
    int i = 0;
    for (; i + 2 <= rows; i += 2) diagonal_rows<2>(x, k, a, first, i, sums, p);
    if (i < rows) diagonal_rows<1>(x, k, a, first, i, sums, p);
  }
  // Rows i and, if kRows is 2, i + 1, which share the keys that they read. `sums` past their ends
  // is anything.
  template <int kRows>
  static AE_INLINE void diagonal_rows(const Acc* x, const Acc* k, const Acc* a, int first, int i,
                                      V (&sums)[2][kBlock], Acc* p) {
    constexpr int kVectors = vectors_together();
    for (int d = 0; d < kPitch; d += kVectors * W) {
      const int64_t at = int64_t(first) * kPitch + d;
      V w[kRows][kVectors];
      const auto add = [&](int r, int s, V sum) __attribute__((always_inline)) {
        sums[r][s] = d == 0 ? sum : sums[r][s] + sum;
      };
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          w[r][v] = load_vector<V>(x + at + (i + r) * kPitch + v * W);
        }
      }
      if constexpr (kRows == 2) {  // the end of the lower row
        const Acc *ks = k + at + (i + 1) * kPitch, *as = a + at + (i + 1) * kPitch;
        V sum{};
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          sum += w[1][v] * load_vector<V>(ks + v * W);
          w[1][v] *= load_vector<V>(as + v * W);
        }
        add(1, i + 1, sum);
      }
      for (int s = i; s >= 0; --s) {
        const Acc *ks = k + at + s * kPitch, *as = a + at + s * kPitch;
        V sum[kRows]{};
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          const V key = load_vector<V>(ks + v * W), decay = load_vector<V>(as + v * W);
#pragma GCC unroll 2
          for (int r = 0; r < kRows; ++r) {
            sum[r] += w[r][v] * key;
            w[r][v] *= decay;
          }
        }
#pragma GCC unroll 2
        for (int r = 0; r < kRows; ++r) add(r, s, sum[r]);
      }
    }
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
      for (int s = 0; s < kBlock; s += W) {
        V group[W];
        for (int j = 0; j < W; ++j) group[j] = sums[r][s + j];
        store_vector(p + int64_t(first + i + r) * C + first + s, sum_each(group));
      }
    }
  }
};

}  // namespace ae
