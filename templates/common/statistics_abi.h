// What a token-statistics module is given: the parameters of its `ae_launch` and
// `ae_workspace_bytes`, in the place of `ae_params`. Plain data, as in common/abi.h.
//
// Tokens n of a sequence, heads h, channels k; u = w^2. What is computed: statistics_reference.py.
//   not causal   c_k = sum_n u        r_n = sum_k u / c_k                   D = sum_n pi + eps
//   causal       c_nk = sum_{m<=n} u  r_n = sum_k (u / c_nk + bias_{h,n})   D_n = sum_{m<=n} pi +
//   eps pi = softmax over h of temp_h r   A = sums of u pi as D's   y = -w pi D / (D + A)
#pragma once
#include "common/abi.h"

#ifdef __cplusplus
extern "C" {
#endif

// Tokens of a block, within which sums are local; a sum over tokens adds those of blocks in order.
#define AE_STATISTICS_BLOCK 64
// Of one head, in elements of the accumulator type: c, padded to a multiple of AE_STATISTICS_PAD
// channels, A, padded too, and D without eps, with padding.
#define AE_STATISTICS_PAD 16

// A `row` below is such a head's statistics for every head; sequence i, whose first token is the
// f-th of all, has block j's in row f / AE_STATISTICS_BLOCK + i + j, whatever the lengths before.
// There are T / AE_STATISTICS_BLOCK + sequences rows for T tokens.
typedef struct ae_statistics_params {
  uint32_t abi_version;
  uint32_t bytes;   // sizeof(ae_statistics_params)
  int64_t B, H, N;  // w is [B, H, N, D] by strides (elements); channels have stride 1
  int64_t sequences;
  // Packed: sequence i is tokens first[i] <= n < first[i + 1] of batch row 0, and B is 1. Null: one
  // sequence for each batch row, all N tokens.
  const int64_t* first;
  const void* w;
  int64_t w_stride[4];
  const void* temp;  // [H], accumulator type, contiguous
  const void* bias;  // [H, tokens] in the accumulator type; null: 0
  int64_t bias_stride[2];
  const int64_t* position;  // of each sequence: where its token 0 is in bias; null: 0
  int32_t causal;
  int32_t threads;  // workers that parallel_for may use, >= 1
  // The sums of earlier tokens of each sequence: c and A [sequences, H, D], D [sequences, H];
  // contiguous, in the accumulator type. Null: none; causal only.
  const void* state_in[3];
  void* state_out[3];  // the same after the last token; may be state_in
  void* y;             // written by forward
  int64_t y_stride[4];
  // What backward needs; null in a forward that saves nothing.
  void* logits;      // r: [rows][H][AE_STATISTICS_BLOCK], the tokens of each block
  void* statistics;  // causal: [rows], before each block; else [sequences], of each sequence
  // backward only: gradients of y, and of w, temp [H] and bias (null: not wanted; as bias, but
  // contiguous [H, bias_tokens]).
  const void* dy;
  int64_t dy_stride[4];
  void* dw;
  int64_t dw_stride[4];
  void *dtemp, *dbias;
  int64_t bias_tokens;
} ae_statistics_params;

#ifdef __cplusplus
}
#endif
