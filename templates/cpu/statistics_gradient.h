// The loops of the gradient of token statistics, over tiles of tokens. With g = dy, t = 1 / (1 +
// a), p = pi / D, and all sums over tokens of the sequence:
//
//   not causal  da = t^2 sum_n g w pi     dpi = sum_k (da u / D - g w t) - (sum_k da a) / D
//               q = sum_n dr u / c        dU = da p + (dr - q) / c       (q = 0 where c is clamped)
//   causal      da = t^2 g w pi           RA_m = sum_{n>=m} da / D       RD_m = -sum_{n>=m,k} da a
//   / D
//               dpi = sum_k (u RA - g w t) + RD
//               dU = pi RA + dr / c - sum_{n>=m} dr u / c^2              (0 from where c is
//               clamped)
//   both        ds = pi (dpi - sum_h pi dpi)   dr = temp ds   dtemp = sum ds r   dbias = d sum dr
//               dw = -g pi t + 2 w dU
//
// Source: the operator's definition, differentiated; both sets of formulas are checked against
// finite differences. As forward's, these loops are not inlined and name what is fused.
#pragma once
#include "cpu/statistics.h"

namespace ae {

template <class Plan>
struct StatisticsGradient : Statistics<Plan> {
  using S = Statistics<Plan>;
  using S::kBlock, S::kC, S::kA, S::kZ, S::kColumns, S::kRow, S::kTile, S::W;
  using typename S::A;
  using typename S::E;
  using typename S::In;
  using typename S::Out;
  using typename S::V;

  // -- both forms --------------------------------------------------------------------------------
  // dr of a tile, 0 beyond its tokens, from dpi; dtemp [H] += ds r. All tables [H][kBlock].
  static __attribute__((noinline)) void softmax_gradient(int count, int64_t H, const A* temp,
                                                         const A* logits, const A* weights,
                                                         const A* dpi, A* dr, A* dtemp) {
    for (int t = 0; t < kTile; t += W) {
      V mean{};
      for (int64_t h = 0; h < H; ++h) {
        const int64_t at = h * kBlock + t;
        mean = fused(load_vector<V>(weights + at), load_vector<V>(dpi + at), mean);
      }
      for (int64_t h = 0; h < H; ++h) {
        const int64_t at = h * kBlock + t;
        const V ds = first_lanes<A>(
            load_vector<V>(weights + at) * (load_vector<V>(dpi + at) - mean), count - t);
        const V r = first_lanes<A>(load_vector<V>(logits + at), count - t);
        store_vector(dr + at, V(temp[h] * ds));
        dtemp[h] += hsum(V(ds * r));
      }
    }
  }

  // -- not causal --------------------------------------------------------------------------------
  // local.A += g w pi, over a tile.
  static __attribute__((noinline)) void add_products(const In& w, const In& g, int64_t H,
                                                     const A* weights, A* local) {
    for (int64_t h = 0; h < H; ++h) {
      const A* weight = weights + h * kBlock;
      A* row = local + h * kRow + kA;
      for_channels<Plan>([&](auto group) __attribute__((always_inline)) {
        V sum[group.kCount];
        for (int v = 0; v < group.kCount; ++v) sum[v] = group.load_sum(row, v);
        for (int t = 0; t < w.count; ++t) {
          group.prefetch(w.at(h, t + kTile));
          group.prefetch(g.at(h, t + kTile));
          const V pi = splat<V>(weight[t]);
          for (int v = 0; v < group.kCount; ++v) {
            const V x = group.load(w.at(h, t), v), y = group.load(g.at(h, t), v);
            sum[v] = fused(x * y, pi, sum[v]);
          }
        }
        for (int v = 0; v < group.kCount; ++v) group.store_sum(row, v, sum[v]);
      });
    }
  }

  // Of a sequence and head, as a row: coefficients of a token's gradient.
  struct Factors {
    static constexpr int kGate = 0, kShare = kColumns;                   // t, da / D
    static constexpr int kInverse = 2 * kColumns, kMean = 3 * kColumns;  // 1/c, q / c
    static constexpr int kConstant = 4 * kColumns;                       // (sum_k da a) / D
    static constexpr int kRow = kConstant + AE_STATISTICS_PAD;
  };

