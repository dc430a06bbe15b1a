// How the backward pass of linear attention is cut and where its memory lies: sizes only. Every sum
// is in an order that depends on the tensor sizes and Plan::kVirtualWorkers, never on the threads.
//
// A task is (sequence, key head, block of its value heads). Its worker's memory:
//   scratch    LinearBackwardScratch, a chunk's tiles
//   head       for each value head of a block: the state before every chunk, in the multiply type;
//              the running state, later its adjoint; under the delta rule what the chunks wrote
//
// States are transposed here, a row for each column of v: S^T [Dv][D] is what dO is multiplied by,
// U^T what v is, so that gradients of q and k come out with a token a row. In the multiply type
// they are B operands over the columns of v.
//
// Where the value heads of a key head are in several blocks, each block has its own sums of dq and
// dk, [blocks][B * Hk][L][D]. All of it is linear in L.
#pragma once
#include "cpu/linear_chunk.h"

namespace ae {

// Rows of v's tiles: whole vectors, and not a multiple of 512 bytes, whose rows would evict each
// other.
template <class A>
constexpr int linear_pitch(int n) {
  const int pitch = row_pitch<A>(n);
  return pitch * int(sizeof(A)) % 512 == 0 ? pitch + 64 / int(sizeof(A)) : pitch;
}

template <class Plan>
struct LinearBackwardTypes : LinearTypes<Plan> {
  using T = LinearTypes<Plan>;
  using A = typename T::Acc;
  using M = typename T::M;
  static constexpr bool kRounds = !__is_same(M, A);  // operands are copies in another type
  static constexpr bool kDelta = Plan::kDelta, kNormalizer = Plan::kNormalizer;
  static constexpr bool kDecays = T::kScalar || T::kChannel;
  static constexpr int C = Plan::kChunk;
  static constexpr int kVWidth = row_pitch<A>(T::kDv);
  static constexpr int kDp = T::kDPitch, kVp = linear_pitch<A>(T::kDv);
  // Of a transposed state.
  static constexpr int kStateRows = int(round_up(T::kDv, T::kPair));
  static constexpr int kSp = linear_pitch<A>(T::kD);
  static constexpr int64_t kState = int64_t(kStateRows) * kSp;
  static_assert(C % T::W == 0, "a chunk is whole vectors");
};

// Tiles of one chunk. Natural tiles have a token a row; `_t` marks transposed ones, with a channel
// a row. In the multiply type: `_nat` natural A operands, `_row` B operands over rows (in pairs),
// `_col` B operands over columns. Where nothing is rounded, the accumulators themselves serve as
// `_nat` and `_row`, and those arrays are empty. Python's linear/scratch.py has the same sizes.
template <class Plan>
struct LinearBackwardScratch {
  using X = LinearBackwardTypes<Plan>;
  using A = typename X::A;
  using M = typename X::M;
  static constexpr int C = X::C, kDv = X::kVWidth, kR = X::kRounds, kDelta = X::kDelta;
  static constexpr int kShared = !X::kChannel, kChannel = X::kChannel;
  static constexpr int kKeys = kChannel && kDelta;
  static constexpr int kTileD = C * X::kDp, kTileV = C * X::kVp, kTileC = C * C;
  static constexpr int kRowsD = X::kDRows * C;

  // Of the key head. From k_col on: of scalar decay or none, where heads share products.
  alignas(64) A q[kTileD];
  alignas(64) A k[kTileD];
  alignas(64) A dq[kTileD];
  alignas(64) A dk[kTileD];
  alignas(64) M q_nat[kR * kTileD];
  alignas(64) M k_nat[kR * kTileD];
  alignas(64) M q_row[kR * kTileD];
  alignas(64) M k_row[kR * kTileD];
  alignas(64) M k_col[kShared * kTileD];
  alignas(64) A qk[kShared * kTileC];
  alignas(64) A kk[kShared * kDelta * kTileC];
  alignas(64) A sum_qk[kShared * kTileC];           // sums over heads of the gradients of qk
  alignas(64) A sum_kk[kShared * kDelta * kTileC];  // and of kk

