// Accesses: bounds, alignment, and what they cost.
#include "memory.h"

#include <bit>
#include <sstream>

#include "regions.h"

namespace ptxsim {
namespace {

constexpr const char* kSpaceNames[] = {"generic", "global",    "shared",
                                       "local",   "parameter", "constant"};

std::string hex(uint64_t x) {
  std::ostringstream out;
  out << "0x" << std::hex << x;
  return out.str();
}

std::string name_of(const Warp& warp, Space space, uint64_t address) {
  const Cta& cta = *warp.cta;
  const Kernel& kernel = *cta.launch->kernel;
  std::string plain =
      "byte " + std::to_string(address) + " of " + kSpaceNames[int(space)] + " memory";
  switch (space) {
    case Space::kShared:
      if (address < cta.shared_bytes) return shared_name(warp, uint32_t(address));
      return plain + ", of which the block has " + std::to_string(cta.shared_bytes) + " bytes";
    case Space::kLocal:
      return plain + ", of which a thread has " + std::to_string(kernel.local_bytes) + " bytes";
    case Space::kParam:
      return plain + ", of which the kernel has " + std::to_string(kernel.parameter_bytes) +
             " bytes";
    default:
      return cta.launch->memory->describe(address);
  }
}

[[noreturn]] void reject(Warp& warp, const Instr& instr, Mask mask, Space space,
                         const uint64_t* address, int bytes, Access access, const char* kind,
                         const std::string& why) {
  int lane = std::countr_zero(mask);
  const char* verb = access == Access::kRead    ? "reads "
                     : access == Access::kWrite ? "writes "
                                                : "updates ";
  fault(warp, instr, mask, kind,
        "lane " + std::to_string(lane) + " " + verb + std::to_string(bytes) + " bytes at " +
            hex(address[lane]) + ", " + name_of(warp, space, address[lane]) + why);
}

void check_aligned(Warp& warp, const Instr& instr, Mask mask, Space space, const uint64_t* address,
                   int bytes, Access access) {
  uint64_t low = 0;
  each_lane(mask, [&](int l) { low |= address[l]; });
  if ((low & uint64_t(bytes - 1)) == 0) return;
  Mask bad = 0;
  each_lane(mask, [&](int l) { bad |= Mask((address[l] & uint64_t(bytes - 1)) != 0) << l; });
  reject(warp, instr, bad, space, address, bytes, access, "misaligned",
         ": not a multiple of " + std::to_string(bytes));
}

// The least and the greatest address.
std::pair<uint64_t, uint64_t> range_of(Mask mask, const uint64_t* address) {
  uint64_t low = ~uint64_t{0}, high = 0;
  each_lane(mask, [&](int l) {
    low = std::min(low, address[l]);
    high = std::max(high, address[l]);
  });
  return {low, high};
}

void check_below(Warp& warp, const Instr& instr, Mask mask, Space space, const uint64_t* address,
                 int bytes, Access access, uint64_t limit) {
  auto [low, high] = range_of(mask, address);
  if (high < limit && high + uint64_t(bytes) <= limit) return;
  Mask bad = 0;
  each_lane(mask, [&](int l) {
    bad |= Mask(address[l] >= limit || address[l] + uint64_t(bytes) > limit) << l;
  });
  reject(warp, instr, bad, space, address, bytes, access, "out-of-bounds", "");
}

void count_sectors(Traffic& traffic, Mask mask, const uint64_t* address, int bytes) {
  traffic.bytes += uint64_t(std::popcount(mask)) * uint64_t(bytes);
  uint64_t sorted[kLanes];
  int count = 0;
  bool ordered = true;
  each_lane(mask, [&](int l) {
    sorted[count] = address[l];
    ordered &= count == 0 || sorted[count - 1] <= sorted[count];
    ++count;
  });
  if (!ordered) std::sort(sorted, sorted + count);
  uint64_t sectors = 1, distinct = 1;
  for (int i = 1; i < count; ++i) {
    sectors += sorted[i] >> 5 != sorted[i - 1] >> 5;
    distinct += sorted[i] != sorted[i - 1];
  }
  traffic.sectors += sectors;
  traffic.ideal_sectors += (distinct * uint64_t(bytes) + 31) / 32;
}

// Cycles beyond one for each 128 bytes: as many lanes as ask for 128 bytes are served together, and
// each of the 32 banks gives one word of 4 bytes a cycle.
uint64_t extra_cycles(Mask mask, const uint64_t* address, int bytes) {
  int words_each = std::max(bytes / 4, 1);
  int together = kLanes / words_each;
  uint64_t extra = 0;
  for (int first = 0; first < kLanes; first += together) {
    uint32_t word[kLanes], held[kLanes];
    uint8_t load[kLanes] = {};
    int count = 0, worst = 1;
    for (int l = first; l < first + together; ++l)
      if (mask >> l & 1)
        for (int w = 0; w < words_each; ++w)
          word[count++] = uint32_t(address[l] >> 2) + uint32_t(w);
    for (int i = 0; i < count; ++i) {
      uint32_t bank = word[i] & 31;
      if (load[bank] == 0) {
        held[bank] = word[i];
        load[bank] = 1;
      } else if (held[bank] != word[i] && std::find(word, word + i, word[i]) == word + i) {
        worst = std::max<int>(worst, ++load[bank]);
      }
    }
    extra += uint64_t(worst - 1);
  }
  return extra;
}

void resolve_shared(Warp& warp, const Instr& instr, Mask mask, const uint64_t* address, int bytes,
                    Access access, uint8_t* host[kLanes]) {
  Cta& cta = *warp.cta;
  check_below(warp, instr, mask, Space::kShared, address, bytes, access, cta.shared_bytes);
  check_aligned(warp, instr, mask, Space::kShared, address, bytes, access);
  uint32_t offset[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    offset[l] = uint32_t(address[l]);
    host[l] = cta.shared + offset[l];
  }
  shared_access(warp, instr, mask, offset, bytes, access);
  uint64_t all = uint64_t(std::popcount(mask)) * uint64_t(bytes);
  if (access != Access::kWrite) cta.counters.shared_read += all;
  if (access != Access::kRead) cta.counters.shared_write += all;
  bool matrix = instr.counter == kMatrixLoad || instr.counter == kMatrixStore;
  (matrix ? cta.counters.matrix_bank_conflicts : cta.counters.bank_conflicts) +=
      extra_cycles(mask, address, bytes);
}

void resolve_global(Warp& warp, const Instr& instr, Mask mask, Space space, const uint64_t* address,
                    int bytes, Access access, uint8_t* host[kLanes]) {
  Cta& cta = *warp.cta;
  const MemoryMap& memory = *cta.launch->memory;
  bool write = access != Access::kRead;
  check_aligned(warp, instr, mask, space, address, bytes, access);
  auto [low, high] = range_of(mask, address);
  auto count = [&](const Region& region, int lanes) {
    Counters::Bytes& bytes_of = cta.counters.regions[region.index];
    if (access != Access::kWrite) bytes_of.read += uint64_t(lanes) * uint64_t(bytes);
    if (write) bytes_of.written += uint64_t(lanes) * uint64_t(bytes);
  };
  if (const Region* region = memory.find(low, high + uint64_t(bytes), write)) {
    count(*region, std::popcount(mask));
  } else {
    Mask bad = 0, forbidden = 0;
    each_lane(mask, [&](int l) {
      uint64_t end = address[l] + uint64_t(bytes);
      if (const Region* own = memory.find(address[l], end, write))
        count(*own, 1);
      else
        (memory.find(address[l], end, false) ? forbidden : bad) |= Mask{1} << l;
    });
    if (bad) reject(warp, instr, bad, space, address, bytes, access, "out-of-bounds", "");
    if (forbidden)
      reject(warp, instr, forbidden, space, address, bytes, access, "read-only",
             ", which it may only read");
  }
  each_lane(mask, [&](int l) { host[l] = reinterpret_cast<uint8_t*>(address[l]); });
  if (!write || access == Access::kAtomic)
    count_sectors(cta.counters.global_read, mask, address, bytes);
  if (write) count_sectors(cta.counters.global_write, mask, address, bytes);
}

void resolve_local(Warp& warp, const Instr& instr, Mask mask, const uint64_t* address, int bytes,
                   Access access, uint8_t* host[kLanes]) {
  Counters& counters = warp.cta->counters;
  check_below(warp, instr, mask, Space::kLocal, address, bytes, access,
              warp.cta->launch->kernel->local_bytes);
  check_aligned(warp, instr, mask, Space::kLocal, address, bytes, access);
  each_lane(mask, [&](int l) { host[l] = local_memory(warp, l) + address[l]; });
  uint64_t all = uint64_t(std::popcount(mask)) * uint64_t(bytes);
  if (access != Access::kWrite) counters.local_read += all;
  if (access != Access::kRead) counters.local_write += all;
}

void resolve_param(Warp& warp, const Instr& instr, Mask mask, const uint64_t* address, int bytes,
                   Access access, uint8_t* host[kLanes]) {
  Launch& launch = *warp.cta->launch;
  const Kernel& kernel = *launch.kernel;
  int first = std::countr_zero(mask);
  check_aligned(warp, instr, mask, Space::kParam, address, bytes, access);
  if (address[first] >= kCallParams) {
    check_below(warp, instr, mask, Space::kParam, address, bytes, access,
                kCallParams + kernel.call_bytes);
    each_lane(mask, [&](int l) { host[l] = call_memory(warp, l) + (address[l] - kCallParams); });
    return;
  }
  check_below(warp, instr, mask, Space::kParam, address, bytes, access, kernel.parameter_bytes);
  if (access != Access::kRead)
    reject(warp, instr, mask, Space::kParam, address, bytes, access, "read-only",
           ", which it may only read");
  each_lane(mask, [&](int l) { host[l] = launch.parameters.data() + address[l]; });
}

Space space_of(uint64_t generic) {
  switch (generic & kWindow) {
    case kSharedWindow:
      return Space::kShared;
    case kLocalWindow:
      return Space::kLocal;
    case kParamWindow:
      return Space::kParam;
    default:
      return Space::kGlobal;
  }
}

// Lanes may point to different spaces.
void resolve_generic(Warp& warp, const Instr& instr, Mask mask, const uint64_t* address, int bytes,
                     Access access, uint8_t* host[kLanes]) {
  while (mask != 0) {
    Space space = space_of(address[std::countr_zero(mask)]);
    Mask same = 0;
    each_lane(mask, [&](int l) { same |= Mask(space_of(address[l]) == space) << l; });
    mask &= ~same;
    if (space == Space::kGlobal) {
      resolve_global(warp, instr, same, space, address, bytes, access, host);
      continue;
    }
    uint64_t inner[kLanes];
    uint8_t* there[kLanes];
    for (int l = 0; l < kLanes; ++l) inner[l] = address[l] & ~kWindow;
    resolve(warp, instr, same, space, inner, bytes, access, there);
    each_lane(same, [&](int l) { host[l] = there[l]; });
  }
}

}  // namespace

void resolve(Warp& warp, const Instr& instr, Mask mask, Space space, const uint64_t* address,
             int bytes, Access access, uint8_t* host[kLanes]) {
  switch (space) {
    case Space::kGeneric:
      return resolve_generic(warp, instr, mask, address, bytes, access, host);
    case Space::kShared:
      return resolve_shared(warp, instr, mask, address, bytes, access, host);
    case Space::kLocal:
      return resolve_local(warp, instr, mask, address, bytes, access, host);
    case Space::kParam:
      return resolve_param(warp, instr, mask, address, bytes, access, host);
    default:
      return resolve_global(warp, instr, mask, space, address, bytes, access, host);
  }
}

}  // namespace ptxsim
