// The output pass: one thread block for each chunk, head and block of value columns, all at once.
// Each warp has 16 tokens of the chunk. Values are those of the tokens, or with the delta rule what
// they add to the state (linear/delta.cuh).
//
//   W = scale (Q K^T), decayed from token s to token t >= s, 0 above
//   O = scale (Q e^(decays so far)) S_chunk + W V
//   O = O / (scale (Q e^(decays so far)) z_chunk + W 1)              under a normalizer
//
// Decays and the scale multiply fp32 sums (linear/scalar.cuh), except those of channels, which have
// to multiply the operands (linear/channel.cuh).
#pragma once
#include "linear/channel.cuh"
#include "linear/pass.cuh"
#include "linear/scalar.cuh"

namespace ae {

template <class Plan, class Fn>
class LinearOutputs : public LinearPass<Plan, Fn> {
  using Pass = LinearPass<Plan, Fn>;
  using Pass::kWarps, Pass::kRows, Pass::kPitch, Pass::kChannel, Pass::kScalar;
  using Pass::params_, Pass::p_, Pass::env_, Pass::shared_, Pass::lane_, Pass::warp_;
  using typename Pass::Elem;
  static constexpr int kColumns = Plan::kValueBlock, kSums = kColumns / 4;
  static constexpr int kTilesV = (Plan::kDv + kColumns - 1) / kColumns;
  static constexpr int kKeys = kLinearChunk / 4;  // of a row and thread
  using QTile = SharedTile<kLinearChunk, Plan::kD>;
  using VTile = SharedTile<kLinearChunk, kColumns>;
  using STile = SharedTile<kRows, kColumns>;
  using Channels = ChannelDecay<Plan, kChannel>;

 public:
  // One after the other in dynamic shared memory.
  static constexpr int kK = QTile::kBytes, kV = kK + QTile::kBytes, kS = kV + VTile::kBytes;
  static constexpr int kDecays = kS + STile::kBytes;
  static constexpr int kBytes = kDecays + Channels::kBytes;
  static_assert(Plan::kOutputBytes == kBytes, "the plan's shared memory total is wrong");

  struct Small {
    ScalarDecay<Plan> scalar;
    float tops[kWarps];
    alignas(8) float z[Plan::kNormalizer ? kRows : 2];
    int64_t sequence;
  };

  __device__ __forceinline__ LinearOutputs(const typename Pass::Params& params, char* shared,
                                           Small& small)
      : Pass(params, shared), small_(small) {}

