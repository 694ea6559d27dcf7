/* SPDX-License-Identifier: MIT */
/* Which slices there are, and every file that a run leaves. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include "policy/eval/report.h"
#include "shm/util.h"

#define FIXED_SLICES 11u

FILE *report_open(const struct report *r, const char *name)
{
	char path[4096];
	FILE *f;

	snprintf(path, sizeof(path), "%s/%s", r->out, name);
	f = fopen(path, "we");
	if (!f)
		snprintf(r->err, r->errsize, "%s: %s", path, strerror(errno));
	return f;
}

int report_close(const struct report *r, FILE *f, const char *name)
{
	int e = ferror(f) ? -EIO : 0;

	if (fclose(f) != 0)
		e = -errno;
	if (e < 0)
		snprintf(r->err, r->errsize, "%s/%s: %s", r->out, name, strerror(-e));
	return e;
}

static int add_slice(struct report_data *d, const struct report *r, const struct slice_def *def)
{
	struct slice_def reach = *def;
	int e = slice_make(&d->slice[d->n], r, def);

	if (e == -ENODATA)
		return 0;
	if (e < 0)
		return e;
	reach.attainable = true;
	e = slice_make(&d->attainable[d->n], r, &reach);
	if (e < 0 && e != -ENODATA)
		return e;
	if (def->kind == SLICE_MAIN)
		d->main = (int)d->n;
	if (def->kind == SLICE_LENGTH && def->from == 0 && def->to == 4096)
		d->to_4k = (int)d->n;
	if (def->kind == SLICE_LENGTH && def->from == 2048)
		d->near_4k = (int)d->n;
	if (def->kind == SLICE_LENGTH && def->to == UINT32_MAX)
		d->over_4k = (int)d->n;
	d->n++;
	return 0;
}

static int make_slices(struct report_data *d, const struct report *r)
{
	static const struct slice_def fixed[FIXED_SLICES] = {
		{.kind = SLICE_MAIN},
		{.kind = SLICE_ALL},
		{.kind = SLICE_HELD_OUT},
		{.kind = SLICE_LONG},
		{.kind = SLICE_BEFORE},
		{.kind = SLICE_AFTER},
		{.kind = SLICE_LENGTH, .from = 0, .to = 1024},
		{.kind = SLICE_LENGTH, .from = 1024, .to = 2048},
		{.kind = SLICE_LENGTH, .from = 2048, .to = 4096},
		{.kind = SLICE_LENGTH, .from = 0, .to = 4096},
		{.kind = SLICE_LENGTH, .from = 4096, .to = UINT32_MAX},
	};
	int e = 0;

	d->main = d->to_4k = d->near_4k = d->over_4k = -1;
	for (uint32_t i = 0; e == 0 && i < FIXED_SLICES; i++)
		e = add_slice(d, r, &fixed[i]);
	for (uint32_t i = 0; e == 0 && i < r->set->domains; i++)
		e = add_slice(d, r, &(struct slice_def){.kind = SLICE_DOMAIN, .domain = i});
	if (d->main < 0)
		d->main = 0; /* only held-out cuts: they are what there is */
	return e;
}

static int prepare(struct report_data *d, const struct report *r)
{
	uint32_t most = FIXED_SLICES + r->set->domains, lanes = r->table->lanes;
	int e;

	*d = (struct report_data){.best = r->chosen ? rival_find(r->rivals, HOW_BEST) : -1,
				  .oracle = rival_find(r->rivals, HOW_ORACLE),
				  .reach = rival_find(r->rivals, HOW_ATTAINABLE)};
	d->slice = calloc(most, sizeof(*d->slice));
	d->attainable = calloc(most, sizeof(*d->attainable));
	d->wins = calloc(most, sizeof(*d->wins));
	d->lane = calloc((size_t)lanes * r->table->policies, sizeof(*d->lane));
	d->scratch = malloc(2ul * r->resamples * sizeof(*d->scratch));
	if (!d->slice || !d->attainable || !d->wins || !d->lane || !d->scratch)
		return -ENOMEM;
	e = make_slices(d, r);
	for (uint32_t i = 0; e == 0 && i < d->n; i++)
		e = slice_wins(r, &d->slice[i], d->wins[i], (int)i == d->main ? d->lane : NULL);
	return e;
}

static void release(struct report_data *d)
{
	for (uint32_t i = 0; i < d->n; i++) {
		slice_done(&d->slice[i]);
		slice_done(&d->attainable[i]);
	}
	free(d->slice);
	free(d->attainable);
	free(d->wins);
	free(d->lane);
	free(d->scratch);
}

int report_write(const struct report *r)
{
	struct report_data d;
	int e;

	snprintf(r->err, r->errsize, "memory: not enough for the report");
	e = prepare(&d, r);
	if (e == 0)
		e = report_csv(r, &d);
	if (e == 0)
		e = report_plots(r, &d);
	if (e == 0)
		e = report_markdown(r, &d);
	release(&d);
	return e;
}
