/* SPDX-License-Identifier: MIT */
/*
 * One lane's part of a recall: which pages it has, the search over them, copies of what it finds. Collecting is
 * the loop's; the rest any thread's, over pinned pages and copies of what the index said.
 */
#include <math.h>
#include <string.h>
#include "daemon/recall.h"
#include "shm/util.h"

/* ---- on the loop ---------------------------------------------------------------------- */

/* Rows of the page that may be recalled, as bits over its packed rows. Returns how many. */
static uint32_t packed_rows(const struct index *ix, const struct page *p, uint32_t *alive)
{
	const uint64_t *dev = index_bits(ix, KVT_TIER_DEVICE, p->lane);
	uint64_t mask[PAGE_SPAN];
	uint32_t row = 0, n = 0;

	memset(alive, 0, PAGE_ROWS / 8);
	if (!index_alive(ix, p, KVT_TIER_DRAM, mask))
		return 0;
	for (uint32_t w = 0; w < p->span; w++) {
		mask[w] &= ~index_window(dev, ix->words, p->first + w * 64);
		n += (uint32_t)__builtin_popcountll(mask[w]);
	}
	if (n == p->rows) {
		for (uint32_t i = 0; i < n; i += 32)
			alive[i / 32] = n - i >= 32 ? UINT32_MAX : (1u << (n - i)) - 1;
		return n;
	}
	for (uint32_t w = 0; n && w < p->span; w++)
		for (uint64_t b = p->pos[w]; b; b &= b - 1, row++)
			if (mask[w] & b & -b)
				alive[row / 32] |= 1u << row % 32;
	return n;
}

/* Where a page of a mapped tier lies: it stays there while it is pinned, or while the loop does nothing else.
 */
static const void *page_bytes(struct core *c, const struct page *p)
{
	struct tier *t = c->pages.tier[KVT_TIER_DRAM];
	struct tier_io io = {.op = TIER_READ, .bytes = p->bytes, .addr = p->addr[KVT_TIER_DRAM - 1]};
	const void *at;

	if (!(t->ops->caps & TIER_CAP_MAPPED) || t->ops->prepare(t, &io) < 0)
		return NULL;
	at = io.buf;
	t->ops->release(t, &io);
	return at;
}

static int hunt_add(struct hunt *u, struct page *p, const void *k, const uint32_t *alive)
{
	if (u->n == u->cap) {
		uint32_t cap = u->cap ? u->cap * 2 : 64;
		struct page **page = reallocarray(u->page, cap, sizeof(struct page *));
		struct recall_run *run;

		if (!page)
			return -ENOMEM;
		u->page = page;
		run = reallocarray(u->run, cap, sizeof(*run));
		if (!run)
			return -ENOMEM;
		u->run = run;
		u->cap = cap;
	}
	u->page[u->n] = p;
	u->run[u->n] = (struct recall_run){
		.k = k, .sum = p->sum, .pos = p->pos, .first = p->first, .span = p->span, .rows = p->rows};
	memcpy(u->run[u->n++].alive, alive, PAGE_ROWS / 8);
	return 0;
}

static void count_skipped(struct recall *k, uint32_t lane)
{
	const struct index *ix = &k->seq->ix;
	const uint64_t *dev = index_bits(ix, 0, lane), *dram = index_bits(ix, 1, lane),
		       *nvme = index_bits(ix, 2, lane);

	for (uint32_t w = 0; w < BITS_WORDS(ix->rows); w++)
		k->skipped += (uint32_t)__builtin_popcountll(nvme[w] & ~dram[w] & ~dev[w]);
}

/* Collect one lane's pages; those without a summary are asked for, once. */
int hunt_collect(struct recall *k, struct hunt *u, void (*summed)(void *arg))
{
	struct seq *s = k->seq;
	const struct lane_pages *lp = &s->ix.lane[u->lane];
	uint32_t alive[PAGE_ROWS / 32];
	int r = 0;

	u->n = 0;
	for (uint32_t i = 0; i < lp->n && r >= 0; i++) {
		struct page *p = lp->v[i];
		uint32_t n = page_in(p, KVT_TIER_DRAM) ? packed_rows(&s->ix, p, alive) : 0;
		const void *at;

		if (!n)
			continue;
		if (!p->sum && !k->asked) {
			r = recall_sum_start(s, p, summed, k);
			k->waiting += r >= 0;
			continue;
		}
		at = p->sum && p->sum->dim == k->m.dim ? page_bytes(s->core, p) : NULL;
		k->searched += at ? n : 0;
		k->missed += at ? 0 : n;
		if (at)
			r = hunt_add(u, p, at, alive);
	}
	count_skipped(k, u->lane);
	return r;
}

