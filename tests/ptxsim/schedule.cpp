// One warp: groups of lanes that are at the same instruction, the lowest first.
#include <algorithm>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "execute.h"
#include "module.h"

namespace ptxsim {
namespace {

Mask ballot(const uint64_t* row) {
  Mask mask = 0;
#ifdef __AVX2__
  for (int i = 0; i < kLanes / 4; ++i) {
    __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + 4 * i));
    mask |= Mask(_mm256_movemask_pd(_mm256_castsi256_pd(_mm256_slli_epi64(v, 63)))) << (4 * i);
  }
#else
  for (int l = 0; l < kLanes; ++l) mask |= Mask(row[l] & 1) << l;
#endif
  return mask;
}

}  // namespace

WarpRunner::WarpRunner(Cta& cta)
    : cta_(cta),
      code_(cta.launch->kernel->code.data()),
      last_(int32_t(cta.launch->kernel->code.size()) - 1),
      limit_(cta.launch->instruction_limit) {}

// Takes the group that runs next out of the warp's list.
WarpRunner::Choice WarpRunner::choose(Warp& warp, Group& group) {
  auto& groups = warp.groups;
  for (Group& g : groups)
    if (g.ready != nullptr && g.ready(warp, *g.at, g.mask, g.token)) {
      g.ready = nullptr;
      g.at = nullptr;
    }
  size_t best = groups.size(), runnable = 0;
  for (size_t i = 0; i < groups.size(); ++i) {
    if (groups[i].at != nullptr) continue;
    ++runnable;
    if (best == groups.size() || groups[i].pc < groups[best].pc) best = i;
  }
  if (runnable == 0) return kNone;
  Choice choice = kLowest;
  if (runnable > 1 && (++turns_ & 63) == 0) {
    // Lanes that spin at a low pc must not keep the others from what they wait for.
    choice = kOutOfTurn;
    size_t skip = cta_.random() % runnable;
    for (size_t i = 0; i < groups.size(); ++i)
      if (groups[i].at == nullptr && skip-- == 0) {
        best = i;
        break;
      }
  }
  group = groups[best];
  groups[best] = groups.back();
  groups.pop_back();
  return choice;
}

// Lanes that are at the same instruction, and not waiting for something else, go on together.
void WarpRunner::merge(Warp& warp, Group& group) {
  auto& groups = warp.groups;
  for (size_t i = groups.size(); i-- > 0;) {
    if (groups[i].pc != group.pc || groups[i].ready != nullptr) continue;
    group.mask |= groups[i].mask;
    groups[i] = groups.back();
    groups.pop_back();
  }
}

bool WarpRunner::others_first(const Warp& warp, const Group& group) const {
  return std::any_of(warp.groups.begin(), warp.groups.end(),
                     [&](const Group& g) { return g.at == nullptr && g.pc < group.pc; });
}

Mask WarpRunner::arrived(Warp& warp, const Instr& instr, Mask active) {
  if (instr.members == -2) return active == (kAll & ~warp.exited) ? active : 0;
  const uint64_t* named = warp.in(instr.op[size_t(instr.members)]);
  Mask here = 0;
  for (Mask left = active; left != 0;) {
    int first = std::countr_zero(left);
    Mask members = Mask(named[first]);
    Mask same = 0;
    each_lane(left, [&](int l) { same |= Mask(Mask(named[l]) == members) << l; });
    left &= ~same;
    if (same & ~members)
      fault(warp, instr, same & ~members, "divergence",
            "lanes run an instruction for the lanes of a mask that does not name themselves");
    if ((members & ~warp.exited) == same) here |= same;
  }
  return here;
}

void WarpRunner::leave(Warp& warp, const Instr& instr, Group& group, Mask lanes) {
  warp.exited |= lanes;
  group.mask &= ~lanes;
  for (Group& g : warp.groups)  // those that wait for partners look again who is left
    if (g.ready == nullptr) g.at = nullptr;
  lanes_exited(warp, instr, lanes);
}

void WarpRunner::branch_indexed(Warp& warp, const Instr& instr, Group& group, Mask active) {
  const auto& table = cta_.launch->kernel->branch_tables[size_t(instr.attr[0])];
  const uint64_t* index = warp.in(instr.op[0]);
  if (group.mask != active) warp.groups.push_back({group.mask & ~active, group.pc + 1});
  for (Mask left = active; left != 0;) {
    uint32_t value = uint32_t(index[std::countr_zero(left)]);
    Mask same = 0;
    each_lane(left, [&](int l) { same |= Mask(uint32_t(index[l]) == value) << l; });
    if (value >= table.size())
      fault(warp, instr, same, "branch",
            "index " + std::to_string(value) + " of " + std::to_string(table.size()) + " targets");
    left &= ~same;
    if (left != 0)
      warp.groups.push_back({same, table[value]});
    else
      group = {same, table[value]};
  }
}

