// The parameter of every CUDA kernel: what the launcher in csrc writes and the kernels read, by
// value. The captured tensors and the block tables of the mask follow the common parameters, so
// that a kernel reads them from its parameter bank.
#pragma once
#include "common/interval_gather.h"

namespace ae {

// N = max(1, captured tensors). `p.captures` is null on the device, `p.fault` points to device
// memory; a table without keys is absent.
template <int N>
struct KernelParams {
  ae_params p;
  ae_capture cap[N];
  BlockTable tables[N];
};

}  // namespace ae
