// The recurrence token by token, for sequences of a few tokens: a step reads the state once and
// writes it once, and the memory sets its pace. Some columns of all rows of a head at a time:
//
//   row d:  s = a_d S_d + k_d v;  o += q_d s;  S'_d = s
//   delta rule: k (a S) and q (a S) first, then the rows, which are still in the cache;
//               o = q (a S) + (q . k) beta (v - k (a S))
#pragma once
#include "cpu/linear_forward_work.h"
#include "cpu/linear_output.h"

namespace ae {

// Sequences of at most so many tokens. More are faster in chunks: each token costs a pass over the
// state, at a third of the rate of a product.
constexpr int kStepTokens = 4;
static_assert(kStepTokens <= kLinearBlock);

// Stored past the caches where the machine can and p is aligned.
template <class V>
AE_INLINE void stream_vector(void* p, V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return _mm512_stream_ps((float*)p, (__m512)v);
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) return _mm256_stream_ps((float*)p, (__m256)v);
#endif
#if defined(__SSE4_1__)
  if constexpr (sizeof(V) == 16) return _mm_stream_ps((float*)p, (__m128)v);
#endif
  store_vector(p, v);
}
inline void stream_end() {
#if defined(__SSE4_1__)
  _mm_sfence();
#endif
}

template <class Plan, class Fn>
class LinearStep {
  using T = LinearTypes<Plan>;
  using Acc = typename T::Acc;
  using V = typename T::V;
  static constexpr int W = T::W, kD = T::kD, kPitch = T::kDPitch;
  static constexpr int64_t kRow = T::kStateColumns;
  static constexpr LinearForwardScratch<Plan> kAt{};
  static constexpr bool kDelta = Plan::kDelta, kNormalizer = Plan::kNormalizer;
  // Vectors of a row that are worked on together.
  static constexpr int kVectors = kRegisterBytes == 64 ? 8 : kDelta ? 2 : 4;

 public:
  // States of a launch from which on they do not stay in the cache.
  static constexpr int64_t kStreamBytes = 16 << 20;

  // scratch: LinearForwardScratch, then the state of a head of the task.
  LinearStep(const LinearInputs<Plan, Fn>& in, const LinearTask& task, char* scratch)
      : in_(in), p_(in.params()), task_(task), scratch_(scratch) {
    first_ = task.panel * T::kPanel;
    const int end = (task.panel + task.panels) * T::kPanel;
    last_ = end < T::kDv ? end : T::kDv;
    state_ = at(kAt.bytes);
    const int64_t row = kRow * int64_t(sizeof(Acc));
    stream_ = p_.final_state != nullptr && p_.sequences * p_.H * kD * row >= kStreamBytes &&
              (int64_t)p_.final_state % kRegisterBytes == 0 && row % kRegisterBytes == 0;
  }

  void run() {
    LinearAt where{task_.b, task_.hk, task_.head, task_.first, int(task_.length)};
    rows_of(in_.q(where, at(kAt.q_stage)), at(kAt.q_stage));
    rows_of(in_.k(where, at(kAt.k_stage)), at(kAt.k_stage));
    if constexpr (T::kDecay == DecayKind::kNone) a_[0] = 1;
    for (int64_t i = 0; i < task_.heads; ++i) {
      where.h = task_.head + i;
      head(where);
    }
    if (stream_) stream_end();
  }

 private:
  const LinearInputs<Plan, Fn>& in_;
  const ae_linear_params& p_;
  const LinearTask task_;
  char* const scratch_;
  Acc* state_;
  int first_, last_;  // columns
  bool stream_;
  alignas(64) Acc a_[kLinearBlock], beta_[kLinearBlock], inverse_[kLinearBlock];

  Acc* at(int64_t offset) const { return (Acc*)(scratch_ + offset); }
  const Acc* q(int t) const { return at(kAt.q_stage) + t * kPitch; }
  const Acc* k(int t) const { return at(kAt.k_stage) + t * kPitch; }
  // What row d decays by.
  AE_INLINE Acc decay(int t, int d) const {
    if constexpr (T::kChannel) {
      return at(kAt.a)[t * kPitch + d];
    } else {
      return a_[T::kScalar ? t : 0];
    }
  }

