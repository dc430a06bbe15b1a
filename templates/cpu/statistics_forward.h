// Token statistics attention, forward, on the CPU. A unit includes this, defines its Plan and
// exports AE_EXPORT_STATISTICS_FORWARD(Plan):
//
//   struct Plan {
//     using Elem = ae::bf16;            // w, y
//     using Acc = float;                // double for fp64
//     static constexpr int kD = 64;     // channels of a head
//     static constexpr int kTile = 16;  // tokens between a head's sums and the softmax over heads
//     static constexpr int64_t kCacheBytes = ..., kCoreBytes = ...;  // last-level cache, L2
//     static constexpr const char* kKey = "...";
//   };
//
// Causal: where there are sequences for every thread, each is walked once: w is read once. Else,
// wave by wave of blocks: sums of u in every block, carries by a scan over the blocks, weights and
// sums of u pi, another scan, outputs. Not causal: three phases with a sum over the blocks between
// them, of one sequence in one task where it is small, else of waves of sequences.
#pragma once
#include "cpu/statistics_work.h"

namespace ae {

template <class Plan>
class StatisticsForward : StatisticsWork<Plan> {
  using Base = StatisticsWork<Plan>;
  using Base::block, Base::H, Base::kBlock, Base::part, Base::tasks, Base::kRow, Base::kTile,
      Base::p, Base::row_elements, Base::table_elements;
  using typename Base::A;
  using typename Base::Block;
  using typename Base::E;
  using typename Base::S;
  using typename Base::V;
  using In = typename S::In;
  using Out = typename S::Out;

 public:
  explicit StatisticsForward(const ae_statistics_params& params) : Base(params) {
    const bool scan = p.causal && !this->by_sequence();
    const int64_t row = row_elements * int64_t(sizeof(A)),
                  table = table_elements * int64_t(sizeof(A));
    const int64_t rows = this->rows();
    scratch_at_ = this->space_.take(p.threads * (2 * row + 2 * table));
    weights_at_ = this->space_.take(!p.causal || scan ? rows * table : 0);
    rows_at_ = this->space_.take(!p.causal || (scan && !p.statistics) ? rows * row : 0);
    sequences_at_ = this->space_.take(!p.causal ? 2 * p.sequences * row : scan ? 2 * row : 0);
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
    } else if (this->by_whole_sequence(1)) {
      tasks(p.sequences, [&](int64_t i, int32_t worker) { whole(i, Scratch(*this, worker)); });
    } else {
      this->waves_of_sequences(1, [&](int64_t begin, int64_t end) { phases(begin, end); });
    }
  }

 private:
  struct Scratch {
    A *carry, *local, *logits, *weights;
    Scratch(const StatisticsForward& f, int32_t worker) {
      const int64_t elements = 2 * (f.row_elements + f.table_elements);
      carry = f.part(f.scratch_at_) + worker * elements;
      local = carry + f.row_elements;
      logits = local + f.row_elements;
      weights = logits + f.table_elements;
    }
  };

  In w_of(const Block& b) const { return this->template tokens<const E>(p.w, p.w_stride, b); }
  Out y_of(const Block& b) const { return this->result(p.y, p.y_stride, b); }
  const A* temp() const { return static_cast<const A*>(p.temp); }

  A* weights_of(const Block& b) const { return part(weights_at_) + b.row * table_elements; }
  // Where a block's r goes.
  A* logits_of(const Block& b, const Scratch& s) const {
    return p.logits ? static_cast<A*>(p.logits) + b.row * table_elements : s.logits;
  }
  // Causal: before each block. Else: local sums of each block.
  A* row_of_block(const Block& b) const {
    A* rows = p.causal && p.statistics ? static_cast<A*>(p.statistics) : part(rows_at_);
    return rows + b.row * row_elements;
  }
  // Not causal: of each sequence; what backward needs, and 1/c with -1 / (1 + a).
  A* sums_of(int64_t i) const {
    A* rows = p.statistics ? static_cast<A*>(p.statistics) : part(sequences_at_);
    return rows + i * row_elements;
  }
  A* factors_of(int64_t i) const { return part(sequences_at_) + (p.sequences + i) * row_elements; }

