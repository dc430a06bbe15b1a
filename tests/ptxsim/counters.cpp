#include "counters.h"

#include <algorithm>
#include <map>
#include <sstream>

namespace ptxsim {
namespace {

Traffic& operator+=(Traffic& a, const Traffic& b) {
  a.bytes += b.bytes;
  a.sectors += b.sectors;
  a.ideal_sectors += b.ideal_sectors;
  return a;
}

constexpr const char* kNames[kClasses] = {
    "control",     "move",         "integer", "float",      "half",    "convert",
    "special",     "exp",          "load",    "store",      "atomic",  "shuffle",
    "matrix_load", "matrix_store", "mma",     "async_copy", "barrier", "fence"};

}  // namespace

Counters& Counters::operator+=(const Counters& other) {
  for (int c = 0; c < kClasses; ++c) {
    instructions[size_t(c)] += other.instructions[size_t(c)];
    lanes[size_t(c)] += other.lanes[size_t(c)];
  }
  mma_flops += other.mma_flops;
  global_read += other.global_read;
  global_write += other.global_write;
  shared_read += other.shared_read;
  shared_write += other.shared_write;
  local_read += other.local_read;
  local_write += other.local_write;
  bank_conflicts += other.bank_conflicts;
  matrix_bank_conflicts += other.matrix_bank_conflicts;
  thread_blocks += other.thread_blocks;
  regions.resize(std::max(regions.size(), other.regions.size()));
  for (size_t r = 0; r < other.regions.size(); ++r) {
    regions[r].read += other.regions[r].read;
    regions[r].written += other.regions[r].written;
  }
  return *this;
}

std::string Counters::json(const std::vector<std::string>& names) const {
  std::ostringstream out;
  out << "{\"thread_blocks\": " << thread_blocks << ", \"instructions\": {";
  uint64_t total = 0;
  for (int c = 0; c < kClasses; ++c) {
    total += instructions[size_t(c)];
    out << '"' << kNames[c] << "\": " << instructions[size_t(c)] << ", ";
  }
  out << "\"total\": " << total << "}, \"mma_flops\": " << mma_flops
      << ", \"exp\": " << lanes[kExp];
  auto traffic = [&](const char* name, const Traffic& t) {
    out << ", \"" << name << "\": {\"bytes\": " << t.bytes << ", \"sectors\": " << t.sectors
        << ", \"ideal_sectors\": " << t.ideal_sectors << "}";
  };
  traffic("global_read", global_read);
  traffic("global_write", global_write);
  out << ", \"shared_read_bytes\": " << shared_read << ", \"shared_write_bytes\": " << shared_write
      << ", \"local_read_bytes\": " << local_read << ", \"local_write_bytes\": " << local_write
      << ", \"bank_conflicts\": " << bank_conflicts
      << ", \"matrix_bank_conflicts\": " << matrix_bank_conflicts << ", \"regions\": {";
  std::map<std::string, Bytes> by_name;
  for (size_t r = 0; r < regions.size() && r < names.size(); ++r) {
    by_name[names[r]].read += regions[r].read;
    by_name[names[r]].written += regions[r].written;
  }
  const char* separator = "";
  for (auto& [name, bytes] : by_name) {
    out << separator << '"' << name << "\": {\"read\": " << bytes.read
        << ", \"written\": " << bytes.written << "}";
    separator = ", ";
  }
  out << "}}";
  return out.str();
}

}  // namespace ptxsim
