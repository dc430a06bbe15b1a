// The operators attnengine::statistics_forward, statistics_step and statistics_backward: token
// statistics attention by CPU modules (templates/common/statistics_abi.h). They check their
// arguments, allocate the results and launch. Users meet the checks of
// attnengine/statistics_ops.py first; cu_seqlens and positions are read here.
#include <vector>

#include "common/statistics_abi.h"
#include "linear.h"

namespace ae {
namespace {

constexpr int64_t kSerialElements = 1 << 16;  // of w; below, waking a second thread costs more

// Elements of one head's row of statistics.
int64_t row_width(int64_t D) {
  const int64_t columns = (D + AE_STATISTICS_PAD - 1) / AE_STATISTICS_PAD * AE_STATISTICS_PAD;
  return 2 * columns + AE_STATISTICS_PAD;
}

int64_t integer_at(const Tensor& tensor, const TensorView& x, int64_t i) {
  const void* data = const_data(tensor);
  return x.dtype == AE_I64 ? static_cast<const int64_t*>(data)[i * x.stride[0]]
                           : static_cast<const int32_t*>(data)[i * x.stride[0]];
}

void check_integers(const TensorView& x) {
  if (x.dtype != AE_I32 && x.dtype != AE_I64) {
    type_error(std::string(x.name) + " has " + dtype_name(x.dtype) +
               ", expected int32 or int64; cast it with .int()");
  }
}

// The operands of one call. Owns the tensors; `p` points into them.
class StatisticsCall {
 public:
  // Takes w, temp, denom_bias? and cu_seqlens? off the stack, or, for a step, w, temp and
  // denom_bias?.
  StatisticsCall(StableIValue* stack, bool has_starts)
      : w_(Tensor::take(stack[0])),
        temp_(Tensor::take(stack[1])),
        bias_(take_optional(stack[2])),
        starts_(has_starts ? take_optional(stack[3]) : Tensor()) {}
  StatisticsCall(const StatisticsCall&) = delete;
  StatisticsCall& operator=(const StatisticsCall&) = delete;

  void check(const Kernel& kernel, bool causal) {
    const ae_module_info& info = kernel.info;
    accumulator_ = accumulator_dtype(info);
    w_ = readable("w", std::move(w_), info.dtype, wv_);
    if (wv_.size[3] != info.D) {
      value_error("head_dim=" + std::to_string(wv_.size[3]) + ": this kernel was compiled for " +
                  std::to_string(info.D));
    }
    p.abi_version = AE_ABI_VERSION;
    p.bytes = sizeof(ae_statistics_params);
    p.B = wv_.size[0];
    p.H = wv_.size[1];
    p.N = wv_.size[2];
    p.w = const_data(w_);
    copy4(p.w_stride, wv_.stride);
    p.causal = causal;
    const TensorView t = view("temp", temp_);
    const int64_t heads[1] = {p.H};
    check_cpu(t);
    check_dtype(t, accumulator_, "the accumulator type");
    expect_shape(t, heads, 1, "a number for each head of w");
    if (p.H > 1 && t.stride[0] != 1) temp_ = copy_as(temp_, heads, 1, accumulator_);
    p.temp = const_data(temp_);
    p.sequences = p.B;
    longest_ = p.N;
    if (starts_) check_starts();
    if (bias_) check_bias();
  }

  // Packed rows of tokens or of statistics that the operators save.
  int64_t rows() const { return p.B * p.N / AE_STATISTICS_BLOCK + p.sequences; }
  int64_t statistics_rows() const { return p.causal ? rows() : p.sequences; }
  bool empty() const { return p.B == 0 || p.H == 0; }
  const TensorView& w() const { return wv_; }
  int32_t accumulator() const { return accumulator_; }
  int64_t longest() const { return longest_; }
  bool has_bias() const { return static_cast<bool>(bias_); }

