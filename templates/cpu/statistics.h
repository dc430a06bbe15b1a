// Token statistics on the CPU: rows of statistics, tiles of tokens, and the loops over them that
// forward and backward share. Formulas: common/statistics_abi.h.
//
// A sum over tokens is that of earlier blocks plus a local one: c_n = carry + local_n. Both are
// kept, so that a walk along a sequence and a scan by blocks in parallel give the same bits. For
// the same reason the loops here are not inlined, and name their fused multiply-adds: compiled
// once, they round alike wherever they are called.
#pragma once
#include "common/statistics_abi.h"
#include "cpu/element.h"
#include "cpu/memory.h"
#include "cpu/module.h"

namespace ae {

// a * b + c, rounded once where the machine can, and never at the compiler's choice.
template <Vec V>
AE_INLINE V fused(V a, V b, V c) {
#if defined(__FMA__)
  if constexpr (__is_same(ElemOf<V>, float)) {
#if defined(__AVX512F__)
    if constexpr (sizeof(V) == 64) return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#endif
    if constexpr (sizeof(V) == 32) return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  } else {
#if defined(__AVX512F__)
    if constexpr (sizeof(V) == 64) return (V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#endif
    if constexpr (sizeof(V) == 32) return (V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
  }
#endif
  return a * b + c;
}

// 1 / x for x > 0, within 1 ulp.
template <Vec V>
AE_INLINE V positive_reciprocal(V x) {
  if constexpr (__is_same(ElemOf<V>, float)) {
    return fast_reciprocal(x);
  } else {
    return ElemOf<V>(1) / x;
  }
}

// A store that does not read the line that it overwrites: stream_fence() before another thread
// reads it.
template <class V>
AE_INLINE void stream_vector(void* to, V x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512((__m512i*)to, (__m512i)x);
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) return _mm256_stream_si256((__m256i*)to, (__m256i)x);
  if constexpr (sizeof(V) == 16) return _mm_stream_si128((__m128i*)to, (__m128i)x);
#endif
  store_vector(to, x);
}
AE_INLINE void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

template <Vec V, int... I>
AE_INLINE V add_neighbours(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (2 * I)...) + __builtin_shufflevector(a, b, (2 * I + 1)...);
}

// Lane i: the sum of the lanes of x[i], by a tree. Overwrites x.
template <Vec V>
AE_INLINE V sums_of_each(V* x) {
  constexpr int W = kLanes<V>;
#pragma GCC unroll 4
  for (int n = W / 2; n > 0; n /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      x[i] = add_neighbours(x[2 * i], x[2 * i + 1], std::make_integer_sequence<int, W>());
    }
  }
  return x[0];
}

// Up to kCount vectors of channels from `first` on; with kPartial the last one ends with the row.
template <class Plan, int kCount_, bool kPartial>
struct ChannelGroup {
  using E = typename Plan::Elem;
  using A = typename Plan::Acc;
  using V = typename Lanes<A>::Acc;
  static constexpr int W = Lanes<A>::W, kCount = kCount_, kTail = Plan::kD % W;
  int first;  // channel

  AE_INLINE bool partial(int v) const { return kPartial && v == kCount - 1; }
  // Of a row of the operand; 0 beyond its end.
  AE_INLINE V load(const E* row, int v) const {
    const E* from = row + first + v * W;
    if (partial(v)) {
      E some[W] = {};
      __builtin_memcpy(some, from, kTail * sizeof(E));
      return load_widened<A>(some);
    }
    return load_widened<A>(from);
  }
  // Brings the group's part of a row, which may be past the end of the operand, into the L2.
  AE_INLINE void prefetch(const E* row) const {
    for (int v = 0; v < kCount; ++v) {
      if (v * W * int(sizeof(E)) % 64 == 0) __builtin_prefetch(row + first + v * W, 0, 2);
    }
  }
  // stream: past the caches, to an address that is whole vectors from 0.
  AE_INLINE void store(E* row, int v, V x, bool stream) const {
    E* to = row + first + v * W;
    const auto some = rounded(x);
    if (partial(v)) {
      __builtin_memcpy(to, &some, kTail * sizeof(E));
    } else if (stream) {
      stream_vector(to, some);
    } else {
      store_vector(to, some);
    }
  }
  // As elements are stored. Bfloat16 by the instruction where there is one, in a seventh of the
  // operations; numbers below 2^-126 are 0 to it.
  static AE_INLINE Vector<Raw<E>, W> rounded(V x) {
#if defined(__AVX512BF16__)
    if constexpr (__is_same(E, bf16)) return (Vector<Raw<E>, W>)_mm512_cvtneps_pbh((__m512)x);
#endif
    alignas(64) E some[W];
    store_narrowed<E, A>(some, x);
    return load_vector<Vector<Raw<E>, W>>(some);
  }
  // Of statistics, which are padded.
  AE_INLINE V load_sum(const A* row, int v) const { return load_vector<V>(row + first + v * W); }
  AE_INLINE void store_sum(A* row, int v, V x) const { store_vector(row + first + v * W, x); }
};

