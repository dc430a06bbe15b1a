// What every CPU kernel module says of itself.
#pragma once
#include "cpu/lanes.h"

#define AE_EXPORT extern "C" __attribute__((visibility("default")))

namespace ae {

#if defined(__AVX512BF16__) && defined(__AVX512VL__)
constexpr int32_t kIsa = AE_ISA_AVX512_BF16;
#elif defined(__AVX512F__)
constexpr int32_t kIsa = AE_ISA_AVX512;
#elif defined(__AVX2__)
constexpr int32_t kIsa = AE_ISA_AVX2;
#else
constexpr int32_t kIsa = AE_ISA_PORTABLE;
#endif

template <class E>
constexpr int32_t dtype_of() {
  if (__is_same(E, f16)) return AE_F16;
  return __is_same(E, float) ? AE_F32 : __is_same(E, double) ? AE_F64 : AE_BF16;
}

// Whether score_mod may turn the score of an unmasked key into -inf, which makes that key dead.
template <class Fn>
constexpr bool score_can_die() {
  if constexpr (requires { Fn::kScoreCanDie; }) {
    return Fn::kScoreCanDie;
  } else {
    return false;
  }
}

// Return codes of ae_launch.
enum ModuleError : int32_t {
  kLaunched = 0,
  kWrongAbi = 1,     // params of another ABI version
  kMissingGrad = 2,  // no accumulator for a captured tensor of grad_mask
};

inline bool same_abi(const ae_params& p) {
  return p.abi_version == AE_ABI_VERSION && p.bytes == sizeof(ae_params);
}

}  // namespace ae
