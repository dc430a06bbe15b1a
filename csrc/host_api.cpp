#include "host_api.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "common/block_tables.h"
#include "cuda_launch.h"
#include "isa.h"
#include "parallel.h"
#include "tensor.h"

namespace {

void report(const char* text, char* error, int64_t error_bytes) {
  if (error_bytes <= 0) return;
  const auto n = std::min<size_t>(std::strlen(text), static_cast<size_t>(error_bytes) - 1);
  std::memcpy(error, text, n);
  error[n] = '\0';
}

// Exceptions stay on this side of the C boundary.
template <class Result, class Body>
Result guarded(char* error, int64_t error_bytes, Body body) {
  try {
    return body();
  } catch (const std::exception& e) {
    report(e.what(), error, error_bytes);
    return -1;
  }
}

const ae::Kernel& kernel_of(int64_t id) {
  const ae::Kernel* kernel = ae::find_kernel(id);
  if (kernel == nullptr) {
    ae::value_error("kernel=" + std::to_string(id) + ": no such kernel is loaded in this process");
  }
  return *kernel;
}

// Null data when nothing was declared; never for an empty list.
class Signature {
 public:
  Signature(const int32_t* ranks, const int32_t* dtypes, int32_t count)
      : declared_(ranks != nullptr) {
    entries_.resize(declared_ ? static_cast<size_t>(count) + 1 : 0);
    for (int32_t i = 0; declared_ && i < count; ++i) entries_[i] = {ranks[i], dtypes[i]};
  }
  const ae::CaptureSignature* data() const { return declared_ ? entries_.data() : nullptr; }

