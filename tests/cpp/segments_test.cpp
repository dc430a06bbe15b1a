// Tile classes: never wrong, exact for the usual masks, and found with few classifications.
#include "interval_support.h"

namespace test {

int64_t classify_calls = 0;
int64_t window = 0, prefix = 0;

using Box = ae::Interval;
struct Causal {
  static constexpr bool kHasMask = true;
  static Box classify(const ae::IntervalEnv&, Box, Box, Box q, Box k) {
    ++classify_calls;
    return ae::iv::ge(q, k);
  }
  static bool live(const ae_capture*, int64_t q, int64_t k) { return q >= k; }
};
struct Window {
  static constexpr bool kHasMask = true;
  static Box classify(const ae::IntervalEnv&, Box, Box, Box q, Box k) {
    ++classify_calls;
    const Box back = ae::iv::sub(q, k);
    return ae::iv::logical_and(ae::iv::ge(back, ae::iv::constant(0)),
                               ae::iv::le(back, ae::iv::constant(double(window))));
  }
  static bool live(const ae_capture*, int64_t q, int64_t k) { return q >= k && q - k <= window; }
};
struct Prefix {
  static constexpr bool kHasMask = true;
  static Box classify(const ae::IntervalEnv&, Box, Box, Box q, Box k) {
    ++classify_calls;
    return ae::iv::logical_or(ae::iv::lt(k, ae::iv::constant(double(prefix))), ae::iv::ge(q, k));
  }
  static bool live(const ae_capture*, int64_t q, int64_t k) { return k < prefix || q >= k; }
};
struct Document {
  static constexpr bool kHasMask = true;
  static Box classify(const ae::IntervalEnv& env, Box, Box, Box q, Box k) {
    ++classify_calls;
    return ae::iv::eq(ae::iv::gather<int32_t>(env, 0, q), ae::iv::gather<int32_t>(env, 0, k));
  }
  static bool live(const ae_capture* c, int64_t q, int64_t k) {
    const int32_t* doc = static_cast<const int32_t*>(c->data);
    return doc[q] == doc[k];
  }
};
struct Dense {
  static constexpr bool kHasMask = true;
  static Box classify(const ae::IntervalEnv& env, Box, Box, Box q, Box k) {
    ++classify_calls;
    return ae::iv::gather<bool>(env, 1, q, k);
  }
  static bool live(const ae_capture* c, int64_t q, int64_t k) {
    return static_cast<const bool*>(c[1].data)[q * c[1].stride[0] + k];
  }
};
struct Unmasked {
  static constexpr bool kHasMask = false;
  static bool live(const ae_capture*, int64_t, int64_t) { return true; }
};

// The class of every tile by counting its live pairs.
template <class Fn>
int32_t counted_class(const ae_capture* c, int64_t q0, int64_t q1, int64_t k0, int64_t k1) {
  int64_t live = 0;
  for (int64_t q = q0; q < q1; ++q)
    for (int64_t k = k0; k < k1; ++k) live += Fn::live(c, q, k);
  return live == 0 ? AE_TILE_EMPTY : live == (q1 - q0) * (k1 - k0) ? AE_TILE_FULL : AE_TILE_PARTIAL;
}

// Expands runs to classes, checking that they are maximal and in order.
std::vector<int32_t> expand(const std::vector<ae_run>& runs, int64_t count, int64_t tiles) {
  std::vector<int32_t> classes(size_t(tiles), AE_TILE_EMPTY);
  for (int64_t i = 0; i < count; ++i) {
    const ae_run& r = runs[size_t(i)];
    const bool listed = r.tile_class == AE_TILE_PARTIAL || r.tile_class == AE_TILE_FULL;
    if (!listed || r.begin >= r.end || r.end > tiles) fail("run", r.begin, r.end, r.tile_class);
    if (i > 0) {
      const ae_run& before = runs[size_t(i) - 1];
      const bool mergeable = before.end == r.begin && before.tile_class == r.tile_class;
      if (before.end > r.begin || mergeable) fail("order of runs", before.end, r.begin, r.end);
    }
    for (int64_t t = r.begin; t < r.end && t < tiles; ++t) classes[size_t(t)] = r.tile_class;
  }
  return classes;
}

template <class Fn>
void check_tiles(const ae::IntervalEnv& env, int64_t L, int64_t S, int block_m, int block_n) {
  const Box zero = ae::iv::constant(0);
  const int64_t rows = (L + block_m - 1) / block_m, columns = (S + block_n - 1) / block_n;
  std::vector<int32_t> expected(size_t(rows * columns));
  std::vector<ae_run> runs(size_t(rows + columns + 1));
  const auto q_of = [&](int64_t first, int64_t last) {
    return ae::iv::range(double(first * block_m), double(smaller((last + 1) * block_m, L) - 1));
  };
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t n =
        ae::row_segments<Fn>(env, zero, zero, q_of(i, i), S, block_n, runs.data(), columns);
    const std::vector<int32_t> classes = expand(runs, n, columns);
    for (int64_t j = 0; j < columns; ++j) {
      const int32_t counted = counted_class<Fn>(env.cap, i * block_m, smaller((i + 1) * block_m, L),
                                                j * block_n, smaller((j + 1) * block_n, S));
      expected[size_t(i * columns + j)] = counted;
      if (classes[size_t(j)] != counted) fail("row tile", double(i), double(j), counted);
    }
    std::vector<ae_run> none(1, {-7, -7, -7});
    if (ae::row_segments<Fn>(env, zero, zero, q_of(i, i), S, block_n, none.data(), 0) != n ||
        none[0].begin != -7)
      fail("capacity", double(n), none[0].begin, 0);
  }
  for (int64_t j = 0; j < columns; ++j) {
    const Box k = ae::tile_keys(j, j, S, block_n);
    const int64_t n = ae::column_segments<Fn>(env, zero, zero, k, rows, q_of, runs.data(), rows);
    const std::vector<int32_t> classes = expand(runs, n, rows);
    for (int64_t i = 0; i < rows; ++i)
      if (classes[size_t(i)] != expected[size_t(i * columns + j)])
        fail("column tile", double(i), double(j), 0);
  }
}

