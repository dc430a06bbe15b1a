// Functions of whole rows, from functions of one lane's values.
#pragma once
#include <cstdint>
#include <type_traits>

#include "family.h"

namespace ptxsim {

// A value as its slot holds it: zero-extended.
template <class T>
inline uint64_t slot(T x) {
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>)
    return bits_of(x);
  else if constexpr (std::is_same_v<T, bool>)
    return x;
  else
    return uint64_t(std::make_unsigned_t<T>(x));
}
template <class T>
inline T value(uint64_t bits) {
  if constexpr (std::is_same_v<T, float>)
    return as_float(bits);
  else if constexpr (std::is_same_v<T, double>)
    return as_double(bits);
  else
    return T(bits);
}

// F: struct with `template <class T> auto operator()(T...)`.
template <class T, class F>
void unary(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t* a = warp.in(instr.op[1]);
  write_lanes(warp.out(instr.op[0]), mask, [&](int l) { return slot(F{}(value<T>(a[l]))); });
}
template <class T, class F>
void binary(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t* a = warp.in(instr.op[1]);
  const uint64_t* b = warp.in(instr.op[2]);
  write_lanes(warp.out(instr.op[0]), mask,
              [&](int l) { return slot(F{}(value<T>(a[l]), value<T>(b[l]))); });
}
template <class T, class F>
void ternary(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t* a = warp.in(instr.op[1]);
  const uint64_t* b = warp.in(instr.op[2]);
  const uint64_t* c = warp.in(instr.op[3]);
  write_lanes(warp.out(instr.op[0]), mask,
              [&](int l) { return slot(F{}(value<T>(a[l]), value<T>(b[l]), value<T>(c[l]))); });
}

}  // namespace ptxsim
