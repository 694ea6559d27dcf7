/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * What every kernel file includes first. The same sources are compiled by nvcc and, for machines without a GPU,
 * as C++ for the emulation in tests/gpu/host, where a block's threads are fibers and blocks run one after
 * another: no block may wait for a later one, whole warps call shuffles and ballots, and every thread of a
 * block reaches its barriers. Machine instructions stand only in the small functions here and in mma.cuh, with
 * what they mean in C++ beside them.
 */
#include <cuda_runtime.h>
#include <stdint.h>
#include "ipc/cuda/args.h"

#define WARP 32u
#define BLOCK 256u /* threads, of every kernel */
#define WARPS (BLOCK / WARP)
#define ALL 0xffffffffu /* threads of a warp */

/* A kernel takes one struct of args.h; `blocks` of them fit a multiprocessor. */
#define KERNEL(blocks) extern "C" __global__ void __launch_bounds__(BLOCK, blocks)

#ifndef __CUDACC__
#ifndef __launch_bounds__
#define __launch_bounds__(...)
#endif
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#endif

/* The block's dynamic shared memory, aligned to 128 bytes. */
#ifndef SHARED
#define SHARED(type, name)                                                                                     \
	extern __shared__ __align__(128) unsigned char kvt_shared[];                                           \
	type *name = (type *)kvt_shared
#endif

/* A device address of args.h as a pointer. */
template <typename T> static __device__ __forceinline__ T *at(uint64_t addr)
{
	return (T *)(uintptr_t)addr;
}
static __device__ __forceinline__ uint32_t warp_lane(void)
{
	return threadIdx.x % WARP;
}
static __device__ __forceinline__ uint32_t warp_index(void)
{
	return threadIdx.x / WARP;
}

/* Sum over the warp; everybody gets it. */
static __device__ __forceinline__ uint32_t warp_sum(uint32_t x)
{
#ifdef __CUDA_ARCH__
	return __reduce_add_sync(ALL, x);
#else
	for (uint32_t d = WARP / 2; d; d >>= 1)
		x += __shfl_xor_sync(ALL, x, d);
	return x;
#endif
}
/* Sum over the threads of the warp up to and with this one. */
static __device__ __forceinline__ uint32_t warp_prefix(uint32_t x)
{
	for (uint32_t d = 1; d < WARP; d <<= 1) {
		uint32_t y = __shfl_up_sync(ALL, x, d);

		x += warp_lane() >= d ? y : 0;
	}
	return x;
}

/* 16 bytes that are read once: they take no place in L1. */
static __device__ __forceinline__ uint4 load16_once(const void *p)
{
#ifdef __CUDA_ARCH__
	uint4 x;

	asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
		     : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
		     : "l"(p));
	return x;
#else
	return *(const uint4 *)p;
#endif
}
static __device__ __forceinline__ uint4 load16(const void *p)
{
	return *(const uint4 *)p;
}
static __device__ __forceinline__ void store16(void *p, uint4 x)
{
	*(uint4 *)p = x;
}

/*
 * Copies of 16 bytes from device or registered host memory into shared memory that do not wait: started by
 * async16(), closed into a group by async_commit(); async_wait<n>() leaves at most the n newest groups of this
 * thread unfinished (other threads see the bytes after a barrier).
 */
static __device__ __forceinline__ void async16(void *shared, const void *from)
{
#ifdef __CUDA_ARCH__
	asm volatile(
		"cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((uint32_t)__cvta_generic_to_shared(shared)),
		"l"(from)
		: "memory");
#else
	*(uint4 *)shared = *(const uint4 *)from;
#endif
}
static __device__ __forceinline__ void async_commit(void)
{
#ifdef __CUDA_ARCH__
	asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int n> static __device__ __forceinline__ void async_wait(void)
{
#ifdef __CUDA_ARCH__
	asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
#endif
}

/* A word that the host or another block may read: written after everything this thread wrote before. */
static __device__ __forceinline__ void store_release_system(uint64_t *p, uint64_t x)
{
#ifdef __CUDA_ARCH__
	asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(p), "l"(x) : "memory");
#else
	__atomic_store_n(p, x, __ATOMIC_RELEASE);
#endif
}
/* A word that the host may change: never cached, and what is read after it is not older. */
static __device__ __forceinline__ uint64_t load_acquire_system(const uint64_t *p)
{
#ifdef __CUDA_ARCH__
	uint64_t x;

	asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(x) : "l"(p) : "memory");
	return x;
#else
	return __atomic_load_n(p, __ATOMIC_ACQUIRE);
#endif
}

/* A word that another block of this kernel wrote. */
static __device__ __forceinline__ uint32_t load_l2(const uint32_t *p)
{
#ifdef __CUDA_ARCH__
	return __ldcg(p);
#else
	return *p;
#endif
}
/* Until blocks that run have counted *p up to n. What they wrote before is seen afterwards. */
static __device__ __forceinline__ void wait_until(uint32_t *p, uint32_t n)
{
#ifdef __CUDA_ARCH__
	uint32_t x;

	do
		asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
	while (x < n);
#else
	if (*p < n)
		__builtin_trap(); /* blocks run one after another here: nobody would come */
#endif
}

/* Bits [from, to) of word w of a bitmap: the mask. */
static __device__ __forceinline__ uint64_t range_mask(uint32_t w, uint32_t from, uint32_t to)
{
	uint64_t low = w * 64 >= from ? ~0ull : from - w * 64 >= 64 ? 0 : ~0ull << (from - w * 64);
	uint64_t high = to <= w * 64 ? 0 : to - w * 64 >= 64 ? ~0ull : ~0ull >> (64 - (to - w * 64));

	return low & high;
}
/* Place of the set bit of x that has r set bits below it; r < popcount(x). */
static __device__ __forceinline__ uint32_t select64(uint64_t x, uint32_t r)
{
	uint32_t low = __popc((uint32_t)x), word, place = 0;

	if (r >= low) {
		r -= low;
		place = 32;
	}
	word = (uint32_t)(x >> place);
	for (uint32_t d = 16; d; d >>= 1) {
		uint32_t n = __popc(word & ((1u << d) - 1));

		if (r >= n) {
			r -= n;
			word >>= d;
			place += d;
		}
	}
	return place;
}