  // -- states ------------------------------------------------------------------------------------
  // One head of a state and a row's column: D columns of c and A, one of D.
  template <int kColumn>
  static constexpr int kPart = kColumn == S::kC   ? 0
                               : kColumn == S::kA ? 1
                                                  : 2;
  template <int kColumn>
  static constexpr int64_t kWidth = kColumn == S::kZ ? 1 : Plan::kD;

  template <int kColumn>
  void load_state(int64_t i, int64_t h, A* row) const {
    const auto* from = static_cast<const A*>(p.state_in[kPart<kColumn>]);
    constexpr int64_t kN = kWidth<kColumn>, kAll = kColumn == S::kZ ? 1 : S::kColumns;
    for (int64_t k = 0; k < kAll; ++k) {
      row[kColumn + k] = from && k < kN ? from[(i * H + h) * kN + k] : A(0);
    }
  }
  template <int kColumn>
  void store_state(int64_t i, int64_t h, const A* row) const {
    auto* to = static_cast<A*>(p.state_out[kPart<kColumn>]);
    constexpr int64_t kN = kWidth<kColumn>;
    if (to == nullptr) return;
    for (int64_t k = 0; k < kN; ++k) to[(i * H + h) * kN + k] = row[kColumn + k];
  }

  void add_squares(const Block& b) const {
    A* row = row_of_block(b);
    this->clear(row);
    for (int t = 0; t < b.count; t += kTile) S::add_squares(w_of(b).from(t, kTile), H, row);
  }

  // -- causal ------------------------------------------------------------------------------------
  // d * bias of a tile's tokens.
  void add_bias(const Block& b, int t, int count, A* logits) const {
    if (p.bias == nullptr) return;
    const int64_t at = (p.position ? p.position[b.sequence] : 0) + b.start + t;
    for (int64_t h = 0; h < H; ++h) {
      const A* bias = static_cast<const A*>(p.bias) + h * p.bias_stride[0] + at * p.bias_stride[1];
      for (int n = 0; n < count; ++n) {
        logits[h * kBlock + n] += A(Plan::kD) * bias[n * p.bias_stride[1]];
      }
    }
  }
  void weigh(const Block& b, const In& x, int t, const A* carry, A* local, A* logits,
             A* weights) const {
    S::causal_logits(x, H, carry, local, logits + t);
    add_bias(b, t, x.count, logits + t);
    S::head_softmax(logits + t, temp(), H, weights + t);
  }

  void walk(int64_t i, const Scratch& s) const {
    this->clear(s.carry);
    for (int64_t h = 0; h < H; ++h) {
      load_state<S::kC>(i, h, s.carry + h * kRow);
      load_state<S::kA>(i, h, s.carry + h * kRow);
      load_state<S::kZ>(i, h, s.carry + h * kRow);
    }
    for (int64_t j = 0; j < this->blocks_of(i); ++j) {
      const Block b = this->block_in(i, j);
      const In w = w_of(b);
      const Out y = y_of(b);
      if (p.statistics) {
        __builtin_memcpy(row_of_block(b), s.carry, uint64_t(row_elements) * sizeof(A));
      }
      A* logits = logits_of(b, s);
      this->clear(s.local);
      for (int t = 0; t < b.count; t += kTile) {
        const In x = w.from(t, kTile);
        weigh(b, x, t, s.carry, s.local, logits, s.weights);
        S::causal_output(x, H, s.weights + t, s.carry, s.local, y.from(t, kTile));
      }
      this->add(s.carry, s.local, row_elements);
    }
    for (int64_t h = 0; h < H; ++h) {
      store_state<S::kC>(i, h, s.carry + h * kRow);
      store_state<S::kA>(i, h, s.carry + h * kRow);
      store_state<S::kZ>(i, h, s.carry + h * kRow);
    }
  }

