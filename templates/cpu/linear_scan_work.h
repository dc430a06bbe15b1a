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
// chunks where those are more. What runs over from one span to the next is one state of each head.
// Whether chunks are tasks depends on the sizes alone. How long a span is depends on the threads,
// and changes no result.
#pragma once
#include "cpu/linear_forward_work.h"

namespace ae {

template <class Plan>
struct LinearScanCut {
  using T = LinearTypes<Plan>;
  using Acc = typename T::Acc;
  static constexpr bool kEver = Plan::kScanTasks > 0 && !Plan::kDelta;
  static constexpr int64_t kLeastChunks = 16;  // of the longest sequence
  static constexpr int64_t kLeastSlots = 2;    // of a thread
  static constexpr int64_t kRuns = 4;          // tasks of a thread in a span
  static constexpr int64_t kLongestRun = 8;    // chunks of a task
  static constexpr int kRows = 4;              // of a state, that a task of step 2 takes
  static constexpr int kRowBlocks = (T::kD + kRows - 1) / kRows;

  bool used = false;
  int64_t group = 0, slot_bytes = 0;      // of one chunk and key head: states, z, decay
  int64_t chunks = 0, span = 0, run = 0;  // in all; of a span; of a task, at most
  int64_t table_bytes = 0;                // of the first chunk of each sequence

  LinearScanCut(const ae_linear_params& p, const LinearCut<Plan>& cut) {
    if (!kEver || p.H == 0) return;
    // The longest sequence against all tokens: tasks of the walk, counted by their work.
    int64_t longest = p.L, tokens = p.L * p.sequences;
    if (p.first != nullptr) {
      longest = 0, tokens = p.L;
      for (int64_t i = 0; i < p.sequences; ++i) {
        const int64_t length = p.first[i + 1] - p.first[i];
        longest = longest < length ? length : longest;
      }
    }
    used = longest > (kLeastChunks - 1) * T::kChunk &&
           cut.sequence_tasks * tokens <= Plan::kScanTasks * longest;
    if (!used) return;
    group = cut.group;
    slot_bytes = linear_line(group * head_elements() * int64_t(sizeof(Acc)));
    for (int64_t i = 0; i < p.sequences; ++i) chunks += chunks_of(p, i);
    int64_t slots = Plan::kScanBytes / slot_bytes;
    slots = p.threads * (slots < kLeastSlots ? kLeastSlots : slots);
    const int64_t spans = (chunks * p.Hk + slots - 1) / slots;
    span = (chunks + spans - 1) / spans;
    run = (span * p.Hk + kRuns * p.threads - 1) / (kRuns * p.threads);
    run = run > kLongestRun ? kLongestRun : run;
    table_bytes = linear_line((p.sequences + 1) * int64_t(sizeof(int64_t)));
  }

  static constexpr int64_t head_elements() {
    return T::kPanels * T::kPanelState + (Plan::kNormalizer ? 2 : 1) * T::kDPitch;
  }
  // A sequence without tokens has a chunk without tokens.
  static int64_t chunks_of(const ae_linear_params& p, int64_t sequence) {
    const int64_t length = p.first != nullptr ? p.first[sequence + 1] - p.first[sequence] : p.L;
    return length <= T::kChunk ? 1 : (length + T::kChunk - 1) / T::kChunk;
  }
  // Slots of a span, the states that are carried, and the table.
  int64_t shared_bytes(const ae_linear_params& p) const {
    return (span + 1) * p.Hk * slot_bytes + table_bytes;
  }
};

}  // namespace ae
