// The segment schedule covers every tile once and says truly where the parts of an output are, and
// the chosen policy costs what its schedule costs. tests/unit/test_schedule.py has the wide sweep.
#include "common/policy.h"

#include <algorithm>
#include <cstdint>
#include <map>
#include <queue>
#include <random>
#include <utility>
#include <vector>

#include "check.h"

namespace {

using ae::Schedule;
using ae::Segment;

struct Case {
  std::vector<int64_t> prefix{0};
  int64_t workers;
  int32_t splits;

  int64_t outputs() const { return int64_t(prefix.size()) - 1; }
};

// Lengths that are zero, equal, small, skewed or near the end of int64.
Case random_case(std::mt19937_64& random) {
  const auto below = [&](int64_t n) { return int64_t(random() % uint64_t(n)); };
  Case c;
  const int64_t outputs = 1 + below(40), kind = below(6), same = below(100);
  for (int64_t o = 0; o < outputs; ++o) {
    int64_t n = kind == 0   ? 0
                : kind == 1 ? same
                : kind == 2 ? below(4)
                : kind == 3 ? int64_t(1) << below(11)
                : kind == 4 ? (INT64_MAX / outputs) - below(1000)
                            : below(300);
    if (kind > 1 && below(4) == 0) n = 0;
    c.prefix.push_back(c.prefix.back() + n);
  }
  c.workers = 1 + below(below(2) == 0 ? 8 : 400);
  c.splits = int32_t(1 + below(12));
  return c;
}

// Where the segments of a schedule lie: exact cover, slots, and parts in the order of the keys.
void check_schedule(const Case& c, int32_t policy) {
  const Schedule s = Schedule::make(policy, c.outputs(), c.prefix.data(), c.workers, c.splits);
  const int64_t most_slots = Schedule::slots(policy, c.outputs(), c.workers, c.splits);
  std::vector<std::vector<std::pair<int64_t, Segment>>> of(c.outputs());  // (worker, segment)
  std::map<int64_t, int64_t> slots;
  int64_t least_load = INT64_MAX, most_load = 0;
  for (int64_t x = 0; x < s.workers + 3; ++x) {  // those beyond the last have nothing to do
    int64_t load = 0;
    s.each_segment(x, [&](const Segment& g) {
      CHECK(x < s.workers);
      of[g.output].push_back({x, g});
      load += g.end - g.begin;
      if (g.slot != -1) {
        CHECK(g.slot >= 0 && g.slot < most_slots);
        CHECK(++slots[g.slot] == 1);
      }
    });
    if (x < s.workers) least_load = std::min(least_load, load);
    most_load = std::max(most_load, load);
  }
  if (policy == ae::kStreamK && s.workers > 0) {
    CHECK(most_load - least_load <= 1);
    CHECK(s.workers == std::min(c.workers, c.prefix.back()));
  }
  for (int64_t o = 0; o < c.outputs(); ++o) {
    const ae::Parts parts = s.parts(o);
    int64_t at = 0;
    for (size_t i = 0; i < of[o].size(); ++i) {
      const auto& [worker, g] = of[o][i];
      CHECK(g.begin == at && (g.end > at || policy == ae::kTiles));
      CHECK(worker == of[o][0].first + int64_t(i));  // consecutive
      at = g.end;
      CHECK((g.slot == -1) == parts.whole);
      if (!parts.whole) CHECK(parts.slot(int64_t(i)) == g.slot);
    }
    CHECK(at == s.tiles(o));
    CHECK(parts.count == (parts.whole ? 0 : int64_t(of[o].size())));
    CHECK(!parts.whole || of[o].size() == 1);
    if (policy == ae::kStreamK && s.share > 1 && s.tiles(o) > 0) {
      const bool even = c.prefix.back() % s.workers == 0;
      const int64_t q = even ? s.share : s.share - 1, n = s.tiles(o) - 1;
      CHECK(int64_t(of[o].size()) <= 1 + n / q + (n % q != 0));
    }
  }
}

// The cost of a schedule, worker by worker, in the order in which workers are handed out.
double simulate(const Schedule& s, int64_t slots, const ae::PolicyCosts& costs) {
  std::priority_queue<double, std::vector<double>, std::greater<double>> free_at;
  for (int64_t i = 0; i < slots; ++i) free_at.push(0);
  double last = 0;
  for (int64_t x = 0; x < s.workers; ++x) {
    double cost = 0;
    s.each_segment(x, [&](const Segment& g) {
      cost += double(g.end - g.begin) * costs.tile + costs.segment + (g.slot >= 0) * costs.part / 2;
    });
    if (cost == 0) continue;
    const double end = free_at.top() + cost;
    free_at.pop();
    free_at.push(end);
    last = std::max(last, end);
  }
  if (s.policy == ae::kTiles) return last;
  int64_t deepest = 0, all = 0;
  for (int64_t o = 0; o < s.outputs; ++o) {
    deepest = std::max(deepest, s.parts(o).count);
    all += s.parts(o).count;
  }
  return last + costs.combine +
         costs.part / 2 * std::max(double(deepest), double(all) / double(slots));
}

void check_policy(const Case& c, std::mt19937_64& random) {
  const auto some = [&] { return double(random() % 8) / 4; };
  const ae::PolicyCosts costs{0.25 + some(), some(), some(), 4 * some()};
  const int64_t n = c.outputs(), *prefix = c.prefix.data();
  const ae::policy::Work work(n, prefix, c.workers, costs);
  const auto near = [](double a, double b) { return std::abs(a - b) <= 1e-9 * (1 + std::abs(b)); };
  const auto truth = [&](int32_t policy, int64_t workers, int32_t splits) {
    return simulate(Schedule::make(policy, n, prefix, workers, splits), c.workers, costs);
  };
  const double tiles = truth(ae::kTiles, n, 1);
  CHECK_MESSAGE(near(ae::policy::tiles_cost(work), tiles), "%g %g", ae::policy::tiles_cost(work),
                tiles);
  if (c.splits > 1) {
    const double split = truth(ae::kSplit, n * c.splits, c.splits);
    const double said = ae::policy::split_cost(work, c.splits);
    CHECK_MESSAGE(near(said, split), "%g %g: O %ld slots %ld s %d longest %ld equal %d", said,
                  split, n, c.workers, c.splits, work.longest, work.equal);
  }
  CHECK(near(ae::policy::stream_k_cost(work, c.workers), truth(ae::kStreamK, c.workers, 1)));

  const ae::PolicyChoice choice = ae::choose_policy(n, prefix, c.workers, true, costs);
  const double chosen = choice.cost[choice.policy];
  const double cost = truth(choice.policy, choice.workers, choice.splits);
  CHECK_MESSAGE(near(chosen, cost) || (choice.policy == ae::kSplit && chosen > cost),
                "policy %d splits %d: %g, is %g", choice.policy, choice.splits, chosen, cost);
  const double stream = truth(ae::kStreamK, c.workers, 1);
  if (c.workers == 1 || c.prefix.back() == 0) return;
  CHECK_MESSAGE(chosen * 0.99 <= tiles * (1 + 1e-9) && chosen * 0.99 <= stream * (1 + 1e-9),
                "policy %d: %g, tiles %g, stream-K %g", choice.policy, chosen, tiles, stream);
  CHECK(ae::choose_policy(n, prefix, c.workers, false, costs).policy == ae::kTiles);
}

}  // namespace

