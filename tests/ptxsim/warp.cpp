// Exchanges between the lanes of a warp: shfl, vote, match, redux, activemask, elect.
//
// What PTX leaves undefined is random here: the value shuffled from a lane that does not take part.
// Which lanes a `membermask` names is the scheduler's business (Instr::members): `mask` has those
// of them that are here.
#include <algorithm>
#include <bit>

#include "counters.h"
#include "family.h"
#include "machine.h"

namespace ptxsim {
namespace {

enum Mode : int64_t { kUp, kDown, kBfly, kIdx };

// shfl.sync.mode.b32 d{|p}, a, b, c, membermask. Its first kFirst operands are destinations.
template <Mode kMode, int kFirst>
void shuffle(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t* a = warp.in(instr.op[kFirst]);
  const uint64_t* b = warp.in(instr.op[kFirst + 1]);
  const uint64_t* c = warp.in(instr.op[kFirst + 2]);
  uint64_t value[kLanes];
  int32_t source[kLanes], inside[kLanes];
  Mask read = 0;
  for (int l = 0; l < kLanes; ++l) {
    int by = int(b[l] & 31), clamp = int(c[l] & 31), segment = int(c[l] >> 8 & 31);
    int last = (l & segment) | (clamp & ~segment), first = l & segment;
    int from = kMode == kUp     ? l - by
               : kMode == kDown ? l + by
               : kMode == kBfly ? l ^ by
                                : first | (by & ~segment);
    inside[l] = kMode == kUp ? from >= last : from <= last;
    source[l] = (inside[l] ? from : l) & 31;
  }
  for (int l = 0; l < kLanes; ++l) value[l] = a[source[l]];
  for (int l = 0; l < kLanes; ++l) read |= (mask >> l & 1) << source[l];
  if (Mask absent = read & ~mask; absent != 0) {
    uint64_t undefined = random_bits(warp) & 0xffffffff;
    for (int l = 0; l < kLanes; ++l)
      if (absent >> source[l] & 1) value[l] = undefined;
  }
  write_lanes(warp.out(instr.op[0]), mask, [&](int l) { return value[l]; });
  if constexpr (kFirst == 2)
    write_lanes(warp.out(instr.op[1]), mask, [&](int l) -> uint64_t { return inside[l]; });
}

Exec shuffle_function(int mode, bool pair) {
  switch (mode) {
    case kUp:
      return pair ? shuffle<kUp, 2> : shuffle<kUp, 1>;
    case kDown:
      return pair ? shuffle<kDown, 2> : shuffle<kDown, 1>;
    case kBfly:
      return pair ? shuffle<kBfly, 2> : shuffle<kBfly, 1>;
    default:
      return pair ? shuffle<kIdx, 2> : shuffle<kIdx, 1>;
  }
}

// The lanes of the mask whose value of the predicate is true.
Mask true_lanes(Warp& warp, const Operand& p, Mask mask) {
  const uint64_t* row = warp.in(p);
  Mask set = 0;
  for (int l = 0; l < kLanes; ++l) set |= Mask(row[l] & 1) << l;
  return (p.negated ? ~set : set) & mask;
}

void broadcast(Warp& warp, const Operand& to, Mask mask, uint64_t value) {
  write_lanes(warp.out(to), mask, [=](int) { return value; });
}

enum Vote : int64_t { kVoteAll, kVoteAny, kVoteUni, kVoteBallot };

void vote(Warp& warp, const Instr& instr, Mask mask) {
  Mask set = true_lanes(warp, instr.op[1], mask);
  uint64_t result = set;
  switch (instr.attr[0]) {
    case kVoteAll:
      result = set == mask;
      break;
    case kVoteAny:
      result = set != 0;
      break;
    case kVoteUni:
      result = set == mask || set == 0;
      break;
    default:
      break;
  }
  broadcast(warp, instr.op[0], mask, result);
}

// attr: 0 bits of the value.
void match_any(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t* a = warp.in(instr.op[1]);
  uint64_t keep = instr.attr[0] == 64 ? ~uint64_t{0} : 0xffffffff;
  uint64_t result[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    Mask same = 0;
    for (int k = 0; k < kLanes; ++k) same |= Mask(((a[k] ^ a[l]) & keep) == 0) << k;
    result[l] = same & mask;
  }
  write_lanes(warp.out(instr.op[0]), mask, [&](int l) { return result[l]; });
}

void match_all(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t* a = warp.in(instr.op[instr.pair ? 2 : 1]);
  uint64_t keep = instr.attr[0] == 64 ? ~uint64_t{0} : 0xffffffff;
  uint64_t first = a[std::countr_zero(mask)];
  bool same = true;
  each_lane(mask, [&](int l) { same &= ((a[l] ^ first) & keep) == 0; });
  broadcast(warp, instr.op[0], mask, same ? mask : 0);
  if (instr.pair) broadcast(warp, instr.op[1], mask, same);
}

enum Reduction : int64_t { kAdd, kMin, kMax, kAnd, kOr, kXor };

template <class T>
void reduce(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t* a = warp.in(instr.op[1]);
  T result = T(a[std::countr_zero(mask)]);
  each_lane(mask & (mask - 1), [&](int l) {
    T x = T(a[l]);
    switch (instr.attr[0]) {
      case kAdd:
        result = T(uint32_t(result) + uint32_t(x));
        break;
      case kMin:
        result = std::min(result, x);
        break;
      case kMax:
        result = std::max(result, x);
        break;
      case kAnd:
        result &= x;
        break;
      case kOr:
        result |= x;
        break;
      default:
        result ^= x;
    }
  });
  broadcast(warp, instr.op[0], mask, uint32_t(result));
}

void active_mask(Warp& warp, const Instr& instr, Mask mask) {
  broadcast(warp, instr.op[0], mask, mask);
}

void elect(Warp& warp, const Instr& instr, Mask mask) {
  int leader = std::countr_zero(mask);
  broadcast(warp, instr.op[0], mask, uint64_t(leader));
  write_lanes(warp.out(instr.op[1]), mask, [=](int l) -> uint64_t { return l == leader; });
}

}  // namespace

bool decode_warp(const Opcode& opcode, Instr& instr) {
  std::string_view name = opcode.name();
  if (name == "activemask") {
    Modifiers modifier(opcode);
    modifier.required({"b32"}, "type");
    modifier.finish();
    expect_operands(opcode, instr, 1);
    instr.exec = active_mask;
    return true;
  }
  if (!(name == "shfl" || name == "vote" || name == "match" || name == "redux" || name == "elect"))
    return false;
  Modifiers modifier(opcode);
  // Without .sync they do not exist since sm_70.
  modifier.required({"sync"}, ".sync");
  size_t destinations = instr.pair ? 2 : 1;
  size_t sources = 2;
  if (name == "shfl") {
    sources = 4;
    int mode = modifier.required({"up", "down", "bfly", "idx"}, "mode");
    modifier.required({"b32"}, "type");
    instr.exec = shuffle_function(mode, instr.pair);
  } else if (name == "vote") {
    instr.attr[0] = modifier.required({"all", "any", "uni", "ballot"}, "mode");
    modifier.required({instr.attr[0] == kVoteBallot ? "b32" : "pred"}, "type");
    if (instr.pair) unknown(opcode, "two destinations");
    instr.exec = vote;
  } else if (name == "match") {
    bool all = modifier.required({"any", "all"}, "mode") == 1;
    instr.attr[0] = modifier.required({"b32", "b64"}, "type") == 1 ? 64 : 32;
    if (instr.pair && !all) unknown(opcode, "two destinations");
    instr.exec = all ? match_all : match_any;
  } else if (name == "redux") {
    instr.attr[0] = modifier.required({"add", "min", "max", "and", "or", "xor"}, "operation");
    if (instr.attr[0] >= kAnd) {
      modifier.required({"b32"}, "type");
      instr.exec = reduce<uint32_t>;
    } else {
      bool is_signed = modifier.required({"u32", "s32"}, "type") == 1;
      instr.exec = is_signed ? reduce<int32_t> : reduce<uint32_t>;
    }
    if (instr.pair) unknown(opcode, "two destinations");
  } else {
    sources = 1;
    if (!instr.pair) unknown(opcode, "one destination");
    instr.exec = elect;
  }
  modifier.finish();
  expect_operands(opcode, instr, destinations + sources);
  instr.members = int16_t(destinations + sources - 1);
  return true;
}

}  // namespace ptxsim
