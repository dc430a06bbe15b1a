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

// Scores of kRows query rows and W / kRows keys, so that a key is loaded once for all these rows
// and the sums over lanes share their rounds.
template <class Acc, class M, int D, class E, int kRows, int... J>
AE_INLINE void direct_block(const M* q, int64_t q_row, const RowAddresses& keys, int64_t ahead,
                            Acc* scores, int64_t ld, std::integer_sequence<int, J...>) {
  using Step = GemmStep<Acc, M>;
  using V = typename Step::V;
  constexpr int W = Lanes<Acc>::W, kLanes = W * Step::kPair, kKeys = W / kRows;
  V sum[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) sum[i] = V{};
#pragma GCC unroll 1
  for (int d = 0; d < D; d += kLanes) {
    (__builtin_prefetch(reinterpret_cast<const E*>(keys.at<J>()) + d + ahead, 0, 2), ...);
    if constexpr (kRows == 1) {  // sixteen keys beside sixteen sums do not fit in registers
      const V x = load_key<Acc, M>(q + d);
      ((sum[J] = add_key<Acc, M>(sum[J], x, reinterpret_cast<const E*>(keys.at<J>()) + d)), ...);
    } else {
      const V key[kKeys] = {load_key<Acc, M>(reinterpret_cast<const E*>(keys.at<J>()) + d)...};
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        const V x = load_key<Acc, M>(q + i * q_row + d);
#pragma GCC unroll 16
        for (int j = 0; j < kKeys; ++j) {
          sum[i * kKeys + j] = Step::multiply_add(sum[i * kKeys + j], x, key[j]);
        }
      }
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

// scores[i][j] = q_i . k_j for rows i < m, keys j < n (n a multiple of W). Row i of q is at
// q + i * q_row, key j at k + j * k_row; D elements each, a whole number of vectors. Fetches what
// lies `ahead` elements after each key.
template <class Acc, class M, int D, class E>
__attribute__((noinline)) void direct_scores(int m, const M* q, int64_t q_row, const E* k,
                                             int64_t k_row, int n, Acc* scores, int64_t ld,
                                             int64_t ahead) {
  constexpr int W = Lanes<Acc>::W, kLanes = W * GemmStep<Acc, M>::kPair;
  static_assert(D % kLanes == 0, "rows must be whole vectors");
  const int64_t row_bytes = k_row * int64_t(sizeof(E));
  for (int j = 0; j < n; j += W) {
    const E* first = k + j * k_row;
    int i = 0;
    const auto rows = [&]<int kRows>() {
      constexpr int kKeys = W / kRows;
      for (; i + kRows <= m; i += kRows) {
        RowAddresses keys(first, row_bytes);
        for (int j1 = 0; j1 < W; j1 += kKeys, keys.skip(kKeys)) {
          direct_block<Acc, M, D, E, kRows>(q + i * q_row, q_row, keys, i == 0 ? ahead : 0,
                                            scores + i * ld + j + j1, ld,
                                            std::make_integer_sequence<int, kKeys>());
        }
      }
    };
    if constexpr (W >= 4) rows.template operator()<4>();
    rows.template operator()<2>();
    rows.template operator()<1>();
  }
}

}  // namespace ae
