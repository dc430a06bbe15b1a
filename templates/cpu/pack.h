// Copies of operand tiles in the layouts that gemm.h multiplies. Every function reads n rows of D
// elements of type E, applies the elementwise operand mod in the accumulator type A, converts to
// the multiply type M (A itself, or bf16 for dot products), fills all padding with zeros, and
// returns whether any packed value is Inf or NaN.
//
//   pack_row         [row_pitch<A>(D)]             one row, natural order: A operand of Q and dO
//   pack_rows        [rows][row_pitch<A>(D)]       natural rows: B operand over rows, M = A
//   pack_pairs       [rows/2][row_pitch<A>(D)][2]  pairs of rows: B operand over rows, M = bf16
//   pack_transposed  [D][rows]                     columns become rows: B operand over D, M = A
//                    [(D+1)/2][rows][2]            the same in pairs of columns, M = bf16
//   pack_by_row, pack_by_column                    the right one of the two for M
//
// `row(i)` returns the address of element 0 of source row i; `col` is the stride between elements
// of a row. `rows` is the padded row count: even for pack_pairs, a multiple of W for
// pack_transposed, which writes no column past n rounded up to W: those scores are never read.
#pragma once
#include "cpu/memory.h"

namespace ae {

template <class P>
struct Pointee;
template <class E>
struct Pointee<const E*> {
  using type = E;
};

// The absent operand mod.
struct NoMod {};

// Rows at a constant distance, in elements.
template <class E>
struct StridedRows {
  const E* base;
  int64_t stride;
  AE_INLINE const E* operator()(int64_t i) const { return base + i * stride; }
};

// Elements of a packed natural row (also columns of a packed pair row).
template <class A>
constexpr int row_pitch(int d) {
  return int(round_up(d, Lanes<A>::W));
}

// Elements of a whole packed tile.
template <class A, class M>
constexpr int64_t by_row_elements(int rows, int d) {
  return int64_t(rows) * row_pitch<A>(d);
}
template <class A, class M>
constexpr int64_t by_column_elements(int rows, int d) {
  return int64_t(rows) * round_up(d, __is_same(M, A) ? 1 : 2);
}

// W values of the multiply type: a vector of A, or the bits of W bf16.
template <class A, class M>
struct Packed;
template <class A>
struct Packed<A, A> {
  using V = typename Lanes<A>::Acc;
  static AE_INLINE V zero_from(V x, int n) { return first_lanes<A>(x, n); }
};
template <class A>
struct Packed<A, bf16> {
  using V = Vector<uint16_t, Lanes<A>::W>;
  static AE_INLINE V zero_from(V x, int n) {
    V lane{};
    for (int i = 0; i < Lanes<A>::W; ++i) lane[i] = uint16_t(i);
    return x & (V)(lane < uint16_t(n));
  }
};

// Collects whether any packed value was Inf or NaN.
template <class A, class M>
class NonFinite {
  static constexpr int W = Lanes<A>::W;
  using V = typename Packed<A, M>::V;
  using Unit = Vector<decltype(mask_element<A>()), W>;
  using Pairs = Vector<uint16_t, 2 * W>;
  V seen_{};
  Pairs seen_pairs_{};

  template <class U>
  static AE_INLINE U exponent_full(U x) {
    return (U)((x & uint16_t(0x7f80)) == uint16_t(0x7f80));
  }

