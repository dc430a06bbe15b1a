// What the backward pass of linear attention reads and writes of a chunk: operands through their
// hooks into natural tiles, gradients back through the hooks' adjoints into the results.
#pragma once
#include "cpu/linear_backward_tile.h"

namespace ae {

template <class Plan, class Fn>
class LinearBackwardOperands {
  using X = LinearBackwardTypes<Plan>;
  using A = typename X::A;
  using V = typename X::V;
  using Elem = typename Plan::Elem;
  using Inputs = LinearInputs<Plan, Fn>;
  static constexpr int W = X::W, C = X::C;

 public:
  // What operands are taken as: in bf16 products without hooks as they lie, else accumulators.
  using M = typename X::M;
  template <bool kHasMod>
  using Tile = std::conditional_t<kHasMod, A, M>;
  using QTile = Tile<Fn::kHasQMod>;
  using KTile = Tile<Fn::kHasKMod>;
  using VTile = Tile<Fn::kHasVMod>;
  using OutTile = Tile<Fn::kHasOutMod>;

  // `scale`: of what is stored; `mute`: dO counts as zero; see LinearBackward.
  LinearBackwardOperands(const ae_linear_params& p, const Env& env, A scale, bool mute)
      : p_(p), env_(env), inputs_(p, env), scale_(scale), mute_(mute) {}

  const Inputs& inputs() const { return inputs_; }
  A scale() const { return scale_; }

  // ---- tiles of accumulators, zero past n ----
  void load_q(const LinearAt& at, A* dst) const {
    load(dst, X::kDp, inputs_.raw_q(at), at, X::kD, at.hk,
         [this](const HookAt& h, V x) { return Fn::q_mod(env_, h, x); });
  }
  void load_k(const LinearAt& at, A* dst) const {
    load(dst, X::kDp, inputs_.raw_k(at), at, X::kD, at.hk,
         [this](const HookAt& h, V x) { return Fn::k_mod(env_, h, x); });
  }

  // ---- natural rows of kDp or kVp elements, in place where they lie so, else in the tile of their
  // type; anything past n ----
  const QTile* q(const LinearAt& at, A* sums, M* copied) const {
    if constexpr (Fn::kHasQMod) {
      load_q(at, sums);
      return sums;
    } else {
      return rows<X::kD, X::kDp>(inputs_.raw_q(at), at.n, sums, copied);
    }
  }
  const KTile* k(const LinearAt& at, A* sums, M* copied) const {
    if constexpr (Fn::kHasKMod) {
      load_k(at, sums);
      return sums;
    } else {
      return rows<X::kD, X::kDp>(inputs_.raw_k(at), at.n, sums, copied);
    }
  }
  const VTile* v(const LinearAt& at, A* sums, M* copied) const {
    if constexpr (Fn::kHasVMod) {
      load(sums, X::kVp, inputs_.raw_v(at, 0), at, X::kDv, at.h,
           [this](const HookAt& h, V x) { return Fn::v_mod(env_, h, x); });
      return sums;
    } else {
      return rows<X::kDv, X::kVp>(inputs_.raw_v(at, 0), at.n, sums, copied);
    }
  }
  // With an out_mod always in the tile, which out_back changes.
  const OutTile* dout(const LinearAt& at, A* sums, M* copied) const {
    OutTile* const tile = own<OutTile>(sums, copied);
    if (!has_dout()) {
      LinearTile<Plan>::clear(tile, int64_t(at.n) * X::kVp);
      return tile;
    }
    if constexpr (Fn::kHasOutMod) {
      copy<X::kDv, X::kVp>(tile, raw_dout(at), at.n);
      return tile;
    } else {
      return rows<X::kDv, X::kVp>(raw_dout(at), at.n, sums, copied);
    }
  }

  // ---- what `next` will load that is not loaded now, to be fetched ----
  // In the walk forwards; and backwards.
  void fetch_values(const LinearAt& at, const LinearAt& next, LinearFetch& ahead) const {
    if (next.t != at.t) ahead.add(inputs_.raw_k(next).ahead(next.n, X::kD));
    if (next.t == at.t && next.h == at.h) return;
    ahead.add(inputs_.raw_v(next, 0).ahead(next.n, X::kDv));
    if constexpr (X::kChannel) ahead.add(inputs_.raw_decay(next).ahead(next.n, X::kD));
  }
  void fetch_all(const LinearAt& at, const LinearAt& next, LinearFetch& ahead) const {
    fetch_values(at, next, ahead);
    if (next.t != at.t) ahead.add(inputs_.raw_q(next).ahead(next.n, X::kD));
    if (next.t == at.t && next.h == at.h) return;
    if (has_dout()) ahead.add(raw_dout(next).ahead(next.n, X::kDv));
  }

