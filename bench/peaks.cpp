// What this machine can do, measured: fp32 FMA and bf16 dot-product rate with every operand in
// registers, and streaming read bandwidth of a buffer far larger than the caches.
// A shared library that peaks.py compiles and loads.
#include <chrono>
#include <cstdint>
#include <functional>
#include <thread>
#include <utility>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vec __attribute__((vector_size(4 * kLanes)));
// FMA latency is 4 cycles and vdpbf16ps 6, two issue per cycle: 12 chains hide either, and with the
// two operands they fit the 16 registers of AVX2.
constexpr int kChains = 12;
using Chains = std::make_index_sequence<kChains>;
constexpr int64_t kRounds = 20'000'000;  // about 70 ms

// Keeps the compiler from merging or hoisting the arithmetic on `v`; costs no instruction.
template <class V>
inline V pin(V v) {
  asm volatile("" : "+x"(v));
  return v;
}

// Indices are template arguments so that every accumulator is a register from the start.
template <size_t... C>
double fma_flops(int64_t rounds, std::index_sequence<C...>) {
  Vec acc[] = {(void(C), Vec{})...};
  Vec a = Vec{} + 1.0f, b = Vec{} + 1e-9f;
  for (int64_t i = 0; i < rounds; ++i) {
    a = pin(a);
#if defined(__AVX512F__)
    ((acc[C] = pin((Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)acc[C]))), ...);
#else
    ((acc[C] = pin(acc[C] + a * b)), ...);
#endif
  }
  volatile float sink = (acc[C][0] + ...);
  (void)sink;
  return 2.0 * kLanes * kChains * rounds;
}

#if defined(__AVX512BF16__)
template <size_t... C>
double dot_flops(int64_t rounds, std::index_sequence<C...>) {
  __m512 acc[] = {(void(C), _mm512_setzero_ps())...};
  __m512bh a = (__m512bh)_mm512_set1_epi16(0x3f80), b = a;  // 1.0 in bf16
  for (int64_t i = 0; i < rounds; ++i) {
    ((acc[C] = pin(_mm512_dpbf16_ps(acc[C], a, b))), ...);
  }
  volatile float sink = (acc[C][0] + ...);
  (void)sink;
  return 4.0 * 16 * kChains * rounds;
}
#endif

double read_bytes(const std::vector<Vec>& buffer) {
  Vec acc[8] = {};
  for (size_t i = 0; i + 8 <= buffer.size(); i += 8)
    for (int c = 0; c < 8; ++c) acc[c] += buffer[i + c];
  volatile float sink = 0;
  for (auto& v : acc) sink = sink + v[0];
  return double(buffer.size()) * sizeof(Vec);
}

// Best rate of several repetitions, all threads together.
double best(int threads, int repeats, const std::function<double(int)>& work) {
  double rate = 0;
  for (int r = 0; r < repeats; ++r) {
    std::vector<double> done(threads);
    auto start = Clock::now();
    std::vector<std::thread> pool;
    for (int t = 0; t < threads; ++t) pool.emplace_back([&, t] { done[t] = work(t); });
    for (auto& t : pool) t.join();
    double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    double total = 0;
    for (double d : done) total += d;
    if (total / seconds > rate) rate = total / seconds;
  }
  return rate;
}

// Sums blocks `order[begin .. end)` of two arrays; each block's successor is fetched meanwhile, as
// a kernel that knows its pages does.
double read_in_order(const char* a, const char* b, int64_t bytes, const int32_t* order,
                     int64_t begin, int64_t end) {
  Vec acc[2] = {};
  for (int64_t i = begin; i < end; ++i) {
    const int64_t next = order[i + 1 < end ? i + 1 : i];
    for (const char* data : {a, b}) {
      const char *here = data + order[i] * bytes, *ahead = data + next * bytes;
      for (int64_t x = 0; x + 64 <= bytes; x += 64) {
        __builtin_prefetch(ahead + x, 0, 2);
        for (int64_t at = x; at < x + 64; at += int64_t(sizeof(Vec))) {
          acc[at / int64_t(sizeof(Vec)) % 2] += *reinterpret_cast<const Vec*>(here + at);
        }
      }
    }
  }
  volatile float sink = acc[0][0] + acc[1][0];
  (void)sink;
  return 2.0 * double(end - begin) * double(bytes);
}

// One buffer of 256 MiB per thread, kept between calls: eight times the largest cache that we meet.
std::vector<std::vector<Vec>> buffers;

void hold_buffers(int threads) {
  buffers.resize(threads);
  for (auto& b : buffers)
    if (b.empty()) b.assign((size_t(256) << 20) / sizeof(Vec), Vec{});
}

}  // namespace

extern "C" {

// FLOP/s of fp32 FMA and of bf16 dot products (0: the CPU has none), bytes/s of streaming read.
void peaks(int threads, double* rates) {
  const int repeats = 7;
  rates[0] = best(threads, repeats, [](int) { return fma_flops(kRounds, Chains{}); });
  rates[1] = 0;
#if defined(__AVX512BF16__)
  rates[1] = best(threads, repeats, [](int) { return dot_flops(kRounds, Chains{}); });
#endif
  hold_buffers(threads);
  rates[2] = best(threads, repeats, [](int t) { return read_bytes(buffers[t]); });
}

// Reads every thread's buffer once, so that a caller can time it beside other work; gives bytes.
double read_once(int threads) {
  hold_buffers(threads);
  std::vector<double> done(threads);
  std::vector<std::thread> pool;
  for (int t = 1; t < threads; ++t) pool.emplace_back([&, t] { done[t] = read_bytes(buffers[t]); });
  done[0] = read_bytes(buffers[0]);
  for (auto& t : pool) t.join();
  double total = 0;
  for (double d : done) total += d;
  return total;
}

// Reads `count` blocks of `bytes` (a multiple of 64) of two 64-byte aligned arrays, in this order.
double read_blocks(int threads, const void* a, const void* b, int64_t bytes, const int32_t* order,
                   int64_t count) {
  const auto part = [=](int t) {
    return read_in_order(static_cast<const char*>(a), static_cast<const char*>(b), bytes, order,
                         count * t / threads, count * (t + 1) / threads);
  };
  std::vector<std::thread> pool;
  for (int t = 1; t < threads; ++t) pool.emplace_back([&, t] { part(t); });
  part(0);
  for (auto& t : pool) t.join();
  return 2.0 * double(count) * double(bytes);
}

void release_buffers() { buffers.clear(), buffers.shrink_to_fit(); }

}  // extern "C"
