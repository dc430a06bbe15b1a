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
  // What v and dO are taken as: in bf16 products without hooks as they lie, else accumulators.
  using M = typename X::M;
  using VTile = std::conditional_t<Fn::kHasVMod, A, M>;
  using OutTile = std::conditional_t<Fn::kHasOutMod, A, M>;

  // `scale`: of what is stored; `mute`: dO counts as zero; see LinearBackward.
  LinearBackwardOperands(const ae_linear_params& p, const Env& env, A scale, bool mute)
      : p_(p), env_(env), inputs_(p, env), scale_(scale), mute_(mute) {}

  const Inputs& inputs() const { return inputs_; }
  A scale() const { return scale_; }

  // ---- natural tiles, zero past n ----
  // `next` is the chunk that will be loaded then: it is fetched meanwhile.
  void load_q(const LinearAt& at, const LinearAt& next, A* dst) const {
    load(dst, X::kDp, inputs_.raw_q(at), inputs_.raw_q(next).ahead(next.n, X::kD), at, X::kD, at.hk,
         [this](const HookAt& h, V x) { return Fn::q_mod(env_, h, x); });
  }
  void load_k(const LinearAt& at, const LinearAt& next, A* dst) const {
    load(dst, X::kDp, inputs_.raw_k(at), inputs_.raw_k(next).ahead(next.n, X::kD), at, X::kD, at.hk,
         [this](const HookAt& h, V x) { return Fn::k_mod(env_, h, x); });
  }
  void load_v(const LinearAt& at, const LinearAt& next, VTile* dst) const {
    const auto rows = inputs_.raw_v(at, 0);
    if constexpr (Fn::kHasVMod) {
      load(dst, X::kVp, rows, {}, at, X::kDv, at.h,
           [this](const HookAt& h, V x) { return Fn::v_mod(env_, h, x); });
    } else {
      copy(dst, rows, at.n, inputs_.raw_v(next, 0).base - rows.base);
    }
  }
  void load_dout(const LinearAt& at, const LinearAt& next, OutTile* dst) const {
    if (p_.dout == nullptr || (mute_ && !Fn::kHasOutMod)) {
      return LinearTile<Plan>::clear(dst, C * X::kVp);
    }
    const auto rows = [&](const LinearAt& a) {
      return Inputs::template rows<Elem>(p_.dout, p_.dout_stride, a.b, a.h, a.t);
    };
    copy(dst, rows(at), at.n, rows(next).base - rows(at).base);
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

  template <class E, class Hook>
  void load(A* dst, int pitch, const LinearRows<E>& src, const LinearAhead& ahead,
            const LinearAt& at, int width, int64_t h, const Hook& hook) const {
    constexpr int kRows = 4;
    for (int i = 0; i < at.n; i += kRows) {
      ahead.fetch(i, kRows);
      const int rows = at.n - i < kRows ? at.n - i : kRows;
      stage_rows<A>(dst + int64_t(i) * pitch, pitch, LinearRows<E>{src(i), src.stride, src.col},
                    rows, width, {at.b, h, at.t + i, 0, 0}, hook);
    }
    LinearTile<Plan>::clear(dst + int64_t(at.n) * pitch, int64_t(C - at.n) * pitch);
  }

  // Rows of kDv elements as they are, zero past n and to the next vector; what lies `ahead`
  // elements on is fetched.
  template <class To>
  __attribute__((noinline)) static void copy(To* dst, const LinearRows<Elem>& rows, int n,
                                             int64_t ahead) {
    for (int i = 0; i < n; ++i) {
      const Elem* from = rows(i);
      for (int d = 0; d < X::kDv; d += W) {
        const int count = X::kDv - d < W ? X::kDv - d : W;
        __builtin_prefetch(from + d * rows.col + ahead, 0, 2);
        To* to = dst + int64_t(i) * X::kVp + d;
        if constexpr (__is_same(To, Elem)) {
          store_vector(to, load_packed<A, To>(from + d * rows.col, rows.col, count, NoMod{}));
        } else {
          store_vector(to,
                       first_lanes<A>(load_lanes<A>(from + d * rows.col, rows.col, count), count));
        }
      }
    }
    LinearTile<Plan>::clear(dst + int64_t(n) * X::kVp, int64_t(C - n) * X::kVp);
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
