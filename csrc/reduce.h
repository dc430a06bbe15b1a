// Sum over the batch of gradients of keys and values that were shared by the whole batch.
#pragma once
#include <bit>
#include <cstdint>

#include "common/abi.h"

namespace ae {

inline float bf16_to_float(uint16_t x) { return std::bit_cast<float>(uint32_t{x} << 16); }

// Round to nearest even; NaN stays NaN.
inline uint16_t float_to_bf16(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// The bits of a float16: a subnormal number is what it adds to the bits of 0.5.
inline float f16_to_float(uint16_t x) {
  const uint32_t magnitude = x & 0x7fffu, sign = uint32_t{x & 0x8000u} << 16;
  const float tiny = std::bit_cast<float>(0x3f000000u + magnitude) - 0.5f;
  const uint32_t rebias = magnitude < 0x7c00u ? 0x38000000u : 0x70000000u;  // infinity and NaN
  const uint32_t large = (magnitude << 13) + rebias;
  return std::bit_cast<float>((magnitude < 0x400u ? std::bit_cast<uint32_t>(tiny) : large) | sign);
}

// Round to nearest even, infinite from 65520 on; NaN stays NaN.
inline uint16_t float_to_f16(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  if (magnitude < 0x38800000u) {  // 2^-14: below, the spacing is that of floats at 0.5
    half = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else if (magnitude >= 0x477ff000u) {  // 65520
    half = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  }
  return static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
}

// How elements of T are read and written: as numbers, or as the bits of a 16-bit float.
template <class T>
struct Numbers {
  using Element = T;
  using Sum = T;
  static T read(T x) { return x; }
  static T write(T x) { return x; }
};
struct Bf16Bits {
  using Element = uint16_t;
  using Sum = float;
  static float read(uint16_t x) { return bf16_to_float(x); }
  static uint16_t write(float x) { return float_to_bf16(x); }
};
struct F16Bits {
  using Element = uint16_t;
  using Sum = float;
  static float read(uint16_t x) { return f16_to_float(x); }
  static uint16_t write(float x) { return float_to_f16(x); }
};

// out[i] = sum over b of in[b * block + i], in index order, for i in [begin, end). 16-bit sums are
// kept in float and rounded once.
template <class Format>
void sum_blocks(const void* from, void* to, int64_t batch, int64_t block, int64_t begin,
                int64_t end) {
  using T = typename Format::Element;
  using Sum = typename Format::Sum;
  const T* in = static_cast<const T*>(from);
  T* out = static_cast<T*>(to);
  constexpr int64_t kStep = 256;  // elements: the partial sums stay in L1
  Sum sums[kStep];
  for (int64_t start = begin; start < end; start += kStep) {
    const int64_t n = end - start < kStep ? end - start : kStep;
    for (int64_t i = 0; i < n; ++i) sums[i] = 0;
    for (int64_t b = 0; b < batch; ++b) {
      const T* row = in + b * block + start;
      for (int64_t i = 0; i < n; ++i) sums[i] += Format::read(row[i]);
    }
    for (int64_t i = 0; i < n; ++i) out[start + i] = Format::write(sums[i]);
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
    const auto sum = s.dtype == AE_F64    ? sum_blocks<Numbers<double>>
                     : s.dtype == AE_F32  ? sum_blocks<Numbers<float>>
                     : s.dtype == AE_BF16 ? sum_blocks<Bf16Bits>
                                          : sum_blocks<F16Bits>;
    sum(s.in, s.out, s.batch, s.block, begin, end);
  }
};

}  // namespace ae
