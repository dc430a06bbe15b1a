// Interval arithmetic: intervals enclose what the kernels compute (random expressions, captures and
// boxes), and are exact where masks need it.
#include "interval_soundness.h"

namespace test {

bool encloses(ae::Interval x, char kind, const Value& v) {
  if (kind == kInt) return x.lo <= (long double)v.i && (long double)v.i <= x.hi;
  const double d = kind == kFloat ? double(v.f) : kind == kBool ? double(v.b) : v.d;
  return d != d ? x.maybe_nan : x.lo <= d && d <= x.hi;
}

// ---- random expressions ----
struct Captures {
  std::vector<Capture> all;
  std::vector<ae_capture> views;

  void add(int dtype, std::vector<int64_t> sizes, bool special, Random& random) {
    Capture& a = all.emplace_back();
    a.c.dtype = dtype;
    a.c.rank = int32_t(sizes.size());
    int64_t elements = 1;
    const bool transposed = random.in(0, 2) == 0;
    for (int i = 0; i < a.c.rank; ++i) {
      const int d = transposed ? i : a.c.rank - 1 - i;
      a.c.size[d] = sizes[size_t(d)];
      a.c.stride[d] = random.in(0, 5) == 0 && a.c.rank > 1 ? 0 : elements;
      if (a.c.stride[d] != 0) elements *= a.c.size[d];
    }
    fill(a, elements, special, random);
  }
  const ae_capture* finish() {
    for (Capture& a : all) {
      a.c.data = a.memory.data();
      views.push_back(a.c);
    }
    return views.data();
  }
};

// An expression over the captures: random operations on earlier nodes of the right kind.
std::vector<Node> random_expression(const Captures& captures, Random& random) {
  std::vector<Node> nodes;
  for (int i = 0; i < 4; ++i) nodes.push_back({Node::kIndex, kInt, i, {}, {}});
  for (const char kind : {kInt, kInt, kFloat, kFloat, kDouble, kBool}) {
    Node n = {Node::kConstant, kind, 0, {}, {}};
    const double x = random.in(0, 1) ? double(random.in(-9, 70)) : random.unit() * 100 - 20;
    if (random.in(0, 19) == 0) {
      const int64_t ints[] = {
          INT64_MIN, INT64_MIN + 1, INT64_MAX, (int64_t(1) << 53) + 1, -(int64_t(1) << 53) - 1,
          INT32_MIN, INT32_MAX};
      const double inf = random.in(0, 1) ? ae::iv::kInf : -ae::iv::kInf;
      n.constant = {ints[random.in(0, 6)], float(inf), inf, false};
      nodes.push_back(n);
      continue;
    }
    n.constant = {random.in(0, 1) ? int64_t(1) << random.in(0, 12) : int64_t(x), float(x), x,
                  random.in(0, 1) != 0};
    nodes.push_back(n);
  }
  const auto pick = [&](char kind) {
    for (;;) {  // recent nodes are likelier, so that expressions get deep
      const int64_t n = int64_t(nodes.size());
      const int64_t i = random.in(0, 1) ? random.in(0, n - 1) : random.in(n * 2 / 3, n - 1);
      if (nodes[size_t(i)].kind == kind) return int(i);
    }
  };
  // Some gathers index with q, k directly: long boxes through the tables.
  const int steps = int(random.in(4, 14));
  for (int step = 0; step < steps; ++step) {
    Node n = {};
    if (random.in(0, 3) == 0) {
      const int which = int(random.in(0, int64_t(captures.all.size()) - 1));
      const ae_capture& c = captures.all[size_t(which)].c;
      n = {Node::kGather, kind_of(c.dtype), which, {}, {}};
      for (int d = 0; d < c.rank; ++d)
        n.args[d] = random.in(0, 3) ? int(random.in(0, 3)) : pick(kInt);
    } else {
      const int which = int(random.in(0, int64_t(sizeof(kOps) / sizeof(Op)) - 1));
      const Op& op = kOps[which];
      n = {Node::kOp, op.kinds[op.arity()], which, {}, {}};
      for (int i = 0; i < op.arity(); ++i) n.args[i] = pick(op.kinds[i]);
    }
    nodes.push_back(n);
  }
  return nodes;
}

void check_expression(const std::vector<Node>& nodes, const ae::IntervalEnv& intervals,
                      const ae::Env& env, const int64_t (&lo)[4], const int64_t (&hi)[4],
                      Random& random) {
  std::vector<ae::Interval> boxes;
  for (const Node& n : nodes) {
    ae::Interval args[4] = {};
    for (int i = 0; i < 4; ++i)
      if (n.source >= Node::kOp) args[i] = boxes[size_t(n.args[i])];
    boxes.push_back(n.source == Node::kIndex
                        ? ae::iv::range(double(lo[n.which]), double(hi[n.which]))
                    : n.source == Node::kConstant ? constant_interval(n)
                    : n.source == Node::kOp       ? kOps[n.which].box(args)
                                                  : gather_interval(intervals, n.which, args));
    const ae::Interval& x = boxes.back();
    if (!(x.lo <= x.hi)) return fail("lo <= hi", x.lo, x.hi, n.which);
  }
  for (int sample = 0; sample < 24; ++sample) {
    std::vector<Value> values;
    const int64_t corner = random.in(0, 3);
    for (const Node& n : nodes) {
      Value args[4] = {};
      int64_t idx[4] = {};
      for (int i = 0; i < 4 && n.source >= Node::kOp; ++i) {
        args[i] = values[size_t(n.args[i])];
        idx[i] = args[i].i;
      }
      const int w = n.which;
      values.push_back(n.source == Node::kIndex
                           ? Value{.i = sample < 4 ? (corner >> (w & 1) & 1 ? lo[w] : hi[w])
                                                   : random.in(lo[w], hi[w])}
                       : n.source == Node::kConstant ? n.constant
                       : n.source == Node::kOp       ? kOps[w].point(args)
                                                     : gather_point(env, w, idx));
      const ae::Interval& x = boxes[values.size() - 1];
      const Value& v = values.back();
      if (encloses(x, n.kind, v)) continue;
      const double d = n.kind == kInt     ? double(v.i)
                       : n.kind == kFloat ? v.f
                       : n.kind == kBool  ? v.b
                                          : v.d;
      return fail(n.source == Node::kOp ? kOps[w].name : "gather", d, x.lo, x.hi);
    }
  }
}

void check_soundness(uint64_t seed) {
  Random random{seed};
  Captures captures;
  const int64_t L = random.in(1, 300), S = random.in(1, 9000), B = 2, H = 3;
  for (int dtype = AE_F32; dtype <= AE_BOOL; ++dtype) {
    captures.add(dtype, {S}, random.in(0, 2) == 0, random);
    captures.add(dtype, {random.in(1, 4), random.in(1, 200), random.in(1, 300)}, random.in(0, 1),
                 random);
  }
  captures.add(AE_BOOL, {L, S}, false, random);
  captures.add(AE_I32, {}, false, random);
  ae_params p = {};
  p.B = B, p.Hq = H, p.L = L, p.S = S;
  p.captures = captures.finish();
  p.capture_count = int32_t(captures.all.size());
  p.threads = 1;
  int32_t fault = 0;
  const ae::Env env = {p.captures, &fault, S};

  std::vector<uint64_t> memory = poisoned(ae::table_bytes(p, ~uint64_t(0)));
  const ae::IntervalEnv tables = ae::build_tables(p, ~uint64_t(0), align(memory), serial_for);
  for (int i = 0; i < 200; ++i) {
    const std::vector<Node> nodes = random_expression(captures, random);
    const int64_t sizes[4] = {B, H, L, S};
    int64_t lo[4], hi[4];
    for (int d = 0; d < 4; ++d) {
      const int64_t x = random.in(0, sizes[d] - 1), length = random.in(0, 1) ? 3 : sizes[d];
      lo[d] = x;
      hi[d] = random.in(x, x + length < sizes[d] ? x + length : sizes[d] - 1);
    }
    check_expression(nodes, i % 2 ? tables : ae::interval_env(p), env, lo, hi, random);
  }
}

// ---- block tables: the exact min and max of every range ----
template <class T>
void check_tables(uint64_t seed) {
  Random random{seed};
  const int64_t n = random.in(1, 20000), rows = random.in(1, 3), planes = 2;
  std::vector<T> x(size_t(planes * rows * n));
  for (T& e : x) e = T(random.in(-100, 10000));
  const bool transposed = random.in(0, 1);
  constexpr int dtype = ae::iv::Element<T>::dtype;
  ae_capture c = {x.data(), nullptr, {planes, rows, n}, {rows * n, n, 1}, 3, dtype};
  if (transposed) c = {x.data(), nullptr, {planes, n, rows}, {rows * n, 1, n}, 3, dtype};
  ae_params p = {};
  p.B = p.Hq = 1, p.L = p.S = 20000, p.threads = 1;
  p.captures = &c;
  p.capture_count = 1;
  std::vector<uint64_t> memory = poisoned(ae::table_bytes(p, 1));
  const ae::IntervalEnv env = ae::build_tables(p, 1, align(memory), serial_for);
  for (int i = 0; i < 60; ++i) {
    const int64_t unit = i % 3 == 0 ? 1 : i % 3 == 1 ? 64 : 4096;  // both levels, on and off edges
    const int64_t first = random.in(0, (n - 1) / unit) * unit;
    const int64_t end = i % 4 == 0 ? n : smaller(random.in(first + 1, n + unit) / unit * unit, n);
    if (end <= first) continue;
    const int64_t plane = random.in(0, planes - 1), row = random.in(0, rows - 1);
    const T* line = x.data() + (plane * rows + row) * n;
    T lo = line[first], hi = lo;
    for (int64_t j = first; j < end; ++j) {
      lo = line[j] < lo ? line[j] : lo;
      hi = line[j] > hi ? line[j] : hi;
    }
    const ae::Interval at = ae::iv::constant(plane), across = ae::iv::constant(row),
                       along = ae::iv::range(double(first), double(end - 1));
    const ae::Interval r = transposed ? ae::iv::gather<T>(env, 0, at, along, across)
                                      : ae::iv::gather<T>(env, 0, at, across, along);
    if (r.lo != double(lo) || r.hi != double(hi))
      fail("block table", double(first), double(end), double(n));
  }
  // One row of queries must not scan a capture that is made for many.
  p.L = 1, p.S = 64;
  const int64_t bytes = ae::table_bytes(p, 1);
  if (planes * rows * n > ae::iv::kMaxVisits && bytes > 64)
    fail("unused table", double(bytes), 0, 0);
}

// ---- exact values of single functions ----
void check_value(const char* name, ae::Interval got, double lo, double hi) {
  if (got.lo != lo || got.hi != hi || got.maybe_nan) fail(name, got.lo, got.hi, got.maybe_nan);
}

void check_tightness() {
  using namespace ae::iv;
  check_value("remainder in a period", remainder(range(65, 127), constant(64)), 1, 63);
  check_value("remainder across periods", remainder(range(60, 70), constant(64)), 0, 63);
  check_value("remainder of a negative", remainder(range(-3, -1), constant(64)), 61, 63);
  check_value("floor_div", floor_div(range(-5, 9), constant(4)), -2, 2);
  check_value("trunc_div", trunc_div(range(-5, 9), constant(4)), -1, 2);
  check_value("bit_and of an aligned range", bit_and(range(128, 191), constant(64)), 0, 0);
  check_value("bit_and with a low mask", bit_and(range(128, 140), constant(63)), 0, 15);
  check_value("bit_xor", bit_xor(range(64, 127), range(128, 191)), 192, 255);
  check_value("shr", shr(range(64, 200), constant(6)), 1, 3);
  check_value("exact float sum", fadd(range(1, 2.5), constant(3)), 4, 5.5);
  check_value("exact float product", fmul(range(-2, 3), constant(0.5)), -1, 1.5);
  check_value("exact float quotient", fdiv(range(6, 9), constant(3)), 2, 3);
  // Past 2^53 the bounds leave room, and past 2^63 int64 may have wrapped to anything.
  if (add(constant(kExactInt), constant(1)).hi <= kExactInt) fail("2^53 + 1", 0, 0, 0);
  if (sub(constant(-kExactInt), constant(1)).lo >= -kExactInt) fail("-2^53 - 1", 0, 0, 0);
  check_value("2^62 + 2^62", add(constant(0x1p62), constant(0x1p62)), -kInt64, kInt64);
  check_value("-2^63 - 1", sub(constant(-0x1p62), constant(0x1p62 + 1)), -kInt64, kInt64);
  if (!ffloor_div(constant(kInf), constant(2)).maybe_nan) fail("ffloor_div of inf", 0, 0, 0);
  check_value("bf16", round_bf16(range(1.001, 257)), 1, 256);
  check_value("f16", round_f16(range(-2049, 65519)), -2048, 65504);
  check_value("to_i32", to_i32(range(-2.5, 7.9)), -2, 7);
}

}  // namespace test

int main() {
  for (uint64_t seed = 1; seed <= 60; ++seed) test::check_soundness(seed);
  for (uint64_t seed = 1; seed <= 30; ++seed) {
    test::check_tables<float>(seed);
    test::check_tables<double>(seed);
    test::check_tables<int64_t>(seed);
    test::check_tables<int16_t>(seed);
    test::check_tables<uint8_t>(seed);
  }
  test::check_tightness();
  if (test::failures != 0) std::printf("%d failures\n", test::failures);
  return test::failures != 0;
}
