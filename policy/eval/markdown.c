/* SPDX-License-Identifier: MIT */
/* The summary that people read. */
#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include "policy/eval/report.h"
#include "shm/util.h"

static void cell(FILE *f, double scale, int digits, struct interval i)
{
	if (isnan(i.mean))
		fprintf(f, " – |");
	else
		fprintf(f, " %.*f [%.*f, %.*f] |", digits, scale * i.mean, digits, scale * i.lo, digits,
			scale * i.hi);
}

static void bare(FILE *f, double scale, int digits, float v)
{
	if (isnan(v))
		fprintf(f, " – |");
	else
		fprintf(f, " %.*f |", digits, scale * (double)v);
}

static const char *role(const struct report *r, uint32_t p)
{
	return rival_role_name(r->rivals->r[p].role);
}

/* Policies by regret in the slice. */
static void by_regret(const struct report *r, const struct slice *s, uint32_t *order)
{
	for (uint32_t i = 0; i < r->rivals->n; i++) {
		float v = s->point[i * METRICS];
		uint32_t at = i;

		for (; at > 0 &&
		       (isnan(s->point[order[at - 1] * METRICS]) || s->point[order[at - 1] * METRICS] > v);
		     at--)
			order[at] = order[at - 1];
		order[at] = i;
	}
}

static void lanes_cell(FILE *f, const struct report *r, const struct wins *w, uint32_t p)
{
	if (r->rivals->r[p].role >= RIVAL_ORACLE || !w[AMONG_STAR].lanes)
		fprintf(f, " – |");
	else
		fprintf(f, " %u (%u) / %u (%u) |", w[AMONG_STAR].lowest, w[AMONG_STAR].sure,
			w[AMONG_TRAINED].lowest, w[AMONG_TRAINED].sure);
}

static void policies_table(FILE *f, const struct report *r, struct report_data *d, const struct slice *s,
			   const struct wins (*wins)[AMONG])
{
	uint32_t order[RIVALS_MAX], m = METRIC_EVICTED + UTILITY_MEAN * EVAL_BUDGETS;

	by_regret(r, s, order);
	fprintf(f, "| policy | kind | regret | ratio | evicted %% at 5 | 10 | 20 | 30 | 50 %% | value-weighted "
		   "at 20 %% "
		   "| output error %% at 10 | 25 | 50 %% | lanes lowest |\n"
		   "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n");
	for (uint32_t i = 0; i < r->rivals->n; i++) {
		uint32_t p = order[i];
		const float *v = &s->point[p * METRICS];

		if (isnan(v[METRIC_REGRET]))
			continue;
		fprintf(f, "| %s | %s |", r->rivals->r[p].name, role(r, p));
		cell(f, 1, 3, slice_mean(s, p, METRIC_REGRET, d->scratch));
		bare(f, 1, 2, v[METRIC_RATIO]);
		for (uint32_t b = 0; b < EVAL_BUDGETS; b++)
			bare(f, 100, 1, v[m + b]);
		bare(f, 100, 1, v[METRIC_EVICTED + UTILITY_VALUE * EVAL_BUDGETS + 2]);
		for (uint32_t b = 0; b < EVAL_ERRORS; b++)
			bare(f, 100, 1, v[METRIC_ERROR + b]);
		lanes_cell(f, r, wins[p], p);
		fputc('\n', f);
	}
	fputc('\n', f);
}

/* Rows that say how good a learned policy is, by slice. */
static void slices_table(FILE *f, const struct report *r, struct report_data *d, uint32_t p)
{
	fprintf(f,
		"### %s\n\n| slice | documents | cuts | regret | best heuristic | lanes lowest among "
		"heuristics (sure) / "
		"with position and q-filters (sure) of %u | gap closed to the attainable oracle %% | to the "
		"raw oracle %% |\n"
		"|---|---|---|---|---|---|---|---|\n",
		r->rivals->r[p].name, r->table->lanes);
	for (uint32_t i = 0; i < d->n; i++) {
		const struct slice *s = &d->slice[i], *a = &d->attainable[i];
		uint32_t best = (uint32_t)d->best;
		const struct interval none = {NAN, NAN, NAN};

		fprintf(f, "| %s | %u | %u |", s->name, s->clusters, s->items);
		cell(f, 1, 3, slice_mean(s, p, METRIC_REGRET, d->scratch));
		bare(f, 1, 3, d->best >= 0 ? s->point[best * METRICS] : NAN);
		lanes_cell(f, r, d->wins[i][p], p);
		cell(f, 100, 1,
		     d->best >= 0 && d->reach >= 0 && a->items
			     ? slice_share(a, p, best, (uint32_t)d->reach, d->scratch)
			     : none);
		cell(f, 100, 1,
		     d->best >= 0 && d->oracle >= 0 ? slice_share(s, p, best, (uint32_t)d->oracle, d->scratch)
						    : none);
		fputc('\n', f);
	}
	fputc('\n', f);
}

