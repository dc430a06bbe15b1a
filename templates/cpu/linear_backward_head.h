// One value head in the backward pass of linear attention, chunk by chunk: forwards through the
// states, backwards through their adjoint U. With S the state before the chunk, D_ts = prod a_r
// over s < r <= t, e and f as in linear_chunk.h, and W the values that the chunk wrote (v, or under
// the delta rule the solution of (I + A) W = beta (v - (k e) S)):
//
//   dW  = M^T dO + (k f) U            delta rule: y = (I + A)^-T dW, dv = beta y; else dv = dW
//   dM  = dO W^T                      dA = -y W^T, dbeta_t = r_t . y_t + sum_s dA_ts A_ts / beta_t
//   d(q e) = dO S^T                   d(k e) = -dv S^T (delta rule)
//   d(k f) = W U^T                    U <- total U + (q e)^T dO - (k e)^T dv
//
// A normalizer's z is one more column of S, to which 1 is written; its part of U is dz. The
// gradient of a log-decay g_r is the sum of all that crosses token r, each term with a_r in it:
// what goes from the state to tokens >= r, from tokens < r to the next state, from token s < r to t
// >= r, and from state to state. Terms are products, and none is taken back from a sum: nothing
// cancels, and at g_r = -inf it is exactly 0.
#pragma once
#include "cpu/linear_backward_shared.h"

namespace ae {

template <class Plan, class Fn, class Keys>
class LinearBackwardStep {
  using X = LinearBackwardTypes<Plan>;
  using A = typename X::A;
  using M = typename X::M;
  using V = typename X::V;
  using Tile = LinearTile<Plan>;
  using Head = LinearBackwardHead<Plan>;
  using Operands = LinearBackwardOperands<Plan, Fn>;
  static constexpr int W = X::W, C = X::C, D = X::kD, kVp = X::kVp, kVWidth = X::kVWidth;
  static constexpr bool kDelta = X::kDelta, kNormalizer = X::kNormalizer;

 public:
  // `scale`: of the scores.
  LinearBackwardStep(const Operands& io, LinearBackwardScratch<Plan>& x, const Keys& keys, A scale)
      : io_(io), x_(x), keys_(keys), scale_(scale) {}

  // Tiles of which parts are read that nothing writes.
  void begin() const {
    Tile::clear(x_.m, C * C);
    Tile::clear(x_.dm, C * C);
    Tile::clear(x_.tile, C * X::kDp);
    Tile::clear(x_.v, C * kVp);
    Tile::clear(x_.dout, C * kVp);
    if constexpr (X::kRounds) {
      Tile::clear(x_.v_nat, C * kVp);
      Tile::clear(x_.dout_nat, C * kVp);
    }
    if constexpr (kDelta) {
      Tile::clear(x_.kd, C * C);
      Tile::clear(x_.minus, C * C);
      Tile::clear(x_.da, C * C);
      Tile::clear(x_.tile2, C * X::kDp);
    }
    keys_.begin();
  }

  // From the state before chunk c, which is kept, that before the next, which is kept too, unless c
  // is the last; under the delta rule what the chunk writes.
  void forward(const LinearAt& at, const LinearAt& next, const Head& head, int64_t c,
               bool last) const {
    if constexpr (kNormalizer) Tile::copy(head.z_of(c), head.z, X::kDp);
    if (last && !kDelta) return;
    keys_.load_decays(at, false);
    const auto v = io_.v(at, x_.v, x_.v_nat);
    if constexpr (kDelta) {
      keys_.scores(at.n, false);
      system(at);
      solve(at.n, v, head, c);
      if (last) return;
      scaled(head.written(c), at.n, x_.gates.f);
    } else {
      scaled(v, at.n, x_.gates.f);
    }
    LinearFetch ahead(2);
    io_.fetch_values(at, next, ahead);
    if constexpr (X::kRounds) {
      keys_.add_keys(at.n, x_.scaled_row, head.state, head.state, head.state_of(c + 1), ahead);
    } else {
      keys_.add_keys(at.n, x_.scaled_row, head.state_of(c), head.state_of(c + 1), nullptr, ahead);
    }
    ahead.rest();
    if constexpr (kNormalizer) keys_.add_z(at.n, head.z);
  }

