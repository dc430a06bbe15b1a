// The forward pass chunk by chunk: what each adds to the state, the states before all of them, the
// outputs (linear_scan_work.h says when and how).
#pragma once
#include "cpu/linear_scan_work.h"
#include "cpu/linear_walk.h"

namespace ae {

// Of a slot: what the chunk adds to the states [group][panels][kD][kPanel], later the states before
// it; likewise z [group][kDPitch]; the decay of a row of the state, [group][kDPitch].
template <class Plan>
struct LinearSlot {
  using T = LinearTypes<Plan>;
  using Acc = typename T::Acc;
  static constexpr int64_t kState = T::kPanels * T::kPanelState;
  static constexpr int64_t kHead = kState + (Plan::kNormalizer ? 2 : 1) * T::kDPitch;

  Acc *states, *sums_z, *decays;

  LinearSlot(char* base, int64_t group) : states((Acc*)base) {
    sums_z = states + group * kState;
    decays = sums_z + (Plan::kNormalizer ? group * T::kDPitch : 0);
  }
  Acc* state(int64_t head) const { return states + head * kState; }
  Acc* z(int64_t head) const { return sums_z + head * T::kDPitch; }
  Acc* decay(int64_t head) const { return decays + head * T::kDPitch; }
};

// Consecutive chunks of one sequence, all value heads of a key head.
template <class Plan, class Fn>
class LinearScanWalk : LinearWalk<Plan, Fn> {
  using Walk = LinearWalk<Plan, Fn>;
  using T = LinearTypes<Plan>;
  using Acc = typename T::Acc;
  using M = typename T::M;
  using V = typename T::V;
  using Channel = LinearChannel<Plan>;
  using Slot = LinearSlot<Plan>;
  using Walk::in_, Walk::task_, Walk::keep_, Walk::fresh_, Walk::gates_, Walk::decay_;
  using Walk::k_tokens_, Walk::states_, Walk::sums_z_, Walk::packed_;
  static constexpr int W = T::W, C = T::kChunk, N = T::kPanel, kPitch = T::kDPitch;
  static constexpr LinearForwardScratch<Plan> kAt{};

 public:
  // slots: of the chunks, `apart` bytes from one to the next.
  LinearScanWalk(const LinearInputs<Plan, Fn>& in, const LinearTask& task, char* scratch,
                 char* slots, int64_t apart)
      : Walk(in, task, scratch), slots_(slots), apart_(apart) {}

  // What the chunks add.
  void add() {
    for (int64_t i = 0; i * C < task_.length; ++i) {
      const int64_t t = i * C, left = task_.length - t;
      add(task_.first + t, int(left < C ? left : C), slot(i));
    }
  }
  // Outputs. fresh: before the first chunk states are zero.
  void outputs(bool fresh) {
    keep_ = false, packed_ = nullptr;
    __builtin_memset(Walk::template at<M>(kAt.weights), 0, sizeof(M) * C * C);
    for (int64_t i = 0; i * C < task_.length; ++i) {
      const int64_t t = i * C, left = task_.length - t;
      const Slot x = slot(i);
      states_ = x.states, sums_z_ = x.sums_z;
      fresh_ = fresh && i == 0;
      Walk::chunk(task_.first + t, int(left < C ? left : C));
    }
  }

 private:
  char* const slots_;
  const int64_t apart_;

  Slot slot(int64_t chunk) const { return Slot(slots_ + chunk * apart_, task_.heads); }
  template <class X>
  X* at(int64_t offset) const {
    return Walk::template at<X>(offset);
  }

