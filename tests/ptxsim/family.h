// What the families of instructions share: reading an opcode's modifiers, where what nobody has
// taken is an error, and going over the lanes.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>

#include "cta.h"
#include "machine.h"

namespace ptxsim {

class Modifiers {
 public:
  explicit Modifiers(const Opcode& opcode) : opcode_(opcode) {}

  bool take(std::string_view name) {
    for (size_t i = 1; i < opcode_.part.size(); ++i) {
      if (opcode_.part[i] == name && !(taken_ >> i & 1)) {
        taken_ |= uint64_t{1} << i;
        return true;
      }
    }
    return false;
  }

  // The index in `names` of the one that the opcode has; -1: none.
  int one_of(std::initializer_list<std::string_view> names) {
    int index = 0;
    for (std::string_view name : names) {
      if (take(name)) return index;
      ++index;
    }
    return -1;
  }

  // As one_of(), where PTX demands one.
  int required(std::initializer_list<std::string_view> names, const char* what) {
    int index = one_of(names);
    if (index < 0) unknown(opcode_, std::string("no ") + what + " that is known");
    return index;
  }

  void finish() const {
    for (size_t i = 1; i < opcode_.part.size(); ++i)
      if (!(taken_ >> i & 1)) unknown(opcode_, "modifier ." + std::string(opcode_.part[i]));
  }

 private:
  const Opcode& opcode_;
  uint64_t taken_ = 0;
};

inline void expect_operands(const Opcode& opcode, const Instr& instr, size_t fewest, size_t most) {
  if (instr.op.size() < fewest || instr.op.size() > most)
    unknown(opcode, std::to_string(instr.op.size()) + " operands");
}
inline void expect_operands(const Opcode& opcode, const Instr& instr, size_t count) {
  expect_operands(opcode, instr, count, count);
}

// Writes value(l) to the lanes of the mask; value() may be asked for the others too.
template <class F>
inline void write_lanes(uint64_t* out, Mask mask, F value) {
  if (mask == kAll) {
    for (int l = 0; l < kLanes; ++l) out[l] = value(l);
  } else {
    for (int l = 0; l < kLanes; ++l) out[l] = mask >> l & 1 ? uint64_t(value(l)) : out[l];
  }
}

// The lanes' addresses of an operand [register + offset], in its space.
inline void lane_addresses(const Warp& warp, const Operand& o, uint64_t* address) {
  uint64_t offset = uint64_t(o.offset);
  if (o.row == -1) {
    for (int l = 0; l < kLanes; ++l) address[l] = offset;
  } else {
    const uint64_t* base = warp.slots + int64_t{o.row} * kLanes;
    for (int l = 0; l < kLanes; ++l) address[l] = base[l] + offset;
  }
}

// 32 random bits for each lane, which the launch's seed and the lane's argument decide: a unit that
// approximates gives the same result for the same argument in every lane and block, as hardware
// does.
inline void random_lanes(const Warp& warp, const uint64_t* argument, uint32_t* bits) {
  const uint64_t seed = (warp.cta->launch->seed + 1) * 0x9e3779b97f4a7c15u;
  const uint32_t low = uint32_t(seed), high = uint32_t(seed >> 32);
  for (int l = 0; l < kLanes; ++l) {
    uint32_t x = (low + uint32_t(argument[l]) * 0x9e3779b9u) ^ high;
    x = (x ^ x >> 16) * 0x85ebca6bu;
    x = (x ^ x >> 13) * 0xc2b2ae35u;
    bits[l] = x ^ x >> 16;
  }
}

}  // namespace ptxsim
