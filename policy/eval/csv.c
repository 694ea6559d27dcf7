/* SPDX-License-Identifier: MIT */
/* The CSV files: long tables, one value a line, with its interval. */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include "policy/eval/report.h"
#include "shm/util.h"

static const char *const among_name[AMONG] = {"heuristics", "heuristics-position-qfilter"};

static const struct rival *rival(const struct report *r, uint32_t p)
{
	return &r->rivals->r[p];
}

static void put(FILE *f, struct interval i)
{
	fprintf(f, "%.6g,%.6g,%.6g", (double)i.mean, (double)i.lo, (double)i.hi);
}

/* slice,policy,kind,metric,mean,lo,hi,documents,cuts */
static int write_policies(const struct report *r, struct report_data *d)
{
	FILE *f = report_open(r, "policies.csv");
	char metric[40];

	if (!f)
		return -EIO;
	fprintf(f, "slice,policy,kind,metric,mean,lo,hi,documents,cuts\n");
	for (uint32_t s = 0; s < d->n; s++)
		for (uint32_t p = 0; p < r->rivals->n; p++)
			for (uint32_t m = 0; m < METRICS; m++) {
				struct interval i = slice_mean(&d->slice[s], p, m, d->scratch);

				if (isnan(i.mean))
					continue;
				metric_name(m, metric, sizeof(metric));
				fprintf(f, "%s,%s,%s,%s,", d->slice[s].name, rival(r, p)->name,
					rival_role_name(rival(r, p)->role), metric);
				put(f, i);
				fprintf(f, ",%u,%u\n", d->slice[s].clusters, d->slice[s].items);
			}
	return report_close(r, f, "policies.csv");
}

/* lane,policy,regret,lo,hi of the main slice */
static int write_lanes(const struct report *r, struct report_data *d)
{
	FILE *f = report_open(r, "lanes.csv");
	uint32_t policies = r->rivals->n;

	if (!f)
		return -EIO;
	fprintf(f, "lane,policy,regret,lo,hi,best_heuristic\n");
	for (uint32_t l = 0; l < r->table->lanes; l++)
		for (uint32_t p = 0; p < policies; p++) {
			if (isnan(d->lane[(size_t)l * policies + p].mean))
				continue;
			fprintf(f, "%u,%s,", r->table->lane[l], rival(r, p)->name);
			put(f, d->lane[(size_t)l * policies + p]);
			fprintf(f, ",%s\n", r->chosen ? rival(r, r->chosen[l])->name : "");
		}
	return report_close(r, f, "lanes.csv");
}

/* slice,policy,among,lanes,lowest,sure */
static int write_wins(const struct report *r, struct report_data *d)
{
	FILE *f = report_open(r, "wins.csv");

	if (!f)
		return -EIO;
	fprintf(f, "slice,policy,kind,among,lanes,lowest,interval_excludes_0\n");
	for (uint32_t s = 0; s < d->n; s++)
		for (uint32_t p = 0; p < r->rivals->n; p++)
			for (int a = 0; a < AMONG; a++) {
				const struct wins *w = &d->wins[s][p][a];

				if (w->lanes && rival(r, p)->role < RIVAL_ORACLE)
					fprintf(f, "%s,%s,%s,%s,%u,%u,%u\n", d->slice[s].name,
						rival(r, p)->name, rival_role_name(rival(r, p)->role),
						among_name[a], w->lanes, w->lowest, w->sure);
			}
	return report_close(r, f, "wins.csv");
}

static void write_share(FILE *f, const struct report *r, const struct slice *s, const char *to_name, int to,
			struct report_data *d)
{
	if (!s->items || to < 0)
		return;
	for (uint32_t p = 0; p < r->rivals->n; p++) {
		struct interval i = slice_share(s, p, (uint32_t)d->best, (uint32_t)to, d->scratch);

		if (rival(r, p)->role >= RIVAL_ORACLE || isnan(i.mean))
			continue;
		fprintf(f, "%s,%s,%s,", s->name, rival(r, p)->name, to_name);
		put(f, i);
		fprintf(f, ",%u,%u\n", s->clusters, s->items);
	}
}

