// What CUDA C++ makes of its operators and intrinsics: run in the simulator by test_ops_nvcc.py.
// Each kernel reads element i of its inputs and writes a row of results for it.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace {
__device__ int index() { return int(blockIdx.x * blockDim.x + threadIdx.x); }
}  // namespace

template <class T>
struct Pair;
template <>
struct Pair<__half> {
  using Type = __half2;
  static __device__ Type of(float2 x) { return __float22half2_rn(x); }
};
template <>
struct Pair<__nv_bfloat16> {
  using Type = __nv_bfloat162;
  static __device__ Type of(float2 x) { return __float22bfloat162_rn(x); }
};

constexpr int kArithmetic = 20;

template <class T>
__device__ void arithmetic(const float2* x, const float2* y, const float2* z,
                           typename Pair<T>::Type* out) {
  int i = index();
  auto a = Pair<T>::of(x[i]), b = Pair<T>::of(y[i]), c = Pair<T>::of(z[i]);
  auto* o = out + int64_t(i) * kArithmetic;
  o[0] = __hadd2(a, b);
  o[1] = __hsub2(a, b);
  o[2] = __hmul2(a, b);
  o[3] = __hfma2(a, b, c);
  o[4] = __hmax2(a, b);
  o[5] = __hmin2(a, b);
  o[6] = __hneg2(a);
  o[7] = __habs2(a);
  o[8] = __heq2(a, b);
  o[9] = __hlt2(a, b);
  o[10] = __hgeu2(a, b);
  o[11] = __hadd2_sat(a, b);
  o[12] = __hfma2_relu(a, b, c);
  o[13].x = __hadd(a.x, b.y), o[13].y = __hmul(a.y, b.x);
  o[14].x = a.x < b.x ? a.y : b.y, o[14].y = __hne(a.x, b.x) ? b.x : a.x;
  o[15].x = T(__half2float(__half(float(a.x)))), o[15].y = T(float(b.y) + 1.0f);
  o[16].x = T(int(x[i].x)), o[16].y = T(__float2int_rn(x[i].y));
  o[17].x = __hmax_nan(a.x, b.x), o[17].y = __hmin_nan(a.y, b.y);
  unsigned mask = __hgt2_mask(a, b);
  o[18] = *reinterpret_cast<typename Pair<T>::Type*>(&mask);
  o[19] = h2exp2(a);
}

extern "C" __global__ void half_arithmetic(const float2* x, const float2* y, const float2* z,
                                           __half2* out) {
  arithmetic<__half>(x, y, z, out);
}
extern "C" __global__ void bfloat_arithmetic(const float2* x, const float2* y, const float2* z,
                                             __nv_bfloat162* out) {
  arithmetic<__nv_bfloat16>(x, y, z, out);
}

extern "C" __global__ void integers(const float* x, const double* d, const int64_t* n,
                                    int64_t* out) {
  int i = index();
  int64_t* o = out + int64_t(i) * 16;
  o[0] = __float2int_rz(x[i]);
  o[1] = __float2int_rn(x[i]);
  o[2] = __float2int_ru(x[i]);
  o[3] = __float2int_rd(x[i]);
  o[4] = __float2uint_rz(x[i]);
  o[5] = __float2ll_rn(x[i]);
  o[6] = __double2int_rz(d[i]);
  o[7] = __double2ll_rd(d[i]);
  o[8] = int8_t(n[i]);
  o[9] = uint8_t(n[i]);
  o[10] = int16_t(n[i]);
  o[11] = uint32_t(n[i]);
  o[12] = int64_t(float(int(n[i])));
  o[13] = int64_t(double(n[i]));
  o[14] = int64_t(__half2int_rn(__float2half(x[i])));
  o[15] = int64_t(floorf(x[i])) + int64_t(rintf(x[i]));
}

extern "C" __global__ void functions(const float* x, float* out) {
  int i = index();
  float* o = out + int64_t(i) * 16;
  float a = x[i];  // positive
  o[0] = exp2f(-a);
  o[1] = __expf(-a);
  o[2] = expf(-a);
  o[3] = log2f(a);
  o[4] = __logf(a);
  o[5] = logf(a);
  o[6] = rsqrtf(a);
  o[7] = sqrtf(a);
  o[8] = 1.0f / a;
  o[9] = __fdividef(3.0f, a);
  o[10] = 3.0f / a;
  o[11] = tanhf(a);
  o[12] = __sinf(a);
  o[13] = __cosf(a);
  o[14] = __frcp_rn(a);
  asm("tanh.approx.f32 %0, %1;" : "=f"(o[15]) : "f"(a));
}

