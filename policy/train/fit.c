/* SPDX-License-Identifier: MIT */
#include "policy/train/fit.h"
#include "policy/train/objective.h"
#include "shm/util.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static const double budgets[] = {0.1, 0.2, 0.3, 0.5};

struct calibrate_shape fit_shape(const struct set *s)
{
	return (struct calibrate_shape){
		.lanes = s->model.layers * s->model.heads,
		.knots = CALIBRATE_KNOTS,
		.lengths = 2,
		.distances = 2,
		.length_edge = {1536},
		.distance_edge = {256},
	};
}

uint64_t fit_bytes(const struct set *s)
{
	struct calibrate_shape shape = fit_shape(s);

	return calibrate_bytes(&shape);
}

void scores_drop(struct split_scores *x)
{
	for (uint32_t i = 0; i < x->n; i++) {
		free(x->unit[i].row);
		free(x->unit[i].score);
	}
	free(x->unit);
	memset(x, 0, sizeof(*x));
}

static int keep_unit(struct split_scores *to, const struct train_batch *t, uint32_t slot, const float *score,
		     uint32_t lanes, uint32_t rows)
{
	struct scored *more = realloc(to->unit, (to->n + 1) * sizeof(*more)), *u;

	if (!more)
		return -ENOMEM;
	to->unit = more;
	u = &more[to->n++];
	*u = (struct scored){.unit = t->unit[slot], .n = t->n[slot]};
	u->row = malloc(u->n * sizeof(*u->row));
	u->score = malloc((size_t)lanes * u->n * sizeof(*u->score));
	if (!u->row || !u->score)
		return -ENOMEM;
	memcpy(u->row, t->row + (size_t)slot * rows, u->n * sizeof(*u->row));
	for (uint32_t lane = 0; lane < lanes; lane++)
		memcpy(u->score + (size_t)lane * u->n, score + ((size_t)lane * t->units + slot) * rows,
		       u->n * sizeof(*u->score));
	return 0;
}

static int score_by_backend(struct run *r, const void *arg, uint32_t split, struct split_scores *ret)
{
	uint32_t lanes = r->o.t.lanes, rows = r->o.t.rows;
	_cleanup_free_ float *score = calloc((size_t)lanes * r->o.t.batch * rows, sizeof(*score));
	const struct train_batch *t;
	struct sampler *p;
	int x = score ? sampler_new(&p, r->set, split, &r->o.t) : -ENOMEM;

	if (x < 0)
		return x;
	for (uint32_t from = 0; x == 0 && (t = sampler_fixed(p, from)); from += t->units) {
		x = r->backend->ops->scores(r->backend, TRAIN_PARAMS, t, score);
		if (x < 0)
			snprintf(r->error, sizeof(r->error), "%s", r->backend->ops->error(r->backend));
		for (uint32_t s = 0; x == 0 && s < t->units; s++)
			x = keep_unit(ret, t, s, score, lanes, rows);
	}
	sampler_free(p);
	return x;
}

static uint32_t distance_of(const struct set *s, const struct set_unit *u, uint32_t row)
{
	return u->prompt - 1 - s->doc[u->doc].pos[row];
}

static int fit_lane(struct run *r, const struct split_scores *in, uint32_t lane, float sensitivity,
		    struct calibrate_point *points, float *table)
{
	struct calibrate_shape shape = fit_shape(r->set);
	size_t count = 0;

	for (uint32_t i = 0; i < in->n; i++) {
		const struct scored *x = &in->unit[i];
		const struct set_unit *u = &r->set->unit[x->unit];

		for (uint32_t k = 0; k < x->n; k++)
			points[count++] = (struct calibrate_point){
				.score = x->score[(size_t)lane * x->n + k],
				.value = u->mean[(size_t)lane * u->rows + x->row[k]],
				.distance = distance_of(r->set, u, x->row[k]),
				.n = u->prompt,
			};
	}
	return calibrate_fit(table, &shape, r->o.s.lane_first + lane, sensitivity, points, count);
}

/* Mean VNORM of each lane over the mean of all; 1 where traces do not say. */
static void sensitivities(const struct set *s, float *out)
{
	double total = 0;

	for (uint32_t lane = 0; lane < s->o.lanes; lane++) {
		double sum = 0;
		uint32_t n = 0;

		for (uint32_t d = 0; d < s->docs; d++) {
			double v = s->vnorm[(size_t)d * s->o.lanes + lane];

			sum += v;
			n += v > 0;
		}
		out[lane] = n ? (float)(sum / n) : 0;
		total += (double)out[lane];
	}
	for (uint32_t lane = 0; lane < s->o.lanes; lane++)
		out[lane] = total > 0 ? (float)((double)out[lane] * s->o.lanes / total) : 1;
}

