// A row of scores in registers. The accumulator of mma.m16n8 gives the four lanes of a quad one
// row: each holds two neighbouring columns of every eight. Reductions over a row are a thread's own
// columns first, then the quad. All 32 lanes of a warp must call the functions that exchange.
#pragma once
#include "cuda/math.cuh"

namespace ae {

constexpr unsigned kWarp = 0xffffffffu;

// Register c of `lane` holds column first_column(lane) + column(c): only the second is a constant.
__host__ __device__ constexpr int column(int c) { return c / 2 * 8 + c % 2; }
__host__ __device__ constexpr int first_column(int lane) { return lane % 4 * 2; }
__host__ __device__ constexpr int column(int c, int lane) { return first_column(lane) + column(c); }

// The value of the lane whose number differs in the bits of `mask`.
template <class T>
AE_DEVICE T exchange(T x, int mask) {
  if constexpr (std::is_same_v<T, bool>) {
    return __shfl_xor_sync(kWarp, int(x), mask) != 0;
  } else if constexpr (std::is_same_v<T, int64_t>) {
    return int64_t(__shfl_xor_sync(kWarp, static_cast<long long>(x), mask));
  } else {
    return __shfl_xor_sync(kWarp, x, mask);
  }
}

// Both steps give the same bits in all four lanes: the operations commute.
#define AE_QUAD(name, combine)         \
  template <class T>                   \
  AE_DEVICE T name(T x) {              \
    x = combine(x, exchange(x, 1));    \
    return combine(x, exchange(x, 2)); \
  }
AE_QUAD(quad_sum, add)
AE_QUAD(quad_prod, mul)
AE_QUAD(quad_maximum, maximum)
AE_QUAD(quad_minimum, minimum)
AE_QUAD(quad_max, max_or_other)
AE_QUAD(quad_any, logical_or)
AE_QUAD(quad_all, logical_and)
#undef AE_QUAD

// Whether any row of the warp has the property: what few rows need is done under this vote.
AE_DEVICE bool any_row(bool x) { return __any_sync(kWarp, x); }

}  // namespace ae
