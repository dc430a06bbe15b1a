// Checks of the tables that say where the rows and keys of sequences lie: lengths, cache rows,
// pages. Torch-free. Every value is looked at before a kernel or an append starts, so that bad
// input changes nothing; 64 sequences with 4000 pages take a few microseconds.
#pragma once
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "common/abi.h"
#include "message.h"

namespace ae {

constexpr int64_t kPageMultiple =
    16;  // tokens: what every template's tile of keys is a multiple of

// The tables of one call, in memory that the host reads; null as in ae_sequences.
struct SequenceTables {
  const int32_t *q_start = nullptr, *q_end = nullptr;
  const int32_t *key_start = nullptr, *key_end = nullptr;
  const int32_t* kv_row = nullptr;
  const int32_t* pages = nullptr;
  int64_t count = 0;       // sequences
  int64_t q_rows = 0;      // of q's dimension L
  int64_t positions = 0;   // that a sequence's keys can have: k's dimension S, or pitch * page_size
  int64_t cache_rows = 0;  // batch rows of k, or its pages
  int64_t page_pitch = 0, page_size = 0;
  int64_t key_more = 0;
  int64_t max_rows = 0, max_keys = 0;  // bounds that the caller gave
  bool packed_keys = false;  // keys of all sequences are one after the other, as by cu_seqlens_k
};

// What the tables were found to hold.
struct SequenceBounds {
  int64_t rows = 0, keys = 0;  // of the longest sequence
  int64_t covered = 0;         // rows of q that belong to a sequence, when packed
};

namespace tables {

inline std::string at(const char* name, int64_t i) {
  return std::string(name) + "[" + std::to_string(i) + "]";
}

inline std::string is(const char* name, int64_t i, int64_t value) {
  return at(name, i) + "=" + std::to_string(value);
}

// cu_seqlens of queries or keys: starts at 0, does not decrease, ends within `total`.
inline void check_packed(const char* name, const char* operand, const int32_t* start,
                         const int32_t* end, int64_t count, int64_t total) {
  int64_t last = 0;
  if (count > 0 && start[0] != 0) {
    value_error(is(name, 0, start[0]) + " must be 0: it holds the running sum of the lengths");
  }
  for (int64_t b = 0; b < count; ++b) {
    if (start[b] < last || end[b] < start[b]) {
      const bool inside = start[b] >= last;
      value_error(is(name, inside ? b + 1 : b, inside ? end[b] : start[b]) + " is below " +
                  is(name, inside ? b : b - 1, inside ? start[b] : last) +
                  "; lengths are not negative: pass their running sum");
    }
    last = end[b];
  }
  if (last > total) {
    value_error(is(name, count, last) + " is beyond the " + std::to_string(total) + " rows of " +
                operand + "; it must end at the number of rows");
  }
}

inline std::string room(const SequenceTables& t) {
  if (t.pages == nullptr) {
    return "the cache holds " + std::to_string(t.positions) + " positions per row";
  }
  return "block_table holds " + std::to_string(t.positions / t.page_size) + " pages of " +
         std::to_string(t.page_size) + " tokens per sequence";
}

[[noreturn]] inline void refuse_length(const SequenceTables& t, int64_t b) {
  const int64_t end = t.key_end[b], start = t.key_start != nullptr ? t.key_start[b] : 0;
  const std::string seqlen = is("cache_seqlens", b, end);
  if (end < 0) value_error(seqlen + " must not be negative");
  if (start < 0 || start > end) {
    value_error(is("cache_leftpad", b, start) + " must lie in [0, " + seqlen + "]");
  }
  if (end + t.key_more > t.positions) {
    const std::string more =
        t.key_more == 0 ? "" : " and " + std::to_string(t.key_more) + " appended tokens";
    value_error(seqlen + more + " do not fit: " + room(t) + "; use a longer cache" +
                (t.pages != nullptr ? " (more columns of block_table)" : ""));
  }
  value_error("max_seqlen_k=" + std::to_string(t.max_keys) + " is below the " +
              std::to_string(end + t.key_more - start) + " keys of sequence " + std::to_string(b) +
              "; pass the largest length or more");
}

inline int64_t key_begin(const SequenceTables& t, int64_t b) {
  return t.key_start != nullptr ? t.key_start[b] : 0;
}

inline int64_t key_end(const SequenceTables& t, int64_t b) {
  return t.key_end != nullptr ? t.key_end[b] + t.key_more : t.max_keys;
}

inline void check_cached_keys(const SequenceTables& t) {
  if (t.key_start != nullptr && t.key_end == nullptr) {
    value_error("cache_leftpad needs cache_seqlens: pass the lengths of the sequences too");
  }
  if (t.key_end == nullptr) return;
  for (int64_t b = 0; b < t.count; ++b) {
    const int64_t end = t.key_end[b], start = key_begin(t, b);
    if (start < 0 || start > end || end + t.key_more > t.positions ||
        end + t.key_more - start > t.max_keys) {
      refuse_length(t, b);
    }
  }
}

// Columns of the block table that sequence b uses: [first, last).
inline void page_columns(const SequenceTables& t, int64_t b, int64_t* first, int64_t* last) {
  const int64_t begin = key_begin(t, b), end = key_end(t, b);
  *first = begin / t.page_size;
  *last = begin < end ? (end + t.page_size - 1) / t.page_size : *first;
}

inline void check_pages(const SequenceTables& t) {
  const auto limit = static_cast<uint32_t>(t.cache_rows);
  for (int64_t b = 0; b < t.count; ++b) {
    int64_t first, last;
    page_columns(t, b, &first, &last);
    const int32_t* row = t.pages + b * t.page_pitch;
    uint32_t bad = 0;  // without a branch per entry: vectors of entries
    for (int64_t i = first; i < last; ++i) bad |= static_cast<uint32_t>(row[i]) >= limit ? 1u : 0u;
    if (bad == 0) continue;
    for (int64_t i = first; i < last; ++i) {
      if (static_cast<uint32_t>(row[i]) >= limit) {
        value_error("block_table[" + std::to_string(b) + ", " + std::to_string(i) +
                    "]=" + std::to_string(row[i]) + " is no page: the cache has pages 0 to " +
                    std::to_string(t.cache_rows - 1) + "; entries up to cache_seqlens must be set");
      }
    }
  }
}

inline void check_cache_rows(const SequenceTables& t) {
  for (int64_t b = 0; b < t.count; ++b) {
    if (t.kv_row[b] < 0 || t.kv_row[b] >= t.cache_rows) {
      value_error(is("cache_batch_idx", b, t.kv_row[b]) + " is no row: the cache has rows 0 to " +
                  std::to_string(t.cache_rows - 1));
    }
  }
}

}  // namespace tables

// Throws std::invalid_argument for the first value that is out of its range.
inline SequenceBounds check_tables(const SequenceTables& t) {
  SequenceBounds found;
  if (t.q_start != nullptr) {
    tables::check_packed("cu_seqlens_q", "q", t.q_start, t.q_end, t.count, t.q_rows);
    for (int64_t b = 0; b < t.count; ++b) {
      const int64_t rows = int64_t{t.q_end[b]} - t.q_start[b];
      if (rows > t.max_rows) {
        value_error("max_seqlen_q=" + std::to_string(t.max_rows) + " is below the " +
                    std::to_string(rows) + " rows of sequence " + std::to_string(b) +
                    "; pass the largest length or more");
      }
      found.rows = std::max(found.rows, rows);
      found.covered += rows;
    }
  } else {
    found.rows = t.max_rows;
  }
  if (t.packed_keys) {
    tables::check_packed("cu_seqlens_k", "k", t.key_start, t.key_end, t.count, t.positions);
    for (int64_t b = 0; b < t.count; ++b) {
      if (t.key_end[b] - t.key_start[b] > t.max_keys) tables::refuse_length(t, b);
    }
  } else {
    tables::check_cached_keys(t);
  }
  if (t.pages != nullptr) tables::check_pages(t);
  if (t.kv_row != nullptr) tables::check_cache_rows(t);
  for (int64_t b = 0; b < t.count; ++b) {
    found.keys = std::max(found.keys, tables::key_end(t, b) - tables::key_begin(t, b));
  }
  return found;
}

// Whether a place is among few: one bit of two cache lines answers most questions.
class Places {
 public:
  void add(int32_t x) {
    filter_[bit(x) / 64] |= uint64_t{1} << bit(x) % 64;
    values_.push_back(x);
  }
  void sort() { std::sort(values_.begin(), values_.end()); }
  // A place that was added twice, or -1. After sort().
  int32_t twice() const {
    const auto found = std::adjacent_find(values_.begin(), values_.end());
    return found == values_.end() ? -1 : *found;
  }
  bool contains(int32_t x) const {
    return (filter_[bit(x) / 64] >> bit(x) % 64 & 1) != 0 &&
           std::binary_search(values_.begin(), values_.end(), x);
  }

