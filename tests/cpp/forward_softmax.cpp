// The forward template with a hand-written softmax functor, against a plain loop in double. Outputs
// and workspace are poisoned with NaN first, dead keys hold NaN and Inf, and every case must give
// the same bits with one worker and with three.
//   g++ -std=c++20 -O3 -march=... -Itemplates tests/cpp/forward_softmax.cpp -o forward_softmax
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "cpu/forward.h"
#include "cpu/math.h"

namespace {

enum class MaskKind { kNone, kCausal, kBand };  // kBand: q - 5 <= k <= q, and only k >= 70

bool live(MaskKind mask, int64_t q, int64_t k) {
  if (mask == MaskKind::kNone) return true;
  if (mask == MaskKind::kCausal) return q >= k;
  return q >= k && q - k <= 5 && k >= 70;
}

bool hooked_dead(int64_t k) { return k % 7 == 3; }

template <class E, int D, int Dv, int BM, int BN, bool kPack, bool kDot>
struct SoftmaxPlan {
  using Elem = E;
  using Acc = std::conditional_t<std::is_same_v<E, double>, double, float>;
  static constexpr int kD = D, kDv = Dv, kBlockM = BM, kBlockN = BN, kVirtualWorkers = 8;
  static constexpr bool kPackGroup = kPack, kSplitKV = true;
  static constexpr bool kBf16Dot = kDot && ae::kHasBf16Dot;
  static constexpr int64_t line(int64_t n) { return (n + 63) / 64 * 64; }
  static constexpr int64_t kScratchBytes = [] {
    const int a = sizeof(Acc), m = kBf16Dot ? 2 : a, W = ae::kRegisterBytes / a;
    const int Dw = (D + W - 1) / W * W, Dvw = (Dv + W - 1) / W * W, pair = kBf16Dot ? 2 : 1;
    return line(BM * Dw * m) + line(BM * BN * a) + (kBf16Dot ? line(BM * BN * 2) : 0) +
           line(BM * Dvw * a) + line(BN * ((D + pair - 1) / pair * pair) * m) + line(BN * Dvw * m);
  }();
  static constexpr const char* kKey = "test";
};

// kHook: operand mods on all three, and a score_mod that is -inf for every key k with k % 7 == 3.
template <class Plan, MaskKind kMask, bool kHook = false>
struct SoftmaxFn {
  using A = typename Plan::Acc;
  using L = ae::Lanes<A>;
  using V = typename L::Acc;
  using Mask = decltype(V{} < V{});
  static constexpr int kStates = 2, kUserStats = 1, kStats = 1, kCaptures = 0;
  static constexpr uint64_t kMaskCaptures = 0;
  static constexpr bool kHasMask = kMask != MaskKind::kNone, kHasMerge = true;
  static constexpr bool kMaskUsesB = false, kMaskUsesH = false;
  static constexpr bool kHasQMod = kHook, kHasKMod = kHook, kHasVMod = kHook, kScoreCanDie = kHook;
  static constexpr A kLowest = -std::numeric_limits<A>::infinity();
  struct Row {
    int64_t q;
  };
  static V q_mod(const ae::Env&, V x) { return x * A(0.5) - A(1); }
  static V k_mod(const ae::Env&, V x) { return x + A(0.25); }
  static V v_mod(const ae::Env&, V x) { return x * x + A(1); }
  static Row make_row(const ae::Env&, int64_t, int64_t, int64_t q) { return {q}; }
  static void init(const ae::Env&, const Row&, A* state) { state[0] = kLowest, state[1] = 0; }

