/* SPDX-License-Identifier: MIT */
/* Wide tables that gnuplot reads as they are: a column a policy, its name on top. */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include "policy/eval/report.h"
#include "shm/util.h"

static void heads(FILE *f, const struct report *r, const char *first, bool (*in)(const struct rival *))
{
	fputs(first, f);
	for (uint32_t p = 0; p < r->rivals->n; p++)
		if (in(&r->rivals->r[p]))
			fprintf(f, ",%s", r->rivals->r[p].name);
	fputc('\n', f);
}

static bool everybody(const struct rival *p)
{
	return p->role != RIVAL_BEST;
}

static bool networks(const struct rival *p)
{
	return p->role == RIVAL_LEARNED;
}

static bool lane_plot(const struct rival *p)
{
	return p->role == RIVAL_LEARNED || p->role == RIVAL_BEST || p->how == HOW_ATTAINABLE;
}

static int plot_evicted(const struct report *r, struct report_data *d)
{
	const struct slice *s = &d->slice[d->main];
	FILE *f = report_open(r, "plot_evicted.csv");

	if (!f)
		return -EIO;
	heads(f, r, "budget", everybody);
	for (uint32_t b = 0; b < EVAL_BUDGETS; b++) {
		uint32_t m = METRIC_EVICTED + UTILITY_MEAN * EVAL_BUDGETS + b;

		fprintf(f, "%.0f", (double)eval_budget[b] * 100);
		for (uint32_t p = 0; p < r->rivals->n; p++)
			if (everybody(&r->rivals->r[p]))
				fprintf(f, ",%.6g", (double)s->point[p * METRICS + m]);
		fputc('\n', f);
	}
	return report_close(r, f, "plot_evicted.csv");
}

static int plot_lanes(const struct report *r, struct report_data *d)
{
	FILE *f = report_open(r, "plot_lanes.csv");

	if (!f)
		return -EIO;
	heads(f, r, "lane", lane_plot);
	for (uint32_t l = 0; l < r->table->lanes; l++) {
		fprintf(f, "%u", r->table->lane[l]);
		for (uint32_t p = 0; p < r->rivals->n; p++)
			if (lane_plot(&r->rivals->r[p]))
				fprintf(f, ",%.6g", (double)d->lane[(size_t)l * r->rivals->n + p].mean);
		fputc('\n', f);
	}
	return report_close(r, f, "plot_lanes.csv");
}

/* Rows are the length slices; three columns a network: share and its interval. */
static int plot_gap(const struct report *r, struct report_data *d)
{
	FILE *f = report_open(r, "plot_gap.csv");

	if (!f)
		return -EIO;
	fprintf(f, "prompt");
	for (uint32_t p = 0; p < r->rivals->n; p++)
		if (networks(&r->rivals->r[p]))
			fprintf(f, ",%s,lo,hi", r->rivals->r[p].name);
	fputc('\n', f);
	for (uint32_t s = 0; s < d->n && d->best >= 0 && d->oracle >= 0; s++) {
		if (!d->slice[s].length || (int)s == d->to_4k)
			continue;
		fprintf(f, "%s", d->slice[s].name);
		for (uint32_t p = 0; p < r->rivals->n; p++) {
			struct interval i;

			if (!networks(&r->rivals->r[p]))
				continue;
			i = slice_share(&d->slice[s], p, (uint32_t)d->best, (uint32_t)d->oracle, d->scratch);
			fprintf(f, ",%.6g,%.6g,%.6g", (double)i.mean, (double)i.lo, (double)i.hi);
		}
		fputc('\n', f);
	}
	return report_close(r, f, "plot_gap.csv");
}

int report_plots(const struct report *r, struct report_data *d)
{
	int e = plot_evicted(r, d);

	if (e == 0)
		e = plot_lanes(r, d);
	return e == 0 ? plot_gap(r, d) : e;
}
