// Shadow against a model that keeps, for every byte, who has ever read and written it, with the
// vector clocks of all threads. Random accesses of all widths, barriers of the block and of some
// warps, and bar.warp.sync of whole and half warps: both must call the same accesses races. Usage:
// shadow_test ROUNDS
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

#include "module.h"
#include "shadow.h"

namespace ptxsim {
namespace {

constexpr uint32_t kSharedBytes = 512;
constexpr const char* kText = R"(.version 8.0
.target sm_80
.address_size 64
.visible .entry kernel() {
  .reg .b32 %r<4>;
  ld.shared.b32 %r1, [%r0];
  st.shared.b32 [%r0], %r1;
  ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r0];
  ret;
}
)";

class Model {
 public:
  explicit Model(int warps)
      : threads_(warps * kLanes),
        clock_(size_t(threads_), std::vector<int>(size_t(threads_), 0)),
        reads_(kSharedBytes),
        writes_(kSharedBytes) {
    for (int t = 0; t < threads_; ++t) clock_[t][t] = 1;
  }

  // What the access is: "", "race" or "uninitialized". A matrix row is read for all lanes.
  std::string judge(int warp, Mask mask, const uint32_t* offset, int bytes, bool write,
                    bool matrix) const {
    std::string verdict;
    each(warp, mask, offset, bytes, matrix, [&](int thread, uint32_t byte) {
      if (!write && writes_[byte].empty()) verdict = "uninitialized";
      auto unordered = [&](const Past& past) {
        return past.thread != thread && past.clock > clock_[thread][past.thread];
      };
      for (const Past& past : writes_[byte])
        if (unordered(past) && verdict.empty()) verdict = "race";
      if (!write) return;
      for (const Past& past : reads_[byte])
        if (unordered(past) && verdict.empty()) verdict = "race";
    });
    return verdict;
  }
  void access(int warp, Mask mask, const uint32_t* offset, int bytes, bool write, bool matrix) {
    each(warp, mask, offset, bytes, matrix, [&](int thread, uint32_t byte) {
      // A thread's latest access stands for its earlier ones.
      std::vector<Past>& history = (write ? writes_ : reads_)[byte];
      for (Past& past : history)
        if (past.thread == thread) {
          past.clock = clock_[thread][thread];
          return;
        }
      history.push_back({thread, clock_[thread][thread]});
    });
  }
  void sync_lanes(int warp, Mask mask) {
    std::vector<int> joint(size_t(threads_), 0);
    each_lane(mask, [&](int l) { join(joint, clock_[warp * kLanes + l]); });
    each_lane(mask, [&](int l) {
      clock_[warp * kLanes + l] = joint;
      ++clock_[warp * kLanes + l][warp * kLanes + l];
    });
  }
  // All warps of `arrived` contribute, those of `waiting` learn.
  void barrier(uint32_t arrived, uint32_t waiting) {
    std::vector<int> joint(size_t(threads_), 0);
    for (int t = 0; t < threads_; ++t) {
      if (!(arrived >> t / kLanes & 1)) continue;
      join(joint, clock_[t]);
      ++clock_[t][t];
    }
    for (int t = 0; t < threads_; ++t) {
      if (!(waiting >> t / kLanes & 1)) continue;
      const int mine = clock_[t][t];
      join(clock_[t], joint);
      clock_[t][t] = mine;
    }
  }

 private:
  struct Past {
    int thread, clock;
  };
  static void join(std::vector<int>& into, const std::vector<int>& from) {
    for (size_t t = 0; t < into.size(); ++t) into[t] = std::max(into[t], from[t]);
  }
  template <class F>
  void each(int warp, Mask mask, const uint32_t* offset, int bytes, bool matrix, F f) const {
    each_lane(mask, [&](int l) {
      for (int t = matrix ? 0 : l; t <= (matrix ? kLanes - 1 : l); ++t)
        for (uint32_t b = offset[l]; b < offset[l] + uint32_t(bytes); ++b) f(warp * kLanes + t, b);
    });
  }

  int threads_;
  std::vector<std::vector<int>> clock_;
  std::vector<std::vector<Past>> reads_, writes_;  // by byte
};

