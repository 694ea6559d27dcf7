/* SPDX-License-Identifier: MIT */
/*
 * Scores on workers: rows are copied out of the region first, because the
 * client may still write it, then the policy reads the copy. Keys go straight
 * into the index: while a plan is being made nobody else touches them. Rows
 * that a client cut off its own file are worth nothing; to fail the plan would
 * only have it made again, and moving such a row will be counted.
 */
#include <string.h>
#include "daemon/internal.h"
#include "policy/decide.h"
#include "shm/util.h"

#define CHUNK_ROWS 1024u

/*
 * The runtime's own scores, or what it computed with a scorer's network: planes of the region, one copy of each
 * per lane. Rows that an earlier client wrote have none of this one's.
 */
static int from_plane(struct plan *p, uint32_t lane, struct worker_ctx *w)
{
	struct seq *s = p->seq;
	const struct wire_layout *y = &s->layout[s->model->lane_layer[lane]];
	uint16_t *to[] = {s->ix.key, s->ix.coef};
	uint32_t from = MAX(p->rescore ? 0 : p->from, p->plane_from), n = p->watermark - from;
	uint32_t planes = MAX(p->use->coefs, 1u);
	uint64_t off = y->score_off + s->model->lane_head[lane] * y->score_head_stride +
		       (uint64_t)from * sizeof(float);
	float *buf = n ? worker_scratch(w, n * sizeof(float)) : NULL;
	int r = buf || !n ? 0 : -ENOMEM;

	for (uint32_t i = 0; n && i < planes && !r; i++, off += (uint64_t)s->max_rows * sizeof(float)) {
		uint16_t *key = to[i] + (size_t)lane * s->ix.cap + from;

		r = p->region->ops->read(p->region->mem, off, buf, n * sizeof(float));
		if (!r)
			score_keys(buf, key, n);
		else if (r == -EIO)
			memset(key, 0, n * sizeof(*key));
		r = r == -EIO ? 0 : r;
	}
	return r;
}

struct rows {
	uint32_t n, first_pos, first_slot;
	const uint32_t *pos; /* NULL: consecutive */
};

/* Slots [first, first + n) of one plane, in pieces that the device takes at once. */
static int copy_plane(const struct region *g, const struct device_lane *lane, uint32_t first, uint32_t n,
		      char *dst)
{
	uint32_t width = lane->k_bytes + lane->v_bytes, slots[256], crc = 0, step;
	int r = 0;

	step = width ? MIN(ARRAY_SIZE(slots), TIER_MAX_PAGE / width) : n;
	for (uint32_t at = 0; width && at < n && !r; at += step) {
		uint32_t k = MIN(step, n - at);

		for (uint32_t i = 0; i < k; i++)
			slots[i] = first + at + i;
		r = g->ops->gather(g->mem, lane, slots, k, dst + (size_t)at * width, &crc);
	}
	return r;
}

static int copy_rows(const struct plan *p, uint32_t lane, const struct rows *rw, char *k, char *v)
{
	struct device_lane only_k, only_v;
	int r;

	seq_lane(p->seq, lane, &only_k);
	only_v = only_k;
	only_k.v_bytes = 0;
	only_v.k_bytes = 0;
	r = copy_plane(p->region, &only_k, rw->first_slot, rw->n, k);
	return r ? r : copy_plane(p->region, &only_v, rw->first_slot, rw->n, v);
}

/* Into a plane of the index; scores NULL: rows that cannot be read are worth nothing. */
static void store(const struct plan *p, uint16_t *plane, uint32_t lane, const struct rows *rw,
		  const float *scores, uint16_t *keys)
{
	uint16_t *to = plane + (size_t)lane * p->seq->ix.cap;

	if (scores)
		score_keys(scores, keys, rw->n);
	else
		memset(keys, 0, rw->n * sizeof(*keys));
	for (uint32_t i = 0; i < rw->n; i++)
		to[rw->pos ? rw->pos[i] : rw->first_pos + i] = keys[i];
}

/* Scratch: positions (the caller's), scores or two coefficients, keys, then the K and V planes. */
static int score_rows(struct plan *p, uint32_t lane, const struct rows *rw, struct worker_ctx *w)
{
	struct seq *s = p->seq;
	const struct model *m = s->model;
	const struct wire_layer *y = &m->layer[m->lane_layer[lane]];
	const struct policy_ops *ops = p->use->ops;
	bool data = ops->caps & (POLICY_NEEDS_K | POLICY_NEEDS_V);
	float *scores = (float *)((char *)w->buf + rw->n * sizeof(uint32_t)), *second = scores + rw->n;
	uint16_t *keys = (uint16_t *)(second + rw->n);
	char *k, *v;
	int r;

	k = (char *)ALIGN_UP((uintptr_t)(keys + rw->n), 64);
	v = (char *)ALIGN_UP((uintptr_t)k + (size_t)rw->n * y->k_bytes, 64);
	r = data ? copy_rows(p, lane, rw, k, v) : 0;
	if (!r) {
		struct policy_batch b = {
			.lane = policy_lane(m, lane),
			.n = rw->n,
			.k = data ? k : NULL,
			.v = data ? v : NULL,
			.k_stride = y->k_bytes,
			.v_stride = y->v_bytes,
			.pos = rw->pos,
			.first_pos = rw->first_pos,
			.total = p->watermark,
			.nonce = s->nonce,
		};

		r = p->use->coefs ? ops->coefs(p->use->policy, &b, (float *const[]){scores, second})
				  : ops->score(p->use->policy, &b, scores);
	}
	if (r < 0 && (r != -EIO || !data))
		return r;
	store(p, s->ix.key, lane, rw, r ? NULL : scores, keys);
	if (p->use->coefs > 1)
		store(p, s->ix.coef, lane, rw, r ? NULL : second, keys);
	return 0;
}

