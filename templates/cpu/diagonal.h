// What a kernel keeps per diagonal of the score matrix, that is for each value of key - query:
//
//   tables  values of score_mod that depend on a pair through its diagonal alone (a
//   relative-position
//           bias), computed once per launch instead of once per pair
//   sums    gradients of captured tensors that are read at such an index, added up along the
//           diagonals and scattered once per diagonal
//
// A diagonal's entry is key - row + L - 1, so a row of keys reads consecutive entries, backwards
// from row to row. The generated Fn may have, when it has any:
//
//   kDiagonals, DiagonalInfo kDiagonalInfo[]             tables
//   diagonal<T>(env, b, h, q, k, live, void* out)        table T at W keys from k on, for row q
//   kDiagonalSums                                        sums
//   scatter_diagonal<T>(env, b, h, q, k, live, V value, A* const* grads)
#pragma once
#include "common/env.h"
#include "common/segments.h"
#include "common/sequences.h"
#include "cpu/capture_gather.h"
#include "cpu/memory.h"

namespace ae {

struct DiagonalInfo {
  int bytes;  // of an entry
  bool uses_b, uses_h;
  bool gathers;  // from captured tensors: an index may be out of bounds
};

template <class Fn>
constexpr int diagonal_tables() {
  if constexpr (requires { Fn::kDiagonals; }) {
    return Fn::kDiagonals;
  } else {
    return 0;
  }
}
template <class Fn, int T>
constexpr DiagonalInfo diagonal_info() {
  if constexpr (T < diagonal_tables<Fn>()) {
    return Fn::kDiagonalInfo[T];
  } else {
    return {};
  }
}
template <class Fn>
constexpr int diagonal_sums() {
  if constexpr (requires { Fn::kDiagonalSums; }) {
    return Fn::kDiagonalSums;
  } else {
    return 0;
  }
}

// No query's index is greater. Where the last row has the index of the last key, rows of all
// sequences share their diagonals: key - query is from 1 - S to L - 1.
inline int64_t last_query(const ae_params& p) {
  return p.q_first + (p.sequences.align_end != 0 ? p.S : p.L) - 1;
}

// Entries of one row of diagonals, with room for a whole vector at the last key.
template <class A>
int64_t diagonal_pitch(const ae_params& p) {
  return round_up(p.L + p.S, Lanes<A>::W) + Lanes<A>::W;
}

// ---- tables ----

// W entries from `at` on, an entry of which the row functor knows (DiagonalTable::row).
template <class V, class Live>
AE_INLINE V diagonal_run(const Env& env, int table, Live live, int64_t at) {
  const DiagonalTable& t = env.tables[table];
  if (__builtin_expect(t.faults != nullptr, 0)) {
    for (int i = 0; i < kLanes<V>; ++i) {
      if (t.faults[at + i] != 0 && lane_of(live, i)) report_fault(env, t.faults[at + i] - 1);
    }
  }
  return load_vector<V>(static_cast<const char*>(t.data) + at * int64_t(sizeof(V) / kLanes<V>));
}

template <class Fn, class A>
class DiagonalTables {
  static constexpr int kCount = diagonal_tables<Fn>();
  static constexpr int W = Lanes<A>::W;
  static constexpr int64_t kChunk = 64 * W;  // entries of one task

 public:
  static int64_t bytes(const ae_params& p) { return bytes_from<0>(p); }

  // Fills the tables in `memory` (64-byte aligned). This object must outlive the launch.
  void build(const ae_params& p, const IntervalEnv& intervals, char* memory,
             ae_parallel_for parallel_for) {
    if constexpr (kCount > 0) {
      p_ = &p;
      intervals_ = &intervals;
      pitch_ = diagonal_pitch<A>(p);
      chunks_ = (p.L + p.S - 1 + kChunk - 1) / kChunk;
      fill<0>(memory, parallel_for);
    }
  }
  const DiagonalTable* tables() const { return tables_; }

 private:
  template <int T>
  static constexpr DiagonalInfo kInfo = diagonal_info<Fn, T>();

