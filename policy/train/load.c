/* SPDX-License-Identifier: MIT */
/* Reading a planned set into a backend: one document per thread at a time. */
#include "policy/learned.h"
#include "policy/train/set.h"
#include "shm/util.h"

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#define LOAD_MAX_THREADS 64u

struct load {
	struct set *s;
	struct train_backend *b;
	const struct weights_header *shape;
	atomic_uint next, done;
	atomic_int failed;    /* first error */
	pthread_mutex_t lock; /* err */
	char err[320];
};

/* A thread's buffers, as large as the largest document needs. */
struct buffers {
	void *raw;   /* a chunk */
	float *rows; /* [stored][dim] */
	uint16_t *k, *v;
	float *u, *mean, *vnorm, *picked;
	uint32_t *whole; /* positions of nothing but stored rows */
};

uint16_t float_half(float f)
{
	uint32_t bits, sign, rest;

	if (isnan(f))
		return 0;
	memcpy(&bits, &f, sizeof(bits));
	sign = bits >> 16 & 0x8000;
	bits &= 0x7fffffff;
	if (bits >= 0x477fe000) /* 65504 */
		return (uint16_t)(sign | 0x7bff);
	if (bits < 0x38800000) { /* below the smallest normal half: adding 0.5 rounds to multiples of 2^-24 */
		memcpy(&f, &bits, sizeof(f));
		f += 0.5f;
		memcpy(&bits, &f, sizeof(bits));
		return (uint16_t)(sign | (bits - 0x3f000000));
	}
	rest = (bits >> 13 & 1) + 0xfff;
	return (uint16_t)(sign | ((bits - 0x38000000 + rest) >> 13));
}

static void buffers_free(struct buffers *x)
{
	free(x->raw);
	free(x->rows);
	free(x->k);
	free(x->v);
	free(x->u);
	free(x->mean);
	free(x->vnorm);
	free(x->picked);
}

static int buffers_new(struct buffers *x, const struct set *s)
{
	size_t dim = MAX(s->model.k_dim, s->model.v_dim), rows = 1, stored = 1;

	for (uint32_t i = 0; i < s->docs; i++) {
		rows = MAX(rows, s->doc[i].rows);
		stored = MAX(stored, s->doc[i].stored);
	}
	memset(x, 0, sizeof(*x));
	x->raw = malloc(rows * dim * sizeof(float)); /* whatever dtype a file has */
	x->rows = malloc(stored * dim * sizeof(float));
	x->k = malloc(stored * s->model.k_dim * 2);
	x->v = malloc(stored * s->model.v_dim * 2);
	x->u = malloc(rows * sizeof(float));
	x->mean = malloc(rows * sizeof(float));
	x->vnorm = malloc(rows * sizeof(float));
	x->picked = malloc(stored * sizeof(float));
	if (x->raw && x->rows && x->k && x->v && x->u && x->mean && x->vnorm && x->picked)
		return 0;
	buffers_free(x);
	return -ENOMEM;
}

/* Stored rows of the chunk in x->raw, as halves; keys turned back to before RoPE if asked. */
static void convert(struct buffers *x, const struct trace_header *h, const struct set_doc *d, uint32_t dim,
		    bool undo, uint16_t *out)
{
	size_t width = dim * dtype_bytes(h->dtype);

	if (h->dtype == TRACE_F16 && !undo) {
		for (uint32_t i = 0; i < d->stored; i++)
			memcpy(out + (size_t)i * dim, (char *)x->raw + d->pos[i] * width, width);
		return;
	}
	for (uint32_t i = 0; i < d->stored; i++)
		for (uint32_t c = 0; c < dim; c++)
			x->rows[(size_t)i * dim + c] =
				row_element((char *)x->raw + d->pos[i] * width, c, h->dtype);
	if (undo)
		rope_undo(x->rows, dim, d->stored, d->pos, h->rope_type, h->rope_theta);
	for (size_t i = 0; i < (size_t)d->stored * dim; i++)
		out[i] = float_half(x->rows[i]);
}