 private:
  bool declared_;
  std::vector<ae::CaptureSignature> entries_;
};

int32_t load_kernel(const char* path, const int32_t* ranks, const int32_t* dtypes,
                    int32_t capture_count, char* error, int64_t error_bytes) {
  return guarded<int32_t>(error, error_bytes, [&] {
    const Signature signature(ranks, dtypes, capture_count);
    return ae::load_kernel(path, signature.data(), capture_count);
  });
}

int32_t load_cuda_kernel(const char* ptx_path, const char* cubin_path, const ae_cuda_info* info,
                         const int32_t* ranks, const int32_t* dtypes, int32_t capture_count,
                         char* error, int64_t error_bytes) {
  return guarded<int32_t>(error, error_bytes, [&] {
    const Signature signature(ranks, dtypes, capture_count);
    return ae::load_cuda_kernel(*info, ptx_path, cubin_path, signature.data(), capture_count);
  });
}

const ae_module_info* kernel_info(int64_t id) {
  const ae::Kernel* kernel = ae::find_kernel(id);
  return kernel == nullptr ? nullptr : &kernel->info;
}

const ae_cuda_info* cuda_info(int64_t id) {
  const ae::Kernel* kernel = ae::find_kernel(id);
  return kernel == nullptr || kernel->cuda == nullptr ? nullptr : &kernel->cuda->info();
}

const char* kernel_path(int64_t id) {
  const ae::Kernel* kernel = ae::find_kernel(id);
  return kernel == nullptr ? nullptr : kernel->path.c_str();
}

int32_t kernel_capture(int64_t id, int32_t index, int32_t* rank, int32_t* dtype) {
  const ae::Kernel* kernel = ae::find_kernel(id);
  if (kernel == nullptr || !kernel->has_signature) return 0;
  *rank = kernel->captures[index].rank;
  *dtype = kernel->captures[index].dtype;
  return 1;
}

int64_t classify(int64_t id, const ae_params* params, int64_t b, int64_t h, ae_row_run* out,
                 int64_t capacity, char* error, int64_t error_bytes) {
  return guarded<int64_t>(error, error_bytes, [&] {
    const ae::Kernel& kernel = kernel_of(id);
    if (kernel.cuda != nullptr) {
      ae::value_error("kernel=" + std::to_string(id) +
                      " is a CUDA kernel, which classifies its tiles on the device; compile the "
                      "spec for the CPU to see them");
    }
    if (kernel.classify == nullptr) {
      ae::value_error("kernel=" + std::to_string(id) +
                      " has no tile classifier; only forward kernels do");
    }
    ae::check_capture_count(kernel.info, params->capture_count);
    return kernel.classify(params, b, h, out, capacity);
  });
}

int32_t describe_cut(int64_t id, const ae_params* params, ae_cut* cut, int64_t* prefix,
                     int64_t capacity, char* error, int64_t error_bytes) {
  return guarded<int32_t>(error, error_bytes, [&]() -> int32_t {
    const ae::Kernel& kernel = kernel_of(id);
    if (kernel.describe_cut == nullptr) {
      ae::value_error("kernel=" + std::to_string(id) +
                      " does not say how its work is cut; forward kernels of the CPU do");
    }
    ae::check_capture_count(kernel.info, params->capture_count);
    if (kernel.describe_cut(params, cut, prefix, capacity) == 0) throw std::bad_alloc();
    return 0;
  });
}

int64_t workspace_bytes(int64_t id, const ae_params* params, char* error, int64_t error_bytes) {
  return guarded<int64_t>(error, error_bytes, [&]() -> int64_t {
    const ae::Kernel& kernel = kernel_of(id);
    ae::check_capture_count(kernel.info, params->capture_count);
    if (params->B == 0 || params->Hq == 0 || params->L == 0) return 0;  // nothing is launched
    if (kernel.cuda != nullptr) {
      return ae::CudaParams(*params, kernel.cuda->info().mask_captures).workspace_bytes();
    }
    ae_params p = *params;
    p.threads = ae::launch_threads(p, kernel.info, p.threads);
    return kernel.workspace_bytes(&p);
  });
}

ae::TensorView as_view(const char* name, const ae_host_tensor& x) {
  return {name,
          nullptr,
          x.size,
          nullptr,
          x.rank,
          x.dtype,
          static_cast<ae::DeviceKind>(x.device),
          x.device_index};
}

int32_t check_forward(int64_t id, const ae_host_tensor* qkv, const ae_host_tensor* captures,
                      int32_t capture_count, char* error, int64_t error_bytes) {
  return guarded<int32_t>(error, error_bytes, [&] {
    const ae::Kernel& kernel = kernel_of(id);
    const ae::TensorView q = as_view("q", qkv[0]);
    ae::check_operands(kernel, q, as_view("k", qkv[1]), as_view("v", qkv[2]));
    ae::check_capture_count(kernel.info, capture_count);
    for (int32_t i = 0; i < capture_count; ++i) {
      ae::check_capture(kernel, i, as_view("captures", captures[i]), q);
    }
    return 0;
  });
}

int32_t cpu_isa() { return ae::cpu_isa(); }

void set_poison(int32_t on) { ae::poison_buffers.store(on != 0); }

int32_t install_driver(const void* table, char* error, int64_t error_bytes) {
  return guarded<int32_t>(error, error_bytes, [&] {
    ae::install_driver(static_cast<const ae_driver*>(table));
    return 0;
  });
}

int32_t driver_name(char* name, int64_t name_bytes, char* error, int64_t error_bytes) {
  return guarded<int32_t>(error, error_bytes, [&] {
    report(ae::driver_name().c_str(), name, name_bytes);
    return 0;
  });
}

int32_t device_capability(int32_t index, char* error, int64_t error_bytes) {
  return guarded<int32_t>(error, error_bytes,
                          [&] { return ae::cuda_device(ae::cuda_driver(), index).capability; });
}

void set_sync_debug(int32_t on) { ae::sync_debug.store(on != 0); }

void set_schedule_policy(int32_t policy, int32_t splits, int64_t workers) {
  ae::forced_schedule.store(
      {static_cast<int16_t>(policy), static_cast<int16_t>(splits), static_cast<int32_t>(workers)});
}

int64_t kept_bytes() { return ae::MemoryPool::of_process().kept(); }

void keep_at_most(int64_t bytes) { ae::MemoryPool::of_process().keep_at_most(bytes); }

constexpr ae_host_api kApi = {
    AE_HOST_API_VERSION, load_kernel,    load_cuda_kernel,    kernel_info, cuda_info,
    kernel_path,         kernel_capture, describe_cut,        classify,    workspace_bytes,
    check_forward,       cpu_isa,        install_driver,      driver_name, device_capability,
    set_sync_debug,      set_poison,     set_schedule_policy, kept_bytes,  keep_at_most};

}  // namespace

const ae_host_api* attnengine_host_api(void) { return &kApi; }
