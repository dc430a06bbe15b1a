// What the operators of linear attention share: their operands, checked, and the launch of a CPU
// module. Every message names the argument, its value, the limit and the next step; the checks are
// those of attnengine/linear/arguments.py, which users meet first.
#pragma once
#include <cmath>
#include <vector>

#include "common/linear_abi.h"
#include "cuda_linear.h"
#include "operators.h"

namespace ae {

inline const char* kind_name(int32_t kind) {
  static constexpr const char* kNames[] = {
      "forward",         "backward",           "linear forward",
      "linear backward", "statistics forward", "statistics backward"};
  return kind >= AE_FORWARD && kind <= AE_STATISTICS_BACKWARD ? kNames[kind] : "foreign";
}

inline const Kernel& check_linear_kernel(int64_t id, ae_kind kind) {
  const Kernel* kernel = find_kernel(id);
  if (kernel == nullptr) {
    value_error("kernel=" + std::to_string(id) +
                ": no such kernel is loaded in this process; load it with "
                "attnengine.library.load_kernel");
  }
  if (kernel->info.kind != kind) {
    value_error("kernel=" + std::to_string(id) + " is a " + kind_name(kernel->info.kind) +
                " kernel, this operator needs a " + kind_name(kind) + " one");
  }
  return *kernel;
}

// What a module was compiled to read: AE_LINEAR_OPERANDS, taken apart.
struct LinearSignature {
  int32_t bits;

  bool declared() const { return (bits & AE_LINEAR_DECLARED) != 0; }
  int32_t decay() const { return bits & 15; }
  int32_t decay_dtype() const { return bits >> 4 & 15; }
  bool beta() const { return (bits >> 8 & 1) != 0; }
  int32_t beta_dtype() const { return bits >> 9 & 15; }
  bool normalizer() const { return (bits >> 13 & 1) != 0; }
};

inline void expect_shape(const TensorView& x, const int64_t* want, int64_t rank,
                         const char* layout) {
  bool same = x.rank == rank;
  for (int64_t d = 0; same && d < rank; ++d) same = x.size[d] == want[d];
  if (same) return;
  value_error(std::string(x.name) + " has shape " + x.shape() + ", expected " +
              shape_text(want, rank) + " (" + layout + ")");
}

// The operands of one call. Owns the tensors; `p` points into them.
class LinearCall {
 public:
  enum Operand { kQ, kK, kV, kDecay, kBeta, kState, kStarts, kOperands };

  // Takes q, k, v, decay?, beta?, state? and cu_seqlens? off the stack, before any is looked at:
  // one that is refused must not leave others there.
  explicit LinearCall(StableIValue* stack) {
    for (int i = 0; i < kDecay; ++i) tensor_[i] = Tensor::take(stack[i]);
    for (int i = kDecay; i < kOperands; ++i) tensor_[i] = take_optional(stack[i]);
  }
  LinearCall(const LinearCall&) = delete;
  LinearCall& operator=(const LinearCall&) = delete;

  // Checks everything and fills `p`, but for results, captures and the fault word.
  void check(const Kernel& kernel, double scale) {
    const ae_module_info& info = kernel.info;
    const LinearSignature want{info.user_stats};
    accumulator_ = accumulator_dtype(info);
    for (int i = 0; i < kOperands; ++i) {
      if (tensor_[i]) view_[i] = view(kNames[i], tensor_[i]);
    }
    check_operands(kernel);
    p.abi_version = AE_ABI_VERSION;
    p.bytes = sizeof(ae_linear_params);
    p.B = v().size[0];
    p.H = v().size[1];
    p.L = v().size[2];
    p.Hk = q().size[1];
    p.q = const_data(tensor_[kQ]);
    p.k = const_data(tensor_[kK]);
    p.v = const_data(tensor_[kV]);
    copy4(p.q_stride, q().stride);
    copy4(p.k_stride, k().stride);
    copy4(p.v_stride, v().stride);
    check_decay(want);
    check_beta(want);
    check_starts();
    check_state(want);
    if (!std::isfinite(scale)) {
      value_error("scale=" + std::to_string(scale) + " must be a finite number");
    }
    p.scale = scale;
  }

