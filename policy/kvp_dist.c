/* SPDX-License-Identifier: MIT */
/*
 * Distance tables: from a row's coefficients to its score in a sequence of n
 * rows. Between two knots phi is linear in log2(1 + distance), so rows at
 * consecutive positions fall into a few dozen runs, longer and longer towards
 * the start, and within a run a score is a logarithm and two multiply-adds.
 */
#include "policy/kvp.h"
#include "shm/util.h"

int kvp_dist_init(struct kvp_dist *d, const struct weights *w)
{
	uint32_t rows = w->h.dist_rows;
	size_t each = (size_t)2 * w->h.rank * rows;

	*d = (struct kvp_dist){.rows = rows, .rank = w->h.rank, .octave = w->h.octave};
	if (!rows)
		return 0;
	d->from = calloc(rows, sizeof(*d->from));
	d->table = calloc(w->lanes * each, sizeof(*d->table));
	if (!d->from || !d->table) {
		kvp_dist_done(d);
		return -ENOMEM;
	}
	for (uint32_t k = 0; k < rows; k++) {
		double x = ceil(exp2((double)k / d->octave) - 1);

		d->from[k] = x < UINT32_MAX ? (uint32_t)x : UINT32_MAX;
	}
	for (uint32_t lane = 0; lane < w->lanes; lane++) {
		const uint16_t *src = weights_at(w, lane, KVP_DIST);

		for (size_t i = 0; i < each; i++)
			d->table[lane * each + i] = bf16_float(src[i]);
	}
	return 0;
}

void kvp_dist_done(struct kvp_dist *d)
{
	free(d->from);
	free(d->table);
	*d = (struct kvp_dist){0};
}

/* The last knot at or before distance x: from[0] is 0. */
static uint32_t knot_before(const struct kvp_dist *d, uint32_t x)
{
	uint32_t lo = 0, hi = d->rows;

	while (hi - lo > 1) {
		uint32_t at = lo + (hi - lo) / 2;

		if (d->from[at] <= x)
			lo = at;
		else
			hi = at;
	}
	return lo;
}

static struct kvp_segment segment_at(const struct kvp_dist *d, uint32_t lane, uint32_t k, float lambda)
{
	const float *even = d->table + (size_t)lane * 2 * d->rank * d->rows, *odd;
	uint32_t next = MIN(k + 1, d->rows - 1); /* past the last knot: flat */
	struct kvp_segment s = {0};

	for (uint32_t r = 0; r < d->rank; r++, even += (size_t)2 * d->rows) {
		float here;

		odd = even + d->rows;
		here = even[k] + lambda * odd[k];
		s.b[r] = even[next] + lambda * odd[next] - here;
		s.a[r] = here - s.b[r] * (float)k;
	}
	return s;
}

/* How many rows from i on follow each other, `most` at most. */
static uint32_t run_length(const struct policy_batch *b, uint32_t i, uint32_t most)
{
	uint32_t n = 1;

	if (!b->pos)
		return most;
	while (n < most && b->pos[i + n] == b->pos[i] + n)
		n++;
	return n;
}

void kvp_dist_combine(const struct kvp_dist *d, const struct kvp_isa *isa, const struct policy_batch *b,
		      const float *const *coef, float *scores)
{
	const float lambda = kvp_lambda(b->total);

	for (uint32_t i = 0, n; i < b->n; i += n) {
		uint32_t x = kvp_distance(b->total, batch_pos(b, i)), k = knot_before(d, x);
		struct kvp_segment s = segment_at(d, b->lane, k, lambda);

		n = run_length(b, i, MIN(b->n - i, x - d->from[k] + 1));
		isa->combine(scores + i, coef[0] + i, d->rank > 1 ? coef[1] + i : NULL, n, x, (float)d->octave,
			     &s);
	}
}
