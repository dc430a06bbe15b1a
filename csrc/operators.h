// What the operators take from torch's stack and give back, and how they launch a CUDA kernel.
#pragma once
#include <torch/csrc/stable/library.h>

#include <limits>

#include "cuda_launch.h"
#include "launch.h"
#include "stream.h"

namespace ae {

// Kernels keep dead keys at -inf through the scale, so it must be positive.
inline double take_scale(StableIValue value) {
  const double scale = std::bit_cast<double>(value);
  if (!(scale > 0) || scale > std::numeric_limits<double>::max()) {
    value_error("scale=" + std::to_string(scale) +
                " must be positive and finite; put its sign into q (attnengine.attention does)");
  }
  return scale;
}

inline bool take_bool(StableIValue value) {
  bool result;
  std::memcpy(&result, &value, sizeof(result));
  return result;
}

inline Tensor allocate_like(const TensorView& like, const int64_t* size, int32_t dtype,
                            int64_t* stride) {
  dense_strides_like(like.stride, size, stride);
  return allocate(size, stride, 4, dtype, Place::of(like));
}

// The same for calls that take less time than the first touch of their results.
inline Tensor allocate_pooled_like(const TensorView& like, const int64_t* size, int32_t dtype,
                                   int64_t* stride) {
  dense_strides_like(like.stride, size, stride);
  return allocate_pooled(size, stride, 4, dtype, Place::of(like));
}

// A `Tensor?` argument: null, or a heap cell that the callee frees.
inline Tensor take_optional(StableIValue& value) {
  auto* cell = std::bit_cast<StableIValue*>(std::exchange(value, 0));
  if (cell == nullptr) return Tensor();
  Tensor tensor = Tensor::take(*cell);
  delete cell;
  return tensor;
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

inline void launch_on_device(const CudaKernel& kernel, const CudaTarget& target, const ae_params& p,
                             const TensorView& q) {
  CudaParams params(p, kernel.info().mask_captures);
  params.share_work(kernel, target.functions);
  Tensor workspace;
  void* memory = nullptr;
  if (const int64_t bytes = params.workspace_bytes(); bytes > 0) {
    workspace = allocate_contiguous(&bytes, 1, AE_U8, Place::of(q));
    memory = workspace.data();
  }
  launch_cuda(kernel, target.functions, params, memory, target.stream);
}

}  // namespace ae
