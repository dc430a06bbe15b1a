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
  static constexpr int W = X::W, C = X::C, D = X::kD, kDp = X::kDp;

 public:
  LinearBackwardShared(const Operands& io, LinearBackwardScratch<Plan>& x) : io_(io), x_(x) {}

  // sum_qk and sum_kk are read as whole tiles; above the diagonal nothing is written.
  void begin() const {
    x_.gates.set_ones();
    Tile::clear(x_.sum_qk, C * C);
    if constexpr (X::kDelta) Tile::clear(x_.sum_kk, C * C);
  }

  // ---- of the key head ----
  // What moves the state; then what else gradients take. `q_` and `k_` are natural.
  void load_keys(const LinearAt& at) const {
    k_ = io_.k(at, x_.k, x_.k_nat);
    k_bad_ = Tile::template checked_by_row<kDp, kDp>(k_, x_.k_row, at.n);
    if constexpr (X::kDelta) {
      keys_by_column(at.n);
      Tile::lower_scores(at.n, D, k_nat_, kDp, x_.k_col, x_.kk);
    }
  }
  // Only what U takes.
  void load_query_rows(const LinearAt& at) const {
    q_ = io_.q(at, x_.q, x_.q_nat);
    q_bad_ = Tile::template checked_by_row<kDp, kDp>(q_, x_.q_row, at.n);
  }
  void load_queries(const LinearAt& at) const {
    load_query_rows(at);
    if constexpr (!X::kDelta) keys_by_column(at.n);
    q_nat_ = Tile::natural(q_, x_.q_nat, int64_t(at.n) * kDp);
    Tile::lower_scores(at.n, D, q_nat_, kDp, x_.k_col, x_.qk);
    first_ = true;
  }
  // dq and dk of the chunk, all heads added up.
  void finish(const LinearAt& at) const {
    add_lower(at.n, x_.sum_qk, k_, k_row(), k_bad_, x_.dq);
    add_transposed(at.n, x_.sum_qk, q_, q_row(), q_bad_);
    if constexpr (X::kDelta) {
      add_lower(at.n, x_.sum_kk, k_, k_row(), k_bad_, x_.dk);
      add_transposed(at.n, x_.sum_kk, k_, k_row(), k_bad_);
    }
  }

  // ---- of a value head ----
  void load_decays(const LinearAt& at, bool) const {
    if constexpr (X::kScalar) {
      io_.inputs().scalar_decay(at, x_.gates.a, x_.gates.e);
      x_.gates.accumulate();
    }
    for (int d = 0; d < kDp; ++d) x_.factor[d] = x_.gates.total;
  }
  // (q_t . k_s) D_ts, and under the delta rule the same of k and k.
  void scores(int n, bool backward) const {
    if (backward) lower_weights<A, A, C>(x_.qk, decays(), A(1), n, x_.m, nullptr);
    if constexpr (X::kDelta) lower_weights<A, A, C>(x_.kk, decays(), A(1), n, x_.kd, nullptr);
  }

  // Products of rows of q or k with a state by channel; rows still lack gates.e, or gates.f.
  void queries_times(int n, const M* b, A* c) const { Tile::state_times(n, q_nat_, b, c); }
  void keys_in_times(int n, const M* b, A* c) const { Tile::state_times(n, k_nat_, b, c); }
  void keys_out_times(int n, const M* b, A* c) const { Tile::state_times(n, k_nat_, b, c); }

  // to = factor from + values^T keys, `packed` as an operand; the same for U with q; U += values^T
  // keys. Values have had their gates.
  void add_keys(int n, const M* values, const A* from, A* to, M* packed, LinearFetch& ahead) const {
    Tile::template add_to_state<true>(n, values, k_row(), from, to, x_.factor, packed, ahead);
  }
  void add_queries(int n, const M* values, A* state, LinearFetch& ahead) const {
    Tile::template add_to_state<true>(n, values, q_row(), state, state, x_.factor, nullptr, ahead);
  }
  void add_keys_in(int n, const M* values, A* state, LinearFetch& ahead) const {
    Tile::template add_to_state<false>(n, values, k_row(), state, state, nullptr, nullptr, ahead);
  }

  // z = factor z + sum of keys, dz = factor dz + sum of q times x[t].
  void add_z(int n, A* z) const { add_rows(n, k_, x_.gates.f, z); }
  void add_dz(int n, const A* x, A* z) const {
    for (int t = 0; t < n; ++t) x_.row_factor[t] = x_.gates.e[t] * x[t];
    add_rows(n, q_, x_.row_factor, z);
  }
  // out[t] = (q e)_t . z
  void queries_dot(int n, const A* z, A* out) const {
    dot_rows(n, q_, x_.gates.e, [=](int, int d) { return load_vector<V>(z + d); }, out);
  }
  // out[t] = (q e)_t . (dO S^T)_t
  void queries_dot_gradient(int n, A* out) const {
    const auto row = [this](int t, int d) { return load_vector<V>(x_.tile + t * kDp + d); };
    dot_rows(n, q_, x_.gates.e, row, out);
  }
  // Gradients of q, k and the decay. tile: d(q e), tile2: minus d(k e).
  void gradients(const LinearAt& at, const Head& head, int64_t c, const M* values) const {
    const int n = at.n;
    const bool first = first_;
    first_ = false;
    spread<false>(n, x_.tile, q_, x_.gates.e, nullptr, first, x_.dq, x_.left);
    if constexpr (X::kDelta) {
      spread<true>(n, x_.tile2, k_, x_.gates.e, nullptr, first, x_.dk, x_.right);
      if constexpr (X::kScalar) {
        for (int t = 0; t < n; ++t) x_.left[t] += x_.right[t];
      }
    }
    Tile::adjoint_times(n, head, c, values, x_.state_row, x_.tile);
    spread<false>(n, x_.tile, k_, x_.gates.f, X::kNormalizer ? head.z : nullptr,
                  first && !X::kDelta, x_.dk, x_.right);
    score_gradients(n, first);
    if constexpr (X::kScalar) {
      Tile::sums_across(n, x_.dm, x_.grad);
      V across{};
      for (int d = 0; d < kDp; d += W) across += load_vector<V>(x_.crossing + d);
      A before = hsum(across);
      if constexpr (X::kNormalizer) before += z_dot(head, c);
      before *= x_.gates.total;
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
  const M* q_row() const { return Tile::pick(q_, x_.q_row); }
  const M* k_row() const { return Tile::pick(k_, x_.k_row); }
  void keys_by_column(int n) const {
    k_nat_ = Tile::natural(k_, x_.k_nat, int64_t(n) * kDp);
    Tile::template by_column<kDp>(k_nat_, kDp, n, x_.k_col);
  }

  // to += sums b, dk += sums^T b; b as rows of x, which may be `bad`.
  template <class E>
  void add_lower(int n, const A* sums, const E* x, const M* b, bool bad, A* to) const {
    if (bad) return Tile::template lower_by_rows<kDp>(n, sums, x, to);
    Tile::template lower_times<kDp>(n, Tile::natural(sums, x_.natural, C * C), b, kDp, to, kDp);
  }
  template <class E>
  void add_transposed(int n, const A* sums, const E* x, const M* b, bool bad) const {
    if (bad) return Tile::template lower_transposed_by_rows<kDp>(n, sums, nullptr, x, x_.dk);
    const M* pairs = Tile::template by_row<C>(sums, x_.pairs, n);
    Tile::template lower_transposed_times<kDp, GemmMode::kAccumulate>(n, pairs, b, kDp, x_.dk, kDp);
  }
  template <class E>
  void add_rows(int n, const E* rows, const A* factor, A* z) const {
    for (int d = 0; d < kDp; d += W) {
      V sum = load_vector<V>(z + d) * x_.gates.total;
      for (int t = 0; t < n; ++t) sum += load_widened<A>(rows + t * kDp + d) * factor[t];
      store_vector(z + d, sum);
    }
  }
  // out[t] = gate[t] times the sum over d of x_t times row(t, d).
  template <class E, class Row>
  static AE_INLINE void dot_rows(int n, const E* x, const A* gate, const Row& row, A* out) {
    for (int t = 0; t < n; t += W) {
      V dots[W]{};
      for (int i = 0; i < W && t + i < n; ++i) {
        for (int d = 0; d < kDp; d += W) {
          dots[i] += load_widened<A>(x + (t + i) * kDp + d) * row(t + i, d);
        }
      }
      store_vector(out + t, sum_each(dots) * load_vector<V>(gate + t));
    }
  }

  // sums += gate (x + more), dots = gate (with . (x + more)), or with minus x. x, `with` and sums
  // have rows of kDp, gate and dots a value for each, `more` (null: none) a row for all. `first`:
  // sums start here.
  template <bool kMinus, class E>
  __attribute__((noinline)) void spread(int n, const A* x, const E* with, const A* gate,
                                        const A* more, bool first, A* sums, A* dots) const {
    for (int t = 0; t < n; t += W) {
      V dot[W]{};
      for (int i = 0; i < W && t + i < n; ++i) {
        const int64_t row = int64_t(t + i) * kDp;
        const A factor = kMinus ? -gate[t + i] : gate[t + i];
        V sum{};
        for (int d = 0; d < kDp; d += W) {
          V y = load_vector<V>(x + row + d);
          if (more != nullptr) y += load_vector<V>(more + d);
          y *= factor;
          if constexpr (X::kScalar) sum += y * load_widened<A>(with + row + d);
          store_vector(sums + row + d, first ? y : load_vector<V>(sums + row + d) + y);
        }
        dot[i] = sum;
      }
      if constexpr (X::kScalar) store_vector(dots + t, sum_each(dot));
    }
  }

  // Adds the gradients of q . k and k . k to those of other heads; dm becomes what each pair gives
  // to the decays between.
  __attribute__((noinline)) void score_gradients(int n, bool first) const {
    each_lower<A, C>(decays(), n, [this, first](int t, int j, V d, int live) {
      const int64_t at = int64_t(t) * C + j * W;
      V dm = load_vector<V>(x_.dm + at);
      if constexpr (X::kNormalizer) dm = dm * x_.inverse_den[t] + x_.dden[t];
      if (live < W) dm = first_lanes<A>(dm, live);
      const V add = dm * d;
      store_vector(x_.sum_qk + at, first ? add : load_vector<V>(x_.sum_qk + at) + add);
      V w = dm * load_vector<V>(x_.m + at);
      if constexpr (X::kDelta) {
        V da = load_vector<V>(x_.da + at);
        if (live < W || j == t / W) da = first_lanes<A>(da, live - 1);
        const V less = da * d * x_.beta[t];
        store_vector(x_.sum_kk + at, first ? -less : load_vector<V>(x_.sum_kk + at) - less);
        w += da * load_vector<V>(x_.minus + at);
      }
      store_vector(x_.dm + at, w);
    });
  }

  // What z adds to <S, U>.
  A z_dot(const Head& head, int64_t c) const {
    V sum{};
    for (int d = 0; d < kDp; d += W) {
      sum += load_vector<V>(head.z_of(c) + d) * load_vector<V>(head.z + d);
    }
    return hsum(sum);
  }

  const Operands& io_;
  LinearBackwardScratch<Plan>& x_;
  // Of the chunk: natural rows, whether they hold Inf or NaN, and rows of the multiply type.
  mutable const typename Operands::QTile* q_ = nullptr;
  mutable const typename Operands::KTile* k_ = nullptr;
  mutable bool q_bad_ = false, k_bad_ = false;
  mutable const M *q_nat_ = nullptr, *k_nat_ = nullptr;
  mutable bool first_ = true;  // no head has added its gradients yet
};

}  // namespace ae
