// The backward pass chunk by chunk, without delta rule, normalizer and out_mod: there what a chunk
// adds to the state S, and to its adjoint U, depends on neither. As linear_scan_work.h has it:
//
//   1. for each chunk by itself: (v f)^T k         2. by rows: S^T before each chunk, which is kept
//   3. for each chunk by itself: (dO e)^T q        4. by rows, in reverse: U^T behind each chunk
//   5. for each chunk by itself: the gradients
//
// Steps 1 and 2 go through all spans, then 3 to 5 from the last span to the first. Kept are the
// states before all chunks, in the multiply type: L / C of them for each head.
#pragma once
#include "cpu/linear_backward_head.h"
#include "cpu/linear_scan_work.h"

namespace ae {

template <class Plan, class Fn, class Keys>
class LinearBackwardScan {
  using X = LinearBackwardTypes<Plan>;
  using A = typename X::A;
  using M = typename X::M;
  using V = typename X::V;
  using Cut = LinearScanCut<Plan>;
  using Scratch = LinearBackwardScratch<Plan>;
  using Head = LinearBackwardHead<Plan>;
  using Operands = LinearBackwardOperands<Plan, Fn>;
  using Step = LinearBackwardStep<Plan, Fn, Keys>;
  static constexpr int W = X::W, C = X::C, D = X::kD, kSp = X::kSp, kPair = X::kPair;
  static constexpr int64_t kState = X::kState, kHead = kState + X::kDp;
  static constexpr int kRows = Cut::kRows;  // of a state, that a task takes
  static constexpr int kRowBlocks = (X::kStateRows + kRows - 1) / kRows;
  static_assert(kRows % 2 == 0, "operands are pairs of rows");
  static constexpr int64_t kKept = linear_line(kState * int64_t(sizeof(M)));

 public:
  static constexpr bool kEver = Cut::kEver;
  static_assert(!kEver || (!X::kDelta && !X::kNormalizer && !Fn::kHasOutMod));

  static Cut cut(const ae_linear_params& p, const LinearBackwardCut<Plan>& walk) {
    return Cut(p, p.Hk * walk.blocks, kHead);
  }
  static int64_t bytes(const ae_linear_params& p, const Cut& cut) {
    return p.threads * int64_t(sizeof(Scratch)) + cut.shared_bytes(p) + cut.chunks * p.H * kKept;
  }

  // factor: of all gradients (linear_backward.h). workspace: of bytes(), 64-aligned.
  LinearBackwardScan(const Operands& io, const ae_linear_params& p, const Cut& cut, A factor,
                     char* workspace)
      : io_(io),
        p_(p),
        cut_(cut),
        factor_(factor),
        workers_(workspace),
        slots_(workers_ + p.threads * int64_t(sizeof(Scratch))),
        carried_(slots_ + cut.span * p.Hk * cut.slot_bytes),
        kept_(carried_ + p.Hk * cut.slot_bytes),
        chunks_(p, C, (int64_t*)(kept_ + cut.chunks * p.H * kKept)) {}

  void run(ae_parallel_for parallel_for) {
    const int64_t spans = (cut_.chunks + cut_.span - 1) / cut_.span;
    for (int64_t i = 0; i < spans; ++i) {
      choose(i);
      each_run<&LinearBackwardScan::add>(parallel_for);
      each_rows<&LinearBackwardScan::states>(parallel_for);
    }
    for (int64_t i = spans - 1; i >= 0; --i) {
      choose(i);
      each_run<&LinearBackwardScan::add_adjoints>(parallel_for);
      each_rows<&LinearBackwardScan::adjoints>(parallel_for);
      each_run<&LinearBackwardScan::gradients>(parallel_for);
    }
  }

 private:
  const Operands& io_;
  const ae_linear_params& p_;
  const Cut& cut_;
  const A factor_;
  char *const workers_, *const slots_, *const carried_, *const kept_;
  const LinearChunks chunks_;
  int64_t begin_ = 0, end_ = 0;  // of the span

  // Chunks [first, end) of one sequence, all value heads of a key head.
  struct Part {
    int64_t sequence, hk, first, end;
  };

  void choose(int64_t span) {
    begin_ = span * cut_.span;
    end_ = begin_ + cut_.span < cut_.chunks ? begin_ + cut_.span : cut_.chunks;
  }
  char* slot(int64_t chunk, int64_t hk) const {
    return slots_ + ((chunk - begin_) * p_.Hk + hk) * cut_.slot_bytes;
  }
  A* state(char* slot, int64_t j) const { return reinterpret_cast<A*>(slot) + j * kState; }
  A* decay(char* slot, int64_t j) const {
    return reinterpret_cast<A*>(slot) + cut_.group * kState + j * X::kDp;
  }
  M* kept(int64_t chunk, int64_t h) const {
    return reinterpret_cast<M*>(kept_ + (chunk * p_.H + h) * kKept);
  }

