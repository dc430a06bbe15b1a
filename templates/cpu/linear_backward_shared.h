// Scalar decay or none in the backward pass of linear attention: q . k, k . k and the packed q and
// k are the same for all value heads of a key head. Decays multiply sums, or rows of v and dO. The
// gradients of q . k are added up over the heads before they meet k and q.
#pragma once
#include "cpu/linear_backward_operands.h"

namespace ae {

template <class Plan, class Fn>
class LinearBackwardShared {
  using X = LinearBackwardTypes<Plan>;
  using A = typename X::A;
  using M = typename X::M;
  using V = typename X::V;
  using Tile = LinearTile<Plan>;
  using Head = LinearBackwardHead<Plan>;
  using Operands = LinearBackwardOperands<Plan, Fn>;
  static constexpr int W = X::W, C = X::C, D = X::kD, kDp = X::kDp, kVp = X::kVp;
  static constexpr int kVectors = X::kVectors;

 public:
  LinearBackwardShared(const Operands& io, LinearBackwardScratch<Plan>& x) : io_(io), x_(x) {}

  void begin() const { x_.gates.set_ones(); }

  // ---- of the key head ----
  void load_keys(const LinearAt& at, const LinearAt& next) const {
    io_.load_k(at, next, x_.k);
    k_bad_ = Tile::any_bad(x_.k, at.n, kDp, kDp);
    const M* nat = Tile::natural(x_.k, x_.k_nat, C * kDp);
    Tile::template by_row<kDp>(x_.k, x_.k_row, C);
    Tile::template by_column<kDp>(nat, kDp, x_.k_col);
    if constexpr (X::kDelta) Tile::lower_scores(at.n, D, nat, kDp, x_.k_col, x_.kk);
  }
  // Only what U takes.
  void load_query_rows(const LinearAt& at, const LinearAt& next) const {
    io_.load_q(at, next, x_.q);
    Tile::template by_row<kDp>(x_.q, x_.q_row, C);
  }
  void load_queries(const LinearAt& at, const LinearAt& next) const {
    io_.load_q(at, next, x_.q);
    q_bad_ = Tile::any_bad(x_.q, at.n, kDp, kDp);
    const M* nat = Tile::natural(x_.q, x_.q_nat, C * kDp);
    Tile::template by_row<kDp>(x_.q, x_.q_row, C);
    Tile::lower_scores(at.n, D, nat, kDp, x_.k_col, x_.qk);
    transpose_tile(x_.q_t, C, x_.q, kDp, C, kDp);
    transpose_tile(x_.k_t, C, x_.k, kDp, C, kDp);
    Tile::clear(x_.dq_t, C * kDp);
    Tile::clear(x_.dk_t, C * kDp);
    Tile::clear(x_.sum_qk, C * C);
    if constexpr (X::kDelta) Tile::clear(x_.sum_kk, C * C);
  }
  // dq and dk of the chunk, all heads added up.
  void finish(const LinearAt& at) const {
    transpose_tile(x_.dq, kDp, x_.dq_t, C, kDp, C);
    transpose_tile(x_.dk, kDp, x_.dk_t, C, kDp, C);
    add_lower(at.n, x_.sum_qk, x_.k, k_row(), k_bad_, x_.dq);
    add_transposed(at.n, x_.sum_qk, x_.q, q_row(), q_bad_);
    if constexpr (X::kDelta) {
      add_lower(at.n, x_.sum_kk, x_.k, k_row(), k_bad_, x_.dk);
      add_transposed(at.n, x_.sum_kk, x_.k, k_row(), k_bad_);
    }
  }

  // ---- of a value head ----
  void load_decays(const LinearAt& at, bool) const {
    if constexpr (X::kScalar) {
      io_.inputs().scalar_decay(at, x_.gates.a, x_.gates.e);
      x_.gates.accumulate();
    }
    for (int d = 0; d < D; ++d) x_.factor[d] = x_.gates.total;
  }
  // (q_t . k_s) D_ts, and under the delta rule the same of k and k.
  void scores(int n, bool backward) const {
    if (backward) lower_weights<A, A, C>(x_.qk, decays(), A(1), n, x_.m, nullptr);
    if constexpr (X::kDelta) lower_weights<A, A, C>(x_.kk, decays(), A(1), n, x_.kd, nullptr);
  }