void WarpRunner::returns(Warp& warp, const Instr& instr, Group& group, Mask active) {
  const uint64_t* back = warp.row(int32_t(instr.attr[0]));
  if (group.mask != active) warp.groups.push_back({group.mask & ~active, group.pc + 1});
  for (Mask left = active; left != 0;) {
    uint64_t to = back[std::countr_zero(left)];
    Mask same = 0;
    each_lane(left, [&](int l) { same |= Mask(back[l] == to) << l; });
    left &= ~same;
    if (left != 0)
      warp.groups.push_back({same, int32_t(to)});
    else
      group = {same, int32_t(to)};
  }
}

// Moves the group to where it goes on. False: nobody of it is left.
bool WarpRunner::control(Warp& warp, const Instr& instr, Group& group, Mask active) {
  if (active == 0) {
    ++group.pc;
    return true;
  }
  switch (instr.control) {
    case Instr::kBranch:
      if (group.mask != active) warp.groups.push_back({group.mask & ~active, group.pc + 1});
      group.mask = active;
      group.pc = int32_t(instr.op[0].offset);
      return true;
    case Instr::kCall: {
      uint64_t* back = warp.row(int32_t(instr.attr[1]));
      each_lane(active, [&](int l) { back[l] = uint64_t(group.pc + 1); });
      if (group.mask != active) warp.groups.push_back({group.mask & ~active, group.pc + 1});
      group.mask = active;
      group.pc = int32_t(instr.attr[0]);
      return true;
    }
    case Instr::kBranchIndexed:
      branch_indexed(warp, instr, group, active);
      return true;
    case Instr::kReturn:
      returns(warp, instr, group, active);
      return true;
    default:
      leave(warp, instr, group, active);
      ++group.pc;
      return group.mask != 0;
  }
}

bool WarpRunner::run(Warp& warp, int budget) {
  bool progress = false;
  Group group;
  while (budget > 0) {
    Choice choice = choose(warp, group);
    if (choice == kNone) break;
    merge(warp, group);
    bool alone = warp.groups.empty();
    bool keep = true;  // the group is still there, and may go on
    while (keep && budget-- > 0) {
      const Instr& instr = code_[group.pc];
      Mask active = group.mask;
      if (instr.guard >= 0) {
        Mask holds = ballot(warp.row(instr.guard));
        active &= instr.guard_negated ? ~holds : holds;
      }
      if (instr.members != -1 && active != 0) {
        Mask here = arrived(warp, instr, active);
        if (here != active) {  // the others wait; those that may go on do
          warp.groups.push_back({active & ~here, group.pc, nullptr, 0, &instr});
          group.mask &= ~(active & ~here);
          active = here;
          progress |= group.mask != 0;
          if (group.mask == 0) {
            keep = false;
            break;
          }
          alone = false;
        }
      }
      progress = true;
      if (active != 0) {
        cta_.counters.instructions[size_t(instr.counter)] += 1;
        cta_.counters.lanes[size_t(instr.counter)] += uint64_t(std::popcount(active));
        cta_.counters.mma_flops += uint64_t(instr.flops);
      }
      ++cta_.executed;
      if (instr.control == Instr::kNone) [[likely]] {
        if (active != 0) instr.exec(warp, instr, active);
        ++group.pc;
        if (warp.waiting != nullptr) [[unlikely]] {
          warp.groups.push_back({active, group.pc, warp.waiting, warp.waiting_token, &instr});
          warp.waiting = nullptr;
          group.mask &= ~active;
          budget = 0;  // another warp's turn
          if (group.mask == 0) keep = false;
          alone = false;
        }
        if (warp.yields) [[unlikely]] {
          warp.yields = false;
          budget = 0;
        }
      } else {
        keep = control(warp, instr, group, active);
        alone = warp.groups.empty();
      }
      if (!alone && keep) {
        merge(warp, group);
        alone = warp.groups.empty();
        if (!alone && choice == kLowest && others_first(warp, group)) break;
      }
    }
    if (keep) warp.groups.push_back(group);
    if (cta_.executed > limit_) [[unlikely]]
      fault(warp, code_[std::min(group.pc, last_)], group.mask, "runaway",
            "a thread block has run " + std::to_string(limit_) + " instructions of its warps");
  }
  return progress;
}

}  // namespace ptxsim
