// cpu/math.h on the ISA that this file is compiled for: every function over scalars and vectors of
// both accumulator types, and the accuracy of the float vector code over the whole range.
#include "cpu/math.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "check.h"

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr int32_t kMin32 = std::numeric_limits<int32_t>::min();

template <class T>
bool same(T a, T b) {
  return a == b || (a != a && b != b);
}

float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// |got - exact| in units in the last place of a float near `exact`.
double ulps(float got, double exact) {
  float rounded = static_cast<float>(exact);
  if (std::isnan(exact) || std::isinf(rounded) || std::isinf(got)) {
    if (same(got, rounded)) return 0;
    // At the edge of overflow either side is within an ulp of the largest float.
    double largest = std::numeric_limits<float>::max();
    bool edge = std::isinf(got) && std::fabs(exact) >= largest * (1 - 0x1p-22);
    bool edge_below = !std::isinf(got) && std::fabs(got) >= largest * (1 - 0x1p-22);
    return edge || (edge_below && !std::isnan(exact)) ? 1 : 1e9;
  }
  int exponent;
  std::frexp(exact, &exponent);
  double unit = std::ldexp(1.0, std::max(exponent - 1, -126) - 23);
  return std::fabs(got - exact) / unit;
}

template <class V, class Vector, class Exact>
void check_ulps(const char* name, Vector of, Exact exact, double bound) {
  constexpr int W = ae::kLanes<V>;
  constexpr uint32_t kStep = 1021;  // about 4.2 million floats, of every exponent and sign
  double worst = 0;
  float where = 0;
  V x = {};
  for (uint64_t bits = 0; bits < (uint64_t{1} << 32); bits += kStep * W) {
    for (int i = 0; i < W; ++i) x[i] = float_of_bits(static_cast<uint32_t>(bits + i * kStep));
    V y = of(x);
    for (int i = 0; i < W; ++i) {
      double error = ulps(y[i], exact(static_cast<double>(x[i])));
      if (error > worst) worst = error, where = x[i];
    }
  }
  std::printf("%-8s %2d lanes: %.3f ulp at %.9g\n", name, W, worst, where);
  CHECK_MESSAGE(worst <= bound, "%s: %.3f ulp at %.9g, bound %.1f", name, worst, where, bound);
}

template <class V>
void check_accuracy() {
  check_ulps<V>("exp", [](V x) { return ae::exp(x); }, [](double x) { return std::exp(x); }, 2);
  check_ulps<V>("exp2", [](V x) { return ae::exp2(x); }, [](double x) { return std::exp2(x); }, 2);
  check_ulps<V>(
      "expm1", [](V x) { return ae::expm1(x); }, [](double x) { return std::expm1(x); }, 2);
  check_ulps<V>("log", [](V x) { return ae::log(x); }, [](double x) { return std::log(x); }, 3);
  check_ulps<V>(
      "log1p", [](V x) { return ae::log1p(x); }, [](double x) { return std::log1p(x); }, 3);
  check_ulps<V>("tanh", [](V x) { return ae::tanh(x); }, [](double x) { return std::tanh(x); }, 3);
  check_ulps<V>(
      "sigmoid", [](V x) { return ae::sigmoid(x); },
      [](double x) { return x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x)); }, 3);
}

