/* SPDX-License-Identifier: MIT */
#pragma once
/* One search on the GPU and the same by policy/recall.c, compared row by row. */
#include "tests/gpu/recall_made.h"

#include "ipc/client/client.h"
#include "policy/recall.h"

#define TOKENS 4u

/* ---- one search, both ways ------------------------------------------------------------------------- */

struct search {
	uint32_t first, heads, group, tokens, want, probe, before, after;
	bool mass, residents;
	float sharp; /* of the queries */
};
struct bed {
	struct kvtier_cuda *g;
	struct made m;
	struct cuda_direct *d;
	struct cuda_recall *f;
	void *stream;
};

/* Device memory that starts as 0xa5. */
static inline uint64_t poisoned(struct bed *b, uint64_t bytes)
{
	uint64_t p;

	ok(cuda_try(b->g, b->g->d->alloc(&p, bytes), "alloc"), "memory");
	ok(cuda_try(b->g, b->g->d->set8(p, 0xa5, bytes, b->stream), "set"), "memory");
	return p;
}

static inline void *fetch(struct bed *b, uint64_t from, uint64_t bytes)
{
	void *to = malloc(bytes);

	if (!to)
		die("no memory");
	ok(cuda_try(b->g, b->g->d->copy_out(to, from, bytes, b->stream), "copy"), "results");
	ok(cuda_try(b->g, b->g->d->stream_sync(b->stream), "sync"), "results");
	return to;
}

struct lane_runs {
	struct recall_run *run;
	uint32_t n, rows;
};

/* The lane's pages as the definitions want them, in the order of the directory. */
static inline struct lane_runs runs_of(const struct made *m, uint32_t lane)
{
	struct lane_runs r = {.run = calloc(m->hdr->used + 1, sizeof(*r.run))};
	const uint64_t *dev = m->resident + (size_t)lane * m->words;

	for (uint32_t i = 0; i < m->hdr->used; i++) {
		const struct direct_page *p = &m->page[i];
		struct recall_run *run = &r.run[r.n];
		struct recall_sum *sum;
		uint32_t row = 0, any = 0;

		if (!p->place || p->lane != lane)
			continue;
		*run = (struct recall_run){
			.k = made_k(m, p), .pos = p->pos, .first = p->first, .span = p->span, .rows = p->rows};
		for (uint32_t b = 0; b < p->span * 64u; b++) {
			uint32_t pos = p->first + b;

			if (!bits_test(p->pos, b))
				continue;
			if (pos < p->limit && pos < m->s.rows && !bits_test(dev, pos) &&
			    !(p->dead[row / 32] >> row % 32 & 1)) {
				run->alive[row / 32] |= 1u << row % 32;
				any++;
			}
			row++;
		}
		r.rows += any;
		sum = malloc(recall_sum_bytes(p->rows, m->s.dim));
		recall_summarise(run->k, p->rows, m->s.dim, (enum row_dtype)m->s.dtype, sum);
		run->sum = sum;
		r.n++;
	}
	return r;
}

static inline void runs_free(struct lane_runs *r)
{
	for (uint32_t i = 0; i < r->n; i++)
		free((void *)r->run[i].sum);
	free(r->run);
}

/* The selected queries of one KV head, as floats. */
static inline float *pick(const struct made *m, const struct search *s, uint32_t head, const char *q,
			  uint32_t *ret_n)
{
	uint32_t dim = m->s.dim, elem = elem_of(m->s.dtype), n = MIN(s->tokens, TOKENS), got[TOKENS];
	float *all = malloc((size_t)s->tokens * dim * sizeof(*all)), *near = malloc(s->tokens * sizeof(*near)),
	      *out = malloc((size_t)s->group * n * dim * sizeof(*out));

	for (uint32_t j = 0; j < s->group; j++) {
		recall_load(all, q + (size_t)(head * s->group + j) * s->tokens * dim * elem,
			    (size_t)s->tokens * dim, (enum row_dtype)m->s.dtype);
		n = pick_farthest(all, dim, dim, s->tokens, TOKENS, near, got);
		for (uint32_t i = 0; i < n; i++)
			memcpy(out + (size_t)(j * n + i) * dim, all + (size_t)got[i] * dim, dim * sizeof(*out));
	}
	*ret_n = s->group * n;
	free(all);
	free(near);
	return out;
}

