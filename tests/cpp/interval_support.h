// What the tests of mask analysis share.
#pragma once
#include <cstdio>
#include <cstring>
#include <vector>

#include "common/segments.h"

namespace test {

struct Random {
  uint64_t state;
  uint64_t next() {  // splitmix64
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
  }
  int64_t in(int64_t lo, int64_t hi) { return lo + int64_t(next() % uint64_t(hi - lo + 1)); }
  double unit() { return double(next() >> 11) * 0x1p-53; }
};

inline int failures = 0;

inline void fail(const char* what, double a, double b, double c) {
  if (++failures <= 20) std::printf("FAILED %s: %.17g %.17g %.17g\n", what, a, b, c);
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline void serial_for(int64_t n, int32_t, ae_task task, void* arg) {
  for (int64_t i = n - 1; i >= 0; --i) task(arg, i, 0);
}

// Memory for tables, poisoned; align() gives its first 64-byte boundary.
inline std::vector<uint64_t> poisoned(int64_t bytes) {
  return std::vector<uint64_t>(size_t(bytes / 8 + 8), ~uint64_t(0));
}
inline void* align(std::vector<uint64_t>& memory) {
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
}

}  // namespace test
