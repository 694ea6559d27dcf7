/* SPDX-License-Identifier: MIT */
/*
 * Summaries of demoted pages, for recall. A page that has one was checked as a whole since its bytes came to
 * private memory, which only we write: rows that recall serves are copied from such pages without another look
 * at the checksum, which covers 128 rows and would cost more than the search. Pages get theirs while they are
 * written, or, older ones, when recall first asks: read like for a promotion, checked, summarised by a worker.
 */
#include <string.h>
#include "daemon/internal.h"
#include "ipc/codec.h"
#include "policy/recall.h"
#include "shm/util.h"

#define BACKGROUND 32u /* pages of one sequence being summarised behind its back */

struct summing {
	struct job job;
	struct seq *seq; /* a reference */
	struct pio *io;
	void (*end)(void *arg);
	void *arg;
};

struct recall_shape recall_shape(const struct seq *s, uint32_t lane)
{
	const struct model *m = s->recalls ? s->model : NULL;
	uint32_t elem = m ? wire_dtype_bytes(m->dtype) : 0;
	uint32_t dim = elem ? m->layer[m->lane_layer[lane]].k_bytes / elem : 0;

	return (struct recall_shape){.dim = dim <= RECALL_MAX_DIM ? dim : 0, .dtype = m ? m->dtype : 0};
}

struct recall_sum *recall_sum_make(struct recall_shape keys, const struct page *p, const void *k)
{
	struct recall_sum *sum = keys.dim ? malloc(recall_sum_bytes(p->rows, keys.dim)) : NULL;

	if (sum)
		recall_summarise(k, p->rows, keys.dim, (enum row_dtype)keys.dtype, sum);
	return sum;
}

static void summing_run(struct job *j, struct worker_ctx *w)
{
	struct pio *io = container_of(j, struct summing, job)->io;

	if (!page_verify(io->page, io->io.buf))
		io->error = -EBADMSG;
	else
		io->sum = recall_sum_make(io->keys, io->page, io->io.buf);
}

static void summing_end(struct summing *m)
{
	struct seq *s = m->seq;
	struct pio *io = m->io;
	int r = io->error;
	bool deciding = !s->dead && plan_lent(s) && s->plan->phase == PHASE_DECIDE;

	io->page->summing = false;
	if (io->sum)
		page_set_sum(&s->core->pages, io->page, TAKE_PTR(io->sum));
	/* A worker that decides reads the index: the page is met again. */
	if (r < 0 && r != -ENOMEM && r != -ENOENT && !s->dead && s->state != SEQ_CLOSING && !deciding)
		mover_lost(s, io->page, io->tier, r);
	s->sums--;
	pio_free(io);
	m->end(m->arg);
	seq_unref(s);
	free(m);
}

static void summing_done(struct job *j)
{
	summing_end(container_of(j, struct summing, job));
}

static void summing_read(struct pio *io)
{
	struct summing *m = io->owner;

	io->error = io->io.res;
	if (io->error < 0) {
		summing_end(m);
		return;
	}
	m->job = (struct job){.run = summing_run,
			      .done = summing_done,
			      .tenant = m->seq->tenant->index,
			      .bytes = io->page->bytes};
	workers_put(m->seq->core->workers, &m->job);
}

int recall_sum_start(struct seq *s, struct page *p, void (*end)(void *arg), void *arg)
{
	struct summing *m = calloc(1, sizeof(*m));

	if (m)
		m->io = pio_new(s->core, p, KVT_TIER_DRAM, summing_read, m);
	if (!m || !m->io) {
		free(m);
		return -ENOMEM;
	}
	m->seq = s;
	m->end = end;
	m->arg = arg;
	m->io->keys = recall_shape(s, p->lane);
	p->summing = true;
	s->refs++;
	s->sums++;
	pio_read(m->io);
	return 0;
}

/* ---- in the background --------------------------------------------------------------------- */

static void next_pages(void *arg)
{
	struct seq *s = arg;

	if (s->dead || s->state == SEQ_CLOSING)
		return;
	for (; s->sum_lane < s->ix.lanes; s->sum_lane++) {
		struct lane_pages *lp = &s->ix.lane[s->sum_lane];

		for (uint32_t i = 0; i < lp->n; i++) {
			struct page *p = lp->v[i];

			if (p->sum || p->summing || !page_in(p, KVT_TIER_DRAM))
				continue;
			if (s->sums >= BACKGROUND || recall_sum_start(s, p, next_pages, s) < 0)
				return;
		}
	}
}

void recall_prepare(struct seq *s)
{
	s->recalls = true;
	s->sum_lane = 0;
	if (recall_shape(s, 0).dim)
		next_pages(s);
}
