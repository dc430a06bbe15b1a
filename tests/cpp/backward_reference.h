// The reference of backward_softmax.cpp: operands, captured tensors and the gradients of all of
// them from a plain loop in double.
#pragma once
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/memory.h"

enum class MaskKind { kNone, kCausal, kBand };  // kBand: q - 5 <= k <= q, and only k >= 70
MaskKind mask_kind = MaskKind::kNone;

bool live(int64_t q, int64_t k) {
  if (mask_kind == MaskKind::kNone) return true;
  if (mask_kind == MaskKind::kCausal) return q >= k;
  return q >= k && q - k <= 5 && k >= 70;
}

enum Capture { kSlope, kSink, kKeyBias, kGain, kCaptureCount };  // [Hq], [Hq], [S], []

struct Shape {
  int64_t B, Hq, Hkv, L, S;
  bool strided;  // operands stored with the last two dimensions exchanged, K and V without batch
  int64_t spare_biases = 0;  // elements of the bias per key beyond S
};

// A [B, H, N, D] operand and its gradient.
template <class E>
struct Operand {
  int64_t B, H, N, D, stride[4], grad_stride[4];
  std::vector<E> data, grad;
  std::vector<double> expected;

  Operand(int64_t b, int64_t h, int64_t n, int64_t d, bool strided, bool broadcast)
      : B(b), H(h), N(n), D(d), data(b * h * n * d), grad(b * h * n * d), expected(b * h * n * d) {
    const int64_t s[4] = {h * n * d, n * d, strided ? 1 : d, strided ? n : 1};
    std::memcpy(stride, s, sizeof s);
    std::memcpy(grad_stride, s, sizeof s);
    if (broadcast) stride[0] = 0;
    for (E& e : data) e = ae::narrow<E>(float(rand() % 2001 - 1000) / 500);
  }
  int64_t offset(int64_t b, int64_t h, int64_t n, int64_t d) const {
    return b * stride[0] + h * stride[1] + n * stride[2] + d * stride[3];
  }
  int64_t grad_offset(int64_t b, int64_t h, int64_t n, int64_t d) const {
    return b * grad_stride[0] + h * grad_stride[1] + n * grad_stride[2] + d * grad_stride[3];
  }
  double at(int64_t b, int64_t h, int64_t n, int64_t d) const {
    return ae::widen<double>(data[offset(b, h, n, d)]);
  }
  double& want(int64_t b, int64_t h, int64_t n, int64_t d) {
    return expected[grad_offset(b, h, n, d)];
  }
  void poison(int64_t n) {
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t h = 0; h < H; ++h) {
        for (int64_t d = 0; d < D; ++d) {
          data[offset(b, h, n, d)] = ae::narrow<E>(float(d % 2 ? NAN : INFINITY));
        }
      }
    }
  }
};

// Relative L2 error; a result that is not finite is infinitely wrong.
template <class T>
double relative_error(const std::vector<T>& got, const std::vector<double>& want) {
  double error = 0, size = 1e-30;
  for (size_t i = 0; i < want.size(); ++i) {
    const double x = ae::widen<double>(got[i]);
    if (!std::isfinite(x)) return INFINITY;
    error += (x - want[i]) * (x - want[i]);
    size += want[i] * want[i];
  }
  return std::sqrt(error / size);
}

template <class A>
struct Captured {
  std::vector<A> data, grad;
  std::vector<double> expected;
  void set(int64_t n, A low, A high) {
    data.resize(n), expected.assign(n, 0);
    for (A& x : data) x = low + (high - low) * A(rand() % 1000) / 1000;
  }
};

template <class A, class E>
struct Problem {
  Shape c;
  double scale;
  Operand<E> q, k, v, out, dout;
  std::vector<A> lse, dlse;
  Captured<A> captured[kCaptureCount];

