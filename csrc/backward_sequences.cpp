// The operator attnengine::backward_sequences: gradients of attention over sequences of any
// lengths, for CPU kernels. Backward kernels know one dense problem, so each sequence is one launch
// on its own rows and keys, in which b_first and q_first say what the user's functions see.
//
// Short sequences run side by side, one thread each; long ones one after the other with all
// threads, and so does everything where captured tensors get gradients: their sums are then in the
// order of the sequences. A launch gives the same bits with any number of threads, so which
// sequence counts as short changes no result.
#include <algorithm>
#include <vector>

#include "gradients.h"
#include "operators.h"
#include "sequences.h"
#include "table.h"

namespace ae {
namespace {

// Memory that side by side launches take together, at least; beyond it, this many times the bytes
// of q, k and v (a launch alone stays within twice the bytes of its own).
constexpr int64_t kSideBySideBytes = int64_t{16} << 20;
constexpr int64_t kWorkspacePerOperand = 2;

// A sequence is short when its work is at most this part of what one thread has to do.
constexpr double kShortShare = 0.25;

void* shifted(const void* base, int64_t elements, int64_t bytes) {
  return const_cast<char*>(static_cast<const char*>(base)) + elements * bytes;
}

// The launches of one call. `whole` describes all sequences, with the tables in host memory.
class Launches {
 public:
  Launches(const Kernel& kernel, const ae_params& whole, bool packed_rows, bool packed_keys)
      : kernel_(kernel),
        whole_(whole),
        packed_rows_(packed_rows),
        packed_keys_(packed_keys),
        element_(element_bytes(kernel.info.dtype)),
        accumulator_(element_bytes(accumulator_dtype(kernel.info))) {}

  // Keys whose gradients the launches write.
  int64_t keys() const { return keys_; }

  // Decides how each sequence runs, on `threads` threads; `operand_bytes`: of q, k and v.
  void plan(int32_t threads, int64_t operand_bytes) {
    threads_ = threads;
    const bool together = threads > 1 && kernel_.info.grad_mask == 0;
    const int64_t room = std::max(kSideBySideBytes, kWorkspacePerOperand * operand_bytes) / threads;
    std::vector<double> pairs(static_cast<size_t>(whole_.B));
    double total = 0;
    for (int64_t b = 0; b < whole_.B; ++b) {
      const Sequence s(whole_, b);
      pairs[static_cast<size_t>(b)] = static_cast<double>(s.rows) * static_cast<double>(s.keys);
      total += pairs[static_cast<size_t>(b)];
    }
    const auto macs =
        static_cast<double>(whole_.Hq * (kernel_.info.D + kernel_.info.Dv));  // a pair
    const double most = std::max(kSerialMacs / macs, total * kShortShare / threads);
    for (int64_t b = 0; b < whole_.B; ++b) {
      ae_params p = part(b);
      if (p.L == 0) continue;
      keys_ += p.S;
      p.threads = 1;
      const int64_t bytes = kernel_.workspace_bytes(&p);
      if (together && pairs[static_cast<size_t>(b)] <= most && bytes <= room) {
        short_.push_back(b);
        short_bytes_ = std::max(short_bytes_, bytes);
        continue;
      }
      long_.push_back(b);
      p.threads = launch_threads(p, kernel_.info, threads);
      long_bytes_ = std::max(long_bytes_, p.threads == 1 ? bytes : kernel_.workspace_bytes(&p));
    }
    // What takes longest first, so that the threads end together.
    std::stable_sort(short_.begin(), short_.end(), [&pairs](int64_t a, int64_t b) {
      return pairs[static_cast<size_t>(a)] > pairs[static_cast<size_t>(b)];
    });
  }

  void run() {
    constexpr int64_t kLine = 64;
    short_bytes_ = (short_bytes_ + kLine - 1) / kLine * kLine;
    const auto workers = std::min<int64_t>(threads_, static_cast<int64_t>(short_.size()));
    const Workspace workspace(std::max(long_bytes_, workers * short_bytes_));
    for (const int64_t b : long_) {
      ae_params p = part(b);
      p.threads = launch_threads(p, kernel_.info, threads_);
      launch_one(p, workspace.data(), long_bytes_);
    }
    memory_ = workspace.data();
    const auto task = [](void* self, int64_t i, int32_t worker) {
      auto& x = *static_cast<Launches*>(self);
      ae_params p = x.part(x.short_[static_cast<size_t>(i)]);
      p.threads = 1;
      x.launch_one(p, shifted(x.memory_, worker, x.short_bytes_), x.short_bytes_);
    };
    parallel_for(static_cast<int64_t>(short_.size()), threads_, task, this);
    if (const int32_t status = status_.load(); status != 0) {
      throw std::runtime_error("attnengine: kernel " + std::string(kernel_.info.key) +
                               " failed with status " + std::to_string(status));
    }
    if (*whole_.fault != 0) raise_fault(*whole_.fault - 1, whole_.captures[*whole_.fault - 1]);
  }

