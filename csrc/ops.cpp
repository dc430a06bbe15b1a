// The operators attnengine::forward and attnengine::backward, registered through torch's stable
// ABI: one binary serves every torch from 2.11 on. They check their arguments, allocate the results
// and launch a kernel module; nothing here depends on what the kernel computes.
#include "gradients.h"
#include "operators.h"
#include "reduce.h"

namespace ae {
namespace {

// forward(q, k, v, captures, kernel, scale, stats) -> (out, stats)
void forward(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor q = Tensor::take(stack[0]), k = Tensor::take(stack[1]), v = Tensor::take(stack[2]);
  const TensorList capture_tensors(stack[3]);
  const Kernel& kernel = check_kernel(static_cast<int64_t>(stack[4]), AE_FORWARD);
  const double scale = take_scale(stack[5]);
  const bool want_stats = take_bool(stack[6]);
  const ae_module_info& info = kernel.info;

  const TensorView qv = view("q", q), kv = view("k", k), vv = view("v", v);
  check_operands(kernel, qv, kv, vv);
  Captures captures(kernel, capture_tensors, qv);
  const bool empty = qv.size[0] == 0 || qv.size[1] == 0 || qv.size[2] == 0;
  std::optional<CudaTarget> device;  // before memory is taken: it may have to refuse
  if (kernel.cuda != nullptr && !empty) device.emplace(CudaTarget::of(*kernel.cuda, qv));

  ae_params p{};
  int32_t fault = 0;
  fill_params(p, q, k, v, qv, kv, vv, captures, scale, &fault);
  const int64_t out_size[4] = {p.B, p.Hq, p.L, info.Dv};
  Tensor out = allocate_like(qv, out_size, info.dtype, p.out_stride);
  Tensor stats;
  if (want_stats) {
    const int64_t stats_size[4] = {info.stats, p.B, p.Hq, p.L};
    stats = allocate_contiguous(stats_size, 4, accumulator_dtype(info), Place::of(qv));
  } else {
    stats = undefined_tensor();
  }
  if (!empty) {
    p.out = out.data();
    p.stats = want_stats ? stats.data() : nullptr;
    if (device) {
      launch_on_device(*kernel.cuda, *device, p, qv);
    } else {
      launch(kernel, p);
    }
  }
  stack[0] = out.give();
  stack[1] = stats.give();
}

// The gradient of k or v. A batch of keys shared by all of q's batch gets one gradient per batch
// element in scratch, block after block, then their sum.
class KeyGradient {
 public:
  KeyGradient(const TensorView& x, int64_t batch, int32_t dtype)
      : shared_(x.size[0] != batch), batch_(batch), dtype_(dtype) {
    grad_ = allocate_like(x, x.size, dtype, stride_);
    block_ = element_count(x.size, 4);
    if (shared_) {
      const int64_t scratch_size[2] = {batch, block_};
      scratch_ = allocate_contiguous(scratch_size, 2, dtype);
    }
  }
  void* fill(int64_t* stride) const {
    copy4(stride, stride_);
    if (!shared_) return grad_.data();
    stride[0] = block_;
    return scratch_.data();
  }
  void zero() const {
    if (block_ > 0) {
      std::memset(grad_.data(), 0, static_cast<size_t>(block_ * element_bytes(dtype_)));
    }
  }
  void finish(int32_t threads) const {
    if (!shared_ || block_ == 0) return;
    BatchSum sum{scratch_.data(), grad_.data(), batch_, block_, dtype_};
    parallel_for(sum.tasks(), threads, BatchSum::run, &sum);
  }
  StableIValue give() { return grad_.give(); }

 private:
  bool shared_;
  int64_t batch_, block_;
  int32_t dtype_;
  int64_t stride_[4];
  Tensor grad_, scratch_;
};

// backward(q, k, v, captures, out, stats, dout, dstats?, kernel, scale) -> (dq, dk, dv, dcaptures)
void backward(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor q = Tensor::take(stack[0]), k = Tensor::take(stack[1]), v = Tensor::take(stack[2]);
  const TensorList capture_tensors(stack[3]);
  const Tensor out = Tensor::take(stack[4]);
  Tensor stats = Tensor::take(stack[5]);
  const Tensor dout = Tensor::take(stack[6]);
  Tensor dstats = take_optional(stack[7]);
  const Kernel& kernel = check_kernel(static_cast<int64_t>(stack[8]), AE_BACKWARD);
  const double scale = take_scale(stack[9]);
  const ae_module_info& info = kernel.info;

  const TensorView qv = view("q", q), kv = view("k", k), vv = view("v", v);
  check_operands(kernel, qv, kv, vv);
  Captures captures(kernel, capture_tensors, qv);
  const TensorView outv = view("out", out), doutv = view("dout", dout);
  check_like_out(info, outv, qv);
  check_like_out(info, doutv, qv);
  const TensorView statsv = view("stats", stats);
  check_stats(info, statsv, qv, info.stats, info.stats);
  stats = contiguous_stats(std::move(stats), statsv);

  ae_params p{};
  int32_t fault = 0;
  fill_params(p, q, k, v, qv, kv, vv, captures, scale, &fault);
  if (dstats) {
    const TensorView dstatsv = view("dstats", dstats);
    check_stats(info, dstatsv, qv, info.user_stats, info.stats);
    dstats = contiguous_stats(std::move(dstats), dstatsv);
    if (info.user_stats > 0) p.dstats = const_data(dstats);
  }
  // The shim only hands out mutable pointers through the field that forward writes.
  p.out = const_cast<void*>(const_data(out));
  copy4(p.out_stride, outv.stride);
  p.stats = const_cast<void*>(const_data(stats));
  p.dout = const_data(dout);
  copy4(p.dout_stride, doutv.stride);

  Tensor dq = allocate_like(qv, qv.size, info.dtype, p.dq_stride);
  KeyGradient dk(kv, p.B, info.dtype), dv(vv, p.B, info.dtype);
  CaptureGradients dcaptures(info, captures);
  if (p.B != 0 && p.Hq != 0 && p.L != 0) {
    p.dq = dq.data();
    p.dk = dk.fill(p.dk_stride);
    p.dv = dv.fill(p.dv_stride);
    launch(kernel, p);
    dk.finish(p.threads);
    dv.finish(p.threads);
  } else {
    dk.zero();
    dv.zero();
  }
  stack[0] = dq.give();
  stack[1] = dk.give();
  stack[2] = dv.give();
  stack[3] = dcaptures.give();
}

}  // namespace
}  // namespace ae

STABLE_TORCH_LIBRARY(attnengine, m) {
  m.def(
      "forward(Tensor q, Tensor k, Tensor v, Tensor[] captures, int kernel, float scale, "
      "bool stats) -> (Tensor, Tensor)");
  m.def(
      "backward(Tensor q, Tensor k, Tensor v, Tensor[] captures, Tensor out, Tensor stats, "
      "Tensor dout, Tensor? dstats, int kernel, float scale) -> (Tensor, Tensor, Tensor, "
      "Tensor[])");
}

STABLE_TORCH_LIBRARY_IMPL(attnengine, CPU, m) {
  m.impl("forward", ae::forward);
  m.impl("backward", ae::backward);
}

// Reached when any argument is a CUDA tensor; the argument checks name it and refuse.
STABLE_TORCH_LIBRARY_IMPL(attnengine, CUDA, m) {
  m.impl("forward", ae::forward);
  m.impl("backward", ae::backward);
}
