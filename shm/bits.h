/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Bitmaps of rows: bit p of word p/64 is row (position) p. All functions are
 * pure and take the number of bits explicitly; bits past it must be zero and
 * stay zero.
 */
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#define BITS_WORDS(n) (((uint64_t)(n) + 63) / 64)

static inline bool bits_test(const uint64_t *b, uint32_t i)
{
	return b[i / 64] >> (i % 64) & 1;
}
static inline void bits_set(uint64_t *b, uint32_t i)
{
	b[i / 64] |= UINT64_C(1) << (i % 64);
}
static inline void bits_clear(uint64_t *b, uint32_t i)
{
	b[i / 64] &= ~(UINT64_C(1) << (i % 64));
}
/* Set bits [from, to). */
static inline void bits_set_range(uint64_t *b, uint32_t from, uint32_t to)
{
	for (; from < to && from % 64; from++)
		bits_set(b, from);
	for (; from + 64 <= to; from += 64)
		b[from / 64] = ~UINT64_C(0);
	for (; from < to; from++)
		bits_set(b, from);
}
/* Clear bits [from, to). */
static inline void bits_clear_range(uint64_t *b, uint32_t from, uint32_t to)
{
	for (; from < to && from % 64; from++)
		bits_clear(b, from);
	for (; from + 64 <= to; from += 64)
		b[from / 64] = 0;
	for (; from < to; from++)
		bits_clear(b, from);
}
/* Number of set bits in [0, n): the slot of row n in a packed lane. */
static inline uint32_t bits_rank(const uint64_t *b, uint32_t n)
{
	uint32_t c = 0, w = n / 64;

	for (uint32_t i = 0; i < w; i++)
		c += (uint32_t)__builtin_popcountll(b[i]);
	if (n % 64)
		c += (uint32_t)__builtin_popcountll(b[w] & ((UINT64_C(1) << (n % 64)) - 1));
	return c;
}
/* First set bit at or after i, or n when there is none before n. */
static inline uint32_t bits_next(const uint64_t *b, uint32_t i, uint32_t n)
{
	while (i < n) {
		uint64_t w = b[i / 64] >> (i % 64);

		if (w) {
			i += (uint32_t)__builtin_ctzll(w);
			return i < n ? i : n;
		}
		i = (i / 64 + 1) * 64;
	}
	return n;
}
#define bits_for_each(i, b, n)                                                                                 \
	for (uint32_t i = bits_next((b), 0, (n)); i < (n); i = bits_next((b), i + 1, (n)))
