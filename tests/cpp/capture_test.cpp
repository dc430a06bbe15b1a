// cpu/capture.h against plain loops: every element type, strides and index mix; wrapped, dead and
// out-of-bounds lanes; and gradient sums.
#include "cpu/capture.h"

#include <cstdlib>
#include <cstring>
#include <vector>

#include "check.h"

namespace {

// A captured tensor of any element type, with values that identify their element.
template <class T>
struct Tensor {
  std::vector<ae::Raw<T>> memory;
  ae_capture capture = {};
  int64_t origin = 0;

  // `gap` > 1 spreads the elements; a negative `flip` reverses the last dimension.
  Tensor(std::initializer_list<int64_t> sizes, int64_t gap = 1, bool flip = false, int skew = 0) {
    int rank = 0;
    for (int64_t n : sizes) capture.size[rank++] = n;
    capture.rank = rank;
    int64_t total = gap;
    for (int d = rank - 1; d >= 0; --d) {
      capture.stride[d] = total;
      total *= capture.size[d];
    }
    memory.resize(total + skew);
    for (size_t i = 0; i < memory.size(); ++i) memory[i] = encode(i);
    origin = skew;
    if (flip) {
      origin += (capture.size[rank - 1] - 1) * capture.stride[rank - 1];
      capture.stride[rank - 1] = -capture.stride[rank - 1];
    }
    capture.data = memory.data() + origin;
  }