  // ---- chunks by themselves ----
  using OfPart = void (LinearBackwardScan::*)(const Part&, Scratch&) const;
  template <OfPart kWork>
  void each_run(ae_parallel_for parallel_for) {
    const int64_t runs = (end_ - begin_ + cut_.run - 1) / cut_.run;
    parallel_for(
        runs * p_.Hk, p_.threads,
        [](void* self, int64_t index, int32_t worker) {
          static_cast<LinearBackwardScan*>(self)->template parts<kWork>(index, worker);
        },
        this);
  }
  template <OfPart kWork>
  void parts(int64_t index, int32_t worker) const {
    Scratch& x = *reinterpret_cast<Scratch*>(workers_ + worker * int64_t(sizeof(Scratch)));
    Part part{0, index % p_.Hk, begin_ + index / p_.Hk * cut_.run, 0};
    const int64_t end = part.first + cut_.run < end_ ? part.first + cut_.run : end_;
    part.sequence = chunks_.sequence_of(part.first);
    for (; part.first < end; part.first = part.end, ++part.sequence) {
      part.end = chunks_.end(part.sequence) < end ? chunks_.end(part.sequence) : end;
      if (chunks_.tokens(part.sequence, part.first) > 0) (this->*kWork)(part, x);
    }
  }
  LinearAt at(const Part& part, int64_t chunk, int64_t j) const {
    return {p_.first != nullptr ? 0 : part.sequence, part.hk, part.hk * cut_.group + j,
            chunks_.token(part.sequence, chunk), chunks_.tokens(part.sequence, chunk)};
  }
  // What comes after head j of a chunk.
  LinearAt following(const Part& part, int64_t chunk, int64_t next, int64_t j) const {
    return j + 1 < cut_.group ? at(part, chunk, j + 1) : at(part, next, 0);
  }

  void add(const Part& part, Scratch& x) const {
    const Keys keys(io_, x);
    const Step step(io_, x, keys, A(p_.scale));
    step.begin();
    // Nobody reads what follows the last chunk.
    const int64_t end = part.end == chunks_.end(part.sequence) ? part.end - 1 : part.end;
    for (int64_t c = part.first; c < end; ++c) {
      const int64_t next = c + 1 < end ? c + 1 : c;
      keys.load_keys(at(part, c, 0));
      for (int64_t j = 0; j < cut_.group; ++j) {
        step.add(at(part, c, j), following(part, c, next, j), state(slot(c, part.hk), j));
        LinearTile<Plan>::copy(decay(slot(c, part.hk), j), x.factor, X::kDp);
      }
    }
  }
  void add_adjoints(const Part& part, Scratch& x) const {
    const Keys keys(io_, x);
    const Step step(io_, x, keys, A(p_.scale));
    step.begin();
    // Nobody reads what comes before the first chunk, unless asked for.
    const bool all = part.first > chunks_.first(part.sequence) || p_.dstate != nullptr;
    const int64_t first = all ? part.first : part.first + 1;
    for (int64_t c = part.end - 1; c >= first; --c) {
      const int64_t next = c > first ? c - 1 : c;
      keys.load_query_rows(at(part, c, 0));
      for (int64_t j = 0; j < cut_.group; ++j) {
        step.add_adjoint(at(part, c, j), following(part, c, next, j), state(slot(c, part.hk), j));
        LinearTile<Plan>::copy(decay(slot(c, part.hk), j), x.factor, X::kDp);
      }
    }
  }
  void gradients(const Part& part, Scratch& x) const {
    const Keys keys(io_, x);
    const Step step(io_, x, keys, A(p_.scale));
    step.begin();
    const int64_t origin = chunks_.first(part.sequence);
    for (int64_t c = part.end - 1; c >= part.first; --c) {
      const int64_t next = c > part.first ? c - 1 : c;
      const LinearAt here = at(part, c, 0), before = at(part, next, 0);
      keys.load_keys(here);
      keys.load_queries(here);
      for (int64_t j = 0; j < cut_.group; ++j) {
        const LinearAt where = at(part, c, j);
        Head head{state(slot(c, part.hk), j)};
        head.kept = reinterpret_cast<char*>(kept(origin, where.h));
        head.pitch = p_.H * kKept;
        head.initial = initial(part.sequence, where.h);
        if (p_.dfinal == nullptr) head.last = chunks_.end(part.sequence) - 1 - origin;
        const LinearAt after = following(part, c, next, j);
        step.gradients(where, after, head, c - origin);
        LinearFetch ahead(2);
        io_.fetch_all(where, after, ahead);
        ahead.rest();
      }
      keys.finish(here);
      io_.store_q(here, before, x.dq);
      io_.store_k(here, before, x.dk);
    }
  }

