// What the passes over chunks share: what a thread knows, the windows of a chunk's operands, and
// products with fragments in registers.
#pragma once
#include "linear/tiles.cuh"
#include "linear/unit.cuh"

namespace ae {

template <class Plan, class Fn>
class LinearPass {
 public:
  static constexpr int kThreads = 2 * kLinearChunk;
  using Params = LinearParams<kLinearCaptures<Fn>>;

 protected:
  using Elem = typename Plan::Elem;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kRows = round_up_16(Plan::kD), kPitch = round_up_16(Plan::kDv);
  static constexpr int kWidth = kStateWidth<Plan>;
  static constexpr bool kChannel = Plan::kDecay == DecayKind::kChannel;
  static constexpr bool kScalar = Plan::kDecay == DecayKind::kScalar;

  __device__ __forceinline__ LinearPass(const Params& params, char* shared)
      : params_(params),
        p_(params.p),
        env_{params.cap, params.p.fault, params.p.L},
        shared_(shared),
        lane_(int(threadIdx.x) % 32),
        warp_(int(threadIdx.x) / 32) {}

  // Fill tiles with rows of q, k (of value head h) and v, after their hooks, from a column on.
  template <class Tile>
  __device__ __forceinline__ void fill_queries(char* tile, int64_t b, int64_t h, int64_t first,
                                               int count) const {
    const int64_t head = h / (p_.H / p_.Hk);
    fill_q<Fn, Tile, Elem, kThreads>(env_, tile,
                                     rows_of(p_.q, p_.q_stride, b, head, first, count, 0, Plan::kD),
                                     {b, head, first, 0, 1});
  }
  template <class Tile>
  __device__ __forceinline__ void fill_keys(char* tile, int64_t b, int64_t h, int64_t first,
                                            int count, int column = 0) const {
    const int64_t head = h / (p_.H / p_.Hk);
    fill_k<Fn, Tile, Elem, kThreads>(
        env_, tile, rows_of(p_.k, p_.k_stride, b, head, first, count, column, Plan::kD - column),
        {b, head, first, column, 1});
  }
  template <class Tile>
  __device__ __forceinline__ void fill_values(char* tile, int64_t b, int64_t h, int64_t first,
                                              int count, int column) const {
    fill_v<Fn, Tile, Elem, kThreads>(
        env_, tile, rows_of(p_.v, p_.v_stride, b, h, first, count, column, Plan::kDv - column),
        {b, h, first, column, 1});
  }

  const Params& params_;
  const ae_linear_params& p_;
  const Env env_;
  char* const shared_;
  const int lane_, warp_;

