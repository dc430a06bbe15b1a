// What the backward operators share.
#pragma once
#include "launch.h"

namespace ae {

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
inline Tensor contiguous_stats(Tensor tensor, const TensorView& x) {
  if (is_contiguous(x.size, x.stride, x.rank)) return tensor;
  return copy_as(tensor, x.size, x.rank, x.dtype);
}

}  // namespace ae
