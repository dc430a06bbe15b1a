// How a forward launch of few long sequences is cut: by chunks, with the states before them in
// memory. Sizes only.
//
// One task walks the chunks of a sequence in order, so a call has as many tasks as sequences, heads
// and columns give (LinearCut). Where those are few, chunks become tasks:
//
//   1. for each chunk by itself: (k f)^T v, what it adds to the state, and its total decay
//   2. for each row of the state, chunk after chunk: S' = total S + (k f)^T v, S kept in its place
//   3. for each chunk by itself: the output, from the state before it
//
// The products are those of the walk, in another order; what it costs is that states go through
// memory and that k, v and decays are read twice. So the chunks, of all sequences in one list, are
// taken in spans whose states stay near the cores: Plan::kScanBytes for each thread, or kLeastSlots
// chunks where those are more; kLonger times that where several threads wait for each other. What
// runs over from one span to the next is one state of each head. Whether chunks are tasks depends
// on the sizes alone. How long a span is depends on the threads, and changes no result.
#pragma once
#include "cpu/linear_work.h"

namespace ae {

// Where chunks are: those of all sequences in one list. A sequence without tokens has a chunk
// without tokens.
class LinearChunks {
 public:
  // first: room for the first chunk of each sequence, and the end; filled here.
  LinearChunks(const ae_linear_params& p, int chunk, int64_t* first)
      : p_(p), chunk_(chunk), first_(first) {
    first[0] = 0;
    for (int64_t i = 0; i < p.sequences; ++i) first[i + 1] = first[i] + count(p, chunk, i);
  }
  static int64_t length(const ae_linear_params& p, int64_t sequence) {
    return p.first != nullptr ? p.first[sequence + 1] - p.first[sequence] : p.L;
  }
  static int64_t count(const ae_linear_params& p, int chunk, int64_t sequence) {
    const int64_t n = length(p, sequence);
    return n <= chunk ? 1 : (n + chunk - 1) / chunk;
  }

  // The sequence of a chunk: the last that does not begin after it.
  int64_t sequence_of(int64_t chunk) const {
    int64_t low = 0, high = p_.sequences;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first_[middle] <= chunk ? low : high) = middle;
    }
    return low;
  }
  int64_t first(int64_t sequence) const { return first_[sequence]; }
  int64_t end(int64_t sequence) const { return first_[sequence + 1]; }
  // Of a chunk of a sequence.
  int64_t token(int64_t sequence, int64_t chunk) const {
    return (p_.first != nullptr ? p_.first[sequence] : 0) + (chunk - first_[sequence]) * chunk_;
  }
  int tokens(int64_t sequence, int64_t chunk) const {
    const int64_t left = length(p_, sequence) - (chunk - first_[sequence]) * chunk_;
    return int(left < chunk_ ? left : chunk_);
  }

 private:
  const ae_linear_params& p_;
  const int chunk_;
  int64_t* const first_;
};

template <class Plan>
struct LinearScanCut {
  using T = LinearTypes<Plan>;
  using Acc = typename T::Acc;
  static constexpr bool kEver = Plan::kScanTasks > 0;
  static constexpr int64_t kLeastChunks = 16;  // of the longest sequence
  static constexpr int64_t kLeastSlots = 2;    // of a thread
  // Threads wait for each other three times in a span: with a core that others use too, 10 ms each.
  static constexpr int64_t kLonger = 8;
  static constexpr int64_t kRuns = 4;        // tasks of a thread in a span
  static constexpr int64_t kLongestRun = 8;  // chunks of a task
  static constexpr int kRows = 4;            // of a state, that a task of step 2 takes
  static constexpr int kRowBlocks = (T::kD + kRows - 1) / kRows;

  bool used = false;
  int64_t group = 0, slot_bytes = 0;      // of one chunk and key head: states, z, decay
  int64_t chunks = 0, span = 0, run = 0;  // in all; of a span; of a task, at most
  int64_t table_bytes = 0;                // of LinearChunks

  // walks: tasks of one sequence otherwise. head: elements of a slot, of one value head.
  LinearScanCut(const ae_linear_params& p, int64_t walks, int64_t head) {
    if (!kEver || p.H == 0) return;
    // The longest sequence against all tokens: walks, counted by their work.
    int64_t longest = 0;
    const int64_t tokens = p.first != nullptr ? p.L : p.L * p.sequences;
    for (int64_t i = 0; i < p.sequences; ++i) {
      const int64_t length = LinearChunks::length(p, i);
      longest = longest < length ? length : longest;
    }
    used = longest > (kLeastChunks - 1) * T::kChunk && walks * tokens < Plan::kScanTasks * longest;
    if (!used) return;
    group = p.H / p.Hk;
    slot_bytes = linear_line(group * head * int64_t(sizeof(Acc)));
    for (int64_t i = 0; i < p.sequences; ++i) chunks += LinearChunks::count(p, T::kChunk, i);
    int64_t slots = Plan::kScanBytes / slot_bytes;
    slots = p.threads * (slots < kLeastSlots ? kLeastSlots : slots);
    if (p.threads > 1) slots *= kLonger;
    const int64_t spans = (chunks * p.Hk + slots - 1) / slots;
    span = (chunks + spans - 1) / spans;
    run = (span * p.Hk + kRuns * p.threads - 1) / (kRuns * p.threads);
    run = run > kLongestRun ? kLongestRun : run;
    table_bytes = linear_line((p.sequences + 1) * int64_t(sizeof(int64_t)));
  }

  // Slots of a span, the states that are carried, and the table.
  int64_t shared_bytes(const ae_linear_params& p) const {
    return (span + 1) * p.Hk * slot_bytes + table_bytes;
  }
};

}  // namespace ae
