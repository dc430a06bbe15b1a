// Scratch memory for launches: small requests reuse one buffer per thread, large ones do not.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace ae {

// Cached up to this size; kernels keep their tiles in L1/L2, so common launches fit. Larger
// requests go to the allocator each time, so that a thread never holds on to more than this.
inline constexpr int64_t kCachedWorkspaceBytes = int64_t{1} << 20;
inline constexpr size_t kWorkspaceAlignment = 4096;  // a page: the same L1 sets at every run

class ThreadBuffer {
 public:
  // Null when the request is too large or the buffer is in use further up this thread's stack.
  void* acquire(int64_t bytes) {
    if (busy_ || bytes > kCachedWorkspaceBytes) return nullptr;
    if (bytes > capacity_) grow(bytes);
    busy_ = true;
    return data_;
  }
  void release() { busy_ = false; }
  int64_t capacity() const { return capacity_; }

  ThreadBuffer() = default;
  ThreadBuffer(const ThreadBuffer&) = delete;
  ThreadBuffer& operator=(const ThreadBuffer&) = delete;
  ~ThreadBuffer() { std::free(data_); }

  static ThreadBuffer& of_this_thread() {
    static thread_local ThreadBuffer buffer;
    return buffer;
  }

 private:
  void grow(int64_t bytes) {
    int64_t capacity = int64_t{64} << 10;
    while (capacity < bytes) capacity *= 2;
    std::free(data_);
    data_ = nullptr;
    capacity_ = 0;
    data_ = std::aligned_alloc(kWorkspaceAlignment, static_cast<size_t>(capacity));
    if (data_ == nullptr) throw std::bad_alloc();
    capacity_ = capacity;
  }

  void* data_ = nullptr;
  int64_t capacity_ = 0;
  bool busy_ = false;
};

}  // namespace ae
