/* SPDX-License-Identifier: MIT */
/*
 * Taking over a plan. Its tables are copied into memory of our own and checked there before anything acts on
 * them: the daemon may cancel a plan and write the next one over it while the GPU is still at the old one.
 */
#include <string.h>
#include "ipc/cuda/cuda.h"

int plan_refuse(const struct plan_view *v, const char *what, uint32_t lane)
{
	return err_set(KVT_E_PROTO, "plan %llu: %s, lane %u: does not fit the sequence",
		       (unsigned long long)v->id, what, lane);
}

static uint64_t below(uint32_t word, uint32_t end)
{
	return word * 64 >= end ? 0 : end - word * 64 < 64 ? (UINT64_C(1) << (end % 64)) - 1 : ~UINT64_C(0);
}

/* The lane's bitmaps against what is resident. */
static int check_lane(const struct kvtier_seq *s, const struct plan_view *v, struct cuda_plan *p, uint32_t lane)
{
	uint64_t at = (uint64_t)lane * p->words;
	uint32_t kept = 0, in = 0;

	for (uint32_t w = 0; w < p->words; w++) {
		uint64_t now = rows_word(s, lane, w, p->watermark), mask = below(w, p->watermark);
		uint64_t after = p->resident[at + w], out = p->copy_out[at + w], come = p->bring_in[at + w];

		if ((after & ~(now | come)) || (come & now) || (come & ~after) || (out & ~now) ||
		    (after & ~mask))
			return plan_refuse(v, "tables", lane);
		kept += (uint32_t)__builtin_popcountll(after);
		in += (uint32_t)__builtin_popcountll(come);
	}
	if (in > s->cu->stage || kept > s->cu->cap)
		return plan_refuse(
			v, in > s->cu->stage ? "more rows come in than stage" : "more rows stay than cap",
			lane);
	p->kept = MAX(p->kept, kept);
	return 0;
}

static uint32_t page_rows(const struct cuda_plan *p, const struct plan_page *page)
{
	uint64_t at = (uint64_t)page->lane * p->words;
	uint32_t n = 0;

	for (uint32_t w = page->first / 64; w * 64 < page->last; w++) {
		uint64_t dram = p->to_dram[at + w];
		uint64_t rows = p->copy_out[at + w] & (page->tier == KVT_TIER_DRAM ? dram : ~dram);

		n += (uint32_t)__builtin_popcountll(rows & below(w, page->last) & ~below(w, page->first));
	}
	return n;
}

/*
 * Every page has the rows that it says and lies in the ring right behind the one before it or, where it does
 * not fit there, at the ring's start: what is skipped then counts as its own, up to the whole ring.
 */
static int check_pages(const struct kvtier_seq *s, const struct plan_view *v, const struct cuda_plan *p)
{
	uint64_t ring = s->cu->ring.out_bytes, end = 0, next = 0;

	for (uint32_t i = 0; i < p->out_pages; i++) {
		const struct plan_page *page = &p->page[i];
		uint64_t bytes, skip = 0;
		uint32_t layer;

		if (page->lane >= s->lanes || page->first >= page->last || page->last > p->watermark ||
		    !page->rows || page->rows > 128 ||
		    (page->tier != KVT_TIER_DRAM && page->tier != KVT_TIER_NVME))
			return plan_refuse(v, "a page", page->lane);
		layer = layer_of(s->m, page->lane);
		bytes = window_out_bytes(page->rows,
					 plane_bytes(s, layer, false) + plane_bytes(s, layer, true));
		if (bytes > ring - next) {
			skip = ring - next;
			next = 0;
		}
		if (bytes > ring || page->off != next || page->end != end + MIN(skip + bytes, ring))
			return plan_refuse(v, "a page's place", page->lane);
		next += bytes;
		if (page_rows(p, page) != page->rows)
			return plan_refuse(v, "a page's rows", page->lane);
		end = page->end;
	}
	return 0;
}

/* The tables into pinned memory: 1, 0 when they changed meanwhile, or an error. */
static int copy_tables(struct kvtier_seq *s, const struct plan_view *v, uint64_t *ret_bytes)
{
	struct cuda_seq *q = s->cu;
	struct cuda_plan *p = &q->plan;
	const char *from = (const char *)v->resident, *to = (const char *)(v->page + v->out_pages);

	if (!(v->flags & PLAN_F_WINDOW) || v->lanes != s->lanes || v->watermark > s->rows ||
	    (uint64_t)(to - from) > q->table_bytes)
		return plan_refuse(v, "its header", 0);
	*ret_bytes = (uint64_t)(to - from);
	memcpy(q->pinned_tables, from, *ret_bytes);
	if (!plan_still(v))
		return 0;
	*p = (struct cuda_plan){.state = v->state,
				.watermark = v->watermark,
				.words = v->words,
				.out_pages = v->out_pages,
				.plane = (uint64_t)v->lanes * v->words * sizeof(uint64_t),
				.page_off = (uint64_t)((const char *)v->page - from)};
	p->resident = (const uint64_t *)q->pinned_tables;
	p->copy_out = p->resident + p->plane / sizeof(uint64_t);
	p->bring_in = p->copy_out + p->plane / sizeof(uint64_t);
	p->to_dram = p->bring_in + p->plane / sizeof(uint64_t);
	p->page = (const struct plan_page *)(q->pinned_tables + p->page_off);
	return 1;
}

int cuda_take_over(struct kvtier_seq *s, const struct plan_view *v, void *stream)
{
	struct cuda_seq *q = s->cu;
	uint64_t bytes = 0;
	int r;

	/* The copy of the last plan's tables has not been made yet. */
	if (q->tables_used || !ticket_room(q, 1))
		return 0;
	r = copy_tables(s, v, &bytes);
	if (r <= 0)
		return r;
	r = 0;
	for (uint32_t lane = 0; lane < s->lanes && !r; lane++)
		r = check_lane(s, v, &q->plan, lane);
	if (!r)
		r = check_pages(s, v, &q->plan);
	if (!r)
		r = cuda_try(q->g, q->g->d->copy_in(q->tables, q->pinned_tables, bytes, stream),
			     "plan: cuMemcpyHtoDAsync");
	if (r) {
		q->plan = (struct cuda_plan){0};
		return r;
	}
	q->tables_used = true;
	q->plan.id = v->id;
	/* From here on append leaves room for it; it may come too late. */
	q->plan.spoilt = q->appended - q->plan.watermark > q->cap - q->plan.kept;
	ticket_add(q, CUDA_TABLES, 0, 0, 0);
	return 0;
}