  static ae::Raw<T> encode(size_t i) {
    if constexpr (std::is_same_v<T, ae::bf16>) {
      return static_cast<uint16_t>(0x3f80 + i);  // 1.0 and the bfloat16 numbers after it
    } else if constexpr (std::is_same_v<T, ae::f16>) {
      return static_cast<uint16_t>((i % 5 == 4 ? 0x8001 : 0x3c00) + i);
    } else if constexpr (std::is_same_v<T, bool>) {
      return i * 7 % 3 == 1;
    } else {
      return static_cast<T>(i * 3 - 20);
    }
  }
  ae::ValueOf<T> at(int64_t offset) const { return ae::load_one<T>(capture.data, offset); }
};

int32_t fault = 0;

ae::Env environment(const ae_capture& capture) {
  fault = 0;
  return {&capture, &fault, 0};
}

template <class X>
double value_of(X x) {
  return static_cast<double>(x);
}

template <class T, int W>
void check_lane(ae::ValueVector<T, W> got, int lane, ae::ValueOf<T> want, const char* what) {
  if constexpr (std::is_same_v<T, bool>) {
    CHECK_MESSAGE(got[lane] == (want ? -1 : 0), "%s, lane %d", what, lane);
  } else {
    CHECK_MESSAGE(got[lane] == want, "%s, lane %d: %g, not %g", what, lane, value_of(got[lane]),
                  value_of(want));
  }
}

template <class T, class L>
void check_gather(const Tensor<T>& tensor) {
  constexpr int W = L::W;
  using I32 = typename L::I32;
  const ae_capture& c = tensor.capture;
  ae::Env env = environment(c);
  const int64_t rows = c.size[0], columns = c.size[1];
  I32 i = {}, j = {}, live = {};
  for (int start = -3; start < 40; ++start) {
    for (int lane = 0; lane < W; ++lane) {
      i[lane] = static_cast<int32_t>((start * 5 + lane * 3) % rows);  // negative ones wrap
      j[lane] = static_cast<int32_t>((start * 7 + lane * 11) % columns);
      live[lane] = (start + lane) % 3 == 0 ? 0 : -1;
      if (!live[lane]) j[lane] = 1 << 30;
    }
    auto both = ae::gather<T, L, 2>(env, 0, live, i, j);
    auto wide = ae::gather<T, L>(env, 0, live, ae::to_i64(i), ae::to_i64(j));
    auto one = ae::gather<T, L>(env, 0, live, int64_t{-1}, j);
    auto other = ae::gather<T, L>(env, 0, true, i, 2);
    auto alone = ae::gather<T, L>(env, 0, true, i[0], int64_t{1});
    for (int lane = 0; lane < W; ++lane) {
      int64_t row = i[lane] < 0 ? i[lane] + rows : i[lane];
      int64_t column = j[lane] < 0 ? j[lane] + columns : j[lane];
      auto zero = ae::ValueOf<T>();
      auto offset = row * c.stride[0] + column * c.stride[1];
      auto last = (rows - 1) * c.stride[0] + column * c.stride[1];
      check_lane<T, W>(both, lane, live[lane] ? tensor.at(offset) : zero, "two vectors");
      check_lane<T, W>(wide, lane, live[lane] ? tensor.at(offset) : zero, "two 64-bit vectors");
      check_lane<T, W>(one, lane, live[lane] ? tensor.at(last) : zero, "scalar, vector");
      check_lane<T, W>(other, lane, tensor.at(row * c.stride[0] + 2 * c.stride[1]),
                       "vector, scalar");
      if (lane == 0) CHECK(alone == tensor.at(row * c.stride[0] + c.stride[1]));
    }
  }
  CHECK(fault == 0);
  // A run from every start, in bounds or not; out of bounds only dead lanes.
  for (int64_t start = -columns; start < columns + 3; ++start) {
    for (int lane = 0; lane < W; ++lane) {
      live[lane] = start + lane < columns && (start + lane) % 5 != 2 ? -1 : 0;
    }
    auto run = ae::gather_run<T, L>(env, 0, live, 1, start);
    auto mixed = ae::gather_run<T, L, 2>(env, 0, live, i, start);
    for (int lane = 0; lane < W; ++lane) {
      int64_t column = start + lane < 0 ? start + lane + columns : start + lane;
      int64_t row = i[lane] < 0 ? i[lane] + rows : i[lane];
      auto zero = ae::ValueOf<T>();
      auto offset = c.stride[0] + column * c.stride[1];
      auto mixed_offset = row * c.stride[0] + column * c.stride[1];
      check_lane<T, W>(run, lane, live[lane] ? tensor.at(offset) : zero, "run");
      check_lane<T, W>(mixed, lane, live[lane] ? tensor.at(mixed_offset) : zero, "run of rows");
    }
    if (start >= 0 && start + W <= columns) {
      auto full = ae::gather_run<T, L>(env, 0, true, 1, start);
      auto none = ae::gather_run<T, L>(env, 0, false, 1, start);
      for (int lane = 0; lane < W; ++lane) {
        check_lane<T, W>(full, lane, tensor.at(c.stride[0] + (start + lane) * c.stride[1]), "all");
        check_lane<T, W>(none, lane, ae::ValueOf<T>(), "none");
      }
    }
  }
  CHECK(fault == 0);
}

template <class T, class L>
void check_bounds(const Tensor<T>& tensor) {
  constexpr int W = L::W;
  const ae_capture captures[2] = {{}, tensor.capture};
  using I32 = typename L::I32;
  const int64_t columns = tensor.capture.size[1];
  for (int64_t bad : {columns, -columns - 1, int64_t{1} << 40, -(int64_t{1} << 62)}) {
    ae::Env env = {captures, &fault, 0};
    int bad_lane = W - 1;
    I32 live = ae::splat<I32>(true);
    auto j = ae::to_i64(live & 1);
    j[bad_lane] = bad;
    fault = 0;
    auto x = ae::gather<T, L>(env, 1, live, 1, j);
    CHECK(fault == 2);
    const auto& c = tensor.capture;
    for (int lane = 0; lane < W; ++lane) {
      auto want = lane == bad_lane ? ae::ValueOf<T>() : tensor.at(c.stride[0] + c.stride[1]);
      check_lane<T, W>(x, lane, want, "one lane out of bounds");
    }
    fault = 0;
    CHECK((ae::gather<T, L>(env, 1, true, 0, bad)) == ae::ValueOf<T>() && fault == 2);
    fault = 0;
    CHECK((ae::gather<T, L>(env, 1, false, 0, bad)) == ae::ValueOf<T>() && fault == 0);
    fault = 0;
    ae::gather<T, L>(env, 1, live, bad, live & 1);
    CHECK(fault == 2);
    fault = 0;
    live[bad_lane] = 0;
    ae::gather<T, L>(env, 1, live, 1, j);
    CHECK(fault == 0);
    fault = 0;
    ae::gather_run<T, L>(env, 1, live, 1, columns - W + 1);
    CHECK(fault == 0);
    ae::gather_run<T, L>(env, 1, true, 1, columns - W + 1);
    CHECK(fault == 2);
  }
}

template <class T, class L>
void check_element() {
  check_gather<T, L>(Tensor<T>({5, 37}));
  check_gather<T, L>(Tensor<T>({5, 37}, 1, false, 1));  // 16- and 8-bit rows begin inside a word
  check_gather<T, L>(Tensor<T>({4, 33}, 3));
  check_gather<T, L>(Tensor<T>({4, 33}, 1, true, 3));
  Tensor<T> broadcast({3, 50});
  broadcast.capture.stride[0] = 0;
  check_gather<T, L>(broadcast);
  broadcast.capture.stride[1] = 0;
  check_gather<T, L>(broadcast);
  check_bounds<T, L>(Tensor<T>({5, 37}));
  Tensor<T> scalar({});
  ae::Env env = environment(scalar.capture);
  CHECK((ae::gather<T, L, 0>(env, 0, true)) == scalar.at(0));
  // Strides beyond 32 bits: only element 0 of the huge dimension exists.
  Tensor<T> huge({7, 37});
  huge.capture.size[0] = 1;
  huge.capture.stride[0] = int64_t{1} << 40;
  env = environment(huge.capture);
  auto lanes = ae::iota<typename L::I32>();
  auto far = ae::gather<T, L>(env, 0, true, lanes * 0, lanes);
  for (int lane = 0; lane < L::W; ++lane) check_lane<T, L::W>(far, lane, huge.at(lane), "huge");
}

template <class L>
void check_empty() {
  Tensor<float> empty({3, 0});
  ae::Env env = environment(empty.capture);
  auto none = typename L::I32{};
  auto x = ae::gather<float, L>(env, 0, none, 0, ae::iota<typename L::I32>());
  CHECK(x[0] == 0 && fault == 0);
  ae::gather<float, L>(env, 0, ae::splat<typename L::I32>(true), 0, none);
  CHECK(fault == 1);
}

template <class L>
void check_scatter() {
  using A = ae::ElemOf<typename L::Acc>;
  using Acc = typename L::Acc;
  constexpr int W = L::W;
  constexpr int kRows = 3, kColumns = 40;
  Tensor<float> tensor({kRows, kColumns});
  ae::Env env = environment(tensor.capture);
  std::vector<A> grad(kRows * kColumns), want(kRows * kColumns);
  auto matches = [&](const char* what) {
    bool equal = std::memcmp(grad.data(), want.data(), grad.size() * sizeof(A)) == 0;
    CHECK_MESSAGE(equal, "%s", what);
    want = grad;
  };
  for (int start = -2; start < 45; ++start) {
    Acc value = {};
    typename L::I32 i = {}, j = {}, live = {};
    for (int lane = 0; lane < W; ++lane) {
      value[lane] = A(0.25) * (start + 3) + lane;
      live[lane] = (start + lane) % 4 == 1 ? 0 : -1;
      i[lane] = (start + lane) % kRows;  // also -1 and -2
      j[lane] = (start * start + lane / 2) % kColumns;
      if (!live[lane]) {
        value[lane] = A(__builtin_nan(""));
        j[lane] = -1000;
      }
    }
    ae::scatter_add(env, 0, grad.data(), live, value, i, j);
    A sum = 0;
    for (int lane = 0; lane < W; ++lane) {
      if (!live[lane]) continue;
      want[(i[lane] + kRows) % kRows * kColumns + j[lane]] += value[lane];
      sum += value[lane];
    }
    matches("vectors");
    ae::scatter_add(env, 0, grad.data(), live, value, -1, int64_t{5});
    want[(kRows - 1) * kColumns + 5] += sum;
    matches("scalars, vector value");
    ae::scatter_add(env, 0, grad.data(), true, A(0.5), 1, 7);
    ae::scatter_add(env, 0, grad.data(), false, A(0.5), 1, 1000);
    want[kColumns + 7] += A(0.5);
    matches("scalars");
    for (int lane = 0; lane < W; ++lane) {
      if (start + lane >= kColumns) live[lane] = 0;
      if (live[lane]) want[2 * kColumns + (start + lane + kColumns) % kColumns] += value[lane];
    }
    ae::scatter_run(env, 0, grad.data(), live, value, 2, int64_t{start});
    matches("run");
    if (start >= 0 && start + W <= kColumns) {
      ae::scatter_run(env, 0, grad.data(), true, ae::splat<Acc>(A(2)), 0, int64_t{start});
      for (int lane = 0; lane < W; ++lane) want[start + lane] += A(2);
      matches("run of live lanes");
    }
    CHECK(fault == 0);
  }
  ae::scatter_add(env, 0, grad.data(), true, A(1), 0, kColumns);
  CHECK(fault == 1);
  fault = 0;
  ae::scatter_run(env, 0, grad.data(), true, ae::splat<Acc>(A(0)), 3, int64_t{0});
  CHECK(fault == 1);
  matches("out of bounds");
}

template <class L>
void check_lanes() {
  check_element<float, L>();
  check_element<double, L>();
  check_element<ae::bf16, L>();
  check_element<ae::f16, L>();
  check_element<int64_t, L>();
  check_element<int32_t, L>();
  check_element<int16_t, L>();
  check_element<int8_t, L>();
  check_element<uint8_t, L>();
  check_element<bool, L>();
  check_empty<L>();
  check_scatter<L>();
}

// Every float16, against its definition.
void check_float16() {
  for (int bits = 0; bits < 65536; ++bits) {
    uint16_t half = static_cast<uint16_t>(bits);
    int exponent = half >> 10 & 31, fraction = half & 1023;
    double magnitude = exponent == 0    ? __builtin_ldexp(fraction, -24)
                       : exponent == 31 ? __builtin_inf()
                                        : __builtin_ldexp(1024 + fraction, exponent - 25);
    float x = ae::load_one<ae::f16>(&half, 0);
    if (exponent == 31 && fraction != 0) {
      CHECK(x != x);
    } else {
      CHECK(x == (half >> 15 ? -magnitude : magnitude));
    }
  }
}

}  // namespace

int main() {
  check_float16();
  check_lanes<ae::Lanes<float>>();
  check_lanes<ae::Lanes<double>>();
  return CHECK_RESULT();
}
