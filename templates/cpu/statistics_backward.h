// The gradient of token statistics attention on the CPU: of w, temp and the bias, from dy and what
// forward saved. A unit includes this, defines its Plan as statistics_forward.h says and exports
// AE_EXPORT_STATISTICS_BACKWARD(Plan). The formulas: statistics_gradient.h.
//
// As forward, with suffix sums in the place of prefix sums: where there are sequences for every
// thread, causal ones are walked once each, from their end; else waves of blocks, from the last, in
// three phases with a scan between them. Not causal: three phases with sums over blocks between.
#pragma once
#include "cpu/statistics_gradient.h"
#include "cpu/statistics_work.h"

namespace ae {

template <class Plan>
class StatisticsBackward : StatisticsWork<Plan> {
  using Base = StatisticsWork<Plan>;
  using Base::block, Base::part, Base::tasks, Base::H, Base::kBlock, Base::kRow, Base::kTile,
      Base::p, Base::row_elements, Base::table_elements;
  using typename Base::A;
  using typename Base::Block;
  using typename Base::E;
  using typename Base::V;
  using G = StatisticsGradient<Plan>;
  using In = typename G::In;
  using Out = typename G::Out;
  using Around = typename G::Around;
  using Factors = typename G::Factors;
  static constexpr int kTiles = kBlock / kTile;  // of a block
  static constexpr int64_t kOperands = 2;        // w and dy are read

 public:
  explicit StatisticsBackward(const ae_statistics_params& params) : Base(params) {
    const bool scan = p.causal && !this->by_sequence();
    const int64_t rows = this->rows(), row = row_elements, table = table_elements;
    scratch_at_ = take(p.threads * scratch_elements());
    dtemp_at_ = take(rows * H);
    dr_at_ = take(!p.causal || scan || p.dbias ? rows * table : 0);
    rows_at_ = take(!p.causal || scan ? rows * row : 0);
    sequences_at_ = take(!p.causal ? p.sequences * H * Factors::kRow : scan ? 2 * row : 0);
  }
  int64_t workspace_bytes() const { return this->space_.bytes(); }

  void run(void* workspace, ae_parallel_for parallel_for) {
    this->begin(workspace, parallel_for);
    if (p.causal) {
      if (this->by_sequence()) {
        tasks(p.sequences, [&](int64_t i, int32_t worker) { walk(i, Scratch(*this, worker)); });
      } else {
        scan();
      }
    } else if (this->by_whole_sequence(kOperands)) {
      tasks(p.sequences, [&](int64_t i, int32_t worker) { whole(i, Scratch(*this, worker)); });
    } else {
      this->waves_of_sequences(kOperands, [&](int64_t begin, int64_t end) { phases(begin, end); });
    }
    tasks(H, [&](int64_t h, int32_t) { sum_heads(h); });
  }

 private:
  int64_t take(int64_t elements) { return this->space_.take(elements * int64_t(sizeof(A))); }
  int64_t partial_elements() const { return H * kTile * G::kColumns; }
  int64_t scratch_elements() const {
    return (3 + kTiles) * row_elements + 3 * table_elements + partial_elements();
  }
  struct Scratch {
    A *after, *local, *sums, *starts, *weights, *dpi, *dr, *partial;
    Scratch(const StatisticsBackward& b, int32_t worker) {
      after = b.part(b.scratch_at_) + worker * b.scratch_elements();
      local = after + b.row_elements;
      sums = local + b.row_elements;
      starts = sums + b.row_elements;
      weights = starts + kTiles * b.row_elements;
      dpi = weights + b.table_elements;
      dr = dpi + b.table_elements;
      partial = dr + b.table_elements;
    }
  };

  In w_of(const Block& b) const { return this->template tokens<const E>(p.w, p.w_stride, b); }
  In g_of(const Block& b) const { return this->template tokens<const E>(p.dy, p.dy_stride, b); }
  Out dw_of(const Block& b) const { return this->result(p.dw, p.dw_stride, b); }
  const A* temp() const { return static_cast<const A*>(p.temp); }
  const A* logits_of(const Block& b) const {
    return static_cast<const A*>(p.logits) + b.row * table_elements;
  }
  const A* statistics_of(int64_t row) const {
    return static_cast<const A*>(p.statistics) + row * row_elements;
  }
  A* row_of_block(const Block& b) const { return part(rows_at_) + b.row * row_elements; }
  A* dtemp_of(const Block& b) const { return part(dtemp_at_) + b.row * H; }
  bool keeps_dr() const { return !p.causal || p.dbias || !this->by_sequence(); }
  A* dr_of(const Block& b, const Scratch& s) const {
    return keeps_dr() ? part(dr_at_) + b.row * table_elements : s.dr;
  }