  // ---- results, times `scale`; the lines of `next` are fetched ----
  void store_q(const LinearAt& at, const LinearAt& next, const A* sum) const {
    store<Fn::kHasQMod, Fn::kQModFirst, Fn::kQModGrads>(
        p_.dq, p_.Hk, at.hk, inputs_.raw_q(at), at, next.t - at.t, X::kD, sum, X::kDp,
        [this](const HookAt& h, V x, V g, V* grads) {
          return Fn::q_mod_grad(env_, h, x, g, grads);
        });
  }
  void store_k(const LinearAt& at, const LinearAt& next, const A* sum) const {
    store<Fn::kHasKMod, Fn::kKModFirst, Fn::kKModGrads>(
        p_.dk, p_.Hk, at.hk, inputs_.raw_k(at), at, next.t - at.t, X::kD, sum, X::kDp,
        [this](const HookAt& h, V x, V g, V* grads) {
          return Fn::k_mod_grad(env_, h, x, g, grads);
        });
  }
  void store_v(const LinearAt& at, const LinearAt& next, const A* sum) const {
    store<Fn::kHasVMod, Fn::kVModFirst, Fn::kVModGrads>(
        p_.dv, p_.H, at.h, inputs_.raw_v(at, 0), at, (next.h - at.h) * p_.L + next.t - at.t, X::kDv,
        sum, X::kVp, [this](const HookAt& h, V x, V g, V* grads) {
          return Fn::v_mod_grad(env_, h, x, g, grads);
        });
  }
  // Of scalar decay: grad[C].
  void store_scalar_decay(const LinearAt& at, const A* grad) const {
    using Decay = typename Plan::Decay;
    const auto g = Inputs::template rows<Decay>(p_.decay, p_.decay_stride, at.b, at.h, at.t);
    const int64_t first = (at.b * p_.H + at.h) * p_.L + at.t;
    for (int i = 0; i < at.n; i += W) {
      const int count = at.n - i < W ? at.n - i : W;
      V dx = load_vector<V>(grad + i) * scale_;
      if constexpr (Fn::kHasDecayMod) {
        dx = decay_back({at.b, at.h, at.t + i, 0, count},
                        load_lanes<A>(g.base + i * g.stride, g.stride, count), dx, first + i);
      }
      store_lanes(static_cast<A*>(p_.ddecay), first + i, dx, count);
    }
  }
  // Of channel decay: natural grad[C][kDp].
  void store_channel_decay(const LinearAt& at, const A* grad) const {
    using Decay = typename Plan::Decay;
    const auto g = Inputs::template rows<Decay>(p_.decay, p_.decay_stride, at.b, at.h, at.t);
    for (int i = 0; i < at.n; ++i) {
      const int64_t first = ((at.b * p_.H + at.h) * p_.L + at.t + i) * X::kD;
      for (int d = 0; d < X::kD; d += W) {
        const int count = X::kD - d < W ? X::kD - d : W;
        V dx = load_vector<V>(grad + i * X::kDp + d) * scale_;
        if constexpr (Fn::kHasDecayMod) {
          dx = decay_back({at.b, at.h, at.t + i, d, count},
                          load_lanes<A>(g(i) + d * g.col, g.col, count), dx, first + d);
        }
        store_lanes(static_cast<A*>(p_.ddecay), first + d, dx, count);
      }
    }
  }
  void store_beta(const LinearAt& at, const A* grad) const {
    if (p_.dbeta == nullptr) return;
    A* out = static_cast<A*>(p_.dbeta) + (at.b * p_.H + at.h) * p_.L + at.t;
    for (int i = 0; i < at.n; ++i) out[i] = grad[i] * scale_;
  }
  // dO becomes the gradient before out_mod, whose operand is `out` (changed by nothing here).
  void out_back(const LinearAt& at, const A* out, A* dout) const {
    if constexpr (Fn::kHasOutMod) {
      for (int i = 0; i < at.n; ++i) {
        const int64_t first = ((at.b * p_.H + at.h) * p_.L + at.t + i) * X::kDv;
        for (int d = 0; d < X::kDv; d += W) {
          const int count = X::kDv - d < W ? X::kDv - d : W;
          V grads[slots(Fn::kOutModGrads)]{};
          const V dx = Fn::out_mod_grad(env_, {at.b, at.h, at.t + i, d, count},
                                        load_vector<V>(out + i * X::kVp + d),
                                        load_vector<V>(dout + i * X::kVp + d), grads);
          store_grads<Fn::kOutModFirst, Fn::kOutModGrads>(grads, first + d, count);
          store_vector(dout + i * X::kVp + d, first_lanes<A>(dx, count));
        }
      }
    }
  }

