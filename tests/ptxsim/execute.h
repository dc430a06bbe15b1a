// Runs a launch: thread blocks on host threads, a block's warps in seeded random order.
#pragma once
#include <cstdint>
#include <vector>

#include "cta.h"

namespace ptxsim {

// Throws the Fault of the first thread block (in order of index) that has one: results and reports
// do not depend on the number of threads.
Counters run_grid(Launch& launch, int threads);

// A host thread's memory for the block that it runs.
class Workspace {
 public:
  ~Workspace();
  // At least `bytes`, aligned to a page's line; contents are undefined.
  uint8_t* slots(size_t bytes) { return grow(slots_, bytes); }
  uint8_t* shared(size_t bytes) { return grow(shared_, bytes); }
  uint8_t* local(size_t bytes) { return grow(local_, bytes); }

 private:
  struct Buffer {
    uint8_t* data = nullptr;
    size_t bytes = 0;
  };
  static uint8_t* grow(Buffer& buffer, size_t bytes);
  Buffer slots_, shared_, local_;
};

// Runs some instructions of a warp. False: all of its lanes wait.
class WarpRunner {
 public:
  explicit WarpRunner(Cta& cta);
  bool run(Warp& warp, int budget);

 private:
  enum Choice { kNone, kLowest, kOutOfTurn };
  Choice choose(Warp& warp, Group& group);
  void merge(Warp& warp, Group& group);
  bool others_first(const Warp& warp, const Group& group) const;
  // The lanes of `active` whose partners named by the instruction have all arrived.
  Mask arrived(Warp& warp, const Instr& instr, Mask active);
  void leave(Warp& warp, const Instr& instr, Group& group, Mask lanes);
  void branch_indexed(Warp& warp, const Instr& instr, Group& group, Mask active);
  void returns(Warp& warp, const Instr& instr, Group& group, Mask active);
  bool control(Warp& warp, const Instr& instr, Group& group, Mask active);

  Cta& cta_;
  const Instr* code_;
  int32_t last_;
  uint64_t limit_;
  uint64_t turns_ = 0;
};

}  // namespace ptxsim
