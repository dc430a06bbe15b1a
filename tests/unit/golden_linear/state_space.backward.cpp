// attnengine linear backward kernel, cpu:portable, f64, D 24, Dv 17. Generated: do not edit.
#include "cpu/linear_backward.h"
#include "cpu/hook.h"
#include "cpu/math.h"
namespace {
struct Plan {
  using Elem = double;
  using Acc = double;
  using Decay = double;
  using Beta = double;
  static constexpr int kD = 24, kDv = 17;
  static constexpr int kChunk = 16;
  static constexpr ae::DecayKind kDecay = ae::DecayKind::kScalar;
  static constexpr bool kDelta = false;
  static constexpr bool kNormalizer = false;
  static constexpr bool kBf16Dot = false;
  static constexpr int kVirtualWorkers = 32;
  static constexpr int kScanTasks = 2;
  static constexpr int64_t kScanBytes = 262144;
  static constexpr int64_t kScratchBytes = 43328;
  static constexpr const char* kKey = "9345ef816d12ab2e7cc126f229e57ed79cc7795a2926b0f0cc17adbf4a2489c1";
};
struct Fn {
  using A = Plan::Acc;
  using L = ae::Lanes<A>;
  using V = L::Acc;
  static constexpr int kCaptures = 3;
  static constexpr bool kHasQMod = false;
  static constexpr bool kHasKMod = false;
  static constexpr bool kHasVMod = true;
  static constexpr bool kHasDecayMod = true;
  static constexpr bool kHasOutMod = false;
  static V q_mod(const ae::Env&, const ae::HookAt&, V x) { return x; }
  static V k_mod(const ae::Env&, const ae::HookAt&, V x) { return x; }
  static V v_mod(const ae::Env& env, const ae::HookAt& at, V x) {
    (void)env, (void)at, (void)x;
    const auto v4 = ae::gather<float>(env, 0, true, ae::spread(env, 0, 0, int32_t(at.b)), ae::spread(env, 0, 1, int32_t(at.h)), ae::spread(env, 0, 2, int32_t(at.t)));
    const auto v6 = ae::gt(v4, 0x1.4000000000000p+4f);
    const auto v7 = ae::select(v6, 0x1.4000000000000p+4f, v4);
    const auto v8 = ae::exp(v7);
    const auto v9 = ae::log1p(v8);
    const auto v10 = ae::select(v6, v4, v9);
    const auto v11 = ae::to_f64(v10);
    const auto v12 = ae::mul(x, v11);
    return ae::splat<L::F64>(v12);
  }
  static V decay_mod(const ae::Env& env, const ae::HookAt& at, V x) {
    (void)env, (void)at, (void)x;
    const auto v13 = ae::gather<float>(env, 1, true, ae::spread(env, 1, 0, int32_t(at.h)));
    const auto v14 = ae::exp(v13);
    const auto v15 = ae::neg(v14);
    const auto v16 = ae::to_f64(v15);
    const auto v17 = ae::gather<float>(env, 2, true, ae::spread(env, 2, 0, int32_t(at.h)));
    const auto v18 = ae::to_f64(v17);
    const auto v19 = ae::add(x, v18);
    const auto v21 = ae::gt(v19, 0x1.4000000000000p+4);
    const auto v22 = ae::select(v21, 0x1.4000000000000p+4, v19);
    const auto v23 = ae::exp(v22);
    const auto v24 = ae::log1p(v23);
    const auto v25 = ae::select(v21, v19, v24);
    const auto v26 = ae::mul(v16, v25);
    return ae::splat<L::F64>(v26);
  }
  static V out_mod(const ae::Env&, const ae::HookAt&, V x) { return x; }
  static constexpr int kHookGrads = 3;
  static constexpr int kQModFirst = 0, kQModGrads = 0;
  static constexpr int kKModFirst = 0, kKModGrads = 0;
  static constexpr int kVModFirst = 0, kVModGrads = 1;
  static constexpr int kDecayModFirst = 1, kDecayModGrads = 2;
  static constexpr int kOutModFirst = 3, kOutModGrads = 0;
  static V q_mod_grad(const ae::Env&, const ae::HookAt&, V, V g, V*) { return g; }
  static V k_mod_grad(const ae::Env&, const ae::HookAt&, V, V g, V*) { return g; }
  static V v_mod_grad(const ae::Env& env, const ae::HookAt& at, V x, V g, V* grads) {
    (void)env, (void)at, (void)x, (void)g, (void)grads;
    const auto v4 = ae::gather<float>(env, 0, true, ae::spread(env, 0, 0, int32_t(at.b)), ae::spread(env, 0, 1, int32_t(at.h)), ae::spread(env, 0, 2, int32_t(at.t)));
    const auto v6 = ae::gt(v4, 0x1.4000000000000p+4f);
    const auto v29 = ae::mul(g, x);
    const auto v44 = ae::select(v6, v29, 0x0.0p+0);
    const auto v55 = ae::add(v44, 0x0.0p+0);
    const auto v56 = ae::add(v55, 0x0.0p+0);
    const auto v7 = ae::select(v6, 0x1.4000000000000p+4f, v4);
    const auto v8 = ae::exp(v7);
    const auto v37 = ae::add(v8, 0x1.0000000000000p+0f);
    const auto v46 = ae::div(0x0.0p+0f, v37);
    const auto v49 = ae::mul(v46, v8);
    const auto v52 = ae::select(v6, 0x0.0p+0f, v49);
    const auto v54 = ae::to_f64(v52);
    const auto v57 = ae::add(v56, v54);
    const auto v45 = ae::select(v6, 0x0.0p+0, v29);
    const auto v47 = ae::to_f64(v37);
    const auto v48 = ae::div(v45, v47);
    const auto v50 = ae::to_f64(v8);
    const auto v51 = ae::mul(v48, v50);
    const auto v53 = ae::select(v6, 0x0.0p+0, v51);
    const auto v58 = ae::add(v57, v53);
    grads[0] = ae::splat<L::F64>(v58);
    const auto v9 = ae::log1p(v8);
    const auto v10 = ae::select(v6, v4, v9);
    const auto v11 = ae::to_f64(v10);
    const auto v30 = ae::mul(g, v11);
    return ae::splat<L::F64>(v30);
  }
  static V decay_mod_grad(const ae::Env& env, const ae::HookAt& at, V x, V g, V* grads) {
    (void)env, (void)at, (void)x, (void)g, (void)grads;
    const auto v17 = ae::gather<float>(env, 2, true, ae::spread(env, 2, 0, int32_t(at.h)));
    const auto v18 = ae::to_f64(v17);
    const auto v19 = ae::add(x, v18);
    const auto v21 = ae::gt(v19, 0x1.4000000000000p+4);
    const auto v22 = ae::select(v21, 0x1.4000000000000p+4, v19);
    const auto v23 = ae::exp(v22);
    const auto v24 = ae::log1p(v23);
    const auto v25 = ae::select(v21, v19, v24);
    const auto v60 = ae::mul(g, v25);
    const auto v77 = ae::neg(v60);
    const auto v13 = ae::gather<float>(env, 1, true, ae::spread(env, 1, 0, int32_t(at.h)));
    const auto v14 = ae::exp(v13);
    const auto v78 = ae::to_f64(v14);
    const auto v79 = ae::mul(v77, v78);
    grads[0] = ae::splat<L::F64>(v79);
    const auto v15 = ae::neg(v14);
    const auto v16 = ae::to_f64(v15);
    const auto v59 = ae::mul(g, v16);
    const auto v63 = ae::select(v21, v59, 0x0.0p+0);
    const auto v62 = ae::select(v21, 0x0.0p+0, v59);
    const auto v65 = ae::add(v23, 0x1.0000000000000p+0);
    const auto v66 = ae::div(v62, v65);
    const auto v67 = ae::mul(v66, v23);
    const auto v68 = ae::select(v21, 0x0.0p+0, v67);
    const auto v69 = ae::add(v63, v68);
    grads[1] = ae::splat<L::F64>(v69);
    return ae::splat<L::F64>(v69);
  }
  static V out_mod_grad(const ae::Env&, const ae::HookAt&, V, V g, V*) { return g; }
};
}  // namespace
AE_EXPORT_LINEAR_BACKWARD(Plan, Fn)
