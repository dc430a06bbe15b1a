// Elements of captured tensors as ordered integers, so that mask analysis finds the min and max of
// any element type with one loop per width.
#pragma once
#include "common/abi.h"
#include "common/interval.h"

namespace ae::iv {

// ---- ordered keys: an element's bits as a signed integer of its width, in value order ----
// Floats: negative numbers get their magnitude bits flipped; NaN lies beyond the infinities. uint8:
// shifted by 128. So one loop per width finds min and max, and NaN shows in the result.
struct Encoding {
  int bytes;
  int64_t flip;      // xor for negative keys
  int64_t bias;      // xor for all keys
  int64_t infinity;  // key of +inf; keys outside [~infinity, infinity] are NaN. 0: no float
};

AE_HD constexpr Encoding encoding(int dtype) {
  switch (dtype) {
    case AE_F32:
      return {4, 0x7fffffff, 0, 0x7f800000};
    case AE_F64:
      return {8, 0x7fffffffffffffff, 0, 0x7ff0000000000000};
    case AE_BF16:
      return {2, 0x7fff, 0, 0x7f80};
    case AE_F16:
      return {2, 0x7fff, 0, 0x7c00};
    case AE_I64:
      return {8, 0, 0, 0};
    case AE_I32:
      return {4, 0, 0, 0};
    case AE_I16:
      return {2, 0, 0, 0};
    case AE_U8:
      return {1, 0, -128, 0};
    default:
      return {1, 0, 0, 0};
  }
}

// Running [min, max] of keys; empty while lo > hi.
template <class Key>
struct KeyRange {
  static constexpr Key kMost = Key(~(uint64_t(1) << (8 * sizeof(Key) - 1)));
  Key lo = kMost, hi = Key(~kMost);
};

template <class Key>
AE_HD inline void fold_keys(const Key* lo, const Key* hi, int64_t n, KeyRange<Key>& r) {
  Key least = r.lo, most = r.hi;
  for (int64_t i = 0; i < n; ++i) {
    least = lo[i] < least ? lo[i] : least;
    most = hi[i] > most ? hi[i] : most;
  }
  r = {least, most};
}

template <class Key>
AE_HD inline void fold_elements(const void* data, int64_t first, int64_t n, int64_t stride,
                                const Encoding& e, KeyRange<Key>& r) {
  typedef Key __attribute__((may_alias)) Element;
  const Element* x = static_cast<const Element*>(data) + first;
  const Key flip = Key(e.flip), bias = Key(e.bias);
  Key least = r.lo, most = r.hi;
  const auto fold = [&](Key bits) {
    const Key key = Key((bits ^ (Key(bits >> (8 * sizeof(Key) - 1)) & flip)) ^ bias);
    least = key < least ? key : least;
    most = key > most ? key : most;
  };
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) fold(x[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) fold(x[i * stride]);
  }
  r = {least, most};
}

AE_HD inline double f16_value(int32_t bits) {
  const int32_t exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double size = exponent == 0 ? __builtin_ldexp(fraction, -24)
                                    : __builtin_ldexp(1024 + fraction, exponent - 25);
  return bits & 0x8000 ? -size : size;
}

// The element of a key that is not NaN.
AE_HD inline double key_value(int64_t key, int dtype, const Encoding& e) {
  const int64_t bits = (key ^ (key < 0 ? e.flip : 0)) ^ e.bias;
  switch (dtype) {
    case AE_F32:
      return __builtin_bit_cast(float, int32_t(bits));
    case AE_BF16:
      return __builtin_bit_cast(float, int32_t(uint32_t(bits) << 16));
    case AE_F64:
      return __builtin_bit_cast(double, bits);
    case AE_F16:
      return key == e.infinity ? kInf : key == ~e.infinity ? -kInf : f16_value(int32_t(bits));
    case AE_U8:
      return double(uint8_t(bits));
    default:
      return double(key);
  }
}

// Everything an element can be.
AE_HD inline Interval any_element(int dtype, const Encoding& e) {
  if (dtype == AE_BOOL) return unknown();
  if (e.infinity != 0) return top();
  if (e.bytes == 8) return int_top();
  const double half = double(int64_t(1) << (8 * e.bytes - 1));
  return dtype == AE_U8 ? range(0, 255) : range(-half, half - 1);
}

AE_HD inline Interval key_interval(int64_t lo, int64_t hi, int dtype, const Encoding& e) {
  if (e.infinity != 0) {
    const bool low_nan = lo<~e.infinity, high_nan = hi> e.infinity;
    return {low_nan || lo > e.infinity ? -kInf : key_value(lo, dtype, e),
            high_nan || hi < ~e.infinity ? kInf : key_value(hi, dtype, e), low_nan || high_nan};
  }
  const Interval r = int_result(key_value(lo, dtype, e), key_value(hi, dtype, e));
  return dtype == AE_BOOL ? to_bool(r) : r;
}

}  // namespace ae::iv
