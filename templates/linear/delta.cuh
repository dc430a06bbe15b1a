// The state pass of the delta rule: a thread block for each sequence, head and block of value
// columns walks the chunks with its columns of S in registers, all rows of them.
//
//   for each chunk:
//     states[chunk] = S
//     R  = V - (K e^(decays so far)) S
//     V' = solved R                                   values[chunk] = V', for the output pass
//     S  = e^(sum of its decays) S + (K e^(the decays after each token))^T V'
//
// R and its solution take part in products as two 16-bit numbers each, so that they are rounded
// once alone: where V' becomes an operand.
#pragma once
#include "linear/solve.cuh"

namespace ae {

template <class Plan, class Fn>
class LinearDeltaStates : public LinearPass<Plan, Fn> {
  using Pass = LinearPass<Plan, Fn>;
  using Pass::kWarps, Pass::kRows, Pass::kPitch, Pass::kWidth, Pass::kChannel, Pass::kScalar;
  using Pass::params_, Pass::p_, Pass::env_, Pass::shared_, Pass::lane_, Pass::warp_;
  using typename Pass::Elem;
  static constexpr int kColumns = 32;
  static constexpr int kBlocks = (kRows / 16 + kWarps - 1) / kWarps;  // of 16 rows of S, of a warp
  static constexpr int kSums = kColumns / 4;
  static constexpr int kTiles = (Plan::kDv + kColumns - 1) / kColumns;
  using KTile = SharedTile<kLinearChunk, Plan::kD>;
  using VTile = SharedTile<kLinearChunk, kColumns>;
  using STile = SharedTile<kRows, kColumns>;
  using TTile = SharedTile<kLinearChunk, kLinearChunk>;

 public:
  // One after the other in dynamic shared memory: K by the decays after each token, K by those so
  // far (the same without channel decays), V, the inverse in two parts, S, R in two parts.
  static constexpr int kBefore = kChannel ? KTile::kBytes : 0, kV = kBefore + KTile::kBytes;
  static constexpr int kT = kV + VTile::kBytes, kS = kT + 2 * TTile::kBytes;
  static constexpr int kR = kS + STile::kBytes, kBytes = kR + 2 * VTile::kBytes;

  struct Small {
    float before[kLinearChunk], after[kLinearChunk];  // scalar decay
    float keep[kRows];                                // channel decay
    float tops[kWarps];
  };

  __device__ __forceinline__ LinearDeltaStates(const typename Pass::Params& params, char* shared,
                                               Small& small)
      : Pass(params, shared), small_(small) {
    const unsigned index = blockIdx.x, head = index / kTiles;
    column_ = int(index % kTiles) * kColumns;
    h_ = head % unsigned(p_.H);
    sequence_ = head / unsigned(p_.H);
  }

  __device__ __forceinline__ void run() {
    const LinearSequence own(p_, sequence_);
    const int chunks = own.chunks();
    const int64_t slots = first_slot(p_, params_.work, sequence_);
    load_initial();
#pragma unroll 1
    for (int c = 0; c < chunks; ++c) {
      const int64_t slot = slots + c;
      if (slot >= params_.work.slots) break;  // of lengths that are none
      fill(own, c, slot);
      cute::cp_async_fence();
      if constexpr (kScalar) {
        if (warp_ == 0) weigh_tokens(own, c);
      }
      const float up = store_entry(slot);
      cute::cp_async_wait<0>();
      __syncthreads();
      if constexpr (kChannel) weigh_channels(own, c);
      correct(up);
      __syncthreads();  // R is there
      solve(slot);
      __syncthreads();  // and its solution in its place
      if (c + 1 < chunks || p_.final_state != nullptr) add();
      __syncthreads();  // nobody reads what the next chunk overwrites
    }
    if (p_.final_state != nullptr) store_final();
  }

 private:
  Small& small_;
  int column_;
  int64_t h_, sequence_;
  float s_[kBlocks][2][kSums];
  float z_[kBlocks][2][2];  // its columns are equal