  // Products of rows of q or k with the state or U; rows still lack gates.e, or gates.f.
  void queries_times(int n, const M* b, A* c) const { Tile::state_times(n, q_nat(), b, c); }
  void keys_in_times(int n, const M* b, A* c) const { Tile::state_times(n, k_nat(), b, c); }
  void keys_out_times(int n, const M* b, A* c) const { Tile::state_times(n, k_nat(), b, c); }

  // state = factor state + keys^T b, and the same for U with q; U += keys^T b. Rows of b have had
  // their gates.
  void add_keys(int n, const M* b, A* state) const {
    Tile::template add_to_state<GemmMode::kScale>(n, k_row(), b, state, x_.factor);
  }
  void add_queries(int n, const M* b, A* state) const {
    Tile::template add_to_state<GemmMode::kScale>(n, q_row(), b, state, x_.factor);
  }
  void add_keys_in(int n, const M* b, A* state) const {
    Tile::template add_to_state<GemmMode::kAccumulate>(n, k_row(), b, state, x_.factor);
  }

  // z = factor z + sum of keys, dz = factor dz + sum of q times x[t].
  void add_z(int n, A* z) const { add_rows(n, x_.k, x_.gates.f, z); }
  void add_dz(int n, const A* x, A* z) const {
    for (int t = 0; t < n; ++t) x_.row_factor[t] = x_.gates.e[t] * x[t];
    add_rows(n, x_.q, x_.row_factor, z);
  }
  // out[t] = (q e)_t . z
  void queries_dot(const A* z, A* out) const {
    V sum[kVectors]{};
    for (int d = 0; d < D; ++d) {
      for (int j = 0; j < kVectors; ++j) sum[j] += load_vector<V>(x_.q_t + d * C + j * W) * z[d];
    }
    store_gated(sum, x_.gates.e, out);
  }
  // out[t] = (q e)_t . (dO S^T)_t
  void queries_dot_gradient(A* out) const {
    V sum[kVectors]{};
    for (int d = 0; d < D; ++d) {
      for (int j = 0; j < kVectors; ++j) {
        const int at = d * C + j * W;
        sum[j] += load_vector<V>(x_.q_t + at) * load_vector<V>(x_.x_t + at);
      }
    }
    store_gated(sum, x_.gates.e, out);
  }
  // d(q e) from dO S^T under a normalizer.
  void normalize_gradient(const A* z) const {
    for (int d = 0; d < D; ++d) {
      for (int j = 0; j < C; j += W) {
        A* x = x_.x_t + d * C + j;
        store_vector(x, load_vector<V>(x) * load_vector<V>(x_.inverse_den + j) +
                            load_vector<V>(x_.dden + j) * z[d]);
      }
    }
  }

  // Gradients of q, k and the decay. x_t: d(q e), y_t: minus d(k e), both transposed.
  void gradients(const LinearAt& at, const Head& head, int64_t c) const {
    const int n = at.n;
    spread<false>(x_.x_t, x_.q_t, x_.gates.e, nullptr, x_.dq_t, x_.left);
    if constexpr (X::kDelta) {
      spread<true>(x_.y_t, x_.k_t, x_.gates.e, nullptr, x_.dk_t, x_.right);
      for (int t = 0; t < n; ++t) x_.left[t] += x_.right[t];
    }
    Tile::adjoint_times(head, c, x_.v_col, x_.state_nat, x_.x_t);
    spread<false>(x_.x_t, x_.k_t, x_.gates.f, X::kNormalizer ? head.z : nullptr, x_.dk_t, x_.right);
    score_gradients(n);
    if constexpr (X::kScalar) {
      Tile::sums_across(n, x_.dm, x_.grad);
      A before = x_.gates.total * states_dot(head, c);
      for (int t = 0; t < n; ++t) {
        x_.grad[t] += before;
        before += x_.right[t];
      }
      A behind = 0;
      for (int t = n - 1; t >= 0; --t) x_.grad[t] += behind += x_.left[t];
      io_.store_scalar_decay(at, x_.grad);
    }
  }

 private:
  const A* decays() const { return X::kScalar ? x_.gates.a : nullptr; }
  const M* q_nat() const { return Tile::pick(x_.q, x_.q_nat); }
  const M* k_nat() const { return Tile::pick(x_.k, x_.k_nat); }
  const M* q_row() const { return Tile::pick(x_.q, x_.q_row); }
  const M* k_row() const { return Tile::pick(x_.k, x_.k_row); }