  void weigh(const Block& b, A* weights) const {
    for (int t = 0; t < b.count; t += kTile) {
      G::head_softmax(logits_of(b) + t, temp(), H, weights + t);
    }
  }
  void clear_dtemp(const Block& b) const {
    for (int64_t h = 0; h < H; ++h) dtemp_of(b)[h] = 0;
  }
  void softmax_gradient(const Block& b, int t, int count, const Scratch& s, A* dr) const {
    G::softmax_gradient(count, H, temp(), logits_of(b) + t, s.weights + t, s.dpi + t, dr + t,
                        dtemp_of(b));
  }

  // dtemp and dbias of a head: sums over the blocks in order.
  void sum_heads(int64_t h) const {
    A total = 0;
    for (int64_t n = 0; n < this->blocks_; ++n) total += dtemp_of(block(n))[h];
    static_cast<A*>(p.dtemp)[h] = total;
    if (!p.dbias) return;
    A* bias = static_cast<A*>(p.dbias) + h * p.bias_tokens;
    for (int64_t n = 0; n < p.bias_tokens; ++n) bias[n] = 0;
    for (int64_t n = 0; n < this->blocks_; ++n) {
      const Block b = block(n);
      const A* dr = part(dr_at_) + b.row * table_elements + h * kBlock;
      for (int t = 0; t < b.count; ++t) bias[b.start + t] += dr[t];
    }
    for (int64_t n = 0; n < p.bias_tokens; ++n) bias[n] *= A(Plan::kD);
  }

  // -- causal ------------------------------------------------------------------------------------
  // What the tokens of a block say before each of its tiles.
  void find_starts(const Block& b, const In& w, const Scratch& s) const {
    weigh(b, s.weights);
    this->clear(s.sums);
    for (int t = 0; t < b.count; t += kTile) {
      A* start = s.starts + t / kTile * row_elements;
      __builtin_memcpy(start, s.sums, uint64_t(row_elements) * sizeof(A));
      const In x = w.from(t, kTile);
      G::add_squares(x, H, s.sums);
      G::template add_weighted<G::kA>(x, H, s.weights + t, s.sums);
      G::add_weights(x.count, H, s.weights + t, s.sums);
    }
  }
  Around around(const Block& b, int t, const A* after, const Scratch& s) const {
    return {statistics_of(b.row), s.starts + t / kTile * row_elements, after, s.local};
  }
  static int last_tile(const Block& b) { return (b.count - 1) / kTile * kTile; }

  void walk(int64_t i, const Scratch& s) const {
    this->clear(s.after);
    for (int64_t j = this->blocks_of(i) - 1; j >= 0; --j) {
      const Block b = this->block_in(i, j);
      const In w = w_of(b), g = g_of(b);
      const Out dw = dw_of(b);
      A* dr = dr_of(b, s);
      find_starts(b, w, s);
      this->clear(s.local);
      clear_dtemp(b);
      for (int t = last_tile(b); t >= 0; t -= kTile) {
        const In x = w.from(t, kTile);
        const Around at = around(b, t, s.after, s);
        G::template causal_dpi<true>(x, g.from(t, kTile), H, s.weights + t, at, s.dpi + t,
                                     s.partial);
        softmax_gradient(b, t, x.count, s, dr);
        G::template causal_gradient<true>(x, H, dr + t, at, s.partial, dw.from(t, kTile));
      }
      this->add(s.after, s.local, row_elements);
    }
  }