  template <bool kPartial>
  static bool tile_row(const ae::Env&, const Row& row, A scale, A* s, ae::Multiply<Plan>* w,
                       A* state, A& factor, int64_t kv0, int ncols, bool mask_full) {
    constexpr int W = L::W;
    const int end = kPartial ? Plan::kBlockN : ncols;
    V top = V{} + kLowest;
    for (int j = 0; j < end; j += W) {
      V x = ae::load_vector<V>(s + j) * scale;
      if constexpr (kHook) {
        for (int i = 0; i < W; ++i) x[i] = hooked_dead(kv0 + j + i) ? kLowest : x[i];
        if (!kPartial) ae::store_vector(s + j, x);
      }
      if constexpr (kPartial) {
        for (int i = 0; i < W; ++i) {
          const bool on = j + i < ncols && (mask_full || live(kMask, row.q, kv0 + j + i));
          x[i] = on ? x[i] : kLowest;
        }
        ae::store_vector(s + j, x);
      }
      top = x > top ? x : top;
    }
    A m = state[0];
    for (int i = 0; i < W; ++i) m = top[i] > m ? top[i] : m;
    V sum{};
    if (m == kLowest) {
      for (int j = 0; j < end; j += W) ae::store_multiply(w + j, V{});
      return false;
    }
    const A prescale = kPartial || kHook ? A(1) : scale;
    for (int j = 0; j < end; j += W) {
      const V p = ae::exp(ae::load_vector<V>(s + j) * prescale - m);
      ae::store_multiply(w + j, p);
      sum += p;
    }
    factor = std::exp(state[0] - m);
    A total = 0;
    for (int i = 0; i < W; ++i) total += sum[i];
    bool any = factor != 1 || total != 0;
    state[0] = m;
    state[1] = state[1] * factor + total;
    return any;
  }
  static void finalize(const ae::Env&, const Row&, const A* state, A& out_factor, A* stats) {
    out_factor = 1 / state[1];
    if (stats != nullptr) stats[0] = state[0] + std::log(state[1]);
  }
  static void merge(const ae::Env&, const Row&, const A* a, const A* b, A* to, A& fa, A& fb) {
    const A m = a[0] > b[0] ? a[0] : b[0];
    fa = std::exp(a[0] - m), fb = std::exp(b[0] - m);
    const A r = a[1] * fa + b[1] * fb;
    to[0] = m, to[1] = r;
  }
  static ae::Interval classify(const ae::IntervalEnv&, ae::Interval, ae::Interval, ae::Interval q,
                               ae::Interval k) {
    using namespace ae::iv;
    if constexpr (kMask == MaskKind::kNone) return boolean(true);
    const ae::Interval causal = ge(q, k);
    if constexpr (kMask == MaskKind::kCausal) return causal;
    return logical_and(logical_and(causal, le(sub(q, k), constant(5))), ge(k, constant(70)));
  }
};

void parallel_for(int64_t n, int32_t threads, ae_task task, void* arg) {
  std::vector<std::thread> team;
  for (int32_t w = 0; w < threads; ++w) {
    team.emplace_back([=] {
      for (int64_t i = w; i < n; i += threads) task(arg, i, w);
    });
  }
  for (auto& t : team) t.join();
}

struct Shape {
  int64_t B, Hq, Hkv, L, S;
  bool transposed;  // operands stored as [B, L, H, D] with the last two exchanged in memory
};

// Strides of [B, H, N, D], elements.
void set_strides(int64_t* s, int64_t H, int64_t N, int64_t D, bool transposed) {
  s[0] = H * N * D, s[1] = transposed ? N * D : N * D;
  s[2] = transposed ? 1 : D, s[3] = transposed ? N : 1;
}

int failures = 0;

template <class E>
double value(E x) {
  return ae::widen<double>(x);
}

template <class Plan, MaskKind kMask, bool kHook = false>
void check(const char* name, Shape c, double tolerance) {
  using E = typename Plan::Elem;
  using A = typename Plan::Acc;
  using Fn = SoftmaxFn<Plan, kMask, kHook>;
  constexpr int D = Plan::kD, Dv = Plan::kDv;
  const auto on = [](int64_t i, int64_t n) {
    return live(kMask, i, n) && !(kHook && hooked_dead(n));
  };
  // The mods' results are rounded to the multiply type.
  using M = ae::Multiply<Plan>;
  const auto q_in = [](double x) { return kHook ? value(ae::narrow<M>(A(x * 0.5 - 1))) : x; };
  const auto k_in = [](double x) { return kHook ? value(ae::narrow<M>(A(x + 0.25))) : x; };
  const auto v_in = [](double x) { return kHook ? value(ae::narrow<M>(A(x * x + 1))) : x; };
  const A nan = std::numeric_limits<A>::quiet_NaN();
  ae_params p{};
  p.abi_version = AE_ABI_VERSION, p.bytes = sizeof(ae_params);
  p.B = c.B, p.Hq = c.Hq, p.Hkv = c.Hkv, p.L = c.L, p.S = c.S, p.scale = 1 / std::sqrt(double(D));
  std::vector<E> q(c.B * c.Hq * c.L * D), k(c.B * c.Hkv * c.S * D), v(c.B * c.Hkv * c.S * Dv);
  const auto fill = [](std::vector<E>& x) {
    for (E& e : x) e = ae::narrow<E>(A(rand() % 2001 - 1000) / 500);
  };
  fill(q), fill(k), fill(v);
  set_strides(p.q_stride, c.Hq, c.L, D, c.transposed);
  set_strides(p.k_stride, c.Hkv, c.S, D, c.transposed);
  set_strides(p.v_stride, c.Hkv, c.S, Dv, c.transposed);
  set_strides(p.out_stride, c.Hq, c.L, Dv, c.transposed);
  // Keys that no row meets hold NaN and Inf.
  for (int64_t n = 0; n < c.S; ++n) {
    bool met = false;
    for (int64_t i = 0; i < c.L; ++i) met |= on(i, n);
    if (met) continue;
    for (int64_t bh = 0; bh < c.B * c.Hkv; ++bh) {
      const int64_t kb = bh * c.S * D + n * p.k_stride[2], vb = bh * c.S * Dv + n * p.v_stride[2];
      for (int d = 0; d < D; ++d) k[kb + d * p.k_stride[3]] = ae::narrow<E>(nan);
      for (int d = 0; d < Dv; ++d) {
        v[vb + d * p.v_stride[3]] = ae::narrow<E>(d % 2 ? nan : std::numeric_limits<A>::infinity());
      }
    }
  }
  p.q = q.data(), p.k = k.data(), p.v = v.data();
  ae::set_dense_stats(p);

  const int64_t rows = c.B * c.Hq * c.L;
  std::vector<E> out[2];
  std::vector<A> lse[2];
  for (int run = 0; run < 2; ++run) {
    out[run].assign(rows * Dv, ae::narrow<E>(nan));
    lse[run].assign(rows, nan);
    p.out = out[run].data(), p.stats = lse[run].data(), p.threads = run ? 3 : 1;
    const int64_t bytes = ae::Forward<Plan, Fn>::workspace_bytes(p);
    std::vector<char> workspace(bytes + 64, char(0xff));
    ae::forward_launch<Plan, Fn>(&p, workspace.data(), parallel_for);
    for (int i = 0; i < 64; ++i) failures += workspace[bytes + i] != char(0xff);
  }
  const bool same =
      rows == 0 || (std::memcmp(out[0].data(), out[1].data(), out[0].size() * sizeof(E)) == 0 &&
                    std::memcmp(lse[0].data(), lse[1].data(), rows * sizeof(A)) == 0);

  double worst = 0, worst_lse = 0;
  std::vector<double> w(c.S);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t b = r / c.L / c.Hq, h = r / c.L % c.Hq, i = r % c.L, kh = h / (c.Hq / c.Hkv);
    const E* qr = q.data() + b * p.q_stride[0] + h * p.q_stride[1] + i * p.q_stride[2];
    double m = -INFINITY, sum = 0;
    for (int64_t n = 0; n < c.S; ++n) {
      w[n] = -INFINITY;
      if (!on(i, n)) continue;
      const E* kr = k.data() + b * p.k_stride[0] + kh * p.k_stride[1] + n * p.k_stride[2];
      w[n] = 0;
      for (int d = 0; d < D; ++d)
        w[n] += q_in(value(qr[d * p.q_stride[3]])) * k_in(value(kr[d * p.k_stride[3]]));
      w[n] *= p.scale;
      m = std::fmax(m, w[n]);
    }
    for (int64_t n = 0; n < c.S; ++n) {
      w[n] = on(i, n) ? std::exp(w[n] - m) : 0;
      sum += w[n];
    }
    const E* o = out[0].data() + b * p.out_stride[0] + h * p.out_stride[1] + i * p.out_stride[2];
    for (int d = 0; d < Dv; ++d) {
      double expected = 0;
      const E* vr = v.data() + b * p.v_stride[0] + kh * p.v_stride[1] + d * p.v_stride[3];
      for (int64_t n = 0; n < c.S; ++n) {
        if (w[n] > 0) expected += w[n] / sum * v_in(value(vr[n * p.v_stride[2]]));
      }
      const double error = std::fabs(value(o[d * p.out_stride[3]]) - expected);
      worst = error <= worst ? worst : error;
    }
    const double expected_lse = m + std::log(sum);
    if (std::isinf(expected_lse)) {
      if (!(lse[0][r] == expected_lse)) worst_lse = INFINITY;
    } else {
      const double error = std::fabs(lse[0][r] - expected_lse);
      worst_lse = error <= worst_lse ? worst_lse : error;
    }
  }
  const bool ok = same && worst <= tolerance && worst_lse <= (sizeof(A) == 8 ? 1e-12 : 1e-5);
  if (!ok) ++failures;
  std::printf("%s %-12s B%ld H%ld/%ld L%ld S%ld%s: error %.2g, lse %.2g%s\n", ok ? "ok  " : "FAIL",
              name, long(c.B), long(c.Hq), long(c.Hkv), long(c.L), long(c.S),
              c.transposed ? " strided" : "", worst, worst_lse, same ? "" : ", threads differ");
}

