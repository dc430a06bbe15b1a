// The operators attnengine::linear_forward and attnengine::linear_backward: linear attention by
// CPU modules (templates/common/linear_abi.h). They check their arguments, allocate the results and
// launch. `cu_seqlens` is read here, before the launch; a positive log-decay is found by the
// kernel.
#include "linear.h"

namespace ae {
namespace {

// linear_forward(q, k, v, decay?, beta?, state?, cu_seqlens?, captures, kernel, scale, want_state)
//   -> (out, state): state is None when it was not asked for
void linear_forward(StableIValue* stack, uint64_t, uint64_t) {
  LinearCall call(stack);
  const TensorList capture_tensors(stack[7]);
  const Kernel& kernel = check_linear_kernel(static_cast<int64_t>(stack[8]), AE_LINEAR_FORWARD);
  const double scale = std::bit_cast<double>(stack[9]);
  const bool want_state = take_bool(stack[10]);
  call.check(kernel, scale);
  Captures captures(kernel, capture_tensors, call.q());

  ae_linear_params& p = call.p;
  int32_t fault = 0;
  p.fault = &fault;
  p.captures = captures.data();
  p.capture_count = static_cast<int32_t>(captures.count());
  Tensor out = allocate_pooled_like(call.v(), call.v().size, kernel.info.dtype, p.out_stride);
  Tensor state =
      want_state ? allocate_pooled(call.state_size(), 4, call.accumulator(), Place::of(call.q()))
                 : undefined_tensor();
  if (!call.empty()) {
    p.out = out.data();
    p.final_state = want_state ? state.data() : nullptr;
    if (kernel.cuda != nullptr) {
      launch_linear_on_device(*kernel.cuda, p, call.q());
    } else {
      launch_linear(kernel, p);
    }
  } else if (want_state) {
    call.carry_state(state);
  }
  stack[0] = out.give();
  stack[1] = state.give();
}

// Bits of `wanted`.
enum Wanted { kDq = 1, kDk = 2, kDv = 4, kDdecay = 8, kDbeta = 16, kDstate = 32 };

// The gradients of what the hooks captured, each in the shape of its hook's operand.
class HookGradients {
 public:
  HookGradients(const ae_module_info& info, const LinearCall& call) {
    const TensorView& v = call.v();
    const int64_t* size[kHooks] = {call.q().size, call.k().size, v.size, call.decay_size(), v.size};
    for (int hook = 0; hook < kHooks; ++hook) {
      const int64_t rank = hook == kDecayMod ? call.decay_rank() : 4;
      for (uint64_t n = info.grad_mask >> (8 * hook) & 255; n > 0; --n) {
        grads_.push_back(allocate_pooled(size[hook], rank, call.accumulator()));
        data_.push_back(grads_.back().data());
      }
    }
  }
  void* const* data() const { return data_.data(); }
  void clear_all() const {
    for (const Tensor& grad : grads_) AE_TORCH(aoti_torch_zero_(grad.get()));
  }
  StableIValue give() {
    StableListHandle list;
    AE_TORCH(torch_new_list_reserve_size(grads_.size(), &list));
    for (Tensor& grad : grads_) AE_TORCH(torch_list_push_back(list, grad.give()));
    return std::bit_cast<StableIValue>(list);
  }

