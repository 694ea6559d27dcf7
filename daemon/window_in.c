/* SPDX-License-Identifier: MIT */
/*
 * Into a window: records for the rows that a plan brings in. Each gets its place in the ring before its page is
 * read, in the order in which pages are asked for; workers write them in any order, and they are announced in
 * order. A page in published memory is named instead of copied and stays where it is until the client is done
 * with it; the client checks it. Should a client refuse what such a plan brought, the next one checks here.
 */
#include <string.h>
#include "daemon/direct.h"
#include "daemon/internal.h"
#include "shm/crc.h"
#include "shm/util.h"

static uint32_t mask_rows(const uint64_t *mask, uint32_t span)
{
	uint32_t n = 0;

	for (uint32_t w = 0; w < span; w++)
		n += (uint32_t)__builtin_popcountll(mask[w]);
	return n;
}

/* Where the ring is written up to, or free up to, as if it had no end. */
static uint64_t record_end(const struct window_plan *win, uint32_t n)
{
	return n ? win->record[n - 1].end : 0;
}

static int grow(struct window_plan *win)
{
	uint32_t room = win->room ? 2 * win->room : 64;
	struct window_record *v = reallocarray(win->record, room, sizeof(*v));

	if (!v)
		return -ENOMEM;
	win->record = v;
	win->room = room;
	return 0;
}

int window_reserve(struct plan *p, struct pio *io)
{
	const struct seq *s = p->seq;
	struct window_plan *win = p->win;
	struct page *page = io->page;
	uint64_t ring = s->window.in_bytes, at = record_end(win, win->records), free_to, bytes;

	io->nth = WINDOW_NO_RECORD;
	if (p->missed)
		return 0; /* it will not be applied: the page is only checked */
	if (win->records == win->room && grow(win) < 0)
		return -ENOMEM;
	if (s->flags & W_OPEN_DIRECT && !s->look_twice && io->tier == KVT_TIER_DRAM &&
	    direct_where(page, &io->segment, &io->segment_off))
		io->segment++;
	bytes = io->segment ? 0 : (uint64_t)mask_rows(io->words, page->span) * (page->bytes / page->rows);
	bytes = window_in_bytes(bytes);
	io->wrap_at = UINT64_MAX;
	if (bytes > ring - at % ring) {
		io->wrap_at = at % ring;
		at += ring - at % ring;
	}
	free_to = record_end(win, win->drained) + ring;
	if (at + bytes > free_to)
		return -EAGAIN;
	io->ring_at = at % ring;
	io->nth = win->records++;
	win->record[io->nth] = (struct window_record){.end = at + bytes, .page = io->segment ? page : NULL};
	if (io->segment) {
		page_pin(page);
		win->direct = true;
	}
	return 0;
}

/* Bytes of ours into the in ring. -ENOSPC: no memory behind it. */
static int put(const struct plan *p, uint64_t at, const void *src, uint32_t bytes)
{
	const struct device_lane to = {
		.k_off = p->seq->window.in_off + at, .k_stride = bytes, .k_bytes = bytes};

	return p->region->ops->scatter(p->region->mem, &to, src, 1, NULL, 0, 1);
}

/* Rows of the page that are wanted. */
static uint32_t picks(const struct pio *io, uint32_t *pick)
{
	uint32_t n = 0, row = 0;

	for (uint32_t w = 0; w < io->page->span; w++)
		for (uint64_t rows = io->page->pos[w]; rows; rows &= rows - 1, row++)
			if (io->words[w] & rows & -rows)
				pick[n++] = row;
	return n;
}

/* The picked rows, packed, behind the header; *crc over them as shm/window.h wants it. */
static int put_rows(const struct plan *p, const struct pio *io, const uint32_t *pick, uint32_t n, uint32_t *crc)
{
	const struct page *page = io->page;
	const struct wire_layer *y = &p->seq->model->layer[p->seq->model->lane_layer[page->lane]];
	const char *k = io->io.buf, *v = k + (size_t)page->rows * y->k_bytes;
	struct device_lane to = {
		.k_off = p->seq->window.in_off + io->ring_at + sizeof(struct window_in),
		.k_stride = y->k_bytes,
		.k_bytes = y->k_bytes,
		.v_stride = y->v_bytes,
		.v_bytes = y->v_bytes,
	};
	uint32_t c = ~UINT32_C(0);

	to.v_off = to.k_off + (uint64_t)n * y->k_bytes;
	if (n == page->rows) {
		*crc = direct_crc(page);
		return p->region->ops->scatter(p->region->mem, &to, io->io.buf, n, NULL, 0, n);
	}
	for (uint32_t i = 0; i < n; i++)
		c = crc32c(c, k + (size_t)pick[i] * y->k_bytes, y->k_bytes);
	for (uint32_t i = 0; i < n; i++)
		c = crc32c(c, v + (size_t)pick[i] * y->v_bytes, y->v_bytes);
	*crc = ~c;
	return p->region->ops->scatter(p->region->mem, &to, io->io.buf, page->rows, pick, 0, n);
}

int window_pack(const struct plan *p, const struct pio *io)
{
	const struct page *page = io->page;
	const struct window_in wrap = {.plan = p->id, .bytes = WINDOW_WRAP};
	uint32_t pick[PAGE_ROWS], n;
	struct window_in h;
	int r = 0;

	if (io->nth == WINDOW_NO_RECORD)
		return 0;
	if (io->wrap_at != UINT64_MAX)
		r = put(p, io->wrap_at, &wrap, WINDOW_ALIGN);
	n = picks(io, pick);
	h = (struct window_in){
		.plan = p->id,
		.bytes = sizeof(h),
		.lane = page->lane,
		.first = page->first,
		.span = page->span,
		.rows = page->rows,
		.wanted = (uint8_t)n,
		.segment = io->segment,
		.off = io->segment_off,
	};
	memcpy(h.pos, io->segment ? page->pos : io->words, page->span * sizeof(uint64_t));
	memcpy(h.mask, io->words, page->span * sizeof(uint64_t));
	if (io->segment) {
		h.crc = direct_crc(page);
	} else {
		h.rows = (uint8_t)n;
		h.bytes += (uint32_t)ALIGN_UP((uint64_t)n * (page->bytes / page->rows), WINDOW_ALIGN);
		r = r ? r : put_rows(p, io, pick, n, &h.crc);
	}
	return r ? r : put(p, io->ring_at, &h, sizeof(h));
}

void window_stage(struct plan *p)
{
	struct window_plan *win = p->win;
	uint32_t before = win->staged;

	while (win->staged < win->records && win->record[win->staged].done)
		win->staged++;
	if (p->over || win->staged == before)
		return;
	plan_set_staged(p->t.hdr, win->staged);
	if (p->seq->client)
		client_notify(p->seq->client, Q_PLAN, p->seq->handle, p->id, PLAN_DECIDED);
}

void window_drained(struct plan *p, uint32_t n)
{
	struct window_plan *win = p->win;

	for (; win->drained < n; win->drained++)
		if (win->record[win->drained].page) {
			page_unpin(&p->seq->core->pages, win->record[win->drained].page);
			win->record[win->drained].page = NULL;
		}
}
