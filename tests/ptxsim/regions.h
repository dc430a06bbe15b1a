// What global memory holds: the regions that a launch may touch.
#pragma once
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

namespace ptxsim {

struct Region {
  uint64_t begin = 0, end = 0;
  bool writable = false;
  std::string name;
  size_t index = 0;  // among the map's regions
};

// Regions in order of address. They may overlap; those that do form a cluster, so that most
// accesses, which fall into a cluster of one, take one binary search.
class MemoryMap {
 public:
  void add(Region region) {
    if (region.end > region.begin) regions_.push_back(std::move(region));
  }
  void finish();

  // The region that contains [begin, end), and for a write allows it; else null.
  const Region* find(uint64_t begin, uint64_t end, bool write) const {
    auto after = std::upper_bound(starts_.begin(), starts_.end(), begin);
    if (after == starts_.begin()) return nullptr;
    const Cluster& cluster = clusters_[size_t(after - starts_.begin()) - 1];
    for (size_t r = cluster.first; r < cluster.last; ++r)
      if (regions_[r].begin <= begin && end <= regions_[r].end && (!write || regions_[r].writable))
        return &regions_[r];
    return nullptr;
  }
  const std::vector<Region>& regions() const { return regions_; }
  // Where an address is, in words: "4 bytes past the end of 'out' (64 bytes)".
  std::string describe(uint64_t address) const;

 private:
  struct Cluster {
    size_t first, last;
  };
  std::vector<Region> regions_;
  std::vector<uint64_t> starts_;  // of the clusters
  std::vector<Cluster> clusters_;
};

}  // namespace ptxsim
