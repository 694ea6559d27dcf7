/* SPDX-License-Identifier: MIT */
/* Carrying out plans: rows out of the lanes into the one ring, rows from the other into the stage slots. */
#include <string.h>
#include "ipc/cuda/cuda.h"

/* ---- rows that leave ---------------------------------------------------------------------------- */

static int gather(struct kvtier_seq *s, const struct plan_view *v, void *stream)
{
	struct cuda_seq *q = s->cu;
	struct cuda_plan *p = &q->plan;
	uint32_t taken, n = p->gathered;
	uint64_t freed, tables = q->tables;
	struct gather_args a;
	int r;

	if (n == p->out_pages || !ticket_room(q, 1))
		return 0;
	taken = plan_taken(v);
	if (!plan_still(v))
		return 0;
	if (taken > n)
		return plan_refuse(v, "pages taken that were not written", 0);
	freed = taken ? p->page[taken - 1].end : 0;
	while (n < p->out_pages && p->page[n].end - freed <= q->ring.out_bytes)
		n++;
	if (n == p->gathered)
		return 0;
	a = (struct gather_args){.maps = {q->slot_of, q->pos_of, s->max_rows, q->cap + q->stage},
				 .lane = q->lane[q->lane_now],
				 .copy_out = tables + p->plane,
				 .to_dram = tables + 3 * p->plane,
				 .page = tables + p->page_off,
				 .plan = p->id,
				 .out = q->w->addr + q->ring.out_off,
				 .crc = q->g->crc,
				 .words = p->words,
				 .first = p->gathered,
				 .n = n - p->gathered};
	r = kern_gather(q->g, &a, stream);
	if (r)
		return r;
	q->bytes_out += p->page[n - 1].end - (p->gathered ? p->page[p->gathered - 1].end : 0);
	p->gathered = n;
	ticket_add(q, CUDA_GATHER, p->id, n, 0);
	return 0;
}

/* ---- rows that come in ---------------------------------------------------------------------------- */

/* One record as the GPU wants it. *ret_bytes: of the record in the ring. */
static int read_record(struct kvtier_seq *s, const struct plan_view *v, const char *ring,
		       struct scatter_page *ret, uint64_t *ret_bytes)
{
	struct cuda_seq *q = s->cu;
	const struct cuda_plan *p = &q->plan;
	uint64_t room = q->ring.in_bytes - p->in_at, rows_bytes, k_bytes;
	uint32_t rows = 0, wanted = 0;
	struct window_in h;

	if (room < sizeof(h))
		return plan_refuse(v, "a record's place", 0);
	memcpy(&h, ring + p->in_at, sizeof(h));
	if (h.plan != p->id || h.lane >= s->lanes || !h.span || h.span > WINDOW_SPAN || !h.rows ||
	    h.rows > 128 || !h.wanted)
		return plan_refuse(v, "a record", h.lane);
	for (uint32_t w = 0; w < h.span; w++) {
		rows += (uint32_t)__builtin_popcountll(h.pos[w]);
		wanted += (uint32_t)__builtin_popcountll(h.mask[w]);
		if (h.mask[w] & ~h.pos[w])
			return plan_refuse(v, "a record's rows", h.lane);
		for (uint64_t left = h.mask[w]; left; left &= left - 1) {
			uint64_t pos = (uint64_t)h.first + w * 64 + (uint32_t)__builtin_ctzll(left);

			if (pos >= p->watermark ||
			    !bits_test(p->bring_in + (size_t)h.lane * p->words, (uint32_t)pos))
				return plan_refuse(v, "a record's rows", h.lane);
		}
	}
	k_bytes = plane_bytes(s, layer_of(s->m, h.lane), false);
	rows_bytes = h.rows * (k_bytes + plane_bytes(s, layer_of(s->m, h.lane), true));
	*ret_bytes = window_in_bytes(h.segment ? 0 : rows_bytes);
	if (rows != h.rows || wanted != h.wanted || h.bytes != *ret_bytes || *ret_bytes > room)
		return plan_refuse(v, "a record's size", h.lane);
	*ret = (struct scatter_page){.lane = h.lane,
				     .first = h.first,
				     .span = h.span,
				     .rows = h.rows,
				     .wanted = h.wanted,
				     .crc = h.crc};
	memcpy(ret->pos, h.pos, sizeof(ret->pos));
	memcpy(ret->mask, h.mask, sizeof(ret->mask));
	if (h.segment) {
		int r = cuda_direct_address(s, h.segment - 1, h.off, rows_bytes, &ret->k);

		if (r)
			return r;
	} else {
		ret->k = q->w->addr + q->ring.in_off + p->in_at + sizeof(h);
	}
	ret->v = ret->k + h.rows * k_bytes;
	q->bytes_in += rows_bytes;
	return 0;
}