template <class X>
void check_limits() {
  auto lane = [](auto y) {
    if constexpr (ae::Scalar<decltype(y)>) {
      return y;
    } else {
      return y[ae::kLanes<decltype(y)> - 1];
    }
  };
  using T = ae::ElemOf<X>;
  auto at = [](double x) { return ae::splat<X>(static_cast<T>(x)); };
  CHECK(lane(ae::exp(at(-kInf))) == 0 && lane(ae::exp(at(kInf))) == kInf);
  CHECK(lane(ae::exp(at(0))) == 1 && lane(ae::exp2(at(0))) == 1);
  CHECK(lane(ae::exp(at(-3e38))) == 0 && lane(ae::exp(at(3e38))) == kInf);
  CHECK(lane(ae::exp2(at(-kInf))) == 0 && lane(ae::exp2(at(kInf))) == kInf);
  CHECK(lane(ae::exp2(at(-3e38))) == 0 && lane(ae::exp2(at(5))) == 32);
  CHECK(lane(ae::expm1(at(-kInf))) == -1 && lane(ae::expm1(at(kInf))) == kInf);
  CHECK(lane(ae::expm1(at(0))) == 0 && lane(ae::tanh(at(0))) == 0);
  CHECK(lane(ae::tanh(at(kInf))) == 1 && lane(ae::tanh(at(-kInf))) == -1);
  CHECK(std::signbit(lane(ae::tanh(at(-0.0)))));
  CHECK(lane(ae::sigmoid(at(kInf))) == 1 && lane(ae::sigmoid(at(-kInf))) == 0);
  CHECK(lane(ae::sigmoid(at(0))) == T(0.5));
  CHECK(lane(ae::log(at(0))) == -kInf && lane(ae::log(at(kInf))) == kInf);
  CHECK(lane(ae::log(at(-0.0))) == -kInf && lane(ae::log(at(1))) == 0);
  CHECK(lane(ae::log1p(at(-1))) == -kInf && lane(ae::log1p(at(kInf))) == kInf);
  CHECK(lane(ae::log1p(at(0))) == 0 && std::isnan(lane(ae::log1p(at(-2)))));
  CHECK(std::isnan(lane(ae::log(at(-1)))) && std::isnan(lane(ae::log(at(-kInf)))));
  for (T nan : {T(kNan), T(-kNan)}) {
    X x = ae::splat<X>(nan);
    CHECK(std::isnan(lane(ae::exp(x))) && std::isnan(lane(ae::exp2(x))));
    CHECK(std::isnan(lane(ae::expm1(x))) && std::isnan(lane(ae::log(x))));
    CHECK(std::isnan(lane(ae::tanh(x))) && std::isnan(lane(ae::sigmoid(x))));
  }
}

// Lane i of a vector, or the scalar.
template <class X>
auto get(X x, int i) {
  if constexpr (ae::Scalar<X>) {
    return x;
  } else {
    return x[i];
  }
}
template <class X>
bool truth(X m, int i) {
  if constexpr (ae::Scalar<X>) {
    return m;
  } else {
    CHECK(m[i] == 0 || m[i] == -1);
    return m[i] != 0;
  }
}

template <class T>
T python_floor_div(T a, T b) {
  if (b == 0) return 0;
  if (b == -1) return ae::neg(a);
  T q = a / b;
  return a % b != 0 && (a < 0) != (b < 0) ? q - 1 : q;
}

template <class A, class B>
void check_integers(A a, B b, int lanes) {
  using T = ae::ElemOf<ae::Common<A, B>>;
  using U = std::make_unsigned_t<T>;
  auto sum = ae::add(a, b), difference = ae::sub(a, b), product = ae::mul(a, b);
  auto floored = ae::floor_div(a, b), truncated = ae::trunc_div(a, b);
  auto modulo = ae::remainder(a, b), rest = ae::fmod(a, b);
  auto low = ae::minimum(a, b), high = ae::maximum(a, b);
  auto conj = ae::bit_and(a, b), disj = ae::bit_or(a, b), parity = ae::bit_xor(a, b);
  auto left = ae::shl(a, ae::bit_and(b, 7)), right = ae::shr(a, ae::bit_and(b, 7));
  auto less = ae::lt(a, b), equal = ae::eq(a, b), chosen = ae::select(ae::ge(a, b), a, b);
  for (int i = 0; i < lanes; ++i) {
    T x = get(a, i), y = get(b, i);
    T q = python_floor_div<T>(x, y);
    T c = y == 0 ? T(0) : y == -1 ? ae::neg(x) : T(x / y);
    CHECK(get(sum, i) == T(U(x) + U(y)) && get(difference, i) == T(U(x) - U(y)));
    CHECK(get(product, i) == T(U(x) * U(y)));
    CHECK_MESSAGE(get(floored, i) == q, "%lld // %lld", (long long)x, (long long)y);
    CHECK_MESSAGE(get(truncated, i) == c, "%lld / %lld", (long long)x, (long long)y);
    CHECK(get(modulo, i) == (y == 0 ? T(0) : T(U(x) - U(q) * U(y))));
    CHECK(get(rest, i) == (y == 0 ? T(0) : T(U(x) - U(c) * U(y))));
    CHECK(get(low, i) == std::min(x, y) && get(high, i) == std::max(x, y));
    CHECK(get(conj, i) == (x & y) && get(disj, i) == (x | y) && get(parity, i) == (x ^ y));
    CHECK(get(left, i) == T(U(x) << (y & 7)) && get(right, i) == (x >> (y & 7)));
    CHECK(truth(less, i) == (x < y) && truth(equal, i) == (x == y));
    CHECK(get(chosen, i) == std::max(x, y));
  }
}

