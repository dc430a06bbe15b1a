// Types and sizes of linear attention on the CPU: what forward and backward share, before any
// arithmetic.
#pragma once
#include "common/env.h"
#include "common/linear.h"
#include "common/linear_abi.h"
#include "cpu/gemm.h"
#include "cpu/module.h"
#include "cpu/pack.h"

namespace ae {

constexpr int kLinearBlock = 16;  // tokens of a diagonal block; a chunk is whole blocks

constexpr int64_t linear_line(int64_t bytes) { return round_up(bytes, 64); }

template <class Plan>
struct LinearTypes {
  using Elem = typename Plan::Elem;
  using Acc = typename Plan::Acc;
  using M = std::conditional_t<Plan::kBf16Dot, bf16, Acc>;  // what products multiply
  using L = Lanes<Acc>;
  using V = typename L::Acc;
  static_assert(!Plan::kBf16Dot || (kHasBf16Dot && __is_same(Elem, bf16)),
                "bf16 dot products need bf16 operands and AVX512_BF16");
  static_assert(Plan::kChunk % kLinearBlock == 0 && Plan::kChunk > 0, "a chunk is whole blocks");
  static constexpr int W = L::W;
  static constexpr int kPair = __is_same(M, Acc) ? 1 : 2;  // consecutive k of one product step
  static constexpr int kChunk = Plan::kChunk, kBlocks = kChunk / kLinearBlock;
  static constexpr int kD = Plan::kD, kDv = Plan::kDv;
  static constexpr int kDPitch = row_pitch<Acc>(kD);        // elements of a packed row of q or k
  static constexpr int kDSteps = (kD + kPair - 1) / kPair;  // product steps over channels
  static constexpr int kDRows = kDSteps * kPair;            // rows of a transposed tile
  static constexpr DecayKind kDecay = Plan::kDecay;
  static constexpr bool kScalar = kDecay == DecayKind::kScalar;
  static constexpr bool kChannel = kDecay == DecayKind::kChannel;

  // Columns of v come in equal panels of at most 256 bytes of sums: four registers of AVX-512, and
  // rows that lie a power of two apart do not evict each other.
  static constexpr int kMostColumns = 256 / sizeof(Acc);
  static constexpr int kPanels = (kDv + kMostColumns - 1) / kMostColumns;
  static constexpr int kPanel = int(round_up((kDv + kPanels - 1) / kPanels, W));
  static constexpr int64_t kPanelState = int64_t(kD) * kPanel;  // elements of one panel
  static constexpr int panel_width(int panel) {
    return kDv - panel * kPanel < kPanel ? kDv - panel * kPanel : kPanel;
  }
  // Columns of a state in memory.
  static constexpr int kStateColumns = kDv + (Plan::kNormalizer ? 1 : 0);
};

// ae_module_info::user_stats of a module.
template <class Plan>
constexpr int32_t linear_operands() {
  constexpr bool decay = Plan::kDecay != DecayKind::kNone;
  return AE_LINEAR_OPERANDS(int32_t(Plan::kDecay), decay ? dtype_of<typename Plan::Decay>() : 0,
                            Plan::kDelta, Plan::kDelta ? dtype_of<typename Plan::Beta>() : 0,
                            Plan::kNormalizer);
}

// A chunk of one head: batch row, key and value head, first token, live tokens.
struct LinearAt {
  int64_t b, hk, h, t;
  int n;
};

// Rows of an operand that come next: fetched meanwhile, since a chunk is too short a run for the
// hardware to foresee.
struct LinearAhead {
  const char* base = nullptr;
  int64_t stride = 0;  // bytes
  int rows = 0, bytes = 0;
  AE_INLINE void fetch(int first, int count) const {
    for (int i = first; i < first + count && i < rows; ++i) {
      for (int at = 0; at < bytes; at += 64) __builtin_prefetch(base + i * stride + at, 0, 2);
    }
  }
};

// Lines at equal distances, one or two for each step of a product: many at once would hold up its
// loads.
struct LinearRun {
  const char* at;
  int64_t stride;  // bytes
  int64_t steps;
  int64_t more = 0;  // to the second line, in bytes
  AE_INLINE void fetch() {
    __builtin_prefetch(at, 0, 2);
    __builtin_prefetch(at + more, 0, 2);
    at += stride;
  }
};

// Rows of some operands that come next, fetched by products: column after column of lines, one or
// two at a time. Backward needs two, to be done when the next chunk begins; two would make forward
// slower on two threads (measured).
class LinearFetch {
  LinearAhead parts_[5];
  const int lines_;
  int count_ = 0, part_ = 0, row_ = 0, column_ = 0;

 public:
  explicit LinearFetch(int lines = 1) : lines_(lines) {}
  void add(const LinearAhead& x) {
    if (x.rows > 0) parts_[count_++] = x;
  }
  // For at most so many steps, at least one; `here` is fetched where nothing is left.
  AE_INLINE LinearRun take(int64_t steps, const void* here) {
    if (part_ == count_) return {(const char*)here, 0, steps};
    const LinearAhead& x = parts_[part_];
    const bool two = lines_ == 2 && column_ + 128 <= x.bytes;
    LinearRun run{x.base + row_ * x.stride + column_, x.stride, x.rows - row_, two ? 64 : 0};
    if (steps < run.steps) {
      run.steps = steps;
      row_ += int(steps);
    } else {
      row_ = 0;
      column_ += two ? 128 : 64;
      if (column_ >= x.bytes) ++part_, column_ = 0;
    }
    return run;
  }
  void rest() {
    while (part_ < count_) {
      LinearRun run = take(1 << 20, nullptr);
      for (; run.steps > 0; --run.steps) run.fetch();
    }
  }
};

// Rows of an operand, elements of type E.
template <class E>
struct LinearRows {
  const E* base;
  int64_t stride, col;
  AE_INLINE const E* operator()(int64_t i) const { return base + i * stride; }
  // `width` elements of each of n rows, where they lie together.
  LinearAhead ahead(int n, int width) const {
    if (col != 1) return {};
    return {(const char*)base, stride * int64_t(sizeof(E)), n, int(width * sizeof(E))};
  }
};

}  // namespace ae
