// What the generated functors see of a launch: captured tensors, where to report an index that is
// out of bounds, and the number of keys.
#pragma once
#include <cstdint>

#include "common/abi.h"
#include "common/host_device.h"

namespace ae {

// Values of the diagonals key - query + origin (cpu/diagonal.h).
struct DiagonalTable {
  const void* data;
  const int32_t* faults;  // null, or per entry: 1 + the captured tensor whose index left its bounds
  int64_t b_stride, h_stride, origin;

  // The entry of row q's key 0.
  AE_HD int64_t row(int64_t b, int64_t h, int64_t q) const {
    return b * b_stride + h * h_stride + origin - q;
  }
};

// Where rows find their sums along diagonals (cpu/diagonal.h).
struct DiagonalRows {
  int64_t group, pitch, origin;

  AE_HD int64_t row(int64_t h, int64_t q) const { return h % group * pitch + origin - q; }
};

struct Env {
  const ae_capture* cap;
  int32_t* fault;
  int64_t S;
  const DiagonalTable* tables = nullptr;
  DiagonalRows sums = {};
};

}  // namespace ae
