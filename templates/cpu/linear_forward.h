// The forward pass of linear attention:
//
//   S_t = exp(g_t) S_{t-1}, then S_t += k_t v_t^T, or k_t (beta_t (v_t - k_t^T S_t))^T
//   o_t = scale q_t^T S_t, divided by scale q_t^T z_t under a normalizer
//
//   for each sequence, key head, some value heads and some panels of columns of v (one task):
//     for each chunk of tokens:
//       q, k through their hooks, packed; raw products q k^T below the diagonal, once for all heads
//       for each head: decays, M, and with the delta rule A and the inverses on its diagonal
//         for each panel: Vn;  O = scale e (q S) + M Vn;  S = total S + (k f)^T Vn
//
// Sequences of a few tokens go row by row through the state instead (linear_step.h). Where tasks
// are few and sequences long, chunks are tasks (linear_scan.h).
//
// The generated unit defines Plan and Fn:
//
//   struct Plan
//     Elem, Acc, Decay, Beta     types of q, k, v, out; of sums and states; of decay and beta
//     kD, kDv, kChunk            tokens of a chunk: a multiple of 16
//     kDecay, kDelta, kNormalizer, kBf16Dot
//     kVirtualWorkers            work is cut for so many, whatever the number of threads
//     kScanTasks, kScanBytes     chunks are tasks where walks would be fewer (0: never);
//                                states that are then in memory, for each thread
//     kScratchBytes, kKey        of LinearForwardScratch; the digest of the kernel key
//   struct Fn
//     kCaptures, kHasQMod, kHasKMod, kHasVMod, kHasDecayMod, kHasOutMod
//     V q_mod(env, HookAt, V x), k_mod, v_mod, decay_mod, out_mod
//
// and ends with AE_EXPORT_LINEAR_FORWARD(Plan, Fn).
#pragma once
#include "cpu/linear_scan.h"
#include "cpu/linear_step.h"
#include "cpu/linear_walk.h"

namespace ae {

template <class Plan, class Fn>
class LinearForward {
  using T = LinearTypes<Plan>;
  using Walk = LinearWalk<Plan, Fn>;
  static_assert(Plan::kScratchBytes == linear_forward_scratch_bytes<Plan>(),
                "the plan's scratch total is wrong");

 public:
  static int64_t workspace_bytes(const ae_linear_params& p) {
    const LinearCut<Plan> cut(p);
    const LinearScanCut<Plan> scan = LinearScan<Plan, Fn>::cut(p);
    // And room to align the base.
    return 64 + (scan.used ? LinearScan<Plan, Fn>::bytes(p, scan) : p.threads * worker_bytes(cut));
  }

  LinearForward(const ae_linear_params& p, void* workspace)
      : p_(p),
        cut_(p),
        worker_bytes_(worker_bytes(cut_)),
        base_((char*)round_up((int64_t)workspace, 64)),
        env_{p.captures, p.fault, 0},
        in_(p, env_) {}

  void run(ae_parallel_for parallel_for) {
    if constexpr (LinearScanCut<Plan>::kEver) {
      const LinearScanCut<Plan> scan = LinearScan<Plan, Fn>::cut(p_);
      if (scan.used) return LinearScan<Plan, Fn>(in_, scan, base_).run(parallel_for);
    }
    if (cut_.tasks > 0) parallel_for(cut_.tasks, p_.threads, &work_task, this);
  }

 private:
  const ae_linear_params& p_;
  const LinearCut<Plan> cut_;
  const int64_t worker_bytes_;
  char* const base_;
  const Env env_;
  const LinearInputs<Plan, Fn> in_;

  static int64_t worker_bytes(const LinearCut<Plan>& cut) {
    return linear_forward_scratch_bytes<Plan>() + Walk::state_bytes(cut.heads, cut.panels);
  }
  static void work_task(void* self, int64_t index, int32_t worker) {
    static_cast<LinearForward*>(self)->work(index, worker);
  }
  void work(int64_t index, int32_t worker) {
    LinearTask task = cut_.task(p_, index);
    char* scratch = base_ + worker * worker_bytes_;
    if (task.length <= kStepTokens<Plan>) {
      // One step reads whole rows of the state where that leaves enough tasks.
      if (task.length == 1 && cut_.tasks / cut_.column_blocks >= Plan::kVirtualWorkers / 2) {
        if (task.panel != 0) return;
        task.panels = T::kPanels;
      }
      LinearStep<Plan, Fn>(in_, task, scratch).run();
    } else {
      Walk(in_, task, scratch).run();
    }
  }
};

template <class Plan, class Fn>
const ae_module_info* linear_forward_info() {
  static constexpr ae_module_info info = {AE_ABI_VERSION,
                                          sizeof(ae_linear_params),
                                          AE_LINEAR_FORWARD,
                                          dtype_of<typename Plan::Elem>(),
                                          Plan::kD,
                                          Plan::kDv,
                                          Fn::kCaptures,
                                          linear_operands<Plan>(),
                                          0,
                                          0,
                                          kIsa,
                                          Plan::kKey};
  return &info;
}

template <class Plan, class Fn>
int32_t linear_forward_launch(const ae_linear_params* p, void* workspace,
                              ae_parallel_for parallel_for) {
  if (p->abi_version != AE_ABI_VERSION || p->bytes != sizeof(ae_linear_params)) return kWrongAbi;
  LinearForward<Plan, Fn>(*p, workspace).run(parallel_for);
  return kLaunched;
}

}  // namespace ae

#define AE_EXPORT_LINEAR_FORWARD(Plan, Fn)                                                      \
  AE_EXPORT const ae_module_info* ae_info(void) { return ae::linear_forward_info<Plan, Fn>(); } \
  AE_EXPORT int64_t ae_workspace_bytes(const ae_linear_params* p) {                             \
    return ae::LinearForward<Plan, Fn>::workspace_bytes(*p);                                    \
  }                                                                                             \
  AE_EXPORT int32_t ae_launch(const ae_linear_params* p, void* workspace,                       \
                              ae_parallel_for parallel_for) {                                   \
    return ae::linear_forward_launch<Plan, Fn>(p, workspace, parallel_for);                     \
  }
