// Scores of few query rows from keys as they lie in memory. A packed K tile pays when many rows
// read it; for a row or a few of them (decoding) reading K once, in order, is all there is to do.
#pragma once
#include <utility>

#include "cpu/gemm.h"
#include "cpu/pack.h"

namespace ae {

// Where lane i of the first half of a round of sum_each comes from, in the concatenation of two
// vectors of W lanes; the second half lies kOther lanes further. Rounds of 1 and 2 stay within
// groups of four lanes, later ones move whole groups: cheap shuffles of one instruction each.
template <int kRound, int W>
struct HalfLanes {
  static constexpr int kGroup = W < 4 ? W : 4;
  static constexpr bool kLast = 2 * kRound == W;
  static constexpr int kOther = kRound < 4 ? kGroup / 2 : kLast ? 4 : W / 2;
  static constexpr int at(int i) {
    const int group = i / kGroup, r = i % kGroup;
    if (kRound == 1) return r % 2 * W + group * kGroup + r / 2;
    if (kRound == 2) return r / 2 * W + group * kGroup + r % 2;
    constexpr int kGroups = W / kGroup;
    const int vector = group / (kGroups / 2), part = group % (kGroups / 2);
    return vector * W + part * kGroup * (kLast ? 2 : 1) + r;
  }
};

// Lane i of the result is the sum of the lanes of x[i]: log2(W) rounds that halve the vectors.
template <int kRound, class V, int W>
AE_INLINE V sum_each(V (&x)[W]) {
  if constexpr (kRound < W) {
    using I = decltype(x[0] < x[0]);
    using Half = HalfLanes<kRound, W>;
    I low{}, high{};
    for (int i = 0; i < W; ++i) {
      low[i] = Half::at(i);
      high[i] = Half::at(i) + Half::kOther;
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; i += 2 * kRound) {
      const V a = x[i], b = x[i + kRound];
      x[i] = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
    }
    return sum_each<2 * kRound>(x);
  } else {
    return x[0];
  }
}

// One vector of keys as they are multiplied: M as it lies, narrower elements widened.
template <class Acc, class M, class E>
AE_INLINE typename GemmStep<Acc, M>::V load_key(const E* p) {
  if constexpr (__is_same(M, E) && __is_same(M, bf16)) {
    // In the type that the product takes: GCC 12 takes a cast of the vector through the stack.
    auto x = load_vector<Vector<int16_t, 2 * Lanes<Acc>::W>>(p);
    __asm__("" : "+v"(x));
    return (typename GemmStep<Acc, M>::V)x;
  } else if constexpr (__is_same(M, E)) {
    return load_vector<typename GemmStep<Acc, M>::V>(p);
  } else {
    return load_widened<Acc>(p);
  }
}

// sum + x * key for a key that is used once. The dot product of bf16 pairs reads it from memory: of
// loads that it may place, GCC 12 keeps some on the stack.
template <class Acc, class M, class V, class E>
AE_INLINE V add_key(V sum, V x, const E* key) {
#if defined(__AVX512BF16__)
  if constexpr (__is_same(M, bf16)) {
    __asm__("vdpbf16ps %2, %1, %0"
            : "+v"(sum)
            : "v"(x), "m"(*reinterpret_cast<const char (*)[sizeof(V)]>(key)));
    return sum;
  }
#endif
  return GemmStep<Acc, M>::multiply_add(sum, x, load_key<Acc, M>(key));
}

// sum[i * kKeys] + x[i] * key for all rows.
template <class Acc, class M, int kRows, int kKeys, class V, class E>
AE_INLINE void add_rows(V* sum, const V (&x)[kRows], const E* key) {
  const V k = load_key<Acc, M>(key);
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    sum[i * kKeys] = GemmStep<Acc, M>::multiply_add(sum[i * kKeys], x[i], k);
  }
}

// Rows at multiples of a distance in bytes. The machine multiplies by 1, 2, 4 and 8 in an address;
// with 3, 5 and 7 distances at hand every row up to 15 needs no arithmetic. Left to itself the
// compiler keeps an address per row and vector, on the stack.
class RowAddresses {
 public:
  AE_INLINE RowAddresses(const void* base, int64_t row)
      : base_(static_cast<const char*>(base)), row_(row), three_(3 * row), five_(5 * row) {
    seven_ = 7 * row;
    __asm__("" : "+r"(three_), "+r"(five_), "+r"(seven_));
  }
  AE_INLINE void skip(int64_t rows) { base_ += rows * row_; }
  template <int kRow>
  AE_INLINE const char* at() const {
    static_assert(kRow < 16);
    const char* from = kRow < 8 ? base_ : base_ + 8 * row_;
    switch (kRow % 8) {
      case 0:
        return from;
      case 3:
        return from + three_;
      case 5:
        return from + five_;
      case 6:
        return from + 2 * three_;
      case 7:
        return from + seven_;
      default:
        return from + kRow % 8 * row_;
    }
  }

 private:
  const char* base_;
  int64_t row_, three_, five_, seven_;
};

