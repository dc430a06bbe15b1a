// Fills the block tables of the captured tensors that a mask reads (common/interval_gather.h): the
// least and largest element of every 64 and of every 4096 along one axis. The launcher has laid the
// tables out; thread blocks of 128 threads share the coarse blocks among them.
#pragma once
#include "common/abi_cuda.h"
#include "common/block_tables.h"

namespace ae {

constexpr int kTableThreads = 128;

template <class Key>
__device__ inline void build_coarse_block(const BlockTable& t, const ae_capture& c, int64_t unit) {
  __shared__ Key low[iv::kFan], high[iv::kFan];
  const iv::Encoding e = iv::encoding(c.dtype);
  const int64_t row = unit / t.coarse, coarse = unit % t.coarse;
  int64_t offset = 0;
  for (int64_t d = c.rank - 1, rest = row; d >= 0; --d) {
    if (d == t.axis) continue;
    offset += rest % iv::extent(c, int(d)) * c.stride[d];
    rest /= iv::extent(c, int(d));
  }
  const int64_t level = t.blocks + t.coarse, stride = c.stride[t.axis];
  Key* lo = static_cast<Key*>(t.keys) + row * 2 * level;
  Key* hi = lo + level;
  const int64_t begin = coarse * iv::kFan;
  const int count = int(t.blocks - begin < iv::kFan ? t.blocks - begin : iv::kFan);
  __syncthreads();  // the unit before has been read
  for (int i = threadIdx.x; i < count; i += kTableThreads) {
    const int64_t first = (begin + i) * iv::kBlock;
    const int64_t end = first + iv::kBlock < t.size ? first + iv::kBlock : t.size;
    iv::KeyRange<Key> r;
    iv::fold_elements<Key>(c.data, offset + first * stride, end - first, stride, e, r);
    lo[begin + i] = low[i] = r.lo;
    hi[begin + i] = high[i] = r.hi;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    iv::KeyRange<Key> all;
    for (int i = 0; i < count; ++i) {
      all = {low[i] < all.lo ? low[i] : all.lo, high[i] > all.hi ? high[i] : all.hi};
    }
    lo[t.blocks + coarse] = all.lo;
    hi[t.blocks + coarse] = all.hi;
  }
}

template <int N>
__device__ inline void build_tables_device(const KernelParams<N>& params) {
  for (int i = 0; i < N; ++i) {
    const BlockTable& t = params.tables[i];
    if (t.keys == nullptr) continue;
    for (int64_t unit = blockIdx.x; unit < t.rows * t.coarse; unit += gridDim.x) {
      switch (iv::encoding(params.cap[i].dtype).bytes) {
        case 1:
          build_coarse_block<int8_t>(t, params.cap[i], unit);
          break;
        case 2:
          build_coarse_block<int16_t>(t, params.cap[i], unit);
          break;
        case 4:
          build_coarse_block<int32_t>(t, params.cap[i], unit);
          break;
        default:
          build_coarse_block<int64_t>(t, params.cap[i], unit);
      }
    }
  }
}

}  // namespace ae
