// attnengine forward kernel, cpu:avx2, f64, D 24, Dv 17. Generated: do not edit.
#include "cpu/forward.h"
#include "cpu/capture.h"
#include "cpu/math.h"
namespace {
struct Plan {
  using Elem = double;
  using Acc = double;
  static constexpr int kD = 24, kDv = 17;
  static constexpr int kBlockM = 24, kBlockN = 256;
  static constexpr int kVirtualWorkers = 32;
  static constexpr bool kPackGroup = true;
  static constexpr bool kSplitKV = true;
  static constexpr bool kBf16Dot = false;
  static constexpr int64_t kScratchBytes = 147712;
  static constexpr const char* kKey = "9101c8419943e67ad5cd5dd54578c04cf787a319d5bae3b9cd91bd1de62a0a11";
};
struct Fn {
  using A = Plan::Acc;
  using L = ae::Lanes<A>;
  using V = L::Acc;
  static constexpr int kCaptures = 2;
  static constexpr int kStates = 2;
  static constexpr int kUserStats = 1;
  static constexpr int kStats = 1;
  static constexpr bool kHasMerge = true;
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
  static void init(const ae::Env& env, const Row& row, A* state) {
    (void)env, (void)row, (void)state;
    state[0] = -__builtin_inf();
    state[1] = 0x0.0p+0;
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
    const auto v27 = ae::maximum(z0, best);
    L::F64 acc33 = ae::splat<L::F64>(0x0.0p+0);
    for (int j = 0; j < end; j += L::W) {
      const V sm = ae::load_vector<V>(s + j);
      const auto v30 = ae::sub(sm, v27);
      const auto v31 = ae::exp(v30);
      acc33 = ae::add(acc33, ae::splat<L::F64>(v31));
      ae::store_multiply(w + j, ae::splat<V>(v31));
    }
    const auto r33 = ae::hsum(acc33);
    const auto v28 = ae::sub(z0, v27);
    const auto v29 = ae::exp(v28);
    const auto v32 = ae::mul(z1, v29);
    const auto v34 = ae::add(v32, r33);
    factor = v29;
    state[0] = v27;
    state[1] = v34;
    return true;
  }
  static void finalize(const ae::Env& env, const Row& row, const A* state,
                       A& out_factor, A* stats) {
    (void)env, (void)row, (void)state, (void)stats;
    const A z0 = state[0];
    const A z1 = state[1];
    const auto v40 = ae::div(0x1.0000000000000p+0, z1);
    out_factor = v40;
    if (stats == nullptr) return;
    const auto v36 = ae::log(z1);
    const auto v37 = ae::add(z0, v36);
    stats[0] = v37;
  }
  static void merge(const ae::Env& env, const Row& row, const A* a, const A* b,
                    A* merged, A& fa, A& fb) {
    (void)env, (void)row, (void)a, (void)b, (void)merged;
    const A a0 = a[0];
    const A a1 = a[1];
    const A b0 = b[0];
    const A b1 = b[1];
    const auto v48 = ae::maximum(a0, b0);
    merged[0] = v48;
    const auto v49 = ae::sub(a0, v48);
    const auto v50 = ae::exp(v49);
    const auto v53 = ae::mul(a1, v50);
    const auto v51 = ae::sub(b0, v48);
    const auto v52 = ae::exp(v51);
    const auto v54 = ae::mul(b1, v52);
    const auto v55 = ae::add(v53, v54);
    merged[1] = v55;
    fa = v50;
    fb = v52;
  }
};
}  // namespace
AE_EXPORT_FORWARD(Plan, Fn)
