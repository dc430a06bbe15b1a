// The parameter of every CUDA kernel of linear attention: what csrc/cuda_linear.cpp writes and the
// kernels read, by value.
#pragma once
#include "common/linear_abi.h"

namespace ae {

constexpr int kLinearChunk = 64;  // tokens of a chunk

// Chunks have slots, in which the state that each of them starts from lies between the two passes.
// Of packed sequences the first token decides: sequence i has those from first[i] / 64 + i on,
// which are enough for any lengths, and no prefix sum over the sequences is needed.
struct LinearWork {
  void* states;  // [slots][H][round_up(D, 16)][round_up(Dv, 16)]
  float* keys;   // under a normalizer z as well: [slots][H][round_up(D, 16)]
  // Of the delta rule, in 16 bits: what solves a chunk's system, [slots][H][2][64][64] (twice: what
  // the first lacks), and the values that are added, [slots][H][64][round_up(Dv, 16)].
  void *inverse, *values;
  int64_t slots;   // B chunks, or L / 64 + sequences of packed ones
  int64_t chunks;  // of a batch row; of packed sequences 0
};

// N = max(1, captured tensors). `p.captures` is null on the device.
template <int N>
struct LinearParams {
  ae_linear_params p;
  ae_capture cap[N];
  LinearWork work;
};

}  // namespace ae
