// attnengine linear backward kernel, cpu:avx512_bf16, bf16, D 128, Dv 128. Generated: do not edit.
#include "cpu/linear_backward.h"
#include "cpu/hook.h"
#include "cpu/math.h"
namespace {
struct Plan {
  using Elem = ae::bf16;
  using Acc = float;
  using Decay = float;
  using Beta = ae::bf16;
  static constexpr int kD = 128, kDv = 128;
  static constexpr int kChunk = 32;
  static constexpr ae::DecayKind kDecay = ae::DecayKind::kScalar;
  static constexpr bool kDelta = true;
  static constexpr bool kNormalizer = false;
  static constexpr bool kBf16Dot = true;
  static constexpr int kVirtualWorkers = 32;
  static constexpr int kScanTasks = 0;
  static constexpr int64_t kScanBytes = 262144;
  static constexpr int64_t kScratchBytes = 377152;
  static constexpr const char* kKey = "cadfc5ae6bbfaaa2176e3923ed8792cb74ddb92e413de35034033d4fc4bd7dff";
};
struct Fn {
  using A = Plan::Acc;
  using L = ae::Lanes<A>;
  using V = L::Acc;
  static constexpr int kCaptures = 0;
  static constexpr bool kHasQMod = false;
  static constexpr bool kHasKMod = false;
  static constexpr bool kHasVMod = false;
  static constexpr bool kHasDecayMod = false;
  static constexpr bool kHasOutMod = false;
  static V q_mod(const ae::Env&, const ae::HookAt&, V x) { return x; }
  static V k_mod(const ae::Env&, const ae::HookAt&, V x) { return x; }
  static V v_mod(const ae::Env&, const ae::HookAt&, V x) { return x; }
  static V decay_mod(const ae::Env&, const ae::HookAt&, V x) { return x; }
  static V out_mod(const ae::Env&, const ae::HookAt&, V x) { return x; }
  static constexpr int kHookGrads = 0;
  static constexpr int kQModFirst = 0, kQModGrads = 0;
  static constexpr int kKModFirst = 0, kKModGrads = 0;
  static constexpr int kVModFirst = 0, kVModGrads = 0;
  static constexpr int kDecayModFirst = 0, kDecayModGrads = 0;
  static constexpr int kOutModFirst = 0, kOutModGrads = 0;
  static V q_mod_grad(const ae::Env&, const ae::HookAt&, V, V g, V*) { return g; }
  static V k_mod_grad(const ae::Env&, const ae::HookAt&, V, V g, V*) { return g; }
  static V v_mod_grad(const ae::Env&, const ae::HookAt&, V, V g, V*) { return g; }
  static V decay_mod_grad(const ae::Env&, const ae::HookAt&, V, V g, V*) { return g; }
  static V out_mod_grad(const ae::Env&, const ae::HookAt&, V, V g, V*) { return g; }
};
}  // namespace
AE_EXPORT_LINEAR_BACKWARD(Plan, Fn)
