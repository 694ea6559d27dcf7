/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Counts by powers of two. Plain numbers of fixed width without a pointer, so that a BPF map, a published page
 * and a structure of the daemon's hold the same thing. One writer, or writers that add atomically; a reader
 * copies first.
 */
#include <stdint.h>

#define HISTOGRAM_BUCKETS 44u /* of nanoseconds: up to 2.4 h, then all the rest */

struct histogram {
	uint64_t bucket[HISTOGRAM_BUCKETS]; /* [i]: values from 2^i (the first: from 0) to 2^(i+1) - 1 */
	uint64_t sum;                       /* of the values */
};

static inline unsigned histogram_index(uint64_t v)
{
	unsigned i = v ? 63u - (unsigned)__builtin_clzll(v) : 0;

	return i < HISTOGRAM_BUCKETS ? i : HISTOGRAM_BUCKETS - 1;
}
static inline void histogram_add(struct histogram *h, uint64_t v)
{
	h->bucket[histogram_index(v)]++;
	h->sum += v;
}
/* The value n times. */
static inline void histogram_add_n(struct histogram *h, uint64_t v, uint64_t n)
{
	h->bucket[histogram_index(v)] += n;
	h->sum += v * n;
}
uint64_t histogram_count(const struct histogram *h);
/* The value that a share q (0 to 1) of the counted ones do not exceed, even within a bucket; 0 when there is
 * none. */
uint64_t histogram_quantile(const struct histogram *h, double q);
/* *ret = now - before, of one histogram that only grew. */
void histogram_since(const struct histogram *now, const struct histogram *before, struct histogram *ret);
