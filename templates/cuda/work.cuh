// The work of a thread block where a launch shares it by a schedule (common/schedule.h): its
// segments one after the other, and the kernel that counts the tiles of keys of each output first,
// for stream-K. Lengths are read on the device, so a captured launch serves others within its
// bounds.
//
// A split needs no count: a block finds how many tiles its output has when it classifies them, and
// so which are its own. Every part has its slot, empty ones too, and ae_combine reads all of them.
#pragma once
#include "common/schedule.h"
#include "cuda/key_tiles.cuh"

namespace ae {

__device__ inline Schedule schedule_of(const WorkParams& work) {
  return Schedule::make(work.policy, work.outputs, work.prefix, work.workers, work.splits);
}

// Where the parts of an output are.
__device__ inline Parts parts_of(const WorkParams& work, int64_t output) {
  if (work.policy != kSplit) return schedule_of(work).parts(output);
  const int64_t first = output * work.splits;
  return {first, first + 1, 1, work.splits, false};
}

// The segments of worker x in order: under stream-K those of Schedule::each_segment. One thread
// asks; it lies in shared memory, for what only a segment's start needs is not held through its
// loop.
struct SegmentWalk {
  static constexpr int kAllTiles = 0x7fffffff;

  Segment segment;
  int64_t at, end, output;  // kStreamK: what is left of the line
  bool more, first;

  __device__ void start(const WorkParams& work, int64_t x) {
    at = end = output = 0;
    more = first = true;
    segment = {x, 0, kAllTiles, -1};
    if (work.policy == kSplit) segment = {unsigned(x) / unsigned(work.splits), 0, 0, x};
    if (work.policy != kStreamK) return;
    const Schedule schedule = schedule_of(work);
    more = x < schedule.workers;
    if (!more) return;
    at = schedule.start(x);
    end = schedule.start(x + 1);
    output = schedule.output_of(at);
  }

  // Sets `segment`, or `more` to false where there is none.
  __device__ void next(const WorkParams& work, int64_t x) {
    if (work.policy == kStreamK) {
      if (!more) return;
      while (at < end && work.prefix[output + 1] <= at) ++output;
      more = at < end;
      if (!more) return;
      const int64_t begin = work.prefix[output], last = work.prefix[output + 1];
      const int64_t stop = last < end ? last : end;
      const bool whole = at == begin && stop == last;
      segment = {output, at - begin, stop - begin, whole ? -1 : 2 * x + (at == begin)};
      at = stop;
      return;
    }
    more = first;
    first = false;
  }

  // Under a split: its part of the output's tiles, once they are counted.
  // In 32 bits: a grid has no more blocks, and a division of 64 bits takes many registers.
  __device__ void cut(const WorkParams& work, unsigned tiles) {
    const unsigned splits = unsigned(work.splits), of = tiles < splits ? tiles : splits;
    const unsigned part = unsigned(segment.slot) % splits;
    segment.begin = segment.end = 0;
    if (part >= of) return;
    const unsigned each = tiles / of, longer = tiles % of;  // as Schedule::cut
    segment.begin = part * each + (part < longer ? part : longer);
    segment.end = segment.begin + each + (part < longer);
  }
};

struct NoWalk {};
template <bool kScheduled>
using Walk = std::conditional_t<kScheduled, SegmentWalk, NoWalk>;

constexpr int kScheduleThreads = 512;  // a warp per output where a mask is classified

// One thread block: how many tiles of keys each output has, then their prefix sums.
template <class Plan, class Fn, class Params>
__device__ inline void make_schedule(const Params& params) {
  __shared__ int64_t totals[kScheduleThreads];
  const int64_t outputs = params.work.outputs;
  int64_t* prefix = params.work.prefix;
  const int thread = int(threadIdx.x);
  const auto tiles = [&](int64_t output) -> int {
    const RowTile rows = RowTile::of_output<Plan>(params.p, unsigned(output));
    if (rows.count <= 0) return 0;
    return KeyTiles<Plan, Fn>::count(params, rows, Sequence(params.p, rows.b).keys);
  };
  if constexpr (Fn::kHasMask) {
    for (int64_t i = thread / 32; i < outputs; i += kScheduleThreads / 32) {
      const int found = tiles(i);
      if (thread % 32 == 0) prefix[i + 1] = found;
    }
  } else {
    for (int64_t i = thread; i < outputs; i += kScheduleThreads) prefix[i + 1] = tiles(i);
  }
  __syncthreads();
  // Each thread adds up a range of outputs, then starts where those before it end.
  const int64_t each = (outputs + kScheduleThreads - 1) / kScheduleThreads;
  const int64_t begin = thread * each < outputs ? thread * each : outputs;
  const int64_t end = begin + each < outputs ? begin + each : outputs;
  int64_t sum = 0;
  for (int64_t i = begin; i < end; ++i) sum += prefix[i + 1];
  totals[thread] = sum;
  __syncthreads();
  for (int step = 1; step < kScheduleThreads; step *= 2) {
    const int64_t before = thread >= step ? totals[thread - step] : 0;
    __syncthreads();
    totals[thread] += before;
    __syncthreads();
  }
  int64_t at = totals[thread] - sum;
  if (thread == 0) prefix[0] = 0;
  for (int64_t i = begin; i < end; ++i) prefix[i + 1] = at += prefix[i + 1];
}

}  // namespace ae

// Counts the tiles of keys of all outputs, where the launch splits them.
#define AE_EXPORT_SCHEDULE(Plan, Fn)                                              \
  extern "C" __global__ void __launch_bounds__(ae::kScheduleThreads, 1)           \
      ae_schedule(const __grid_constant__ ae::Forward<Plan, Fn>::Params params) { \
    ae::make_schedule<Plan, Fn>(params);                                          \
  }
