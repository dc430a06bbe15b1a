// States of linear attention in memory: between [kD][columns] and a task's panels.
#pragma once
#include "cpu/linear_forward_work.h"
#include "cpu/linear_operand.h"

namespace ae {

// Stored past the caches where the machine can and p is aligned.
template <class V>
AE_INLINE void stream_vector(void* p, V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return _mm512_stream_ps((float*)p, (__m512)v);
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) return _mm256_stream_ps((float*)p, (__m256)v);
#endif
#if defined(__SSE4_1__)
  if constexpr (sizeof(V) == 16) return _mm_stream_ps((float*)p, (__m128)v);
#endif
  store_vector(p, v);
}
inline void stream_end() {
#if defined(__SSE4_1__)
  _mm_sfence();
#endif
}

// Whether final states go past the caches: they would not stay there, and rows are whole vectors.
template <class Plan>
bool streams_states(const ae_linear_params& p) {
  constexpr int64_t kLarge = 16 << 20;  // bytes of a launch
  constexpr int64_t kRow = LinearTypes<Plan>::kStateColumns * int64_t(sizeof(typename Plan::Acc));
  return p.final_state != nullptr && p.sequences * p.H * Plan::kD * kRow >= kLarge &&
         (int64_t)p.final_state % kRegisterBytes == 0 && kRow % kRegisterBytes == 0;
}

// The panels of a head, [panels][kD][kPanel], from its state (null: zeros). Row after row, in the
// order of the memory.
template <class Plan>
__attribute__((noinline)) void load_panels(const typename Plan::Acc* from, int64_t pitch, int panel,
                                           int panels, typename Plan::Acc* to) {
  using T = LinearTypes<Plan>;
  using Acc = typename T::Acc;
  constexpr int N = T::kPanel, W = T::W;
  if (from == nullptr) {
    __builtin_memset(to, 0, sizeof(Acc) * uint64_t(panels) * T::kPanelState);
    return;
  }
  for (int d = 0; d < T::kD; ++d, from += pitch) {
    for (int n = 0; n < panels; ++n) {
      const int width = T::panel_width(panel + n);
      const Acc* row = from + (panel + n) * N;
      Acc* out = to + n * T::kPanelState + d * N;
      for (int j = 0; j < N; j += W) {
        __builtin_prefetch(row + 8 * pitch + j);
        const int count = width - j < W ? (width - j < 0 ? 0 : width - j) : W;
        store_vector(out + j, load_lanes<Acc>(row + j, 1, count));
      }
    }
  }
}

// And back, to a contiguous state.
template <class Plan>
__attribute__((noinline)) void store_panels(const typename Plan::Acc* from, int panel, int panels,
                                            bool stream, typename Plan::Acc* to) {
  using T = LinearTypes<Plan>;
  using Acc = typename T::Acc;
  using V = typename T::V;
  constexpr int N = T::kPanel, W = T::W;
  for (int d = 0; d < T::kD; ++d, to += T::kStateColumns) {
    for (int n = 0; n < panels; ++n) {
      const int width = T::panel_width(panel + n);
      const Acc* row = from + n * T::kPanelState + d * N;
      Acc* out = to + (panel + n) * N;
      if (stream) {
        for (int j = 0; j < width; j += W) stream_vector(out + j, load_vector<V>(row + j));
      } else {
        __builtin_memcpy(out, row, sizeof(Acc) * uint64_t(width));
      }
    }
  }
}

}  // namespace ae
