#include "cuda_launch.h"

#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/block_tables.h"
#include "layout.h"
#include "message.h"

namespace ae {
namespace {

constexpr int64_t kMaxParamBytes = 32764;  // of a kernel's parameters, from compute capability 7.0
constexpr int64_t kMaxBlocks = std::numeric_limits<int32_t>::max();  // of a grid's x dimension
constexpr int64_t kTableBlocks = 1 << 16;  // enough for every device; blocks take several units
constexpr unsigned int kTableThreads = 128;
// Results that a call gives when a kernel launched before has failed: AE_CU_LAUNCH_FAILED and its
// kin, from illegal addresses on.
constexpr ae_cu_result kFirstFault = 700, kLastFault = AE_CU_LAUNCH_FAILED;

// As laid out by KernelParams<N>; every part is a multiple of 8 bytes.
constexpr int64_t kCapturesAt = sizeof(ae_params);
int64_t tables_at(int64_t slots) { return kCapturesAt + slots * int64_t{sizeof(ae_capture)}; }
int64_t total_bytes(int64_t slots) {
  return tables_at(slots) + slots * int64_t{sizeof(BlockTable)};
}
static_assert(sizeof(ae_params) % 8 == 0 && sizeof(ae_capture) % 8 == 0 &&
              sizeof(BlockTable) % 8 == 0 && alignof(ae_params) == 8);

class Launcher {
 public:
  Launcher(const CudaKernel& kernel, const CudaFunctions& functions, CudaParams& params,
           ae_cu_stream stream)
      : kernel_(kernel),
        functions_(functions),
        device_(*functions.device),
        driver_(*device_.driver),
        params_(params),
        stream_(stream),
        context_(device_) {}

  void run(void* workspace) {
    blocks_ = forward_blocks(kernel_.info(), params_.params());
    if (params_.table_blocks() > 0) params_.place(workspace);
    if (device_.simulated()) {
      run_simulated(workspace);
    } else if (sync_debug.load(std::memory_order_relaxed) && !capturing()) {
      run_synchronously();
    } else {
      params_.set_fault(device_.fault);
      launch();
    }
  }

 private:
  void launch() {
    if (params_.table_blocks() > 0) {
      launch("ae_tables", functions_.tables, params_.table_blocks(), kTableThreads, 0);
    }
    const ae_cuda_info& info = kernel_.info();
    launch("ae_forward", functions_.forward, blocks_, static_cast<unsigned int>(info.threads),
           static_cast<unsigned int>(info.shared_bytes));
  }

  void launch(const char* name, ae_cu_function function, int64_t blocks, unsigned int threads,
              unsigned int shared_bytes) {
    const ae_cu_launch_config config = {
        static_cast<unsigned int>(blocks), 1, 1, threads, 1, 1, shared_bytes, stream_, nullptr, 0};
    void* arguments[] = {params_.data()};
    check(driver_.LaunchKernelEx(&config, function, arguments, nullptr), name);
  }

  void run_simulated(void* workspace) {
    int32_t fault = 0;
    params_.set_fault(&fault);
    describe(workspace, &fault);
    launch();
    report(fault);
  }

  void run_synchronously() {
    const auto word = reinterpret_cast<ae_cu_ptr>(device_.fault);
    params_.set_fault(device_.fault);
    // Another launch may have left its report.
    check(driver_.MemsetD8Async(word, 0, sizeof(int32_t), stream_), "cuMemsetD8Async");
    launch();
    int32_t fault = 0;
    check(driver_.MemcpyDtoHAsync(&fault, word, sizeof(fault), stream_), "cuMemcpyDtoHAsync");
    check(driver_.StreamSynchronize(stream_), "cuStreamSynchronize");
    report(fault);
  }

  bool capturing() const {
    int status = AE_CU_CAPTURE_NONE;
    check(driver_.StreamIsCapturing(stream_, &status), "cuStreamIsCapturing");
    return status != AE_CU_CAPTURE_NONE;
  }

  void check(ae_cu_result error, const char* call) const {
    if (error == AE_CU_SUCCESS) return;
    std::string hint;
    if (error >= kFirstFault && error <= kLastFault && !device_.simulated() &&
        !sync_debug.load(std::memory_order_relaxed)) {
      hint =
          "; this or an earlier kernel of any library is at fault: ATTNENGINE_SYNC_DEBUG=1 makes "
          "each launch of attnengine report its own";
    }
    throw std::runtime_error("attnengine: kernel " + std::string(kernel_.info().info.key) + " on " +
                             device_.name + ": " + call +
                             " failed: " + driver_error(driver_, error) + hint);
  }

  void report(int32_t fault) const {
    if (fault > 0 && fault <= params_.params().capture_count) {
      raise_fault(fault - 1, params_.capture(fault - 1));
    }
  }

