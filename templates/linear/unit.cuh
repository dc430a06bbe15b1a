// What a generated unit of linear attention defines, and what the kernels here share: where
// sequences and chunks lie, log-decays, hooks.
//
//   struct Plan:
//     Elem                        bf16 or f16: q, k, v, out
//     Decay, Beta                 element types of decay and beta; float where there is none
//     kD, kDv                     head dims, 1 to 256
//     kDecay                      DecayKind
//     kDelta, kNormalizer
//     kValueBlock                 columns of a block of the output pass
//     kOutputBytes, kStateBytes, kSplitBytes, of dynamic shared memory of the three chunk kernels
//                                 (with the delta rule the last is the pass that solves)
//   struct Fn:
//     kCaptures
//     kHasQMod, kHasKMod, kHasVMod, kHasDecayMod, kHasOutMod
//     float q_mod(env, at, float), k_mod, v_mod, decay_mod, out_mod    of one element; with
//     kHas*Mod
//
// and ends with AE_EXPORT_LINEAR_CHUNKS(Plan, Fn), with the delta rule AE_EXPORT_LINEAR_DELTA(Plan,
// Fn), and AE_EXPORT_LINEAR_STEP(Plan, Fn).
#pragma once
#include "common/env.h"
#include "common/linear.h"
#include "cuda/capture.cuh"
#include "cuda/math.cuh"
#include "cuda/packed.cuh"
#include "linear/params.h"

namespace ae {

template <class Fn>
constexpr int kLinearCaptures = Fn::kCaptures > 0 ? Fn::kCaptures : 1;

template <class Plan>
constexpr bool kHasDecay = Plan::kDecay != DecayKind::kNone;

// Entry states between the passes: rounded once to the operands of the products. fp16 cannot hold
// sums over long sequences, so there they stay fp32 and are scaled where they are used.
template <class Plan>
using StoredState = std::conditional_t<__is_same(typename Plan::Elem, bf16), uint16_t, float>;

// Columns of a state's row.
template <class Plan>
constexpr int kStateWidth = Plan::kDv + (Plan::kNormalizer ? 1 : 0);

// What the sum of weights that divides an output is kept away from 0 by.
constexpr float kLeastSum = 1e-6f;
__device__ __forceinline__ float away_from_zero(float sum) {
  return fabsf(sum) < kLeastSum ? (sum < 0 ? -kLeastSum : kLeastSum) : sum;
}

constexpr int round_up_16(int x) { return (x + 15) / 16 * 16; }

// Tokens of one sequence in its batch row. Lengths on the device may be anything: they are clamped.
struct LinearSequence {
  int64_t b, first, last;

  __device__ __forceinline__ LinearSequence(const ae_linear_params& p, int64_t i)
      : b(i), first(0), last(p.L) {
    if (p.first == nullptr) return;
    b = 0;
    first = clamped(p, i);
    last = clamped(p, i + 1);
  }
  __device__ static __forceinline__ int64_t clamped(const ae_linear_params& p, int64_t i) {
    const int64_t at = p.first[i];
    return at < 0 ? 0 : at < p.L ? at : p.L;
  }
  __device__ __forceinline__ int chunks() const {
    return last > first ? int((last - first + kLinearChunk - 1) / kLinearChunk) : 0;
  }
  // Tokens of chunk c: not more than 0 where there is no such chunk.
  __device__ __forceinline__ int count(int c) const {
    const int64_t left = last - first - int64_t(c) * kLinearChunk;
    return int(left < kLinearChunk ? left : kLinearChunk);
  }
};

// The slot of chunk 0 of sequence i.
__device__ __forceinline__ int64_t first_slot(const ae_linear_params& p, const LinearWork& work,
                                              int64_t i) {
  if (p.first == nullptr) return i * work.chunks;
  return LinearSequence::clamped(p, i) / kLinearChunk + i;
}

// The sequence whose chunks may have this slot: the last one that starts there or before.
__device__ __forceinline__ int64_t sequence_of(const ae_linear_params& p, const LinearWork& work,
                                               int64_t slot) {
  if (p.first == nullptr) return slot / work.chunks;
  int64_t low = 0, high = p.sequences;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (first_slot(p, work, middle) <= slot) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Index i of a dimension that a hook broadcasts where its size is 1: one kernel serves both.
__device__ __forceinline__ int32_t spread(const Env& env, int cap, int dim, int32_t i) {
  return env.cap[cap].size[dim] == 1 ? 0 : i;
}

// exp2 of what is below is less than the least normal fp32 and becomes 0: such a token forgets all.
constexpr float kForgets = -126.0f;

// The log-decay of a token in powers of 2, after decay_mod. A positive one, or NaN, is reported.
template <class Plan, class Fn>
__device__ __forceinline__ float log2_decay(const Env& env, const ae_linear_params& p, int64_t b,
                                            int64_t h, int64_t t, int64_t d) {
  const int64_t* s = p.decay_stride;
  int64_t at = b * s[0] + h * s[1] + t * s[2];
  if constexpr (Plan::kDecay == DecayKind::kChannel) at += d * s[3];
  float g = float(load_element<typename Plan::Decay>(p.decay, at));
  if constexpr (Fn::kHasDecayMod) g = Fn::decay_mod(env, HookAt{b, h, t, d, 1}, g);
  if (!(g <= 0)) *env.fault = AE_POSITIVE_DECAY;
  return g * kLog2E;
}

}  // namespace ae