/* Slope through the origin of kept on predicted attention. */
static double slope_of_lane(struct run *r, const struct split_scores *in, const struct calibration *c,
			    uint32_t lane, struct objective_scratch *x, uint32_t *order)
{
	double cross = 0, square = 0;

	for (uint32_t i = 0; i < in->n; i++) {
		const struct scored *s = &in->unit[i];
		const struct set_unit *u = &r->set->unit[s->unit];
		const float *score = s->score + (size_t)lane * s->n;
		double kept = 0, predicted = 0;
		size_t b = 0;

		objective_order(order, score, s->n, x);
		for (uint32_t k = 0; k < s->n && b < ARRAY_SIZE(budgets); k++) {
			uint32_t at = order[k], row = s->row[at];

			kept += (double)u->mean[(size_t)lane * u->rows + row];
			predicted += (double)calibrate_value(c, r->o.s.lane_first + lane, score[at],
							     distance_of(r->set, u, row), u->prompt);
			if (k + 1 < (uint32_t)(budgets[b] * s->n))
				continue;
			cross += kept * predicted;
			square += predicted * predicted;
			b++;
		}
	}
	return square > 0 ? cross / square : NAN;
}

static int ascending(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return x < y ? -1 : x > y;
}

static int verify(struct run *r, const struct fit_source *from, const struct calibration *c,
		  struct fit_slopes *ret)
{
	uint32_t lanes = r->o.t.lanes, within = 0;
	_cleanup_free_ uint32_t *order = calloc(MAX(r->o.t.rows, 1024u), sizeof(*order));
	_cleanup_free_ double *sorted = calloc(lanes, sizeof(*sorted));
	struct objective_scratch *x = NULL;
	struct split_scores in = {0};
	int e = from->score(r, from->arg, TRACE_VALID, &in);

	ret->lane = calloc(lanes, sizeof(*ret->lane));
	if (!order || !sorted || !ret->lane || objective_scratch_new(&x, MAX(r->o.t.rows, 1024u)) < 0)
		e = e < 0 ? e : -ENOMEM;
	for (uint32_t lane = 0; e == 0 && lane < lanes; lane++) {
		double slope = slope_of_lane(r, &in, c, lane, x, order);

		ret->lane[lane] = slope;
		sorted[lane] = isfinite(slope) ? slope : 0;
		within += slope >= 0.9 && slope <= 1.1;
	}
	if (e == 0) {
		qsort(sorted, lanes, sizeof(*sorted), ascending);
		ret->median = (sorted[lanes / 2] + sorted[(lanes - 1) / 2]) / 2;
		ret->within = (double)within / lanes;
	}
	objective_scratch_free(x);
	scores_drop(&in);
	return e;
}

int fit_from(struct run *r, const struct fit_source *from, float *table, struct fit_slopes *ret)
{
	struct calibrate_shape shape = fit_shape(r->set);
	_cleanup_free_ float *sensitivity = calloc(r->o.t.lanes, sizeof(*sensitivity));
	_cleanup_free_ struct calibrate_point *points = NULL;
	struct split_scores in = {0};
	struct calibration c;
	size_t count = 0;
	int x = from->score(r, from->arg, TRACE_CALIB, &in);

	for (uint32_t i = 0; i < in.n; i++)
		count += in.unit[i].n;
	points = calloc(count + 1, sizeof(*points));
	if (x == 0 && (!points || !sensitivity))
		x = -ENOMEM;
	if (x == 0) {
		calibrate_begin(table, &shape);
		sensitivities(r->set, sensitivity);
	}
	for (uint32_t lane = 0; x == 0 && lane < r->o.t.lanes; lane++)
		x = fit_lane(r, &in, lane, sensitivity[lane], points, table);
	scores_drop(&in);
	if (x == 0)
		x = calibrate_parse(&c, table, calibrate_bytes(&shape), shape.lanes, r->error,
				    sizeof(r->error));
	if (x == 0)
		x = verify(r, from, &c, ret);
	if (x < 0 && !*r->error)
		snprintf(r->error, sizeof(r->error), "calibration: %s", strerror(-x));
	return x;
}

int fit_table(struct run *r, float *table, struct fit_slopes *ret)
{
	const struct fit_source backend = {.score = score_by_backend};

	return fit_from(r, &backend, table, ret);
}

int fit_image(struct run *r, uint8_t *image, struct fit_slopes *ret)
{
	return fit_table(r, (float *)(image + ((struct weights_header *)image)->calib_off), ret);
}