  // The memory that this launch may touch: of each tensor all from its lowest to its highest
  // element.
  void describe(void* workspace, int32_t* fault) const {
    const ae_params& p = params_.params();
    const ae_module_info& info = kernel_.info().info;
    std::vector<ae_memory_region> regions;
    std::vector<std::string> names(static_cast<size_t>(p.capture_count));
    const auto add = [&](const char* name, const void* data, const int64_t* size,
                         const int64_t* stride, int64_t rank, int32_t dtype, bool writable) {
      int64_t elements = 1;
      for (int64_t d = 0; d < rank; ++d) {
        if (size[d] == 0) return;
        elements += (size[d] - 1) * stride[d];
      }
      regions.push_back({data, elements * element_bytes(dtype), writable, name});
    };
    const int64_t q[4] = {p.B, p.Hq, p.L, info.D}, k[4] = {p.B, p.Hkv, p.S, info.D};
    const int64_t v[4] = {p.B, p.Hkv, p.S, info.Dv}, out[4] = {p.B, p.Hq, p.L, info.Dv};
    add("q", p.q, q, p.q_stride, 4, info.dtype, false);
    add("k", p.k, k, p.k_stride, 4, info.dtype, false);
    add("v", p.v, v, p.v_stride, 4, info.dtype, false);
    add("out", p.out, out, p.out_stride, 4, info.dtype, true);
    if (p.stats != nullptr) {
      const int64_t size = info.stats * p.B * p.Hq * p.L, stride = 1;
      add("stats", p.stats, &size, &stride, 1, AE_F32, true);
    }
    for (int32_t i = 0; i < p.capture_count; ++i) {
      const ae_capture& c = params_.capture(i);
      names[i] = "captures[" + std::to_string(i) + "]";
      add(names[i].c_str(), c.data, c.size, c.stride, c.rank, c.dtype, false);
    }
    if (params_.workspace_bytes() > 0) {
      regions.push_back({workspace, params_.workspace_bytes(), 1, "workspace"});
    }
    regions.push_back({fault, sizeof(*fault), 1, "fault"});
    driver_.describe_memory(regions.data(), static_cast<int>(regions.size()));
  }

  const CudaKernel& kernel_;
  const CudaFunctions& functions_;
  const CudaDevice& device_;
  const ae_driver& driver_;
  CudaParams& params_;
  ae_cu_stream stream_;
  ContextGuard context_;
  int64_t blocks_ = 0;
};

}  // namespace

CudaParams::CudaParams(const ae_params& p, uint64_t mask_captures)
    : slots_(p.capture_count > 1 ? p.capture_count : 1) {
  bytes_ = total_bytes(slots_);
  if (bytes_ > kMaxParamBytes) {
    const int64_t limit = (kMaxParamBytes - kCapturesAt) / (total_bytes(1) - kCapturesAt);
    value_error("captures has " + std::to_string(p.capture_count) +
                " tensors, a CUDA kernel takes " + std::to_string(limit) +
                "; stack some of them into one tensor");
  }
  if (bytes_ > kInlineBytes) more_ = std::make_unique<char[]>(static_cast<size_t>(bytes_));
  data_ = more_ ? more_.get() : inline_;
  auto* params = ::new (data_) ae_params(p);
  params->captures = nullptr;
  params->threads = 1;
  auto* captures = ::new (data_ + kCapturesAt) ae_capture[slots_];
  auto* tables = ::new (data_ + tables_at(slots_)) BlockTable[slots_];
  std::memset(captures, 0, static_cast<size_t>(bytes_ - kCapturesAt));
  for (int32_t i = 0; i < p.capture_count; ++i) {
    captures[i] = p.captures[i];
    if (!reads_capture(mask_captures, i)) continue;
    const BlockTable shape = iv::table_shape(p, i);
    if (shape.rows == 0) continue;
    tables[i] = shape;
    workspace_bytes_ += iv::key_bytes(shape, p.captures[i]);
    const int64_t units = shape.rows * shape.coarse;
    if (units > table_blocks_) table_blocks_ = units < kTableBlocks ? units : kTableBlocks;
  }
}

void CudaParams::place(void* workspace) {
  auto* tables = reinterpret_cast<BlockTable*>(data_ + tables_at(slots_));
  auto* keys = static_cast<char*>(workspace);
  for (int32_t i = 0; i < params().capture_count; ++i) {
    if (tables[i].rows == 0) continue;
    tables[i].keys = keys;
    keys += iv::key_bytes(tables[i], capture(i));
  }
}

void CudaParams::set_fault(int32_t* fault) { reinterpret_cast<ae_params*>(data_)->fault = fault; }

const ae_params& CudaParams::params() const { return *reinterpret_cast<const ae_params*>(data_); }

const ae_capture& CudaParams::capture(int32_t index) const {
  return reinterpret_cast<const ae_capture*>(data_ + kCapturesAt)[index];
}

int64_t forward_blocks(const ae_cuda_info& info, const ae_params& p) {
  const int64_t interleave = info.pack_group != 0 && p.Hkv > 0 ? p.Hq / p.Hkv : 1;
  const int64_t rows = p.L * interleave;
  const int64_t row_tiles = (rows + info.block_m - 1) / info.block_m;
  int64_t blocks = 0;
  if (__builtin_mul_overflow(p.B, p.Hq / interleave, &blocks) ||
      __builtin_mul_overflow(blocks, row_tiles, &blocks) || blocks > kMaxBlocks) {
    value_error("q has batch " + std::to_string(p.B) + ", " + std::to_string(p.Hq) +
                " heads and length " + std::to_string(p.L) + ": with tiles of " +
                std::to_string(info.block_m) +
                " rows that is more than the 2147483647 thread blocks of one launch; split the "
                "call over the batch");
  }
  return blocks;
}

void launch_cuda(const CudaKernel& kernel, const CudaFunctions& functions, CudaParams& params,
                 void* workspace, ae_cu_stream stream) {
  Launcher(kernel, functions, params, stream).run(workspace);
}

}  // namespace ae
