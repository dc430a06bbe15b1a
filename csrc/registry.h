// Loaded kernel modules, each known by a small integer that stays valid for the process's life.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "common/abi.h"

namespace ae {

// What a kernel module was generated for, per captured tensor. The generated gathers have these
// baked in, so a tensor of another rank or type would be read wrongly.
struct CaptureSignature {
  int32_t rank;
  int32_t dtype;  // ae_dtype
};

struct Kernel {
  ae_module_info info;
  ae_workspace_fn workspace_bytes;
  ae_launch_fn launch;
  ae_classify_fn classify;  // null in backward modules
  std::vector<CaptureSignature> captures;
  bool has_signature;  // false: loaded without one, captured tensors are not checked against it
  std::string path;
};

// Loads the module at `path` (absolute) or finds it when already loaded. Modules are never
// unloaded: running calls and captured graphs may hold their code. Throws std::runtime_error when
// the file is no module of this ABI or needs instructions that this CPU lacks.
int32_t load_kernel(const std::string& path, const CaptureSignature* captures,
                    int32_t capture_count);

// Null when no module has this id. Lock-free.
const Kernel* find_kernel(int64_t id);

}  // namespace ae