  // dpi of a tile.
  static __attribute__((noinline)) void plain_dpi(const In& w, const In& g, int64_t H,
                                                  const A* factors, A* dpi) {
    for (int64_t h = 0; h < H; ++h) {
      const A* row = factors + h * Factors::kRow;
      V sums[kTile] = {};
      for_channels<Plan>([&](auto group) __attribute__((always_inline)) {
        V gate[group.kCount], share[group.kCount];
        for (int v = 0; v < group.kCount; ++v) {
          gate[v] = group.load_sum(row + Factors::kGate, v);
          share[v] = group.load_sum(row + Factors::kShare, v);
        }
        for (int t = 0; t < w.count; ++t) {
          group.prefetch(w.at(h, t + kTile));
          group.prefetch(g.at(h, t + kTile));
          V sum = sums[t];
          for (int v = 0; v < group.kCount; ++v) {
            const V x = group.load(w.at(h, t), v), y = group.load(g.at(h, t), v);
            sum = fused(x, fused(x, share[v], V(-(y * gate[v]))), sum);
          }
          sums[t] = sum;
        }
      });
      A* out = dpi + h * kBlock;
      S::sum_channels(sums, out);
      for (int t = 0; t < kTile; ++t) out[t] -= row[Factors::kConstant];
    }
  }

  // dw of a tile.
  static __attribute__((noinline)) void plain_gradient(const In& w, const In& g, int64_t H,
                                                       const A* weights, const A* dr,
                                                       const A* factors, const Out& dw) {
    for (int64_t h = 0; h < H; ++h) {
      const A* row = factors + h * Factors::kRow;
      for_channels<Plan>([&](auto group) __attribute__((always_inline)) {
        V gate[group.kCount], share[group.kCount], inverse[group.kCount], mean[group.kCount];
        for (int v = 0; v < group.kCount; ++v) {
          gate[v] = -group.load_sum(row + Factors::kGate, v);
          share[v] = A(2) * group.load_sum(row + Factors::kShare, v);
          inverse[v] = A(2) * group.load_sum(row + Factors::kInverse, v);
          mean[v] = A(-2) * group.load_sum(row + Factors::kMean, v);
        }
        for (int t = 0; t < w.count; ++t) {
          group.prefetch(w.at(h, t + kTile));
          group.prefetch(g.at(h, t + kTile));
          const V pi = splat<V>(weights[h * kBlock + t]), slope = splat<V>(dr[h * kBlock + t]);
          for (int v = 0; v < group.kCount; ++v) {
            const V x = group.load(w.at(h, t), v), y = group.load(g.at(h, t), v);
            const V du = fused(pi, share[v], fused(slope, inverse[v], mean[v]));
            group.store(dw.at(h, t), v, V(fused(x, du, V(y * (pi * gate[v])))), dw.stream);
          }
        }
      });
    }
  }

  // -- causal ------------------------------------------------------------------------------------
  // A tile with the sums around it, as rows of statistics: of tokens before its block, of those of
  // the block before the tile, of tokens after the block (of Q at c, RA at A, RD at D), and of
  // those of the block after the tile, which the functions move to before it.
  struct Around {
    const A *before, *start, *after;
    A* local;
  };

