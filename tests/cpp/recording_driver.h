// A driver that launches nothing and remembers what it was told.
#pragma once
#include <atomic>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "driver.h"

namespace recording {

struct Launch {
  ae_cu_launch_config config;
  std::string function;  // its name
  int device;            // of the context that it ran in
  std::vector<char> params;
};

struct Region {
  const void* address;
  int64_t bytes;
  bool writable;
};

// What a test sets, and what it reads back.
struct State {
  // device ordinal -> compute capability
  std::vector<int> capabilities = {80};
  int shared_optin = 166912;
  int static_shared = 0;
  int occupancy = 2;
  int capture_status = AE_CU_CAPTURE_NONE;
  int32_t fault = 0;                          // what a launch leaves in the fault word
  size_t param_bytes = 0;                     // of a kernel's parameter
  std::map<std::string, ae_cu_result> fails;  // function of the table -> its result
  std::string missing_entry;

  std::vector<Launch> launches;
  std::vector<std::string> images;  // as loaded, in order
  std::vector<int> image_devices;
  std::vector<std::pair<int, int>> function_attributes;
  std::map<std::string, Region> regions;
  int unloads = 0, allocations = 0, synchronizations = 0, memsets = 0;
  int current = -1;  // device whose context is current, -1: none
  int capture_mode = AE_CU_CAPTURE_GLOBAL;
};
inline State state;
inline int32_t fault_words[8];

inline ae_cu_result result(const char* function) {
  const auto found = state.fails.find(function);
  return found == state.fails.end() ? static_cast<ae_cu_result>(AE_CU_SUCCESS) : found->second;
}
inline ae_cu_context context_of(int device) {
  return device < 0 ? nullptr : reinterpret_cast<ae_cu_context>(uintptr_t(device) + 1);
}
inline int device_of(ae_cu_context context) {
  return context == nullptr ? -1 : int(reinterpret_cast<uintptr_t>(context)) - 1;
}
// A function is its place here.
constexpr const char* kEntries[] = {"", "ae_forward", "ae_tables", "ae_schedule", "ae_combine"};
inline const char* name_of(ae_cu_function function) {
  return kEntries[reinterpret_cast<uintptr_t>(function)];
}
inline ae_cu_function function_of(const char* name) {
  uintptr_t i = 1;
  while (std::strcmp(kEntries[i], name) != 0) ++i;
  return reinterpret_cast<ae_cu_function>(i);
}

inline const ae_driver table = {
    .version = AE_DRIVER_VERSION,
    .bytes = sizeof(ae_driver),
    .name = "recording",
    .Init = [](unsigned int) { return 0; },
    .DeviceGetCount =
        [](int* count) {
          *count = int(state.capabilities.size());
          return 0;
        },
    .DeviceGet =
        [](ae_cu_device* device, int ordinal) {
          *device = ordinal;
          return 0;
        },
    .DeviceGetAttribute =
        [](int* value, int attribute, ae_cu_device device) {
          const int capability = state.capabilities[size_t(device)];
          *value = attribute == AE_CU_DEVICE_CAPABILITY_MAJOR   ? capability / 10
                   : attribute == AE_CU_DEVICE_CAPABILITY_MINOR ? capability % 10
                   : attribute == AE_CU_DEVICE_MULTIPROCESSORS  ? 108
                                                                : state.shared_optin;
          return 0;
        },
    .DevicePrimaryCtxRetain =
        [](ae_cu_context* context, ae_cu_device device) {
          *context = context_of(device);
          return 0;
        },
    .CtxGetCurrent =
        [](ae_cu_context* context) {
          *context = context_of(state.current);
          return 0;
        },
    .CtxSetCurrent =
        [](ae_cu_context context) {
          state.current = device_of(context);
          return 0;
        },
    .CtxGetDevice =
        [](ae_cu_device* device) {
          *device = state.current;
          return 0;
        },
    .ModuleLoadDataEx =
        [](ae_cu_module* module, const void* image, unsigned int options, int* keys,
           void** values) {
          state.images.emplace_back(static_cast<const char*>(image));
          state.image_devices.push_back(state.current);
          const ae_cu_result error = result("ModuleLoadDataEx");
          if (error != 0 && options == 2 && keys[0] == AE_CU_JIT_ERROR_LOG) {
            std::strcpy(static_cast<char*>(values[0]), "line 7: a log");
          }
          *module = reinterpret_cast<ae_cu_module>(uintptr_t{1});
          return error;
        },
    .ModuleUnload =
        [](ae_cu_module) {
          ++state.unloads;
          return 0;
        },
    .ModuleGetFunction = [](ae_cu_function* function, ae_cu_module,
                            const char* name) -> ae_cu_result {
      if (state.missing_entry == name) return AE_CU_NOT_FOUND;
      *function = function_of(name);
      return 0;
    },
    .FuncGetAttribute =
        [](int* value, int attribute, ae_cu_function) {
          *value = attribute == AE_CU_FUNC_STATIC_SHARED ? state.static_shared : 255;
          return 0;
        },
    .FuncSetAttribute =
        [](ae_cu_function, int attribute, int value) {
          state.function_attributes.emplace_back(attribute, value);
          return 0;
        },
    .OccupancyMaxActiveBlocksPerMultiprocessor =
        [](int* blocks, ae_cu_function, int, size_t) {
          *blocks = state.occupancy;
          return 0;
        },
    .LaunchKernelEx = [](const ae_cu_launch_config* config, ae_cu_function function, void** params,
                         void** extra) -> ae_cu_result {
      if (extra != nullptr) return AE_CU_INVALID_VALUE;
      const char* data = static_cast<const char*>(params[0]);
      state.launches.push_back(
          {*config, name_of(function), state.current, {data, data + state.param_bytes}});
      if (state.current >= 0) fault_words[state.current] = state.fault;
      return result("LaunchKernelEx");
    },
    .MemAlloc =
        [](ae_cu_ptr* address, size_t) {
          ++state.allocations;
          *address = reinterpret_cast<ae_cu_ptr>(&fault_words[state.current]);
          return 0;
        },
    .MemFree = [](ae_cu_ptr) { return 0; },
    .MemsetD8Async =
        [](ae_cu_ptr address, unsigned char value, size_t bytes, ae_cu_stream) {
          ++state.memsets;
          std::memset(reinterpret_cast<void*>(address), value, bytes);
          return 0;
        },
    .MemcpyDtoHAsync =
        [](void* to, ae_cu_ptr from, size_t bytes, ae_cu_stream) {
          std::memcpy(to, reinterpret_cast<const void*>(from), bytes);
          return 0;
        },
    .StreamIsCapturing =
        [](ae_cu_stream, int* status) {
          *status = state.capture_status;
          return 0;
        },
    .StreamSynchronize =
        [](ae_cu_stream) {
          ++state.synchronizations;
          return result("StreamSynchronize");
        },
    .ThreadExchangeStreamCaptureMode =
        [](int* mode) {
          std::swap(*mode, state.capture_mode);
          return 0;
        },
    .GetErrorString =
        [](ae_cu_result, const char** text) {
          *text = "a recorded error";
          return 0;
        },
    .describe_memory = nullptr,
    .last_report = nullptr,
};

inline const ae_driver simulator = [] {
  ae_driver t = table;
  t.name = "simulator";
  t.describe_memory = [](const ae_memory_region* regions, int count) {
    state.regions.clear();
    for (int i = 0; i < count; ++i) {
      state.regions[regions[i].name] = {regions[i].address, regions[i].bytes,
                                        regions[i].writable != 0};
    }
    if (state.fault != 0) {
      *static_cast<int32_t*>(const_cast<void*>(state.regions["fault"].address)) = state.fault;
    }
  };
  t.last_report = [] { return "out of bounds: ld.global at line 12"; };
  return t;
}();

}  // namespace recording
