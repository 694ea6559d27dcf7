/* SPDX-License-Identifier: MIT */
/* Slices of the test cuts, averaged by source document and resampled. */
#include <errno.h>
#include <math.h>
#include <string.h>
#include "policy/eval/report.h"
#include "shm/util.h"

static bool inside(const struct report *r, const struct slice_def *d, const struct eval_item *it)
{
	if (d->attainable && !it->attainable)
		return false;
	switch (d->kind) {
	case SLICE_MAIN:
		return !it->held_out && !it->long_doc && it->prompt <= EVAL_MAIN_ROWS;
	case SLICE_HELD_OUT:
		return it->held_out;
	case SLICE_LONG:
		return it->long_doc;
	case SLICE_BEFORE:
		return it->flags & TRACE_CUT_BEFORE;
	case SLICE_AFTER:
		return !(it->flags & TRACE_CUT_BEFORE);
	case SLICE_LENGTH:
		return it->prompt > d->from && it->prompt <= d->to;
	case SLICE_DOMAIN:
		return r->set->doc[it->doc].domain == d->domain;
	default:
		return true;
	}
}

static void name_slice(const struct report *r, const struct slice_def *d, char *name, size_t size)
{
	static const char *const names[] = {
		"all", "main", "held-out-domain", "held-out-length", "before-question", "after-question"};

	if (d->kind == SLICE_DOMAIN)
		snprintf(name, size, "domain-%s", r->set->domain[d->domain]);
	else if (d->kind == SLICE_LENGTH && d->to == UINT32_MAX)
		snprintf(name, size, "over-%u", d->from);
	else if (d->kind == SLICE_LENGTH)
		snprintf(name, size, "%u-to-%u", d->from, d->to);
	else
		snprintf(name, size, "%s", names[d->kind]);
}

/* A mean that leaves NaN out: sums and counts, then divided. */
static void add(float *sum, float *count, size_t at, float value)
{
	if (isnan(value))
		return;
	sum[at] += value;
	count[at]++;
}

static void divide(float *sum, const float *count, size_t n)
{
	for (size_t i = 0; i < n; i++)
		sum[i] = count[i] > 0 ? sum[i] / count[i] : NAN;
}

/* Sum the items of the slice into clusters; `place` maps the set's clusters to the slice's. */
static void sum_items(struct slice *s, const struct report *r, const struct slice_def *d, const int *place,
		      float *regret_count, float *metric_count)
{
	const struct eval_table *t = r->table;
	uint32_t policies = t->policies;

	for (uint32_t i = 0; i < t->items; i++) {
		const struct eval_item *it = &r->set->item[i];
		uint32_t c = (uint32_t)place[r->set->doc[it->doc].cluster];

		if (!inside(r, d, it))
			continue;
		for (uint32_t lane = 0; lane < t->lanes; lane++) {
			const float *v = eval_at(t, i, lane, 0);
			size_t at = ((size_t)lane * s->clusters + c) * policies;

			for (uint32_t p = 0; p < policies; p++)
				add(s->regret, regret_count, at + p, v[p * METRICS + METRIC_REGRET]);
			for (uint32_t k = 0; k < s->columns; k++)
				add(s->metric, metric_count, (size_t)c * s->columns + k,
				    v[k / s->metrics * METRICS + k % s->metrics]);
		}
	}
}

static int place_clusters(struct slice *s, const struct report *r, const struct slice_def *d, int *place)
{
	for (uint32_t c = 0; c < r->set->clusters; c++)
		place[c] = -1;
	for (uint32_t i = 0; i < r->set->items; i++) {
		int *at = &place[r->set->doc[r->set->item[i].doc].cluster];

		if (!inside(r, d, &r->set->item[i]))
			continue;
		s->items++;
		if (*at < 0)
			*at = (int)s->clusters++;
	}
	return s->items ? 0 : -ENODATA;
}

