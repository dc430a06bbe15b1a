// attnengine linear backward kernel, cpu:avx2, f32, D 64, Dv 64. Generated: do not edit.
#include "cpu/linear_backward.h"
#include "cpu/hook.h"
#include "cpu/math.h"
namespace {
struct Plan {
  using Elem = float;
  using Acc = float;
  using Decay = float;
  using Beta = float;
  static constexpr int kD = 64, kDv = 64;
  static constexpr int kChunk = 32;
  static constexpr ae::DecayKind kDecay = ae::DecayKind::kNone;
  static constexpr bool kDelta = false;
  static constexpr bool kNormalizer = true;
  static constexpr bool kBf16Dot = false;
  static constexpr int kVirtualWorkers = 32;
  static constexpr int kScanTasks = 0;
  static constexpr int64_t kScanBytes = 262144;
  static constexpr int64_t kScratchBytes = 128832;
  static constexpr const char* kKey = "f61c7c4bc836ccbbaa6b10bd1234e2048f526e8e8321fcad2ac12ee61babbaaf";
};
struct Fn {
  using A = Plan::Acc;
  using L = ae::Lanes<A>;
  using V = L::Acc;
  static constexpr int kCaptures = 0;
  static constexpr bool kHasQMod = true;
  static constexpr bool kHasKMod = true;
  static constexpr bool kHasVMod = false;
  static constexpr bool kHasDecayMod = false;
  static constexpr bool kHasOutMod = false;
  static V q_mod(const ae::Env& env, const ae::HookAt& at, V x) {
    (void)env, (void)at, (void)x;
    const auto v2 = ae::gt(x, 0x0.0p+0f);
    const auto v3 = ae::select(v2, 0x0.0p+0f, x);
    const auto v4 = ae::expm1(v3);
    const auto v5 = ae::select(v2, x, v4);
    const auto v7 = ae::add(v5, 0x1.0000000000000p+0f);
    return ae::splat<L::F32>(v7);
  }
  static V k_mod(const ae::Env& env, const ae::HookAt& at, V x) {
    (void)env, (void)at, (void)x;
    const auto v2 = ae::gt(x, 0x0.0p+0f);
    const auto v3 = ae::select(v2, 0x0.0p+0f, x);
    const auto v4 = ae::expm1(v3);
    const auto v5 = ae::select(v2, x, v4);
    const auto v7 = ae::add(v5, 0x1.0000000000000p+0f);
    return ae::splat<L::F32>(v7);
  }
  static V v_mod(const ae::Env&, const ae::HookAt&, V x) { return x; }
  static V decay_mod(const ae::Env&, const ae::HookAt&, V x) { return x; }
  static V out_mod(const ae::Env&, const ae::HookAt&, V x) { return x; }
  static constexpr int kHookGrads = 0;
  static constexpr int kQModFirst = 0, kQModGrads = 0;
  static constexpr int kKModFirst = 0, kKModGrads = 0;
  static constexpr int kVModFirst = 0, kVModGrads = 0;
  static constexpr int kDecayModFirst = 0, kDecayModGrads = 0;
  static constexpr int kOutModFirst = 0, kOutModGrads = 0;
  static V q_mod_grad(const ae::Env& env, const ae::HookAt& at, V x, V g, V* grads) {
    (void)env, (void)at, (void)x, (void)g, (void)grads;
    const auto v2 = ae::gt(x, 0x0.0p+0f);
    const auto v14 = ae::select(v2, g, 0x0.0p+0f);
    const auto v13 = ae::select(v2, 0x0.0p+0f, g);
    const auto v3 = ae::select(v2, 0x0.0p+0f, x);
    const auto v4 = ae::expm1(v3);
    const auto v15 = ae::add(v4, 0x1.0000000000000p+0f);
    const auto v16 = ae::mul(v13, v15);
    const auto v17 = ae::select(v2, 0x0.0p+0f, v16);
    const auto v18 = ae::add(v14, v17);
    return ae::splat<L::F32>(v18);
  }
  static V k_mod_grad(const ae::Env& env, const ae::HookAt& at, V x, V g, V* grads) {
    (void)env, (void)at, (void)x, (void)g, (void)grads;
    const auto v2 = ae::gt(x, 0x0.0p+0f);
    const auto v14 = ae::select(v2, g, 0x0.0p+0f);
    const auto v13 = ae::select(v2, 0x0.0p+0f, g);
    const auto v3 = ae::select(v2, 0x0.0p+0f, x);
    const auto v4 = ae::expm1(v3);
    const auto v15 = ae::add(v4, 0x1.0000000000000p+0f);
    const auto v16 = ae::mul(v13, v15);
    const auto v17 = ae::select(v2, 0x0.0p+0f, v16);
    const auto v18 = ae::add(v14, v17);
    return ae::splat<L::F32>(v18);
  }
  static V v_mod_grad(const ae::Env&, const ae::HookAt&, V, V g, V*) { return g; }
  static V decay_mod_grad(const ae::Env&, const ae::HookAt&, V, V g, V*) { return g; }
  static V out_mod_grad(const ae::Env&, const ae::HookAt&, V, V g, V*) { return g; }
};
}  // namespace
AE_EXPORT_LINEAR_BACKWARD(Plan, Fn)
