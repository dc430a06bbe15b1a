// Partial results of outputs whose keys are shared among thread blocks, and the kernel that merges
// them in the order of the keys: no sum depends on which block ran first.
#pragma once
#include "cuda/packed.cuh"
#include "cuda/work.cuh"

namespace ae {

// A slot: for each row of a tile the sums so far, not normalised; its states; whether it has met a
// live key. The launcher gives each slot kFloats.
template <class Plan, class Fn>
struct PartialSlot {
  static constexpr int kPitch = (Plan::kDv + 7) / 8 * 8;
  static constexpr int kStates = Plan::kBlockM * kPitch;
  static constexpr int kAlive = kStates + Plan::kBlockM * Fn::kStates;
  static constexpr int kFloats = kAlive + Plan::kBlockM;
  static_assert(Plan::kSlotBytes == 4 * kFloats, "the plan's size of a slot is wrong");

  float* data;

  __device__ __forceinline__ PartialSlot(const WorkParams& work, int64_t slot)
      : data(work.slots + slot * kFloats) {}
  __device__ __forceinline__ float* out(int row) const { return data + row * kPitch; }
  __device__ __forceinline__ float* states(int row) const {
    return data + kStates + row * Fn::kStates;
  }
  __device__ __forceinline__ float& alive(int row) const { return data[kAlive + row]; }
};

// A warp per row.
template <class Plan, class Fn>
struct Combine {
  static constexpr int kThreads = 128;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kBlocksOfOutput = Plan::kBlockM / kWarps;
  using Slot = PartialSlot<Plan, Fn>;
  using Elem = typename Plan::Elem;
  static constexpr int kStates = Fn::kStates > 0 ? Fn::kStates : 1;
  static constexpr int kVectors = (Slot::kPitch + 127) / 128;  // of 4 columns, of a lane

  template <class Params>
  __device__ static void run(const Params& params) {
    const ae_params& p = params.p;
    const int64_t output = blockIdx.x / kBlocksOfOutput;
    const int lane = int(threadIdx.x) % 32;
    const int row = int(blockIdx.x % kBlocksOfOutput) * kWarps + int(threadIdx.x) / 32;
    const Parts parts = parts_of(params.work, output);
    if (parts.whole) return;
    const RowTile tile = RowTile::of_output<Plan>(p, unsigned(output));
    if (row >= tile.count) return;
    const Env env{params.cap, p.fault, p.S};
    const int h = tile.h(row);
    const typename Fn::Row fixed = Fn::make_row(env, tile.batch, h, tile.query(row));

    // Inf and NaN of V are added at the end: a later factor of 0 must not make NaN of an Inf.
    float sums[kVectors][4] = {}, infinite[kVectors][4] = {};
    float state[kStates];
    Fn::init(env, fixed, state);
    bool alive = false;
    for (int64_t i = 0; i < parts.count; ++i) {
      const Slot slot(params.work, parts.slot(i));
      if (slot.alive(row) == 0) continue;
      float fa = 0, fb = 1, taken[kStates];
#pragma unroll
      for (int n = 0; n < Fn::kStates; ++n) taken[n] = slot.states(row)[n];
      if (alive) {
        float merged[kStates];
        Fn::merge(env, fixed, state, taken, merged, fa, fb);
#pragma unroll
        for (int n = 0; n < Fn::kStates; ++n) state[n] = merged[n];
      } else {
#pragma unroll
        for (int n = 0; n < Fn::kStates; ++n) state[n] = taken[n];
      }
      alive = true;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int column = 128 * v + 4 * lane;
        if (column >= Slot::kPitch) break;
        const float4 x = *reinterpret_cast<const float4*>(slot.out(row) + column);
        const float values[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const bool finite = fabsf(values[c]) <= 3.402823466e38f;
          if (!finite) infinite[v][c] += values[c];
          sums[v][c] = sums[v][c] * fa + (finite ? values[c] : 0.0f) * fb;
        }
      }
    }

    float stats[Fn::kStats > 0 ? Fn::kStats : 1];
    float factor = 1;
    Fn::finalize(env, fixed, state, factor, stats);
    const int64_t* s = p.out_stride;
    const int64_t q = tile.first_row + tile.q(row);
    uint16_t* out = static_cast<uint16_t*>(p.out) + tile.b * s[0] + h * s[1] + q * s[2];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int column = 128 * v + 4 * lane + c;
        if (column >= Plan::kDv) break;
        float x = alive ? sums[v][c] * factor : 0.0f;
        if (infinite[v][c] != 0) x += infinite[v][c] * factor;
        out[column * s[3]] = narrow<Elem>(x);
      }
    }
    if (p.stats != nullptr && lane == 0) {
      const int64_t* step = p.stats_stride;
      float* to = static_cast<float*>(p.stats) + tile.b * step[1] + h * step[2] + q;
#pragma unroll
      for (int n = 0; n < Fn::kStats; ++n) to[n * step[0]] = stats[n];
    }
  }
};

}  // namespace ae

// Merges the partial results of all outputs, and finishes those that have no tile.
#define AE_EXPORT_COMBINE(Plan, Fn)                                              \
  extern "C" __global__ void __launch_bounds__(ae::Combine<Plan, Fn>::kThreads)  \
      ae_combine(const __grid_constant__ ae::Forward<Plan, Fn>::Params params) { \
    ae::Combine<Plan, Fn>::run(params);                                          \
  }