 private:
  __device__ __forceinline__ static Window rows_of(const void* data, const int64_t* s, int64_t b,
                                                   int64_t h, int64_t first, int count, int column,
                                                   int columns) {
    return {static_cast<const uint16_t*>(data) + b * s[0] + h * s[1] + first * s[2] + column * s[3],
            s[2], s[3], count, columns};
  }
};

// Scores of a warp's 16 tokens with its own and earlier ones of the chunk; tiles have rows of both.
template <class Elem, class Tile, int kKeys>
__device__ __forceinline__ void multiply_rows(const char* queries, const char* keys,
                                              float (&s)[2][kKeys], int warp, int lane) {
  const auto q = read_a<Tile>(queries, 16 * warp, lane);
  const auto k = read_b<Tile>(keys, lane);
#pragma unroll
  for (int step = 0; step < Tile::kChunks / 2; ++step) {
    uint32_t a[4];
    q.load(0, 2 * step, a);
#pragma unroll
    for (int pair = 0; pair < kKeys / 4; ++pair) {
      if (pair > warp) break;
      uint32_t b[4];
      k.load(16 * pair, 2 * step, b);
      multiply_add<Elem>(s[0], s[1], 2 * pair, a, b[0], b[1]);
      multiply_add<Elem>(s[0], s[1], 2 * pair + 1, a, b[2], b[3]);
    }
  }
}

// Adds the product of an A operand and 16 rows of a tile, its columns from 8 `chunk` on.
template <class Elem, class Tile, int kSums>
__device__ __forceinline__ void multiply_columns(const uint32_t (&a)[4],
                                                 const MatrixReader<Tile>& tile, int row, int chunk,
                                                 float (&o)[2][kSums]) {
#pragma unroll
  for (int pair = 0; pair < kSums / 4; ++pair) {
    uint32_t b[4];
    tile.load_transposed(row, chunk + 2 * pair, b);
    multiply_add<Elem>(o[0], o[1], 2 * pair, a, b[0], b[1]);
    multiply_add<Elem>(o[0], o[1], 2 * pair + 1, a, b[2], b[3]);
  }
}

// Adds the product of a warp's 16 rows of a tile and another tile, that of a state.
template <class Elem, class Rows, class Tile, int kSums>
__device__ __forceinline__ void multiply_state(const char* rows, const char* state,
                                               float (&o)[2][kSums], int warp, int lane) {
  const auto a_reader = read_a<Rows>(rows, 16 * warp, lane);
  const auto b_reader = read_b_transposed<Tile>(state, lane);
#pragma unroll
  for (int step = 0; step < Rows::kChunks / 2; ++step) {
    uint32_t a[4];
    a_reader.load(0, 2 * step, a);
    multiply_columns<Elem>(a, b_reader, 16 * step, 0, o);
  }
}

// Adds what a warp's 16 tokens get of one another: the product of their weights, 0 for later
// tokens, and their rows of a tile. Where these have Inf or NaN, which 0 does not hide, rows are
// added one by one to those that are not earlier.
template <class Elem, class Tile, int kSums>
__device__ __forceinline__ void multiply_own(const uint32_t (&a)[4], const char* tile,
                                             float (&o)[2][kSums], int warp, int lane) {
  constexpr uint32_t kExponent = kExponentBits<Elem> * 0x10001u;
  constexpr uint32_t kCarry = kExponent & ~(kExponent << 1);  // the last bits of both
  const auto values = read_b_transposed<Tile>(tile, lane);
  uint32_t b[kSums / 4][4], found = 0;
#pragma unroll
  for (int pair = 0; pair < kSums / 4; ++pair) {
    values.load_transposed(16 * warp, 2 * pair, b[pair]);
#pragma unroll
    for (int i = 0; i < 4; ++i) found |= (b[pair][i] & kExponent) + kCarry;
  }
  if (!__any_sync(~0u, (found & 0x80008000u) != 0)) {
#pragma unroll
    for (int pair = 0; pair < kSums / 4; ++pair) {
      multiply_add<Elem>(o[0], o[1], 2 * pair, a, b[pair][0], b[pair][1]);
      multiply_add<Elem>(o[0], o[1], 2 * pair + 1, a, b[pair][2], b[pair][3]);
    }
    return;
  }
#pragma unroll 1
  for (int token = 0; token < 16; ++token) {
    float weight[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t pair = __shfl_sync(~0u, token < 8 ? a[r] : a[2 + r], token % 8 / 2, 4);
      weight[r] = widen<Elem>(uint16_t(token % 2 == 0 ? pair : pair >> 16));
    }
#pragma unroll
    for (int i = 0; i < kSums; i += 2) {
      const uint32_t v = *reinterpret_cast<const uint32_t*>(
          tile + Tile::at(16 * warp + token, i / 2) + lane % 4 * 4);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (token > lane / 4 + 8 * r) continue;
        o[r][i] = fmaf(weight[r], widen<Elem>(uint16_t(v)), o[r][i]);
        o[r][i + 1] = fmaf(weight[r], widen<Elem>(uint16_t(v >> 16)), o[r][i + 1]);
      }
    }
  }
}

}  // namespace ae
