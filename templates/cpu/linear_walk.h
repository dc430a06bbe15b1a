// One task of the forward pass: the chunks of one sequence, in order, for some heads and columns.
#pragma once
#include "cpu/linear_chunk.h"
#include "cpu/linear_forward_work.h"
#include "cpu/linear_output.h"
#include "cpu/linear_state.h"
#include "cpu/linear_update.h"

namespace ae {

template <class Plan, class Fn>
class LinearWalk {
  using T = LinearTypes<Plan>;
  using Acc = typename T::Acc;
  using Elem = typename T::Elem;
  using M = typename T::M;
  using V = typename T::V;
  using Inputs = LinearInputs<Plan, Fn>;
  using Channel = LinearChannel<Plan>;
  using Gates = LinearGates<Acc, T::kChunk>;
  static constexpr int W = T::W, C = T::kChunk, N = T::kPanel, kPitch = T::kDPitch;
  static constexpr LinearForwardScratch<Plan> kAt{};
  // Elements of a panel of a state as products read it, where that is not the state itself.
  static constexpr int64_t kPacked = T::kPair == 2 ? int64_t(T::kDRows) * N : 0;
  static constexpr bool kDelta = Plan::kDelta, kNormalizer = Plan::kNormalizer;

 public:
  // Bytes of the states of a task.
  static int64_t state_bytes(int64_t heads, int64_t panels) {
    const int64_t sums = heads * (panels * T::kPanelState + kPitch);
    return linear_line(sums * int64_t(sizeof(Acc)) + heads * panels * kPacked * int64_t(sizeof(M)));
  }

  // scratch: LinearForwardScratch, then the states.
  LinearWalk(const Inputs& in, const LinearTask& task, char* scratch)
      : in_(in), p_(in.params()), task_(task), scratch_(scratch) {
    states_ = (Acc*)(scratch + kAt.bytes);
    sums_z_ = states_ + task.heads * task.panels * T::kPanelState;
    packed_ = (M*)(sums_z_ + task.heads * kPitch);
  }

  void run() {
    __builtin_memset(at<M>(kAt.weights), 0, sizeof(M) * C * C);
    for (int64_t i = 0; i < task_.heads; ++i) load_state(i);
    fresh_ = p_.state == nullptr;
    for (int64_t t = 0; t < task_.length; t += C) {
      const int64_t left = task_.length - t;
      more_ = left > C;
      keep_ = more_ || p_.final_state != nullptr;
      chunk(task_.first + t, int(left < C ? left : C));
      fresh_ = false;
    }
    if (p_.final_state == nullptr) return;
    const bool stream = streams_states<Plan>(p_);
    for (int64_t i = 0; i < task_.heads; ++i) store_state(i, stream);
    if (stream) stream_end();
  }

 protected:
  const Inputs& in_;
  const ae_linear_params& p_;
  const LinearTask task_;
  char* const scratch_;
  Acc *states_, *sums_z_;
  M* packed_;                              // null: not kept
  bool fresh_, more_;                      // the state is zero; chunks follow
  bool keep_;                              // somebody reads the state after this chunk
  const M *q_rows_, *k_rows_, *k_tokens_;  // tiles by row, and k over tokens

  // Of the head in work.
  Gates gates_;
  alignas(64) Acc beta_[C], factor_[C];       // factor: of q S
  alignas(64) Acc row_sums_[C], inverse_[C];  // of M; one over the normalizer
  alignas(64) Acc decay_[kPitch];             // of the rows of the state, over the chunk

  template <class X>
  X* at(int64_t offset) const {
    return (X*)(scratch_ + offset);
  }
  Acc* state(int64_t head, int panel) const {
    return states_ + (head * task_.panels + panel) * T::kPanelState;
  }
  // As products read it: what the last update left, or rounded now.
  M* packed(int64_t head, int panel) const {
    if constexpr (T::kPair == 2) {
      if (packed_ == nullptr) {
        if (!fresh_) pack_state<Plan>(state(head, panel), at<M>(kAt.state));
        return at<M>(kAt.state);
      }
    }
    return packed_ + (head * task_.panels + panel) * kPacked;
  }
  Acc* z(int64_t head) const { return sums_z_ + head * kPitch; }

