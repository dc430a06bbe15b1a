// Builds the block tables of interval_gather.h: which captures get one, where it lies in the
// caller's memory, and its contents, cut into chunks that threads fill independently.
#pragma once
#include "common/interval_gather.h"

namespace ae {
namespace iv {

constexpr int64_t kMinTableAxis = 128;     // shorter axes are read element by element
constexpr int64_t kChunkElements = 65536;  // read by one chunk, about
constexpr int64_t kTableAlignment = 64;    // bytes

// The table of one capture, without its memory; rows = 0: none. The axis is the last one long
// enough. A capture with more elements than the launch has (query, key) pairs is cheaper to read
// where it is needed: a decode step must not scan a whole dense mask.
AE_HD inline BlockTable table_shape(const ae_params& p, int cap) {
  const ae_capture& c = p.captures[cap];
  BlockTable t = {nullptr, 0, 0, 0, 0, -1};
  int64_t elements = 1;
  for (int d = 0; d < c.rank; ++d) {
    const int64_t n = extent(c, d);
    if (n >= kMinTableAxis) t.axis = d, t.size = n;
    elements *= n;
  }
  const int64_t pairs = p.B * p.Hq * p.L * p.S;
  if (t.axis < 0 || elements == 0 || elements > (pairs > kMaxVisits ? pairs : kMaxVisits)) return t;
  t.rows = elements / t.size;
  t.blocks = (t.size + kBlock - 1) / kBlock;
  t.coarse = (t.blocks + kFan - 1) / kFan;
  return t;
}

AE_HD inline int64_t aligned(int64_t bytes) {
  return (bytes + kTableAlignment - 1) / kTableAlignment * kTableAlignment;
}
AE_HD inline int64_t key_bytes(const BlockTable& t, const ae_capture& c) {
  return aligned(t.rows * 2 * (t.blocks + t.coarse) * encoding(c.dtype).bytes);
}

// A unit of work is one coarse block of one row; a chunk is a fixed number of consecutive units.
AE_HD inline int64_t units_per_chunk(const BlockTable& t) {
  const int64_t unit = t.size < kBlock * kFan ? t.size : kBlock * kFan;
  return kChunkElements / unit;
}
AE_HD inline int64_t chunk_count(const BlockTable& t) {
  const int64_t per_chunk = units_per_chunk(t);
  return (t.rows * t.coarse + per_chunk - 1) / per_chunk;
}

template <class Key>
AE_HD inline void build_unit(const BlockTable& t, const ae_capture& c, const Encoding& e,
                             int64_t row, int64_t coarse) {
  int64_t offset = 0;
  for (int64_t d = c.rank - 1, rest = row; d >= 0; --d) {
    if (d == t.axis) continue;
    offset += rest % extent(c, int(d)) * c.stride[d];
    rest /= extent(c, int(d));
  }
  const int64_t level = t.blocks + t.coarse, stride = c.stride[t.axis];
  Key* lo = static_cast<Key*>(t.keys) + row * 2 * level;
  Key* hi = lo + level;
  const int64_t block = coarse * kFan;
  const int64_t block_end = block + kFan < t.blocks ? block + kFan : t.blocks;
  KeyRange<Key> all;
  for (int64_t i = block; i < block_end; ++i) {
    const int64_t first = i * kBlock, end = first + kBlock < t.size ? first + kBlock : t.size;
    KeyRange<Key> r;
    if (stride == 1 && end - first == kBlock) {  // twice as fast with the length known
      fold_elements<Key>(c.data, offset + first, kBlock, 1, e, r);
    } else {
      fold_elements<Key>(c.data, offset + first * stride, end - first, stride, e, r);
    }
    lo[i] = r.lo;
    hi[i] = r.hi;
    all = {r.lo < all.lo ? r.lo : all.lo, r.hi > all.hi ? r.hi : all.hi};
  }
  lo[t.blocks + coarse] = all.lo;
  hi[t.blocks + coarse] = all.hi;
}

template <class Key>
AE_HD inline void build_chunk(const BlockTable& t, const ae_capture& c, int64_t chunk) {
  const Encoding e = encoding(c.dtype);
  const int64_t units = t.rows * t.coarse, per_chunk = units_per_chunk(t);
  const int64_t begin = chunk * per_chunk,
                end = begin + per_chunk < units ? begin + per_chunk : units;
  for (int64_t i = begin; i < end; ++i) build_unit<Key>(t, c, e, i / t.coarse, i % t.coarse);
}

// Task `index` over all chunks of all tables, in capture order.
AE_HD inline void build_task(void* arg, int64_t index, int32_t) {
  const IntervalEnv& env = *static_cast<const IntervalEnv*>(arg);
  for (int i = 0; i < env.capture_count; ++i) {
    const BlockTable& t = env.tables[i];
    if (t.keys == nullptr) continue;
    const int64_t chunks = chunk_count(t);
    if (index >= chunks) {
      index -= chunks;
      continue;
    }
    switch (encoding(env.cap[i].dtype).bytes) {
      case 1:
        return build_chunk<int8_t>(t, env.cap[i], index);
      case 2:
        return build_chunk<int16_t>(t, env.cap[i], index);
      case 4:
        return build_chunk<int32_t>(t, env.cap[i], index);
      default:
        return build_chunk<int64_t>(t, env.cap[i], index);
    }
  }
}

}  // namespace iv

AE_HD inline bool reads_capture(uint64_t mask_captures, int cap) {
  return cap < 64 && (mask_captures >> cap & 1) != 0;
}

// Bytes that build_tables needs, a multiple of 64; depends on sizes and strides only.
// `mask_captures` has bit i set when the mask reads capture i.
AE_HD inline int64_t table_bytes(const ae_params& p, uint64_t mask_captures) {
  if (mask_captures == 0) return 0;
  int64_t bytes = iv::aligned(p.capture_count * int64_t(sizeof(BlockTable)));
  for (int i = 0; i < p.capture_count; ++i) {
    if (reads_capture(mask_captures, i))
      bytes += iv::key_bytes(iv::table_shape(p, i), p.captures[i]);
  }
  return bytes;
}

// Lays the tables out in `memory` (64-byte aligned, table_bytes long), fills them, and returns the
// environment that reads them; `memory` must outlive it.
inline IntervalEnv build_tables(const ae_params& p, uint64_t mask_captures, void* memory,
                                ae_parallel_for parallel_for) {
  IntervalEnv env = interval_env(p);
  if (mask_captures == 0) return env;
  BlockTable* tables = static_cast<BlockTable*>(memory);
  char* keys =
      static_cast<char*>(memory) + iv::aligned(p.capture_count * int64_t(sizeof(BlockTable)));
  int64_t chunks = 0;
  for (int i = 0; i < p.capture_count; ++i) {
    tables[i] = iv::table_shape(p, i);
    if (!reads_capture(mask_captures, i) || tables[i].rows == 0) continue;
    tables[i].keys = keys;
    keys += iv::key_bytes(tables[i], p.captures[i]);
    chunks += iv::chunk_count(tables[i]);
  }
  env.tables = tables;
  if (chunks > 0) parallel_for(chunks, p.threads, iv::build_task, &env);
  return env;
}

}  // namespace ae
