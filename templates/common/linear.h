// What linear-attention kernels of every target share: kinds of decay, and where an elementwise
// hook stands.
#pragma once
#include <cstdint>

namespace ae {

// Of the log-decay: none, one number a token (or head), one a token and channel of k.
enum class DecayKind { kNone, kScalar, kChannel };

// The elements that a vector given to a hook holds: `count` lanes are live, the rest is anything.
// Lane i is channel d + i of token t; of a scalar decay, token t + i and channel 0. `h` is the
// query/key head in q_mod and k_mod, else the value head. `b` and `t` are those of the operand:
// packed sequences share row 0.
struct HookAt {
  int64_t b, h, t, d;
  int count;
};

}  // namespace ae
