// Linear attention in chunks, for Ampere and later: the state pass (linear/states.cuh) and then the
// outputs of all chunks (linear/outputs.cuh). Where batch and heads are few, the launcher takes the
// state pass of smaller tiles, for more thread blocks: the same sums in the same order.
#pragma once
#include "linear/outputs.cuh"
#include "linear/states.cuh"
#include "linear/unit.cuh"

#define AE_LINEAR_STATES(Plan, Fn, name, width, bytes)                                 \
  static_assert(Plan::bytes == ae::LinearStates<Plan, Fn, width, width>::kBytes,       \
                "the plan's shared memory total is wrong");                            \
  extern "C" __global__ void __launch_bounds__(                                        \
      (ae::LinearStates<Plan, Fn, width, width>::kThreads))                            \
      name(const __grid_constant__ ae::LinearParams<ae::kLinearCaptures<Fn>> params) { \
    extern __shared__ __align__(128) char ae_shared[];                                 \
    __shared__ ae::LinearStates<Plan, Fn, width, width>::Small small;                  \
    ae::LinearStates<Plan, Fn, width, width>(params, ae_shared, small).run();          \
  }

#define AE_EXPORT_LINEAR_CHUNKS(Plan, Fn)                                               \
  AE_LINEAR_STATES(Plan, Fn, ae_linear_states, 64, kStateBytes)                         \
  AE_LINEAR_STATES(Plan, Fn, ae_linear_states_split, 32, kSplitBytes)                   \
  extern "C" __global__ void __launch_bounds__((ae::LinearOutputs<Plan, Fn>::kThreads)) \
      ae_linear_outputs(                                                                \
          const __grid_constant__ ae::LinearParams<ae::kLinearCaptures<Fn>> params) {   \
    extern __shared__ __align__(128) char ae_shared[];                                  \
    __shared__ ae::LinearOutputs<Plan, Fn>::Small small;                                \
    ae::LinearOutputs<Plan, Fn>(params, ae_shared, small).run();                        \
  }