  void add(int64_t t, int n, const Slot& to) {
    LinearAt where{task_.b, task_.hk, task_.head, t, n};
    const LinearAt next = Walk::following(where);
    const auto k = in_.k(where, at<Acc>(kAt.k_stage));
    in_.raw_k(next).ahead(next.n, T::kD).fetch(0, C);
    if constexpr (T::kChannel) {
      tile_sums<Plan>(k, n, at<Acc>(kAt.k_stage));
    } else {
      k_tokens_ = T::kPair == 1 ? rows_in_place<Plan>(k) : nullptr;
      if (k_tokens_ == nullptr) {
        tile_over_tokens<Plan>(k, n, at<M>(kAt.k_tokens));
        k_tokens_ = at<M>(kAt.k_tokens);
      }
    }
    for (int64_t i = 0; i < task_.heads; ++i) {
      where.h = task_.head + i;
      const M* keys = decayed_keys(where);
      __builtin_memcpy(to.decay(i), decay_, sizeof(decay_));
      if constexpr (Plan::kNormalizer) {
        __builtin_memset(to.z(i), 0, sizeof(Acc) * kPitch);
        Walk::add_keys(where, k, to.z(i));
      }
      for (int panel = 0; panel < T::kPanels; ++panel) {
        add_panel(where, panel, keys, to.state(i) + panel * T::kPanelState);
      }
    }
  }

  // Decays of one head, and its keys as the A operand of (k f)^T v where they carry f.
  const M* decayed_keys(const LinearAt& where) {
    if constexpr (T::kChannel) {
      const int n = where.n, blocks = Channel::blocks(n);
      Acc *a = at<Acc>(kAt.a), *rest = at<Acc>(kAt.rest), *keys = at<Acc>(kAt.keys);
      const Acc* whole = at<Acc>(kAt.whole);
      Walk::load_channel_decay(where);
      Channel::products(a, n, at<Acc>(kAt.inside), rest, at<Acc>(kAt.whole), at<Acc>(kAt.before));
      for (int d = 0; d < kPitch; d += W) {
        V after = splat<V>(Acc(1));
        for (int b = blocks - 1; b > 0; --b) {
          after *= load_vector<V>(whole + b * kPitch + d);
          for (int i = 0; i < kLinearBlock; ++i) {
            Acc* row = rest + (int64_t(b - 1) * kLinearBlock + i) * kPitch + d;
            store_vector(row, load_vector<V>(row) * after);
          }
        }
      }
      Channel::decay_keys(at<Acc>(kAt.k_stage), rest, n, keys);
      __builtin_memcpy(decay_, at<Acc>(kAt.before) + int64_t(blocks) * kPitch, sizeof(decay_));
      return Channel::update_operand(keys, n, at<M>(kAt.k_channels));
    } else {
      if constexpr (T::kScalar) Walk::load_scalar_decay(where);
      return k_tokens_;
    }
  }

  void add_panel(const LinearAt& where, int panel, const M* keys, Acc* to) const {
    const int column = panel * N, width = T::panel_width(panel), n = where.n;
    const auto rows = in_.v(where, column, width, at<Acc>(kAt.v_stage), N);
    const LinearAt next = Walk::following(where);
    M* v = at<M>(kAt.v);
    pack_decayed(rows, n, width, v, in_.raw_v(next, column).ahead(next.n, width));
    const int64_t steps = (n + T::kPair - 1) / T::kPair;
    const int64_t row = T::kChannel ? C : T::kPair, step = T::kChannel ? 1 : kPitch;
    gemm<Acc, M, N, GemmMode::kOverwrite>(T::kD, steps, keys, row, step * T::kPair, v, N, to, N);
  }

  // Rows of v, times f of a scalar decay, as a B operand over tokens.
  template <class Rows>
  __attribute__((noinline)) void pack_decayed(const Rows& rows, int n, int width, M* to,
                                              const LinearAhead& ahead) const {
    constexpr int kPair = T::kPair;
    for (int i = 0; i < n; i += kPair) {
      const bool pair = i + kPair <= n;
      ahead.fetch(i, kPair);
      const auto *even = rows(i), *odd = rows(pair ? i + kPair - 1 : i);
      for (int j = 0; j < N; j += W) {
        const int count = width - j < W ? (width - j < 0 ? 0 : width - j) : W;
        V x = load_lanes<Acc>(even + j * rows.col, rows.col, count), y{};
        if (kPair == 2 && pair) y = load_lanes<Acc>(odd + j * rows.col, rows.col, count);
        if constexpr (T::kScalar) {
          x *= gates_.f[i];
          if (kPair == 2 && pair) y *= gates_.f[i + kPair - 1];
        }
        store_pairs(to + int64_t(i) * N + j * kPair, x, y);
      }
    }
  }
};

template <class Plan, class Fn>
class LinearScan {
  using T = LinearTypes<Plan>;
  using Acc = typename T::Acc;
  using V = typename T::V;
  using Cut = LinearScanCut<Plan>;
  using Slot = LinearSlot<Plan>;
  static constexpr int W = T::W, N = T::kPanel;
  static constexpr int64_t kWorker = linear_forward_scratch_bytes<Plan>();

