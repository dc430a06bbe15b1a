// How the forward pass reads keys and values: their addresses, packed tiles, and the two products
// straight from memory for few rows.
#pragma once
#include "common/env.h"
#include "common/segments.h"
#include "cpu/direct.h"
#include "cpu/forward_work.h"
#include "cpu/module.h"

namespace ae {

// Packing fetches what it reads this many rows later.
constexpr int64_t kPackAhead = 48;

// Addresses of keys [first, first + n) of a sequence, of kv head 0.
template <class E>
void key_addresses(const ae_params& p, const void* data, const int64_t* stride, const Sequence& s,
                   int64_t first, int64_t n, const E** out) {
  const ae_sequences& in = p.sequences;
  for (int64_t i = 0; i < n;) {
    int64_t run = n - i;
    if (s.pages != nullptr) {
      const int64_t left = in.page_size - (s.first_key + first + i) % in.page_size;
      run = left < run ? left : run;
    }
    const E* row = static_cast<const E*>(data) + key_offset(in, s, stride, first + i);
    for (const int64_t end = i + run; i < end; ++i, row += stride[2]) out[i] = row;
  }
}

// One tile of keys of one kv head, as the parts of an output meet it.
template <class Elem, class M>
struct ForwardKeyTile {
  int64_t first;  // key
  int count;
  bool full;                                  // the mask holds for every pair
  const Elem *const *k_rows, *const *v_rows;  // null: packed ahead
  int64_t k_offset, v_offset;                 // of the head, from the rows' addresses
  Fetch<Elem> k_fetch, v_fetch;
  M *k, *v;  // the packed tiles, or room for them
  bool k_packed, v_packed, bad_v;
};

template <class Plan, class Fn>
class ForwardKeys {
  using Elem = typename Plan::Elem;
  using Acc = typename Plan::Acc;
  using M = Multiply<Plan>;
  using L = Lanes<Acc>;
  using V = typename L::Acc;
  using Scratch = ForwardScratch<Plan>;
  static constexpr int kBlockN = Plan::kBlockN;
  static constexpr int kD = Plan::kD, kDv = Plan::kDv, kOutPitch = Scratch::kOutPitch;
  static constexpr int kPair = GemmStep<Acc, M>::kPair;

 public:
  using Tile = ForwardKeyTile<Elem, M>;

  ForwardKeys(const ae_params& p, const Env& env) : p_(p), env_(env) {}

  // ---- packing ----
  __attribute__((noinline)) void pack_k(const Elem* const* rows, int64_t offset, int n,
                                        M* k) const {
    const int64_t* s = p_.k_stride;
    const auto row = [=](int64_t i) { return rows[i] + offset; };
    pack_by_column<Acc, M, kD>(k, row, s[3], n, kBlockN, k_mod(), ahead(s));
  }
  // Returns whether the tile holds Inf or NaN.
  __attribute__((noinline)) bool pack_v(const Elem* const* rows, int64_t offset, int n,
                                        M* v) const {
    const int64_t* s = p_.v_stride;
    const auto row = [=](int64_t i) { return rows[i] + offset; };
    return pack_by_row<Acc, M, kDv>(v, row, s[3], n, kBlockN, v_mod(), ahead(s));
  }
  void pack_q(const ForwardTile<Plan>& tile, const Elem* q, M* to) const {
    const int64_t* s = p_.q_stride;
    for (int i = 0; i < tile.count; ++i) {
      const Elem* row = q + tile.h(i) * s[1] + tile.row(i) * s[2];
      pack_row<Acc, M, kD>(to + i * Scratch::kQPitch, row, s[3], q_mod());
    }
  }

  // ---- products ----
  // Whether few rows may read K, or V, where they lie.
  static constexpr bool kDirectK = !Fn::kHasKMod && kD % (L::W * kPair) == 0;
  static constexpr bool kDirectV = !Fn::kHasVMod && kDv % (L::W * kPair) == 0;
  static bool direct(const Tile& tile, const int64_t* stride, int rows) {
    return tile.k_rows != nullptr && rows <= kDirectRows && stride[3] == 1;
  }

