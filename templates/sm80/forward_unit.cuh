// What a generated unit of sm80/forward.cuh defines, and how it exports its kernels. It defines
//
//   struct Plan
//     Elem                      bf16 or f16 operands; sums are fp32
//     kD, kDv                   head dimensions of Q and K, and of V: any that fit
//     kBlockM, kBlockN          rows and keys of a score tile
//     kWarps, kStages           warps split the rows; tiles of K and V in the ring
//     kColumnWarps              so many warps share rows: each takes some columns of Q K^T's sums,
//                               which they exchange, and of the output; 1: none do
//     kSharedKV                 V is the first kDv columns of K (MLA's latent): read once
//     kPackGroup                the query heads of a kv head share row tiles
//     kHoldQ                    Q's operands stay in registers, else each tile of keys reads them
//     kSequences, kScheduled    as in sm80/forward.cuh; the second takes the first, and Fn::merge
//     kSharedBytes              the planned total of dynamic shared memory
//     kSlotBytes                with kScheduled, of a partial result
//   struct Fn
//     kStates, kStats, kUserStats, kCaptures, kMaskCaptures (bits), kHasMask, kHasQMod, kHasKMod,
//     kHasVMod
//     Row make_row(env, b, h, q)               what does not depend on the key
//     init(env, row, float* state)
//     merge(env, row, const float* a, const float* b, float* merged, float& fa, float& fb)
//         with kScheduled: the state of two parts, and the factors of their outputs
//     bool tile_row<kPartial>(env, row, scale, float (&s)[kBlockN / 4], float* state, float&
//     factor,
//                             kv0, ncols, mask_full, lane)
//         s[c]: raw dot product with key kv0 + column(c, lane); becomes its weight, 0 for dead
//         keys. The quad of lanes that share a row, and so the warp, call it together. kPartial =
//         false: every key exists and is live under the mask. Returns whether the row has a live
//         key; if not, state is untouched and factor is 1.
//     finalize(env, row, const float* state, float& out_factor, float* stats)    stats may be null
//     Interval classify(interval_env, b, h, q, k)                                with kHasMask
//     float q_mod(env, float), k_mod, v_mod                                      with kHas*Mod
//
// and ends with AE_EXPORT_FORWARD(Plan, Fn) or AE_EXPORT_SEQUENCES(Plan, Fn),
// AE_EXPORT_TABLES(Plan, Fn) where kMaskCaptures is not 0, and with kScheduled
// AE_EXPORT_SCHEDULE(Plan, Fn) and AE_EXPORT_COMBINE(Plan, Fn).
#pragma once

#define AE_EXPORT_FORWARD(Plan, Fn)                                              \
  extern "C" __global__ void __launch_bounds__(ae::Forward<Plan, Fn>::kThreads)  \
      ae_forward(const __grid_constant__ ae::Forward<Plan, Fn>::Params params) { \
    extern __shared__ __align__(128) char ae_shared[];                           \
    __shared__ ae::Forward<Plan, Fn>::Small small;                               \
    ae::Forward<Plan, Fn>(params, ae_shared, small).run();                       \
  }

// The same for kernels of sequences. A block of one warp: without "at least 1 block" ptxas takes
// 128 registers at most where there is an array in local memory, and spills.
#define AE_EXPORT_SEQUENCES(Plan, Fn)                                              \
  extern "C" __global__ void __launch_bounds__(ae::Forward<Plan, Fn>::kThreads, 1) \
      ae_forward(const __grid_constant__ ae::Forward<Plan, Fn>::Params params) {   \
    extern __shared__ __align__(128) char ae_shared[];                             \
    __shared__ ae::Forward<Plan, Fn>::Small small;                                 \
    ae::Forward<Plan, Fn>(params, ae_shared, small).run();                         \
  }

// Fills the block tables of the mask; the launcher calls it where there are any.
#define AE_EXPORT_TABLES(Plan, Fn)                                              \
  extern "C" __global__ void __launch_bounds__(ae::kTableThreads)               \
      ae_tables(const __grid_constant__ ae::Forward<Plan, Fn>::Params params) { \
    ae::build_tables_device(params);                                            \
  }