int main() {
  std::mt19937_64 random(5);
  for (int i = 0; i < 2000; ++i) {
    const Case c = random_case(random);
    for (const int32_t policy : {ae::kTiles, ae::kSplit, ae::kStreamK}) check_schedule(c, policy);
    if (c.prefix.back() < (int64_t(1) << 40)) {
      check_policy(c, random);
    } else {  // no sum overflows
      ae::choose_policy(c.outputs(), c.prefix.data(), c.workers, true, {1, 1, 1, 1});
    }
  }
  // Unknown lengths: stream-K for few outputs, a worker per output for many or where nothing
  // merges.
  const ae::PolicyCosts costs{2, 1, 0.1, 3};
  CHECK(ae::choose_policy_bounded(8, 1024, 132, true, costs).policy == ae::kStreamK);
  CHECK(ae::choose_policy_bounded(8, 1024, 132, true, costs).workers == 132);
  CHECK(ae::choose_policy_bounded(8, 1024, 132, false, costs).policy == ae::kTiles);
  CHECK(ae::choose_policy_bounded(32 * 132, 1024, 132, true, costs).policy == ae::kTiles);
  CHECK(ae::choose_policy_bounded(8, 2, 132, true, costs).policy == ae::kTiles);
  return CHECK_RESULT();
}
