// Channel decay in the backward pass of linear attention, with the factors of linear_channel.h:
// every value head has its own q and k, each times its decays. Blocks of 16 tokens are walked back
// as keys came: with K_I the keys before block I on their way to its start and E their adjoint
// behind it,
//
//   dq = inside (dM K_I)      dk = rest E, of the block's own keys
//   E <- whole_I E + dM^T (q inside)
//   what crosses all of block I: whole_I K_I E
//
// and pairs inside the block token by token. Under the delta rule k is to the left as well, with
// the gradient of A in the place of dM.
#pragma once
#include <utility>

#include "cpu/linear_backward_operands.h"

namespace ae {

template <class Plan, class Fn>
class LinearBackwardChannel {
  using X = LinearBackwardTypes<Plan>;
  using A = typename X::A;
  using M = typename X::M;
  using V = typename X::V;
  using Tile = LinearTile<Plan>;
  using Head = LinearBackwardHead<Plan>;
  using Operands = LinearBackwardOperands<Plan, Fn>;
  using Products = LinearChannel<Plan>;
  static constexpr int W = X::W, C = X::C, kDp = X::kDp;
  static constexpr int kBlock = kLinearBlock;
  static constexpr bool kDelta = X::kDelta, kNormalizer = X::kNormalizer;

 public:
  LinearBackwardChannel(const Operands& io, LinearBackwardScratch<Plan>& x) : io_(io), x_(x) {}

  void begin() const { x_.gates.set_ones(); }

  // ---- of the key head ----
  void load_keys(const LinearAt& at) const { io_.load_k(at, x_.k); }
  void load_query_rows(const LinearAt& at) const {
    io_.load_q(at, x_.q);
    Tile::clear(x_.k, C * kDp);
  }
  void load_queries(const LinearAt& at) const {
    io_.load_q(at, x_.q);
    Tile::clear(x_.dq, C * kDp);
    Tile::clear(x_.dk, C * kDp);
  }
  void finish(const LinearAt&) const {}

  // ---- of a value head ----
  void load_decays(const LinearAt& at, bool backward) const {
    const int whole = Products::blocks(at.n) * kBlock;
    for (int i = 0; i < at.n; ++i) {
      io_.inputs().channel_decay(at, i, x_.a + i * kDp, x_.rest + i * kDp);
    }
    for (int i = at.n * kDp; i < whole * kDp; ++i) x_.a[i] = 1, x_.rest[i] = 0;
    Products::products(x_.a, at.n, x_.inside, x_.rest, x_.whole, x_.before);
    Tile::copy(x_.factor, x_.before + Products::blocks(at.n) * kDp, kDp);
    decay_keys(at.n);
    if (backward) {
      decay_left(at.n, x_.q, x_.q_in, x_.q_start);
      Tile::natural(x_.q_in, x_.in_nat, C * kDp);
      Tile::template by_row<kDp>(x_.q_in, x_.in_row, at.n);
      Tile::natural(x_.q_start, x_.q_nat, C * kDp);
      Tile::template by_row<kDp>(x_.q_start, x_.q_row, at.n);
    }
    if constexpr (kDelta) {
      decay_left(at.n, x_.k, x_.k_in, x_.k_start);
      Tile::natural(x_.k_in, x_.key_in_nat, C * kDp);
      Tile::template by_row<kDp>(x_.k_in, x_.key_in_row, at.n);
      Tile::natural(x_.k_start, x_.start_nat, C * kDp);
      Tile::template by_row<kDp>(x_.k_start, x_.start_row, at.n);
    }
    Tile::natural(x_.k_end, x_.k_nat, C * kDp);
    Tile::template by_row<kDp>(x_.k_end, x_.k_row, at.n);
  }

  void scores(int n, bool backward) const {
    if (!backward && !kDelta) return;
    Tile::copy(x_.tile, x_.rest, int64_t(C) * kDp);
    Products::decay_keys(x_.k, x_.tile, n, x_.keys);
    const M *q_in = Tile::pick(x_.q_in, x_.in_nat), *k_in = Tile::pick(x_.k_in, x_.key_in_nat);
    if (backward) {
      Products::lower_product(x_.q, q_in, x_.m, kDelta ? x_.k : nullptr, k_in, x_.kd, x_.k, x_.a,
                              x_.whole, n, x_.keys, x_.key_pairs);
    } else {
      Products::lower_product(x_.k, k_in, x_.kd, nullptr, nullptr, nullptr, x_.k, x_.a, x_.whole, n,
                              x_.keys, x_.key_pairs);
    }
  }