 public:
  AE_INLINE void add(V x) {
    if constexpr (__is_same(M, bf16)) {
      seen_ |= exponent_full(x);
    } else {
      seen_ += x * A(0);
    }
  }
  // W whole units: elements, or pairs of bf16.
  AE_INLINE void add_units(Unit x) {
    if constexpr (__is_same(M, bf16)) {
      seen_pairs_ |= exponent_full((Pairs)x);
    } else {
      add((V)x);
    }
  }
  AE_INLINE bool any() const {
    bool found = false;
    for (int i = 0; i < W; ++i) found |= seen_[i] != 0;
    for (int i = 0; i < 2 * W; ++i) found |= seen_pairs_[i] != 0;
    return found;
  }
};

// x0 y0 x1 y1 ..: of the lower and of the upper half of two vectors.
template <class V>
struct Interleaved {
  V low, high;
};
template <class V>
AE_INLINE Interleaved<V> interleaved(V x, V y) {
  constexpr int N = sizeof(V) / sizeof(x[0]);
  V low{}, high{};
  for (int i = 0; i < N; ++i) {
    low[i] = i / 2 + i % 2 * N;
    high[i] = low[i] + N / 2;
  }
  return {__builtin_shuffle(x, y, low), __builtin_shuffle(x, y, high)};
}

// The slow case of load_packed: strided elements, or fewer than W.
template <class E, int W>
__attribute__((noinline)) void copy_elements(E* out, const E* p, int64_t col, int count) {
  for (int i = 0; i < W; ++i) out[i] = i < count ? p[i * col] : E{};
}

// Elements [0, count) of a row as W packed values, zero beyond.
template <class A, class M, class E, class Mod>
AE_INLINE typename Packed<A, M>::V load_packed(const E* p, int64_t col, int count, const Mod& mod) {
  using P = Packed<A, M>;
  constexpr int W = Lanes<A>::W;
  E copy[W];
  if (col != 1 || count < W) {
    copy_elements<E, W>(copy, p, col, count);
    p = copy;
  }
  if constexpr (__is_same(M, E) && __is_same(Mod, NoMod)) {
    return load_vector<typename P::V>(p);
  } else {
    typename Lanes<A>::Acc x = load_widened<A>(p);
    if constexpr (!__is_same(Mod, NoMod)) x = mod(x);
    typename P::V v;
    if constexpr (__is_same(M, A)) {
      v = x;
    } else {
      M out[W];
      store_narrowed<M, A>(out, x);
      v = load_vector<typename P::V>(out);
    }
    return !__is_same(Mod, NoMod) && count < W ? P::zero_from(v, count) : v;
  }
}

template <class A, class M, int D, class E, class Mod>
AE_INLINE bool pack_row(M* dst, const E* src, int64_t col, const Mod& mod, int64_t ahead = 0) {
  constexpr int W = Lanes<A>::W;
  NonFinite<A, M> bad;
  for (int d = 0; d < D; d += W) {
    if (ahead != 0) __builtin_prefetch(src + d * col + ahead, 0, 2);
    const auto v = load_packed<A, M>(src + d * col, col, D - d < W ? D - d : W, mod);
    bad.add(v);
    store_vector(dst + d, v);
  }
  return bad.any();
}

template <class A, class M, int D, class Row, class Mod>
bool pack_rows(M* dst, const Row& row, int64_t col, int n, int rows, const Mod& mod,
               int64_t ahead = 0) {
  constexpr int kPitch = row_pitch<A>(D);
  bool bad = false;
  for (int i = 0; i < n; ++i) {
    bad |= pack_row<A, M, D>(dst + int64_t(i) * kPitch, row(i), col, mod, ahead);
  }
  __builtin_memset(dst + int64_t(n) * kPitch, 0, sizeof(M) * uint64_t(rows - n) * kPitch);
  return bad;
}

template <class A, int D, class Row, class Mod>
bool pack_pairs(bf16* dst, const Row& row, int64_t col, int n, int rows, const Mod& mod,
                int64_t ahead = 0) {
  constexpr int W = Lanes<A>::W, kPitch = row_pitch<A>(D);
  using E = typename Pointee<decltype(row(0))>::type;
  using H = typename Packed<A, bf16>::V;
  using U = Vector<uint32_t, W>;
  using P = Vector<uint16_t, 2 * W>;
  NonFinite<A, bf16> bad;
  for (int i = 0; i < n; i += 2) {
    const auto *even = row(i), *odd = row(i + 1 < n ? i + 1 : i);
    bf16* out = dst + int64_t(i) * kPitch;
    int d = 0;
    if constexpr (__is_same(E, bf16) && __is_same(Mod, NoMod) && D >= 2 * W) {
      // Interleaved as they are.
      if (col == 1 && i + 1 < n) {
        for (; d + 2 * W <= D; d += 2 * W) {
          if (ahead != 0) {
            __builtin_prefetch(even + d + ahead, 0, 2);
            __builtin_prefetch(odd + d + ahead, 0, 2);
          }
          const P x = load_vector<P>(even + d), y = load_vector<P>(odd + d);
          bad.add_units((Vector<int32_t, W>)x);
          bad.add_units((Vector<int32_t, W>)y);
          const auto pairs = interleaved(x, y);
          store_vector(out + 2 * d, pairs.low);
          store_vector(out + 2 * d + 2 * W, pairs.high);
        }
      }
    }
    for (; d < D; d += W) {
      const int count = D - d < W ? D - d : W;
      if (ahead != 0) {
        __builtin_prefetch(even + d * col + ahead, 0, 2);
        __builtin_prefetch(odd + d * col + ahead, 0, 2);
      }
      const H lo = load_packed<A, bf16>(even + d * col, col, count, mod);
      H hi = load_packed<A, bf16>(odd + d * col, col, count, mod);
      if (i + 1 >= n) hi = H{};
      bad.add(lo);
      bad.add(hi);
      store_vector(out + 2 * d,
                   __builtin_convertvector(lo, U) | (__builtin_convertvector(hi, U) << 16));
    }
  }
  const int done = int(round_up(n, 2));
  __builtin_memset(dst + int64_t(done) * kPitch, 0, sizeof(bf16) * uint64_t(rows - done) * kPitch);
  return bad.any();
}

// Transposes a W x W block in registers: log2(W) rounds of exchanges between rows `kDistance`
// apart.
template <int kDistance, class V, int W>
AE_INLINE void transpose(V (&x)[W]) {
  if constexpr (kDistance < W) {
    using I = decltype(x[0] < x[0]);
    I low{}, high{};
    for (int i = 0; i < W; ++i) {
      low[i] = (i & kDistance) ? W + i - kDistance : i;
      high[i] = (i & kDistance) ? W + i : i + kDistance;
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      if ((i & kDistance) == 0) {
        const V a = x[i], b = x[i + kDistance];
        x[i] = __builtin_shuffle(a, b, low);
        x[i + kDistance] = __builtin_shuffle(a, b, high);
      }
    }
    transpose<2 * kDistance>(x);
  }
}

template <class A, class M, int D, class Row, class Mod>
bool pack_transposed(M* dst, const Row& row, int64_t col, int n, int rows, const Mod& mod,
                     int64_t ahead = 0) {
  constexpr int W = Lanes<A>::W;
  constexpr int kPair = __is_same(M, A) ? 1 : 2;  // elements of one transposed unit
  constexpr int kUnits = (D + kPair - 1) / kPair;
  using E = typename Pointee<decltype(row(0))>::type;
  using H = typename Packed<A, M>::V;
  using Unit = Vector<decltype(mask_element<A>()), W>;
  constexpr bool kWhole = (__is_same(M, E) || __is_same(M, A)) && __is_same(Mod, NoMod);
  NonFinite<A, M> bad;
  for (int i0 = 0; i0 < n; i0 += W) {
    for (int u0 = 0; u0 < kUnits; u0 += W) {
      Unit block[W];
      M* out = dst + (int64_t(u0) * rows + i0) * kPair;
      if (kWhole && col == 1 && i0 + W <= n && (u0 + W) * kPair <= D) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) {
          const E* p = row(i0 + i) + u0 * kPair;
          if (ahead != 0) __builtin_prefetch(p + ahead, 0, 2);
          if constexpr (__is_same(M, E)) {
            block[i] = load_vector<Unit>(p);
          } else {
            block[i] = (Unit)load_widened<A>(p);
          }
          bad.add_units(block[i]);
        }
        transpose<1>(block);
#pragma GCC unroll 16
        for (int u = 0; u < W; ++u) store_vector(out + int64_t(u) * rows * kPair, block[u]);
        continue;
      }
      for (int i = 0; i < W; ++i) {
        H part[kPair]{};
        if (i0 + i < n) {
          const E* p = row(i0 + i);
          for (int h = 0; h < kPair; ++h) {
            const int d = u0 * kPair + h * W;
            const int left = D - d < 0 ? 0 : D - d;
            part[h] = load_packed<A, M>(p + d * col, col, left < W ? left : W, mod);
            bad.add(part[h]);
          }
        }
        block[i] = load_vector<Unit>(part);
      }
      transpose<1>(block);
      for (int u = 0; u < W && u0 + u < kUnits; ++u) {
        store_vector(out + int64_t(u) * rows * kPair, block[u]);
      }
    }
  }
  return bad.any();
}

// B operand over rows (V for PV, K for dQ, Q for dK, dO for dV).
template <class A, class M, int D, class Row, class Mod>
AE_INLINE bool pack_by_row(M* dst, const Row& row, int64_t col, int n, int rows, const Mod& mod,
                           int64_t ahead = 0) {
  if constexpr (__is_same(M, A)) {
    return pack_rows<A, M, D>(dst, row, col, n, rows, mod, ahead);
  } else {
    return pack_pairs<A, D>(dst, row, col, n, rows, mod, ahead);
  }
}
// B operand over D (K for QK, V for dO V).
template <class A, class M, int D, class Row, class Mod>
AE_INLINE bool pack_by_column(M* dst, const Row& row, int64_t col, int n, int rows, const Mod& mod,
                              int64_t ahead = 0) {
  return pack_transposed<A, M, D>(dst, row, col, n, rows, mod, ahead);
}

}  // namespace ae
