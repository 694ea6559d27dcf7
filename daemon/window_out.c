/* SPDX-License-Identifier: MIT */
/* Out of a window: pages that the client has announced, each copied once and checked as it is copied. */
#include "daemon/internal.h"
#include "shm/crc.h"
#include "shm/util.h"

int window_take(const struct plan *p, struct pio *io)
{
	const struct seq *s = p->seq;
	const struct plan_page *at = &p->t.page[io->nth];
	struct page *page = io->page;
	const struct window_out *h;
	uint32_t crc, nth, plain;
	struct page_ident id;
	uint64_t plan;

	h = p->region->ops->peek(p->region->mem, s->window.out_off + at->off, sizeof(*h) + page->bytes);
	if (!h)
		return -ERANGE;
	plan = __atomic_load_n(&h->plan, __ATOMIC_RELAXED);
	nth = __atomic_load_n(&h->page, __ATOMIC_RELAXED);
	crc = __atomic_load_n(&h->crc, __ATOMIC_RELAXED);
	plain = ~crc32c_gather(~UINT32_C(0), io->io.buf, h + 1, page->bytes, page->bytes, NULL, 1);
	if (plan != p->id || nth != io->nth || crc != plain)
		return -EILSEQ;
	page_ident(page, &id);
	page->crc = crc32c_seeded(page_crc_seed(&id), plain, page->bytes);
	return 0;
}

/* The window held something else than was announced. */
static void mutated(struct plan *p, const struct pio *io)
{
	struct seq *s = p->seq;
	struct core *c = s->core;
	uint32_t rows[4] = {io->page->rows, 0, 0, 0};

	c->stat.miss_client_mutated++;
	s->misses++;
	log_about(&s->tenant->said, 4,
		  "miss: seq %016llx plan %llu: page %u of the out ring is not what the client announced",
		  (unsigned long long)s->handle, (unsigned long long)p->id, io->nth);
	core_feed(c, FEED_MISS, s, EILSEQ, io->page->bytes, rows);
}

void window_taken(struct plan *p, struct pio *const *io, unsigned n)
{
	struct window_plan *win = p->win;
	uint32_t before = win->taken;

	if (p->over)
		return;
	for (unsigned i = 0; i < n; i++) {
		if (!io[i]->error)
			bits_set(win->copied, io[i]->nth);
		else if (io[i]->error == -EILSEQ)
			mutated(p, io[i]);
	}
	while (win->taken < win->next && bits_test(win->copied, win->taken))
		win->taken++;
	if (win->taken == before)
		return;
	plan_set_taken(p->t.hdr, win->taken);
	if (p->seq->client)
		client_notify(p->seq->client, Q_PLAN, p->seq->handle, p->id, PLAN_DECIDED);
}
