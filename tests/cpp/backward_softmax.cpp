// The backward template with hand-written softmax functors, against a plain loop in double: the
// plain one, and one with everything a generated unit can have (per-head slopes and sinks, a bias
// per key, scaled operands, all captured with gradients; a differentiable lse; rowsum(W * dP) from
// an extra pass). Outputs and workspace are poisoned with NaN first, operands of dead pairs hold
// NaN and Inf, and every case must give the same bits with one worker and with three.
//   g++ -std=c++20 -O3 -march=... -Itemplates tests/cpp/backward_softmax.cpp -o backward_softmax
#include <cstdio>
#include <thread>

#include "backward_reference.h"
#include "cpu/backward.h"
#include "cpu/capture.h"
#include "cpu/math.h"

namespace {

template <class E, int D, int Dv, int BM, int BN, bool kPack, bool kDot>
struct SoftmaxPlan {
  using Elem = E;
  using Acc = std::conditional_t<std::is_same_v<E, double>, double, float>;
  static constexpr int kD = D, kDv = Dv, kBlockM = BM, kBlockN = BN, kVirtualWorkers = 8;
  static constexpr bool kPackGroup = kPack;
  static constexpr bool kBf16Dot = kDot && ae::kHasBf16Dot;
  static constexpr int64_t kScratchBytes =
      int64_t(BM) * BN * (2 * sizeof(Acc) + (kBf16Dot ? 6 : 0));
  static constexpr const char* kKey = "test";
};

// score = scale * q.k + slope[h] * (k - q) / 64 + key_bias[k], with the operands q * gain, k *
// gain, v * gain, and a sink logit in the denominator. Plain: only scale * q.k.
template <class Plan, bool kRich, bool kMasked>
struct SoftmaxFn {
  using A = typename Plan::Acc;
  using L = ae::Lanes<A>;
  using V = typename L::Acc;
  using Mask = typename L::Mask;
  static constexpr int kUserStats = 1, kStats = 1, kCaptures = kRich ? kCaptureCount : 0;
  static constexpr uint64_t kMaskCaptures = 0, kGradMask = kRich ? 15 : 0;
  static constexpr bool kHasMask = kMasked, kMaskUsesB = false, kMaskUsesH = false;
  static constexpr bool kHasQMod = kRich, kHasKMod = kRich, kHasVMod = kRich;
  static constexpr int kRowScalars = 2;  // lse, rowsum(W * dP) - dlse
  static constexpr int kPasses = kRich ? 1 : 0;
  static constexpr int kPassAccs[1] = {1};
  static constexpr bool kPassNeedsDP[1] = {true};
  static constexpr bool kNeedsDelta = !kRich;
  static constexpr ae::GradInfo kGradInfo[kCaptureCount] = {{true, false, true, false, false},
                                                            {true, false, true, false, false},
                                                            {true, false, false, false, true},
                                                            {true, false, false, false, false}};
  static constexpr bool kHasRowGrads = kRich;
  struct Row {
    int64_t h, q;
    A slope, sink;
  };
  static Row make_row(const ae::Env& env, int64_t, int64_t h, int64_t q) {
    if constexpr (!kRich) return {h, q, 0, 0};
    return {h, q, ae::gather<A>(env, kSlope, true, h), ae::gather<A>(env, kSink, true, h)};
  }
  static ae::Interval classify(const ae::IntervalEnv&, ae::Interval, ae::Interval, ae::Interval q,
                               ae::Interval k) {
    using namespace ae::iv;
    if (mask_kind == MaskKind::kNone) return boolean(true);
    const ae::Interval causal = ge(q, k);
    if (mask_kind == MaskKind::kCausal) return causal;
    return logical_and(logical_and(causal, le(sub(q, k), constant(5))), ge(k, constant(70)));
  }
  static void begin(const ae::Env&, const Row&, const A* stats, const A* dstats, A delta, A* r) {
    r[0] = stats[0], r[1] = delta - dstats[0];
  }
  // Lanes whose key exists and is not masked.
  template <bool kPartial>
  static Mask lanes(const Row& row, int64_t kv0, int j, int ncols, bool mask_full) {
    Mask m = Mask{} - 1;
    if constexpr (kPartial) {
      for (int i = 0; i < L::W; ++i) {
        m[i] = j + i < ncols && (mask_full || live(row.q, kv0 + j + i)) ? -1 : 0;
      }
    }
    return m;
  }
  static V weights(const ae::Env& env, const Row& row, A scale, const A* s, A lse, Mask m,
                   int64_t k) {
    V x = ae::load_vector<V>(s) * scale;
    if constexpr (kRich) {
      for (int i = 0; i < L::W; ++i) x[i] += row.slope * A(k + i - row.q) / 64;
      x += ae::gather_run<A>(env, kKeyBias, m, k);
    }
    return ae::select(m, ae::exp(x - lse), V{});
  }
  template <int P>
  static void begin_pass(A* acc) {
    acc[0] = 0;
  }
  template <int P, bool kPartial>
  static void pass_row(const ae::Env& env, const Row& row, A scale, A* s, const A* dp, const A* r,
                       A* acc, int64_t kv0, int ncols, bool mask_full) {
    V sum{};
    for (int j = 0; j < Plan::kBlockN; j += L::W) {
      const Mask m = lanes<kPartial>(row, kv0, j, ncols, mask_full);
      const V w = weights(env, row, scale, s + j, r[0], m, kv0 + j);
      sum += ae::select(m, w * ae::load_vector<V>(dp + j), V{});
    }
    acc[0] += ae::hsum(sum);
  }
  template <int P>
  static void end_pass(const ae::Env&, const Row&, const A* acc, A* r) {
    r[1] += acc[0];
  }
  static void row_grads(const ae::Env& env, const Row& row, const A* r, A* const* grads) {
    const A w = std::exp(row.sink - r[0]);
    ae::scatter_add<A>(env, kSink, grads[kSink], true, -w * r[1], row.h);
  }
  template <bool kPartial>
  static void tile_row(const ae::Env& env, const Row& row, A scale, const A* r, A* s, A* dp,
                       A* const* grads, int64_t kv0, int ncols, bool mask_full) {
    V slope{};
    for (int j = 0; j < Plan::kBlockN; j += L::W) {
      const Mask m = lanes<kPartial>(row, kv0, j, ncols, mask_full);
      const V w = weights(env, row, scale, s + j, r[0], m, kv0 + j);
      const V ds = ae::select(m, w * (ae::load_vector<V>(dp + j) - r[1]), V{});
      ae::store_vector(s + j, w);
      ae::store_vector(dp + j, ds * scale);
      if constexpr (kRich) {
        for (int i = 0; i < L::W; ++i) slope[i] += ds[i] * A(kv0 + j + i - row.q) / 64;
        ae::scatter_run<A>(env, kKeyBias, grads[kKeyBias], m, ds, kv0 + j);
      }
    }
    if constexpr (kRich) {
      ae::scatter_add<A>(env, kSlope, grads[kSlope], true, ae::hsum(slope), row.h);
    }
  }
  static V gain(const ae::Env& env, V x) { return x * ae::gather<A>(env, kGain, true); }
  static V gain_vjp(const ae::Env& env, V x, V g, Mask m, A* const* grads) {
    ae::scatter_add<A>(env, kGain, grads[kGain], m, x * g);
    return gain(env, g);
  }
  static V q_mod(const ae::Env& env, V x) { return gain(env, x); }
  static V k_mod(const ae::Env& env, V x) { return gain(env, x); }
  static V v_mod(const ae::Env& env, V x) { return gain(env, x); }
  static V q_mod_vjp(const ae::Env& env, V x, V g, Mask m, A* const* grads) {
    return gain_vjp(env, x, g, m, grads);
  }
  static V k_mod_vjp(const ae::Env& env, V x, V g, Mask m, A* const* grads) {
    return gain_vjp(env, x, g, m, grads);
  }
  static V v_mod_vjp(const ae::Env& env, V x, V g, Mask m, A* const* grads) {
    return gain_vjp(env, x, g, m, grads);
  }
};

void parallel_for(int64_t n, int32_t threads, ae_task task, void* arg) {
  std::vector<std::thread> team;
  for (int32_t w = 1; w < threads; ++w) {
    team.emplace_back([=] {
      for (int64_t i = w; i < n; i += threads) task(arg, i, w);
    });
  }
  for (int64_t i = 0; i < n; i += threads) task(arg, i, 0);
  for (auto& t : team) t.join();
}

int failures = 0;

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(&a[0], &b[0], a.size() * sizeof(T)) == 0);
}

