/* SPDX-License-Identifier: MIT */
/*
 * Tables of the rotations that undo RoPE. The keys of a cache are rotated by
 * their positions; a network that was trained on keys before that sees through
 * the rotation, and is not confused by positions that it was never shown.
 */
#include "policy/kvp.h"
#include "shm/util.h"

#include <stdlib.h>

#define COARSE 64u /* 64 * 128 * 128 = 2^20 positions */

static void fill(float *table, const struct kvp_rope *r, uint32_t entries, double stride)
{
	for (uint32_t e = 0; e < entries; e++, table += 2 * (size_t)r->dim)
		for (uint32_t i = 0; i < r->dim; i++) {
			double angle = e * stride * r->freq[i];

			table[i] = (float)cos(angle);
			table[r->dim + i] = (float)(kvp_rope_partner(r, i) > i ? sin(angle) : -sin(angle));
		}
}

int kvp_rope_init(struct kvp_rope *r, uint32_t type, uint32_t dim, float theta)
{
	size_t entry = 2 * (size_t)dim;

	*r = (struct kvp_rope){.type = type, .dim = dim};
	if (type == WEIGHTS_ROPE_NONE)
		return 0;
	r->freq = calloc(dim, sizeof(*r->freq));
	r->fine = aligned_alloc(64, ALIGN_UP((2 * KVP_ROPE_STEP + COARSE) * entry * sizeof(float), (size_t)64));
	if (!r->freq || !r->fine) {
		kvp_rope_done(r);
		return -ENOMEM;
	}
	r->mid = r->fine + KVP_ROPE_STEP * entry;
	r->coarse = r->mid + KVP_ROPE_STEP * entry;
	for (uint32_t i = 0; i < dim; i++) {
		uint32_t pair = type == WEIGHTS_ROPE_PAIRS ? i / 2 : i % (dim / 2);

		r->freq[i] = pow((double)theta, -2.0 * pair / dim);
	}
	fill(r->fine, r, KVP_ROPE_STEP, 1);
	fill(r->mid, r, KVP_ROPE_STEP, KVP_ROPE_STEP);
	fill(r->coarse, r, COARSE, KVP_ROPE_STEP * KVP_ROPE_STEP);
	return 0;
}

void kvp_rope_done(struct kvp_rope *r)
{
	free(r->freq);
	free(r->fine);
	*r = (struct kvp_rope){0};
}

void kvp_rope_base(const struct kvp_rope *r, uint32_t step, float *base)
{
	const uint32_t dim = r->dim, high = step / KVP_ROPE_STEP;
	const float *m = r->mid + (size_t)(step % KVP_ROPE_STEP) * 2 * dim,
		    *c = r->coarse + (size_t)high * 2 * dim;

	for (uint32_t i = 0; high < COARSE && i < dim; i++) {
		base[i] = m[i] * c[i] - m[dim + i] * c[dim + i];
		base[dim + i] = m[dim + i] * c[i] + m[i] * c[dim + i];
	}
	for (uint32_t i = 0; high >= COARSE && i < dim; i++) { /* no sequence is that long: right, not fast */
		double angle = (double)step * KVP_ROPE_STEP * r->freq[i];

		base[i] = (float)cos(angle);
		base[dim + i] = (float)(kvp_rope_partner(r, i) > i ? sin(angle) : -sin(angle));
	}
}