  void scan() const {
    const int64_t wave = this->wave_blocks(1);
    for (int64_t begin = 0; begin < this->blocks_; begin += wave) {
      const int64_t end = begin + wave < this->blocks_ ? begin + wave : this->blocks_;
      tasks(end - begin, [&](int64_t n, int32_t) {
        const Block b = block(begin + n);
        add_squares(b);
      });
      carry<S::kC, S::kA>(begin, end);
      tasks(end - begin, [&](int64_t n, int32_t worker) {
        const Block b = block(begin + n);
        const Scratch s(*this, worker);
        weigh_block(b, s);
      });
      carry<S::kA, kRow>(begin, end);
      tasks(end - begin, [&](int64_t n, int32_t worker) {
        const Block b = block(begin + n);
        const Scratch s(*this, worker);
        this->clear(s.local);
        for (int t = 0; t < b.count; t += kTile) {
          S::causal_output(w_of(b).from(t, kTile), H, weights_of(b) + t, row_of_block(b), s.local,
                           y_of(b).from(t, kTile));
        }
      });
    }
    for (int64_t i = 0; i < p.sequences; ++i) {
      if (this->length(i) == 0) walk(i, Scratch(*this, 0));  // passes its state on
    }
  }
  void weigh_block(const Block& b, const Scratch& s) const {
    A *row = row_of_block(b), *weights = weights_of(b), *logits = logits_of(b, s);
    const In w = w_of(b);
    this->clear(s.local);
    for (int t = 0; t < b.count; t += kTile) {
      const In x = w.from(t, kTile);
      weigh(b, x, t, row, s.local, logits, weights);
      S::template add_weighted<S::kA>(x, H, weights + t, s.local);
    }
    S::add_weights(b.count, H, weights, s.local);
    for (int64_t h = 0; h < H; ++h) {
      constexpr uint64_t kBytes = (kRow - S::kA) * sizeof(A);
      __builtin_memcpy(row + h * kRow + S::kA, s.local + h * kRow + S::kA, kBytes);
    }
  }
  // Turns local sums of the blocks of a wave, columns [kFrom, kTo), into sums of all before.
  template <int kFrom, int kTo>
  void carry(int64_t begin, int64_t end) const {
    const int64_t* first_block = this->first_block();
    const int64_t first = this->sequence_at(begin), last = this->sequence_at(end - 1);
    A* kept = part(sequences_at_);  // what the last sequence of a wave leaves to the next
    this->sums(first, last + 1, end - begin, [&](int64_t i, int64_t h) {
      const int64_t from = first_block[i] > begin ? first_block[i] : begin;
      const int64_t to = first_block[i + 1] < end ? first_block[i + 1] : end;
      if (from == to) return;
      A total[kRow];
      start<kFrom>(i, h, from == first_block[i], kept + h * kRow, total);
      for (int64_t m = from; m < to; ++m) {
        A* here = row_of_block(this->block_in(i, m - first_block[i])) + h * kRow;
        for (int k = kFrom; k < kTo; ++k) {
          const A local = here[k];
          here[k] = total[k];
          total[k] += local;
        }
      }
      finish<kFrom>(i, h, to == first_block[i + 1], kept + row_elements + h * kRow, total);
    });
    // Another sequence may have been reading: only now.
    for (int64_t h = 0; h < H; ++h) {
      constexpr uint64_t kBytes = (kTo - kFrom) * sizeof(A);
      __builtin_memcpy(kept + h * kRow + kFrom, kept + row_elements + h * kRow + kFrom, kBytes);
    }
  }
  template <int kFrom>
  void start(int64_t i, int64_t h, bool at_start, const A* kept, A* sum) const {
    if (!at_start) {
      __builtin_memcpy(sum, kept, kRow * sizeof(A));
    } else if constexpr (kFrom == S::kC) {
      load_state<S::kC>(i, h, sum);
    } else {
      for (int k = S::kA; k < kRow; ++k) sum[k] = 0;
      load_state<S::kA>(i, h, sum);
      load_state<S::kZ>(i, h, sum);
    }
  }
  template <int kFrom>
  void finish(int64_t i, int64_t h, bool at_end, A* kept, const A* sum) const {
    if (!at_end) {
      __builtin_memcpy(kept, sum, kRow * sizeof(A));
    } else if constexpr (kFrom == S::kC) {
      store_state<S::kC>(i, h, sum);
    } else {
      store_state<S::kA>(i, h, sum);
      store_state<S::kZ>(i, h, sum);
    }
  }

