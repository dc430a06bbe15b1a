// The recurrence token by token, for sequences of a few tokens: a step reads the state once and
// writes it once, and the memory sets its pace. Some columns of all rows of a head at a time:
//
//   row d:  s = a_d S_d + k_d v;  o += q_d s;  S'_d = s
//   delta rule: k (a S) and q (a S) first, then the rows, which are still in the cache;
//               o = q (a S) + (q . k) beta (v - k (a S))
#pragma once
#include "cpu/linear_forward_work.h"
#include "cpu/linear_output.h"
#include "cpu/linear_step_rows.h"

namespace ae {

// Sequences of at most so many tokens. More are faster in chunks: each token costs a pass over the
// state, at a third of the rate of a product, and two under the delta rule.
template <class Plan>
constexpr int kStepTokens = Plan::kDelta || Plan::kChunk < 32 ? 4 : 8;
static_assert(8 <= kLinearBlock);

template <class Plan, class Fn>
class LinearStep {
  using T = LinearTypes<Plan>;
  using Acc = typename T::Acc;
  using V = typename T::V;
  static constexpr int W = T::W, kD = T::kD, kPitch = T::kDPitch;
  static constexpr int64_t kRow = T::kStateColumns;
  static constexpr LinearForwardScratch<Plan> kAt{};
  static constexpr bool kDelta = Plan::kDelta, kNormalizer = Plan::kNormalizer;
  using Rows = LinearStepRows<Plan>;
  // Registers for sums: vectors of a row that are worked on together, times tokens. In memory the
  // sums would stand between the stores of the state, which are what is waited for (measured: half
  // the bandwidth).
  static constexpr int kSums = kRegisterBytes == 64 ? 16 : 8;
  static constexpr int kVectors = kDelta ? kSums / 2 : kSums;

 public:
  // scratch: LinearForwardScratch, then the state of a head of the task.
  LinearStep(const LinearInputs<Plan, Fn>& in, const LinearTask& task, char* scratch)
      : in_(in), p_(in.params()), task_(task), scratch_(scratch) {
    first_ = task.panel * T::kPanel;
    const int end = (task.panel + task.panels) * T::kPanel;
    last_ = end < T::kDv ? end : T::kDv;
    state_ = at(kAt.bytes);
    stream_ = streams_states<Plan>(p_);
    lines_ = Rows::streams_lines(p_);
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
    if (stream_ || lines_) stream_end();
  }

 private:
  const LinearInputs<Plan, Fn>& in_;
  const ae_linear_params& p_;
  const LinearTask task_;
  char* const scratch_;
  Acc* state_;
  int first_, last_;     // columns
  bool stream_, lines_;  // final states go past the caches: rows, lines across rows
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
    constexpr int kTokens = int(round_up(kStepTokens<Plan>, W));
    if constexpr (T::kScalar) in_.scalar_decay(where, a_, nullptr, kTokens);
    if constexpr (T::kChannel) {
      for (int t = 0; t < where.n; ++t) in_.channel_decay(where, t, at(kAt.a) + t * kPitch);
    }
    if constexpr (kDelta) in_.beta(where, beta_, kTokens);
    if constexpr (kWide) {
      const int width = last_ - first_;
      if (where.n == 1 && (width > kVectors * W || ((kDelta || kNormalizer) && width == T::kDv))) {
        if (kNormalizer && width < T::kDv) normalize(where, from, to);
        return whole_rows(where, from, to);
      }
    }
    if constexpr (kNormalizer) normalize(where, from, to);
    int column = first_;
    const auto groups = [&]<int kCount>() {
      for (; column + kCount * W <= last_; column += kCount * W) {
        group<kCount>(where, column, kCount * W, from, to);
      }
    };
    if (kDelta || where.n < 2) groups.template operator()<kVectors>();
    if constexpr (kVectors > 8) groups.template operator()<8>();
    if constexpr (kVectors > 4) groups.template operator()<4>();
    groups.template operator()<2>();
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
    Acc den[kStepTokens<Plan>]{};
    for (int d = 0; d < kD; ++d) {
      // The lines of a column: they are far apart, and the rows come next.
      if (from != nullptr) __builtin_prefetch(from + (d + 16) * p_.state_stride[2] + T::kDv);
      Acc z = from != nullptr ? from[d * p_.state_stride[2] + T::kDv] : Acc(0);
      for (int t = 0; t < where.n; ++t) {
        z = z * decay(t, d) + k(t)[d];
        den[t] += q(t)[d] * z;
      }
      if (to != nullptr && last_ == T::kDv) to[d * kRow + T::kDv] = z;
    }
    for (int t = 0; t < where.n; ++t) inverse_[t] = normalizer_inverse(Acc(p_.scale) * den[t]);
  }

