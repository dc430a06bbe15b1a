// What the scheduler calls to have a thread block checked (cta.h).
#include "async.h"
#include "barrier.h"
#include "shadow.h"

namespace ptxsim {

void begin_checks(Cta& cta) {
  cta.shadow = std::make_shared<Shadow>(cta);
  cta.barriers = std::make_shared<Barriers>(cta);
  cta.async = std::make_shared<AsyncCopies>(cta);
}

// Threads that exit are checked as they do; a barrier may be left with warps that arrived and went
// on, as a pipeline leaves it.
void end_checks(Cta&) {}

void lanes_exited(Warp& warp, const Instr& instr, Mask lanes) {
  warp.cta->async->exited(warp, instr, lanes);
  warp.cta->barriers->exited(warp);
}

void at_switch(Warp& warp) {
  const uint64_t random = random_bits(warp);
  if ((random >> 56) % 4 == 0) warp.cta->async->stir(random);
}

// Copies are waited for by taking them in, so that nothing that is under way can free a warp that
// waits.
bool advance(Cta&) { return false; }

void shared_access(Warp& warp, const Instr& instr, Mask mask, const uint32_t* offset, int bytes,
                   Access access) {
  warp.cta->shadow->access(warp, instr, mask, offset, bytes, access);
}

std::string describe_wait(Warp& warp, const Group& group) {
  if (group.ready == nullptr) return "waits for other lanes of its warp";
  return warp.cta->barriers->describe(int(group.token & 0xff));
}

}  // namespace ptxsim
