// The rows of scores of one thread block: which query, which head.
#pragma once
#include "common/abi_cuda.h"
#include "common/sequences.h"

namespace ae {

// Row i of a tile of head block `block` is query row q(i) of query head h(i): the heads of a group
// are interleaved (`interleave` of them), so that they share the tiles of K and V. The user's
// functions see batch number `batch` and index query(i).
struct RowTile {
  int b, batch, block, count;  // of a sequence that is shorter than the bound, count may be <= 0
  int interleave, kv_head;
  int64_t first_row;  // of q's, out's and the statistics' dimension L: row q(i) is that far on

  // The tile of output `index`. Each call computes it anew, so that no loop between two calls holds
  // it in registers.
  template <class Plan>
  __device__ static __forceinline__ RowTile of_output(const ae_params& p, unsigned index) {
    constexpr int kBlockM = Plan::kBlockM;
    asm volatile("" : "+r"(index));
    RowTile t;
    const int group = int(p.Hq / p.Hkv);
    t.interleave = Plan::kPackGroup ? group : 1;
    int64_t rows = p.L * t.interleave;
    const unsigned row_tiles = unsigned((rows + kBlockM - 1) / kBlockM);
    const unsigned blocks = unsigned(p.Hq) / unsigned(t.interleave);
    const unsigned head = index / row_tiles;
    // The last rows come first: under a causal mask they have the most work.
    const int64_t first = int64_t(row_tiles - 1 - index % row_tiles) * kBlockM;
    t.b = t.batch = int(head / blocks);
    t.block = int(head % blocks);
    t.first_row = t.first_query_ = 0;
    if constexpr (Plan::kSequences) {
      const Sequence sequence(p, t.b);
      rows = sequence.rows * t.interleave;
      t.batch += int(p.b_first);
      t.first_row = sequence.first_row;
      t.first_query_ = int(sequence.first_query);
    }
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
  __device__ __forceinline__ int query(int i) const { return first_query_ + q(i); }
  // The least and greatest query index and head of its rows.
  __device__ __forceinline__ void bounds(int& q0, int& q1, int& h0, int& h1) const {
    q0 = query(0), q1 = query(count - 1);
    h0 = q0 == q1 ? h(0) : block * interleave;
    h1 = q0 == q1 ? h(count - 1) : h0 + interleave - 1;
  }

 private:
  int first_q_, first_h_, first_query_;
};

}  // namespace ae
