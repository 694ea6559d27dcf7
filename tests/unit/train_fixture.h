/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * A small made-up training set, the same for every backend: documents of random
 * K and V (fp16), two cuts each, and utilities that follow from a direction of K,
 * one of V and the distance, so that there is something to learn.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "policy/train/backend.h"
#include "policy/train/net.h"
#include "policy/train/noise.h"
#include "shm/util.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#define SET_DOCS 12u
#define SET_UNITS (2 * SET_DOCS)
#define SET_ROWS 400u /* of the longest document */

struct made_set {
	uint32_t doc_rows[SET_DOCS], unit_doc[SET_UNITS], unit_rows[SET_UNITS], unit_prompt[SET_UNITS];
	uint32_t pos[SET_DOCS][SET_ROWS];
	const uint32_t *doc_pos[SET_DOCS];
	struct train_set_shape shape;
	struct train_opts o;
	uint32_t units[64], n[64], *row;
	struct train_batch batch;
};

/* Finite halves of both signs about 1 in size: random bits with an exponent of 13 to 15. */
static inline uint16_t made_half(uint64_t r)
{
	return (uint16_t)((r & 0x83ff) | (13 + (r >> 20) % 3) << 10);
}

static inline float half_value(uint16_t h)
{
	return ldexpf((float)((h & 0x3ff) | 0x400), (h >> 10 & 31) - 25) * (h >> 15 ? -1.0f : 1.0f);
}

static inline struct weights_header made_shape(uint32_t kind, uint32_t pos_kind, uint32_t rank, uint32_t dist)
{
	struct weights_header h = {.name = "made",
				   .layers = 1,
				   .heads = 1,
				   .k_dim = 32,
				   .v_dim = 48,
				   .kind = kind,
				   .pos_kind = pos_kind,
				   .rank = rank,
				   .dist_rows = dist};

	if (kind == WEIGHTS_KVP) {
		h.proj = 32;
		h.hidden = 64;
		h.pos_dim = 16;
		h.octave = pos_kind == WEIGHTS_POS_LOG2 || dist ? 2 : 0;
		h.pos_rows = pos_kind == WEIGHTS_POS_LOG2 ? 17 : 150;
	} else {
		h.pos_dim = 4;
		h.pos_rows = 40;
	}
	return h;
}

static inline void made_set(struct made_set *m, struct weights_header shape, uint32_t lanes)
{
	memset(m, 0, sizeof(*m));
	for (uint32_t d = 0; d < SET_DOCS; d++) {
		m->doc_rows[d] = SET_ROWS - 17 * d;
		m->doc_pos[d] = m->pos[d];
		for (uint32_t i = 0; i < m->doc_rows[d]; i++)
			m->pos[d][i] = 4 + 3 * i + (uint32_t)(train_hash(1, d, i, 0, 0, 0) % 3);
		for (uint32_t c = 0; c < 2; c++) {
			uint32_t unit = 2 * d + c, rows = c ? m->doc_rows[d] : m->doc_rows[d] / 2;

			m->unit_doc[unit] = d;
			m->unit_rows[unit] = rows;
			m->unit_prompt[unit] = m->pos[d][rows - 1] + 17;
		}
	}
	m->shape = (struct train_set_shape){SET_DOCS,    SET_UNITS,    m->doc_rows,   m->doc_pos,
					    m->unit_doc, m->unit_rows, m->unit_prompt};
	m->o = (struct train_opts){.shape = shape,
				   .lanes = lanes,
				   .batch = 8,
				   .rows = 256,
				   .perms = 4,
				   .beta1 = 0.9f,
				   .beta2 = 0.999f,
				   .eps = 1e-8f,
				   .weight_decay = 1e-3f,
				   .clip = 5,
				   .ema = 0.99f,
				   .ema_start = 5,
				   .seed = 42,
				   .threads = 2};
	m->o.shape.layers = lanes;
	m->row = calloc((size_t)64 * TRAIN_MAX_ROWS, sizeof(*m->row));
	assert_non_null(m->row);
}

static inline void made_free(struct made_set *m)
{
	free(m->row);
}

/* The batch of a step: opts.batch units, of each every other row or every row, as far as they fit. */
static inline const struct train_batch *made_batch(struct made_set *m, uint64_t step)
{
	for (uint32_t s = 0; s < m->o.batch; s++) {
		uint32_t unit = (uint32_t)(train_hash(3, step, 0, s, 0, 0) % SET_UNITS), n = 0;
		uint32_t stride = 1 + s % 2, from = m->unit_rows[unit] % 3;

		for (uint32_t i = from; i < m->unit_rows[unit] && n < m->o.rows; i += stride)
			m->row[(size_t)s * m->o.rows + n++] = i;
		m->units[s] = unit;
		m->n[s] = n;
	}
	m->batch = (struct train_batch){
		.step = step, .lr = 1e-3f, .units = m->o.batch, .unit = m->units, .n = m->n, .row = m->row};
	return &m->batch;
}

static inline void made_fill(struct made_set *m, struct train_backend *b)
{
	uint32_t kd = m->o.shape.k_dim, vd = m->o.shape.v_dim;
	uint16_t *k = calloc(SET_ROWS * kd, 2), *v = calloc(SET_ROWS * vd, 2);
	float u[SET_ROWS];

	for (uint32_t x = 0; x < m->o.lanes * SET_DOCS; x++) {
		uint32_t lane = x / SET_DOCS, d = x % SET_DOCS;

		for (uint32_t i = 0; i < m->doc_rows[d] * kd; i++)
			k[i] = made_half(train_hash(5, d, lane, i, 0, 0));
		for (uint32_t i = 0; i < m->doc_rows[d] * vd; i++)
			v[i] = made_half(train_hash(6, d, lane, i, 0, 0));
		assert_int_equal(b->ops->put_rows(b, lane, d, k, v), 0);
		for (uint32_t c = 0; c < 2; c++) {
			uint32_t unit = 2 * d + c;

			for (uint32_t i = 0; i < m->unit_rows[unit]; i++) {
				float left = (float)(m->unit_prompt[unit] - m->pos[d][i]);

				u[i] = 0.01f * expf(1.5f * half_value(k[i * kd + lane % kd]) +
						    half_value(v[i * vd + 3]) - 0.3f * log2f(left));
			}
			assert_int_equal(b->ops->put_utility(b, lane, unit, u), 0);
		}
	}
	free(k);
	free(v);
}

/* Open, fill, and start every lane; lane l of the run starts as lane l of the seed. */
static inline struct train_backend *made_open(struct made_set *m, const struct train_backend_ops *ops)
{
	struct train_backend *b;
	char err[256] = "";
	struct net n;
	float *p;

	if (ops->open(&b, &m->o, &m->shape, err, sizeof(err)) != 0)
		fail_msg("%s", err);
	made_fill(m, b);
	assert_int_equal(net_init(&n, &m->o.shape, err, sizeof(err)), 0);
	p = calloc(n.params, sizeof(*p));
	for (uint32_t lane = 0; lane < m->o.lanes; lane++) {
		net_random(&n, m->o.seed, lane, p);
		assert_int_equal(b->ops->set(b, TRAIN_PARAMS, lane, p), 0);
		assert_int_equal(b->ops->set(b, TRAIN_EMA, lane, p), 0);
	}
	free(p);
	return b;
}