  Problem(Shape shape, int64_t D, int64_t Dv, bool rich)
      : c(shape),
        scale(1 / std::sqrt(double(D))),
        q(c.B, c.Hq, c.L, D, c.strided, false),
        k(c.B, c.Hkv, c.S, D, c.strided, c.strided),
        v(c.B, c.Hkv, c.S, Dv, c.strided, c.strided),
        out(c.B, c.Hq, c.L, Dv, c.strided, false),
        dout(c.B, c.Hq, c.L, Dv, c.strided, false),
        lse(c.B * c.Hq * c.L),
        dlse(lse.size()) {
    for (A& x : dlse) x = A(rand() % 2001 - 1000) / 1000;
    captured[kSlope].set(c.Hq, rich ? -1 : 0, rich ? 1 : 0);
    captured[kSink].set(c.Hq, rich ? 0 : -INFINITY, rich ? 1 : -INFINITY);
    if (!rich) captured[kSink].data.assign(c.Hq, -std::numeric_limits<A>::infinity());
    captured[kKeyBias].set(c.S + c.spare_biases, rich ? -1 : 0, rich ? 1 : 0);
    captured[kGain].set(1, rich ? A(0.75) : 1, rich ? A(0.75) : 1);
    poison();
    reference();
  }

  // What takes part in no live pair must not matter.
  void poison() {
    for (int64_t n = 0; n < c.S; ++n) {
      bool met = false;
      for (int64_t i = 0; i < c.L; ++i) met |= live(i, n);
      if (!met) k.poison(n), v.poison(n);
    }
    for (int64_t i = 0; i < c.L; ++i) {
      bool met = false;
      for (int64_t n = 0; n < c.S; ++n) met |= live(i, n);
      if (!met) q.poison(i), dout.poison(i);
    }
  }

  void reference() {
    const double gain = captured[kGain].data[0];
    std::vector<double> w(c.S), dp(c.S);
    for (int64_t r = 0; r < c.B * c.Hq * c.L; ++r) {
      const int64_t b = r / c.L / c.Hq, h = r / c.L % c.Hq, i = r % c.L, kh = h / (c.Hq / c.Hkv);
      const double slope = captured[kSlope].data[h], sink = captured[kSink].data[h];
      double m = sink, sum = 0, delta = 0;
      for (int64_t n = 0; n < c.S; ++n) {
        if (!live(i, n)) continue;
        w[n] = dp[n] = 0;
        for (int64_t d = 0; d < q.D; ++d) w[n] += q.at(b, h, i, d) * k.at(b, kh, n, d);
        w[n] = w[n] * gain * gain * scale + slope * double(n - i) / 64 + captured[kKeyBias].data[n];
        m = std::fmax(m, w[n]);
        for (int64_t d = 0; d < v.D; ++d) dp[n] += dout.at(b, h, i, d) * v.at(b, kh, n, d) * gain;
      }
      const double sink_part = std::isinf(m) ? 0 : std::exp(sink - m);
      for (int64_t n = 0; n < c.S; ++n) {
        w[n] = live(i, n) ? std::exp(w[n] - m) : 0;
        sum += w[n];
      }
      sum += sink_part;
      lse[r] = A(std::isinf(m) ? m : m + std::log(sum));
      for (int64_t n = 0; n < c.S; ++n) {
        if (live(i, n)) delta += (w[n] /= sum) * dp[n];
      }
      for (int64_t d = 0; d < v.D; ++d) {
        double o = 0;
        for (int64_t n = 0; n < c.S; ++n) {
          if (live(i, n)) o += w[n] * v.at(b, kh, n, d) * gain;
        }
        out.data[out.offset(b, h, i, d)] = ae::narrow<E>(A(o));
      }
      if (!std::isinf(sink)) captured[kSink].expected[h] += sink_part / sum * (dlse[r] - delta);
      for (int64_t n = 0; n < c.S; ++n) {
        if (!live(i, n)) continue;
        const double ds = w[n] * (dp[n] - delta + dlse[r]);
        captured[kSlope].expected[h] += ds * double(n - i) / 64;
        captured[kKeyBias].expected[n] += ds;
        double& dgain = captured[kGain].expected[0];
        for (int64_t d = 0; d < q.D; ++d) {
          const double x = q.at(b, h, i, d), y = k.at(b, kh, n, d), g = ds * scale * gain;
          q.want(b, h, i, d) += g * gain * y;
          k.want(b, kh, n, d) += g * gain * x;
          dgain += 2 * g * x * y;
        }
        for (int64_t d = 0; d < v.D; ++d) {
          v.want(b, kh, n, d) += w[n] * gain * dout.at(b, h, i, d);
          dgain += w[n] * v.at(b, kh, n, d) * dout.at(b, h, i, d);
        }
      }
    }
  }
};