  template <int T>
  static int64_t bytes_from(const ae_params& p) {
    if constexpr (T < kCount) {
      return data_bytes<T>(p) + fault_bytes<T>(p) + bytes_from<T + 1>(p);
    } else {
      return 0;
    }
  }
  template <int T>
  static int64_t slots(const ae_params& p) {
    return (kInfo<T>.uses_b ? p.B : 1) * (kInfo<T>.uses_h ? p.Hq : 1);
  }
  template <int T>
  static int64_t data_bytes(const ae_params& p) {
    return round_up(slots<T>(p) * diagonal_pitch<A>(p) * kInfo<T>.bytes, 64);
  }
  template <int T>
  static int64_t fault_bytes(const ae_params& p) {
    if (!kInfo<T>.gathers) return 0;
    return round_up(slots<T>(p) * diagonal_pitch<A>(p) * int64_t(sizeof(int32_t)), 64);
  }

  template <int T>
  void fill(char* memory, ae_parallel_for parallel_for) {
    if constexpr (T < kCount) {
      DiagonalTable& t = tables_[T];
      t.data = memory;
      t.h_stride = kInfo<T>.uses_h ? pitch_ : 0;
      t.b_stride = kInfo<T>.uses_b ? pitch_ * (kInfo<T>.uses_h ? p_->Hq : 1) : 0;
      t.origin = last_query(*p_) - p_->b_first * t.b_stride;
      faults_ = kInfo<T>.gathers ? (int32_t*)(memory + data_bytes<T>(*p_)) : nullptr;
      faulted_ = false;
      const auto task = [](void* self, int64_t index, int32_t) {
        static_cast<DiagonalTables*>(self)->template fill_chunk<T>(index);
      };
      parallel_for(slots<T>(*p_) * chunks_, p_->threads, task, this);
      t.faults = __atomic_load_n(&faulted_, __ATOMIC_RELAXED) ? faults_ : nullptr;
      fill<T + 1>(memory + data_bytes<T>(*p_) + fault_bytes<T>(*p_), parallel_for);
    }
  }

  // The last query meets every diagonal once if it had L + S - 1 keys: entry = key.
  template <int T>
  void fill_chunk(int64_t index) {
    const int64_t slot = index / chunks_, begin = index % chunks_ * kChunk;
    const int64_t b = kInfo<T>.uses_b ? slot / (kInfo<T>.uses_h ? p_->Hq : 1) : 0;
    const int64_t h = kInfo<T>.uses_h ? slot % p_->Hq : 0;
    const int64_t count = p_->L + p_->S - 1;
    const int64_t end = begin + kChunk < count ? begin + kChunk : count;
    if (p_->L == 1 && masked(begin, end - 1)) return;
    char* out = (char*)tables_[T].data + slot * pitch_ * kInfo<T>.bytes;
    for (int64_t k = begin; k < end; k += W) {
      const auto live = lt(iota<typename Lanes<A>::I32>(), int32_t(end - k < W ? end - k : W));
      int32_t fault = fill_vector<T>(b, h, k, live, out + k * kInfo<T>.bytes);
      if constexpr (kInfo<T>.gathers) {
        int32_t* faults = faults_ + slot * pitch_ + k;
        for (int i = 0; i < W; ++i) faults[i] = 0;
        if (__builtin_expect(fault != 0, 0)) find_faults<T>(b, h, k, live, faults);
      }
    }
  }

  // Whether the mask empties these diagonals for the only query of each sequence: a window of a
  // long cache needs few.
  bool masked(int64_t first, int64_t last) const {
    if constexpr (Fn::kHasMask) {
      int64_t least = int64_t(1) << 62, most = -1;
      for (int64_t b = 0; b < p_->B; ++b) {
        const Sequence s(*p_, b);
        if (s.rows == 0 || s.keys == 0) continue;
        least = s.first_query < least ? s.first_query : least;
        most = s.first_query > most ? s.first_query : most;
        if (p_->sequences.align_end == 0) break;  // the same for all
      }
      const int64_t origin = last_query(*p_), begin = first - origin + least;
      const int64_t end = last - origin + most;
      if (most < 0 || end < 0) return true;
      const auto range = [](int64_t a, int64_t z) { return iv::range(double(a), double(z)); };
      return iv::is_false(Fn::classify(*intervals_, range(p_->b_first, p_->b_first + p_->B - 1),
                                       range(0, p_->Hq - 1), range(least, most),
                                       range(begin < 0 ? 0 : begin, end)));
    }
    return false;
  }

