#include "schedule_binding.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "common/policy.h"

namespace py = pybind11;

namespace ae {
namespace {

using Numbers = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;
using Costs = std::array<double, 4>;  // the fields of PolicyCosts
using Choice = std::tuple<int32_t, int32_t, int64_t, std::array<double, 3>>;

[[noreturn]] void refuse(const std::string& text) { throw py::value_error(text); }

void require_positive(const char* name, int64_t value) {
  if (value < 1) refuse(std::string(name) + "=" + std::to_string(value) + ": at least 1");
}

void require_policy(int32_t policy) {
  if (policy < kTiles || policy > kStreamK) {
    refuse("policy=" + std::to_string(policy) + ": 0 (tiles), 1 (split) or 2 (stream-K)");
  }
}

// The number of outputs.
int64_t check_prefix(const Numbers& prefix) {
  if (prefix.ndim() != 1 || prefix.size() < 1 || prefix.at(0) != 0) {
    refuse("prefix: one dimension, outputs + 1 numbers, the first of them 0");
  }
  const int64_t* p = prefix.data();
  for (int64_t o = 0; o + 1 < prefix.size(); ++o) {
    if (p[o + 1] < p[o]) {
      refuse("prefix[" + std::to_string(o + 1) + "]=" + std::to_string(p[o + 1]) +
             ": not below the one before it, " + std::to_string(p[o]));
    }
  }
  return prefix.size() - 1;
}

PolicyCosts check_costs(const Costs& costs) {
  for (const double cost : costs) {
    if (!(cost >= 0)) refuse("costs: (tile, segment, part, combine), none of them negative");
  }
  return {costs[0], costs[1], costs[2], costs[3]};
}

Schedule make(int32_t policy, const Numbers& prefix, int64_t workers, int32_t splits) {
  const int64_t outputs = check_prefix(prefix);
  require_policy(policy);
  require_positive("workers", workers);
  require_positive("splits", splits);
  return Schedule::make(policy, outputs, prefix.data(), workers, splits);
}

Numbers table(const std::vector<std::array<int64_t, 5>>& rows) {
  Numbers out(std::vector<py::ssize_t>{py::ssize_t(rows.size()), 5});
  for (size_t i = 0; i < rows.size(); ++i) {
    std::copy(rows[i].begin(), rows[i].end(), out.mutable_data() + 5 * i);
  }
  return out;
}

Numbers segments(int32_t policy, const Numbers& prefix, int64_t workers, int32_t splits) {
  const Schedule s = make(policy, prefix, workers, splits);
  std::vector<std::array<int64_t, 5>> rows;
  for (int64_t x = 0; x < s.workers; ++x) {
    s.each_segment(
        x, [&](const Segment& g) { rows.push_back({x, g.output, g.begin, g.end, g.slot}); });
  }
  return table(rows);
}

Numbers parts(int32_t policy, const Numbers& prefix, int64_t workers, int32_t splits) {
  const Schedule s = make(policy, prefix, workers, splits);
  std::vector<std::array<int64_t, 5>> rows;
  for (int64_t o = 0; o < s.outputs; ++o) {
    const Parts p = s.parts(o);
    rows.push_back({p.first, p.second, p.step, p.count, p.whole});
  }
  return table(rows);
}

Choice as_tuple(const PolicyChoice& c) {
  return {c.policy, c.splits, c.workers, {c.cost[0], c.cost[1], c.cost[2]}};
}

Choice choose(const Numbers& prefix, int64_t slots, bool can_merge, const Costs& costs) {
  const int64_t outputs = check_prefix(prefix);
  require_positive("slots", slots);
  return as_tuple(choose_policy(outputs, prefix.data(), slots, can_merge, check_costs(costs)));
}

Choice choose_bounded(int64_t outputs, int64_t most_tiles, int64_t slots, bool can_merge,
                      const Costs& costs, double count, int64_t crowded) {
  require_positive("slots", slots);
  if (outputs < 0 || most_tiles < 0) refuse("outputs and most_tiles: not negative");
  if (!(count >= 0)) refuse("count: not negative");
  return as_tuple(choose_policy_bounded(outputs, most_tiles, slots, can_merge, check_costs(costs),
                                        count, crowded));
}

std::pair<Costs, double> costs_of_device(int64_t tile_cycles, int64_t slot_bytes) {
  const DeviceCosts c = device_costs(tile_cycles, slot_bytes);
  return {{c.policy.tile, c.policy.segment, c.policy.part, c.policy.combine}, c.count};
}

double cost(int32_t policy, const Numbers& prefix, int64_t workers, int32_t splits, int64_t slots,
            const Costs& costs) {
  const Schedule s = make(policy, prefix, workers, splits);
  require_positive("slots", slots);
  const policy::Work w(s.outputs, s.prefix, slots, check_costs(costs));
  constexpr int64_t all = INT64_MAX;
  if (policy == kStreamK) return policy::stream_k_cost(w, workers);
  return policy == kSplit ? policy::split_cost(w, splits, policy::kNever, all)
                          : policy::tiles_cost(w, policy::kNever, all);
}

}  // namespace

void bind_schedule(py::module_& m) {
  m.def("schedule_segments", &segments, py::arg("policy"), py::arg("prefix"), py::arg("workers"),
        py::arg("splits"),
        "int64 [segments, 5]: (worker, output, begin, end, slot or -1), workers in order.");
  m.def("schedule_parts", &parts, py::arg("policy"), py::arg("prefix"), py::arg("workers"),
        py::arg("splits"),
        "int64 [outputs, 5]: (first slot, second, step, count, whole) of each output's parts.");
  m.def("schedule_slots", &Schedule::slots, py::arg("policy"), py::arg("outputs"),
        py::arg("workers"), py::arg("splits"), "Slots that a launch needs whatever the lengths.");
  m.def("choose_policy", &choose, py::arg("prefix"), py::arg("slots"), py::arg("can_merge"),
        py::arg("costs"),
        "(policy, splits, workers, predicted makespan of each policy); costs: (tile, segment, "
        "part, combine).");
  m.def("choose_policy_bounded", &choose_bounded, py::arg("outputs"), py::arg("most_tiles"),
        py::arg("slots"), py::arg("can_merge"), py::arg("costs"), py::arg("count"),
        py::arg("crowded"), "The same for lengths that the host does not know.");
  m.def("device_costs", &costs_of_device, py::arg("tile_cycles"), py::arg("slot_bytes"),
        "(costs, count) of a CUDA launch, in cycles of an SM.");
  m.def("policy_cost", &cost, py::arg("policy"), py::arg("prefix"), py::arg("workers"),
        py::arg("splits"), py::arg("slots"), py::arg("costs"),
        "Predicted makespan of one schedule on `slots` workers at a time, nothing left out.");
}

}  // namespace ae