 public:
  // workspace: of bytes(), 64-aligned.
  LinearScan(const LinearInputs<Plan, Fn>& in, const Cut& cut, char* workspace)
      : in_(in),
        p_(in.params()),
        cut_(cut),
        workers_(workspace),
        slots_(workers_ + p_.threads * kWorker),
        carried_(slots_ + cut.span * p_.Hk * cut.slot_bytes),
        chunks_(p_, T::kChunk, (int64_t*)(carried_ + p_.Hk * cut.slot_bytes)) {}

  static Cut cut(const ae_linear_params& p) {
    return Cut(p, LinearCut<Plan>(p).sequence_tasks, Slot::kHead);
  }
  static int64_t bytes(const ae_linear_params& p, const Cut& cut) {
    return p.threads * kWorker + cut.shared_bytes(p);
  }

  void run(ae_parallel_for parallel_for) {
    for (begin_ = 0; begin_ < cut_.chunks; begin_ = end_) {
      end_ = begin_ + cut_.span < cut_.chunks ? begin_ + cut_.span : cut_.chunks;
      const int64_t runs = (end_ - begin_ + cut_.run - 1) / cut_.run * p_.Hk;
      parallel_for(runs, p_.threads, &run_task<false>, this);
      parallel_for(p_.H * Cut::kRowBlocks, p_.threads, &rows_task, this);
      parallel_for(runs, p_.threads, &run_task<true>, this);
    }
  }

 private:
  const LinearInputs<Plan, Fn>& in_;
  const ae_linear_params& p_;
  const Cut& cut_;
  char *const workers_, *const slots_, *const carried_;
  const LinearChunks chunks_;
  int64_t begin_ = 0, end_ = 0;

  char* slot(int64_t chunk, int64_t hk) const {
    return slots_ + ((chunk - begin_) * p_.Hk + hk) * cut_.slot_bytes;
  }
  // ---- steps 1 and 3: chunks by themselves ----
  template <bool kOutputs>
  static void run_task(void* self, int64_t index, int32_t worker) {
    static_cast<LinearScan*>(self)->template run_chunks<kOutputs>(index, worker);
  }
  template <bool kOutputs>
  void run_chunks(int64_t index, int32_t worker) const {
    const int64_t hk = index % p_.Hk;
    int64_t chunk = begin_ + index / p_.Hk * cut_.run;
    const int64_t end = chunk + cut_.run < end_ ? chunk + cut_.run : end_;
    for (int64_t s = chunks_.sequence_of(chunk); chunk < end; ++s) {
      const int64_t stop = chunks_.end(s) < end ? chunks_.end(s) : end;
      LinearTask task = task_of(s, chunk, stop, hk);
      // Nobody reads what follows the last chunk.
      if (!kOutputs && stop == chunks_.end(s) && p_.final_state == nullptr) {
        task.length = (stop - 1 - chunk) * T::kChunk;
      }
      LinearScanWalk<Plan, Fn> walk(in_, task, workers_ + worker * kWorker, slot(chunk, hk),
                                    p_.Hk * cut_.slot_bytes);
      if constexpr (kOutputs) {
        walk.outputs(chunk == chunks_.first(s) && p_.state == nullptr);
      } else {
        walk.add();
      }
      chunk = stop;
    }
  }
  LinearTask task_of(int64_t sequence, int64_t chunk, int64_t stop, int64_t hk) const {
    LinearTask x;
    x.sequence = sequence;
    x.b = p_.first != nullptr ? 0 : sequence;
    x.first = chunks_.token(sequence, chunk);
    x.length = chunks_.token(sequence, stop - 1) + chunks_.tokens(sequence, stop - 1) - x.first;
    x.hk = hk;
    x.head = hk * cut_.group;
    x.heads = cut_.group;
    x.panel = 0;
    x.panels = T::kPanels;
    return x;
  }