  const TensorView& q() const { return view_[kQ]; }
  const TensorView& k() const { return view_[kK]; }
  const TensorView& v() const { return view_[kV]; }
  int32_t accumulator() const { return accumulator_; }
  bool has(Operand operand) const { return static_cast<bool>(tensor_[operand]); }
  // No token is there: nothing is launched.
  bool empty() const { return p.B == 0 || p.H == 0 || p.L == 0; }
  const int64_t* state_size() const { return state_size_; }
  // [B, H, L] or [B, H, L, D]: what decay_mod sees, and its gradient.
  int64_t decay_rank() const { return channel_decay_ ? 4 : 3; }
  const int64_t* decay_size() const { return decay_size_; }

  // The final state where no token changes it.
  void carry_state(const Tensor& to) const {
    if (p.state == nullptr) {
      AE_TORCH(aoti_torch_zero_(to.get()));
    } else {
      AE_TORCH(aoti_torch_copy_(to.get(), tensor_[kState].get(), 0));
    }
  }

  ae_linear_params p{};

 private:
  static constexpr const char* kNames[kOperands] = {
      "q", "k", "v", "decay", "beta", "initial_state", "cu_seqlens"};

  void check_operands(const Kernel& kernel) const {
    const ae_module_info& info = kernel.info;
    for (int i = 0; i < kOperands; ++i) {
      if (tensor_[i]) check_device(view_[i], q());
    }
    if (kernel.cuda != nullptr) {
      check_place(kernel, q());
    } else if (q().device != DeviceKind::kCpu) {
      not_implemented("q is on " + q().where() +
                      "; this kernel of linear attention was compiled for the CPU: use CPU "
                      "tensors (.cpu())");
    }
    for (const TensorView* x : {&q(), &k(), &v()}) check_rank4(*x, "[B, H, L, D]");
    if (q().dtype != info.dtype || k().dtype != info.dtype || v().dtype != info.dtype) {
      type_error(
          std::string("q, k and v must share the dtype that this kernel was compiled for, ") +
          dtype_name(info.dtype) + ", got " + dtype_name(q().dtype) + ", " + dtype_name(k().dtype) +
          ", " + dtype_name(v().dtype) + ": cast with .to()");
    }
    if (q().size[3] != info.D || v().size[3] != info.Dv) {
      value_error("head_dim=" + std::to_string(q().size[3]) + ", value head_dim=" +
                  std::to_string(v().size[3]) + ": this kernel was compiled for " +
                  std::to_string(info.D) + " and " + std::to_string(info.Dv));
    }
    expect_shape(k(), q().size, 4, "the shape of q, [B, Hk, L, D]");
    const int64_t v_size[4] = {q().size[0], v().size[1], q().size[2], v().size[3]};
    expect_shape(v(), v_size, 4, "[B, H, L, Dv] with the batch and length of q");
    const int64_t H = v().size[1], Hk = q().size[1];
    if (Hk == 0 ? H != 0 : H % Hk != 0) {
      value_error("v has " + std::to_string(H) + " heads, which is not a multiple of the " +
                  std::to_string(Hk) + " heads of q and k; repeat heads of q and k, or of v");
    }
  }