template <class V>
void check_integer_vectors() {
  using T = ae::ElemOf<V>;
  constexpr int W = ae::kLanes<V>;
  constexpr T kLow = std::numeric_limits<T>::min(), kHigh = std::numeric_limits<T>::max();
  const T values[] = {0, 1, -1, 2, -2, 3, 7, -7, 64, -64, 1000003, -99991, kHigh, kLow, kLow + 1};
  constexpr int n = sizeof(values) / sizeof(T);
  for (int shift = 0; shift < n; ++shift) {
    for (int start = 0; start < n; ++start) {
      V a = {}, b = {};
      for (int i = 0; i < W; ++i) {
        a[i] = values[(start + i) % n];
        b[i] = values[(start + shift + i) % n];
      }
      check_integers(a, b, W);
      check_integers(a, values[shift], W);
      check_integers(values[shift], b, W);
      check_integers(values[shift], values[start], 1);
    }
  }
  V x = ae::iota<V>() * T(37) - T(50);
  auto eighths = ae::floor_div(x, T(8)), parts = ae::trunc_div(x, T(8)),
       mod = ae::remainder(x, T(8));
  for (int i = 0; i < W; ++i) {
    CHECK(eighths[i] == (x[i] >> 3) && parts[i] == x[i] / 8 && mod[i] == (x[i] & 7));
    CHECK(ae::abs(x)[i] == (x[i] < 0 ? -x[i] : x[i]) && ae::neg(x)[i] == -x[i]);
    CHECK(ae::sign(x)[i] == (x[i] > 0) - (x[i] < 0));
    CHECK(ae::bit_not(x)[i] == ~x[i]);
    CHECK(ae::shl(x, T(1000))[i] == 0 && ae::shr(x, T(1000))[i] == (x[i] < 0 ? -1 : 0));
    CHECK(ae::floor(x)[i] == x[i]);
  }
}

template <class T>
T torch_remainder(T a, T b) {
  T r = std::fmod(a, b);
  return r != 0 && (b < 0) != (r < 0) ? r + b : r;
}

template <class A, class B>
void check_floats(A a, B b, int lanes) {
  using T = ae::ElemOf<ae::Common<A, B>>;
  auto sum = ae::add(a, b), difference = ae::sub(a, b), product = ae::mul(a, b);
  auto quotient = ae::div(a, b), low = ae::minimum(a, b), high = ae::maximum(a, b);
  auto truncated = ae::trunc_div(a, b), floored = ae::floor_div(a, b);
  auto modulo = ae::remainder(a, b), rest = ae::fmod(a, b);
  auto power = ae::pow(a, b), angle = ae::atan2(a, b), length = ae::hypot(a, b);
  auto signs = ae::copysign(a, b), chosen = ae::select(ae::le(a, b), a, b);
  auto less = ae::lt(a, b), different = ae::ne(a, b);
  for (int i = 0; i < lanes; ++i) {
    T x = get(a, i), y = get(b, i);
    T nan = std::numeric_limits<T>::quiet_NaN();
    bool unordered = x != x || y != y;
    CHECK(same<T>(get(sum, i), x + y) && same<T>(get(difference, i), x - y));
    CHECK(same<T>(get(product, i), x * y) && same<T>(get(quotient, i), x / y));
    CHECK(same<T>(get(low, i), unordered ? nan : std::min(x, y)));
    CHECK(same<T>(get(high, i), unordered ? nan : std::max(x, y)));
    CHECK(same<T>(get(truncated, i), std::trunc(x / y)));
    CHECK(same<T>(get(rest, i), std::fmod(x, y)));
    CHECK(same<T>(get(modulo, i), torch_remainder(x, y)));
    if (y != 0 && std::isfinite(x / y)) {
      T exact = std::floor(x / y);  // torch's own formula may differ by one, and by rounding
      CHECK(std::fabs(get(floored, i) - exact) <= 1 + T(1e-6) * std::fabs(exact));
    }
    CHECK(same<T>(get(power, i), std::pow(x, y)) && same<T>(get(angle, i), std::atan2(x, y)));
    CHECK(same<T>(get(length, i), std::hypot(x, y)));
    CHECK(same<T>(get(signs, i), std::copysign(x, y)));
    CHECK(truth(less, i) == (x < y) && truth(different, i) == (x != y));
    CHECK(same<T>(get(chosen, i), x <= y ? x : y));
  }
}

