// What the generated functors see of a launch: captured tensors, where to report an index that is
// out of bounds, and the number of keys.
#pragma once
#include <cstdint>

#include "common/abi.h"

namespace ae {

struct Env {
  const ae_capture* cap;
  int32_t* fault;
  int64_t S;
};

}  // namespace ae
