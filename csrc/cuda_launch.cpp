#include "cuda_launch.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/abi_cuda.h"
#include "common/block_tables.h"
#include "common/policy.h"
#include "common/sequences.h"
#include "layout.h"
#include "message.h"

namespace ae {
namespace {

constexpr int64_t kMaxParamBytes = 32764;  // of a kernel's parameters, from compute capability 7.0
constexpr int64_t kMaxBlocks = std::numeric_limits<int32_t>::max();  // of a grid's x dimension
constexpr int64_t kTableBlocks = 1 << 16;  // enough for every device; blocks take several units
constexpr unsigned int kTableThreads = 128;
constexpr unsigned int kScheduleThreads = 512, kCombineThreads = 128;
constexpr int64_t kCombineRows = kCombineThreads / 32;  // of a thread block: a warp each
constexpr int64_t kAlignment = 64;
// Results that a call gives when a kernel launched before has failed: AE_CU_LAUNCH_FAILED and its
// kin, from illegal addresses on.
constexpr ae_cu_result kFirstFault = 700, kLastFault = AE_CU_LAUNCH_FAILED;

// As laid out by KernelParams<N>; every part is a multiple of 8 bytes.
constexpr int64_t kCapturesAt = sizeof(ae_params);
int64_t tables_at(int64_t slots) { return kCapturesAt + slots * int64_t{sizeof(ae_capture)}; }
int64_t work_at(int64_t slots) { return tables_at(slots) + slots * int64_t{sizeof(BlockTable)}; }
int64_t total_bytes(int64_t slots) { return work_at(slots) + int64_t{sizeof(WorkParams)}; }
static_assert(sizeof(ae_params) % 8 == 0 && sizeof(ae_capture) % 8 == 0 &&
              sizeof(BlockTable) % 8 == 0 && alignof(ae_params) == 8);
static_assert(sizeof(KernelParams<1>) ==
              sizeof(ae_params) + sizeof(ae_capture) + sizeof(BlockTable) + sizeof(WorkParams));

int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// How far the rows and keys of a launch reach, for tables that the host can read.
struct SequenceExtents {
  int64_t q_batches, q_rows, k_batches, k_rows, page_columns = 0;

