// The state pass: for each sequence, head and tile of the state one thread block walks the chunks,
// with its part of S in registers, and stores what each chunk starts from.
//
//   for each chunk:                                    K and V of the next one on their way
//     states[chunk] = S                              and z, under a normalizer
//     S = e^(sum of its decays) S + (K e^(sum of the decays after each token))^T V
//   final_state = S
//
// Exponents are sums of log-decays, never differences: none is positive, and -Inf forgets.
#pragma once
#include "linear/pass.cuh"

namespace ae {

template <class Plan, class Fn, int kBk, int kBv>
class LinearStates : public LinearPass<Plan, Fn> {
  using Pass = LinearPass<Plan, Fn>;
  using Pass::kWarps, Pass::kRows, Pass::kPitch, Pass::kWidth, Pass::kChannel, Pass::kScalar;
  using Pass::params_, Pass::p_, Pass::env_, Pass::shared_, Pass::lane_, Pass::warp_;
  using typename Pass::Elem;
  using KTile = SharedTile<kLinearChunk, kBk>;
  using VTile = SharedTile<kLinearChunk, kBv>;
  static constexpr int kRowWarps = kBk / 16, kColumnWarps = kWarps / kRowWarps;
  static constexpr int kColumns = kBv / kColumnWarps;  // of a warp
  static constexpr int kSums = kColumns / 4;           // of a row and thread
  static constexpr int kTilesK = (Plan::kD + kBk - 1) / kBk, kTilesV = (Plan::kDv + kBv - 1) / kBv;
  // Channel decays are summed in parts of a chunk, the same in tiles of any size, for the same
  // bits.
  static constexpr int kPart = 16, kParts = kLinearChunk / kPart;
  static constexpr int kOwn = kParts * kBk / Pass::kThreads;  // of a thread, of one channel
  static_assert(kRowWarps >= 1 && kWarps % kRowWarps == 0 && kColumns % 16 == 0);

 public:
  static constexpr int kBytes = 2 * (KTile::kBytes + VTile::kBytes);
  struct Small {
    float weights[kChannel ? 1 : kWarps][kLinearChunk];  // each warp its own
    float sums[kChannel ? kParts : 1][kBk];              // of the parts of the chunk
    float keep[kBk];                                     // and what is left of each row of S
  };

  __device__ __forceinline__ LinearStates(const typename Pass::Params& params, char* shared,
                                          Small& small)
      : Pass(params, shared), small_(small) {
    const unsigned index = blockIdx.x, head = index / (kTilesK * kTilesV);
    column_ = int(index % kTilesV) * kBv;
    row_ = int(index / kTilesV % kTilesK) * kBk;
    h_ = head % unsigned(p_.H);
    sequence_ = head / unsigned(p_.H);
  }

  __device__ __forceinline__ void run() {
    const LinearSequence own(p_, sequence_);
    const int chunks = own.chunks();
    // Nobody reads the state after the last chunk where it is not wanted.
    const int updates = p_.final_state != nullptr ? chunks : chunks - 1;
    load_initial();
    if (updates > 0) fill(own, 0);
    cute::cp_async_fence();
#pragma unroll 1
    for (int c = 0; c < chunks; ++c) {
      if (c > 0 || p_.state != nullptr) store_entry(c);
      if (c >= updates) break;
      if (c + 1 < updates) fill(own, c + 1);
      cute::cp_async_fence();
      if constexpr (kScalar) weigh_tokens(own, c);
      cute::cp_async_wait<1>();
      if constexpr (kChannel) {
        weigh_channels(own, c);  // a barrier before it reads K
      } else {
        __syncthreads();
      }
      add(c);
      __syncthreads();  // nobody reads the slots that are filled next
    }
    cute::cp_async_wait<0>();
    if (p_.final_state != nullptr) store_final();
  }

 private:
  Small& small_;
  int row_, column_;  // of S, where the tile starts
  int64_t h_, sequence_;
  float s_[2][kSums];  // rows row(0) and row(1)
  float z_[2][2];      // of the same rows; its columns are equal
  float keep_ = 1;