int slice_make(struct slice *ret, const struct report *r, const struct slice_def *d)
{
	_cleanup_free_ int *place = calloc(r->set->clusters + 1, sizeof(*place));
	_cleanup_free_ float *regret_count = NULL, *metric_count = NULL;
	uint32_t metrics = d->attainable ? 1 : METRICS, columns = r->table->policies * metrics;
	struct slice s = {.metrics = metrics, .columns = columns};
	size_t regrets, values;
	int e;

	if (!place)
		return -ENOMEM;
	e = place_clusters(&s, r, d, place);
	if (e < 0)
		return e;
	name_slice(r, d, s.name, sizeof(s.name));
	s.length = d->kind == SLICE_LENGTH;
	regrets = (size_t)r->table->lanes * s.clusters * r->table->policies;
	values = (size_t)s.clusters * columns;
	regret_count = calloc(regrets, sizeof(float));
	metric_count = calloc(values, sizeof(float));
	s.regret = calloc(regrets, sizeof(float));
	s.metric = calloc(values, sizeof(float));
	s.point = calloc(columns, sizeof(float));
	s.mean = calloc((size_t)r->resamples * columns, sizeof(float));
	e = boot_init(&s.boot, r->resamples, s.clusters, r->seed);
	if (e == 0 && (!regret_count || !metric_count || !s.regret || !s.metric || !s.point || !s.mean))
		e = -ENOMEM;
	if (e == 0) {
		sum_items(&s, r, d, place, regret_count, metric_count);
		divide(s.regret, regret_count, regrets);
		divide(s.metric, metric_count, values);
		e = boot_means(&s.boot, s.metric, columns, s.point, s.mean);
	}
	if (e < 0) {
		slice_done(&s);
		return e;
	}
	*ret = s;
	return 0;
}

void slice_done(struct slice *s)
{
	boot_done(&s->boot);
	free(s->regret);
	free(s->metric);
	free(s->point);
	free(s->mean);
	*s = (struct slice){0};
}

/* One resample's mean of a metric of a policy. */
static float draw(const struct slice *s, uint32_t b, uint32_t policy, uint32_t metric)
{
	return s->mean[(size_t)b * s->columns + policy * s->metrics + metric];
}

struct interval slice_mean(const struct slice *s, uint32_t policy, uint32_t metric, float *scratch)
{
	for (uint32_t b = 0; b < s->boot.resamples; b++)
		scratch[b] = draw(s, b, policy, metric);
	return boot_interval(s->point[policy * s->metrics + metric], scratch, s->boot.resamples);
}

struct interval slice_difference(const struct slice *s, uint32_t policy, uint32_t than, uint32_t metric,
				 double *p, float *scratch)
{
	float point = s->point[policy * s->metrics + metric] - s->point[than * s->metrics + metric];

	for (uint32_t b = 0; b < s->boot.resamples; b++)
		scratch[b] = draw(s, b, policy, metric) - draw(s, b, than, metric);
	*p = boot_p(scratch, s->boot.resamples);
	return boot_interval(point, scratch, s->boot.resamples);
}

static float share(float from, float policy, float to)
{
	return from - to > 1e-6f ? (from - policy) / (from - to) : NAN;
}

void slice_share_draws(const struct slice *s, uint32_t policy, uint32_t from, uint32_t to, float *draws)
{
	for (uint32_t b = 0; b < s->boot.resamples; b++)
		draws[b] = share(draw(s, b, from, METRIC_REGRET), draw(s, b, policy, METRIC_REGRET),
				 draw(s, b, to, METRIC_REGRET));
}

struct interval slice_share(const struct slice *s, uint32_t policy, uint32_t from, uint32_t to, float *scratch)
{
	slice_share_draws(s, policy, from, to, scratch);
	return boot_interval(
		share(s->point[from * s->metrics], s->point[policy * s->metrics], s->point[to * s->metrics]),
		scratch, s->boot.resamples);
}
