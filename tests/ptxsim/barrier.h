// The sixteen named barriers of a thread block (bar.sync, bar.arrive, bar.red and the barrier.cta
// forms). As on hardware, warps arrive, each once all of its lanes that have not exited are there,
// and a barrier counts its warps' 32 threads whether they hold threads or not. Without a thread
// count it waits for every warp that has not exited, with a count for that many threads, exited or
// not. What the manual leaves undefined is a fault here: "barrier" for counts and uses that do not
// fit, "divergence" for lanes of a warp that wait in different places.
#pragma once
#include <array>
#include <cstdint>
#include <string>

#include "cta.h"

namespace ptxsim {

class Barriers {
 public:
  enum Action : uint8_t { kSync, kArrive, kReduce };
  static constexpr int kCount = 16;

  explicit Barriers(Cta& cta) : cta_(cta) {}

  // `threads` 0: no count is given. `holds`: lanes whose predicate holds, of a reduction.
  void arrive(Warp& warp, const Instr& instr, Mask lanes, uint64_t barrier, uint64_t threads,
              Action action, Mask holds);
  bool completed(int barrier, uint32_t phase) const { return at_[barrier].phase != phase; }
  uint32_t phase(int barrier) const { return at_[barrier].phase; }
  struct Votes {  // of a reduction
    uint32_t threads = 0, hold = 0;
  };
  Votes votes(const Warp& warp, int barrier) const { return at_[barrier].result[warp.index]; }
  void exited(const Warp& warp);
  std::string describe(int barrier) const;

 private:
  struct Barrier {
    uint32_t phase = 0;
    int expected = 0;      // warps; 0: nobody has arrived
    bool counted = false;  // `expected` was given, and does not shrink as warps exit
    Action action = kSync;
    Mask arrived = 0, waiting = 0, begun = 0;  // by warp; begun: some of its lanes are there
    Votes votes;
    std::array<Mask, kLanes> lanes{};          // by warp
    std::array<const Instr*, kLanes> instr{};  // by warp: what it arrived with
    std::array<Votes, kLanes> result{};        // by warp: of the phase it waited for
  };

  int live_warps() const;
  void check_use(Warp& warp, const Instr& instr, Mask lanes, int barrier, uint64_t threads,
                 Action action) const;
  void warp_arrives(const Warp& warp, int barrier);
  void complete_if_due(int barrier);

  Cta& cta_;
  std::array<Barrier, kCount> at_;
};

}  // namespace ptxsim
