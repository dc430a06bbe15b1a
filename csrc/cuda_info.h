// What a CUDA kernel's manifest says of it. The PTX itself carries no description.
#pragma once
#include <stdint.h>

#include "common/abi.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ae_cuda_info {
  ae_module_info info;   // `isa` has no meaning here
  int32_t target;        // compute capability that it was compiled for: 80 is sm_80
  int32_t threads;       // per thread block
  int32_t shared_bytes;  // dynamic shared memory per thread block
  int32_t block_m, block_n;
  int32_t pack_group;      // 1: the query heads of one key head share a tile of rows
  uint64_t mask_captures;  // bit i: the mask reads captured tensor i, so it has a block table
  int32_t sequences;       // 1: rows and keys are those of ae_params.sequences
  int32_t slot_bytes;      // of a partial result; 0: an output's keys are never split
  int32_t tile_cycles;     // predicted: of one tile of keys
  int32_t shared_kv;       // 1: V is the first columns of K, and is read with it
  int32_t crowded;         // outputs per worker from which none is split
  // Linear attention: dynamic shared memory of the state pass, and of the same in small tiles or
  // with the delta rule the pass that solves. shared_bytes is the output pass's, block_n its
  // columns.
  int32_t state_bytes, split_bytes;
} ae_cuda_info;

#ifdef __cplusplus
}
#endif