/* As many records as there are and as there is room for, without a gap in the staging. */
static int read_records(struct kvtier_seq *s, const struct plan_view *v, uint32_t staged, uint32_t *ret_n)
{
	struct cuda_seq *q = s->cu;
	struct cuda_plan *p = &q->plan;
	const char *ring = (const char *)q->w->r->seg.addr + q->ring.in_off;
	uint32_t at = q->next_page % CUDA_SCATTER_PAGES, n = 0;
	uint32_t most = MIN(CUDA_SCATTER_PAGES - at, CUDA_SCATTER_PAGES - q->pages_used);

	while (p->records + n < staged && n < most) {
		uint64_t bytes = 0;
		uint32_t wrap;
		int r;

		if (p->in_at == q->ring.in_bytes)
			p->in_at = 0;
		memcpy(&wrap, ring + p->in_at + offsetof(struct window_in, bytes), sizeof(wrap));
		if (wrap == WINDOW_WRAP)
			p->in_at = 0;
		r = read_record(s, v, ring, &q->pages[at + n], &bytes);
		if (r)
			return r;
		p->in_at += bytes;
		n++;
	}
	*ret_n = n;
	return 0;
}

static int scatter(struct kvtier_seq *s, const struct plan_view *v, void *stream)
{
	struct cuda_seq *q = s->cu;
	struct cuda_plan *p = &q->plan;
	uint64_t before = p->in_at;
	uint32_t staged = plan_staged(v), n = 0;
	struct scatter_args a;
	int r;

	if (!plan_still(v) || staged == p->records || !ticket_room(q, 1))
		return 0;
	if (staged < p->records)
		return plan_refuse(v, "records taken back", 0);
	r = read_records(s, v, staged, &n);
	if (!plan_still(v)) { /* what was read may be another's */
		p->in_at = before;
		return 0;
	}
	if (r || !n)
		return r;
	a = (struct scatter_args){
		.lane = q->lane[q->lane_now],
		.page = q->pinned_addr +
			(uint64_t)((char *)&q->pages[q->next_page % CUDA_SCATTER_PAGES] - q->pinned),
		.bring_in = q->tables + 2 * p->plane,
		.bad = q->flags & KVT_CUDA_DIRECT ? q->pinned_addr + (uint64_t)((char *)q->bad - q->pinned) : 0,
		.crc = q->g->crc,
		.words = p->words,
		.cap = q->cap,
		.n = n};
	r = kern_scatter(q->g, &a, stream);
	if (r) {
		p->in_at = before;
		return r;
	}
	p->records += n;
	q->next_page += n;
	q->pages_used += n;
	ticket_add(q, CUDA_SCATTER, p->id, p->records, n);
	return 0;
}

/* ---- one step ---------------------------------------------------------------------------------------- */

/* Every lane stays as it was: the daemon makes another plan, and looks at its pages itself. */
static void refuse_spoilt(struct kvtier_seq *s)
{
	struct cuda_seq *q = s->cu;
	uint64_t all[CTL_MAX_LANES / 64] = {0};
	bool lost;

	bits_set_range(all, 0, s->lanes);
	pthread_mutex_lock(&s->c->lock);
	lost = plan_acked(s, q->plan.id, all);
	atomic_fetch_add(&s->c->count.plans_nacked, 1);
	pthread_mutex_unlock(&s->c->lock);
	q->plan = (struct cuda_plan){0};
	if (lost)
		link_lost(s->c, s->link);
}

/* The plan that is visible and concerns us: 1, 0, or KVT_E_PROTO. */
static int visible(const struct kvtier_seq *s, struct plan_view *v)
{
	int r = plan_peek(s->plan_area, s->plan_bytes, s->lanes, v);

	if (r < 0)
		return err_set(KVT_E_PROTO, "plan: its tables do not fit its area");
	return r && v->id > atomic_load_explicit(&s->acked, memory_order_relaxed) && v->id != s->cu->applied &&
	       v->epoch == atomic_load_explicit(&s->epoch, memory_order_relaxed) && v->state != PLAN_CANCELLED;
}

int cuda_plan_step(struct kvtier_seq *s, void *stream)
{
	struct cuda_seq *q = s->cu;
	struct plan_view v;
	int r = visible(s, &v);
	bool fresh;

	if (r < 0)
		return r;
	if (q->plan.id && (!r || v.id != q->plan.id))
		q->plan = (struct cuda_plan){0};
	if (!r && q->sent == q->issued)
		return 0;
	/* Nothing has come to be done: the driver is left alone. */
	if (r && v.id == q->plan.id && v.state == PLAN_DECIDED && q->sent == q->issued &&
	    q->plan.gathered == q->plan.out_pages && q->plan.records == plan_staged(&v))
		return 0;
	if (r && v.id == q->plan.id && v.state == PLAN_READY) {
		if (q->plan.spoilt) {
			refuse_spoilt(s);
			return 0;
		}
		if (q->plan.state != PLAN_READY)
			atomic_fetch_add_explicit(&s->c->count.plans_seen, 1, memory_order_relaxed);
		q->plan.state = PLAN_READY;
		if (q->sent == q->issued)
			return 0;
	}
	fresh = r && !q->plan.id;
	r = cuda_enter(q->g);
	if (r)
		return r;
	if (fresh)
		r = cuda_take_over(s, &v, stream);
	if (!r && q->plan.id)
		r = gather(s, &v, stream);
	if (!r && q->plan.id)
		r = scatter(s, &v, stream);
	/* Also when something failed: what was launched is to be seen. */
	if (r)
		(void)ticket_send(q, stream);
	else
		r = ticket_send(q, stream);
	cuda_leave(q->g);
	return r;
}
