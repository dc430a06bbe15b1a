// The checks of tables against brute force, over random caches, and the append to a cache.
#include "sequences.h"

#include <cstring>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "append.h"
#include "check.h"

namespace {

using ae::SequenceTables;

bool passes(void (*check)(const SequenceTables&), const SequenceTables& t, std::string* why) {
  try {
    check(t);
  } catch (const std::invalid_argument& error) {
    *why = error.what();
    return false;
  }
  return true;
}

// Sequences of a paged cache. Tables are random: most are good, the others have one kind of fault.
struct Paged {
  static constexpr int64_t kPageSize = 16;
  std::mt19937& random;
  int64_t count, columns, pages, more;
  std::vector<int32_t> lengths, start, table;

  int64_t below(int64_t n) { return std::uniform_int_distribution<int64_t>(0, n - 1)(random); }

  explicit Paged(std::mt19937& r) : random(r) {
    count = 1 + below(6);
    columns = 1 + below(5);
    pages = count * columns + below(4);
    more = below(3) * below(20);
    std::vector<int32_t> order(pages);
    for (int64_t i = 0; i < pages; ++i) order[i] = static_cast<int32_t>(i);
    std::shuffle(order.begin(), order.end(), random);
    table.assign(order.begin(), order.begin() + count * columns);
    for (int64_t b = 0; b < count; ++b) {
      lengths.push_back(static_cast<int32_t>(below(columns * kPageSize + 1)));
      start.push_back(static_cast<int32_t>(below(lengths[b] + 1)));
    }
    if (below(3) == 0) table[below(count * columns)] = static_cast<int32_t>(below(pages));
    if (below(8) == 0) table[below(count * columns)] = static_cast<int32_t>(below(2) ? -1 : pages);
    if (below(16) == 0) lengths[below(count)] = -1;
    if (below(16) == 0) start[below(count)] += static_cast<int32_t>(below(40));
  }
  SequenceTables tables() const {
    SequenceTables t;
    t.key_start = start.data();
    t.key_end = lengths.data();
    t.pages = table.data();
    t.count = count;
    t.page_pitch = columns;
    t.page_size = kPageSize;
    t.positions = t.max_keys = columns * kPageSize;
    t.cache_rows = pages;
    t.key_more = more;
    return t;
  }
  bool good() const {
    for (int64_t b = 0; b < count; ++b) {
      if (lengths[b] < 0 || start[b] < 0 || start[b] > lengths[b]) return false;
      if (lengths[b] + more > columns * kPageSize) return false;
      for (int64_t s = start[b]; s < lengths[b] + more; ++s) {
        const int32_t page = table[b * columns + s / kPageSize];
        if (page < 0 || page >= pages) return false;
      }
    }
    return true;
  }
  // Whether no sequence writes where another position lies, in pages that are used.
  bool separate() const {
    std::map<int32_t, std::pair<int, int>> uses;  // page -> places, of these written to
    for (int64_t b = 0; b < count && more > 0; ++b) {
      for (int64_t i = start[b] / kPageSize; i * kPageSize < lengths[b] + more; ++i) {
        auto& [places, written] = uses[table[b * columns + i]];
        ++places;
        if ((i + 1) * kPageSize > lengths[b]) ++written;
      }
    }
    for (const auto& [page, use] : uses) {
      if (use.second > 0 && use.first > 1) return false;
    }
    return true;
  }
};

void test_random_pages() {
  std::mt19937 random(7);
  int good = 0, separate = 0;
  for (int i = 0; i < 20000; ++i) {
    const Paged x(random);
    const SequenceTables t = x.tables();
    std::string why;
    const bool passed = passes([](const SequenceTables& t) { ae::check_tables(t); }, t, &why);
    CHECK_MESSAGE(passed == x.good(), "case %d: %s", i, why.c_str());
    if (!passed) continue;
    ++good;
    const bool alone = passes(ae::check_append, t, &why);
    CHECK_MESSAGE(alone == x.separate(), "case %d: %s", i, why.c_str());
    separate += alone ? 1 : 0;
    const ae::SequenceBounds found = ae::check_tables(t);
    int64_t longest = 0;
    for (int64_t b = 0; b < x.count; ++b) {
      longest = std::max<int64_t>(longest, x.lengths[b] + x.more - x.start[b]);
    }
    CHECK(found.keys == longest);
  }
  CHECK(good > 5000 && separate > 2000 && separate < good - 100);
}

void test_packed() {
  const int32_t q[4] = {0, 3, 3, 9}, k[4] = {0, 0, 5, 12};
  SequenceTables t;
  t.q_start = q;
  t.q_end = q + 1;
  t.key_start = k;
  t.key_end = k + 1;
  t.count = 3;
  t.q_rows = 10;
  t.positions = 12;
  t.cache_rows = 1;
  t.max_rows = 6;
  t.max_keys = 7;
  t.packed_keys = true;
  const ae::SequenceBounds found = ae::check_tables(t);
  CHECK(found.rows == 6 && found.keys == 7 && found.covered == 9);
  std::string why;
  t.q_rows = 8;
  CHECK(!passes([](const SequenceTables& t) { ae::check_tables(t); }, t, &why));
  CHECK_MESSAGE(why.find("cu_seqlens_q[3]=9 is beyond the 8 rows of q") == 0, "%s", why.c_str());
}

void test_least() {
  const int32_t lengths[2] = {4, 1};
  SequenceTables t;
  t.key_end = lengths;
  t.count = 2;
  t.key_more = 1;
  std::string why;
  CHECK(passes([](const SequenceTables& t) { ae::check_least(t, 2); }, t, &why));
  CHECK(!passes([](const SequenceTables& t) { ae::check_least(t, 3); }, t, &why));
  CHECK(passes([](const SequenceTables& t) { ae::check_least(t, 0); }, t, &why));
}

// Elements of 1 byte with strides of every kind.
void test_append() {
  constexpr int64_t kHeads = 2, kD = 3, kTokens = 4;
  const int32_t lengths[2] = {14, 0}, table[4] = {2, 0, 1, 3};
  SequenceTables t;
  t.key_end = lengths;
  t.pages = table;
  t.count = 2;
  t.page_pitch = 2;
  t.page_size = 16;
  t.key_more = kTokens;
  std::vector<char> fresh(2 * kTokens * kHeads * kD);
  for (size_t i = 0; i < fresh.size(); ++i) fresh[i] = static_cast<char>(i + 1);
  const int64_t layouts[3][4] = {{16 * kHeads * kD, kHeads * kD, kD, 1},
                                 {16 * kHeads * kD, kD, 16 * kD, 1},
                                 {16 * kHeads * kD, kHeads, 1, 16 * kHeads}};
  for (const auto& stride : layouts) {
    std::vector<char> cache(4 * 16 * kHeads * kD, 0), other = cache;
    ae::AppendOperand x{cache.data(), fresh.data(), {}, {}, kHeads, kD};
    std::memcpy(x.cache_stride, stride, sizeof(stride));
    const int64_t dense[4] = {kTokens * kHeads * kD, kHeads * kD, kD, 1};
    std::memcpy(x.fresh_stride, dense, sizeof(dense));
    ae::AppendOperand y = x;
    y.cache = other.data();
    ae::Append append{t, {x, y}, 1};
    CHECK(append.tokens() == 8 && append.bytes() == 2 * 48);
    for (int64_t i = 0; i < append.tokens(); ++i) ae::Append::run(&append, i, 0);
    CHECK(cache == other);
    size_t written = 0;
    for (const char c : cache) written += c != 0 ? 1 : 0;
    CHECK(written == fresh.size());
    for (int64_t b = 0; b < 2; ++b) {
      for (int64_t n = 0; n < kTokens; ++n) {
        const int64_t at = lengths[b] + n, page = table[b * 2 + at / 16];
        for (int64_t h = 0; h < kHeads; ++h) {
          for (int64_t d = 0; d < kD; ++d) {
            const int64_t from = b * dense[0] + n * dense[1] + h * dense[2] + d;
            CHECK(cache[page * stride[0] + at % 16 * stride[1] + h * stride[2] + d * stride[3]] ==
                  fresh[from]);
          }
        }
      }
    }
  }
}

}  // namespace

int main() {
  test_random_pages();
  test_packed();
  test_least();
  test_append();
  return CHECK_RESULT();
}
