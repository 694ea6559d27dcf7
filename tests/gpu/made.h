/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Made-up training sets for the GPU's checks and benchmark: documents of random
 * K and V, two cuts each, utilities that follow from K, V and the distance. Filled by
 * several threads, as the trainer does it. Failures end the program: exit status 1.
 */
#include "policy/train/backend.h"
#include "policy/train/net.h"
#include "policy/train/noise.h"

#include <dlfcn.h>
#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define MADE_POOL (1u << 20) /* random halves that rows are cut from */
#define MADE_LOADERS 4u

struct made {
	struct train_opts o;
	struct train_set_shape s;
	struct weights_layout layout;
	uint32_t *doc_rows, **pos, *unit_doc, *unit_rows, *unit_prompt;
	uint32_t *unit, *n, *row;
	uint16_t *pool;
	struct train_batch t;
};

__attribute__((noreturn, format(printf, 1, 2))) static inline void die(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	printf("Bail out! ");
	vprintf(fmt, ap);
	printf("\n");
	va_end(ap);
	exit(1);
}

static inline double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static inline void *made_array(size_t n, size_t size)
{
	void *p = calloc(n + 1, size);

	if (!p)
		die("out of memory");
	return p;
}

static inline struct weights_header made_shape(uint32_t kind, uint32_t dims, uint32_t proj, uint32_t hidden,
					       uint32_t pos_kind, uint32_t rank, uint32_t dist_rows)
{
	struct weights_header h = {.name = "made",
				   .layers = 1,
				   .heads = 1,
				   .k_dim = dims,
				   .v_dim = dims,
				   .kind = kind,
				   .pos_kind = pos_kind,
				   .rank = rank,
				   .dist_rows = dist_rows,
				   .proj = proj,
				   .hidden = hidden};

	if (kind == WEIGHTS_POSITION) {
		h.pos_dim = 4;
		h.pos_rows = 48;
	} else if (pos_kind == WEIGHTS_POS_LOG2) {
		h.pos_dim = 16;
		h.pos_rows = 33;
	} else {
		h.pos_dim = 32;
		h.pos_rows = 6000;
	}
	h.octave = kind == WEIGHTS_KVP && (pos_kind == WEIGHTS_POS_LOG2 || dist_rows > 0) ? 2 : 0;
	return h;
}

static inline struct train_opts made_opts(struct weights_header shape, uint32_t lanes, uint32_t batch,
					  uint32_t rows)
{
	struct train_opts o = {.shape = shape,
			       .lanes = lanes,
			       .batch = batch,
			       .rows = rows,
			       .perms = 4,
			       .beta1 = 0.9f,
			       .beta2 = 0.999f,
			       .eps = 1e-8f,
			       .weight_decay = 1e-3f,
			       .clip = 5,
			       .ema = 0.99f,
			       .ema_start = 3,
			       .seed = 42,
			       .threads = (uint32_t)sysconf(_SC_NPROCESSORS_ONLN)};

	o.shape.layers = lanes;
	return o;
}

/* Finite halves of both signs, about 1 in size. */
static inline uint16_t made_half(uint64_t r)
{
	return (uint16_t)((r & 0x83ff) | (13 + (r >> 20) % 3) << 10);
}

static inline float made_value(uint16_t h)
{
	return ldexpf((float)((h & 0x3ff) | 0x400), (h >> 10 & 31) - 25) * (h >> 15 ? -1.0f : 1.0f);
}

/* Documents of `shortest` to `longest` rows with gaps between their positions, cut in the middle and at the
 * end. */
static inline void made_new(struct made *m, const struct train_opts *o, uint32_t docs, uint32_t shortest,
			    uint32_t longest)
{
	memset(m, 0, sizeof(*m));
	m->o = *o;
	if (weights_lay_out(&m->layout, &o->shape) < 0)
		die("no such kind");
	m->doc_rows = made_array(docs, 4);
	m->pos = made_array(docs, sizeof(*m->pos));
	m->unit_doc = made_array(2 * docs, 4);
	m->unit_rows = made_array(2 * docs, 4);
	m->unit_prompt = made_array(2 * docs, 4);
	for (uint32_t d = 0; d < docs; d++) {
		uint32_t rows = shortest + (uint32_t)(train_hash(1, d, 0, 0, 0, 0) % (longest - shortest + 1));

		m->doc_rows[d] = rows;
		m->pos[d] = made_array(rows, 4);
		for (uint32_t i = 0, p = 4; i < rows;
		     i++, p += 1 + (uint32_t)(train_hash(2, d, i, 0, 0, 0) % 2))
			m->pos[d][i] = p;
		for (uint32_t c = 0; c < 2; c++) {
			uint32_t at = 2 * d + c;

			m->unit_doc[at] = d;
			m->unit_rows[at] = c ? rows : rows / 2;
			m->unit_prompt[at] = m->pos[d][m->unit_rows[at] - 1] + 17;
		}
	}
	m->s = (struct train_set_shape){
		docs,        2 * docs,     m->doc_rows,   (const uint32_t *const *)m->pos,
		m->unit_doc, m->unit_rows, m->unit_prompt};
	m->unit = made_array(o->batch, 4);
	m->n = made_array(o->batch, 4);
	m->row = made_array((size_t)o->batch * o->rows, 4);
	m->pool = made_array(MADE_POOL + (size_t)longest * 512, 2);
	for (uint32_t i = 0; i < MADE_POOL + longest * 512; i++)
		m->pool[i] = made_half(train_hash(3, i, 0, 0, 0, 0));
}