// Calls f(group) for all channels. Accumulators of a group stay in registers over a tile's tokens.
template <class Plan, class F>
AE_INLINE void for_channels(const F& f) {
  constexpr int W = Lanes<typename Plan::Acc>::W, kGroup = 4;
  constexpr int kVectors = (Plan::kD + W - 1) / W, kWhole = Plan::kD / W / kGroup;
  constexpr int kRest = kVectors - kWhole * kGroup;
  for (int g = 0; g < kWhole; ++g) f(ChannelGroup<Plan, kGroup, false>{g * kGroup * W});
  if constexpr (kRest > 0) {
    f(ChannelGroup<Plan, kRest, Plan::kD % W != 0>{kWhole * kGroup * W});
  }
}

// Tokens of an operand, all heads.
template <class E>
struct Tokens {
  E* data;  // of head 0, token 0
  int64_t head, token;
  int count;
  bool stream = false;
  AE_INLINE E* at(int64_t h, int t) const { return data + h * head + t * token; }
  Tokens from(int t, int limit) const {
    return {data + t * token, head, token, count - t < limit ? count - t : limit, stream};
  }
};

template <class Plan>
struct Statistics {
  using E = typename Plan::Elem;
  using A = typename Plan::Acc;
  using V = typename Lanes<A>::Acc;
  using In = Tokens<const E>;
  using Out = Tokens<E>;
  static constexpr int W = Lanes<A>::W, kBlock = AE_STATISTICS_BLOCK, kTile = Plan::kTile;
  static_assert(kTile % W == 0 && kBlock % kTile == 0, "tiles are whole vectors of tokens");
  static_assert(AE_STATISTICS_PAD % W == 0, "rows of statistics are whole vectors");

  // One head's row, in elements of A.
  static constexpr int kColumns = int(round_up(Plan::kD, AE_STATISTICS_PAD));
  static constexpr int kC = 0, kA = kColumns, kZ = 2 * kColumns;
  static constexpr int kRow = kZ + AE_STATISTICS_PAD;
  static constexpr A kSumFloor = A(1e-12), kNormFloor = A(1e-24), kEpsilon = A(1e-8);

  // sums[t] of kTile tokens -> out[t].
  static AE_INLINE void sum_channels(V* sums, A* out) {
    for (int t = 0; t < kTile; t += W) store_vector(out + t, sums_of_each(sums + t));
  }

  // local.c += u, over all tokens.
  static __attribute__((noinline)) void add_squares(const In& w, int64_t H, A* local) {
    for (int64_t h = 0; h < H; ++h) {
      A* row = local + h * kRow + kC;
      for_channels<Plan>([&](auto g) __attribute__((always_inline)) {
        V sum[g.kCount];
        for (int v = 0; v < g.kCount; ++v) sum[v] = g.load_sum(row, v);
        for (int t = 0; t < w.count; ++t) {
          g.prefetch(w.at(h, t + kTile));
          for (int v = 0; v < g.kCount; ++v) {
            const V x = g.load(w.at(h, t), v);
            sum[v] = fused(x, x, sum[v]);
          }
        }
        for (int v = 0; v < g.kCount; ++v) g.store_sum(row, v, sum[v]);
      });
    }
  }

  // row[kTo] += u * weight, over a tile of tokens; weights [H][kBlock].
  template <int kTo>
  static __attribute__((noinline)) void add_weighted(const In& w, int64_t H, const A* weights,
                                                     A* local) {
    for (int64_t h = 0; h < H; ++h) {
      const A* weight = weights + h * kBlock;
      A* row = local + h * kRow + kTo;
      for_channels<Plan>([&](auto g) __attribute__((always_inline)) {
        V sum[g.kCount];
        for (int v = 0; v < g.kCount; ++v) sum[v] = g.load_sum(row, v);
        for (int t = 0; t < w.count; ++t) {
          const V pi = splat<V>(weight[t]);
          for (int v = 0; v < g.kCount; ++v) {
            const V x = g.load(w.at(h, t), v);
            sum[v] = fused(x * x, pi, sum[v]);
          }
        }
        for (int v = 0; v < g.kCount; ++v) g.store_sum(row, v, sum[v]);
      });
    }
  }
  // local.D += pi, token by token, as the walk along a sequence does.
  static __attribute__((noinline)) void add_weights(int count, int64_t H, const A* weights,
                                                    A* local) {
    for (int64_t h = 0; h < H; ++h) {
      A sum = local[h * kRow + kZ];
      for (int t = 0; t < count; ++t) sum += weights[h * kBlock + t];
      local[h * kRow + kZ] = sum;
    }
  }

