/* SPDX-License-Identifier: MIT */
#pragma once
/* What the runtime of window_double.h does about plans: gather, scatter, apply, and the messages that ask for
 * them. */
#include "tests/unit/window_double.h"

/* ---- out --------------------------------------------------------------------------- */

/* Write page i of the list into the out ring, as kvt_gather does. */
static inline int wq_gather(struct wseq *q, uint32_t i)
{
	const struct plan_view *v = &q->view;
	const struct plan_page *p = &v->page[i];
	char *at = (char *)q->region.addr + q->win.out_off + p->off;
	uint8_t *k = (uint8_t *)at + sizeof(struct window_out), *vp = k + (size_t)p->rows * q->l->k_bytes;
	uint32_t n = 0, bytes = p->rows * (q->l->k_bytes + q->l->v_bytes);
	struct window_out h = {.plan = v->id, .page = i};

	W_CHECK(p->lane < q->l->lanes && p->last <= v->watermark && p->first < p->last);
	W_CHECK(p->tier == KVT_TIER_DRAM || p->tier == KVT_TIER_NVME);
	W_CHECK(p->rows >= 1 && p->rows <= WINDOW_ROWS && p->off % WINDOW_ALIGN == 0);
	W_CHECK(p->off + window_out_bytes(p->rows, q->l->k_bytes + q->l->v_bytes) <= q->win.out_bytes);
	if (i && p->off <= v->page[i - 1].off)
		q->wraps_out++;
	W_CHECK(p->end >=
		(i ? v->page[i - 1].end : 0) + window_out_bytes(p->rows, q->l->k_bytes + q->l->v_bytes));
	for (uint32_t pos = p->first; pos < p->last; pos++) {
		const uint64_t *out = v->copy_out + (size_t)p->lane * v->words,
			       *dram = v->to_dram + (size_t)p->lane * v->words;
		uint32_t slot = *wq_slot(q, p->lane, pos);

		if (!bits_test(out, pos) || bits_test(dram, pos) != (p->tier == KVT_TIER_DRAM))
			continue;
		W_CHECK(n < p->rows && slot < q->count[p->lane] && *wq_pos(q, p->lane, slot) == pos);
		memcpy(k + (size_t)n * q->l->k_bytes, wq_k(q, p->lane, slot), q->l->k_bytes);
		memcpy(vp + (size_t)n * q->l->v_bytes, wq_v(q, p->lane, slot), q->l->v_bytes);
		n++;
	}
	W_CHECK(n == p->rows);
	h.crc = ~crc32c(~0u, k, bytes);
	if (i == q->bad_crc)
		h.crc ^= 0x10;
	if (i == q->bad_plan)
		h.plan--;
	if (i == q->bad_page)
		h.page++;
	if (i == q->bad_crc || i == q->bad_plan || i == q->bad_page)
		q->bad_crc = q->bad_plan = q->bad_page = UINT32_MAX;
	memcpy(at, &h, sizeof(h));
	q->pages_out++;
	return 0;
}

static inline int wq_out(struct wseq *q)
{
	const struct plan_view *v = &q->view;
	uint32_t taken = plan_taken(v), before = q->gathered;
	uint64_t free_from;

	W_CHECK(taken <= q->gathered || !plan_still(v));
	if (!plan_still(v) || q->stop_out)
		return 0;
	free_from = taken ? v->page[taken - 1].end : 0;
	while (q->gathered < v->out_pages && v->page[q->gathered].end - free_from <= q->win.out_bytes)
		if (wq_gather(q, q->gathered++) < 0)
			return -1;
	if (q->gathered == before)
		return 0;
	atomic_store_explicit(&q->slot->gathered, window_cursor(v->id, q->gathered), memory_order_release);
	wq_poke(q);
	return 1;
}

/* ---- in ---------------------------------------------------------------------------- */

/* One record's rows into stage slots, as kvt_scatter does. */
static inline int wq_scatter(struct wseq *q, const struct window_in *h, const uint8_t *planes)
{
	const struct plan_view *v = &q->view;
	const uint64_t *in = v->bring_in + (size_t)h->lane * v->words;
	uint32_t row = 0, wanted = 0;

	W_CHECK(h->plan == v->id && h->lane < q->l->lanes && h->span >= 1 && h->span <= WINDOW_SPAN);
	W_CHECK(h->rows >= 1 && h->rows <= WINDOW_ROWS);
	W_CHECK(h->crc == (uint32_t)~crc32c(~0u, planes, h->rows * (q->l->k_bytes + q->l->v_bytes)));
	for (uint32_t i = 0; i < h->span * 64u; i++) {
		uint32_t pos = h->first + i, slot;

		if (!bits_test(h->pos, i)) {
			W_CHECK(!bits_test(h->mask, i));
			continue;
		}
		if (bits_test(h->mask, i)) {
			W_CHECK(pos < v->watermark && bits_test(in, pos));
			W_CHECK(!bits_test(q->came + (size_t)h->lane * v->words, pos));
			bits_set(q->came + (size_t)h->lane * v->words, pos);
			slot = q->cap + bits_rank(in, pos);
			W_CHECK(slot < q->cap + q->stage);
			memcpy(wq_k(q, h->lane, slot), planes + (size_t)row * q->l->k_bytes, q->l->k_bytes);
			memcpy(wq_v(q, h->lane, slot),
			       planes + (size_t)h->rows * q->l->k_bytes + (size_t)row * q->l->v_bytes,
			       q->l->v_bytes);
			wanted++;
		}
		row++;
	}
	W_CHECK(row == h->rows && wanted == h->wanted && wanted >= 1);
	q->staged_rows += wanted;
	return 0;
}

