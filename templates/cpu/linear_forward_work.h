// How a forward launch of linear attention is cut, and where a worker's memory lies: sizes only.
#pragma once
#include "cpu/linear_work.h"

namespace ae {

// Byte offsets of one worker's tiles. With C = kChunk, a = sizeof(Acc), m = 2 if kBf16Dot else a,
// Dw = D rounded up to W, De = D rounded up to 2 if kBf16Dot, N = kPanel, B = C / 16 and
// line(x) = x rounded up to 64, the total is the sum of
//   line(C Dw m)   4 times with channel decay and kDelta, else 3 with kBf16Dot and kDelta, else 2
//   line(C Dw a)   5 times with channel decay, else 2
//   line(De C m)   unless channel decay without kBf16Dot
//   line(C C a)    3 times with kDelta, else once
//   line(C C m)
//   line(C N m)    2 times
//   line(C N a)    4 times with kDelta, else 2
//   line(De N m)   with kBf16Dot
//   line(C 16 a)   with kDelta
//   line(B Dw a) + line((B + 1) Dw a) + line(De C a)    with channel decay
template <class Plan>
struct LinearForwardScratch {
  using T = LinearTypes<Plan>;
  int64_t bytes = 0;
  int64_t q, q_inside;  // by row; with channel decay q times all decay, and times that of its block
  int64_t k, k_inside;  // by row, likewise
  int64_t k_tokens;     // over tokens
  int64_t k_channels;   // transposed; with channel decay room for it
  int64_t q_stage, k_stage, v_stage;             // accumulators
  int64_t products, key_products;                // raw q . k and k . k
  int64_t weights, minus, inverse;               // M, -A, and the inverses on the diagonal of I + A
  int64_t v, v_left;                             // Vn, and what is left of it after the chunk
  int64_t sums, right, solved;                   // output rows; right sides and solutions of I + A
  int64_t state;                                 // a packed panel
  int64_t a, inside, rest, whole, before, keys;  // LinearChannel

  constexpr LinearForwardScratch() {
    constexpr int64_t C = T::kChunk, a_bytes = sizeof(typename T::Acc), m = sizeof(typename T::M);
    constexpr bool bf16_dot = Plan::kBf16Dot, delta = Plan::kDelta, channel = T::kChannel;
    const int64_t rows = C * T::kDPitch, panel = C * T::kPanel;
    q = take(rows * m);
    q_inside = take(channel, rows * m);
    k_tokens = take(!channel, rows * m);
    k = channel || bf16_dot ? take(delta, rows * m) : k_tokens;
    k_inside = take(channel && delta, rows * m);
    k_channels = take(!channel || bf16_dot, T::kDRows * C * m);
    q_stage = take(rows * a_bytes);
    k_stage = take(rows * a_bytes);
    v_stage = take(panel * a_bytes);
    products = take(C * C * a_bytes);
    key_products = take(delta, C * C * a_bytes);
    weights = take(C * C * m);
    minus = take(delta, C * C * a_bytes);
    inverse = take(delta, C * kLinearBlock * a_bytes);
    v = take(panel * m);
    v_left = take(panel * m);
    sums = take(panel * a_bytes);
    right = take(delta, panel * a_bytes);
    solved = take(delta, panel * a_bytes);
    state = take(bf16_dot, T::kDRows * T::kPanel * m);
    a = take(channel, rows * a_bytes);
    inside = take(channel, rows * a_bytes);
    rest = take(channel, rows * a_bytes);
    whole = take(channel, int64_t(T::kBlocks) * T::kDPitch * a_bytes);
    before = take(channel, int64_t(T::kBlocks + 1) * T::kDPitch * a_bytes);
    keys = take(channel, T::kDRows * C * a_bytes);
  }

 private:
  constexpr int64_t take(int64_t n) {
    const int64_t offset = bytes;
    bytes += linear_line(n);
    return offset;
  }
  constexpr int64_t take(bool wanted, int64_t n) { return take(wanted ? n : 0); }
};

template <class Plan>
constexpr int64_t linear_forward_scratch_bytes() {
  return LinearForwardScratch<Plan>().bytes;
}

// What a task covers: one sequence, some value heads of one key head, some panels of columns of v.
struct LinearTask {
  int64_t sequence, b, first, length;  // tokens [first, first + length) of batch row b
  int64_t hk, head, heads;             // value heads [head, head + heads)
  int panel, panels;
};

// A task walks the chunks of its sequence; its states stay with the worker.
template <class Plan>
struct LinearCut {
  using T = LinearTypes<Plan>;
  // States of a task: half of a second cache of 512 KB or more.
  static constexpr int64_t kStateBytes = 256 << 10;
  static constexpr int64_t kPanelBytes = T::kPanelState * int64_t(sizeof(typename T::Acc));

  int64_t group;                  // value heads of a key head
  int64_t heads, head_blocks;     // of a task; of a key head
  int64_t panels, column_blocks;  // of a task; of a head
  int64_t sequence_tasks, tasks;

  explicit LinearCut(const ae_linear_params& p) {
    group = p.Hk > 0 ? p.H / p.Hk : 0;
    heads = panels = 1;
    const int64_t fit = kStateBytes / kPanelBytes;  // panels
    if (fit >= T::kPanels) {
      panels = T::kPanels;
      heads = fit / T::kPanels < group ? fit / T::kPanels : group;
    } else if (fit > 1) {
      panels = fit;
    }
    if (heads < 1) heads = 1;
    count(p);
    // Heads first: they share no more than the raw products. Panels share all but the state.
    while (tasks < kEnough && (heads > 1 || panels > 1)) {
      int64_t& n = heads > 1 ? heads : panels;
      n = (n + 1) / 2;
      count(p);
    }
  }

  LinearTask task(const ae_linear_params& p, int64_t index) const {
    LinearTask x;
    x.sequence = index / sequence_tasks;
    x.b = p.first != nullptr ? 0 : x.sequence;
    x.first = p.first != nullptr ? p.first[x.sequence] : 0;
    x.length = p.first != nullptr ? p.first[x.sequence + 1] - x.first : p.L;
    const int64_t column = index % column_blocks, block = index / column_blocks % head_blocks;
    x.hk = index % sequence_tasks / (column_blocks * head_blocks);
    x.head = x.hk * group + block * heads;
    x.heads = group - block * heads < heads ? group - block * heads : heads;
    x.panel = int(column * panels);
    x.panels = int(T::kPanels - x.panel < panels ? T::kPanels - x.panel : panels);
    return x;
  }

 private:
  static constexpr int64_t kEnough = Plan::kVirtualWorkers / 2;

  // Blocks of even size.
  static void even(int64_t all, int64_t& size, int64_t& blocks) {
    blocks = (all + size - 1) / size;
    size = blocks > 0 ? (all + blocks - 1) / blocks : 1;
  }
  void count(const ae_linear_params& p) {
    even(group, heads, head_blocks);
    even(T::kPanels, panels, column_blocks);
    sequence_tasks = p.Hk * head_blocks * column_blocks;
    tasks = p.sequences * sequence_tasks;
  }
};

}  // namespace ae