  // ---- step 2: rows of a head's state, chunk after chunk ----
  static void rows_task(void* self, int64_t index, int32_t) {
    auto* scan = static_cast<LinearScan*>(self);
    const int first = int(index % Cut::kRowBlocks) * Cut::kRows;
    const int end = first + Cut::kRows < T::kD ? first + Cut::kRows : T::kD;
    scan->rows(index / Cut::kRowBlocks, first, end);
  }
  void rows(int64_t h, int first, int end) const {
    const int64_t hk = h / cut_.group, j = h % cut_.group;
    const Slot carried(carried_ + hk * cut_.slot_bytes, cut_.group);
    Acc *state = carried.state(j), *z = carried.z(j);
    for (int64_t c = begin_, s = chunks_.sequence_of(c); c < end_; ++c) {
      if (c == chunks_.end(s)) ++s;
      const Slot x(slot(c, hk), cut_.group);
      if (c == chunks_.first(s)) load(s, h, first, end, state, z);
      const bool last = c + 1 == chunks_.end(s), wanted = !last || p_.final_state != nullptr;
      if (chunks_.tokens(s, c) > 0) {
        const Acc* next = c + 1 < end_ ? Slot(slot(c + 1, hk), cut_.group).state(j) : x.state(j);
        step(first, end, x.decay(j), x.state(j), next, state, wanted);
        if constexpr (Plan::kNormalizer) step_z(first, end, x.decay(j), x.z(j), z, wanted);
      }
      if (last && wanted) store(s, h, first, end, state, z);
    }
  }
  // `slot` has what the chunk adds, and gets the state before it; `state` goes on, if wanted.
  static void step(int first, int end, const Acc* decay, Acc* slot, const Acc* next, Acc* state,
                   bool wanted) {
    for (int panel = 0; panel < T::kPanels; ++panel) {
      for (int d = first; d < end; ++d) {
        const int64_t row = panel * T::kPanelState + int64_t(d) * N;
        for (int64_t i = row; i < row + N; i += W) {
          __builtin_prefetch(next + i, 1);
          const V before = load_vector<V>(state + i);
          V after = before;
          if constexpr (T::kDecay != DecayKind::kNone) after *= decay[d];
          if (wanted) store_vector(state + i, after + load_vector<V>(slot + i));
          store_vector(slot + i, before);
        }
      }
    }
  }
  static void step_z(int first, int end, const Acc* decay, Acc* slot, Acc* z, bool wanted) {
    for (int d = first; d < end; ++d) {
      const Acc before = z[d];
      const Acc after = T::kDecay != DecayKind::kNone ? before * decay[d] : before;
      if (wanted) z[d] = after + slot[d];
      slot[d] = before;
    }
  }

  // ---- states of the caller ----
  void load(int64_t sequence, int64_t h, int first, int end, Acc* state, Acc* z) const {
    const int64_t* s = p_.state_stride;
    const auto* from = (const Acc*)p_.state;
    if (from != nullptr) from += sequence * s[0] + h * s[1];
    for (int d = first; d < end; ++d) {
      for (int panel = 0; panel < T::kPanels; ++panel) {
        Acc* to = state + panel * T::kPanelState + int64_t(d) * N;
        const int width = T::panel_width(panel);
        for (int i = 0; i < N; ++i) {
          to[i] = from != nullptr && i < width ? from[d * s[2] + panel * N + i] : Acc(0);
        }
      }
      if constexpr (Plan::kNormalizer) z[d] = from != nullptr ? from[d * s[2] + T::kDv] : Acc(0);
    }
  }
  void store(int64_t sequence, int64_t h, int first, int end, const Acc* state,
             const Acc* z) const {
    Acc* to = (Acc*)p_.final_state + ((sequence * p_.H + h) * T::kD + first) * T::kStateColumns;
    for (int d = first; d < end; ++d, to += T::kStateColumns) {
      for (int panel = 0; panel < T::kPanels; ++panel) {
        __builtin_memcpy(to + panel * N, state + panel * T::kPanelState + int64_t(d) * N,
                         sizeof(Acc) * uint64_t(T::panel_width(panel)));
      }
      if constexpr (Plan::kNormalizer) to[T::kDv] = z[d];
    }
  }
};

}  // namespace ae