  __device__ __forceinline__ void run() {
    const unsigned index = blockIdx.x, head = index / kTilesV;
    const int column = int(index % kTilesV) * kColumns;
    const int64_t h = head % unsigned(p_.H), slot = head / unsigned(p_.H);
    if (threadIdx.x == 0) small_.sequence = sequence_of(p_, params_.work, slot);
    __syncthreads();
    const int64_t sequence = small_.sequence;
    const LinearSequence own(p_, sequence);
    const int64_t c = slot - first_slot(p_, params_.work, sequence);
    if (c < 0 || c >= own.chunks()) return;
    const int64_t first = own.first + c * kLinearChunk;
    const int count = own.count(int(c));
    const bool has_state = c > 0 || p_.state != nullptr;

    this->template fill_queries<QTile>(shared_, own.b, h, first, count);
    this->template fill_keys<QTile>(shared_ + kK, own.b, h, first, count);
    cute::cp_async_fence();
    if constexpr (Plan::kDelta) {
      const auto* values = static_cast<const uint16_t*>(params_.work.values) +
                           (slot * p_.H + h) * int64_t(kLinearChunk * kPitch) + column;
      const Window v{values, kPitch, 1, kLinearChunk, kPitch - column};
      fill_window<VTile, Elem, Pass::kThreads>(shared_ + kV, v, NoHook{});
    } else {
      this->template fill_values<VTile>(shared_ + kV, own.b, h, first, count, column);
    }
    float state_scale = 1;
    if (has_state) state_scale = fill_state(slot, h, column);
    if (Plan::kNormalizer && has_state) fill_sum(slot, h);
    cute::cp_async_fence();
    if constexpr (kScalar) {
      if (warp_ == 0) small_.scalar.template fill<Fn>(env_, p_, own.b, h, first, count);
    }
    if constexpr (kChannel) {
      Channels::template fill<Fn>(env_, p_, shared_ + kDecays, own.b, h, first, count);
    }
    cute::cp_async_wait<1>();
    __syncthreads();

    float o[2][kSums] = {};
    uint32_t w[kLinearChunk / 16][4], own_w[4] = {};  // those with the warp's own tokens
    float sums[2] = {};  // of the rows' weights, what this lane has of them
    const float scale = float(p_.scale);
    if constexpr (kChannel) {
      float s[2][kKeys] = {};
      Channels::template begin<Elem, QTile>(shared_, shared_ + kK, shared_ + kDecays, s, warp_,
                                            lane_);
      cute::cp_async_wait<0>();
      __syncthreads();  // of K, what each warp has weighed; V and S are there
      Channels::template finish<Elem, QTile, STile>(shared_, shared_ + kK, shared_ + kDecays,
                                                    shared_ + kS, has_state, s, o, small_.z, sums,
                                                    warp_, lane_);
      sums[0] *= scale, sums[1] *= scale;
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        o[0][i] *= scale * state_scale;
        o[1][i] *= scale * state_scale;
      }
      weigh(scale, s, sums);
      pack(s, w, own_w);
    } else {
      float s[2][kKeys] = {};
      multiply_rows<Elem, QTile>(shared_, shared_ + kK, s, warp_, lane_);
      if (has_state) {
        sum_keys(sums);
#pragma unroll
        for (int r = 0; r < 2; ++r) sums[r] *= scale * small_.scalar.since_start(row(r));
      }
      weigh(scale, s, sums);
      pack(s, w, own_w);
      cute::cp_async_wait<0>();
      __syncthreads();
      if (has_state) {
        multiply_state<Elem, QTile, STile>(shared_, shared_ + kS, o, warp_, lane_);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float factor = state_scale * scale * small_.scalar.since_start(row(r));
#pragma unroll
          for (int i = 0; i < kSums; ++i) o[r][i] *= factor;
        }
      }
    }

    const auto v = read_b_transposed<VTile>(shared_ + kV, lane_);
#pragma unroll
    for (int step = 0; step < kLinearChunk / 16; ++step) {
      if (step >= warp_) break;  // own tokens, and later ones
      multiply_columns<Elem>(w[step], v, 16 * step, 0, o);
    }
    multiply_own<Elem, VTile>(own_w, shared_ + kV, o, warp_, lane_);
    if constexpr (Plan::kNormalizer) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int step = 1; step < 4; step *= 2) sums[r] += __shfl_xor_sync(~0u, sums[r], step);
        const float sum = away_from_zero(sums[r]);
