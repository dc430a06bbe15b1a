// Few tokens of each sequence, as in decoding: the recurrence itself. A thread block has kColumns
// columns of one head's state in registers: one read and one write of it, whatever the tokens.
//
//   for each token:  S = e^g S;  S += k v^T, or by the delta rule k (beta (v - k^T S))^T;  o =
//   scale q^T S
//
// Sums over the channels are in fp32, in one order: lanes, then warps.
#pragma once
#include "linear/unit.cuh"

namespace ae {

template <class Plan, class Fn>
class LinearStep {
 public:
  static constexpr int kThreads = 128, kColumns = 32;
  using Params = LinearParams<kLinearCaptures<Fn>>;

 private:
  using Elem = typename Plan::Elem;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kVector = 4;                      // columns of a thread: 16 bytes
  static constexpr int kLanes = kColumns / kVector;      // that share a row
  static constexpr int kRowsAtOnce = kThreads / kLanes;  // of all warps
  static constexpr int kRows = (Plan::kD + kRowsAtOnce - 1) / kRowsAtOnce;  // of a thread
  static constexpr int kD = kRows * kRowsAtOnce;
  static constexpr int kTiles = (Plan::kDv + kColumns - 1) / kColumns;
  static constexpr int kWidth = kStateWidth<Plan>;
  static constexpr bool kChannel = Plan::kDecay == DecayKind::kChannel;
  static constexpr int kZ = Plan::kNormalizer ? (Plan::kD + kThreads - 1) / kThreads : 1;

 public:
  struct Small {
    alignas(16) float sums[2][kWarps][kColumns];  // of k^T S, and of q^T S
    float q[kD], k[kD], v[kColumns];
    float decay[kChannel ? kD : 1];
    float z[kWarps];
  };

  __device__ __forceinline__ LinearStep(const Params& params, Small& small)
      : p_(params.p),
        env_{params.cap, params.p.fault, params.p.L},
        small_(small),
        thread_(int(threadIdx.x)),
        lane_(thread_ % 32),
        warp_(thread_ / 32) {
    const unsigned index = blockIdx.x, head = index / kTiles;
    first_column_ = int(index % kTiles) * kColumns;
    h_ = head % unsigned(p_.H);
    sequence_ = head / unsigned(p_.H);
  }

  __device__ __forceinline__ void run() {
    const LinearSequence own(p_, sequence_);
    load();
#pragma unroll 1
    for (int64_t t = own.first; t < own.last; ++t) token(own.b, t);
    if (p_.final_state != nullptr) store();
  }

 private:
  const ae_linear_params& p_;
  const Env env_;
  Small& small_;
  const int thread_, lane_, warp_;
  int first_column_;
  int64_t h_, sequence_;
  float s_[kRows][kVector];
  float z_[kZ];

  // Channel of the thread's row i, and its first column in the block.
  __device__ __forceinline__ int row(int i) const { return kRowsAtOnce * i + thread_ / kLanes; }
  __device__ __forceinline__ int column() const { return thread_ % kLanes * kVector; }

  // ---- the state ----
  // Rows start at multiples of 16 bytes.
  __device__ __forceinline__ static bool vectors(const float* data, int64_t stride) {
    return Plan::kDv % kVector == 0 && stride % kVector == 0 &&
           reinterpret_cast<uintptr_t>(data) % 16 == 0;
  }