  // dpi of a tile, and with kPartial what is known of dw: 2 w pi RA - g pi t, [H][kTile][kColumns].
  template <bool kPartial>
  static __attribute__((noinline)) void causal_dpi(const In& w, const In& g, int64_t H,
                                                   const A* weights, const Around& at, A* dpi,
                                                   A* partial) {
    for (int64_t h = 0; h < H; ++h) {
      const A* weight = weights + h * kBlock;
      alignas(64) A total[kTile] = {}, inverse[kTile] = {};  // D, 1/D
      A sum = at.start[h * kRow + kZ];
      for (int t = 0; t < w.count; ++t) {
        sum += weight[t];
        total[t] = (at.before[h * kRow + kZ] + sum) + S::kEpsilon;
        inverse[t] = A(1) / total[t];
      }
      V sums[kTile] = {}, losses[kTile] = {};  // sum_k (u RA - g w t), sum_k g w t (1 - t)
      for_channels<Plan>([&](auto group) __attribute__((always_inline)) {
        constexpr int kCount = group.kCount;
        V base[kCount], s[kCount], gates[kTile][kCount];
        for (int v = 0; v < kCount; ++v) {
          base[v] = group.load_sum(at.before + h * kRow + kA, v);
          s[v] = group.load_sum(at.start + h * kRow + kA, v);
        }
        for (int t = 0; t < w.count; ++t) {
          const V pi = splat<V>(weight[t]), d = splat<V>(total[t]);
          for (int v = 0; v < kCount; ++v) {
            const V x = group.load(w.at(h, t), v);
            s[v] = fused(x * x, pi, s[v]);
            gates[t][v] = d * positive_reciprocal(V(d + (base[v] + s[v])));
          }
        }
        A* later = at.local + h * kRow + kA;
        for (int v = 0; v < kCount; ++v) {
          base[v] = group.load_sum(at.after + h * kRow + kA, v);
          s[v] = group.load_sum(later, v);
        }
        for (int t = w.count - 1; t >= 0; --t) {
          const V pi = splat<V>(weight[t]), share = splat<V>(inverse[t]);
          V value = sums[t], loss = losses[t];
          for (int v = 0; v < kCount; ++v) {
            const V x = group.load(w.at(h, t), v), y = group.load(g.at(h, t), v);
            const V gate = gates[t][v], gain = x * y * gate;
            s[v] = fused(gain * gate, pi * share, s[v]);
            const V ra = base[v] + s[v];
            value = fused(x, fused(x, ra, V(-(y * gate))), value);
            loss = fused(gain, V(A(1) - gate), loss);
            if constexpr (kPartial) {
              const V dw = pi * fused(V(A(2) * x), ra, V(-(y * gate)));
              group.store_sum(partial + (h * kTile + t) * kColumns, v, dw);
            }
          }
          sums[t] = value;
          losses[t] = loss;
        }
        for (int v = 0; v < kCount; ++v) group.store_sum(later, v, s[v]);
      });
      alignas(64) A lost[kTile];
      S::sum_channels(sums, dpi + h * kBlock);
      S::sum_channels(losses, lost);
      for (int t = 0; t < kTile; t += W) {  // as vectors: the sums below then add rounded products
        store_vector(lost + t, V(load_vector<V>(lost + t) * load_vector<V>(inverse + t)));
        store_vector(inverse + t, V(load_vector<V>(lost + t) *
                                    first_lanes<A>(load_vector<V>(weight + t), w.count - t)));
      }
      sum = at.local[h * kRow + kZ];
      for (int t = w.count - 1; t >= 0; --t) {
        sum -= inverse[t];
        dpi[h * kBlock + t] += at.after[h * kRow + kZ] + sum;
      }
      at.local[h * kRow + kZ] = sum;
    }
  }

  // The sums of dr u / c^2 past a tile, and with kWrite its dw from what causal_dpi left.
  template <bool kWrite>
  static __attribute__((noinline)) void causal_gradient(const In& w, int64_t H, const A* dr,
                                                        const Around& at, const A* partial,
                                                        const Out& dw) {
    for (int64_t h = 0; h < H; ++h) {
      for_channels<Plan>([&](auto group) __attribute__((always_inline)) {
        constexpr int kCount = group.kCount;
        V base[kCount], s[kCount], inverses[kTile][kCount], squares[kTile][kCount];
        for (int v = 0; v < kCount; ++v) {
          base[v] = group.load_sum(at.before + h * kRow + kC, v);
          s[v] = group.load_sum(at.start + h * kRow + kC, v);
        }
        for (int t = 0; t < w.count; ++t) {
          for (int v = 0; v < kCount; ++v) {
            const V x = group.load(w.at(h, t), v);
            s[v] = fused(x, x, s[v]);
            const V c = base[v] + s[v];
            const V inverse = positive_reciprocal(max_or_second(splat<V>(S::kSumFloor), c));
            inverses[t][v] = inverse;
            squares[t][v] = choose(lt(c, S::kSumFloor), V{}, V(inverse * inverse));
          }
        }
        A* later = at.local + h * kRow + kC;
        for (int v = 0; v < kCount; ++v) {
          base[v] = group.load_sum(at.after + h * kRow + kC, v);
          s[v] = group.load_sum(later, v);
        }
        for (int t = w.count - 1; t >= 0; --t) {
          const V slope = splat<V>(dr[h * kBlock + t]);
          for (int v = 0; v < kCount; ++v) {
            const V x = group.load(w.at(h, t), v);
            s[v] = fused(x * x * squares[t][v], slope, s[v]);
            if constexpr (kWrite) {
              const V du = fused(slope, inverses[t][v], V(-(base[v] + s[v])));
              const V known = group.load_sum(partial + (h * kTile + t) * kColumns, v);
              group.store(dw.at(h, t), v, V(fused(V(A(2) * x), du, known)), dw.stream);
            }
          }
        }
        for (int v = 0; v < kCount; ++v) group.store_sum(later, v, s[v]);
      });
    }
  }
};

}  // namespace ae