template <class Plan, class Fn>
void check(const char* name, Shape c, double tolerance) {
  using E = typename Plan::Elem;
  using A = typename Plan::Acc;
  Problem<A, E> x(c, Plan::kD, Plan::kDv, Fn::kCaptures > 0);
  const A nan = std::numeric_limits<A>::quiet_NaN();
  ae_capture captures[kCaptureCount] = {};
  int32_t fault = 0;
  ae_params p{};
  p.abi_version = AE_ABI_VERSION, p.bytes = sizeof(ae_params);
  p.B = c.B, p.Hq = c.Hq, p.Hkv = c.Hkv, p.L = c.L, p.S = c.S, p.scale = x.scale;
  p.q = x.q.data.data(), p.k = x.k.data.data(), p.v = x.v.data.data();
  p.out = x.out.data.data(), p.dout = x.dout.data.data();
  p.stats = x.lse.data(), p.dstats = x.dlse.data(), p.fault = &fault;
  ae::set_dense_stats(p);
  std::memcpy(p.q_stride, x.q.stride, sizeof p.q_stride);
  std::memcpy(p.k_stride, x.k.stride, sizeof p.k_stride);
  std::memcpy(p.v_stride, x.v.stride, sizeof p.v_stride);
  std::memcpy(p.out_stride, x.out.stride, sizeof p.out_stride);
  std::memcpy(p.dout_stride, x.dout.stride, sizeof p.dout_stride);
  std::memcpy(p.dq_stride, x.q.grad_stride, sizeof p.dq_stride);
  std::memcpy(p.dk_stride, x.k.grad_stride, sizeof p.dk_stride);
  std::memcpy(p.dv_stride, x.v.grad_stride, sizeof p.dv_stride);
  p.captures = captures, p.capture_count = Fn::kCaptures;

  std::vector<E> first[3];
  bool same = true;
  for (int run = 0; run < 2; ++run) {
    Operand<E>* operands[3] = {&x.q, &x.k, &x.v};
    for (Operand<E>* o : operands) o->grad.assign(o->grad.size(), ae::narrow<E>(nan));
    p.dq = x.q.grad.data(), p.dk = x.k.grad.data(), p.dv = x.v.grad.data();
    p.threads = run ? 3 : 1;
    std::vector<A> grads[kCaptureCount];
    for (int i = 0; i < kCaptureCount; ++i) {
      Captured<A>& t = x.captured[i];
      grads[i] = t.grad;
      t.grad.assign(t.data.size(), 0);
      captures[i] = {t.data.data(), t.grad.data(), {int64_t(t.data.size())},
                     {1},           i != kGain,    sizeof(A) == 8 ? AE_F64 : AE_F32};
    }
    const int64_t bytes = ae::Backward<Plan, Fn>(p).workspace_bytes();
    std::vector<char> workspace(bytes + 64, char(0xff));
    failures += ae::backward_launch<Plan, Fn>(&p, workspace.data(), parallel_for) != 0;
    for (int i = 0; i < 64; ++i) failures += workspace[bytes + i] != char(0xff);
    for (int i = 0; i < 3; ++i) {
      const std::vector<E>& g = operands[i]->grad;
      if (run == 0) first[i] = g;
      if (run) same &= same_bits(first[i], g);
    }
    for (int i = 0; run && i < kCaptureCount; ++i) {
      same &= same_bits(grads[i], x.captured[i].grad);
    }
  }
  const double dq = relative_error(x.q.grad, x.q.expected);
  const double dk = relative_error(x.k.grad, x.k.expected);
  const double dv = relative_error(x.v.grad, x.v.expected);
  double dc = 0;
  for (int i = 0; i < Fn::kCaptures; ++i) {
    dc = std::fmax(dc, relative_error(x.captured[i].grad, x.captured[i].expected));
  }
  const bool ok = same && fault == 0 && dq <= tolerance && dk <= tolerance && dv <= tolerance &&
                  dc <= 8 * tolerance;
  if (!ok) ++failures;
  std::printf("%s %s mask %d B%ld H%ld/%ld L%ld S%ld%s: dq %.1e dk %.1e dv %.1e captured %.1e%s\n",
              ok ? "ok  " : "FAIL", name, int(mask_kind), long(c.B), long(c.Hq), long(c.Hkv),
              long(c.L), long(c.S), c.strided ? " strided" : "", dq, dk, dv, dc,
              same ? "" : ", threads differ");
}

