// The first and the last step of a backward wave: operands into packed tiles (with the row scalars
// and cleared accumulators), accumulators into dq, dk, dv.
#pragma once
#include "cpu/backward_launch.h"
#include "cpu/backward_tile.h"

namespace ae {

template <class Plan, class Fn>
class BackwardOperands {
  using Launch = BackwardLaunch<Plan, Fn>;
  using E = typename Launch::E;
  using A = typename Launch::A;
  using M = typename Launch::M;
  using Head = typename Launch::Head;
  using KeyTile = typename Launch::KeyTile;
  using Grads = typename Launch::Grads;
  using V = typename Lanes<A>::Acc;
  static constexpr int kM = Launch::kM, kN = Launch::kN, kD = Launch::kD, kDv = Launch::kDv;

 public:
  explicit BackwardOperands(const Launch& launch) : x_(launch), p_(launch.p) {}

  void pack() const {
    const int64_t row_tiles = x_.sizes.row_tiles, tiles = row_tiles + x_.sizes.kv_tiles;
    x_.parallel(x_.wave * tiles, [this, row_tiles, tiles](int64_t i, int32_t) {
      const Head h = x_.head(i / tiles);
      const int64_t t = i % tiles;
      if (t < row_tiles) {
        pack_rows_of(h, t);
      } else {
        pack_keys_of(h, x_.key_tile(t - row_tiles));
      }
    });
  }

  // Task i of a head takes row chunk i and KV chunk i, whatever grid summed them.
  void store() const {
    x_.parallel(x_.wave * x_.cut.n, [this](int64_t task, int32_t) {
      const Head h = x_.head(task / x_.cut.n);
      const Grads grads = x_.grads(task);
      const int64_t i = task % x_.cut.n;
      const TileRange rows = chunk_of(x_.sizes.row_tiles, x_.cut.n, i);
      for (int64_t t = rows.begin; t < rows.end; ++t) store_rows_of(h, t, grads);
      const TileRange keys = chunk_of(x_.sizes.kv_tiles, x_.cut.n, i);
      for (int64_t j = keys.begin; j < keys.end; ++j) store_keys_of(h, x_.key_tile(j), grads);
    });
  }

 private:
  void pack_rows_of(const Head& h, int64_t t) const {
    const RowTile<Plan> tile(x_.sizes, t);
    const auto q = [&](int64_t i) { return query(p_.q, p_.q_stride, h, tile, int(i)); };
    const auto dout = [&](int64_t i) { return query(p_.dout, p_.dout_stride, h, tile, int(i)); };
    const int64_t q_col = p_.q_stride[3], dout_col = p_.dout_stride[3], at = t * kM;
    const auto q_mod = [&](V v) { return Fn::q_mod(x_.env(), v); };
    with_mod<Fn::kHasQMod>(q_mod, [&](const auto& mod) {
      h.q_bad[t] = pack_by_row<A, M, Plan::kD>(h.q_by_row + at * kD, q, q_col, tile.count, kM, mod);
      for (int i = 0; Plan::kBf16Dot && i < tile.count; ++i) {
        pack_row<A, M, Plan::kD>(h.q + (at + i) * kD, q(i), q_col, mod);
      }
    });
    h.dout_bad[t] = pack_by_row<A, M, Plan::kDv>(h.dout_by_row + at * kDv, dout, dout_col,
                                                 tile.count, kM, NoMod{});
    for (int i = 0; Plan::kBf16Dot && i < tile.count; ++i) {
      pack_row<A, M, Plan::kDv>(h.dout + (at + i) * kDv, dout(i), dout_col, NoMod{});
    }
    for (int64_t c = 0; c < x_.cut.dq_copies(); ++c) {
      clear(h.dq + (c * x_.sizes.padded_rows() + at) * kD, int64_t(kM) * kD);
    }
    for (int i = 0; i < tile.count; ++i) begin_row(h, tile, i, x_.scalars(h, t, i));
  }

  void begin_row(const Head& h, const RowTile<Plan>& tile, int i, A* scalars) const {
    const int64_t* stride = p_.stats_stride;
    const int64_t at = h.b * stride[1] + x_.query_head(h, tile, i) * stride[2] + tile.q(i);
    A stats[Fn::kStats > 0 ? Fn::kStats : 1] = {};
    A dstats[Fn::kUserStats > 0 ? Fn::kUserStats : 1] = {};
    for (int k = 0; k < Fn::kStats; ++k) {
      stats[k] = static_cast<const A*>(p_.stats)[k * stride[0] + at];
    }
    if (p_.dstats != nullptr) {
      for (int k = 0; k < Fn::kUserStats; ++k) {
        dstats[k] = static_cast<const A*>(p_.dstats)[k * stride[0] + at];
      }
    }
    A delta = 0;
    if constexpr (Fn::kNeedsDelta) {
      delta = dot_row<A, Plan::kDv>(query(p_.out, p_.out_stride, h, tile, i), p_.out_stride[3],
                                    query(p_.dout, p_.dout_stride, h, tile, i), p_.dout_stride[3]);
    }
    Fn::begin(x_.env(), x_.row(h, tile, i), stats, dstats, delta, scalars);
  }

