#include "device.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "module.h"
#include "settings.h"

namespace ptxsim {

int shared_limit(int capability) {
  constexpr int kKiB = 1024;
  switch (capability) {
    case 80:
    case 87:
      return 163 * kKiB;
    case 86:
    case 89:
    case 120:
      return 99 * kKiB;
    case 90:
    case 100:
    case 103:
      return 227 * kKiB;
    default:
      return 64 * kKiB;
  }
}

ae_cu_result failed(ae_cu_result result, const std::string& why) {
  last_launch().report = why;
  return result;
}

namespace {

// Memory that the table allocated, by address.
struct Allocations {
  std::mutex mutex;
  std::map<uint64_t, size_t> bytes;
};
Allocations& allocations() {
  static Allocations all;
  return all;
}

}  // namespace

void add_allocations(MemoryMap& memory) {
  std::lock_guard lock(allocations().mutex);
  for (auto [address, bytes] : allocations().bytes)
    memory.add(
        {address, address + bytes, true, "allocation of " + std::to_string(bytes) + " bytes"});
}

ae_cu_result init(unsigned int) { return AE_CU_SUCCESS; }

ae_cu_result device_count(int* count) {
  *count = 1;
  return AE_CU_SUCCESS;
}

ae_cu_result device_get(ae_cu_device* device, int ordinal) {
  if (ordinal != 0) return failed(AE_CU_INVALID_DEVICE, "the simulator is one device, number 0");
  *device = 0;
  return AE_CU_SUCCESS;
}

ae_cu_result device_attribute(int* value, int attribute, ae_cu_device) {
  int capability = settings().capability;
  switch (attribute) {
    case AE_CU_DEVICE_MAX_THREADS_PER_BLOCK:
      *value = 1024;
      return AE_CU_SUCCESS;
    case AE_CU_DEVICE_MAX_GRID_DIM_X:
      *value = 0x7fffffff;
      return AE_CU_SUCCESS;
    case AE_CU_DEVICE_MAX_SHARED_PER_BLOCK:
      *value = Kernel::kDefaultDynamicShared;
      return AE_CU_SUCCESS;
    case AE_CU_DEVICE_MULTIPROCESSORS:
      *value = settings().multiprocessors;
      return AE_CU_SUCCESS;
    case AE_CU_DEVICE_CAPABILITY_MAJOR:
      *value = capability / 10;
      return AE_CU_SUCCESS;
    case AE_CU_DEVICE_CAPABILITY_MINOR:
      *value = capability % 10;
      return AE_CU_SUCCESS;
    case AE_CU_DEVICE_MAX_SHARED_PER_BLOCK_OPTIN:
      *value = shared_limit(capability);
      return AE_CU_SUCCESS;
    default:
      return failed(AE_CU_INVALID_VALUE, "device attribute " + std::to_string(attribute) +
                                             " is not one that the simulator knows");
  }
}

namespace {

ae_cu_context context() {
  static char one;
  return reinterpret_cast<ae_cu_context>(&one);
}

}  // namespace

ae_cu_result primary_context(ae_cu_context* out, ae_cu_device) {
  *out = context();
  return AE_CU_SUCCESS;
}
ae_cu_result current_context(ae_cu_context* out) {
  *out = context();
  return AE_CU_SUCCESS;
}
ae_cu_result set_context(ae_cu_context) { return AE_CU_SUCCESS; }
ae_cu_result context_device(ae_cu_device* device) {
  *device = 0;
  return AE_CU_SUCCESS;
}

ae_cu_result mem_alloc(ae_cu_ptr* out, size_t bytes) {
  size_t rounded = align_up(std::max<size_t>(bytes, 1), 256);
  void* memory = std::aligned_alloc(256, rounded);
  if (memory == nullptr) return failed(AE_CU_OUT_OF_MEMORY, "out of memory");
  std::memset(memory, 0xFF, rounded);  // device memory comes with anything in it
  *out = reinterpret_cast<ae_cu_ptr>(memory);
  std::lock_guard lock(allocations().mutex);
  allocations().bytes[*out] = bytes;
  return AE_CU_SUCCESS;
}

ae_cu_result mem_free(ae_cu_ptr address) {
  std::lock_guard lock(allocations().mutex);
  if (address != 0 && allocations().bytes.erase(address) == 0)
    return failed(AE_CU_INVALID_VALUE, "an address that was not allocated is freed");
  std::free(reinterpret_cast<void*>(address));
  return AE_CU_SUCCESS;
}

ae_cu_result memset8(ae_cu_ptr address, unsigned char value, size_t bytes, ae_cu_stream) {
  std::memset(reinterpret_cast<void*>(address), value, bytes);
  return AE_CU_SUCCESS;
}

ae_cu_result copy_to_host(void* to, ae_cu_ptr from, size_t bytes, ae_cu_stream) {
  std::memcpy(to, reinterpret_cast<const void*>(from), bytes);
  return AE_CU_SUCCESS;
}

ae_cu_result is_capturing(ae_cu_stream, int* status) {
  *status = AE_CU_CAPTURE_NONE;
  return AE_CU_SUCCESS;
}
ae_cu_result synchronize(ae_cu_stream) { return AE_CU_SUCCESS; }
ae_cu_result exchange_capture_mode(int* mode) {
  static thread_local int current = AE_CU_CAPTURE_GLOBAL;
  std::swap(*mode, current);
  return AE_CU_SUCCESS;
}

ae_cu_result error_string(ae_cu_result error, const char** text) {
  switch (error) {
    case AE_CU_SUCCESS:
      *text = "no error";
      return AE_CU_SUCCESS;
    case AE_CU_INVALID_VALUE:
      *text = "invalid argument";
      return AE_CU_SUCCESS;
    case AE_CU_OUT_OF_MEMORY:
      *text = "out of memory";
      return AE_CU_SUCCESS;
    case AE_CU_INVALID_DEVICE:
      *text = "invalid device ordinal";
      return AE_CU_SUCCESS;
    case AE_CU_NO_BINARY_FOR_GPU:
      *text = "no kernel image is available for execution on the device";
      return AE_CU_SUCCESS;
    case AE_CU_INVALID_PTX:
      *text = "a PTX compilation failed";
      return AE_CU_SUCCESS;
    case AE_CU_NOT_FOUND:
      *text = "named symbol not found";
      return AE_CU_SUCCESS;
    case AE_CU_LAUNCH_FAILED:
      *text = "the simulated kernel failed";
      return AE_CU_SUCCESS;
    default:
      *text = nullptr;
      return AE_CU_INVALID_VALUE;
  }
}

}  // namespace ptxsim
