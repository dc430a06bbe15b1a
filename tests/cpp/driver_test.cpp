// How CUDA kernels are loaded, over a driver that records what it is told.
#include <stdexcept>
#include <thread>
#include <vector>

#include "check.h"
#include "cuda_launch.h"
#include "cuda_support.h"
#include "validate.h"

#if __has_include(<cuda.h>)
#include "cuda_header.h"
#endif

namespace {

using recording::state;

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
  params.share_work(kernel, first);
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
  test_images(images);
  test_bad_descriptions(images);
  test_loading(images);
  test_two_devices(images);
  test_threads_load_once(images);
  test_tables();
  test_places(images);
  return CHECK_RESULT();
}