template <class X>
void check_float_unary(X x, int lanes) {
  using T = ae::ElemOf<X>;
  auto floored = ae::floor(x), ceiled = ae::ceil(x), cut = ae::trunc(x), even = ae::round_even(x);
  auto magnitude = ae::abs(x), negated = ae::neg(x), signs = ae::sign(x), root = ae::sqrt(x);
  auto inverse = ae::reciprocal(x), inverse_root = ae::rsqrt(x), curve = ae::erf(x);
  auto nans = ae::isnan(x), infinities = ae::isinf(x), nonzero = ae::to_bool(x);
  auto sine = ae::sin(x), log2 = ae::log2(x), gamma = ae::lgamma(x);
  for (int i = 0; i < lanes; ++i) {
    T v = get(x, i);
    CHECK(same<T>(get(floored, i), std::floor(v)) && same<T>(get(ceiled, i), std::ceil(v)));
    CHECK(same<T>(get(cut, i), std::trunc(v)) && same<T>(get(even, i), std::nearbyint(v)));
    CHECK(v != v || std::signbit(get(cut, i)) == std::signbit(std::trunc(v)));
    CHECK(v != v || std::signbit(get(floored, i)) == std::signbit(std::floor(v)));
    CHECK(v != v || std::signbit(get(ceiled, i)) == std::signbit(std::ceil(v)));
    CHECK(same<T>(get(magnitude, i), std::fabs(v)) && same<T>(get(negated, i), -v));
    CHECK(get(signs, i) == (v > 0) - (v < 0) && same<T>(get(root, i), std::sqrt(v)));
    CHECK(same<T>(get(inverse, i), 1 / v) && same<T>(get(inverse_root, i), 1 / std::sqrt(v)));
    CHECK(truth(nans, i) == (v != v) && truth(infinities, i) == bool(std::isinf(v)));
    CHECK(truth(nonzero, i) == (v != 0));
    CHECK(same<T>(get(sine, i), std::sin(v)) && same<T>(get(curve, i), std::erf(v)));
    CHECK(same<T>(get(log2, i), std::log2(v)) && same<T>(get(gamma, i), std::lgamma(v)));
  }
}

template <class V>
void check_float_vectors() {
  using T = ae::ElemOf<V>;
  constexpr int W = ae::kLanes<V>;
  const T values[] = {0,          T(-0.0),    1,      -1,    T(0.5), T(-0.5),
                      T(1.5),     T(2.5),     T(7),   T(-7), T(1e9), T(-3.7),
                      T(4194305), T(8388609), kInf,   -kInf, kNan,   T(0.49999997),
                      T(-2.5),    T(1e-40),   T(-0.3)};
  constexpr int n = sizeof(values) / sizeof(T);
  for (int shift = 0; shift < n; ++shift) {
    for (int start = 0; start < n; ++start) {
      V a = {}, b = {};
      for (int i = 0; i < W; ++i) {
        a[i] = values[(start + i) % n];
        b[i] = values[(start + shift + i) % n];
      }
      check_floats(a, b, W);
      check_floats(a, values[shift], W);
      check_floats(values[shift], b, W);
      check_floats(values[shift], values[start], 1);
      if (shift == 0) check_float_unary(a, W);
    }
    check_float_unary(values[shift], 1);
  }
  // As torch: the quotient of 1.0 and 0.1 is just below 10 before it is rounded.
  CHECK(ae::floor_div(ae::splat<V>(T(1)), T(0.1))[0] == 9 || sizeof(T) == 4);
  CHECK(ae::floor_div(T(1), T(0)) == T(kInf));
}

template <class L>
void check_masks_and_conversions() {
  using I32 = typename L::I32;
  constexpr int W = L::W;
  I32 numbers = ae::iota<I32>();
  for (int cut = 0; cut <= W; ++cut) {
    I32 m = ae::lt(numbers, cut);
    CHECK(ae::any(m) == (cut > 0) && ae::all(m) == (cut == W));
    CHECK(ae::lane_bits(m) == (1u << cut) - 1);
    auto inverted = ae::logical_not(m), both = ae::logical_and(m, ae::ge(numbers, 1));
    auto either = ae::logical_or(true, m), exclusive = ae::logical_xor(m, true);
    auto picked = ae::select(m, ae::to_f64(numbers), 0.5);
    auto flags = ae::select(m, false, true);
    for (int i = 0; i < W; ++i) {
      bool on = i < cut;
      CHECK(truth(inverted, i) == !on && truth(both, i) == (on && i >= 1));
      CHECK(truth(either, i) && truth(exclusive, i) == !on && truth(flags, i) == !on);
      CHECK(ae::mask_to_i32(m)[i] == on && ae::mask_to_i64(m)[i] == on);
      CHECK(ae::mask_to_f32(m)[i] == on && ae::mask_to_f64(m)[i] == on);
      CHECK(picked[i] == (on ? i : 0.5));
      CHECK(ae::select(m, 1.5f, -1.5f)[i] == (on ? 1.5f : -1.5f));
      CHECK(ae::select(on, numbers, 7)[i] == (on ? i : 7));
    }
  }
  CHECK(ae::mask_to_f32(true) == 1.0f && ae::mask_to_i64(false) == 0 && ae::to_bool(3));
  CHECK(ae::logical_not(false) && ae::logical_xor(true, false) && ae::any(true) && !ae::all(false));
  auto x = ae::to_f32(numbers) * 1.75f - 3.0f;
  for (int i = 0; i < W; ++i) {
    float v = 1.75f * i - 3.0f;
    CHECK(ae::to_i32(x)[i] == static_cast<int>(v) && ae::to_i64(x)[i] == static_cast<int>(v));
    CHECK(ae::to_f64(x)[i] == v && ae::to_f32(ae::to_f64(x))[i] == v);
    CHECK(ae::to_i64(numbers)[i] == i && ae::to_i32(ae::to_i64(numbers))[i] == i);
  }
}