  explicit SequenceExtents(const ae_params& p)
      : q_batches(p.B), q_rows(p.L), k_batches(p.B), k_rows(p.S) {
    const ae_sequences& s = p.sequences;
    if (s.q_start != nullptr) q_batches = 1, q_rows = 0;
    if (s.key_start != nullptr || s.key_end != nullptr) k_rows = 0;
    if (s.pages != nullptr || s.kv_row != nullptr) k_batches = 1;
    for (int64_t b = 0; b < p.B; ++b) {
      const Sequence q(p, b);
      const int64_t last = q.first_key + q.keys;  // position after its keys
      q_rows = std::max(q_rows, q.first_row + q.rows);
      if (s.pages == nullptr) {
        k_rows = std::max(k_rows, last);
        k_batches = std::max(k_batches, q.kv_row + 1);
        continue;
      }
      k_rows = s.page_size;
      page_columns = std::max(page_columns, (last + s.page_size - 1) / s.page_size);
      for (int64_t i = q.first_key / s.page_size; i * s.page_size < last && q.keys > 0; ++i) {
        k_batches = std::max(k_batches, int64_t{q.pages[i]} + 1);
      }
    }
  }
};

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
    if (params_.workspace_bytes() > 0) params_.place(workspace);
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
    const bool split = params_.policy() != kTiles;
    if (params_.policy() == kStreamK) {
      launch("ae_schedule", functions_.schedule, 1, kScheduleThreads, 0);
    }
    launch("ae_forward", functions_.forward, params_.forward_blocks(),
           static_cast<unsigned int>(info.threads), static_cast<unsigned int>(info.shared_bytes));
    if (split) {
      launch("ae_combine", functions_.combine, params_.outputs() * (info.block_m / kCombineRows),
             kCombineThreads, 0);
    }
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
    const SequenceExtents e(p);
    const int64_t q[4] = {e.q_batches, p.Hq, e.q_rows, info.D};
    const int64_t k[4] = {e.k_batches, p.Hkv, e.k_rows, info.D};
    const int64_t v[4] = {e.k_batches, p.Hkv, e.k_rows, info.Dv};
    const int64_t out[4] = {e.q_batches, p.Hq, e.q_rows, info.Dv};
    add("q", p.q, q, p.q_stride, 4, info.dtype, false);
    add("k", p.k, k, p.k_stride, 4, info.dtype, false);
    add("v", p.v, v, p.v_stride, 4, info.dtype, false);
    add("out", p.out, out, p.out_stride, 4, info.dtype, true);
    if (p.stats != nullptr) {
      const int64_t size[4] = {info.stats, e.q_batches, p.Hq, e.q_rows};
      const int64_t stride[4] = {p.stats_stride[0], p.stats_stride[1], p.stats_stride[2], 1};
      add("stats", p.stats, size, stride, 4, AE_F32, true);
    }
    const ae_sequences& s = p.sequences;
    const std::pair<const char*, const int32_t*> lists[] = {{"q_start", s.q_start},
                                                            {"q_end", s.q_end},
                                                            {"key_start", s.key_start},
                                                            {"key_end", s.key_end},
                                                            {"kv_row", s.kv_row}};
    const int64_t one = 1;
    for (const auto& [name, list] : lists) {
      if (list != nullptr) add(name, list, &p.B, &one, 1, AE_I32, false);
    }
    if (s.pages != nullptr) {
      const int64_t size[2] = {p.B, e.page_columns}, stride[2] = {s.page_pitch, 1};
      add("pages", s.pages, size, stride, 2, AE_I32, false);
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
  ::new (data_ + work_at(slots_)) WorkParams;
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

void CudaParams::share_work(const CudaKernel& kernel, const CudaFunctions& functions) {
  const ae_cuda_info& info = kernel.info();
  const ae_params& p = params();
  const ae_sequences& s = p.sequences;
  if (info.sequences == 0 && (s.q_start != nullptr || s.key_start != nullptr ||
                              s.key_end != nullptr || s.kv_row != nullptr || s.pages != nullptr)) {
    value_error("kernel=" + std::string(info.info.key) +
                " takes no sequences; a program's in_form(Form.of_sequences(rows)) does");
  }
  if (info.shared_kv != 0 && (p.k != p.v || !std::equal(p.k_stride, p.k_stride + 4, p.v_stride))) {
    value_error("kernel=" + std::string(info.info.key) +
                " reads v as the first columns of k; v must be a view of k, such as k[..., :" +
                std::to_string(info.info.Dv) + "]");
  }
  outputs_ = forward_blocks_ = ae::forward_blocks(info, p);
  if (info.slot_bytes == 0) return;
  const int64_t most_tiles = (p.S + info.block_n - 1) / info.block_n;
  const int64_t slots = int64_t{functions.blocks} * functions.device->multiprocessors;
  const DeviceCosts costs = device_costs(info.tile_cycles, info.slot_bytes);
  PolicyChoice choice = choose_policy_bounded(outputs_, most_tiles, slots, true, costs.policy,
                                              costs.count, info.crowded);
  const ForcedSchedule forced = forced_schedule.load(std::memory_order_relaxed);
  if (forced.policy >= 0) {
    choice.policy = forced.policy;
    choice.splits = forced.policy == kSplit ? forced.splits : 1;
    choice.workers = forced.workers;
  }
  auto& work = *reinterpret_cast<WorkParams*>(data_ + work_at(slots_));
  work.policy = choice.policy;
  work.splits = choice.splits;
  work.outputs = outputs_;
  work.workers = choice.workers;
  if (choice.policy == kTiles) return;
  forward_blocks_ = choice.policy == kSplit ? outputs_ * choice.splits : choice.workers;
  parts_at_ = aligned(workspace_bytes_);
  if (choice.policy == kStreamK) {  // parts of a split find their tiles by themselves
    prefix_at_ = parts_at_;
    parts_at_ = aligned(prefix_at_ + (outputs_ + 1) * int64_t{sizeof(int64_t)});
  }
  workspace_bytes_ = parts_at_ + info.slot_bytes * Schedule::slots(choice.policy, outputs_,
                                                                   choice.workers, choice.splits);
}

int32_t CudaParams::policy() const {
  return reinterpret_cast<const WorkParams*>(data_ + work_at(slots_))->policy;
}

void CudaParams::place(void* workspace) {
  auto& work = *reinterpret_cast<WorkParams*>(data_ + work_at(slots_));
  char* const memory = static_cast<char*>(workspace);
  if (prefix_at_ >= 0) work.prefix = reinterpret_cast<int64_t*>(memory + prefix_at_);
  if (parts_at_ >= 0) work.slots = reinterpret_cast<float*>(memory + parts_at_);
  auto* tables = reinterpret_cast<BlockTable*>(data_ + tables_at(slots_));
  char* keys = memory;
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
