// ld, ldu, st, prefetches, fences, and conversions between address spaces.
#include <atomic>
#include <bit>
#include <cstring>

#include "counters.h"
#include "cta.h"
#include "family.h"
#include "memory.h"

namespace ptxsim {
namespace {

// attr: space, elements, and bytes of all of them.
enum { kSpaceAttr, kCount, kBytes };

const Operand& element(const Instr& instr, size_t data, int64_t i) {
  const Operand& o = instr.op[data];
  return o.kind == Operand::kVector ? o.items[size_t(i)] : o;
}

template <class T>
void load(Warp& warp, const Instr& instr, Mask mask) {
  uint64_t address[kLanes];
  uint8_t* host[kLanes];
  lane_addresses(warp, instr.op[1], address);
  resolve(warp, instr, mask, Space(instr.attr[kSpaceAttr]), address, int(instr.attr[kBytes]),
          Access::kRead, host);
  for (int64_t i = 0; i < instr.attr[kCount]; ++i) {
    const Operand& to = element(instr, 0, i);
    uint64_t* out = warp.out(to);
    uint64_t width =
        to.bytes == 0 || to.bytes == 8 ? ~uint64_t{0} : (uint64_t{1} << 8 * to.bytes) - 1;
    each_lane(mask, [&](int l) {
      T value;
      std::memcpy(&value, host[l] + i * int64_t{sizeof(T)}, sizeof(T));
      out[l] = uint64_t(int64_t(value)) & width;
    });
  }
}

template <class T>
void store(Warp& warp, const Instr& instr, Mask mask) {
  uint64_t address[kLanes];
  uint8_t* host[kLanes];
  lane_addresses(warp, instr.op[0], address);
  resolve(warp, instr, mask, Space(instr.attr[kSpaceAttr]), address, int(instr.attr[kBytes]),
          Access::kWrite, host);
  for (int64_t i = 0; i < instr.attr[kCount]; ++i) {
    const uint64_t* in = warp.in(element(instr, 1, i));
    each_lane(mask, [&](int l) {
      T value = T(in[l]);
      std::memcpy(host[l] + i * int64_t{sizeof(T)}, &value, sizeof(T));
    });
  }
}

// The kernel's own parameters, at an address that is known: one value for all lanes.
template <class T>
void load_parameter(Warp& warp, const Instr& instr, Mask mask) {
  const auto& parameters = warp.cta->launch->parameters;
  if (uint64_t(instr.op[1].offset + instr.attr[kBytes]) > parameters.size())
    return load<T>(warp, instr, mask);  // and is rejected there
  const uint8_t* from = parameters.data() + instr.op[1].offset;
  for (int64_t i = 0; i < instr.attr[kCount]; ++i) {
    T value;
    std::memcpy(&value, from + i * int64_t{sizeof(T)}, sizeof(T));
    uint64_t* out = warp.out(element(instr, 0, i));
    each_lane(mask, [&](int l) { out[l] = uint64_t(value); });
  }
}

void do_nothing(Warp&, const Instr&, Mask) {}

void run_fence(Warp&, const Instr&, Mask) { std::atomic_thread_fence(std::memory_order_seq_cst); }

// attr: the window's tag.
void to_window(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t* in = warp.in(instr.op[1]);
  uint64_t tag = uint64_t(instr.attr[0]);
  write_lanes(warp.out(instr.op[0]), mask, [&](int l) { return in[l] | tag; });
}

// Addresses outside of the window become one that no access is allowed to.
void from_window(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t* in = warp.in(instr.op[1]);
  uint64_t tag = uint64_t(instr.attr[0]);
  constexpr uint64_t kNowhere = 0xFFFF'FF00u;
  write_lanes(warp.out(instr.op[0]), mask, [&](int l) {
    return (in[l] & kWindow) == tag ? in[l] & ~kWindow : kNowhere | (in[l] & 0xFF);
  });
}

void copy(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t* in = warp.in(instr.op[1]);
  write_lanes(warp.out(instr.op[0]), mask, [&](int l) { return in[l]; });
}

void in_window(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t* in = warp.in(instr.op[1]);
  uint64_t tag = uint64_t(instr.attr[0]);
  write_lanes(warp.out(instr.op[0]), mask,
              [&](int l) { return uint64_t((in[l] & kWindow) == tag); });
}

// attr: whether constant variables are meant, or everything else outside of windows.
void in_host_memory(Warp& warp, const Instr& instr, Mask mask) {
  const uint64_t* in = warp.in(instr.op[1]);
  uint64_t* out = warp.out(instr.op[0]);
  const Module& module = *warp.cta->launch->kernel->module;
  each_lane(mask, [&](int l) {
    bool constant = false;
    for (auto& [name, v] : module.variables)
      constant |= v.space == Space::kConst && v.address <= in[l] && in[l] < v.address + v.bytes;
    out[l] = (in[l] & kWindow) == 0 && constant == bool(instr.attr[0]);
  });
}

Space space(Modifiers& modifiers) {
  if (modifiers.take("global")) return Space::kGlobal;
  if (modifiers.one_of({"shared", "shared::cta"}) >= 0) return Space::kShared;
  if (modifiers.take("local")) return Space::kLocal;
  if (modifiers.one_of({"param", "param::entry", "param::func"}) >= 0) return Space::kParam;
  if (modifiers.take("const")) return Space::kConst;
  return Space::kGeneric;
}

uint64_t tag_of(Space space) {
  return space == Space::kShared  ? kSharedWindow
         : space == Space::kLocal ? kLocalWindow
         : space == Space::kParam ? kParamWindow
                                  : 0;
}

bool decode_space(const Opcode& opcode, Instr& instr) {
  Modifiers modifiers(opcode);
  bool to = modifiers.take("to");
  Space where = space(modifiers);
  if (where == Space::kGeneric) unknown(opcode, "no space that is known");
  if (opcode.name() == "cvta") modifiers.required({"u64", "u32", "s64"}, "type");
  modifiers.finish();
  expect_operands(opcode, instr, 2);
  uint64_t tag = tag_of(where);
  instr.attr[0] = int64_t(tag);
  instr.counter = kMove;
  if (opcode.name() == "isspacep") {
    instr.exec = tag == 0 ? in_host_memory : in_window;
    if (tag == 0) instr.attr[0] = where == Space::kConst;
  } else {
    instr.exec = tag == 0 ? copy : to ? from_window : to_window;
  }
  return true;
}

bool decode_fence(const Opcode& opcode, Instr& instr) {
  Modifiers modifiers(opcode);
  if (opcode.name() == "membar")
    modifiers.required({"cta", "gl", "sys"}, "scope");
  else {
    modifiers.one_of({"sc", "acq_rel", "acquire", "release"});
    modifiers.required({"cta", "cluster", "gpu", "sys"}, "scope");
  }
  modifiers.finish();
  expect_operands(opcode, instr, 0);
  instr.exec = run_fence;
  instr.counter = kFence;
  return true;
}

bool decode_hint(const Opcode& opcode, Instr& instr) {
  Modifiers modifiers(opcode);
  modifiers.one_of({"global", "local"});
  if (opcode.name() == "discard" || opcode.name() == "applypriority") {
    modifiers.take("L2::evict_normal");
    modifiers.take("L2");
  } else {
    modifiers.required({"L1", "L2", "L2::evict_last", "L2::evict_normal"}, "cache level");
  }
  modifiers.finish();
  instr.exec = do_nothing;
  instr.counter = kControl;
  return true;
}

// The policy of a cache has no effect here; its value is any.
bool decode_policy(const Opcode& opcode, Instr& instr) {
  Modifiers modifiers(opcode);
  modifiers.required({"fractional", "range"}, "kind");
  modifiers.take("global");
  for (int i = 0; i < 2; ++i)
    modifiers.one_of(
        {"L2::evict_last", "L2::evict_normal", "L2::evict_first", "L2::evict_unchanged"});
  modifiers.required({"b64"}, "type");
  modifiers.finish();
  instr.exec = [](Warp& warp, const Instr& i, Mask mask) {
    write_lanes(warp.out(i.op[0]), mask, [](int) { return uint64_t{0}; });
  };
  instr.counter = kMove;
  return true;
}

// Where data is kept in caches does not change what it is.
void take_hints(Modifiers& modifiers) {
  modifiers.one_of({"ca", "cg", "cs", "lu", "cv", "wb", "wt"});
  modifiers.one_of({"L1::evict_normal", "L1::evict_unchanged", "L1::evict_first", "L1::evict_last",
                    "L1::no_allocate"});
  modifiers.one_of({"L2::evict_normal", "L2::evict_first", "L2::evict_last"});
  modifiers.take("L2::cache_hint");
  modifiers.one_of({"L2::64B", "L2::128B", "L2::256B"});
}

template <template <class> class Run>
Exec by_type(int type) {
  static constexpr Exec kOf[] = {Run<uint8_t>::run,  Run<uint16_t>::run, Run<uint32_t>::run,
                                 Run<uint64_t>::run, Run<int8_t>::run,   Run<int16_t>::run,
                                 Run<int32_t>::run,  Run<int64_t>::run};
  return kOf[type];
}
template <class T>
struct Load {
  static void run(Warp& w, const Instr& i, Mask m) { load<T>(w, i, m); }
};
template <class T>
struct LoadParameter {
  static void run(Warp& w, const Instr& i, Mask m) { load_parameter<T>(w, i, m); }
};
template <class T>
struct Store {
  static void run(Warp& w, const Instr& i, Mask m) { store<T>(w, i, m); }
};

bool decode_access(const Opcode& opcode, Instr& instr) {
  Modifiers modifiers(opcode);
  bool is_store = opcode.name() == "st";
  Space where = space(modifiers);
  bool scoped = !is_store ? modifiers.one_of({"relaxed", "acquire"}) >= 0
                          : modifiers.one_of({"relaxed", "release"}) >= 0;
  if (scoped)
    modifiers.required({"cta", "cluster", "gpu", "sys"}, "scope");
  else if (modifiers.one_of({"volatile", "weak"}) < 0 && !is_store)
    modifiers.take("nc");
  modifiers.take("mmio");
  take_hints(modifiers);
  int vector = modifiers.one_of({"v2", "v4"});
  int64_t count = vector < 0 ? 1 : 2 << vector;
  int type = modifiers.required({"b8", "b16", "b32", "b64", "u8", "u16", "u32", "u64", "s8", "s16",
                                 "s32", "s64", "f32", "f64", "f16", "bf16"},
                                "type");
  if (type >= 12) type = type == 12 ? 2 : type == 13 ? 3 : 1;
  modifiers.finish();
  expect_operands(opcode, instr, 2, 3);  // the third is a cache policy
  int width = type & 3;
  bool is_signed = type >= 8;
  const Operand& data = instr.op[is_store ? 1 : 0];
  const Operand& address = instr.op[is_store ? 0 : 1];
  if (address.kind != Operand::kAddress) unknown(opcode, "an address in brackets is expected");
  if ((data.kind == Operand::kVector) != (count > 1) ||
      (count > 1 && int64_t(data.items.size()) != count))
    unknown(opcode, "the number of registers is not that of the opcode's vector");
  instr.attr[kSpaceAttr] = int64_t(where);
  instr.attr[kCount] = count;
  instr.attr[kBytes] = count << width;
  instr.counter = is_store ? kStore : kLoad;
  bool fixed = where == Space::kParam && address.row < 0 && !is_store && !is_signed &&
               address.offset >= 0 && address.offset < int64_t(kCallParams) &&
               address.offset % instr.attr[kBytes] == 0;
  int index = width + (is_signed ? 4 : 0);
  instr.exec = is_store ? by_type<Store>(index)
               : fixed  ? by_type<LoadParameter>(index)
                        : by_type<Load>(index);
  return true;
}

}  // namespace

bool decode_memory(const Opcode& opcode, Instr& instr) {
  std::string_view name = opcode.name();
  if (name == "ld" || name == "ldu" || name == "st") return decode_access(opcode, instr);
  if (name == "cvta" || name == "isspacep") return decode_space(opcode, instr);
  if (name == "fence" || name == "membar") return decode_fence(opcode, instr);
  if (name == "prefetch" || name == "prefetchu" || name == "discard" || name == "applypriority")
    return decode_hint(opcode, instr);
  if (name == "createpolicy") return decode_policy(opcode, instr);
  return false;
}

}  // namespace ptxsim
