#include "cuda_module.h"

#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>

#include "common/linear_abi.h"

namespace ae {
namespace {

constexpr int32_t kDefaultSharedBytes = 48 << 10;  // more needs FuncSetAttribute
constexpr int32_t kTableThreads = 128, kScheduleThreads = 512, kCombineThreads = 128;

std::string sm(int32_t capability) { return "sm_" + std::to_string(capability); }

std::string capability_text(int32_t capability) {
  return std::to_string(capability / 10) + "." + std::to_string(capability % 10);
}

[[noreturn]] void fail_device(const ae_driver& driver, int32_t ordinal, const char* call,
                              ae_cu_result error) {
  throw std::runtime_error("attnengine: cuda:" + std::to_string(ordinal) + ": " + call +
                           " failed: " + driver_error(driver, error));
}

struct Devices {
  std::mutex mutex;
  std::array<std::atomic<const CudaDevice*>, kMaxDevices> current{};
  std::vector<std::unique_ptr<CudaDevice>> all;
};

Devices& devices() {
  static Devices* instance = new Devices;
  return *instance;
}

int32_t attribute(const ae_driver& driver, int32_t ordinal, ae_cu_device handle, int which) {
  int value = 0;
  const ae_cu_result error = driver.DeviceGetAttribute(&value, which, handle);
  if (error != AE_CU_SUCCESS) fail_device(driver, ordinal, "cuDeviceGetAttribute", error);
  return value;
}

std::unique_ptr<CudaDevice> describe(const ae_driver& driver, int32_t ordinal) {
  int count = 0;
  ae_cu_result error = driver.DeviceGetCount(&count);
  if (error != AE_CU_SUCCESS) fail_device(driver, ordinal, "cuDeviceGetCount", error);
  if (ordinal < 0 || ordinal >= count) {
    throw std::runtime_error("attnengine: there is no device cuda:" + std::to_string(ordinal) +
                             "; the driver shows " + std::to_string(count) +
                             " (CUDA_VISIBLE_DEVICES limits them)");
  }
  auto device = std::make_unique<CudaDevice>();
  device->driver = &driver;
  device->ordinal = ordinal;
  error = driver.DeviceGet(&device->handle, ordinal);
  if (error != AE_CU_SUCCESS) fail_device(driver, ordinal, "cuDeviceGet", error);
  const auto get = [&](int which) { return attribute(driver, ordinal, device->handle, which); };
  device->capability = 10 * get(AE_CU_DEVICE_CAPABILITY_MAJOR) + get(AE_CU_DEVICE_CAPABILITY_MINOR);
  device->shared_optin = get(AE_CU_DEVICE_MAX_SHARED_PER_BLOCK_OPTIN);
  device->multiprocessors = get(AE_CU_DEVICE_MULTIPROCESSORS);
  device->name = device->simulated() ? "the simulator" : "cuda:" + std::to_string(ordinal);
  return device;
}

// Loading allocates and synchronizes, which a capture in another thread must not notice.
class RelaxedCapture {
 public:
  explicit RelaxedCapture(const ae_driver& driver) : driver_(driver) {
    driver_.ThreadExchangeStreamCaptureMode(&mode_);
  }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;
  ~RelaxedCapture() { driver_.ThreadExchangeStreamCaptureMode(&mode_); }

