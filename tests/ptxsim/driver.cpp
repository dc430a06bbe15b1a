// The table of CUDA driver functions (csrc/driver.h), as the simulator has them: device memory is
// the host's, launches run when they are called, modules are PTX text.
#include "driver.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>

#include "device.h"
#include "execute.h"
#include "module.h"
#include "regions.h"
#include "settings.h"

namespace ptxsim {

Settings& settings() {
  static Settings all;
  return all;
}

LastLaunch& last_launch() {
  static thread_local LastLaunch last;
  return last;
}

namespace {

thread_local std::vector<Region> described;

// Modules that were unloaded are kept for the next load of the same text.
struct Parked {
  std::mutex mutex;
  std::deque<std::unique_ptr<Module>> modules;
};
Parked& parked() {
  static Parked all;
  return all;
}
constexpr size_t kMostParked = 8;  // of some 10 MB each

Kernel* kernel_of(ae_cu_function f) { return reinterpret_cast<Kernel*>(f); }

std::unique_ptr<Module> load(std::string_view text) {
  {
    std::lock_guard lock(parked().mutex);
    auto& modules = parked().modules;
    auto found = std::find_if(modules.begin(), modules.end(),
                              [&](const auto& m) { return m->text == text; });
    if (found != modules.end()) {
      std::unique_ptr<Module> module = std::move(*found);
      modules.erase(found);
      module->reset();
      return module;
    }
  }
  return std::make_unique<Module>(text);
}

// Where the caller gave a buffer for the compiler's words, the error goes there too.
void write_log(const std::string& text, unsigned int options, int* keys, void** values) {
  char* log = nullptr;
  size_t bytes = 0;
  for (unsigned int i = 0; i < options; ++i) {
    if (keys[i] == AE_CU_JIT_ERROR_LOG) log = static_cast<char*>(values[i]);
    if (keys[i] == AE_CU_JIT_ERROR_LOG_BYTES) bytes = reinterpret_cast<size_t>(values[i]);
  }
  if (log == nullptr || bytes == 0) return;
  size_t count = std::min(text.size(), bytes - 1);
  std::memcpy(log, text.data(), count);
  log[count] = '\0';
}

ae_cu_result module_load(ae_cu_module* out, const void* image, unsigned int options, int* keys,
                         void** values) {
  const char* text = static_cast<const char*>(image);
  auto reject = [&](ae_cu_result result, const std::string& why) {
    write_log(why, options, keys, values);
    return failed(result, why);
  };
  if (std::memcmp(text,
                  "\x7f"
                  "ELF",
                  4) == 0 ||
      uint8_t(text[0]) == 0x50)
    return reject(AE_CU_NO_BINARY_FOR_GPU,
                  "the simulator runs PTX text; this image is a cubin or fatbin");
  try {
    std::unique_ptr<Module> module = load(text);
    if (module->target > settings().capability) {
      return reject(AE_CU_NO_BINARY_FOR_GPU,
                    "the module is for sm_" + std::to_string(module->target) +
                        " and the simulated device is sm_" + std::to_string(settings().capability));
    }
    *out = reinterpret_cast<ae_cu_module>(module.release());
    return AE_CU_SUCCESS;
  } catch (const DecodeError& e) {
    return reject(AE_CU_INVALID_PTX, e.what());
  }
}

ae_cu_result module_unload(ae_cu_module handle) {
  std::unique_ptr<Module> module(reinterpret_cast<Module*>(handle));
  std::lock_guard lock(parked().mutex);
  parked().modules.push_back(std::move(module));
  if (parked().modules.size() > kMostParked) parked().modules.pop_front();
  return AE_CU_SUCCESS;
}

ae_cu_result get_function(ae_cu_function* out, ae_cu_module handle, const char* name) {
  Module& module = *reinterpret_cast<Module*>(handle);
  auto found = module.kernels.find(name);
  if (found == module.kernels.end()) {
    std::string names;
    for (auto& [known, kernel] : module.kernels) names += " " + std::string(known);
    return failed(AE_CU_NOT_FOUND,
                  "the module has no kernel '" + std::string(name) + "'; it has:" + names);
  }
  *out = reinterpret_cast<ae_cu_function>(found->second.get());
  return AE_CU_SUCCESS;
}

int max_threads(const Kernel& kernel) {
  return kernel.function->max_threads ? int(kernel.function->max_threads) : 1024;
}

ae_cu_result function_attribute(int* value, int attribute, ae_cu_function f) {
  const Kernel& kernel = *kernel_of(f);
  switch (attribute) {
    case AE_CU_FUNC_MAX_THREADS_PER_BLOCK:
      *value = max_threads(kernel);
      return AE_CU_SUCCESS;
    case AE_CU_FUNC_STATIC_SHARED:
      *value = int(kernel.static_shared);
      return AE_CU_SUCCESS;
    case AE_CU_FUNC_REGISTERS:  // ptxas decides that; here, rows that are alive together
      *value = std::min(kernel.rows, 255);
      return AE_CU_SUCCESS;
    case AE_CU_FUNC_MAX_DYNAMIC_SHARED:
      *value = kernel.max_dynamic_shared;
      return AE_CU_SUCCESS;
    default:
      return failed(AE_CU_INVALID_VALUE, "function attribute " + std::to_string(attribute) +
                                             " is not one that the simulator knows");
  }
}

ae_cu_result set_function_attribute(ae_cu_function f, int attribute, int value) {
  Kernel& kernel = *kernel_of(f);
  if (attribute == 9) return AE_CU_SUCCESS;  // the preferred carve-out: a hint
  if (attribute != AE_CU_FUNC_MAX_DYNAMIC_SHARED)
    return failed(AE_CU_INVALID_VALUE, "function attribute " + std::to_string(attribute) +
                                           " is not one that can be set");
  int limit = shared_limit(settings().capability) - int(kernel.dynamic_offset);
  if (value < 0 || value > limit)
    return failed(AE_CU_INVALID_VALUE, std::to_string(value) +
                                           " bytes of dynamic shared memory: sm_" +
                                           std::to_string(settings().capability) + " has at most " +
                                           std::to_string(limit) + " beside the static ones");
  kernel.max_dynamic_shared = value;
  return AE_CU_SUCCESS;
}

ae_cu_result occupancy(int* blocks, ae_cu_function f, int threads, size_t shared_bytes) {
  const Kernel& kernel = *kernel_of(f);
  constexpr size_t kReserved = 1024;  // the system's, for each block
  size_t each = kernel.dynamic_offset + shared_bytes + kReserved;
  size_t all = size_t(shared_limit(settings().capability)) + kReserved;
  *blocks = int(std::min<size_t>(all / each, threads > 0 ? size_t(2048 / threads) : 1));
  return AE_CU_SUCCESS;
}

void add_memory(MemoryMap& memory, const Module& module) {
  for (const Region& region : described) memory.add(region);
  for (auto& [name, v] : module.variables)
    if (v.space != Space::kShared)
      memory.add({v.address, v.address + v.bytes, v.space == Space::kGlobal, std::string(name)});
  add_allocations(memory);
  memory.finish();
}

std::string check_launch(const ae_cu_launch_config& config, const Kernel& kernel) {
  uint64_t threads = uint64_t{config.block_x} * config.block_y * config.block_z;
  uint64_t blocks = uint64_t{config.grid_x} * config.grid_y * config.grid_z;
  if (blocks == 0 || config.grid_y > 65535 || config.grid_z > 65535 || config.grid_x > 0x7fffffffu)
    return "a grid of " + std::to_string(config.grid_x) + " x " + std::to_string(config.grid_y) +
           " x " + std::to_string(config.grid_z) + " thread blocks";
  if (threads == 0 || threads > uint64_t(max_threads(kernel)))
    return std::to_string(threads) + " threads in a block: the kernel allows 1 to " +
           std::to_string(max_threads(kernel));
  const uint32_t* required = kernel.function->required_threads;
  if (required[0] != 0 && (config.block_x != required[0] || config.block_y != required[1] ||
                           config.block_z != required[2]))
    return "another shape of thread block than the kernel's .reqntid";
  if (int64_t{config.shared_bytes} > kernel.max_dynamic_shared)
    return std::to_string(config.shared_bytes) + " bytes of dynamic shared memory: the kernel's " +
           "attribute allows " + std::to_string(kernel.max_dynamic_shared);
  if (int64_t{config.shared_bytes} + kernel.dynamic_offset > shared_limit(settings().capability))
    return "more shared memory than a thread block may have";
  for (unsigned i = 0; i < config.attribute_count; ++i) {
    const ae_cu_launch_attribute& a = config.attributes[i];
    if (a.id == 2 && a.value.cooperative)
      return "cooperative launches are not simulated: thread blocks run one after another";
    if (a.id == 4 && a.value.cluster.x * a.value.cluster.y * a.value.cluster.z != 1)
      return "clusters of more than one thread block are not simulated";
  }
  return "";
}

ae_cu_result launch_kernel(const ae_cu_launch_config* config, ae_cu_function f, void** params,
                           void**) {
  const Kernel& kernel = *kernel_of(f);
  LastLaunch& last = last_launch();
  last.report.clear();
  last.counters = {};
  std::string wrong = check_launch(*config, kernel);
  if (!wrong.empty())
    return failed(AE_CU_INVALID_VALUE,
                  "launch of " + std::string(kernel.function->name) + ": " + wrong);
  MemoryMap memory;
  add_memory(memory, *kernel.module);
  last.regions.clear();
  for (const Region& region : memory.regions()) last.regions.push_back(region.name);
  Launch launch;
  launch.kernel = &kernel;
  launch.memory = &memory;
  launch.grid = {config->grid_x, config->grid_y, config->grid_z};
  launch.block = {config->block_x, config->block_y, config->block_z};
  launch.dynamic_shared = config->shared_bytes;
  launch.seed = settings().seed;
  launch.instruction_limit = settings().instruction_limit;
  launch.multiprocessors = settings().multiprocessors;
  launch.parameters.resize(kernel.parameter_bytes);
  for (size_t i = 0; i < kernel.function->parameters.size(); ++i) {
    const Parameter& p = kernel.function->parameters[i];
    std::memcpy(launch.parameters.data() + p.offset, params[i], p.bytes);
  }
  int threads = settings().threads;
  if (threads <= 0) threads = std::max(1, int(std::thread::hardware_concurrency()));
  try {
    last.counters = run_grid(launch, threads);
    return AE_CU_SUCCESS;
  } catch (const std::exception& e) {
    return failed(AE_CU_LAUNCH_FAILED, e.what());
  }
}

void describe_memory(const ae_memory_region* regions, int count) {
  described.clear();
  for (int i = 0; i < count; ++i) {
    auto begin = reinterpret_cast<uint64_t>(regions[i].address);
    described.push_back({begin, begin + uint64_t(regions[i].bytes), regions[i].writable != 0,
                         regions[i].name ? regions[i].name : "memory"});
  }
}

const char* last_report() { return last_launch().report.c_str(); }

constexpr ae_driver kTable = {
    AE_DRIVER_VERSION,
    sizeof(ae_driver),
    "simulator",
    init,
    device_count,
    device_get,
    device_attribute,
    primary_context,
    current_context,
    set_context,
    context_device,
    module_load,
    module_unload,
    get_function,
    function_attribute,
    set_function_attribute,
    occupancy,
    launch_kernel,
    mem_alloc,
    mem_free,
    memset8,
    copy_to_host,
    is_capturing,
    synchronize,
    exchange_capture_mode,
    error_string,
    describe_memory,
    last_report,
};

}  // namespace
}  // namespace ptxsim

extern "C" const ae_driver* ptxsim_driver() { return &ptxsim::kTable; }
