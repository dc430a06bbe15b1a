// Launches of CUDA linear attention (templates/linear): which kernels serve a call, their grids and
// their report. Torch-free.
#pragma once
#include <cstdint>
#include <memory>

#include "common/linear_abi.h"
#include "cuda_module.h"

namespace ae {

// Up to so many tokens the recurrence itself is cheaper than two passes over chunks (STEP_TOKENS in
// attnengine/linear/plan_cuda.py says so, too).
inline constexpr int64_t kStepTokens = 8;

// The parameter of a kernel's entries, LinearParams<N> of templates/linear/params.h, and how it is
// launched.
class CudaLinear {
 public:
  // `p` has its operands, results and captured tensors, and may die afterwards; p.first lies in the
  // kernels' memory. Throws std::invalid_argument where the call is too large for a launch.
  CudaLinear(const ae_linear_params& p, const CudaKernel& kernel, const CudaFunctions& functions);
  CudaLinear(const CudaLinear&) = delete;
  CudaLinear& operator=(const CudaLinear&) = delete;

  // Of the states that chunks start from; aligned to 64 bytes.
  int64_t workspace_bytes() const { return workspace_bytes_; }

  // Runs on `stream`. Returns what the kernels left in their fault word where that is known: in a
  // simulator and under sync_debug; else 0. Throws std::runtime_error when the driver refuses or a
  // simulator reports a fault.
  int32_t run(void* workspace, ae_cu_stream stream);

 private:
  void launch(ae_cu_stream stream) const;
  void launch(const char* name, int entry, int64_t blocks, int64_t shared_bytes,
              ae_cu_stream stream) const;
  void check(ae_cu_result error, const char* call) const;
  void describe(void* workspace, int32_t* fault) const;
  int64_t blocks(int64_t of_head, int64_t heads) const;
  const ae_linear_params& params() const;
  int64_t tiles(int64_t width) const;  // of the state, with so many rows and columns

  const CudaKernel& kernel_;
  const CudaFunctions& functions_;
  const CudaDevice& device_;
  const ae_driver& driver_;
  int64_t slots_ = 0, workspace_bytes_ = 0;
  int64_t keys_at_ = 0, values_at_ = 0, inverse_at_ = 0;  // in the workspace, behind the states
  bool step_ = false, states_ = true, split_ = false, delta_ = false;
  int64_t captures_;
  std::unique_ptr<char[]> data_;
};

}  // namespace ae
