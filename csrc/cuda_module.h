// CUDA kernels: their images, and the functions loaded from them per device. Torch-free.
#pragma once
#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda_info.h"
#include "driver_table.h"

namespace ae {

inline constexpr int32_t kMaxDevices = 64;

// One device of one driver. Never destroyed.
struct CudaDevice {
  const ae_driver* driver;
  int32_t ordinal;
  ae_cu_device handle;
  int32_t capability;    // 80 is compute capability 8.0
  int32_t shared_optin;  // most shared memory of one thread block, in bytes
  int32_t multiprocessors;
  std::string name;  // "cuda:0" or "the simulator"

  // Set before the first kernel is loaded.
  mutable ae_cu_context context = nullptr;  // primary
  // In device memory, zero until a kernel reports an index that left its captured tensor. Null in a
  // simulator, where each launch has its own.
  mutable int32_t* fault = nullptr;

  bool simulated() const { return driver->describe_memory != nullptr; }
};

// Facts about a device; its context is not touched. Throws std::runtime_error when there is no such
// device. Lock-free after the first call.
const CudaDevice& cuda_device(const ae_driver& driver, int32_t ordinal);

// Makes the device's primary context the thread's current one while it lives.
class ContextGuard {
 public:
  explicit ContextGuard(const CudaDevice& device);
  ContextGuard(const ContextGuard&) = delete;
  ContextGuard& operator=(const ContextGuard&) = delete;
  ~ContextGuard();

 private:
  const ae_driver* driver_ = nullptr;  // null: nothing to restore
  ae_cu_context previous_ = nullptr;
};

// A kernel's functions on one device.
struct CudaFunctions {
  const CudaDevice* device;
  ae_cu_module module;
  ae_cu_function forward;
  ae_cu_function tables;             // null: the mask reads no captured tensor
  ae_cu_function schedule, combine;  // null: work is not split
  int32_t blocks;                    // of `forward`, on a multiprocessor at a time
  // Of linear attention, in the place of the others. kSplitStates is the pass that solves with the
  // delta rule.
  enum Linear { kStates, kSplitStates, kOutputs, kStep, kLinear };
  ae_cu_function linear[kLinear] = {};
};

class CudaKernel {
 public:
  // Reads the images. `cubin_path` may be empty. Throws std::runtime_error when a file cannot be
  // read or the description is impossible.
  CudaKernel(const ae_cuda_info& info, const std::string& ptx_path, const std::string& cubin_path);

  const ae_cuda_info& info() const { return info_; }
  const std::string& ptx_path() const { return ptx_path_; }

  // The functions on a device, loaded at the first call, which must not fall into a capture of
  // `stream`. Throws std::runtime_error. Lock-free once loaded.
  const CudaFunctions& on(const ae_driver& driver, int32_t ordinal, ae_cu_stream stream) const;

 private:
  const CudaFunctions* load(const CudaDevice& device, ae_cu_stream stream) const;
  ae_cu_module load_image(const CudaDevice& device) const;
  ae_cu_function entry(const CudaDevice& device, ae_cu_module module, const char* name,
                       int32_t threads, int32_t shared_bytes, int32_t* blocks = nullptr) const;
  [[noreturn]] void fail(const CudaDevice& device, const std::string& why) const;

  std::string key_;
  ae_cuda_info info_;  // its key points into key_
  std::string ptx_path_, ptx_, cubin_;

  // A driver may be replaced, so a device has one entry here and the functions of every driver in
  // `loaded_`. Launches hold them: they are never unloaded.
  mutable std::array<std::atomic<const CudaFunctions*>, kMaxDevices> current_{};
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<const CudaFunctions>> loaded_;
};

}  // namespace ae
