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
  while (a != b) (a > b ? a : b) >>= 1;
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

// Reads by lanes of one warp that nothing orders are kept as one, by all of them.
Shadow::Stamp Shadow::merged(Stamp before, const Actor& actor) const {
  if (ordered(before, actor)) return actor.stamp;
  return (actor.stamp & ~kWho) | common_group(before & kWho, actor.stamp & kWho);
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
bool Shadow::same_value(uint32_t at, int bytes, int other, const Actor& actor) const {
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
  for (uint32_t b = at; b < at + uint32_t(bytes); ++b)
    if (b - actor.offset[other] < uint32_t(actor.bytes) && value(actor.lane, b) != value(other, b))
      return false;
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
    const int bytes = actor.bytes == 16 ? 16 : actor.bytes >= 4 ? 4 : 1;
    if (other >= 0 && same_value(at, bytes, other, actor)) return;
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
  mine = merged(mine, actor);
  layer.read[cell] = actor.stamp;
}

void Shadow::check_cell(int index, size_t cell, const Actor& actor) {
  Layer& layer = layers_[index];
  const Stamp before = layer.write[cell];
  if (before == kStrong) return check_strong(cell, actor);
  if (before == kSplit) {
    for (size_t part = cell * 4; part < cell * 4 + 4; ++part) check_cell(index + 1, part, actor);
    if (actor.access == Access::kRead)
      join(index, cell);
    else
      layer.write[cell] = actor.stamp;
    return;
  }
  const auto at = uint32_t(cell << layer.shift);
  check_write_stamp(before, at, actor);
  if (actor.access == Access::kRead) {
    note_read(layer, cell, actor);
  } else {
    check_readers(layer, cell, at, actor);
    layer.write[cell] = actor.stamp;
  }
}

// The first strong access of a word: what came before counts as plain.
void Shadow::enter_strong(size_t word, Strong& state, const Actor& actor) {
  state.write.assign(warps_, 0);
  state.read.assign(warps_, 0);
  state.released.assign(warps_, 0);
  Layer &words = layers_[kWords], &bytes = layers_[kBytes];
  state.plain = words.write[word];
  if (state.plain == kSplit) {
    state.plain = 0;
    for (size_t b = word * 4; b < word * 4 + 4; ++b) {
      check_write_stamp(bytes.write[b], uint32_t(b), actor);
      if (actor.access != Access::kRead) check_readers(bytes, b, uint32_t(b), actor);
      if (bytes.write[b] != kUnwritten) state.plain = std::max(state.plain, bytes.write[b]);
      words.read[word] = std::max(words.read[word], bytes.read[b]);
      for (int v = 0; v < warps_; ++v)
        words.by_warp[v][word] = std::max(words.by_warp[v][word], bytes.by_warp[v][b]);
    }
  } else {
    check_write_stamp(state.plain, uint32_t(word * 4), actor);
    if (state.plain == kUnwritten) state.plain = 0;
  }
  words.write[word] = kStrong;
}

void Shadow::check_strong(size_t word, const Actor& actor) {
  const int u = actor.warp.index;
  const auto at = uint32_t(word * 4);
  Layer& words = layers_[kWords];
  Strong& state = strong_[word];
  if (words.write[word] != kStrong) enter_strong(word, state, actor);
  if (!ordered(state.plain, actor)) race(state.plain, true, at, actor);
  const bool reads = actor.access != Access::kWrite, writes = actor.access != Access::kRead;
  if (writes) check_readers(words, word, at, actor);
  if (!actor.strong) {
    for (Stamp before : state.write)
      if (!ordered(before, actor)) race(before, true, at, actor);
    if (!writes) return note_read(words, word, actor);
    for (Stamp before : state.read)
      if (!ordered(before, actor)) race(before, false, at, actor);
    words.write[word] = actor.stamp;
    strong_.erase(word);
    return;
  }
  Stamp& mine = writes ? state.write[u] : state.read[u];
  mine = merged(mine, actor);
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