  void queries_times(int n, const M* b, A* c) const {
    Tile::state_times(n, Tile::pick(x_.q_start, x_.q_nat), b, c);
  }
  void keys_in_times(int n, const M* b, A* c) const {
    Tile::state_times(n, Tile::pick(x_.k_start, x_.start_nat), b, c);
  }
  void keys_out_times(int n, const M* b, A* c) const {
    Tile::state_times(n, Tile::pick(x_.k_end, x_.k_nat), b, c);
  }
  void add_keys(int n, const M* values, const A* from, A* to, M* packed, LinearFetch& ahead) const {
    Tile::template add_to_state<true>(n, values, Tile::pick(x_.k_end, x_.k_row), from, to,
                                      x_.factor, packed, ahead);
  }
  void add_queries(int n, const M* values, A* state, LinearFetch& ahead) const {
    Tile::template add_to_state<true>(n, values, Tile::pick(x_.q_start, x_.q_row), state, state,
                                      x_.factor, nullptr, ahead);
  }
  void add_keys_in(int n, const M* values, A* state, LinearFetch& ahead) const {
    Tile::template add_to_state<false>(n, values, Tile::pick(x_.k_start, x_.start_row), state,
                                       state, nullptr, nullptr, ahead);
  }

  void add_z(int n, A* z) const {
    for (int t = 0; t < n; ++t) x_.row_factor[t] = 1;
    add_rows(n, x_.k_end, x_.row_factor, z);
  }
  void add_dz(int n, const A* x, A* z) const { add_rows(n, x_.q_start, x, z); }
  void queries_dot(int n, const A* z, A* out) const {
    for (int t = 0; t < n; ++t) {
      V sum{};
      for (int d = 0; d < kDp; d += W) {
        sum += load_vector<V>(x_.q_start + t * kDp + d) * load_vector<V>(z + d);
      }
      out[t] = hsum(sum);
    }
  }
  void queries_dot_gradient(int n, A* out) const {
    for (int t = 0; t < n; ++t) {
      V sum{};
      for (int d = 0; d < kDp; d += W) {
        sum += load_vector<V>(x_.q_start + t * kDp + d) * load_vector<V>(x_.tile + t * kDp + d);
      }
      out[t] = hsum(sum);
    }
  }

  void gradients(const LinearAt& at, const Head& head, int64_t c, const M* values) const {
    const int n = at.n;
    complete_scores(n);
    crossing(head, c);
    from_state(n);
    Tile::adjoint_times(n, head, c, values, x_.state_row, x_.e);
    if constexpr (kNormalizer) {
      for (int t = 0; t < n; ++t) {
        for (int d = 0; d < kDp; d += W) add_to(x_.e + t * kDp + d, load_vector<V>(head.z + d));
      }
    }
    for (int b = Products::blocks(n) - 1; b >= 0; --b) {
      const int first = b * kBlock, rows = n - first < kBlock ? n - first : kBlock;
      if (b > 0) {
        carry_back(b);
      } else {
        Tile::clear(x_.crossing, kDp);
      }
      own_keys(first, rows);
      if (b > 0) earlier_keys(first, rows);
      diagonal(first);
    }
    io_.store_channel_decay(at, x_.dg);
  }

 private:
  static AE_INLINE void add_to(A* p, V x) { store_vector(p, load_vector<V>(p) + x); }

  void add_rows(int n, const A* rows, const A* factor, A* z) const {
    for (int d = 0; d < kDp; d += W) {
      V sum = load_vector<V>(z + d) * load_vector<V>(x_.factor + d);
      for (int t = 0; t < n; ++t) sum += load_vector<V>(rows + t * kDp + d) * factor[t];
      store_vector(z + d, sum);
    }
  }

  // k to the end of its block and of the chunk.
  void decay_keys(int n) const {
    for (int d = 0; d < kDp; d += W) {
      V behind = splat<V>(A(1));
      for (int b = Products::blocks(n) - 1; b >= 0; --b) {
        for (int s = b * kBlock; s < (b + 1) * kBlock; ++s) {
          const int i = s * kDp + d;
          const V x = load_vector<V>(x_.k + i) * load_vector<V>(x_.rest + i);
          store_vector(x_.k_rest + i, x);
          store_vector(x_.k_end + i, x * behind);
        }
        behind *= load_vector<V>(x_.whole + b * kDp + d);
      }
    }
    const int64_t whole = int64_t(Products::blocks(n)) * kBlock;
    Tile::clear(x_.k_end + whole * kDp, (C - whole) * kDp);
  }
  __attribute__((noinline)) void decay_left(int n, const A* x, A* in, A* start) const {
    for (int t = 0; t < n; ++t) {
      for (int d = 0; d < kDp; d += W) {
        const int i = t * kDp + d;
        const V y = load_vector<V>(x + i) * load_vector<V>(x_.inside + i);
        store_vector(in + i, y);
        store_vector(start + i, y * load_vector<V>(x_.before + t / kBlock * kDp + d));
      }
    }
    Tile::clear(in + n * kDp, int64_t(C - n) * kDp);
    Tile::clear(start + n * kDp, int64_t(C - n) * kDp);
  }

