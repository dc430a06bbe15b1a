#include "cuda_linear.h"

#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_launch.h"
#include "layout.h"
#include "linear/params.h"
#include "message.h"

namespace ae {
namespace {

constexpr int64_t kMaxParamBytes = 32764;   // of a kernel's parameters, from compute capability 7.0
constexpr int64_t kMaxBlocks = 2147483647;  // of a grid's x dimension
constexpr int64_t kStateTile = 64, kSplitTile = 32, kStepColumns = 32, kDeltaColumns = 32;

// As laid out by LinearParams<N>.
constexpr int64_t kCapturesAt = sizeof(ae_linear_params);
int64_t work_at(int64_t captures) { return kCapturesAt + captures * int64_t{sizeof(ae_capture)}; }
static_assert(sizeof(ae_linear_params) % 8 == 0 && alignof(LinearWork) == 8);
static_assert(sizeof(LinearParams<1>) ==
              sizeof(ae_linear_params) + sizeof(ae_capture) + sizeof(LinearWork));

int64_t divide_up(int64_t x, int64_t by) { return (x + by - 1) / by; }
int64_t round_up_16(int64_t x) { return divide_up(x, 16) * 16; }

}  // namespace

const ae_linear_params& CudaLinear::params() const {
  return *reinterpret_cast<const ae_linear_params*>(data_.get());
}

int64_t CudaLinear::blocks(int64_t of_head, int64_t heads) const {
  const ae_linear_params& p = params();
  int64_t total = 0;
  if (__builtin_mul_overflow(heads, p.H * of_head, &total) || total > kMaxBlocks) {
    value_error("v has batch " + std::to_string(p.B) + ", " + std::to_string(p.H) +
                " heads and length " + std::to_string(p.L) +
                ": that is more than the 2147483647 thread blocks of one launch; split the call "
                "over the batch or the heads");
  }
  return total;
}

int64_t CudaLinear::tiles(int64_t width) const {
  const ae_module_info& info = kernel_.info().info;
  return divide_up(info.D, width) * divide_up(info.Dv, width);
}

CudaLinear::CudaLinear(const ae_linear_params& p, const CudaKernel& kernel,
                       const CudaFunctions& functions)
    : kernel_(kernel),
      functions_(functions),
      device_(*functions.device),
      driver_(*device_.driver),
      captures_(p.capture_count > 1 ? p.capture_count : 1) {
  const int64_t bytes = work_at(captures_) + int64_t{sizeof(LinearWork)};
  if (bytes > kMaxParamBytes) {
    const int64_t limit =
        (kMaxParamBytes - kCapturesAt - int64_t{sizeof(LinearWork)}) / int64_t{sizeof(ae_capture)};
    value_error("captures has " + std::to_string(p.capture_count) +
                " tensors, a CUDA kernel takes " + std::to_string(limit) +
                "; stack some of them into one tensor");
  }
  const ae_cuda_info& info = kernel.info();
  data_ = std::make_unique<char[]>(static_cast<size_t>(bytes));
  auto* params = ::new (data_.get()) ae_linear_params(p);
  auto* captures = ::new (data_.get() + kCapturesAt) ae_capture[captures_];
  auto* work = ::new (data_.get() + work_at(captures_)) LinearWork{};
  for (int32_t i = 0; i < p.capture_count; ++i) captures[i] = p.captures[i];
  params->captures = nullptr;
  params->threads = 1;

  delta_ = (info.info.user_stats >> 8 & 1) != 0;  // AE_LINEAR_OPERANDS
  step_ = p.L <= kStepTokens;
  if (step_) {
    blocks(divide_up(info.info.Dv, kStepColumns), p.sequences);
    return;
  }
  const int64_t chunks = divide_up(p.L, kLinearChunk);
  slots_ = p.first != nullptr ? p.L / kLinearChunk + p.sequences : p.B * chunks;
  work->slots = slots_;
  work->chunks = p.first != nullptr ? 0 : chunks;
  // A single chunk that starts from zeros needs no state, where nobody wants the last one.
  states_ = delta_ || chunks > 1 || p.state != nullptr || p.final_state != nullptr;
  // Two blocks for each multiprocessor, else there is more to gain from parallelism than to lose by
  // reading K and V again for each tile.
  split_ = blocks(tiles(kStateTile), p.sequences) < 2 * device_.multiprocessors;
  blocks(tiles(kSplitTile), p.sequences);
  blocks(divide_up(info.info.Dv, info.block_n), slots_);
  const int64_t element = info.info.dtype == AE_BF16 ? 2 : 4;
  if (!states_) return;
  // Parts are whole rows of 16 elements of 2 bytes.
  const int64_t heads = slots_ * p.H, columns = round_up_16(info.info.Dv);
  const int64_t rows = heads * round_up_16(info.info.D);
  keys_at_ = rows * columns * element;
  values_at_ = inverse_at_ = workspace_bytes_ = keys_at_ + rows * int64_t{sizeof(float)};
  if (delta_) {
    inverse_at_ = values_at_ + heads * kLinearChunk * columns * 2;
    workspace_bytes_ = inverse_at_ + heads * 2 * kLinearChunk * kLinearChunk * 2;
  }
}

int32_t CudaLinear::run(void* workspace, ae_cu_stream stream) {
  auto* work = reinterpret_cast<LinearWork*>(data_.get() + work_at(captures_));
  work->states = workspace;
  char* const memory = static_cast<char*>(workspace);
  work->keys = reinterpret_cast<float*>(memory + keys_at_);
  work->values = memory + values_at_;
  work->inverse = memory + inverse_at_;
  auto& p = *reinterpret_cast<ae_linear_params*>(data_.get());
  const ContextGuard context(device_);
  int32_t fault = 0;
  if (device_.simulated()) {
    p.fault = &fault;
    describe(workspace, &fault);
    launch(stream);
    return fault;
  }
  p.fault = device_.fault;
  int status = AE_CU_CAPTURE_NONE;
  if (sync_debug.load(std::memory_order_relaxed)) {
    check(driver_.StreamIsCapturing(stream, &status), "cuStreamIsCapturing");
  }
  if (!sync_debug.load(std::memory_order_relaxed) || status != AE_CU_CAPTURE_NONE) {
    launch(stream);
    return 0;
  }
  const auto word = reinterpret_cast<ae_cu_ptr>(device_.fault);
  // Another launch may have left its report.
  check(driver_.MemsetD8Async(word, 0, sizeof(int32_t), stream), "cuMemsetD8Async");
  launch(stream);
  check(driver_.MemcpyDtoHAsync(&fault, word, sizeof(fault), stream), "cuMemcpyDtoHAsync");
  check(driver_.StreamSynchronize(stream), "cuStreamSynchronize");
  return fault;
}

void CudaLinear::launch(ae_cu_stream stream) const {
  const ae_linear_params& p = params();
  const ae_cuda_info& info = kernel_.info();
  if (step_) {
    launch("ae_linear_step", CudaFunctions::kStep,
           blocks(divide_up(info.info.Dv, kStepColumns), p.sequences), 0, stream);
    return;
  }
  if (delta_) {
    launch("ae_linear_solve", CudaFunctions::kSplitStates, blocks(1, slots_), info.split_bytes,
           stream);
    launch("ae_linear_states", CudaFunctions::kStates,
           blocks(divide_up(info.info.Dv, kDeltaColumns), p.sequences), info.state_bytes, stream);
  } else if (states_ && split_) {
    launch("ae_linear_states_split", CudaFunctions::kSplitStates,
           blocks(tiles(kSplitTile), p.sequences), info.split_bytes, stream);
  } else if (states_) {
    launch("ae_linear_states", CudaFunctions::kStates, blocks(tiles(kStateTile), p.sequences),
           info.state_bytes, stream);
  }
  launch("ae_linear_outputs", CudaFunctions::kOutputs,
         blocks(divide_up(info.info.Dv, info.block_n), slots_), info.shared_bytes, stream);
}

void CudaLinear::launch(const char* name, int entry, int64_t blocks, int64_t shared_bytes,
                        ae_cu_stream stream) const {
  const ae_cu_launch_config config = {static_cast<unsigned int>(blocks),
                                      1,
                                      1,
                                      static_cast<unsigned int>(kernel_.info().threads),
                                      1,
                                      1,
                                      static_cast<unsigned int>(shared_bytes),
                                      stream,
                                      nullptr,
                                      0};
  void* arguments[] = {data_.get()};
  check(driver_.LaunchKernelEx(&config, functions_.linear[entry], arguments, nullptr), name);
}

void CudaLinear::check(ae_cu_result error, const char* call) const {
  if (error == AE_CU_SUCCESS) return;
  throw std::runtime_error("attnengine: kernel " + std::string(kernel_.info().info.key) + " on " +
                           device_.name + ": " + call + " failed: " + driver_error(driver_, error));
}

// The memory that a simulated launch may touch: of each tensor all from its lowest to its highest
// element.
void CudaLinear::describe(void* workspace, int32_t* fault) const {
  const ae_linear_params& p = params();
  const ae_module_info& info = kernel_.info().info;
  const auto* captures = reinterpret_cast<const ae_capture*>(data_.get() + kCapturesAt);
  std::vector<ae_memory_region> regions;
  std::vector<std::string> names(static_cast<size_t>(p.capture_count));
  const auto add = [&](const char* name, const void* data, const int64_t* size,
                       const int64_t* stride, int64_t rank, int64_t element, bool writable) {
    if (data == nullptr) return;
    int64_t elements = 1;
    for (int64_t d = 0; d < rank; ++d) {
      if (size[d] == 0) return;
      elements += (size[d] - 1) * stride[d];
    }
    regions.push_back({data, elements * element, writable, name});
  };
  const int64_t element = element_bytes(info.dtype);
  const int64_t qk[4] = {p.B, p.Hk, p.L, info.D}, v[4] = {p.B, p.H, p.L, info.Dv};
  add("q", p.q, qk, p.q_stride, 4, element, false);
  add("k", p.k, qk, p.k_stride, 4, element, false);
  add("v", p.v, v, p.v_stride, 4, element, false);
  add("out", p.out, v, p.out_stride, 4, element, true);
  const int32_t operands = info.user_stats;  // AE_LINEAR_OPERANDS
  const int64_t decay[4] = {p.B, p.H, p.L, info.D};
  add("decay", p.decay, decay, p.decay_stride, (operands & 15) == 2 ? 4 : 3,
      element_bytes(operands >> 4 & 15), false);
  add("beta", p.beta, decay, p.beta_stride, 3, element_bytes(operands >> 9 & 15), false);
  const int64_t columns = info.Dv + (operands >> 13 & 1);
  const int64_t state[4] = {p.sequences, p.H, info.D, columns};
  const int64_t dense[4] = {p.H * info.D * columns, info.D * columns, columns, 1};
  add("state", p.state, state, p.state_stride, 4, sizeof(float), false);
  add("final_state", p.final_state, state, dense, 4, sizeof(float), true);
  const int64_t starts = p.sequences + 1, one = 1;
  add("first", p.first, &starts, &one, 1, sizeof(int64_t), false);
  for (int32_t i = 0; i < p.capture_count; ++i) {
    const ae_capture& c = captures[i];
    names[i] = "captures[" + std::to_string(i) + "]";
    add(names[i].c_str(), c.data, c.size, c.stride, c.rank, element_bytes(c.dtype), false);
  }
  add("workspace", workspace, &workspace_bytes_, &one, 1, 1, true);
  add("fault", fault, &one, &one, 1, sizeof(*fault), true);
  driver_.describe_memory(regions.data(), static_cast<int>(regions.size()));
}

}  // namespace ae
