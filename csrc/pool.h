// Large blocks of memory that are used again: workspaces of launches and large results. The pages
// of a fresh block are cleared at their first touch, which takes three times as long as a decode
// step that writes its states there.
#pragma once
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

#include "pages.h"

namespace ae {

// Blocks that nobody uses, at most kSlots of them and limit() bytes in all; the newest stay.
// Without a lock, so that a process that forks during a call harms nobody: whoever looks for a
// block takes all of them out and puts the others back, and whoever finds none meanwhile allocates.
class MemoryPool {
 public:
  static constexpr int64_t kPage = int64_t{2} << 20;
  static constexpr int64_t kMostKept = int64_t{1} << 30;

  struct Block {
    void* data;
    int64_t bytes, age;
  };

  // Never destroyed: tensors may die after static objects.
  static MemoryPool& of_process() {
    static auto* pool = new MemoryPool;
    return *pool;
  }

  // A block of whole pages: the smallest free one of `bytes` to `most` bytes, of several the
  // newest, or a new one; with `replace` in the place of the largest free one.
  Block* take(int64_t bytes, int64_t most, bool replace = false) {
    if (kept() >= (replace ? 1 : bytes)) {
      Block* free[kSlots + 1];
      const int count = take_all(free);
      Block* best = nullptr;
      for (int i = 0; i < count; ++i) {
        const bool fits = free[i]->bytes >= bytes && free[i]->bytes <= most;
        if (fits && (best == nullptr || before(free[i], best))) std::swap(best, free[i]);
      }
      if (best == nullptr && replace && count > 0) {
        const auto smaller = [](const Block* a, const Block* b) { return a->bytes < b->bytes; };
        drop(std::exchange(*std::max_element(free, free + count, smaller), nullptr));
      }
      put_back(free, count);
      if (best != nullptr) return best;
    }
    const int64_t size = whole_pages(bytes);
    void* data = std::aligned_alloc(kPage, static_cast<size_t>(size));
    if (data == nullptr) throw std::bad_alloc();
    advise_large_pages(data, size);
    return new Block{data, size, 0};
  }

  void give(Block* block) {
    block->age = clock_.fetch_add(1, std::memory_order_relaxed);
    if (put(block)) return;
    Block* free[kSlots + 1] = {block};
    put_back(free, block->bytes <= limit() ? 1 + take_all(free + 1) : 1);
  }

  // 0 keeps nothing. Blocks that are in use go when they are given back.
  void keep_at_most(int64_t bytes) {
    limit_.store(bytes);
    Block* free[kSlots + 1];
    put_back(free, take_all(free));
  }
  int64_t limit() const { return limit_.load(std::memory_order_relaxed); }
  int64_t kept() const { return kept_.load(std::memory_order_relaxed); }

  // Of the block for so many bytes: an eighth may be left unused, beside the rest of a page.
  static int64_t most_for(int64_t bytes) { return whole_pages(bytes + bytes / 8); }
  static int64_t whole_pages(int64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

 private:
  static constexpr int kSlots = 8;

  static bool before(const Block* a, const Block* b) {
    return a->bytes != b->bytes ? a->bytes < b->bytes : a->age > b->age;
  }
  // A thirty-second of the machine's memory.
  static int64_t first_limit() {
    const int64_t pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGE_SIZE);
    if (pages <= 0 || page <= 0) return kPage;
    return std::min(pages / 32 * page, kMostKept);
  }

  int take_all(Block** to) {
    int count = 0;
    for (auto& slot : slots_) {
      if (slot.load(std::memory_order_relaxed) == nullptr) continue;
      Block* block = slot.exchange(nullptr);
      if (block == nullptr) continue;
      kept_.fetch_sub(block->bytes);
      to[count++] = block;
    }
    return count;
  }
  static void drop(Block* block) {
    std::free(block->data);
    delete block;
  }
  // The newest first, as far as they may stay; frees the others. Null: no block.
  void put_back(Block** blocks, int count) {
    Block** end = std::remove(blocks, blocks + count, nullptr);
    std::sort(blocks, end, [](const Block* a, const Block* b) { return a->age > b->age; });
    for (Block** block = blocks; block != end; ++block) {
      if (put(*block)) continue;
      drop(*block);
    }
  }
  bool put(Block* block) {
    const int64_t bytes = block->bytes;
    if (kept_.fetch_add(bytes) + bytes <= limit()) {
      for (auto& slot : slots_) {
        Block* none = nullptr;
        if (slot.compare_exchange_strong(none, block)) return true;
      }
    }
    kept_.fetch_sub(bytes);
    return false;
  }

  std::atomic<Block*> slots_[kSlots] = {};
  std::atomic<int64_t> kept_{0}, limit_{first_limit()}, clock_{0};
};

}  // namespace ae
