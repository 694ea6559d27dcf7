/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * CRC32C of a page by one block, while it copies the page. A checksum without inversions is linear: the message
 * is a polynomial over GF(2), the checksum is what remains of message * x^32 modulo P. Thread t sees the
 *16-byte pieces t, t + 256, t + 512, ...; for each of the four words of a piece it keeps a Horner sum
 *
 *	s <- s * x^32768 + word		(32768 bits lie between two pieces of one thread)
 *
 * which takes four look-ups in 4 KiB of shared memory per word and no other work per byte. At the end the sums
 * are moved to their place before the message's end by one multiplication each and added over the block. Words
 * are bit-reflected, as CRC32C's usual form has them: bit 31 is x^0.
 */
#include "ipc/cuda/common.cuh"

#define CRC_POLY 0x82f63b78u

/* As crc_tables_fill() in move.c makes it. */
struct crc_tables {
	uint32_t stride[4][256];  /* b * x^32768, b being byte 0, 1, 2, 3 of a word */
	uint32_t place[BLOCK][4]; /* x^(128 d + 32 (4 - k)): word k of a piece with d pieces behind it */
};

struct crc_sum {
	uint4 s;
};

/* The block's copy of the table; a barrier must follow. */
static __device__ __forceinline__ void crc_load(uint32_t *table, uint64_t tables)
{
	const uint4 *from = at<const uint4>(tables);

	for (uint32_t i = threadIdx.x; i < 256; i += BLOCK)
		((uint4 *)table)[i] = from[i];
}

static __device__ __forceinline__ uint32_t crc_stride(const uint32_t *table, uint32_t s)
{
	return table[s & 255] ^ table[256 + (s >> 8 & 255)] ^ table[512 + (s >> 16 & 255)] ^
	       table[768 + (s >> 24)];
}

/* This thread's next piece. */
static __device__ __forceinline__ void crc_add(struct crc_sum *c, const uint32_t *table, uint4 x)
{
	c->s.x = crc_stride(table, c->s.x) ^ x.x;
	c->s.y = crc_stride(table, c->s.y) ^ x.y;
	c->s.z = crc_stride(table, c->s.z) ^ x.z;
	c->s.w = crc_stride(table, c->s.w) ^ x.w;
}

/* a * b modulo P. */
static __device__ __forceinline__ uint32_t crc_times(uint32_t a, uint32_t b)
{
	uint32_t r = 0;

	for (uint32_t i = 0; i < 32; i++) {
		r ^= a >> 31 ? b : 0;
		a <<= 1;
		b = b >> 1 ^ (b & 1 ? CRC_POLY : 0);
	}
	return r;
}

/* This warp's part of the checksum of `pieces`; the block's parts added (exclusive or) are the checksum. */
static __device__ __forceinline__ uint32_t crc_part(const struct crc_sum *c, uint64_t tables, uint32_t pieces)
{
	uint32_t behind = (pieces - 1 - threadIdx.x) % BLOCK, sum;
	const uint4 place = *(const uint4 *)at<const struct crc_tables>(tables)->place[behind];

	sum = crc_times(c->s.x, place.x) ^ crc_times(c->s.y, place.y) ^ crc_times(c->s.z, place.z) ^
	      crc_times(c->s.w, place.w);
	for (uint32_t d = WARP / 2; d; d >>= 1)
		sum ^= __shfl_xor_sync(ALL, sum, d);
	return sum;
}