  template <class Rows>
  void rows_of(const Rows& rows, Acc* to) const {
    for (int t = 0; t < task_.length; ++t) {
      pack_row<Acc, Acc, kD>(to + t * kPitch, rows(t), rows.col, NoMod{});
    }
  }

  void head(const LinearAt& where) {
    const int64_t* s = p_.state_stride;
    const auto* from = (const Acc*)p_.state;
    if (from != nullptr) from += task_.sequence * s[0] + where.h * s[1];
    auto* to = (Acc*)p_.final_state;
    if (to != nullptr) to += (task_.sequence * p_.H + where.h) * kD * kRow;
    if (where.n == 0) return copy(from, to);
    constexpr int kTokens = int(round_up(kStepTokens, W));
    if constexpr (T::kScalar) in_.scalar_decay(where, a_, kTokens);
    if constexpr (T::kChannel) {
      for (int t = 0; t < where.n; ++t) in_.channel_decay(where, t, at(kAt.a) + t * kPitch);
    }
    if constexpr (kDelta) in_.beta(where, beta_, kTokens);
    if constexpr (kNormalizer) normalize(where, from, to);
    int column = first_;
    const auto groups = [&]<int kCount>() {
      for (; column + kCount * W <= last_; column += kCount * W) {
        group<kCount>(where, column, kCount * W, from, to);
      }
    };
    groups.template operator()<kVectors>();
    if constexpr (kVectors > 4) groups.template operator()<4>();
    if constexpr (kVectors > 2) groups.template operator()<2>();
    groups.template operator()<1>();
    if (column < last_) group<0>(where, column, last_ - column, from, to);
  }

  void copy(const Acc* from, Acc* to) const {
    if (to == nullptr) return;
    const int end = kNormalizer && last_ == T::kDv ? last_ + 1 : last_;
    const uint64_t bytes = sizeof(Acc) * uint64_t(end - first_);
    for (int d = 0; d < kD; ++d, to += kRow) {
      if (from != nullptr) {
        __builtin_memcpy(to + first_, from + d * p_.state_stride[2] + first_, bytes);
      } else {
        __builtin_memset(to + first_, 0, bytes);
      }
    }
  }

  // z, the last column, token by token, and the denominators.
  void normalize(const LinearAt& where, const Acc* from, Acc* to) {
    Acc den[kStepTokens]{};
    for (int d = 0; d < kD; ++d) {
      Acc z = from != nullptr ? from[d * p_.state_stride[2] + T::kDv] : Acc(0);
      for (int t = 0; t < where.n; ++t) {
        z = z * decay(t, d) + k(t)[d];
        den[t] += q(t)[d] * z;
      }
      if (to != nullptr && last_ == T::kDv) to[d * kRow + T::kDv] = z;
    }
    for (int t = 0; t < where.n; ++t) inverse_[t] = normalizer_inverse(Acc(p_.scale) * den[t]);
  }