  // Of a value head.
  alignas(64) A v[kTileV];
  alignas(64) A dout[kTileV];
  alignas(64) A dv[kTileV];
  alignas(64) M v_nat[kR * kTileV];
  alignas(64) M v_col[C * kDv];
  alignas(64) M dout_nat[kR * kTileV];
  alignas(64) M dout_row[kR * kTileV];
  alignas(64) M scaled_row[kTileV];
  alignas(64) M state_row[kR * X::kState];             // U^T as an operand over columns of v,
  alignas(64) M state_by_channel[X::kDRows * X::kVp];  // a state as one over channels
  alignas(64) A tile[kTileD];                          // products with a state
  alignas(64) A tile2[(kChannel || kDelta) * kTileD];
  alignas(64) A m[kTileC];               // M
  alignas(64) A dm[kTileC];              // its gradient
  alignas(64) A minus[kDelta * kTileC];  // -A
  alignas(64) A kd[kDelta * kTileC];     // A / beta
  alignas(64) A da[kDelta * kTileC];     // minus its gradient / beta
  alignas(64) A inverse[kDelta * C * kLinearBlock];
  alignas(64) A solved[kDelta * kTileV];
  alignas(64) M natural[kR * kTileC];
  alignas(64) M pairs[(kR || X::kNormalizer) * kTileC];

  // Channel decay: factors (linear_channel.h), then q and k with theirs.
  alignas(64) A a[kChannel * kTileD];
  alignas(64) A inside[kChannel * kTileD];
  alignas(64) A rest[kChannel * kTileD];
  alignas(64) A whole[kChannel * X::kBlocks * X::kDp];
  alignas(64) A before[kChannel * (X::kBlocks + 1) * X::kDp];
  alignas(64) A q_in[kChannel * kTileD];     // inside
  alignas(64) A q_start[kChannel * kTileD];  // since the start of the chunk
  alignas(64) A k_in[kKeys * kTileD];
  alignas(64) A k_start[kKeys * kTileD];
  alignas(64) A k_rest[kChannel * kTileD];  // to the end of the block, of the chunk
  alignas(64) A k_end[kChannel * kTileD];
  alignas(64) M in_nat[kChannel * kR * kTileD];
  alignas(64) M in_row[kChannel * kR * kTileD];
  alignas(64) M key_in_nat[kKeys * kR * kTileD];
  alignas(64) M key_in_row[kKeys * kR * kTileD];
  alignas(64) M start_nat[kKeys * kR * kTileD];
  alignas(64) M start_row[kKeys * kR * kTileD];
  alignas(64) A keys[kChannel * kRowsD];
  alignas(64) M key_pairs[kChannel * kR * kRowsD];
  alignas(64) A e[kChannel * kTileD];  // adjoint of keys on their way to the end
  alignas(64) A dg[kChannel * kTileD];
  alignas(64) M tile_row[kChannel * kR * kTileD];
  alignas(64) M key_natural[kKeys * kR * kTileC];
  alignas(64) M key_pairs_of[kKeys * kR * kTileC];

  // Of a token: decays, beta; 1 / denominator and its gradient; parts of the decay's gradient.
  LinearGates<A, C> gates;
  alignas(64) A beta[C];
  alignas(64) A inverse_den[C];
  alignas(64) A dden[C];
  alignas(64) A row_factor[C];
  alignas(64) A left[C];
  alignas(64) A right[C];
  alignas(64) A grad[C];
  alignas(64) A crossing[X::kDp];
  alignas(64) A factor[X::kDp];  // of each channel of the state, over the whole chunk
};

// The memory of a value head.
template <class Plan>
struct LinearBackwardHead {
  using A = typename LinearBackwardTypes<Plan>::A;
  using M = typename LinearBackwardTypes<Plan>::M;
  A* state;    // running S^T, then U^T
  A* z;        // [kDp] running z, then its part of U
  char* kept;  // of every chunk: the state before it, z, W and r
  int64_t pitch, z_at, written_at, residual_at;
  LinearRows<A> initial{};  // the state before chunk 0 as it was given; base null: zeros
  int64_t last = -1;        // the last chunk, if the final state has no gradient

