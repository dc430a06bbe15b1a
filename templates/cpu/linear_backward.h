// Backward of linear attention on the CPU: gradients of q, k, v, the log-decay, beta, the initial
// state and the tensors that hooks capture, from those of the output and of the final state.
//
// A generated unit defines Plan and Fn (the hooks and their adjoints), then
// AE_EXPORT_LINEAR_BACKWARD(Plan, Fn). A task is a sequence, a key head and a block of its value
// heads. It walks the chunks forwards, to have the state before each, then backwards with the
// adjoint of the state; linear_backward_head.h has the formulas. Where the value heads of a key
// head are in several blocks, a second step adds up dq and dk in the order of the blocks.
//
// Where tasks are few and sequences long, chunks are tasks (linear_backward_scan.h).
//
// Everything is linear in dO and the final state's gradient, so the scale of the scores is left
// out: dO is taken as it is, the final state's gradient divided by the scale, and results are
// multiplied by it. A scale of 0 counts as 1 with dO = 0. Under a normalizer the scale cancels, but
// where the denominator is held at its limit.
#pragma once
#include "cpu/linear_backward_channel.h"
#include "cpu/linear_backward_head.h"
#include "cpu/linear_backward_scan.h"
#include "cpu/linear_backward_shared.h"

namespace ae {

template <class Plan, class Fn>
class LinearBackward {
  using X = LinearBackwardTypes<Plan>;
  using A = typename X::A;
  using V = typename X::V;
  using Scratch = LinearBackwardScratch<Plan>;
  using Head = LinearBackwardHead<Plan>;
  using Operands = LinearBackwardOperands<Plan, Fn>;
  using Keys = std::conditional_t<X::kChannel, LinearBackwardChannel<Plan, Fn>,
                                  LinearBackwardShared<Plan, Fn>>;
  using Step = LinearBackwardStep<Plan, Fn, Keys>;
  using Scan = LinearBackwardScan<Plan, Fn, Keys>;
  static constexpr int W = X::W, C = X::C, D = X::kD, kDp = X::kDp;
  static_assert(Plan::kScratchBytes == sizeof(Scratch), "the plan's scratch formula");

 public:
  explicit LinearBackward(const ae_linear_params& p)
      : p_(p),
        cut_(p),
        env_{p.captures, p.fault, p.L},
        mute_(!Plan::kNormalizer && p.scale == 0),
        factor_(Plan::kNormalizer || mute_ ? A(1) : A(p.scale)),
        io_(p, env_, factor_, mute_) {}

  int64_t workspace_bytes() const {
    if constexpr (Scan::kEver) {
      if (const auto scan = Scan::cut(p_, cut_); scan.used) return 64 + Scan::bytes(p_, scan);
    }
    return cut_.total_bytes(p_);
  }

  void run(void* workspace, ae_parallel_for parallel_for) {
    base_ = reinterpret_cast<char*>(round_up(reinterpret_cast<int64_t>(workspace), 64));
    if constexpr (Scan::kEver) {
      if (const auto scan = Scan::cut(p_, cut_); scan.used) {
        return Scan(io_, p_, scan, factor_, base_).run(parallel_for);
      }
    }
    const auto each = [&](int64_t n, auto task) {
      if (n <= 0) return;
      parallel_for(
          n, p_.threads,
          [](void* arg, int64_t i, int32_t worker) {
            (*static_cast<decltype(task)*>(arg))(i, worker);
          },
          &task);
    };
    each(cut_.tasks, [this](int64_t i, int32_t worker) { run_task(i, worker); });
    if (cut_.blocks > 1) {
      const int64_t parts = (p_.L + C - 1) / C;
      each(p_.B * p_.Hk * parts,
           [this, parts](int64_t i, int32_t) { merge(i / parts, i % parts); });
    }
  }

 private:
  // The tokens of a task and the rows of the sums of its block.
  struct Task {
    int64_t sequence, b, hk, block, begin, end, first_head, heads;
  };

  Task task_of(int64_t i) const {
    Task t;
    t.block = i % cut_.blocks;
    t.hk = i / cut_.blocks % p_.Hk;
    t.sequence = i / cut_.blocks / p_.Hk;
    const bool packed = p_.first != nullptr;
    t.b = packed ? 0 : t.sequence;
    t.begin = packed ? p_.first[t.sequence] : 0;
    t.end = packed ? p_.first[t.sequence + 1] : p_.L;
    const int64_t first = t.block * cut_.heads, left = cut_.group - first;
    t.first_head = t.hk * cut_.group + first;
    t.heads = left < cut_.heads ? left : cut_.heads;
    return t;
  }