// Stores the i-th part of kCount lanes.
template <int kCount, class A, class V>
AE_INLINE void store_part(A* to, V x, int i) {
  Vector<A, kCount> parts[sizeof(V) / sizeof(A) / kCount];
  __builtin_memcpy(parts, &x, sizeof(V));
  store_vector(to, parts[i]);
}

// What is fetched into the second cache while row j is read: the row at rows[j] + offset, and the
// one at more[j] where there are more.
template <class E>
struct Fetch {
  const E* const* rows;
  int64_t offset;
  const E* const* more;

  AE_INLINE Fetch from(int64_t j) const {
    return {rows + j, offset, more != nullptr ? more + j : nullptr};
  }
  AE_INLINE void operator()(int64_t j, int64_t d) const {
    __builtin_prefetch(rows[j] + offset + d, 0, 2);
    if (more != nullptr) __builtin_prefetch(more[j] + d, 0, 2);
  }
};

// Rows of keys or values in memory: row j at rows[j] + offset. Where 16 and more follow each other
// `stride` elements apart they are addressed from the first.
template <class E>
struct MemoryRows {
  const E* const* rows;
  int64_t offset, stride;
  Fetch<E> fetch;

  AE_INLINE MemoryRows from(int64_t j) const { return {rows + j, offset, stride, fetch.from(j)}; }
};

// Scores of kRows query rows and W / kRows keys, so that a key is loaded once for all these rows
// and the sums over lanes share their rounds.
template <class Acc, class M, int D, class E, int kRows, bool kFetch, int... J>
AE_INLINE void direct_block(const M* q, int64_t q_row, const RowAddresses& keys,
                            const Fetch<E>& fetch, Acc* scores, int64_t ld,
                            std::integer_sequence<int, J...>) {
  using Step = GemmStep<Acc, M>;
  using V = typename Step::V;
  constexpr int W = Lanes<Acc>::W, kLanes = W * Step::kPair, kKeys = W / kRows;
  V sum[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) sum[i] = V{};
#pragma GCC unroll 1
  for (int d = 0; d < D; d += kLanes) {
    if constexpr (kFetch) (fetch(J, d), ...);
    if constexpr (kRows == 1) {  // sixteen keys beside sixteen sums do not fit in registers
      const V x = load_key<Acc, M>(q + d);
      ((sum[J] = add_key<Acc, M>(sum[J], x, reinterpret_cast<const E*>(keys.at<J>()) + d)), ...);
    } else {
      V x[kRows];
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) x[i] = load_key<Acc, M>(q + i * q_row + d);
      (add_rows<Acc, M, kRows, kKeys>(sum + J, x, reinterpret_cast<const E*>(keys.at<J>()) + d),
       ...);
    }
  }
  const V total = sum_each<1>(sum);
  if constexpr (kRows == 1) {
    store_vector(scores, total);
  } else {
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      store_part<kKeys>(scores + i * ld, total, i);
    }
  }
}

// W keys for all rows.
template <class Acc, class M, int D, class E>
AE_INLINE void direct_keys(int m, const M* q, int64_t q_row, const E* first, int64_t row_bytes,
                           const Fetch<E>& fetch, Acc* scores, int64_t ld) {
  constexpr int W = Lanes<Acc>::W;
  int i = 0;
  const auto rows = [&]<int kRows>() {
    constexpr int kKeys = W / kRows;
    for (; i + kRows <= m; i += kRows) {
      RowAddresses keys(first, row_bytes);
      for (int j = 0; j < W; j += kKeys, keys.skip(kKeys)) {
        Acc* to = scores + i * ld + j;
        constexpr std::make_integer_sequence<int, kKeys> kEach;
        if (i == 0) {
          direct_block<Acc, M, D, E, kRows, true>(q, q_row, keys, fetch.from(j), to, ld, kEach);
        } else {
          direct_block<Acc, M, D, E, kRows, false>(q + i * q_row, q_row, keys, fetch, to, ld,
                                                   kEach);
        }
      }
    }
  };
  if constexpr (W >= 4) rows.template operator()<4>();
  rows.template operator()<2>();
  rows.template operator()<1>();
}

// scores[i][j] = q_i . k_j for rows i < m, keys j < n; up to the next whole vector of scores is
// written. Row i of q is at q + i * q_row; D elements each, a whole number of vectors.
template <class Acc, class M, int D, class E>
__attribute__((noinline)) void direct_scores(int m, const M* q, int64_t q_row, MemoryRows<E> k,
                                             int n, Acc* scores, int64_t ld) {
  constexpr int W = Lanes<Acc>::W;
  static_assert(D % (W * GemmStep<Acc, M>::kPair) == 0, "rows must be whole vectors");
  for (int j = 0; j < n; j += W) {
    const E* const* row = k.rows + j;
    const E* first = row[0] + k.offset;
    int64_t stride = k.stride;
    E copy[W * D];
    // Past the end nothing is read, and pages may end anywhere: such keys are copied.
    if (j + W > n || row[W - 1] - row[0] != (W - 1) * k.stride) {
      for (int i = 0; i < W; ++i) {
        if (j + i < n) {
          __builtin_memcpy(copy + i * D, row[i] + k.offset, sizeof(E) * D);
        } else {
          __builtin_memset(copy + i * D, 0, sizeof(E) * D);
        }
      }
      first = copy, stride = D;
    }
    direct_keys<Acc, M, D, E>(m, q, q_row, first, stride * int64_t(sizeof(E)), k.fetch.from(j),
                              scores + j, ld);
  }
}

