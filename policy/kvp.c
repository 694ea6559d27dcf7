/* SPDX-License-Identifier: MIT */
/*
 * The KVP policy: weights repacked for the CPU at init, batches cut into
 * tiles at score. The arithmetic is in kvp_ref.c and kvp_avx*.c.
 */
#include "policy/kvp.h"
#include "shm/util.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <sys/mman.h>

struct kvp {
	struct policy base;
	enum row_dtype dtype;
	uint32_t lanes;
	struct kvp_dims dims;
	struct kvp_rope rope; /* NONE: keys are scored as cached */
	struct kvp_dist dist;
	struct calibration *calibration; /* or NULL */
	uint64_t id;                     /* of the weights */
	const struct kvp_isa *isa;       /* NULL: the reference, which reads `weights` */
	struct weights *weights;         /* reference only; the others free it once packed */
	struct kvp_lane *lane;           /* into `arena` */
	void *arena;                     /* all lanes' packed weights, one mapping */
	size_t arena_bytes;
};

static const struct kvp_isa *const isas[] = {&kvp_avx512_bf16, &kvp_avx512_fp32, &kvp_avx2}; /* fastest first */

static bool name_covers(const char *name, const struct kvp_isa *isa)
{
	return !name || strcmp(name, isa->name) == 0 ||
	       (strcmp(name, "avx512") == 0 && strncmp(isa->name, "avx512", 6) == 0);
}

int kvp_isa_find(const struct kvp_isa **ret, const char *name, char *err, size_t errsize)
{
	bool known = false;

	if (!name || strcmp(name, "ref") != 0) {
		for (size_t i = 0; i < ARRAY_SIZE(isas); i++) {
			if (!name_covers(name, isas[i]))
				continue;
			known = true;
			if (isas[i]->supported()) {
				*ret = isas[i];
				return 0;
			}
		}
		if (name) {
			snprintf(err, errsize, "isa: %s, %s", name,
				 known ? "this CPU does not have it"
				       : "must be ref, avx2, avx512, avx512-fp32 or avx512-bf16");
			return known ? -ENOTSUP : -EINVAL;
		}
	}
	*ret = NULL;
	return 0;
}

/* ---- packing ---- */

/* Hands out aligned pieces of the arena; with base NULL it only measures. */
struct carver {
	char *base;
	size_t used;
};

static void *carve(struct carver *c, size_t bytes)
{
	void *p = c->base ? c->base + c->used : NULL;

	c->used += ALIGN_UP(bytes, (size_t)KVT_CACHELINE);
	return p;
}

static const float *pack_floats(struct carver *c, const struct weights *w, uint32_t lane, uint32_t t)
{
	const uint16_t *src = weights_at(w, lane, t);
	size_t n = (size_t)w->layout.tensor[t].rows * w->layout.tensor[t].cols;
	float *dst = carve(c, n * sizeof(float));

	for (size_t i = 0; dst && i < n; i++)
		dst[i] = bf16_float(src[i]);
	return dst;
}

/* [out][in] -> [out / panel][in / 2][panel][2] */
static const uint16_t *pack_matrix(struct carver *c, const struct weights *w, uint32_t lane, uint32_t t,
				   uint32_t panel)
{
	uint32_t out = w->layout.tensor[t].rows, in = w->layout.tensor[t].cols;
	const uint16_t *src = weights_at(w, lane, t);
	uint16_t *dst = carve(c, (size_t)out * in * sizeof(*dst));

	for (uint32_t o = 0; dst && o < out; o++)
		for (uint32_t i = 0; i < in; i++)
			dst[((size_t)(o / panel) * in + (i & ~1u)) * panel + o % panel * 2 + i % 2] =
				src[(size_t)o * in + i];
	return dst;
}

static struct kvp_dense pack_dense(struct carver *c, const struct weights *w, uint32_t lane, uint32_t t,
				   uint32_t panel)
{
	struct kvp_dense d;

	/* The enum keeps each weight, bias, gain and shift in this order. */
	d.w = pack_matrix(c, w, lane, t, panel);
	d.bias = pack_floats(c, w, lane, t + 1);
	d.norm.gain = pack_floats(c, w, lane, t + 2);
	d.norm.shift = pack_floats(c, w, lane, t + 3);
	return d;
}

static struct kvp_lane pack_lane(struct carver *c, const struct weights *w, uint32_t lane, uint32_t panel)
{
	struct kvp_lane l;

	l.k = pack_dense(c, w, lane, KVP_WK, panel);
	l.v = pack_dense(c, w, lane, KVP_WV, panel);
	l.h1 = pack_dense(c, w, lane, KVP_W1, panel);
	l.h2 = pack_dense(c, w, lane, KVP_W2, panel);
	l.pos_norm.gain = pack_floats(c, w, lane, KVP_GP);
	l.pos_norm.shift = pack_floats(c, w, lane, KVP_OP);
	l.out = pack_floats(c, w, lane, KVP_W3);
	l.out_bias = pack_floats(c, w, lane, KVP_B3);
	l.pos = pack_floats(c, w, lane, KVP_POS);
	return l;
}

