// What a linear-attention module is given: the parameters of its `ae_launch` and
// `ae_workspace_bytes`, in the place of `ae_params`. Plain data, as in common/abi.h.
//
//   S_t = exp(g_t) S_{t-1}, then S_t += k_t (beta_t (v_t - k_t^T S_t))^T, or += k_t v_t^T
//   o_t = scale q_t^T S_t, divided by scale q_t^T z_t under a normalizer
#pragma once
#include "common/abi.h"

#ifdef __cplusplus
extern "C" {
#endif

// What ae_module_info says of a linear-attention module beside what its names say: `user_stats` is
// AE_LINEAR_OPERANDS, the operands that it reads. `grad_mask` of a backward module counts the
// gradients that it gives of what q_mod, k_mod, v_mod, decay_mod and out_mod captured, 8 bits each,
// q_mod lowest; ae_linear_params.hook_grads has them in this order.
//   decay: 0 none, 1 [B, H, L], 2 [B, H, L, D]; types: ae_dtype, 0 of what is absent
#define AE_LINEAR_DECLARED (1 << 30)
#define AE_LINEAR_OPERANDS(decay, decay_type, beta, beta_type, normalizer)                       \
  (AE_LINEAR_DECLARED | (decay) | (decay_type) << 4 | ((beta) ? 1 << 8 : 0) | (beta_type) << 9 | \
   ((normalizer) ? 1 << 13 : 0))

// Values of *ae_linear_params.fault beside 1 + capture index.
enum ae_linear_fault { AE_POSITIVE_DECAY = -1 };

// Operand layout is [B, heads, L, width] by strides (elements); a stride of 0 repeats. Query and
// key head of value head h: h / (H / Hk). States are [sequences, H, D, Dv], or [.., Dv + 1] under a
// normalizer, whose last column is z; they have the accumulator type.
typedef struct ae_linear_params {
  uint32_t abi_version;
  uint32_t bytes;  // sizeof(ae_linear_params)
  int64_t B, Hk, H, L;
  // Packed: sequence i is tokens first[i] <= t < first[i + 1] of batch row 0, and B is 1. Null: one
  // sequence for each batch row, all L tokens.
  int64_t sequences;
  const int64_t* first;
  const void *q, *k, *v;
  int64_t q_stride[4], k_stride[4], v_stride[4];
  const void* decay;  // log-decay [B, H, L] or [B, H, L, D]; absent where the plan has none
  int64_t decay_stride[4];
  const void* beta;  // [B, H, L]
  int64_t beta_stride[3];
  double scale;
  const void* state;  // initial; null: zeros
  int64_t state_stride[4];
  void* out;  // written by forward
  int64_t out_stride[4];
  void* final_state;  // contiguous; null: not wanted; never `state`
  // backward only: gradients of `out` and of the final state (null: zero), and where results go.
  // Null results are not wanted. All are contiguous, in the operand's type and in the shape of the
  // sizes above (ddecay: [B, H, L] or [B, H, L, D] and dbeta in the accumulator type).
  const void* dout;
  int64_t dout_stride[4];
  const void* dfinal;  // contiguous
  void *dq, *dk, *dv, *ddecay, *dbeta, *dstate;
  // Gradients of captured tensors before their broadcast is undone: Fn::kHookGrads contiguous
  // arrays of the accumulator type, each of the shape of its hook's operand.
  void* const* hook_grads;
  const ae_capture* captures;
  int32_t capture_count;
  int32_t threads;  // workers that parallel_for may use, >= 1
  int32_t* fault;   // 1 + capture index: gathered out of bounds; AE_POSITIVE_DECAY
} ae_linear_params;

#ifdef __cplusplus
}
#endif
