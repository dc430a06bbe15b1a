// Reads of captured tensors (capture.h).
#pragma once
#include "common/env.h"
#include "cpu/element.h"

namespace ae {

__attribute__((noinline, cold)) inline void report_fault(const Env& env, int cap) {
  __atomic_store_n(env.fault, cap + 1, __ATOMIC_RELAXED);
}

// Wraps index i of a dimension and adds it to an element offset; false when it is out of bounds.
AE_INLINE bool add_index(int64_t i, int64_t size, int64_t stride, int64_t& offset) {
  if (i < 0) i += size;
  offset = add(offset, mul(i, stride));
  return static_cast<uint64_t>(i) < static_cast<uint64_t>(size);
}

// One lane of an index or a mask; scalars are the same in all lanes.
template <class X>
AE_INLINE auto lane_of(const X& x, int lane) {
  if constexpr (Scalar<X>) {
    return x;
  } else {
    return x[lane];
  }
}

// The lane count of the first vector among the types, 0 when all are scalars.
template <class... X>
constexpr int kLanesAmong = 0;
template <class X, class... Rest>
constexpr int kLanesAmong<X, Rest...> = Vec<X> ? kLanes<X> : kLanesAmong<Rest...>;
template <class L>
constexpr int kLanesIn = L::W;
template <>
constexpr int kLanesIn<void> = 0;

// Any indices, lane by lane: the path that is always right.
template <class T, int W, class Live, class... Idx>
__attribute__((noinline)) ValueVector<T, W> gather_lanes(const Env& env, int cap, const Live& live,
                                                         const Idx&... idx) {
  const ae_capture& c = env.cap[cap];
  ValueVector<T, W> out = {};
  for (int lane = 0; lane < W; ++lane) {
    if (!lane_of(live, lane)) continue;
    int64_t offset = 0;
    int d = 0;
    bool ok = true;
    ((ok &= add_index(lane_of(idx, lane), c.size[d], c.stride[d], offset), ++d), ...);
    if (!ok) {
      report_fault(env, cap);
    } else if constexpr (std::is_same_v<T, bool>) {
      out[lane] = load_one<T>(c.data, offset) ? -1 : 0;
    } else {
      out[lane] = load_one<T>(c.data, offset);
    }
  }
  return out;
}

#if defined(__AVX512F__)
template <int W>
constexpr bool kHasGather = W == 16 || W == 8;
#elif defined(__AVX2__)
template <int W>
constexpr bool kHasGather = W == 8;
#else
template <int W>
constexpr bool kHasGather = false;
#endif

#if defined(__AVX2__)
// The 32-bit words at base + bytes of the live lanes, 0 in the others.
template <int W>
AE_INLINE Vector<int32_t, W> gather_words(const void* base, Vector<int32_t, W> bytes,
                                          Vector<int32_t, W> live) {
#if defined(__AVX512F__)
  if constexpr (W == 16) {
    __m512i zero = _mm512_setzero_si512();
    __mmask16 k = _mm512_movepi32_mask((__m512i)live);
    return (Vector<int32_t, W>)_mm512_mask_i32gather_epi32(zero, k, (__m512i)bytes, base, 1);
  }
#endif
  if constexpr (W == 8) {
    return (Vector<int32_t, W>)_mm256_mask_i32gather_epi32(
        _mm256_setzero_si256(), static_cast<const int*>(base), (__m256i)bytes, (__m256i)live, 1);
  }
}

// Elements of at most 4 bytes at data + offsets of the live lanes. Shorter ones are cut out of the
// aligned words that hold them, which never reach into another page.
template <class T, int W>
AE_INLINE ValueVector<T, W> gather_elements(const void* data, Vector<int32_t, W> offsets,
                                            Vector<int32_t, W> live) {
  if constexpr (sizeof(T) == 4) {
    return bits_as<ElemOf<ValueVector<T, W>>>(gather_words<W>(data, offsets << 2, live));
  } else {
    int32_t skew = static_cast<int32_t>(reinterpret_cast<uintptr_t>(data) & 3);
    Vector<int32_t, W> bytes = (offsets << (sizeof(T) - 1)) + skew;
    const void* base = static_cast<const char*>(data) - skew;
    auto words = bits_as<uint32_t>(gather_words<W>(base, bytes & ~3, live));
    auto raw = convert<Raw<T>>(words >> bits_as<uint32_t>((bytes & 3) << 3));
    return decode<T>(raw);
  }
}
#endif

// Offsets of W lanes in 32 bits. They fit when the elements that the vector indices span do.
template <int W>
struct LaneOffsets {
  using I32 = Vector<int32_t, W>;
  static constexpr double kLimit = INT32_MAX / 4 - 1;  // so that a byte offset fits, too
  I32 offsets = {};
  I32 inside = splat<I32>(true);
  int64_t base = 0;
  double span = 0;  // in double it cannot overflow

