// Copies new tokens into a cache. Torch-free; elements of any size, any strides.
#pragma once
#include <cstdint>
#include <cstring>

#include "sequences.h"

namespace ae {

// One of k and v. Dimensions: [rows or pages, positions, heads, head_dim] of the cache, [sequences,
// tokens, heads, head_dim] of what is appended. Strides count elements.
struct AppendOperand {
  char* cache;
  const char* fresh;
  int64_t cache_stride[4], fresh_stride[4];
  int64_t heads, head_dim;

  void copy(int64_t element, int64_t row, int64_t position, int64_t b, int64_t token) const {
    char* to = cache + (row * cache_stride[0] + position * cache_stride[1]) * element;
    const char* from = fresh + (b * fresh_stride[0] + token * fresh_stride[1]) * element;
    const bool dense = head_dim == 1 || (cache_stride[3] == 1 && fresh_stride[3] == 1);
    if (dense && (heads == 1 || (cache_stride[2] == head_dim && fresh_stride[2] == head_dim))) {
      std::memcpy(to, from, static_cast<size_t>(heads * head_dim * element));
      return;
    }
    for (int64_t h = 0; h < heads; ++h) {
      char* to_head = to + h * cache_stride[2] * element;
      const char* from_head = from + h * fresh_stride[2] * element;
      if (dense) {
        std::memcpy(to_head, from_head, static_cast<size_t>(head_dim * element));
        continue;
      }
      for (int64_t d = 0; d < head_dim; ++d) {
        std::memcpy(to_head + d * cache_stride[3] * element,
                    from_head + d * fresh_stride[3] * element, static_cast<size_t>(element));
      }
    }
  }
};

// The whole append: a token of a sequence is a task. The tables have been checked.
struct Append {
  const SequenceTables& tables;
  AppendOperand operands[2];
  int64_t element_bytes;

  int64_t tokens() const { return tables.count * tables.key_more; }
  int64_t bytes() const {
    int64_t elements = 0;
    for (const AppendOperand& x : operands) elements += x.heads * x.head_dim;
    return tokens() * elements * element_bytes;
  }
  static void run(void* self, int64_t task, int32_t) {
    const auto* a = static_cast<const Append*>(self);
    const SequenceTables& t = a->tables;
    const int64_t b = task / t.key_more, token = task % t.key_more;
    int64_t position = t.key_end[b] + token;
    int64_t row = t.kv_row != nullptr ? t.kv_row[b] : b;
    if (t.pages != nullptr) {
      row = t.pages[b * t.page_pitch + position / t.page_size];
      position %= t.page_size;
    }
    for (const AppendOperand& x : a->operands) x.copy(a->element_bytes, row, position, b, token);
  }
};

}  // namespace ae
