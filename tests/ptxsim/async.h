// Copies from global to shared memory that run beside the program: cp.async and its groups. On
// hardware a copy lands at any time from its issue to the wait that covers it. Here each lane's
// part lands at a random moment in between, and its source is read then, so that a program which
// relies on one order is found out by one seed or another; the shadow memory reports any access to
// the destination before the wait. Groups are kept per thread, as PTX defines them.
#pragma once
#include <array>
#include <cstdint>
#include <vector>

#include "cta.h"

namespace ptxsim {

class AsyncCopies {
 public:
  struct Copy {  // of one executed instruction
    const Instr* instr;
    Mask waited_for = 0;  // lanes not yet covered by a wait of theirs
    Mask to_land = 0;
    int bytes = 0;
    std::array<uint32_t, kLanes> offset{};        // in shared memory
    std::array<const uint8_t*, kLanes> source{};  // null: zeros
    std::array<uint8_t, kLanes> source_bytes{};   // the rest is zeros
    std::array<uint32_t, kLanes> group{};         // per lane, the number of its group
  };

  explicit AsyncCopies(Cta& cta) : cta_(cta), warps_(cta.warps.size()) {}

  void issue(Warp& warp, Copy copy);
  void commit(const Warp& warp, Mask lanes);
  // Lanes wait until at most `pending` of their latest groups are under way.
  void wait(Warp& warp, Mask lanes, uint64_t pending);
  void exited(Warp& warp, const Instr& instr, Mask lanes) const;
  // A moment at which something may land.
  void stir(uint64_t random);

 private:
  struct OfWarp {
    std::vector<Copy> copies;                  // in order of issue
    std::array<uint32_t, kLanes> committed{};  // per lane: the number of the open group
  };
  void land(Copy& copy, Mask lanes);

  Cta& cta_;
  std::vector<OfWarp> warps_;
};

}  // namespace ptxsim