  // ---- one token, whole rows, in the order of the memory ----
  // Pieces of rows would be fetched and stored at half the rate of whole ones. So a few rows give
  // their part of the sums, o = q (a S) + (q . k) v, and are then written one after the other.
  // Under the delta rule all rows give theirs first, k (a S) and q (a S).
  static constexpr bool kWide = T::kDv % W == 0;
  static constexpr int kTogether = 2;  // rows: 4 KB at 512 columns
  // Under a normalizer z is the last column: v is 1 there, and goes on as in the next row.
  static constexpr int kValues = kRow + (kNormalizer ? W : 0);

  __attribute__((noinline)) void whole_rows(const LinearAt& where, const Acc* initial,
                                            Acc* final_state) {
    alignas(64) static constexpr Acc kZeros[kRow]{};
    alignas(64) Acc v[kValues], qs[kPitch], ks[kPitch];
    const int width = last_ - first_;
    const bool all = width == T::kDv;
    Acc* sums = at(kAt.sums);
    const auto values = in_.v(where, first_, width, v, width);
    const Acc product = decay_rows(qs, ks);
    const Acc* from = initial != nullptr ? initial + first_ : kZeros;
    const int64_t pitch = initial != nullptr ? kRow : 0;
    if constexpr (kDelta) Rows::gather(from, pitch, width, qs, ks, at(kAt.right), sums);
    for (int j = 0; j < width; j += W) {
      V x = load_lanes<Acc>(values(0) + j * values.col, values.col, W), o{};
      if constexpr (kDelta) {
        x = (x - load_vector<V>(at(kAt.right) + j)) * beta_[0];
        o = load_vector<V>(sums + j);
      }
      store_vector(v + j, x);
      store_vector(sums + j, o + x * product);
    }
    if constexpr (kNormalizer) {
      v[width] = 1;
      store_vector(v + width + 1, load_vector<V>(v));
    }
    const bool lines = kNormalizer && all && lines_;
    int64_t done = 0;  // elements of the head that are written
    Acc den = 0;
    const auto write = [&](int d) __attribute__((always_inline)) {
      const Acc* row = from + d * pitch;
      Acc* to = final_state != nullptr ? final_state + first_ + d * kRow : nullptr;
      if (kNormalizer && all) {
        const Acc z = row[T::kDv] * decay(0, d) + k(0)[d];
        den += q(0)[d] * z;
        if (to != nullptr && !lines) to[T::kDv] = z;
      }
      if (to == nullptr) return;
      if (lines) {
        const int after = d + 1 < kD ? d + 1 : d;
        done = Rows::write_lines(d, done, initial, v, decay(0, d), k(0)[d], decay(0, after),
                                 k(0)[after], final_state);
      } else {
        Rows::write(row, width, v, decay(0, d), k(0)[d], stream_, to);
      }
    };
    if constexpr (kDelta) {
      for (int d = 0; d < kD; ++d) write(d);
    } else if (kInRegisters && all) {
      V o[kInRegisters ? T::kDv / W : 1];
      constexpr int N = sizeof(o) / sizeof(V);
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) o[i] = load_vector<V>(sums + i * W);
      for (int d = 0; d < kD; ++d) {
        const Acc* row = from + d * pitch;
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i) {
          __builtin_prefetch(row + kTogether * pitch + i * W);
          o[i] += load_vector<V>(row + i * W) * qs[d];
        }
        write(d);
      }
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) store_vector(sums + i * W, o[i]);
    } else {
      int d = 0;
      for (; d + kTogether <= kD; d += kTogether) {
        Rows::template add<kTogether>(from + d * pitch, pitch, width, qs + d, sums);
        for (int r = 0; r < kTogether; ++r) write(d + r);
      }
      for (; d < kD; ++d) {
        Rows::template add<1>(from + d * pitch, pitch, width, qs + d, sums);
        write(d);
      }
    }
    for (int j = 0; j < width; j += W) {
      store_vector(sums + j, load_vector<V>(sums + j) * Acc(p_.scale));
    }
    if (kNormalizer && all) inverse_[0] = normalizer_inverse(Acc(p_.scale) * den);
    finish_rows<Plan, Fn>(in_, where, first_, width, sums, width, kNormalizer ? inverse_ : nullptr);
  }
  // Sums of a row under a normalizer. Without one such rows are a group (below).
  static constexpr bool kInRegisters = kNormalizer && kWide && T::kDv / W <= kSums;

  // The token's q and k, each channel times its decay. Returns q . k.
  Acc decay_rows(Acc* qs, Acc* ks) const {
    V both{};
    for (int d = 0; d < kPitch; d += W) {
      const V x = load_vector<V>(q(0) + d), y = load_vector<V>(k(0) + d);
      const V a = T::kChannel ? load_vector<V>(at(kAt.a) + d) : V{} + decay(0, 0);
      store_vector(qs + d, x * a);
      store_vector(ks + d, y * a);
      both += x * y;
    }
    return hsum(both);
  }

  // ---- some columns of all rows, kCount vectors; kCount = 0: one, in part ----
  template <int kCount>
  __attribute__((noinline)) void group(const LinearAt& where, int column, int width,
                                       const Acc* initial, Acc* final_state) {
    constexpr int N = kCount > 0 ? kCount : 1;
    static constexpr Acc kZeros[N * W]{};
    Acc* sums = at(kAt.sums);
    const int64_t pitch = N * W;
    // The tokens' sums and values have the room of a chunk's, which is a panel wide.
    static_assert(kStepTokens<Plan> * N * W <= T::kChunk * T::kPanel || N * W > T::kDv);
    const auto values = in_.v(where, column, width, at(kAt.v_stage), pitch);
    // No initial state: a row of zeros again and again.
    const Acc* from = initial != nullptr ? initial + column : kZeros;
    int64_t from_pitch = initial != nullptr ? p_.state_stride[2] : 0;
    const Acc* next = from + kAhead * from_pitch;
    if (kDelta && initial != nullptr) {
      const bool same = column + 2 * N * W <= last_;
      next = same ? from + N * W : initial + p_.state_stride[1] + first_;
    }
    int t = 0;
    const auto tokens = [&]<int kTokens>() {
      for (; t + kTokens <= where.n; t += kTokens) {
        const bool end = t + kTokens == where.n && final_state != nullptr;
        Acc* to = end ? final_state + column : state_;
        // What nobody reads goes nowhere.
        const int64_t to_pitch = end ? kRow : t + kTokens == where.n ? 0 : pitch;
        V v[kTokens][N], o[kTokens][N]{};
        for (int i = 0; i < kTokens; ++i) {
          const auto* row = values(t + i);
          for (int j = 0; j < N; ++j) {
            v[i][j] = load_lanes<Acc>(row + j * W * values.col, values.col, kCount > 0 ? W : width);
          }
        }
        // From the second time on the rows are those of the last, in place.
        const int count = kCount > 0 || t == 0 || end ? width : W;
        if constexpr (kDelta) {
          V kept[N]{};
          const Acc both = gather<kCount>(t, from, from_pitch, count, kept, o[0]);
          for (int j = 0; j < N; ++j) v[0][j] = (v[0][j] - kept[j]) * beta_[t];
          for (int j = 0; j < N; ++j) o[0][j] += v[0][j] * both;
        }
        sweep<kCount, kTokens>(t, from, from_pitch, to, to_pitch, count, end && stream_, next, v,
                               o);
        for (int i = 0; i < kTokens; ++i) {
          for (int j = 0; j < N; ++j) {
            store_vector(sums + (t + i) * pitch + j * W, o[i][j] * Acc(p_.scale));
          }
        }
        from = state_, from_pitch = pitch;
      }
    };
    constexpr int kTogether = kDelta || kCount == 0 ? 1 : kSums / N;
    if constexpr (kTogether >= 4) tokens.template operator()<4>();
    if constexpr (kTogether >= 2) tokens.template operator()<2>();
    tokens.template operator()<1>();
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

  // The rows after some tokens; without the delta rule o += q_d of each. Meanwhile rows from `next`
  // on are fetched: those further down, or under the delta rule, which has just read these, those
  // that come after.
  template <int kCount, int kTokens, int N>
  AE_INLINE void sweep(int t, const Acc* from, int64_t from_pitch, Acc* to, int64_t to_pitch,
                       int count, bool stream, const Acc* next, const V (&v)[kTokens][N],
                       V (&out)[kTokens][N]) const {
    V o[kTokens][N];
#pragma GCC unroll 4
    for (int i = 0; i < kTokens; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < N; ++j) o[i][j] = out[i][j];
    }
    const Acc *qs = q(t), *ks = k(t);
    const int64_t next_pitch = p_.state_stride[2];
    for (int d = 0; d < kD; ++d, from += from_pitch, to += to_pitch) {
#pragma GCC unroll 16
      for (int j = 0; j < N; ++j) {
        __builtin_prefetch(next + d * next_pitch + j * W);
        V s = load_state<kCount>(from, j, count);
#pragma GCC unroll 4
        for (int i = 0; i < kTokens; ++i) {
          if constexpr (T::kDecay != DecayKind::kNone) s *= decay(t + i, d);
          s += v[i][j] * ks[i * kPitch + d];
          if constexpr (!kDelta) o[i][j] += s * qs[i * kPitch + d];
        }
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
#pragma GCC unroll 4
    for (int i = 0; i < kTokens; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < N; ++j) out[i][j] = o[i][j];
    }
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
