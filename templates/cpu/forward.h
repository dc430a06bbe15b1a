// The forward pass: one pass over tiles of keys with running row states.
//
//   for each tile of query rows (and, when there are few, each chunk of keys):
//     for each tile of keys that the mask does not empty:
//       S = Q K^T                           scores of kBlockM rows x kBlockN keys
//       W, state, factor = tile_row(S)      the traced functor, row by row
//       O = O * factor + W V
//     O * out_factor, statistics            or a partial result, merged in index order afterwards
//
// A key is dead when it is masked, past the end, or scored -inf: its weight is exactly 0. Nothing
// stored in K or V at a dead key reaches the result: tile_row overwrites its score, and a tile
// whose V holds Inf or NaN is multiplied without the keys of weight 0. A row that meets no live key
// gives 0 and the statistics of its initial state.
//
// The generated unit defines, with A = Plan::Acc and L = ae::Lanes<A>:
//
//   struct Plan
//     Elem, Acc                 float, double, bf16 or f16 operands; float or double arithmetic
//     kD, kDv                   head dimensions of Q and K, and of V
//     kBlockM, kBlockN          rows and keys of a score tile; kBlockN a multiple of 2 W
//     kVirtualWorkers           work is cut for so many, whatever the number of threads
//     kPackGroup                the query heads of a kv head share row tiles
//     kSplitKV                  few tasks may cut the keys into chunks (with Fn::kHasMerge)
//     kBf16Dot                  bf16 dot products
//     kScratchBytes, kKey       the planned scratch total of a worker; the digest of the kernel key
//   struct Fn
//     kStates, kStats, kUserStats, kCaptures, kMaskCaptures (bits), kHasMask, kHasMerge,
//     kScoreCanDie (score_mod may give -inf), kHasQMod, kHasKMod, kHasVMod
//     Row make_row(env, b, h, q)               what does not depend on the key
//     init(env, row, A* state)
//     bool tile_row<kPartial>(env, row, scale, A* s, Multiply<Plan>* w, A* state, A& factor, kv0,
//                             ncols, mask_full)
//         s: raw dot products of keys from kv0 on; w, which is s unless kBf16Dot: their weights as
//         the product takes them, 0 for dead keys. kPartial = false: ncols keys, whole vectors, all
//         live under the mask. kPartial = true: ncols keys, and unless mask_full the mask decides
//         on each. Returns false, with state untouched and factor 1, when no key is live.
//     finalize(env, row, const A* state, A& out_factor, A* stats)            stats may be null
//     merge(env, row, const A* a, const A* b, A* merged, A& fa, A& fb)       with kHasMerge
//     Interval classify(interval_env, b, h, q, k)                            with kHasMask
//     L::Acc q_mod(env, L::Acc), k_mod, v_mod                                with kHas*Mod
//
// and ends with AE_EXPORT_FORWARD(Plan, Fn).
#pragma once
#include "cpu/forward_kernel.h"

namespace ae {

template <class Plan, class Fn>
const ae_module_info* forward_info() {
  static constexpr ae_module_info info = {AE_ABI_VERSION, sizeof(ae_params),
                                          AE_FORWARD,     dtype_of<typename Plan::Elem>(),
                                          Plan::kD,       Plan::kDv,
                                          Fn::kCaptures,  Fn::kUserStats,
                                          Fn::kStats,     0,
                                          kIsa,           Plan::kKey};
  return &info;
}

template <class Plan, class Fn>
int32_t forward_launch(const ae_params* p, void* workspace, ae_parallel_for parallel_for) {
  if (!same_abi(*p)) return kWrongAbi;
  Forward<Plan, Fn>(*p, workspace).run(parallel_for);
  return kLaunched;
}

inline void run_here(int64_t n, int32_t, ae_task task, void* arg) {
  for (int64_t i = 0; i < n; ++i) task(arg, i, 0);
}

// Introspection, not part of a launch: all runs of the rows of tiles that hold query head h.
template <class Plan, class Fn>
int64_t forward_classify(const ae_params* p, int64_t b, int64_t h, ae_row_run* out,
                         int64_t capacity) {
  const ForwardCut<Plan> cut(*p, Fn::kMaskUsesH);
  const Sequence s(*p, b);
  const int64_t kv_tiles = (s.keys + Plan::kBlockN - 1) / Plan::kBlockN;
  if (cut.interleave == 0 || kv_tiles == 0) return 0;
  const int64_t tables = round_up(table_bytes(*p, Fn::kMaskCaptures), kCacheLine);
  char* memory = (char*)__builtin_malloc(tables + kCacheLine + sizeof(ae_run) * kv_tiles);
  if (memory == nullptr) return 0;
  char* aligned = (char*)round_up((int64_t)memory, kCacheLine);
  ae_run* runs = (ae_run*)(aligned + tables);
  const IntervalEnv env = build_tables(*p, Fn::kMaskCaptures, aligned, &run_here);
  int64_t total = 0;
  for (int64_t row = 0; row < cut.row_tiles(s); ++row) {
    const typename Forward<Plan, Fn>::Box box(
        ForwardTile<Plan>(cut, s, b, h / cut.interleave, row));
    const int64_t n = Forward<Plan, Fn>::runs(box, env, s.keys, Plan::kBlockN, runs, kv_tiles);
    for (int64_t i = 0; i < n; ++i, ++total) {
      if (total >= capacity) continue;
      out[total] = {int32_t(row), runs[i].begin, runs[i].end, runs[i].tile_class};
    }
  }
  __builtin_free(memory);
  return total;
}

}  // namespace ae

#define AE_EXPORT_FORWARD(Plan, Fn)                                                                \
  AE_EXPORT const ae_module_info* ae_info(void) { return ae::forward_info<Plan, Fn>(); }           \
  AE_EXPORT int64_t ae_workspace_bytes(const ae_params* p) {                                       \
    return ae::Forward<Plan, Fn>::workspace_bytes(*p);                                             \
  }                                                                                                \
  AE_EXPORT int32_t ae_launch(const ae_params* p, void* workspace, ae_parallel_for parallel_for) { \
    return ae::forward_launch<Plan, Fn>(p, workspace, parallel_for);                               \
  }                                                                                                \
  AE_EXPORT int64_t ae_classify(const ae_params* p, int64_t b, int64_t h, ae_row_run* out,         \
                                int64_t capacity) {                                                \
    return ae::forward_classify<Plan, Fn>(p, b, h, out, capacity);                                 \
  }                                                                                                \
  AE_EXPORT int32_t ae_describe_cut(const ae_params* p, ae_cut* cut, int64_t* prefix,              \
                                    int64_t capacity) {                                            \
    return ae::Forward<Plan, Fn>::describe(*p, *cut, prefix, capacity);                            \
  }