static inline int wq_in(struct wseq *q)
{
	uint32_t staged = plan_staged(&q->view), before = q->drained;
	char *ring = (char *)q->region.addr + q->win.in_off;

	if (!plan_still(&q->view) || q->stop_in)
		return 0;
	for (; q->drained < staged; q->drained++) {
		struct window_in *h;
		const char *planes;

		if (q->in_at == q->win.in_bytes)
			q->in_at = 0;
		h = (struct window_in *)(ring + q->in_at);
		if (h->bytes == WINDOW_WRAP) {
			W_CHECK(h->plan == q->view.id);
			h->bytes = 0xdddddddd;
			q->in_at = 0;
			q->wraps_in++;
			h = (struct window_in *)ring;
		}
		W_CHECK(h->bytes % WINDOW_ALIGN == 0 && h->bytes >= sizeof(*h));
		W_CHECK(q->in_at + h->bytes <= q->win.in_bytes);
		planes = (const char *)(h + 1);
		if (h->segment) {
			W_CHECK(q->segment && h->bytes == sizeof(*h));
			planes = q->segment(q->segment_arg, h->segment - 1);
			W_CHECK(planes);
			planes += h->off;
			q->direct++;
		}
		if (wq_scatter(q, h, (const uint8_t *)planes) < 0)
			return -1;
		q->in_at += h->bytes;
		memset(h, 0xdd, h->bytes); /* ours again only when it is written anew */
	}
	if (q->drained == before)
		return 0;
	atomic_store_explicit(&q->slot->drained, window_cursor(q->view.id, q->drained), memory_order_release);
	wq_poke(q);
	return 1;
}

/* ---- apply ------------------------------------------------------------------------- */

static inline void wq_move(struct wseq *q, uint32_t lane, uint32_t from, uint32_t to, uint32_t pos)
{
	memcpy(wq_k(q, lane, to), wq_k(q, lane, from), q->l->k_bytes);
	memcpy(wq_v(q, lane, to), wq_v(q, lane, from), q->l->v_bytes);
	*wq_pos(q, lane, to) = pos;
	*wq_slot(q, lane, pos) = to;
}

/* Rows that stay move down into the holes of those that go, then the staged ones follow. */
static inline int wq_apply_lane(struct wseq *q, uint32_t l)
{
	const struct plan_view *v = &q->view;
	const uint64_t *res = v->resident + (size_t)l * v->words, *in = v->bring_in + (size_t)l * v->words;
	uint32_t n = 0, staged = 0, past = 0;

	for (uint32_t s = 0; s < q->count[l]; s++) {
		uint32_t pos = *wq_pos(q, l, s);
		bool stays = pos >= v->watermark || bits_test(res, pos);

		W_CHECK(pos >= v->watermark || !bits_test(in, pos)); /* it is here: nobody brings it in */
		past += pos >= v->watermark;
		if (stays)
			wq_move(q, l, s, n++, pos);
	}
	for (uint32_t pos = 0; pos < v->watermark; pos++)
		if (bits_test(in, pos)) {
			W_CHECK(bits_test(res, pos) && bits_test(q->came + (size_t)l * v->words, pos));
			wq_move(q, l, q->cap + staged++, n++, pos);
		}
	W_CHECK(staged == v->lane[l].in && n - past == v->lane[l].kept && n <= q->cap);
	q->count[l] = n;
	return 0;
}

static inline int wq_apply(struct wseq *q)
{
	const struct plan_view *v = &q->view;

	W_CHECK(q->gathered == v->out_pages && plan_taken(v) == v->out_pages);
	W_CHECK(q->drained == plan_staged(v) && q->staged_rows == v->rows_in);
	for (uint32_t l = 0; l < q->l->lanes; l++)
		if (l != q->nack_lane && wq_apply_lane(q, l) < 0)
			return -1;
	memset(q->slot->nack, 0, sizeof(q->slot->nack));
	if (q->nack_lane != UINT32_MAX)
		q->slot->nack[q->nack_lane / 64] |= UINT64_C(1) << q->nack_lane % 64;
	q->nack_lane = UINT32_MAX;
	q->applied = v->id;
	atomic_store_explicit(&q->slot->acked, v->id, memory_order_release);
	wq_poke(q);
	return 2;
}