template <class V>
void check_reductions() {
  using T = ae::ElemOf<V>;
  constexpr int W = ae::kLanes<V>;
  V x = {};
  T sum = 0, product = 1;
  for (int i = 0; i < W; ++i) {
    x[i] = static_cast<T>((i * 5) % 7 - 2);
    sum += x[i];
    product *= x[i];
  }
  CHECK(ae::hsum(x) == sum && ae::hprod(x) == product);
  CHECK(ae::hmin(x) == -2 && ae::hmax(x) == (W <= 4 ? 3 : 4));
  for (int i = 0; i < W && ae::FloatLike<V>; ++i) {
    V y = x;
    y[i] = static_cast<T>(kNan);
    CHECK(ae::hmax(y) != ae::hmax(y) && ae::hmin(y) != ae::hmin(y));
  }
}

// The definition: the nearest multiple of the spacing of floats with `bits` significant bits.
float round_to_format(float x, int bits, int min_exponent, double overflow) {
  if (x != x || std::isinf(x) || x == 0) return x;
  int exponent;
  std::frexp(x, &exponent);
  double spacing = std::ldexp(1.0, std::max(exponent - 1, min_exponent) - (bits - 1));
  double rounded = std::nearbyint(x / spacing) * spacing;
  return std::fabs(rounded) >= overflow ? std::copysign(kInf, x) : static_cast<float>(rounded);
}

template <class V>
void check_roundings() {
  constexpr int W = ae::kLanes<V>;
  V x = {};
  for (uint64_t bits = 0; bits < (uint64_t{1} << 32); bits += 4093 * W) {
    for (int i = 0; i < W; ++i) {
      // Half of the samples lie on the ties of one format or the other.
      uint32_t u = static_cast<uint32_t>(bits + i * 4093);
      x[i] = float_of_bits(i % 4 == 0 ? (u & 0xffff8000u) : i % 4 == 2 ? (u & 0xfffff000u) : u);
    }
    V b = ae::round_bf16(x), h = ae::round_f16(x);
    for (int i = 0; i < W; ++i) {
      float to_bf16 = round_to_format(x[i], 8, -126, 0x1p128);
      float to_f16 = round_to_format(x[i], 11, -14, 65536.0);
      CHECK_MESSAGE(same(b[i], to_bf16), "%.9g: %.9g, not %.9g", x[i], b[i], to_bf16);
      CHECK_MESSAGE(same(h[i], to_f16), "%.9g: %.9g, not %.9g", x[i], h[i], to_f16);
      if (i == 0) CHECK(same(ae::round_bf16(x[i]), to_bf16) && same(ae::round_f16(x[i]), to_f16));
    }
  }
}

template <class L>
void check_lanes() {
  check_accuracy<typename L::F32>();
  check_limits<typename L::F32>();
  check_limits<typename L::F64>();
  check_integer_vectors<typename L::I32>();
  check_integer_vectors<typename L::I64>();
  check_float_vectors<typename L::F32>();
  check_float_vectors<typename L::F64>();
  check_masks_and_conversions<L>();
  check_reductions<typename L::F32>();
  check_reductions<typename L::F64>();
  check_reductions<typename L::I32>();
  check_reductions<typename L::I64>();
  check_roundings<typename L::F32>();
}

}  // namespace

int main() {
  check_limits<float>();
  check_limits<double>();
  check_lanes<ae::Lanes<float>>();
  check_lanes<ae::Lanes<double>>();
  return CHECK_RESULT();
}
