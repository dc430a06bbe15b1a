// The 16-bit floats of cpu/memory.h on the ISA that this file is compiled for: every value to float
// and double and back, and the rounding of floats around every one of them, against definitions in
// double.
#include <bit>
#include <cmath>
#include <cstdint>

#include "check.h"
#include "cpu/memory.h"

namespace {

using ae::bf16;
using ae::f16;

// A sign bit, kExponent bits and kFraction bits, as IEEE 754 lays them out.
template <int kExponent, int kFraction>
struct Format {
  static constexpr int kBias = (1 << (kExponent - 1)) - 1, kSpecial = (1 << kExponent) - 1;
  static int exponent(uint16_t bits) { return bits >> kFraction & kSpecial; }
  static int fraction(uint16_t bits) { return bits & ((1 << kFraction) - 1); }
  static bool is_nan(uint16_t bits) { return exponent(bits) == kSpecial && fraction(bits) != 0; }

  static double value(uint16_t bits) {
    const int e = exponent(bits), f = fraction(bits);
    const double magnitude = e == kSpecial ? HUGE_VAL
                             : e == 0 ? std::ldexp(f, 1 - kBias - kFraction)
                                      : std::ldexp((1 << kFraction) + f, e - kBias - kFraction);
    return bits >> 15 ? -magnitude : magnitude;
  }
};
template <class E>
struct FormatOf;
template <>
struct FormatOf<bf16> : Format<8, 7> {};
template <>
struct FormatOf<f16> : Format<5, 10> {};

// W lanes of A as E, one after the other and all at once.
template <class E, class A>
void check_narrowed(const A* x, const uint16_t* want) {
  constexpr int W = ae::Lanes<A>::W;
  E got[W];
  ae::store_narrowed<E, A>(got, ae::load_vector<typename ae::Lanes<A>::Acc>(x));
  for (int i = 0; i < W; ++i) {
    const uint16_t one = ae::narrow<E>(x[i]).bits;
    if (FormatOf<E>::is_nan(want[i])) {
      CHECK(FormatOf<E>::is_nan(got[i].bits) && FormatOf<E>::is_nan(one));
    } else {
      CHECK_MESSAGE(got[i].bits == want[i], "%.9g: %04x, not %04x", double(x[i]), got[i].bits,
                    want[i]);
      CHECK_MESSAGE(one == want[i], "%.9g alone: %04x, not %04x", double(x[i]), one, want[i]);
    }
  }
}

template <class E, class A>
void check_every_value() {
  using F = FormatOf<E>;
  constexpr int W = ae::Lanes<A>::W;
  for (int first = 0; first < 65536; first += W) {
    E in[W];
    uint16_t bits[W];
    A out[W];
    for (int i = 0; i < W; ++i) bits[i] = in[i].bits = uint16_t(first + i);
    ae::store_vector(out, ae::load_widened<A>(in));
    for (int i = 0; i < W; ++i) {
      const A one = ae::widen<A>(in[i]);
      if (F::is_nan(bits[i])) {
        CHECK(out[i] != out[i] && one != one);
      } else {
        const double want = F::value(bits[i]);
        CHECK_MESSAGE(double(out[i]) == want && std::signbit(out[i]) == std::signbit(want),
                      "%04x: %.9g, not %.9g", bits[i], double(out[i]), want);
        CHECK(double(one) == want && std::signbit(one) == std::signbit(want));
      }
    }
    check_narrowed<E>(out, bits);
  }
}

// Between two neighbours of the format: the tie goes to the even one, a float beside it to the
// nearer one. Behind the largest finite number comes infinity, as if the format went on.
template <class E>
void check_rounding() {
  using F = FormatOf<E>;
  constexpr int W = ae::Lanes<float>::W, kCases = 3;
  float x[W * kCases];
  uint16_t want[W * kCases];
  const double step = F::value(1);
  for (int first = 0; first < 65536; first += W) {
    for (int i = 0; i < W; ++i) {
      const uint16_t low = uint16_t(first + i), high = uint16_t(low + 1);
      const bool finite = F::exponent(low) != F::kSpecial;
      const bool last = finite && F::exponent(high) == F::kSpecial;
      const double below = finite ? F::value(low) : 0;
      const double above = !finite ? step
                           : last  ? below + (below - F::value(uint16_t(low - 1)))
                                   : F::value(high);
      const float tie = float((below + above) / 2);  // one bit more than the format: exact
      const float away = std::copysign(HUGE_VALF, finite && low >> 15 ? -1.0f : 1.0f);
      const uint16_t from = finite ? low : 0, to = finite ? high : 1;
      x[i] = tie, want[i] = from & 1 ? to : from;
      x[W + i] = std::nextafter(tie, 0.0f), want[W + i] = from;
      x[2 * W + i] = std::nextafter(tie, away), want[2 * W + i] = to;
    }
    for (int c = 0; c < kCases; ++c) check_narrowed<E>(x + c * W, want + c * W);
  }
}

void check_float16_edges() {
  constexpr int W = ae::Lanes<float>::W;
  const float edges[] = {65504, 65519.996f, 65520,      65536,    3e38f,  HUGE_VALF,
                         0,     0x1p-24f,   0x1p-25f,   0x1p-26f, 1e-40f, 0x1.8p-24f,
                         NAN,   -65520,     -0x1p-149f, -0.0f};
  const uint16_t wants[] = {0x7bff, 0x7bff, 0x7c00, 0x7c00, 0x7c00, 0x7c00, 0,      1,
                            0,      0,      0,      2,      0x7e00, 0xfc00, 0x8000, 0x8000};
  for (int first = 0; first < 16; first += W) check_narrowed<f16>(edges + first, wants + first);
}

}  // namespace

int main() {
  check_every_value<f16, float>();
  check_every_value<f16, double>();
  check_every_value<bf16, float>();
  check_every_value<bf16, double>();
  check_rounding<f16>();
  check_rounding<bf16>();
  check_float16_edges();
  return CHECK_RESULT();
}
