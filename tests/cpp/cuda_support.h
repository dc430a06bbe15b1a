// What the tests of CUDA kernels share: images on disk, a description that fits them, launches'
// sizes.
#pragma once
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>

#include "common/sequences.h"
#include "cuda_module.h"
#include "recording_driver.h"

inline constexpr const char* kCubin = "the cubin";
inline constexpr const char* kPtx = "the PTX";

// A folder that holds the two images.
class Images {
 public:
  Images()
      : folder_(std::filesystem::temp_directory_path() /
                ("attnengine_driver_test_" + std::to_string(getpid()))) {
    std::filesystem::create_directories(folder_);
    std::ofstream(ptx()) << kPtx;
    std::ofstream(cubin()) << kCubin;
    std::ofstream(folder_ / "empty").flush();
  }
  ~Images() { std::filesystem::remove_all(folder_); }
  std::string ptx() const { return folder_ / "kernel.ptx"; }
  std::string cubin() const { return folder_ / "kernel.cubin"; }
  std::string empty() const { return folder_ / "empty"; }

 private:
  std::filesystem::path folder_;
};

inline ae_cuda_info description() {
  ae_cuda_info x{};
  x.info.kind = AE_FORWARD;
  x.info.dtype = AE_F16;
  x.info.D = 64;
  x.info.Dv = 32;
  x.info.stats = 2;
  x.info.key = "abc123";
  x.target = 80;
  x.threads = 128;
  x.shared_bytes = 40000;
  x.block_m = 64;
  x.block_n = 32;
  return x;
}

template <class Error, class Body>
std::string text_of(Body body) {
  try {
    body();
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}
inline bool has(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

// The devices of a driver are described once, so that each set of facts needs a table of its own.
inline const ae_driver& fresh_driver(const ae_driver& like = recording::table) {
  recording::state = recording::State();
  std::memset(recording::fault_words, 0, sizeof(recording::fault_words));
  return *new ae_driver(like);
}

inline ae_params sizes(int64_t B, int64_t Hq, int64_t Hkv, int64_t L, int64_t S) {
  ae_params p{};
  p.abi_version = AE_ABI_VERSION;
  p.bytes = sizeof(p);
  p.B = B, p.Hq = Hq, p.Hkv = Hkv, p.L = L, p.S = S;
  ae::set_dense_stats(p);
  return p;
}

inline ae_capture vector_of(const void* data, int64_t size, int32_t dtype) {
  ae_capture c{};
  c.data = data;
  c.rank = 1;
  c.size[0] = size;
  c.stride[0] = 1;
  c.dtype = dtype;
  return c;
}
