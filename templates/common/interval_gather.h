// What mask analysis knows of captured tensors: the [min, max] of a box of elements.
//
// Contract. gather<T>(env, capture, index intervals...) encloses every element of the index box. A
// negative index wraps once, as in the kernels. If any index of the box may be out of range the
// result is everything T can hold, so that the tile stays undecided, the kernel evaluates the mask
// there, and an index that really is out of range is reported. The same for a box that would take
// more than kMaxVisits reads: the caller subdivides.
//
// Long boxes read block tables: the min and max of every 64 and every 4096 elements along one axis
// of a capture. They are built once per launch in caller memory:
//     bytes = table_bytes(params, Fn::kMaskCaptures)                       // in the workspace
//     IntervalEnv env = build_tables(params, Fn::kMaskCaptures, memory, parallel_for);
// Without memory (introspection) interval_env(params) reads elements only.
#pragma once
#include "common/abi.h"
#include "common/interval_keys.h"

namespace ae {

struct bf16;  // complete in the kernels' vector header; only named here
struct f16;

// Tables of one capture. A "row" is one position of the other axes, in order, with broadcast
// (stride 0) axes counted once. Each row holds mins[blocks], coarse mins[coarse], then the maxs.
struct BlockTable {
  void* keys;          // ordered keys, as wide as the elements; null: no table
  int64_t rows, size;  // size: elements along the axis
  int64_t blocks, coarse;
  int32_t axis;
};

struct IntervalEnv {
  const ae_capture* cap;
  int64_t S, L;
  const BlockTable* tables;  // one per capture, or null
  int32_t capture_count;
};

AE_HD inline IntervalEnv interval_env(const ae_params& p) {
  return {p.captures, p.S, p.L, nullptr, p.capture_count};
}

namespace iv {

constexpr int64_t kBlock = 64;         // elements per block
constexpr int64_t kFan = 64;           // blocks per coarse block
constexpr int64_t kMaxVisits = 65536;  // reads of one gather

// The length of an axis in memory: a broadcast axis holds one element.
AE_HD inline int64_t extent(const ae_capture& c, int axis) {
  return c.stride[axis] == 0 && c.size[axis] > 0 ? 1 : c.size[axis];
}

// ---- gather ----
// Folds elements [first, end) of one row: the coarse blocks inside, the blocks on both sides of
// them, and the elements at both ends. The last, short block ends where the axis ends.
template <class Key>
AE_HD inline void fold_row(const void* data, int64_t offset, int64_t stride,
                           const BlockTable* table, int64_t row, int64_t first, int64_t end,
                           const Encoding& e, KeyRange<Key>& r) {
  const auto elements = [&](int64_t begin, int64_t stop) {
    fold_elements<Key>(data, offset + begin * stride, stop - begin, stride, e, r);
  };
  if (table == nullptr) return elements(first, end);
  const int64_t block = (first + kBlock - 1) / kBlock;
  const int64_t block_end = end == table->size ? table->blocks : end / kBlock;
  if (block >= block_end) return elements(first, end);
  elements(first, block * kBlock);
  if (end != table->size) elements(block_end * kBlock, end);

  const int64_t level = table->blocks + table->coarse;
  const Key* lo = static_cast<const Key*>(table->keys) + row * 2 * level;
  const Key* hi = lo + level;
  const auto keys = [&](int64_t begin, int64_t stop) {
    fold_keys(lo + begin, hi + begin, stop - begin, r);
  };
  const int64_t coarse = (block + kFan - 1) / kFan;
  const int64_t coarse_end = block_end == table->blocks ? table->coarse : block_end / kFan;
  if (coarse >= coarse_end) return keys(block, block_end);
  keys(block, coarse * kFan);
  keys(table->blocks + coarse, table->blocks + coarse_end);
  if (block_end != table->blocks) keys(coarse_end * kFan, block_end);
}

template <class Key, int kDtype>
AE_HD inline Interval gather_box(const IntervalEnv& env, int cap, const Interval* box, int rank) {
  constexpr Encoding e = encoding(kDtype);
  const ae_capture& c = env.cap[cap];
  const BlockTable* table = env.tables == nullptr ? nullptr : env.tables + cap;
  if (table != nullptr && table->keys == nullptr) table = nullptr;
  const int axis = table != nullptr ? table->axis : rank - 1;

  int64_t first[AE_MAX_RANK + 1], last[AE_MAX_RANK + 1], rows = 1;
  for (int d = 0; d < rank; ++d) {
    const double n = double(c.size[d]);
    if (box[d].maybe_nan || !(box[d].lo >= -n && box[d].hi < n)) return any_element(kDtype, e);
    const bool wraps = box[d].lo < 0, both = wraps && box[d].hi >= 0;
    first[d] = both ? 0 : int64_t(box[d].lo) + (wraps ? c.size[d] : 0);
    last[d] = both ? c.size[d] - 1 : int64_t(box[d].hi) + (wraps ? c.size[d] : 0);
    if (c.stride[d] == 0) first[d] = last[d] = 0;
    if (d != axis) rows *= last[d] - first[d] + 1;
  }
  const int64_t length = rank == 0 ? 1 : last[axis] - first[axis] + 1;
  const int64_t edges = 2 * (kBlock + kFan);
  const int64_t visits =
      table == nullptr || length < edges ? length : edges + length / (kBlock * kFan);
  if (rows * visits > kMaxVisits) return any_element(kDtype, e);

  KeyRange<Key> r;
  if (rank == 0) {
    fold_elements<Key>(c.data, 0, 1, 1, e, r);
    return key_interval(r.lo, r.hi, kDtype, e);
  }
  int64_t at[AE_MAX_RANK + 1];
  for (int d = 0; d < rank; ++d) at[d] = first[d];
  for (int64_t i = 0; i < rows; ++i) {
    int64_t offset = 0, row = 0;
    for (int d = 0; d < rank; ++d) {
      if (d == axis) continue;
      offset += at[d] * c.stride[d];
      row = row * extent(c, d) + at[d];
    }
    fold_row<Key>(c.data, offset, c.stride[axis], table, row, first[axis], last[axis] + 1, e, r);
    if (kDtype == AE_BOOL && r.lo == 0 && r.hi == 1) break;
    for (int d = rank - 1; d >= 0; --d) {
      if (d == axis) continue;
      if (++at[d] <= last[d]) break;
      at[d] = first[d];
    }
  }
  return key_interval(r.lo, r.hi, kDtype, e);
}

// The ABI's name and the key type of an element type.
template <class T>
struct Element;
template <>
struct Element<float> {
  using Key = int32_t;
  static constexpr int dtype = AE_F32;
};
template <>
struct Element<double> {
  using Key = int64_t;
  static constexpr int dtype = AE_F64;
};
template <>
struct Element<bf16> {
  using Key = int16_t;
  static constexpr int dtype = AE_BF16;
};
template <>
struct Element<f16> {
  using Key = int16_t;
  static constexpr int dtype = AE_F16;
};
template <>
struct Element<int64_t> {
  using Key = int64_t;
  static constexpr int dtype = AE_I64;
};
template <>
struct Element<int32_t> {
  using Key = int32_t;
  static constexpr int dtype = AE_I32;
};
template <>
struct Element<int16_t> {
  using Key = int16_t;
  static constexpr int dtype = AE_I16;
};
template <>
struct Element<int8_t> {
  using Key = int8_t;
  static constexpr int dtype = AE_I8;
};
template <>
struct Element<uint8_t> {
  using Key = int8_t;
  static constexpr int dtype = AE_U8;
};
template <>
struct Element<bool> {
  using Key = int8_t;
  static constexpr int dtype = AE_BOOL;
};

template <class T, class... I>
AE_HD inline Interval gather(const IntervalEnv& env, int cap, I... idx) {
  const Interval box[] = {idx..., Interval{}};
  return gather_box<typename Element<T>::Key, Element<T>::dtype>(env, cap, box, sizeof...(idx));
}

}  // namespace iv
}  // namespace ae
