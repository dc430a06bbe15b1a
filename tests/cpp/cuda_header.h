// Our declarations of the CUDA driver's types and functions against its own header.
#pragma once
#include <cuda.h>

#include <cstddef>
#include <type_traits>

#include "driver.h"

#define SAME_PLACE(ours, field, theirs, their_field)                      \
  static_assert(offsetof(ours, field) == offsetof(theirs, their_field) && \
                sizeof(ours::field) == sizeof(theirs::their_field))
static_assert(sizeof(ae_cu_launch_config) == sizeof(CUlaunchConfig));
static_assert(alignof(ae_cu_launch_config) == alignof(CUlaunchConfig));
SAME_PLACE(ae_cu_launch_config, grid_x, CUlaunchConfig, gridDimX);
SAME_PLACE(ae_cu_launch_config, grid_z, CUlaunchConfig, gridDimZ);
SAME_PLACE(ae_cu_launch_config, block_x, CUlaunchConfig, blockDimX);
SAME_PLACE(ae_cu_launch_config, block_z, CUlaunchConfig, blockDimZ);
SAME_PLACE(ae_cu_launch_config, shared_bytes, CUlaunchConfig, sharedMemBytes);
SAME_PLACE(ae_cu_launch_config, stream, CUlaunchConfig, hStream);
SAME_PLACE(ae_cu_launch_config, attributes, CUlaunchConfig, attrs);
SAME_PLACE(ae_cu_launch_config, attribute_count, CUlaunchConfig, numAttrs);
static_assert(sizeof(ae_cu_launch_attribute) == sizeof(CUlaunchAttribute));
static_assert(alignof(ae_cu_launch_attribute) == alignof(CUlaunchAttribute));
SAME_PLACE(ae_cu_launch_attribute, id, CUlaunchAttribute, id);
SAME_PLACE(ae_cu_launch_attribute, value, CUlaunchAttribute, value);
static_assert(sizeof(ae_cu_launch_value) == sizeof(CUlaunchAttributeValue));
SAME_PLACE(ae_cu_launch_value, cluster, CUlaunchAttributeValue, clusterDim);
static_assert(sizeof(ae_cu_result) == sizeof(CUresult) && sizeof(ae_cu_ptr) == sizeof(CUdeviceptr));
static_assert(sizeof(ae_cu_device) == sizeof(CUdevice));