static inline void made_free(struct made *m)
{
	for (uint32_t d = 0; d < m->s.docs; d++)
		free(m->pos[d]);
	free(m->pos);
	free(m->doc_rows);
	free(m->unit_doc);
	free(m->unit_rows);
	free(m->unit_prompt);
	free(m->unit);
	free(m->n);
	free(m->row);
	free(m->pool);
}

/* Units at random; of each every row as far as they fit, or every second, or (with `ragged`) three alone. */
static inline const struct train_batch *made_batch(struct made *m, uint64_t step, int ragged)
{
	for (uint32_t s = 0; s < m->o.batch; s++) {
		uint32_t unit = (uint32_t)(train_hash(4, step, 0, s, 0, 0) % m->s.units), n = 0;
		uint32_t most = ragged && s % 4 == 3 ? 3 : m->o.rows, stride = s % 2 && ragged ? 2 : 1;

		if (m->unit_rows[unit] < 4)
			die("a unit of %u rows", m->unit_rows[unit]);
		for (uint32_t i = ragged ? unit % 3 : 0; i < m->unit_rows[unit] && n < most; i += stride)
			m->row[(size_t)s * m->o.rows + n++] = i;
		m->unit[s] = unit;
		m->n[s] = n;
	}
	m->t = (struct train_batch){
		.step = step, .lr = 1e-3f, .units = m->o.batch, .unit = m->unit, .n = m->n, .row = m->row};
	return &m->t;
}

struct made_loader {
	struct made *m;
	struct train_backend *b;
	uint32_t first;
};

static inline void made_utility(struct made *m, uint32_t lane, uint32_t unit, const uint16_t *k,
				const uint16_t *v, float *u)
{
	uint32_t d = m->unit_doc[unit], kd = m->o.shape.k_dim, vd = m->o.shape.v_dim;

	for (uint32_t i = 0; i < m->unit_rows[unit]; i++) {
		float left = (float)(m->unit_prompt[unit] - m->pos[d][i]), seen = 0;

		if (kd && vd)
			seen = 1.5f * made_value(k[(size_t)i * kd + lane % kd]) +
			       made_value(v[(size_t)i * vd + 3]);
		u[i] = 0.01f * expf(seen - 0.3f * log2f(left));
		if (unit % 5 == 1) /* ties */
			u[i] = roundf(u[i] * 100) / 100;
		if (unit % 7 == 2 && lane == 0) /* nothing to learn */
			u[i] = 0;
	}
}

static inline void *made_load(void *arg)
{
	struct made_loader *l = arg;
	struct made *m = l->m;
	uint32_t kd = m->o.shape.k_dim, vd = m->o.shape.v_dim;
	float *u = made_array(65536, sizeof(*u));

	for (uint32_t x = l->first; x < m->o.lanes * m->s.docs; x += MADE_LOADERS) {
		uint32_t lane = x / m->s.docs, d = x % m->s.docs;
		const uint16_t *k = m->pool + train_hash(5, d, lane, 0, 0, 0) % MADE_POOL;
		const uint16_t *v = m->pool + train_hash(6, d, lane, 0, 0, 0) % MADE_POOL;

		if (kd + vd > 0 && l->b->ops->put_rows(l->b, lane, d, k, v) < 0)
			die("put_rows: %s", l->b->ops->error(l->b));
		for (uint32_t unit = 2 * d; unit < 2 * d + 2; unit++) {
			made_utility(m, lane, unit, k, v, u);
			if (l->b->ops->put_utility(l->b, lane, unit, u) < 0)
				die("put_utility: %s", l->b->ops->error(l->b));
		}
	}
	free(u);
	return NULL;
}

/* Starting parameters with nothing left at 0 or 1, so that every gradient counts. */
static inline void made_start(struct made *m, struct train_backend *b)
{
	float *p = made_array(m->layout.params, sizeof(*p));
	char err[256];
	struct net n;

	if (net_init(&n, &m->o.shape, err, sizeof(err)) < 0)
		die("%s", err);
	for (uint32_t lane = 0; lane < m->o.lanes; lane++) {
		net_random(&n, m->o.seed, lane, p);
		for (uint32_t i = 0; i < n.params; i++)
			p[i] += 0.1f * (train_noise(7, i, lane, 0, 0, 0) - 0.5f);
		if (b->ops->set(b, TRAIN_PARAMS, lane, p) < 0 || b->ops->set(b, TRAIN_EMA, lane, p) < 0)
			die("set: %s", b->ops->error(b));
	}
	free(p);
}

static inline struct train_backend *made_open(struct made *m, const struct train_backend_ops *ops)
{
	struct made_loader l[MADE_LOADERS];
	pthread_t thread[MADE_LOADERS];
	struct train_backend *b;
	char err[256] = "";

	if (ops->open(&b, &m->o, &m->s, err, sizeof(err)) < 0)
		die("%s: %s", ops->name, err);
	for (uint32_t i = 0; i < MADE_LOADERS; i++) {
		l[i] = (struct made_loader){m, b, i};
		if (pthread_create(&thread[i], NULL, made_load, &l[i]) != 0)
			die("no thread");
	}
	for (uint32_t i = 0; i < MADE_LOADERS; i++)
		pthread_join(thread[i], NULL);
	made_start(m, b);
	return b;
}

/* The CUDA backend's operations; exit status 77 when the object or a GPU is not there. */
static inline const struct train_backend_ops *cuda_backend(const char *path)
{
	void *object = dlopen(path, RTLD_NOW | RTLD_LOCAL);
	const struct train_backend_ops *ops = object ? dlsym(object, TRAIN_CUDA_SYMBOL) : NULL;

	if (!ops) {
		printf("1..0 # SKIP %s\n", dlerror());
		exit(77);
	}
	if (ops->memory() == 0) {
		printf("1..0 # SKIP no CUDA device\n");
		exit(77);
	}
	return ops;
}
