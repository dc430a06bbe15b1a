// How CUDA kernels are launched: the bytes of their parameter, grid, order and reports.
#include <stdexcept>
#include <vector>

#include "check.h"
#include "common/abi_cuda.h"
#include "common/block_tables.h"
#include "common/sequences.h"
#include "cuda_launch.h"
#include "cuda_support.h"

namespace {

using recording::state;

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
    ae::set_dense_stats(p);
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
    params.share_work(kernel, functions);
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
  params.share_work(kernel, functions);
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

void test_faults_of_earlier_kernels(const Images& images) {
  const ae_driver& driver = fresh_driver();
  const ae::CudaKernel kernel(description(), images.ptx(), images.cubin());
  const ae::CudaFunctions& functions = kernel.on(driver, 0, nullptr);
  ae::CudaParams params(sizes(1, 1, 1, 1, 1), 0);
  params.share_work(kernel, functions);
  state.fails["LaunchKernelEx"] = AE_CU_LAUNCH_FAILED;
  const auto launch = [&] { ae::launch_cuda(kernel, functions, params, nullptr, nullptr); };
  CHECK(has(text_of<std::runtime_error>(launch), "(CUDA driver error 719); this or an earlier"));
}

// A kernel that splits its work: three launches, and scratch for the schedule and the parts.
void test_split_work(const Images& images) {
  const ae_driver& driver = fresh_driver(recording::simulator);
  ae_cuda_info info = description();
  info.sequences = 1, info.slot_bytes = 1024, info.tile_cycles = 4000, info.crowded = 32;
  info.pack_group = 1;
  const ae::CudaKernel kernel(info, images.ptx(), images.cubin());
  const ae::CudaFunctions& functions = kernel.on(driver, 0, nullptr);
  state.param_bytes = sizeof(ae::KernelParams<1>);
  const int64_t slots = functions.blocks * 108;
  const ae_params few = sizes(3, 8, 2, 1, 32 * 1000);
  const auto work_of = [&](const ae_params& p, std::vector<char>& workspace) {
    ae::CudaParams params(p, 0);
    params.share_work(kernel, functions);
    workspace.resize(static_cast<size_t>(params.workspace_bytes()));
    state.launches.clear();
    ae::launch_cuda(kernel, functions, params, workspace.data(), nullptr);
    ae::KernelParams<1> got;
    std::memcpy(&got, state.launches[0].params.data(), sizeof(got));
    return got.work;
  };
  std::vector<char> workspace;
  ae::WorkParams work = work_of(few, workspace);
  CHECK(work.policy == ae::kStreamK && work.outputs == 6 && work.workers == slots);
  CHECK(state.launches.size() == 3 && state.launches[0].function == "ae_schedule");
  CHECK(state.launches[1].config.grid_x == slots && state.launches[2].function == "ae_combine");
  CHECK(state.launches[2].config.grid_x == 6 * 16 && state.launches[2].config.block_x == 128);
  CHECK(static_cast<void*>(work.prefix) == workspace.data());
  CHECK(reinterpret_cast<char*>(work.slots) == workspace.data() + 64);
  CHECK(workspace.size() == 64 + 2 * static_cast<size_t>(slots) * 1024);
  // Nothing to split.
  work = work_of(sizes(1000, 8, 2, 1, 32), workspace);
  CHECK(work.policy == ae::kTiles && workspace.empty() && state.launches.size() == 1);
  CHECK(state.launches[0].config.grid_x == 2000);
  ae::forced_schedule = {ae::kSplit, 3, 1};
  work = work_of(few, workspace);
  CHECK(work.policy == ae::kSplit && work.splits == 3);
  CHECK(state.launches.size() == 2 && state.launches[0].config.grid_x == 18);
  CHECK(work.prefix == nullptr && workspace.size() == 18 * 1024);
  CHECK(reinterpret_cast<char*>(work.slots) == workspace.data());
  ae::forced_schedule = {-1, 1, 1};
  // So short that counting tiles would take longer than what it saves.
  work = work_of(sizes(3, 8, 2, 1, 32 * 20), workspace);
  CHECK(work.policy == ae::kSplit && state.launches.size() == 2);

  const int32_t ends[3] = {1, 2, 3};
  ae_params p = few;
  p.sequences.key_end = ends;
  info.sequences = info.slot_bytes = 0;
  const ae::CudaKernel dense(info, images.ptx(), images.cubin());
  ae::CudaParams params(p, 0);
  CHECK(has(text_of<std::invalid_argument>([&] { params.share_work(dense, functions); }),
            "takes no sequences"));
}

void test_synchronous_launch(const Images& images) {
  const ae_driver& driver = fresh_driver();
  ae_cuda_info info = description();
  info.info.capture_count = 1;
  const ae::CudaKernel kernel(info, images.ptx(), images.cubin());
  const ae::CudaFunctions& functions = kernel.on(driver, 0, nullptr);
  Example x;
  ae::CudaParams params(x.p, 0);
  params.share_work(kernel, functions);
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
    empty.share_work(kernel, functions);
    ae::launch_cuda(kernel, functions, empty, nullptr, nullptr);
    CHECK(state.regions.count("captures[0]") == 0 && state.regions.count("workspace") == 0);
  }
  x.captures[0].size[0] = 128;
  ae::CudaParams params(x.p, 1);
  params.share_work(kernel, functions);
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

}  // namespace

int main() {
  const Images images;
  test_layout<1>(0);
  test_layout<1>(1);
  test_layout<4>(4);
  test_layout<12>(12);
  test_too_many_captures();
  test_grid();
  test_launch(images);
  test_faults_of_earlier_kernels(images);
  test_split_work(images);
  test_synchronous_launch(images);
  test_simulated_launch(images);
  return CHECK_RESULT();
}