 private:
  const ae_driver& driver_;
  int mode_ = AE_CU_CAPTURE_RELAXED;
};

void retain_context(const CudaDevice& device) {
  Devices& d = devices();
  const std::lock_guard<std::mutex> lock(d.mutex);
  if (device.context != nullptr) return;
  const ae_cu_result error = device.driver->DevicePrimaryCtxRetain(&device.context, device.handle);
  if (error != AE_CU_SUCCESS) {
    fail_device(*device.driver, device.ordinal, "cuDevicePrimaryCtxRetain", error);
  }
}

void allocate_fault(const CudaDevice& device, ae_cu_stream stream) {
  if (device.simulated()) return;
  const ae_driver& driver = *device.driver;
  Devices& d = devices();
  const std::lock_guard<std::mutex> lock(d.mutex);
  if (device.fault != nullptr) return;
  ae_cu_ptr address = 0;
  ae_cu_result error = driver.MemAlloc(&address, sizeof(int32_t));
  if (error != AE_CU_SUCCESS) fail_device(driver, device.ordinal, "cuMemAlloc", error);
  error = driver.MemsetD8Async(address, 0, sizeof(int32_t), stream);
  if (error == AE_CU_SUCCESS) error = driver.StreamSynchronize(stream);
  if (error != AE_CU_SUCCESS) {
    driver.MemFree(address);
    fail_device(driver, device.ordinal, "cuMemsetD8Async", error);
  }
  device.fault = reinterpret_cast<int32_t*>(address);
}

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (!file.is_open() || file.bad()) {
    throw std::runtime_error("CUDA kernel " + path + ": cannot be read: " + std::strerror(errno));
  }
  if (bytes.empty()) {
    throw std::runtime_error("CUDA kernel " + path +
                             ": the file is empty; clear the cache with: attnengine cache clear");
  }
  return bytes;
}

void check_info(const ae_cuda_info& x, const std::string& path) {
  const auto refuse = [&](const char* field, int64_t value, const char* limit) {
    throw std::runtime_error("CUDA kernel " + path + ": its manifest says " + field + " = " +
                             std::to_string(value) + ", which must be " + limit +
                             "; clear the cache with: attnengine cache clear");
  };
  if (x.info.kind != AE_FORWARD && x.info.kind != AE_LINEAR_FORWARD) {
    refuse("kind", x.info.kind, "0 (forward) or 2 (linear forward)");
  }
  if (x.target < 10) refuse("target", x.target, "a compute capability, as 80 for 8.0");
  if (x.threads < 32 || x.threads > 1024 || x.threads % 32 != 0) {
    refuse("threads", x.threads, "a multiple of 32 up to 1024");
  }
  if (x.shared_bytes < 0) refuse("shared_bytes", x.shared_bytes, "0 or more");
  if (x.block_m < 1) refuse("block_m", x.block_m, "1 or more");
  if (x.block_n < 1) refuse("block_n", x.block_n, "1 or more");
  if (x.info.capture_count < 0) refuse("capture_count", x.info.capture_count, "0 or more");
  if (x.slot_bytes < 0 || x.slot_bytes % 64 != 0) {
    refuse("slot_bytes", x.slot_bytes, "a multiple of 64");
  }
}

}  // namespace

const CudaDevice& cuda_device(const ae_driver& driver, int32_t ordinal) {
  if (ordinal < 0 || ordinal >= kMaxDevices) {
    throw std::runtime_error("attnengine: cuda:" + std::to_string(ordinal) +
                             " is beyond the limit of " + std::to_string(kMaxDevices) +
                             " devices; choose others with CUDA_VISIBLE_DEVICES");
  }
  Devices& d = devices();
  const CudaDevice* found = d.current[ordinal].load(std::memory_order_acquire);
  if (found != nullptr && found->driver == &driver) return *found;
  const std::lock_guard<std::mutex> lock(d.mutex);
  for (const auto& device : d.all) {
    if (device->driver == &driver && device->ordinal == ordinal) {
      d.current[ordinal].store(device.get(), std::memory_order_release);
      return *device;
    }
  }
  d.all.push_back(describe(driver, ordinal));
  d.current[ordinal].store(d.all.back().get(), std::memory_order_release);
  return *d.all.back();
}

ContextGuard::ContextGuard(const CudaDevice& device) {
  const ae_driver& driver = *device.driver;
  ae_cu_result error = driver.CtxGetCurrent(&previous_);
  if (error != AE_CU_SUCCESS) fail_device(driver, device.ordinal, "cuCtxGetCurrent", error);
  if (previous_ == device.context) return;
  error = driver.CtxSetCurrent(device.context);
  if (error != AE_CU_SUCCESS) fail_device(driver, device.ordinal, "cuCtxSetCurrent", error);
  driver_ = &driver;
}

