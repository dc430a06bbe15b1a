// The C ABI between the op library (csrc/) and every kernel module. Plain data only: no torch, no
// Python, no C++ types, so one module serves every torch version. Bump AE_ABI_VERSION on any
// change.
#pragma once
#include <stdint.h>

#define AE_ABI_VERSION 2
#define AE_MAX_RANK 8

#ifdef __cplusplus
extern "C" {
#endif

// Element types of operands and captured tensors.
enum ae_dtype {
  AE_F32 = 0,
  AE_F64 = 1,
  AE_BF16 = 2,
  AE_F16 = 3,
  AE_I64 = 4,
  AE_I32 = 5,
  AE_I16 = 6,
  AE_I8 = 7,
  AE_U8 = 8,
  AE_BOOL = 9,
};

// One captured tensor. Strides count elements. `grad` is the contiguous accumulator of its gradient
// (float, or double in fp64 kernels), zero-filled by the caller; null when no gradient is wanted.
typedef struct ae_capture {
  const void* data;
  void* grad;
  int64_t size[AE_MAX_RANK];
  int64_t stride[AE_MAX_RANK];
  int32_t rank;
  int32_t dtype;
} ae_capture;

// Where the rows and keys of sequence b lie when they are not all of batch row b: packed sequences
// of any lengths, a cache that is partly full, a cache in pages. Arrays hold B elements and lie in
// the kernel's memory; where one is null, what is said of null holds. common/sequences.h reads
// them.
typedef struct ae_sequences {
  // Query rows q_start[b] <= i < q_end[b] of batch row 0; null: rows 0 to L - 1 of batch row b.
  const int32_t *q_start, *q_end;
  // Keys at positions key_start[b] <= s < key_end[b] + key_more; null: from 0, up to S.
  const int32_t *key_start, *key_end;
  const int32_t* kv_row;  // batch row of k and v; null: b
  // [B][page_pitch]: position s is row s % page_size of batch row pages[b][s / page_size]; null: no
  // pages.
  const int32_t* pages;
  int64_t page_pitch;
  int32_t page_size;
  int32_t key_more;
  int32_t
      align_end;  // 1: the last query row has the index of the last key; 0: the first has index 0
} ae_sequences;

// Everything a launch needs. Operand layout is [B, H, L, D] by strides (elements). A broadcast
// batch of K/V arrives as stride 0. B counts sequences; L and S bound the rows and the keys of one
// sequence, and without `sequences` are all of them. `stats` in the accumulator type has
// consecutive query rows.
typedef struct ae_params {
  uint32_t abi_version;
  uint32_t bytes;  // sizeof(ae_params)
  int64_t B, Hq, Hkv, L, S;
  const void *q, *k, *v;
  int64_t q_stride[4], k_stride[4], v_stride[4];
  void* out;  // written by forward, read by backward
  int64_t out_stride[4];
  void* stats;              // forward: written, may be null; backward: read
  int64_t stats_stride[3];  // of the statistic, batch row and head, in elements
  double scale;
  // backward only
  const void* dout;
  int64_t dout_stride[4];
  const void* dstats;  // of the first kUserStats statistics, strides as `stats`; null when all zero
  void *dq, *dk, *dv;  // dk, dv have batch B even when K/V were broadcast
  int64_t dq_stride[4], dk_stride[4], dv_stride[4];
  const ae_capture* captures;
  int32_t capture_count;
  int32_t threads;  // workers that parallel_for may use, >= 1
  int32_t* fault;   // set to 1 + capture index when a live key gathers out of bounds
  // What the user's functions see: batch row 0 is sequence b_first, row 0 is query q_first.
  int64_t b_first, q_first;
  ae_sequences sequences;  // forward only
} ae_params;

// Runs task(arg, index, worker) for every index in [0, n), worker in [0, threads). Returns when all
// are done. Which worker runs which index is unspecified: results must not depend on it.
typedef void (*ae_task)(void* arg, int64_t index, int32_t worker);
typedef void (*ae_parallel_for)(int64_t n, int32_t threads, ae_task task, void* arg);

// Modules of other families than attention take another struct than ae_params, whose first two
// members are the same: linear attention ae_linear_params (common/linear_abi.h), token statistics
// ae_statistics_params (common/statistics_abi.h).
enum ae_kind {
  AE_FORWARD = 0,
  AE_BACKWARD = 1,
  AE_LINEAR_FORWARD = 2,
  AE_LINEAR_BACKWARD = 3,
  AE_STATISTICS_FORWARD = 4,
  AE_STATISTICS_BACKWARD = 5,
};

typedef struct ae_module_info {
  uint32_t abi_version;
  uint32_t params_bytes;
  int32_t kind;   // ae_kind
  int32_t dtype;  // ae_dtype of q, k, v, out
  int32_t D, Dv;
  int32_t capture_count;
  int32_t user_stats;  // saved row statistics that the caller sees
  int32_t stats;       // all saved row statistics: the user's first, then the backward's own
  uint64_t grad_mask;  // bit i: this backward module produces the gradient of captured tensor i
  int32_t isa;         // ae_isa the code was compiled for
  const char* key;     // digest of the kernel key
} ae_module_info;

enum ae_isa { AE_ISA_PORTABLE = 0, AE_ISA_AVX2 = 1, AE_ISA_AVX512 = 2, AE_ISA_AVX512_BF16 = 3 };

// A run of consecutive KV tiles of one class, for one tile of query rows.
enum ae_tile_class { AE_TILE_EMPTY = 0, AE_TILE_PARTIAL = 1, AE_TILE_FULL = 2 };
typedef struct ae_run {
  int32_t begin, end;  // tile indices [begin, end)
  int32_t tile_class;  // PARTIAL or FULL; empty tiles are not listed
} ae_run;

// The same with its row of tiles: what introspection returns.
typedef struct ae_row_run {
  int32_t row, begin, end, tile_class;
} ae_row_run;

// How a forward launch shares its work: what introspection returns beside the tiles of keys.
typedef struct ae_cut {
  int64_t outputs;    // sets of rows that walk the keys together
  int64_t rows;       // of an output, at most
  int64_t kv_heads;   // of an output, at most
  int64_t tile_keys;  // keys of a tile
  int32_t workers;    // that the line of tiles is cut for
  int32_t may_split;  // 0: every output is whole
  double costs[4];    // PolicyCosts of common/policy.h, in cycles
} ae_cut;

// A kernel module exports exactly these symbols (forward and backward modules alike; ae_classify
// and ae_describe_cut only in forward modules):
//   const ae_module_info* ae_info(void);
//   int64_t ae_workspace_bytes(const ae_params*);             // depends on sizes and threads only
//   int32_t ae_launch(const ae_params*, void* workspace, ae_parallel_for);  // 0 = ok
//   int64_t ae_classify(const ae_params*, int64_t b, int64_t h, ae_row_run* out,
//                       int64_t capacity);  // the runs of all rows of tiles of query head h:
//                       their number; the first `capacity` are stored
//   int32_t ae_describe_cut(const ae_params*, ae_cut* cut, int64_t* prefix, int64_t capacity);
//                       how the launch is cut; prefix[o]: the tiles of outputs before o, stored
//                       where capacity > outputs
typedef const ae_module_info* (*ae_info_fn)(void);
typedef int64_t (*ae_workspace_fn)(const ae_params*);
typedef int32_t (*ae_launch_fn)(const ae_params*, void*, ae_parallel_for);
typedef int32_t (*ae_describe_cut_fn)(const ae_params*, ae_cut*, int64_t*, int64_t);
typedef int64_t (*ae_classify_fn)(const ae_params*, int64_t, int64_t, ae_row_run*, int64_t);

#ifdef __cplusplus
}
#endif