  // Raw dot products of `rows` rows with some columns of the tile; `scores` is the first.
  void score(Tile& tile, Columns columns, int rows, const M* q, Acc* scores) const {
    const int first = columns.begin, ncols = columns.end - columns.begin;
    if constexpr (kDirectK) {
      if (direct(tile, p_.k_stride, rows)) {
        const MemoryRows<Elem> k{tile.k_rows, tile.k_offset, p_.k_stride[2], tile.k_fetch};
        direct_scores<Acc, M, kD, Elem>(rows, q, Scratch::kQPitch, k.from(first), ncols, scores,
                                        kBlockN);
        return;
      }
    }
    if (!tile.k_packed) pack_k(tile.k_rows, tile.k_offset, tile.count, tile.k);
    tile.k_packed = true;
    gemm<Acc, M, kBlockN, GemmMode::kOverwrite>(rows, (kD + kPair - 1) / kPair, q, Scratch::kQPitch,
                                                kPair, tile.k + int64_t(first) * kPair, kBlockN,
                                                scores, kBlockN, nullptr, ncols);
  }

  // O = O * factor + W V over these columns.
  void multiply(Tile& tile, Columns columns, int rows, const Acc* factor, const M* weights,
                Acc* out) const {
    const int first = columns.begin, ncols = columns.end - columns.begin;
    // Dead keys must not be multiplied, so only a tile without any may be read where it lies.
    if constexpr (kDirectV && !score_can_die<Fn>()) {
      if (tile.full && direct(tile, p_.v_stride, rows)) {
        const MemoryRows<Elem> v{tile.v_rows, tile.v_offset, p_.v_stride[2], tile.v_fetch};
        direct_values<Acc, M, kDv, Elem>(rows, ncols, weights, kBlockN, v.from(first), out,
                                         kOutPitch, factor);
        return;
      }
    }
    if (!tile.v_packed) tile.bad_v = pack_v(tile.v_rows, tile.v_offset, tile.count, tile.v);
    tile.v_packed = true;
    const M* v = tile.v + int64_t(first) * kOutPitch;
    if (tile.bad_v && (!tile.full || score_can_die<Fn>())) {
      return multiply_live(rows, ncols, factor, weights, v, out);
    }
    const int steps = (ncols + kPair - 1) / kPair;  // the weight that fills a pair is 0
    gemm<Acc, M, kOutPitch, GemmMode::kScale>(rows, steps, weights, kBlockN, kPair, v, kOutPitch,
                                              out, kOutPitch, factor);
  }

 private:
  const ae_params& p_;
  const Env& env_;

  // Elements from a row to the one that packing fetches meanwhile. Pages lie anywhere.
  int64_t ahead(const int64_t* stride) const {
    return p_.sequences.pages != nullptr ? 0 : kPackAhead * stride[2];
  }

  auto q_mod() const {
    if constexpr (Fn::kHasQMod) {
      return [this](V x) { return Fn::q_mod(env_, x); };
    } else {
      return NoMod{};
    }
  }
  auto k_mod() const {
    if constexpr (Fn::kHasKMod) {
      return [this](V x) { return Fn::k_mod(env_, x); };
    } else {
      return NoMod{};
    }
  }
  auto v_mod() const {
    if constexpr (Fn::kHasVMod) {
      return [this](V x) { return Fn::v_mod(env_, x); };
    } else {
      return NoMod{};
    }
  }

  // O = O * factor + W V over the keys whose weight is not 0: V may hold Inf or NaN at dead keys.
  __attribute__((noinline)) void multiply_live(int count, int keys, const Acc* factor,
                                               const M* weights, const M* v, Acc* out) const {
    for (int i = 0; i < count; ++i) {
      Acc* o = out + int64_t(i) * kOutPitch;
      for (int d = 0; d < kOutPitch; ++d) o[d] *= factor[i];
      for (int j = 0; j < keys; ++j) {
        const Acc w = widen<Acc>(weights[int64_t(i) * kBlockN + j]);
        if (w == 0) continue;
        const M* row = v + int64_t(j / kPair) * kPair * kOutPitch + j % kPair;
        for (int d = 0; d < kOutPitch; ++d) o[d] += w * widen<Acc>(row[d * kPair]);
      }
    }
  }
};

}  // namespace ae
