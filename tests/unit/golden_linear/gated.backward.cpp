// attnengine linear backward kernel, cpu:avx512_bf16, bf16, D 128, Dv 64. Generated: do not edit.
#include "cpu/linear_backward.h"
#include "cpu/hook.h"
#include "cpu/math.h"
namespace {
struct Plan {
  using Elem = ae::bf16;
  using Acc = float;
  using Decay = float;
  using Beta = float;
  static constexpr int kD = 128, kDv = 64;
  static constexpr int kChunk = 48;
  static constexpr ae::DecayKind kDecay = ae::DecayKind::kChannel;
  static constexpr bool kDelta = false;
  static constexpr bool kNormalizer = false;
  static constexpr bool kBf16Dot = true;
  static constexpr int kVirtualWorkers = 32;
  static constexpr int kScanTasks = 0;
  static constexpr int64_t kScanBytes = 262144;
  static constexpr int64_t kScratchBytes = 628160;
  static constexpr const char* kKey = "3baa2191ff45c46b39b24fe378a6d1555de008743881c95e6712a221b064b347";
};
struct Fn {
  using A = Plan::Acc;
  using L = ae::Lanes<A>;
  using V = L::Acc;
  static constexpr int kCaptures = 1;
  static constexpr bool kHasQMod = false;
  static constexpr bool kHasKMod = false;
  static constexpr bool kHasVMod = false;
  static constexpr bool kHasDecayMod = true;
  static constexpr bool kHasOutMod = true;
  static V q_mod(const ae::Env&, const ae::HookAt&, V x) { return x; }
  static V k_mod(const ae::Env&, const ae::HookAt&, V x) { return x; }
  static V v_mod(const ae::Env&, const ae::HookAt&, V x) { return x; }
  static V decay_mod(const ae::Env& env, const ae::HookAt& at, V x) {
    (void)env, (void)at, (void)x;
    const auto v2 = ae::minimum(0x0.0p+0f, x);
    const auto v3 = ae::abs(x);
    const auto v4 = ae::neg(v3);
    const auto v5 = ae::exp(v4);
    const auto v6 = ae::log1p(v5);
    const auto v7 = ae::sub(v2, v6);
    const auto v9 = ae::div(v7, 0x1.0000000000000p+4f);
    return ae::splat<L::F32>(v9);
  }
  static V out_mod(const ae::Env& env, const ae::HookAt& at, V x) {
    (void)env, (void)at, (void)x;
    const L::Mask live = ae::lt(ae::iota<L::I32>(), int32_t(at.count));
    const L::I32 k = ae::add(ae::iota<L::I32>(), int32_t(at.d));
    (void)k;
    const auto v14 = ae::gather_run<float, void, 4, true>(env, 0, live, ae::spread(env, 0, 0, int32_t(at.b)), ae::spread(env, 0, 1, int32_t(at.h)), ae::spread(env, 0, 2, int32_t(at.t)), at.d);
    const auto v15 = ae::sigmoid(v14);
    const auto v16 = ae::mul(v14, v15);
    const auto v17 = ae::mul(x, v16);
    return ae::splat<L::F32>(v17);
  }
  static constexpr int kHookGrads = 1;
  static constexpr int kQModFirst = 0, kQModGrads = 0;
  static constexpr int kKModFirst = 0, kKModGrads = 0;
  static constexpr int kVModFirst = 0, kVModGrads = 0;
  static constexpr int kDecayModFirst = 0, kDecayModGrads = 0;
  static constexpr int kOutModFirst = 0, kOutModGrads = 1;
  static V q_mod_grad(const ae::Env&, const ae::HookAt&, V, V g, V*) { return g; }
  static V k_mod_grad(const ae::Env&, const ae::HookAt&, V, V g, V*) { return g; }
  static V v_mod_grad(const ae::Env&, const ae::HookAt&, V, V g, V*) { return g; }
  static V decay_mod_grad(const ae::Env& env, const ae::HookAt& at, V x, V g, V* grads) {
    (void)env, (void)at, (void)x, (void)g, (void)grads;
    const auto v19 = ae::div(g, 0x1.0000000000000p+4f);
    const auto v20 = ae::neg(v19);
    const auto v3 = ae::abs(x);
    const auto v4 = ae::neg(v3);
    const auto v5 = ae::exp(v4);
    const auto v22 = ae::add(v5, 0x1.0000000000000p+0f);
    const auto v23 = ae::div(v20, v22);
    const auto v24 = ae::mul(v23, v5);
    const auto v25 = ae::neg(v24);
    const auto v26 = ae::sign(x);
    const auto v27 = ae::mul(v25, v26);
    const auto v32 = ae::lt(0x0.0p+0f, x);
    const auto v30 = ae::eq(0x0.0p+0f, x);
    const auto v29 = ae::div(v19, 0x1.0000000000000p+1f);
    const auto v31 = ae::select(v30, v29, v19);
    const auto v33 = ae::select(v32, 0x0.0p+0f, v31);
    const auto v34 = ae::add(v27, v33);
    return ae::splat<L::F32>(v34);
  }
  static V out_mod_grad(const ae::Env& env, const ae::HookAt& at, V x, V g, V* grads) {
    (void)env, (void)at, (void)x, (void)g, (void)grads;
    const L::Mask live = ae::lt(ae::iota<L::I32>(), int32_t(at.count));
    const L::I32 k = ae::add(ae::iota<L::I32>(), int32_t(at.d));
    (void)k;
    const auto v35 = ae::mul(g, x);
    const auto v14 = ae::gather_run<float, void, 4, true>(env, 0, live, ae::spread(env, 0, 0, int32_t(at.b)), ae::spread(env, 0, 1, int32_t(at.h)), ae::spread(env, 0, 2, int32_t(at.t)), at.d);
    const auto v15 = ae::sigmoid(v14);
    const auto v38 = ae::mul(v35, v15);
    const auto v37 = ae::mul(v35, v14);
    const auto v39 = ae::sub(0x1.0000000000000p+0f, v15);
    const auto v40 = ae::mul(v15, v39);
    const auto v41 = ae::mul(v37, v40);
    const auto v42 = ae::add(v38, v41);
    grads[0] = ae::splat<L::F32>(v42);
    const auto v16 = ae::mul(v14, v15);
    const auto v36 = ae::mul(g, v16);
    return ae::splat<L::F32>(v36);
  }
};
}  // namespace
AE_EXPORT_LINEAR_BACKWARD(Plan, Fn)