/* How much of the share in a slice of shorter prompts is left over 4k. The slices are drawn independently. */
static void write_length(FILE *f, const struct report *r, struct report_data *d, int shorter)
{
	uint32_t best = (uint32_t)d->best, oracle = (uint32_t)d->oracle, n = r->resamples;
	float *lower = d->scratch + n;

	if (shorter < 0 || d->over_4k < 0 || d->oracle < 0)
		return;
	for (uint32_t p = 0; p < r->rivals->n; p++) {
		const struct slice *a = &d->slice[d->over_4k], *b = &d->slice[shorter];
		float point;

		if (rival(r, p)->role >= RIVAL_ORACLE)
			continue;
		point = slice_share(a, p, best, oracle, d->scratch).mean /
			slice_share(b, p, best, oracle, lower).mean;
		slice_share_draws(a, p, best, oracle, d->scratch);
		slice_share_draws(b, p, best, oracle, lower);
		for (uint32_t i = 0; i < n; i++)
			d->scratch[i] /= lower[i];
		fprintf(f, "%s / %s,%s,oracle,", a->name, b->name, rival(r, p)->name);
		put(f, boot_interval(point, d->scratch, n));
		fprintf(f, ",%u,%u\n", a->clusters, a->items);
	}
}

/* slice,policy,to,share,lo,hi,documents,cuts */
static int write_gap(const struct report *r, struct report_data *d)
{
	FILE *f = report_open(r, "gap.csv");

	if (!f)
		return -EIO;
	fprintf(f, "slice,policy,to,share,lo,hi,documents,cuts\n");
	for (uint32_t s = 0; s < d->n && d->best >= 0; s++) {
		write_share(f, r, &d->slice[s], "oracle", d->oracle, d);
		write_share(f, r, &d->attainable[s], "attainable-oracle", d->reach, d);
	}
	if (d->best >= 0) {
		write_length(f, r, d, d->to_4k);
		write_length(f, r, d, d->near_4k);
	}
	return report_close(r, f, "gap.csv");
}

/* Evicted utility less the best heuristic's, tested at five budgets: Holm over them. */
static void write_budget(FILE *f, const struct report *r, struct report_data *d, const struct slice *s,
			 uint32_t p, int utility)
{
	struct interval own[EVAL_BUDGETS], less[EVAL_BUDGETS];
	double raw[EVAL_BUDGETS], holm[EVAL_BUDGETS];
	uint32_t tested[EVAL_BUDGETS], n = 0;
	char metric[40];

	for (uint32_t b = 0; b < EVAL_BUDGETS; b++) {
		uint32_t m = METRIC_EVICTED + (uint32_t)utility * EVAL_BUDGETS + b;

		own[n] = slice_mean(s, p, m, d->scratch);
		if (isnan(own[n].mean))
			continue;
		less[n] = slice_difference(s, p, (uint32_t)d->best, m, &raw[n], d->scratch);
		holm[n] = raw[n];
		tested[n++] = m;
	}
	boot_holm(holm, n);
	for (uint32_t i = 0; i < n; i++) {
		metric_name(tested[i], metric, sizeof(metric));
		fprintf(f, "%s,%s,%s,", s->name, rival(r, p)->name, metric);
		put(f, own[i]);
		fputc(',', f);
		put(f, less[i]);
		fprintf(f, ",%.3g,%.3g\n", raw[i], holm[i]);
	}
}

static int write_budgets(const struct report *r, struct report_data *d)
{
	FILE *f = report_open(r, "budgets.csv");

	if (!f)
		return -EIO;
	fprintf(f, "slice,policy,metric,mean,lo,hi,less_best,less_lo,less_hi,p,p_holm\n");
	for (uint32_t s = 0; s < d->n && d->best >= 0; s++)
		for (uint32_t p = 0; p < r->rivals->n; p++)
			for (int u = 0; u < UTILITIES && rival(r, p)->role < RIVAL_ORACLE; u++)
				write_budget(f, r, d, &d->slice[s], p, u);
	return report_close(r, f, "budgets.csv");
}

int report_csv(const struct report *r, struct report_data *d)
{
	int e = write_policies(r, d);

	if (e == 0)
		e = write_lanes(r, d);
	if (e == 0)
		e = write_wins(r, d);
	if (e == 0)
		e = write_gap(r, d);
	return e == 0 ? write_budgets(r, d) : e;
}
