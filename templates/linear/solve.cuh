// The delta rule within chunks. A token's own value is what it corrects:
//
//   v'_t = beta_t (v_t - k_t^T S_t),  S_t what is left of the state before token t
//
// so those of a chunk are V' = (I + A)^-1 diag(beta) (V - (K e^(decays so far)) S_chunk), with
// A_ts = beta_t (k_t . k_s) decayed from s to t, for s < t. This pass finds (I + A)^-1 diag(beta)
// of all chunks at once, in fp32; it is kept as two 16-bit numbers, the second what the first
// lacks.
#pragma once
#include "linear/channel.cuh"
#include "linear/pass.cuh"
#include "linear/scalar.cuh"

namespace ae {

constexpr int kSolveElements = 2 * kLinearChunk * kLinearChunk;  // of a chunk and head

template <class Plan, class Fn>
class LinearSolve : public LinearPass<Plan, Fn> {
  using Pass = LinearPass<Plan, Fn>;
  using Pass::kChannel, Pass::kScalar;
  using Pass::params_, Pass::p_, Pass::env_, Pass::shared_, Pass::lane_, Pass::warp_;
  using typename Pass::Elem;
  static constexpr int kKeys = kLinearChunk / 4;  // of a row and thread
  using KTile = SharedTile<kLinearChunk, Plan::kD>;
  using Channels = ChannelDecay<Plan, kChannel>;

 public:
  // One after the other in dynamic shared memory. Channel decays change K in place, so the rows
  // have a copy.
  static constexpr int kK = kChannel ? KTile::kBytes : 0, kDecays = kK + KTile::kBytes;
  static constexpr int kBytes = kDecays + Channels::kBytes;

  struct Small {
    alignas(16) float a[kLinearChunk][kLinearChunk + 4];
    ScalarDecay<Plan> scalar;
    int64_t sequence;
  };

  __device__ __forceinline__ LinearSolve(const typename Pass::Params& params, char* shared,
                                         Small& small)
      : Pass(params, shared), small_(small) {}

  __device__ __forceinline__ void run() {
    const int64_t h = blockIdx.x % unsigned(p_.H), slot = blockIdx.x / unsigned(p_.H);
    if (threadIdx.x == 0) small_.sequence = sequence_of(p_, params_.work, slot);
    __syncthreads();
    const int64_t sequence = small_.sequence;
    const LinearSequence own(p_, sequence);
    const int64_t c = slot - first_slot(p_, params_.work, sequence);
    if (c < 0 || c >= own.chunks()) return;
    const int64_t first = own.first + c * kLinearChunk;
    const int count = own.count(int(c));

    this->template fill_keys<KTile>(shared_ + kK, own.b, h, first, count);
    if constexpr (kChannel) this->template fill_keys<KTile>(shared_, own.b, h, first, count);
    cute::cp_async_fence();
    if constexpr (kScalar) {
      if (warp_ == 0) small_.scalar.template fill<Fn>(env_, p_, own.b, h, first, count);
    }
    if constexpr (kChannel) {
      Channels::template fill<Fn>(env_, p_, shared_ + kDecays, own.b, h, first, count);
    }
    cute::cp_async_wait<0>();
    __syncthreads();

    float s[2][kKeys] = {};
    if constexpr (kChannel) {
      Channels::template begin<Elem, KTile>(shared_, shared_ + kK, shared_ + kDecays, s, warp_,
                                            lane_);
      __syncthreads();  // of K, what each warp has weighed
      float none[2][4], sums[2];
      Channels::template finish<Elem, KTile, KTile>(shared_, shared_ + kK, shared_ + kDecays,
                                                    shared_, false, s, none, nullptr, sums, warp_,
                                                    lane_);
    } else {
      multiply_rows<Elem, KTile>(shared_ + kK, shared_ + kK, s, warp_, lane_);
    }
    const int64_t* bs = p_.beta_stride;
    const auto beta = [&](int t) {
      return t < count ? float(load_element<typename Plan::Beta>(
                             p_.beta, own.b * bs[0] + h * bs[1] + (first + t) * bs[2]))
                       : 0.0f;
    };
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int t = 16 * warp_ + lane_ / 4 + 8 * r;
      const float factor = beta(t);
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        const int key = i / 2 * 8 + i % 2 + lane_ % 4 * 2;
        float left = 1;
        if constexpr (kScalar) left = small_.scalar.between(key, t);
        small_.a[t][key] = key < t ? factor * s[r][i] * left : 0.0f;
      }
    }
    __syncthreads();
    if (threadIdx.x < kLinearChunk) {
      invert(int(threadIdx.x), beta(int(threadIdx.x)), slot, h);
    }
  }

 private:
  Small& small_;

  // One column of the inverse, by forward substitution.
  __device__ __forceinline__ void invert(int column, float beta, int64_t slot, int64_t h) const {
    float x[kLinearChunk];
    auto* to = static_cast<uint16_t*>(params_.work.inverse) +
               (slot * p_.H + h) * int64_t(kSolveElements) + column;
#pragma unroll
    for (int i = 0; i < kLinearChunk; ++i) {
      float sum = i == column ? 1.0f : 0.0f;
#pragma unroll
      for (int j = 0; j < i; ++j) sum = fmaf(-small_.a[i][j], x[j], sum);
      x[i] = sum;
      const float scaled = i < column ? 0.0f : sum * beta;  // though either is Inf or NaN
      const uint16_t high = narrow<Elem>(scaled);
      to[i * kLinearChunk] = high;
      to[(kLinearChunk + i) * kLinearChunk] = narrow<Elem>(scaled - widen<Elem>(high));
    }
  }
};

}  // namespace ae
