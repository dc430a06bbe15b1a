// How a token-statistics launch is cut: sequences into blocks of AE_STATISTICS_BLOCK tokens, and
// launches into waves that the last-level cache holds between their phases. Blocks depend on the
// sizes alone and their sums are added in order; which of them run together depends on the threads
// too, and changes no bit.
#pragma once
#include "cpu/statistics.h"

namespace ae {

// Parts of a workspace, one after the other.
class WorkspacePlan {
 public:
  static constexpr int64_t kAlign = 64;
  int64_t take(int64_t bytes) {
    const int64_t at = bytes_;
    bytes_ += round_up(bytes, kAlign);
    return at;
  }
  int64_t bytes() const { return bytes_ + kAlign; }

 private:
  int64_t bytes_ = 0;
};

template <class Plan>
class StatisticsWork {
 protected:
  using S = Statistics<Plan>;
  using E = typename Plan::Elem;
  using A = typename Plan::Acc;
  using V = typename S::V;
  static constexpr int kBlock = S::kBlock, kTile = S::kTile, kRow = S::kRow;

  // What phases read again: of a wave a quarter of the last-level cache, beside which its results
  // are written; of a sequence that one task walks phase by phase, half of the core's own.
  static constexpr int64_t kWaveBytes = Plan::kCacheBytes / 4, kTaskBytes = Plan::kCoreBytes / 2;
  static constexpr int64_t kSerialSums = 1
                                         << 17;  // additions, 20 us: less than a start of the pool

  struct Block {
    int64_t sequence, index, row, start;  // start: token of the sequence
    int count;
    bool last;  // of its sequence
  };

  const ae_statistics_params& p;
  const int64_t H, row_elements, table_elements;

  explicit StatisticsWork(const ae_statistics_params& params)
      : p(params), H(p.H), row_elements(p.H * kRow), table_elements(p.H * kBlock) {
    for (int64_t i = 0; i < p.sequences; ++i) {
      blocks_ += blocks_of(i);
      tokens_ += length(i);
      if (length(i) > longest_) longest_ = length(i);
    }
    first_block_at_ = space_.take((p.sequences + 1) * int64_t(sizeof(int64_t)));
  }

  int64_t length(int64_t i) const { return p.first ? p.first[i + 1] - p.first[i] : p.N; }
  int64_t blocks_of(int64_t i) const { return (length(i) + kBlock - 1) / kBlock; }
  int64_t first_token(int64_t i) const { return p.first ? p.first[i] : i * p.N; }
  int64_t row_of(int64_t i) const { return first_token(i) / kBlock + i; }
  int64_t rows() const { return p.B * p.N / kBlock + p.sequences; }
  int64_t token_bytes() const { return H * Plan::kD * int64_t(sizeof(E)); }

  Block block_in(int64_t sequence, int64_t index) const {
    const int64_t start = index * kBlock, left = length(sequence) - start;
    return {
        sequence,      index, row_of(sequence) + index, start, int(left < kBlock ? left : kBlock),
        left <= kBlock};
  }
  void number_blocks(int64_t* first_block) const {
    first_block[0] = 0;
    for (int64_t i = 0; i < p.sequences; ++i) first_block[i + 1] = first_block[i] + blocks_of(i);
  }

  template <class T>
  Tokens<T> tokens(const void* data, const int64_t* stride, const Block& b) const {
    const int64_t batch = p.first ? 0 : b.sequence;
    const int64_t token = b.start + (p.first ? p.first[b.sequence] : 0);
    // Results are written through the same view.
    T* at = static_cast<T*>(const_cast<void*>(data)) + batch * stride[0] + token * stride[2];
    return {at, stride[1], stride[2], b.count};
  }
  // Of a result: past the caches when they cannot hold it anyway.
  Tokens<E> result(void* data, const int64_t* stride, const Block& b) const {
    Tokens<E> t = tokens<E>(data, stride, b);
    constexpr int64_t kVector = S::W * int64_t(sizeof(E)), kElements = S::W;
    t.stream = 2 * tokens_ * token_bytes() >= Plan::kCacheBytes && int64_t(data) % kVector == 0;
    for (int d = 0; d < 3; ++d) t.stream = t.stream && stride[d] % kElements == 0;
    return t;
  }

  // Whether one worker for each sequence keeps them all busy.
  bool by_sequence() const {
    return p.threads == 1 || double(longest_) * p.threads <= 1.25 * double(tokens_);
  }
  // The same for phases that one worker runs one after the other, reading w again: from its own
  // cache, from the shared one, or from memory where sequences are too long for that anyway.
  bool by_whole_sequence(int64_t operands) const {
    const int64_t bytes = longest_ * token_bytes() * operands;
    return by_sequence() && (bytes <= kTaskBytes || bytes * p.threads <= Plan::kCacheBytes ||
                             2 * bytes >= Plan::kCacheBytes);
  }

