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

// The stamps of consecutive cells as one vector: one comparison for all.
typedef int32_t Vector4 __attribute__((vector_size(16)));

template <int Cells>
bool any_above(const int32_t* cells, int32_t limit) {
  if constexpr (Cells == 4) {
    Vector4 v;
    std::memcpy(&v, cells, 16);
    v = v > limit;
    uint64_t half[2];
    std::memcpy(half, &v, 16);
    return (half[0] | half[1]) != 0;
  } else {
    bool above = false;
    for (int c = 0; c < Cells; ++c) above |= cells[c] > limit;
    return above;
  }
}

// Some cell is above the limit and of other lanes than `mine`.
template <int Cells>
bool any_shared(const int32_t* cells, int32_t limit, int32_t mine) {
  if constexpr (Cells == 4) {
    Vector4 v;
    std::memcpy(&v, cells, 16);
    v = (v > limit) & (((v ^ mine) & 63) != 0);
    uint64_t half[2];
    std::memcpy(half, &v, 16);
    return (half[0] | half[1]) != 0;
  } else {
    bool shared = false;
    for (int c = 0; c < Cells; ++c) shared |= (cells[c] > limit) & (((cells[c] ^ mine) & 63) != 0);
    return shared;
  }
}

template <int Cells>
void fill(int32_t* cells, int32_t value) {
  for (int c = 0; c < Cells; ++c) cells[c] = value;
}

}  // namespace

void Shadow::Layer::create(size_t count, int warps) {
  cells = count;
  write = std::make_unique<Stamp[]>(count);
  std::fill_n(write.get(), count, kUnwritten);
  read = std::make_unique<Stamp[]>(count);
  for (int w = 0; w < warps; ++w) by_warp.push_back(std::make_unique<Stamp[]>(count));
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
  words_.create((cta.shared_bytes + 3) / 4, warps_);
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
    const size_t cell = offset[l] >> Shift;
    const Stamp stamp = all_lanes != 0 ? first | all_lanes : first | 32 | l;
    if (any_above<Cells>(write + cell, floor)) [[unlikely]] {
      actor.lane = l;
      actor.stamp = stamp;
      check_cells(layer, cell, Cells, actor);
      return;
    }
    if (any_shared<Cells>(mine + cell, own, stamp)) {
      for (int c = 0; c < Cells; ++c) mine[cell + c] = merged(mine[cell + c], stamp, u);
    } else {
      fill<Cells>(mine + cell, stamp);
    }
    fill<Cells>(read + cell, stamp);
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
    const size_t cell = offset[l] >> Shift;
    const Stamp stamp = all_lanes != 0 ? first | all_lanes : first | 32 | l;
    // A cell that another lane of this instruction wrote is above the floor too.
    if (any_above<Cells>(write + cell, floor) || any_above<Cells>(read + cell, floor))
        [[unlikely]] {
      actor.lane = l;
      actor.stamp = stamp;
      check_cells(layer, cell, Cells, actor);
      return;
    }
    fill<Cells>(write + cell, stamp);
  });
}

template <int Cells, int Shift>
void Shadow::access_cells(Layer& layer, Mask mask, Actor& actor, Stamp all_lanes) {
  if (actor.access == Access::kRead)
    read_cells<Cells, Shift>(layer, mask, actor, all_lanes);
  else
    write_cells<Cells, Shift>(layer, mask, actor, all_lanes);
}

void Shadow::access(Warp& warp, const Instr& instr, Mask mask, const uint32_t* offset, int bytes,
                    Access access) {
  const bool strong = access == Access::kAtomic || is_strong(instr);
  Actor actor{warp, instr, access, strong, offset, bytes, 0, next(warp, instr)};
  // The lane that gives a matrix row's address is not the one that gets or supplies its values.
  const Stamp all_lanes =
      instr.text.starts_with("ldmatrix") || instr.text.starts_with("stmatrix") ? 1 : 0;
  if (strong) {
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
      return access_cells<4, 2>(words_, mask, actor, all_lanes);
    case 8:
      return access_cells<2, 2>(words_, mask, actor, all_lanes);
    case 4:
      return access_cells<1, 2>(words_, mask, actor, all_lanes);
    default:
      break;
  }
  Mask narrow = 0;
  each_lane(mask, [&](int l) {
    const size_t word = offset[l] / 4;
    if (words_.write[word] == kStrong) {
      Actor other = actor;
      other.lane = l;
      other.stamp |= 32 | l;
      check_strong(word, other);
      return;
    }
    if (words_.write[word] != kSplit) split(word);
    narrow |= Mask{1} << l;
  });
  if (bytes == 2)
    access_cells<2, 0>(bytes_, narrow, actor, all_lanes);
  else
    access_cells<1, 0>(bytes_, narrow, actor, all_lanes);
}

void Shadow::begin_copy(const Warp& warp, Mask lanes, const uint32_t* offset, int bytes) {
  const Stamp first = last_[warp.index] << 6 | kPending;
  each_lane(lanes, [&](int l) {
    std::fill_n(words_.write.get() + offset[l] / 4, bytes / 4, first | 32 | l);
  });
}

void Shadow::end_copy(const Warp& warp, const Instr& copy, Mask lanes, const uint32_t* offset,
                      int bytes) {
  const Stamp first = next(warp, copy);
  each_lane(lanes, [&](int l) {
    std::fill_n(words_.write.get() + offset[l] / 4, bytes / 4, first | 32 | l);
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
  for (size_t w = 0; w < words_.cells; ++w) {
    const Stamp stamp = words_.write[w];
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
  for (Layer* layer : {&words_, &bytes_}) {
    stamps(layer->write.get(), layer->cells);
    stamps(layer->read.get(), layer->cells);
    for (auto& cells : layer->by_warp) stamps(cells.get(), layer->cells);
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

void Shadow::split(size_t word) {
  if (bytes_.cells == 0) bytes_.create(words_.cells * 4, warps_);
  std::fill_n(bytes_.write.get() + word * 4, 4, words_.write[word]);
  std::fill_n(bytes_.read.get() + word * 4, 4, words_.read[word]);
  for (int v = 0; v < warps_; ++v)
    std::fill_n(bytes_.by_warp[v].get() + word * 4, 4, words_.by_warp[v][word]);
  words_.write[word] = kSplit;
}

}  // namespace ptxsim
