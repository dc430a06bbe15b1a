// attnengine linear forward kernel, cpu:portable, f64, D 24, Dv 17. Generated: do not edit.
#include "cpu/linear_forward.h"
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
  static constexpr int64_t kScratchBytes = 28672;
  static constexpr const char* kKey = "02a3301b972b0c5fbb0ff75f233297d775bcc1fa305651c1001fd92c07b558bf";
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
};
}  // namespace
AE_EXPORT_LINEAR_FORWARD(Plan, Fn)
