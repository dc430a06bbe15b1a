// attnengine._host: what Python needs of the kernels that involves no tensors. It includes no torch
// header and finds the operator library beside itself at first use; attnengine.library loads that
// library through torch beforehand.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "host_api.h"
#include "isa.h"
#include "schedule_binding.h"

namespace py = pybind11;

namespace {

using Shape = std::vector<int64_t>;
using CaptureArg =
    std::tuple<uintptr_t, Shape, Shape, int32_t>;  // address, shape, strides, ae_dtype
using TensorArg = std::tuple<Shape, int32_t, int32_t, int32_t>;  // shape, dtype, device, its index

constexpr int64_t kErrorBytes = 4096;

std::string library_path() {
  Dl_info self;
  if (dladdr(reinterpret_cast<void*>(&library_path), &self) == 0) {
    throw std::runtime_error("attnengine._host cannot tell where it was loaded from");
  }
  const std::string path = self.dli_fname;
  return path.substr(0, path.find_last_of('/') + 1) + "libattnengine_ops.so";
}

const ae_host_api& api() {
  static const ae_host_api* const found = [] {
    const std::string path = library_path();
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) throw std::runtime_error(dlerror());
    using Getter = const ae_host_api* (*)();
    auto* get = reinterpret_cast<Getter>(dlsym(library, "attnengine_host_api"));
    const ae_host_api* table = get == nullptr ? nullptr : get();
    if (table == nullptr || table->version != AE_HOST_API_VERSION) {
      throw std::runtime_error(path +
                               " and attnengine._host come from different builds; reinstall "
                               "attnengine");
    }
    return table;
  }();
  return *found;
}

// Rank and dtype code of each captured tensor; nothing: not declared.
using SignatureArg = std::optional<std::vector<std::pair<int32_t, int32_t>>>;

class Signature {
 public:
  explicit Signature(const SignatureArg& captures) : declared_(captures.has_value()) {
    if (captures) {
      for (const auto& [rank, dtype] : *captures) {
        ranks_.push_back(rank);
        dtypes_.push_back(dtype);
      }
    }
    count_ = static_cast<int32_t>(ranks_.size());
    ranks_.push_back(0);  // never empty: a null pointer means "not declared"
  }
  const int32_t* ranks() const { return declared_ ? ranks_.data() : nullptr; }
  const int32_t* dtypes() const { return dtypes_.data(); }
  int32_t count() const { return count_; }

 private:
  bool declared_;
  std::vector<int32_t> ranks_, dtypes_;
  int32_t count_;
};

int32_t load_kernel(const std::string& path, const SignatureArg& captures) {
  const Signature signature(captures);
  char error[kErrorBytes];
  int32_t id;
  {
    const ae_host_api& table = api();
    const py::gil_scoped_release unlocked;
    id = table.load_kernel(path.c_str(), signature.ranks(), signature.dtypes(), signature.count(),
                           error, kErrorBytes);
  }
  if (id < 0) throw std::runtime_error(error);
  return id;
}

int32_t load_cuda_kernel(const std::string& ptx, const std::string& cubin, const std::string& key,
                         const std::map<std::string, uint64_t>& manifest,
                         const SignatureArg& captures) {
  const auto number = [&](const char* field) {
    const auto found = manifest.find(field);
    if (found == manifest.end()) {
      throw py::value_error("the manifest of " + ptx + " has no field \"" + field + "\"");
    }
    return found->second;
  };
  const auto small = [&](const char* field) { return static_cast<int32_t>(number(field)); };
  ae_cuda_info info{};
  const auto kind = manifest.find("kind");
  info.info.kind = kind == manifest.end() ? AE_FORWARD : static_cast<int32_t>(kind->second);
  info.info.dtype = small("dtype");
  info.info.D = small("head_dim");
  info.info.Dv = small("value_dim");
  info.info.capture_count = small("capture_count");
  info.info.user_stats = small("user_stats");
  info.info.stats = small("stats");
  info.info.key = key.c_str();
  info.target = small("target");
  info.threads = small("threads");
  info.shared_bytes = small("shared_bytes");
  info.block_m = small("block_m");
  info.block_n = small("block_n");
  info.pack_group = small("pack_group");
  info.mask_captures = number("mask_captures");
  info.sequences = small("sequences");
  info.slot_bytes = small("slot_bytes");
  info.tile_cycles = small("tile_cycles");
  info.shared_kv = small("shared_kv");
  info.crowded = small("crowded");
  info.state_bytes = small("state_bytes");
  info.split_bytes = small("split_bytes");
  const Signature signature(captures);
  char error[kErrorBytes];
  int32_t id;
  {
    const ae_host_api& table = api();
    const py::gil_scoped_release unlocked;
    id = table.load_cuda_kernel(ptx.c_str(), cubin.c_str(), &info, signature.ranks(),
                                signature.dtypes(), signature.count(), error, kErrorBytes);
  }
  if (id < 0) throw std::runtime_error(error);
  return id;
}

