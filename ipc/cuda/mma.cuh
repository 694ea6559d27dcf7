/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * The tensor cores' product of small matrices, and the conversions around it, as machine instructions; beside
 * each what it means, for the emulation in tests/gpu/host. A warp's 32 threads call together. Thread 4 g + t
 * of a warp holds, of the
 *   left matrix [16][16] a0: row g, columns 2t and 2t + 1; a1: row g + 8; a2, a3: the same rows, columns 8 on
 *   right matrix [16][8] b0: column g, rows 2t and 2t + 1; b1: rows 8 on
 *   sum [16][8]          d0, d1: row g, columns 2t and 2t + 1; d2, d3: row g + 8
 * bf16 pairs with the lower column or row in the lower half of a word.
 */
#include "ipc/cuda/common.cuh"

#ifndef __CUDACC__
#include <math.h>
#include <string.h>

/* What every thread of the warp brought; all have when it returns, and may read until they call again. */
template <typename T> static inline const T *host_gather_warp(const T &mine)
{
	static T all[2][BLOCK];
	static unsigned char turn[BLOCK];
	T *now = all[turn[threadIdx.x] ^= 1];

	now[threadIdx.x] = mine;
	__shfl_xor_sync(ALL, 0u, 1u);
	return now + threadIdx.x / WARP * WARP;
}
static inline float host_bf16(uint32_t pair, unsigned high)
{
	uint32_t bits = high ? pair & 0xffff0000u : pair << 16;
	float x;

	memcpy(&x, &bits, 4);
	return x;
}
static inline uint32_t host_round_bf16(float x)
{
	uint32_t bits;

	memcpy(&bits, &x, 4);
	if ((bits & 0x7fffffff) > 0x7f800000)
		return bits >> 16 | 0x40;
	return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
#endif

/* d += a b */
static __device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
#ifdef __CUDACC__
	asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
	    "{%0, %1, %2, %3};"
	    : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
	    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
	struct operands {
		uint32_t a[4], b[2];
	};
	const operands mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}}, *warp = host_gather_warp(mine);
	const unsigned g = warp_lane() / 4, t = warp_lane() % 4;

	for (unsigned k = 0; k < 16; k++) {
		unsigned owner = k % 8 / 2, high = k & 1, eight = k / 8;

		for (unsigned i = 0; i < 4; i++)
			d[i] += host_bf16(warp[g * 4 + owner].a[eight * 2 + i / 2], high) *
				host_bf16(warp[(2 * t + i % 2) * 4 + owner].b[eight], high);
	}
#endif
}

/*
 * Four matrices of 8 x 8 bf16 from shared memory. Threads 8 i .. 8 i + 7 give the addresses of the rows of
 * matrix i; of each matrix thread 4 g + t gets row g, columns 2 t and 2 t + 1.
 */
static __device__ __forceinline__ uint4 load_matrices(const void *row)
{
	uint4 x;

#ifdef __CUDACC__
	asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
		     : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
		     : "r"((uint32_t)__cvta_generic_to_shared(row))
		     : "memory");
#else
	const void *const *rows = host_gather_warp(row);
	uint32_t word[4];

	for (unsigned i = 0; i < 4; i++)
		memcpy(&word[i], (const char *)rows[i * 8 + warp_lane() / 4] + warp_lane() % 4 * 4, 4);
	x = make_uint4(word[0], word[1], word[2], word[3]);
#endif
	return x;
}

/* Two floats, rounded to nearest, as a pair of bf16. */
static __device__ __forceinline__ uint32_t pack_bf16(float low, float high)
{
#ifdef __CUDACC__
	uint32_t pair;

	asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
	return pair;
#else
	return host_round_bf16(low) | host_round_bf16(high) << 16;
#endif
}
static __device__ __forceinline__ float low_bf16(uint32_t pair)
{
	return __uint_as_float(pair << 16);
}
static __device__ __forceinline__ float high_bf16(uint32_t pair)
{
	return __uint_as_float(pair & 0xffff0000u);
}
/* The halves of a pair of fp16. */
static __device__ __forceinline__ void unpack_f16(uint32_t pair, float &low, float &high)
{
#ifdef __CUDACC__
	asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
	    : "=f"(low), "=f"(high)
	    : "r"(pair));
#else
	for (unsigned i = 0; i < 2; i++) {
		uint32_t half = i ? pair >> 16 : pair & 0xffff, bits = (half & 0x7fff) << 13;
		float x;

		if (bits >= 0x7c00u << 13)
			bits |= 0x7f800000;
		memcpy(&x, &bits, 4);
		if (bits < 0x7c00u << 13)
			x *= 0x1p112f;
		(i ? high : low) = half & 0x8000 ? -x : x;
	}
#endif
}
/* To 2^-11 of itself. */
static __device__ __forceinline__ float tanh_fast(float x)
{
#ifdef __CUDACC__
	float y;

	asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
	return y;
#else
	return tanhf(x);
#endif
}
/* To 2^-21, for angles between -pi and pi. */
static __device__ __forceinline__ void sincos_fast(float angle, float &sine, float &cosine)
{
#ifdef __CUDACC__
	__sincosf(angle, &sine, &cosine);
#else
	sine = sinf(angle);
	cosine = cosf(angle);
#endif
}