  // dM whole, minus beta y W^T in the place of da, and both as operands. Rows past n are zero.
  __attribute__((noinline)) void complete_scores(int n) const {
    if constexpr (kNormalizer) {
      for (int t = 0; t < n; ++t) {
        for (int j = 0; j <= t; j += W) {
          A* p = x_.dm + t * C + j;
          store_vector(p, load_vector<V>(p) * x_.inverse_den[t] + x_.dden[t]);
        }
      }
    }
    Tile::clear(x_.dm + n * C, int64_t(C - n) * C);
    Tile::natural(x_.dm, x_.natural, C * C);
    Tile::template by_row<C>(x_.dm, x_.pairs, n);
    if constexpr (kDelta) {
      for (int t = 0; t < n; ++t) {
        for (int j = 0; j <= t; j += W) {
          A* p = x_.da + t * C + j;
          const V x = load_vector<V>(p) * -x_.beta[t];
          store_vector(p, t - j < W ? first_lanes<A>(x, t - j) : x);
        }
      }
      Tile::clear(x_.da + n * C, int64_t(C - n) * C);
      Tile::natural(x_.da, x_.key_natural, C * C);
      Tile::template by_row<C>(x_.da, x_.key_pairs_of, n);
    }
  }

  // What crosses the whole chunk, of each channel.
  void crossing(const Head& head, int64_t c) const {
    for (int d = 0; d < kDp; d += W) {
      V dot = load_vector<V>(x_.crossing + d);
      if constexpr (kNormalizer)
        dot += load_vector<V>(head.z_of(c) + d) * load_vector<V>(head.z + d);
      store_vector(x_.crossing + d, load_vector<V>(x_.factor + d) * dot);
    }
  }

  // From the state to tokens: tile holds dO S^T, tile2 dv S^T.
  __attribute__((noinline)) void from_state(int n) const {
    for (int d = 0; d < kDp; d += W) {
      V behind = load_vector<V>(x_.crossing + d);
      for (int t = n - 1; t >= 0; --t) {
        const int i = t * kDp + d;
        const V gate =
            load_vector<V>(x_.inside + i) * load_vector<V>(x_.before + t / kBlock * kDp + d);
        const V dq = gate * load_vector<V>(x_.tile + i);
        add_to(x_.dq + i, dq);
        behind += load_vector<V>(x_.q + i) * dq;
        if constexpr (kDelta) {
          const V dk = gate * load_vector<V>(x_.tile2 + i);
          add_to(x_.dk + i, -dk);
          behind -= load_vector<V>(x_.k + i) * dk;
        }
        store_vector(x_.dg + i, behind);
      }
    }
  }

  // tile: keys before block b on their way to its start; E, so far behind block b, before it; and
  // what crosses the block.
  __attribute__((noinline)) void carry_back(int b) const {
    for (int d = 0; d < kDp; d += W) {
      const V whole = load_vector<V>(x_.whole + b * kDp + d);
      V between = splat<V>(A(1)), crossing{};
      for (int j = b - 1; j >= 0; --j) {
        for (int s = j * kBlock; s < (j + 1) * kBlock; ++s) {
          const int i = s * kDp + d;
          const V key = load_vector<V>(x_.k_rest + i) * between;
          const V e = load_vector<V>(x_.e + i) * whole;
          store_vector(x_.tile + i, key);
          store_vector(x_.e + i, e);
          crossing += key * e;
        }
        between *= load_vector<V>(x_.whole + j * kDp + d);
      }
      store_vector(x_.crossing + d, crossing);
    }
  }

  // From the block's keys to what is behind it.
  __attribute__((noinline)) void own_keys(int first, int rows) const {
    for (int d = 0; d < kDp; d += W) {
      V before = load_vector<V>(x_.crossing + d);
      for (int s = first; s < first + rows; ++s) {
        const int i = s * kDp + d;
        const V dk = load_vector<V>(x_.rest + i) * load_vector<V>(x_.e + i);
        add_to(x_.dk + i, dk);
        add_to(x_.dg + i, before);
        before += load_vector<V>(x_.k + i) * dk;
      }
    }
  }

