// attnengine forward kernel, cpu:avx512_bf16, bf16, D 64, Dv 128. Generated: do not edit.
#include "cpu/forward.h"
#include "cpu/capture.h"
#include "cpu/math.h"
namespace {
struct Plan {
  using Elem = ae::bf16;
  using Acc = float;
  static constexpr int kD = 64, kDv = 128;
  static constexpr int kBlockM = 48, kBlockN = 256;
  static constexpr int kVirtualWorkers = 32;
  static constexpr bool kPackGroup = true;
  static constexpr bool kSplitKV = false;
  static constexpr bool kBf16Dot = true;
  static constexpr int64_t kScratchBytes = 202752;
  static constexpr const char* kKey = "52dacaea0064f6f0270069b261bfac96d50dea13f94840c12a32812160d9da51";
};
struct Fn {
  using A = Plan::Acc;
  using L = ae::Lanes<A>;
  using V = L::Acc;
  static constexpr int kCaptures = 1;
  static constexpr int kStates = 2;
  static constexpr int kUserStats = 1;
  static constexpr int kStats = 3;
  static constexpr bool kHasMerge = false;
  static constexpr bool kHasMask = true;
  static constexpr bool kMaskUsesB = false;
  static constexpr bool kMaskUsesH = false;
  static constexpr uint64_t kMaskCaptures = 0u;
  static constexpr bool kScoreCanDie = false;
  static ae::Interval classify(const ae::IntervalEnv& env, ae::Interval b,
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
  static Row make_row(const ae::Env& env, int64_t b, int64_t h, int64_t q) {
    (void)env, (void)b, (void)h, (void)q;
    const auto v9 = ae::gather<float>(env, 0, true, int32_t(h));
    const auto v11 = ae::sub(v9, v9);
    const auto v12 = ae::exp(v11);
    return Row{int32_t(q), v9, v12};
  }
  static constexpr bool kHasQMod = false;
  static V q_mod(const ae::Env&, V x) { return x; }
  static constexpr bool kHasKMod = false;
  static V k_mod(const ae::Env&, V x) { return x; }
  static constexpr bool kHasVMod = false;
  static V v_mod(const ae::Env&, V x) { return x; }
  static void init(const ae::Env& env, const Row& row, A* state) {
    (void)env, (void)row, (void)state;
    state[0] = row.f1;
    state[1] = row.f2;
  }
  template <bool kPartial>
  static bool tile_row(const ae::Env& env, const Row& row, A scale, A* s,
                       ae::Multiply<Plan>* w, A* state, A& factor, int64_t kv0,
                       int ncols, bool mask_full) {
    (void)env, (void)row, (void)kv0, (void)ncols, (void)mask_full;
    const V low = ae::splat<V>(-A(__builtin_inf()));
    const int end = kPartial ? int(ae::round_up(ncols, L::W)) : ncols;
    const A z0 = state[0];
    const A z1 = state[1];
    V top = low;
    for (int j = 0; j < end; j += L::W) {
      V sm = ae::load_vector<V>(s + j);
      const L::I32 k = ae::add(ae::iota<L::I32>(), int32_t(kv0 + j));
      L::Mask live = ~L::Mask{};
      if constexpr (kPartial) {
        live = ae::lt(ae::iota<L::I32>(), int32_t(ncols - j));
        if (!mask_full) {
          const auto v4 = ae::ge(row.f0, k);
          const auto v5 = ae::sub(row.f0, k);
          const auto v7 = ae::lt(v5, int32_t(128));
          const auto v8 = ae::logical_and(v4, v7);
          live = ae::logical_and(live, v8);
        }
      }
      if constexpr (kPartial) sm = ae::select(live, sm, low);
      top = ae::max_or_second(top, sm);
      if constexpr (kPartial) ae::store_vector(s + j, sm);
    }
    A best = ae::hmax(top);
    if (best == -A(__builtin_inf())) {
      if (!ae::any_nan<V>(s, end)) {
        ae::store_zeros<V>(w, end);
        factor = 1;
        return false;
      }
      best = A(__builtin_nan(""));
    }
    const A largest = best * scale;
    const auto v18 = ae::maximum(z0, largest);
    L::F32 acc24 = ae::splat<L::F32>(0x0.0p+0f);
    for (int j = 0; j < end; j += L::W) {
      const V sm = ae::load_vector<V>(s + j);
      const auto v22 = ae::exp_scaled_minus(sm, scale, (v18));
      acc24 = ae::add(acc24, ae::splat<L::F32>(v22));
      ae::store_multiply(w + j, ae::splat<V>(v22));
    }
    const auto r24 = ae::hsum(acc24);
    const auto v19 = ae::sub(z0, v18);
    const auto v20 = ae::exp(v19);
    const auto v23 = ae::mul(z1, v20);
    const auto v25 = ae::add(v23, r24);
    factor = v20;
    state[0] = v18;
    state[1] = v25;
    return true;
  }
  static void finalize(const ae::Env& env, const Row& row, const A* state,
                       A& out_factor, A* stats) {
    (void)env, (void)row, (void)state, (void)stats;
    const A z0 = state[0];
    const A z1 = state[1];
    const auto v31 = ae::div(0x1.0000000000000p+0f, z1);
    out_factor = v31;
    if (stats == nullptr) return;
    const auto v28 = ae::log(z1);
    const auto v29 = ae::add(z0, v28);
    stats[0] = v29;
    stats[1] = z0;
    stats[2] = z1;
  }
};
}  // namespace
AE_EXPORT_FORWARD(Plan, Fn)
