// Scratch memory for launches: small requests reuse one buffer per thread, large ones blocks of the
// process's pool.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "pool.h"

namespace ae {

// Kernels keep their tiles in L1/L2, so small launches fit; a thread never holds on to more.
inline constexpr int64_t kCachedWorkspaceBytes = int64_t{1} << 20;
inline constexpr size_t kWorkspaceAlignment = 4096;  // a page: the same L1 sets at every run

// A large buffer of the process's pool, so that layers which run one after the other touch fresh
// pages once. Where none is large enough, the largest makes room; so does one of which much would
// be left unused.
class LargeBuffer {
 public:
  // Of blocks that may be much too large.
  static constexpr int64_t kAnyBytes = int64_t{64} << 20;

  explicit LargeBuffer(int64_t bytes)
      : block_(pool().take(bytes, std::max(MemoryPool::most_for(bytes), kAnyBytes), true)) {}
  LargeBuffer(const LargeBuffer&) = delete;
  LargeBuffer& operator=(const LargeBuffer&) = delete;
  ~LargeBuffer() { pool().give(block_); }
  void* data() const { return block_->data; }

 private:
  static MemoryPool& pool() { return MemoryPool::of_process(); }
  MemoryPool::Block* block_;
};

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