  __device__ __forceinline__ void load() {
    const int64_t* s = p_.state_stride;
    const float* from = static_cast<const float*>(p_.state) + sequence_ * s[0] + h_ * s[1];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int c = 0; c < kVector; ++c) s_[i][c] = 0;
    }
#pragma unroll
    for (int i = 0; i < kZ; ++i) z_[i] = 0;
    if (p_.state == nullptr) return;
    const int first = first_column_ + column();
    if (s[3] == 1 && vectors(from, s[2])) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (row(i) >= Plan::kD || first >= Plan::kDv) continue;
        const float4 x = __ldg(reinterpret_cast<const float4*>(from + row(i) * s[2] + first));
        s_[i][0] = x.x, s_[i][1] = x.y, s_[i][2] = x.z, s_[i][3] = x.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int c = 0; c < kVector; ++c) {
          if (row(i) < Plan::kD && first + c < Plan::kDv) {
            s_[i][c] = __ldg(from + row(i) * s[2] + (first + c) * s[3]);
          }
        }
      }
    }
    if constexpr (Plan::kNormalizer) {
#pragma unroll
      for (int i = 0; i < kZ; ++i) {
        const int d = thread_ + i * kThreads;
        if (d < Plan::kD) z_[i] = __ldg(from + d * s[2] + Plan::kDv * s[3]);
      }
    }
  }

  __device__ __forceinline__ void store() const {
    float* to =
        static_cast<float*>(p_.final_state) + (sequence_ * p_.H + h_) * int64_t(Plan::kD * kWidth);
    const int first = first_column_ + column();
    const bool whole = vectors(to, kWidth);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (row(i) >= Plan::kD) continue;
      float* own = to + row(i) * kWidth + first;
      if (whole) {
        if (first < Plan::kDv) {
          *reinterpret_cast<float4*>(own) = make_float4(s_[i][0], s_[i][1], s_[i][2], s_[i][3]);
        }
        continue;
      }
#pragma unroll
      for (int c = 0; c < kVector; ++c) {
        if (first + c < Plan::kDv) own[c] = s_[i][c];
      }
    }
    if constexpr (Plan::kNormalizer) {
      if (first_column_ != 0) return;
#pragma unroll
      for (int i = 0; i < kZ; ++i) {
        const int d = thread_ + i * kThreads;
        if (d < Plan::kD) to[d * kWidth + Plan::kDv] = z_[i];
      }
    }
  }

  // ---- one token ----
  __device__ __forceinline__ static float element(const void* data, const int64_t* s, int64_t b,
                                                  int64_t h, int64_t t, int64_t d) {
    return load_element<Elem>(data, b * s[0] + h * s[1] + t * s[2] + d * s[3]);
  }

  // Its operands, after their hooks, into shared memory; zeros where there are none.
  __device__ __forceinline__ void fetch(int64_t b, int64_t t) const {
    const int64_t head = h_ / (p_.H / p_.Hk);
#pragma unroll
    for (int i = 0; i < (kD + kThreads - 1) / kThreads; ++i) {
      const int d = thread_ + i * kThreads;
      if (kD % kThreads != 0 && d >= kD) break;
      float q = 0, k = 0;
      if (d < Plan::kD) {
        q = element(p_.q, p_.q_stride, b, head, t, d);
        k = element(p_.k, p_.k_stride, b, head, t, d);
        if constexpr (Fn::kHasQMod) q = Fn::q_mod(env_, HookAt{b, head, t, d, 1}, q);
        if constexpr (Fn::kHasKMod) k = Fn::k_mod(env_, HookAt{b, head, t, d, 1}, k);
      }
      small_.q[d] = q;
      small_.k[d] = k;
      if constexpr (kChannel) {
        float a = 1;
        if (d < Plan::kD) a = ex2(log2_decay<Plan, Fn>(env_, p_, b, h_, t, d));
        small_.decay[d] = a;
      }
    }
    if (thread_ < kColumns) {
      const int n = first_column_ + thread_;
      float v = 0;
      if (n < Plan::kDv) {
        v = element(p_.v, p_.v_stride, b, h_, t, n);
        if constexpr (Fn::kHasVMod) v = Fn::v_mod(env_, HookAt{b, h_, t, n, 1}, v);
      }
      small_.v[thread_] = v;
    }
  }

  // The product of a vector of all channels with the state, as parts of each warp.
  __device__ __forceinline__ void multiply(const float* x, float (&to)[kWarps][kColumns]) const {
    float sums[kVector] = {};
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float own = x[row(i)];
#pragma unroll
      for (int c = 0; c < kVector; ++c) sums[c] = fmaf(own, s_[i][c], sums[c]);
    }
