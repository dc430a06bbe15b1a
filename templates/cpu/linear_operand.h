// Operands of a chunk: through their hooks, into the layouts that gemm.h multiplies.
#pragma once
#include "cpu/linear_work.h"
#include "cpu/math.h"

namespace ae {

// Elements [0, count) of a row as W accumulator lanes, zero beyond.
template <class A, class E>
AE_INLINE typename Lanes<A>::Acc load_lanes(const E* p, int64_t col, int count) {
  if constexpr (__is_same(E, A)) {
    return load_packed<A, A>(p, col, count, NoMod{});
  } else {
    E copy[Lanes<A>::W];
    if (col != 1 || count < Lanes<A>::W) {
      copy_elements<E, Lanes<A>::W>(copy, p, col, count);
      p = copy;
    }
    return load_widened<A>(p);
  }
}

// Two rows of lanes as pairs of the multiply type: W units, of 32 bits for bf16; one row (`odd` is
// unused) where products take no pairs.
template <class M, class V>
AE_INLINE auto pair_lanes(V even, V odd) {
#if defined(__AVX512BF16__)
  if constexpr (__is_same(M, bf16)) {
    const auto both = (Vector<uint16_t, 32>)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    Vector<uint16_t, 32> lane{};
    for (int i = 0; i < 32; ++i) lane[i] = uint16_t(i / 2 + i % 2 * 16);
    return (Vector<uint32_t, 16>)__builtin_shuffle(both, lane);
  } else {
    return even;
  }
#else
  return even;
#endif
}
template <class M, class V>
AE_INLINE void store_pairs(M* p, V even, V odd) {
  store_vector(p, pair_lanes<M>(even, odd));
}

// N elements of two rows as pairs at `to`, or of `even` alone where products take no pairs;
// visit(j, x, y) gets each vector of both.
template <class A, class M, int N, class E, class Visit>
AE_INLINE void each_pair(const E* even, const E* odd, M* to, const Visit& visit) {
  using V = typename Lanes<A>::Acc;
  constexpr int W = Lanes<A>::W;
  if constexpr (__is_same(M, A)) {
#pragma GCC unroll 16
    for (int j = 0; j < N; j += W) {
      const V x = load_widened<A>(even + j);
      store_vector(to + j, x);
      visit(j, x, V{});
    }
  } else if constexpr (__is_same(E, M) && N % (2 * W) == 0) {
    // Interleaved as they are; pairs widen in place.
    using H = Vector<uint16_t, 2 * W>;
    using U = Vector<uint32_t, W>;
#pragma GCC unroll 8
    for (int j = 0; j < N; j += 2 * W) {
      const auto both = interleaved(load_vector<H>(even + j), load_vector<H>(odd + j));
      const U pairs[2] = {(U)both.low, (U)both.high};
      for (int h = 0; h < 2; ++h) {
        store_vector(to + 2 * (j + h * W), pairs[h]);
        visit(j + h * W, (V)(pairs[h] << 16), (V)(pairs[h] & 0xffff0000u));
      }
    }
  } else {
    for (int j = 0; j < N; j += W) {
      const V x = load_widened<A>(even + j), y = load_widened<A>(odd + j);
      store_pairs(to + 2 * j, x, y);
      visit(j, x, y);
    }
  }
}

// Rows of accumulators [rows][N] as a B operand over them: [rows][N], or [rows/2][N][2] in pairs.
// An odd last row is paired with zeros. Each row may be scaled.
template <class A, class M, int N, class Factor>
AE_INLINE void pack_sums(M* dst, const A* src, int rows, const Factor& factor) {
  using V = typename Lanes<A>::Acc;
  constexpr int W = Lanes<A>::W, kPair = __is_same(M, A) ? 1 : 2;
  for (int i = 0; i < rows; i += kPair) {
    const bool whole = i + kPair <= rows;
    for (int j = 0; j < N; j += W) {
      const V even = load_vector<V>(src + int64_t(i) * N + j) * factor(i);
      V odd{};
      if (kPair == 2 && whole) odd = load_vector<V>(src + int64_t(i + 1) * N + j) * factor(i + 1);
      store_pairs(dst + int64_t(i) * N + j * kPair, even, odd);
    }
  }
}

// W x W blocks of accumulators [rows][pitch] as [columns][rows]: `rows` a multiple of W.
template <class A>
__attribute__((noinline)) void transpose_tile(A* dst, int64_t dst_pitch, const A* src,
                                              int64_t src_pitch, int rows, int columns) {
  using V = typename Lanes<A>::Acc;
  constexpr int W = Lanes<A>::W;
  for (int i = 0; i < rows; i += W) {
    for (int j = 0; j < columns; j += W) {
      V block[W];
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) block[r] = load_vector<V>(src + (i + r) * src_pitch + j);
      transpose<1>(block);
      const int n = columns - j < W ? columns - j : W;
      if (n == W) {
#pragma GCC unroll 16
        for (int c = 0; c < W; ++c) store_vector(dst + (j + c) * dst_pitch + i, block[c]);
      } else {
        for (int c = 0; c < n; ++c) store_vector(dst + (j + c) * dst_pitch + i, block[c]);
      }
    }
  }
}