  void scan() const {
    const int64_t wave = this->wave_blocks(kOperands);
    for (int64_t end = this->blocks_; end > 0; end -= wave) {
      const int64_t begin = end > wave ? end - wave : 0;
      tasks(end - begin, [&](int64_t n, int32_t worker) {
        later_weighted(block(begin + n), Scratch(*this, worker));
      });
      carry<G::kA, kRow>(begin, end);
      tasks(end - begin, [&](int64_t n, int32_t worker) {
        later_squares(block(begin + n), Scratch(*this, worker));
      });
      carry<G::kC, G::kA>(begin, end);
      tasks(end - begin,
            [&](int64_t n, int32_t worker) { write(block(begin + n), Scratch(*this, worker)); });
    }
  }
  // A block's own part of RA and RD.
  void later_weighted(const Block& b, const Scratch& s) const {
    const In w = w_of(b), g = g_of(b);
    find_starts(b, w, s);
    this->clear(s.after);
    this->clear(s.local);
    for (int t = last_tile(b); t >= 0; t -= kTile) {
      G::template causal_dpi<false>(w.from(t, kTile), g.from(t, kTile), H, s.weights + t,
                                    around(b, t, s.after, s), s.dpi + t, nullptr);
    }
    __builtin_memcpy(row_of_block(b), s.local, uint64_t(row_elements) * sizeof(A));
  }
  // dr, and a block's own part of Q.
  void later_squares(const Block& b, const Scratch& s) const {
    const In w = w_of(b), g = g_of(b);
    A *row = row_of_block(b), *dr = dr_of(b, s);
    find_starts(b, w, s);
    this->clear(s.local);
    clear_dtemp(b);
    for (int t = last_tile(b); t >= 0; t -= kTile) {
      const In x = w.from(t, kTile);
      const Around at = around(b, t, row, s);
      G::template causal_dpi<false>(x, g.from(t, kTile), H, s.weights + t, at, s.dpi + t, nullptr);
      softmax_gradient(b, t, x.count, s, dr);
      G::template causal_gradient<false>(x, H, dr + t, at, nullptr, Out{});
    }
    for (int64_t h = 0; h < H; ++h) {
      __builtin_memcpy(row + h * kRow + G::kC, s.local + h * kRow + G::kC, G::kColumns * sizeof(A));
    }
  }
  void write(const Block& b, const Scratch& s) const {
    const In w = w_of(b), g = g_of(b);
    const Out dw = dw_of(b);
    find_starts(b, w, s);
    this->clear(s.local);
    for (int t = last_tile(b); t >= 0; t -= kTile) {
      const In x = w.from(t, kTile);
      const Around at = around(b, t, row_of_block(b), s);
      G::template causal_dpi<true>(x, g.from(t, kTile), H, s.weights + t, at, s.dpi + t, s.partial);
      G::template causal_gradient<true>(x, H, dr_of(b, s) + t, at, s.partial, dw.from(t, kTile));
    }
  }
  // Turns local sums of the blocks of a wave, columns [kFrom, kTo), into sums of all after.
  template <int kFrom, int kTo>
  void carry(int64_t begin, int64_t end) const {
    const int64_t* first_block = this->first_block();
    const int64_t first = this->sequence_at(begin), last = this->sequence_at(end - 1);
    A* kept = part(sequences_at_);  // what the first sequence of a wave leaves to the one before
    this->sums(first, last + 1, end - begin, [&](int64_t i, int64_t h) {
      const int64_t from = first_block[i] > begin ? first_block[i] : begin;
      const int64_t to = first_block[i + 1] < end ? first_block[i + 1] : end;
      if (from == to) return;
      A total[kRow] = {};
      if (to != first_block[i + 1]) __builtin_memcpy(total, kept + h * kRow, sizeof(total));
      for (int64_t m = to - 1; m >= from; --m) {
        A* here = row_of_block(this->block_in(i, m - first_block[i])) + h * kRow;
        for (int k = kFrom; k < kTo; ++k) {
          const A local = here[k];
          here[k] = total[k];
          total[k] += local;
        }
      }
      if (from != first_block[i]) {
        __builtin_memcpy(kept + row_elements + h * kRow, total, sizeof(total));
      }
    });
    // Another sequence may have been reading: only now.
    for (int64_t h = 0; h < H; ++h) {
      __builtin_memcpy(kept + h * kRow + kFrom, kept + row_elements + h * kRow + kFrom,
                       (kTo - kFrom) * sizeof(A));
    }
  }

