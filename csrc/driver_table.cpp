#include "driver_table.h"

#include <dlfcn.h>

#include <atomic>
#include <cstring>
#include <stdexcept>

namespace ae {
namespace {

std::atomic<const ae_driver*> installed{nullptr};

bool simulates(const ae_driver& driver) { return std::strcmp(driver.name, "simulator") == 0; }

// The machine's own table; `problem` says why there is none.
struct Machine {
  ae_driver table{};
  std::string problem;

  Machine() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      const char* reason = dlerror();
      problem = std::string("there is no CUDA driver on this machine (") +
                (reason != nullptr ? reason : "libcuda.so.1 cannot be loaded") +
                "); install NVIDIA's driver, or use CPU tensors (.cpu())";
      return;
    }
    table.version = AE_DRIVER_VERSION;
    table.bytes = sizeof(ae_driver);
    table.name = "cuda";
    find(library, table.Init, "cuInit");
    find(library, table.DeviceGetCount, "cuDeviceGetCount");
    find(library, table.DeviceGet, "cuDeviceGet");
    find(library, table.DeviceGetAttribute, "cuDeviceGetAttribute");
    find(library, table.DevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain");
    find(library, table.CtxGetCurrent, "cuCtxGetCurrent");
    find(library, table.CtxSetCurrent, "cuCtxSetCurrent");
    find(library, table.CtxGetDevice, "cuCtxGetDevice");
    find(library, table.ModuleLoadDataEx, "cuModuleLoadDataEx");
    find(library, table.ModuleUnload, "cuModuleUnload");
    find(library, table.ModuleGetFunction, "cuModuleGetFunction");
    find(library, table.FuncGetAttribute, "cuFuncGetAttribute");
    find(library, table.FuncSetAttribute, "cuFuncSetAttribute");
    find(library, table.OccupancyMaxActiveBlocksPerMultiprocessor,
         "cuOccupancyMaxActiveBlocksPerMultiprocessor");
    find(library, table.LaunchKernelEx, "cuLaunchKernelEx");
    find(library, table.MemAlloc, "cuMemAlloc_v2");
    find(library, table.MemFree, "cuMemFree_v2");
    find(library, table.MemsetD8Async, "cuMemsetD8Async");
    find(library, table.MemcpyDtoHAsync, "cuMemcpyDtoHAsync_v2");
    find(library, table.StreamIsCapturing, "cuStreamIsCapturing");
    find(library, table.StreamSynchronize, "cuStreamSynchronize");
    find(library, table.ThreadExchangeStreamCaptureMode, "cuThreadExchangeStreamCaptureMode");
    find(library, table.GetErrorString, "cuGetErrorString");
    if (!problem.empty()) return;
    if (const ae_cu_result error = table.Init(0); error != AE_CU_SUCCESS) {
      problem = "the CUDA driver cannot be initialized: " + driver_error(table, error) +
                "; see what nvidia-smi says, or use CPU tensors (.cpu())";
    }
  }

 private:
  template <class Fn>
  void find(void* library, Fn& function, const char* name) {
    function = reinterpret_cast<Fn>(dlsym(library, name));
    if (function == nullptr && problem.empty()) {
      problem = std::string("the CUDA driver of this machine has no ") + name +
                ": it is older than CUDA 12.0; update it";
    }
  }
};

// Leaked on purpose: other threads may still launch kernels while static objects are destroyed.
const Machine& machine() {
  static const Machine* const instance = new Machine;
  return *instance;
}

}  // namespace

void install_driver(const ae_driver* table) {
  if (table != nullptr &&
      (table->version != AE_DRIVER_VERSION || table->bytes != sizeof(ae_driver))) {
    throw std::runtime_error("the driver table has version " + std::to_string(table->version) +
                             ", this library needs " + std::to_string(AE_DRIVER_VERSION) +
                             "; rebuild the library that it comes from");
  }
  installed.store(table, std::memory_order_release);
}

const ae_driver& cuda_driver() {
  const ae_driver* table = installed.load(std::memory_order_acquire);
  if (table != nullptr && !simulates(*table)) return *table;
  const Machine& own = machine();
  if (!own.problem.empty()) throw std::runtime_error("attnengine: " + own.problem);
  return own.table;
}

const ae_driver* simulator() {
  const ae_driver* table = installed.load(std::memory_order_acquire);
  return table != nullptr && simulates(*table) ? table : nullptr;
}

std::string driver_name() {
  const ae_driver* table = installed.load(std::memory_order_acquire);
  if (table != nullptr) return table->name;
  return machine().problem.empty() ? machine().table.name : "none";
}

std::string driver_error(const ae_driver& driver, ae_cu_result error) {
  if (driver.last_report != nullptr) return driver.last_report();
  const char* text = nullptr;
  if (driver.GetErrorString(error, &text) != AE_CU_SUCCESS || text == nullptr) {
    text = "unknown error";
  }
  return std::string(text) + " (CUDA driver error " + std::to_string(error) + ")";
}

}  // namespace ae