  // Gradients of the chunk. `next`: what follows; its operands are fetched by whatever moves a
  // state meanwhile.
  void gradients(const LinearAt& at, const LinearAt& next, const Head& head, int64_t c) const {
    keys_.load_decays(at, true);
    keys_.scores(at.n, true);
    if constexpr (kDelta) {
      system(at);
      gradients(at, next, head, c, head.written(c));
    } else {
      gradients(at, next, head, c, io_.v(at, x_.v, x_.v_nat));
    }
  }
  // And U before it.
  void backward(const LinearAt& at, const LinearAt& next, const Head& head, int64_t c) const {
    gradients(at, next, head, c);
    LinearFetch ahead(2);
    io_.fetch_all(at, next, ahead);
    move_adjoint(at.n, head, ahead);
    ahead.rest();
  }

  // What a chunk adds to the state, and to U, in `state`; its decay is then in the scratch.
  void add(const LinearAt& at, const LinearAt& next, A* state) const {
    keys_.load_decays(at, false);
    scaled(io_.v(at, x_.v, x_.v_nat), at.n, x_.gates.f);
    Tile::clear(state, X::kState);
    LinearFetch ahead(2);
    io_.fetch_values(at, next, ahead);
    keys_.add_keys(at.n, x_.scaled_row, state, state, nullptr, ahead);
    ahead.rest();
  }
  void add_adjoint(const LinearAt& at, const LinearAt& next, A* state) const {
    keys_.load_decays(at, true);
    dout_ = io_.dout(at, x_.dout, x_.dout_nat);
    Tile::clear(state, X::kState);
    LinearFetch ahead(2);
    io_.fetch_all(at, next, ahead);
    move_adjoint(at.n, Head{state}, ahead);
    ahead.rest();
  }

 private:
  template <class E>
  void scaled(const E* rows, int n, const A* factor) const {
    Tile::template by_scaled_row<kVp>(rows, x_.scaled_row, n, factor);
  }

  template <class E>
  void gradients(const LinearAt& at, const LinearAt& next, const Head& head, int64_t c,
                 const E* written) const {
    const int n = at.n;
    if constexpr (kNormalizer) denominators(n, head.z_of(c));
    dout_ = io_.dout(at, x_.dout, x_.dout_nat);
    if constexpr (Fn::kHasOutMod) out_mod_back(at, head, c, written);

    const M* v_nat = Tile::natural(written, x_.v_nat, int64_t(n) * kVp);
    Tile::template by_column<kVWidth>(v_nat, kVp, n, x_.v_col);
    dout_bad_ = Tile::template checked_by_row<kVWidth, kVp>(dout_, x_.dout_row, n);
    const M* dout_nat = Tile::natural(dout_, x_.dout_nat, int64_t(n) * kVp);
    Tile::lower_scores(n, X::kDv, dout_nat, kVp, x_.v_col, x_.dm);
    through(n, head, c, dout_nat, x_.tile);
    if constexpr (kNormalizer) denominator_gradients(n, head.z_of(c));

    states(head, c);
    written_gradients(n, head, c);
    if constexpr (kDelta) delta_gradients(at, head, c);
    io_.store_v(at, next, x_.dv);

    keys_.gradients(at, head, c, v_nat);
  }

  // Rows of dO or dv times the kept state S^T.
  void through(int n, const Head& head, int64_t c, const M* rows, A* out) const {
    if (head.starts_empty(c)) return Tile::clear(out, int64_t(n) * X::kDp);
    Tile::times_state(n, rows, head.state_of(c), out);
  }
  // The operands of U, and <S, U> of each channel.
  void states(const Head& head, int64_t c) const {
    if (head.ends_empty(c)) return Tile::clear(x_.crossing, X::kDp);
    const bool given = X::kRounds && c == 0;
    const bool dots = X::kDecays && !given && !head.starts_empty(c);
    Tile::turn_adjoint(head.state, dots ? head.state_of(c) : nullptr, x_.state_row,
                       x_.state_by_channel, x_.crossing);
    if (X::kDecays && given && !head.starts_empty(c)) {
      Tile::initial_dots(head.initial, head.state, x_.crossing);
    }
  }