#pragma unroll
    for (int step = kLanes; step < 32; step *= 2) {
#pragma unroll
      for (int c = 0; c < kVector; ++c) sums[c] += __shfl_xor_sync(~0u, sums[c], step);
    }
    if (lane_ < kLanes) {
      *reinterpret_cast<float4*>(to[warp_] + column()) =
          make_float4(sums[0], sums[1], sums[2], sums[3]);
    }
  }
  __device__ __forceinline__ static float total(const float (&parts)[kWarps][kColumns],
                                                int column) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += parts[w][column];
    return sum;
  }

  __device__ __forceinline__ void token(int64_t b, int64_t t) {
    fetch(b, t);
    float a = 1;
    if constexpr (Plan::kDecay == DecayKind::kScalar) {
      a = ex2(log2_decay<Plan, Fn>(env_, p_, b, h_, t, 0));
    }
    __syncthreads();
    if constexpr (kHasDecay<Plan>) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if constexpr (kChannel) a = small_.decay[row(i)];
#pragma unroll
        for (int c = 0; c < kVector; ++c) s_[i][c] *= a;
      }
    }
    float added[kVector];
#pragma unroll
    for (int c = 0; c < kVector; ++c) added[c] = small_.v[column() + c];
    if constexpr (Plan::kDelta) {
      const int64_t* s = p_.beta_stride;
      const float beta =
          float(load_element<typename Plan::Beta>(p_.beta, b * s[0] + h_ * s[1] + t * s[2]));
      multiply(small_.k, small_.sums[0]);
      __syncthreads();
#pragma unroll
      for (int c = 0; c < kVector; ++c) {
        added[c] = beta * (added[c] - total(small_.sums[0], column() + c));
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float k = small_.k[row(i)];
#pragma unroll
      for (int c = 0; c < kVector; ++c) s_[i][c] = fmaf(k, added[c], s_[i][c]);
    }
    multiply(small_.q, small_.sums[1]);
    if constexpr (Plan::kNormalizer) add_keys(a);
    __syncthreads();
    if (thread_ < kColumns) {
      // The next token writes what is read here after its first barrier.
      finish(b, t, first_column_ + thread_, float(p_.scale) * total(small_.sums[1], thread_));
    }
  }

  // z = e^g z + k, and q^T z.
  __device__ __forceinline__ void add_keys(float a) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kZ; ++i) {
      const int d = thread_ + i * kThreads;
      if (d >= Plan::kD) break;
      if constexpr (kChannel) a = small_.decay[d];
      z_[i] = fmaf(a, z_[i], small_.k[d]);
      sum = fmaf(small_.q[d], z_[i], sum);
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (lane_ == 0) small_.z[warp_] = sum;
  }

  __device__ __forceinline__ void finish(int64_t b, int64_t t, int n, float o) const {
    if (n >= Plan::kDv) return;
    if constexpr (Plan::kNormalizer) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += small_.z[w];
      o /= away_from_zero(sum * float(p_.scale));
    }
    if constexpr (Fn::kHasOutMod) o = Fn::out_mod(env_, HookAt{b, h_, t, n, 1}, o);
    const int64_t* s = p_.out_stride;
    static_cast<uint16_t*>(p_.out)[b * s[0] + h_ * s[1] + t * s[2] + n * s[3]] = narrow<Elem>(o);
  }
};

}  // namespace ae

#define AE_EXPORT_LINEAR_STEP(Plan, Fn)                                                          \
  extern "C" __global__ void __launch_bounds__((ae::LinearStep<Plan, Fn>::kThreads))             \
      ae_linear_step(const __grid_constant__ ae::LinearParams<ae::kLinearCaptures<Fn>> params) { \
    __shared__ ae::LinearStep<Plan, Fn>::Small small;                                            \
    ae::LinearStep<Plan, Fn>(params, small).run();                                               \
  }