// Sums of the lanes of W vectors: lane i is that of x[i].
template <int kDistance = 1, class V, int N>
AE_INLINE V sum_each(V (&x)[N]) {
  if constexpr (N == 1) {
    return x[0];
  } else {
    using I = decltype(x[0] < x[0]);
    constexpr int W = sizeof(V) / sizeof(x[0][0]);
    I own{}, other{};
    for (int i = 0; i < W; ++i) {
      const int from = (i & kDistance) ? W : 0;
      own[i] = from + i;
      other[i] = from + (i ^ kDistance);
    }
    V half[N / 2];
#pragma GCC unroll 8
    for (int i = 0; i < N / 2; ++i) {
      half[i] = __builtin_shuffle(x[2 * i], x[2 * i + 1], own) +
                __builtin_shuffle(x[2 * i], x[2 * i + 1], other);
    }
    return sum_each<2 * kDistance>(half);
  }
}

// Rows of accumulators, `width` elements each (zeros to the next vector), through a hook.
template <class A, class E, class Hook>
__attribute__((noinline)) void stage_rows(A* dst, int64_t pitch, const LinearRows<E>& src, int n,
                                          int width, HookAt at, const Hook& hook) {
  constexpr int W = Lanes<A>::W;
  const int64_t d0 = at.d;
  for (int i = 0; i < n; ++i, ++at.t) {
    for (int d = 0; d < width; d += W) {
      at.d = d0 + d;
      at.count = width - d < W ? width - d : W;
      const auto x = hook(at, load_lanes<A>(src(i) + d * src.col, src.col, at.count));
      store_vector(dst + i * pitch + d, at.count < W ? first_lanes<A>(x, at.count) : x);
    }
  }
}

// What the kernel reads of a launch. Rows come through their hook, staged as accumulators
// [n][pitch], or as they lie where there is no hook.
template <class Plan, class Fn>
class LinearInputs {
  using T = LinearTypes<Plan>;
  using Acc = typename T::Acc;
  using Elem = typename T::Elem;
  using V = typename T::V;
  static constexpr int W = T::W;

 public:
  using QElem = std::conditional_t<Fn::kHasQMod, Acc, Elem>;
  using KElem = std::conditional_t<Fn::kHasKMod, Acc, Elem>;
  using VElem = std::conditional_t<Fn::kHasVMod, Acc, Elem>;

  LinearInputs(const ae_linear_params& p, const Env& env) : p_(p), env_(env) {}

  // As they lie.
  template <class E>
  static LinearRows<E> rows(const void* data, const int64_t* s, int64_t b, int64_t h, int64_t t) {
    return {(const E*)data + b * s[0] + h * s[1] + t * s[2], s[2], s[3]};
  }
  LinearRows<Elem> raw_q(const LinearAt& a) const {
    return rows<Elem>(p_.q, p_.q_stride, a.b, a.hk, a.t);
  }
  LinearRows<Elem> raw_k(const LinearAt& a) const {
    return rows<Elem>(p_.k, p_.k_stride, a.b, a.hk, a.t);
  }
  LinearRows<Elem> raw_v(const LinearAt& a, int column) const {
    const auto r = rows<Elem>(p_.v, p_.v_stride, a.b, a.h, a.t);
    return {r.base + column * r.col, r.stride, r.col};
  }
  // Where the output goes.
  LinearRows<Elem> out(const LinearAt& a, int column) const {
    const auto r = rows<Elem>(p_.out, p_.out_stride, a.b, a.h, a.t);
    return {r.base + column * r.col, r.stride, r.col};
  }

  // Of a channel decay.
  LinearRows<typename Plan::Decay> raw_decay(const LinearAt& a) const {
    return rows<typename Plan::Decay>(p_.decay, p_.decay_stride, a.b, a.h, a.t);
  }

