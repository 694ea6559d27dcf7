/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * As much of CUDA as our kernels use, on the CPU: a block's threads are fibers that run in turn, one block
 * after another. Slow, and exact about what a missing barrier or an unwritten value does: device and shared
 * memory start as NaN, and KVT_HOST_ORDER=falling runs the threads in the other order. For machines without a
 * GPU (tests/gpu/run host, and the driver in fake_cuda.cc); nothing that ships includes it.
 */
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)
#define __constant__ static
#define warpSize 32
#define HOST_SHARED_PLAIN ((size_t)48 << 10) /* what a kernel gets without asking */
#define HOST_SHARED_MAX ((size_t)227 << 10)

struct dim3 {
	unsigned x, y, z;

	dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_)
	{
	}
};
struct alignas(8) float2 {
	float x, y;
};
struct alignas(16) float4 {
	float x, y, z, w;
};
struct alignas(8) uint2 {
	unsigned x, y;
};
struct alignas(16) uint4 {
	unsigned x, y, z, w;
};
struct alignas(8) int2 {
	int x, y;
};
struct alignas(16) int4 {
	int x, y, z, w;
};
struct alignas(16) ulonglong2 {
	unsigned long long x, y;
};
struct alignas(16) double2 {
	double x, y;
};
static inline float2 make_float2(float x, float y)
{
	return {x, y};
}
static inline float4 make_float4(float x, float y, float z, float w)
{
	return {x, y, z, w};
}
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w)
{
	return {x, y, z, w};
}
static inline uint2 make_uint2(unsigned x, unsigned y)
{
	return {x, y};
}
static inline int2 make_int2(int x, int y)
{
	return {x, y};
}
static inline int4 make_int4(int x, int y, int z, int w)
{
	return {x, y, z, w};
}
static inline ulonglong2 make_ulonglong2(unsigned long long x, unsigned long long y)
{
	return {x, y};
}
static inline double2 make_double2(double x, double y)
{
	return {x, y};
}

extern dim3 threadIdx, blockIdx, blockDim, gridDim;
extern unsigned char *host_shared;

void host_block_barrier(void);
/* The threads of the warp that are in `mask` and have not returned meet. */
void host_warp_barrier(unsigned mask);
/* What the thread `from` of the own warp put in; the whole warp, or all of the mask, calls. */
uint64_t host_exchange(uint64_t value, unsigned from);
uint64_t host_exchange_mask(unsigned mask, uint64_t value, unsigned from);
unsigned host_ballot(unsigned mask, bool yes);
/* Run a grid; abort on what a GPU would refuse. */
void host_launch(dim3 grid, unsigned block, size_t shared, void (*run)(void *), void *arg);
/* The same unchecked, its first `blocks` blocks alone; and what is wrong with a launch, or NULL. */
void host_run(dim3 grid, dim3 block, size_t shared, void (*run)(void *), void *arg, unsigned blocks);
const char *host_bad_launch(dim3 grid, dim3 block, size_t shared);

#define __syncthreads host_block_barrier
#define __expf expf

/* ---- a warp ------------------------------------------------------------------------------------- */

#define HOST_LANE ((threadIdx.x + threadIdx.y * blockDim.x) % 32)

