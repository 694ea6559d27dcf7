/* SPDX-License-Identifier: MIT */
/*
 * Plans of sequences whose device rows only their client reaches (shm/window.h): the list of pages that the
 * client is to write, its words about both rings, and when a plan has come through. window_out.c copies pages
 * out of the one ring, window_in.c puts records into the other.
 *
 * No buffer of a tier is held while the client is waited for: a page gets one when it is in the ring, and is
 * read when there is room for its record. A client that stops only stops itself.
 */
#include "daemon/internal.h"
#include "shm/util.h"

int window_list(struct plan *p)
{
	const struct seq *s = p->seq;
	struct window_plan *win = p->win;
	struct cut_at at = {.tier = KVT_TIER_DRAM};
	uint64_t end = 0, off = 0, ring = s->window.out_bytes;
	struct cut cut;

	for (; cut_find(p, &at, &cut); at.pos = cut.end) {
		uint64_t bytes = window_out_bytes(cut.rows, lane_bytes(s->model, at.lane)), skip = 0;

		if (win->pages == p->t.max_pages)
			return -ENOSPC;
		if (bytes > ring - off) { /* it does not fit before the ring's end */
			skip = ring - off;
			off = 0;
		}
		end += MIN(skip + bytes, ring); /* no more than all of it: then it waits for all before it */
		p->t.page[win->pages++] = (struct plan_page){
			.off = off,
			.end = end,
			.first = cut.first,
			.last = cut.end,
			.lane = (uint16_t)at.lane,
			.tier = (uint8_t)at.tier,
			.rows = (uint8_t)cut.rows,
		};
		off += bytes;
	}
	win->copied = calloc(BITS_WORDS(win->pages) + 1, sizeof(*win->copied));
	return win->copied ? 0 : -ENOMEM;
}

void window_free(struct plan *p)
{
	struct window_plan *win = p->win;

	if (!win)
		return;
	for (uint32_t i = win->drained; i < win->records; i++)
		if (win->record[i].page)
			page_unpin(&p->seq->core->pages, win->record[i].page);
	free(win->record);
	free(win->copied);
	free(win);
	p->win = NULL;
}

bool window_rests(const struct plan *p)
{
	return p->win && p->refs == 1;
}

bool window_settled(const struct plan *p)
{
	const struct window_plan *win = p->win;

	if (!win || p->over || p->error || p->missed)
		return true;
	return win->taken == win->pages && win->drained == win->records;
}

void window_refused(struct plan *p)
{
	if (!p->win->direct)
		return;
	p->seq->look_twice = true;
	manager_again(p, true);
}

/* ---- the client's words ---------------------------------------------------------------- */

/*
 * A cursor as the client has it now. 1: it speaks of the plan that is out, *ret of its pages or records; 0:
 * nothing new, or of a plan that is over; -1: the client was ended.
 */
static int look(struct seq *s, const char *name, const _Atomic uint64_t *word, uint64_t *seen, uint32_t limit,
		uint32_t *ret)
{
	uint64_t now = atomic_load_explicit(word, memory_order_acquire);
	uint32_t plan = (uint32_t)(now >> 32), n = (uint32_t)now;
	struct plan *p = s->plan;

	if (now == *seen)
		return 0;
	if (now < *seen || plan > (uint32_t)s->plan_id) {
		client_end(s->client,
			   "slot.%s: plan %u, %u, must be from plan %u, %u on and of plan %u at most", name,
			   plan, n, (uint32_t)(*seen >> 32), (uint32_t)*seen, (uint32_t)s->plan_id);
		return -1;
	}
	if (!p || !p->win || p->over || plan != (uint32_t)p->id) {
		*seen = now;
		return 0; /* of one that was cancelled meanwhile */
	}
	if (n > limit) {
		client_end(s->client, "slot.%s: plan %u, %u, must be at most %u", name, plan, n, limit);
		return -1;
	}
	*seen = now;
	*ret = n;
	return 1;
}

bool window_poll(struct seq *s)
{
	const struct seq_slot *slot = &s->client->slots[s->slot];
	struct window_plan *win = s->plan && s->plan->id ? s->plan->win : NULL; /* till then a worker's */
	uint32_t n;
	int r;

	r = look(s, "gathered", &slot->gathered, &s->gathered, win ? win->pages : 0, &n);
	if (r < 0)
		return false;
	if (r) {
		win->gathered = n;
		mover_kick(s->core);
	}
	r = look(s, "drained", &slot->drained, &s->drained, win ? win->staged : 0, &n);
	if (r > 0) {
		window_drained(s->plan, n);
		mover_kick(s->core);
	}
	return r >= 0;
}