  void run_task(int64_t i, int32_t worker) const {
    const Task task = task_of(i);
    char* memory = base_ + 2 * cut_.sums_bytes(p_) + worker * cut_.worker_bytes();
    Scratch& x = *reinterpret_cast<Scratch*>(memory);
    memory += sizeof(Scratch);
    const int64_t chunks = (task.end - task.begin + C - 1) / C;
    const auto head = [&](int64_t j) {
      Head found = cut_.head(memory + j * cut_.head_bytes());
      found.initial = initial_state(task, task.first_head + j);
      if (p_.dfinal == nullptr) found.last = chunks - 1;
      return found;
    };
    const Keys keys(io_, x);
    const Step step(io_, x, keys, A(p_.scale));
    const auto at = [&](int64_t c, int64_t j) {
      const int64_t t = task.begin + c * C, left = task.end - t;
      return LinearAt{task.b, task.hk, task.first_head + j, t, int(left < C ? left : C)};
    };
    step.begin();
    for (int64_t j = 0; chunks > 0 && j < task.heads; ++j) first_state(head(j));
    for (int64_t c = 0; c < chunks; ++c) {
      const bool last = c + 1 == chunks;
      if (!last || X::kDelta) keys.load_keys(at(c, 0));
      for (int64_t j = 0; j < task.heads; ++j) {
        step.forward(at(c, j), j + 1 < task.heads ? at(c, j + 1) : at(last ? c : c + 1, 0), head(j),
                     c, last);
      }
    }
    for (int64_t j = 0; j < task.heads; ++j) final_adjoint(task, task.first_head + j, head(j));
    for (int64_t c = chunks - 1; c >= 0; --c) {
      const LinearAt here = at(c, 0), before = at(c > 0 ? c - 1 : c, 0);
      keys.load_keys(here);
      keys.load_queries(here);
      for (int64_t j = 0; j < task.heads; ++j) {
        step.backward(at(c, j), j + 1 < task.heads ? at(c, j + 1) : before, head(j), c);
      }
      keys.finish(here);
      if (cut_.blocks == 1) {
        io_.store_q(here, before, x.dq);
        io_.store_k(here, before, x.dk);
      } else {
        keep_sums(here, x.dq, sums(0, task.block, here));
        keep_sums(here, x.dk, sums(1, task.block, here));
      }
    }
    if (p_.dstate == nullptr) return;
    for (int64_t j = 0; j < task.heads; ++j) store_state(task, task.first_head + j, head(j));
  }

  // ---- states ----
  int64_t state_offset(const Task& task, int64_t h) const {
    return (task.sequence * p_.H + h) * D * X::kStateColumns;
  }
  LinearRows<A> initial_state(const Task& task, int64_t h) const {
    const int64_t* s = p_.state_stride;
    const A* from = static_cast<const A*>(p_.state);
    if (from != nullptr) from += task.sequence * s[0] + h * s[1];
    return {from, s[2], s[3]};
  }
  void final_adjoint(const Task& task, int64_t h, const Head& head) const {
    const A* from = static_cast<const A*>(p_.dfinal);
    if (from != nullptr) from += state_offset(task, h);
    load_state(head, head.state, {from, X::kStateColumns, 1}, A(1) / factor_);
  }
  // Transposed, times `factor`; base null: zeros.
  void load_state(const Head& head, A* state, const LinearRows<A>& from, A factor) const {
    LinearTile<Plan>::clear(state, X::kState);
    if constexpr (X::kNormalizer) LinearTile<Plan>::clear(head.z, kDp);
    if (from.base == nullptr) return;
    LinearTile<Plan>::each_turned(from, [=](int e, int d, V x) {
      store_vector(state + int64_t(e) * X::kSp + d, x * factor);
    });
    if constexpr (X::kNormalizer) {
      for (int d = 0; d < D; ++d) head.z[d] = from(d)[X::kDv * from.col] * factor;
    }
  }
  // The state before chunk 0, kept.
  void first_state(const Head& head) const {
    if constexpr (X::kRounds) {
      load_state(head, head.state, head.initial, A(1));
      LinearTile<Plan>::template by_row<X::kSp>(head.state, head.state_of(0), X::kStateRows);
    } else {
      load_state(head, head.state_of(0), head.initial, A(1));
    }
  }
  void store_state(const Task& task, int64_t h, const Head& head) const {
    A* to = static_cast<A*>(p_.dstate) + state_offset(task, h);
    for (int d = 0; d < D; ++d, to += X::kStateColumns) {
      for (int e = 0; e < X::kDv; ++e) to[e] = head.state[int64_t(e) * X::kSp + d] * factor_;
      if constexpr (X::kNormalizer) to[X::kDv] = head.z[d] * factor_;
    }
  }