// kRegs vectors of columns of kPair rows of values as B operands: as they lie, widened, or pairs of
// bf16 rows.
template <class Acc, class M, class E, int kRegs>
AE_INLINE void load_values(typename GemmStep<Acc, M>::V (&bv)[kRegs], const E* even, const E* odd) {
  using V = typename GemmStep<Acc, M>::V;
  if constexpr (!__is_same(M, Acc)) {
    constexpr int kLanes = sizeof(V) / sizeof(E);
    using H = Vector<uint16_t, kLanes>;
    H low, high;
    for (int i = 0; i < kLanes; ++i) {
      low[i] = uint16_t(i / 2 + i % 2 * kLanes);
      high[i] = uint16_t(kLanes / 2 + i / 2 + i % 2 * kLanes);
    }
#pragma GCC unroll 8
    for (int j = 0; j < kRegs / 2; ++j) {
      const H x = load_vector<H>(even + j * kLanes), y = load_vector<H>(odd + j * kLanes);
      bv[2 * j] = (V)__builtin_shuffle(x, y, low);
      bv[2 * j + 1] = (V)__builtin_shuffle(x, y, high);
    }
  } else {
#pragma GCC unroll 8
    for (int j = 0; j < kRegs; ++j) {
      if constexpr (__is_same(E, Acc)) {
        bv[j] = load_vector<V>(even + j * Lanes<Acc>::W);
      } else {
        bv[j] = load_widened<Acc>(even + j * Lanes<Acc>::W);
      }
    }
  }
}

// Columns [0, kRegs * W) of kRows rows of O = O * factor + W V, held in registers over all values.
template <class Acc, class M, class E, int kRows, int kRegs, bool kFetch>
AE_INLINE void values_block(int n, const M* weights, int64_t ldw, const MemoryRows<E>& v,
                            int64_t column, const E* zeros, Acc* out, int64_t ldo,
                            const Acc* factor) {
  using Step = GemmStep<Acc, M>;
  using V = typename Step::V;
  constexpr int W = Lanes<Acc>::W, kPair = Step::kPair;
  constexpr int kLine = 64 / int(sizeof(E));
  V sum[kRows][kRegs];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kRegs; ++j) sum[i][j] = load_vector<V>(out + i * ldo + j * W) * factor[i];
  }
  const int64_t offset = v.offset + column;
#pragma GCC unroll 1
  for (int s = 0; s < n; s += kPair) {
    const E* even = v.rows[s] + offset;
    const E* odd = kPair == 1 ? even : s + 1 < n ? v.rows[s + 1] + offset : zeros;
    if constexpr (kFetch) {
#pragma GCC unroll 8
      for (int c = 0; c < kRegs * W; c += kLine) {
        for (int i = 0; i < kPair; ++i) v.fetch(s + i, column + c);
      }
    }
    V bv[kRegs];
    load_values<Acc, M, E>(bv, even, odd);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const V av = Step::broadcast(weights + i * ldw + s);
#pragma GCC unroll 8
      for (int j = 0; j < kRegs; ++j) sum[i][j] = Step::multiply_add(sum[i][j], av, bv[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kRegs; ++j) store_vector(out + i * ldo + j * W, sum[i][j]);
  }
}

// out[i] = out[i] * factor[i] + sum of weights[i][j] v_j for rows i < m, values j < n of Dv
// elements, a whole number of vectors. All of them are multiplied. An odd last one is paired with
// zeros; its ahead[] has one more entry.
template <class Acc, class M, int Dv, class E>
__attribute__((noinline)) void direct_values(int m, int n, const M* weights, int64_t ldw,
                                             MemoryRows<E> v, Acc* out, int64_t ldo,
                                             const Acc* factor) {
  constexpr int W = Lanes<Acc>::W, kPanel = kGemmRegs * W, kRest = Dv % kPanel / W;
  alignas(64) static constexpr E kZeros[kPanel] = {};
  const auto panel = [&]<int kRegs>(int64_t column) {
    int i = 0;
    const auto rows = [&]<int kRows>() {
      for (; i + kRows <= m; i += kRows) {
        const M* w = weights + i * ldw;
        Acc* o = out + i * ldo + column;
        if (i == 0) {
          values_block<Acc, M, E, kRows, kRegs, true>(n, w, ldw, v, column, kZeros, o, ldo, factor);
        } else {
          values_block<Acc, M, E, kRows, kRegs, false>(n, w, ldw, v, column, kZeros, o, ldo,
                                                       factor + i);
        }
      }
    };
    rows.template operator()<4>();
    rows.template operator()<2>();
    rows.template operator()<1>();
  };
  int64_t column = 0;
  for (; column + kPanel <= Dv; column += kPanel) panel.template operator()<kGemmRegs>(column);
  if constexpr (kRest > 0) panel.template operator()<kRest>(column);
}

}  // namespace ae