  // Through their hooks. `stage` is read only with a hook: [kChunk][kDPitch], for v
  // [kChunk][pitch].
  LinearRows<QElem> q(const LinearAt& a, Acc* stage) const {
    if constexpr (Fn::kHasQMod) {
      stage_rows<Acc>(stage, T::kDPitch, raw_q(a), a.n, T::kD, {a.b, a.hk, a.t, 0, 0},
                      [this](const HookAt& at, V x) { return Fn::q_mod(env_, at, x); });
      return {stage, T::kDPitch, 1};
    } else {
      return raw_q(a);
    }
  }
  LinearRows<KElem> k(const LinearAt& a, Acc* stage) const {
    if constexpr (Fn::kHasKMod) {
      stage_rows<Acc>(stage, T::kDPitch, raw_k(a), a.n, T::kD, {a.b, a.hk, a.t, 0, 0},
                      [this](const HookAt& at, V x) { return Fn::k_mod(env_, at, x); });
      return {stage, T::kDPitch, 1};
    } else {
      return raw_k(a);
    }
  }
  LinearRows<VElem> v(const LinearAt& a, int column, int width, Acc* stage, int64_t pitch) const {
    if constexpr (Fn::kHasVMod) {
      stage_rows<Acc>(stage, pitch, raw_v(a, column), a.n, width, {a.b, a.h, a.t, column, 0},
                      [this](const HookAt& at, V x) { return Fn::v_mod(env_, at, x); });
      return {stage, pitch, 1};
    } else {
      return raw_v(a, column);
    }
  }

  // a[i] = exp(g) of token i of the chunk, 1 past the last, in whole vectors up to `size`; `log`,
  // if wanted, is g itself, and 0.
  void scalar_decay(const LinearAt& a, Acc* out, Acc* log = nullptr,
                    int size = Plan::kChunk) const {
    const int64_t* s = p_.decay_stride;
    const auto* g = (const typename Plan::Decay*)p_.decay + a.b * s[0] + a.h * s[1] + a.t * s[2];
    HookAt at{a.b, a.h, a.t, 0, 0};
    for (int i = 0; i < size; i += W) {
      const int left = a.n - i;
      at.t = a.t + i;
      at.count = left < 0 ? 0 : left < W ? left : W;
      const V x = decay_lanes(at, load_lanes<Acc>(g + i * s[2], s[2], at.count));
      if (log != nullptr) store_vector(log + i, x);
      store_vector(out + i, ae::exp(x));
    }
  }
  // The same of one token's channels: out[0, kDPitch), 1 past the last.
  void channel_decay(const LinearAt& a, int token, Acc* out, Acc* log = nullptr) const {
    const auto r = rows<typename Plan::Decay>(p_.decay, p_.decay_stride, a.b, a.h, a.t + token);
    HookAt at{a.b, a.h, a.t + token, 0, 0};
    for (int d = 0; d < T::kDPitch; d += W) {
      at.d = d;
      at.count = T::kD - d < W ? T::kD - d : W;
      const V x = decay_lanes(at, load_lanes<Acc>(r.base + d * r.col, r.col, at.count));
      if (log != nullptr) store_vector(log + d, x);
      store_vector(out + d, ae::exp(x));
    }
  }
  // beta of the tokens of the chunk, 0 past the last.
  void beta(const LinearAt& a, Acc* out, int size = Plan::kChunk) const {
    const int64_t* s = p_.beta_stride;
    const auto* x = (const typename Plan::Beta*)p_.beta + a.b * s[0] + a.h * s[1] + a.t * s[2];
    for (int i = 0; i < size; i += W) {
      const int left = a.n - i;
      const int count = left < 0 ? 0 : left < W ? left : W;
      store_vector(out + i, load_lanes<Acc>(x + i * s[2], s[2], count));
    }
  }

  const ae_linear_params& params() const { return p_; }
  const Env& env() const { return env_; }

 private:
  const ae_linear_params& p_;
  const Env& env_;

  // Log-decays through their hook, 0 past `at.count`.
  AE_INLINE V decay_lanes(const HookAt& at, V g) const {
    if constexpr (Fn::kHasDecayMod) g = Fn::decay_mod(env_, at, g);
    if (at.count < W) g = first_lanes<Acc>(g, at.count);
    if (!all(le(g, Acc(0)))) {  // positive or NaN
      __atomic_store_n(p_.fault, int32_t(AE_POSITIVE_DECAY), __ATOMIC_RELAXED);
    }
    return g;
  }
};

}  // namespace ae