static int pack(struct kvp *q, const struct weights *w)
{
	struct carver c = {NULL, 0};
	void *arena;

	pack_lane(&c, w, 0, q->isa->panel);
	q->lane = calloc(w->lanes, sizeof(*q->lane));
	if (!q->lane)
		return -ENOMEM;
	q->arena_bytes = c.used * w->lanes;
	arena = mmap(NULL, q->arena_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (arena == MAP_FAILED)
		return -ENOMEM;
	madvise(arena, q->arena_bytes, MADV_HUGEPAGE); /* fewer TLB misses as weights stream; a hint */
	q->arena = arena;
	c = (struct carver){arena, 0};
	for (uint32_t lane = 0; lane < w->lanes; lane++)
		q->lane[lane] = pack_lane(&c, w, lane, q->isa->panel);
	mprotect(arena, q->arena_bytes, PROT_READ); /* nothing writes them again */
	return 0;
}

/* ---- policy_ops ---- */

static void kvp_free(struct policy *p)
{
	struct kvp *q = (struct kvp *)p;

	if (!q)
		return;
	if (q->arena)
		munmap(q->arena, q->arena_bytes);
	free(q->lane);
	kvp_rope_done(&q->rope);
	kvp_dist_done(&q->dist);
	weights_calibration_free(q->calibration);
	weights_free(q->weights);
	free(q);
}

static int kvp_setup(struct kvp *q, const struct policy_cfg *cfg, char *err, size_t errsize)
{
	const struct weights_header *h;
	int r;

	r = rows_readable(cfg, err, errsize);
	if (r == 0)
		r = kvp_isa_find(&q->isa, cfg->isa, err, errsize);
	if (r == 0)
		r = weights_for(&q->weights, cfg, WEIGHTS_KVP, err, errsize);
	if (r == 0)
		r = weights_calibration(&q->calibration, q->weights, cfg, err, errsize);
	if (r < 0)
		return r;
	h = &q->weights->h;
	q->id = weights_id_of(q->weights);
	q->dtype = cfg->dtype;
	q->lanes = q->weights->lanes;
	q->dims = (struct kvp_dims){.k_dim = h->k_dim,
				    .v_dim = h->v_dim,
				    .proj = h->proj,
				    .pos_rows = h->pos_rows,
				    .pos_dim = h->pos_dim,
				    .hidden = h->hidden,
				    .in = 2 * h->proj + h->pos_dim,
				    .octave = h->pos_kind == WEIGHTS_POS_LOG2 ? h->octave : 0,
				    .rank = h->rank};
	if (!q->isa)
		return 0;
	if (kvp_rope_init(&q->rope, h->keys == WEIGHTS_KEYS_UNROTATED ? h->rope_type : WEIGHTS_ROPE_NONE,
			  h->k_dim, h->rope_theta) < 0 ||
	    kvp_dist_init(&q->dist, q->weights) < 0 || pack(q, q->weights) < 0)
		return out_of_memory(err, errsize);
	weights_free(q->weights);
	q->weights = NULL;
	return 0;
}

static int kvp_init(struct policy **ret, const struct policy_cfg *cfg, char *err, size_t errsize)
{
	struct kvp *q = calloc(1, sizeof(*q));
	int r;

	if (!q)
		return out_of_memory(err, errsize);
	q->base.ops = &policy_kvp_ops;
	r = kvp_setup(q, cfg, err, errsize);
	if (r < 0) {
		kvp_free(&q->base);
		return r;
	}
	*ret = &q->base;
	return 0;
}

/* One tile's activations; per call, so that threads share nothing but weights. */
struct scratch {
	_Alignas(64) char in[KVP_TILE * KVP_LD * sizeof(float)];
	_Alignas(64) char x[KVP_TILE * KVP_LD * sizeof(float)];
	_Alignas(64) float c[KVP_TILE * KVP_WIDEST];
	uint32_t pos[KVP_TILE];
};

/* c = the tile's rows of the position table, between its knots where it has knots. */
static void look_up(float *c, const struct kvp_dims *d, const float *table, const uint32_t *pos, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++, c += d->pos_dim) {
		float t = d->octave ? kvp_knot(d->octave, d->pos_rows, pos[i])
				    : (float)MIN(pos[i], d->pos_rows - 1);
		uint32_t at = (uint32_t)t;
		const float *low = table + (size_t)at * d->pos_dim,
			    *high = at + 1 < d->pos_rows ? low + d->pos_dim : low;

		t -= (float)at;
		for (uint32_t j = 0; j < d->pos_dim; j++)
			c[j] = low[j] + t * (high[j] - low[j]);
	}
}

static void tile_coefs(const struct kvp *q, const struct policy_batch *b, uint32_t first, uint32_t n,
		       struct scratch *s, float *const *coef)
{
	const struct kvp_lane *l = &q->lane[b->lane];
	const struct kvp_dims *d = &q->dims;
	const struct kvp_isa *isa = q->isa;
	const char *k = (const char *)b->k + first * b->k_stride, *v = (const char *)b->v + first * b->v_stride;
	char *x_v = s->x + (size_t)d->proj * isa->act_bytes, *x_pos = x_v + (size_t)d->proj * isa->act_bytes;