static inline void __syncwarp(unsigned mask = ~0u)
{
	host_warp_barrier(mask);
}
static inline unsigned __ballot_sync(unsigned mask, int yes)
{
	return host_ballot(mask, yes != 0);
}
static inline int __any_sync(unsigned mask, int yes)
{
	return host_ballot(mask, yes != 0) != 0;
}
static inline int __all_sync(unsigned mask, int yes)
{
	return host_ballot(mask, yes == 0) == 0;
}
static inline unsigned __activemask(void)
{
	return ~0u;
}
template <typename T> static inline T host_shuffle(unsigned mask, T x, unsigned from)
{
	static_assert(sizeof(T) <= 8, "one word");
	uint64_t bits = 0;

	memcpy(&bits, &x, sizeof(x));
	bits = host_exchange_mask(mask, bits, from);
	memcpy(&x, &bits, sizeof(x));
	return x;
}
/* `width` divides the warp; a lane whose partner is outside its part reads itself. */
template <typename T> static inline T __shfl_sync(unsigned mask, T x, unsigned from, unsigned width = 32)
{
	return host_shuffle(mask, x, HOST_LANE / width * width + from % width);
}
template <typename T> static inline T __shfl_xor_sync(unsigned mask, T x, unsigned d, unsigned width = 32)
{
	unsigned from = HOST_LANE ^ d;

	return host_shuffle(mask, x, from / width <= HOST_LANE / width ? from : HOST_LANE);
}
template <typename T> static inline T __shfl_up_sync(unsigned mask, T x, unsigned d, unsigned width = 32)
{
	return host_shuffle(mask, x, HOST_LANE % width >= d ? HOST_LANE - d : HOST_LANE);
}
template <typename T> static inline T __shfl_down_sync(unsigned mask, T x, unsigned d, unsigned width = 32)
{
	return host_shuffle(mask, x, HOST_LANE % width + d < width ? HOST_LANE + d : HOST_LANE);
}
template <typename T, typename F> static inline T host_reduce(unsigned mask, T x, F both)
{
	T got = x;
	bool first = true;

	for (unsigned i = 0; i < 32; i++)
		if (mask >> i & 1) {
			T y = host_shuffle(mask, x, i);

			got = first ? y : both(got, y);
			first = false;
		}
	return got;
}
template <typename T> static inline T __reduce_add_sync(unsigned mask, T x)
{
	return host_reduce(mask, x, [](T a, T b) { return (T)(a + b); });
}
template <typename T> static inline T __reduce_max_sync(unsigned mask, T x)
{
	return host_reduce(mask, x, [](T a, T b) { return a > b ? a : b; });
}
template <typename T> static inline T __reduce_min_sync(unsigned mask, T x)
{
	return host_reduce(mask, x, [](T a, T b) { return a < b ? a : b; });
}
template <typename T> static inline T __reduce_or_sync(unsigned mask, T x)
{
	return host_reduce(mask, x, [](T a, T b) { return (T)(a | b); });
}
template <typename T> static inline T __reduce_xor_sync(unsigned mask, T x)
{
	return host_reduce(mask, x, [](T a, T b) { return (T)(a ^ b); });
}

/* ---- memory ----------------------------------------------------------------------------------------- */

static inline void __threadfence_system(void)
{
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
}
#define __threadfence __threadfence_system
#define __threadfence_block __threadfence_system
template <typename T> static inline T __ldg(const T *p)
{
	return *p;
}
#define __ldcg __ldg
#define __ldcs __ldg
#define __ldca __ldg
#define __ldcv __ldg
#define __ldlu __ldg
template <typename T> static inline void __stcs(T *p, T x)
{
	*p = x;
}
#define __stcg __stcs
#define __stwt __stcs
#define __stwb __stcs
/* Fibers change only at barriers: what a thread does between two of them is atomic already. */
template <typename T> static inline T atomicExch(T *p, T x)
{
	T old = *p;

	*p = x;
	return old;
}
template <typename T> static inline T atomicAdd(T *p, T x)
{
	return atomicExch(p, (T)(*p + x));
}
template <typename T> static inline T atomicMax(T *p, T x)
{
	return atomicExch(p, (T)(*p > x ? *p : x));
}
template <typename T> static inline T atomicMin(T *p, T x)
{
	return atomicExch(p, (T)(*p < x ? *p : x));
}
template <typename T> static inline T atomicOr(T *p, T x)
{
	return atomicExch(p, (T)(*p | x));
}
template <typename T> static inline T atomicAnd(T *p, T x)
{
	return atomicExch(p, (T)(*p & x));
}
template <typename T> static inline T atomicXor(T *p, T x)
{
	return atomicExch(p, (T)(*p ^ x));
}
template <typename T> static inline T atomicCAS(T *p, T want, T x)
{
	T old = *p;

	*p = old == want ? x : old;
	return old;
}

/* ---- bits --------------------------------------------------------------------------------------------- */

