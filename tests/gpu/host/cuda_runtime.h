/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * As much of CUDA as our kernels use, on the CPU: a block's threads are fibers that run in turn, one
 * block after another. Slow, and exact about what a missing barrier or an unwritten value does: device and
 * shared memory start as NaN, and KVT_HOST_ORDER=falling runs the threads in the other order. For machines
 * without a GPU (tests/gpu/run --host); nothing that ships includes it.
 */
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __shared__ static

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
struct alignas(16) uint4 {
	unsigned x, y, z, w;
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
static inline double2 make_double2(double x, double y)
{
	return {x, y};
}

extern dim3 threadIdx, blockIdx, blockDim, gridDim;
extern unsigned char *host_shared;

void host_block_barrier(void);
/* What the thread `from` of the own warp put in; the whole warp calls. */
uint64_t host_exchange(uint64_t value, unsigned from);
void host_launch(dim3 grid, unsigned block, size_t shared, void (*run)(void *), void *arg);

#define __syncthreads host_block_barrier
#define __expf expf

template <typename T> static inline T host_shuffle(T x, unsigned from)
{
	uint64_t bits = 0;

	memcpy(&bits, &x, sizeof(x));
	bits = host_exchange(bits, from);
	memcpy(&x, &bits, sizeof(x));
	return x;
}
#define HOST_LANE (threadIdx.x % 32)
template <typename T> static inline T __shfl_xor_sync(unsigned, T x, unsigned d)
{
	return host_shuffle(x, HOST_LANE ^ d);
}
template <typename T> static inline T __shfl_up_sync(unsigned, T x, unsigned d)
{
	return host_shuffle(x, HOST_LANE >= d ? HOST_LANE - d : HOST_LANE);
}
template <typename T> static inline T __shfl_down_sync(unsigned, T x, unsigned d)
{
	return host_shuffle(x, HOST_LANE + d < 32 ? HOST_LANE + d : HOST_LANE);
}

template <typename T> static inline T __shfl_sync(unsigned, T x, unsigned from)
{
	return host_shuffle(x, from % 32);
}
static inline unsigned __ballot_sync(unsigned, bool p)
{
	unsigned bits = (unsigned)p << HOST_LANE;

	for (unsigned d = 16; d; d >>= 1)
		bits |= __shfl_xor_sync(~0u, bits, d);
	return bits;
}
static inline void __syncwarp(void)
{
	host_exchange(0, HOST_LANE);
}
/* Fibers change only at barriers: what a thread does between two of them is atomic already. */
template <typename T> static inline T atomicAdd(T *p, T x)
{
	T old = *p;

	*p += x;
	return old;
}
template <typename T> static inline T atomicMax(T *p, T x)
{
	T old = *p;

	*p = old > x ? old : x;
	return old;
}
template <typename T> static inline T atomicOr(T *p, T x)
{
	T old = *p;

	*p |= x;
	return old;
}
#define __threadfence() ((void)0)
#define __threadfence_system() ((void)0)
#define __popc __builtin_popcount
#define __popcll __builtin_popcountll
#define __ffs __builtin_ffs
#define __ffsll __builtin_ffsll
static inline int __clz(int x)
{
	return x ? __builtin_clz((unsigned)x) : 32;
}
static inline int __clzll(long long x)
{
	return x ? __builtin_clzll((unsigned long long)x) : 64;
}

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