  // ---- some columns of all rows, kCount vectors; kCount = 0: one, in part ----
  template <int kCount>
  __attribute__((noinline)) void group(const LinearAt& where, int column, int width,
                                       const Acc* initial, Acc* final_state) {
    constexpr int N = kCount > 0 ? kCount : 1;
    static constexpr Acc kZeros[N * W]{};
    Acc* sums = at(kAt.sums);
    const int64_t pitch = N * W;
    const auto values = in_.v(where, column, width, at(kAt.v_stage), pitch);
    // No initial state: a row of zeros again and again.
    const Acc* from = initial != nullptr ? initial + column : kZeros;
    int64_t from_pitch = initial != nullptr ? p_.state_stride[2] : 0;
    for (int t = 0; t < where.n; ++t) {
      const bool end = t + 1 == where.n && final_state != nullptr;
      Acc* to = end ? final_state + column : state_;
      const int64_t to_pitch = end ? kRow : pitch;
      V v[N], o[N]{};
      for (int j = 0; j < N; ++j) {
        v[j] = load_lanes<Acc>(values(t) + j * W * values.col, values.col, kCount > 0 ? W : width);
      }
      // From the second token on the rows are those that the last one wrote, in place.
      const int count = kCount > 0 || t == 0 || end ? width : W;
      if constexpr (kDelta) {
        V kept[N]{};
        const Acc both = gather<kCount>(t, from, from_pitch, count, kept, o);
        for (int j = 0; j < N; ++j) v[j] = (v[j] - kept[j]) * beta_[t];
        for (int j = 0; j < N; ++j) o[j] += v[j] * both;
      }
      sweep<kCount>(t, from, from_pitch, to, to_pitch, count, end && stream_, v, o);
      for (int j = 0; j < N; ++j) store_vector(sums + t * pitch + j * W, o[j] * Acc(p_.scale));
      from = state_, from_pitch = pitch;
    }
    finish_rows<Plan, Fn>(in_, where, column, width, sums, pitch, kNormalizer ? inverse_ : nullptr);
  }

  static constexpr int kAhead = 8;  // rows that are fetched early: 2 KB at 64 columns

  template <int kCount>
  static AE_INLINE V load_state(const Acc* row, int j, int count) {
    if constexpr (kCount > 0) {
      return load_vector<V>(row + j * W);
    } else {
      return load_lanes<Acc>(row, 1, count);
    }
  }

  // The new rows; without the delta rule o += q_d of each.
  template <int kCount>
  AE_INLINE void sweep(int t, const Acc* from, int64_t from_pitch, Acc* to, int64_t to_pitch,
                       int count, bool stream, const V* values, V* out) const {
    constexpr int N = kCount > 0 ? kCount : 1;
    V v[N], o[N];
    for (int j = 0; j < N; ++j) v[j] = values[j], o[j] = out[j];
    const Acc *qs = q(t), *ks = k(t);
    for (int d = 0; d < kD; ++d, from += from_pitch, to += to_pitch) {
      const Acc a = decay(t, d);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) {
        if (!kDelta) __builtin_prefetch(from + kAhead * from_pitch + j * W);
        V s = load_state<kCount>(from, j, count);
        if constexpr (T::kDecay != DecayKind::kNone) s *= a;
        s += v[j] * ks[d];
        if constexpr (!kDelta) o[j] += s * qs[d];
        if constexpr (kCount == 0) {
          Acc copy[W];
          store_vector(copy, s);
          __builtin_memcpy(to, copy, sizeof(Acc) * uint64_t(count));
        } else if (stream) {
          stream_vector(to + j * W, s);
        } else {
          store_vector(to + j * W, s);
        }
      }
    }
    for (int j = 0; j < N; ++j) out[j] = o[j];
  }

  // kept += k_d s and out += q_d s of the decayed rows s. Returns q . k.
  template <int kCount>
  AE_INLINE Acc gather(int t, const Acc* from, int64_t from_pitch, int count, V* kept,
                       V* out) const {
    constexpr int N = kCount > 0 ? kCount : 1;
    V u[N]{}, o[N]{};
    const Acc *qs = q(t), *ks = k(t);
    for (int d = 0; d < kD; ++d, from += from_pitch) {
      const Acc a = decay(t, d);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) {
        __builtin_prefetch(from + kAhead * from_pitch + j * W);
        V s = load_state<kCount>(from, j, count);
        if constexpr (T::kDecay != DecayKind::kNone) s *= a;
        u[j] += s * ks[d];
        o[j] += s * qs[d];
      }
    }
    V both{};
    for (int d = 0; d < kPitch; d += W) both += load_vector<V>(qs + d) * load_vector<V>(ks + d);
    for (int j = 0; j < N; ++j) kept[j] = u[j], out[j] = o[j];
    return hsum(both);
  }
};

}  // namespace ae
