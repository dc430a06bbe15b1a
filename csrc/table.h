// A table argument of the operators on sequences: int32, in q's memory, readable by the host when
// its values are to be checked.
#pragma once
#include "cuda_launch.h"
#include "operators.h"

namespace ae {

class Table {
 public:
  // `tensor` may be none.
  Table(const char* name, Tensor tensor, int64_t rank) : tensor_(std::move(tensor)) {
    if (!tensor_) return;
    view_ = view(name, tensor_);
    if (view_.rank != rank) {
      value_error(std::string(name) + " must be " + std::to_string(rank) + "-D, got shape " +
                  view_.shape());
    }
    check_dtype(view_, AE_I32, "the type of lengths and tables");
    if (size(rank - 1) > 1 && view_.stride[rank - 1] != 1) {
      value_error(std::string(name) + " " + view_.shape() + " has stride " +
                  std::to_string(view_.stride[rank - 1]) +
                  " in its last dimension; pass it contiguous: .contiguous()");
    }
  }
  explicit operator bool() const { return static_cast<bool>(tensor_); }
  int64_t size(int64_t d) const { return view_.size[d]; }
  int64_t pitch() const { return view_.stride[0]; }
  void check_size(int64_t d, int64_t want, const char* what) const {
    if (!tensor_ || size(d) == want) return;
    value_error(std::string(view_.name) + " has shape " + view_.shape() + "; it needs " +
                std::to_string(want) + " " + what);
  }
  void check_beside(const TensorView& x) const {
    if (tensor_) check_device(view_, x);
  }
  const int32_t* data() const {
    return tensor_ ? static_cast<const int32_t*>(const_data(tensor_)) : nullptr;
  }
  // The same values in memory that the host reads. Waits for the device when they lie there.
  const int32_t* host() {
    if (!tensor_ || view_.device != DeviceKind::kCuda) return data();
    copy_ = copy_as(tensor_, view_.size, view_.rank, AE_I32);
    return static_cast<const int32_t*>(const_data(copy_));
  }
  // Of what `host` returned.
  int64_t host_pitch() const { return copy_ ? size(1) : pitch(); }

 private:
  Tensor tensor_, copy_;
  TensorView view_{};
};

}  // namespace ae