py::dict kernel_info(int64_t id) {
  const ae_module_info* info = api().kernel_info(id);
  if (info == nullptr) throw py::value_error("kernel=" + std::to_string(id) + ": no such kernel");
  py::dict d;
  static constexpr const char* kKinds[] = {
      "forward",         "backward",           "linear forward",
      "linear backward", "statistics forward", "statistics backward"};
  d["kind"] = kKinds[info->kind];
  d["dtype"] = info->dtype;
  d["D"] = info->D;
  d["Dv"] = info->Dv;
  d["capture_count"] = info->capture_count;
  d["user_stats"] = info->user_stats;
  d["stats"] = info->stats;
  d["grad_mask"] = info->grad_mask;
  const ae_cuda_info* cuda = api().cuda_info(id);
  d["isa"] = cuda == nullptr ? ae::isa_name(info->isa) : "sm_" + std::to_string(cuda->target);
  d["key"] = info->key;
  d["path"] = api().kernel_path(id);
  py::list captures;
  int32_t rank, dtype;
  for (int32_t i = 0; i < info->capture_count; ++i) {
    if (api().kernel_capture(id, i, &rank, &dtype) != 0)
      captures.append(py::make_tuple(rank, dtype));
  }
  d["captures"] = captures;
  d["cuda"] = py::none();
  if (cuda != nullptr) {
    py::dict launch;
    launch["threads"] = cuda->threads;
    launch["shared_bytes"] = cuda->shared_bytes;
    launch["block_m"] = cuda->block_m;
    launch["block_n"] = cuda->block_n;
    launch["pack_group"] = cuda->pack_group != 0;
    launch["mask_captures"] = cuda->mask_captures;
    launch["sequences"] = cuda->sequences != 0;
    launch["slot_bytes"] = cuda->slot_bytes;
    launch["tile_cycles"] = cuda->tile_cycles;
    launch["shared_kv"] = cuda->shared_kv != 0;
    launch["crowded"] = cuda->crowded;
    d["cuda"] = launch;
  }
  return d;
}

// Parameters that hold sizes and captured tensors, and no operands.
class SizesOnly {
 public:
  SizesOnly(const std::array<int64_t, 5>& sizes, const std::vector<CaptureArg>& captures)
      : captures_(captures.size()) {
    for (size_t i = 0; i < captures.size(); ++i) {
      const auto& [address, shape, strides, dtype] = captures[i];
      if (shape.size() > AE_MAX_RANK || shape.size() != strides.size()) {
        throw py::value_error("captures[" + std::to_string(i) +
                              "]: shape and strides must have the same length, at most " +
                              std::to_string(AE_MAX_RANK));
      }
      ae_capture& c = captures_[i];
      c.data = reinterpret_cast<const void*>(address);
      c.rank = static_cast<int32_t>(shape.size());
      c.dtype = dtype;
      std::copy(shape.begin(), shape.end(), c.size);
      std::copy(strides.begin(), strides.end(), c.stride);
    }
    p.abi_version = AE_ABI_VERSION;
    p.bytes = sizeof(ae_params);
    p.B = sizes[0];
    p.Hq = sizes[1];
    p.Hkv = sizes[2];
    p.L = sizes[3];
    p.S = sizes[4];
    p.captures = captures_.data();
    p.capture_count = static_cast<int32_t>(captures_.size());
    p.threads = 1;
    p.fault = &fault_;
  }
  SizesOnly(const SizesOnly&) = delete;
  SizesOnly& operator=(const SizesOnly&) = delete;
  ae_params p{};

 private:
  std::vector<ae_capture> captures_;
  int32_t fault_ = 0;
};