  // ---- sums of blocks: [2][blocks][B * Hk][L][kDp] ----
  A* sums(int which, int64_t block, const LinearAt& at) const {
    const int64_t row = ((block * p_.B + at.b) * p_.Hk + at.hk) * p_.L + at.t;
    return reinterpret_cast<A*>(base_ + which * cut_.sums_bytes(p_)) + row * kDp;
  }
  static void keep_sums(const LinearAt& at, const A* from, A* to) {
    LinearTile<Plan>::copy(to, from, int64_t(at.n) * kDp);
  }
  void merge(int64_t head, int64_t part) const {
    const int64_t t = part * C, left = p_.L - t;
    const LinearAt at{head / p_.Hk, head % p_.Hk, 0, t, int(left < C ? left : C)};
    for (int which = 0; which < 2; ++which) {
      A* sum = sums(which, 0, at);
      for (int64_t block = 1; block < cut_.blocks; ++block) {
        const A* more = sums(which, block, at);
        for (int64_t i = 0; i < int64_t(at.n) * kDp; i += W) {
          store_vector(sum + i, load_vector<V>(sum + i) + load_vector<V>(more + i));
        }
      }
      which == 0 ? io_.store_q(at, at, sum) : io_.store_k(at, at, sum);
    }
  }

  const ae_linear_params& p_;
  const LinearBackwardCut<Plan> cut_;
  const Env env_;
  const bool mute_;
  const A factor_;
  const Operands io_;
  char* base_ = nullptr;
};

// How many gradients of captured tensors each hook gives, as linear_abi.h counts them.
template <class Fn>
constexpr uint64_t linear_hook_grads() {
  return uint64_t(Fn::kQModGrads) | uint64_t(Fn::kKModGrads) << 8 | uint64_t(Fn::kVModGrads) << 16 |
         uint64_t(Fn::kDecayModGrads) << 24 | uint64_t(Fn::kOutModGrads) << 32;
}

template <class Plan, class Fn>
const ae_module_info* linear_backward_info() {
  static constexpr ae_module_info info = {AE_ABI_VERSION,
                                          sizeof(ae_linear_params),
                                          AE_LINEAR_BACKWARD,
                                          dtype_of<typename Plan::Elem>(),
                                          Plan::kD,
                                          Plan::kDv,
                                          Fn::kCaptures,
                                          linear_operands<Plan>(),
                                          0,
                                          linear_hook_grads<Fn>(),
                                          kIsa,
                                          Plan::kKey};
  return &info;
}

template <class Plan, class Fn>
int32_t linear_backward_launch(const ae_linear_params* p, void* workspace,
                               ae_parallel_for parallel_for) {
  if (p->abi_version != AE_ABI_VERSION || p->bytes != sizeof(ae_linear_params)) return kWrongAbi;
  if (Fn::kHookGrads > 0 && p->hook_grads == nullptr) return kMissingGrad;
  LinearBackward<Plan, Fn>(*p).run(workspace, parallel_for);
  return kLaunched;
}

}  // namespace ae

#define AE_EXPORT_LINEAR_BACKWARD(Plan, Fn)                                                      \
  AE_EXPORT const ae_module_info* ae_info(void) { return ae::linear_backward_info<Plan, Fn>(); } \
  AE_EXPORT int64_t ae_workspace_bytes(const ae_linear_params* p) {                              \
    return ae::LinearBackward<Plan, Fn>(*p).workspace_bytes();                                   \
  }                                                                                              \
  AE_EXPORT int32_t ae_launch(const ae_linear_params* p, void* workspace,                        \
                              ae_parallel_for parallel_for) {                                    \
    return ae::linear_backward_launch<Plan, Fn>(p, workspace, parallel_for);                     \
  }