static inline int by_pos(const void *a, const void *b)
{
	const struct recall_hit *x = a, *y = b;

	return x->pos < y->pos ? -1 : x->pos > y->pos;
}

/* The rows' bytes are one of the pages' that have this position. */
static inline bool bytes_right(const struct made *m, const struct lane_runs *r, uint32_t pos, const char *k,
			       const char *v)
{
	for (uint32_t i = 0; i < r->n; i++) {
		const struct recall_run *run = &r->run[i];
		const char *keys = run->k;
		uint32_t row;

		if (pos < run->first || pos - run->first >= run->span * 64 ||
		    !bits_test(run->pos, pos - run->first))
			continue;
		row = bits_rank(run->pos, pos - run->first);
		if (run->alive[row / 32] >> row % 32 & 1 &&
		    !memcmp(k, keys + (size_t)row * m->k_bytes, m->k_bytes) &&
		    !memcmp(v, keys + (size_t)run->rows * m->k_bytes + (size_t)row * m->s.v_bytes,
			    m->s.v_bytes))
			return true;
	}
	return false;
}

/* What one head found against the definitions. Rows whose score is the last taken one's but for rounding may
 * differ. */
static inline bool compare(struct bed *b, const struct search *s, uint32_t head, const char *q, uint32_t count,
			   const uint32_t *pos, const char *k, const char *v)
{
	const struct made *m = &b->m;
	struct lane_runs runs = runs_of(m, s->first + head);
	uint32_t n = 0, odd = 0;
	float *picked = pick(m, s, head, q, &n), edge = INFINITY;
	struct recall_query rq = {.n = n,
				  .dim = m->s.dim,
				  .scale = 1 / sqrtf((float)m->s.dim),
				  .dtype = (enum row_dtype)m->s.dtype,
				  .norm = s->mass ? RECALL_MASS : RECALL_LOGIT,
				  .probe = s->probe,
				  .want = s->want,
				  .before = s->before,
				  .after = s->after,
				  .q = picked,
				  .isa = "ref"};
	struct recall_hit *hit = calloc(s->want, sizeof(*hit));
	struct recall_seen seen;
	void *scratch;
	bool good = true;
	int want;

	if (s->residents && m->held[s->first + head]) {
		rq.resident = m->device + (size_t)(s->first + head) * m->cap * m->row_bytes;
		rq.resident_stride = m->k_bytes;
		rq.resident_n = m->held[s->first + head];
	}
	scratch = malloc(recall_scratch(&rq, runs.run, runs.n));
	want = recall_search(&rq, runs.run, runs.n, scratch, hit, &seen);
	if (want < 0)
		die("recall_search: %d", want);
	qsort(hit, (size_t)want, sizeof(*hit), by_pos);
	for (int i = 0; i < want; i++)
		edge = fminf(edge, hit[i].score);
	if (count != (uint32_t)want) {
		printf("# head %u: %u rows, must be %d of %u\n", head, count, want, runs.rows);
		good = false;
	}
	for (uint32_t i = 0; good && i < count; i++) {
		struct recall_hit key = {.pos = pos[i]};

		if (i && pos[i] <= pos[i - 1]) {
			printf("# head %u: position %u after %u\n", head, pos[i], pos[i - 1]);
			good = false;
		}
		odd += !bsearch(&key, hit, (size_t)want, sizeof(*hit), by_pos);
		if (!bytes_right(m, &runs, pos[i], k + (size_t)i * (m->k_bytes + 16),
				 v + (size_t)i * (m->s.v_bytes + 32))) {
			printf("# head %u: row %u at position %u has other bytes\n", head, i, pos[i]);
			good = false;
		}
	}
	for (uint32_t i = 0, j = 0; good && odd && i < (uint32_t)want; i++) {
		while (j < count && pos[j] < hit[i].pos)
			j++;
		if ((j == count || pos[j] != hit[i].pos) &&
		    hit[i].score - edge > 1e-4f * fmaxf(1, fabsf(edge))) {
			printf("# head %u: position %u of score %g is missing, the last is %g\n", head,
			       hit[i].pos, (double)hit[i].score, (double)edge);
			good = false;
		}
	}
	if (odd)
		printf("# head %u: %u of %u rows are ties\n", head, odd, count);
	free(scratch);
	free(hit);
	free(picked);
	runs_free(&runs);
	return good && odd * 8 <= count + 8;
}

