// The table of CUDA driver functions through which the launcher loads and launches kernels. On a
// machine with a GPU it is filled from libcuda.so.1, which is never linked; the PTX simulator
// (tests/ptxsim) supplies another one. Plain C, and no CUDA header is needed to build with it.
//
// Signatures, layouts and values are those of cuda.h (CUDA 12 and later, where the functions that
// have versions mean their _v2). tests/cpp/driver_test.cpp compares them with cuda.h where there is
// one. Types have names of our own, so that both headers can be included together.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define AE_DRIVER_VERSION 1  // bump on any change of ae_driver

typedef int ae_cu_result;              // CUresult
typedef int ae_cu_device;              // CUdevice
typedef unsigned long long ae_cu_ptr;  // CUdeviceptr
typedef struct ae_cu_context_st* ae_cu_context;
typedef struct ae_cu_module_st* ae_cu_module;
typedef struct ae_cu_function_st* ae_cu_function;
typedef struct ae_cu_stream_st* ae_cu_stream;

// The results that the launcher gives a meaning; any other is reported by GetErrorString.
enum {
  AE_CU_SUCCESS = 0,
  AE_CU_INVALID_VALUE = 1,
  AE_CU_OUT_OF_MEMORY = 2,
  AE_CU_NO_DEVICE = 100,
  AE_CU_INVALID_DEVICE = 101,
  AE_CU_NO_BINARY_FOR_GPU = 209,
  AE_CU_INVALID_PTX = 218,
  AE_CU_UNSUPPORTED_PTX_VERSION = 222,
  AE_CU_NOT_FOUND = 500,
  AE_CU_LAUNCH_FAILED = 719,
};

// CUdevice_attribute
enum {
  AE_CU_DEVICE_MAX_THREADS_PER_BLOCK = 1,
  AE_CU_DEVICE_MAX_GRID_DIM_X = 5,
  AE_CU_DEVICE_MAX_SHARED_PER_BLOCK = 8,
  AE_CU_DEVICE_MULTIPROCESSORS = 16,
  AE_CU_DEVICE_CAPABILITY_MAJOR = 75,
  AE_CU_DEVICE_CAPABILITY_MINOR = 76,
  AE_CU_DEVICE_MAX_SHARED_PER_BLOCK_OPTIN = 97,
};

// CUfunction_attribute
enum {
  AE_CU_FUNC_MAX_THREADS_PER_BLOCK = 0,
  AE_CU_FUNC_STATIC_SHARED = 1,
  AE_CU_FUNC_REGISTERS = 4,
  AE_CU_FUNC_MAX_DYNAMIC_SHARED = 8,
};

// CUjit_option of ModuleLoadDataEx
enum { AE_CU_JIT_ERROR_LOG = 5, AE_CU_JIT_ERROR_LOG_BYTES = 6 };

// CUstreamCaptureStatus and CUstreamCaptureMode
enum { AE_CU_CAPTURE_NONE = 0, AE_CU_CAPTURE_ACTIVE = 1, AE_CU_CAPTURE_INVALIDATED = 2 };
enum { AE_CU_CAPTURE_GLOBAL = 0, AE_CU_CAPTURE_THREAD_LOCAL = 1, AE_CU_CAPTURE_RELAXED = 2 };

// CUlaunchAttribute. `id` is a CUlaunchAttributeID.
typedef union ae_cu_launch_value {
  char bytes[64];
  int cooperative;  // id 2
  struct {
    unsigned int x, y, z;
  } cluster;                          // id 4
  int programmatic_serialization;     // id 6
  unsigned long long eight_bytes[8];  // gives the union its alignment
} ae_cu_launch_value;
typedef struct ae_cu_launch_attribute {
  int id;
  char pad[4];
  ae_cu_launch_value value;
} ae_cu_launch_attribute;

