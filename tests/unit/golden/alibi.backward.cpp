// attnengine backward kernel, cpu:avx512, f32, D 64, Dv 64. Generated: do not edit.
#include "cpu/backward.h"
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
  static constexpr bool kSplitKV = false;
  static constexpr bool kBf16Dot = false;
  static constexpr int64_t kScratchBytes = 98304;
  static constexpr const char* kKey = "7b17ef7db76d2f1a7ef1d131f43ba382b0f5d8430a20d738123e3e2625c3ee2e";
};
struct Fn {
  using A = Plan::Acc;
  using L = ae::Lanes<A>;
  using V = L::Acc;
  static constexpr int kCaptures = 1;
  static constexpr int kUserStats = 1;
  static constexpr int kStats = 1;
  static constexpr int kRowScalars = 3;
  static constexpr int kPasses = 0;
  static constexpr int kPassAccs[] = {0};
  static constexpr bool kPassNeedsDP[] = {false};
  static constexpr bool kNeedsDelta = true;
  static constexpr uint64_t kGradMask = 1u;
  static constexpr ae::GradInfo kGradInfo[] = {{true, false, true, false, false}};
  static constexpr bool kHasRowGrads = false;
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
    int32_t f1;
    float f2;
  };
  static Row make_row(const ae::Env& env, int64_t b, int64_t h, int64_t q) {
    (void)env, (void)b, (void)h, (void)q;
    const auto v6 = ae::gather<float>(env, 0, true, int32_t(h));
    return Row{int32_t(h), int32_t(q), v6};
  }
  static constexpr bool kHasQMod = false;
  static V q_mod(const ae::Env&, V x) { return x; }
  static constexpr bool kHasKMod = false;
  static V k_mod(const ae::Env&, V x) { return x; }
  static constexpr bool kHasVMod = false;
  static V v_mod(const ae::Env&, V x) { return x; }
  static void begin(const ae::Env& env, const Row& row, const A* stats, const A* dstats,
                    A delta, A* r) {
    (void)env, (void)row, (void)stats, (void)dstats, (void)delta, (void)r;
    r[0] = delta;
    r[1] = dstats[0];
    r[2] = stats[0];
  }
  template <int P>
  static void begin_pass(A* acc) {
    (void)acc;
  }
  template <int P>
  static void end_pass(const ae::Env& env, const Row& row, const A* acc, A* r) {
    (void)env, (void)row, (void)acc, (void)r;
  }
  template <int P, bool kPartial>
  static void pass_row(const ae::Env& env, const Row& row, A scale, A* s, const A* dp,
                       const A* r, A* acc, int64_t kv0, int ncols, bool mask_full) {
    (void)env, (void)row, (void)scale, (void)s, (void)dp, (void)r, (void)acc;
    (void)kv0, (void)ncols, (void)mask_full;
    const V low = ae::splat<V>(-A(__builtin_inf()));
    (void)low;
  }
  static void row_grads(const ae::Env& env, const Row& row, const A* r,
                        A* const* grads) {
    (void)env, (void)row, (void)r, (void)grads;
  }
  template <bool kPartial>
  static void tile_row(const ae::Env& env, const Row& row, A scale, const A* r, A* s,
                       A* dp,
                       A* const* grads, int64_t kv0, int ncols, bool mask_full) {
    (void)env, (void)row, (void)r, (void)grads, (void)kv0, (void)ncols, (void)mask_full;
    const V low = ae::splat<V>(-A(__builtin_inf()));
    const A r0 = r[0];
    const A r1 = r[1];
    const A r2 = r[2];
    const int end = kPartial ? int(ae::round_up(ncols, L::W)) : ncols;
    const auto v61 = ae::neg(r0);
    const auto v62 = ae::add(r1, v61);
    for (int j = 0; j < end; j += L::W) {
      const V x = ae::mul(ae::load_vector<V>(s + j), scale);
      const L::I32 k = ae::add(ae::iota<L::I32>(), int32_t(kv0 + j));
      L::Mask live = ~L::Mask{};
      if constexpr (kPartial) {
        live = ae::lt(ae::iota<L::I32>(), int32_t(ncols - j));
        if (!mask_full) {
          const auto v4 = ae::ge(row.f1, k);
          live = ae::logical_and(live, v4);
        }
      }
      const auto v7 = ae::sub(k, row.f1);
      const auto v8 = ae::to_f32(v7);
      const auto v9 = ae::mul(row.f2, v8);
      const auto v10 = ae::add(x, v9);
      V sm = ae::splat<V>(v10);
      if constexpr (kPartial) sm = ae::select(live, sm, low);
      const L::Mask alive = ae::ne(sm, low);
      const V dpv = ae::load_vector<V>(dp + j);
      const auto v33 = ae::sub(sm, r2);
      const auto v34 = ae::exp(v33);
      ae::store_vector(s + j, ae::select(alive, ae::splat<V>(v34), V{}));
      const auto v58 = ae::mul(dpv, v34);
      const auto v63 = ae::mul(v62, v34);
      const auto v64 = ae::add(v58, v63);
      const V ds = ae::mul(ae::splat<V>(v64), scale);
      ae::store_vector(dp + j, ae::select(alive, ds, V{}));
      const auto v65 = ae::mul(v64, v8);
      ae::scatter_add<A>(env, 0, grads[0], alive, ae::splat<V>(v65), row.f0);
    }
  }
  static V q_mod_vjp(const ae::Env&, V, V g, L::Mask, A* const*) { return g; }
  static V k_mod_vjp(const ae::Env&, V, V g, L::Mask, A* const*) { return g; }
  static V v_mod_vjp(const ae::Env&, V, V g, L::Mask, A* const*) { return g; }
};
}  // namespace
AE_EXPORT_BACKWARD(Plan, Fn)