  __device__ __forceinline__ int block_row(int block) const {
    return 16 * (block * kWarps + warp_);
  }
  __device__ __forceinline__ int row(int block, int r) const {
    return block_row(block) + lane_ / 4 + 8 * r;
  }
  __device__ __forceinline__ int token(int r) const { return 16 * warp_ + lane_ / 4 + 8 * r; }
  // Two sums of a thread in a tile of the block's columns.
  template <class Tile>
  __device__ __forceinline__ uint32_t& pair(char* tile, int row, int i) const {
    return *reinterpret_cast<uint32_t*>(tile + Tile::at(row, i / 2) + lane_ % 4 * 4);
  }

  __device__ __forceinline__ void fill(const LinearSequence& own, int c, int64_t slot) const {
    const int64_t first = own.first + int64_t(c) * kLinearChunk;
    this->template fill_keys<KTile>(shared_, own.b, h_, first, own.count(c));
    this->template fill_values<VTile>(shared_ + kV, own.b, h_, first, own.count(c), column_);
    const auto* solved = static_cast<const uint16_t*>(params_.work.inverse) +
                         (slot * p_.H + h_) * int64_t(kSolveElements);
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const Window t{solved + part * kLinearChunk * kLinearChunk, kLinearChunk, 1, kLinearChunk,
                     kLinearChunk};
      fill_window<TTile, Elem, Pass::kThreads>(shared_ + kT + part * TTile::kBytes, t, NoHook{});
    }
  }

