// Scores of a chunk whose decays differ from channel to channel: they have to multiply the operands
// of the product, and no factor may grow where another shrinks. Each is a product of the tokens'
// own factors, which are at most 1.
//
// Of tokens t and s of a block of 16, the highest bit in which they differ says which halves of
// which part of the block they lie in. One product for each bit has the scores between its halves:
//
//   (q_t prefix(t)) . (k_s suffix(s))      prefix, suffix: from and up to the middle of the part
//
// Between blocks I > J the same, from the start of block I and to the end of block J; the factors
// of whole blocks between them go to the queries, as do those of all blocks before for the state.
#pragma once
#include "linear/tiles.cuh"
#include "linear/unit.cuh"

namespace ae {

template <class Plan, bool kUsed>
struct ChannelDecay {
  static constexpr int kBytes = 0;
};

template <class Plan>
struct ChannelDecay<Plan, true> {
  static constexpr int kBlocks = kLinearChunk / 16;
  static constexpr int kWidth = round_up_16(Plan::kD);
  // 8 banks from row to row, so that the 8 bytes of each lane of half a warp lie in all of them.
  static constexpr int kPitch = kWidth % 32 == 0 ? kWidth + 8 : kWidth + 24;
  static constexpr int kBytes = 4 * (kLinearChunk * kPitch + kBlocks * kWidth);
  static constexpr int kThreads = 2 * kLinearChunk;

  // What a lane has of 16 channels: tokens l / 4 and l / 4 + 8, of each the channels 2 (l % 4),
  // that + 1, + 8 and + 9.
  using Values = float[2][4];

  __device__ static __forceinline__ float* row(char* decays, int t) {
    return reinterpret_cast<float*>(decays) + t * kPitch;
  }
  // The product of a block's factors, by channel.
  __device__ static __forceinline__ float* total(char* decays, int block) {
    return reinterpret_cast<float*>(decays) + kLinearChunk * kPitch + block * kWidth;
  }

  template <class Fn>
  __device__ static __forceinline__ void fill(const Env& env, const ae_linear_params& p,
                                              char* decays, int64_t b, int64_t h, int64_t first,
                                              int count) {
    for (int i = int(threadIdx.x); i < kLinearChunk * kWidth; i += kThreads) {
      const int t = i / kWidth, d = i % kWidth;
      float a = 1;
      if (t < count && d < Plan::kD) a = ex2(log2_decay<Plan, Fn>(env, p, b, h, first + t, d));
      row(decays, t)[d] = a;
    }
  }

  __device__ static __forceinline__ void load(const float* from, float (&x)[4]) {
    const float2 low = *reinterpret_cast<const float2*>(from);
    const float2 high = *reinterpret_cast<const float2*>(from + 8);
    x[0] = low.x, x[1] = low.y, x[2] = high.x, x[3] = high.y;
  }
  __device__ static __forceinline__ void store(float* to, const float (&x)[4]) {
    *reinterpret_cast<float2*>(to) = make_float2(x[0], x[1]);
    *reinterpret_cast<float2*>(to + 8) = make_float2(x[2], x[3]);
  }

