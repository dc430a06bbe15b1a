// Sum over the batch of gradients of keys and values that were shared by the whole batch.
#pragma once
#include <bit>
#include <cstdint>
#include <type_traits>

#include "common/abi.h"

namespace ae {

inline float bf16_to_float(uint16_t x) { return std::bit_cast<float>(uint32_t{x} << 16); }

// Round to nearest even; NaN stays NaN.
inline uint16_t float_to_bf16(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// out[i] = sum over b of in[b * block + i], in index order, for i in [begin, end). 16-bit sums are
// kept in float and rounded once.
template <class T>
void sum_blocks(const T* in, T* out, int64_t batch, int64_t block, int64_t begin, int64_t end) {
  using Sum = std::conditional_t<sizeof(T) == 2, float, T>;
  constexpr int64_t kStep = 256;  // elements: the partial sums stay in L1
  Sum sums[kStep];
  for (int64_t start = begin; start < end; start += kStep) {
    const int64_t n = end - start < kStep ? end - start : kStep;
    for (int64_t i = 0; i < n; ++i) sums[i] = 0;
    for (int64_t b = 0; b < batch; ++b) {
      const T* row = in + b * block + start;
      for (int64_t i = 0; i < n; ++i) {
        if constexpr (sizeof(T) == 2) {
          sums[i] += bf16_to_float(row[i]);
        } else {
          sums[i] += row[i];
        }
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      if constexpr (sizeof(T) == 2) {
        out[start + i] = float_to_bf16(sums[i]);
      } else {
        out[start + i] = sums[i];
      }
    }
  }
}

struct BatchSum {
  const void* in;
  void* out;
  int64_t batch, block;
  int32_t dtype;

  static constexpr int64_t kChunk = 16384;  // elements: one task's share, a few tens of us
  int64_t tasks() const { return (block + kChunk - 1) / kChunk; }

  static void run(void* self, int64_t index, int32_t /*worker*/) {
    const auto& s = *static_cast<const BatchSum*>(self);
    const int64_t begin = index * kChunk;
    const int64_t end = begin + kChunk < s.block ? begin + kChunk : s.block;
    const auto sum = [&](auto* in, auto* out) {
      sum_blocks(in, out, s.batch, s.block, begin, end);
    };
    if (s.dtype == AE_F64) {
      sum(static_cast<const double*>(s.in), static_cast<double*>(s.out));
    } else if (s.dtype == AE_F32) {
      sum(static_cast<const float*>(s.in), static_cast<float*>(s.out));
    } else {
      sum(static_cast<const uint16_t*>(s.in), static_cast<uint16_t*>(s.out));
    }
  }
};

}  // namespace ae
