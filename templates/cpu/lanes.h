// The vector types of the CPU kernels: W lanes of the accumulator type A (float, or double for fp64
// kernels) and, lane for lane beside it, the integer and mask vectors. GCC vector extensions make
// one source serve every ISA; the compiler splits vectors that are wider than the machine's
// registers.
#pragma once
#include <cstdint>

#include "common/abi.h"

namespace ae {

template <class T, int W>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * W)));
};
template <class T, int W>
using Vector = typename VectorOf<T, W>::type;

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

#if defined(__AVX512BF16__) && defined(__AVX512VL__)
constexpr bool kHasBf16Dot = true;
#else
constexpr bool kHasBf16Dot = false;
#endif

// Lanes<float>: 16 / 8 / 4 lanes on AVX-512 / AVX2 / portable; Lanes<double>: half of that.
template <class A>
struct Lanes {
  static constexpr int W = kRegisterBytes / sizeof(A);
  using Acc = Vector<A, W>;  // accumulator type
  using F32 = Vector<float, W>;
  using F64 = Vector<double, W>;
  using I32 = Vector<int32_t, W>;  // also the mask type: 0 or -1 in each lane
  using I64 = Vector<int64_t, W>;
  using Mask = I32;
};

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

}  // namespace ae
