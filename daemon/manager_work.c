/* SPDX-License-Identifier: MIT */
/*
 * Who works for a plan: jobs that score its rows, lanes side by side, and the one that decides. What costs less
 * than handing it over is done on the loop.
 */
#include "daemon/internal.h"
#include "policy/adaptive.h"
#include "policy/decide.h"
#include "shm/util.h"

#define INLINE_ROWS 65536u  /* row-lanes decided on the loop: a hand-over costs more */
#define WEIGH_COST 8u       /* what a row-lane costs whose worth is looked up, in such row-lanes */
#define FUSED_ROWS 1048576u /* row-lanes whose given scores are read by the worker that decides */
#define SCORE_ROWS 16384u   /* row-lanes of one scoring job at least */

struct plan_job {
	struct job job;
	struct plan *plan;
	uint32_t lo, hi; /* lanes to score */
	bool decide;
};

static void plan_run(struct job *j, struct worker_ctx *w)
{
	struct plan_job *pj = container_of(j, struct plan_job, job);
	struct plan *p = pj->plan;
	int r = 0;

	if (pj->hi > pj->lo)
		r = score_lanes(p, pj->lo, pj->hi, w);
	if (!r && pj->decide)
		r = plan_decide(p);
	if (r < 0)
		__atomic_store_n(&p->error, r, __ATOMIC_RELAXED);
}

static void plan_done(struct job *j)
{
	struct plan_job *pj = container_of(j, struct plan_job, job);
	struct plan *p = pj->plan;
	bool last = pj->decide;

	free(pj);
	if (last)
		manager_decided(p);
	else
		plan_unref(p);
}

/* Of each lane. */
static uint32_t rows_to_score(const struct plan *p)
{
	bool all = p->rescore || (p->use->ops->caps & POLICY_CONTEXT);

	return p->watermark - (all ? 0 : p->from);
}

static int put_job(struct plan *p, uint32_t lo, uint32_t hi, bool last, bool here)
{
	struct plan_job *pj = calloc(1, sizeof(*pj));
	struct workers *w = p->seq->core->workers;

	if (!pj)
		return -ENOMEM;
	p->refs++;
	pj->plan = p;
	pj->lo = lo;
	pj->hi = hi;
	pj->decide = last;
	pj->job.run = plan_run;
	pj->job.done = plan_done;
	pj->job.urgent = last;
	pj->job.tenant = p->seq->tenant->index;
	pj->job.bytes = (uint64_t)(hi - lo) * rows_to_score(p) * 64;
	if (here)
		workers_run_inline(w, &pj->job);
	else
		workers_put(w, &pj->job);
	return 0;
}

static int put_decide(struct plan *p, bool fused)
{
	uint64_t rows = p->watermark + (p->bid ? ADAPTIVE_BINS : 0u);
	uint64_t work = p->seq->ix.lanes * rows * (p->worth ? WEIGH_COST : 1);

	p->phase = PHASE_DECIDE;
	p->decide_ns = now_ns();
	return put_job(p, 0, fused ? p->seq->ix.lanes : 0, true, work <= INLINE_ROWS);
}

void manager_scored(struct plan *p)
{
	struct seq *s = p->seq;

	p->refs++; /* a decision made here and now may end p before put_decide() returns */
	if (!p->error && p->epoch == s->epoch)
		p->error = put_decide(p, false);
	if (p->error && !p->over)
		manager_failed(s, p->error);
	if (p->error || p->epoch != s->epoch)
		p->over = true;
	p->refs--;
}

static int put_scoring(struct plan *p)
{
	uint32_t lanes = p->seq->ix.lanes, rows = rows_to_score(p), per;

	per = MAX(1u, MIN(DIV_UP(lanes, 2 * workers_count(p->seq->core->workers)), DIV_UP(SCORE_ROWS, rows)));
	p->phase = PHASE_SCORE;
	for (uint32_t lo = 0; lo < lanes; lo += per) {
		int r = put_job(p, lo, MIN(lanes, lo + per), false, false);

		if (r < 0)
			return r;
	}
	return 0;
}

/* Scores that are there already or cost next to nothing are read where the decision is made. */
static bool cheap(const struct plan *p)
{
	uint64_t rows = p->watermark - (p->rescore ? 0 : p->from);

	return (p->from == p->watermark && !p->rescore) ||
	       (score_given(p) && p->seq->ix.lanes * rows <= FUSED_ROWS) ||
	       !(p->use->ops->caps & (POLICY_NEEDS_K | POLICY_NEEDS_V | POLICY_CONTEXT));
}

int manager_work(struct plan *p)
{
	return cheap(p) ? put_decide(p, p->from < p->watermark || p->rescore || p->keys || p->worth)
			: put_scoring(p);
}