  __device__ __forceinline__ int row(int r) const {
    return row_ + warp_ % kRowWarps * 16 + lane_ / 4 + 8 * r;
  }
  // The first column of the warp.
  __device__ __forceinline__ int column() const { return column_ + warp_ / kRowWarps * kColumns; }
  __device__ __forceinline__ char* k_tile(int c) const {
    return shared_ + c % 2 * (KTile::kBytes + VTile::kBytes);
  }
  __device__ __forceinline__ char* v_tile(int c) const { return k_tile(c) + KTile::kBytes; }

  __device__ __forceinline__ void fill(const LinearSequence& own, int c) const {
    const int64_t first = own.first + int64_t(c) * kLinearChunk;
    this->template fill_keys<KTile>(k_tile(c), own.b, h_, first, own.count(c), row_);
    this->template fill_values<VTile>(v_tile(c), own.b, h_, first, own.count(c), column_);
  }

  // Lane l has tokens 2 l and 2 l + 1 of the chunk. Each warp finds all weights for itself.
  __device__ __forceinline__ void weigh_tokens(const LinearSequence& own, int c) {
    const int64_t first = own.first + int64_t(c) * kLinearChunk;
    const int count = own.count(c);
    float g[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int t = 2 * lane_ + i;
      g[i] = t < count ? log2_decay<Plan, Fn>(env_, p_, own.b, h_, first + t, 0) : 0.0f;
    }
    float sum = g[0] + g[1];
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const float more = __shfl_down_sync(~0u, sum, step);
      if (lane_ + step < 32) sum += more;
    }
    const float next = __shfl_down_sync(~0u, sum, 1), after = lane_ == 31 ? 0.0f : next;
    *reinterpret_cast<float2*>(small_.weights[warp_] + 2 * lane_) =
        make_float2(ex2(after + g[1]), ex2(after));
    keep_ = ex2(__shfl_sync(~0u, sum, 0));
    __syncwarp();
  }

  // Each thread has a channel of some of the tokens, and weighs K in place.
  __device__ __forceinline__ void weigh_channels(const LinearSequence& own, int c) {
    const int channel = int(threadIdx.x) % kBk, first_part = int(threadIdx.x) / kBk * kOwn;
    const int64_t first = own.first + int64_t(c) * kLinearChunk;
    const int count = own.count(c), d = row_ + channel;
    char* k = k_tile(c);
    float g[kOwn][kPart];
#pragma unroll
    for (int o = 0; o < kOwn; ++o) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kPart; ++i) {
        const int t = (first_part + o) * kPart + i;
        g[o][i] = t < count && d < Plan::kD
                      ? log2_decay<Plan, Fn>(env_, p_, own.b, h_, first + t, d)
                      : 0.0f;
        sum += g[o][i];
      }
      small_.sums[first_part + o][channel] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int o = 0; o < kOwn; ++o) {
      const int part = first_part + o;
      float after = 0;
      for (int i = part + 1; i < kParts; ++i) after += small_.sums[i][channel];
#pragma unroll
      for (int i = kPart - 1; i >= 0; --i) {
        uint16_t& x =
            *reinterpret_cast<uint16_t*>(k + KTile::at(part * kPart + i, channel / kChunkElements) +
                                         channel % kChunkElements * 2);
        x = narrow<Elem>(widen<Elem>(x) * ex2(after));
        after += g[o][i];
      }
      if (part == 0) small_.keep[channel] = ex2(after);
    }
    __syncthreads();
  }

  __device__ __forceinline__ void add(int c) {
    if constexpr (kHasDecay<Plan>) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float keep = kChannel ? small_.keep[row(r) - row_] : keep_;
#pragma unroll
        for (int i = 0; i < kSums; ++i) s_[r][i] *= keep;
        if constexpr (Plan::kNormalizer) z_[r][0] *= keep, z_[r][1] *= keep;
      }
    }
    const auto k = read_a_transposed<KTile>(k_tile(c), lane_);
    const auto v = read_b_transposed<VTile>(v_tile(c), lane_);