/* Look and do what is due: -1 a promise was broken, 0 nothing, 1 something, 2 a plan was applied. */
static inline int wq_step(struct wseq *q)
{
	struct plan_view v;
	int r = plan_peek(q->area, q->area_bytes, q->l->lanes, &v), out, in;

	W_CHECK(r >= 0);
	if (r == 0 || v.id <= q->applied || v.state == PLAN_CANCELLED)
		return 0;
	W_CHECK(v.flags & PLAN_F_WINDOW && v.page && v.lanes == q->l->lanes && v.epoch == q->epoch);
	if (v.id != q->plan) {
		q->plan = v.id;
		q->gathered = q->drained = q->staged_rows = 0;
		q->in_at = 0;
		memset(q->came, 0, (size_t)q->l->lanes * BITS_WORDS(q->max_rows) * sizeof(uint64_t));
	}
	q->view = v;
	if (v.state == PLAN_READY)
		return wq_apply(q);
	out = wq_out(q);
	in = out < 0 ? out : wq_in(q);
	return in < 0 ? in : out | in;
}

/* Follow plans until one with id >= min is applied: 0; -2: nothing came. */
static inline int wq_follow(struct wseq *q, uint64_t min)
{
	uint64_t end = now_ns() + UINT64_C(20000000000);

	while (now_ns() < end) {
		int r = wq_step(q);

		if (r < 0)
			return -1;
		if (r == 2 && q->applied >= min)
			return 0;
		if (!r)
			usleep(50);
	}
	fprintf(stderr, "# plan %llu: gathered %u of %u, taken %u, drained %u of %u\n",
		(unsigned long long)q->plan, q->gathered, q->view.out_pages, plan_taken(&q->view), q->drained,
		plan_staged(&q->view));
	return -2;
}

/* ---- messages ------------------------------------------------------------------------ */

static inline struct wire_budget wq_budget(uint32_t device, uint32_t dram, uint32_t nvme)
{
	struct wire_budget b = {
		.set = 1, .manual = 1, .device_rows = device, .dram_rows = dram, .nvme_rows = nvme};

	return b;
}

static inline int wq_ask(struct wseq *q, const struct wire_budget *b, uint64_t *ret_id)
{
	struct wire_plan_request m;
	int r;

	wire_init(&m.hdr, W_PLAN_REQUEST, sizeof(m), 5);
	m.seq = q->handle;
	m.budget = *b;
	r = wl_call(q->l, &m.hdr);
	*ret_id = ((struct wire_plan_reply *)q->l->reply)->plan_id;
	return r;
}

static inline int wq_plan(struct wseq *q, uint32_t device, uint32_t dram, uint32_t nvme)
{
	struct wire_budget b = wq_budget(device, dram, nvme);
	uint64_t id;
	int r = wq_ask(q, &b, &id);

	return r ? r : wq_follow(q, id);
}

static inline int wq_fetch(struct wseq *q, uint32_t pos, uint32_t n, uint64_t *ret_id)
{
	struct wire_fetch m;
	int r;

	wire_init(&m.hdr, W_FETCH, sizeof(m), 6);
	m.seq = q->handle;
	m.pos = pos;
	m.n = n;
	r = wl_call(q->l, &m.hdr);
	*ret_id = ((struct wire_plan_reply *)q->l->reply)->plan_id;
	return r;
}

static inline int wq_truncate(struct wseq *q, uint32_t rows)
{
	struct wire_seq_truncate m;
	int r;

	wire_init(&m.hdr, W_SEQ_TRUNCATE, sizeof(m), 7);
	m.seq = q->handle;
	m.rows = rows;
	r = wl_call(q->l, &m.hdr);
	if (r)
		return r;
	q->epoch = ((struct wire_seq_truncate_reply *)q->l->reply)->epoch;
	q->rows = rows;
	q->salt++;
	for (uint32_t l = 0; l < q->l->lanes; l++) {
		uint32_t n = 0;

		for (uint32_t s = 0; s < q->count[l]; s++)
			if (*wq_pos(q, l, s) < rows)
				wq_move(q, l, s, n++, *wq_pos(q, l, s));
		q->count[l] = n;
	}
	atomic_store_explicit(&q->slot->len, seq_len_pack(q->epoch, rows), memory_order_release);
	return 0;
}

static inline int wq_close(struct wseq *q, bool drop)
{
	struct wire_seq_close m;

	wire_init(&m.hdr, W_SEQ_CLOSE, sizeof(m), 8);
	m.seq = q->handle;
	m.drop = drop;
	return wl_call(q->l, &m.hdr);
}

static inline struct wire_seq_info_reply wq_info(struct wseq *q)
{
	struct wire_handle m;
	struct wire_seq_info_reply a = {.lanes = 0};

	wire_init(&m.hdr, W_SEQ_INFO, sizeof(m), 9);
	m.handle = q->handle;
	if (wl_call(q->l, &m.hdr) == 0)
		memcpy(&a, q->l->reply, sizeof(a));
	return a;
}