// The runs as the bytes of an int32 [runs, 4] array.
py::bytes classify(int64_t id, const std::array<int64_t, 5>& sizes,
                   const std::vector<CaptureArg>& captures, int64_t b, int64_t h) {
  const SizesOnly only(sizes, captures);
  char error[kErrorBytes];
  std::vector<ae_row_run> runs(4096);
  for (;;) {
    const int64_t n = api().classify(id, &only.p, b, h, runs.data(),
                                     static_cast<int64_t>(runs.size()), error, kErrorBytes);
    if (n < 0) throw py::value_error(error);
    const bool fits = n <= static_cast<int64_t>(runs.size());
    runs.resize(static_cast<size_t>(n));
    if (fits) break;
  }
  return py::bytes(reinterpret_cast<const char*>(runs.data()), runs.size() * sizeof(ae_row_run));
}

// How a call on a cache is cut: sizes (B, Hq, Hkv, L, S), strides of k and v, keys of each
// sequence.
py::dict describe_cut(int64_t id, const std::array<int64_t, 5>& sizes,
                      const std::vector<CaptureArg>& captures,
                      const std::array<int64_t, 4>& k_stride,
                      const std::array<int64_t, 4>& v_stride, const std::vector<int32_t>& lengths) {
  SizesOnly only(sizes, captures);
  if (static_cast<int64_t>(lengths.size()) != only.p.B) {
    throw py::value_error("lengths must hold one number per sequence");
  }
  std::copy(k_stride.begin(), k_stride.end(), only.p.k_stride);
  std::copy(v_stride.begin(), v_stride.end(), only.p.v_stride);
  only.p.sequences.key_end = lengths.data();
  only.p.sequences.align_end = 1;
  char error[kErrorBytes];
  ae_cut cut{};
  std::vector<int64_t> prefix;
  for (;;) {
    if (api().describe_cut(id, &only.p, &cut, prefix.data(), static_cast<int64_t>(prefix.size()),
                           error, kErrorBytes) < 0) {
      throw py::value_error(error);
    }
    if (static_cast<int64_t>(prefix.size()) > cut.outputs) break;
    prefix.resize(static_cast<size_t>(cut.outputs + 1));
  }
  py::dict d;
  d["rows"] = cut.rows;
  d["kv_heads"] = cut.kv_heads;
  d["tile_keys"] = cut.tile_keys;
  d["workers"] = cut.workers;
  d["may_split"] = cut.may_split != 0;
  d["costs"] = py::make_tuple(cut.costs[0], cut.costs[1], cut.costs[2], cut.costs[3]);
  d["prefix"] = prefix;
  return d;
}

int64_t workspace_bytes(int64_t id, const std::array<int64_t, 5>& sizes, bool shared_keys,
                        const std::vector<CaptureArg>& captures, int32_t threads) {
  SizesOnly only(sizes, captures);
  only.p.threads = threads;
  if (!shared_keys) only.p.k_stride[0] = only.p.v_stride[0] = 1;  // one K and V per batch element
  char error[kErrorBytes];
  const int64_t bytes = api().workspace_bytes(id, &only.p, error, kErrorBytes);
  if (bytes < 0) throw py::value_error(error);
  return bytes;
}

void install_driver(uintptr_t table) {
  char error[kErrorBytes];
  if (api().install_driver(reinterpret_cast<const void*>(table), error, kErrorBytes) < 0) {
    throw std::runtime_error(error);
  }
}

std::string driver_name() {
  char error[kErrorBytes], name[64];
  if (api().driver_name(name, sizeof(name), error, kErrorBytes) < 0) {
    throw std::runtime_error(error);
  }
  return name;
}

int32_t device_capability(int32_t index) {
  char error[kErrorBytes];
  const int32_t capability = api().device_capability(index, error, kErrorBytes);
  if (capability < 0) throw std::runtime_error(error);
  return capability;
}

ae_host_tensor as_host(const TensorArg& x) {
  const auto& [shape, dtype, device, index] = x;
  return {shape.data(), static_cast<int64_t>(shape.size()), dtype, device, index};
}