  // ---- some rows of a head's state, chunk after chunk ----
  using OfRows = void (LinearBackwardScan::*)(int64_t h, int first, int end) const;
  template <OfRows kWork>
  void each_rows(ae_parallel_for parallel_for) {
    parallel_for(
        p_.H * kRowBlocks, p_.threads,
        [](void* self, int64_t index, int32_t) {
          const int first = int(index % kRowBlocks) * kRows;
          const int end = first + kRows < X::kStateRows ? first + kRows : X::kStateRows;
          (static_cast<LinearBackwardScan*>(self)->*kWork)(index / kRowBlocks, first, end);
        },
        this);
  }
  void states(int64_t h, int first, int end) const {
    const int64_t hk = h / cut_.group, j = h % cut_.group;
    A* running = state(carried_ + hk * cut_.slot_bytes, j);
    int64_t s = chunks_.sequence_of(begin_);
    for (int64_t c = begin_; c < end_; ++c) {
      if (c == chunks_.end(s)) ++s;
      if (c == chunks_.first(s)) load(initial(s, h), A(1), first, end, running);
      const bool last = c + 1 == chunks_.end(s);
      const A *added = state(slot(c, hk), j), *factor = decay(slot(c, hk), j);
      M* to = kept(c, h);
      for (int e = first; e < end; e += kPair) {
        for (int d = 0; d < X::kDp; d += W) {
          const V total = load_vector<V>(factor + d);
          V x[2];
          for (int r = 0; r < kPair; ++r) {
            const int64_t i = int64_t(e + r) * kSp + d;
            x[r] = load_vector<V>(running + i);
            if (!last) store_vector(running + i, x[r] * total + load_vector<V>(added + i));
          }
          store_pairs(to + int64_t(e) * kSp + d * kPair, x[0], x[kPair - 1]);
        }
      }
    }
  }
  // A slot has what the chunk adds to U, and gets U behind it.
  void adjoints(int64_t h, int first, int end) const {
    const int64_t hk = h / cut_.group, j = h % cut_.group;
    A* running = state(carried_ + hk * cut_.slot_bytes, j);
    int64_t s = chunks_.sequence_of(end_ - 1);
    for (int64_t c = end_ - 1; c >= begin_; --c) {
      if (c < chunks_.first(s)) --s;
      if (c + 1 == chunks_.end(s)) load(final_adjoint(s, h), A(1) / factor_, first, end, running);
      const bool moves = c > chunks_.first(s) || p_.dstate != nullptr;
      A* added = state(slot(c, hk), j);
      const A* factor = decay(slot(c, hk), j);
      if (chunks_.tokens(s, c) > 0) {
        for (int e = first; e < end; ++e) {
          for (int d = 0; d < X::kDp; d += W) {
            const int64_t i = int64_t(e) * kSp + d;
            const V x = load_vector<V>(running + i), total = load_vector<V>(factor + d);
            if (moves) store_vector(running + i, x * total + load_vector<V>(added + i));
            store_vector(added + i, x);
          }
        }
      }
      if (c == chunks_.first(s) && p_.dstate != nullptr) store(s, h, first, end, running);
    }
  }

  // ---- states of the caller ----
  LinearRows<A> initial(int64_t sequence, int64_t h) const {
    const int64_t* s = p_.state_stride;
    const A* from = static_cast<const A*>(p_.state);
    if (from != nullptr) from += sequence * s[0] + h * s[1];
    return {from, s[2], s[3]};
  }
  LinearRows<A> final_adjoint(int64_t sequence, int64_t h) const {
    const A* from = static_cast<const A*>(p_.dfinal);
    if (from != nullptr) from += (sequence * p_.H + h) * D * X::kStateColumns;
    return {from, X::kStateColumns, 1};
  }
  static void load(const LinearRows<A>& from, A factor, int first, int end, A* to) {
    LinearTile<Plan>::clear(to + int64_t(first) * kSp, int64_t(end - first) * kSp);
    if (from.base == nullptr) return;
    for (int d = 0; d < D; ++d) {
      for (int e = first; e < end && e < X::kDv; ++e) {
        to[int64_t(e) * kSp + d] = from(d)[e * from.col] * factor;
      }
    }
  }
  void store(int64_t sequence, int64_t h, int first, int end, const A* from) const {
    A* to = static_cast<A*>(p_.dstate) + (sequence * p_.H + h) * D * X::kStateColumns;
    for (int d = 0; d < D; ++d) {
      for (int e = first; e < end && e < X::kDv; ++e) {
        to[d * X::kStateColumns + e] = from[int64_t(e) * kSp + d] * factor_;
      }
    }
  }
};

}  // namespace ae
