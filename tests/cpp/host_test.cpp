// The torch-free parts of csrc: layouts, batch sums, the thread pool's task queue, workspace,
// argument checks and the kernel registry.  host_test <path of a kernel module>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "layout.h"
#include "parallel.h"
#include "reduce.h"
#include "registry.h"
#include "validate.h"
#include "workspace.h"

namespace {

using ae::DeviceKind;
using ae::TensorView;

void test_layout() {
  const int64_t size[4] = {2, 3, 5, 7};
  int64_t stride[4];
  const auto is = [&](int64_t a, int64_t b, int64_t c) {
    return stride[0] == a && stride[1] == b && stride[2] == c && stride[3] == 1;
  };
  const int64_t bhld[4] = {105, 35, 7, 1}, blhd[4] = {105, 7, 21, 1}, lbhd[4] = {21, 7, 42, 1};
  ae::dense_strides_like(bhld, size, stride);
  CHECK(is(105, 35, 7));
  ae::dense_strides_like(blhd, size, stride);
  CHECK(is(105, 7, 21));
  ae::dense_strides_like(lbhd, size, stride);
  CHECK(is(21, 7, 42));
  const int64_t expanded_batch[4] = {0, 35, 7, 1}, equal[4] = {7, 7, 7, 1};
  ae::dense_strides_like(expanded_batch, size, stride);
  CHECK(is(105, 35, 7));
  ae::dense_strides_like(equal, size, stride);
  CHECK(is(105, 35, 7));
  const int64_t empty[4] = {2, 0, 5, 7};
  ae::dense_strides_like(bhld, empty, stride);
  CHECK(is(35, 35, 7));
  CHECK(ae::element_count(empty, 4) == 0 && ae::element_count(size, 4) == 210);
  CHECK(ae::element_count(size, 0) == 1);
  CHECK(ae::is_contiguous(size, bhld, 4) && !ae::is_contiguous(size, blhd, 4));
  CHECK(ae::is_contiguous(empty, blhd, 4));
}

void test_bf16() {
  CHECK(ae::float_to_bf16(1.0f) == 0x3f80 && ae::bf16_to_float(0x3f80) == 1.0f);
  CHECK(ae::float_to_bf16(1.00390625f) == 0x3f80);  // halfway: to even, down
  CHECK(ae::float_to_bf16(1.01171875f) == 0x3f82);  // halfway: to even, up
  CHECK(ae::float_to_bf16(std::numeric_limits<float>::infinity()) == 0x7f80);
  CHECK(std::isnan(ae::bf16_to_float(ae::float_to_bf16(std::nanf("")))));
}

void test_f16() {
  const float subnormal = 3 * 0x1p-24f;
  for (const auto& [x, bits] : {std::pair{1.0f, 0x3c00},
                                {-2.5f, 0xc100},
                                {65504.0f, 0x7bff},
                                {subnormal, 3},
                                {0x1p-14f, 0x400},
                                {HUGE_VALF, 0x7c00}}) {
    CHECK(ae::float_to_f16(x) == bits && ae::f16_to_float(uint16_t(bits)) == x);
  }
  CHECK(ae::float_to_f16(1 + 0x1p-11f) == 0x3c00);  // halfway: to even, down
  CHECK(ae::float_to_f16(1 + 0x3p-11f) == 0x3c02);  // halfway: to even, up
  CHECK(ae::float_to_f16(0x1p-25f) == 0 && ae::float_to_f16(0x3p-25f) == 2);
  CHECK(ae::float_to_f16(65519) == 0x7bff && ae::float_to_f16(-65520) == 0xfc00);
  CHECK(std::isnan(ae::f16_to_float(ae::float_to_f16(std::nanf("")))));
}

template <class T>
void test_batch_sum(int32_t dtype, T one, T three) {
  const int64_t block = ae::BatchSum::kChunk + 300;
  std::vector<T> in(3 * block, one), out(block);
  ae::BatchSum sum{in.data(), out.data(), 3, block, dtype};
  CHECK(sum.tasks() == 2);
  for (int64_t i = 0; i < sum.tasks(); ++i) ae::BatchSum::run(&sum, i, 0);
  CHECK(out == std::vector<T>(block, three));
}

using Body = void (*)(int64_t, int64_t, void*);
void threads_pool(int64_t workers, Body body, void* ctx) {
  std::vector<std::thread> threads;
  for (int64_t w = 0; w < workers; ++w) threads.emplace_back(body, w, w + 1, ctx);
  for (std::thread& t : threads) t.join();
}
void nested_pool(int64_t workers, Body body, void* ctx) { body(0, workers, ctx); }
void forbidden_pool(int64_t, Body, void*) { CHECK(false); }

template <ae::PoolFor kPool>
void test_tasks(int64_t n, int32_t threads) {
  struct Seen {
    std::vector<std::atomic<int>> runs;
    std::atomic<int32_t> highest{0};
  } seen{std::vector<std::atomic<int>>(n), {0}};
  ae::run_tasks<kPool>(
      n, threads,
      [](void* arg, int64_t index, int32_t worker) {
        auto* s = static_cast<Seen*>(arg);
        ++s->runs[index];
        for (int32_t h = s->highest; worker > h && !s->highest.compare_exchange_weak(h, worker);) {
        }
      },
      &seen);
  for (const auto& runs : seen.runs) CHECK(runs == 1);
  CHECK(seen.highest < threads);
}

void test_workspace() {
  ae::ThreadBuffer buffer;
  CHECK(buffer.capacity() == 0);
  void* first = buffer.acquire(100);
  CHECK(first != nullptr && reinterpret_cast<uintptr_t>(first) % ae::kWorkspaceAlignment == 0);
  CHECK(buffer.acquire(1) == nullptr);  // in use
  buffer.release();
  CHECK(buffer.acquire(200) == first);
  buffer.release();
  CHECK(buffer.acquire(ae::kCachedWorkspaceBytes + 1) == nullptr);
  void* largest = buffer.acquire(ae::kCachedWorkspaceBytes);
  CHECK(largest != nullptr && buffer.capacity() == ae::kCachedWorkspaceBytes);
  std::memset(largest, 1, ae::kCachedWorkspaceBytes);
  buffer.release();
}

void test_large_buffer() {
  constexpr int64_t kBytes = int64_t{5} << 20;
  void* first = nullptr;
  {
    const ae::LargeBuffer buffer(kBytes);
    first = buffer.data();
    CHECK(reinterpret_cast<uintptr_t>(first) % 64 == 0);
    std::memset(first, 1, kBytes);
    const ae::LargeBuffer other(kBytes);  // while the first one is in use
    CHECK(other.data() != first);
    std::memset(other.data(), 2, kBytes);
    CHECK(static_cast<const char*>(first)[kBytes - 1] == 1);
  }
  const void* kept = ae::LargeBuffer(kBytes).data();
  CHECK(ae::LargeBuffer(kBytes - 1).data() == kept);
  ae::MemoryPool::of_process().keep_at_most(0);
  CHECK(ae::MemoryPool::of_process().kept() == 0);
}

void test_memory_pool() {
  constexpr int64_t kMega = int64_t{1} << 20;
  ae::MemoryPool pool;
  const auto fill = [](const auto* block) {
    std::memset(block->data, 1, static_cast<size_t>(block->bytes));
  };
  auto* first = pool.take(5 * kMega, 6 * kMega);
  CHECK(first->bytes == 6 * kMega && pool.kept() == 0);
  CHECK(reinterpret_cast<uintptr_t>(first->data) % ae::MemoryPool::kPage == 0);
  auto* second = pool.take(10 * kMega, 10 * kMega);
  fill(first), fill(second);
  pool.give(first), pool.give(second);
  CHECK(pool.kept() == 16 * kMega);
  CHECK(pool.take(1, 100 * kMega) == first);  // the smallest that serves
  pool.give(first);
  auto* other = pool.take(4 * kMega, 5 * kMega);  // both are larger than it may be
  CHECK(other != first && other != second && other->bytes == 4 * kMega);
  fill(other);
  CHECK(pool.take(7 * kMega, 10 * kMega) == second);
  pool.give(second);
  pool.give(other);
  CHECK(pool.kept() == 20 * kMega);

  pool.keep_at_most(15 * kMega);  // the newest stay: other and second
  CHECK(pool.kept() == 14 * kMega);
  CHECK(pool.take(10 * kMega, 10 * kMega) == second);
  pool.give(pool.take(16 * kMega, 16 * kMega));  // too large to stay
  CHECK(pool.kept() == 4 * kMega);
  pool.give(second);
  CHECK(pool.kept() == 14 * kMega);
  pool.give(pool.take(12 * kMega, 12 * kMega));  // newer than both, and too much with either
  CHECK(pool.kept() == 12 * kMega);
  pool.keep_at_most(0);
  CHECK(pool.kept() == 0);

  pool.keep_at_most(1000 * kMega);
  pool.give(pool.take(4 * kMega, INT64_MAX, true));
  pool.give(pool.take(6 * kMega, 6 * kMega));
  CHECK(pool.kept() == 10 * kMega);
  pool.give(pool.take(20 * kMega, INT64_MAX, true));  // in the place of the largest
  CHECK(pool.kept() == 24 * kMega);
  pool.keep_at_most(0);

  pool.keep_at_most(1000 * kMega);  // no more than a few blocks
  ae::MemoryPool::Block* many[20];
  for (auto*& block : many) block = pool.take(kMega, kMega);
  for (auto* block : many) pool.give(block);
  CHECK(pool.kept() == 8 * ae::MemoryPool::kPage);
  pool.keep_at_most(0);
}

void test_memory_pool_threads() {
  constexpr int64_t kMega = int64_t{1} << 20;
  ae::MemoryPool pool;
  pool.keep_at_most(6 * kMega);
  std::atomic<bool> over{false}, mixed{false};
  std::vector<std::thread> threads;
  for (int id = 0; id < 4; ++id) {
    threads.emplace_back([&, id] {
      for (int i = 0; i < 2000; ++i) {
        const int64_t bytes = (1 + (i + id) % 3) * 2 * kMega;
        auto* block = pool.take(bytes, bytes);
        auto* word = static_cast<std::atomic<int>*>(block->data);
        word->store(id);
        std::this_thread::yield();
        if (word->load() != id || block->bytes != bytes) mixed = true;
        pool.give(block);
        if (pool.kept() < 0) over = true;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  CHECK(!mixed && !over && pool.kept() <= 6 * kMega);
  pool.keep_at_most(0);
  CHECK(pool.kept() == 0);
}

template <class Error, class Body_>
std::string text_of(Body_ body) {
  try {
    body();
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

bool starts(const std::string& text, const char* with) { return text.rfind(with, 0) == 0; }

void test_registry_and_checks(const char* module) {
  const ae::CaptureSignature signature[2] = {{2, AE_F32}, {1, AE_I64}};
  const int32_t id = ae::load_kernel(module, signature, 2);
  CHECK(id == ae::load_kernel(module, nullptr, 0));
  const ae::Kernel& kernel = *ae::find_kernel(id);
  CHECK(kernel.info.D == 8 && kernel.info.Dv == 5 && kernel.captures.size() == 2);
  CHECK(&ae::check_kernel(id, AE_FORWARD) == &kernel);
  for (const int64_t absent : {int64_t{-1}, int64_t{id + 1}, int64_t{1} << 40}) {
    CHECK(ae::find_kernel(absent) == nullptr);
  }
  using Runtime = std::runtime_error;
  CHECK(text_of<Runtime>([] {
          ae::load_kernel("/nowhere.so", nullptr, 0);
        }).find("cannot be loaded") != std::string::npos);
  using Value = std::invalid_argument;
  CHECK(
      starts(text_of<Value>([&] { ae::check_kernel(id, AE_BACKWARD); }), "kernel=0 is a forward"));
  CHECK(
      starts(text_of<Value>([] { ae::check_kernel(7, AE_FORWARD); }), "kernel=7: no such kernel"));

  const int64_t q_size[4] = {2, 4, 7, 8}, k_size[4] = {1, 2, 9, 8}, v_size[4] = {2, 2, 9, 5};
  const auto tensor = [](const char* name, const int64_t* size) {
    return TensorView{name, nullptr, size, nullptr, 4, AE_F32, DeviceKind::kCpu, 0};
  };
  const TensorView q = tensor("q", q_size), k = tensor("k", k_size), v = tensor("v", v_size);
  const auto operands = [&](TensorView a, TensorView b, TensorView c) {
    return text_of<Value>([&] { ae::check_operands(kernel, a, b, c); });
  };
  CHECK(operands(q, k, v).empty());
  TensorView bad = k;
  bad.device = DeviceKind::kCuda;
  bad.device_index = 1;
  CHECK(starts(operands(q, bad, v), "k is on cuda:1 but q is on cpu"));
  TensorView cuda[3] = {q, k, v};
  for (TensorView& x : cuda) x.device = DeviceKind::kCuda;
  CHECK(starts(operands(cuda[0], cuda[1], cuda[2]),
               "q is on cuda:0 but this kernel was compiled for the CPU"));
  bad = k;
  bad.rank = 3;
  CHECK(starts(operands(q, bad, v), "k must be 4-D [B, H, L, D], got shape [1, 2, 9]"));
  bad = k;
  bad.dtype = AE_BF16;
  CHECK(starts(operands(q, bad, v), "TypeError: q, k and v must share one dtype, got float32, bf"));
  CHECK(starts(operands(q, q, v), "k and v must have the same heads and length"));
  const int64_t three_heads[4] = {2, 3, 7, 8}, no_heads[4] = {2, 0, 9, 8}, none[4] = {2, 0, 9, 5};
  CHECK(starts(operands(tensor("q", three_heads), k, v), "q has 3 heads, which is not a multiple"));
  CHECK(
      starts(operands(q, tensor("k", no_heads), tensor("v", none)), "q has 4 heads, which is not"));

  TensorView index = {"captures", nullptr, k_size, nullptr, 1, AE_I64, DeviceKind::kCpu, 0};
  const auto capture = [&](TensorView x) {
    return text_of<Value>([&] { ae::check_capture(kernel, 1, x, q); });
  };
  CHECK(capture(index).empty());
  index.dtype = AE_I32;
  CHECK(
      starts(capture(index), "captures[1] is int32 of rank 1, the kernel was compiled for int64"));
  index.dtype = -1;
  CHECK(starts(capture(index), "TypeError: captures[1] has a dtype"));
  CHECK(starts(text_of<Value>([&] { ae::check_capture_count(kernel.info, 3); }),
               "captures has 3 tensors, this kernel reads 2"));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s <kernel module>\n", argv[0]);
    return 2;
  }
  test_layout();
  test_bf16();
  test_f16();
  test_batch_sum<float>(AE_F32, 0.5f, 1.5f);
  test_batch_sum<double>(AE_F64, 0.5, 1.5);
  test_batch_sum<uint16_t>(AE_BF16, 0x3f00, 0x3fc0);
  test_batch_sum<uint16_t>(AE_F16, 0x3800, 0x3e00);
  for (const int64_t n : {0, 1, 2, 1000}) {
    test_tasks<threads_pool>(n, 4);
    test_tasks<nested_pool>(n, 4);
    test_tasks<forbidden_pool>(n, 1);
  }
  test_tasks<forbidden_pool>(1, 4);
  test_workspace();
  test_large_buffer();
  test_memory_pool();
  test_memory_pool_threads();
  test_registry_and_checks(argv[1]);
  return CHECK_RESULT();
}