#define SAME_VALUE(ours, theirs) static_assert(int(ours) == int(theirs))
SAME_VALUE(AE_CU_SUCCESS, CUDA_SUCCESS);
SAME_VALUE(AE_CU_INVALID_VALUE, CUDA_ERROR_INVALID_VALUE);
SAME_VALUE(AE_CU_OUT_OF_MEMORY, CUDA_ERROR_OUT_OF_MEMORY);
SAME_VALUE(AE_CU_NO_DEVICE, CUDA_ERROR_NO_DEVICE);
SAME_VALUE(AE_CU_INVALID_DEVICE, CUDA_ERROR_INVALID_DEVICE);
SAME_VALUE(AE_CU_NO_BINARY_FOR_GPU, CUDA_ERROR_NO_BINARY_FOR_GPU);
SAME_VALUE(AE_CU_INVALID_PTX, CUDA_ERROR_INVALID_PTX);
SAME_VALUE(AE_CU_UNSUPPORTED_PTX_VERSION, CUDA_ERROR_UNSUPPORTED_PTX_VERSION);
SAME_VALUE(AE_CU_NOT_FOUND, CUDA_ERROR_NOT_FOUND);
SAME_VALUE(AE_CU_LAUNCH_FAILED, CUDA_ERROR_LAUNCH_FAILED);
SAME_VALUE(AE_CU_DEVICE_MAX_THREADS_PER_BLOCK, CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK);
SAME_VALUE(AE_CU_DEVICE_MAX_GRID_DIM_X, CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X);
SAME_VALUE(AE_CU_DEVICE_MAX_SHARED_PER_BLOCK, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK);
SAME_VALUE(AE_CU_DEVICE_MULTIPROCESSORS, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
SAME_VALUE(AE_CU_DEVICE_CAPABILITY_MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
SAME_VALUE(AE_CU_DEVICE_CAPABILITY_MINOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
SAME_VALUE(AE_CU_DEVICE_MAX_SHARED_PER_BLOCK_OPTIN,
           CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
SAME_VALUE(AE_CU_FUNC_MAX_THREADS_PER_BLOCK, CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK);
SAME_VALUE(AE_CU_FUNC_STATIC_SHARED, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES);
SAME_VALUE(AE_CU_FUNC_REGISTERS, CU_FUNC_ATTRIBUTE_NUM_REGS);
SAME_VALUE(AE_CU_FUNC_MAX_DYNAMIC_SHARED, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);
SAME_VALUE(AE_CU_JIT_ERROR_LOG, CU_JIT_ERROR_LOG_BUFFER);
SAME_VALUE(AE_CU_JIT_ERROR_LOG_BYTES, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES);
SAME_VALUE(AE_CU_CAPTURE_NONE, CU_STREAM_CAPTURE_STATUS_NONE);
SAME_VALUE(AE_CU_CAPTURE_ACTIVE, CU_STREAM_CAPTURE_STATUS_ACTIVE);
SAME_VALUE(AE_CU_CAPTURE_INVALIDATED, CU_STREAM_CAPTURE_STATUS_INVALIDATED);
SAME_VALUE(AE_CU_CAPTURE_GLOBAL, CU_STREAM_CAPTURE_MODE_GLOBAL);
SAME_VALUE(AE_CU_CAPTURE_THREAD_LOCAL, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
SAME_VALUE(AE_CU_CAPTURE_RELAXED, CU_STREAM_CAPTURE_MODE_RELAXED);

// Each argument is passed alike: pointers as pointers, numbers of one size as numbers of that size.
template <class Ours, class Theirs>
constexpr bool same_argument() {
  return sizeof(Ours) == sizeof(Theirs) && std::is_pointer_v<Ours> == std::is_pointer_v<Theirs>;
}
template <class... Ours, class... Theirs>
constexpr bool same_signature(ae_cu_result (*)(Ours...), CUresult (*)(Theirs...)) {
  if constexpr (sizeof...(Ours) == sizeof...(Theirs)) {
    return (same_argument<Ours, Theirs>() && ...);
  } else {
    return false;
  }
}
#define SAME_CALL(name) \
  static_assert(same_signature(decltype(ae_driver::name){}, decltype(&cu##name){}))
SAME_CALL(Init);
SAME_CALL(DeviceGetCount);
SAME_CALL(DeviceGet);
SAME_CALL(DeviceGetAttribute);
SAME_CALL(DevicePrimaryCtxRetain);
SAME_CALL(CtxGetCurrent);
SAME_CALL(CtxSetCurrent);
SAME_CALL(CtxGetDevice);
SAME_CALL(ModuleLoadDataEx);
SAME_CALL(ModuleUnload);
SAME_CALL(ModuleGetFunction);
SAME_CALL(FuncGetAttribute);
SAME_CALL(FuncSetAttribute);
SAME_CALL(OccupancyMaxActiveBlocksPerMultiprocessor);
SAME_CALL(LaunchKernelEx);
static_assert(same_signature(decltype(ae_driver::MemAlloc){}, decltype(&cuMemAlloc_v2){}));
static_assert(same_signature(decltype(ae_driver::MemFree){}, decltype(&cuMemFree_v2){}));
SAME_CALL(MemsetD8Async);
static_assert(same_signature(decltype(ae_driver::MemcpyDtoHAsync){},
                             decltype(&cuMemcpyDtoHAsync_v2){}));
SAME_CALL(StreamIsCapturing);
SAME_CALL(StreamSynchronize);
SAME_CALL(ThreadExchangeStreamCaptureMode);
SAME_CALL(GetErrorString);
