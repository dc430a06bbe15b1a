// The comparison of one access with what a cell of shared memory has been through, where the one
// comparison of shadow.cpp did not settle it.
#include <algorithm>
#include <bit>

#include "shadow.h"

namespace ptxsim {
namespace {

constexpr int32_t kWho = 63;  // the bits of a stamp that say which lanes

int depth(int node) { return std::bit_width(unsigned(node)); }

// The smallest group that holds both.
int common_group(int a, int b) {
  while (a != b) {
    if (depth(a) >= depth(b) && a > b)
      a >>= 1;
    else
      b >>= 1;
  }
  return a;
}

Mask lanes_of(int node) {
  const int width = 1 << (6 - depth(node));  // lanes in the group
  const int first = node * width - kLanes;
  return (width == kLanes ? kAll : (Mask{1} << width) - 1) << first;
}

const char* verb(Access access) {
  return access == Access::kRead ? "reads" : access == Access::kWrite ? "writes" : "updates";
}

}  // namespace

Shadow::Stamp Shadow::merged(Stamp before, Stamp now, int warp) const {
  if (before >> 6 <= known(warp, warp)) return now;
  return (now & ~kWho) | common_group(before & kWho, now & kWho);
}

bool Shadow::ordered(Stamp before, const Actor& actor) const {
  const int32_t id = before >> 6;
  const int u = actor.warp.index;
  if (before <= floor_[u]) return true;
  const int v = done_[id].warp;
  if (id <= known(u, v)) return true;
  if (v != u) return false;
  // The same warp, since its lanes were last in order.
  const int past = before & kWho, now = actor.stamp & kWho;
  if (past == now && past >= kLanes) return true;  // one lane
  const std::vector<int32_t>& order = lanes_[u];
  if (order.empty()) return false;
  bool all = true;
  each_lane(lanes_of(now), [&](int a) {
    each_lane(lanes_of(past), [&](int b) { all &= a == b || order[a * kLanes + b] >= id; });
  });
  return all;
}

std::string Shadow::place_of(Stamp stamp) const {
  const Done& done = done_[stamp >> 6];
  return place(cta_.warps[done.warp], *done.instr, lanes_of(stamp & kWho));
}

void Shadow::race(Stamp before, bool wrote, uint32_t at, const Actor& actor) const {
  const bool same_warp = done_[before >> 6].warp == actor.warp.index;
  fault(actor.warp, actor.instr, lanes_of(actor.stamp & kWho), "race",
        std::string(verb(actor.access)) + " " + shared_name(actor.warp, at) + ", which " +
            place_of(before) + (wrote ? " wrote" : " read") +
            (same_warp ? ", and no bar.warp.sync or barrier comes between the two lanes"
                       : ", and no barrier orders the two"));
}

// The bytes that st has for address `at`: two lanes may write one address with one value.
bool Shadow::same_value(uint32_t at, int lane, int other, const Actor& actor) const {
  const Instr& instr = actor.instr;
  if (!instr.text.starts_with("st.") || instr.op.size() < 2) return false;
  const Operand& source = instr.op[1];
  const bool vector = source.kind == Operand::kVector;
  const int element = vector ? actor.bytes / int(source.items.size()) : actor.bytes;
  auto value = [&](int l, uint32_t address) {
    const int byte = int(address - actor.offset[l]);
    const Operand& item = vector ? source.items[byte / element] : source;
    return uint8_t(actor.warp.in(item)[l] >> (byte % element * 8));
  };
  for (uint32_t b = at; b < at + 4; ++b) {
    if (b - actor.offset[lane] >= uint32_t(actor.bytes)) continue;
    if (b - actor.offset[other] >= uint32_t(actor.bytes)) continue;
    if (value(lane, b) != value(other, b)) return false;
  }
  return true;
}

// The last write of a cell against this access.
void Shadow::check_write_stamp(Stamp before, uint32_t at, const Actor& actor) const {
  if (before == kUnwritten) {
    if (actor.access != Access::kWrite)
      fault(actor.warp, actor.instr, lanes_of(actor.stamp & kWho), "uninitialized",
            "reads " + shared_name(actor.warp, at) + ", which nobody has written");
    return;
  }
  if ((before & kPending) != 0) {
    const Stamp copy = before & ~kPending;
    fault(actor.warp, actor.instr, lanes_of(actor.stamp & kWho), "cp.async",
          std::string(verb(actor.access)) + " " + shared_name(actor.warp, at) +
              " while a copy to it is under way: " + place_of(copy) +
              " issued it and has not waited for it (cp.async.wait_group)");
  }
  if (before >> 6 == actor.stamp >> 6) {
    const int other = (before & kWho) - kLanes;
    if (actor.strong || before == actor.stamp) return;
    if (other >= 0 && same_value(at, actor.lane, other, actor)) return;
    fault(actor.warp, actor.instr, lanes_of(actor.stamp & kWho) | lanes_of(before & kWho), "race",
          "writes " + shared_name(actor.warp, at) + " from two lanes with different values");
  }
  if (!ordered(before, actor)) race(before, true, at, actor);
}

void Shadow::check_readers(const Layer& layer, size_t cell, uint32_t at, const Actor& actor) const {
  if (layer.read[cell] <= floor_[actor.warp.index]) return;
  for (int v = 0; v < warps_; ++v) {
    const Stamp before = layer.by_warp[v][cell];
    if (!ordered(before, actor)) race(before, false, at, actor);
  }
}

void Shadow::note_read(Layer& layer, size_t cell, const Actor& actor) {
  Stamp& mine = layer.by_warp[actor.warp.index][cell];
  mine = merged(mine, actor.stamp, actor.warp.index);
  layer.read[cell] = actor.stamp;
}

void Shadow::check_cell(Layer& layer, size_t cell, const Actor& actor) {
  const auto at = uint32_t(&layer == &words_ ? cell * 4 : cell);
  check_write_stamp(layer.write[cell], at, actor);
  if (actor.access == Access::kRead) {
    note_read(layer, cell, actor);
  } else {
    check_readers(layer, cell, at, actor);
    layer.write[cell] = actor.stamp;
  }
}

void Shadow::check_cells(Layer& layer, size_t cell, int cells, const Actor& actor) {
  for (size_t c = cell; c < cell + cells; ++c) {
    if (&layer == &bytes_) {
      check_cell(layer, c, actor);
    } else if (words_.write[c] == kStrong) {
      check_strong(c, actor);
    } else if (words_.write[c] == kSplit) {
      for (size_t b = c * 4; b < c * 4 + 4; ++b) check_cell(bytes_, b, actor);
      if (actor.access == Access::kRead)
        join(c);
      else
        words_.write[c] = actor.stamp;
    } else {
      check_cell(words_, c, actor);
    }
  }
}

// A word whose bytes no longer differ in what matters goes back to one stamp.
void Shadow::join(size_t word) {
  const Stamp past = *std::min_element(floor_.begin(), floor_.end());
  auto joined = [past](const Stamp* bytes, Stamp& stamp) {
    stamp = *std::max_element(bytes, bytes + 4);
    for (int b = 0; b < 4; ++b)
      if (bytes[b] != stamp && bytes[b] > past) return false;
    return stamp <= past || *std::min_element(bytes, bytes + 4) == stamp;
  };
  Stamp write, stamp;
  if (!joined(bytes_.write.get() + word * 4, write) || (write & kPending) != 0) return;
  std::vector<Stamp> read(warps_);
  for (int v = 0; v < warps_; ++v)
    if (!joined(bytes_.by_warp[v].get() + word * 4, read[v])) return;
  for (int v = 0; v < warps_; ++v) words_.by_warp[v][word] = read[v];
  joined(bytes_.read.get() + word * 4, stamp);
  words_.read[word] = stamp;
  words_.write[word] = write;
}

// The first strong access of a word: what came before counts as plain.
void Shadow::enter_strong(size_t word, Strong& state, const Actor& actor) {
  state.write.assign(warps_, 0);
  state.read.assign(warps_, 0);
  state.released.assign(warps_, 0);
  if (words_.write[word] == kSplit) {
    Stamp latest = 0;
    for (size_t b = word * 4; b < word * 4 + 4; ++b) {
      check_write_stamp(bytes_.write[b], uint32_t(b), actor);
      if (actor.access != Access::kRead) check_readers(bytes_, b, uint32_t(b), actor);
      if (bytes_.write[b] != kUnwritten) latest = std::max(latest, bytes_.write[b]);
      words_.read[word] = std::max(words_.read[word], bytes_.read[b]);
      for (int v = 0; v < warps_; ++v)
        words_.by_warp[v][word] = std::max(words_.by_warp[v][word], bytes_.by_warp[v][b]);
    }
    state.plain = latest;
  } else {
    state.plain = words_.write[word];
  }
  check_write_stamp(state.plain, uint32_t(word * 4), actor);
  if (state.plain == kUnwritten) state.plain = 0;
  words_.write[word] = kStrong;
}

void Shadow::check_strong(size_t word, const Actor& actor) {
  const int u = actor.warp.index;
  const auto at = uint32_t(word * 4);
  Strong& state = strong_[word];
  if (words_.write[word] != kStrong) enter_strong(word, state, actor);
  if (!ordered(state.plain, actor)) race(state.plain, true, at, actor);
  const bool reads = actor.access != Access::kWrite, writes = actor.access != Access::kRead;
  if (writes) check_readers(words_, word, at, actor);
  if (!actor.strong) {
    for (Stamp before : state.write)
      if (!ordered(before, actor)) race(before, true, at, actor);
    if (!writes) return note_read(words_, word, actor);
    for (Stamp before : state.read)
      if (!ordered(before, actor)) race(before, false, at, actor);
    words_.write[word] = actor.stamp;
    strong_.erase(word);
    return;
  }
  Stamp& mine = writes ? state.write[u] : state.read[u];
  mine = merged(mine, actor.stamp, u);
  const std::string_view text = actor.instr.text;
  const bool both = text.find(".acq_rel") != text.npos;
  if (writes && (both || text.find(".release") != text.npos)) {
    for (int v = 0; v < warps_; ++v) state.released[v] = std::max(state.released[v], known(u, v));
    state.released[u] = actor.stamp >> 6;
  }
  if (reads && (both || text.find(".acquire") != text.npos)) {
    for (int v = 0; v < warps_; ++v)
      if (v != u) known(u, v) = std::max(known(u, v), state.released[v]);
    set_floor(u);
  }
}

}  // namespace ptxsim
