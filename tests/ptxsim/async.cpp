#include "async.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <numeric>

#include "family.h"
#include "shadow.h"

namespace ptxsim {
namespace {

// Instr::attr
enum { kOnlySixteen, kSourceBytesOperand, kIgnoreOperand };

void addresses_of(const Warp& warp, const Operand& operand, Mask mask, uint64_t* address) {
  const uint64_t* row = operand.row == -1 ? nullptr : warp.in(operand);
  each_lane(mask, [&](int l) { address[l] = (row ? row[l] : 0) + uint64_t(operand.offset); });
}

// The fourth operand is the source's size or, if a predicate, whether to ignore the source.
bool is_predicate(const Operand& operand) { return operand.negated || operand.bytes == 1; }

// The lanes' sources are `bytes` long, any number up to 16: checked in powers of two.
void resolve_source(Warp& warp, const Instr& instr, Mask mask, const uint64_t* address, int bytes,
                    AsyncCopies::Copy& copy) {
  uint64_t part[kLanes] = {};
  uint8_t* host[kLanes];
  for (int done = 0; done < bytes;) {
    int step = 16;
    while (step > bytes - done || done % step != 0) step /= 2;
    each_lane(mask, [&](int l) { part[l] = address[l] + uint64_t(done); });
    resolve(warp, instr, mask, Space::kGlobal, part, step, Access::kRead, host);
    if (done == 0) each_lane(mask, [&](int l) { copy.source[l] = host[l]; });
    done += step;
  }
}

void run_copy(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t size = warp.in(instr.op[2])[std::countr_zero(mask)];
  if (size != 16 && (instr.attr[kOnlySixteen] || (size != 4 && size != 8)))
    fault(warp, instr, mask, "cp.async",
          "copies " + std::to_string(size) + " bytes: .ca takes 4, 8 or 16, .cg 16");
  const auto bytes = int(size);
  AsyncCopies::Copy copy{&instr};
  copy.waited_for = copy.to_land = mask;
  copy.bytes = bytes;

  uint64_t address[kLanes];
  uint8_t* host[kLanes] = {};
  addresses_of(warp, instr.op[0], mask, address);
  resolve(warp, instr, mask, Space::kShared, address, bytes, Access::kWrite, host);
  each_lane(mask, [&](int l) { copy.offset[l] = uint32_t(host[l] - warp.cta->shared); });

  uint64_t source_bytes[kLanes];
  std::fill_n(source_bytes, kLanes, uint64_t(bytes));
  if (instr.attr[kSourceBytesOperand] >= 0)
    std::copy_n(warp.in(instr.op[instr.attr[kSourceBytesOperand]]), kLanes, source_bytes);
  if (instr.attr[kIgnoreOperand] >= 0) {
    const Operand& predicate = instr.op[instr.attr[kIgnoreOperand]];
    const uint64_t* ignore = warp.in(predicate);
    for (int l = 0; l < kLanes; ++l)
      if ((ignore[l] != 0) != predicate.negated) source_bytes[l] = 0;
  }
  addresses_of(warp, instr.op[1], mask, address);
  Mask by_size[17] = {};
  each_lane(mask, [&](int l) {
    const Mask lane = Mask{1} << l;
    if (source_bytes[l] > uint64_t(bytes))
      fault(warp, instr, lane, "cp.async",
            "a source of " + std::to_string(source_bytes[l]) + " bytes for a copy of " +
                std::to_string(bytes));
    if (source_bytes[l] != 0 && address[l] % uint64_t(bytes) != 0)
      fault(warp, instr, lane, "misaligned",
            "a source at an address that is no multiple of the copy's " + std::to_string(bytes) +
                " bytes");
    by_size[source_bytes[l]] |= lane;
    copy.source_bytes[l] = uint8_t(source_bytes[l]);
  });
  for (int b = 1; b <= bytes; ++b)
    if (by_size[b] != 0) resolve_source(warp, instr, by_size[b], address, b, copy);

  warp.cta->shadow->begin_copy(warp, mask, copy.offset.data(), bytes);
  warp.cta->async->issue(warp, copy);
}

void run_commit(Warp& warp, const Instr&, Mask mask) { warp.cta->async->commit(warp, mask); }

void run_wait_group(Warp& warp, const Instr& instr, Mask mask) {
  warp.cta->async->wait(warp, mask, warp.in(instr.op[0])[std::countr_zero(mask)]);
}

void run_wait_all(Warp& warp, const Instr&, Mask mask) {
  warp.cta->async->commit(warp, mask);
  warp.cta->async->wait(warp, mask, 0);
}

}  // namespace

void AsyncCopies::issue(Warp& warp, Copy copy) {
  OfWarp& of = warps_[warp.index];
  copy.group = of.committed;
  const uint64_t random = random_bits(warp);
  if (random % 4 == 0) land(copy, Mask(random >> 32));
  of.copies.push_back(copy);
}

void AsyncCopies::commit(const Warp& warp, Mask lanes) {
  each_lane(lanes, [&](int l) { ++warps_[warp.index].committed[l]; });
}

void AsyncCopies::wait(Warp& warp, Mask lanes, uint64_t pending) {
  OfWarp& of = warps_[warp.index];
  // What has not landed lands now, in any order.
  std::vector<size_t> order(of.copies.size());
  std::iota(order.begin(), order.end(), size_t{0});
  uint64_t random = random_bits(warp);
  for (size_t i = order.size(); i > 1; --i) {
    random = random * 6364136223846793005u + 1442695040888963407u;
    std::swap(order[i - 1], order[(random >> 33) % i]);
  }
  auto covered = [&](const Copy& copy) {
    Mask mask = 0;
    each_lane(copy.waited_for & lanes, [&](int l) {
      if (copy.group[l] + pending < of.committed[l]) mask |= Mask{1} << l;
    });
    return mask;
  };
  for (size_t i : order) land(of.copies[i], covered(of.copies[i]));
  size_t left = 0;
  for (Copy& copy : of.copies) {
    const Mask now = covered(copy);
    if (now != 0) {
      cta_.shadow->end_copy(warp, *copy.instr, now, copy.offset.data(), copy.bytes);
      copy.waited_for &= ~now;
    }
    if (copy.waited_for != 0) of.copies[left++] = copy;
  }
  of.copies.resize(left);
}

void AsyncCopies::land(Copy& copy, Mask lanes) {
  lanes &= copy.to_land;
  copy.to_land &= ~lanes;
  each_lane(lanes, [&](int l) {
    uint8_t* to = cta_.shared + copy.offset[l];
    std::memcpy(to, copy.source[l], copy.source_bytes[l]);
    std::memset(to + copy.source_bytes[l], 0, size_t(copy.bytes - copy.source_bytes[l]));
  });
}

void AsyncCopies::stir(uint64_t random) {
  OfWarp& of = warps_[random % warps_.size()];
  if (of.copies.empty()) return;
  land(of.copies[(random >> 16) % of.copies.size()], Mask(random >> 32));
}

void AsyncCopies::exited(Warp& warp, const Instr& instr, Mask lanes) const {
  for (const Copy& copy : warps_[warp.index].copies) {
    const Mask lost = copy.waited_for & lanes;
    if (lost != 0)
      fault(warp, instr, lost, "cp.async",
            "a thread exits while a copy of its own is under way: " +
                place(warp, *copy.instr, lost) + " has no cp.async.wait_group that covers it");
  }
}

bool decode_async(const Opcode& opcode, Instr& instr) {
  if (opcode.name() != "cp" || opcode.part.size() < 2 || opcode.part[1] != "async") return false;
  Modifiers modifiers(opcode);
  modifiers.take("async");
  if (modifiers.take("commit_group") || modifiers.take("wait_all")) {
    modifiers.finish();
    expect_operands(opcode, instr, 0);
    instr.exec = opcode.part[2] == "wait_all" ? run_wait_all : run_commit;
    return true;
  }
  if (modifiers.take("wait_group")) {
    modifiers.finish();
    expect_operands(opcode, instr, 1);
    instr.exec = run_wait_group;
    return true;
  }
  const int cache = modifiers.required({"ca", "cg"}, "cache operator");
  modifiers.required({"shared", "shared::cta"}, "destination space");
  modifiers.required({"global"}, "source space");
  const bool policy = modifiers.take("L2::cache_hint");
  modifiers.one_of({"L2::64B", "L2::128B", "L2::256B"});
  modifiers.finish();
  expect_operands(opcode, instr, policy ? 4 : 3, policy ? 5 : 4);
  instr.exec = run_copy;
  instr.attr[kOnlySixteen] = cache == 1;
  instr.attr[kSourceBytesOperand] = instr.attr[kIgnoreOperand] = -1;
  if (instr.op.size() == (policy ? 5u : 4u))
    instr.attr[is_predicate(instr.op[3]) ? kIgnoreOperand : kSourceBytesOperand] = 3;
  return true;
}

}  // namespace ptxsim
