// The arithmetic of one row tile x KV tile of the backward pass, and what goes in and out of it:
// weights and dS as A operands, products that keep stored Inf and NaN away from zero weights, and
// the last step from an accumulator to a stored gradient. Layouts are those of gemm.h and pack.h.
#pragma once
#include "cpu/gemm.h"
#include "cpu/pack.h"
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace ae {

#if defined(__AVX512BF16__)
// Two rows of n values rounded to bf16 and interleaved, n a multiple of 16:
// out[2 * j] = even[j], out[2 * j + 1] = odd[j].
inline void interleave_rows(const float* even, const float* odd, bf16* out, int n) {
  alignas(64) uint16_t order[32];
  for (int i = 0; i < 16; ++i) {
    order[2 * i] = uint16_t(i);
    order[2 * i + 1] = uint16_t(16 + i);
  }
  const __m512i index = _mm512_load_si512(order);
  for (int j = 0; j < n; j += 16) {
    const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(odd + j), _mm512_loadu_ps(even + j));
    _mm512_storeu_si512(out + 2 * j, _mm512_permutexvar_epi16(index, (__m512i)both));
  }
}

// A row of n values rounded to bf16, n a multiple of 32.
inline void round_row(const float* x, bf16* out, int n) {
  for (int j = 0; j < n; j += 32) {
    const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + j + 16), _mm512_loadu_ps(x + j));
    _mm512_storeu_si512(out + j, (__m512i)both);
  }
}
#endif

// C[m x N] += A[m x k] * B[k x N] without the terms whose factor in A is exactly zero: a dead pair
// must not meet an Inf or NaN stored in the operand. Only for tiles that hold one, so not tuned.
// a: element (i, j) at i * a_row + j * a_step, not yet rounded to M. b: packed by row. ldc = N.
template <class A, class M, int N>
__attribute__((noinline)) void multiply_nonzero(int m, int k, const A* a, int64_t a_row,
                                                int64_t a_step, const M* b, A* c) {
  constexpr int kPair = __is_same(M, A) ? 1 : 2;
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < k; ++j) {
      const A factor = a[i * a_row + j * a_step];
      if (factor == A(0)) continue;
      const A rounded = widen<A>(narrow<M>(factor));
      const M* row = b + (j / kPair) * N * kPair + j % kPair;
      for (int d = 0; d < N; ++d) c[i * N + d] += rounded * widen<A>(row[d * kPair]);
    }
  }
}

// rowsum(x * y) of D elements. Where x is exactly zero the term is: the output of a dead row is,
// and its dO may be anything.
template <class A, int D, class E>
AE_INLINE A dot_row(const E* x, int64_t x_col, const E* y, int64_t y_col) {
  constexpr int W = Lanes<A>::W;
  typename Lanes<A>::Acc sum{};
  for (int d = 0; d < D; d += W) {
    const int count = D - d < W ? D - d : W;
    const auto xv = load_packed<A, A>(x + d * x_col, x_col, count, NoMod{});
    const auto yv = load_packed<A, A>(y + d * y_col, y_col, count, NoMod{});
    sum += xv != 0 ? xv * yv : xv;
  }
  A total = 0;
  for (int i = 0; i < W; ++i) total += sum[i];
  return total;
}

// Stores one row of a gradient: the sum over `copies` accumulators in index order, taken back
// through the operand mod. `vjp(x, g, live)` sees the raw operand; lanes whose gradient is exactly
// zero are not live, so what is stored in an operand that nobody attends to reaches nothing.
template <class A, int D, class E, class Vjp>
AE_INLINE void store_gradient_row(E* dst, int64_t dst_col, const A* sum, int64_t copies,
                                  int64_t copy_stride, const E* raw, int64_t raw_col,
                                  const Vjp& vjp) {
  using L = Lanes<A>;
  using V = typename L::Acc;
  constexpr int W = L::W;
  for (int d = 0; d < D; d += W) {
    const int count = D - d < W ? D - d : W;
    V g = load_vector<V>(sum + d);
    for (int64_t c = 1; c < copies; ++c) g += load_vector<V>(sum + c * copy_stride + d);
    if constexpr (!__is_same(Vjp, NoMod)) {
      const V x = load_packed<A, A>(raw + d * raw_col, raw_col, count, NoMod{});
      g = first_lanes<A>(g, count);
      const auto live = g != V{};
      g = live ? vjp(x, g, __builtin_convertvector(live, typename L::Mask)) : V{};
    }
    if (dst_col == 1 && count == W) {
      store_narrowed<E, A>(dst + d, g);
    } else {
      E element[W];
      store_narrowed<E, A>(element, g);
      for (int i = 0; i < count; ++i) dst[(d + i) * dst_col] = element[i];
    }
  }
}

}  // namespace ae
