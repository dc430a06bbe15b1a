// Linear attention in chunks, for Ampere and later: the state pass (linear/states.cuh) and then the
// outputs of all chunks (linear/outputs.cuh). Where batch and heads are few, the launcher takes the
// state pass of smaller tiles, for more thread blocks: the same sums in the same order. The delta
// rule has a pass before (linear/solve.cuh) and a state pass of its own (linear/delta.cuh).
#pragma once
#include "linear/delta.cuh"
#include "linear/outputs.cuh"
#include "linear/solve.cuh"
#include "linear/states.cuh"
#include "linear/unit.cuh"

namespace ae {

template <class Plan, class Fn>
using LargeStates = LinearStates<Plan, Fn, 64, 64>;
template <class Plan, class Fn>
using SmallStates = LinearStates<Plan, Fn, 32, 32>;

}  // namespace ae

#define AE_LINEAR_ENTRY(name, Pass, bytes)                                         \
  static_assert(bytes == Pass::kBytes, "the plan's shared memory total is wrong"); \
  extern "C" __global__ void __launch_bounds__((Pass::kThreads))                   \
      name(const __grid_constant__ typename Pass::Params params) {                 \
    extern __shared__ __align__(128) char ae_shared[];                             \
    __shared__ typename Pass::Small small;                                         \
    Pass(params, ae_shared, small).run();                                          \
  }

#define AE_EXPORT_LINEAR_CHUNKS(Plan, Fn)                             \
  using AeLarge = ae::LargeStates<Plan, Fn>;                          \
  using AeSmall = ae::SmallStates<Plan, Fn>;                          \
  using AeOutputs = ae::LinearOutputs<Plan, Fn>;                      \
  AE_LINEAR_ENTRY(ae_linear_states, AeLarge, Plan::kStateBytes)       \
  AE_LINEAR_ENTRY(ae_linear_states_split, AeSmall, Plan::kSplitBytes) \
  AE_LINEAR_ENTRY(ae_linear_outputs, AeOutputs, Plan::kOutputBytes)

#define AE_EXPORT_LINEAR_DELTA(Plan, Fn)                         \
  using AeSolve = ae::LinearSolve<Plan, Fn>;                     \
  using AeStates = ae::LinearDeltaStates<Plan, Fn>;              \
  using AeOutputs = ae::LinearOutputs<Plan, Fn>;                 \
  AE_LINEAR_ENTRY(ae_linear_solve, AeSolve, Plan::kSplitBytes)   \
  AE_LINEAR_ENTRY(ae_linear_states, AeStates, Plan::kStateBytes) \
  AE_LINEAR_ENTRY(ae_linear_outputs, AeOutputs, Plan::kOutputBytes)