  void launch(const Kernel& kernel) {
    p.threads = 1;
    if (p.B * p.H * p.N * kernel.info.D > kSerialElements) {
      uint32_t threads;
      AE_TORCH(torch_get_num_threads(&threads));
      p.threads = static_cast<int32_t>(threads);
    }
    // A module takes the parameters of its own kind, which begin like ae_params.
    const auto* params = reinterpret_cast<const ae_params*>(&p);
    const Workspace workspace(kernel.workspace_bytes(params));
    const int32_t status = kernel.launch(params, workspace.data(), parallel_for);
    if (status != 0) {
      throw std::runtime_error("attnengine: kernel " + std::string(kernel.info.key) +
                               " failed with status " + std::to_string(status));
    }
  }

  static void check_cpu(const TensorView& x) {
    if (x.device == DeviceKind::kCpu) return;
    not_implemented(std::string(x.name) + " is on " + x.where() +
                    "; token statistics attention runs on CPU tensors (.cpu()), and anywhere by "
                    "attnengine.token_statistics_reference");
  }
  // A tensor [B, H, N, D] whose channels are consecutive, copied where they are not.
  static Tensor readable(const char* name, Tensor tensor, int32_t dtype, TensorView& x) {
    x = view(name, tensor);
    check_cpu(x);
    check_rank4(x, "[B, h, N, d]");
    check_dtype(x, dtype, "the type this kernel was compiled for");
    if (x.size[3] > 1 && x.stride[3] != 1) {
      tensor = copy_as(tensor, x.size, 4, dtype);
      x = view(name, tensor);
    }
    return tensor;
  }

  ae_statistics_params p{};

 private:
  void check_starts() {
    const TensorView x = view("cu_seqlens", starts_);
    check_cpu(x);
    check_integers(x);
    if (x.rank != 1 || x.size[0] == 0) {
      value_error("cu_seqlens must have shape [sequences + 1], got " + x.shape() +
                  "; it holds the running sum of the lengths, from 0");
    }
    if (p.B != 1) {
      value_error("cu_seqlens needs packed tokens of batch 1, got w " + wv_.shape() +
                  "; lay the sequences one after the other along N: [1, h, total, d]");
    }
    first_.resize(static_cast<size_t>(x.size[0]));
    longest_ = 0;
    for (int64_t i = 0, before = 0; i < x.size[0]; ++i) {
      const int64_t start = integer_at(starts_, x, i);
      const std::string element = "cu_seqlens[" + std::to_string(i) + "]=" + std::to_string(start);
      if (i == 0 && start != 0) value_error(element + " must be 0: sequences lie from 0 on");
      if (start < before) {
        value_error(element + " is less than the " + std::to_string(before) +
                    " before it; cu_seqlens must not decrease");
      }
      if (start - before > longest_) longest_ = start - before;
      first_[static_cast<size_t>(i)] = before = start;
    }
    if (first_.back() != p.N) {
      value_error("cu_seqlens[-1]=" + std::to_string(first_.back()) + " must be the length of w, " +
                  std::to_string(p.N) + " (w " + wv_.shape() + ")");
    }
    p.sequences = x.size[0] - 1;
    p.first = first_.data();
  }
  void check_bias() {
    const TensorView x = view("denom_bias", bias_);
    check_cpu(x);
    check_dtype(x, accumulator_, "the accumulator type");
    if (!p.causal) {
      value_error("denom_bias needs causal=True: the form without order has no bias");
    }
    if (x.rank != 2 || x.size[0] != p.H || x.size[1] < longest_) {
      const int64_t want[2] = {p.H, longest_};
      value_error("denom_bias has shape " + x.shape() + ", expected " + shape_text(want, 2) +
                  ": a number for each head and position of the longest sequence, or more");
    }
    p.bias = const_data(bias_);
    p.bias_stride[0] = x.stride[0];
    p.bias_stride[1] = x.stride[1];
    p.bias_tokens = x.size[1];
  }

