// The results of sm80/forward.cuh: rows of the output and their statistics, parts for ae_combine,
// and what Inf and NaN in V add to either.
#pragma once
#include "sm80/forward_fill.cuh"
#include "sm80/nonfinite.cuh"
#include "sm80/store.cuh"

namespace ae {

template <class Plan, class Fn>
class ForwardResults : public ForwardFill<Plan, Fn> {
 protected:
  using Base = ForwardFill<Plan, Fn>;
  using Base::Base;
  using Base::p_, Base::env_, Base::shared_, Base::small_, Base::lane_, Base::rows_, Base::state_,
      Base::o_, Base::alive_, Base::kBlockM, Base::kColumnWarps, Base::kAtoms, Base::kRows,
      Base::kColumns, Base::kSums, Base::kThreads, Base::row_tile, Base::is_part, Base::slot,
      Base::column_warp, Base::row_of;
  using typename Base::Elem, typename Base::Shared, typename Base::KTile, typename Base::VTile;

  __device__ __forceinline__ void store() {
    const RowTile tile = row_tile();
    if constexpr (Plan::kScheduled) {
      if (is_part()) return store_part(tile.count);
    }
    const int64_t* s = p_.out_stride;
    uint16_t* base = static_cast<uint16_t*>(p_.out) + tile.b * s[0] + tile.first_row * s[2];
    const bool vectors = GlobalRows{base, s[2], s[3]}.aligned() && s[1] % kChunkElements == 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const bool exists = row_of(r) < tile.count;
      const int i = exists ? row_of(r) : tile.count - 1;
      const int q = tile.q(i), h = tile.h(i);
      float stats[Fn::kStats > 0 ? Fn::kStats : 1];
      float factor = 1;
      Fn::finalize(env_, rows_[r], state_[r], factor, stats);
      if (lane_ % 4 == 0 && column_warp() == 0) small_.out_factors[row_of(r)] = factor;
      const bool alive = (alive_ >> r & 1) != 0;
#pragma unroll
      for (int c = 0; c < kSums; ++c) o_[r][c] = alive ? o_[r][c] * factor : 0.0f;
      constexpr int kWidth = kColumnWarps == 1 ? Plan::kDv : kColumns;
      store_row<Elem, kWidth>(base + h * s[1] + q * s[2] + column_warp() * kColumns * s[3], s[3],
                              vectors, exists, o_[r], lane_);
      if (p_.stats != nullptr && exists && lane_ % 4 == 0 && column_warp() == 0) {
        const int64_t* step = p_.stats_stride;
        float* to =
            static_cast<float*>(p_.stats) + tile.b * step[1] + h * step[2] + tile.first_row + q;
#pragma unroll
        for (int n = 0; n < Fn::kStats; ++n) to[n * step[0]] = stats[n];
      }
    }
  }

  // Sums that are not normalised, and states: what ae_combine merges.
  __device__ __forceinline__ void store_part(int count) {
    const auto part = slot();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = row_of(r);
      if (row >= count) continue;
      const bool alive = (alive_ >> r & 1) != 0;
      float* to = part.out(row) + column_warp() * kColumns + lane_ % 4 * 2;
#pragma unroll
      for (int c = 0; c < kSums; c += 2) {
        if (kColumnWarps == 1 && 4 * c >= part.kPitch) break;
        *reinterpret_cast<float2*>(to + 4 * c) =
            alive ? make_float2(o_[r][c], o_[r][c + 1]) : make_float2(0.0f, 0.0f);
      }
      if (lane_ % 4 != 0 || column_warp() != 0) continue;
#pragma unroll
      for (int n = 0; n < Fn::kStates; ++n) part.states(row)[n] = state_[r][n];
      part.alive(row) = alive ? 1.0f : 0.0f;
    }
  }

  // Adds what Inf and NaN in a tile of V give to outputs that have been stored.
  template <int kKeySteps>
  __device__ __forceinline__ void add_nonfinite(char* k, char* v,
                                                const uint32_t (&w)[kKeySteps][kAtoms][4]) {
    const RowTile tile = row_tile();
    const int64_t* s = p_.out_stride;
    const auto add = [&](int row, int column, float x) {
      if (row >= tile.count || column >= Plan::kDv) return;
      if constexpr (Plan::kScheduled) {
        if (is_part()) {
          slot().out(row)[column] += x;
          return;
        }
      }
      uint16_t* out = static_cast<uint16_t*>(p_.out) + tile.b * s[0] + tile.h(row) * s[1] +
                      (tile.first_row + tile.q(row)) * s[2] + column * s[3];
      *out = narrow<Elem>(widen<Elem>(*out) + x * small_.out_factors[row]);
    };
    // K is no longer needed, unless V lies in it.
    constexpr int kScratch = Plan::kSharedKV ? Shared::kExchangeBytes : KTile::kBytes;
    char* scratch = Plan::kSharedKV ? shared_ + Shared::kExchange : k;
    each_nonfinite<VTile, Elem, kBlockM, kThreads, kScratch>(
        v, scratch, w, [&](int r) { return row_of(r); }, add, lane_);
  }
};

}  // namespace ae
