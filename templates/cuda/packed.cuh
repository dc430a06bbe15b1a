// 16-bit operands of tensor-core products: two of them in a register, and their conversions.
#pragma once
#include "cuda/element.cuh"

namespace ae {

// Rounds to nearest even; `low` gets the lower half of the register.
template <class Elem>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  uint32_t packed;
  if constexpr (__is_same(Elem, bf16)) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    static_assert(__is_same(Elem, f16), "tensor-core operands are fp16 or bf16");
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

template <class Elem>
__device__ __forceinline__ float widen(uint16_t bits) {
  if constexpr (__is_same(Elem, bf16)) {
    return __uint_as_float(uint32_t(bits) << 16);
  } else {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
  }
}

template <class Elem>
__device__ __forceinline__ uint16_t narrow(float value) {
  return uint16_t(pack2<Elem>(value, 0.0f));
}

// The bits of the exponent: all of them are set in Inf and NaN.
template <class Elem>
constexpr uint16_t kExponentBits = __is_same(Elem, bf16) ? 0x7f80 : 0x7c00;

}  // namespace ae
