// Loaded kernel modules, each known by a small integer that stays valid for the process's life.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "common/abi.h"
#include "cuda_module.h"

namespace ae {

// What a kernel module was generated for, per captured tensor. The generated gathers have these
// baked in, so a tensor of another rank or type would be read wrongly.
struct CaptureSignature {
  int32_t rank;
  int32_t dtype;  // ae_dtype
};

struct Kernel {
  ae_module_info info;
  // A shared object for the CPU; null in CUDA kernels.
  ae_workspace_fn workspace_bytes = nullptr;
  ae_launch_fn launch = nullptr;
  ae_classify_fn classify = nullptr;  // null in backward modules too
  ae_describe_cut_fn describe_cut = nullptr;
  std::unique_ptr<const CudaKernel> cuda;  // null in CPU kernels
  std::vector<CaptureSignature> captures;
  bool has_signature = false;  // else captured tensors are not checked against it
  std::string path;
};

// Loads the module at `path` (absolute) or finds it when already loaded. Modules are never
// unloaded: running calls and captured graphs may hold their code. Throws std::runtime_error when
// the file is no module of this ABI or needs instructions that this CPU lacks.
int32_t load_kernel(const std::string& path, const CaptureSignature* captures,
                    int32_t capture_count);

// The same for a CUDA kernel, which is known by the path of its PTX; `cubin_path` may be empty. No
// GPU is needed. Throws std::runtime_error when a file cannot be read or the description is
// impossible.
int32_t load_cuda_kernel(const ae_cuda_info& info, const std::string& ptx_path,
                         const std::string& cubin_path, const CaptureSignature* captures,
                         int32_t capture_count);

// Null when no module has this id. Lock-free.
const Kernel* find_kernel(int64_t id);

}  // namespace ae
