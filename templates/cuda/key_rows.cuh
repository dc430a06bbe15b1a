// Where the keys of a tile lie in global memory, for kernels of sequences: in a batch row or in
// pages (common/sequences.h). Every lane finds some keys of the tile once, and copies read the rest
// from shared memory: a division and a read of the page table for each 16 bytes would cost more
// than the copies themselves.
#pragma once
#include "common/sequences.h"
#include "sm80/tile.cuh"

namespace ae {

template <int kWarps, int kBlockN>
struct KeyRowsTable {
  const int32_t* pages;      // of the sequence; null: no pages
  int keys;                  // of the sequence
  int first, kv_row;         // position of key 0, and where there are no pages its batch row
  int2 at[kWarps][kBlockN];  // batch row, row. Warps keep their own: no barrier of the block

  // Of sequence b: all threads of the block call it, and synchronise before they locate.
  __device__ __forceinline__ void start(const ae_params& p, int b) {
    if (threadIdx.x != 0) return;
    const Sequence sequence(p, b);
    keys = int(sequence.keys);
    pages = sequence.pages;
    first = int(sequence.first_key);
    kv_row = int(sequence.kv_row);
  }

  // All lanes of a warp call it together. `key`: first of the tile.
  __device__ __forceinline__ void locate(const ae_sequences& s, int key) {
    const int lane = int(threadIdx.x) % 32;
    int2* own = at[threadIdx.x / 32];
    __syncwarp();  // nobody reads the tile before
#pragma unroll
    for (int i = lane; i < kBlockN; i += 32) {
      // A key that does not exist gets the place of the last one.
      const int position = first + (key + i < keys ? key + i : keys - 1);
      if (pages != nullptr) {
        const unsigned page = unsigned(position) / unsigned(s.page_size);
        own[i] = make_int2(__ldg(pages + page), position - int(page) * s.page_size);
      } else {
        own[i] = make_int2(kv_row, position);
      }
    }
    __syncwarp();
  }

  // `head`: the head's part of batch row 0.
  __device__ __forceinline__ const uint16_t* row(const GlobalRows& head, int64_t batch_stride,
                                                 int i) const {
    const int2 place = at[threadIdx.x / 32][i];
    return head.data + place.x * batch_stride + place.y * head.row_stride;
  }
};

template <class Plan>
struct NoKeyRows {};

template <class Plan>
using KeyRows = std::conditional_t<Plan::kSequences, KeyRowsTable<Plan::kWarps, Plan::kBlockN>,
                                   NoKeyRows<Plan>>;

}  // namespace ae