 private:
  static constexpr uint32_t kBits = 1024;
  static uint32_t bit(int32_t x) { return static_cast<uint32_t>(x) % kBits; }

  uint64_t filter_[kBits / 64] = {};
  std::vector<int32_t> values_;
};

namespace tables {

inline void check_appended_rows(const SequenceTables& t) {
  Places written;
  for (int64_t b = 0; b < t.count; ++b) written.add(t.kv_row[b]);
  written.sort();
  const int32_t row = written.twice();
  for (int64_t b = 0; row >= 0 && b < t.count; ++b) {
    if (t.kv_row[b] != row) continue;
    value_error(is("cache_batch_idx", b, row) +
                " is the row of another sequence too, and both append to it; give every sequence "
                "a row of its own");
  }
}

// A page that gets tokens is used nowhere else.
inline void check_appended_pages(const SequenceTables& t) {
  Places written;
  int64_t first, last;
  for (int64_t b = 0; b < t.count; ++b) {
    page_columns(t, b, &first, &last);
    const int32_t* row = t.pages + b * t.page_pitch;
    for (int64_t i = t.key_end[b] / t.page_size; i < last; ++i) written.add(row[i]);
  }
  written.sort();
  const int32_t twice = written.twice();
  for (int64_t b = 0; b < t.count; ++b) {
    page_columns(t, b, &first, &last);
    const int64_t appended = t.key_end[b] / t.page_size;
    const int32_t* row = t.pages + b * t.page_pitch;
    if (twice < 0) last = std::min(last, appended);
    for (int64_t i = first; i < last; ++i) {
      if (row[i] != twice && (i >= appended || !written.contains(row[i]))) continue;
      value_error("block_table[" + std::to_string(b) + ", " + std::to_string(i) +
                  "]=" + std::to_string(row[i]) +
                  " is used in two places, and tokens are appended to that page; give it to one "
                  "sequence (of a shared prefix, copy the last page when it is not full)");
    }
  }
}

}  // namespace tables

// What an append needs beside check_tables: no two sequences write to one place, and no sequence
// reads what another one writes. Throws std::invalid_argument.
inline void check_append(const SequenceTables& t) {
  if (t.key_more == 0) return;
  if (t.kv_row != nullptr) tables::check_appended_rows(t);
  if (t.pages != nullptr) tables::check_appended_pages(t);
}

// With a causal mask a sequence with fewer keys than q has rows has rows before its first key:
// `least` is q's rows then, else 0.
inline void check_least(const SequenceTables& t, int64_t least) {
  for (int64_t b = 0; least > 0 && b < t.count; ++b) {
    const int64_t keys = tables::key_end(t, b) - tables::key_begin(t, b);
    if (keys >= least) continue;
    value_error(
        "causal: q has " + std::to_string(least) + " rows and sequence " + std::to_string(b) +
        " has " + std::to_string(keys) +
        " keys (cache_seqlens less cache_leftpad, with what is appended), so that its first "
        "rows come before every key; pass fewer rows, or causal=False");
  }
}

}  // namespace ae
