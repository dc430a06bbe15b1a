// What each byte of a thread block's shared memory has been through: who wrote it last, who has
// read it since, and whether an asynchronous copy is on its way to it. Each access is compared with
// that, and is a race if nothing orders the two: the order of one lane's instructions,
// bar.warp.sync between lanes of a warp, barriers between warps. shfl and vote order nothing. Races
// between thread blocks, and races in global memory, are not looked for.
//
// Every access of a warp to shared memory has a number, its id, counted over the thread block: ids
// are the clocks of the happens-before relation. What warp u knows of warp v is the largest id of v
// that happens before u's next access. Since ids increase as the block runs, one comparison settles
// nearly every access: all ids up to u's `floor` happen before it. After a barrier of the whole
// block that is every access before it.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "cta.h"

namespace ptxsim {

class Shadow {
 public:
  explicit Shadow(Cta& cta);
  ~Shadow();

  // Bounds and alignment have been checked. Faults: "uninitialized", "race", "cp.async".
  void access(Warp& warp, const Instr& instr, Mask mask, const uint32_t* offset, int bytes,
              Access access);

  // bar.warp.sync: orders these lanes' accesses, with those of lanes that have exited.
  void sync_lanes(const Warp& warp, Mask lanes);
  // A warp arrives at a barrier (0 to 15): what it has done and what it knows go into the barrier.
  void arrive(const Warp& warp, int barrier);
  // The barrier completes: the warps that waited at it know all that went into it.
  void complete(int barrier, uint32_t waiting_warps);

  // The destinations, just accessed as writes, are undefined until end_copy.
  void begin_copy(const Warp& warp, Mask lanes, const uint32_t* offset, int bytes);
  // The threads that issued the copies have waited for them: as if they had stored the bytes now.
  void end_copy(const Warp& warp, const Instr& copy, Mask lanes, const uint32_t* offset, int bytes);

 private:
  // An access, packed so that a greater value is a later access: id << 6 | who. `who` is a node of
  // the binary tree over the lanes: 32 + lane for one lane, 1 for the whole warp, between them the
  // smallest aligned group of lanes that holds all that took part.
  using Stamp = int32_t;
  static constexpr int kIdBits = 24;
  // Stamps that no floor reaches, so that they leave the fast path.
  static constexpr Stamp kUnwritten = 0x7fffffff;
  static constexpr Stamp kSplit = 0x7ffffffe;   // parts of the cell differ: see the next layer
  static constexpr Stamp kStrong = 0x7ffffffd;  // atomics and strong accesses: see strong_
  static constexpr Stamp kPending = 1 << 30;    // flag: a copy, by this stamp, is on its way

  struct Done {  // what an id stands for
    const Instr* instr;
    int32_t warp;
  };
  // Stamps of consecutive cells of 16, 4 and 1 bytes. A cell whose parts are accessed one by one is
  // split into four of the next layer, and becomes one again when it is written as one, or when
  // what its parts differ in no longer matters.
  struct Layer {
    int shift = 0;  // log2 of a cell's bytes
    size_t cells = 0;
    std::unique_ptr<Stamp[]> write;                 // the last write
    std::unique_ptr<Stamp[]> read;                  // the last read by any warp
    std::vector<std::unique_ptr<Stamp[]>> by_warp;  // ... by each warp
    void create(size_t bytes, int warps);
  };
  enum { kChunks, kWords, kBytes };
  // Accesses of one word that do not race with each other: atomics, volatile and relaxed ones.
  struct Strong {
    std::vector<Stamp> write, read;  // by warp
    Stamp plain = kUnwritten;        // the last write of another sort
    std::vector<int32_t> released;   // what an acquire of this word makes known
  };
  struct Actor {  // the access being checked
    Warp& warp;
    const Instr& instr;
    Access access;
    bool strong;
    const uint32_t* offset;  // of all lanes
    int bytes;
    int lane;
    Stamp stamp;
  };

  template <int Cells, int Shift>
  void read_cells(Layer& layer, Mask mask, Actor& actor, Stamp all_lanes);
  template <int Cells, int Shift>
  void write_cells(Layer& layer, Mask mask, Actor& actor, Stamp all_lanes);
  template <int Cells, int Shift>
  void access_cells(int layer, Mask mask, Actor& actor, Stamp all_lanes);
  Layer& layer_of(int bytes);

  // One cell, exactly (shadow_exact.cpp).
  void check_cell(int layer, size_t cell, const Actor& actor);
  void check_write_stamp(Stamp before, uint32_t at, const Actor& actor) const;
  void check_readers(const Layer& layer, size_t cell, uint32_t at, const Actor& actor) const;
  void check_strong(size_t word, const Actor& actor);
  void enter_strong(size_t word, Strong& state, const Actor& actor);
  bool same_value(uint32_t at, int bytes, int other, const Actor& actor) const;
  void note_read(Layer& layer, size_t cell, const Actor& actor);
  Mask open(int layer, Mask mask, const Actor& actor);
  void split(int layer, size_t cell);
  void join(int layer, size_t cell);
  bool ordered(Stamp before, const Actor& actor) const;
  Stamp merged(Stamp before, const Actor& actor) const;
  [[noreturn]] void race(Stamp before, bool wrote, uint32_t at, const Actor& actor) const;
  std::string place_of(Stamp stamp) const;

  Stamp next(const Warp& warp, const Instr& instr);  // a new id, `who` 0
  int32_t& known(int warp, int other) { return known_[size_t(warp) * warps_ + other]; }
  int32_t known(int warp, int other) const { return known_[size_t(warp) * warps_ + other]; }
  void set_floor(int warp);
  void forget();  // drops ids that happen before everything to come

  Cta& cta_;
  int warps_;
  std::array<Layer, 3> layers_;  // made when first used
  std::unordered_map<size_t, Strong> strong_;
  std::vector<Done> done_;      // by id; id 1 stands for all that forget() dropped
  std::vector<int32_t> known_;  // [warp][other]; [warp][warp]: up to where its lanes are in order
  std::vector<int32_t> last_;   // [warp]: its last id
  std::vector<Stamp> floor_;    // [warp]: every stamp up to it happens before what comes
  std::vector<std::vector<int32_t>> barrier_;  // [barrier][warp]
  // [warp]: [lane][other lane], where bar.warp.sync has ordered some of the lanes only.
  std::vector<std::vector<int32_t>> lanes_;
};

}  // namespace ptxsim