#pragma unroll
    for (int step = 0; step < kLinearChunk / 16; ++step) {
      uint32_t a[4];
      k.load_transposed(16 * step, warp_ % kRowWarps * 2, a);
      if constexpr (kScalar) {
        const float* w = small_.weights[warp_] + 16 * step + lane_ % 4 * 2;
        const float2 low = *reinterpret_cast<const float2*>(w);
        const float2 high = *reinterpret_cast<const float2*>(w + 8);
        a[0] = scale_pair<Elem>(a[0], low.x, low.y);
        a[1] = scale_pair<Elem>(a[1], low.x, low.y);
        a[2] = scale_pair<Elem>(a[2], high.x, high.y);
        a[3] = scale_pair<Elem>(a[3], high.x, high.y);
      }
      if constexpr (Plan::kNormalizer) {
        const uint32_t ones = pack2<Elem>(1.0f, 1.0f);
        multiply_add<Elem>(z_[0], z_[1], 0, a, ones, ones);
      }
      multiply_columns<Elem>(a, v, 16 * step, warp_ / kRowWarps * (kColumns / 8), s_);
    }
  }

  // ---- states in global memory ----
  // Calls f(r, i, d, column) for each sum of the thread whose place exists in [D, Dv].
  template <class F>
  __device__ __forceinline__ void each(const F& f) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        const int n = column() + i / 2 * 8 + lane_ % 4 * 2 + i % 2;
        if (row(r) < Plan::kD && n < Plan::kDv) f(r, i, row(r), n);
      }
    }
  }

  // Calls f(r, d) in one of the threads that have z of a row.
  template <class F>
  __device__ __forceinline__ void each_key(const F& f) {
    if constexpr (Plan::kNormalizer) {
      if (column() != 0 || lane_ % 4 != 0) return;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (row(r) < Plan::kD) f(r, row(r));
      }
    }
  }

  __device__ __forceinline__ void load_initial() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      z_[r][0] = z_[r][1] = 0;
#pragma unroll
      for (int i = 0; i < kSums; ++i) s_[r][i] = 0;
    }
    if (p_.state == nullptr) return;
    const int64_t* s = p_.state_stride;
    const float* from = static_cast<const float*>(p_.state) + sequence_ * s[0] + h_ * s[1];
    each([&](int r, int i, int d, int n) { s_[r][i] = __ldg(from + d * s[2] + n * s[3]); });
    each_key([&](int r, int d) { z_[r][0] = __ldg(from + d * s[2] + Plan::kDv * s[3]); });
  }

  __device__ __forceinline__ void store_final() {
    float* to =
        static_cast<float*>(p_.final_state) + (sequence_ * p_.H + h_) * int64_t(Plan::kD * kWidth);
    each_key([&](int r, int d) { to[d * kWidth + Plan::kDv] = z_[r][0]; });
    if (kWidth % 2 == 0 && Plan::kDv % 2 == 0) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int i = 0; i < kSums; i += 2) {
          const int n = column() + i / 2 * 8 + lane_ % 4 * 2;
          if (row(r) < Plan::kD && n < Plan::kDv) {
            *reinterpret_cast<float2*>(to + row(r) * kWidth + n) =
                make_float2(s_[r][i], s_[r][i + 1]);
          }
        }
      }
    } else {
      each([&](int r, int i, int d, int n) { to[d * kWidth + n] = s_[r][i]; });
    }
  }

  __device__ __forceinline__ void store_entry(int c) {
    const int64_t slot = first_slot(p_, params_.work, sequence_) + c;
    if (slot >= params_.work.slots) return;  // of lengths that are none
    each_key([&](int r, int d) { params_.work.keys[(slot * p_.H + h_) * kRows + d] = z_[r][0]; });
    auto* to = static_cast<StoredState<Plan>*>(params_.work.states) +
               (slot * p_.H + h_) * int64_t(kRows * kPitch) + column();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      auto* own = to + row(r) * kPitch;
      if constexpr (sizeof(*own) == 2) {
        store_sums<Elem, kColumns>(own, 1, true, row(r) < kRows, kPitch - column(), s_[r], lane_);
      } else {
#pragma unroll
        for (int i = 0; i < kSums; i += 2) {
          const int n = i / 2 * 8 + lane_ % 4 * 2;
          if (row(r) < kRows && column() + n < kPitch) {
            *reinterpret_cast<float2*>(own + n) = make_float2(s_[r][i], s_[r][i + 1]);
          }
        }
      }
    }
  }
};

}  // namespace ae