  template <class X>
  AE_INLINE void index(X i, int64_t size, int64_t stride) {
    if constexpr (Scalar<X>) {
      if (!add_index(i, size, stride, base)) inside = I32{};
    } else {
      span += static_cast<double>(size) * (abs(static_cast<double>(stride)) + 1);
      ElemOf<X> n = static_cast<ElemOf<X>>(size);
      i = choose(lt(i, 0), add(i, n), i);
      inside &= lt(wrap(i), splat<Wrap<X>>(n));
      offsets = add(offsets, mul(to_i32(i), static_cast<int32_t>(stride)));
    }
  }
};

// Element of captured tensor `cap` at idx..., one index per dimension; N, if given, is the rank.
template <class T, class L = void, int N = -1, class Live, class... Idx>
AE_INLINE auto gather(const Env& env, int cap, Live live, Idx... idx) {
  static_assert(N < 0 || N == sizeof...(Idx));
  constexpr int W = kLanesAmong<Idx...>;
  const ae_capture& c = env.cap[cap];
  [[maybe_unused]] int d = 0;
  if constexpr (W == 0) {
    int64_t offset = 0;
    bool ok = true;
    ((ok &= add_index(idx, c.size[d], c.stride[d], offset), ++d), ...);
    if (!any(live)) return ValueOf<T>();
    if (ok) return load_one<T>(c.data, offset);
    report_fault(env, cap);
    return ValueOf<T>();
  } else {
#if defined(__AVX2__)
    if constexpr (kHasGather<W> && sizeof(T) <= 4) {
      LaneOffsets<W> at;
      ((at.index(idx, c.size[d], c.stride[d]), ++d), ...);
      if (__builtin_expect(at.span < at.kLimit, 1)) {
        auto alive = splat<Vector<int32_t, W>>(live);
        if (__builtin_expect(any(alive & ~at.inside), 0)) report_fault(env, cap);
        auto data = static_cast<const Raw<T>*>(c.data) + at.base;
        return gather_elements<T, W>(data, at.offsets, alive & at.inside);
      }
    }
#endif
    return gather_lanes<T, W>(env, cap, live, idx...);
  }
}

template <bool kLast, int W, class X>
AE_INLINE auto run_index(X i) {
  if constexpr (kLast) {
    using I64 = Vector<int64_t, W>;
    return splat<I64>(static_cast<int64_t>(i)) + iota<I64>();
  } else {
    return i;
  }
}
template <class T, int W, class Live, class... Idx, int... I>
AE_INLINE auto gather_run_lanes(const Env& env, int cap, Live live,
                                std::integer_sequence<int, I...>, Idx... idx) {
  return gather_lanes<T, W>(env, cap, live, run_index<I + 1 == sizeof...(I), W>(idx)...);
}

// Where W consecutive elements along the last dimension lie, all other indices being scalars.
struct RunOffset {
  int64_t offset = 0;
  bool inside = true;  // all of them are in bounds, none wraps

  template <int W>
  AE_INLINE void index(int64_t i, int64_t size, int64_t stride, bool last) {
    if (last) {
      inside &= i >= 0 && i <= size - W;
      offset = add(offset, mul(i, stride));
    } else {
      inside &= add_index(i, size, stride, offset);
    }
  }
};

// A tensor that is indexed by (.., query, key) has as many elements as there are scores: a tile of
// it comes from memory in short pieces, one per row, that no hardware prefetcher foresees. So a row
// fetches what this many rows further will read (measured: see docs/cpu.md).
constexpr int kRowsAhead = 2;

// The same with last index start + lane, for a scalar start that ends idx: consecutive elements.
// L (a Lanes) gives the lane count where `live` does not. kByQuery: the index before is the
// query's.
template <class T, class L = void, int N = -1, bool kByQuery = false, class Live, class... Idx>
AE_INLINE auto gather_run(const Env& env, int cap, Live live, Idx... idx) {
  constexpr int kRank = sizeof...(Idx);
  static_assert(N < 0 || N == kRank);
  constexpr int W = kLanesIn<L> > 0 ? kLanesIn<L> : kLanesAmong<Live, Idx...>;
  static_assert(W > 0 && kRank > 0, "gather_run: no operand tells the lane count, name L");
  using V = ValueVector<T, W>;
  if constexpr ((Scalar<Idx> && ...)) {
    const ae_capture& c = env.cap[cap];
    RunOffset at;
    int d = 0;
    ((at.index<W>(idx, c.size[d], c.stride[d], d == kRank - 1), ++d), ...);
    if (__builtin_expect(at.inside, 1)) {
      int64_t stride = c.stride[kRank - 1];
      if (__builtin_expect(stride == 1, 1)) {
        if constexpr (kByQuery) {
          const int64_t ahead = at.offset + kRowsAhead * c.stride[kRank - 2];
          __builtin_prefetch(static_cast<const Raw<T>*>(c.data) + ahead, 0, 2);
        }
        V x = load_run<T, W>(c.data, at.offset);
        if constexpr (Scalar<Live>) {
          return live ? x : V{};
        } else {
          return choose(live, x, V{});
        }
      }
#if defined(__AVX2__)
      if constexpr (kHasGather<W> && sizeof(T) <= 4) {
        if (abs(stride) <= INT32_MAX / (4 * W)) {
          auto data = static_cast<const Raw<T>*>(c.data) + at.offset;
          using I32 = Vector<int32_t, W>;
          auto lanes = iota<I32>() * splat<I32>(stride);
          return V(gather_elements<T, W>(data, lanes, splat<I32>(live)));
        }
      }
#endif
    }
  }
  return V(
      gather_run_lanes<T, W>(env, cap, live, std::make_integer_sequence<int, kRank>(), idx...));
}

}  // namespace ae
