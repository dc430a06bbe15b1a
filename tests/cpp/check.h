// The C++ tests' whole framework: CHECK reports and counts failures, and CHECK_RESULT() is main's
// return value.
#pragma once
#include <cstdio>

namespace check {
inline int failures = 0;
inline int checks = 0;
}  // namespace check

#define CHECK_MESSAGE(condition, ...)                                    \
  do {                                                                   \
    ++check::checks;                                                     \
    if (!(condition) && ++check::failures <= 50) {                       \
      std::fprintf(stderr, "%s:%d: %s", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, " " __VA_ARGS__);                             \
      std::fprintf(stderr, "\n");                                        \
    }                                                                    \
  } while (0)
#define CHECK(condition) CHECK_MESSAGE(condition, "")
#define CHECK_RESULT()                                                               \
  (std::fprintf(stderr, "%d checks, %d failures\n", check::checks, check::failures), \
   check::failures == 0 ? 0 : 1)
