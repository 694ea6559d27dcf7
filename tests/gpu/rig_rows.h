/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Rows in GPU memory that say which sequence, lane and position they are, so that a row in the wrong place
 * cannot go unnoticed: filled and compared through pinned host memory, by several threads.
 */
#include <pthread.h>
#include "tests/gpu/rig.h"

#define RIG_THREADS 8u

/* Shape of one model: every lane's rows are K and V of row_bytes / 2 each. */
struct shape {
	uint32_t layers, heads, row_bytes;
};
static inline uint32_t shape_lanes(const struct shape *m)
{
	return m->layers * m->heads;
}

static inline uint64_t row_mix(uint64_t x)
{
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
	x = (x ^ x >> 27) * 0x94d049bb133111ebu;
	return x ^ x >> 31;
}

/* 64-bit word i of one row: K has words [0, n), V [n, 2 n). */
static inline uint64_t row_base(uint32_t salt, uint32_t lane, uint32_t pos)
{
	return row_mix(((uint64_t)salt << 48) + ((uint64_t)lane << 32) + pos + 0x9e3779b97f4a7c15u);
}
static inline uint64_t row_word(uint64_t base, uint32_t i)
{
	return base + i * 0xd1342543de82ef95u;
}

/* The rows of one sequence in GPU memory: [layer][K|V][head][slots][row_bytes / 2]. */
struct rows {
	struct rig *g;
	struct shape m;
	uint32_t cap, stage, salt;
	uint64_t base, bytes;
	struct kvtier_cuda_layer *layer;
};

static inline void rows_new(struct rows *r, struct rig *g, const struct shape *m, uint32_t cap, uint32_t stage)
{
	uint32_t half = m->row_bytes / 2;
	uint64_t head = (uint64_t)(cap + stage) * half;

	*r = (struct rows){.g = g, .m = *m, .cap = cap, .stage = stage};
	r->bytes = head * m->heads * 2 * m->layers;
	r->layer = calloc(m->layers, sizeof(*r->layer));
	if (!r->layer)
		die("no memory");
	cu(g, g->d->alloc(&r->base, r->bytes), "cuMemAlloc");
	for (uint32_t l = 0; l < m->layers; l++)
		r->layer[l] = (struct kvtier_cuda_layer){.k = r->base + (uint64_t)(2 * l) * m->heads * head,
							 .v = r->base + (uint64_t)(2 * l + 1) * m->heads * head,
							 .k_head_stride = head,
							 .v_head_stride = head,
							 .k_row_stride = half,
							 .v_row_stride = half};
}

static inline void rows_free(struct rows *r)
{
	if (r->base)
		cu(r->g, r->g->d->free(r->base), "cuMemFree");
	free(r->layer);
	memset(r, 0, sizeof(*r));
}

static inline uint64_t rows_plane(const struct rows *r, uint32_t lane, bool v)
{
	const struct kvtier_cuda_layer *l = &r->layer[lane / r->m.heads];
	uint32_t h = lane % r->m.heads;

	return v ? l->v + h * l->v_head_stride : l->k + h * l->k_head_stride;
}

/* A run of slots of one plane, by several threads: written, or compared. */
struct row_work {
	uint64_t *at;
	const uint32_t *pos; /* of each slot; NULL: slot i is position first + i */
	uint32_t salt, lane, first, n, words, skip;
	bool check;
	uint64_t bad;
};

static inline void *row_thread(void *arg)
{
	struct row_work *w = arg;

	for (uint32_t s = 0; s < w->n; s++) {
		uint64_t base = row_base(w->salt, w->lane, w->pos ? w->pos[s] : w->first + s);
		uint64_t *row = w->at + (uint64_t)s * w->words, diff = 0;

		if (!w->check) {
			for (uint32_t i = 0; i < w->words; i++)
				row[i] = row_word(base, w->skip + i);
			continue;
		}
		for (uint32_t i = 0; i < w->words; i++)
			diff |= row[i] ^ row_word(base, w->skip + i);
		w->bad += diff != 0;
	}
	return NULL;
}

