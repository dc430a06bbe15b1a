// How CUDA kernels are loaded and launched, over a driver that records what it is told; and our
// declarations of the driver's types against cuda.h, where there is one.
#include <unistd.h>
#include <cstddef>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <thread>

#if __has_include(<cuda.h>)
#include <cuda.h>
#define HAS_CUDA_H 1
#endif

#include "check.h"
#include "common/abi_cuda.h"
#include "common/block_tables.h"
#include "cuda_launch.h"
#include "recording_driver.h"
#include "validate.h"

namespace {

using recording::state;

#ifdef HAS_CUDA_H
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
#endif

constexpr const char* kCubin = "the cubin";
constexpr const char* kPtx = "the PTX";

// A folder that holds the two images.
class Images {
 public:
  Images()
      : folder_(std::filesystem::temp_directory_path() /
                ("attnengine_driver_test_" + std::to_string(getpid()))) {
    std::filesystem::create_directories(folder_);
    std::ofstream(ptx()) << kPtx;
    std::ofstream(cubin()) << kCubin;
    std::ofstream(folder_ / "empty").flush();
  }
  ~Images() { std::filesystem::remove_all(folder_); }
  std::string ptx() const { return folder_ / "kernel.ptx"; }
  std::string cubin() const { return folder_ / "kernel.cubin"; }
  std::string empty() const { return folder_ / "empty"; }

