// Reads of captured tensors. The capture's number is a constant where it is called, and everything
// here is inlined, so sizes and strides come from the kernel's parameters.
#pragma once
#include "common/env.h"
#include "cuda/math.cuh"

namespace ae {

// An index that cannot be negative: nothing wraps.
template <class T>
struct NonNegative {
  T value;
};
template <class T>
AE_DEVICE NonNegative<T> nonnegative(T x) {
  return {x};
}

// Adds an index of a dimension to an element offset, wrapping a negative one; false when it is out
// of bounds. The sum wraps as unsigned numbers do: an index that is out of bounds is never read.
template <class T>
AE_DEVICE bool add_index(NonNegative<T> i, int64_t size, int64_t stride, int64_t& offset) {
  offset = int64_t(uint64_t(offset) + uint64_t(int64_t(i.value)) * uint64_t(stride));
  return int64_t(i.value) < size;
}
template <class T>
AE_DEVICE bool add_index(T i, int64_t size, int64_t stride, int64_t& offset) {
  const int64_t at = i < 0 ? int64_t(i) + size : int64_t(i);
  offset = int64_t(uint64_t(offset) + uint64_t(at) * uint64_t(stride));
  return uint64_t(at) < uint64_t(size);
}

// Element of captured tensor `cap` at idx..., one index per dimension. Dead keys read nothing and
// see 0; so does a live key whose index is out of bounds, which is reported.
template <class T, class... Idx>
AE_DEVICE ValueOf<T> gather(const Env& env, int cap, bool live, Idx... idx) {
  const ae_capture& c = env.cap[cap];
  int64_t offset = 0;
  [[maybe_unused]] int d = 0;
  bool ok = true;
  ((ok &= add_index(idx, c.size[d], c.stride[d], offset), ++d), ...);
  if (live && !ok) *env.fault = cap + 1;
  ValueOf<T> value = 0;
  if (live && ok) value = load_element<T>(c.data, offset);
  return value;
}

}  // namespace ae
