// Scratch memory for launches: small requests reuse one buffer per thread, large ones one buffer of
// the process.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "pages.h"

namespace ae {

// Kernels keep their tiles in L1/L2, so small launches fit; a thread never holds on to more.
inline constexpr int64_t kCachedWorkspaceBytes = int64_t{1} << 20;
inline constexpr size_t kWorkspaceAlignment = 4096;  // a page: the same L1 sets at every run

// One large buffer that the process keeps between launches, so that layers which run one after the
// other touch fresh pages once. A launch that finds it taken or too small allocates its own; the
// larger one is kept, up to kKeptBytes.
class LargeBuffer {
 public:
  static constexpr int64_t kKeptBytes = int64_t{64} << 20;

  explicit LargeBuffer(int64_t bytes) : block_(kept().exchange(nullptr)) {
    if (block_ != nullptr && block_->bytes >= bytes) return;
    drop(block_);
    constexpr int64_t kPage = int64_t{2} << 20;
    const int64_t size = (bytes + kPage - 1) / kPage * kPage;
    void* data = std::aligned_alloc(kPage, static_cast<size_t>(size));
    if (data == nullptr) throw std::bad_alloc();
    advise_large_pages(data, size);
    block_ = new Block{data, size};
  }
  LargeBuffer(const LargeBuffer&) = delete;
  LargeBuffer& operator=(const LargeBuffer&) = delete;
  ~LargeBuffer() {
    const int64_t bytes = block_->bytes;  // once it is kept, another thread may have it
    Block* spare = bytes > kKeptBytes ? block_ : kept().exchange(block_);
    if (spare != block_ && spare != nullptr && spare->bytes > bytes) spare = kept().exchange(spare);
    drop(spare);
  }
  void* data() const { return block_->data; }

 private:
  struct Block {
    void* data;
    int64_t bytes;
  };
  static void drop(Block* block) {
    if (block == nullptr) return;
    std::free(block->data);
    delete block;
  }
  // Without a lock, so that a process that forks during a launch harms nobody.
  static std::atomic<Block*>& kept() {
    static std::atomic<Block*> one{nullptr};
    return one;
  }
  Block* block_;
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
