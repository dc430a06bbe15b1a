// The parts of the integer family, and its choice of functions by type.
#pragma once
#include "counters.h"
#include "lanes.h"

namespace ptxsim {

bool decode_bits(const Opcode& opcode, Instr& instr);     // bits.cpp: and, shl, bfe, popc, ...
bool decode_compare(const Opcode& opcode, Instr& instr);  // compare.cpp: setp, set

// s16 u16 s32 u32 s64 u64: 0 to 5; -1: none of them.
inline int integer_type(std::string_view type) {
  int index = 0;
  for (std::string_view name : {"s16", "u16", "s32", "u32", "s64", "u64"}) {
    if (type == name) return index;
    ++index;
  }
  return -1;
}

template <class F>
Exec integer_unary(int type) {
  static constexpr Exec kOf[] = {unary<int16_t, F>,  unary<uint16_t, F>, unary<int32_t, F>,
                                 unary<uint32_t, F>, unary<int64_t, F>,  unary<uint64_t, F>};
  return kOf[type];
}
template <class F>
Exec integer_binary(int type) {
  static constexpr Exec kOf[] = {binary<int16_t, F>,  binary<uint16_t, F>, binary<int32_t, F>,
                                 binary<uint32_t, F>, binary<int64_t, F>,  binary<uint64_t, F>};
  return kOf[type];
}
template <class F>
Exec integer_ternary(int type) {
  static constexpr Exec kOf[] = {ternary<int16_t, F>,  ternary<uint16_t, F>, ternary<int32_t, F>,
                                 ternary<uint32_t, F>, ternary<int64_t, F>,  ternary<uint64_t, F>};
  return kOf[type];
}

}  // namespace ptxsim
