// Whole rows of a state for one token (linear_step.h), in the order of the memory.
#pragma once
#include "cpu/linear_state.h"

namespace ae {

template <class Plan>
struct LinearStepRows {
  using T = LinearTypes<Plan>;
  using Acc = typename T::Acc;
  using V = typename T::V;
  static constexpr int W = T::W, kD = T::kD;
  static constexpr int64_t kRow = T::kStateColumns;

  // As streams_states, where a state but not its rows are whole vectors.
  static bool streams_lines(const ae_linear_params& p) {
    constexpr int64_t kLarge = 16 << 20, kBytes = kD * kRow * int64_t(sizeof(Acc));
    return Plan::kNormalizer && p.final_state != nullptr && p.sequences * p.H * kBytes >= kLarge &&
           (int64_t)p.final_state % kRegisterBytes == 0 && kBytes % kRegisterBytes == 0;
  }

  // o += q S of a few rows; those that come next are fetched.
  template <int kCount>
  static AE_INLINE void add(const Acc* row, int64_t pitch, int width, const Acc* qs, Acc* o) {
    for (int j = 0; j < width; j += W) {
      V x = load_vector<V>(o + j);
#pragma GCC unroll 4
      for (int r = 0; r < kCount; ++r) {
        __builtin_prefetch(row + (kCount + r) * pitch + j);
        x += load_vector<V>(row + r * pitch + j) * qs[r];
      }
      store_vector(o + j, x);
    }
  }

  // a S + x v, a row after the token.
  static AE_INLINE void write(const Acc* row, int width, const Acc* v, Acc a, Acc x, bool stream,
                              Acc* to) {
    for (int j = 0; j < width; j += W) {
      const V s = load_vector<V>(row + j) * a + load_vector<V>(v + j) * x;
      if (stream) {
        stream_vector(to + j, s);
      } else {
        store_vector(to + j, s);
      }
    }
  }

  // The vectors of a state that begin in row d, `done` being the first: z keeps rows from being
  // whole vectors, so the lanes past the row are of the next one. Put together in memory they would
  // wait behind the stores (measured: half the bandwidth). Returns where the next one begins.
  static AE_INLINE int64_t write_lines(int d, int64_t done, const Acc* initial, const Acc* v, Acc a,
                                       Acc x, Acc next_a, Acc next_x, Acc* to) {
    using Int = std::conditional_t<sizeof(Acc) == 8, int64_t, int32_t>;
    typedef Int Lanes __attribute__((vector_size(sizeof(V))));
    const auto line = [&](int64_t j, V a, V x) __attribute__((always_inline)) {
      const V s = initial != nullptr ? load_vector<V>(initial + done) : V{};
      stream_vector(to + done, s * a + load_vector<V>(v + j) * x);
      done += W;
    };
    const V av = V{} + a, xv = V{} + x;
    int64_t j = done - d * kRow;
    for (; j + W <= kRow; j += W) line(j, av, xv);
    if (j == kRow || d + 1 == kD) return done;
    Lanes lane;
    for (int i = 0; i < W; ++i) lane[i] = i;
    const auto here = lane < Lanes{} + Int(kRow - j);
    line(j, here ? av : V{} + next_a, here ? xv : V{} + next_x);
    return done;
  }

  // u = k S and o = q S of all rows. Sums are put into memory rarely: there they would stand behind
  // the stores of the head before.
  __attribute__((noinline)) static void gather(const Acc* from, int64_t pitch, int width,
                                               const Acc* qs, const Acc* ks, Acc* u, Acc* o) {
    constexpr int kEarly = kD < 32 ? 0 : 16;  // rows that are fetched early
    constexpr int kRows = T::kDv > 8 * W ? 32 : kD;
    for (int j = 0; j < width; j += W) store_vector(u + j, V{}), store_vector(o + j, V{});
    for (int d = 0, n; d < kD; d += n, from += n * pitch) {
      n = d < kD - kEarly ? kD - kEarly - d : kEarly;
      n = n < kRows ? n : kRows;
      // The next head is another worker's.
      const int64_t ahead = d < kD - kEarly ? kEarly * pitch : 0;
      int j = 0;
      const auto groups = [&]<int N>() {
        for (; j + N * W <= width; j += N * W) {
          V us[N], os[N];
#pragma GCC unroll 8
          for (int i = 0; i < N; ++i) {
            us[i] = load_vector<V>(u + j + i * W);
            os[i] = load_vector<V>(o + j + i * W);
          }
          for (int r = 0; r < n; ++r) {
            const Acc* row = from + r * pitch + j;
#pragma GCC unroll 8
            for (int i = 0; i < N; ++i) {
              __builtin_prefetch(row + ahead + i * W);
              const V s = load_vector<V>(row + i * W);
              us[i] += s * ks[d + r];
              os[i] += s * qs[d + r];
            }
          }
#pragma GCC unroll 8
          for (int i = 0; i < N; ++i) {
            store_vector(u + j + i * W, us[i]);
            store_vector(o + j + i * W, os[i]);
          }
        }
      };
      if constexpr (kRegisterBytes == 64) groups.template operator()<8>();
      groups.template operator()<4>();
      groups.template operator()<1>();
    }
  }
};

}  // namespace ae