 private:
  static constexpr int kHooks = 5, kDecayMod = 3;
  std::vector<Tensor> grads_;
  std::vector<void*> data_;
};

void clear_operand_gradient(void* grad, const TensorView& like) {
  if (grad != nullptr) clear(grad, element_count(like.size, 4) * element_bytes(like.dtype));
}

// linear_backward(q, k, v, decay?, beta?, state?, cu_seqlens?, captures, dout?, dstate?, kernel,
//   scale, wanted) -> (dq, dk, dv, ddecay, dbeta, dinitial, hook_grads)
void linear_backward(StableIValue* stack, uint64_t, uint64_t) {
  LinearCall call(stack);
  const TensorList capture_tensors(stack[7]);
  const Tensor dout = take_optional(stack[8]);
  Tensor dfinal = take_optional(stack[9]);
  const Kernel& kernel = check_linear_kernel(static_cast<int64_t>(stack[10]), AE_LINEAR_BACKWARD);
  const double scale = std::bit_cast<double>(stack[11]);
  const auto wanted = static_cast<int64_t>(stack[12]);
  call.check(kernel, scale);
  Captures captures(kernel, capture_tensors, call.q());

  ae_linear_params& p = call.p;
  const int32_t accumulator = call.accumulator();
  int32_t fault = 0;
  p.fault = &fault;
  p.captures = captures.data();
  p.capture_count = static_cast<int32_t>(captures.count());
  if (dout) {
    const TensorView x = view("dout", dout);
    check_device(x, call.q());
    check_dtype(x, kernel.info.dtype, "q's type");
    expect_shape(x, call.v().size, 4, "the shape of the output, [B, H, L, Dv]");
    p.dout = const_data(dout);
    copy4(p.dout_stride, x.stride);
  }
  if (dfinal) {
    const TensorView x = view("dstate", dfinal);
    check_device(x, call.q());
    check_dtype(x, accumulator, "the accumulator type");
    expect_shape(x, call.state_size(), 4, "the shape of the final state");
    if (!is_contiguous(x.size, x.stride, 4)) {
      dfinal = copy_as(dfinal, call.state_size(), 4, accumulator);
    }
    p.dfinal = const_data(dfinal);
  }

  const auto result = [&](int bit, bool exists, const int64_t* size, int64_t rank, int32_t dtype,
                          void** data) {
    if ((wanted & bit) == 0 || !exists) return undefined_tensor();
    Tensor grad = allocate_pooled(size, rank, dtype);
    *data = grad.data();
    return grad;
  };
  const int32_t dtype = kernel.info.dtype;
  Tensor dq = result(kDq, true, call.q().size, 4, dtype, &p.dq);
  Tensor dk = result(kDk, true, call.k().size, 4, dtype, &p.dk);
  Tensor dv = result(kDv, true, call.v().size, 4, dtype, &p.dv);
  Tensor ddecay = result(kDdecay, call.has(LinearCall::kDecay), call.decay_size(),
                         call.decay_rank(), accumulator, &p.ddecay);
  Tensor dbeta =
      result(kDbeta, call.has(LinearCall::kBeta), call.v().size, 3, accumulator, &p.dbeta);
  Tensor dstate =
      result(kDstate, call.has(LinearCall::kState), call.state_size(), 4, accumulator, &p.dstate);
  HookGradients hooks(kernel.info, call);
  p.hook_grads = hooks.data();
  if (!call.empty()) {
    launch_linear(kernel, p);
  } else {                                   // without tokens the final state is the initial one
    clear_operand_gradient(p.dq, call.q());  // of the heads of q and k, where v has none
    clear_operand_gradient(p.dk, call.k());
    hooks.clear_all();
    const int64_t bytes = element_count(call.state_size(), 4) * element_bytes(accumulator);
    if (p.dstate != nullptr && p.dfinal != nullptr && bytes > 0) {
      std::memcpy(p.dstate, p.dfinal, static_cast<size_t>(bytes));
    } else if (p.dstate != nullptr) {
      clear(p.dstate, bytes);
    }
  }
  StableIValue results[7] = {dq.give(),    dk.give(),     dv.give(),   ddecay.give(),
                             dbeta.give(), dstate.give(), hooks.give()};
  for (int i = 0; i < 7; ++i) stack[i] = results[i];
}

}  // namespace
}  // namespace ae

STABLE_TORCH_LIBRARY_FRAGMENT(attnengine, m) {
  m.def(
      "linear_forward(Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? beta, Tensor? state, "
      "Tensor? cu_seqlens, Tensor[] captures, int kernel, float scale, bool want_state) -> "
      "(Tensor, Tensor)");
  m.def(
      "linear_backward(Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? beta, Tensor? state, "
      "Tensor? cu_seqlens, Tensor[] captures, Tensor? dout, Tensor? dstate, int kernel, "
      "float scale, int wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[])");
}

STABLE_TORCH_LIBRARY_IMPL(attnengine, CPU, m) {
  m.impl("linear_forward", ae::linear_forward);
  m.impl("linear_backward", ae::linear_backward);
}

// Reached when any argument is a CUDA tensor; the argument checks name it and refuse.
STABLE_TORCH_LIBRARY_IMPL(attnengine, CUDA, m) {
  m.impl("linear_forward", ae::linear_forward);
  m.impl("linear_backward", ae::linear_backward);
}