  // Queries, an A operand, and keys, two B operands, by a factor for each element.
  template <class Elem>
  __device__ static __forceinline__ void scale_a(const uint32_t (&q)[4], const Values& f,
                                                 uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i] = scale_pair<Elem>(q[i], f[i % 2][i / 2 * 2], f[i % 2][i / 2 * 2 + 1]);
    }
  }
  template <class Elem>
  __device__ static __forceinline__ void scale_b(const uint32_t (&k)[4], const Values& f,
                                                 uint32_t (&b)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      b[i] = scale_pair<Elem>(k[i], f[i / 2][i % 2 * 2], f[i / 2][i % 2 * 2 + 1]);
    }
  }
  template <class Elem>
  __device__ static __forceinline__ void multiply(float (&s)[2][4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[4]) {
    multiply_add<Elem>(s[0], s[1], 0, a, b[0], b[1]);
    multiply_add<Elem>(s[0], s[1], 1, a, b[2], b[3]);
  }

  // Adds what a lane has of the product of weighed queries with z, which starts at its first
  // channel.
  template <class Elem>
  __device__ static __forceinline__ void add_keys(const uint32_t (&q)[4], const Values& f,
                                                  const float* z, float (&sums)[2]) {
    float own[4];
    load(z, own);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int c = i / 2 * 2;
      sums[i % 2] += widen<Elem>(uint16_t(q[i])) * f[i % 2][c] * own[c] +
                     widen<Elem>(uint16_t(q[i] >> 16)) * f[i % 2][c + 1] * own[c + 1];
    }
  }

  // The scores of each warp's own block. Leaves, for `finish`, the prefixes of the block in the
  // place of the decays, and in K's the keys by their suffixes.
  template <class Elem, class Tile, int kKeys>
  __device__ static __forceinline__ void begin(const char* q_tile, char* k_tile, char* decays,
                                               float (&s)[2][kKeys], int warp, int lane) {
    constexpr int kBits = 4;
    float own[2][4] = {}, halves[kBits][2][4] = {};
    const auto q_reader = read_a<Tile>(q_tile, 16 * warp, lane);
    const auto k_reader = read_b<Tile>(k_tile, lane);
    const int first = lane % 4 * 2, token = lane / 4;
#pragma unroll 1
    for (int step = 0; step < kWidth / 16; ++step) {
      uint32_t q[4], k[4], a[4], b[4];
      q_reader.load(0, 2 * step, q);
      k_reader.load(16 * warp, 2 * step, k);
      multiply<Elem>(own, q, k);
      Values prefix, suffix, all;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        load(row(decays, 16 * warp + token + 8 * r) + 16 * step + first, prefix[r]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          suffix[r][i] = 1;
          all[r][i] = prefix[r][i];
        }
      }
#pragma unroll
      for (int bit = 0; bit < kBits; ++bit) {
        scale_a<Elem>(q, prefix, a);
        scale_b<Elem>(k, suffix, b);
        multiply<Elem>(halves[bit], a, b);
        const bool upper = (token >> bit & 1) != 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (bit == kBits - 1) {
            prefix[1][i] *= all[0][i];
            suffix[0][i] *= all[1][i];
            all[0][i] *= all[1][i];
            continue;
          }
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const float other = __shfl_xor_sync(~0u, all[r][i], 4 << bit);
            prefix[r][i] *= upper ? other : 1.0f;
            suffix[r][i] *= upper ? 1.0f : other;
            all[r][i] *= other;
          }
        }
      }
      __syncwarp();  // all lanes have read K here
      scale_b<Elem>(k, suffix, b);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int t = 16 * warp + token + i / 2 * 8;
        *reinterpret_cast<uint32_t*>(k_tile + Tile::at(t, 2 * step + i % 2) + 2 * first) = b[i];
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        store(row(decays, 16 * warp + token + 8 * r) + 16 * step + first, prefix[r]);
      }
      if (token == 0) store(total(decays, warp) + 16 * step + first, all[0]);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int differ = (token + 8 * r) ^ (i / 2 * 8 + first + i % 2);
        const float x = differ == 0  ? own[r][i]
                        : differ < 2 ? halves[0][r][i]
                        : differ < 4 ? halves[1][r][i]
                        : differ < 8 ? halves[2][r][i]
                                     : halves[3][r][i];
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
          if (block == warp) s[r][4 * block + i] = x;
        }
      }
    }
  }

  // The scores with the blocks before, and queries by all their decays times the state.
  template <class Elem, class Tile, class StateTile, int kKeys, int kSums>
  __device__ static __forceinline__ void finish(const char* q_tile, const char* k_tile,
                                                char* decays, const char* state_tile,
                                                bool has_state, float (&s)[2][kKeys],
                                                float (&o)[2][kSums], const float* z,
                                                float (&sums)[2], int warp, int lane) {
    const auto q_reader = read_a<Tile>(q_tile, 16 * warp, lane);
    const auto k_reader = read_b<Tile>(k_tile, lane);
    const auto s_reader = read_b_transposed<StateTile>(state_tile, lane);
    const int first = lane % 4 * 2, token = lane / 4;
#pragma unroll 1
    for (int step = 0; step < kWidth / 16; ++step) {
      uint32_t q[4], a[4], b[4];
      q_reader.load(0, 2 * step, q);
      Values f;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        load(row(decays, 16 * warp + token + 8 * r) + 16 * step + first, f[r]);
      }
#pragma unroll
      for (int block = kBlocks - 2; block >= 0; --block) {
        if (block >= warp) continue;
        scale_a<Elem>(q, f, a);
        k_reader.load(16 * block, 2 * step, b);
        multiply_add<Elem>(s[0], s[1], 2 * block, a, b[0], b[1]);
        multiply_add<Elem>(s[0], s[1], 2 * block + 1, a, b[2], b[3]);
        float all[4];
        load(total(decays, block) + 16 * step + first, all);
#pragma unroll
        for (int i = 0; i < 4; ++i) f[0][i] *= all[i], f[1][i] *= all[i];
      }
      if (!has_state) continue;
      if constexpr (Plan::kNormalizer) add_keys<Elem>(q, f, z + 16 * step + first, sums);
      scale_a<Elem>(q, f, a);
#pragma unroll
      for (int pair = 0; pair < kSums / 4; ++pair) {
        s_reader.load_transposed(16 * step, 2 * pair, b);
        multiply_add<Elem>(o[0], o[1], 2 * pair, a, b[0], b[1]);
        multiply_add<Elem>(o[0], o[1], 2 * pair + 1, a, b[2], b[3]);
      }
    }
  }
};

}  // namespace ae
