// mma.sync m16n8kK. Products are exact and summed in double, beside the addend; the sum is rounded
// once, to nearest even. (Hardware sums with fewer bits and cuts them off: results are compared
// with tolerances, on both.) Integer sums wrap, or saturate with .satfinite.
//
// Fragments: register r of A holds, of an 8-row block of 4 * (elements per register) columns, row
// l/4 and the columns that lane l%4 has in order; blocks run down the rows first, then along k. B
// is the same with n for rows, and has one row of blocks. So a fragment's registers, lane after
// lane, are the block in row-major order.
#include <cstring>

#include "counters.h"
#include "family.h"
#include "machine.h"
#include "matrix.h"
#include "narrow.h"

namespace ptxsim {
namespace {

constexpr int kRows = 16, kColumns = 8;

// How 32-bit registers of a fragment are read: kPer elements each, summed in Sum.
struct HalfElements {
  using Sum = double;
  using Bits = uint16_t;
  static constexpr int kPer = 2;
  static double value(Bits b) { return half_to_float(b); }
};
struct BfloatElements {
  using Sum = double;
  using Bits = uint16_t;
  static constexpr int kPer = 2;
  static double value(Bits b) { return bfloat_to_float(b); }
};
struct Tf32Elements {  // the lower 13 bits are ignored
  using Sum = double;
  using Bits = uint32_t;
  static constexpr int kPer = 1;
  static double value(Bits b) { return std::bit_cast<float>(b & 0xffffe000u); }
};
template <class T>
struct ByteElements {
  using Sum = int64_t;
  using Bits = T;
  static constexpr int kPer = 4;
  static int64_t value(Bits b) { return b; }
};

// One register of a fragment: an 8-row block with row stride `stride`.
template <class E>
inline void read_block(const uint64_t* row, typename E::Sum* to, int stride) {
  constexpr int kWidth = 4 * E::kPer;
  uint32_t packed[kLanes];
  for (int l = 0; l < kLanes; ++l) packed[l] = uint32_t(row[l]);
  typename E::Bits bits[8][kWidth];
  static_assert(sizeof(bits) == sizeof(packed));
  std::memcpy(bits, packed, sizeof(bits));
  for (int r = 0; r < 8; ++r)
    for (int c = 0; c < kWidth; ++c) to[r * stride + c] = E::value(bits[r][c]);
}

// Accumulators: f32 has the two columns of a lane in two registers, f16 in one.
struct FloatSums {
  static constexpr int kRegisters = 4;
  template <class Sum>
  static void read(Warp& warp, const Operand& o, Sum (*sum)[kColumns]) {
    for (int r = 0; r < 4; ++r) {
      const uint64_t* in = warp.in(o.items[size_t(r)]);
      for (int l = 0; l < kLanes; ++l)
        sum[l / 4 + 8 * (r / 2)][2 * (l % 4) + r % 2] = Sum(as_float(in[l]));
    }
  }
  template <class Sum>
  static void write(Warp& warp, const Operand& o, Sum (*sum)[kColumns], bool) {
    for (int r = 0; r < 4; ++r) {
      uint64_t* out = warp.out(o.items[size_t(r)]);
      for (int l = 0; l < kLanes; ++l) {
        float x = float(sum[l / 4 + 8 * (r / 2)][2 * (l % 4) + r % 2]);
        out[l] = x == x ? bits_of(x) : uint64_t{kNanFloat};
      }
    }
  }
};
struct HalfSums {
  static constexpr int kRegisters = 2;
  template <class Sum>
  static void read(Warp& warp, const Operand& o, Sum (*sum)[kColumns]) {
    for (int r = 0; r < 2; ++r)
      read_block<HalfElements>(warp.in(o.items[size_t(r)]), sum[8 * r], kColumns);
  }
  template <class Sum>
  static void write(Warp& warp, const Operand& o, Sum (*sum)[kColumns], bool) {
    for (int r = 0; r < 2; ++r) {
      uint64_t* out = warp.out(o.items[size_t(r)]);
      for (int l = 0; l < kLanes; ++l) {
        const double* pair = &sum[8 * r + l / 4][2 * (l % 4)];
        out[l] = float_to_half(odd_float(pair[0])) | float_to_half(odd_float(pair[1])) << 16;
      }
    }
  }
};
struct IntegerSums {
  static constexpr int kRegisters = 4;
  template <class Sum>
  static void read(Warp& warp, const Operand& o, Sum (*sum)[kColumns]) {
    for (int r = 0; r < 4; ++r) {
      const uint64_t* in = warp.in(o.items[size_t(r)]);
      for (int l = 0; l < kLanes; ++l)
        sum[l / 4 + 8 * (r / 2)][2 * (l % 4) + r % 2] = int32_t(in[l]);
    }
  }
  template <class Sum>
  static void write(Warp& warp, const Operand& o, Sum (*sum)[kColumns], bool saturate) {
    for (int r = 0; r < 4; ++r) {
      uint64_t* out = warp.out(o.items[size_t(r)]);
      for (int l = 0; l < kLanes; ++l) {
        Sum x = sum[l / 4 + 8 * (r / 2)][2 * (l % 4) + r % 2];
        if (saturate) x = x < INT32_MIN ? INT32_MIN : x > INT32_MAX ? INT32_MAX : x;
        out[l] = uint32_t(x);
      }
    }
  }
};

// attr: 0 .satfinite. kBlocks: of 4 * kPer each along k.
template <class A, class B, class Sums, int kBlocks>
void multiply(Warp& warp, const Instr& instr, Mask mask) {
  need_all_lanes(warp, instr, mask);
  using Sum = typename A::Sum;
  constexpr int kWidth = 4 * A::kPer, kDepth = kWidth * kBlocks;
  using Row [[gnu::vector_size(kColumns * sizeof(Sum))]] = Sum;
  alignas(64) Sum a[kRows][kDepth], b[kColumns][kDepth];
  Row turned[kDepth], sum[kRows];
  for (int k = 0; k < kBlocks; ++k) {
    for (int half = 0; half < 2; ++half)
      read_block<A>(warp.in(instr.op[1].items[size_t(2 * k + half)]), &a[8 * half][kWidth * k],
                    kDepth);
    read_block<B>(warp.in(vector_item(instr.op[2], size_t(k))), &b[0][kWidth * k], kDepth);
  }
  for (int k = 0; k < kDepth; ++k)
    for (int n = 0; n < kColumns; ++n) turned[k][n] = b[n][k];
  auto* sums = reinterpret_cast<Sum(*)[kColumns]>(sum);
  Sums::read(warp, instr.op[3], sums);
  for (int m = 0; m < kRows; m += 4) {  // four at a time: their additions do not wait for another
    Row r0 = sum[m], r1 = sum[m + 1], r2 = sum[m + 2], r3 = sum[m + 3];
    for (int k = 0; k < kDepth; ++k) {
      r0 += a[m][k] * turned[k];
      r1 += a[m + 1][k] * turned[k];
      r2 += a[m + 2][k] * turned[k];
      r3 += a[m + 3][k] * turned[k];
    }
    sum[m] = r0, sum[m + 1] = r1, sum[m + 2] = r2, sum[m + 3] = r3;
  }
  Sums::write(warp, instr.op[0], sums, instr.attr[0] != 0);
}

template <class A, class B, class Sums>
Exec multiply_blocks(const Opcode& opcode, int depth) {
  if (depth == 4 * A::kPer) return multiply<A, B, Sums, 1>;
  if (depth == 8 * A::kPer) return multiply<A, B, Sums, 2>;
  unknown(opcode, "this shape for this type");
}

Exec choose(const Opcode& opcode, std::string_view a, std::string_view b, std::string_view sums,
            int depth) {
  bool to_float = sums == "f32", to_half = sums == "f16", to_integer = sums == "s32";
  if (a == "f16" && b == a && to_float)
    return multiply_blocks<HalfElements, HalfElements, FloatSums>(opcode, depth);
  if (a == "f16" && b == a && to_half)
    return multiply_blocks<HalfElements, HalfElements, HalfSums>(opcode, depth);
  if (a == "bf16" && b == a && to_float)
    return multiply_blocks<BfloatElements, BfloatElements, FloatSums>(opcode, depth);
  if (a == "tf32" && b == a && to_float)
    return multiply_blocks<Tf32Elements, Tf32Elements, FloatSums>(opcode, depth);
  using S8 = ByteElements<int8_t>;
  using U8 = ByteElements<uint8_t>;
  if (to_integer && a == "s8" && b == "s8")
    return multiply_blocks<S8, S8, IntegerSums>(opcode, depth);
  if (to_integer && a == "s8" && b == "u8")
    return multiply_blocks<S8, U8, IntegerSums>(opcode, depth);
  if (to_integer && a == "u8" && b == "s8")
    return multiply_blocks<U8, S8, IntegerSums>(opcode, depth);
  if (to_integer && a == "u8" && b == "u8")
    return multiply_blocks<U8, U8, IntegerSums>(opcode, depth);
  unknown(opcode, "these types");
}

}  // namespace

// mma.sync.aligned.shape.row.col{.satfinite}.d.a.b.c d, a, b, c
bool decode_mma(const Opcode& opcode, Instr& instr) {
  if (opcode.part.size() < 9) unknown(opcode, "too few modifiers");
  Modifiers modifier(opcode);
  modifier.required({"sync"}, ".sync");
  modifier.required({"aligned"}, ".aligned");
  constexpr int kDepths[] = {4, 8, 16, 32};
  int depth = kDepths[modifier.required({"m16n8k4", "m16n8k8", "m16n8k16", "m16n8k32"}, "shape")];
  modifier.required({"row"}, "layout of A");
  modifier.required({"col"}, "layout of B");
  std::string_view d = opcode.last(3), a = opcode.last(2), b = opcode.last(1), c = opcode.last();
  for (std::string_view type : {d, a, b, c}) modifier.take(type);
  if (d == "s32") instr.attr[0] = modifier.take("satfinite");
  modifier.finish();
  if (c != d) unknown(opcode, "an addend of another type");
  instr.exec = choose(opcode, a, b, d, depth);

  expect_operands(opcode, instr, 4);
  size_t elements = a == "tf32" ? 4 : a.ends_with("16") ? 8 : 16;  // per block, along k
  size_t blocks = size_t(depth) / elements, sums = d == "f16" ? 2 : 4;
  auto fits = [](const Operand& o, size_t n) {
    return o.kind == Operand::kVector ? o.items.size() == n : n == 1;
  };
  if (!fits(instr.op[0], sums) || !fits(instr.op[1], 2 * blocks) || !fits(instr.op[2], blocks) ||
      !fits(instr.op[3], sums))
    unknown(opcode, "a fragment of another size");
  instr.members = -2;
  instr.counter = kMma;
  instr.flops = 2 * kRows * kColumns * depth;
  return true;
}

}  // namespace ptxsim