/* Search one layer on the GPU and compare. Rows land with gaps between them, which must stay as they were. */
static inline bool search(struct bed *b, const struct search *s)
{
	struct made *m = &b->m;
	uint32_t elem = elem_of(m->s.dtype), k_row = m->k_bytes + 16, v_row = m->s.v_bytes + 32,
		 heads = s->heads;
	uint64_t n = (uint64_t)heads * s->group * s->tokens * m->s.dim, k_head = (uint64_t)s->want * k_row + 64,
		 v_head = (uint64_t)s->want * v_row + 64, k_all = k_head * heads, v_all = v_head * heads;
	char *q = malloc(n * elem), *k, *v;
	uint32_t *counts, *pos;
	struct find_query fq = {.first = s->first,
				.heads = heads,
				.group = s->group,
				.n_queries = s->tokens,
				.rows = s->want,
				.probe = s->probe,
				.before = s->before,
				.after = s->after,
				.mass = s->mass,
				.scale = s->probe == 1000 ? 0 : 1 / sqrtf((float)m->s.dim),
				.resident = s->residents ? m->held + s->first : NULL,
				.token_stride = (uint64_t)m->s.dim * elem,
				.head_stride = (uint64_t)s->tokens * m->s.dim * elem,
				.k_head_stride = k_head,
				.v_head_stride = v_head,
				.k_row_stride = k_row,
				.v_row_stride = v_row};
	bool good = true;

	put_normal(q, (uint32_t)n, m->s.dtype, s->sharp);
	fq.queries = poisoned(b, n * elem);
	fq.k = poisoned(b, k_all);
	fq.v = poisoned(b, v_all);
	fq.counts = poisoned(b, heads * 4);
	fq.positions = poisoned(b, (uint64_t)heads * s->want * 4);
	ok(cuda_try(b->g, b->g->d->copy_in(fq.queries, q, n * elem, b->stream), "copy"), "queries");
	ok(find_launch(b->f, &fq, m->lane_addr, b->stream), "find_launch");
	counts = fetch(b, fq.counts, heads * 4);
	pos = fetch(b, fq.positions, (uint64_t)heads * s->want * 4);
	k = fetch(b, fq.k, k_all);
	v = fetch(b, fq.v, v_all);
	for (uint32_t h = 0; h < heads; h++) {
		uint32_t have = MIN(counts[h], s->want);

		good &= compare(b, s, h, q, counts[h], pos + (size_t)h * s->want, k + h * k_head,
				v + h * v_head);
		for (uint32_t i = 0; i < s->want; i++) {
			const char *tail = k + h * k_head + (size_t)i * k_row + (i < have ? m->k_bytes : 0);

			for (uint32_t j = 0; j < (i < have ? 16 : k_row); j++)
				good &= tail[j] == (char)0xa5;
		}
	}
	if (!view_still(b->d)) {
		printf("# the directory stands still and is said to have moved\n");
		good = false;
	}
	(void)b->g->d->free(fq.queries);
	(void)b->g->d->free(fq.k);
	(void)b->g->d->free(fq.v);
	(void)b->g->d->free(fq.counts);
	(void)b->g->d->free(fq.positions);
	free(q);
	free(counts);
	free(pos);
	free(k);
	free(v);
	return good;
}