const Shape kShapes[] = {
    {2, 4, 2, 65, 65, false},  {1, 2, 2, 1, 300, false},  {1, 4, 1, 1, 700, true},
    {1, 2, 1, 200, 257, true}, {2, 2, 2, 33, 1, false},   {1, 2, 1, 5, 0, false},
    {1, 2, 2, 0, 9, false},    {0, 2, 2, 4, 9, false},    {1, 1, 1, 150, 1100, false},
    {2, 3, 1, 700, 40, true},  {1, 1, 1, 640, 640, false}};
// Too large for private gradient copies: the tasks that would collide take turns.
const Shape kLargeCapture = {2, 2, 1, 70, 300, false, int64_t(1) << 23};

template <class Plan, bool kRich, bool kMasked>
void check_plan(const char* name, double tolerance) {
  for (MaskKind kind : {MaskKind::kNone, MaskKind::kCausal, MaskKind::kBand}) {
    if (!kMasked && kind != MaskKind::kNone) continue;
    mask_kind = kind;
    for (const Shape& c : kShapes) check<Plan, SoftmaxFn<Plan, kRich, kMasked>>(name, c, tolerance);
  }
}

// Cuts of sizes that are too large to run here.
struct Bias {  // a captured [heads, keys] tensor, its gradient scattered at [h, k]
  static constexpr int kRowScalars = 2;
  static constexpr int kCaptures = 1;
  static constexpr uint64_t kGradMask = 1;
  static constexpr ae::GradInfo kGradInfo[1] = {{true, false, true, false, true}};
};