#define __popc __builtin_popcount
#define __popcll __builtin_popcountll
static inline int __ffs(unsigned x)
{
	return __builtin_ffs((int)x);
}
static inline int __ffsll(unsigned long long x)
{
	return __builtin_ffsll((long long)x);
}
static inline int __clz(unsigned x)
{
	return x ? __builtin_clz(x) : 32;
}
static inline int __clzll(unsigned long long x)
{
	return x ? __builtin_clzll(x) : 64;
}
static inline unsigned __brev(unsigned x)
{
	unsigned y = 0;

	for (int i = 0; i < 32; i++)
		y |= (x >> i & 1) << (31 - i);
	return y;
}
/* The low word of the pair shifted right by d % 32. */
static inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned d)
{
	return (unsigned)((((uint64_t)hi << 32) | lo) >> (d % 32));
}
static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned pick)
{
	uint64_t both = (uint64_t)b << 32 | a;
	unsigned y = 0;

	for (int i = 0; i < 4; i++)
		y |= (unsigned)(both >> (pick >> 4 * i & 7) * 8 & 255) << 8 * i;
	return y;
}
static inline unsigned __umulhi(unsigned a, unsigned b)
{
	return (unsigned)((uint64_t)a * b >> 32);
}
template <typename T> static inline T min(T a, T b)
{
	return a < b ? a : b;
}
template <typename T> static inline T max(T a, T b)
{
	return a > b ? a : b;
}
/* Four products of signed bytes, added to c. */
static inline int __dp4a(int a, int b, int c)
{
	for (int i = 0; i < 4; i++)
		c += (int)(int8_t)(a >> 8 * i) * (int)(int8_t)(b >> 8 * i);
	return c;
}

/* ---- numbers -------------------------------------------------------------------------------------------- */

static inline float rsqrtf(float x)
{
	return 1.0f / sqrtf(x);
}
static inline float __uint_as_float(unsigned u)
{
	float f;

	memcpy(&f, &u, 4);
	return f;
}
#define __frcp_rn(x) (1.0f / (x))
#define __frsqrt_rn rsqrtf
#define __fsqrt_rn sqrtf
#define __logf logf
#define __log2f log2f
#define __sinf sinf
#define __cosf cosf
#define __fmaf_rn fmaf
static inline float __fdividef(float a, float b)
{
	return a / b;
}
static inline unsigned __float_as_uint(float f)
{
	unsigned u;

	memcpy(&u, &f, 4);
	return u;
}
using std::isfinite;

#define SHARED(type, name) type *name = (type *)host_shared
#define KERNEL_LAUNCH(fn, grid, block, shared, stream, ...)                                                    \
	do {                                                                                                   \
		auto launch_body = [&] { fn(__VA_ARGS__); };                                                   \
		host_launch(                                                                                   \
			grid, block, shared, [](void *f) { (*(decltype(launch_body) *)f)(); }, &launch_body);  \
	} while (0)

enum cudaError_t { cudaSuccess = 0, cudaErrorMemoryAllocation = 2 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };
enum { cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2 };
typedef struct host_stream *cudaStream_t;
typedef struct host_event *cudaEvent_t;

cudaError_t cudaMalloc(void **p, size_t size);
cudaError_t cudaFree(void *p);
cudaError_t cudaMallocHost(void **p, size_t size);
cudaError_t cudaFreeHost(void *p);
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *all);
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
			      size_t height, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaMemsetAsync(void *to, int value, size_t n, cudaStream_t stream);
cudaError_t cudaGetDeviceCount(int *count);
const char *cudaGetErrorString(cudaError_t e);
#define cudaGetLastError() cudaSuccess
#define cudaStreamCreateWithFlags(stream, flags) (*(stream) = NULL, cudaSuccess)
#define cudaStreamSynchronize(stream) ((void)(stream), cudaSuccess)
#define cudaStreamDestroy(stream) ((void)(stream))
#define cudaEventCreateWithFlags(event, flags) (*(event) = NULL, cudaSuccess)
#define cudaEventSynchronize(event) ((void)(event), cudaSuccess)
#define cudaEventRecord(event, stream) ((void)(event), cudaSuccess)
#define cudaEventDestroy(event) ((void)(event))