static int load_rows(struct load *l, struct buffers *x, const struct trace *t, uint32_t doc, uint32_t lane,
		     char *err, size_t errsize)
{
	struct set *s = l->s;
	bool undo = l->shape->keys == WEIGHTS_KEYS_UNROTATED && s->model.keys == TRACE_KEYS_CACHED &&
		    s->model.rope_type != TRACE_ROPE_NONE;
	uint32_t file_lane = s->o.lane_first + lane;
	int r;

	if (l->shape->kind != WEIGHTS_KVP)
		return 0;
	r = trace_read(t, TRACE_K, file_lane, 0, x->raw, err, errsize);
	if (r < 0)
		return r;
	convert(x, &t->h, &s->doc[doc], s->model.k_dim, undo, x->k);
	r = trace_read(t, TRACE_V, file_lane, 0, x->raw, err, errsize);
	if (r < 0)
		return r;
	convert(x, &t->h, &s->doc[doc], s->model.v_dim, false, x->v);
	return l->b->ops->put_rows(l->b, lane, doc, x->k, x->v);
}

/* f32[P] of a cut: from the file, or computed from its queries. */
static int read_utility(const struct trace *t, bool mean, uint32_t lane, uint32_t cut, float *u, char *err,
			size_t errsize)
{
	uint32_t kind = mean ? TRACE_UMEAN : TRACE_UMAX;

	if (trace_find(t, kind, lane, cut))
		return trace_read(t, kind, lane, cut, u, err, errsize);
	return trace_utility(t, lane, cut, mean ? NULL : u, mean ? u : NULL, err, errsize);
}

static double average(const float *v, uint32_t n)
{
	double sum = 0;

	for (uint32_t i = 0; i < n; i++)
		sum += (double)v[i];
	return sum / n;
}

static int load_unit(struct load *l, struct buffers *x, const struct trace *t, uint32_t unit, uint32_t lane,
		     double vnorm, char *err, size_t errsize)
{
	struct set *s = l->s;
	struct set_unit *u = &s->unit[unit];
	const uint32_t *pos = s->doc[u->doc].pos;
	bool keep = s->o.keep_means >> u->split & 1, mean = s->o.utility != SET_MAX;
	int r;

	r = read_utility(t, mean, s->o.lane_first + lane, u->cut, x->u, err, errsize);
	if (r == 0 && keep && !mean)
		r = read_utility(t, true, s->o.lane_first + lane, u->cut, x->mean, err, errsize);
	if (r < 0)
		return r;
	for (uint32_t i = 0; keep && i < u->rows; i++)
		u->mean[(size_t)lane * u->rows + i] = (mean ? x->u : x->mean)[pos[i]] / (float)u->queries;
	for (uint32_t i = 0; i < u->rows; i++) {
		x->picked[i] = x->u[pos[i]] / (float)u->queries;
		if (s->o.utility == SET_VALUE)
			x->picked[i] *= (float)((double)x->vnorm[pos[i]] / vnorm);
	}
	return l->b ? l->b->ops->put_utility(l->b, lane, unit, x->picked) : 0;
}

static int load_lane(struct load *l, struct buffers *x, const struct trace *t, uint32_t doc, uint32_t lane,
		     char *err, size_t errsize)
{
	struct set *s = l->s;
	const struct set_doc *d = &s->doc[doc];
	bool keep = s->o.keep_means >> d->split & 1;
	double vnorm = 1;
	int r = load_rows(l, x, t, doc, lane, err, errsize);

	if (r == 0 && trace_find(t, TRACE_VNORM, s->o.lane_first + lane, 0) &&
	    (keep || s->o.utility == SET_VALUE)) {
		r = trace_read(t, TRACE_VNORM, s->o.lane_first + lane, 0, x->vnorm, err, errsize);
		if (r < 0)
			return r;
		vnorm = MAX(average(x->vnorm, d->rows), 1e-30);
		s->vnorm[(size_t)doc * s->o.lanes + lane] = vnorm;
	}
	for (uint32_t u = 0; r == 0 && u < s->units; u++)
		if (s->unit[u].doc == doc)
			r = load_unit(l, x, t, u, lane, vnorm, err, errsize);
	return r;
}