ContextGuard::~ContextGuard() {
  if (driver_ != nullptr) driver_->CtxSetCurrent(previous_);
}

CudaKernel::CudaKernel(const ae_cuda_info& info, const std::string& ptx_path,
                       const std::string& cubin_path)
    : key_(info.info.key), info_(info), ptx_path_(ptx_path), ptx_(read_file(ptx_path)) {
  if (!cubin_path.empty()) cubin_ = read_file(cubin_path);
  check_info(info, ptx_path);
  info_.info.abi_version = AE_ABI_VERSION;
  const bool linear = info.info.kind == AE_LINEAR_FORWARD;
  info_.info.params_bytes = linear ? sizeof(ae_linear_params) : sizeof(ae_params);
  info_.info.grad_mask = 0;
  info_.info.isa = AE_ISA_PORTABLE;
  info_.info.key = key_.c_str();
}

void CudaKernel::fail(const CudaDevice& device, const std::string& why) const {
  throw std::runtime_error("attnengine: kernel " + key_ + " on " + device.name + ": " + why);
}

const CudaFunctions& CudaKernel::on(const ae_driver& driver, int32_t ordinal,
                                    ae_cu_stream stream) const {
  if (ordinal >= 0 && ordinal < kMaxDevices) {
    const CudaFunctions* found = current_[ordinal].load(std::memory_order_acquire);
    if (found != nullptr && found->device->driver == &driver) return *found;
  }
  const CudaDevice& device = cuda_device(driver, ordinal);
  const std::lock_guard<std::mutex> lock(mutex_);
  const CudaFunctions* functions = nullptr;
  for (const auto& loaded : loaded_) {
    if (loaded->device == &device) functions = loaded.get();
  }
  if (functions == nullptr) functions = load(device, stream);
  current_[ordinal].store(functions, std::memory_order_release);
  return *functions;
}

const CudaFunctions* CudaKernel::load(const CudaDevice& device, ae_cu_stream stream) const {
  const ae_driver& driver = *device.driver;
  if (device.capability < info_.target) {
    fail(device, "it was compiled for " + sm(info_.target) +
                     ", the device has compute capability " + capability_text(device.capability) +
                     "; compile the spec on this device, or use CPU tensors (.cpu())");
  }
  retain_context(device);
  const ContextGuard context(device);
  int status = AE_CU_CAPTURE_NONE;
  const ae_cu_result error = driver.StreamIsCapturing(stream, &status);
  if (error != AE_CU_SUCCESS) {
    fail(device, "cuStreamIsCapturing failed: " + driver_error(driver, error));
  }
  if (status != AE_CU_CAPTURE_NONE) {
    fail(device,
         "its first call on a device loads it, which cannot be captured into a CUDA graph; warm up "
         "with one call before capture");
  }
  const RelaxedCapture relaxed(driver);
  allocate_fault(device, stream);
  CudaFunctions functions{&device, load_image(device), nullptr, nullptr, nullptr, nullptr, 0};
  try {
    if (info_.info.kind == AE_LINEAR_FORWARD) {
      const auto linear = [&](CudaFunctions::Linear which, const char* name, int32_t shared_bytes) {
        functions.linear[which] =
            entry(device, functions.module, name, info_.threads, shared_bytes);
      };
      linear(CudaFunctions::kStep, "ae_linear_step", 0);
      if (info_.state_bytes > 0) {
        linear(CudaFunctions::kStates, "ae_linear_states", info_.state_bytes);
        // The delta rule has a pass that solves in the place of the small tiles.
        const bool delta = (info_.info.user_stats >> 8 & 1) != 0;
        linear(CudaFunctions::kSplitStates, delta ? "ae_linear_solve" : "ae_linear_states_split",
               info_.split_bytes);
        linear(CudaFunctions::kOutputs, "ae_linear_outputs", info_.shared_bytes);
      }
      loaded_.push_back(std::make_unique<const CudaFunctions>(functions));
      return loaded_.back().get();
    }
    functions.forward = entry(device, functions.module, "ae_forward", info_.threads,
                              info_.shared_bytes, &functions.blocks);
    if (info_.mask_captures != 0) {
      functions.tables = entry(device, functions.module, "ae_tables", kTableThreads, 0);
    }
    if (info_.slot_bytes > 0) {
      functions.schedule = entry(device, functions.module, "ae_schedule", kScheduleThreads, 0);
      functions.combine = entry(device, functions.module, "ae_combine", kCombineThreads, 0);
    }
  } catch (...) {
    driver.ModuleUnload(functions.module);
    throw;
  }
  loaded_.push_back(std::make_unique<const CudaFunctions>(functions));
  return loaded_.back().get();
}

