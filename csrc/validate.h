// Argument checks of the operators. Torch-free: the operators and the fake (tracing) path share
// them, so both give the same text. Every message names the argument, its value, the limit and the
// next step.
#pragma once
#include <string>

#include "message.h"
#include "registry.h"

namespace ae {

enum class DeviceKind : int32_t { kCpu = 0, kCuda = 1, kMeta = 2, kOther = 3 };

// A tensor argument as the checks and the launch see it; sizes and strides are borrowed.
struct TensorView {
  const char* name;
  const void* data;
  const int64_t* size;
  const int64_t* stride;
  int64_t rank;
  int32_t dtype;  // ae_dtype, or -1 for a type that no kernel takes
  DeviceKind device;
  int32_t device_index;

  std::string shape() const { return shape_text(size, rank); }
  std::string where() const {
    static constexpr const char* kNames[] = {"cpu", "cuda", "meta", "another device"};
    std::string text = kNames[static_cast<int32_t>(device)];
    return device == DeviceKind::kCuda ? text + ":" + std::to_string(device_index) : text;
  }
};

inline void check_device(const TensorView& x, const TensorView& q) {
  if (x.device != q.device || x.device_index != q.device_index) {
    value_error(std::string(x.name) + " is on " + x.where() + " but q is on " + q.where() +
                "; move them to one device with .to()");
  }
}

// CPU kernels run on CPU tensors; CUDA kernels on CUDA tensors, and in a simulator on CPU tensors.
inline void check_place(const Kernel& kernel, const TensorView& q) {
  if (q.device == DeviceKind::kOther) {
    not_implemented("q is on " + q.where() + "; attnengine runs on CPU and CUDA tensors");
  }
  if (kernel.cuda == nullptr && q.device == DeviceKind::kCuda) {
    if (kernel.info.kind == AE_BACKWARD) {
      not_implemented("q is on " + q.where() +
                      "; CUDA kernels have no gradient in this version: call the forward pass "
                      "under torch.no_grad(), or detach q, k and v");
    }
    value_error("q is on " + q.where() +
                " but this kernel was compiled for the CPU; compile one for CUDA tensors with "
                "attnengine.compile, or use CPU tensors (.cpu())");
  }
  if (kernel.cuda != nullptr && q.device == DeviceKind::kCpu && simulator() == nullptr) {
    value_error("q is on cpu but this kernel was compiled for sm_" +
                std::to_string(kernel.cuda->info().target) +
                "; move q, k and v to a CUDA device (.cuda()), or install a simulator with "
                "attnengine.library.install_driver");
  }
}

inline void check_rank4(const TensorView& x, const char* layout) {
  if (x.rank == 4) return;
  value_error(std::string(x.name) + " must be 4-D " + layout + ", got shape " + x.shape() +
              "; add or merge dimensions with unsqueeze/reshape");
}

inline void check_dtype(const TensorView& x, int32_t want, const char* why) {
  if (x.dtype == want) return;
  type_error(std::string(x.name) + " has " + dtype_name(x.dtype) + ", expected " +
             dtype_name(want) + " (" + why + "); cast it with .to()");
}

// kOfQ: K and V have q's batch, or 1. kAny: tables say which of their batch rows a sequence reads.
enum class Batches { kOfQ, kAny };

inline void check_operands(const Kernel& kernel, const TensorView& q, const TensorView& k,
                           const TensorView& v, Batches batches = Batches::kOfQ) {
  const ae_module_info& info = kernel.info;
  for (const TensorView* x : {&q, &k, &v}) {
    check_device(*x, q);
    check_rank4(*x, "[B, H, L, D]");
  }
  check_place(kernel, q);
  if (q.dtype != info.dtype || k.dtype != info.dtype || v.dtype != info.dtype) {
    if (q.dtype == k.dtype && q.dtype == v.dtype) {
      check_dtype(q, info.dtype, "the type this kernel was compiled for");
    }
    type_error(std::string("q, k and v must share one dtype, got ") + dtype_name(q.dtype) + ", " +
               dtype_name(k.dtype) + ", " + dtype_name(v.dtype) +
               (kernel.cuda != nullptr ? "; CUDA kernels take bfloat16 and float16"
                                       : "; supported are float32, float64, bfloat16 and float16") +
               ": cast with .to()");
  }
  if (k.size[3] != q.size[3]) {
    value_error("k has head_dim " + std::to_string(k.size[3]) + " but q has " +
                std::to_string(q.size[3]) + " (q " + q.shape() + ", k " + k.shape() +
                "); the last dimension of q and k must agree");
  }
  if (q.size[3] != info.D || v.size[3] != info.Dv) {
    value_error("head_dim=" + std::to_string(q.size[3]) +
                ", value head_dim=" + std::to_string(v.size[3]) +
                ": this kernel was compiled for " + std::to_string(info.D) + " and " +
                std::to_string(info.Dv) + "; compile one for these shapes with attnengine.compile");
  }
  for (const TensorView* x : {&k, &v}) {
    if (batches == Batches::kOfQ && x->size[0] != q.size[0] && x->size[0] != 1) {
      value_error(std::string(x->name) + " has batch " + std::to_string(x->size[0]) +
                  " but q has " + std::to_string(q.size[0]) + " (q " + q.shape() + ", " + x->name +
                  " " + x->shape() + "); it must be equal, or 1 to share keys and values");
    }
  }
  if (k.size[1] != v.size[1] || k.size[2] != v.size[2]) {
    value_error("k and v must have the same heads and length, got k " + k.shape() + " and v " +
                v.shape());
  }
  constexpr int64_t kLimit = int64_t(1) << 30;  // kernels index in 32 bits
  for (const TensorView* x : {&q, &k}) {
    for (int d = 0; d < 3; ++d) {
      if (x->size[d] >= kLimit) {
        value_error(std::string(x->name) + " has shape " + x->shape() +
                    "; batch, heads and lengths must stay below 2**30: split the call");
      }
    }
  }
  const int64_t Hq = q.size[1], Hkv = k.size[1];
  if (Hkv == 0 ? Hq != 0 : Hq % Hkv != 0) {
    value_error("q has " + std::to_string(Hq) + " heads, which is not a multiple of the " +
                std::to_string(Hkv) +
                " heads of k and v; grouped-query attention needs Hq % Hkv == 0");
  }
}

inline void check_capture_count(const ae_module_info& info, int64_t count) {
  if (count == info.capture_count) return;
  value_error("captures has " + std::to_string(count) + " tensors, this kernel reads " +
              std::to_string(info.capture_count) + "; pass the spec's captured tensors in order");
}

inline void check_capture(const Kernel& kernel, int32_t index, const TensorView& x,
                          const TensorView& q) {
  const bool known = x.dtype >= 0 && x.rank <= AE_MAX_RANK && x.device == q.device &&
                     x.device_index == q.device_index;
  const bool expected = !kernel.has_signature || (x.rank == kernel.captures[index].rank &&
                                                  x.dtype == kernel.captures[index].dtype);
  if (known && expected) return;
  const std::string name = "captures[" + std::to_string(index) + "]";
  if (x.device != q.device || x.device_index != q.device_index) {
    value_error(name + " is on " + x.where() + " but q is on " + q.where() +
                "; move it there with .to()");
  }
  if (x.rank > AE_MAX_RANK) {
    value_error(name + " has " + std::to_string(x.rank) + " dimensions (shape " + x.shape() +
                "), the limit is " + std::to_string(AE_MAX_RANK) + "; flatten some of them");
  }
  if (x.dtype < 0) {
    type_error(name +
               " has a dtype that kernels cannot read; cast it to a real float, an integer "
               "up to 64 bits or bool");
  }
  const CaptureSignature& want = kernel.captures[index];
  value_error(name + " is " + dtype_name(x.dtype) + " of rank " + std::to_string(x.rank) +
              ", the kernel was compiled for " + dtype_name(want.dtype) + " of rank " +
              std::to_string(want.rank) + "; compile one for the new tensor");
}

// The remaining arguments of backward: `out` and `dout` like out, `stats` [stats, B, Hq, L].
inline void check_like_out(const ae_module_info& info, const TensorView& x, const TensorView& q) {
  check_device(x, q);
  check_dtype(x, info.dtype, "q's type");
  const int64_t want[4] = {q.size[0], q.size[1], q.size[2], info.Dv};
  if (x.rank != 4 || x.size[0] != want[0] || x.size[1] != want[1] || x.size[2] != want[2] ||
      x.size[3] != want[3]) {
    value_error(std::string(x.name) + " must have the output's shape " + shape_text(want, 4) +
                ", got " + x.shape());
  }
}

inline int32_t accumulator_dtype(const ae_module_info& info) {
  return info.dtype == AE_F64 ? AE_F64 : AE_F32;
}

// `rows_min`..`rows_max`: how many statistics the first dimension may hold.
inline void check_stats(const ae_module_info& info, const TensorView& x, const TensorView& q,
                        int64_t rows_min, int64_t rows_max) {
  check_device(x, q);
  check_dtype(x, accumulator_dtype(info), "the accumulator type");
  if (x.rank != 4 || x.size[0] < rows_min || x.size[0] > rows_max || x.size[1] != q.size[0] ||
      x.size[2] != q.size[1] || x.size[3] != q.size[2]) {
    const int64_t want[4] = {rows_max, q.size[0], q.size[1], q.size[2]};
    value_error(std::string(x.name) + " must have shape " + shape_text(want, 4) + ", got " +
                x.shape() + "; pass the statistics that forward returned with stats=True");
  }
}

inline const Kernel& check_kernel(int64_t id, ae_kind kind) {
  const Kernel* kernel = find_kernel(id);
  if (kernel == nullptr) {
    value_error("kernel=" + std::to_string(id) +
                ": no such kernel is loaded in this process; load it with "
                "attnengine.library.load_kernel");
  }
  if (kernel->cuda != nullptr && kind == AE_BACKWARD) {
    not_implemented("kernel=" + std::to_string(id) +
                    ": CUDA kernels have no gradient in this version; call the forward pass under "
                    "torch.no_grad(), or detach q, k and v");
  }
  if (kernel->info.kind != kind) {
    value_error("kernel=" + std::to_string(id) + " is a " +
                (kind == AE_FORWARD ? "backward" : "forward") + " kernel, this operator needs a " +
                (kind == AE_FORWARD ? "forward" : "backward") + " one");
  }
  return *kernel;
}

}  // namespace ae
