// Memory layout of results: each follows the dimension order of the input that it belongs to.
#pragma once
#include <cstdint>
#include <limits>

#include "common/abi.h"

namespace ae {

// Strides for a new dense [4-D] tensor of `size` whose first three dimensions lie in memory in the
// order of `like` (largest stride outermost, ties in natural order) and whose last dimension is
// innermost. An expanded dimension (stride 0) has no place in memory and counts as outermost.
inline void dense_strides_like(const int64_t* like, const int64_t* size, int64_t* stride) {
  int order[3] = {0, 1, 2};
  const auto weight = [like](int d) {
    return like[d] == 0 ? std::numeric_limits<int64_t>::max() : like[d];
  };
  for (int i = 1; i < 3; ++i) {
    for (int j = i; j > 0 && weight(order[j - 1]) < weight(order[j]); --j) {
      const int moved = order[j];
      order[j] = order[j - 1];
      order[j - 1] = moved;
    }
  }
  const auto extent = [size](int d) { return size[d] > 0 ? size[d] : 1; };
  stride[3] = 1;
  int64_t step = extent(3);
  for (int i = 2; i >= 0; --i) {
    stride[order[i]] = step;
    step *= extent(order[i]);
  }
}

inline void contiguous_strides(const int64_t* size, int64_t rank, int64_t* stride) {
  int64_t step = 1;
  for (int64_t d = rank - 1; d >= 0; --d) {
    stride[d] = step;
    step *= size[d] > 0 ? size[d] : 1;
  }
}

inline int64_t element_count(const int64_t* size, int64_t rank) {
  int64_t count = 1;
  for (int64_t d = 0; d < rank; ++d) count *= size[d];
  return count;
}

constexpr int64_t element_bytes(int32_t dtype) {
  constexpr int64_t kBytes[] = {4, 8, 2, 2, 8, 4, 2, 1, 1, 1};
  return kBytes[dtype];
}

inline bool is_contiguous(const int64_t* size, const int64_t* stride, int64_t rank) {
  if (element_count(size, rank) == 0) return true;
  int64_t step = 1;
  for (int64_t d = rank - 1; d >= 0; --d) {
    if (size[d] != 1 && stride[d] != step) return false;
    step *= size[d];
  }
  return true;
}

}  // namespace ae
