#include "registry.h"

#include <dlfcn.h>

#include <array>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>

#include "common/linear_abi.h"
#include "common/statistics_abi.h"
#include "isa.h"

namespace ae {
namespace {

// Readers index the table without a lock, so it never moves. 64 Ki pointers are 512 KiB of zero
// pages that cost nothing until used; a process with more kernels than that has lost its cache.
constexpr int32_t kMaxKernels = 1 << 16;
std::array<std::atomic<const Kernel*>, kMaxKernels> table;

struct Writer {
  std::mutex mutex;
  std::map<std::string, int32_t> by_path;
  int32_t count = 0;
};

// Leaked on purpose: other threads may still launch kernels while static objects are destroyed.
Writer& writer() {
  static Writer* instance = new Writer;
  return *instance;
}

[[noreturn]] void refuse(const std::string& path, const std::string& why) {
  throw std::runtime_error("kernel module " + path + ": " + why);
}

template <class Fn>
Fn symbol(void* handle, const std::string& path, const char* name) {
  void* address = dlsym(handle, name);
  if (address == nullptr) refuse(path, std::string("symbol ") + name + " is missing");
  return reinterpret_cast<Fn>(address);
}

// Of what a launch is given; 0 for a kind that this library does not know.
size_t params_bytes_of(int32_t kind) {
  switch (kind) {
    case AE_FORWARD:
    case AE_BACKWARD:
      return sizeof(ae_params);
    case AE_LINEAR_FORWARD:
    case AE_LINEAR_BACKWARD:
      return sizeof(ae_linear_params);
    case AE_STATISTICS_FORWARD:
    case AE_STATISTICS_BACKWARD:
      return sizeof(ae_statistics_params);
    default:
      return 0;
  }
}

std::unique_ptr<Kernel> open_module(const std::string& path) {
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    const char* reason = dlerror();
    refuse(path, std::string("cannot be loaded: ") + (reason ? reason : "unknown error"));
  }
  try {
    const ae_module_info* info = symbol<ae_info_fn>(handle, path, "ae_info")();
    const size_t params_bytes = params_bytes_of(info->kind);
    if (info->abi_version != AE_ABI_VERSION || info->params_bytes != params_bytes) {
      refuse(path, "built for kernel ABI " + std::to_string(info->abi_version) + " (" +
                       std::to_string(info->params_bytes) +
                       " bytes of parameters), this library has " + std::to_string(AE_ABI_VERSION) +
                       " (" + std::to_string(params_bytes) +
                       "); clear the cache with: attnengine cache clear");
    }
    if (info->isa > cpu_isa()) {
      refuse(path, std::string("needs ") + isa_name(info->isa) + ", this CPU supports " +
                       isa_name(cpu_isa()) + "; rebuild it for this machine");
    }
    auto kernel = std::make_unique<Kernel>();
    kernel->info = *info;
    kernel->workspace_bytes = symbol<ae_workspace_fn>(handle, path, "ae_workspace_bytes");
    kernel->launch = symbol<ae_launch_fn>(handle, path, "ae_launch");
    kernel->classify = reinterpret_cast<ae_classify_fn>(dlsym(handle, "ae_classify"));
    kernel->describe_cut = reinterpret_cast<ae_describe_cut_fn>(dlsym(handle, "ae_describe_cut"));
    return kernel;
  } catch (...) {
    dlclose(handle);
    throw;
  }
}

template <class Open>
int32_t add_kernel(const std::string& path, const CaptureSignature* captures, int32_t capture_count,
                   Open open) {
  Writer& w = writer();
  const std::lock_guard<std::mutex> lock(w.mutex);
  if (const auto found = w.by_path.find(path); found != w.by_path.end()) return found->second;
  if (w.count == kMaxKernels) {
    refuse(path,
           std::to_string(kMaxKernels) +
               " kernels are loaded already; a spec that bakes a changing constant into its code "
               "should capture it as a 0-d tensor");
  }
  std::unique_ptr<Kernel> kernel = open();
  kernel->path = path;
  if (captures != nullptr) {
    if (capture_count != kernel->info.capture_count) {
      refuse(path, "captures " + std::to_string(kernel->info.capture_count) + " tensors, " +
                       std::to_string(capture_count) + " were declared");
    }
    kernel->captures.assign(captures, captures + capture_count);
    kernel->has_signature = true;
  }
  const int32_t id = w.count++;
  w.by_path.emplace(path, id);
  table[id].store(kernel.release(), std::memory_order_release);
  return id;
}

}  // namespace

int32_t load_kernel(const std::string& path, const CaptureSignature* captures,
                    int32_t capture_count) {
  return add_kernel(path, captures, capture_count, [&] { return open_module(path); });
}

int32_t load_cuda_kernel(const ae_cuda_info& info, const std::string& ptx_path,
                         const std::string& cubin_path, const CaptureSignature* captures,
                         int32_t capture_count) {
  return add_kernel(ptx_path, captures, capture_count, [&] {
    auto kernel = std::make_unique<Kernel>();
    kernel->cuda = std::make_unique<const CudaKernel>(info, ptx_path, cubin_path);
    kernel->info = kernel->cuda->info().info;
    return kernel;
  });
}

const Kernel* find_kernel(int64_t id) {
  if (id < 0 || id >= kMaxKernels) return nullptr;
  return table[id].load(std::memory_order_acquire);
}

}  // namespace ae
