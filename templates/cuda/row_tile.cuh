// The rows of scores of one thread block: which query, which head.
#pragma once
#include "common/abi_cuda.h"

namespace ae {

// Row i of a tile of head block `block` is query q(i) of query head h(i): the heads of a group are
// interleaved (`interleave` of them), so that they share the tiles of K and V.
struct RowTile {
  int b, block, count;
  int interleave, kv_head;

  // The tile of this thread block. Each call computes it anew, so that no loop between two calls
  // holds it in registers.
  template <int kBlockM, bool kPackGroup>
  __device__ static __forceinline__ RowTile of_block(const ae_params& p) {
    unsigned index = blockIdx.x;
    asm volatile("" : "+r"(index));
    RowTile t;
    const int group = int(p.Hq / p.Hkv);
    t.interleave = kPackGroup ? group : 1;
    const int64_t rows = p.L * t.interleave;
    const unsigned row_tiles = unsigned((rows + kBlockM - 1) / kBlockM);
    const unsigned blocks = unsigned(p.Hq) / unsigned(t.interleave);
    const unsigned head = index / row_tiles;
    // The last rows come first: under a causal mask they have the most work.
    const int64_t first = int64_t(row_tiles - 1 - index % row_tiles) * kBlockM;
    t.b = int(head / blocks);
    t.block = int(head % blocks);
    t.count = int(rows - first < kBlockM ? rows - first : kBlockM);
    t.kv_head = t.block * t.interleave / group;
    t.first_q_ = int(first / t.interleave);
    t.first_h_ = int(first % t.interleave);
    return t;
  }
  __device__ __forceinline__ int q(int i) const {
    return first_q_ + int(unsigned(first_h_ + i) / unsigned(interleave));
  }
  __device__ __forceinline__ int h(int i) const {
    return block * interleave + int(unsigned(first_h_ + i) % unsigned(interleave));
  }
  // The least and greatest query and head of its rows.
  __device__ __forceinline__ void bounds(int& q0, int& q1, int& h0, int& h1) const {
    q0 = q(0), q1 = q(count - 1);
    h0 = q0 == q1 ? h(0) : block * interleave;
    h1 = q0 == q1 ? h(count - 1) : h0 + interleave - 1;
  }

 private:
  int first_q_, first_h_;
};

}  // namespace ae