  void check_decay(const LinearSignature& want) {
    const TensorView& x = view_[kDecay];
    const int64_t size[4] = {p.B, p.H, p.L, q().size[3]};
    copy4(decay_size_, size);
    if (want.declared() && has(kDecay) != (want.decay() != 0)) {
      value_error(std::string("this kernel was compiled ") + (has(kDecay) ? "without" : "with") +
                  " decay; compile one for this call");
    }
    if (!has(kDecay)) return;
    channel_decay_ = x.rank == 4;
    if (x.rank == 1) {
      expect_shape(x, size + 1, 1, "[H], a number for each head of v");
      p.decay_stride[1] = x.stride[0];
    } else {
      expect_shape(x, size, channel_decay_ ? 4 : 3,
                   "decay is [H], [B, H, L] or [B, H, L, D] with the heads of v");
      for (int64_t d = 0; d < x.rank; ++d) p.decay_stride[d] = x.stride[d];
    }
    if (want.declared()) {
      if (channel_decay_ != (want.decay() == 2)) {
        value_error("decay has shape " + x.shape() + "; this kernel was compiled for " +
                    (want.decay() == 2 ? "[B, H, L, D]" : "[H] or [B, H, L]"));
      }
      check_dtype(x, want.decay_dtype(), "the type this kernel was compiled for");
    }
    p.decay = const_data(tensor_[kDecay]);
  }

  void check_beta(const LinearSignature& want) {
    if (want.declared() && has(kBeta) != want.beta()) {
      value_error(std::string("this kernel was compiled ") + (has(kBeta) ? "without" : "with") +
                  " beta; compile one for this call");
    }
    if (!has(kBeta)) return;
    const TensorView& x = view_[kBeta];
    expect_shape(x, v().size, 3, "[B, H, L] with the heads of v");
    if (want.declared()) {
      check_dtype(x, want.beta_dtype(), "the type this kernel was compiled for");
    }
    for (int d = 0; d < 3; ++d) p.beta_stride[d] = x.stride[d];
    p.beta = const_data(tensor_[kBeta]);
  }

  void check_starts() {
    p.sequences = p.B;
    if (!has(kStarts)) return;
    const TensorView& x = view_[kStarts];
    if (x.rank != 1 || x.size[0] == 0) {
      value_error("cu_seqlens must have shape [N + 1], got " + x.shape() +
                  "; it holds the running sum of the lengths, from 0");
    }
    if (x.dtype != AE_I32 && x.dtype != AE_I64) {
      type_error(std::string("cu_seqlens has ") + dtype_name(x.dtype) +
                 ", expected int32 or int64; cast it with .int()");
    }
    if (p.B != 1) {
      value_error("cu_seqlens needs packed operands of batch 1, got q " + q().shape() +
                  "; lay the sequences one after the other along L: [1, H, total, D]");
    }
    p.sequences = x.size[0] - 1;
    Tensor on_host;
    const bool on_device = x.device == DeviceKind::kCuda;
    if (on_device) {
      on_device_ = copy_as(tensor_[kStarts], x.size, 1, AE_I64, Place::of(x));
      p.first = static_cast<const int64_t*>(const_data(on_device_));
      // To read them would wait for the device; kernels clamp them.
      if (!sync_debug.load(std::memory_order_relaxed)) return;
      on_host = copy_as(tensor_[kStarts], x.size, 1, AE_I64);
    }
    const void* data = const_data(on_device ? on_host : tensor_[kStarts]);
    const int64_t step = on_device ? 1 : x.stride[0];
    const bool wide = on_device || x.dtype == AE_I64;
    starts_.resize(static_cast<size_t>(x.size[0]));
    int64_t before = 0;
    for (int64_t i = 0; i < x.size[0]; ++i) {
      const int64_t at = i * step;
      const int64_t start =
          wide ? static_cast<const int64_t*>(data)[at] : static_cast<const int32_t*>(data)[at];
      const auto element = [i](int64_t value) {
        return "cu_seqlens[" + std::to_string(i) + "]=" + std::to_string(value);
      };
      if (i == 0 && start != 0) value_error(element(start) + " must be 0: sequences lie from 0 on");
      if (start < before) {
        value_error(element(start) + " is less than the " + std::to_string(before) +
                    " before it; cu_seqlens must not decrease");
      }
      starts_[static_cast<size_t>(i)] = before = start;
    }
    if (before != p.L) {
      value_error("cu_seqlens[-1]=" + std::to_string(before) + " must be the length of q, " +
                  std::to_string(p.L) + " (q " + q().shape() + ")");
    }
    if (!on_device) p.first = starts_.data();
  }