	for (uint32_t i = 0; i < n; i++)
		s->pos[i] = batch_pos(b, first + i);
	if (q->rope.type == WEIGHTS_ROPE_NONE)
		isa->load(s->in, k, b->k_stride, q->dtype, n, d->k_dim);
	else
		isa->unrotate(s->in, k, b->k_stride, q->dtype, n, &q->rope, s->pos);
	isa->linear(s->c, s->in, n, d->k_dim, d->proj, &l->k);
	isa->norm(s->x, s->c, n, d->proj, l->k.norm, false);

	isa->load(s->in, v, b->v_stride, q->dtype, n, d->v_dim);
	isa->linear(s->c, s->in, n, d->v_dim, d->proj, &l->v);
	isa->norm(x_v, s->c, n, d->proj, l->v.norm, false);

	look_up(s->c, d, l->pos, s->pos, n);
	isa->norm(x_pos, s->c, n, d->pos_dim, l->pos_norm, false);

	isa->linear(s->c, s->x, n, d->in, d->hidden, &l->h1);
	isa->norm(s->in, s->c, n, d->hidden, l->h1.norm, true);
	isa->linear(s->c, s->in, n, d->hidden, d->hidden, &l->h2);
	isa->finish(coef, s->c, n, d->hidden, l->h2.norm, l->out, l->out_bias, d->rank);
}

static int kvp_coefs(struct policy *p, const struct policy_batch *b, float *const *coef)
{
	const struct kvp *q = (const struct kvp *)p;
	const uint32_t rank = q->dims.rank;
	_cleanup_free_ struct scratch *s = NULL;

	if (b->lane >= q->lanes || (b->n && (!b->k || !b->v)))
		return -EINVAL;
	if (!q->isa) {
		kvp_ref_coefs(q->weights, q->dtype, b, coef);
	} else {
		s = aligned_alloc(64, sizeof(*s));
		if (!s)
			return -ENOMEM;
		for (uint32_t i = 0; i < b->n; i += KVP_TILE)
			tile_coefs(q, b, i, MIN(b->n - i, KVP_TILE), s,
				   (float *const[KVP_RANK]){coef[0] + i, rank > 1 ? coef[1] + i : NULL});
	}
	/* A runtime can hand us infinite or absurd rows; they rank last, and nothing else suffers. */
	for (uint32_t i = 0; i < b->n; i++) {
		if (isfinite(coef[0][i]) && (rank == 1 || isfinite(coef[1][i])))
			continue;
		coef[0][i] = -FLT_MAX;
		if (rank > 1)
			coef[1][i] = 0;
	}
	return 0;
}

static uint32_t kvp_coefs_per_row(const struct policy *p)
{
	const struct kvp *q = (const struct kvp *)p;
	uint32_t knots = q->isa ? q->dist.rows : q->weights->h.dist_rows;

	return knots ? q->dims.rank : 0;
}

static int kvp_combine(const struct policy *p, const struct policy_batch *b, const float *const *coef,
		       float *scores)
{
	const struct kvp *q = (const struct kvp *)p;

	if (b->lane >= q->lanes || !kvp_coefs_per_row(p))
		return -EINVAL;
	if (q->isa)
		kvp_dist_combine(&q->dist, q->isa, b, coef, scores);
	else
		kvp_ref_combine(q->weights, b, coef, scores);
	return 0;
}

static int kvp_score(struct policy *p, const struct policy_batch *b, float *scores)
{
	const struct kvp *q = (const struct kvp *)p;
	_cleanup_free_ float *second = NULL;
	float *coef[KVP_RANK] = {scores};
	int r;

	if (q->dims.rank > 1) {
		second = malloc((b->n + (size_t)1) * sizeof(*second));
		if (!second)
			return -ENOMEM;
		coef[1] = second;
	}
	r = kvp_coefs(p, b, coef);
	if (r < 0 || !kvp_coefs_per_row(p))
		return r;
	return kvp_combine(p, b, (const float *const[KVP_RANK]){scores, second}, scores);
}

static const struct calibration *kvp_calibration(const struct policy *p)
{
	return ((const struct kvp *)p)->calibration;
}

static uint64_t kvp_weights_id(const struct policy *p)
{
	return ((const struct kvp *)p)->id;
}

const struct policy_ops policy_kvp_ops = {
	.name = "kvp",
	.id = POLICY_KVP,
	.caps = POLICY_STATIC | POLICY_SEPARABLE | POLICY_NEEDS_K | POLICY_NEEDS_V | POLICY_NEEDS_WEIGHTS |
		POLICY_NEEDS_DIM,
	.init = kvp_init,
	.score = kvp_score,
	.coefs_per_row = kvp_coefs_per_row,
	.coefs = kvp_coefs,
	.combine = kvp_combine,
	.calibration = kvp_calibration,
	.weights_id = kvp_weights_id,
	.free = kvp_free,
	.doc = "the KVP network: predicted future attention from key, value and position (from the weight "
	       "file)",
};
