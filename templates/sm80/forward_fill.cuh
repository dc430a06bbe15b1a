// Filling the shared memory of sm80/forward.cuh: Q, and tiles of K and V in the ring's slots.
#pragma once
#include "sm80/forward_thread.cuh"
#include "sm80/store.cuh"
#include "sm80/tile.cuh"

namespace ae {

template <class Plan, class Fn>
class ForwardFill : public ForwardThread<Plan, Fn> {
 protected:
  using Base = ForwardThread<Plan, Fn>;
  using Base::Base;
  using Base::p_, Base::env_, Base::shared_, Base::small_, Base::k_, Base::v_, Base::rows_,
      Base::kBlockN, Base::kRows, Base::kThreads, Base::row_tile, Base::slot, Base::row_of,
      Base::keys_in;
  using typename Base::Elem, typename Base::Shared, typename Base::QTile, typename Base::KTile,
      typename Base::VTile;

  // What a mod makes of an element, rounded to the operands' type.
  template <class F>
  struct Mod {
    static constexpr bool kIdentity = false;
    F f;
    __device__ __forceinline__ uint16_t operator()(uint16_t x) const {
      return narrow<Elem>(f(widen<Elem>(x)));
    }
  };
  template <class Tile, bool kModified, class RowOf, class F>
  __device__ __forceinline__ void fill_modified(char* tile, int count, int64_t column_stride,
                                                bool vectors, const RowOf& row_of,
                                                const F& f) const {
    if constexpr (kModified) {
      fill<Tile, Elem, kThreads>(tile, count, column_stride, vectors, row_of, Mod<F>{f});
    } else {
      fill<Tile, Elem, kThreads>(tile, count, column_stride, vectors, row_of, NoMod{});
    }
  }

  // Starts copying Q, and computes what the row function needs of each row.
  __device__ __forceinline__ void start() {
    const RowTile tile = row_tile();
    const auto rows_of = [&](const void* data, const int64_t* stride) {
      const auto* head = static_cast<const uint16_t*>(data) + tile.kv_head * stride[1];
      if constexpr (Plan::kSequences) {
        return GlobalRows{head, stride[2], stride[3]};
      } else {
        return GlobalRows{head + tile.b * stride[0], stride[2], stride[3]};
      }
    };
    k_ = rows_of(p_.k, p_.k_stride);
    v_ = rows_of(p_.v, p_.v_stride);
    const int64_t* s = p_.q_stride;
    const uint16_t* base =
        static_cast<const uint16_t*>(p_.q) + tile.b * s[0] + tile.first_row * s[2];
    const bool vectors = GlobalRows{base, s[2], s[3]}.aligned() && s[1] % kChunkElements == 0;
    const auto row = [&](int i) { return base + tile.h(i) * s[1] + tile.q(i) * s[2]; };
    fill_modified<QTile, Fn::kHasQMod>(shared_, tile.count, s[3], vectors, row,
                                       [&](float x) { return Fn::q_mod(env_, x); });
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = row_of(r) < tile.count ? row_of(r) : tile.count - 1;
      rows_[r] = Fn::make_row(env_, tile.batch, tile.h(i), tile.query(i));
    }
  }

  // Starts copying a tile of K and V into a slot of the ring.
  __device__ __forceinline__ void fill_slot(int tile, int slot) const {
    const int count = keys_in(tile);
    char* k = shared_ + Shared::kK + slot * KTile::kBytes;
    char* v = shared_ + Shared::kV + slot * VTile::kBytes;
    if constexpr (Plan::kSequences) {
      small_.rows.locate(p_.sequences, tile * kBlockN);
      const auto k_row = [&](int i) { return small_.rows.row(k_, p_.k_stride[0], i); };
      const auto v_row = [&](int i) { return small_.rows.row(v_, p_.v_stride[0], i); };
      copy(k, v, count, k_.aligned() && p_.k_stride[0] % kChunkElements == 0,
           v_.aligned() && p_.v_stride[0] % kChunkElements == 0, k_row, v_row);
    } else {
      const int64_t first = int64_t(tile) * kBlockN;
      const uint16_t *k_first = k_.row(first), *v_first = v_.row(first);
      const auto k_row = [&](int i) { return k_first + i * k_.row_stride; };
      const auto v_row = [&](int i) { return v_first + i * v_.row_stride; };
      copy(k, v, count, k_.aligned(), v_.aligned(), k_row, v_row);
    }
  }

  template <class KRow, class VRow>
  __device__ __forceinline__ void copy(char* k, char* v, int count, bool k_vectors, bool v_vectors,
                                       const KRow& k_row, const VRow& v_row) const {
    fill_modified<KTile, Fn::kHasKMod>(k, count, k_.column_stride, k_vectors, k_row,
                                       [&](float x) { return Fn::k_mod(env_, x); });
    if constexpr (!Plan::kSharedKV) {
      fill_modified<VTile, Fn::kHasVMod>(v, count, v_.column_stride, v_vectors, v_row,
                                         [&](float x) { return Fn::v_mod(env_, x); });
    }
  }
};

}  // namespace ae