  // to += sums b, dk += sums^T b; b as rows of x, which may be `bad`.
  void add_lower(int n, const A* sums, const A* x, const M* b, bool bad, A* to) const {
    if (bad) return Tile::template lower_by_rows<kDp>(n, sums, x, to);
    Tile::template lower_times<kDp>(n, Tile::natural(sums, x_.natural, C * C), b, kDp, to, kDp);
  }
  void add_transposed(int n, const A* sums, const A* x, const M* b, bool bad) const {
    if (bad) return Tile::template lower_transposed_by_rows<kDp>(n, sums, nullptr, x, x_.dk);
    const M* pairs = Tile::template by_row<C>(sums, x_.pairs, n);
    Tile::template lower_transposed_times<kDp, GemmMode::kAccumulate>(n, pairs, b, kDp, x_.dk, kDp);
  }
  void add_rows(int n, const A* rows, const A* factor, A* z) const {
    for (int d = 0; d < kDp; d += W) {
      V sum = load_vector<V>(z + d) * x_.gates.total;
      for (int t = 0; t < n; ++t) sum += load_vector<V>(rows + t * kDp + d) * factor[t];
      store_vector(z + d, sum);
    }
  }
  static AE_INLINE void store_gated(const V* sum, const A* gate, A* out) {
    for (int j = 0; j < kVectors; ++j) {
      store_vector(out + j * W, sum[j] * load_vector<V>(gate + j * W));
    }
  }

  // sums += gate (x + more), dots = gate (with . (x + more)), or with minus x: all [D][C], gate and
  // dots of a token, `more` (null: none) of a channel.
  template <bool kMinus>
  __attribute__((noinline)) void spread(const A* x, const A* with, const A* gate, const A* more,
                                        A* sums, A* dots) const {
    V dot[kVectors]{};
    for (int d = 0; d < D; ++d) {
      for (int j = 0; j < kVectors; ++j) {
        const int at = d * C + j * W;
        V y = load_vector<V>(x + at);
        if (more != nullptr) y += more[d];
        y *= load_vector<V>(gate + j * W);
        if constexpr (kMinus) y = -y;
        dot[j] += y * load_vector<V>(with + at);
        store_vector(sums + at, load_vector<V>(sums + at) + y);
      }
    }
    for (int j = 0; j < kVectors; ++j) store_vector(dots + j * W, dot[j]);
  }

  // Adds the gradients of q . k and k . k to those of other heads; dm becomes what each pair gives
  // to the decays between.
  __attribute__((noinline)) void score_gradients(int n) const {
    each_lower<A, C>(decays(), n, [this](int t, int j, V d, int live) {
      const int64_t at = int64_t(t) * C + j * W;
      V dm = load_vector<V>(x_.dm + at);
      if constexpr (X::kNormalizer) dm = dm * x_.inverse_den[t] + x_.dden[t];
      if (live < W) dm = first_lanes<A>(dm, live);
      store_vector(x_.sum_qk + at, load_vector<V>(x_.sum_qk + at) + dm * d);
      V w = dm * load_vector<V>(x_.m + at);
      if constexpr (X::kDelta) {
        V da = load_vector<V>(x_.da + at);
        if (live < W || j == t / W) da = first_lanes<A>(da, live - 1);
        store_vector(x_.sum_kk + at, load_vector<V>(x_.sum_kk + at) - da * d * x_.beta[t]);
        w += da * load_vector<V>(x_.minus + at);
      }
      store_vector(x_.dm + at, w);
    });
  }

  // <S, U>, with z.
  __attribute__((noinline)) A states_dot(const Head& head, int64_t c) const {
    V sum{};
    for (int d = 0; d < D; ++d) sum += Tile::states_dot(head, c, d);
    if constexpr (X::kNormalizer) {
      for (int d = 0; d < kDp; d += W) {
        sum += load_vector<V>(head.z_of(c) + d) * load_vector<V>(head.z + d);
      }
    }
    return hsum(sum);
  }

  const Operands& io_;
  LinearBackwardScratch<Plan>& x_;
  mutable bool q_bad_ = false, k_bad_ = false;  // q or k of the chunk holds Inf or NaN
};

}  // namespace ae
