// C entry points of the operator library for attnengine._host, which resolves them at run time and
// so depends on neither torch nor this library's C++ ABI.
#pragma once
#include <stdint.h>

#include "common/abi.h"
#include "cuda_info.h"

#ifdef __cplusplus
extern "C" {
#endif

#define AE_HOST_API_VERSION 7  // bump on any change of ae_host_api

// One tensor argument for the argument checks; `device` is ae::DeviceKind.
typedef struct ae_host_tensor {
  const int64_t* size;
  int64_t rank;
  int32_t dtype;
  int32_t device;
  int32_t device_index;
} ae_host_tensor;

// Functions that can fail return a negative value and write the reason to `error`.
typedef struct ae_host_api {
  uint32_t version;
  // `ranks` and `dtypes` describe the captured tensors that the module was generated for; null when
  // unknown. Returns the kernel's id.
  int32_t (*load_kernel)(const char* path, const int32_t* ranks, const int32_t* dtypes,
                         int32_t capture_count, char* error, int64_t error_bytes);
  // The same for a CUDA kernel; `cubin_path` may be empty.
  int32_t (*load_cuda_kernel)(const char* ptx_path, const char* cubin_path,
                              const ae_cuda_info* info, const int32_t* ranks, const int32_t* dtypes,
                              int32_t capture_count, char* error, int64_t error_bytes);
  const ae_module_info* (*kernel_info)(int64_t id);  // null: no such kernel
  const ae_cuda_info* (*cuda_info)(int64_t id);      // null: no such kernel, or one for the CPU
  const char* (*kernel_path)(int64_t id);
  // Rank and ae_dtype that captured tensor `index` was declared with; 0 when nothing was declared.
  int32_t (*kernel_capture)(int64_t id, int32_t index, int32_t* rank, int32_t* dtype);
  // As ae_describe_cut; -1: an error.
  int32_t (*describe_cut)(int64_t id, const ae_params* params, ae_cut* cut, int64_t* prefix,
                          int64_t capacity, char* error, int64_t error_bytes);
  // The number of runs (as in ae_classify).
  int64_t (*classify)(int64_t id, const ae_params* params, int64_t b, int64_t h, ae_row_run* out,
                      int64_t capacity, char* error, int64_t error_bytes);
  // Bytes of scratch that a launch of these sizes on params->threads threads takes; -1: an error.
  int64_t (*workspace_bytes)(int64_t id, const ae_params* params, char* error, int64_t error_bytes);
  // The checks that forward applies to q, k, v and captures. 0 = they pass.
  int32_t (*check_forward)(int64_t id, const ae_host_tensor* qkv, const ae_host_tensor* captures,
                           int32_t capture_count, char* error, int64_t error_bytes);
  int32_t (*cpu_isa)(void);
  // `table` is an ae_driver that lives as long as the process; null removes the installed one.
  int32_t (*install_driver)(const void* table, char* error, int64_t error_bytes);
  // The table's name ("none" without a driver), written to `name`.
  int32_t (*driver_name)(char* name, int64_t name_bytes, char* error, int64_t error_bytes);
  // 80 for compute capability 8.0.
  int32_t (*device_capability)(int32_t index, char* error, int64_t error_bytes);
  void (*set_sync_debug)(int32_t on);
  void (*set_poison)(int32_t on);
  // How CUDA kernels that split their work do it; policy < 0: as predicted to be fastest.
  void (*set_schedule_policy)(int32_t policy, int32_t splits, int64_t workers);
  // Of the process's pool (csrc/pool.h): bytes of free blocks, and their limit.
  int64_t (*kept_bytes)(void);
  void (*keep_at_most)(int64_t bytes);
} ae_host_api;

__attribute__((visibility("default"))) const ae_host_api* attnengine_host_api(void);

#ifdef __cplusplus
}
#endif
