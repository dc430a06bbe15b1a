// The operators attnengine::forward_sequences and attnengine::append_kv: attention where tables say
// which rows and keys each sequence has (packed lengths, caches, pages), and the append to a cache.
// Every value in the tables is checked before anything is written. Those in a GPU's memory are not
// (a call would wait for it) except under ATTNENGINE_SYNC_DEBUG; kernels clamp the lengths there.
#include "append.h"
#include "sequences.h"
#include "table.h"

namespace ae {
namespace {

int64_t take_int(StableIValue value) { return static_cast<int64_t>(value); }

int64_t take_count(const char* name, StableIValue value) {
  const int64_t count = take_int(value);
  constexpr int64_t kLimit = int64_t{1} << 30;  // kernels index in 32 bits
  if (count < 0 || count >= kLimit) {
    value_error(std::string(name) + "=" + std::to_string(count) + " must lie in [0, 2**30)");
  }
  return count;
}

// The tables of a call, by the names that users know them by.
struct Tables {
  Table q_start, q_end, key_start, key_end, kv_row, pages;

  // Tensors: q_start, q_end, key_start, key_end, kv_row, pages. All of them are off torch's stack
  // before any is looked at: one that is refused must not leave others there.
  static Tables of(Tensor (&x)[6]) {
    const bool packed = x[0] && x[2] && !x[4] && !x[5];
    return {Table("cu_seqlens_q", std::move(x[0]), 1),
            Table("cu_seqlens_q", std::move(x[1]), 1),
            Table(packed ? "cu_seqlens_k" : "cache_leftpad", std::move(x[2]), 1),
            Table(packed ? "cu_seqlens_k" : "cache_seqlens", std::move(x[3]), 1),
            Table("cache_batch_idx", std::move(x[4]), 1),
            Table("block_table", std::move(x[5]), 2)};
  }

  // That they belong to `count` sequences and lie beside `x`.
  void check(int64_t count, const TensorView& x) const {
    for (const Table* t : {&q_start, &q_end, &key_start, &key_end, &kv_row, &pages}) {
      t->check_beside(x);
      t->check_size(0, count, "elements, one per sequence");
    }
    if (static_cast<bool>(q_start) != static_cast<bool>(q_end)) {
      value_error("q_start and q_end must be given together");
    }
    if (pages && kv_row) {
      value_error(
          "block_table and cache_batch_idx exclude each other: a row of block_table says where a "
          "sequence's cache lies");
    }
  }