  // ---- states in memory ----
  void load_state(int64_t i) {
    const int64_t* s = p_.state_stride;
    const auto* from = (const Acc*)p_.state;
    if (from != nullptr) from += task_.sequence * s[0] + (task_.head + i) * s[1];
    load_panels<Plan>(from, s[2], task_.panel, int(task_.panels), state(i, 0));
    if (T::kPair == 2 && from != nullptr) {
      for (int n = 0; n < task_.panels; ++n) pack_state<Plan>(state(i, n), packed(i, n));
    }
    if constexpr (kNormalizer) {
      for (int d = 0; d < kPitch; ++d) {
        z(i)[d] = from != nullptr && d < T::kD ? from[d * s[2] + T::kDv] : Acc(0);
      }
    }
  }
  void store_state(int64_t i, bool stream) const {
    constexpr int64_t kRow = T::kStateColumns;
    Acc* to = (Acc*)p_.final_state + (task_.sequence * p_.H + task_.head + i) * T::kD * kRow;
    store_panels<Plan>(state(i, 0), task_.panel, int(task_.panels), stream, to);
    if (kNormalizer && task_.panel == 0) {
      for (int d = 0; d < T::kD; ++d) to[d * kRow + T::kDv] = z(i)[d];
    }
  }

  // ---- a chunk ----
  void chunk(int64_t t, int n) {
    LinearAt where{task_.b, task_.hk, task_.head, t, n};
    const LinearAt next = following(where);
    Acc *q_stage = at<Acc>(kAt.q_stage), *k_stage = at<Acc>(kAt.k_stage);
    const auto q = in_.q(where, q_stage);
    const auto k = in_.k(where, k_stage);
    if constexpr (T::kChannel) {
      tile_sums<Plan>(q, n, q_stage);
      tile_sums<Plan>(k, n, k_stage);
      q_rows_ = at<M>(kAt.q), k_rows_ = at<M>(kAt.k);
    } else {
      M* k_channels = at<M>(kAt.k_channels);
      tile_by_channel<Plan>(k, n, k_channels);
      const bool update = keep_, rows = kDelta;
      k_rows_ = k_tokens_ = rows_in_place<Plan>(k);
      if (T::kPair == 2 ? update : k_tokens_ == nullptr && (update || rows)) {
        tile_over_tokens<Plan>(k, n, at<M>(kAt.k_tokens));
        k_tokens_ = at<M>(kAt.k_tokens);
      }
      q_rows_ = rows_in_place<Plan>(q);
      if (q_rows_ == nullptr) {
        tile_by_row<Plan>(q, n, at<M>(kAt.q));
        q_rows_ = at<M>(kAt.q);
      }
      lower_product<Plan>(q_rows_, k_channels, n, at<Acc>(kAt.products));
      if constexpr (kDelta) {
        if (k_rows_ == nullptr) {
          if (T::kPair == 2) tile_by_row<Plan>(k, n, at<M>(kAt.k));
          k_rows_ = T::kPair == 2 ? at<M>(kAt.k) : k_tokens_;
        }
        lower_product<Plan>(k_rows_, k_channels, n, at<Acc>(kAt.key_products));
      }
    }
    for (int64_t i = 0; i < task_.heads; ++i) {
      where.h = task_.head + i;
      weights(where, i == 0);
      if constexpr (kNormalizer) normalize(where, i, k);
      for (int panel = 0; panel < task_.panels; ++panel) {
        LinearFetch rows;
        if (i == 0 && panel == 0) {
          rows.add(in_.raw_q(next).ahead(next.n, T::kD));
          rows.add(in_.raw_k(next).ahead(next.n, T::kD));
        }
        columns(where, panel, state(i, panel), packed(i, panel), rows);
      }
    }
  }

  // The next chunk; without tokens at the end.
  LinearAt following(LinearAt a) const {
    a.t += a.n;
    const int64_t left = task_.first + task_.length - a.t;
    a.n = int(left < C ? left : C);
    return a;
  }

  // Decays, M, and A of one head.
  void weights(const LinearAt& where, bool first) {
    const Acc scale = Acc(p_.scale);
    const int n = where.n;
    Acc *products = at<Acc>(kAt.products), *key_products = at<Acc>(kAt.key_products);
    const Acc* a = nullptr;  // D, where the products do not hold it
    if constexpr (T::kChannel) {
      channel_products(where);
    } else if constexpr (T::kScalar) {
      load_scalar_decay(where);
      for (int t = 0; t < C; ++t) factor_[t] = scale * gates_.e[t];
      a = gates_.a;
    }
    if constexpr (!T::kScalar) {
      for (int t = 0; t < C; ++t) factor_[t] = scale;
    }
    if (T::kDecay != DecayKind::kNone || first) {
      lower_weights<Acc, M, C>(products, a, scale, n, at<M>(kAt.weights),
                               kNormalizer ? row_sums_ : nullptr);
    }
    if constexpr (kDelta) {
      in_.beta(where, beta_);
      delta_weights<Acc, C>(key_products, a, beta_, n, at<Acc>(kAt.minus));
      invert_diagonal<Acc, C>(at<Acc>(kAt.minus), n, at<Acc>(kAt.inverse));
    }
  }

