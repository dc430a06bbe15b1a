#include "execute.h"

#include <atomic>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <thread>

#include "memory.h"
#include "module.h"
#include "regions.h"

namespace ptxsim {

Workspace::~Workspace() {
  for (Buffer* b : {&slots_, &shared_, &local_}) std::free(b->data);
}

uint8_t* Workspace::grow(Buffer& buffer, size_t bytes) {
  if (bytes > buffer.bytes || buffer.data == nullptr) {
    std::free(buffer.data);
    buffer.bytes = align_up(std::max<size_t>(bytes, 1), 4096);
    buffer.data = static_cast<uint8_t*>(std::aligned_alloc(4096, buffer.bytes));
    if (buffer.data == nullptr) throw std::bad_alloc();
  }
  return buffer.data;
}

uint64_t random_bits(Warp& warp) { return warp.cta->random(); }

namespace {

// What local memory holds before it is written: as floats, NaN.
constexpr int kUnwritten = 0xFF;

uint64_t special_value(const Cta& cta, const Warp& warp, std::string_view name, uint32_t thread,
                       int lane) {
  const Launch& launch = *cta.launch;
  auto axis = [&](const std::array<uint32_t, 3>& of) { return of[size_t(name.back() - 'x')]; };
  auto is = [&](std::string_view stem) { return name.substr(0, name.size() - 2) == stem; };
  if (is("%tid")) {
    uint32_t x = launch.block[0], y = launch.block[1];
    return axis({thread % x, thread / x % y, thread / x / y});
  }
  if (is("%ntid")) return axis(launch.block);
  if (is("%ctaid") || is("%clusterid")) return axis(cta.id);
  if (is("%nctaid") || is("%nclusterid")) return axis(launch.grid);
  if (is("%cluster_nctaid") || name == "%cluster_nctarank") return 1;
  if (name == "%laneid") return uint64_t(lane);
  if (name == "%warpid") return uint64_t(warp.index);
  if (name == "%nwarpid") return uint64_t(cta.warps.size());
  if (name == "%smid") return cta.linear % uint64_t(launch.multiprocessors);
  if (name == "%nsmid") return uint64_t(launch.multiprocessors);
  if (name == "%lanemask_eq") return Mask{1} << lane;
  if (name == "%lanemask_lt") return (Mask{1} << lane) - 1;
  if (name == "%lanemask_le") return (Mask{2} << lane) - 1;
  if (name == "%lanemask_gt") return Mask(~((Mask{2} << lane) - 1));
  if (name == "%lanemask_ge") return Mask(~((Mask{1} << lane) - 1));
  if (name == "%dynamic_smem_size") return launch.dynamic_shared;
  if (name == "%total_smem_size" || name == "%aggr_smem_size") return cta.shared_bytes;
  if (name == "WARP_SZ") return kLanes;
  return 0;  // a grid's number, a cluster of one block
}

void start_warps(Cta& cta, Workspace& space) {
  const Launch& launch = *cta.launch;
  const Kernel& kernel = *launch.kernel;
  int count = (cta.threads + kLanes - 1) / kLanes;
  size_t row_bytes = sizeof(Row) * size_t(kernel.rows);
  uint8_t* slots = space.slots(row_bytes * size_t(count));
  std::memset(slots, 0, row_bytes * size_t(count));
  size_t local = (kernel.local_bytes + kernel.call_bytes) * size_t(count) * kLanes;
  cta.local = space.local(local);
  std::memset(cta.local, kUnwritten, local);
  cta.shared_bytes = std::max(kernel.static_shared, kernel.dynamic_offset + launch.dynamic_shared);
  cta.shared = space.shared(cta.shared_bytes);
  std::memset(cta.shared, kUnwritten, cta.shared_bytes);
  cta.warps.resize(size_t(count));
  for (int w = 0; w < count; ++w) {
    Warp& warp = cta.warps[size_t(w)];
    warp.cta = &cta;
    warp.index = w;
    warp.slots = reinterpret_cast<uint64_t*>(slots + row_bytes * size_t(w));
    warp.constants = kernel.constants.data();
    int threads = std::min(cta.threads - w * kLanes, kLanes);
    warp.present = threads == kLanes ? kAll : (Mask{1} << threads) - 1;
    warp.exited = ~warp.present;
    warp.groups.push_back({warp.present, kernel.start});
  }
  for (Warp& warp : cta.warps)
    for (const Special& special : kernel.specials)
      for (int l = 0; l < kLanes; ++l)
        warp.row(special.row)[l] =
            special_value(cta, warp, special.name, uint32_t(warp.index * kLanes + l), l);
}

// Every lane that is left waits: who, where and for what.
[[noreturn]] void report_stuck(Cta& cta) {
  std::string text;
  bool divergent = false;
  int count = 0;
  Warp* first = nullptr;
  const Group* group = nullptr;
  for (Warp& warp : cta.warps) {
    for (const Group& g : warp.groups) {
      if (first == nullptr) first = &warp, group = &g;
      divergent |= g.ready == nullptr;
      if (++count > 16) continue;
      text += "\n  " + place(warp, *g.at, g.mask);
      if (g.ready == nullptr)
        text += " waits for other lanes of its warp to arrive there";
      else
        text += " waits: " + describe_wait(warp, g);
    }
  }
  if (count > 16) text += "\n  and " + std::to_string(count - 16) + " more";
  fault(*first, *group->at, group->mask, divergent ? "divergence" : "deadlock",
        "every thread of the block that has not exited waits:" + text);
}

void run_block(Cta& cta, Workspace& space) {
  start_warps(cta, space);
  begin_checks(cta);
  WarpRunner runner(cta);
  std::vector<uint32_t> waiting, runnable;  // warps by index
  for (uint32_t w = 0; w < cta.warps.size(); ++w) runnable.push_back(w);
  while (!runnable.empty()) {
    uint64_t random = cta.random();
    size_t pick = (random & 0xffffffffu) % runnable.size();
    Warp& warp = cta.warps[runnable[pick]];
    bool progress = runner.run(warp, 16 + int((random >> 32) % 64));
    at_switch(warp);
    if (progress) {
      runnable.insert(runnable.end(), waiting.begin(), waiting.end());
      waiting.clear();
    }
    if (warp.groups.empty() || !progress) {
      if (!warp.groups.empty()) waiting.push_back(runnable[pick]);
      runnable[pick] = runnable.back();
      runnable.pop_back();
    }
    if (runnable.empty() && !waiting.empty()) {
      if (!advance(cta)) report_stuck(cta);
      runnable.swap(waiting);
    }
  }
  end_checks(cta);
  cta.counters.thread_blocks += 1;
}

uint64_t mix(uint64_t seed, uint64_t block) {
  Random random{seed};
  random.state ^= random() + block * 0xD1342543DE82EF95u;
  return random();
}

}  // namespace

Counters run_grid(Launch& launch, int threads) {
  uint64_t blocks = uint64_t{launch.grid[0]} * launch.grid[1] * launch.grid[2];
  std::atomic<uint64_t> next{0};
  std::atomic<uint64_t> failed{~uint64_t{0}};  // the first block that has
  std::mutex mutex;
  std::exception_ptr error;
  Counters total;
  auto work = [&] {
    Workspace space;
    Counters mine;
    for (uint64_t b; (b = next.fetch_add(1)) < blocks && b < failed.load();) {
      Cta cta;
      cta.launch = &launch;
      cta.linear = b;
      cta.id = {uint32_t(b % launch.grid[0]), uint32_t(b / launch.grid[0] % launch.grid[1]),
                uint32_t(b / launch.grid[0] / launch.grid[1])};
      cta.threads = int(launch.block[0] * launch.block[1] * launch.block[2]);
      cta.random.state = mix(launch.seed, b);
      cta.counters.regions.resize(launch.memory->regions().size());
      try {
        run_block(cta, space);
        mine += cta.counters;
      } catch (...) {
        std::lock_guard lock(mutex);
        if (b < failed.load()) {
          failed = b;
          error = std::current_exception();
        }
      }
    }
    std::lock_guard lock(mutex);
    total += mine;
  };
  int extra = int(std::min<uint64_t>(uint64_t(threads), blocks)) - 1;
  std::vector<std::thread> others;
  for (int t = 0; t < extra; ++t) others.emplace_back(work);
  work();
  for (std::thread& t : others) t.join();
  if (error) std::rethrow_exception(error);
  return total;
}

}  // namespace ptxsim