  void pack_keys_of(const Head& h, const KeyTile& tile) const {
    const StridedRows<E> k{key(p_.k, p_.k_stride, h, tile, 0), p_.k_stride[2]};
    const StridedRows<E> v{key(p_.v, p_.v_stride, h, tile, 0), p_.v_stride[2]};
    const int64_t k_col = p_.k_stride[3], v_col = p_.v_stride[3], at = tile.index * kN;
    const auto k_mod = [&](V a) { return Fn::k_mod(x_.env(), a); };
    const auto v_mod = [&](V a) { return Fn::v_mod(x_.env(), a); };
    with_mod<Fn::kHasKMod>(k_mod, [&](const auto& mod) {
      h.k_bad[tile.index] =
          pack_by_row<A, M, Plan::kD>(h.k_by_row + at * kD, k, k_col, tile.count, kN, mod);
      pack_by_column<A, M, Plan::kD>(h.k_by_column + tile.index * Launch::kKColumns, k, k_col,
                                     tile.count, kN, mod);
    });
    with_mod<Fn::kHasVMod>(v_mod, [&](const auto& mod) {
      pack_by_column<A, M, Plan::kDv>(h.v_by_column + tile.index * Launch::kVColumns, v, v_col,
                                      tile.count, kN, mod);
    });
    for (int64_t c = 0; c < x_.cut.dkv_copies(); ++c) {
      const int64_t first = c * x_.sizes.padded_keys() + at;
      clear(h.dk + first * kD, int64_t(kN) * kD);
      clear(h.dv + first * kDv, int64_t(kN) * kDv);
    }
  }

  void store_rows_of(const Head& h, int64_t t, const Grads& grads) const {
    const RowTile<Plan> tile(x_.sizes, t);
    const auto vjp = [&](V v, V g, auto live) {
      return Fn::q_mod_vjp(x_.env(), v, g, live, grads.at);
    };
    with_mod<Fn::kHasQMod>(vjp, [&](const auto& back) {
      for (int i = 0; i < tile.count; ++i) {
        store_gradient_row<A, Plan::kD>(query_out(p_.dq, p_.dq_stride, h, tile, i), p_.dq_stride[3],
                                        h.dq + (t * kM + i) * kD, x_.cut.dq_copies(),
                                        x_.sizes.padded_rows() * kD,
                                        query(p_.q, p_.q_stride, h, tile, i), p_.q_stride[3], back);
      }
    });
  }

  void store_keys_of(const Head& h, const KeyTile& tile, const Grads& grads) const {
    const int64_t at = tile.index * kN, keys = x_.sizes.padded_keys();
    const int64_t copies = x_.cut.dkv_copies();
    const auto k_vjp = [&](V v, V g, auto live) {
      return Fn::k_mod_vjp(x_.env(), v, g, live, grads.at);
    };
    const auto v_vjp = [&](V v, V g, auto live) {
      return Fn::v_mod_vjp(x_.env(), v, g, live, grads.at);
    };
    with_mod<Fn::kHasKMod>(k_vjp, [&](const auto& back) {
      for (int i = 0; i < tile.count; ++i) {
        store_gradient_row<A, Plan::kD>(key_out(p_.dk, p_.dk_stride, h, tile, i), p_.dk_stride[3],
                                        h.dk + (at + i) * kD, copies, keys * kD,
                                        key(p_.k, p_.k_stride, h, tile, i), p_.k_stride[3], back);
      }
    });
    with_mod<Fn::kHasVMod>(v_vjp, [&](const auto& back) {
      for (int i = 0; i < tile.count; ++i) {
        store_gradient_row<A, Plan::kDv>(key_out(p_.dv, p_.dv_stride, h, tile, i), p_.dv_stride[3],
                                         h.dv + (at + i) * kDv, copies, keys * kDv,
                                         key(p_.v, p_.v_stride, h, tile, i), p_.v_stride[3], back);
      }
    });
  }

  // Element 0 of a query row of q, dout, out (or dq), of a key row of k, v (or dk, dv).
  const E* query(const void* base, const int64_t (&stride)[4], const Head& h,
                 const RowTile<Plan>& tile, int i) const {
    return static_cast<const E*>(base) + x_.query_offset(stride, h, tile, i);
  }
  E* query_out(void* base, const int64_t (&stride)[4], const Head& h, const RowTile<Plan>& tile,
               int i) const {
    return static_cast<E*>(base) + x_.query_offset(stride, h, tile, i);
  }
  const E* key(const void* base, const int64_t (&stride)[4], const Head& h, const KeyTile& tile,
               int i) const {
    return static_cast<const E*>(base) + x_.key_offset(stride, h, tile, i);
  }
  E* key_out(void* base, const int64_t (&stride)[4], const Head& h, const KeyTile& tile,
             int i) const {
    return static_cast<E*>(base) + x_.key_offset(stride, h, tile, i);
  }

  static void clear(A* x, int64_t n) { __builtin_memset(x, 0, uint64_t(n) * sizeof(A)); }

  const Launch& x_;
  const ae_params& p_;
};

}  // namespace ae
