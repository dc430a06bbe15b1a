// The operators attnengine::merge_states and attnengine::merge_states_backward on CPU tensors.
// attnengine/merge.py says what they mean, and holds their CUDA twins, fakes and autograd.
#include "merge_state.h"

#include <torch/csrc/stable/library.h>

#include "launch.h"

namespace ae {
namespace {

constexpr int64_t kSerialMergeElements = 1 << 16;  // below, waking a second thread costs more

// Merges and their gradients: the arguments, checked, and the work that they make.
class MergeCall {
 public:
  MergeCall(StableIValue& outs, StableIValue& lses) : outs_(outs), lses_(lses) {
    check();
    const TensorView first = view("outs", outs_[0]);
    merge_.dims = first.rank - 1;
    merge_.rows = element_count(first.size, merge_.dims);
    merge_.depth = first.size[merge_.dims];
    merge_.dtype = first.dtype;
    for (int64_t d = 0; d < merge_.dims; ++d) merge_.size[d] = first.size[d];
    merge_.parts.resize(outs_.size());
    kept_.reserve(outs_.size() + 1);
    for (size_t i = 0; i < outs_.size(); ++i) {
      merge_.parts[i].out = read_rows(outs_[i], true);
      merge_.parts[i].lse = read_rows(lses_[i], false);
    }
  }
  Merge& merge() { return merge_; }
  size_t count() const { return outs_.size(); }
  const Tensor& out(size_t i) const { return outs_[i]; }
  const Tensor& lse(size_t i) const { return lses_[i]; }
  int32_t lse_dtype() const { return merge_.dtype == AE_F64 ? AE_F64 : AE_F32; }

  // Rows of an argument whose elements the kernel reads; with others than consecutive ones, of a
  // copy.
  Rows read_rows(const Tensor& tensor, bool has_depth) {
    TensorView x = view("", tensor);
    const Tensor* source = &tensor;
    if (has_depth && x.size[x.rank - 1] > 1 && x.stride[x.rank - 1] != 1) {
      source = &kept_.emplace_back(copy_as(tensor, x.size, x.rank, x.dtype));
      x = view("", *source);
    }
    Rows rows;
    // Only results are written through this pointer.
    rows.data = const_cast<void*>(const_data(*source));
    for (int64_t d = 0; d < merge_.dims; ++d) rows.stride[d] = x.stride[d];
    return rows;
  }

  // A new tensor in the dimension order of `like`, and its rows.
  Tensor allocate_out(const Tensor& like, Rows& rows) const {
    const TensorView x = view("", like);
    int64_t stride[AE_MAX_RANK];
    dense_strides_of_rank(x.stride, x.size, x.rank, stride);
    Tensor tensor = allocate(x.size, stride, x.rank, merge_.dtype, Place::cpu());
    return with_rows(std::move(tensor), stride, rows);
  }
  Tensor allocate_lse(Rows& rows) const {
    int64_t stride[AE_MAX_RANK];
    contiguous_strides(merge_.size, merge_.dims, stride);
    Tensor tensor = allocate(merge_.size, stride, merge_.dims, lse_dtype(), Place::cpu());
    return with_rows(std::move(tensor), stride, rows);
  }

  void run(ae_task task) {
    const int64_t elements =
        merge_.rows * (merge_.depth + 1) * static_cast<int64_t>(merge_.parts.size());
    uint32_t threads = 1;
    if (elements > kSerialMergeElements) AE_TORCH(torch_get_num_threads(&threads));
    parallel_for(merge_.tasks(), static_cast<int32_t>(threads), task, &merge_);
  }

 private:
  Tensor with_rows(Tensor tensor, const int64_t* stride, Rows& rows) const {
    rows.data = tensor.data();
    for (int64_t d = 0; d < merge_.dims; ++d) rows.stride[d] = stride[d];
    return tensor;
  }

  static std::string name(const char* list, size_t i) {
    return std::string(list) + "[" + std::to_string(i) + "]";
  }

  // The texts are attnengine/merge.py's: a test compares them.
  void check() const {
    if (outs_.size() != lses_.size()) {
      value_error("outs has " + std::to_string(outs_.size()) + " tensors but lses has " +
                  std::to_string(lses_.size()) + "; each part has one of both");
    }
    if (outs_.size() == 0) value_error("outs is empty; pass at least one part");
    const TensorView first = view("outs", outs_[0]);
    check_first(first);
    for (size_t i = 0; i < outs_.size(); ++i) {
      const TensorView out = view("outs", outs_[i]), lse = view("lses", lses_[i]);
      check_part(name("outs", i), name("lses", i), out, lse, first);
    }
  }

  static void check_first(const TensorView& x) {
    if (x.dtype < AE_F32 || x.dtype > AE_F16) {
      type_error(std::string("outs[0] has ") + dtype_name(x.dtype) +
                 "; supported are float32, float64, bfloat16 and float16: cast with .to()");
    }
    if (x.rank < 1) value_error("outs[0] has shape []; it must be [..., Dv]");
    if (x.rank > AE_MAX_RANK) {
      value_error("outs[0] has " + std::to_string(x.rank) + " dimensions (shape " + x.shape() +
                  "), the limit is " + std::to_string(AE_MAX_RANK) + "; flatten some of them");
    }
  }