template <class Plan, bool kHook = false>
void check_plan(const char* name, double tolerance) {
  const Shape shapes[] = {
      {2, 4, 2, 65, 65, false},  {1, 2, 2, 1, 300, false}, {1, 4, 1, 1, 700, true},
      {1, 2, 1, 200, 257, true}, {2, 2, 2, 33, 1, false},  {1, 2, 1, 5, 0, false},
      {1, 2, 2, 0, 9, false},    {0, 2, 2, 4, 9, false},   {1, 1, 1, 150, 1100, false},
      {3, 1, 1, 1, 128, false},  {1, 4, 1, 1, 700, false}, {1, 6, 2, 2, 530, false}};
  for (const Shape& c : shapes) {
    check<Plan, MaskKind::kNone>(name, c, tolerance);
    check<Plan, MaskKind::kCausal>(name, c, tolerance);
    check<Plan, MaskKind::kBand>(name, c, tolerance);
    if constexpr (kHook) check<Plan, MaskKind::kCausal, true>(name, c, 4 * tolerance);
  }
}

using ExportPlan = SoftmaxPlan<ae::bf16, 64, 64, 48, 128, true, true>;
using ExportFn = SoftmaxFn<ExportPlan, MaskKind::kCausal>;

}  // namespace

AE_EXPORT_FORWARD(ExportPlan, ExportFn)

int main() {
  check_plan<SoftmaxPlan<float, 64, 64, 48, 64, true, false>>("fp32 64", 3e-6);
  check_plan<SoftmaxPlan<float, 5, 33, 6, 32, false, false>, true>("fp32 5/33", 3e-6);
  check_plan<SoftmaxPlan<double, 24, 8, 12, 32, true, false>>("fp64 24/8", 1e-13);
  check_plan<SoftmaxPlan<ae::bf16, 64, 64, 48, 128, true, true>, true>("bf16 64", 2e-2);
  check_plan<SoftmaxPlan<ae::bf16, 37, 1, 7, 64, true, true>, true>("bf16 37/1", 2e-2);
  check_plan<SoftmaxPlan<ae::bf16, 40, 72, 16, 32, false, false>>("bf16 fp32", 2e-2);
  std::printf(failures ? "%d failed\n" : "all passed\n", failures);
  return failures != 0;
}
