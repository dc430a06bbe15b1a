// Rows for registers. A compiler's PTX names a new register for nearly every result; 32 lanes of
// thousands of them would not fit a cache. Registers that are never alive together share a row:
// liveness by data flow over basic blocks, then a scan over intervals of the code.
#include <algorithm>
#include <limits>
#include <queue>

#include "module.h"

namespace ptxsim {
namespace {

using Bits = std::vector<uint64_t>;

bool get(const Bits& bits, int32_t i) { return bits[size_t(i) >> 6] >> (i & 63) & 1; }
void set(Bits& bits, int32_t i) { bits[size_t(i) >> 6] |= uint64_t{1} << (i & 63); }
void clear(Bits& bits, int32_t i) { bits[size_t(i) >> 6] &= ~(uint64_t{1} << (i & 63)); }

struct Block {
  int32_t first, last;  // instructions, both included
  std::vector<int32_t> successors;
  Bits live_in, live_out;
};

template <class F>
void each_row(const Operand& o, F f) {
  if (o.row >= kVirtualRows) f(o.row - kVirtualRows);
  for (const Operand& item : o.items) each_row(item, f);
}

void rename(Operand& o, const std::vector<int32_t>& row) {
  if (o.row >= kVirtualRows) o.row = row[size_t(o.row - kVirtualRows)];
  for (Operand& item : o.items) rename(item, row);
}

// Whether operand 0 is written whatever the lanes hold, and not read: its old value ends there. A
// guard, and any instruction that is not listed, keeps it alive, which costs a row at most.
bool defines(const Instr& instr) {
  if (instr.guard >= 0) return false;
  static constexpr std::string_view kNames[] = {
      "abs",      "add",   "addc",     "and",  "bfe",        "bfind", "brev",  "clz",  "cnot",
      "copysign", "cos",   "cvt",      "cvta", "div",        "dp4a",  "ex2",   "fma",  "fns",
      "isspacep", "ld",    "ldu",      "lg2",  "lop3",       "mad",   "max",   "min",  "mov",
      "mul",      "mul24", "mad24",    "neg",  "not",        "or",    "popc",  "prmt", "rcp",
      "rem",      "rsqrt", "sad",      "selp", "set",        "setp",  "shf",   "shfl", "shl",
      "shr",      "sin",   "slct",     "sqrt", "sub",        "subc",  "szext", "tanh", "testp",
      "vote",     "xor",   "ldmatrix", "mma",  "activemask", "redux", "match", "atom", "bfi"};
  std::string_view name = instr.text.substr(0, instr.text.find('.'));
  return std::find(std::begin(kNames), std::end(kNames), name) != std::end(kNames);
}

template <class Use, class Define>
void visit(const Instr& instr, Use use, Define define) {
  size_t first_use = 0;
  if (defines(instr)) {
    first_use = instr.pair ? 2 : 1;
    for (size_t i = 0; i < first_use && i < instr.op.size(); ++i) each_row(instr.op[i], define);
  }
  for (size_t i = first_use; i < instr.op.size(); ++i) each_row(instr.op[i], use);
  if (instr.guard >= kVirtualRows) use(instr.guard - kVirtualRows);
}

std::vector<Block> blocks_of(const std::vector<Instr>& code, int32_t first,
                             const std::vector<std::vector<int32_t>>& tables) {
  int32_t end = int32_t(code.size());
  std::vector<uint8_t> leader(size_t(end - first) + 1, 0);
  leader[0] = 1;
  auto targets = [&](const Instr& instr, auto f) {
    if (instr.control == Instr::kBranch) f(int32_t(instr.op[0].offset));
    if (instr.control == Instr::kBranchIndexed)
      for (int32_t t : tables[size_t(instr.attr[0])]) f(t);
  };
  for (int32_t i = first; i < end; ++i) {
    targets(code[size_t(i)], [&](int32_t t) { leader[size_t(t - first)] = 1; });
    if (code[size_t(i)].control != Instr::kNone) leader[size_t(i + 1 - first)] = 1;
  }
  std::vector<Block> blocks;
  std::vector<int32_t> block_at(size_t(end - first));
  for (int32_t i = first; i < end; ++i) {
    if (leader[size_t(i - first)]) blocks.push_back({i, i, {}, {}, {}});
    blocks.back().last = i;
    block_at[size_t(i - first)] = int32_t(blocks.size() - 1);
  }
  for (Block& block : blocks) {
    const Instr& last = code[size_t(block.last)];
    targets(last, [&](int32_t t) { block.successors.push_back(block_at[size_t(t - first)]); });
    bool goes_on = last.guard >= 0 || last.control == Instr::kNone || last.control == Instr::kCall;
    if (goes_on && block.last + 1 < end)
      block.successors.push_back(block_at[size_t(block.last + 1 - first)]);
  }
  return blocks;
}

}  // namespace

int32_t allocate_rows(std::vector<Instr>& code, int32_t first,
                      const std::vector<std::vector<int32_t>>& branch_tables, int32_t count,
                      int32_t taken) {
  std::vector<Block> blocks = blocks_of(code, first, branch_tables);
  size_t words = size_t(count + 63) / 64;
  std::vector<Bits> used(blocks.size(), Bits(words)), defined(blocks.size(), Bits(words));
  for (size_t b = 0; b < blocks.size(); ++b) {
    blocks[b].live_in.resize(words);
    blocks[b].live_out.resize(words);
    for (int32_t i = blocks[b].last; i >= blocks[b].first; --i) {
      visit(
          code[size_t(i)], [](int32_t) {},
          [&](int32_t r) {
            set(defined[b], r);
            clear(used[b], r);
          });
      visit(code[size_t(i)], [&](int32_t r) { set(used[b], r); }, [](int32_t) {});
    }
  }
  for (bool changed = true; changed;) {
    changed = false;
    for (size_t b = blocks.size(); b-- > 0;) {
      Block& block = blocks[b];
      for (size_t w = 0; w < words; ++w) {
        uint64_t out = 0;
        for (int32_t s : block.successors) out |= blocks[size_t(s)].live_in[w];
        uint64_t in = used[b][w] | (out & ~defined[b][w]);
        changed |= in != block.live_in[w];
        block.live_out[w] = out;
        block.live_in[w] = in;
      }
    }
  }
  // The part of the code over which each register is alive somewhere.
  constexpr int32_t kNever = std::numeric_limits<int32_t>::max();
  std::vector<int32_t> from(size_t(count), kNever), to(size_t(count), -1);
  auto extend = [&](int32_t r, int32_t at) {
    from[size_t(r)] = std::min(from[size_t(r)], at);
    to[size_t(r)] = std::max(to[size_t(r)], at);
  };
  for (const Block& block : blocks) {
    for (int32_t r = 0; r < count; ++r) {
      if ((r & 63) == 0 && (block.live_in[size_t(r) >> 6] | block.live_out[size_t(r) >> 6]) == 0) {
        r += 63;
        continue;
      }
      if (get(block.live_in, r)) extend(r, block.first);
      if (get(block.live_out, r)) extend(r, block.last);
    }
    for (int32_t i = block.first; i <= block.last; ++i) {
      auto touch = [&](int32_t r) { extend(r, i); };
      visit(code[size_t(i)], touch, touch);
    }
  }
  std::vector<int32_t> order;
  for (int32_t r = 0; r < count; ++r)
    if (to[size_t(r)] >= 0) order.push_back(r);
  std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return std::pair(from[size_t(a)], a) < std::pair(from[size_t(b)], b);
  });
  using Ending = std::pair<int32_t, int32_t>;  // last instruction, row
  std::priority_queue<Ending, std::vector<Ending>, std::greater<>> busy;
  std::vector<int32_t> row(size_t(count), 0);
  std::vector<int32_t> idle;
  int32_t rows = 0;
  for (int32_t r : order) {
    while (!busy.empty() && busy.top().first < from[size_t(r)]) {
      idle.push_back(busy.top().second);
      busy.pop();
    }
    int32_t mine;
    if (idle.empty()) {
      mine = rows++;
    } else {
      mine = idle.back();
      idle.pop_back();
    }
    row[size_t(r)] = kSharedRows + taken + mine;
    busy.emplace(to[size_t(r)], mine);
  }
  for (size_t i = size_t(first); i < code.size(); ++i) {
    Instr& instr = code[i];
    if (instr.guard >= kVirtualRows) instr.guard = row[size_t(instr.guard - kVirtualRows)];
    for (Operand& o : instr.op) rename(o, row);
  }
  return rows;
}

}  // namespace ptxsim
