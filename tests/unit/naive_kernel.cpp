// A small kernel module written by hand against the C ABI, for tests of the operators: softmax
// attention with a learnable bias, score = (q.k) * scale + table[h, bucket[key]], and its gradient.
// ELEM: 0 float, 1 double, 2 bfloat16. BACKWARD: which of the two directions this module is.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "common/abi.h"

namespace {

#if ELEM == 2
struct Elem {
  uint16_t bits;
};
using Acc = float;
Acc load(Elem x) {
  const uint32_t wide = uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
Elem store(Acc x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
#elif ELEM == 1
using Elem = double;
using Acc = double;
Acc load(Elem x) { return x; }
Elem store(Acc x) { return x; }
#else
using Elem = float;
using Acc = float;
Acc load(Elem x) { return x; }
Elem store(Acc x) { return x; }
#endif

constexpr ae_module_info kInfo = {AE_ABI_VERSION,
                                  sizeof(ae_params),
                                  BACKWARD ? AE_BACKWARD : AE_FORWARD,
                                  ELEM == 2   ? AE_BF16
                                  : ELEM == 1 ? AE_F64
                                              : AE_F32,
                                  HEAD_DIM,
                                  VALUE_DIM,
                                  2,
                                  1,
                                  2,
                                  BACKWARD ? 1u : 0u,
                                  AE_ISA_PORTABLE,
                                  "naive"};

const Elem& at(const void* base, const int64_t* stride, int64_t b, int64_t h, int64_t l,
               int64_t d) {
  return static_cast<const Elem*>(
      base)[b * stride[0] + h * stride[1] + l * stride[2] + d * stride[3]];
}
Elem& at(void* base, const int64_t* stride, int64_t b, int64_t h, int64_t l, int64_t d) {
  return static_cast<Elem*>(base)[b * stride[0] + h * stride[1] + l * stride[2] + d * stride[3]];
}

// Offset into the table's contiguous gradient, or -1 (and a fault) when the bucket is out of range.
int64_t bucket_of(const ae_params& p, int64_t key) {
  const ae_capture &table = p.captures[0], &bucket = p.captures[1];
  const int64_t index = static_cast<const int64_t*>(bucket.data)[key * bucket.stride[0]];
  if (index >= 0 && index < table.size[1]) return index;
  *p.fault = 1;
  return -1;
}

Acc score(const ae_params& p, int64_t b, int64_t h, int64_t i, int64_t j) {
  const int64_t hk = h / (p.Hq / p.Hkv);
  Acc dot = 0;
  for (int64_t d = 0; d < kInfo.D; ++d) {
    dot += load(at(p.q, p.q_stride, b, h, i, d)) * load(at(p.k, p.k_stride, b, hk, j, d));
  }
  const ae_capture& table = p.captures[0];
  const int64_t bucket = bucket_of(p, j);
  const Acc bias =
      bucket < 0
          ? 0
          : static_cast<const Acc*>(table.data)[h * table.stride[0] + bucket * table.stride[1]];
  return dot * static_cast<Acc>(p.scale) + bias;
}

struct Job {
  const ae_params& p;
  Acc* scratch;  // S scores per worker
};

// Row statistics: [0] lse, for the caller; [1] the row maximum, which only backward could want.
void forward_row(void* arg, int64_t row, int32_t worker) {
  const Job& job = *static_cast<Job*>(arg);
  const ae_params& p = job.p;
  const int64_t b = row / (p.Hq * p.L), h = row / p.L % p.Hq, i = row % p.L;
  Acc* s = job.scratch + worker * p.S;
  Acc top = -std::numeric_limits<Acc>::infinity();
  for (int64_t j = 0; j < p.S; ++j) {
    s[j] = score(p, b, h, i, j);
    top = std::fmax(top, s[j]);
  }
  Acc sum = 0;
  for (int64_t j = 0; j < p.S; ++j) sum += s[j] = std::exp(s[j] - top);
  const int64_t hk = h / (p.Hq / p.Hkv);
  for (int64_t d = 0; d < kInfo.Dv; ++d) {
    Acc o = 0;
    for (int64_t j = 0; j < p.S; ++j) o += s[j] * load(at(p.v, p.v_stride, b, hk, j, d));
    at(p.out, p.out_stride, b, h, i, d) = store(p.S > 0 ? o / sum : 0);
  }
  if (p.stats != nullptr) {
    auto* stats = static_cast<Acc*>(p.stats);
    stats[row] = top + std::log(sum);
    stats[p.B * p.Hq * p.L + row] = top;
  }
}

void backward_all(const ae_params& p) {
  const int64_t group = p.Hq / p.Hkv, D = kInfo.D, Dv = kInfo.Dv;
  const auto* lse = static_cast<const Acc*>(p.stats);
  const auto* dlse = static_cast<const Acc*>(p.dstats);
  auto* dtable = static_cast<Acc*>(p.captures[0].grad);
  for (int64_t b = 0; b < p.B; ++b) {
    for (int64_t hk = 0; hk < p.Hkv; ++hk) {
      std::vector<Acc> dk(p.S * D), dv(p.S * Dv), dq(D);
      for (int64_t h = hk * group; h < (hk + 1) * group; ++h) {
        for (int64_t i = 0; i < p.L; ++i) {
          const int64_t row = (b * p.Hq + h) * p.L + i;
          Acc delta = dlse != nullptr ? -dlse[row] : 0;
          for (int64_t d = 0; d < Dv; ++d) {
            delta += load(at(p.out, p.out_stride, b, h, i, d)) *
                     load(at(p.dout, p.dout_stride, b, h, i, d));
          }
          dq.assign(D, 0);
          for (int64_t j = 0; j < p.S; ++j) {
            const Acc w = std::exp(score(p, b, h, i, j) - lse[row]);
            Acc dw = 0;
            for (int64_t d = 0; d < Dv; ++d) {
              const Acc go = load(at(p.dout, p.dout_stride, b, h, i, d));
              dw += go * load(at(p.v, p.v_stride, b, hk, j, d));
              dv[j * Dv + d] += w * go;
            }
            const Acc ds = w * (dw - delta);
            const int64_t bucket = bucket_of(p, j);
            if (bucket >= 0) dtable[h * p.captures[0].size[1] + bucket] += ds;
            for (int64_t d = 0; d < D; ++d) {
              const Acc g = ds * static_cast<Acc>(p.scale);
              dq[d] += g * load(at(p.k, p.k_stride, b, hk, j, d));
              dk[j * D + d] += g * load(at(p.q, p.q_stride, b, h, i, d));
            }
          }
          for (int64_t d = 0; d < D; ++d) at(p.dq, p.dq_stride, b, h, i, d) = store(dq[d]);
        }
      }
      for (int64_t j = 0; j < p.S; ++j) {
        for (int64_t d = 0; d < D; ++d) at(p.dk, p.dk_stride, b, hk, j, d) = store(dk[j * D + d]);
        for (int64_t d = 0; d < Dv; ++d) at(p.dv, p.dv_stride, b, hk, j, d) = store(dv[j * Dv + d]);
      }
    }
  }
}

}  // namespace

extern "C" {

const ae_module_info* ae_info() { return &kInfo; }

int64_t ae_workspace_bytes(const ae_params* p) {
  return BACKWARD ? 0 : p->threads * p->S * static_cast<int64_t>(sizeof(Acc));
}

int32_t ae_launch(const ae_params* p, void* workspace, ae_parallel_for parallel_for) {
  if (BACKWARD) {
    backward_all(*p);
  } else {
    Job job{*p, static_cast<Acc*>(workspace)};
    parallel_for(p->B * p->Hq * p->L, p->threads, forward_row, &job);
  }
  return 0;
}

#if !BACKWARD
// No mask: every tile of 16 keys is full.
int64_t ae_classify(const ae_params* p, int64_t, int64_t, ae_row_run* out, int64_t capacity) {
  if (p->S == 0) return 0;
  if (capacity > 0) *out = {0, 0, static_cast<int32_t>((p->S + 15) / 16), AE_TILE_FULL};
  return 1;
}
#endif
}