#pragma unroll
        for (int i = 0; i < kSums; ++i) o[r][i] /= sum;
      }
    }
    store(own.b, h, first, count, column, o);
  }

 private:
  Small& small_;

  // The token of the thread's row r.
  __device__ __forceinline__ int row(int r) const { return 16 * warp_ + lane_ / 4 + 8 * r; }

  // ---- filling shared memory ----
  // Returns what a product with the tile is to be multiplied by. An fp16 tile is scaled by a power
  // of two, so that its largest element lies in [2^13, 2^14).
  __device__ __forceinline__ float fill_state(int64_t slot, int64_t h, int column) const {
    const int64_t at = (slot * p_.H + h) * int64_t(kRows * kPitch) + column;
    const auto* from = static_cast<const StoredState<Plan>*>(params_.work.states) + at;
    if constexpr (sizeof(*from) == 2) {
      const Window state{from, kPitch, 1, kRows, kPitch - column};
      fill_window<STile, Elem, Pass::kThreads>(shared_ + kS, state, NoHook{});
      return 1;
    } else {
      constexpr int kPairs = kColumns / 2;
      const auto pair_at = [&](int i) {
        const int d = i / kPairs, n = i % kPairs * 2;
        return column + n < kPitch ? *reinterpret_cast<const float2*>(from + d * kPitch + n)
                                   : make_float2(0.0f, 0.0f);
      };
      float top = 0;
      for (int i = int(threadIdx.x); i < kRows * kPairs; i += Pass::kThreads) {
        const float2 x = pair_at(i);
        top = fmaxf(top, fmaxf(size_of(x.x), size_of(x.y)));
      }
      const Scale scale = scale_of(block_top<kWarps>(top, small_.tops));
      for (int i = int(threadIdx.x); i < kRows * kPairs; i += Pass::kThreads) {
        const float2 x = pair_at(i);
        const int n = i % kPairs * 2;
        *reinterpret_cast<uint32_t*>(shared_ + kS + STile::at(i / kPairs, n / kChunkElements) +
                                     n % kChunkElements * 2) =
            pack2<Elem>(x.x * scale.down, x.y * scale.down);
      }
      return scale.up;
    }
  }

  __device__ __forceinline__ void fill_sum(int64_t slot, int64_t h) const {
    const float* from = params_.work.keys + (slot * p_.H + h) * kRows;
    for (int d = int(threadIdx.x); d < kRows; d += Pass::kThreads) {
      small_.z[d] = d < Plan::kD ? from[d] : 0.0f;
    }
  }

  // ---- products ----
  // What a lane has of the product of the queries with z.
  __device__ __forceinline__ void sum_keys(float (&sums)[2]) const {
    if constexpr (Plan::kNormalizer) {
      const auto q = read_a<QTile>(shared_, 16 * warp_, lane_);
#pragma unroll 1
      for (int step = 0; step < kRows / 16; ++step) {
        uint32_t a[4];
        q.load(0, 2 * step, a);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* z = small_.z + 16 * step + i / 2 * 8 + lane_ % 4 * 2;
          sums[i % 2] +=
              widen<Elem>(uint16_t(a[i])) * z[0] + widen<Elem>(uint16_t(a[i] >> 16)) * z[1];
        }
      }
    }
  }

  // Tokens that are not later, by what is left of them. Channel decays are in the scores already.
  __device__ __forceinline__ void weigh(float scale, float (&s)[2][kKeys], float (&sums)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int t = row(r);
#pragma unroll
      for (int c = 0; c < kKeys; ++c) {
        const int key = c / 2 * 8 + c % 2 + lane_ % 4 * 2;
        float factor = scale;
        if constexpr (kScalar) factor *= small_.scalar.between(key, t);
        s[r][c] = key <= t ? s[r][c] * factor : 0.0f;
        if constexpr (Plan::kNormalizer) sums[r] += s[r][c];
      }
    }
  }

  __device__ __forceinline__ void pack(const float (&s)[2][kKeys],
                                       uint32_t (&w)[kLinearChunk / 16][4],
                                       uint32_t (&own)[4]) const {
#pragma unroll
    for (int step = 0; step < kLinearChunk / 16; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int c = 4 * step + i / 2 * 2;
        const uint32_t pair = pack2<Elem>(s[i % 2][c], s[i % 2][c + 1]);
        w[step][i] = pair;
        own[i] = step == warp_ ? pair : own[i];
      }
    }
  }

  __device__ __forceinline__ void store(int64_t b, int64_t h, int64_t first, int count, int column,
                                        float (&o)[2][kSums]) const {
    const int64_t* s = p_.out_stride;
    uint16_t* base =
        static_cast<uint16_t*>(p_.out) + b * s[0] + h * s[1] + first * s[2] + column * s[3];
    const int columns = Plan::kDv - column;
    const bool vectors = Window{base, s[2], s[3], count, columns}.vectors();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool exists = row(r) < count;
      if constexpr (Fn::kHasOutMod) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
          const int d = i / 2 * 8 + lane_ % 4 * 2 + i % 2;
          if (exists && d < columns) {
            o[r][i] = Fn::out_mod(env_, HookAt{b, h, first + row(r), column + d, 1}, o[r][i]);
          }
        }
      }
      store_sums<Elem, kColumns>(base + row(r) * s[2], s[3], vectors, exists, columns, o[r], lane_);
    }
  }
};

}  // namespace ae