  // From keys before the block to its tokens.
  __attribute__((noinline)) void earlier_keys(int first, int rows) const {
    constexpr GemmMode kAdd = GemmMode::kAccumulate;
    const M* keys = Tile::template by_row<kDp>(x_.tile, x_.tile_row, first);
    const int64_t at = int64_t(first) * C, in = int64_t(first) * kDp;
    A *dq = x_.tile2, *dk = x_.tile2 + kBlock * kDp;
    Tile::template times<kDp, GemmMode::kOverwrite>(rows, first, Tile::pick(x_.dm, x_.natural) + at,
                                                    C, keys, kDp, dq, kDp);
    Tile::template transposed_times<kDp, kAdd>(first, rows, Tile::pick(x_.dm, x_.pairs) + at, C,
                                               Tile::pick(x_.q_in, x_.in_row) + in, kDp, x_.e, kDp);
    if constexpr (kDelta) {
      Tile::template times<kDp, GemmMode::kOverwrite>(
          rows, first, Tile::pick(x_.da, x_.key_natural) + at, C, keys, kDp, dk, kDp);
      Tile::template transposed_times<kDp, kAdd>(
          first, rows, Tile::pick(x_.da, x_.key_pairs_of) + at, C,
          Tile::pick(x_.k_in, x_.key_in_row) + in, kDp, x_.e, kDp);
    }
    for (int d = 0; d < kDp; d += W) {
      V behind{};
      for (int t = rows - 1; t >= 0; --t) {
        const int here = t * kDp + d, i = first * kDp + here;
        const V gate = load_vector<V>(x_.inside + i);
        V x = gate * load_vector<V>(dq + here);
        add_to(x_.dq + i, x);
        behind += load_vector<V>(x_.q + i) * x;
        if constexpr (kDelta) {
          x = gate * load_vector<V>(dk + here);
          add_to(x_.dk + i, x);
          behind += load_vector<V>(x_.k + i) * x;
        }
        add_to(x_.dg + i, behind);
      }
    }
  }

  // Pairs of the block's tokens: keys decay from token to token, their adjoint on the way back.
  __attribute__((noinline)) void diagonal(int first) const {
    for (int d = 0; d < kDp; d += W)
      diagonal_lanes(int64_t(first) * kDp + d, x_.dm + first * C + first,
                     kDelta ? x_.da + first * C + first : x_.dm);
  }
  AE_INLINE void diagonal_lanes(int64_t at, const A* dm, const A* da) const {
    V key[kBlock], passed[kBlock][kBlock];  // passed[t][s]: key s at token t > s
    const auto forth = [&]<int t>() {
      const int64_t i = at + t * kDp;
      const V a = load_vector<V>(x_.a + i);
      V dq{}, dk{};
#pragma GCC unroll 16
      for (int s = 0; s < t; ++s) {
        passed[t][s] = key[s] *= a;
        dq += dm[t * C + s] * key[s];
        if constexpr (kDelta) dk += da[t * C + s] * key[s];
      }
      key[t] = load_vector<V>(x_.k + i);
      add_to(x_.dq + i, dq + dm[t * C + t] * key[t]);
      if constexpr (kDelta) add_to(x_.dk + i, dk);
    };
    V e[kBlock]{}, a{};
    const auto back = [&]<int kBack>() {
      constexpr int t = kBlock - 1 - kBack;
      const int64_t i = at + t * kDp;
      const V q = load_vector<V>(x_.q + i);
      V k{}, dg{};
      if constexpr (kDelta) k = load_vector<V>(x_.k + i);
#pragma GCC unroll 16
      for (int s = 0; s < t; ++s) {
        e[s] = e[s] * a + dm[t * C + s] * q;
        if constexpr (kDelta) e[s] += da[t * C + s] * k;
        dg += passed[t][s] * e[s];
      }
      add_to(x_.dk + i, e[t] * a + dm[t * C + t] * q);
      add_to(x_.dg + i, dg);
      a = load_vector<V>(x_.a + i);
    };
    [&]<int... I>(std::integer_sequence<int, I...>) {
      (forth.template operator()<I>(), ...);
      (back.template operator()<I>(), ...);
    }(std::make_integer_sequence<int, kBlock>());
  }

  const Operands& io_;
  LinearBackwardScratch<Plan>& x_;
};

}  // namespace ae
