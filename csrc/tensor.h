// Owning tensor handles over torch's C shim. The shim's calls cost a few nanoseconds each; its C++
// wrapper (torch::stable::Tensor) allocates a control block per tensor, which would show in a call
// that should take two microseconds.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <atomic>
#include <bit>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

#include "layout.h"
#include "pool.h"
#include "validate.h"

namespace ae {

inline void check_shim(AOTITorchError code, const char* call) {
  if (code != AOTI_TORCH_SUCCESS) [[unlikely]] {
    throw std::runtime_error(std::string("attnengine: torch refused ") + call);
  }
}
#define AE_TORCH(call) ::ae::check_shim((call), #call)

class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle owned) : handle_(owned) {}
  Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }
  AtenTensorHandle get() const { return handle_; }
  explicit operator bool() const { return handle_ != nullptr; }

  static Tensor take(StableIValue& value) {
    return Tensor(std::bit_cast<AtenTensorHandle>(std::exchange(value, 0)));
  }
  StableIValue give() { return std::bit_cast<StableIValue>(std::exchange(handle_, nullptr)); }

  void* data() const {
    void* data;
    AE_TORCH(torch_get_mutable_data_ptr(handle_, &data));
    return data;
  }

 private:
  AtenTensorHandle handle_ = nullptr;
};

// torch's type codes, asked for once: their values are no part of its ABI.
struct TorchTypes {
  static constexpr int32_t kCodes = 64;
  int32_t to_torch[AE_BOOL + 1];
  int8_t to_ae[kCodes];
  int32_t cpu, cuda, meta;

  TorchTypes()
      : to_torch{aoti_torch_dtype_float32(),  aoti_torch_dtype_float64(),
                 aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16(),
                 aoti_torch_dtype_int64(),    aoti_torch_dtype_int32(),
                 aoti_torch_dtype_int16(),    aoti_torch_dtype_int8(),
                 aoti_torch_dtype_uint8(),    aoti_torch_dtype_bool()},
        cpu(aoti_torch_device_type_cpu()),
        cuda(aoti_torch_device_type_cuda()),
        meta(aoti_torch_device_type_meta()) {
    std::memset(to_ae, -1, sizeof(to_ae));
    for (int8_t i = 0; i <= AE_BOOL; ++i) to_ae[to_torch[i]] = i;
  }
  int32_t dtype(int32_t code) const { return code >= 0 && code < kCodes ? to_ae[code] : -1; }
  DeviceKind device(int32_t type) const {
    if (type == cpu) return DeviceKind::kCpu;
    if (type == cuda) return DeviceKind::kCuda;
    return type == meta ? DeviceKind::kMeta : DeviceKind::kOther;
  }
};

inline const TorchTypes types;

// Everything a launch needs to know of a tensor, except its data, which a foreign device may not
// have.
inline TensorView view(const char* name, const Tensor& tensor) {
  TensorView v{};
  v.name = name;
  int64_t *size, *stride;
  int32_t dtype, device;
  AE_TORCH(aoti_torch_get_dim(tensor.get(), &v.rank));
  AE_TORCH(aoti_torch_get_sizes(tensor.get(), &size));
  AE_TORCH(aoti_torch_get_strides(tensor.get(), &stride));
  AE_TORCH(aoti_torch_get_dtype(tensor.get(), &dtype));
  AE_TORCH(aoti_torch_get_device_type(tensor.get(), &device));
  v.size = size;
  v.stride = stride;
  v.dtype = types.dtype(dtype);
  v.device = types.device(device);
  if (v.device == DeviceKind::kCuda) {
    AE_TORCH(aoti_torch_get_device_index(tensor.get(), &v.device_index));
  }
  return v;
}

// Reading through the const pointer leaves copy-on-write tensors shared.
inline const void* const_data(const Tensor& tensor) {
  const void* data;
  AE_TORCH(torch_get_const_data_ptr(tensor.get(), &data));
  return data;
}

// Debugging aid of the tests: every buffer that a kernel must write starts as NaN (all bits set).
inline std::atomic<bool> poison_buffers{false};

inline void poison(void* data, int64_t bytes) {
  if (poison_buffers.load(std::memory_order_relaxed)) [[unlikely]] {
    if (bytes > 0) std::memset(data, 0xff, static_cast<size_t>(bytes));
  }
}

// Where a result is allocated: beside an argument.
struct Place {
  int32_t type, index;