 private:
  // Sequence b alone.
  ae_params part(int64_t b) const {
    const Sequence s(whole_, b);
    ae_params p = whole_;
    p.sequences = {};
    p.B = 1;
    p.L = s.rows;
    p.S = s.keys;
    p.b_first = b;
    p.q_first = s.first_query;
    const int64_t q_batch = packed_rows_ ? 0 : b, key_batch = packed_keys_ ? 0 : b;
    const auto row = [&](const void* base, const int64_t* stride) {
      return shifted(base, q_batch * stride[0] + s.first_row * stride[2], element_);
    };
    const auto key = [&](const void* base, const int64_t* stride) {
      return shifted(base, key_batch * stride[0] + s.first_key * stride[2], element_);
    };
    p.q = row(p.q, p.q_stride);
    p.out = row(p.out, p.out_stride);
    p.dout = row(p.dout, p.dout_stride);
    p.dq = row(p.dq, p.dq_stride);
    p.k = key(p.k, p.k_stride);
    p.v = key(p.v, p.v_stride);
    p.dk = key(p.dk, p.dk_stride);
    p.dv = key(p.dv, p.dv_stride);
    const int64_t stat = q_batch * p.stats_stride[1] + s.first_row;
    p.stats = shifted(p.stats, stat, accumulator_);
    if (p.dstats != nullptr) p.dstats = shifted(p.dstats, stat, accumulator_);
    return p;
  }
  void launch_one(const ae_params& p, void* memory, int64_t bytes) {
    poison(memory, bytes);
    const int32_t status = kernel_.launch(&p, memory, parallel_for);
    if (status != 0) status_.store(status);
  }