  // -- not causal --------------------------------------------------------------------------------
  void sum_squares(int64_t i, int64_t h) const {
    A *sums = sums_of(i) + h * kRow, *factors = factors_of(i) + h * kRow;
    __builtin_memset(sums, 0, kRow * sizeof(A));
    for (int64_t j = 0; j < this->blocks_of(i); ++j) {
      this->add(sums, row_of_block(this->block_in(i, j)) + h * kRow, S::kColumns);
    }
    for (int k = 0; k < S::kColumns; k += S::W) {
      const V c = max_or_second(splat<V>(S::kNormFloor), load_vector<V>(sums + S::kC + k));
      store_vector(factors + S::kC + k, V(A(1) / c));
    }
  }
  void weigh_plain(const Block& b, const Scratch& s) const {
    A *row = row_of_block(b), *weights = weights_of(b), *logits = logits_of(b, s);
    const In w = w_of(b);
    const A* factors = factors_of(b.sequence);
    this->clear(row);
    for (int t = 0; t < b.count; t += kTile) {
      const In x = w.from(t, kTile);
      S::plain_logits(x, H, factors, logits + t);
      S::head_softmax(logits + t, temp(), H, weights + t);
      S::template add_weighted<S::kA>(x, H, weights + t, row);
    }
    S::add_weights(b.count, H, weights, row);
  }
  void sum_weighted(int64_t i, int64_t h) const {
    A *sums = sums_of(i) + h * kRow, *factors = factors_of(i) + h * kRow;
    for (int64_t j = 0; j < this->blocks_of(i); ++j) {
      const A* row = row_of_block(this->block_in(i, j)) + h * kRow;
      this->add(sums + S::kA, row + S::kA, kRow - S::kA);
    }
    const A total = sums[S::kZ] + S::kEpsilon;
    for (int k = 0; k < S::kColumns; k += S::W) {
      const V a = load_vector<V>(sums + S::kA + k);
      store_vector(factors + S::kA + k, V(-total / (total + a)));
    }
  }
  void output(const Block& b) const {
    const A *weights = weights_of(b), *factors = factors_of(b.sequence);
    for (int t = 0; t < b.count; t += kTile) {
      S::plain_output(w_of(b).from(t, kTile), H, weights + t, factors, y_of(b).from(t, kTile));
    }
  }

  // The second phase begins where the first has ended: with what caches still hold.
  void whole(int64_t i, const Scratch& s) const {
    const int64_t blocks = this->blocks_of(i);
    for (int64_t j = 0; j < blocks; ++j) add_squares(this->block_in(i, j));
    for (int64_t h = 0; h < H; ++h) sum_squares(i, h);
    for (int64_t j = blocks; j-- > 0;) weigh_plain(this->block_in(i, j), s);
    for (int64_t h = 0; h < H; ++h) sum_weighted(i, h);
    for (int64_t j = 0; j < blocks; ++j) output(this->block_in(i, j));
  }
  void phases(int64_t begin, int64_t end) const {
    const int64_t* first_block = this->first_block();
    const int64_t first = first_block[begin], blocks = first_block[end] - first;
    tasks(blocks, [&](int64_t n, int32_t) { add_squares(block(first + n)); });
    this->sums(begin, end, blocks, [&](int64_t i, int64_t h) { sum_squares(i, h); });
    tasks(blocks, [&](int64_t n, int32_t worker) {
      weigh_plain(block(first + blocks - 1 - n), Scratch(*this, worker));
    });
    this->sums(begin, end, blocks, [&](int64_t i, int64_t h) { sum_weighted(i, h); });
    tasks(blocks, [&](int64_t n, int32_t) { output(block(first + n)); });
  }

  int64_t scratch_at_, weights_at_, rows_at_, sequences_at_;
};

}  // namespace ae

#define AE_EXPORT_STATISTICS_FORWARD(Plan) \
  AE_EXPORT_STATISTICS(Plan, ae::StatisticsForward<Plan>, AE_STATISTICS_FORWARD)