  void check_state(const LinearSignature& want) {
    const int64_t size[4] = {p.sequences, p.H, q().size[3],
                             v().size[3] + (want.normalizer() ? 1 : 0)};
    copy4(state_size_, size);
    if (!has(kState)) return;
    expect_shape(view_[kState], size, 4,
                 want.normalizer() ? "[sequences, H, D, Dv + 1], the last column is z"
                                   : "[sequences, H, D, Dv]");
    check_dtype(view_[kState], accumulator_, "the accumulator type");
    const TensorView& x = view_[kState];
    if (!is_contiguous(x.size + 2, x.stride + 2, 2)) {  // kernels read a head's state as one block
      tensor_[kState] = copy_as(tensor_[kState], size, 4, accumulator_, Place::of(x));
      contiguous_strides(size, 4, p.state_stride);
    } else {
      copy4(p.state_stride, x.stride);
      p.state_stride[2] = size[3];
      p.state_stride[3] = 1;
    }
    p.state = const_data(tensor_[kState]);
  }

  Tensor tensor_[kOperands];
  TensorView view_[kOperands]{};
  std::vector<int64_t> starts_;
  Tensor on_device_;  // cu_seqlens where kernels read them
  int64_t state_size_[4], decay_size_[4];
  int32_t accumulator_ = AE_F32;
  bool channel_decay_ = false;
};

// What the fault word says, as ValueError or IndexError.
[[noreturn]] inline void raise_linear_fault(const ae_linear_params& p) {
  if (*p.fault == AE_POSITIVE_DECAY) {
    value_error(
        "decay is positive (or NaN) at some token, after decay_mod: it is the log of the factor "
        "by which the state is multiplied, and that must not exceed 1; pass for example "
        "torch.nn.functional.logsigmoid(x), -torch.nn.functional.softplus(x) or alpha.log() with "
        "alpha in [0, 1]");
  }
  const int32_t index = *p.fault - 1;
  throw std::out_of_range("captures[" + std::to_string(index) + "] of shape " +
                          shape_text(p.captures[index].size, p.captures[index].rank) +
                          ": an index is out of range; clamp it in the hook");
}

// The same on a GPU, or in a simulator.
inline void launch_linear_on_device(const CudaKernel& kernel, ae_linear_params& p,
                                    const TensorView& q) {
  const CudaTarget target = CudaTarget::of(kernel, q);
  CudaLinear launch(p, kernel, target.functions);
  Tensor workspace;
  void* memory = nullptr;
  if (const int64_t bytes = launch.workspace_bytes(); bytes > 0) {
    workspace = allocate_contiguous(&bytes, 1, AE_U8, Place::of(q));
    memory = workspace.data();
  }
  *p.fault = launch.run(memory, target.stream);
  if (*p.fault != 0) raise_linear_fault(p);
}

// Runs the module. Throws what `fault` says.
inline void launch_linear(const Kernel& kernel, ae_linear_params& p) {
  const double work = static_cast<double>(p.B) * static_cast<double>(p.H) *
                      static_cast<double>(p.L) * kernel.info.D * kernel.info.Dv * 2;
  p.threads = 1;
  if (work > kSerialMacs) {
    uint32_t threads;
    AE_TORCH(torch_get_num_threads(&threads));
    p.threads = static_cast<int32_t>(threads);
  }
  // A module takes the parameters of its own kind, which begin like ae_params.
  const auto* params = reinterpret_cast<const ae_params*>(&p);
  const Workspace workspace(kernel.workspace_bytes(params));
  const int32_t status = kernel.launch(params, workspace.data(), parallel_for);
  if (status != 0) {
    throw std::runtime_error("attnengine: kernel " + std::string(kernel.info.key) +
                             " failed with status " + std::to_string(status));
  }
  if (*p.fault != 0) raise_linear_fault(p);
}

}  // namespace ae