  const Kernel& kernel_;
  const ae_params& whole_;
  const bool packed_rows_, packed_keys_;
  const int64_t element_, accumulator_;
  int32_t threads_ = 1;
  std::vector<int64_t> short_, long_;
  int64_t keys_ = 0, short_bytes_ = 0, long_bytes_ = 0;
  void* memory_ = nullptr;
  std::atomic<int32_t> status_{0};
};

void clear_gradient(const Tensor& grad, const TensorView& like) {
  clear(grad.data(), element_count(like.size, 4) * element_bytes(like.dtype));
}

// backward_sequences(q, k, v, captures, out, stats, dout, dstats?, kernel, scale, q_start?, q_end?,
// key_start?, key_end?, max_rows, max_keys, key_more, align_end) -> (dq, dk, dv, dcaptures)
void backward_sequences(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor q = Tensor::take(stack[0]), k = Tensor::take(stack[1]), v = Tensor::take(stack[2]);
  const TensorList capture_tensors(stack[3]);
  const Tensor out = Tensor::take(stack[4]);
  Tensor stats = Tensor::take(stack[5]);
  const Tensor dout = Tensor::take(stack[6]);
  Tensor dstats = take_optional(stack[7]);
  Tensor tables[4];  // all are off the stack before one is refused
  for (int i = 0; i < 4; ++i) tables[i] = take_optional(stack[10 + i]);
  const Table q_start("cu_seqlens_q", std::move(tables[0]), 1);
  const Table q_end("cu_seqlens_q", std::move(tables[1]), 1);
  const Table key_start("cu_seqlens_k", std::move(tables[2]), 1);
  const Table key_end("cu_seqlens_k", std::move(tables[3]), 1);
  const Kernel& kernel = check_kernel(static_cast<int64_t>(stack[8]), AE_BACKWARD);
  const double scale = take_scale(stack[9]);
  const ae_module_info& info = kernel.info;

  const TensorView qv = view("q", q), kv = view("k", k), vv = view("v", v);
  check_operands(kernel, qv, kv, vv);
  Captures captures(kernel, capture_tensors, qv);
  const TensorView outv = view("out", out), doutv = view("dout", dout);
  check_like_out(info, outv, qv);
  check_like_out(info, doutv, qv);
  const TensorView statsv = view("stats", stats);
  check_stats(info, statsv, qv, info.stats, info.stats);
  stats = contiguous_stats(std::move(stats), statsv);

  if (static_cast<bool>(q_start) != static_cast<bool>(q_end)) {
    value_error("q_start and q_end go together: pass cu_seqlens_q[:-1] and cu_seqlens_q[1:]");
  }
  const bool packed_rows = static_cast<bool>(q_start);
  const bool packed_keys = static_cast<bool>(key_start) && kv.size[0] == 1;
  SequenceTables t;
  t.count = packed_rows ? q_start.size(0) : qv.size[0];
  for (const Table* x : {&q_end, &key_start, &key_end}) {
    x->check_size(0, t.count, "elements, one per sequence");
  }
  for (const Table* x : {&q_start, &q_end, &key_start, &key_end}) x->check_beside(qv);
  if ((packed_rows && qv.size[0] != 1) || (packed_rows && !packed_keys)) {
    value_error("q " + qv.shape() + " and k " + kv.shape() +
                ": packed sequences have batch 1 and a range of keys each; pass cu_seqlens_q and "
                "cu_seqlens_k of [1, H, total, D] operands");
  }
  if (!packed_keys && t.count > 1 && (kv.size[0] == 1 || vv.size[0] == 1)) {
    value_error("k " + kv.shape() + " and v " + vv.shape() + " are shared by " +
                std::to_string(t.count) +
                " sequences; their gradient needs a copy per sequence: use .expand()");
  }
  t.q_start = q_start.data();
  t.q_end = q_end.data();
  t.key_start = key_start.data();
  t.key_end = key_end.data();
  t.q_rows = qv.size[2];
  t.positions = kv.size[2];
  t.cache_rows = kv.size[0];
  t.packed_keys = packed_keys;
  t.max_rows = packed_rows ? static_cast<int64_t>(stack[14]) : qv.size[2];
  t.max_keys = key_end ? static_cast<int64_t>(stack[15]) : kv.size[2];
  t.key_more = static_cast<int64_t>(stack[16]);
  const SequenceBounds found = check_tables(t);

  ae_params p{};
  int32_t fault = 0;
  fill_params(p, q, k, v, qv, kv, vv, captures, scale, &fault);
  if (dstats) {
    const TensorView dstatsv = view("dstats", dstats);
    check_stats(info, dstatsv, qv, info.user_stats, info.stats);
    dstats = contiguous_stats(std::move(dstats), dstatsv);
    if (info.user_stats > 0) p.dstats = const_data(dstats);
  }
  p.B = t.count;
  p.L = t.max_rows;
  p.S = t.max_keys;
  p.sequences = {t.q_start,
                 t.q_end,
                 t.key_start,
                 t.key_end,
                 nullptr,
                 nullptr,
                 0,
                 0,
                 static_cast<int32_t>(t.key_more),
                 take_bool(stack[17]) ? 1 : 0};
  p.out = const_cast<void*>(const_data(out));
  copy4(p.out_stride, outv.stride);
  p.stats = const_cast<void*>(const_data(stats));
  p.dout = const_data(dout);
  copy4(p.dout_stride, doutv.stride);

  Tensor dq = allocate_like(qv, qv.size, info.dtype, p.dq_stride);
  Tensor dk = allocate_like(kv, kv.size, info.dtype, p.dk_stride);
  Tensor dv = allocate_like(vv, vv.size, info.dtype, p.dv_stride);
  p.dq = dq.data();
  p.dk = dk.data();
  p.dv = dv.data();
  CaptureGradients dcaptures(info, captures);
  Launches launches(kernel, p, packed_rows, packed_keys);
  if (p.Hq != 0) {
    uint32_t threads;
    AE_TORCH(torch_get_num_threads(&threads));
    int64_t bytes = 0;
    for (const TensorView* x : {&qv, &kv, &vv}) {
      bytes += element_count(x->size, 4) * element_bytes(x->dtype);
    }
    launches.plan(static_cast<int32_t>(threads), bytes);
  }
  // What belongs to no launch gets no gradient.
  if (packed_rows && found.covered < qv.size[2]) clear_gradient(dq, qv);
  if (launches.keys() < kv.size[0] * kv.size[2]) {
    clear_gradient(dk, kv);
    clear_gradient(dv, vv);
  }
  if (p.Hq != 0) launches.run();
  stack[0] = dq.give();
  stack[1] = dk.give();
  stack[2] = dv.give();
  stack[3] = dcaptures.give();
}

}  // namespace
}  // namespace ae

STABLE_TORCH_LIBRARY_FRAGMENT(attnengine, m) {
  m.def(
      "backward_sequences(Tensor q, Tensor k, Tensor v, Tensor[] captures, Tensor out, "
      "Tensor stats, Tensor dout, Tensor? dstats, int kernel, float scale, Tensor? q_start, "
      "Tensor? q_end, Tensor? key_start, Tensor? key_end, int max_rows, int max_keys, "
      "int key_more, bool align_end) -> (Tensor, Tensor, Tensor, Tensor[])");
}

STABLE_TORCH_LIBRARY_IMPL(attnengine, CPU, m) {
  m.impl("backward_sequences", ae::backward_sequences);
}

// Reached when any argument is a CUDA tensor; the argument checks name it and refuse.
STABLE_TORCH_LIBRARY_IMPL(attnengine, CUDA, m) {
  m.impl("backward_sequences", ae::backward_sequences);
}
