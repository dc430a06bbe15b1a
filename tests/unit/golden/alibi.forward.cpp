// attnengine forward kernel, cpu:avx512, f32, D 64, Dv 64. Generated: do not edit.
#include "cpu/forward.h"
#include "cpu/capture.h"
#include "cpu/math.h"
namespace {
struct Plan {
  using Elem = float;
  using Acc = float;
  static constexpr int kD = 64, kDv = 64;
  static constexpr int kBlockM = 48, kBlockN = 256;
  static constexpr int kVirtualWorkers = 32;
  static constexpr bool kPackGroup = true;
  static constexpr bool kSplitKV = true;
  static constexpr bool kBf16Dot = false;
  static constexpr int64_t kScratchBytes = 204800;
  static constexpr const char* kKey = "79d40a88496019550dec36f57c355cc4f193bf4b3d4efde1dc8652ccbe110837";
};
struct Fn {
  using A = Plan::Acc;
  using L = ae::Lanes<A>;
  using V = L::Acc;
  static constexpr int kCaptures = 1;
  static constexpr int kStates = 2;
  static constexpr int kUserStats = 1;
  static constexpr int kStats = 1;
  static constexpr bool kHasMerge = true;
  static constexpr bool kHasMask = true;
  static constexpr bool kMaskUsesB = false;
  static constexpr bool kMaskUsesH = false;
  static constexpr uint64_t kMaskCaptures = 0u;
  static constexpr bool kScoreCanDie = true;
  static ae::Interval classify(const ae::IntervalEnv& env, ae::Interval b,
                               ae::Interval h, ae::Interval q, ae::Interval k) {
    (void)env, (void)b, (void)h, (void)q, (void)k;
    const auto i4 = ae::iv::ge(q, k);
    return i4;
  }
  struct Row {
    int32_t f0;
    float f1;
  };
  static Row make_row(const ae::Env& env, int64_t b, int64_t h, int64_t q) {
    (void)env, (void)b, (void)h, (void)q;
    const auto v6 = ae::gather<float>(env, 0, true, int32_t(h));
    return Row{int32_t(q), v6};
  }
  static constexpr bool kHasQMod = false;
  static V q_mod(const ae::Env&, V x) { return x; }
  static constexpr bool kHasKMod = false;
  static V k_mod(const ae::Env&, V x) { return x; }
  static constexpr bool kHasVMod = false;
  static V v_mod(const ae::Env&, V x) { return x; }
  static void init(const ae::Env& env, const Row& row, A* state) {
    (void)env, (void)row, (void)state;
    state[0] = -__builtin_inff();
    state[1] = 0x0.0p+0f;
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
      const V x = ae::mul(ae::load_vector<V>(s + j), scale);
      const L::I32 k = ae::add(ae::iota<L::I32>(), int32_t(kv0 + j));
      L::Mask live = ~L::Mask{};
      if constexpr (kPartial) {
        live = ae::lt(ae::iota<L::I32>(), int32_t(ncols - j));
        if (!mask_full) {
          const auto v4 = ae::ge(row.f0, k);
          live = ae::logical_and(live, v4);
        }
      }
      const auto v7 = ae::sub(k, row.f0);
      const auto v8 = ae::to_f32(v7);
      const auto v9 = ae::mul(row.f1, v8);
      const auto v10 = ae::add(x, v9);
      V sm = ae::splat<V>(v10);
      if constexpr (kPartial) sm = ae::select(live, sm, low);
      top = ae::max_or_second(top, sm);
      ae::store_vector(s + j, sm);
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
    const auto v18 = ae::maximum(z0, best);
    L::F32 acc24 = ae::splat<L::F32>(0x0.0p+0f);
    for (int j = 0; j < end; j += L::W) {
      const V sm = ae::load_vector<V>(s + j);
      const auto v21 = ae::sub(sm, v18);
      const auto v22 = ae::exp(v21);
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
    const auto v27 = ae::log(z1);
    const auto v28 = ae::add(z0, v27);
    stats[0] = v28;
  }
  static void merge(const ae::Env& env, const Row& row, const A* a, const A* b,
                    A* merged, A& fa, A& fb) {
    (void)env, (void)row, (void)a, (void)b, (void)merged;
    const A a0 = a[0];
    const A a1 = a[1];
    const A b0 = b[0];
    const A b1 = b[1];
    const auto v39 = ae::maximum(a0, b0);
    merged[0] = v39;
    const auto v40 = ae::sub(a0, v39);
    const auto v41 = ae::exp(v40);
    const auto v44 = ae::mul(a1, v41);
    const auto v42 = ae::sub(b0, v39);
    const auto v43 = ae::exp(v42);
    const auto v45 = ae::mul(b1, v43);
    const auto v46 = ae::add(v44, v45);
    merged[1] = v46;
    fa = v41;
    fb = v43;
  }
};
}  // namespace
AE_EXPORT_FORWARD(Plan, Fn)