  Tensor w_, temp_, bias_, starts_;
  TensorView wv_{};
  std::vector<int64_t> first_;
  int64_t longest_ = 0;
  int32_t accumulator_ = AE_F32;
};

// statistics_forward(w, temp, denom_bias?, cu_seqlens?, kernel, causal, save) -> (y, logits,
//   statistics): the last two None unless saved
void statistics_forward(StableIValue* stack, uint64_t, uint64_t) {
  StatisticsCall call(stack, true);
  const Kernel& kernel = check_linear_kernel(static_cast<int64_t>(stack[4]), AE_STATISTICS_FORWARD);
  const bool causal = take_bool(stack[5]), save = take_bool(stack[6]);
  call.check(kernel, causal);
  ae_statistics_params& p = call.p;
  Tensor y = allocate_pooled_like(call.w(), call.w().size, kernel.info.dtype, p.y_stride);
  p.y = y.data();
  Tensor logits = undefined_tensor(), statistics = undefined_tensor();
  if (save) {
    const int64_t tokens[3] = {call.rows(), p.H, AE_STATISTICS_BLOCK};
    const int64_t sums[3] = {call.statistics_rows(), p.H, row_width(kernel.info.D)};
    logits = allocate_pooled(tokens, 3, call.accumulator());
    statistics = allocate_pooled(sums, 3, call.accumulator());
    p.logits = logits.data();
    p.statistics = statistics.data();
    // What no token writes must not differ from run to run: they are results too.
    const int64_t bytes = element_bytes(call.accumulator());
    clear(p.logits, element_count(tokens, 3) * bytes);
    clear(p.statistics, element_count(sums, 3) * bytes);
  }
  if (!call.empty() && p.N > 0) call.launch(kernel);
  stack[0] = y.give();
  stack[1] = logits.give();
  stack[2] = statistics.give();
}

// A part of the state: c, A or D.
Tensor take_state(const char* name, Tensor tensor, const int64_t* size, int64_t rank,
                  int32_t dtype) {
  const TensorView x = view(name, tensor);
  StatisticsCall::check_cpu(x);
  check_dtype(x, dtype, "the accumulator type");
  expect_shape(x, size, rank, "as attnengine.token_statistics_attention_step returned it");
  return is_contiguous(x.size, x.stride, rank) ? std::move(tensor)
                                               : copy_as(tensor, size, rank, dtype);
}

// statistics_step(w, temp, denom_bias?, c, A, D, position, kernel) -> (y, c, A, D, position)
void statistics_step(StableIValue* stack, uint64_t, uint64_t) {
  StatisticsCall call(stack, false);
  Tensor state[3];
  for (int i = 0; i < 3; ++i) state[i] = Tensor::take(stack[3 + i]);
  const Tensor position = Tensor::take(stack[6]);
  const Kernel& kernel = check_linear_kernel(static_cast<int64_t>(stack[7]), AE_STATISTICS_FORWARD);
  call.check(kernel, true);
  ae_statistics_params& p = call.p;
  static constexpr const char* kNames[3] = {"state.c", "state.A", "state.D"};
  const int64_t size[3] = {p.B, p.H, kernel.info.D};
  Tensor after[3];
  for (int i = 0; i < 3; ++i) {
    const int64_t rank = i < 2 ? 3 : 2;
    state[i] = take_state(kNames[i], std::move(state[i]), size, rank, call.accumulator());
    after[i] = allocate_contiguous(size, rank, call.accumulator());
    p.state_in[i] = const_data(state[i]);
    p.state_out[i] = after[i].data();
  }
  const TensorView at = view("state.position", position);
  StatisticsCall::check_cpu(at);
  check_dtype(at, AE_I64, "positions");
  expect_shape(at, size, 1, "one for each row of the batch");
  Tensor moved = allocate_contiguous(size, 1, AE_I64);
  std::vector<int64_t> positions(static_cast<size_t>(p.B));
  for (int64_t b = 0; b < p.B; ++b) {
    const int64_t here = integer_at(position, at, b);
    if (here < 0 || (call.has_bias() && here + p.N > p.bias_tokens)) {
      value_error("state.position[" + std::to_string(b) + "]=" + std::to_string(here) + " with " +
                  std::to_string(p.N) + " tokens leaves the " + std::to_string(p.bias_tokens) +
                  " positions of denom_bias; pass denom_bias [h, positions] of the whole context");
    }
    positions[static_cast<size_t>(b)] = here;
    static_cast<int64_t*>(moved.data())[b] = here + p.N;
  }
  p.position = positions.data();
  Tensor y = allocate_pooled_like(call.w(), call.w().size, kernel.info.dtype, p.y_stride);
  p.y = y.data();
  if (!call.empty()) call.launch(kernel);
  stack[0] = y.give();
  for (int i = 0; i < 3; ++i) stack[1 + i] = after[i].give();
  stack[4] = moved.give();
}

// statistics_backward(w, temp, denom_bias?, cu_seqlens?, logits, statistics, dy, kernel, causal)
//   -> (dw, dtemp, dbias)
void statistics_backward(StableIValue* stack, uint64_t, uint64_t) {
  StatisticsCall call(stack, true);
  const Tensor logits = Tensor::take(stack[4]), statistics = Tensor::take(stack[5]);
  Tensor dy = Tensor::take(stack[6]);
  const Kernel& kernel =
      check_linear_kernel(static_cast<int64_t>(stack[7]), AE_STATISTICS_BACKWARD);
  call.check(kernel, take_bool(stack[8]));
  ae_statistics_params& p = call.p;
  const auto saved = [&](const char* name, const Tensor& tensor, int64_t rows, int64_t width) {
    const int64_t size[3] = {rows, p.H, width};
    const TensorView x = view(name, tensor);
    StatisticsCall::check_cpu(x);
    check_dtype(x, call.accumulator(), "the accumulator type");
    expect_shape(x, size, 3, "as statistics_forward returned it");
    if (!is_contiguous(x.size, x.stride, 3)) {
      value_error(std::string(name) + " must be contiguous, as statistics_forward returned it");
    }
    return const_cast<void*>(const_data(tensor));  // backward reads through the same field
  };
  p.logits = saved("logits", logits, call.rows(), AE_STATISTICS_BLOCK);
  p.statistics = saved("statistics", statistics, call.statistics_rows(), row_width(kernel.info.D));
  TensorView dyv{};
  dy = StatisticsCall::readable("dy", std::move(dy), kernel.info.dtype, dyv);
  expect_shape(dyv, call.w().size, 4, "the shape of w");
  p.dy = const_data(dy);
  copy4(p.dy_stride, dyv.stride);
  Tensor dw = allocate_pooled_like(call.w(), call.w().size, kernel.info.dtype, p.dw_stride);
  p.dw = dw.data();
  const int64_t sizes[2] = {p.H, p.bias_tokens};
  Tensor dtemp = allocate_contiguous(sizes, 1, call.accumulator());
  p.dtemp = dtemp.data();
  Tensor dbias =
      call.has_bias() ? allocate_contiguous(sizes, 2, call.accumulator()) : undefined_tensor();
  p.dbias = call.has_bias() ? dbias.data() : nullptr;
  if (!call.empty() && p.N > 0) {
    call.launch(kernel);
  } else {
    const int64_t bytes = element_bytes(call.accumulator());
    clear(p.dtemp, p.H * bytes);
    if (p.dbias != nullptr) clear(p.dbias, p.H * p.bias_tokens * bytes);
  }
  stack[0] = dw.give();
  stack[1] = dtemp.give();
  stack[2] = dbias.give();
}

}  // namespace
}  // namespace ae

STABLE_TORCH_LIBRARY_FRAGMENT(attnengine, m) {
  m.def(
      "statistics_forward(Tensor w, Tensor temp, Tensor? denom_bias, Tensor? cu_seqlens, "
      "int kernel, bool causal, bool save) -> (Tensor, Tensor, Tensor)");
  m.def(
      "statistics_step(Tensor w, Tensor temp, Tensor? denom_bias, Tensor c, Tensor a, Tensor d, "
      "Tensor position, int kernel) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "statistics_backward(Tensor w, Tensor temp, Tensor? denom_bias, Tensor? cu_seqlens, "
      "Tensor logits, Tensor statistics, Tensor dy, int kernel, bool causal) -> "
      "(Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(attnengine, CPU, m) {
  m.impl("statistics_forward", ae::statistics_forward);
  m.impl("statistics_step", ae::statistics_step);
  m.impl("statistics_backward", ae::statistics_backward);
}

// Reached when any argument is a CUDA tensor; the argument checks name it and refuse.
STABLE_TORCH_LIBRARY_IMPL(attnengine, CUDA, m) {
  m.impl("statistics_forward", ae::statistics_forward);
  m.impl("statistics_step", ae::statistics_step);
  m.impl("statistics_backward", ae::statistics_backward);
}