// Document ids 0, 0, ..., 1, 1, ...: lengths between 1 and `longest`.
std::vector<int32_t> documents(int64_t n, int64_t longest, Random& random) {
  std::vector<int32_t> ids;
  for (int32_t id = 0; int64_t(ids.size()) < n; ++id)
    ids.resize(size_t(smaller(int64_t(ids.size()) + random.in(1, longest), n)), id);
  return ids;
}

struct Launch {
  ae_params p = {};
  ae_capture captures[2] = {};
  std::vector<int32_t> ids;
  std::vector<uint8_t> dense;
  std::vector<uint64_t> memory;

  ae::IntervalEnv prepare(int64_t L, int64_t S, int64_t longest, bool with_dense, Random& random) {
    ids = documents(L > S ? L : S, longest, random);
    captures[0] = {ids.data(), nullptr, {int64_t(ids.size())}, {1}, 1, AE_I32};
    if (with_dense) {
      for (int64_t i = 0; i < L * S; ++i) dense.push_back((i / S / 70 + i % S / 150) % 3 != 0);
      captures[1] = {dense.data(), nullptr, {L, S}, {S, 1}, 2, AE_BOOL};
    }
    p.B = p.Hq = 1, p.L = L, p.S = S, p.threads = 1;
    p.captures = captures;
    p.capture_count = with_dense ? 2 : 1;
    memory = poisoned(ae::table_bytes(p, 3));
    return ae::build_tables(p, 3, align(memory), serial_for);
  }
};

void check_classes(uint64_t seed) {
  Random random{seed};
  Launch launch;
  const int64_t L = random.in(1, 700), S = random.in(1, 1300);
  const ae::IntervalEnv env = launch.prepare(L, S, random.in(1, 300), true, random);
  const int block_m = int(random.in(1, 4) * 16), block_n = int(random.in(1, 4) * 32);
  window = random.in(0, 300);
  prefix = random.in(0, S);
  check_tiles<Causal>(env, L, S, block_m, block_n);
  check_tiles<Window>(env, L, S, block_m, block_n);
  check_tiles<Prefix>(env, L, S, block_m, block_n);
  check_tiles<Document>(env, L, S, block_m, block_n);
  check_tiles<Dense>(env, L, S, block_m, block_n);
  check_tiles<Dense>(ae::interval_env(launch.p), L, S, block_m, block_n);
  check_tiles<Unmasked>(env, L, S, block_m, block_n);
}

// ---- cost: classifications per row of tiles, the same on every machine ----
template <class Fn>
void check_cost(const char* name, const ae::IntervalEnv& env, int64_t most_per_row) {
  const int64_t L = env.L, S = env.S, block_m = 48, block_n = 128;
  const int64_t rows = (L + block_m - 1) / block_m;
  std::vector<ae_run> runs(size_t(S / block_n + 1));
  classify_calls = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const Box q = ae::iv::range(double(i * block_m), double(smaller((i + 1) * block_m, L) - 1));
    ae::row_segments<Fn>(env, ae::iv::constant(0), ae::iv::constant(0), q, S, block_n, runs.data(),
                         0);
  }
  if (classify_calls > most_per_row * rows)
    fail(name, double(classify_calls), double(rows), double(most_per_row));
}

void check_costs() {
  Random random{5};
  Launch launch;
  const ae::IntervalEnv env = launch.prepare(131072, 131072, 8000, false, random);
  window = 4096;
  prefix = 10000;
  check_cost<Causal>("cost of causal", env, 24);
  check_cost<Window>("cost of window", env, 40);
  check_cost<Prefix>("cost of prefix", env, 40);
  check_cost<Document>("cost of document", env, 40);
  if (ae::table_bytes(launch.p, 1) > 131072 * 4 / 16)
    fail("table bytes", double(ae::table_bytes(launch.p, 1)), 0, 0);
}

}  // namespace test

int main() {
  for (uint64_t seed = 1; seed <= 12; ++seed) test::check_classes(seed);
  test::check_costs();
  if (test::failures != 0) std::printf("%d failures\n", test::failures);
  return test::failures != 0;
}
