// attnengine forward kernel, cuda:sm_80, bf16, D 64, Dv 128. Generated: do not edit.
// manifest: {"kind": "forward", "dtype": "bf16", "head_dim": 64, "value_dim": 128, "capture_count": 1, "user_stats": 1, "stats": 1, "mask_captures": 0, "block_m": 128, "block_n": 32, "pack_group": true, "threads": 128, "shared_bytes": 40960, "key": "1633cfa7f44b376581839b0e9fdc682e220eba8969a0553943a3500419053314"}
#include "sm80/forward.cuh"
namespace {
struct Plan {
  using Elem = ae::bf16;
  static constexpr int kD = 64, kDv = 128;
  static constexpr int kBlockM = 128, kBlockN = 32;
  static constexpr int kWarps = 4, kStages = 2;
  static constexpr int kSharedBytes = 40960;
  static constexpr bool kPackGroup = true;
  static constexpr bool kHoldQ = false;
  static constexpr int kColumnWarps = 1;
  static constexpr bool kSharedKV = false;
  static constexpr bool kSequences = false;
  static constexpr bool kScheduled = false;
  static constexpr int kSlotBytes = 0;
};
struct Fn {
  static constexpr int kCaptures = 1;
  static constexpr int kStates = 2;
  static constexpr int kUserStats = 1;
  static constexpr int kStats = 1;
  static constexpr bool kHasMerge = false;
  static constexpr bool kNeedsAlive = true;
  static constexpr bool kHasMask = true;
  static constexpr bool kMaskUsesB = false;
  static constexpr bool kMaskUsesH = false;
  static constexpr uint64_t kMaskCaptures = 0u;
  static constexpr bool kScoreCanDie = false;
  static AE_HD ae::Interval classify(const ae::IntervalEnv& env, ae::Interval b,
                                     ae::Interval h, ae::Interval q, ae::Interval k) {
    (void)env, (void)b, (void)h, (void)q, (void)k;
    const auto i4 = ae::iv::ge(q, k);
    const auto i5 = ae::iv::sub(q, k);
    const auto i7 = ae::iv::lt(i5, ae::iv::constant(0x1.0000000000000p+7));
    const auto i8 = ae::iv::logical_and(i4, i7);
    return i8;
  }
  struct Row {
    int32_t f0;
    float f1;
    float f2;
  };
  static __device__ Row make_row(const ae::Env& env, int b, int h, int q) {
    (void)env, (void)b, (void)h, (void)q;
    const auto v9 = ae::gather<float>(env, 0, true, ae::nonnegative(int32_t(h)));
    const auto v11 = ae::sub(v9, v9);
    const auto v12 = ae::exp(v11);
    return Row{int32_t(q), v9, v12};
  }
  static constexpr bool kHasQMod = false;
  static __device__ float q_mod(const ae::Env&, float x) { return x; }
  static constexpr bool kHasKMod = false;
  static __device__ float k_mod(const ae::Env&, float x) { return x; }
  static constexpr bool kHasVMod = false;
  static __device__ float v_mod(const ae::Env&, float x) { return x; }
  static __device__ void init(const ae::Env& env, const Row& row, float* state) {
    (void)env, (void)row, (void)state;
    state[0] = row.f1;
    state[1] = row.f2;
  }
  template <bool kPartial, int kCols>
  static __device__ __forceinline__ bool tile_row(const ae::Env& env, const Row& row, float scale,
                                                  float (&s)[kCols], float* state, float& factor,
                                                  int kv0, int ncols, bool mask_full, int lane) {
    (void)env, (void)row, (void)scale, (void)state, (void)mask_full;
    const float low = -__builtin_inff();
    const int first = kv0 + ae::first_column(lane), count = ncols - ae::first_column(lane);
    (void)low, (void)first, (void)count;
    const float z0 = state[0];
    const float z1 = state[1];
    float top = low;
#pragma unroll
    for (int c = 0; c < kCols; ++c) {
      float sm = s[c];
      const int32_t k = first + ae::column(c);
      bool live = true;
      if constexpr (kPartial) {
        live = ae::column(c) < count;
        const auto v4 = ae::ge(row.f0, k);
        const auto v5 = ae::sub(row.f0, k);
        const auto v7 = ae::lt(v5, int32_t(128));
        const auto v8 = ae::logical_and(v4, v7);
        live = ae::logical_and(live, v8);
      }
      if constexpr (kPartial) sm = ae::select(live, sm, low);
      top = ae::max_or_other(top, sm);
      if constexpr (kPartial) s[c] = sm;
    }
    float best = ae::quad_max(top);
    bool alive = best != low;
    const bool some_dead = ae::any_row(!alive);
    if (some_dead) {
      bool bad = false;
#pragma unroll
      for (int c = 0; c < kCols; ++c) {
        bad |= ae::isnan(s[c]);
      }
      bad = !alive & ae::quad_any(bad);
      alive |= bad;
      best = ae::select(bad, __builtin_nanf(""), best);
    }
    const float largest = best * scale;
    const auto v18 = ae::maximum(z0, largest);
    float acc24 = 0x0.0p+0f;
#pragma unroll
    for (int c = 0; c < kCols; ++c) {
      const float sm = s[c];
      const auto v22 = ae::exp_scaled_minus(sm, scale, (v18));
      acc24 = ae::add(acc24, v22);
      s[c] = v22;
    }
    const auto r24 = ae::quad_sum(acc24);
    const auto v19 = ae::sub(z0, v18);
    const auto v20 = ae::exp(v19);
    const auto v23 = ae::mul(z1, v20);
    const auto v25 = ae::add(v23, r24);
    factor = v20;
    float n0 = v18;
    float n1 = v25;
    if (some_dead) {
      factor = ae::select(alive, factor, 1.0f);
      n0 = ae::select(alive, n0, z0);
      n1 = ae::select(alive, n1, z1);
#pragma unroll
      for (int c = 0; c < kCols; ++c) {
        s[c] = ae::select(alive, s[c], 0.0f);
      }
    }
    state[0] = n0;
    state[1] = n1;
    return alive;
  }
  static __device__ void finalize(const ae::Env& env, const Row& row, const float* state,
                                  float& out_factor, float* stats) {
    (void)env, (void)row, (void)state, (void)stats;
    const float z0 = state[0];
    const float z1 = state[1];
    const auto v31 = ae::div(0x1.0000000000000p+0f, z1);
    out_factor = v31;
    if (stats == nullptr) return;
    const auto v28 = ae::log(z1);
    const auto v29 = ae::add(z0, v28);
    stats[0] = v29;
  }
};
}  // namespace
AE_EXPORT_FORWARD(Plan, Fn)