// CUlaunchConfig
typedef struct ae_cu_launch_config {
  unsigned int grid_x, grid_y, grid_z;
  unsigned int block_x, block_y, block_z;
  unsigned int shared_bytes;  // dynamic
  ae_cu_stream stream;
  ae_cu_launch_attribute* attributes;  // null when there are none
  unsigned int attribute_count;
} ae_cu_launch_config;

// Memory that a simulated launch may touch. Bytes outside every region are out of bounds; regions
// may overlap where tensors share storage.
typedef struct ae_memory_region {
  const void* address;
  int64_t bytes;
  int32_t writable;  // 0: a write is a fault
  const char* name;  // "q", "captures[2]", ...; copied
} ae_memory_region;

typedef struct ae_driver {
  uint32_t version;  // AE_DRIVER_VERSION
  uint32_t bytes;    // sizeof(ae_driver)
  const char* name;  // "cuda" or "simulator"

  ae_cu_result (*Init)(unsigned int flags);
  ae_cu_result (*DeviceGetCount)(int* count);
  ae_cu_result (*DeviceGet)(ae_cu_device* device, int ordinal);
  ae_cu_result (*DeviceGetAttribute)(int* value, int attribute, ae_cu_device device);
  ae_cu_result (*DevicePrimaryCtxRetain)(ae_cu_context* context, ae_cu_device device);
  ae_cu_result (*CtxGetCurrent)(ae_cu_context* context);
  ae_cu_result (*CtxSetCurrent)(ae_cu_context context);
  ae_cu_result (*CtxGetDevice)(ae_cu_device* device);
  // `image` is a cubin or zero-terminated PTX text (the simulator takes PTX alone) and may be freed
  // afterwards.
  ae_cu_result (*ModuleLoadDataEx)(ae_cu_module* module, const void* image, unsigned int options,
                                   int* option_keys, void** option_values);
  ae_cu_result (*ModuleUnload)(ae_cu_module module);
  ae_cu_result (*ModuleGetFunction)(ae_cu_function* function, ae_cu_module module,
                                    const char* name);
  ae_cu_result (*FuncGetAttribute)(int* value, int attribute, ae_cu_function function);
  ae_cu_result (*FuncSetAttribute)(ae_cu_function function, int attribute, int value);
  ae_cu_result (*OccupancyMaxActiveBlocksPerMultiprocessor)(int* blocks, ae_cu_function function,
                                                            int threads, size_t shared_bytes);
  // `extra` is null; params[i] points to the value of the kernel's parameter i.
  ae_cu_result (*LaunchKernelEx)(const ae_cu_launch_config* config, ae_cu_function function,
                                 void** params, void** extra);
  ae_cu_result (*MemAlloc)(ae_cu_ptr* address, size_t bytes);
  ae_cu_result (*MemFree)(ae_cu_ptr address);
  ae_cu_result (*MemsetD8Async)(ae_cu_ptr address, unsigned char value, size_t bytes,
                                ae_cu_stream stream);
  ae_cu_result (*MemcpyDtoHAsync)(void* to, ae_cu_ptr from, size_t bytes, ae_cu_stream stream);
  ae_cu_result (*StreamIsCapturing)(ae_cu_stream stream, int* status);
  ae_cu_result (*StreamSynchronize)(ae_cu_stream stream);
  ae_cu_result (*ThreadExchangeStreamCaptureMode)(int* mode);
  ae_cu_result (*GetErrorString)(ae_cu_result error, const char** text);

  // A simulator's own; null in the table of a real driver. What the calling thread's launches may
  // touch, until its next call; without one they may touch nothing.
  void (*describe_memory)(const ae_memory_region* regions, int count);
  // Why the calling thread's latest failed call failed: the whole report of a fault, or where a
  // module cannot be read. Never null; valid until the thread's next call of the table.
  const char* (*last_report)(void);
} ae_driver;

// What a simulator's shared object exports: ptxsim_driver().
typedef const ae_driver* (*ae_driver_getter)(void);

#ifdef __cplusplus
}
#endif
