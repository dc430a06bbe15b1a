// Where the rows and keys of one sequence lie, and which query index its rows have.
#pragma once
#include "common/abi.h"
#include "common/host_device.h"

namespace ae {

// Statistics as one contiguous [statistics][B][Hq][L].
AE_HD inline void set_dense_stats(ae_params& p) {
  p.stats_stride[2] = p.L;
  p.stats_stride[1] = p.Hq * p.stats_stride[2];
  p.stats_stride[0] = p.B * p.stats_stride[1];
}

// Sequence b of a launch. Rows i < rows and keys j < keys count from the sequence's own start.
struct Sequence {
  int64_t rows, keys;
  int64_t first_row;    // of q's, out's and the statistics' dimension L
  int64_t first_key;    // position of key 0
  int64_t first_query;  // index that the user's functions see for row 0; key j has index j
  int64_t kv_row;       // batch row of k and v, where they are not in pages
  const int32_t* pages;

  AE_HD Sequence(const ae_params& p, int64_t b) {
    const ae_sequences& s = p.sequences;
    first_row = s.q_start != nullptr ? s.q_start[b] : 0;
    rows = s.q_start != nullptr ? s.q_end[b] - first_row : p.L;
    first_key = s.key_start != nullptr ? s.key_start[b] : 0;
    keys = (s.key_end != nullptr ? int64_t(s.key_end[b]) + s.key_more : p.S) - first_key;
    // Lengths that the caller could not check (they lie in device memory) stay within the bounds of
    // the launch.
    rows = rows < 0 ? 0 : rows > p.L ? p.L : rows;
    keys = keys < 0 ? 0 : keys > p.S ? p.S : keys;
    first_query = p.q_first + (s.align_end != 0 ? keys - rows : 0);
    kv_row = s.kv_row != nullptr ? s.kv_row[b] : b;
    pages = s.pages != nullptr ? s.pages + b * s.page_pitch : nullptr;
  }
};

// Offset in elements of key j of a sequence: `stride` is that of k or v.
AE_HD inline int64_t key_offset(const ae_sequences& s, const Sequence& sequence,
                                const int64_t* stride, int64_t j) {
  const int64_t at = sequence.first_key + j;
  if (sequence.pages == nullptr) return sequence.kv_row * stride[0] + at * stride[2];
  const auto page = uint32_t(at) / uint32_t(s.page_size);
  return sequence.pages[page] * stride[0] + (at - int64_t(page) * s.page_size) * stride[2];
}

}  // namespace ae
