// A driver whose ae_forward is the attention of naive_kernel.cpp, in bf16, computed on the host
// from the parameters that the launcher hands over: what reaches a kernel is what the operator was
// given. Two tables: one that calls itself a simulator, and one of another version.
#define ELEM 2
#define BACKWARD 0
#include "common/abi_cuda.h"
#include "naive_kernel.cpp"
#include "recording_driver.h"

namespace {

void serially(int64_t n, int32_t, ae_task task, void* arg) {
  for (int64_t i = 0; i < n; ++i) task(arg, i, 0);
}

ae_driver naive_simulator() {
  ae_driver table = recording::simulator;
  table.LaunchKernelEx = [](const ae_cu_launch_config*, ae_cu_function, void** params,
                            void**) -> ae_cu_result {
    auto* got = static_cast<ae::KernelParams<2>*>(params[0]);
    if (got->p.scale == 666) return AE_CU_LAUNCH_FAILED;
    got->p.captures = got->cap;
    std::vector<char> workspace(size_t(ae_workspace_bytes(&got->p)));
    return ae_launch(&got->p, workspace.data(), serially);
  };
  return table;
}

}  // namespace

extern "C" const ae_driver* simulator() {
  static const ae_driver table = naive_simulator();
  return &table;
}

extern "C" const ae_driver* other_version() {
  static const ae_driver table = [] {
    ae_driver t = naive_simulator();
    t.version += 1;
    return t;
  }();
  return &table;
}
