// The rows of the outputs of a forward launch: their states, results and statistics, and the
// merging of partial results.
#pragma once
#include "cpu/forward_launch.h"

namespace ae {

template <class Plan, class Fn>
class ForwardResults : public ForwardLaunch<Plan, Fn> {
 protected:
  using Base = ForwardLaunch<Plan, Fn>;
  using typename Base::Acc;
  using typename Base::Elem;
  using typename Base::L;
  using typename Base::Output;
  using typename Base::Scratch;
  using typename Base::Tile;
  using V = typename L::Acc;
  using Base::at_, Base::base_, Base::cut_, Base::env_, Base::p_, Base::schedule_;
  using Base::kBlockM, Base::kDv, Base::kMergeRows, Base::kOutPitch, Base::output_of;
  static constexpr int kStates = Fn::kStates > 0 ? Fn::kStates : 1;

  using Base::Base;

  // The row states of an output, or of a part of it.
  struct Rows {
    typename Fn::Row* row;
    Acc (*state)[kStates];
    Acc* factor;
    bool* alive;

    Rows from(int64_t i) const { return {row + i, state + i, factor + i, alive + i}; }
  };
  Rows rows_of(char* scratch) const {
    return {(typename Fn::Row*)(scratch + at_.row), (Acc(*)[kStates])(scratch + at_.state),
            (Acc*)(scratch + at_.factor), (bool*)(scratch + at_.row_alive)};
  }
  void start_rows(const Tile& tile, const Rows& rows) const {
    for (int i = 0; i < tile.count; ++i) {
      rows.row[i] = Fn::make_row(env_, tile.b, tile.h(i), tile.q(i));
      Fn::init(env_, rows.row[i], rows.state[i]);
      rows.alive[i] = false;
    }
  }
  void finish(const Output& output, const Rows& rows, const Acc* sums) const {
    output.each_part(cut_, [&](const Tile& tile, int64_t at) {
      const Rows mine = rows.from(at);
      for (int i = 0; i < tile.count; ++i) {
        finish_row(output, tile, i, mine.row[i], mine.state[i], mine.alive[i],
                   sums + (at + i) * kOutPitch);
      }
    });
  }
  Acc* partial_out(int64_t row) const { return (Acc*)(base_ + at_.out) + row * kOutPitch; }
  Acc* partial_state(int64_t row) const { return (Acc*)(base_ + at_.out_state) + row * kStates; }
  bool* partial_alive(int64_t row) const { return (bool*)(base_ + at_.alive) + row; }

  // Row r of an output: its part, and the row there.
  struct Place {
    Tile tile;
    int i;
  };
  Place place_of(const Output& o, int64_t r) const {
    if (cut_.pack_ahead) return {Tile(cut_, o.s, o.sequence, o.block, o.row_tile), int(r)};
    const int64_t rows = o.s.rows * cut_.interleave, row = r % rows;
    const int64_t block = o.head * cut_.blocks + r / rows;
    return {Tile(cut_, o.s, o.sequence, block, row / kBlockM), int(row % kBlockM)};
  }
  int64_t row_count(const Output& o) const {
    if (cut_.pack_ahead) return Tile(cut_, o.s, o.sequence, o.block, o.row_tile).count;
    return o.heads * cut_.blocks * o.s.rows * cut_.interleave;
  }

  // Merges the parts of some rows of an output in the order of its keys; a part without live key is
  // absent.
  void merge(int64_t index) {
    if constexpr (Base::kCanSplit) {
      const int64_t chunks = (at_.rows + kMergeRows - 1) / kMergeRows;
      const Parts parts = schedule_.parts(index / chunks);
      if (parts.whole) return;
      const Output output = output_of(index / chunks);
      const int64_t begin = index % chunks * kMergeRows, rows = row_count(output);
      for (int64_t r = begin; r < rows && r < begin + kMergeRows; ++r) merge_row(output, parts, r);
    }
  }
  void merge_row(const Output& output, const Parts& parts, int64_t r) const {
    if constexpr (Base::kCanSplit) {
      const Place at = place_of(output, r);
      const auto row = Fn::make_row(env_, at.tile.b, at.tile.h(at.i), at.tile.q(at.i));
      Acc state[kStates];
      Acc* out = nullptr;
      for (int64_t part = 0; part < parts.count; ++part) {
        const int64_t from = parts.slot(part) * at_.rows + r;
        if (!*partial_alive(from)) continue;
        const Acc* other = partial_state(from);
        Acc* other_out = partial_out(from);
        if (out == nullptr) {
          out = other_out;
          for (int s = 0; s < Fn::kStates; ++s) state[s] = other[s];
        } else {
          Acc merged[kStates], fa = 1, fb = 1;
          Fn::merge(env_, row, state, other, merged, fa, fb);
          for (int s = 0; s < Fn::kStates; ++s) state[s] = merged[s];
          for (int d = 0; d < kOutPitch; ++d) out[d] = out[d] * fa + other_out[d] * fb;
        }
      }
      if (out == nullptr) Fn::init(env_, row, state);
      finish_row(output, at.tile, at.i, row, state, out != nullptr, out);
    }
  }

  // Writes one output row and its statistics; a row that never met a live key is 0.
  void finish_row(const Output& output, const Tile& tile, int i, const typename Fn::Row& row,
                  const Acc* state, bool alive, const Acc* acc) const {
    constexpr int W = L::W;
    const int64_t q = output.s.first_row + tile.row(i), h = tile.h(i), b = output.sequence;
    const int64_t* s = p_.out_stride;
    Acc stats[Fn::kStats > 0 ? Fn::kStats : 1];
    Acc factor = 1;
    Fn::finalize(env_, row, state, factor, p_.stats != nullptr ? stats : nullptr);
    Elem* out = (Elem*)p_.out + b * s[0] + h * s[1] + q * s[2];
    if (!alive) {
      for (int d = 0; d < kDv; ++d) out[d * s[3]] = Elem{};
    } else if (s[3] == 1) {
      int d = 0;
      for (; d + W <= kDv; d += W) {
        store_narrowed<Elem, Acc>(out + d, load_vector<V>(acc + d) * factor);
      }
      for (; d < kDv; ++d) out[d] = narrow<Elem>(acc[d] * factor);
    } else {
      for (int d = 0; d < kDv; ++d) out[d * s[3]] = narrow<Elem>(acc[d] * factor);
    }
    if (p_.stats == nullptr) return;
    const int64_t* step = p_.stats_stride;
    Acc* to = (Acc*)p_.stats + b * step[1] + h * step[2] + q;
    for (int n = 0; n < Fn::kStats; ++n) to[n * step[0]] = stats[n];
  }
};

}  // namespace ae