extern "C" __global__ void lanes(const int* x, int* out) {
  int i = index(), a = x[i];
  unsigned lane = threadIdx.x % 32;
  int* o = out + i * 16;
  int sum = a;
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  int scan = a;
  for (int step = 1; step < 32; step *= 2) {
    int other = __shfl_up_sync(0xffffffffu, scan, step);
    if (lane >= unsigned(step)) scan += other;
  }
  o[0] = sum;
  o[1] = scan;
  o[2] = __shfl_down_sync(0xffffffffu, a, 3, 16);
  o[3] = __shfl_sync(0xffffffffu, a, int(lane) * 5, 8);
  o[4] = int(__ballot_sync(0xffffffffu, a & 1));
  o[5] = __any_sync(0xffffffffu, a == 7);
  o[6] = __all_sync(0xffffffffu, a >= 0);
  o[7] = int(__match_any_sync(0xffffffffu, a & 3));
  int same;
  o[8] = int(__match_all_sync(0xffffffffu, a & 1, &same));
  o[9] = same;
  o[10] = __reduce_add_sync(0xffffffffu, a);
  o[11] = __reduce_max_sync(0xffffffffu, a);
  o[12] = int(__reduce_xor_sync(0xffffffffu, unsigned(a)));
  if (lane % 2 == 0) {
    o[13] = int(__activemask());
    o[14] = __shfl_sync(0x55555555u, a, 4);
    o[15] = int(__shfl_xor_sync(0x55555555u, (long long)a << 20, 2) >> 20);
  }
}

extern "C" __global__ void atomics(const int* x, int* ints, unsigned long long* longs,
                                   float* floats, double* doubles, __half2* halves,
                                   __nv_bfloat162* bfloats, int* shared_sum) {
  __shared__ int total;
  __shared__ float ftotal;
  if (threadIdx.x == 0) total = 0, ftotal = 0;
  __syncthreads();
  int a = x[index()];
  atomicAdd(&ints[0], a);
  atomicSub(&ints[1], a);
  atomicMin(&ints[2], a);
  atomicMax(&ints[3], a);
  atomicAnd(&ints[4], a);
  atomicOr(&ints[5], a);
  atomicXor(&ints[6], a);
  atomicInc(reinterpret_cast<unsigned*>(&ints[7]), 9);
  atomicDec(reinterpret_cast<unsigned*>(&ints[8]), 9);
  if (atomicExch(&ints[9], a) == 0) atomicAdd_block(&ints[10], 1);
  for (int seen = ints[11];;) {  // a sum by compare and swap
    int before = atomicCAS(&ints[11], seen, seen + a);
    if (before == seen) break;
    seen = before;
  }
  atomicAdd(&longs[0], (unsigned long long)a);
  atomicMax(&longs[1], (unsigned long long)a);
  atomicAdd(&floats[0], float(a));
  atomicAdd(&doubles[0], double(a));
  atomicAdd(&halves[0], __float2half2_rn(float(a % 2)));
  atomicAdd(&bfloats[0], __float2bfloat162_rn(float(a == 3)));
  atomicAdd(&total, a);
  atomicAdd(&ftotal, float(a));
  __syncthreads();
  if (threadIdx.x == 0) shared_sum[blockIdx.x] = total + int(ftotal);
}

// One warp: C = A B, A (16, 64) and B (64, 8) in row-major order, through shared memory.
extern "C" __global__ void product(const __half* a, const __half* b, float* c) {
  __shared__ __align__(16) __half sa[16][72];
  __shared__ __align__(16) __half sb[64][8];
  int lane = int(threadIdx.x);
  for (int i = lane; i < 16 * 64; i += 32) sa[i / 64][i % 64] = a[i];
  for (int i = lane; i < 64 * 8; i += 32) sb[i / 8][i % 8] = b[i];
  __syncwarp();
  float acc[4] = {};
  for (int k = 0; k < 64; k += 16) {
    unsigned fa[4], fb[2];
    auto pa = unsigned(__cvta_generic_to_shared(&sa[lane % 16][k + lane / 16 * 8]));
    auto pb = unsigned(__cvta_generic_to_shared(&sb[k + lane % 16][0]));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fa[0]), "=r"(fa[1]), "=r"(fa[2]), "=r"(fa[3])
                 : "r"(pa));
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(fb[0]), "=r"(fb[1])
                 : "r"(pb));
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(fa[0]), "r"(fa[1]), "r"(fa[2]), "r"(fa[3]), "r"(fb[0]), "r"(fb[1]));
  }
  for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = acc[i];
}
