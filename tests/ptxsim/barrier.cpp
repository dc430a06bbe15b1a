#include "barrier.h"

#include <bit>

#include "family.h"
#include "shadow.h"

namespace ptxsim {
namespace {

enum Reduction : int64_t { kPopc, kAnd, kOr };
// Instr::attr
enum { kAction, kBarrierOperand, kThreadsOperand, kPredicateOperand, kReduction };

std::string threads_text(int warps) { return std::to_string(warps * kLanes) + " threads"; }

// An operand that all lanes must agree on.
uint64_t uniform(Warp& warp, const Instr& instr, Mask mask, const Operand& operand,
                 const char* what) {
  const uint64_t* row = warp.in(operand);
  const uint64_t value = row[std::countr_zero(mask)];
  each_lane(mask, [&](int l) {
    if (row[l] != value)
      fault(warp, instr, mask, "divergence",
            std::string("lanes of a warp give different ") + what + ": " + std::to_string(value) +
                " and " + std::to_string(row[l]));
  });
  return value;
}

bool barrier_ready(Warp& warp, const Instr& instr, Mask lanes, uint64_t token) {
  const Barriers& barriers = *warp.cta->barriers;
  const int barrier = int(token & 0xff);
  if (!barriers.completed(barrier, uint32_t(token >> 8))) return false;
  if (instr.attr[kAction] == Barriers::kReduce) {
    const Barriers::Votes votes = barriers.votes(warp, barrier);
    uint64_t* out = warp.out(instr.op[0]);
    uint64_t value = votes.hold;
    if (instr.attr[kReduction] == kAnd) value = votes.hold == votes.threads;
    if (instr.attr[kReduction] == kOr) value = votes.hold != 0;
    each_lane(lanes, [&](int l) { out[l] = value; });
  }
  return true;
}

void run_barrier(Warp& warp, const Instr& instr, Mask mask) {
  const auto action = Barriers::Action(instr.attr[kAction]);
  const uint64_t barrier =
      uniform(warp, instr, mask, instr.op[instr.attr[kBarrierOperand]], "barriers");
  uint64_t threads = 0;
  if (instr.attr[kThreadsOperand] >= 0) {
    threads =
        uniform(warp, instr, mask, instr.op[instr.attr[kThreadsOperand]], "counts of threads");
    if (threads == 0)
      fault(warp, instr, mask, "barrier", "a count of 0 threads: give a multiple of 32");
  }
  Mask holds = 0;
  if (action == Barriers::kReduce) {
    const Operand& predicate = instr.op[instr.attr[kPredicateOperand]];
    const uint64_t* row = warp.in(predicate);
    each_lane(mask, [&](int l) {
      if ((row[l] != 0) != predicate.negated) holds |= Mask{1} << l;
    });
  }
  Barriers& barriers = *warp.cta->barriers;
  const uint32_t phase = barrier < Barriers::kCount ? barriers.phase(int(barrier)) : 0;
  barriers.arrive(warp, instr, mask, barrier, threads, action, holds);
  if (action != Barriers::kArrive) warp.wait(barrier_ready, uint64_t{phase} << 8 | barrier);
}

void run_warp_sync(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t* named = warp.in(instr.op[0]);
  each_lane(mask, [&](int l) {
    if (!(named[l] >> l & 1))
      fault(warp, instr, Mask{1} << l, "divergence",
            "the lane is not among the members that it names");
  });
  warp.cta->shadow->sync_lanes(warp, mask);
}

}  // namespace

int Barriers::live_warps() const {
  int live = 0;
  for (const Warp& warp : cta_.warps) live += warp.exited != kAll;
  return live;
}

void Barriers::check_use(Warp& warp, const Instr& instr, Mask lanes, int barrier, uint64_t threads,
                         Action action) const {
  const Barrier& b = at_[barrier];
  const std::string name = "barrier " + std::to_string(barrier);
  if (threads % kLanes != 0)
    fault(warp, instr, lanes, "barrier",
          name + " is given a count of " + std::to_string(threads) +
              " threads, which is not a multiple of 32");
  if (threads > cta_.warps.size() * kLanes)
    fault(warp, instr, lanes, "barrier",
          name + " is given a count of " + std::to_string(threads) +
              " threads, more than the thread block's " + threads_text(int(cta_.warps.size())));
  if (b.expected == 0) return;
  const int expected = threads != 0 ? int(threads / kLanes) : live_warps();
  const int first = std::countr_zero(b.arrived | b.begun);
  auto against = [&] {
    return " (" + place(cta_.warps[first], *b.instr[first], b.lanes[first]) + ")";
  };
  if (expected != b.expected)
    fault(warp, instr, lanes, "barrier",
          name + " is given a count of " + threads_text(expected) + ", and of " +
              threads_text(b.expected) + " by a warp that is there already" + against());
  if ((action == kReduce) != (b.action == kReduce))
    fault(warp, instr, lanes, "barrier",
          name + " is used by barrier.red and by another form at the same time" + against());
  if (b.arrived >> warp.index & 1)
    fault(warp, instr, lanes, "barrier",
          "the warp arrives at " + name + " again before it has completed: " + describe(barrier));
}

void Barriers::arrive(Warp& warp, const Instr& instr, Mask lanes, uint64_t barrier,
                      uint64_t threads, Action action, Mask holds) {
  if (barrier >= kCount)
    fault(warp, instr, lanes, "barrier",
          "barrier " + std::to_string(barrier) + " does not exist: there are 0 to 15");
  const int index = int(barrier);
  check_use(warp, instr, lanes, index, threads, action);
  Barrier& b = at_[index];
  if (b.expected == 0) {
    b.expected = threads != 0 ? int(threads / kLanes) : live_warps();
    b.counted = threads != 0;
    b.action = action;
  }
  const Mask me = Mask{1} << warp.index;
  b.begun |= me;
  if (action != kArrive) b.waiting |= me;
  b.lanes[warp.index] |= lanes;
  b.instr[warp.index] = &instr;
  b.votes.threads += uint32_t(std::popcount(lanes));
  b.votes.hold += uint32_t(std::popcount(holds));
  if ((b.lanes[warp.index] | warp.exited) == kAll) {
    warp_arrives(warp, index);
    complete_if_due(index);
  }
}

void Barriers::warp_arrives(const Warp& warp, int barrier) {
  at_[barrier].arrived |= Mask{1} << warp.index;
  cta_.shadow->sync_lanes(warp, ~warp.exited);
  cta_.shadow->arrive(warp, barrier);
}

void Barriers::complete_if_due(int barrier) {
  Barrier& b = at_[barrier];
  if (b.expected == 0 || std::popcount(b.arrived) < b.expected) return;
  cta_.shadow->complete(barrier, b.waiting);
  each_lane(b.waiting, [&](int w) { b.result[w] = b.votes; });
  ++b.phase;
  b.expected = 0;
  b.arrived = b.waiting = b.begun = 0;
  b.votes = Votes{};
  b.lanes.fill(0);
}

void Barriers::exited(const Warp& warp) {
  for (int i = 0; i < kCount; ++i) {
    Barrier& b = at_[i];
    if (b.expected == 0) continue;
    const Mask me = Mask{1} << warp.index;
    // Lanes that have arrived no longer wait for those that exit.
    if ((b.begun & ~b.arrived & me) != 0 && (b.lanes[warp.index] | warp.exited) == kAll)
      warp_arrives(warp, i);
    if (warp.exited == kAll && !b.counted && !(b.arrived & me)) --b.expected;
    complete_if_due(i);
  }
}

std::string Barriers::describe(int barrier) const {
  const Barrier& b = at_[barrier];
  const std::string name = "barrier " + std::to_string(barrier);
  if (b.expected == 0) return name + ": nobody has arrived";
  std::string text = name + ": " + std::to_string(std::popcount(b.arrived) * kLanes) + " of " +
                     threads_text(b.expected) + " have arrived";
  auto list = [&](Mask warps, const char* what) {
    if (warps == 0) return;
    text += std::string("; ") + what;
    each_lane(warps, [&](int w) { text += " " + std::to_string(w); });
  };
  list(b.arrived & b.waiting, "waiting are warps");
  list(b.arrived & ~b.waiting, "arrived and gone on are warps");
  list(b.begun & ~b.arrived, "with some of their lanes only are warps");
  Mask missing = 0;
  if (!b.counted)
    for (const Warp& warp : cta_.warps)
      if (warp.exited != kAll && !(b.arrived >> warp.index & 1)) missing |= Mask{1} << warp.index;
  list(missing, "missing are warps");
  return text;
}

bool decode_barrier(const Opcode& opcode, Instr& instr) {
  if (opcode.name() != "bar" && opcode.name() != "barrier") return false;
  Modifiers modifiers(opcode);
  if (opcode.name() == "bar" && modifiers.take("warp")) {
    modifiers.required({"sync"}, "action");
    modifiers.finish();
    expect_operands(opcode, instr, 1);
    instr.exec = run_warp_sync;
    instr.members = 0;
    return true;
  }
  modifiers.take("cta");
  const int action = modifiers.required({"sync", "arrive", "red"}, "action");
  const bool aligned = modifiers.take("aligned") || opcode.name() == "bar";
  instr.attr[kAction] = action;
  instr.attr[kBarrierOperand] = 0;
  instr.attr[kThreadsOperand] = -1;
  if (action == Barriers::kReduce) {
    instr.attr[kReduction] = modifiers.required({"popc", "and", "or"}, "reduction");
    modifiers.required({instr.attr[kReduction] == kPopc ? "u32" : "pred"}, "type");
    expect_operands(opcode, instr, 3, 4);
    instr.attr[kBarrierOperand] = 1;
    instr.attr[kPredicateOperand] = int64_t(instr.op.size()) - 1;
    if (instr.op.size() == 4) instr.attr[kThreadsOperand] = 2;
  } else {
    expect_operands(opcode, instr, action == Barriers::kArrive ? 2 : 1, 2);
    if (instr.op.size() == 2) instr.attr[kThreadsOperand] = 1;
  }
  modifiers.finish();
  instr.exec = run_barrier;
  // Without .aligned lanes may come one by one, by different instructions.
  instr.members = aligned ? -2 : -1;
  return true;
}

}  // namespace ptxsim
