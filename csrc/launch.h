// What forward and backward launches share: parameters, captured tensors, workspace, the thread
// pool and the fault report.
#pragma once
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

#include "common/sequences.h"
#include "parallel.h"
#include "tensor.h"
#include "workspace.h"

namespace ae {

inline void torch_pool(int64_t workers, void (*body)(int64_t, int64_t, void*), void* ctx) {
  AE_TORCH(torch_parallel_for(0, workers, 1, body, ctx));
}

inline void parallel_for(int64_t n, int32_t threads, ae_task task, void* arg) {
  run_tasks<torch_pool>(n, threads, task, arg);
}

// Zeroes a buffer with the pool: one core writes half as fast as the memory takes it.
inline void clear(void* data, int64_t bytes) {
  struct Range {
    char* data;
    int64_t bytes;
  } range{static_cast<char*>(data), bytes};
  constexpr int64_t kBlock = int64_t{1} << 20;
  const auto clear_block = [](void* arg, int64_t block, int32_t) {
    const auto* r = static_cast<Range*>(arg);
    const int64_t left = r->bytes - block * kBlock;
    std::memset(r->data + block * kBlock, 0, static_cast<size_t>(left < kBlock ? left : kBlock));
  };
  uint32_t threads = 1;
  if (bytes > kLargeBufferBytes) AE_TORCH(torch_get_num_threads(&threads));
  parallel_for((bytes + kBlock - 1) / kBlock, static_cast<int32_t>(threads), clear_block, &range);
}

// The launch's view of the captured tensors, in the kernel's order.
class Captures {
 public:
  Captures(const Kernel& kernel, const TensorList& tensors, const TensorView& q)
      : count_(tensors.size()) {
    check_capture_count(kernel.info, static_cast<int64_t>(count_));
    if (count_ > TensorList::kInline) more_ = std::make_unique<ae_capture[]>(count_);
    for (size_t i = 0; i < count_; ++i) {
      const TensorView x = view("captures", tensors[i]);
      check_capture(kernel, static_cast<int32_t>(i), x, q);
      ae_capture& c = data()[i];
      c.data = const_data(tensors[i]);
      c.grad = nullptr;
      c.rank = static_cast<int32_t>(x.rank);
      c.dtype = x.dtype;
      for (int64_t d = 0; d < x.rank; ++d) {
        c.size[d] = x.size[d];
        c.stride[d] = x.stride[d];
      }
    }
  }
  ae_capture* data() { return more_ ? more_.get() : inline_; }
  size_t count() const { return count_; }

 private:
  size_t count_;
  ae_capture inline_[TensorList::kInline];
  std::unique_ptr<ae_capture[]> more_;
};

// Scratch for one launch: the thread's own buffer, or a large one when that is too small or in use.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    if (bytes <= 0) return;
    data_ = ThreadBuffer::of_this_thread().acquire(bytes);
    if (data_ == nullptr) data_ = large_.emplace(bytes).data();
    poison(data_, bytes);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() {
    if (data_ != nullptr && !large_) ThreadBuffer::of_this_thread().release();
  }
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
  std::optional<LargeBuffer> large_;
};

inline void copy4(int64_t* to, const int64_t* from) {
  for (int d = 0; d < 4; ++d) to[d] = from[d];
}

inline const void* set_operand(const Tensor& tensor, const TensorView& x, int64_t batch,
                               int64_t* stride) {
  copy4(stride, x.stride);
  if (x.size[0] != batch) stride[0] = 0;
  return const_data(tensor);
}

// Parameters common to both directions. Operands have been checked.
inline void fill_params(ae_params& p, const Tensor& q, const Tensor& k, const Tensor& v,
                        const TensorView& qv, const TensorView& kv, const TensorView& vv,
                        Captures& captures, double scale, int32_t* fault) {
  p.abi_version = AE_ABI_VERSION;
  p.bytes = sizeof(ae_params);
  p.B = qv.size[0];
  p.Hq = qv.size[1];
  p.L = qv.size[2];
  p.Hkv = kv.size[1];
  p.S = kv.size[2];
  set_dense_stats(p);
  p.q = set_operand(q, qv, p.B, p.q_stride);
  p.k = set_operand(k, kv, p.B, p.k_stride);
  p.v = set_operand(v, vv, p.B, p.v_stride);
  p.scale = scale;
  p.captures = captures.data();
  p.capture_count = static_cast<int32_t>(captures.count());
  p.fault = fault;
}

// Runs the kernel; throws std::out_of_range (IndexError) when a live key's gather left its tensor.
inline void launch(const Kernel& kernel, ae_params& p) {
  p.threads = launch_threads(p, kernel.info, 2);
  if (p.threads > 1) {
    uint32_t threads;
    AE_TORCH(torch_get_num_threads(&threads));
    p.threads = static_cast<int32_t>(threads);
  }
  const Workspace workspace(kernel.workspace_bytes(&p));
  const int32_t status = kernel.launch(&p, workspace.data(), parallel_for);
  if (status != 0) {
    throw std::runtime_error("attnengine: kernel " + std::string(kernel.info.key) +
                             " failed with status " + std::to_string(status));
  }
  if (*p.fault != 0) raise_fault(*p.fault - 1, p.captures[*p.fault - 1]);
}

}  // namespace ae