static size_t scratch_for(const struct model *m, uint32_t lane, uint32_t n)
{
	return (size_t)n * (3 * sizeof(uint32_t) + sizeof(uint16_t) + lane_bytes(m, lane)) + 256;
}

/* Rows are scored by themselves, once, in chunks that stay in cache. */
static int score_new(struct plan *p, uint32_t lane, struct worker_ctx *w)
{
	uint32_t slot = bits_rank(index_bits(&p->seq->ix, KVT_TIER_DEVICE, lane), p->from);

	if (!worker_scratch(w, scratch_for(p->seq->model, lane, CHUNK_ROWS)))
		return -ENOMEM;
	for (uint32_t at = p->from; at < p->watermark; at += CHUNK_ROWS) {
		struct rows rw = {.n = MIN(CHUNK_ROWS, p->watermark - at),
				  .first_pos = at,
				  .first_slot = slot + (at - p->from)};
		int r = score_rows(p, lane, &rw, w);

		if (r < 0)
			return r;
	}
	return 0;
}

/* The policy compares rows, or is a new one: everything in the device tier again, in one batch. */
static int score_all(struct plan *p, uint32_t lane, struct worker_ctx *w)
{
	struct seq *s = p->seq;
	const uint64_t *dev = index_bits(&s->ix, KVT_TIER_DEVICE, lane);
	struct rows rw = {.n = s->ix.resident[lane]};
	uint32_t *pos = worker_scratch(w, scratch_for(s->model, lane, rw.n)), n = 0;

	if (!pos)
		return -ENOMEM;
	bits_for_each(i, dev, p->watermark)
		pos[n++] = i;
	rw.pos = pos;
	return rw.n ? score_rows(p, lane, &rw, w) : 0;
}

void score_combine(const struct seq *s, const struct policy_use *use, uint32_t lane, uint32_t rows,
		   uint32_t total, uint16_t *keys)
{
	const struct index *ix = &s->ix;
	const uint16_t *from[POLICY_MAX_COEFS] = {ix->key + (size_t)lane * ix->cap,
						  ix->coef ? ix->coef + (size_t)lane * ix->cap : NULL};
	float f[POLICY_MAX_COEFS][CHUNK_ROWS];

	for (uint32_t at = 0; at < rows; at += CHUNK_ROWS) {
		struct policy_batch b = {.lane = policy_lane(s->model, lane),
					 .n = MIN(CHUNK_ROWS, rows - at),
					 .first_pos = at,
					 .total = total};

		for (uint32_t r = 0; r < use->coefs; r++)
			key_scores(from[r] + at, f[r], b.n);
		use->ops->combine(use->policy, &b, (const float *const[]){f[0], f[1]}, f[0]);
		score_keys(f[0], keys + at, b.n);
	}
}

/* Another policy's coefficients mean nothing to the next: what rows below the device tier keep is a score. */
static void settle_keys(struct plan *p, uint32_t lane)
{
	const struct seq *s = p->seq;
	const struct index *ix = &s->ix;
	size_t at = (size_t)lane * ix->cap;

	if (!s->keys_use || !s->keys_use->coefs)
		return;
	score_combine(s, s->keys_use, lane, p->from, p->watermark, ix->key + at);
	for (uint32_t i = 0; ix->coef && i < p->from; i++)
		ix->coef[at + i] = INDEX_NO_COEF;
}

int score_lanes(struct plan *p, uint32_t lo, uint32_t hi, struct worker_ctx *w)
{
	const struct policy_ops *ops = p->use->ops;
	bool all = p->rescore || ops->caps & POLICY_CONTEXT;
	int r = 0;

	for (uint32_t l = lo; l < hi && !r; l++) {
		if (p->rescore)
			settle_keys(p, l);
		if (!all && p->from >= p->watermark)
			r = 0;
		else if (score_given(p))
			r = from_plane(p, l, w);
		else
			r = all ? score_all(p, l, w) : score_new(p, l, w);
		if (!r && p->keys)
			score_combine(p->seq, p->use, l, p->watermark, p->watermark,
				      p->keys + (size_t)l * p->watermark);
		if (!r && p->worth)
			adaptive_weigh(p, l);
	}
	return r;
}
