// Decays of one number a token, within a chunk: sums of log-decays from its start, begun anew at
// every token that forgets all. So the differences of sums are finite, their exponents are not
// positive, and between which tokens everything was forgotten is known.
#pragma once
#include "linear/unit.cuh"

namespace ae {

template <class Plan>
struct ScalarDecay {
  float decay[kLinearChunk];  // sum of log2-decays since token `since`, without that one's own
  int since[kLinearChunk];    // the last token that forgot all, up to this one; -1: none

  // One warp: lane l has tokens 2 l and 2 l + 1.
  template <class Fn>
  __device__ __forceinline__ void fill(const Env& env, const ae_linear_params& p, int64_t b,
                                       int64_t h, int64_t first, int count) {
    const int lane = int(threadIdx.x) % 32;
    float g[2];
    int forgets[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int t = 2 * lane + i;
      g[i] = t < count ? log2_decay<Plan, Fn>(env, p, b, h, first + t, 0) : 0.0f;
      forgets[i] = g[i] < kForgets ? t : -1;
      if (forgets[i] >= 0) g[i] = 0;
    }
    float sum = forgets[1] >= 0 ? 0.0f : g[0] + g[1];
    int last = forgets[1] >= 0 ? forgets[1] : forgets[0];
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const float before = __shfl_up_sync(~0u, sum, step);
      const int forgot = __shfl_up_sync(~0u, last, step);
      if (lane < step) continue;
      if (last < 0) {
        sum += before;
        last = forgot;
      }
    }
    float before = __shfl_up_sync(~0u, sum, 1);
    int forgot = __shfl_up_sync(~0u, last, 1);
    if (lane == 0) before = 0, forgot = -1;
    const int token = 2 * lane;
    decay[token] = forgets[0] >= 0 ? 0.0f : before + g[0];
    since[token] = forgets[0] >= 0 ? forgets[0] : forgot;
    decay[token + 1] = sum;
    since[token + 1] = last;
  }

  // What is left at token t of what token `key` brought, which is not later.
  __device__ __forceinline__ float between(int key, int t) const {
    const float decays = decay[t] - decay[key];
    return key >= since[t] ? ex2(decays > 0 ? 0.0f : decays) : 0.0f;  // by a rounding; NaN stays
  }

  // What is left at token t of the state that the chunk starts from.
  __device__ __forceinline__ float since_start(int t) const {
    if constexpr (Plan::kDecay != DecayKind::kScalar) return 1;
    return since[t] < 0 ? ex2(decay[t]) : 0.0f;
  }
};

}  // namespace ae
