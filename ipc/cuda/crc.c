/* SPDX-License-Identifier: MIT */
/* The checksum kernels' tables: what crc.cuh multiplies by. */
#include <assert.h>
#include "ipc/cuda/kernels.h"

#define POLY 0x82f63b78u /* CRC32C, bit-reflected: bit 31 is x^0 */
#define BLOCK 256u       /* threads, as in common.cuh */
#define PIECE 16u        /* bytes that a thread sees at a time */

/* As crc.cuh reads it. */
struct crc_tables {
	uint32_t stride[4][256];
	uint32_t place[BLOCK][4];
};
static_assert(sizeof(struct crc_tables) == 8192, "crc.cuh");

/* a * x^bits modulo P: what so many zero bits behind it make of a checksum. */
static uint32_t shifted(uint32_t a, uint32_t bits)
{
	while (bits--)
		a = a >> 1 ^ (a & 1 ? POLY : 0);
	return a;
}

size_t crc_tables_bytes(void)
{
	return sizeof(struct crc_tables);
}

void crc_tables_fill(void *ret)
{
	struct crc_tables *t = ret;

	for (uint32_t b = 0; b < 4; b++)
		for (uint32_t i = 0; i < 256; i++)
			t->stride[b][i] = shifted(i << 8 * b, 8 * BLOCK * PIECE);
	for (uint32_t d = 0; d < BLOCK; d++)
		for (uint32_t k = 0; k < 4; k++)
			t->place[d][k] = shifted(1u << 31, 8 * PIECE * d + 32 * (4 - k));
}
