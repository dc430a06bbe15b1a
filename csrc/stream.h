// Torch's current CUDA stream. The function for it lies in libtorch_cuda.so, which a CPU build of
// torch lacks, so it is looked up: the operator library stays one binary for both.
#pragma once
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <stdexcept>

#include "driver.h"
#include "tensor.h"

namespace ae {

using CurrentStream = AOTITorchError (*)(int32_t device_index, void** stream);

inline CurrentStream find_current_stream() {
  constexpr const char* kName = "aoti_torch_get_current_cuda_stream";
  void* address = dlsym(RTLD_DEFAULT, kName);
  if (address == nullptr) {
    if (void* cuda = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY)) {
      address = dlsym(cuda, kName);
      dlclose(cuda);  // the reference only: torch never unloads it
    }
  }
  return reinterpret_cast<CurrentStream>(address);
}

inline ae_cu_stream current_stream(int32_t device_index) {
  static const CurrentStream current = find_current_stream();
  if (current == nullptr) {
    throw std::runtime_error(
        "attnengine: this build of torch has no CUDA streams; install one with CUDA, or use CPU "
        "tensors (.cpu())");
  }
  void* stream = nullptr;
  AE_TORCH(current(device_index, &stream));
  return static_cast<ae_cu_stream>(stream);
}

}  // namespace ae
