// Runs a kernel's virtual tasks on a thread pool that splits index ranges.
#pragma once
#include <atomic>
#include <cstdint>

#include "common/abi.h"

namespace ae {

// Calls body(begin, end, ctx) on disjoint ranges that cover [0, workers), possibly concurrently.
using PoolFor = void (*)(int64_t workers, void (*body)(int64_t, int64_t, void*), void* ctx);

// One pool task per worker; each draws virtual tasks from a shared counter, so a slow thread delays
// one task and not a fixed share of them. A pool that runs several workers' ranges in one call (a
// nested parallel region) simply lets the first of them draw everything.
template <PoolFor kPool>
void run_tasks(int64_t n, int32_t threads, ae_task task, void* arg) {
  const int64_t workers = n < threads ? n : threads;
  if (workers <= 1) {
    for (int64_t i = 0; i < n; ++i) task(arg, i, 0);
    return;
  }
  struct Shared {
    std::atomic<int64_t> next;
    int64_t n;
    ae_task task;
    void* arg;
  } shared{{0}, n, task, arg};
  kPool(
      workers,
      [](int64_t begin, int64_t end, void* ctx) {
        auto* s = static_cast<Shared*>(ctx);
        for (int64_t worker = begin; worker < end; ++worker) {
          for (int64_t i; (i = s->next.fetch_add(1, std::memory_order_relaxed)) < s->n;) {
            s->task(s->arg, i, static_cast<int32_t>(worker));
          }
        }
      },
      &shared);
}

// Below this many multiply-adds a launch takes one thread: waking a second one costs 2-50 us, and
// this is about 5 us of work. Results do not depend on the thread count, so this is free to choose.
inline constexpr double kSerialMacs = 1 << 18;

inline double launch_macs(const ae_params& p, int32_t D, int32_t Dv) {
  return static_cast<double>(p.B) * static_cast<double>(p.Hq) * static_cast<double>(p.L) *
         static_cast<double>(p.S) * (D + Dv);
}

// Of the threads that the pool offers, those that a launch uses.
inline int32_t launch_threads(const ae_params& p, const ae_module_info& info, int32_t offered) {
  return launch_macs(p, info.D, info.Dv) > kSerialMacs ? offered : 1;
}

}  // namespace ae