  // Whether the state before chunk c, or U behind it, is zero: nothing is multiplied then.
  bool starts_empty(int64_t c) const { return c == 0 && initial.base == nullptr; }
  bool ends_empty(int64_t c) const { return c == last; }

  M* state_of(int64_t c) const { return reinterpret_cast<M*>(kept + c * pitch); }
  A* z_of(int64_t c) const { return reinterpret_cast<A*>(kept + c * pitch + z_at); }
  A* written(int64_t c) const { return reinterpret_cast<A*>(kept + c * pitch + written_at); }
  A* residual(int64_t c) const { return reinterpret_cast<A*>(kept + c * pitch + residual_at); }
};

// Sizes of a launch.
template <class Plan>
struct LinearBackwardCut {
  using X = LinearBackwardTypes<Plan>;
  using A = typename X::A;
  using M = typename X::M;
  // Of the states of one worker, where a block has a choice of heads.
  static constexpr int64_t kMostStates = int64_t(64) << 20;

  int64_t sequences, group, heads, blocks, tasks, chunks;

  explicit LinearBackwardCut(const ae_linear_params& p) {
    sequences = p.first != nullptr ? p.sequences : p.B;
    group = p.Hk > 0 ? p.H / p.Hk : 0;
    chunks = (p.L + X::C - 1) / X::C;
    const int64_t pairs = sequences * p.Hk, wanted = Plan::kVirtualWorkers / 2;
    const int64_t needed = pairs > 0 ? (wanted + pairs - 1) / pairs : 1;
    blocks = needed < group ? needed : group;
    heads = blocks > 0 ? (group + blocks - 1) / blocks : 0;
    while (heads > 1 && heads * head_bytes() > kMostStates) heads = (heads + 1) / 2;
    blocks = heads > 0 ? (group + heads - 1) / heads : 0;
    tasks = pairs * blocks;
  }

  int64_t state_bytes() const { return linear_line(X::kState * int64_t(sizeof(M))); }
  int64_t z_bytes() const { return X::kNormalizer ? linear_line(X::kDp * sizeof(A)) : 0; }
  int64_t written_bytes() const {
    return X::kDelta ? linear_line(int64_t(X::C) * X::kVp * sizeof(A)) : 0;
  }
  int64_t running_bytes() const { return linear_line(X::kState * int64_t(sizeof(A))); }
  int64_t head_bytes() const { return running_bytes() + z_bytes() + chunks * kept_bytes(); }
  int64_t kept_bytes() const { return state_bytes() + z_bytes() + 2 * written_bytes(); }
  LinearBackwardHead<Plan> head(char* base) const {
    char* z = base + running_bytes();
    return {reinterpret_cast<A*>(base),
            reinterpret_cast<A*>(z),
            z + z_bytes(),
            kept_bytes(),
            state_bytes(),
            state_bytes() + z_bytes(),
            state_bytes() + z_bytes() + written_bytes()};
  }
  int64_t worker_bytes() const {
    return int64_t(sizeof(LinearBackwardScratch<Plan>)) + heads * head_bytes();
  }
  // Sums of dq, and as many of dk, where blocks share a key head.
  int64_t rows_of(const ae_linear_params& p) const { return p.B * p.Hk * p.L; }
  int64_t sums_bytes(const ae_linear_params& p) const {
    if (blocks <= 1) return 0;
    return linear_line(blocks * rows_of(p) * X::kDp * int64_t(sizeof(A)));
  }
  int64_t total_bytes(const ae_linear_params& p) const {
    return 64 + 2 * sums_bytes(p) + p.threads * worker_bytes();
  }
};

}  // namespace ae
