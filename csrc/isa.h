// The best instruction set that this CPU and its operating system support.
#pragma once
#include "common/abi.h"

namespace ae {

inline ae_isa cpu_isa() {
  static const ae_isa isa = [] {
#if defined(__x86_64__)
    __builtin_cpu_init();
    // The levels x86-64-v3 and x86-64-v4 that modules are compiled for (attnengine/staging.py).
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi") &&
                      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("lzcnt") &&
                      __builtin_cpu_supports("movbe");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) return AE_ISA_AVX512_BF16;
    if (avx512) return AE_ISA_AVX512;
    if (avx2) return AE_ISA_AVX2;
#endif
    return AE_ISA_PORTABLE;
  }();
  return isa;
}

inline const char* isa_name(int32_t isa) {
  static constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16"};
  return isa >= AE_ISA_PORTABLE && isa <= AE_ISA_AVX512_BF16 ? kNames[isa] : "unknown";
}

}  // namespace ae