 private:
  std::filesystem::path folder_;
};

ae_cuda_info description() {
  ae_cuda_info x{};
  x.info.kind = AE_FORWARD;
  x.info.dtype = AE_F16;
  x.info.D = 64;
  x.info.Dv = 32;
  x.info.stats = 2;
  x.info.key = "abc123";
  x.target = 80;
  x.threads = 128;
  x.shared_bytes = 40000;
  x.block_m = 64;
  x.block_n = 32;
  return x;
}

template <class Error, class Body>
std::string text_of(Body body) {
  try {
    body();
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}
bool has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

// The devices of a driver are described once, so that each set of facts needs a table of its own.
const ae_driver& fresh_driver(const ae_driver& like = recording::table) {
  state = recording::State();
  std::memset(recording::fault_words, 0, sizeof(recording::fault_words));
  return *new ae_driver(like);
}

ae_params sizes(int64_t B, int64_t Hq, int64_t Hkv, int64_t L, int64_t S) {
  ae_params p{};
  p.abi_version = AE_ABI_VERSION;
  p.bytes = sizeof(p);
  p.B = B, p.Hq = Hq, p.Hkv = Hkv, p.L = L, p.S = S;
  return p;
}

ae_capture vector_of(const void* data, int64_t size, int32_t dtype) {
  ae_capture c{};
  c.data = data;
  c.rank = 1;
  c.size[0] = size;
  c.stride[0] = 1;
  c.dtype = dtype;
  return c;
}

template <int N>
void test_layout(int count) {
  const int32_t small[2] = {}, large[5000] = {};
  std::vector<ae_capture> captures;
  for (int i = 0; i < count; ++i) {
    captures.push_back(i % 2 == 0 ? vector_of(large, 5000, AE_I32) : vector_of(small, 2, AE_I32));
  }
  ae_params p = sizes(2, 4, 2, 300, 5000);
  p.scale = 0.25;
  p.captures = captures.data();
  p.capture_count = count;
  ae::CudaParams params(p, 0b101);
  using Wanted = ae::KernelParams<N>;
  CHECK(params.bytes() == sizeof(Wanted));
  const auto& got = *static_cast<const Wanted*>(params.data());
  CHECK(got.p.captures == nullptr && got.p.capture_count == count && got.p.scale == 0.25);
  CHECK(got.p.L == 300 && got.p.Hkv == 2);
  int64_t bytes = 0;
  for (int i = 0; i < count; ++i) {
    CHECK(got.cap[i].data == captures[i].data && got.cap[i].size[0] == captures[i].size[0]);
    if (i == 0 || i == 2) bytes += ae::iv::key_bytes(ae::iv::table_shape(p, i), captures[i]);
  }
  CHECK(params.workspace_bytes() == bytes);
  CHECK(params.table_blocks() == (count > 0 ? 2 : 0));  // 5000 elements are two coarse blocks
  std::vector<char> workspace(static_cast<size_t>(bytes) + 1);
  params.place(workspace.data());
  for (int i = 0; i < N; ++i) {
    const bool wanted = i < count && (i == 0 || i == 2);
    CHECK((got.tables[i].keys != nullptr) == wanted);
    if (wanted) CHECK(got.tables[i].rows == 1 && got.tables[i].size == 5000);
  }
  if (count > 0) CHECK(got.tables[0].keys == workspace.data());
  if (count > 2) {
    CHECK(static_cast<char*>(got.tables[2].keys) == workspace.data() + bytes / 2);
  }
}

void test_too_many_captures() {
  const int32_t zero = 0;
  std::vector<ae_capture> captures(500, vector_of(&zero, 1, AE_I32));
  ae_params p = sizes(1, 1, 1, 1, 1);
  p.captures = captures.data();
  p.capture_count = 500;
  CHECK(has(text_of<std::invalid_argument>([&] { ae::CudaParams(p, 0); }), "captures has 500"));
  p.capture_count = 160;
  ae::CudaParams largest(p, 0);
  CHECK(largest.bytes() <= 32764);
}

void test_grid() {
  ae_cuda_info info = description();
  CHECK(ae::forward_blocks(info, sizes(2, 4, 2, 65, 9)) == 2 * 4 * 2);
  info.pack_group = 1;
  CHECK(ae::forward_blocks(info, sizes(2, 4, 2, 65, 9)) == 2 * 2 * 3);  // 130 rows
  CHECK(ae::forward_blocks(info, sizes(1, 8, 1, 1, 9)) == 1);
  info.block_m = 1;
  const int64_t most = (int64_t{1} << 31) - 1;
  CHECK(ae::forward_blocks(info, sizes(1, 1, 1, most, 9)) == most);
  CHECK(has(text_of<std::invalid_argument>(
                [&] { ae::forward_blocks(info, sizes(1, 1, 1, most + 1, 9)); }),
            "q has batch 1, 1 heads and length 2147483648"));
  const int64_t large = int64_t{1} << 29;
  CHECK(has(text_of<std::invalid_argument>(
                [&] { ae::forward_blocks(info, sizes(large, large, large, large, 9)); }),
            "split the call"));
}

void test_images(const Images& images) {
  // {compute capability, image}: "" is a refusal
  const std::pair<int, std::string> expected[] = {{75, ""},     {80, kCubin}, {86, kCubin},
                                                  {89, kCubin}, {90, kPtx},   {100, kPtx}};
  for (const auto& [capability, image] : expected) {
    const ae_driver& driver = fresh_driver();
    state.capabilities = {capability};
    const ae::CudaKernel kernel(description(), images.ptx(), images.cubin());
    const std::string error = text_of<std::runtime_error>([&] { kernel.on(driver, 0, nullptr); });
    if (image.empty()) {
      CHECK(has(error, "kernel abc123 on cuda:0") && has(error, "for sm_80") && has(error, "7.5"));
      CHECK(state.images.empty());
    } else {
      CHECK(error.empty() && state.images == std::vector<std::string>{image});
    }
    CHECK(state.current == -1 && state.capture_mode == AE_CU_CAPTURE_GLOBAL);
  }
  const ae_driver& driver = fresh_driver();
  const ae::CudaKernel only_ptx(description(), images.ptx(), "");
  only_ptx.on(driver, 0, nullptr);
  CHECK(state.images == std::vector<std::string>{kPtx});
  const ae_driver& simulator = fresh_driver(recording::simulator);
  ae::CudaKernel(description(), images.ptx(), images.cubin()).on(simulator, 0, nullptr);
  CHECK(state.images == std::vector<std::string>{kPtx} && state.allocations == 0);
}

void test_bad_descriptions(const Images& images) {
  const auto refusal = [&](auto change, const std::string& ptx) {
    ae_cuda_info info = description();
    change(info);
    return text_of<std::runtime_error>([&] { ae::CudaKernel(info, ptx, ""); });
  };
  const auto nothing = [](ae_cuda_info&) {};
  CHECK(refusal(nothing, images.ptx()).empty());
  CHECK(has(refusal(nothing, "/nowhere.ptx"), "/nowhere.ptx: cannot be read: No such file"));
  CHECK(has(refusal(nothing, images.empty()), "the file is empty"));
  CHECK(has(refusal([](auto& x) { x.threads = 100; }, images.ptx()), "threads = 100"));
  CHECK(has(refusal([](auto& x) { x.block_m = 0; }, images.ptx()), "block_m = 0"));
  CHECK(has(refusal([](auto& x) { x.info.kind = AE_BACKWARD; }, images.ptx()), "kind = 1"));
}

void test_loading(const Images& images) {
  const ae_driver* driver = &fresh_driver();
  const auto error_of = [&](const ae::CudaKernel& kernel, int device = 0) {
    return text_of<std::runtime_error>([&] { kernel.on(*driver, device, nullptr); });
  };
  ae_cuda_info info = description();
  ae::CudaKernel small(info, images.ptx(), images.cubin());
  state.capture_status = AE_CU_CAPTURE_ACTIVE;
  CHECK(has(error_of(small), "warm up with one call before capture") && state.images.empty());
  state.capture_status = AE_CU_CAPTURE_NONE;
  CHECK(error_of(small).empty() && state.function_attributes.empty());
  state.capture_status = AE_CU_CAPTURE_ACTIVE;
  CHECK(error_of(small).empty() && state.images.size() == 1);  // loaded: capture is no obstacle
  CHECK(has(error_of(small, 1), "there is no device cuda:1; the driver shows 1"));
  CHECK(has(error_of(small, 64), "beyond the limit of 64 devices"));
  CHECK(has(error_of(small, -1), "cuda:-1"));
  state.capture_status = AE_CU_CAPTURE_NONE;

  info.shared_bytes = 49153;
  CHECK(error_of(ae::CudaKernel(info, images.ptx(), "")).empty());
  const std::pair<int, int> attribute = {AE_CU_FUNC_MAX_DYNAMIC_SHARED, 49153};
  CHECK(state.function_attributes == std::vector{attribute});
  info.shared_bytes = state.shared_optin;
  CHECK(error_of(ae::CudaKernel(info, images.ptx(), "")).empty());
  state.static_shared = 8;
  const std::string too_much = error_of(ae::CudaKernel(info, images.ptx(), ""));
  CHECK(has(too_much, "kernel abc123 on cuda:0") && has(too_much, "needs 166920 bytes"));
  CHECK(has(too_much, "the limit is 166912") && state.unloads == 1);
  state.static_shared = 0;
  state.occupancy = 0;
  CHECK(has(error_of(ae::CudaKernel(info, images.ptx(), "")), "128 threads of 255 registers"));
  state.occupancy = 1;
  state.missing_entry = "ae_tables";
  CHECK(error_of(ae::CudaKernel(info, images.ptx(), "")).empty());
  info.mask_captures = 1;
  CHECK(has(error_of(ae::CudaKernel(info, images.ptx(), "")),
            "cuModuleGetFunction(ae_tables) failed: a recorded error (CUDA driver error 500)"));
  state.fails["ModuleLoadDataEx"] = AE_CU_UNSUPPORTED_PTX_VERSION;
  const std::string refused = error_of(ae::CudaKernel(info, images.ptx(), ""));
  CHECK(has(refused, "the driver refused its PTX") && has(refused, "line 7: a log"));
  CHECK(has(refused, "older than the compiler"));
  CHECK(state.allocations == 1);  // the fault word, once for the device
}

void test_two_devices(const Images& images) {
  const ae_driver& driver = fresh_driver();
  state.capabilities = {80, 90};
  const ae::CudaKernel kernel(description(), images.ptx(), images.cubin());
  state.current = 0;
  const ae::CudaFunctions& second = kernel.on(driver, 1, nullptr);
  CHECK(state.current == 0);  // as it was
  const ae::CudaFunctions& first = kernel.on(driver, 0, nullptr);
  CHECK(&first != &second && first.device->fault != second.device->fault);
  CHECK((state.images == std::vector<std::string>{kPtx, kCubin}));
  CHECK((state.image_devices == std::vector<int>{1, 0}));
  ae::CudaParams params(sizes(1, 1, 1, 1, 1), 0);
  ae::launch_cuda(kernel, second, params, nullptr, nullptr);
  ae::launch_cuda(kernel, first, params, nullptr, nullptr);
  CHECK(state.launches[0].device == 1 && state.launches[1].device == 0 && state.current == 0);
  CHECK(ae::cuda_device(driver, 1).capability == 90);
  // Another driver in its place, then this one again: nothing is loaded twice.
  const ae_driver& other = *new ae_driver(recording::table);
  CHECK(&kernel.on(other, 0, nullptr) != &first && &kernel.on(driver, 0, nullptr) == &first);
  CHECK(state.images.size() == 3);
}

void test_threads_load_once(const Images& images) {
  const ae_driver& driver = fresh_driver();
  state.current = 0;
  const ae::CudaKernel kernel(description(), images.ptx(), images.cubin());
  std::vector<const ae::CudaFunctions*> seen(8);
  std::vector<std::thread> threads;
  for (auto& functions : seen) {
    threads.emplace_back([&] { functions = &kernel.on(driver, 0, nullptr); });
  }
  for (std::thread& t : threads) t.join();
  for (const auto* functions : seen) CHECK(functions == seen[0]);
  CHECK(state.images.size() == 1);
}

// A launch of q [2, 4, 65, 64] in BLHD order and keys that the whole batch shares.
struct Example {
  std::vector<uint16_t> q = std::vector<uint16_t>(2 * 65 * 4 * 64),
                        k = std::vector<uint16_t>(9 * 64);
  std::vector<uint16_t> v = std::vector<uint16_t>(9 * 32),
                        out = std::vector<uint16_t>(2 * 4 * 65 * 32);
  std::vector<float> stats = std::vector<float>(2 * 2 * 4 * 65);
  std::vector<int64_t> table = std::vector<int64_t>(300);
  ae_capture captures[1];
  ae_params p = sizes(2, 4, 1, 65, 9);

  Example() {
    const auto strides = [](int64_t* to, int64_t b, int64_t h, int64_t l) {
      to[0] = b, to[1] = h, to[2] = l, to[3] = 1;
    };
    p.q = q.data(), p.k = k.data(), p.v = v.data(), p.out = out.data(), p.stats = stats.data();
    strides(p.q_stride, 65 * 4 * 64, 64, 4 * 64);
    strides(p.k_stride, 0, 9 * 64, 64);
    strides(p.v_stride, 0, 9 * 32, 32);
    strides(p.out_stride, 4 * 65 * 32, 65 * 32, 32);
    captures[0] = vector_of(table.data(), 100, AE_I64);
    captures[0].stride[0] = 3;
    p.captures = captures;
    p.capture_count = 1;
  }
};

void test_launch(const Images& images) {
  const ae_driver& driver = fresh_driver();
  ae_cuda_info info = description();
  info.info.capture_count = 1;
  info.mask_captures = 1;
  const ae::CudaKernel kernel(info, images.ptx(), images.cubin());
  auto* stream = reinterpret_cast<ae_cu_stream>(uintptr_t{77});
  const ae::CudaFunctions& functions = kernel.on(driver, 0, stream);
  state.param_bytes = sizeof(ae::KernelParams<1>);
  state.memsets = state.synchronizations = 0;
  Example x;
  {
    ae::CudaParams params(x.p, info.mask_captures);
    CHECK(params.workspace_bytes() == 0);  // the table is too short to be worth one
    ae::launch_cuda(kernel, functions, params, nullptr, stream);
  }
  CHECK(state.launches.size() == 1 && state.launches[0].function == "ae_forward");
  const ae_cu_launch_config config = state.launches[0].config;
  CHECK(config.grid_x == 2 * 4 * 2 && config.grid_y == 1 && config.grid_z == 1);
  CHECK(config.block_x == 128 && config.block_y == 1 && config.block_z == 1);
  CHECK(config.shared_bytes == 40000 && config.stream == stream && config.attribute_count == 0);
  ae::KernelParams<1> got;
  std::memcpy(&got, state.launches[0].params.data(), sizeof(got));
  CHECK(got.p.q == x.p.q && got.p.fault == functions.device->fault && got.p.captures == nullptr);
  CHECK(got.cap[0].data == x.table.data() && got.cap[0].stride[0] == 3);
  CHECK(got.tables[0].keys == nullptr);
  CHECK(state.memsets == 0 && state.synchronizations == 0);

  x.captures[0].size[0] = 128;
  ae::CudaParams params(x.p, info.mask_captures);
  std::vector<char> workspace(static_cast<size_t>(params.workspace_bytes()));
  CHECK(!workspace.empty());
  ae::launch_cuda(kernel, functions, params, workspace.data(), stream);
  CHECK(state.launches.size() == 3 && state.launches[1].function == "ae_tables");
  CHECK(state.launches[1].config.grid_x == 1 && state.launches[1].config.block_x == 128);
  CHECK(state.launches[1].config.shared_bytes == 0 && state.launches[1].config.stream == stream);
  std::memcpy(&got, state.launches[2].params.data(), sizeof(got));
  CHECK(got.tables[0].keys == workspace.data() && got.tables[0].size == 128);

  state.fails["LaunchKernelEx"] = AE_CU_INVALID_VALUE;
  CHECK(text_of<std::runtime_error>(
            [&] { ae::launch_cuda(kernel, functions, params, workspace.data(), stream); }) ==
        "attnengine: kernel abc123 on cuda:0: ae_tables failed: a recorded error (CUDA driver "
        "error 1)");
}

void test_synchronous_launch(const Images& images) {
  const ae_driver& driver = fresh_driver();
  ae_cuda_info info = description();
  info.info.capture_count = 1;
  const ae::CudaKernel kernel(info, images.ptx(), images.cubin());
  const ae::CudaFunctions& functions = kernel.on(driver, 0, nullptr);
  Example x;
  ae::CudaParams params(x.p, 0);
  const auto launch = [&] { ae::launch_cuda(kernel, functions, params, nullptr, nullptr); };
  state.fault = 1;
  launch();  // nobody looks
  ae::sync_debug = true;
  CHECK(has(text_of<std::out_of_range>(launch), "captures[0] of shape [100]: an index is out of"));
  state.fault = 0;
  launch();  // the report before is not this one's
  state.fails["StreamSynchronize"] = AE_CU_LAUNCH_FAILED;
  CHECK(has(text_of<std::runtime_error>(launch), "kernel abc123 on cuda:0: cuStreamSynchronize"));
  state.capture_status = AE_CU_CAPTURE_ACTIVE;
  launch();  // a capture cannot be waited for
  ae::sync_debug = false;
}

void test_simulated_launch(const Images& images) {
  const ae_driver& driver = fresh_driver(recording::simulator);
  ae_cuda_info info = description();
  info.info.capture_count = 1;
  info.mask_captures = 1;
  const ae::CudaKernel kernel(info, images.ptx(), images.cubin());
  const ae::CudaFunctions& functions = kernel.on(driver, 0, nullptr);
  Example x;
  x.captures[0].size[0] = 0;
  {
    ae::CudaParams empty(x.p, 1);
    ae::launch_cuda(kernel, functions, empty, nullptr, nullptr);
    CHECK(state.regions.count("captures[0]") == 0 && state.regions.count("workspace") == 0);
  }
  x.captures[0].size[0] = 128;
  ae::CudaParams params(x.p, 1);
  std::vector<char> workspace(static_cast<size_t>(params.workspace_bytes()));
  const auto launch = [&] {
    ae::launch_cuda(kernel, functions, params, workspace.data(), nullptr);
  };
  launch();
  const auto is = [&](const char* name, const void* address, int64_t bytes, bool writable) {
    const auto found = state.regions.find(name);
    return found != state.regions.end() && found->second.address == address &&
           found->second.bytes == bytes && found->second.writable == writable;
  };
  CHECK(state.regions.size() == 8);
  CHECK(is("q", x.q.data(), int64_t(x.q.size()) * 2, false));
  CHECK(is("k", x.k.data(), int64_t(x.k.size()) * 2, false));  // one for the batch
  CHECK(is("v", x.v.data(), int64_t(x.v.size()) * 2, false));
  CHECK(is("out", x.out.data(), int64_t(x.out.size()) * 2, true));
  CHECK(is("stats", x.stats.data(), int64_t(x.stats.size()) * 4, true));
  CHECK(is("captures[0]", x.table.data(), (127 * 3 + 1) * 8, false));
  CHECK(is("workspace", workspace.data(), params.workspace_bytes(), true));
  CHECK(state.regions["fault"].bytes == 4 && state.regions["fault"].writable);
  state.fault = 1;
  CHECK(has(text_of<std::out_of_range>(launch), "captures[0] of shape [128]"));
  state.fault = 0;
  state.fails["LaunchKernelEx"] = AE_CU_LAUNCH_FAILED;
  CHECK(text_of<std::runtime_error>(launch) ==
        "attnengine: kernel abc123 on the simulator: ae_tables failed: out of bounds: ld.global at "
        "line 12");
}

void test_tables() {
  ae::install_driver(&recording::table);
  CHECK(ae::driver_name() == "recording" && &ae::cuda_driver() == &recording::table);
  CHECK(ae::simulator() == nullptr);
  ae::install_driver(&recording::simulator);
  CHECK(ae::driver_name() == "simulator" && ae::simulator() == &recording::simulator);
  ae_driver old = recording::table;
  old.version = AE_DRIVER_VERSION + 1;
  CHECK(has(text_of<std::runtime_error>([&] { ae::install_driver(&old); }), "rebuild the library"));
  CHECK(ae::simulator() == &recording::simulator);  // still
  ae::install_driver(nullptr);
  CHECK(ae::simulator() == nullptr);
}

void test_places(const Images& images) {
  const int32_t id = ae::load_cuda_kernel(description(), images.ptx(), "", nullptr, 0);
  CHECK(id == ae::load_cuda_kernel(description(), images.ptx(), "", nullptr, 0));
  const ae::Kernel& kernel = *ae::find_kernel(id);
  CHECK(kernel.path == images.ptx() && kernel.info.D == 64 && kernel.info.Dv == 32);
  CHECK(kernel.info.key == std::string("abc123") && kernel.cuda->info().threads == 128);
  const int64_t size[4] = {1, 1, 5, 64}, v_size[4] = {1, 1, 5, 32};
  ae::TensorView q{"q", nullptr, size, nullptr, 4, AE_F16, ae::DeviceKind::kCpu, 0}, v = q;
  v.name = "v";
  v.size = v_size;
  const auto refusal = [&] {
    return text_of<std::invalid_argument>([&] { ae::check_operands(kernel, q, q, v); });
  };
  CHECK(has(refusal(), "q is on cpu but this kernel was compiled for sm_80"));
  ae::install_driver(&recording::simulator);
  CHECK(refusal().empty());
  q.dtype = AE_F32;
  CHECK(
      has(refusal(), "TypeError: q, k and v must share one dtype, got float32, float32, float16"));
  CHECK(has(refusal(), "CUDA kernels take bfloat16 and float16"));
  q.dtype = AE_F16;
  q.device = v.device = ae::DeviceKind::kCuda;
  ae::install_driver(nullptr);
  CHECK(refusal().empty());
  q.device = v.device = ae::DeviceKind::kOther;
  CHECK(has(refusal(), "NotImplementedError: q is on another device"));
  CHECK(has(text_of<std::invalid_argument>([&] { ae::check_kernel(id, AE_BACKWARD); }),
            "NotImplementedError: kernel=0: CUDA kernels have no gradient"));
}

}  // namespace

int main() {
  const Images images;
  test_layout<1>(0);
  test_layout<1>(1);
  test_layout<4>(4);
  test_layout<12>(12);
  test_too_many_captures();
  test_grid();
  test_images(images);
  test_bad_descriptions(images);
  test_loading(images);
  test_two_devices(images);
  test_threads_load_once(images);
  test_launch(images);
  test_synchronous_launch(images);
  test_simulated_launch(images);
  test_tables();
  test_places(images);
  return CHECK_RESULT();
}