  void load_scalar_decay(const LinearAt& where) {
    in_.scalar_decay(where, gates_.a, gates_.e);
    gates_.accumulate();
    for (int d = 0; d < kPitch; ++d) decay_[d] = gates_.total;
  }
  // a, and g in the place of `rest`.
  void load_channel_decay(const LinearAt& where) {
    const int64_t n = where.n, end = Channel::blocks(where.n) * kLinearBlock * kPitch;
    Acc *a = at<Acc>(kAt.a), *rest = at<Acc>(kAt.rest);
    for (int64_t t = 0; t < n; ++t) {
      in_.channel_decay(where, int(t), a + t * kPitch, rest + t * kPitch);
    }
    for (int64_t i = n * kPitch; i < end; ++i) a[i] = 1, rest[i] = 0;
  }

  void channel_products(const LinearAt& where) {
    const int n = where.n, blocks = Channel::blocks(n);
    Acc *a = at<Acc>(kAt.a), *inside = at<Acc>(kAt.inside), *rest = at<Acc>(kAt.rest);
    Acc *whole = at<Acc>(kAt.whole), *before = at<Acc>(kAt.before), *keys = at<Acc>(kAt.keys);
    const Acc *q = at<Acc>(kAt.q_stage), *k = at<Acc>(kAt.k_stage);
    load_channel_decay(where);
    Channel::products(a, n, inside, rest, whole, before);
    Channel::decay_rows(q, inside, before, n, at<M>(kAt.q_inside), at<M>(kAt.q));
    if constexpr (kDelta) {
      Channel::decay_rows(k, inside, before, n, at<M>(kAt.k_inside), at<M>(kAt.k));
    }
    Channel::decay_keys(k, rest, n, keys);
    Channel::lower_product(q, at<M>(kAt.q_inside), at<Acc>(kAt.products), kDelta ? k : nullptr,
                           at<M>(kAt.k_inside), at<Acc>(kAt.key_products), k, a, whole, n, keys,
                           at<M>(kAt.k_channels));
    __builtin_memcpy(decay_, before + int64_t(blocks) * kPitch, sizeof(decay_));
  }

  // Denominators of the rows, and z after the chunk.
  template <class Rows>
  void normalize(const LinearAt& where, int64_t head, const Rows& k) {
    Acc* sum = z(head);
    for (int t = 0; t < where.n; ++t) {
      const M* q = q_rows_ + int64_t(t) * kPitch;
      V dot{};
      for (int d = 0; d < kPitch; d += W) {
        dot += load_widened<Acc>(q + d) * load_vector<V>(sum + d);
      }
      const Acc den = row_sums_[t] + factor_[t] * hsum(dot);
      inverse_[t] = normalizer_inverse(den);
    }
    if (keep_) add_keys(where, k, sum);
  }
  template <class Rows>
  void add_keys(const LinearAt& where, const Rows& k, Acc* sum) const {
    for (int d = 0; d < kPitch; d += W) {
      V x = load_vector<V>(sum + d);
      if constexpr (T::kChannel) {
        x *= load_vector<V>(decay_ + d);
        V keys[W];
        for (int j = 0; j < W; ++j) {
          keys[j] = V{};
          if (d + j >= T::kD) continue;
          const Acc* row = at<Acc>(kAt.keys) + int64_t(d + j) * C;
          for (int t = 0; t < Channel::blocks(where.n) * kLinearBlock; t += W) {
            keys[j] += load_vector<V>(row + t);
          }
        }
        x += sum_each(keys);
      } else {
        if constexpr (T::kScalar) x *= gates_.total;
        const int count = T::kD - d < W ? T::kD - d : W;
        for (int t = 0; t < where.n; ++t) {
          const V y = load_lanes<Acc>(k(t) + d * k.col, k.col, count);
          if constexpr (T::kScalar) {
            x += y * gates_.f[t];
          } else {
            x += y;
          }
        }
      }
      store_vector(sum + d, x);
    }
  }

