/* SPDX-License-Identifier: MIT */
/* Calibration without training: of a weight file, or of a policy that needs none. */
#include "policy/learned.h"
#include "policy/train/fit.h"
#include "policy/train/modes.h"
#include "shm/util.h"

#include <stdio.h>
#include <string.h>

static void report(const struct run *r, const char *what, const struct fit_slopes *s)
{
	printf("%s: %s calibrated on %u units, slope of kept on predicted attention: median %.3f, %.0f %% of "
	       "lanes "
	       "within 0.9-1.1\n",
	       r->o.out, what, r->set->units, s->median, 100 * s->within);
	for (uint32_t lane = 0; r->o.csv && lane < r->o.t.lanes; lane++)
		printf("lane %u slope %.4f\n", lane, s->lane[lane]);
}

/* The weights as the run's network, and the traces of the two splits behind it. */
static int open_file(struct run *r, struct options *o, const struct weights *w)
{
	const struct train_backend_ops *ops;
	_cleanup_free_ float *p = NULL;
	int x;

	r->o = o->run;
	r->o.t.shape = w->h;
	r->progress = progress_new(o->run.quiet);
	x = run_device(&ops, o->run.device, r->error, sizeof(r->error));
	if (x == 0)
		x = net_init(&r->net, &w->h, r->error, sizeof(r->error));
	if (x == 0)
		x = set_plan(&r->set, &r->o.s, r->error, sizeof(r->error));
	if (x < 0)
		return x;
	if (r->set->model.k_dim != w->h.k_dim || r->set->model.v_dim != w->h.v_dim ||
	    strcmp(r->set->model.model, w->h.name) != 0) {
		snprintf(r->error, sizeof(r->error), "%s is for model %s, the traces are of %s", o->subject,
			 w->h.name, r->set->model.model);
		return -EINVAL;
	}
	x = ops->open(&r->backend, &r->o.t, &r->set->shape, r->error, sizeof(r->error));
	if (x == 0)
		x = set_load(r->set, r->backend, &r->o.t.shape, NULL, NULL, r->error, sizeof(r->error));
	p = calloc(r->net.params, sizeof(*p));
	if (x == 0 && !p)
		x = -ENOMEM;
	for (uint32_t lane = 0; x == 0 && lane < w->lanes; lane++) {
		for (size_t i = 0; i < r->net.params; i++)
			p[i] = w->layout.elem == 2 ? bf16_float(((const uint16_t *)weights_at(w, lane, 0))[i])
						   : ((const float *)weights_at(w, lane, 0))[i];
		x = ops->set(r->backend, TRAIN_PARAMS, lane, p);
	}
	return x;
}

static int write_file(struct run *r, const struct weights *w, struct fit_slopes *slopes)
{
	_cleanup_free_ uint8_t *image = NULL;
	int x = weights_image_new(&image, &w->h, fit_bytes(r->set), r->error, sizeof(r->error));

	if (x < 0)
		return x;
	memcpy(weights_image_at(image, 0, 0), weights_at(w, 0, 0), w->lanes * w->h.lane_stride);
	*r->error = 0;
	x = fit_image(r, image, slopes);
	if (x < 0)
		return x;
	x = weights_image_seal(image, ((struct weights_header *)image)->total_size);
	if (x == 0)
		x = weights_image_write(image, r->o.out);
	if (x < 0)
		snprintf(r->error, sizeof(r->error), "%s: %s", r->o.out, strerror(-x));
	return x;
}

static int calibrate_weights(struct options *o, struct run *r)
{
	struct fit_slopes slopes = {0};
	struct weights *w;
	int x = weights_load(&w, o->subject, r->error, sizeof(r->error));

	if (x < 0)
		return x;
	if (w->h.kind == WEIGHTS_QFILTER) {
		snprintf(r->error, sizeof(r->error),
			 "%s: of kind qfilter, use --calibrate-policy qfilter --base", o->subject);
		x = -EINVAL;
	} else {
		x = open_file(r, o, w);
	}
	if (x == 0)
		x = write_file(r, w, &slopes);
	if (x == 0)
		report(r, weights_kind_name(w->h.kind), &slopes);
	free(slopes.lane);
	weights_free(w);
	return x;
}

static int calibrate_policy(struct options *o, struct run *r)
{
	struct fit_slopes slopes = {0};
	_cleanup_free_ float *table = NULL;
	struct calibrate_shape shape;
	int x;

	r->o = o->run;
	r->o.t.shape.kind = WEIGHTS_POSITION; /* only utilities are loaded */
	x = set_plan(&r->set, &r->o.s, r->error, sizeof(r->error));
	if (x == 0)
		x = set_load(r->set, NULL, &r->o.t.shape, NULL, NULL, r->error, sizeof(r->error));
	if (x < 0)
		return x;
	shape = fit_shape(r->set);
	table = calloc(1, calibrate_bytes(&shape));
	*r->error = 0;
	x = table ? fit_policy(r, o->subject, table, &slopes) : -ENOMEM;
	if (x == 0) {
		x = calibrate_write(r->o.out, table, &shape, o->subject, r->set->model.model);
		if (x < 0)
			snprintf(r->error, sizeof(r->error), "%s: %s", r->o.out, strerror(-x));
	}
	if (x == 0)
		report(r, o->subject, &slopes);
	free(slopes.lane);
	return x;
}

int mode_calibrate(struct options *o)
{
	struct run r = {0};
	int x = mode_prepare(o);

	if (x != 0)
		return x;
	if (o->lanes_given)
		return mode_fail("--lanes: a calibration is of all lanes");
	o->run.s.splits = o->run.s.keep_means = 1u << TRACE_CALIB | 1u << TRACE_VALID;
	x = o->mode == MODE_CALIBRATE_FILE ? calibrate_weights(o, &r) : calibrate_policy(o, &r);
	if (x < 0)
		mode_fail(*r.error ? r.error : strerror(-x));
	run_close(&r);
	return x < 0 ? 1 : 0;
}