void check_forward(int64_t id, const TensorArg& q, const TensorArg& k, const TensorArg& v,
                   const std::vector<TensorArg>& captures) {
  const ae_host_tensor qkv[3] = {as_host(q), as_host(k), as_host(v)};
  std::vector<ae_host_tensor> tensors;
  for (const TensorArg& x : captures) tensors.push_back(as_host(x));
  char error[kErrorBytes];
  if (api().check_forward(id, qkv, tensors.data(), static_cast<int32_t>(tensors.size()), error,
                          kErrorBytes) < 0) {
    throw py::value_error(error);
  }
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() =
      "Kernel registry, tile classes, schedules and CPU features; no tensors pass through here.";
  m.def(
      "cpu_isa", [] { return ae::isa_name(ae::cpu_isa()); },
      "Best instruction set of this CPU: 'avx512_bf16', 'avx512', 'avx2' or 'portable'.");
  m.def("load_kernel", &load_kernel, py::arg("path"), py::arg("captures") = py::none(),
        "Load a kernel module; returns its id. captures: (rank, dtype code) of each captured "
        "tensor.");
  m.def("load_cuda_kernel", &load_cuda_kernel, py::arg("ptx"), py::arg("cubin"), py::arg("key"),
        py::arg("manifest"), py::arg("captures") = py::none(),
        "Load a CUDA kernel's images (cubin may be empty); returns its id. manifest: the numbers "
        "that describe it.");
  m.def("kernel_info", &kernel_info, py::arg("kernel"), "The module's own description, as a dict.");
  m.def("classify", &classify, py::arg("kernel"), py::arg("sizes"), py::arg("captures"),
        py::arg("b"), py::arg("h"),
        "Runs of KV tiles, the bytes of int32 [runs, 4] (row, begin, end, class); sizes = (B, Hq, "
        "Hkv, L, "
        "S).");
  m.def("describe_cut", &describe_cut, py::arg("kernel"), py::arg("sizes"), py::arg("captures"),
        py::arg("k_stride"), py::arg("v_stride"), py::arg("lengths"),
        "How a CPU kernel cuts a call on caches of these lengths.");
  m.def("workspace_bytes", &workspace_bytes, py::arg("kernel"), py::arg("sizes"),
        py::arg("shared_keys"), py::arg("captures"), py::arg("threads"),
        "Scratch of one launch in bytes; sizes = (B, Hq, Hkv, L, S), shared_keys: the whole batch "
        "has one K and V.");
  m.def("check_forward", &check_forward, py::arg("kernel"), py::arg("q"), py::arg("k"),
        py::arg("v"), py::arg("captures"),
        "The operator's argument checks on (shape, dtype code, device code, device index) tuples.");
  m.def("install_driver", &install_driver, py::arg("table"),
        "Use the ae_driver table at this address in place of the machine's; 0 removes it.");
  m.def("driver_name", &driver_name,
        "'simulator' when one is installed, 'cuda' with a CUDA driver, else 'none'.");
  m.def("device_capability", &device_capability, py::arg("index"),
        "Compute capability of a CUDA device: 80 is 8.0.");
  m.def(
      "set_sync_debug", [](bool on) { api().set_sync_debug(on ? 1 : 0); }, py::arg("on"),
      "Wait for every launch on a CUDA device and raise what went wrong in it.");
  m.def(
      "set_schedule_policy",
      [](int policy, int splits, int64_t workers) {
        if (policy > 2 || splits < 1 || workers < 1) {
          throw py::value_error("policy must be at most 2, splits and workers at least 1");
        }
        api().set_schedule_policy(policy, splits, workers);
      },
      py::arg("policy"), py::arg("splits") = 1, py::arg("workers") = 1,
      "Debugging aid: CUDA kernels that split their work take 0 (tiles), 1 (split) or 2 "
      "(stream-K); -1: what is predicted to be fastest.");
  m.def(
      "set_poison", [](bool on) { api().set_poison(on ? 1 : 0); }, py::arg("on"),
      "Fill results and scratch with NaN before each launch (for tests).");
  m.def(
      "kept_bytes", [] { return api().kept_bytes(); },
      "Bytes of large blocks that are kept for later calls.");
  m.def(
      "keep_at_most",
      [](int64_t bytes) {
        if (bytes < 0) throw py::value_error("bytes must be at least 0");
        api().keep_at_most(bytes);
      },
      py::arg("bytes"), "Keep no more bytes of large blocks for later calls, from now on.");
  ae::bind_schedule(m);
}
