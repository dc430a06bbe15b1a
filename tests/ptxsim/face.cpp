// What the Python face calls (tests/ptxsim/__init__.py): settings, counters, and one function that
// runs a kernel of a PTX text from start to end.
#include <string>

#include "driver.h"
#include "module.h"
#include "settings.h"

extern "C" {

const ae_driver* ptxsim_driver();

void ptxsim_set_seed(uint64_t seed) { ptxsim::settings().seed = seed; }
void ptxsim_set_threads(int threads) { ptxsim::settings().threads = threads; }
void ptxsim_set_instruction_limit(uint64_t limit) {  // 0: the one that it starts with
  ptxsim::settings().instruction_limit = limit ? limit : ptxsim::Settings::kInstructionLimit;
}
void ptxsim_set_device(int capability, int multiprocessors) {
  ptxsim::settings().capability = capability;
  ptxsim::settings().multiprocessors = multiprocessors;
}

// Of the calling thread's latest launch; valid until its next call.
const char* ptxsim_counters() {
  auto& last = ptxsim::last_launch();
  last.json = last.counters.json(last.regions);
  return last.json.c_str();
}

// Why the latest call of this thread failed.
const char* ptxsim_report() { return ptxsim_driver()->last_report(); }

// `params` point to values of `sizes` bytes. Returns the driver's result; why it is not 0 is in the
// table's last_report().
int ptxsim_run(const char* ptx, const char* entry, const uint32_t* grid, const uint32_t* block,
               uint32_t shared_bytes, int count, void** params, const uint32_t* sizes,
               int region_count, const ae_memory_region* regions) {
  const ae_driver* table = ptxsim_driver();
  ae_cu_module module = nullptr;
  if (ae_cu_result r = table->ModuleLoadDataEx(&module, ptx, 0, nullptr, nullptr)) return r;
  auto run = [&]() -> ae_cu_result {
    ae_cu_function f = nullptr;
    if (ae_cu_result r = table->ModuleGetFunction(&f, module, entry)) return r;
    const auto& expected = reinterpret_cast<ptxsim::Kernel*>(f)->function->parameters;
    std::string wrong;
    if (int(expected.size()) != count)
      wrong = std::to_string(count) + " arguments for " + std::to_string(expected.size());
    for (int i = 0; i < count && wrong.empty(); ++i)
      if (expected[size_t(i)].bytes != sizes[i])
        wrong = "argument " + std::to_string(i) + " has " + std::to_string(sizes[i]) +
                " bytes, the parameter " + std::to_string(expected[size_t(i)].bytes);
    if (!wrong.empty()) {
      ptxsim::last_launch().report = std::string(entry) + ": " + wrong;
      return AE_CU_INVALID_VALUE;
    }
    if (shared_bytes > 48 * 1024)
      if (ae_cu_result r =
              table->FuncSetAttribute(f, AE_CU_FUNC_MAX_DYNAMIC_SHARED, int(shared_bytes)))
        return r;
    table->describe_memory(regions, region_count);
    ae_cu_launch_config config{};
    config.grid_x = grid[0], config.grid_y = grid[1], config.grid_z = grid[2];
    config.block_x = block[0], config.block_y = block[1], config.block_z = block[2];
    config.shared_bytes = shared_bytes;
    ae_cu_result r = table->LaunchKernelEx(&config, f, params, nullptr);
    table->describe_memory(nullptr, 0);
    return r;
  };
  ae_cu_result result = run();
  table->ModuleUnload(module);
  return result;
}

}  // extern "C"
