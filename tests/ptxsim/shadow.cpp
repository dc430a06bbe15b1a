#include "shadow.h"

#include <algorithm>
#include <cstring>

namespace ptxsim {
namespace {

constexpr size_t kForgetAt = size_t{1} << 18;  // ids: 4 MB of Done
constexpr int32_t kAncient = 1;                // the id of what forget() dropped

// ld.volatile, st.relaxed, ...: accesses that may meet each other unordered. The qualifier follows
// the first dot.
bool is_strong(const Instr& instr) {
  std::string_view text = instr.text;
  if (text.size() < 6 || text[2] != '.') return false;
  text.remove_prefix(3);
  return text.starts_with("vol") || text.starts_with("rel") || text.starts_with("acq") ||
         text.starts_with("mmio");
}

}  // namespace

void Shadow::Layer::create(size_t bytes, int warps) {
  cells = (bytes + 15) / 16 << (4 - shift);
  write = std::make_unique<Stamp[]>(cells);
  std::fill_n(write.get(), cells, kUnwritten);
  read = std::make_unique<Stamp[]>(cells);
  for (int w = 0; w < warps; ++w) by_warp.push_back(std::make_unique<Stamp[]>(cells));
}

Shadow::Shadow(Cta& cta)
    : cta_(cta),
      warps_(int(cta.warps.size())),
      done_(kAncient + 1, Done{nullptr, -1}),
      known_(size_t(warps_) * warps_, kAncient),
      last_(warps_, kAncient),
      floor_(warps_, kAncient << 6 | 63),
      barrier_(16, std::vector<int32_t>(warps_, 0)),
      lanes_(warps_) {
  for (int l = kChunks; l <= kBytes; ++l) layers_[l].shift = 4 - 2 * l;
  layers_[kChunks].create(cta.shared_bytes, warps_);
}

Shadow::~Shadow() = default;

Shadow::Stamp Shadow::next(const Warp& warp, const Instr& instr) {
  if (done_.size() >= kForgetAt && (done_.size() & (kForgetAt / 4 - 1)) == 0) forget();
  if (done_.size() >= (size_t{1} << kIdBits) - 1)
    throw std::runtime_error(
        "a thread block made 2^24 accesses to shared memory while some of its warps never met at a "
        "barrier: run it with a smaller problem");
  auto id = int32_t(done_.size());
  done_.push_back({&instr, warp.index});
  last_[warp.index] = id;
  return id << 6;
}

template <int Cells, int Shift>
void Shadow::read_cells(Layer& layer, Mask mask, Actor& actor, Stamp all_lanes) {
  const Stamp first = actor.stamp;
  const int u = actor.warp.index;
  const Stamp floor = floor_[u], own = known(u, u) << 6 | 63;
  const Stamp* write = layer.write.get();
  Stamp *read = layer.read.get(), *mine = layer.by_warp[u].get();
  const uint32_t* offset = actor.offset;
  each_lane(mask, [&](int l) {
    const Stamp stamp = all_lanes != 0 ? first | all_lanes : first | 32 | l;
    for (size_t cell = offset[l] >> Shift, end = cell + Cells; cell < end; ++cell) {
      // Reads by several lanes since they were last in order are merged.
      const bool shared = mine[cell] > own && ((mine[cell] ^ stamp) & 63) != 0;
      if (write[cell] > floor || shared) [[unlikely]] {
        actor.lane = l;
        actor.stamp = stamp;
        check_cell(int(&layer - layers_.data()), cell, actor);
      } else {
        mine[cell] = stamp;
        read[cell] = stamp;
      }
    }
  });
}

template <int Cells, int Shift>
void Shadow::write_cells(Layer& layer, Mask mask, Actor& actor, Stamp all_lanes) {
  const Stamp first = actor.stamp;
  const Stamp floor = floor_[actor.warp.index];
  Stamp* write = layer.write.get();
  const Stamp* read = layer.read.get();
  const uint32_t* offset = actor.offset;
  each_lane(mask, [&](int l) {
    const Stamp stamp = all_lanes != 0 ? first | all_lanes : first | 32 | l;
    for (size_t cell = offset[l] >> Shift, end = cell + Cells; cell < end; ++cell) {
      // A cell that another lane of this instruction wrote is above the floor too.
      if (write[cell] > floor || read[cell] > floor) [[unlikely]] {
        actor.lane = l;
        actor.stamp = stamp;
        check_cell(int(&layer - layers_.data()), cell, actor);
      } else {
        write[cell] = stamp;
      }
    }
  });
}

template <int Cells, int Shift>
void Shadow::access_cells(int layer, Mask mask, Actor& actor, Stamp all_lanes) {
  if (layer != kChunks) mask = open(layer, mask, actor);
  if (actor.access == Access::kRead)
    read_cells<Cells, Shift>(layers_[layer], mask, actor, all_lanes);
  else
    write_cells<Cells, Shift>(layers_[layer], mask, actor, all_lanes);
}

void Shadow::access(Warp& warp, const Instr& instr, Mask mask, const uint32_t* offset, int bytes,
                    Access access) {
  const bool strong = access == Access::kAtomic || is_strong(instr);
  Actor actor{warp, instr, access, strong, offset, bytes, 0, next(warp, instr)};
  // The lane that gives a matrix row's address is not the one that gets or supplies its values.
  const Stamp all_lanes =
      instr.text.starts_with("ldmatrix") || instr.text.starts_with("stmatrix") ? 1 : 0;
  if (strong) {
    open(kWords, mask, actor);
    const Stamp first = actor.stamp;
    each_lane(mask, [&](int l) {
      actor.lane = l;
      actor.stamp = first | 32 | l;
      for (uint32_t at = offset[l] & ~3u; at < offset[l] + bytes; at += 4)
        check_strong(at / 4, actor);
    });
    return;
  }
  switch (bytes) {
    case 16:
      return access_cells<1, 4>(kChunks, mask, actor, all_lanes);
    case 8:
      return access_cells<2, 2>(kWords, mask, actor, all_lanes);
    case 4:
      return access_cells<1, 2>(kWords, mask, actor, all_lanes);
    case 2:
      return access_cells<2, 0>(kBytes, mask, actor, all_lanes);
    case 1:
      return access_cells<1, 0>(kBytes, mask, actor, all_lanes);
    default:
      throw std::logic_error("an access of " + std::to_string(bytes) + " bytes");
  }
}

// Makes sure that the cells which the lanes access in a layer are in use. A strong word is dealt
// with as a whole; returns the lanes whose access remains.
Mask Shadow::open(int layer, Mask mask, const Actor& actor) {
  Mask remaining = mask;
  for (int l = kWords; l <= layer; ++l)
    if (layers_[l].cells == 0) layers_[l].create(cta_.shared_bytes, warps_);
  const Stamp* chunks = layers_[kChunks].write.get();
  const uint32_t* offset = actor.offset;
  bool whole = false;
  each_lane(mask, [&](int l) { whole |= chunks[offset[l] / 16] != kSplit; });
  if (whole)
    each_lane(mask, [&](int l) {
      if (chunks[offset[l] / 16] != kSplit) split(kChunks, offset[l] / 16);
    });
  if (layer == kWords) return mask;
  each_lane(mask, [&](int l) {
    const uint32_t at = offset[l];
    const Stamp word = layers_[kWords].write[at / 4];
    if (word == kStrong) {
      Actor one = actor;
      one.lane = l;
      one.stamp |= 32 | l;
      check_strong(at / 4, one);
      remaining &= ~(Mask{1} << l);
    } else if (word != kSplit) {
      split(kWords, at / 4);
    }
  });
  return remaining;
}

// The cells of a copy's destination have just been written, so they are not split.
Shadow::Layer& Shadow::layer_of(int bytes) { return layers_[bytes == 16 ? kChunks : kWords]; }

void Shadow::begin_copy(const Warp& warp, Mask lanes, const uint32_t* offset, int bytes) {
  const Stamp first = last_[warp.index] << 6 | kPending;
  Layer& layer = layer_of(bytes);
  each_lane(lanes, [&](int l) {
    std::fill_n(&layer.write[offset[l] >> layer.shift], bytes >> layer.shift, first | 32 | l);
  });
}

void Shadow::end_copy(const Warp& warp, const Instr& copy, Mask lanes, const uint32_t* offset,
                      int bytes) {
  const Stamp first = next(warp, copy);
  Layer& layer = layer_of(bytes);
  each_lane(lanes, [&](int l) {
    std::fill_n(&layer.write[offset[l] >> layer.shift], bytes >> layer.shift, first | 32 | l);
  });
}

void Shadow::sync_lanes(const Warp& warp, Mask lanes) {
  const int u = warp.index;
  const auto now = int32_t(done_.size() - 1);
  if ((lanes | warp.exited) == kAll) {
    known(u, u) = now;
    set_floor(u);
    return;
  }
  std::vector<int32_t>& order = lanes_[u];
  if (order.empty()) order.assign(kLanes * kLanes, 0);
  int32_t joint[kLanes] = {};
  each_lane(lanes, [&](int a) {
    for (int b = 0; b < kLanes; ++b) joint[b] = std::max(joint[b], order[a * kLanes + b]);
  });
  each_lane(lanes, [&](int b) { joint[b] = now; });
  each_lane(lanes, [&](int a) { std::copy_n(joint, kLanes, order.begin() + a * kLanes); });
}

void Shadow::arrive(const Warp& warp, int barrier) {
  std::vector<int32_t>& into = barrier_[barrier];
  for (int v = 0; v < warps_; ++v) into[v] = std::max(into[v], known(warp.index, v));
  into[warp.index] = int32_t(done_.size() - 1);
}

void Shadow::complete(int barrier, uint32_t waiting_warps) {
  std::vector<int32_t>& from = barrier_[barrier];
  // They have done nothing since they arrived.
  for (int u = 0; u < warps_; ++u)
    if (waiting_warps >> u & 1) from[u] = int32_t(done_.size() - 1);
  for (int u = 0; u < warps_; ++u) {
    if (!(waiting_warps >> u & 1)) continue;
    for (int v = 0; v < warps_; ++v) known(u, v) = std::max(known(u, v), from[v]);
  }
  for (int u = 0; u < warps_; ++u)
    if (waiting_warps >> u & 1) set_floor(u);
  std::fill(from.begin(), from.end(), 0);
}

void Shadow::set_floor(int u) {
  auto floor = int32_t(done_.size() - 1);
  for (int v = 0; v < warps_; ++v)
    if (last_[v] > known(u, v)) floor = std::min(floor, known(u, v));
  floor_[u] = std::max(floor, kAncient) << 6 | 63;
}

void Shadow::forget() {
  Stamp dropped = *std::min_element(floor_.begin(), floor_.end());
  // The place of a copy under way is still wanted.
  for (const Layer& layer : layers_)
    for (size_t c = 0; c < layer.cells; ++c) {
      const Stamp stamp = layer.write[c];
      if (stamp < kStrong && (stamp & kPending) != 0)
        dropped = std::min(dropped, (stamp & ~kPending) - 64);
    }
  const int32_t shift = (dropped >> 6) - kAncient;
  if (shift < int32_t(done_.size() / 4)) return;
  auto id = [&](int32_t& value) { value = std::max(value - shift, value == 0 ? 0 : kAncient); };
  auto stamps = [&](Stamp* cells, size_t count) {
    for (size_t c = 0; c < count; ++c) {
      if (cells[c] >= kStrong || cells[c] == 0) continue;
      const Stamp flag = cells[c] & kPending;
      const Stamp value = cells[c] & ~kPending;
      cells[c] = (std::max((value >> 6) - shift, kAncient) << 6 | (value & 63)) | flag;
    }
  };
  for (Layer& layer : layers_) {
    stamps(layer.write.get(), layer.cells);
    stamps(layer.read.get(), layer.cells);
    for (auto& cells : layer.by_warp) stamps(cells.get(), layer.cells);
  }
  for (auto& [word, state] : strong_) {
    stamps(state.write.data(), state.write.size());
    stamps(state.read.data(), state.read.size());
    stamps(&state.plain, 1);
    for (int32_t& value : state.released) id(value);
  }
  for (int32_t& value : known_) id(value);
  for (int32_t& value : last_) id(value);
  stamps(floor_.data(), floor_.size());
  for (auto& barrier : barrier_)
    for (int32_t& value : barrier) id(value);
  for (auto& order : lanes_)
    for (int32_t& value : order) id(value);
  done_.erase(done_.begin() + kAncient + 1, done_.begin() + kAncient + 1 + shift);
}

void Shadow::split(int layer, size_t cell) {
  Layer &from = layers_[layer], &to = layers_[layer + 1];
  auto four = [cell](const std::unique_ptr<Stamp[]>& whole, std::unique_ptr<Stamp[]>& parts) {
    std::fill_n(&parts[cell * 4], 4, whole[cell]);
  };
  four(from.write, to.write);
  four(from.read, to.read);
  for (int v = 0; v < warps_; ++v) four(from.by_warp[v], to.by_warp[v]);
  from.write[cell] = kSplit;
}

// A cell whose parts no longer differ in what matters is one again.
void Shadow::join(int layer, size_t cell) {
  Layer &to = layers_[layer], &from = layers_[layer + 1];
  const Stamp past = *std::min_element(floor_.begin(), floor_.end());
  auto alike = [past, cell](const std::unique_ptr<Stamp[]>& parts, Stamp& whole) {
    const Stamp* part = &parts[cell * 4];
    whole = std::max(std::max(part[0], part[1]), std::max(part[2], part[3]));
    return whole <= past || (whole < kPending && part[0] == whole && part[1] == whole &&
                             part[2] == whole && part[3] == whole);
  };
  Stamp write, read, by_warp[kLanes];
  if (!alike(from.write, write)) return;
  for (int v = 0; v < warps_; ++v)
    if (!alike(from.by_warp[v], by_warp[v])) return;
  alike(from.read, read);
  for (int v = 0; v < warps_; ++v) to.by_warp[v][cell] = by_warp[v];
  to.read[cell] = read;
  to.write[cell] = write;
}

}  // namespace ptxsim
