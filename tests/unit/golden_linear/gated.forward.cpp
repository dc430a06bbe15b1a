// attnengine linear forward kernel, cpu:avx512_bf16, bf16, D 128, Dv 64. Generated: do not edit.
#include "cpu/linear_forward.h"
#include "cpu/hook.h"
#include "cpu/math.h"
namespace {
struct Plan {
  using Elem = ae::bf16;
  using Acc = float;
  using Decay = float;
  using Beta = float;
  static constexpr int kD = 128, kDv = 64;
  static constexpr int kChunk = 32;
  static constexpr ae::DecayKind kDecay = ae::DecayKind::kChannel;
  static constexpr bool kDelta = false;
  static constexpr bool kNormalizer = false;
  static constexpr bool kBf16Dot = true;
  static constexpr int kVirtualWorkers = 32;
  static constexpr int kScanTasks = 2;
  static constexpr int64_t kScanBytes = 262144;
  static constexpr int64_t kScratchBytes = 172544;
  static constexpr const char* kKey = "34c4aa83ad032fb48b39d6cc49db739458413316ab74bc381649d92c5911966c";
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
};
}  // namespace
AE_EXPORT_LINEAR_FORWARD(Plan, Fn)