  // One panel of columns of one head: output rows, and the state after the chunk.
  // Meanwhile rows of the next chunk are fetched.
  void columns(const LinearAt& where, int panel, Acc* state, M* packed, LinearFetch& ahead) {
    const int number = task_.panel + panel, column = number * N, width = T::panel_width(number);
    const int n = where.n;
    M *v = at<M>(kAt.v), *left = T::kScalar && keep_ ? at<M>(kAt.v_left) : nullptr;
    const M* s = T::kPair == 2 ? packed : (const M*)state;
    const auto rows = in_.v(where, column, width, at<Acc>(kAt.v_stage), N);
    const LinearAt next = following(where);
    ahead.add(in_.raw_v(next, column).ahead(next.n, width));
    ahead.add(in_.out(next, column).ahead(next.n, width));
    if (T::kChannel && panel == 0) ahead.add(in_.raw_decay(next).ahead(next.n, T::kD));
    bool bad;
    if constexpr (kDelta) {
      bad = solve(rows, n, width, s, v, left);
    } else {
      bad = pack_values<T>(rows, n, width, gates_.f, v, left);
    }
    const M* m = at<M>(kAt.weights);
    const int64_t q_steps = fresh_ ? 0 : T::kDSteps;
    const auto out = in_.out(where, column);
    if (!kNormalizer && !Fn::kHasOutMod && !bad && out.col == 1 && width == N) {
      output_rows<T>(n, q_steps, q_rows_, s, factor_, true, m, v, (Elem*)out.base, out.stride,
                     ahead);
    } else {
      Acc* sums = at<Acc>(kAt.sums);
      output_rows<T>(n, q_steps, q_rows_, s, factor_, !bad, m, v, sums, N, ahead);
      if (bad) add_by_rows<T>(n, m, v, sums);
      finish_rows<Plan, Fn>(in_, where, column, width, sums, N, kNormalizer ? inverse_ : nullptr);
    }
    if (keep_) update(n, T::kScalar ? left : v, state, more_ ? packed : nullptr, ahead);
    ahead.rest();
  }

  // Vn of the delta rule as operands. Returns whether it holds Inf or NaN.
  template <class Rows>
  bool solve(const Rows& rows, int n, int width, const M* s, M* v, M* left) {
    Acc *right = at<Acc>(kAt.right), *solved = at<Acc>(kAt.solved), *minus = at<Acc>(kAt.minus);
    right_sides(rows, n, width, s, right);
    solve_unit_lower<Acc, C, N>(minus, at<Acc>(kAt.inverse), n, right, solved);
    V seen{};
    for (int i = 0; i < n * N; i += W) seen += load_vector<V>(solved + i) * Acc(0);
    const bool bad = hsum(seen) != 0;
    if (bad) {
      right_sides(rows, n, width, s, right);
      solve_by_rows<Acc, C, N>(minus, n, right, solved);
    }
    pack_sums<Acc, M, N>(v, solved, n, [](int) { return Acc(1); });
    if (left != nullptr) {
      pack_sums<Acc, M, N>(left, solved, n, [this](int i) { return gates_.f[i]; });
    }
    return bad;
  }
  // beta (v - e k S).
  template <class Rows>
  __attribute__((noinline)) void right_sides(const Rows& rows, int n, int width, const M* s,
                                             Acc* right) const {
    if (fresh_) {
      __builtin_memset(right, 0, sizeof(Acc) * uint64_t(n) * N);
    } else {
      gemm<Acc, M, N, GemmMode::kOverwrite>(n, T::kDSteps, k_rows_, kPitch, T::kPair, s, N, right,
                                            N);
    }
    for (int t = 0; t < n; ++t) {
      const auto* from = rows(t);
      const Acc e = T::kScalar ? gates_.e[t] : Acc(1);
      for (int j = 0; j < N; j += W) {
        const int count = width - j < W ? (width - j < 0 ? 0 : width - j) : W;
        Acc* to = right + int64_t(t) * N + j;
        const V x = load_lanes<Acc>(from + j * rows.col, rows.col, count);
        store_vector(to, (x - load_vector<V>(to) * e) * beta_[t]);
      }
    }
  }

  // The state after the chunk: rows decayed, plus k^T v; `packed`, if not null, as products read
  // it.
  void update(int n, const M* v, Acc* state, M* packed, LinearFetch& ahead) const {
    const M* k = k_tokens_;
    int64_t row = T::kPair, step = T::kPair * kPitch;
    if constexpr (T::kChannel) {
      k = Channel::update_operand(at<Acc>(kAt.keys), n, at<M>(kAt.k_channels));
      row = C, step = T::kPair;
    }
    constexpr auto kDecay = T::kDecay == DecayKind::kNone ? StateDecay::kNone : StateDecay::kByRow;
    using State = LinearStateLayout<T::kD, N, N, N, kDecay>;
    update_state<T, State>((n + T::kPair - 1) / T::kPair, k, row, step, v, state, state, decay_,
                           packed, ahead);
  }
};

}  // namespace ae