  // -- not causal --------------------------------------------------------------------------------
  A* factors_of(int64_t i, int64_t h) const {
    return part(sequences_at_) + (i * H + h) * Factors::kRow;
  }
  void products(const Block& b, const Scratch& s) const {
    A* row = row_of_block(b);
    this->clear(row);
    weigh(b, s.weights);
    for (int t = 0; t < b.count; t += kTile) {
      G::add_products(w_of(b).from(t, kTile), g_of(b).from(t, kTile), H, s.weights + t, row);
    }
  }
  void sum_products(int64_t i, int64_t h) const {
    const A* sums = statistics_of(i) + h * kRow;
    A* factors = factors_of(i, h);
    A* products = factors + Factors::kShare;
    __builtin_memset(factors, 0, Factors::kRow * sizeof(A));
    for (int64_t j = 0; j < this->blocks_of(i); ++j) {
      this->add(products, row_of_block(this->block_in(i, j)) + h * kRow + G::kA, G::kColumns);
    }
    const A total = sums[G::kZ] + G::kEpsilon;
    A constant = 0;
    for (int k = 0; k < G::kColumns; ++k) {
      const A c = sums[G::kC + k], a = sums[G::kA + k] / total;
      const A gate = total / (total + sums[G::kA + k]);
      const A da = gate * gate * products[k];
      constant += da * a;
      factors[Factors::kGate + k] = gate;
      factors[Factors::kShare + k] = da / total;
      factors[Factors::kInverse + k] = A(1) / (c < G::kNormFloor ? G::kNormFloor : c);
    }
    factors[Factors::kConstant] = constant / total;
  }
  void slopes(const Block& b, const Scratch& s) const {
    const In w = w_of(b), g = g_of(b);
    A *row = row_of_block(b), *dr = dr_of(b, s);
    const A* factors = factors_of(b.sequence, 0);
    this->clear(row);
    clear_dtemp(b);
    weigh(b, s.weights);
    for (int t = 0; t < b.count; t += kTile) {
      const In x = w.from(t, kTile);
      G::plain_dpi(x, g.from(t, kTile), H, factors, s.dpi + t);
      softmax_gradient(b, t, x.count, s, dr);
      G::template add_weighted<G::kC>(x, H, dr + t, row);
    }
  }
  void sum_slopes(int64_t i, int64_t h) const {
    const A* sums = statistics_of(i) + h * kRow;
    A* factors = factors_of(i, h);
    A* means = factors + Factors::kMean;
    for (int64_t j = 0; j < this->blocks_of(i); ++j) {
      this->add(means, row_of_block(this->block_in(i, j)) + h * kRow + G::kC, G::kColumns);
    }
    for (int k = 0; k < G::kColumns; ++k) {
      const A inverse = factors[Factors::kInverse + k];
      means[k] = sums[G::kC + k] < G::kNormFloor ? A(0) : means[k] * inverse * inverse;
    }
  }
  void gradient(const Block& b, const Scratch& s) const {
    weigh(b, s.weights);
    for (int t = 0; t < b.count; t += kTile) {
      G::plain_gradient(w_of(b).from(t, kTile), g_of(b).from(t, kTile), H, s.weights + t,
                        dr_of(b, s) + t, factors_of(b.sequence, 0), dw_of(b).from(t, kTile));
    }
  }

  // The second phase begins where the first has ended: with what caches still hold.
  void whole(int64_t i, const Scratch& s) const {
    const int64_t blocks = this->blocks_of(i);
    for (int64_t j = 0; j < blocks; ++j) products(this->block_in(i, j), s);
    for (int64_t h = 0; h < H; ++h) sum_products(i, h);
    for (int64_t j = blocks; j-- > 0;) slopes(this->block_in(i, j), s);
    for (int64_t h = 0; h < H; ++h) sum_slopes(i, h);
    for (int64_t j = 0; j < blocks; ++j) gradient(this->block_in(i, j), s);
  }
  void phases(int64_t begin, int64_t end) const {
    const int64_t first = this->first_block()[begin], blocks = this->first_block()[end] - first;
    const auto every_block = [&](bool backwards, const auto& phase) {
      tasks(blocks, [&](int64_t n, int32_t worker) {
        phase(block(first + (backwards ? blocks - 1 - n : n)), Scratch(*this, worker));
      });
    };
    every_block(false, [&](const Block& b, const Scratch& s) { products(b, s); });
    this->sums(begin, end, blocks, [&](int64_t i, int64_t h) { sum_products(i, h); });
    every_block(true, [&](const Block& b, const Scratch& s) { slopes(b, s); });
    this->sums(begin, end, blocks, [&](int64_t i, int64_t h) { sum_slopes(i, h); });
    every_block(false, [&](const Block& b, const Scratch& s) { gradient(b, s); });
  }

  int64_t scratch_at_, dtemp_at_, dr_at_, rows_at_, sequences_at_;
};

}  // namespace ae

#define AE_EXPORT_STATISTICS_BACKWARD(Plan) \
  AE_EXPORT_STATISTICS(Plan, ae::StatisticsBackward<Plan>, AE_STATISTICS_BACKWARD)
