// atom and red, on global and shared memory.
//
// Thread blocks run in parallel, so that every operation is an atomic one of the host. The lanes of
// a warp take their turns in a random order: sums of floats must not depend on one.
#include <atomic>
#include <bit>
#include <cstring>

#include "counters.h"
#include "family.h"
#include "machine.h"
#include "module.h"
#include "narrow.h"

namespace ptxsim {
namespace {

// What memory holds after the operation: from what it held and the sources b and c.
using Update = uint64_t (*)(uint64_t old, uint64_t b, uint64_t c);

template <class T>
uint64_t add(uint64_t old, uint64_t b, uint64_t) {
  return T(T(old) + T(b));
}
template <class T>
uint64_t least(uint64_t old, uint64_t b, uint64_t) {
  return std::make_unsigned_t<T>(T(b) < T(old) ? T(b) : T(old));
}
template <class T>
uint64_t greatest(uint64_t old, uint64_t b, uint64_t) {
  return std::make_unsigned_t<T>(T(b) > T(old) ? T(b) : T(old));
}
uint64_t bit_and(uint64_t old, uint64_t b, uint64_t) { return old & b; }
uint64_t bit_or(uint64_t old, uint64_t b, uint64_t) { return old | b; }
uint64_t bit_xor(uint64_t old, uint64_t b, uint64_t) { return old ^ b; }
uint64_t exchange(uint64_t, uint64_t b, uint64_t) { return b; }
template <class T>
uint64_t compare_and_swap(uint64_t old, uint64_t b, uint64_t c) {
  return T(old) == T(b) ? c : old;
}
uint64_t increment(uint64_t old, uint64_t b, uint64_t) {
  return uint32_t(old) >= uint32_t(b) ? 0 : old + 1;
}
uint64_t decrement(uint64_t old, uint64_t b, uint64_t) {
  return uint32_t(old) == 0 || uint32_t(old) > uint32_t(b) ? uint32_t(b) : old - 1;
}

uint64_t canonical(float x) { return x == x ? bits_of(x) : uint64_t{kNanFloat}; }
uint64_t add_float(uint64_t old, uint64_t b, uint64_t) {
  return canonical(as_float(old) + as_float(b));
}
// As global memory does it.
uint64_t add_float_flushed(uint64_t old, uint64_t b, uint64_t) {
  return canonical(flush(flush(as_float(old)) + flush(as_float(b))));
}
uint64_t add_double(uint64_t old, uint64_t b, uint64_t) {
  return bits_of(as_double(old) + as_double(b));
}

enum HalfOp { kHalfAdd, kHalfMin, kHalfMax };
template <class T, HalfOp kOp>
uint64_t half_op(uint64_t old, uint64_t b, uint64_t) {
  float x = T::widen(old & 0xffff), y = T::widen(b & 0xffff);
  if constexpr (kOp == kHalfAdd) return T::narrow(odd_float(odd_sum(x, y)));
  if (x != x || y != y) return x == x ? old : y == y ? b : uint64_t{kNanHalf};
  bool first = kOp == kHalfMin ? x < y : x > y;
  if (x == y) first = std::signbit(x) == (kOp == kHalfMin);  // -0 below +0
  return first ? old : b;
}

struct Operation {
  Update update = nullptr;
  Update flushed = nullptr;  // on global memory, where that differs
  int bytes = 4;             // of each atomic access
};

// attr: 0 and 1 the functions, 2 bytes of an access, 3 accesses per item, 4 items, 5 Space.
template <class Word>
uint64_t apply(uint8_t* at, Update update, uint64_t b, uint64_t c) {
  std::atomic_ref<Word> memory(*reinterpret_cast<Word*>(at));
  Word old = memory.load(std::memory_order_relaxed);
  while (!memory.compare_exchange_weak(old, Word(update(old, b, c)), std::memory_order_seq_cst,
                                       std::memory_order_relaxed)) {
  }
  return old;
}

uint64_t apply(int bytes, uint8_t* at, Update update, uint64_t b, uint64_t c) {
  return bytes == 2   ? apply<uint16_t>(at, update, b, c)
         : bytes == 4 ? apply<uint32_t>(at, update, b, c)
                      : apply<uint64_t>(at, update, b, c);
}

template <bool kReturns>
void atomic(Warp& warp, const Instr& instr, Mask mask) {
  const Operand& place = instr.op[kReturns ? 1 : 0];
  const Operand& source = instr.op[kReturns ? 2 : 1];
  Update update = reinterpret_cast<Update>(instr.attr[0]);
  Update flushed = reinterpret_cast<Update>(instr.attr[1]);
  int bytes = int(instr.attr[2]), parts = int(instr.attr[3]), items = int(instr.attr[4]);
  Space space = Space(instr.attr[5]);
  bool swaps = instr.op.size() > (kReturns ? 3u : 2u);
  const uint64_t* c = swaps ? warp.in(instr.op[kReturns ? 3 : 2]) : nullptr;

  uint64_t address[kLanes];
  uint8_t* host[kLanes];
  lane_addresses(warp, place, address);
  resolve(warp, instr, mask, space, address, bytes * parts * items, Access::kAtomic, host);

  uint64_t order = random_bits(warp);
  uint64_t old[8][kLanes];
  for (int turn = 0; turn < kLanes; ++turn) {
    int l = int(order + uint64_t(turn) * (order >> 5 | 1)) & 31;
    if (!(mask >> l & 1)) continue;
    bool in_shared = space == Space::kShared ||
                     (space == Space::kGeneric && (address[l] & kWindow) == kSharedWindow);
    for (int i = 0; i < items; ++i) {
      const Operand& from = items == 1 ? source : source.items[size_t(i)];
      uint64_t b = warp.in(from)[l], loaded = 0;
      for (int p = 0; p < parts; ++p) {
        int shift = 8 * bytes * p;
        uint64_t part = apply(bytes, host[l] + (i * parts + p) * bytes,
                              in_shared ? update : flushed, b >> shift, c ? c[l] : 0);
        loaded |= part << shift;
      }
      old[i][l] = loaded;
    }
  }
  if constexpr (kReturns) {
    for (int i = 0; i < items; ++i) {
      const Operand& to = items == 1 ? instr.op[0] : instr.op[0].items[size_t(i)];
      uint64_t* out = warp.out(to);
      each_lane(mask, [&](int l) { out[l] = old[i][l]; });
    }
  }
}

template <class T>
Operation half_operation(int op, int bytes) {
  constexpr Update kUpdates[] = {half_op<T, kHalfAdd>, half_op<T, kHalfMin>, half_op<T, kHalfMax>};
  return {kUpdates[op], kUpdates[op], bytes};
}

enum Name { kAdd, kMin, kMax, kInc, kDec, kAnd, kOr, kXor, kExch, kCas };

Operation integer_operation(const Opcode& opcode, int name, std::string_view type) {
  bool wide = type.ends_with("64");
  Operation o;
  o.bytes = wide ? 8 : type.ends_with("16") ? 2 : 4;
  bool bits = type[0] == 'b';
  if (bits != (name >= kAnd)) unknown(opcode, "this type for this operation");
  if (o.bytes == 2 && name != kCas) unknown(opcode, "this type for this operation");
  bool is_signed = type[0] == 's';
  switch (name) {
    case kAdd:
      o.update = wide ? add<uint64_t> : add<uint32_t>;
      break;
    case kMin:
      o.update = wide ? (is_signed ? least<int64_t> : least<uint64_t>)
                      : (is_signed ? least<int32_t> : least<uint32_t>);
      break;
    case kMax:
      o.update = wide ? (is_signed ? greatest<int64_t> : greatest<uint64_t>)
                      : (is_signed ? greatest<int32_t> : greatest<uint32_t>);
      break;
    case kInc:
    case kDec:
      if (type != "u32") unknown(opcode, "this type for this operation");
      o.update = name == kInc ? increment : decrement;
      break;
    case kAnd:
      o.update = bit_and;
      break;
    case kOr:
      o.update = bit_or;
      break;
    case kXor:
      o.update = bit_xor;
      break;
    case kExch:
      o.update = exchange;
      break;
    default:
      o.update = wide           ? compare_and_swap<uint64_t>
                 : o.bytes == 2 ? compare_and_swap<uint16_t>
                                : compare_and_swap<uint32_t>;
  }
  o.flushed = o.update;
  return o;
}

}  // namespace

bool decode_atomic(const Opcode& opcode, Instr& instr) {
  bool returns = opcode.name() == "atom";
  if (!returns && opcode.name() != "red") return false;
  if (opcode.has("async")) return false;  // red.async: of clusters
  instr.counter = kAtomic;
  Modifiers modifier(opcode);
  modifier.one_of({"relaxed", "acquire", "release", "acq_rel"});
  modifier.one_of({"cta", "cluster", "gpu", "sys"});
  int place = modifier.one_of({"global", "shared", "shared::cta"});
  Space space = place < 0 ? Space::kGeneric : place == 0 ? Space::kGlobal : Space::kShared;
  bool policy = modifier.take("L2::cache_hint");
  int name = modifier.required(
      {"add", "min", "max", "inc", "dec", "and", "or", "xor", "exch", "cas"}, "operation");
  if (!returns && name >= kExch) unknown(opcode, "this operation");
  int vector = modifier.one_of({"v2", "v4", "v8"});
  int items = vector < 0 ? 1 : 2 << vector;
  constexpr std::string_view kTypes[] = {"f16", "f16x2", "bf16", "bf16x2", "f32", "f64", "u32",
                                         "s32", "u64",   "s64",  "b32",    "b64", "b16"};
  int type = modifier.required(
      {kTypes[0], kTypes[1], kTypes[2], kTypes[3], kTypes[4], kTypes[5], kTypes[6], kTypes[7],
       kTypes[8], kTypes[9], kTypes[10], kTypes[11], kTypes[12]},
      "type");
  Operation o;
  int parts = 1;
  if (type < 4) {
    modifier.required({"noftz"}, ".noftz");
    if (name > kMax || (name != kAdd && items == 1)) unknown(opcode, "this operation");
    parts = type % 2 == 1 ? 2 : 1;
    o = type < 2 ? half_operation<Half>(name, 2) : half_operation<Bfloat>(name, 2);
  } else if (type < 6) {
    if (name != kAdd) unknown(opcode, "this operation");
    o = type == 4 ? Operation{add_float, add_float_flushed, 4}
                  : Operation{add_double, add_double, 8};
  } else {
    o = integer_operation(opcode, name, kTypes[type]);
  }
  modifier.finish();
  if (items > 1 && (type > 4 || space == Space::kShared)) unknown(opcode, "this vector");
  if (items * parts * o.bytes > 16) unknown(opcode, "this vector");

  if (policy) {  // where the data ends up in a cache is not simulated
    if (instr.op.empty()) unknown(opcode, "0 operands");
    instr.op.pop_back();
  }
  expect_operands(opcode, instr, size_t(returns) + 2 + (name == kCas));
  const Operand& address = instr.op[returns ? 1 : 0];
  if (address.kind != Operand::kAddress) unknown(opcode, "no address");
  for (size_t i = 0; i < instr.op.size(); ++i) {
    bool is_vector = instr.op[i].kind == Operand::kVector;
    if (is_vector != (items > 1) && &instr.op[i] != &address) unknown(opcode, "these operands");
    if (is_vector && instr.op[i].items.size() != size_t(items)) unknown(opcode, "this vector");
  }
  instr.attr[0] = reinterpret_cast<int64_t>(o.update);
  instr.attr[1] = reinterpret_cast<int64_t>(o.flushed);
  instr.attr[2] = o.bytes;
  instr.attr[3] = parts;
  instr.attr[4] = items;
  instr.attr[5] = int64_t(space);
  instr.exec = returns ? atomic<true> : atomic<false>;
  return true;
}

}  // namespace ptxsim