  // ---- delta rule ----
  // -A and beta of the chunk.
  void system(const LinearAt& at) const {
    io_.inputs().beta(at, x_.beta);
    for (int t = 0; t < at.n; ++t) {
      for (int j = 0; j <= t; j += W) {
        const V x = load_vector<V>(x_.kd + t * C + j) * -x_.beta[t];
        store_vector(x_.minus + t * C + j, t - j < W ? first_lanes<A>(x, t - j) : x);
      }
    }
    system_bad_ = Tile::template any_bad<C>(x_.minus, at.n, C);
    invert_diagonal<A, C>(x_.minus, at.n, x_.inverse);
  }
  // r and W from v; rows past n are zero.
  template <class E>
  __attribute__((noinline)) void solve(int n, const E* v, const Head& head, int64_t c) const {
    A *r = head.residual(c), *written = head.written(c);
    if (head.starts_empty(c)) {
      Tile::clear(x_.dv, int64_t(n) * kVp);
    } else {
      Tile::turn_state(head.state_of(c), x_.state_by_channel);
      keys_.keys_in_times(n, x_.state_by_channel, x_.dv);
    }
    for (int t = 0; t < n; ++t) {
      for (int d = 0; d < kVWidth; d += W) {
        const int64_t i = int64_t(t) * kVp + d;
        const V x = load_widened<A>(v + i) - load_vector<V>(x_.dv + i) * x_.gates.e[t];
        store_vector(r + i, x);
        store_vector(x_.dv + i, x * x_.beta[t]);
      }
    }
    if (system_bad_ || Tile::template any_bad<kVWidth>(x_.dv, n, kVp)) {
      solve_by_rows<A, C, kVp>(x_.minus, n, x_.dv, written);
    } else {
      solve_unit_lower<A, C, kVp>(x_.minus, x_.inverse, n, x_.dv, written);
    }
    Tile::clear(written + int64_t(n) * kVp, int64_t(C - n) * kVp);
  }
  // From dW in dv: y, dA, dbeta, and dv = beta y.
  __attribute__((noinline)) void delta_gradients(const LinearAt& at, const Head& head,
                                                 int64_t c) const {
    const int n = at.n;
    A* y = x_.solved;
    if (system_bad_ || Tile::template any_bad<kVWidth>(x_.dv, n, kVp)) {
      Tile::copy(y, x_.dv, int64_t(n) * kVp);
      Tile::template solve_transposed_by_rows<kVp>(n, x_.minus, y);
    } else {
      solve_unit_lower<A, C, kVp, true>(x_.minus, x_.inverse, n, x_.dv, y);
    }
    Tile::clear(y + int64_t(n) * kVp, int64_t(C - n) * kVp);
    const M* y_nat = Tile::natural(y, x_.scaled_row, int64_t(n) * kVp);
    Tile::lower_scores(n, X::kDv, y_nat, kVp, x_.v_col, x_.da);
    const A* r = head.residual(c);
    for (int t = 0; t < n; ++t) {
      V sum{};
      for (int d = 0; d < kVWidth; d += W) {
        const int64_t i = int64_t(t) * kVp + d;
        const V x = load_vector<V>(y + i);
        sum += load_vector<V>(r + i) * x;
        store_vector(x_.dv + i, x * x_.beta[t]);
      }
      for (int j = 0; j < t; j += W) {
        const V x = load_vector<V>(x_.da + t * C + j) * load_vector<V>(x_.kd + t * C + j);
        sum -= t - j < W ? first_lanes<A>(x, t - j) : x;
      }
      x_.grad[t] = hsum(sum);
    }
    io_.store_beta(at, x_.grad);
    through(n, head, c, Tile::natural(x_.dv, x_.scaled_row, int64_t(n) * kVp), x_.tile2);
  }

  // ---- normalizer ----
  static constexpr double kSmallest = 1e-6;  // of the denominator's size

  // Of n_t = (q S_t): o_t = inverse_den n_t.
  void denominators(int n, const A* z) const {
    keys_.queries_dot(n, z, x_.inverse_den);
    for (int t = 0; t < n; ++t) {
      V sum{};
      for (int j = 0; j <= t; j += W) sum += load_vector<V>(x_.m + t * C + j);
      A den = scale_ * (x_.inverse_den[t] + hsum(sum));
      x_.dden[t] = 1;
      if (__builtin_fabs(den) < A(kSmallest)) {
        den = den < A(0) ? -A(kSmallest) : A(kSmallest);
        x_.dden[t] = 0;
      }
      x_.inverse_den[t] = scale_ / den;
    }
    for (int t = n; t < C; ++t) x_.inverse_den[t] = x_.dden[t] = 0;
  }
  void denominator_gradients(int n, const A* z) const {
    keys_.queries_dot_gradient(n, x_.left);
    for (int t = 0; t < n; ++t) {
      V sum{};
      for (int j = 0; j <= t; j += W) {
        const V x = load_vector<V>(x_.m + t * C + j) * load_vector<V>(x_.dm + t * C + j);
        sum += t - j < W - 1 ? first_lanes<A>(x, t - j + 1) : x;
      }
      const A inverse = x_.inverse_den[t], o = inverse * (x_.left[t] + hsum(sum));
      x_.dden[t] = x_.dden[t] == A(0) ? A(0) : -inverse * o;
    }
    Tile::normalize_rows(n, x_, z);
  }

