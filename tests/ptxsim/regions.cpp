#include "regions.h"

namespace ptxsim {

void MemoryMap::finish() {
  std::sort(regions_.begin(), regions_.end(),
            [](const Region& a, const Region& b) { return a.begin < b.begin; });
  uint64_t end = 0;
  for (size_t r = 0; r < regions_.size(); ++r) {
    regions_[r].index = r;
    if (clusters_.empty() || regions_[r].begin >= end) {
      starts_.push_back(regions_[r].begin);
      clusters_.push_back({r, r});
    }
    clusters_.back().last = r + 1;
    end = std::max(end, regions_[r].end);
  }
}

std::string MemoryMap::describe(uint64_t address) const {
  const Region* before = nullptr;
  const Region* after = nullptr;
  for (const Region& region : regions_) {
    std::string name = "'" + region.name + "' (" + std::to_string(region.end - region.begin) +
                       (region.writable ? " bytes)" : " bytes, read-only)");
    if (region.begin <= address && address < region.end)
      return "byte " + std::to_string(address - region.begin) + " of " + name;
    if (region.end <= address && (!before || region.end > before->end)) before = &region;
    if (region.begin > address && (!after || region.begin < after->begin)) after = &region;
  }
  constexpr uint64_t kNear = 1 << 24;
  auto text = [](uint64_t bytes, const char* where, const Region& region) {
    return std::to_string(bytes) + where + "'" + region.name + "' (" +
           std::to_string(region.end - region.begin) + " bytes)";
  };
  uint64_t behind = before ? address - before->end : ~uint64_t{0};
  uint64_t ahead = after ? after->begin - address : ~uint64_t{0};
  if (behind <= ahead && behind < kNear) return text(behind, " bytes past the end of ", *before);
  if (ahead < kNear) return text(ahead, " bytes before ", *after);
  return "near no memory that the launch was given";
}

}  // namespace ptxsim