  // `k`: dimensions rows or pages, heads, positions, as forward has them.
  SequenceTables on_host(int64_t count, int64_t cache_rows, int64_t positions) {
    SequenceTables t;
    t.q_start = q_start.host();
    t.q_end = q_end.host();
    t.key_start = key_start.host();
    t.key_end = key_end.host();
    t.kv_row = kv_row.host();
    t.pages = pages.host();
    t.count = count;
    t.cache_rows = cache_rows;
    t.positions = positions;
    if (pages) {
      t.page_pitch = pages.host_pitch();
      t.page_size = positions;
      t.positions = pages.size(1) * positions;
    }
    return t;
  }
};

void check_page_size(int64_t page_size, const char* name, const std::string& shape) {
  if (page_size > 0 && page_size % kPageMultiple == 0) return;
  value_error("page_size=" + std::to_string(page_size) + " (" + name + " " + shape +
              "): a page must hold a multiple of " + std::to_string(kPageMultiple) + " tokens");
}

// Rows that k and v must have for `count` sequences that have row b each.
void check_rows(int64_t rows, int64_t count, const char* name, const std::string& shape) {
  if (rows == 1 || rows >= count) return;
  value_error(std::string(name) + " has shape " + shape + " for " + std::to_string(count) +
              " sequences; it needs a row for each of them (or cache_batch_idx, or block_table)");
}

// Output rows that belong to no sequence are 0, and so are their statistics.
void clear_uncovered(const SequenceTables& t, const ae_params& p, const ae_module_info& info) {
  const int64_t element = element_bytes(info.dtype);
  const int64_t stat = element_bytes(accumulator_dtype(info));
  const auto clear_rows = [&](int64_t begin, int64_t end) {
    for (int64_t h = 0; h < p.Hq; ++h) {
      for (int64_t i = begin; i < end; ++i) {
        std::memset(
            static_cast<char*>(p.out) + (h * p.out_stride[1] + i * p.out_stride[2]) * element, 0,
            static_cast<size_t>(info.Dv * element));
      }
      for (int64_t n = 0; p.stats != nullptr && n < info.stats; ++n) {
        const int64_t row = n * p.stats_stride[0] + h * p.stats_stride[2] + begin;
        std::memset(static_cast<char*>(p.stats) + row * stat, 0,
                    static_cast<size_t>((end - begin) * stat));
      }
    }
  };
  int64_t done = 0;
  for (int64_t b = 0; b < t.count; ++b) {
    if (t.q_start[b] > done) clear_rows(done, t.q_start[b]);
    done = t.q_end[b];
  }
  clear_rows(done, t.q_rows);
}

// forward_sequences(q, k, v, captures, kernel, scale, stats, q_start?, q_end?, key_start?,
// key_end?, kv_row?, pages?, max_rows, max_keys, key_more, align_end, least_keys) -> (out, stats)
void forward_sequences(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor q = Tensor::take(stack[0]), k = Tensor::take(stack[1]), v = Tensor::take(stack[2]);
  const TensorList capture_tensors(stack[3]);
  Tensor given[6];
  for (int i = 0; i < 6; ++i) given[i] = take_optional(stack[7 + i]);
  Tables tables = Tables::of(given);
  const Kernel& kernel = check_kernel(take_int(stack[4]), AE_FORWARD);
  const double scale = take_scale(stack[5]);
  const bool want_stats = take_bool(stack[6]);
  const int64_t max_rows = take_count("max_seqlen_q", stack[13]);
  const int64_t max_keys = take_count("max_seqlen_k", stack[14]);
  const int64_t key_more = take_count("key_more", stack[15]);
  const int64_t least_keys = take_int(stack[17]);
  const ae_module_info& info = kernel.info;

  const TensorView qv = view("q", q), kv = view("k", k), vv = view("v", v);
  check_operands(kernel, qv, kv, vv, Batches::kAny);
  const bool packed = static_cast<bool>(tables.q_start);
  const int64_t count = packed ? tables.q_start.size(0) : qv.size[0];
  tables.check(count, qv);
  if (packed && qv.size[0] != 1) {
    value_error("q has shape " + qv.shape() + "; packed sequences lie in batch row 0 of one");
  }
  if (kv.size[0] != vv.size[0]) {
    value_error("k and v must have the same batch (or pages), got k " + kv.shape() + " and v " +
                vv.shape());
  }
  if (key_more > 0 && !tables.key_end) {
    value_error("appended tokens need cache_seqlens: pass the lengths before the append");
  }
  if (tables.pages) check_page_size(kv.size[2], "k", kv.shape());
  if (!tables.pages && !tables.kv_row) check_rows(kv.size[0], count, "k", kv.shape());
  Captures captures(kernel, capture_tensors, qv);

  SequenceBounds bounds;
  const bool on_cpu = qv.device != DeviceKind::kCuda;
  const int64_t positions = tables.pages ? tables.pages.size(1) * kv.size[2] : kv.size[2];
  bounds.rows = packed ? std::min(max_rows, qv.size[2]) : qv.size[2];
  bounds.keys = std::min(max_keys, positions);
  SequenceTables host;
  if (on_cpu || sync_debug.load(std::memory_order_relaxed)) {
    host = tables.on_host(count, kv.size[0], kv.size[2]);
    host.q_rows = qv.size[2];
    host.key_more = key_more;
    host.max_rows = bounds.rows;
    host.max_keys = bounds.keys;
    host.packed_keys = packed && tables.key_start && !tables.pages && !tables.kv_row;
    const SequenceBounds found = check_tables(host);
    check_least(host, least_keys);
    if (on_cpu) bounds = found;  // a GPU's grid depends on what the caller says, so graphs replay
  }
  const bool empty = count == 0 || qv.size[1] == 0 || bounds.rows == 0;
  std::optional<CudaTarget> device;  // before memory is taken: it may have to refuse
  if (kernel.cuda != nullptr && !empty) device.emplace(CudaTarget::of(*kernel.cuda, qv));

  ae_params p{};
  int32_t fault = 0;
  fill_params(p, q, k, v, qv, kv, vv, captures, scale, &fault);
  p.B = count;
  p.L = bounds.rows;
  p.S = bounds.keys;
  copy4(p.k_stride, kv.stride);
  copy4(p.v_stride, vv.stride);
  if (kv.size[0] == 1 && !tables.pages && !tables.kv_row) p.k_stride[0] = p.v_stride[0] = 0;
  const int64_t out_size[4] = {qv.size[0], p.Hq, qv.size[2], info.Dv};
  Tensor out = allocate_like(qv, out_size, info.dtype, p.out_stride);
  Tensor stats;
  if (want_stats) {
    const int64_t stats_size[4] = {info.stats, qv.size[0], p.Hq, qv.size[2]};
    stats = allocate_contiguous(stats_size, 4, accumulator_dtype(info), Place::of(qv));
  } else {
    stats = undefined_tensor();
  }
  p.stats_stride[0] = qv.size[0] * p.Hq * qv.size[2];
  p.stats_stride[1] = packed ? 0 : p.Hq * qv.size[2];
  p.stats_stride[2] = qv.size[2];
  if (packed) p.q_stride[0] = p.out_stride[0] = 0;

  const bool nothing = out_size[0] * out_size[1] * out_size[2] == 0;
  if (!nothing) {
    p.out = out.data();
    p.stats = want_stats ? stats.data() : nullptr;
    if (packed && !on_cpu) {
      AE_TORCH(aoti_torch_zero_(out.get()));
      if (want_stats) AE_TORCH(aoti_torch_zero_(stats.get()));
    } else if (packed && bounds.covered < qv.size[2]) {
      clear_uncovered(host, p, info);
    }
  }
  if (!nothing && !empty) {
    ae_sequences& s = p.sequences;
    s.q_start = tables.q_start.data();
    s.q_end = tables.q_end.data();
    s.key_start = tables.key_start.data();
    s.key_end = tables.key_end.data();
    s.kv_row = tables.kv_row.data();
    s.pages = tables.pages.data();
    s.page_pitch = tables.pages ? tables.pages.pitch() : 0;
    s.page_size = tables.pages ? static_cast<int32_t>(kv.size[2]) : 0;
    s.key_more = static_cast<int32_t>(key_more);
    s.align_end = take_bool(stack[16]) ? 1 : 0;
    if (device) {
      launch_on_device(*kernel.cuda, *device, p, qv);
    } else {
      launch(kernel, p);
    }
  }
  stack[0] = out.give();
  stack[1] = stats.give();
}

TensorView raw_view(const char* name, const Tensor& tensor, int32_t* torch_dtype) {
  AE_TORCH(aoti_torch_get_dtype(tensor.get(), torch_dtype));
  return view(name, tensor);
}

void check_cache_pair(const TensorView& cache, const TensorView& fresh) {
  for (const TensorView* x : {&cache, &fresh}) {
    if (x->rank != 4) {
      value_error(std::string(x->name) + " must be 4-D [B, S, H, D], got shape " + x->shape());
    }
  }
  if (cache.size[2] != fresh.size[2] || cache.size[3] != fresh.size[3]) {
    value_error(std::string(fresh.name) + " has shape " + fresh.shape() + " and " + cache.name +
                " has " + cache.shape() + "; their heads and head_dim (the last two) must agree");
  }
  check_device(fresh, cache);
  for (int d = 0; d < 4; ++d) {
    if (cache.size[d] > 1 && cache.stride[d] == 0) {
      value_error(std::string(cache.name) +
                  " is expanded: several of its elements are one in memory, and an append would "
                  "overwrite them; pass a cache of its own");
    }
  }
}

AppendOperand append_operand(const Tensor& cache, const TensorView& cv, const Tensor& fresh,
                             const TensorView& fv) {
  AppendOperand x{};
  x.cache = static_cast<char*>(cache.data());
  x.fresh = static_cast<const char*>(const_data(fresh));
  copy4(x.cache_stride, cv.stride);
  copy4(x.fresh_stride, fv.stride);
  x.heads = cv.size[2];
  x.head_dim = cv.size[3];
  return x;
}

// append_kv(k_cache, v_cache, k, v, cache_seqlens?, kv_row?, pages?, key_start?, least_keys)
void append_kv(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor k_cache = Tensor::take(stack[0]), v_cache = Tensor::take(stack[1]);
  const Tensor k = Tensor::take(stack[2]), v = Tensor::take(stack[3]);
  Tensor given[6];
  given[3] = take_optional(stack[4]);
  given[4] = take_optional(stack[5]);
  given[5] = take_optional(stack[6]);
  given[2] = take_optional(stack[7]);
  Tables tables = Tables::of(given);
  const int64_t least_keys = take_int(stack[8]);
  int32_t dtypes[4];
  const TensorView kc = raw_view("k_cache", k_cache, dtypes);
  const TensorView vc = raw_view("v_cache", v_cache, dtypes + 1);
  const TensorView kn = raw_view("k", k, dtypes + 2), vn = raw_view("v", v, dtypes + 3);
  check_cache_pair(kc, kn);
  check_cache_pair(vc, vn);
  if (dtypes[0] != dtypes[2] || dtypes[1] != dtypes[3] || dtypes[0] != dtypes[1]) {
    type_error(std::string("k and v must have the dtype of the cache, got k ") +
               dtype_name(kn.dtype) + ", v " + dtype_name(vn.dtype) + ", k_cache " +
               dtype_name(kc.dtype) + ", v_cache " + dtype_name(vc.dtype) + "; cast with .to()");
  }
  if (kc.size[0] != vc.size[0] || kc.size[1] != vc.size[1] || kn.size[0] != vn.size[0] ||
      kn.size[1] != vn.size[1]) {
    value_error("k and v must have the same batch and length, got k " + kn.shape() + ", v " +
                vn.shape() + ", k_cache " + kc.shape() + ", v_cache " + vc.shape());
  }
  const int64_t count = kn.size[0];
  tables.check(count, kc);
  if (!tables.key_end) {
    value_error("appending k and v needs cache_seqlens: pass the lengths before the append");
  }
  if (tables.pages) check_page_size(kc.size[1], "k_cache", kc.shape());
  if (!tables.pages && !tables.kv_row && kc.size[0] < count) {
    value_error("k_cache has shape " + kc.shape() + " and k " + kn.shape() +
                "; it needs a row for every sequence (or cache_batch_idx, or block_table)");
  }
  SequenceTables host = tables.on_host(count, kc.size[0], kc.size[1]);
  host.key_more = kn.size[1];
  host.max_keys = host.positions;
  check_tables(host);
  check_append(host);
  check_least(host, least_keys);

  const int64_t element = static_cast<int64_t>(aoti_torch_dtype_element_size(dtypes[0]));
  Append append{
      host, {append_operand(k_cache, kc, k, kn), append_operand(v_cache, vc, v, vn)}, element};
  uint32_t threads = 1;
  constexpr int64_t kSerialBytes = int64_t{1} << 18;  // one core writes it within 50 us
  if (append.bytes() > kSerialBytes) AE_TORCH(torch_get_num_threads(&threads));
  parallel_for(append.tokens(), static_cast<int32_t>(threads), Append::run, &append);
}

}  // namespace
}  // namespace ae

STABLE_TORCH_LIBRARY_FRAGMENT(attnengine, m) {
  m.def(
      "forward_sequences(Tensor q, Tensor k, Tensor v, Tensor[] captures, int kernel, "
      "float scale, bool stats, Tensor? q_start, Tensor? q_end, Tensor? key_start, "
      "Tensor? key_end, Tensor? kv_row, Tensor? pages, int max_rows, int max_keys, int key_more, "
      "bool align_end, int least_keys=0) -> (Tensor, Tensor)");
  // key_start and least_keys are of what follows: checked before the cache is written.
  m.def(
      "append_kv(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, "
      "Tensor? cache_seqlens, Tensor? kv_row, Tensor? pages, Tensor? key_start=None, "
      "SymInt least_keys=0) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(attnengine, CPU, m) {
  m.impl("forward_sequences", ae::forward_sequences);
  m.impl("append_kv", ae::append_kv);
}

// append_kv on CUDA tensors is written in Python over torch's own kernels.
STABLE_TORCH_LIBRARY_IMPL(attnengine, CUDA, m) {
  m.impl("forward_sequences", ae::forward_sequences);
}
