// attnengine backward kernel, cpu:avx512_bf16, bf16, D 64, Dv 128. Generated: do not edit.
#include "cpu/backward.h"
#include "cpu/capture.h"
#include "cpu/math.h"
namespace {
struct Plan {
  using Elem = ae::bf16;
  using Acc = float;
  static constexpr int kD = 64, kDv = 128;
  static constexpr int kBlockM = 96, kBlockN = 128;
  static constexpr int kVirtualWorkers = 32;
  static constexpr bool kPackGroup = true;
  static constexpr bool kSplitKV = false;
  static constexpr bool kBf16Dot = true;
  static constexpr int64_t kScratchBytes = 172032;
  static constexpr const char* kKey = "28484ee626eb372cadaa8b4a9d9fe261f56ec0a40d42d700e5e422a95b9534ea";
};
struct Fn {
  using A = Plan::Acc;
  using L = ae::Lanes<A>;
  using V = L::Acc;
  static constexpr int kCaptures = 1;
  static constexpr int kUserStats = 1;
  static constexpr int kStats = 3;
  static constexpr int kRowScalars = 5;
  static constexpr int kPasses = 0;
  static constexpr int kPassAccs[] = {0};
  static constexpr bool kPassNeedsDP[] = {false};
  static constexpr bool kNeedsDelta = true;
  static constexpr uint64_t kGradMask = 1u;
  static constexpr ae::GradInfo kGradInfo[] = {{true, false, true, false, false}};
  static constexpr bool kHasRowGrads = true;
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
    int32_t f1;
    float f2;
    float f3;
  };
  static Row make_row(const ae::Env& env, int64_t b, int64_t h, int64_t q) {
    (void)env, (void)b, (void)h, (void)q;
    const auto v9 = ae::gather<float>(env, 0, true, int32_t(h));
    const auto v55 = ae::sub(v9, v9);
    const auto v56 = ae::exp(v55);
    return Row{int32_t(h), int32_t(q), v9, v56};
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
    r[2] = stats[1];
    r[3] = stats[2];
    r[4] = stats[0];
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
    const A r0 = r[0];
    const A r1 = r[1];
    const A r2 = r[2];
    const A r3 = r[3];
    const auto v49 = ae::neg(r0);
    const auto v50 = ae::add(r1, v49);
    const auto v74 = ae::div(v50, r3);
    const auto v75 = ae::add(0x0.0p+0f, v74);
    const auto v72 = ae::sub(row.f2, r2);
    const auto v73 = ae::exp(v72);
    const auto v76 = ae::mul(v75, v73);
    const auto v77 = ae::mul(v76, row.f3);
    ae::scatter_add<A>(env, 0, grads[0], true, v77, row.f0);
  }
  template <bool kPartial>
  static void tile_row(const ae::Env& env, const Row& row, A scale, const A* r, A* s,
                       A* dp,
                       A* const* grads, int64_t kv0, int ncols, bool mask_full) {
    (void)env, (void)row, (void)r, (void)grads, (void)kv0, (void)ncols, (void)mask_full;
    const V low = ae::splat<V>(-A(__builtin_inf()));
    const A r0 = r[0];
    const A r1 = r[1];
    const A r4 = r[4];
    const int end = kPartial ? int(ae::round_up(ncols, L::W)) : ncols;
    const auto v49 = ae::neg(r0);
    const auto v50 = ae::add(r1, v49);
    for (int j = 0; j < end; j += L::W) {
      V sm = ae::load_vector<V>(s + j);
      const L::I32 k = ae::add(ae::iota<L::I32>(), int32_t(kv0 + j));
      L::Mask live = ~L::Mask{};
      if constexpr (kPartial) {
        live = ae::lt(ae::iota<L::I32>(), int32_t(ncols - j));
        if (!mask_full) {
          const auto v4 = ae::ge(row.f1, k);
          const auto v5 = ae::sub(row.f1, k);
          const auto v7 = ae::lt(v5, int32_t(128));
          const auto v8 = ae::logical_and(v4, v7);
          live = ae::logical_and(live, v8);
        }
      }
      if constexpr (kPartial) sm = ae::select(live, sm, low);
      const L::Mask alive = ae::ne(sm, low);
      const V dpv = ae::load_vector<V>(dp + j);
      const auto v34 = ae::exp_scaled_minus(sm, scale, (r4));
      ae::store_vector(s + j, ae::select(alive, ae::splat<V>(v34), V{}));
      const auto v46 = ae::mul(dpv, v34);
      const auto v51 = ae::mul(v50, v34);
      const auto v52 = ae::add(v46, v51);
      const V ds = ae::mul(ae::splat<V>(v52), scale);
      ae::store_vector(dp + j, ae::select(alive, ds, V{}));
    }
  }
  static V q_mod_vjp(const ae::Env&, V, V g, L::Mask, A* const*) { return g; }
  static V k_mod_vjp(const ae::Env&, V, V g, L::Mask, A* const*) { return g; }
  static V v_mod_vjp(const ae::Env&, V, V g, L::Mask, A* const*) { return g; }
};
}  // namespace
AE_EXPORT_BACKWARD(Plan, Fn)