  // One warp: lane l has tokens 2 l and 2 l + 1.
  __device__ __forceinline__ void weigh_tokens(const LinearSequence& own, int c) {
    const int64_t first = own.first + int64_t(c) * kLinearChunk;
    float g[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int t = 2 * lane_ + i;
      g[i] = t < own.count(c) ? log2_decay<Plan, Fn>(env_, p_, own.b, h_, first + t, 0) : 0.0f;
    }
    float up_to = g[0] + g[1], from = up_to;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const float less = __shfl_up_sync(~0u, up_to, step);
      const float more = __shfl_down_sync(~0u, from, step);
      if (lane_ >= step) up_to += less;
      if (lane_ + step < 32) from += more;
    }
    const float less = __shfl_up_sync(~0u, up_to, 1), more = __shfl_down_sync(~0u, from, 1);
    const float before = lane_ == 0 ? 0.0f : less, after = lane_ == 31 ? 0.0f : more;
    small_.before[2 * lane_] = ex2(before + g[0]);
    small_.before[2 * lane_ + 1] = ex2(before + g[0] + g[1]);
    small_.after[2 * lane_] = ex2(after + g[1]);
    small_.after[2 * lane_ + 1] = ex2(after);
  }

  // Each thread has some channels of all tokens.
  __device__ __forceinline__ void weigh_channels(const LinearSequence& own, int c) {
    const int64_t first = own.first + int64_t(c) * kLinearChunk;
    const int count = own.count(c);
    for (int d = int(threadIdx.x); d < kRows; d += Pass::kThreads) {
      const auto decay = [&](int t) {
        return t < count && d < Plan::kD ? log2_decay<Plan, Fn>(env_, p_, own.b, h_, first + t, d)
                                         : 0.0f;
      };
      const auto at = [&](int t) {
        return KTile::at(t, d / kChunkElements) + d % kChunkElements * 2;
      };
      float sum = 0;
#pragma unroll 8
      for (int t = 0; t < kLinearChunk; ++t) {
        sum += decay(t);
        const auto k = *reinterpret_cast<const uint16_t*>(shared_ + at(t));
        *reinterpret_cast<uint16_t*>(shared_ + kBefore + at(t)) =
            narrow<Elem>(widen<Elem>(k) * ex2(sum));
      }
      small_.keep[d] = ex2(sum);
      sum = 0;
#pragma unroll 8
      for (int t = kLinearChunk - 1; t >= 0; --t) {
        auto& k = *reinterpret_cast<uint16_t*>(shared_ + at(t));
        k = narrow<Elem>(widen<Elem>(k) * ex2(sum));
        sum += decay(t);
      }
    }
    __syncthreads();
  }

  // R, each warp of its tokens, as two numbers. `up`: what products with S are to be multiplied by.
  __device__ __forceinline__ void correct(float up) {
    float r_[2][kSums] = {};
    multiply_state<Elem, KTile, STile>(shared_ + kBefore, shared_ + kS, r_, warp_, lane_);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int t = token(r);
      const float factor = kScalar ? up * small_.before[t] : up;
#pragma unroll
      for (int i = 0; i < kSums; i += 2) {
        const uint32_t v = pair<VTile>(shared_ + kV, t, i);
        const float low = widen<Elem>(uint16_t(v)) - r_[r][i] * factor;
        const float high = widen<Elem>(uint16_t(v >> 16)) - r_[r][i + 1] * factor;
        put_parts(t, i, low, high);
      }
    }
  }
  __device__ __forceinline__ void put_parts(int t, int i, float low, float high) const {
    const uint32_t rounded = pack2<Elem>(low, high);
    pair<VTile>(shared_ + kR, t, i) = rounded;
    pair<VTile>(shared_ + kR + VTile::kBytes, t, i) = pack2<Elem>(
        low - widen<Elem>(uint16_t(rounded)), high - widen<Elem>(uint16_t(rounded >> 16)));
  }

  // V' of each warp's tokens, to global memory, and by the decays after them to R's place.
  __device__ __forceinline__ void solve(int64_t slot) {
    float v_[2][kSums] = {};
#pragma unroll
    for (int product = 0; product < 3; ++product) {  // high high, high low, low high
      const char* t = shared_ + kT + (product == 2 ? TTile::kBytes : 0);
      const char* r = shared_ + kR + (product == 1 ? VTile::kBytes : 0);
      const auto rows = read_a<TTile>(t, 16 * warp_, lane_);
      const auto values = read_b_transposed<VTile>(r, lane_);
      uint32_t a[4];
#pragma unroll
      for (int step = 0; step < kLinearChunk / 16; ++step) {
        if (step >= warp_) break;
        rows.load(0, 2 * step, a);
        multiply_columns<Elem>(a, values, 16 * step, 0, v_);
      }
      read_a<TTile>(t, 16 * warp_, lane_).load(0, 2 * warp_, a);
      multiply_own<Elem, VTile>(a, r, v_, warp_, lane_);
    }
    __syncthreads();  // R has been read
    auto* to = static_cast<uint16_t*>(params_.work.values) +
               (slot * p_.H + h_) * int64_t(kLinearChunk * kPitch) + column_;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int t = token(r);
      store_sums<Elem, kColumns>(to + t * kPitch, 1, true, true, kPitch - column_, v_[r], lane_);
      const float after = kScalar ? small_.after[t] : 1.0f;
#pragma unroll
      for (int i = 0; i < kSums; i += 2) {
        pair<VTile>(shared_ + kR, t, i) = pack2<Elem>(v_[r][i] * after, v_[r][i + 1] * after);
      }
    }
  }

  __device__ __forceinline__ void add() {
    const auto k = read_a_transposed<KTile>(shared_, lane_);
    const auto v = read_b_transposed<VTile>(shared_ + kR, lane_);
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      if (block_row(block) >= kRows) break;
      if constexpr (kHasDecay<Plan>) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float keep =
              kChannel ? small_.keep[row(block, r)] : small_.before[kLinearChunk - 1];
#pragma unroll
          for (int i = 0; i < kSums; ++i) s_[block][r][i] *= keep;
          z_[block][r][0] *= keep, z_[block][r][1] *= keep;
        }
      }