  // r of a tile; moves local.c past it.
  static __attribute__((noinline)) void causal_logits(const In& w, int64_t H, const A* carry,
                                                      A* local, A* logits) {
    for (int64_t h = 0; h < H; ++h) {
      V sums[kTile] = {};
      for_channels<Plan>([&](auto g) __attribute__((always_inline)) {
        const A* before = carry + h * kRow + kC;
        A* row = local + h * kRow + kC;
        V base[g.kCount], s[g.kCount];
        for (int v = 0; v < g.kCount; ++v) {
          base[v] = g.load_sum(before, v);
          s[v] = g.load_sum(row, v);
        }
        for (int t = 0; t < w.count; ++t) {
          V sum = sums[t];
          g.prefetch(w.at(h, t + kTile));
          for (int v = 0; v < g.kCount; ++v) {
            const V x = g.load(w.at(h, t), v);
            s[v] = fused(x, x, s[v]);
            const V c = max_or_second(splat<V>(kSumFloor), base[v] + s[v]);
            sum = fused(x * x, positive_reciprocal(c), sum);
          }
          sums[t] = sum;
        }
        for (int v = 0; v < g.kCount; ++v) g.store_sum(row, v, s[v]);
      });
      sum_channels(sums, logits + h * kBlock);
    }
  }

  // r of a tile from 1/c of the sequence.
  static __attribute__((noinline)) void plain_logits(const In& w, int64_t H, const A* inverse,
                                                     A* logits) {
    for (int64_t h = 0; h < H; ++h) {
      V sums[kTile] = {};
      for_channels<Plan>([&](auto g) __attribute__((always_inline)) {
        V factor[g.kCount];
        for (int v = 0; v < g.kCount; ++v) factor[v] = g.load_sum(inverse + h * kRow + kC, v);
        for (int t = 0; t < w.count; ++t) {
          V sum = sums[t];
          g.prefetch(w.at(h, t + kTile));
          for (int v = 0; v < g.kCount; ++v) {
            const V x = g.load(w.at(h, t), v);
            sum = fused(x * x, factor[v], sum);
          }
          sums[t] = sum;
        }
      });
      sum_channels(sums, logits + h * kBlock);
    }
  }

  // pi of kTile tokens: softmax over the heads. Logits and weights may be the same.
  static __attribute__((noinline)) void head_softmax(const A* logits, const A* temp, int64_t H,
                                                     A* weights) {
    for (int t = 0; t < kTile; t += W) {
      V top = splat<V>(A(-__builtin_inf()));
      for (int64_t h = 0; h < H; ++h) {
        top = maximum(top, temp[h] * load_vector<V>(logits + h * kBlock + t));
      }
      V sum{};
      for (int64_t h = 0; h < H; ++h) {
        const V e = exp(V(temp[h] * load_vector<V>(logits + h * kBlock + t) - top));
        store_vector(weights + h * kBlock + t, e);
        sum += e;
      }
      for (int64_t h = 0; h < H; ++h) {  // by division: a single head's weight is exactly 1
        A* weight = weights + h * kBlock + t;
        store_vector(weight, V(load_vector<V>(weight) / sum));
      }
    }
  }

  // y of a tile; moves local.A and local.D past it.
  static __attribute__((noinline)) void causal_output(const In& w, int64_t H, const A* weights,
                                                      const A* carry, A* local, const Out& y) {
    for (int64_t h = 0; h < H; ++h) {
      const A* weight = weights + h * kBlock;
      A total[kTile], factor[kTile];  // D, -pi D
      A sum = local[h * kRow + kZ];
      for (int t = 0; t < w.count; ++t) {
        sum += weight[t];
        total[t] = (carry[h * kRow + kZ] + sum) + kEpsilon;
        factor[t] = -weight[t] * total[t];
      }
      local[h * kRow + kZ] = sum;
      for_channels<Plan>([&](auto g) __attribute__((always_inline)) {
        const A* before = carry + h * kRow + kA;
        A* row = local + h * kRow + kA;
        V base[g.kCount], s[g.kCount];
        for (int v = 0; v < g.kCount; ++v) {
          base[v] = g.load_sum(before, v);
          s[v] = g.load_sum(row, v);
        }
        for (int t = 0; t < w.count; ++t) {
          const V pi = splat<V>(weight[t]), d = splat<V>(total[t]), f = splat<V>(factor[t]);
          for (int v = 0; v < g.kCount; ++v) {
            const V x = g.load(w.at(h, t), v);
            s[v] = fused(x * x, pi, s[v]);
            const V rate = positive_reciprocal(V(d + (base[v] + s[v])));
            g.store(y.at(h, t), v, x * (f * rate), y.stream);
          }
        }
        for (int v = 0; v < g.kCount; ++v) g.store_sum(row, v, s[v]);
      });
    }
  }

  // y of tokens from -1 / (1 + a) of the sequence, at kA of `gates`.
  static __attribute__((noinline)) void plain_output(const In& w, int64_t H, const A* weights,
                                                     const A* gates, const Out& y) {
    for (int64_t h = 0; h < H; ++h) {
      for_channels<Plan>([&](auto g) __attribute__((always_inline)) {
        V gate[g.kCount];
        for (int v = 0; v < g.kCount; ++v) gate[v] = g.load_sum(gates + h * kRow + kA, v);
        for (int t = 0; t < w.count; ++t) {
          g.prefetch(w.at(h, t + kTile));
          const V pi = splat<V>(weights[h * kBlock + t]);
          for (int v = 0; v < g.kCount; ++v) {
            g.store(y.at(h, t), v, g.load(w.at(h, t), v) * (pi * gate[v]), y.stream);
          }
        }
      });
    }
  }
};

}  // namespace ae