// A cubin runs on its own and on later minor versions of the compute capability; PTX, which the
// driver compiles, on every later one. A simulator executes PTX.
ae_cu_module CudaKernel::load_image(const CudaDevice& device) const {
  const ae_driver& driver = *device.driver;
  const bool native =
      !cubin_.empty() && !device.simulated() && device.capability / 10 == info_.target / 10;
  const std::string& image = native ? cubin_ : ptx_;
  std::string log(8192, '\0');
  int keys[] = {AE_CU_JIT_ERROR_LOG, AE_CU_JIT_ERROR_LOG_BYTES};
  void* values[] = {log.data(), reinterpret_cast<void*>(static_cast<uintptr_t>(log.size()))};
  ae_cu_module module = nullptr;
  const ae_cu_result error = driver.ModuleLoadDataEx(&module, image.c_str(), 2, keys, values);
  if (error == AE_CU_SUCCESS) return module;
  std::string why = std::string("the driver refused its ") + (native ? "cubin" : "PTX") + ": " +
                    driver_error(driver, error);
  if (log[0] != '\0' && !device.simulated()) why += std::string("\n") + log.c_str();
  if (error == AE_CU_UNSUPPORTED_PTX_VERSION) {
    why += "; the driver is older than the compiler: update it, or compile with an older nvcc";
  }
  fail(device, why);
}

ae_cu_function CudaKernel::entry(const CudaDevice& device, ae_cu_module module, const char* name,
                                 int32_t threads, int32_t shared_bytes, int32_t* active) const {
  const ae_driver& driver = *device.driver;
  const auto check = [&](const char* call, ae_cu_result error) {
    if (error != AE_CU_SUCCESS) {
      fail(device, std::string(call) + "(" + name + ") failed: " + driver_error(driver, error));
    }
  };
  ae_cu_function function = nullptr;
  check("cuModuleGetFunction", driver.ModuleGetFunction(&function, module, name));
  int fixed = 0;
  check("cuFuncGetAttribute", driver.FuncGetAttribute(&fixed, AE_CU_FUNC_STATIC_SHARED, function));
  if (int64_t{fixed} + shared_bytes > device.shared_optin) {
    fail(device, std::string(name) + " needs " + std::to_string(int64_t{fixed} + shared_bytes) +
                     " bytes of shared memory per thread block, the limit is " +
                     std::to_string(device.shared_optin) +
                     "; compile the spec on this device, which plans smaller tiles");
  }
  if (shared_bytes > kDefaultSharedBytes - fixed) {
    check("cuFuncSetAttribute",
          driver.FuncSetAttribute(function, AE_CU_FUNC_MAX_DYNAMIC_SHARED, shared_bytes));
  }
  int blocks = 0;
  check("cuOccupancyMaxActiveBlocksPerMultiprocessor",
        driver.OccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, threads,
                                                         static_cast<size_t>(shared_bytes)));
  if (blocks < 1) {
    int registers = 0;
    check("cuFuncGetAttribute",
          driver.FuncGetAttribute(&registers, AE_CU_FUNC_REGISTERS, function));
    fail(device, std::string(name) + " does not fit: " + std::to_string(threads) + " threads of " +
                     std::to_string(registers) + " registers and " +
                     std::to_string(int64_t{fixed} + shared_bytes) +
                     " bytes of shared memory per thread block; compile the spec on this device");
  }
  if (active != nullptr) *active = blocks;
  return function;
}

}  // namespace ae