static int load_doc(struct load *l, struct buffers *x, uint32_t doc, char *err, size_t errsize)
{
	struct trace *t;
	int r = trace_open(&t, l->s->doc[doc].path, err, errsize);

	if (r < 0)
		return r;
	if (t->h.rows != l->s->doc[doc].rows || trace_same_shape(&l->s->model, &t->h, err, errsize) < 0) {
		snprintf(err, errsize, "%s: changed while it was being read", l->s->doc[doc].path);
		r = -EBADMSG;
	}
	for (uint32_t lane = 0; r == 0 && lane < l->s->o.lanes; lane++)
		r = load_lane(l, x, t, doc, lane, err, errsize);
	trace_free(t);
	return r;
}

static void fail_load(struct load *l, int r, const char *err)
{
	pthread_mutex_lock(&l->lock);
	if (!l->failed) {
		snprintf(l->err, sizeof(l->err), "%s", err);
		l->failed = r;
	}
	pthread_mutex_unlock(&l->lock);
}

static void *load_some(void *arg)
{
	struct load *l = arg;
	struct buffers x;
	char err[320] = "loading: out of memory";
	int r = buffers_new(&x, l->s);

	if (r < 0) {
		fail_load(l, r, err);
		return NULL;
	}
	while (!l->failed) {
		uint32_t doc = atomic_fetch_add(&l->next, 1);

		if (doc >= l->s->docs)
			break;
		r = load_doc(l, &x, doc, err, sizeof(err));
		if (r < 0)
			fail_load(l, r, err);
		atomic_fetch_add(&l->done, 1);
	}
	buffers_free(&x);
	return NULL;
}

static int keep_room(struct set *s)
{
	for (uint32_t u = 0; u < s->units; u++) {
		if (!(s->o.keep_means >> s->unit[u].split & 1) || s->unit[u].mean)
			continue;
		s->unit[u].mean = calloc((size_t)s->o.lanes * s->unit[u].rows, sizeof(float));
		if (!s->unit[u].mean)
			return -ENOMEM;
	}
	return 0;
}

int set_load(struct set *s, struct train_backend *b, const struct weights_header *shape,
	     int (*progress)(void *arg, uint32_t done, uint32_t docs), void *arg, char *err, size_t errsize)
{
	struct load l = {.s = s, .b = b, .shape = shape, .lock = PTHREAD_MUTEX_INITIALIZER};
	uint32_t threads = MIN(MAX(s->o.threads, 1u), LOAD_MAX_THREADS), started = 0;
	pthread_t thread[LOAD_MAX_THREADS];

	snprintf(err, errsize, "loading: out of memory");
	if (shape->keys == WEIGHTS_KEYS_CACHED && s->model.keys == TRACE_KEYS_UNROTATED &&
	    shape->kind == WEIGHTS_KVP) {
		snprintf(err, errsize, "%s: keys are from before RoPE, --keys cached needs those after it",
			 s->doc[0].path);
		return -EINVAL;
	}
	if (keep_room(s) < 0)
		return -ENOMEM;
	while (started < threads && pthread_create(&thread[started], NULL, load_some, &l) == 0)
		started++;
	if (!started)
		return -EAGAIN;
	while (l.done < s->docs && !l.failed) {
		if (progress && progress(arg, l.done, s->docs) != 0)
			fail_load(&l, -EINTR, "interrupted while loading");
		usleep(50000);
	}
	while (started > 0)
		pthread_join(thread[--started], NULL);
	if (l.failed)
		snprintf(err, errsize, "%s", l.err);
	return l.failed;
}