  // ---- out_mod ----
  // The operand of out_mod, o before it, and dO through it.
  template <class E>
  void out_mod_back(const LinearAt& at, const Head& head, int64_t c, const E* written) const {
    const int n = at.n;
    A* o = x_.dv;
    if (head.starts_empty(c)) {
      Tile::clear(o, int64_t(n) * kVp);
    } else {
      Tile::turn_state(head.state_of(c), x_.state_by_channel);
      keys_.queries_times(n, x_.state_by_channel, o);
    }
    scale_rows(n, x_.gates.e, o);
    const M* m = Tile::natural(x_.m, x_.natural, C * C);
    const M* rows = Tile::template by_row<kVp>(written, x_.scaled_row, n);
    Tile::template lower_times<kVWidth>(n, m, rows, kVp, o, kVp);
    for (int t = 0; t < n; ++t) x_.row_factor[t] = kNormalizer ? x_.inverse_den[t] : scale_;
    scale_rows(n, x_.row_factor, o);
    io_.out_back(at, o, x_.dout);
    if (!kNormalizer && scale_ == A(0)) Tile::clear(x_.dout, C * kVp);
  }
  static void scale_rows(int n, const A* factor, A* x) {
    for (int t = 0; t < n; ++t) {
      for (int d = 0; d < kVWidth; d += W) {
        A* p = x + int64_t(t) * kVp + d;
        store_vector(p, load_vector<V>(p) * factor[t]);
      }
    }
  }

  // dW into dv.
  void written_gradients(int n, const Head& head, int64_t c) const {
    if (head.ends_empty(c)) {
      Tile::clear(x_.dv, int64_t(n) * kVp);
    } else {
      keys_.keys_out_times(n, x_.state_by_channel, x_.dv);
    }
    if (dout_bad_) {
      scale_rows(n, x_.gates.f, x_.dv);
      Tile::template lower_transposed_by_rows<kVp>(n, x_.m, kNormalizer ? x_.inverse_den : nullptr,
                                                   dout_, x_.dv);
      return;
    }
    const M* pairs = x_.pairs;
    if constexpr (kNormalizer) {
      Tile::template by_scaled_row<C>(x_.m, x_.pairs, n, x_.inverse_den);
    } else {
      pairs = Tile::template by_row<C>(x_.m, x_.pairs, n);
    }
    Tile::template lower_transposed_times<kVWidth, GemmMode::kScale>(
        n, pairs, Tile::pick(dout_, x_.dout_row), kVp, x_.dv, kVp, x_.gates.f);
  }

  // U and dz of the chunk before.
  void move_adjoint(int n, const Head& head, LinearFetch& ahead) const {
    for (int t = 0; t < n; ++t) {
      x_.row_factor[t] = x_.gates.e[t] * (kNormalizer ? x_.inverse_den[t] : A(1));
    }
    scaled(dout_, n, x_.row_factor);
    keys_.add_queries(n, x_.scaled_row, head.state, ahead);
    if constexpr (kNormalizer) keys_.add_dz(n, x_.dden, head.z);
    if constexpr (kDelta) {
      for (int t = 0; t < n; ++t) x_.row_factor[t] = -x_.gates.e[t];
      scaled(x_.dv, n, x_.row_factor);
      keys_.add_keys_in(n, x_.scaled_row, head.state, ahead);
    }
  }

  const Operands& io_;
  LinearBackwardScratch<Plan>& x_;
  const Keys& keys_;
  const A scale_;
  mutable const typename Operands::OutTile* dout_ = nullptr;  // of the chunk
  mutable bool system_bad_ = false;                           // A does
  mutable bool dout_bad_ = false;                             // it holds Inf or NaN
};

}  // namespace ae
