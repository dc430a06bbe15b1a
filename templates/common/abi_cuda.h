// The parameter of every CUDA kernel: what the launcher in csrc writes and the kernels read, by
// value. The captured tensors and the block tables of the mask follow the common parameters, so
// that a kernel reads them from its parameter bank.
#pragma once
#include "common/interval_gather.h"

namespace ae {

// How a launch shares its work among thread blocks (common/schedule.h): for kernels that were
// generated to split it. With kTiles, block x takes output x whole, and the pointers are null.
struct WorkParams {
  int32_t policy, splits;
  int64_t outputs, workers;
  int64_t* prefix;  // [outputs + 1]: written by ae_schedule
  float* slots;     // partial results: written by ae_forward, merged by ae_combine
};

// N = max(1, captured tensors). `p.captures` is null on the device, `p.fault` points to device
// memory; a table without keys is absent.
template <int N>
struct KernelParams {
  ae_params p;
  ae_capture cap[N];
  BlockTable tables[N];
  WorkParams work;
};

}  // namespace ae
