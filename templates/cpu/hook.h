// What the hooks of linear attention read captured tensors by, beside cpu/capture.h.
#pragma once
#include "cpu/capture.h"

namespace ae {

// Index i of a dimension that a hook broadcasts where its size is 1: one kernel serves both.
AE_INLINE int32_t spread(const Env& env, int cap, int dim, int32_t i) {
  return env.cap[cap].size[dim] == 1 ? 0 : i;
}

}  // namespace ae
