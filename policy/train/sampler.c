/* SPDX-License-Identifier: MIT */
/* Which units and rows a step sees: a function of seed and step. */
#include "policy/train/noise.h"
#include "policy/train/set.h"
#include "shm/util.h"

#define SALT_EPOCH 0x65706f6368ull
#define SALT_ROWS 0x726f7773ull
#define FIXED UINT64_MAX /* the "step" of evaluation rows */

void sampler_free(struct sampler *p)
{
	if (!p)
		return;
	free(p->pool);
	free(p->key);
	free(p->unit);
	free(p->n);
	free(p->row);
	free(p);
}

int sampler_new(struct sampler **ret, const struct set *s, uint32_t split, const struct train_opts *o)
{
	struct sampler *p = calloc(1, sizeof(*p));

	if (!p)
		return -ENOMEM;
	p->set = s;
	p->seed = o->seed;
	p->batch = o->batch;
	p->rows = o->rows;
	p->epoch = FIXED;
	p->pool = calloc(s->units, sizeof(*p->pool));
	p->key = calloc(s->units, sizeof(*p->key));
	p->unit = calloc(o->batch, sizeof(*p->unit));
	p->n = calloc(o->batch, sizeof(*p->n));
	p->row = calloc((size_t)o->batch * o->rows, sizeof(*p->row));
	if (!p->pool || !p->key || !p->unit || !p->n || !p->row) {
		sampler_free(p);
		return -ENOMEM;
	}
	for (uint32_t u = 0; u < s->units; u++)
		if (s->unit[u].split == split)
			p->pool[p->pool_n++] = u;
	*ret = p;
	return 0;
}

static int by_key(const void *a, const void *b, void *keys)
{
	const uint64_t *key = keys;
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

	return key[x] < key[y] ? -1 : key[x] > key[y] ? 1 : x < y ? -1 : x > y;
}

static void shuffle(struct sampler *p, uint64_t epoch)
{
	if (epoch == p->epoch)
		return;
	for (uint32_t i = 0; i < p->pool_n; i++)
		p->key[p->pool[i]] = train_hash(p->seed ^ SALT_EPOCH, epoch, 0, p->pool[i], 0, 0);
	qsort_r(p->pool, p->pool_n, sizeof(*p->pool), by_key, p->key);
	p->epoch = epoch;
}

/* Up to `rows` of the unit's rows without replacement, ascending (Knuth's algorithm S). */
static void draw_rows(struct sampler *p, uint32_t slot, uint32_t unit, uint64_t step)
{
	uint32_t have = p->set->unit[unit].rows, want = MIN(have, p->rows), n = 0;
	uint32_t *row = p->row + (size_t)slot * p->rows, salt = p->set->unit[unit].salt;

	for (uint32_t i = 0; n < want; i++)
		if (have == want ||
		    train_hash(p->seed ^ SALT_ROWS, step, salt, 0, 0, i) % (have - i) < want - n)
			row[n++] = i;
	p->unit[slot] = unit;
	p->n[slot] = n;
}

const struct train_batch *sampler_step(struct sampler *p, uint64_t step, float lr)
{
	for (uint32_t s = 0; s < p->batch; s++) {
		uint64_t drawn = step * p->batch + s;

		shuffle(p, drawn / p->pool_n);
		draw_rows(p, s, p->pool[drawn % p->pool_n], step);
	}
	p->t = (struct train_batch){step, lr, p->batch, p->unit, p->n, p->row};
	return &p->t;
}

const struct train_batch *sampler_fixed(struct sampler *p, uint32_t from)
{
	uint32_t n = 0, at = 0;

	for (uint32_t u = 0; u < p->set->units && n < p->batch; u++) {
		if (p->set->unit[u].split != p->set->unit[p->pool[0]].split || at++ < from)
			continue;
		draw_rows(p, n++, u, FIXED);
	}
	p->t = (struct train_batch){0, 0, n, p->unit, p->n, p->row};
	return n ? &p->t : NULL;
}