  static void check_part(const std::string& out_name, const std::string& lse_name,
                         const TensorView& out, const TensorView& lse, const TensorView& first) {
    if (out.device != first.device || lse.device != first.device) {
      const bool of_out = out.device != first.device;
      value_error((of_out ? out_name : lse_name) + " is on " +
                  (of_out ? out.where() : lse.where()) + " but outs[0] is on " + first.where() +
                  "; move them to one device with .to()");
    }
    if (out.dtype != first.dtype) {
      type_error(out_name + " has " + dtype_name(out.dtype) + " but outs[0] has " +
                 dtype_name(first.dtype) + "; cast with .to()");
    }
    const int32_t lse_dtype = first.dtype == AE_F64 ? AE_F64 : AE_F32;
    if (lse.dtype != lse_dtype) {
      type_error(lse_name + " has " + dtype_name(lse.dtype) + ", expected " +
                 dtype_name(lse_dtype) + " (the accumulator type of outs' " +
                 dtype_name(first.dtype) + "); cast with .to()");
    }
    if (!same_size(out, first, first.rank) || out.rank != first.rank) {
      value_error(out_name + " has shape " + out.shape() + " but outs[0] has " + first.shape() +
                  "; the parts must have one shape");
    }
    if (lse.rank != first.rank - 1 || !same_size(lse, first, lse.rank)) {
      value_error(lse_name + " has shape " + lse.shape() + ", expected " +
                  shape_text(first.size, first.rank - 1) +
                  ": outs[0]'s without its last dimension; for outs [B, L, H, Dv] or [total, H, "
                  "Dv] pass lse.transpose(-1, -2)");
    }
  }
  static bool same_size(const TensorView& a, const TensorView& b, int64_t dims) {
    if (a.rank < dims || b.rank < dims) return false;
    for (int64_t d = 0; d < dims; ++d) {
      if (a.size[d] != b.size[d]) return false;
    }
    return true;
  }

  TensorList outs_, lses_;
  std::vector<Tensor> kept_;
  Merge merge_;
};

// merge_states(outs, lses) -> (out, lse)
void merge_states(StableIValue* stack, uint64_t, uint64_t) {
  MergeCall call(stack[0], stack[1]);
  Tensor out = call.allocate_out(call.out(0), call.merge().out);
  Tensor lse = call.allocate_lse(call.merge().lse);
  call.run(run_merge_task<false>);
  stack[0] = out.give();
  stack[1] = lse.give();
}

StableIValue give_list(std::vector<Tensor>& tensors) {
  StableListHandle list;
  AE_TORCH(torch_new_list_reserve_size(tensors.size(), &list));
  for (Tensor& tensor : tensors) AE_TORCH(torch_list_push_back(list, tensor.give()));
  return std::bit_cast<StableIValue>(list);
}

void check_gradient(const char* name, const TensorView& x, const int64_t* size, int64_t rank,
                    int32_t dtype) {
  check_dtype(x, dtype, "that of the forward's result");
  bool same = x.rank == rank && x.device == DeviceKind::kCpu;
  for (int64_t d = 0; same && d < rank; ++d) same = x.size[d] == size[d];
  if (!same) {
    value_error(std::string(name) + " has shape " + x.shape() + " on " + x.where() + ", expected " +
                shape_text(size, rank) + " on cpu: the forward's result");
  }
}

// merge_states_backward(outs, lses, dout, dlse) -> (douts, dlses)
void merge_states_backward(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor dout = Tensor::take(stack[2]), dlse = Tensor::take(stack[3]);
  MergeCall call(stack[0], stack[1]);
  Merge& merge = call.merge();
  const TensorView first = view("outs", call.out(0));
  check_gradient("dout", view("dout", dout), first.size, first.rank, merge.dtype);
  check_gradient("dlse", view("dlse", dlse), first.size, merge.dims, call.lse_dtype());
  merge.out = call.read_rows(dout, true);
  merge.lse = call.read_rows(dlse, false);
  std::vector<Tensor> douts, dlses;
  for (size_t i = 0; i < call.count(); ++i) {
    douts.push_back(call.allocate_out(call.out(i), merge.parts[i].dout));
    dlses.push_back(call.allocate_lse(merge.parts[i].dlse));
  }
  call.run(run_merge_task<true>);
  stack[0] = give_list(douts);
  stack[1] = give_list(dlses);
}

}  // namespace
}  // namespace ae

STABLE_TORCH_LIBRARY_FRAGMENT(attnengine, m) {
  m.def("merge_states(Tensor[] outs, Tensor[] lses) -> (Tensor out, Tensor lse)");
  m.def(
      "merge_states_backward(Tensor[] outs, Tensor[] lses, Tensor dout, Tensor dlse) -> "
      "(Tensor[] douts, Tensor[] dlses)");
}

STABLE_TORCH_LIBRARY_IMPL(attnengine, CPU, m) {
  m.impl("merge_states", ae::merge_states);
  m.impl("merge_states_backward", ae::merge_states_backward);
}
