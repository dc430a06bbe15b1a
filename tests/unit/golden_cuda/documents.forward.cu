// attnengine forward kernel, cuda:sm_80, f16, D 24, Dv 17. Generated: do not edit.
// manifest: {"kind": "forward", "dtype": "f16", "head_dim": 24, "value_dim": 17, "capture_count": 2, "user_stats": 1, "stats": 1, "mask_captures": 1, "block_m": 64, "block_n": 32, "pack_group": true, "threads": 128, "shared_bytes": 15360, "key": "5dec0fec01eb9654a34fa1be7801cda80703c98cd066b42316a543e679272f28"}
#include "sm80/forward.cuh"
namespace {
struct Plan {
  using Elem = ae::f16;
  static constexpr int kD = 24, kDv = 17;
  static constexpr int kBlockM = 64, kBlockN = 32;
  static constexpr int kWarps = 4, kStages = 2;
  static constexpr int kSharedBytes = 15360;
  static constexpr bool kPackGroup = true;
  static constexpr bool kHoldQ = true;
  static constexpr int kColumnWarps = 1;
  static constexpr bool kSharedKV = false;
  static constexpr bool kSequences = false;
  static constexpr bool kScheduled = false;
  static constexpr int kSlotBytes = 0;
};
struct Fn {
  static constexpr int kCaptures = 2;
  static constexpr int kStates = 2;
  static constexpr int kUserStats = 1;
  static constexpr int kStats = 1;
  static constexpr bool kHasMerge = true;
  static constexpr bool kNeedsAlive = true;
  static constexpr bool kHasMask = true;
  static constexpr bool kMaskUsesB = true;
  static constexpr bool kMaskUsesH = false;
  static constexpr uint64_t kMaskCaptures = 1u;
  static constexpr bool kScoreCanDie = true;
  static AE_HD ae::Interval classify(const ae::IntervalEnv& env, ae::Interval b,
                                     ae::Interval h, ae::Interval q, ae::Interval k) {
    (void)env, (void)b, (void)h, (void)q, (void)k;
    const auto i4 = ae::iv::gather<int32_t>(env, 0, b, q);
    const auto i5 = ae::iv::gather<int32_t>(env, 0, b, k);
    const auto i6 = ae::iv::eq(i4, i5);
    return i6;
  }
  struct Row {
    int32_t f0;
    int32_t f1;
    int32_t f2;
    int32_t f3;
  };
  static __device__ Row make_row(const ae::Env& env, int b, int h, int q) {
    (void)env, (void)b, (void)h, (void)q;
    const auto v4 = ae::gather<int32_t>(env, 0, true, ae::nonnegative(int32_t(b)), ae::nonnegative(int32_t(q)));
    return Row{int32_t(b), int32_t(h), int32_t(q), v4};
  }
  static constexpr bool kHasQMod = false;
  static __device__ float q_mod(const ae::Env&, float x) { return x; }
  static constexpr bool kHasKMod = true;
  static __device__ float k_mod(const ae::Env& env, float x) {
    (void)env;
    const auto v57 = ae::mul(x, 0x1.0000000000000p-1f);
    return v57;
  }
  static constexpr bool kHasVMod = false;
  static __device__ float v_mod(const ae::Env&, float x) { return x; }
  static __device__ void init(const ae::Env& env, const Row& row, float* state) {
    (void)env, (void)row, (void)state;
    state[0] = -__builtin_inff();
    state[1] = 0x0.0p+0f;
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
      const float x = ae::mul(s[c], scale);
      const int32_t k = first + ae::column(c);
      bool live = true;
      if constexpr (kPartial) {
        live = ae::column(c) < count;
        const auto v5 = ae::gather<int32_t>(env, 0, live, ae::nonnegative(row.f0), ae::nonnegative(k));
        const auto v6 = ae::eq(row.f3, v5);
        live = ae::logical_and(live, v6);
      }
      const auto v8 = ae::sub(row.f2, k);
      const auto v10 = ae::maximum(v8, int32_t(0));
      const auto v12 = ae::minimum(v10, int32_t(31));
      const auto v13 = ae::gather<float>(env, 1, live, ae::nonnegative(row.f1), v12);
      const auto v14 = ae::add(x, v13);
      const auto v16 = ae::div(v14, 0x1.e000000000000p+4f);
      const auto v17 = ae::tanh(ae::mul(v14, 0x1.1111120000000p-5f));
      const auto v18 = ae::mul(v17, 0x1.e000000000000p+4f);
      float sm = v18;
      if constexpr (kPartial) sm = ae::select(live, sm, low);
      top = ae::max_or_other(top, sm);
      s[c] = sm;
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
    const auto v26 = ae::maximum(z0, best);
    float acc32 = 0x0.0p+0f;
#pragma unroll
    for (int c = 0; c < kCols; ++c) {
      const float sm = s[c];
      const auto v30 = ae::exp_minus(sm, v26);
      acc32 = ae::add(acc32, v30);
      s[c] = v30;
    }
    const auto r32 = ae::quad_sum(acc32);
    const auto v27 = ae::sub(z0, v26);
    const auto v28 = ae::exp(v27);
    const auto v31 = ae::mul(z1, v28);
    const auto v33 = ae::add(v31, r32);
    factor = v28;
    float n0 = v26;
    float n1 = v33;
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
    const auto v39 = ae::div(0x1.0000000000000p+0f, z1);
    out_factor = v39;
    if (stats == nullptr) return;
    const auto v35 = ae::log(z1);
    const auto v36 = ae::add(z0, v35);
    stats[0] = v36;
  }
  static __device__ void merge(const ae::Env& env, const Row& row, const float* a, const float* b,
                               float* merged, float& fa, float& fb) {
    (void)env, (void)row, (void)a, (void)b, (void)merged;
    const float a0 = a[0];
    const float a1 = a[1];
    const float b0 = b[0];
    const float b1 = b[1];
    const auto v47 = ae::maximum(a0, b0);
    merged[0] = v47;
    const auto v48 = ae::sub(a0, v47);
    const auto v49 = ae::exp(v48);
    const auto v52 = ae::mul(a1, v49);
    const auto v50 = ae::sub(b0, v47);
    const auto v51 = ae::exp(v50);
    const auto v53 = ae::mul(b1, v51);
    const auto v54 = ae::add(v52, v53);
    merged[1] = v54;
    fa = v49;
    fb = v51;
  }
};
}  // namespace
AE_EXPORT_FORWARD(Plan, Fn)
AE_EXPORT_TABLES(Plan, Fn)