  // No live pair may ever meet this diagonal: a fault is remembered, not reported.
  template <int T, class Live>
  int32_t fill_vector(int64_t b, int64_t h, int64_t k, Live live, void* out) const {
    int32_t fault = 0;
    const Env env{p_->captures, &fault, p_->S};
    Fn::template diagonal<T>(env, p_->b_first + b, h, last_query(*p_), k, live, out);
    return fault;
  }
  template <int T, class Live>
  __attribute__((noinline)) void find_faults(int64_t b, int64_t h, int64_t k, Live live,
                                             int32_t* faults) {
    alignas(64) char unused[16 * sizeof(int64_t)];
    for (int i = 0; i < W; ++i) {
      Live one{};
      one[i] = live[i];
      faults[i] = fill_vector<T>(b, h, k, one, unused);
    }
    __atomic_store_n(&faulted_, true, __ATOMIC_RELAXED);
  }

  const ae_params* p_ = nullptr;
  const IntervalEnv* intervals_ = nullptr;
  int64_t pitch_ = 0, chunks_ = 0;
  int32_t* faults_ = nullptr;
  bool faulted_ = false;
  DiagonalTable tables_[kCount > 0 ? kCount : 1] = {};
};

// ---- sums ----

// sums[at ...] += value in the live lanes.
template <class A, class Live, class V>
AE_INLINE void diagonal_add(A* sums, int64_t at, Live live, V value) {
  A* to = sums + at;
  store_vector(to, load_vector<V>(to) + select(live, value, V{}));
}

// The sums of one launch: [slot of a task][query head of the group][diagonal], and the scatter at
// the end of a wave, in index order.
template <class Fn, class A>
class DiagonalSums {
  static constexpr int kCount = diagonal_sums<Fn>();

 public:
  DiagonalSums(const ae_params& p, int64_t group, int64_t slots)
      : pitch_(kCount > 0 ? diagonal_pitch<A>(p) : 0), rows_(group), slots_(slots) {}

  int64_t bytes() const { return kCount * sum_bytes(); }
  A* at(char* memory, int sum, int64_t slot) const {
    return (A*)(memory + sum * sum_bytes()) + slot * rows_ * pitch_;
  }

  template <class Parallel>
  void clear(char* memory, const Parallel& parallel) const {
    if constexpr (kCount > 0) {
      parallel(kCount * slots_, [&](int64_t i, int32_t) {
        __builtin_memset(at(memory, int(i / slots_), i % slots_), 0,
                         uint64_t(rows_ * pitch_) * sizeof(A));
      });
    }
  }

  // Adds `copies` consecutive slots of each of `heads` heads and scatters the totals.
  // `head(i)` gives (b of the user's functions, first query head).
  template <class Parallel, class Head>
  void scatter(char* memory, const Env& env, const ae_params& p, int64_t heads, int64_t copies,
               A* const* grads, const Parallel& parallel, const Head& head) const {
    if constexpr (kCount > 0) {
      if (copies > 1) {
        parallel(kCount * heads * rows_, [&](int64_t i, int32_t) {
          A* sum =
              at(memory, int(i / (heads * rows_)), i / rows_ % heads * copies) + i % rows_ * pitch_;
          for (int64_t copy = 1; copy < copies; ++copy) {
            const A* other = sum + copy * rows_ * pitch_;
            for (int64_t e = 0; e < pitch_; ++e) sum[e] += other[e];
          }
        });
      }
      for (int64_t i = 0; i < heads; ++i) {
        const auto [b, first] = head(i);
        for (int64_t row = 0; row < rows_; ++row) {
          scatter_row<0>(memory, env, p, i * copies, row, b, first + row, grads);
        }
      }
    }
  }

 private:
  int64_t sum_bytes() const { return round_up(slots_ * rows_ * pitch_ * int64_t(sizeof(A)), 64); }

  template <int T>
  void scatter_row(char* memory, const Env& env, const ae_params& p, int64_t slot, int64_t row,
                   int64_t b, int64_t h, A* const* grads) const {
    if constexpr (T < kCount) {
      using V = typename Lanes<A>::Acc;
      const A* sum = at(memory, T, slot) + row * pitch_;
      for (int64_t k = 0; k < p.L + p.S - 1; k += Lanes<A>::W) {
        const V value = load_vector<V>(sum + k);
        // A diagonal without live pair has the sum 0, and its index may be out of bounds.
        const auto live = __builtin_convertvector(value != V{}, typename Lanes<A>::Mask);
        if (!any(live)) continue;
        Fn::template scatter_diagonal<T>(env, b, h, last_query(p), k, live, value, grads);
      }
      scatter_row<T + 1>(memory, env, p, slot, row, b, h, grads);
    }
  }

  int64_t pitch_, rows_, slots_;
};

}  // namespace ae
