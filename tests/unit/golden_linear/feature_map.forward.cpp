// attnengine linear forward kernel, cpu:avx2, f32, D 64, Dv 64. Generated: do not edit.
#include "cpu/linear_forward.h"
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
  static constexpr int kScanTasks = 2;
  static constexpr int64_t kScanBytes = 262144;
  static constexpr int64_t kScratchBytes = 81920;
  static constexpr const char* kKey = "0d0f8c7d4484fff607eab837e03c03cedf5a35c7e1e8b65a71e036934aa7bc2e";
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
};
}  // namespace
AE_EXPORT_LINEAR_FORWARD(Plan, Fn)