static inline uint64_t row_run(const struct row_work *all)
{
	struct row_work part[RIG_THREADS];
	pthread_t thread[RIG_THREADS];
	uint64_t bad = 0;

	for (uint32_t t = 0; t < RIG_THREADS; t++) {
		uint32_t from = (uint32_t)((uint64_t)all->n * t / RIG_THREADS);

		part[t] = *all;
		part[t].n = (uint32_t)((uint64_t)all->n * (t + 1) / RIG_THREADS) - from;
		part[t].at += (uint64_t)from * all->words;
		part[t].first += from;
		part[t].pos = all->pos ? all->pos + from : NULL;
		if (pthread_create(&thread[t], NULL, row_thread, &part[t]))
			die("pthread_create");
	}
	for (uint32_t t = 0; t < RIG_THREADS; t++) {
		pthread_join(thread[t], NULL);
		bad += part[t].bad;
	}
	return bad;
}

/* Slots [0, n) of every lane become rows [0, n) of this salt; everything behind them is poisoned. */
static inline void rows_fill(struct rows *r, uint32_t salt, uint32_t n)
{
	struct rig *g = r->g;
	uint32_t half = r->m.row_bytes / 2, step = (uint32_t)(RIG_CHUNK / half);

	r->salt = salt;
	cu(g, g->d->set8(r->base, 0xee, r->bytes, g->stream), "cuMemsetD8Async");
	for (uint32_t lane = 0; lane < shape_lanes(&r->m); lane++)
		for (int v = 0; v < 2; v++)
			for (uint32_t at = 0; at < n; at += step) {
				struct row_work w = {.at = (uint64_t *)g->pinned,
						     .salt = salt,
						     .lane = lane,
						     .first = at,
						     .n = MIN(step, n - at),
						     .words = half / 8,
						     .skip = v ? half / 8 : 0};

				cu(g, g->d->stream_sync(g->stream), "cuStreamSynchronize");
				row_run(&w);
				cu(g,
				   g->d->copy_in(rows_plane(r, lane, v) + (uint64_t)at * half, g->pinned,
						 (uint64_t)w.n * half, g->stream),
				   "cuMemcpyHtoDAsync");
			}
	cu(g, g->d->stream_sync(g->stream), "cuStreamSynchronize");
}

/* Entries of a lane's map that are no position below n, or one that another slot has too. */
static inline uint64_t pos_wrong(const uint32_t *pos, uint32_t count, uint32_t n, uint8_t *seen)
{
	uint64_t bad = 0;

	memset(seen, 0, n);
	for (uint32_t i = 0; i < count; i++)
		bad += pos[i] >= n || seen[pos[i]]++;
	return bad;
}

/*
 * Rows in slots [0, counts[lane]) that are not, byte for byte, the rows of the positions that the map gives
 * them, positions below n and each one once; 0 is right.
 */
static inline uint64_t rows_wrong(struct rows *r, struct kvtier_seq *s, const uint32_t *counts, uint32_t n)
{
	struct rig *g = r->g;
	uint32_t half = r->m.row_bytes / 2, step = (uint32_t)(RIG_CHUNK / half), stride;
	uint32_t *pos = malloc((r->cap + r->stage) * sizeof(*pos));
	uint8_t *seen = malloc(n);
	uint64_t map, bad = 0;

	if (!pos || !seen)
		die("no memory");
	must(kvtier_cuda_map(s, &map, &stride), "kvtier_cuda_map");
	for (uint32_t lane = 0; lane < shape_lanes(&r->m); lane++) {
		cu(g,
		   g->d->copy_out(pos, map + (uint64_t)lane * stride * sizeof(*pos),
				  counts[lane] * sizeof(*pos), g->stream),
		   "cuMemcpyDtoHAsync");
		cu(g, g->d->stream_sync(g->stream), "cuStreamSynchronize");
		bad += pos_wrong(pos, counts[lane], n, seen);
		for (int v = 0; v < 2; v++)
			for (uint32_t at = 0; at < counts[lane]; at += step) {
				struct row_work w = {.at = (uint64_t *)g->pinned,
						     .pos = pos + at,
						     .salt = r->salt,
						     .lane = lane,
						     .n = MIN(step, counts[lane] - at),
						     .words = half / 8,
						     .skip = v ? half / 8 : 0,
						     .check = true};

				cu(g,
				   g->d->copy_out(g->pinned, rows_plane(r, lane, v) + (uint64_t)at * half,
						  (uint64_t)w.n * half, g->stream),
				   "cuMemcpyDtoHAsync");
				cu(g, g->d->stream_sync(g->stream), "cuStreamSynchronize");
				bad += row_run(&w);
			}
	}
	free(pos);
	free(seen);
	return bad;
}
