// attnengine backward kernel, cpu:avx2, f64, D 24, Dv 17. Generated: do not edit.
#include "cpu/backward.h"
#include "cpu/capture.h"
#include "cpu/math.h"
namespace {
struct Plan {
  using Elem = double;
  using Acc = double;
  static constexpr int kD = 24, kDv = 17;
  static constexpr int kBlockM = 48, kBlockN = 256;
  static constexpr int kVirtualWorkers = 32;
  static constexpr bool kPackGroup = true;
  static constexpr bool kSplitKV = false;
  static constexpr bool kBf16Dot = false;
  static constexpr int64_t kScratchBytes = 196608;
  static constexpr const char* kKey = "5dffe8e3455c3bf17dc6e411d65a7f99608588837b3cf13e4a304e12d87d0131";
};
struct Fn {
  using A = Plan::Acc;
  using L = ae::Lanes<A>;
  using V = L::Acc;
  static constexpr int kCaptures = 2;
  static constexpr int kUserStats = 1;
  static constexpr int kStats = 1;
  static constexpr int kRowScalars = 3;
  static constexpr int kPasses = 0;
  static constexpr int kPassAccs[] = {0};
  static constexpr bool kPassNeedsDP[] = {false};
  static constexpr bool kNeedsDelta = true;
  static constexpr uint64_t kGradMask = 0u;
  static constexpr ae::GradInfo kGradInfo[] = {{false, false, false, false, false}, {false, false, false, false, false}};
  static constexpr bool kHasRowGrads = false;
  static constexpr bool kHasMask = true;
  static constexpr bool kMaskUsesB = true;
  static constexpr bool kMaskUsesH = false;
  static constexpr uint64_t kMaskCaptures = 1u;
  static constexpr bool kScoreCanDie = true;
  static ae::Interval classify(const ae::IntervalEnv& env, ae::Interval b,
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
    int64_t t0;  // where this row's key 0 stands in table 0
  };
  static Row make_row(const ae::Env& env, int64_t b, int64_t h, int64_t q) {
    (void)env, (void)b, (void)h, (void)q;
    const auto v4 = ae::gather<int32_t>(env, 0, true, int32_t(b), int32_t(q));
    return Row{int32_t(b), v4, env.tables[0].row(b, h, q)};
  }
  static constexpr bool kHasQMod = false;
  static V q_mod(const ae::Env&, V x) { return x; }
  static constexpr bool kHasKMod = true;
  static V k_mod(const ae::Env& env, V x) {
    (void)env;
    const auto v58 = ae::mul(x, 0x1.0000000000000p-1);
    return ae::splat<V>(v58);
  }
  static constexpr bool kHasVMod = false;
  static V v_mod(const ae::Env&, V x) { return x; }
  static constexpr int kDiagonals = 1;
  static constexpr ae::DiagonalInfo kDiagonalInfo[] = {{8, false, true, true}};
  template <int T>
  static void diagonal(const ae::Env& env, int64_t b, int64_t h, int64_t q,
                       int64_t kv0, L::Mask live, void* out) {
    (void)env, (void)b, (void)h, (void)q, (void)live;
    const L::I32 k = ae::add(ae::iota<L::I32>(), int32_t(kv0));
    if constexpr (T == 0) {
      const auto v8 = ae::sub(int32_t(q), k);
      const auto v10 = ae::maximum(v8, int32_t(0));
      const auto v12 = ae::minimum(v10, int32_t(31));
      const auto v13 = ae::gather<float>(env, 1, live, int32_t(h), v12);
      const auto v14 = ae::to_f64(v13);
      ae::store_vector(out, ae::splat<L::F64>(v14));
    }
  }
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
    const auto v73 = ae::neg(r0);
    const auto v74 = ae::add(r1, v73);
    for (int j = 0; j < end; j += L::W) {
      const V x = ae::mul(ae::load_vector<V>(s + j), scale);
      const L::I32 k = ae::add(ae::iota<L::I32>(), int32_t(kv0 + j));
      L::Mask live = ~L::Mask{};
      if constexpr (kPartial) {
        live = ae::lt(ae::iota<L::I32>(), int32_t(ncols - j));
        if (!mask_full) {
          const auto v5 = ae::gather_run<int32_t>(env, 0, live, row.f0, (kv0 + j));
          const auto v6 = ae::eq(row.f1, v5);
          live = ae::logical_and(live, v6);
        }
      }
      const auto t0 = ae::diagonal_run<L::F64>(env, 0, live, row.t0 + (kv0 + j));
      const auto v15 = ae::add(x, t0);
      const auto v17 = ae::div(v15, 0x1.e000000000000p+4);
      const auto v18 = ae::tanh(v17);
      const auto v19 = ae::mul(v18, 0x1.e000000000000p+4);
      V sm = ae::splat<V>(v19);
      if constexpr (kPartial) sm = ae::select(live, sm, low);
      const L::Mask alive = ae::ne(sm, low);
      const V dpv = ae::load_vector<V>(dp + j);
      const auto v42 = ae::sub(sm, r2);
      const auto v43 = ae::exp(v42);
      ae::store_vector(s + j, ae::select(alive, ae::splat<V>(v43), V{}));
      const auto v70 = ae::mul(dpv, v43);
      const auto v75 = ae::mul(v74, v43);
      const auto v76 = ae::add(v70, v75);
      const auto v77 = ae::mul(v76, 0x1.e000000000000p+4);
      const auto v78 = ae::mul(v18, v18);
      const auto v79 = ae::sub(0x1.0000000000000p+0, v78);
      const auto v80 = ae::mul(v77, v79);
      const auto v81 = ae::div(v80, 0x1.e000000000000p+4);
      const V ds = ae::mul(ae::splat<V>(v81), scale);
      ae::store_vector(dp + j, ae::select(alive, ds, V{}));
    }
  }
  static V q_mod_vjp(const ae::Env&, V, V g, L::Mask, A* const*) { return g; }
  static V k_mod_vjp(const ae::Env& env, V x, V g, L::Mask live,
                       A* const* grads) {
    (void)env, (void)x, (void)g, (void)live, (void)grads;
    const auto v83 = ae::mul(g, 0x1.0000000000000p-1);
    return ae::splat<V>(v83);
  }
  static V v_mod_vjp(const ae::Env&, V, V g, L::Mask, A* const*) { return g; }
};
}  // namespace
AE_EXPORT_BACKWARD(Plan, Fn)
