// The operators attnengine::forward and attnengine::backward, registered through torch's stable
// ABI: one binary serves every torch from 2.11 on. They check their arguments, allocate the results
// and launch a kernel module; nothing here depends on what the kernel computes.
#include <torch/csrc/stable/library.h>

#include <limits>

#include "cuda_launch.h"
#include "host_api.h"
#include "launch.h"
#include "reduce.h"
#include "stream.h"

namespace ae {
namespace {

// Kernels keep dead keys at -inf through the scale, so it must be positive.
double take_scale(StableIValue value) {
  const double scale = std::bit_cast<double>(value);
  if (!(scale > 0) || scale > std::numeric_limits<double>::max()) {
    value_error("scale=" + std::to_string(scale) +
                " must be positive and finite; put its sign into q (attnengine.attention does)");
  }
  return scale;
}

bool take_bool(StableIValue value) {
  bool result;
  std::memcpy(&result, &value, sizeof(result));
  return result;
}

Tensor allocate_like(const TensorView& like, const int64_t* size, int32_t dtype, int64_t* stride) {
  dense_strides_like(like.stride, size, stride);
  return allocate(size, stride, 4, dtype, Place::of(like));
}

// Where a CUDA kernel runs, with its functions loaded there: on torch's current stream of q's
// device, or in the simulator when q is on the CPU.
struct CudaTarget {
  ae_cu_stream stream;
  const CudaFunctions& functions;

  static CudaTarget of(const CudaKernel& kernel, const TensorView& q) {
    if (q.device != DeviceKind::kCuda) {
      const ae_driver* driver = simulator();
      if (driver == nullptr) value_error("the simulator was removed during a call");
      return {nullptr, kernel.on(*driver, 0, nullptr)};
    }
    const ae_driver& driver = cuda_driver();
    const ae_cu_stream stream = current_stream(q.device_index);
    return {stream, kernel.on(driver, q.device_index, stream)};
  }
};

void launch_on_device(const CudaKernel& kernel, const CudaTarget& target, const ae_params& p,
                      const TensorView& q) {
  CudaParams params(p, kernel.info().mask_captures);
  Tensor workspace;
  void* memory = nullptr;
  if (const int64_t bytes = params.workspace_bytes(); bytes > 0) {
    workspace = allocate_contiguous(&bytes, 1, AE_U8, Place::of(q));
    memory = workspace.data();
  }
  launch_cuda(kernel, target.functions, params, memory, target.stream);
}

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

// Accumulators for the captured tensors that get gradients; `give` casts them to the captured
// types.
class CaptureGradients {
 public:
  CaptureGradients(const ae_module_info& info, Captures& captures) : captures_(captures) {
    const int32_t dtype = accumulator_dtype(info);
    for (size_t i = 0; i < captures.count() && i < 64; ++i) {
      if ((info.grad_mask >> i & 1) != 0) indices_[count_++] = static_cast<uint8_t>(i);
    }
    accumulators_ = count_ > 0 ? std::make_unique<Tensor[]>(count_) : nullptr;
    for (size_t n = 0; n < count_; ++n) {
      ae_capture& c = captures.data()[indices_[n]];
      accumulators_[n] = allocate_contiguous(c.size, c.rank, dtype);
      c.grad = accumulators_[n].data();
      const int64_t bytes = element_count(c.size, c.rank) * element_bytes(dtype);
      clear(c.grad, bytes);
    }
    dtype_ = dtype;
  }
  StableIValue give() {
    for (size_t n = 0; n < count_; ++n) {
      const ae_capture& c = captures_.data()[indices_[n]];
      if (c.dtype != dtype_) accumulators_[n] = copy_as(accumulators_[n], c.size, c.rank, c.dtype);
    }
    StableListHandle list;
    AE_TORCH(torch_new_list_reserve_size(count_, &list));
    for (size_t n = 0; n < count_; ++n) {
      AE_TORCH(torch_list_push_back(list, accumulators_[n].give()));
    }
    return std::bit_cast<StableIValue>(list);
  }

 private:
  Captures& captures_;
  uint8_t indices_[64];
  size_t count_ = 0;
  int32_t dtype_;
  std::unique_ptr<Tensor[]> accumulators_;
};

// Statistics reach kernels contiguous; autograd may hand over an expanded or transposed gradient.
Tensor contiguous_stats(Tensor tensor, const TensorView& x) {
  if (is_contiguous(x.size, x.stride, x.rank)) return tensor;
  return copy_as(tensor, x.size, x.rank, x.dtype);
}

// A `Tensor?` argument: null, or a heap cell that the callee frees.
Tensor take_optional(StableIValue& value) {
  auto* cell = std::bit_cast<StableIValue*>(std::exchange(value, 0));
  if (cell == nullptr) return Tensor();
  Tensor tensor = Tensor::take(*cell);
  delete cell;
  return tensor;
}

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