// One random program; counts its verdicts. False: the two disagree.
bool run(uint64_t seed, const Kernel& kernel, std::map<std::string, int>& verdicts) {
  Random random{seed * 77 + 1};
  auto below = [&](uint64_t n) { return uint32_t(random() % n); };
  auto find = [&](std::string_view stem) {
    for (const Instr& instr : kernel.code)
      if (instr.text.starts_with(stem)) return &instr;
    std::abort();
  };
  const Instr *load = find("ld."), *store = find("st."), *matrix_load = find("ldmatrix");
  const auto warps = int(1 + below(4));
  const uint32_t all_warps = (1u << warps) - 1;
  std::vector<uint64_t> slots(size_t(kernel.rows) * kLanes);
  Launch launch;
  launch.kernel = &kernel;
  Cta cta;
  cta.launch = &launch;
  cta.threads = warps * kLanes;
  cta.shared_bytes = kSharedBytes;
  cta.warps.resize(size_t(warps));
  for (int w = 0; w < warps; ++w) {
    cta.warps[w].cta = &cta;
    cta.warps[w].index = w;
    cta.warps[w].slots = slots.data();
  }
  Shadow shadow(cta);
  Model model(warps);
  auto barrier = [&](int number, uint32_t arrived, uint32_t waiting) {
    for (int w = 0; w < warps; ++w)
      if (arrived >> w & 1) {
        shadow.sync_lanes(cta.warps[w], kAll);
        model.sync_lanes(w, kAll);
        shadow.arrive(cta.warps[w], number);
      }
    shadow.complete(number, waiting);
    model.barrier(arrived, waiting);
  };
  uint32_t offset[kLanes];
  if (below(8) != 0) {
    for (int l = 0; l < kLanes; ++l) offset[l] = uint32_t(l) * 16;
    shadow.access(cta.warps[0], *store, kAll, offset, 16, Access::kWrite);
    model.access(0, kAll, offset, 16, true, false);
    barrier(0, all_warps, all_warps);
  }
  const uint32_t widths = below(4);
  for (int step = 0; step < 400; ++step) {
    const auto w = int(below(uint64_t(warps)));
    switch (below(10)) {
      case 0:
        barrier(0, all_warps, all_warps);
        continue;
      case 1: {
        const uint32_t waiting = uint32_t(random() & random()) & all_warps;
        barrier(1 + int(below(3)), waiting | (uint32_t(random()) & all_warps), waiting);
        continue;
      }
      case 2: {
        const Mask mask = below(2) ? kAll : below(2) ? 0xffffu : 0xff000000u;
        shadow.sync_lanes(cta.warps[w], mask);
        model.sync_lanes(w, mask);
        continue;
      }
      default:
        break;
    }
    const int bytes = widths == 0 ? 16 : widths == 1 ? 4 : 1 << below(5);
    const bool write = below(3) == 0, matrix = !write && bytes == 16 && below(2);
    const Mask mask = below(4) == 0 ? Mask{1} << below(kLanes) : below(2) ? kAll : Mask(random());
    if (mask == 0) continue;
    const uint32_t pattern = below(3), base = below(kSharedBytes);
    for (uint32_t l = 0; l < kLanes; ++l) {
      const uint32_t cell = pattern == 0   ? base + l
                            : pattern == 1 ? base / 32 * 32 + (l ^ 5)
                                           : below(kSharedBytes);
      offset[l] = cell * uint32_t(bytes) % kSharedBytes;
    }
    const std::string expected = model.judge(w, mask, offset, bytes, write, matrix);
    if (!expected.empty() && below(40) != 0) continue;  // most programs go on without
    std::string found;
    try {
      shadow.access(cta.warps[w],
                    matrix  ? *matrix_load
                    : write ? *store
                            : *load,
                    mask, offset, bytes, write ? Access::kWrite : Access::kRead);
    } catch (const Fault& fault) {
      found = fault.kind;
    }
    // One instruction may have both faults; which one is met first is not defined.
    if (expected.empty() != found.empty()) {
      std::fprintf(stderr, "seed %llu, step %d: expected '%s', found '%s'\n",
                   static_cast<unsigned long long>(seed), step, expected.c_str(), found.c_str());
      return false;
    }
    ++verdicts[found];
    if (!found.empty()) return true;
    model.access(w, mask, offset, bytes, write, matrix);
  }
  return true;
}

}  // namespace
}  // namespace ptxsim

int main(int argc, char** argv) {
  using namespace ptxsim;
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 1000;
  const Module module(kText);
  const Kernel& kernel = *module.kernels.at("kernel");
  std::map<std::string, int> verdicts;
  int disagreements = 0;
  for (int round = 0; round < rounds; ++round)
    disagreements += !run(uint64_t(round), kernel, verdicts);
  std::printf("%d races, %d uninitialized reads, %d legal accesses, %d disagreements\n",
              verdicts["race"], verdicts["uninitialized"], verdicts[""], disagreements);
  return disagreements != 0 || verdicts["race"] < rounds / 4 || verdicts["uninitialized"] == 0;
}