void check_cut(const char* what, Shape c, int64_t bias_elements, ae::BackwardGrid grid, int64_t n,
               int64_t heads, bool is_private) {
  using Plan = SoftmaxPlan<float, 64, 64, 48, 128, true, false>;
  ae_capture bias{};
  bias.rank = 1, bias.size[0] = bias_elements;
  ae_params p{};
  p.B = c.B, p.Hq = c.Hq, p.Hkv = c.Hkv, p.L = c.L, p.S = c.S, p.captures = &bias;
  const ae::BackwardDecision<Plan, Bias> got(p, ae::BackwardSizes<Plan>(p));
  const bool ok = got.cut.grid == grid && got.cut.n == n && got.cut.heads == heads &&
                  (got.private_grads == 1) == is_private;
  if (!ok) ++failures;
  std::printf("%s cut %s: grid %d, n %ld, heads %ld, private %d\n", ok ? "ok  " : "FAIL", what,
              int(got.cut.grid), long(got.cut.n), long(got.cut.heads), int(got.private_grads));
}

void check_cuts() {
  using enum ae::BackwardGrid;
  const int64_t large = int64_t(1) << 24;
  check_cut("long", {1, 8, 8, 32768, 32768, false}, 1, kCyclic, 8, 1, false);
  check_cut("many heads", {4, 8, 8, 256, 256, false}, 1, kCyclic, 1, 8, true);
  check_cut("few rows", {1, 2, 2, 1, 8192, false}, 1, kPrivateDq, 4, 2, false);
  check_cut("few keys", {1, 2, 2, 8192, 77, false}, 1, kPrivateDkv, 4, 2, true);
  check_cut("large bias, batches", {4, 8, 8, 1024, 256, false}, large, kCyclic, 2, 1, false);
  check_cut("large bias, few keys", {1, 2, 2, 8192, 77, false}, large, kCyclic, 1, 1, false);
}

using ExportPlan = SoftmaxPlan<ae::bf16, 64, 64, 48, 128, true, true>;
using ExportFn = SoftmaxFn<ExportPlan, false, true>;

}  // namespace

AE_EXPORT_BACKWARD(ExportPlan, ExportFn)

int main() {
  check_cuts();
  check_plan<SoftmaxPlan<float, 64, 64, 48, 64, true, false>, false, true>("fp32 64", 1e-5);
  check_plan<SoftmaxPlan<float, 5, 33, 6, 32, false, false>, true, true>("fp32 5/33", 1e-5);
  check_plan<SoftmaxPlan<double, 24, 8, 12, 32, true, false>, true, true>("fp64 24/8", 1e-13);
  check_plan<ExportPlan, false, true>("bf16 64", 1e-2);
  check_plan<SoftmaxPlan<ae::bf16, 37, 1, 8, 64, true, true>, true, true>("bf16 37/1", 1e-2);
  check_plan<SoftmaxPlan<ae::bf16, 40, 72, 16, 32, false, false>, false, false>("bf16 fp32", 1e-2);
  mask_kind = MaskKind::kCausal;
  using SmallPlan = SoftmaxPlan<float, 5, 33, 6, 32, false, false>;
  check<SmallPlan, SoftmaxFn<SmallPlan, true, true>>("fp32 5/33", kLargeCapture, 1e-5);
  std::printf(failures ? "%d failed\n" : "all passed\n", failures);
  return failures != 0;
}
