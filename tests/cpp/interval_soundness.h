// Random scalar expressions, evaluated at points by the kernels' own scalar functions and over
// boxes by their interval counterparts.
#pragma once
#include "cpu/capture.h"
#include "interval_support.h"

namespace test {

// A captured tensor with its memory: any element type, some axes transposed or broadcast.
struct Capture {
  ae_capture c = {};
  std::vector<uint64_t> memory;

  template <class T>
  T* data() {
    return reinterpret_cast<T*>(memory.data());
  }
};

inline int element_bytes(int dtype) { return ae::iv::encoding(dtype).bytes; }

inline void fill(Capture& a, int64_t elements, bool special, Random& random) {
  a.memory.resize(size_t(elements));
  for (int64_t i = 0; i < elements; ++i) {
    const float x = float(random.unit() * 8 - 4);
    const bool odd = special && random.in(0, 400) == 0;
    const uint16_t specials16[] = {0x7f80, 0xff80, 0x7fc0, 0xffc0, 0x8000};
    const uint16_t high =
        odd ? specials16[random.in(0, 4)] : uint16_t(__builtin_bit_cast(uint32_t, x) >> 16);
    switch (a.c.dtype) {
      case AE_F32:
        a.data<float>()[i] = odd ? __builtin_bit_cast(float, uint32_t(high) << 16) : x;
        break;
      case AE_F64:
        a.data<double>()[i] = odd ? double(__builtin_bit_cast(float, uint32_t(high) << 16)) : x;
        break;
      case AE_BF16:
        a.data<uint16_t>()[i] = high;
        break;
      case AE_F16:
        a.data<uint16_t>()[i] = special ? uint16_t(random.next()) : uint16_t(random.in(0, 0x4400));
        break;
      case AE_I64:
        a.data<int64_t>()[i] = odd ? int64_t(random.next()) : random.in(-50, 50);
        break;
      case AE_I32:
        a.data<int32_t>()[i] = int32_t(i / 37 + random.in(0, 1));
        break;
      case AE_I16:
        a.data<int16_t>()[i] = int16_t(random.in(-9, 300));
        break;
      case AE_BOOL:
        a.data<uint8_t>()[i] = random.in(0, 99) != 0 && i / 100 % 2;
        break;
      default:
        a.data<uint8_t>()[i] = uint8_t(random.in(0, 255));
    }
  }
}

struct Value {
  int64_t i = 0;
  float f = 0;
  double d = 0;
  bool b = false;
};

// Kinds of values: index or int64, float, double, bool.
enum Kind : char { kInt = 'i', kFloat = 'f', kDouble = 'd', kBool = 'b' };

// One function of the vocabulary. `kinds` is its arguments' kinds, then the result's.
struct Op {
  const char* name;
  const char* kinds;
  Value (*point)(const Value*);
  ae::Interval (*box)(const ae::Interval*);
  int arity() const { return int(strlen(kinds)) - 1; }
};

#define AE_INT_OP2(op)                                                            \
  {#op, "iii", [](const Value* x) { return Value{.i = ae::op(x[0].i, x[1].i)}; }, \
   [](const ae::Interval* x) { return ae::iv::op(x[0], x[1]); }},
#define AE_INT_OP1(op)                                                   \
  {#op, "ii", [](const Value* x) { return Value{.i = ae::op(x[0].i)}; }, \
   [](const ae::Interval* x) { return ae::iv::op(x[0]); }},
#define AE_REAL_OP2(op, box)                                                           \
  {#box, "fff", [](const Value* x) { return Value{.f = ae::op(x[0].f, x[1].f)}; },     \
   [](const ae::Interval* x) { return ae::iv::box(x[0], x[1]); }},                     \
      {#box, "ddd", [](const Value* x) { return Value{.d = ae::op(x[0].d, x[1].d)}; }, \
       [](const ae::Interval* x) { return ae::iv::box(x[0], x[1]); }},
// Floats as vectors: the kernels' own approximations.
#define AE_REAL_OP1(op, box)                                                                       \
  {#box, "ff",                                                                                     \
   [](const Value* x) { return Value{.f = ae::op(ae::splat<ae::Lanes<float>::F32>(x[0].f))[0]}; }, \
   [](const ae::Interval* x) { return ae::iv::box(x[0]); }},                                       \
      {#box, "dd", [](const Value* x) { return Value{.d = ae::op(x[0].d)}; },                      \
       [](const ae::Interval* x) { return ae::iv::box(x[0]); }},
#define AE_COMPARE(op)                                                                \
  {#op, "iib", [](const Value* x) { return Value{.b = ae::op(x[0].i, x[1].i)}; },     \
   [](const ae::Interval* x) { return ae::iv::op(x[0], x[1]); }},                     \
      {#op, "ffb", [](const Value* x) { return Value{.b = ae::op(x[0].f, x[1].f)}; }, \
       [](const ae::Interval* x) { return ae::iv::op(x[0], x[1]); }},                 \
      {#op, "ddb", [](const Value* x) { return Value{.b = ae::op(x[0].d, x[1].d)}; }, \
       [](const ae::Interval* x) { return ae::iv::op(x[0], x[1]); }},
#define AE_LOGICAL(op)                                                            \
  {#op, "bbb", [](const Value* x) { return Value{.b = ae::op(x[0].b, x[1].b)}; }, \
   [](const ae::Interval* x) { return ae::iv::op(x[0], x[1]); }},
#define AE_CONVERT(op, kinds, from, to)                                       \
  {#op, kinds, [](const Value* x) { return Value{.to = ae::op(x[0].from)}; }, \
   [](const ae::Interval* x) { return ae::iv::op(x[0]); }},
#define AE_SELECT(kinds, to)                                                         \
  {"select", kinds,                                                                  \
   [](const Value* x) { return Value{.to = ae::select(x[0].b, x[1].to, x[2].to)}; }, \
   [](const ae::Interval* x) { return ae::iv::select(x[0], x[1], x[2]); }},

inline const Op kOps[] = {
    AE_INT_OP2(add) AE_INT_OP2(sub) AE_INT_OP2(mul) AE_INT_OP2(floor_div) AE_INT_OP2(trunc_div)
        AE_INT_OP2(remainder) AE_INT_OP2(fmod) AE_INT_OP2(minimum) AE_INT_OP2(maximum) AE_INT_OP2(
            bit_and) AE_INT_OP2(bit_or) AE_INT_OP2(bit_xor) AE_INT_OP2(shl) AE_INT_OP2(shr)
            AE_INT_OP1(neg) AE_INT_OP1(abs) AE_INT_OP1(bit_not) AE_INT_OP1(sign) AE_REAL_OP2(
                add, fadd) AE_REAL_OP2(sub, fsub) AE_REAL_OP2(mul, fmul) AE_REAL_OP2(div, fdiv)
                AE_REAL_OP2(floor_div, ffloor_div) AE_REAL_OP2(trunc_div, ftrunc_div) AE_REAL_OP2(
                    remainder, fremainder) AE_REAL_OP2(fmod, ffmod) AE_REAL_OP2(minimum, minimum)
                    AE_REAL_OP2(maximum, maximum) AE_REAL_OP1(neg, fneg) AE_REAL_OP1(abs, fabs)
                        AE_REAL_OP1(exp, exp) AE_REAL_OP1(exp2, exp2) AE_REAL_OP1(
                            expm1, expm1) AE_REAL_OP1(log, log) AE_REAL_OP1(log2, log2)
                            AE_REAL_OP1(log10, log10) AE_REAL_OP1(log1p, log1p) AE_REAL_OP1(
                                sqrt, sqrt) AE_REAL_OP1(rsqrt, rsqrt)
                                AE_REAL_OP1(reciprocal, reciprocal) AE_REAL_OP1(
                                    tanh, tanh) AE_REAL_OP1(sigmoid, sigmoid) AE_REAL_OP1(sin, sin)
                                    AE_REAL_OP1(cos, cos) AE_REAL_OP1(atan, atan) AE_REAL_OP1(
                                        sinh, sinh) AE_REAL_OP1(asinh, asinh)
                                        AE_REAL_OP1(erf, erf) AE_REAL_OP1(erfc, erfc) AE_REAL_OP1(
                                            floor,
                                            floor) AE_REAL_OP1(ceil, ceil) AE_REAL_OP1(trunc, trunc)
                                            AE_REAL_OP1(round_even, round_even) AE_REAL_OP1(
                                                sign, sign) AE_COMPARE(eq) AE_COMPARE(ne)
                                                AE_COMPARE(lt) AE_COMPARE(le) AE_COMPARE(
                                                    gt) AE_COMPARE(ge) AE_LOGICAL(logical_and)
                                                    AE_LOGICAL(logical_or) AE_LOGICAL(
                                                        logical_xor) AE_CONVERT(logical_not, "bb", b, b)
                                                        AE_CONVERT(isnan, "fb", f, b) AE_CONVERT(
                                                            isinf, "fb", f,
                                                            b) AE_CONVERT(to_bool, "ib", i, b)
                                                            AE_CONVERT(
                                                                to_bool, "fb",
                                                                f, b) AE_CONVERT(to_f32, "if", i, f)
                                                                AE_CONVERT(
                                                                    to_f32,
                                                                    "df", d,
                                                                    f) AE_CONVERT(to_f64, "id", i, d)
                                                                    AE_CONVERT(
                                                                        to_f64,
                                                                        "fd", f,
                                                                        d) AE_CONVERT(round_bf16,
                                                                                      "ff", f, f)
                                                                        AE_CONVERT(
                                                                            round_f16,
                                                                            "ff", f,
                                                                            f) AE_CONVERT(mask_to_i64,
                                                                                          "bi", b, i)
                                                                            AE_CONVERT(mask_to_f32,
                                                                                       "bf", b, f)
                                                                                AE_CONVERT(
                                                                                    mask_to_f64,
                                                                                    "bd", b,
                                                                                    d) AE_SELECT("b"
                                                                                                 "i"
                                                                                                 "i"
                                                                                                 "i",
                                                                                                 i)
                                                                                    AE_SELECT(
                                                                                        "bfff",
                                                                                        f)
                                                                                        AE_SELECT(
                                                                                            "bddd",
                                                                                            d)};

// A node of an expression; arguments come before it.
struct Node {
  enum Source { kIndex, kConstant, kOp, kGather } source;
  char kind;
  int which;  // index 0..3 = b, h, q, k; number of the op; number of the capture
  int args[4];
  Value constant;
};

inline ae::Interval constant_interval(const Node& n) {
  if (n.kind == kInt) return ae::iv::constant(n.constant.i);
  return ae::iv::constant(n.kind == kFloat  ? double(n.constant.f)
                          : n.kind == kBool ? double(n.constant.b)
                                            : n.constant.d);
}

template <class T, class F>
auto with_indices(int rank, const T* x, F f) {
  switch (rank) {
    case 0:
      return f();
    case 1:
      return f(x[0]);
    case 2:
      return f(x[0], x[1]);
    default:
      return f(x[0], x[1], x[2]);
  }
}

inline Value gather_point(const ae::Env& env, int cap, const int64_t* x) {
  const ae_capture& c = env.cap[cap];
  const auto read = [&]<class T>(T) {
    return with_indices(c.rank, x, [&](auto... idx) {
      const auto value = ae::gather<T>(env, cap, true, idx...);
      return Value{int64_t(0), float(value), double(value), bool(value)};
    });
  };
  const auto read_int = [&]<class T>(T) {
    return with_indices(c.rank, x, [&](auto... idx) {
      return Value{.i = int64_t(ae::gather<T>(env, cap, true, idx...))};
    });
  };
  switch (c.dtype) {
    case AE_F32:
      return read(float());
    case AE_F64:
      return read(double());
    case AE_BF16:
      return read(ae::bf16());
    case AE_F16:
      return read(ae::f16());
    case AE_BOOL:
      return read(bool());
    case AE_I64:
      return read_int(int64_t());
    case AE_I32:
      return read_int(int32_t());
    case AE_I16:
      return read_int(int16_t());
    case AE_I8:
      return read_int(int8_t());
    default:
      return read_int(uint8_t());
  }
}

inline ae::Interval gather_interval(const ae::IntervalEnv& env, int cap, const ae::Interval* x) {
  const ae_capture& c = env.cap[cap];
  const auto read = [&]<class T>(T) {
    return with_indices(c.rank, x,
                        [&](auto... idx) { return ae::iv::gather<T>(env, cap, idx...); });
  };
  switch (c.dtype) {
    case AE_F32:
      return read(float());
    case AE_F64:
      return read(double());
    case AE_BF16:
      return read(ae::bf16());
    case AE_F16:
      return read(ae::f16());
    case AE_BOOL:
      return read(bool());
    case AE_I64:
      return read(int64_t());
    case AE_I32:
      return read(int32_t());
    case AE_I16:
      return read(int16_t());
    case AE_I8:
      return read(int8_t());
    default:
      return read(uint8_t());
  }
}

inline char kind_of(int dtype) {
  return dtype == AE_F64 ? kDouble : dtype == AE_BOOL ? kBool : dtype <= AE_F16 ? kFloat : kInt;
}

}  // namespace test