  // Calls body(begin, end) for waves of sequences.
  template <class Body>
  void waves_of_sequences(int64_t operands, const Body& body) const {
    const int64_t limit = kWaveBytes / (operands * token_bytes());
    for (int64_t begin = 0; begin < p.sequences;) {
      int64_t end = begin, sum = 0;
      do sum += length(end++);
      while (end < p.sequences && sum + length(end) <= limit);
      body(begin, end);
      begin = end;
    }
  }
  int64_t wave_blocks(int64_t operands) const {
    const int64_t limit = kWaveBytes / (operands * token_bytes() * kBlock);
    return limit < 2 * p.threads ? 2 * p.threads : limit;
  }

  // -- the launch --------------------------------------------------------------------------------
  void begin(void* workspace, ae_parallel_for parallel_for) {
    base_ = reinterpret_cast<char*>(round_up(int64_t(workspace), WorkspacePlan::kAlign));
    parallel_for_ = parallel_for;
    number_blocks(reinterpret_cast<int64_t*>(base_ + first_block_at_));
  }
  A* part(int64_t at) const { return reinterpret_cast<A*>(base_ + at); }
  // task(index, worker) for every index in [0, n).
  template <class Task>
  void tasks(int64_t n, const Task& task) const {
    const auto call = [](void* arg, int64_t index, int32_t worker) {
      (*static_cast<const Task*>(arg))(index, worker);
      stream_fence();
    };
    if (n > 0) parallel_for_(n, p.threads, call, const_cast<Task*>(&task));
  }
  // sum(sequence, head) for every head of the sequences [begin, end): sums over their blocks.
  template <class Sum>
  void sums(int64_t begin, int64_t end, int64_t blocks, const Sum& sum) const {
    const auto task = [&](int64_t n, int32_t) { sum(begin + n / H, n % H); };
    if (blocks * row_elements > kSerialSums) return tasks((end - begin) * H, task);
    for (int64_t n = 0; n < (end - begin) * H; ++n) task(n, 0);
  }
  const int64_t* first_block() const {
    return reinterpret_cast<const int64_t*>(base_ + first_block_at_);
  }
  Block block(int64_t n) const {
    const int64_t i = sequence_at(n);
    return block_in(i, n - first_block()[i]);
  }
  int64_t sequence_at(int64_t block) const {
    int64_t low = 0, high = p.sequences;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first_block()[middle] <= block ? low : high) = middle;
    }
    return low;
  }

  void clear(A* row) const { __builtin_memset(row, 0, uint64_t(row_elements) * sizeof(A)); }
  static void add(A* to, const A* from, int64_t elements) {
    for (int64_t i = 0; i < elements; ++i) to[i] += from[i];
  }

  int64_t blocks_ = 0, tokens_ = 0, longest_ = 0;
  WorkspacePlan space_;
  int64_t first_block_at_;
  char* base_ = nullptr;
  ae_parallel_for parallel_for_ = nullptr;
};

inline bool same_statistics_abi(const ae_statistics_params& p) {
  return p.abi_version == AE_ABI_VERSION && p.bytes == sizeof(ae_statistics_params);
}

}  // namespace ae

#define AE_EXPORT_STATISTICS(Plan, Kernel, kind)                              \
  AE_EXPORT const ae_module_info* ae_info() {                                 \
    static const ae_module_info info = {AE_ABI_VERSION,                       \
                                        sizeof(ae_statistics_params),         \
                                        kind,                                 \
                                        ae::dtype_of<Plan::Elem>(),           \
                                        Plan::kD,                             \
                                        Plan::kD,                             \
                                        0,                                    \
                                        0,                                    \
                                        0,                                    \
                                        0,                                    \
                                        ae::kIsa,                             \
                                        Plan::kKey};                          \
    return &info;                                                             \
  }                                                                           \
  AE_EXPORT int64_t ae_workspace_bytes(const ae_statistics_params* p) {       \
    return Kernel(*p).workspace_bytes();                                      \
  }                                                                           \
  AE_EXPORT int32_t ae_launch(const ae_statistics_params* p, void* workspace, \
                              ae_parallel_for parallel_for) {                 \
    if (!ae::same_statistics_abi(*p)) return ae::kWrongAbi;                   \
    Kernel(*p).run(workspace, parallel_for);                                  \
    return ae::kLaunched;                                                     \
  }