 private:
  static constexpr int slots(int n) { return n > 0 ? n : 1; }

  bool has_dout() const { return p_.dout != nullptr && !(mute_ && !Fn::kHasOutMod); }
  LinearRows<Elem> raw_dout(const LinearAt& a) const {
    return Inputs::template rows<Elem>(p_.dout, p_.dout_stride, a.b, a.h, a.t);
  }

  template <class E, class Hook>
  void load(A* dst, int pitch, const LinearRows<E>& src, const LinearAt& at, int width, int64_t h,
            const Hook& hook) const {
    stage_rows<A>(dst, pitch, src, at.n, width, {at.b, h, at.t, 0, 0}, hook);
    LinearTile<Plan>::clear(dst + int64_t(at.n) * pitch, int64_t(C - at.n) * pitch);
  }

  template <class To>
  static To* own(A* sums, M* copied) {
    if constexpr (__is_same(To, A)) {
      return sums;
    } else {
      return copied;
    }
  }

  // Without a hook.
  template <int kWidth, int kPitch>
  static const M* rows(const LinearRows<Elem>& src, int n, A* sums, M* copied) {
    if constexpr (__is_same(Elem, M) && kWidth == kPitch) {
      if (src.col == 1 && src.stride == kPitch) return src.base;
    }
    M* const tile = own<M>(sums, copied);
    copy<kWidth, kPitch>(tile, src, n);
    return tile;
  }

  // Rows of kWidth elements as they are, zero to the next vector.
  template <int kWidth, int kPitch, class To>
  __attribute__((noinline)) static void copy(To* dst, const LinearRows<Elem>& rows, int n) {
    for (int i = 0; i < n; ++i) {
      const Elem* from = rows(i);
      for (int d = 0; d < kWidth; d += W) {
        const int count = kWidth - d < W ? kWidth - d : W;
        To* to = dst + int64_t(i) * kPitch + d;
        if constexpr (__is_same(To, Elem)) {
          store_vector(to, load_packed<A, To>(from + d * rows.col, rows.col, count, NoMod{}));
        } else {
          store_vector(to,
                       first_lanes<A>(load_lanes<A>(from + d * rows.col, rows.col, count), count));
        }
      }
    }
  }

  template <class E>
  static AE_INLINE void store_lanes(E* out, int64_t at, V x, int count) {
    if (out == nullptr) return;
    if (count == W) {
      store_narrowed<E, A>(out + at, x);
    } else {
      E element[W];
      store_narrowed<E, A>(element, x);
      for (int i = 0; i < count; ++i) out[at + i] = element[i];
    }
  }
  template <int kFirst, int kGrads>
  AE_INLINE void store_grads(const V* grads, int64_t at, int count) const {
    for (int i = 0; i < kGrads; ++i) {
      store_lanes(static_cast<A*>(p_.hook_grads[kFirst + i]), at, grads[i], count);
    }
  }

  template <bool kHasMod, int kFirst, int kGrads, class Back>
  __attribute__((noinline)) void store(void* to, int64_t heads, int64_t h,
                                       const LinearRows<Elem>& raw, const LinearAt& at,
                                       int64_t ahead, int width, const A* sum, int pitch,
                                       const Back& back) const {
    Elem* out = static_cast<Elem*>(to);
    if (out == nullptr && kGrads == 0) return;
    for (int i = 0; i < at.n; ++i) {
      const int64_t first = ((at.b * heads + h) * p_.L + at.t + i) * width;
      for (int d = 0; d < width; d += W) {
        const int count = width - d < W ? width - d : W;
        if (out != nullptr) __builtin_prefetch(out + first + d + ahead * width, 1, 2);
        V g = load_vector<V>(sum + int64_t(i) * pitch + d) * scale_;
        if constexpr (kHasMod) {
          V grads[slots(kGrads)]{};
          const V x = load_lanes<A>(raw(i) + d * raw.col, raw.col, count);
          g = back({at.b, h, at.t + i, d, count}, x, first_lanes<A>(g, count), grads);
          store_grads<kFirst, kGrads>(grads, first + d, count);
        }
        store_lanes(out, first + d, g, count);
      }
    }
  }

  AE_INLINE V decay_back(const HookAt& h, V x, V g, int64_t at) const {
    V grads[slots(Fn::kDecayModGrads)]{};
    const V dx = Fn::decay_mod_grad(env_, h, x, first_lanes<A>(g, h.count), grads);
    store_grads<Fn::kDecayModFirst, Fn::kDecayModGrads>(grads, at, h.count);
    return dx;
  }

  const ae_linear_params& p_;
  const Env& env_;
  const Inputs inputs_;
  const A scale_;
  const bool mute_;
};

}  // namespace ae
