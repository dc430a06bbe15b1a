// Sums of gradients of captured tensors (capture.h). `grad` is a contiguous accumulator with the
// sizes of the captured tensor. Lanes are added in lane order, so the sum is the same at every run.
#pragma once
#include "cpu/capture_gather.h"

namespace ae {

// Wraps index i of the next dimension of a contiguous tensor and appends it to an element offset;
// false when it is out of bounds.
AE_INLINE bool append_index(int64_t i, int64_t size, int64_t& offset) {
  if (i < 0) i += size;
  offset = add(mul(offset, size), i);
  return static_cast<uint64_t>(i) < static_cast<uint64_t>(size);
}

template <int W, class A, class Live, class Value, class... Idx>
__attribute__((noinline)) void scatter_lanes(const Env& env, int cap, A* grad, const Live& live,
                                             const Value& value, const Idx&... idx) {
  const ae_capture& c = env.cap[cap];
  for (int lane = 0; lane < W; ++lane) {
    if (!lane_of(live, lane)) continue;
    int64_t offset = 0;
    int d = 0;
    bool ok = true;
    ((ok &= append_index(lane_of(idx, lane), c.size[d], offset), ++d), ...);
    if (ok) {
      grad[offset] += static_cast<A>(lane_of(value, lane));
    } else {
      report_fault(env, cap);
    }
  }
}

// grad[idx...] += value in every live lane. Where all indices are scalars, the live lanes' sum.
template <class A, class Live, class Value, class... Idx>
AE_INLINE void scatter_add(const Env& env, int cap, A* grad, Live live, Value value, Idx... idx) {
  constexpr int W = kLanesAmong<Idx...>;
  if constexpr (W == 0) {
    if (!any(live)) return;
    const ae_capture& c = env.cap[cap];
    int64_t offset = 0;
    [[maybe_unused]] int d = 0;
    bool ok = true;
    ((ok &= append_index(idx, c.size[d], offset), ++d), ...);
    if (!ok) return report_fault(env, cap);
    auto sum = convert<A>(select(live, value, splat<Value>(0)));
    if constexpr (Vec<decltype(sum)>) {
      grad[offset] += hsum(sum);
    } else {
      grad[offset] += sum;
    }
  } else {
    scatter_lanes<W>(env, cap, grad, live, value, idx...);
  }
}

template <int W, class A, class Live, class Value, class... Idx, int... I>
AE_INLINE void scatter_run_lanes(const Env& env, int cap, A* grad, Live live, Value value,
                                 std::integer_sequence<int, I...>, Idx... idx) {
  scatter_lanes<W>(env, cap, grad, live, value, run_index<I + 1 == sizeof...(I), W>(idx)...);
}

// The same with last index start + lane, for a scalar start that ends idx: consecutive elements.
// kByQuery: the index before is the query's (capture_gather.h).
template <class A, bool kByQuery = false, class Live, class Value, class... Idx>
AE_INLINE void scatter_run(const Env& env, int cap, A* grad, Live live, Value value, Idx... idx) {
  constexpr int kRank = sizeof...(Idx);
  constexpr int W = kLanesAmong<Live, Value, Idx...>;
  static_assert(W > 0 && kRank > 0, "scatter_run: no operand tells the lane count");
  if constexpr ((Scalar<Idx> && ...)) {
    const ae_capture& c = env.cap[cap];
    using V = Vector<A, W>;
    int64_t offset = 0;
    int d = 0;
    bool inside = true;  // all lanes are in bounds, none wraps
    ((inside &= d < kRank - 1 || (idx >= 0 && idx <= c.size[d] - W),
      inside &= append_index(idx, c.size[d], offset), ++d),
     ...);
    if (__builtin_expect(inside, 1)) {
      A* to = grad + offset;
      if constexpr (kByQuery) __builtin_prefetch(to + kRowsAhead * c.size[kRank - 1], 1, 2);
      auto x = splat<V>(convert<A>(value));
#if defined(__AVX512F__)
      if constexpr (std::is_same_v<A, float> && W == 16) {
        __mmask16 k = static_cast<__mmask16>(lane_bits(splat<Vector<int32_t, W>>(live)));
        __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(k, to), (__m512)x);
        return _mm512_mask_storeu_ps(to, k, sum);
      }
#endif
      if (all(live)) {
        V sum;
        __builtin_memcpy(&sum, to, sizeof(V));
        sum += x;
        __builtin_memcpy(to, &sum, sizeof(V));
        return;
      }
    }
  }
  scatter_run_lanes<W>(env, cap, grad, live, value, std::make_integer_sequence<int, kRank>(),
                       idx...);
}

}  // namespace ae
