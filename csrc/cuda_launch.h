// Launches of CUDA kernels: their parameters, grid and report. Torch-free.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>

#include "common/schedule.h"
#include "cuda_module.h"

namespace ae {

// Debugging aid (ATTNENGINE_SYNC_DEBUG): every launch waits for its end and reports its faults, as
// launches on the CPU do. Without it a GPU's faults show at a later call, or not at all where they
// are indices of captured tensors.
inline std::atomic<bool> sync_debug{false};

// Debugging aid of the tests: how kernels that split their work do it, instead of what is predicted
// to be fastest. policy < 0: as predicted.
struct ForcedSchedule {
  int16_t policy, splits;
  int32_t workers;
};
inline std::atomic<ForcedSchedule> forced_schedule{ForcedSchedule{-1, 1, 1}};

// The parameter of a kernel's entries, KernelParams<N> of templates/common/abi_cuda.h: the common
// parameters, then the captured tensors, then the block tables of those that the mask reads, then
// how thread blocks share the work.
class CudaParams {
 public:
  // `p` has its operands, results and captured tensors, and may die afterwards. Throws
  // std::invalid_argument when the driver could not take so many captured tensors.
  CudaParams(const ae_params& p, uint64_t mask_captures);
  CudaParams(const CudaParams&) = delete;
  CudaParams& operator=(const CudaParams&) = delete;

  // Chooses the schedule of a kernel that splits its work, from the bounds on the lengths alone:
  // they may lie on the device. Before workspace_bytes() is asked for. Throws std::invalid_argument
  // when there are more outputs than a grid holds, or sequences where the kernel takes none.
  void share_work(const CudaKernel& kernel, const CudaFunctions& functions);

  int64_t workspace_bytes() const { return workspace_bytes_; }
  int64_t table_blocks() const { return table_blocks_; }  // grid of ae_tables; 0: no tables
  int32_t policy() const;
  int64_t forward_blocks() const { return forward_blocks_; }  // once work is shared
  int64_t outputs() const { return outputs_; }
  // Puts the tables, the schedule and partial results into `workspace`, which is aligned to 64
  // bytes.
  void place(void* workspace);
  void set_fault(int32_t* fault);

  const ae_params& params() const;
  const ae_capture& capture(int32_t index) const;
  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  static constexpr int64_t kInlineBytes = 2048;  // eight captured tensors

  int64_t workspace_bytes_ = 0, table_blocks_ = 0, bytes_, slots_;
  int64_t prefix_at_ = -1, parts_at_ = -1;  // in the workspace; -1: there are none
  int64_t outputs_ = 0, forward_blocks_ = 0;
  char* data_;
  std::unique_ptr<char[]> more_;
  alignas(16) char inline_[kInlineBytes];
};

// Tiles of rows, of which each is an output. Throws std::invalid_argument when they are more than a
// grid holds.
int64_t forward_blocks(const ae_cuda_info& info, const ae_params& p);

// Runs the kernel on `stream`. `workspace` holds params.workspace_bytes(). Throws
// std::runtime_error when the driver refuses or a simulator reports a fault, std::out_of_range when
// a live key's gather left its tensor (in a simulator and under sync_debug).
void launch_cuda(const CudaKernel& kernel, const CudaFunctions& functions, CudaParams& params,
                 void* workspace, ae_cu_stream stream);

}  // namespace ae