int hunt_begin(struct recall *k, struct hunt *u)
{
	struct seq *s = k->seq;
	uint32_t h = (uint32_t)(u - k->hunt), extra = s->rows - MIN(s->ix.rows, s->rows);
	struct device_lane own;

	u->q = (struct recall_query){.n = k->m.per_head,
				     .dim = k->m.dim,
				     .scale = k->m.scale > 0 ? k->m.scale : 1 / sqrtf((float)k->m.dim),
				     .dtype = (enum row_dtype)s->model->dtype,
				     .norm = k->m.flags & KVT_RECALL_LOGITS ? RECALL_LOGIT : RECALL_MASS,
				     .probe = k->m.probe ? k->m.probe : RECALL_PROBE,
				     .want = k->m.rows,
				     .before = k->m.before,
				     .after = k->m.after,
				     .q = k->q + (size_t)h * k->m.per_head * k->m.dim};
	if (!(k->m.flags & (KVT_RECALL_LOGITS | KVT_RECALL_NO_RESIDENT)) && s->cut == ROWS_ALL &&
	    s->ix.resident[u->lane] + extra) {
		seq_lane(s, u->lane, &own);
		u->q.resident_n = s->ix.resident[u->lane] + extra;
		u->q.resident_stride = own.k_stride;
		u->q.resident =
			k->region->ops->peek(k->region->mem, own.k_off,
					     (uint64_t)(u->q.resident_n - 1) * own.k_stride + own.k_bytes);
	}
	u->hit = malloc(k->m.rows * sizeof(*u->hit));
	u->found = malloc(k->m.rows * sizeof(*u->found));
	u->rows = malloc((size_t)k->m.rows * (u->to.k_bytes + u->to.v_bytes));
	return u->hit && u->found && u->rows ? 0 : -ENOMEM;
}

/* ---- one lane: any thread -------------------------------------------------------------------------- */

static int by_position(const void *a, const void *b)
{
	const struct row *x = a, *y = b;

	return x->pos < y->pos ? -1 : x->pos > y->pos;
}

/* Hits in ascending position: pages interleave. */
static void sort_hits(struct hunt *u, uint32_t n)
{
	bool sorted = true;

	for (uint32_t i = 0; i < n; i++) {
		u->found[i] = (struct row){.pos = u->hit[i].pos, .run = u->hit[i].run, .row = u->hit[i].row};
		sorted &= !i || u->found[i].pos > u->found[i - 1].pos;
	}
	if (!sorted)
		qsort(u->found, n, sizeof(*u->found), by_position);
	u->count = n;
}

static void copy_rows(struct hunt *u, uint32_t k_bytes, uint32_t v_bytes)
{
	char *k = u->rows, *v = u->rows + (size_t)u->count * k_bytes;

	for (uint32_t i = 0; i < u->count; i++) {
		const struct recall_run *run = &u->run[u->found[i].run];

		__builtin_prefetch((const char *)run->k + (size_t)run->rows * k_bytes +
				   (size_t)u->found[i].row * v_bytes);
		memcpy(k + (size_t)i * k_bytes, (const char *)run->k + (size_t)u->found[i].row * k_bytes,
		       k_bytes);
	}
	for (uint32_t i = 0; v_bytes && i < u->count; i++) {
		const struct recall_run *run = &u->run[u->found[i].run];

		memcpy(v + (size_t)i * v_bytes,
		       (const char *)run->k + (size_t)run->rows * k_bytes + (size_t)u->found[i].row * v_bytes,
		       v_bytes);
	}
}

void hunt_scatter(struct hunt *u)
{
	struct recall *k = u->call;

	if (u->count)
		u->error =
			k->region->ops->scatter(k->region->mem, &u->to, u->rows, u->count, NULL, 0, u->count);
}

void hunt_run(struct job *j, struct worker_ctx *w)
{
	struct hunt *u = container_of(j, struct hunt, job);
	void *scratch = worker_scratch(w, recall_scratch(&u->q, u->run, u->n));
	struct recall_seen seen;
	int n = scratch ? recall_search(&u->q, u->run, u->n, scratch, u->hit, &seen) : -ENOMEM;

	if (n < 0) {
		u->error = n;
		return;
	}
	sort_hits(u, (uint32_t)n);
	copy_rows(u, u->to.k_bytes, u->to.v_bytes);
	if (!recall_imported(u->call))
		hunt_scatter(u);
}