#pragma unroll
      for (int step = 0; step < kLinearChunk / 16; ++step) {
        uint32_t a[4];
        k.load_transposed(16 * step, block_row(block) / kChunkElements, a);
        if constexpr (Plan::kNormalizer) {
          const float* w = small_.after + 16 * step + lane_ % 4 * 2;
          const uint32_t low = kScalar ? pack2<Elem>(w[0], w[1]) : pack2<Elem>(1.0f, 1.0f);
          const uint32_t high = kScalar ? pack2<Elem>(w[8], w[9]) : low;
          multiply_add<Elem>(z_[block][0], z_[block][1], 0, a, low, high);
        }
        multiply_columns<Elem>(a, v, 16 * step, 0, s_[block]);
      }
    }
  }

  // ---- states in global memory ----
  // Calls f(block, r, d) for each row of the thread that exists.
  template <class F>
  __device__ __forceinline__ void each_row(int rows, const F& f) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (row(block, r) < rows) f(block, r, row(block, r));
      }
    }
  }
  __device__ __forceinline__ bool has_keys() const {
    return Plan::kNormalizer && column_ == 0 && lane_ % 4 == 0;
  }
  __device__ __forceinline__ int column_of(int i) const {
    return column_ + i / 2 * 8 + lane_ % 4 * 2 + i % 2;
  }

  __device__ __forceinline__ void load_initial() {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        z_[block][r][0] = z_[block][r][1] = 0;
#pragma unroll
        for (int i = 0; i < kSums; ++i) s_[block][r][i] = 0;
      }
    }
    if (p_.state == nullptr) return;
    const int64_t* s = p_.state_stride;
    const float* from = static_cast<const float*>(p_.state) + sequence_ * s[0] + h_ * s[1];
    each_row(Plan::kD, [&](int block, int r, int d) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        const int n = column_of(i);
        if (n < Plan::kDv) s_[block][r][i] = __ldg(from + d * s[2] + n * s[3]);
      }
      if (has_keys()) z_[block][r][0] = __ldg(from + d * s[2] + Plan::kDv * s[3]);
    });
  }

  __device__ __forceinline__ void store_final() {
    float* to =
        static_cast<float*>(p_.final_state) + (sequence_ * p_.H + h_) * int64_t(Plan::kD * kWidth);
    each_row(Plan::kD, [&](int block, int r, int d) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        const int n = column_of(i);
        if (n < Plan::kDv) to[d * kWidth + n] = s_[block][r][i];
      }
      if (has_keys()) to[d * kWidth + Plan::kDv] = z_[block][r][0];
    });
  }

  // S as an operand in shared memory, and for the output pass. Returns what products with it are to
  // be multiplied by: fp16 cannot hold it otherwise.
  __device__ __forceinline__ float store_entry(int64_t slot) {
    const int64_t at = slot * p_.H + h_;
    auto* to = static_cast<StoredState<Plan>*>(params_.work.states) + at * (kRows * kPitch);
    float down = 1, up = 1;
    if constexpr (sizeof(*to) != 2) {
      float top = 0;
      each_row(kRows, [&](int block, int r, int) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) top = fmaxf(top, size_of(s_[block][r][i]));
      });
      const Scale scale = scale_of(block_top<kWarps>(top, small_.tops));
      down = scale.down, up = scale.up;
    }
    each_row(kRows, [&](int block, int r, int d) {
#pragma unroll
      for (int i = 0; i < kSums; i += 2) {
        const float low = s_[block][r][i], high = s_[block][r][i + 1];
        pair<STile>(shared_ + kS, d, i) = pack2<Elem>(low * down, high * down);
        const int n = column_of(i);
        if (n >= kPitch) continue;
        auto* own = to + d * kPitch + n;
        if constexpr (sizeof(*own) == 2) {
          *reinterpret_cast<uint32_t*>(own) = pack2<Elem>(low, high);
        } else {
          *reinterpret_cast<float2*>(own) = make_float2(low, high);
        }
      }
      if (has_keys()) params_.work.keys[at * kRows + d] = z_[block][r][0];
    });
    return up;
  }
};

}  // namespace ae