static void distance_table(FILE *f, const struct report *r, const struct slice *s)
{
	uint32_t order[RIVALS_MAX];
	char name[40];

	by_regret(r, s, order);
	fprintf(f, "| policy | without the last 128 rows |");
	for (uint32_t b = 0; b < EVAL_BUCKETS; b++) {
		metric_name(METRIC_BUCKET + b, name, sizeof(name));
		fprintf(f, " %s |", name + sizeof("regret_") - 1);
	}
	fprintf(f, "\n|---|---|---|---|---|---|---|---|\n");
	for (uint32_t i = 0; i < r->rivals->n; i++) {
		const float *v = &s->point[order[i] * METRICS];

		if (isnan(v[METRIC_REGRET]))
			continue;
		fprintf(f, "| %s |", r->rivals->r[order[i]].name);
		bare(f, 1, 3, v[METRIC_FAR]);
		for (uint32_t b = 0; b < EVAL_BUCKETS; b++)
			bare(f, 1, 3, v[METRIC_BUCKET + b]);
		fputc('\n', f);
	}
	fputc('\n', f);
}

/* How many lanes each heuristic was chosen for. */
static void chosen_line(FILE *f, const struct report *r)
{
	uint32_t lanes[RIVALS_MAX] = {0};
	const char *comma = "";

	for (uint32_t l = 0; l < r->table->lanes; l++)
		lanes[r->chosen[l]]++;
	fprintf(f, "Best heuristic, chosen per lane on the validation traces (lanes):");
	for (uint32_t p = 0; p < r->rivals->n; p++) {
		if (!lanes[p])
			continue;
		fprintf(f, "%s %s (%u)", comma, r->rivals->r[p].name, lanes[p]);
		comma = ",";
	}
	fprintf(f, ".\n\n");
}

static void introduction(FILE *f, const struct report *r, const struct slice *s)
{
	fprintf(f, "# Trace evaluation of %s\n\n`%s`\n\n", r->set->shape.model, r->command);
	fprintf(f,
		"%u traces of %u source documents, %u cuts, %u lanes, %u policies. The first %u and the last "
		"%u rows "
		"of a prompt are kept by everybody and left out of every figure. Intervals: 95 %%, %u paired "
		"bootstrap "
		"resamples of source documents. Main: %u source documents, %u cuts, without domains and "
		"document "
		"lengths that validation does not have. Evicted utility is the group's mean; budgets that "
		"leave fewer "
		"than %u rows are left out. Lanes lowest: among the heuristics / with position-only and "
		"q-filters too; "
		"in brackets where the interval of the distance to the best of them excludes 0.\n\n",
		r->set->docs, r->set->clusters, r->set->items, r->table->lanes, r->rivals->n, PROTECT_FIRST,
		PROTECT_LAST, r->resamples, s->clusters, s->items, LEAST_KEPT);
	if (r->error_queries)
		fprintf(f, "Output errors: %u future queries of a cut, evenly spread; not of branches.\n\n",
			r->error_queries);
	if (r->chosen)
		chosen_line(f, r);
	else
		fprintf(f, "No validation traces: no best heuristic was chosen and no gap is given.\n\n");
}

int report_markdown(const struct report *r, struct report_data *d)
{
	const struct slice *s = &d->slice[d->main];
	FILE *f = report_open(r, "summary.md");
	static_assert(EVAL_BUCKETS == 6, "columns of the distance table");

	if (!f)
		return -EIO;
	introduction(f, r, s);
	fprintf(f, "## Policies (%s)\n\n", s->name);
	policies_table(f, r, d, s, d->wins[d->main]);
	fprintf(f, "## Learned policies by slice\n\n");
	for (uint32_t p = 0; p < r->rivals->n; p++)
		if (r->rivals->r[p].role == RIVAL_LEARNED)
			slices_table(f, r, d, p);
	fprintf(f, "## Regret by distance to the end (%s)\n\n", s->name);
	distance_table(f, r, s);
	return report_close(r, f, "summary.md");
}
