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
#include "linear/scalar.cuh"
#include "linear/tiles.cuh"
#include "linear/unit.cuh"

namespace ae {

constexpr int kSolveElements = 2 * kLinearChunk * kLinearChunk;  // of a chunk and head

template <class Plan, class Fn>
class LinearSolve {
 public:
  static constexpr int kThreads = 2 * kLinearChunk;
  using Params = LinearParams<kLinearCaptures<Fn>>;

 private:
  using Elem = typename Plan::Elem;
  static constexpr bool kChannel = Plan::kDecay == DecayKind::kChannel;
  static constexpr bool kScalar = Plan::kDecay == DecayKind::kScalar;
  static constexpr int kRows = round_up_16(Plan::kD);
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

  __device__ __forceinline__ LinearSolve(const Params& params, char* shared, Small& small)
      : params_(params),
        p_(params.p),
        env_{params.cap, params.p.fault, params.p.L},
        shared_(shared),
        small_(small),
        lane_(int(threadIdx.x) % 32),
        warp_(int(threadIdx.x) / 32) {}

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

    fill(shared_ + kK, own.b, h, first, count);
    if constexpr (kChannel) fill(shared_, own.b, h, first, count);
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
      score(s);
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
  const Params& params_;
  const ae_linear_params& p_;
  const Env env_;
  char* const shared_;
  Small& small_;
  const int lane_, warp_;

  __device__ __forceinline__ void fill(char* tile, int64_t b, int64_t h, int64_t first,
                                       int count) const {
    const int64_t* s = p_.k_stride;
    const int64_t head = h / (p_.H / p_.Hk);
    const Window k{static_cast<const uint16_t*>(p_.k) + b * s[0] + head * s[1] + first * s[2], s[2],
                   s[3], count, Plan::kD};
    fill_k<Fn, KTile, Elem, kThreads>(env_, tile, k, {b, head, first, 0, 1});
  }

  __device__ __forceinline__ void score(float (&s)[2][kKeys]) const {
    const auto rows = read_a<KTile>(shared_ + kK, 16 * warp_, lane_);
    const auto keys = read_b<KTile>(shared_ + kK, lane_);
#pragma unroll
    for (int step = 0; step < kRows / 16; ++step) {
      uint32_t a[4];
      rows.load(0, 2 * step, a);
#pragma unroll
      for (int pair = 0; pair < kLinearChunk / 16; ++pair) {
        if (pair > warp_) break;
        uint32_t b[4];
        keys.load(16 * pair, 2 * step, b);
        multiply_add<Elem>(s[0], s[1], 2 * pair, a, b[0], b[1]);
        multiply_add<Elem>(s[0], s[1], 2 * pair + 1, a, b[2], b[3]);
      }
    }
  }

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
      const float scaled = sum * beta;
      const uint16_t high = narrow<Elem>(scaled);
      to[i * kLinearChunk] = high;
      to[(kLinearChunk + i) * kLinearChunk] = narrow<Elem>(scaled - widen<Elem>(high));
    }
  }
};

}  // namespace ae