  static Place cpu() { return {types.cpu, 0}; }
  static Place of(const TensorView& x) {
    return x.device == DeviceKind::kCuda ? Place{types.cuda, x.device_index} : cpu();
  }
  bool is_cpu() const { return type == types.cpu; }
};

inline Tensor allocate(const int64_t* size, const int64_t* stride, int64_t rank, int32_t dtype,
                       Place place) {
  AtenTensorHandle handle;
  AE_TORCH(aoti_torch_empty_strided(rank, size, stride, types.to_torch[dtype], place.type,
                                    place.index, &handle));
  Tensor tensor(handle);
  if (!place.is_cpu()) return tensor;
  const int64_t bytes = element_count(size, rank) * element_bytes(dtype);
  if (bytes >= kLargeBufferBytes) advise_large_pages(tensor.data(), bytes);
  if (poison_buffers.load(std::memory_order_relaxed)) [[unlikely]] {
    poison(tensor.data(), bytes);
  }
  return tensor;
}

inline Tensor allocate_contiguous(const int64_t* size, int64_t rank, int32_t dtype,
                                  Place place = Place::cpu()) {
  int64_t stride[AE_MAX_RANK];
  contiguous_strides(size, rank, stride);
  return allocate(size, stride, rank, dtype, place);
}

// A large result on the CPU, in memory of the process's pool, which it goes back to with the last
// tensor that uses it: where each result replaces the last, two blocks are used in turns. Dense.
// torch cannot make the storage of such a tensor larger (resize_), which it says.
inline Tensor allocate_pooled(const int64_t* size, const int64_t* stride, int64_t rank,
                              int32_t dtype, Place place) {
  MemoryPool& pool = MemoryPool::of_process();
  const int64_t bytes = element_count(size, rank) * element_bytes(dtype);
  if (!place.is_cpu() || bytes < kLargeBufferBytes || bytes > pool.limit()) {
    return allocate(size, stride, rank, dtype, place);
  }
  const auto give = [](void*, void* block) {
    MemoryPool::of_process().give(static_cast<MemoryPool::Block*>(block));
  };
  MemoryPool::Block* block = pool.take(bytes, MemoryPool::most_for(bytes));
  AtenTensorHandle handle;  // the CPU has no number here
  AE_TORCH(torch_from_blob(block->data, rank, size, stride, 0, types.to_torch[dtype], place.type,
                           -1, &handle, aoti_torch_layout_strided(), nullptr, 0, give, block));
  poison(block->data, bytes);
  return Tensor(handle);
}

inline Tensor allocate_pooled(const int64_t* size, int64_t rank, int32_t dtype,
                              Place place = Place::cpu()) {
  int64_t stride[AE_MAX_RANK];
  contiguous_strides(size, rank, stride);
  return allocate_pooled(size, stride, rank, dtype, place);
}

// Python's None. Returning it is 0.5 us cheaper than an empty tensor.
inline Tensor undefined_tensor() {
  AtenTensorHandle handle;
  AE_TORCH(aoti_torch_new_uninitialized_tensor(&handle));
  return Tensor(handle);
}

inline Tensor copy_as(const Tensor& source, const int64_t* size, int64_t rank, int32_t dtype,
                      Place place = Place::cpu()) {
  Tensor copy = allocate_contiguous(size, rank, dtype, place);
  AE_TORCH(aoti_torch_copy_(copy.get(), source.get(), 0));
  return copy;
}

// The tensors of a `Tensor[]` argument. Owns the list; up to kInline tensors need no allocation.
class TensorList {
 public:
  static constexpr size_t kInline = 8;

  explicit TensorList(StableIValue& value)
      : list_(std::bit_cast<StableListHandle>(std::exchange(value, 0))) {
    AE_TORCH(torch_list_size(list_, &size_));
    if (size_ > kInline) more_ = std::make_unique<Tensor[]>(size_);
    for (size_t i = 0; i < size_; ++i) {
      StableIValue element;
      AE_TORCH(torch_list_get_item(list_, i, &element));
      items()[i] = Tensor::take(element);
    }
  }
  TensorList(const TensorList&) = delete;
  TensorList& operator=(const TensorList&) = delete;
  ~TensorList() { torch_delete_list(list_); }

  size_t size() const { return size_; }
  const Tensor& operator[](size_t i) const { return more_ ? more_[i] : inline_[i]; }

 private:
  Tensor* items() { return more_ ? more_.get() : inline_; }

  StableListHandle list_;
  size_t size_ = 0;
  Tensor inline_[kInline];
  std::unique_ptr<Tensor[]> more_;
};

}  // namespace ae
