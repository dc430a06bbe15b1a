// Reductions over the lanes of a vector (a tree: the order is fixed), and the lane numbers.
#pragma once
#include "cpu/math_select.h"

namespace ae {

template <class F, Vec V>
AE_INLINE ElemOf<V> reduce(V v) {
  if constexpr (kLanes<V> == 2) {
    return F::of(v[0], v[1]);
  } else {
    return reduce<F>(F::of(lower_half(v), upper_half(v)));
  }
}

#define AE_REDUCE(name, combine)      \
  struct name##_lanes {               \
    template <class X>                \
    static AE_INLINE X of(X a, X b) { \
      return combine(a, b);           \
    }                                 \
  };                                  \
  template <Vec V>                    \
  AE_INLINE ElemOf<V> name(V v) {     \
    return reduce<name##_lanes>(v);   \
  }
AE_REDUCE(hsum, add)
AE_REDUCE(hprod, mul)
AE_REDUCE(hmax, maximum)
AE_REDUCE(hmin, minimum)
#undef AE_REDUCE

AE_INLINE bool any(bool m) { return m; }
AE_INLINE bool all(bool m) { return m; }

// One bit per lane of a Mask, lane 0 lowest.
template <Vec M>
AE_INLINE uint32_t lane_bits(M m) {
  static_assert(std::is_same_v<ElemOf<M>, int32_t>);
#if defined(__AVX512F__)
  if constexpr (sizeof(M) == 64) return _cvtmask16_u32(_mm512_movepi32_mask((__m512i)m));
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(M) == 32) {
    return static_cast<uint32_t>(_mm256_movemask_ps((__m256)m));
  }
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(M) == 16) {
    typedef float F4 __attribute__((vector_size(16)));
    return static_cast<uint32_t>(__builtin_ia32_movmskps((F4)m));
  }
#endif
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<M>; ++i) bits |= (static_cast<uint32_t>(m[i]) & 1u) << i;
  return bits;
}

template <Vec M>
AE_INLINE bool any(M m) {
  return lane_bits(m) != 0;
}
template <Vec M>
AE_INLINE bool all(M m) {
  return lane_bits(m) == (1u << kLanes<M>)-1;
}

template <Vec V, int... I>
AE_INLINE V iota_of(std::integer_sequence<int, I...>) {
  return V{I...};
}
template <Vec V>
AE_INLINE V iota() {
  return iota_of<V>(std::make_integer_sequence<int, kLanes<V>>());
}

}  // namespace ae
