/* SPDX-License-Identifier: MIT */
#include "policy/train/run.h"
#include "policy/learned.h"
#include "shm/util.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#define LEAST_DOC_ROWS 128u

volatile sig_atomic_t run_stop;

void run_close(struct run *r)
{
	sampler_free(r->train);
	sampler_free(r->valid);
	if (r->backend)
		r->backend->ops->close(r->backend);
	set_free(r->set);
	progress_free(r->progress);
	free(r->best);
	free(r->best_regret);
	free(r->best_step);
	free(r->curve);
	memset(r, 0, sizeof(*r));
}

float run_lr(const struct run_opts *o, uint64_t step)
{
	double along;

	if (step < o->warmup)
		return o->lr * (0.01f + 0.99f * (float)step / (float)o->warmup);
	along = (double)(step - o->warmup) / (double)MAX(o->steps - o->warmup, (uint64_t)1);
	return o->lr_min + 0.5f * (o->lr - o->lr_min) * (float)(1 + cos(M_PI * MIN(along, 1.0)));
}

/* The set that fits into the backend's memory: fewer rows of each document until it does. */
static int plan(struct run *r, const struct train_backend_ops *ops)
{
	uint32_t before = r->o.resume && r->o.checkpoint ? checkpoint_doc_rows(r->o.checkpoint) : 0;
	uint64_t memory = ops->memory(), bytes;
	int x;

	if (before)
		r->o.s.doc_rows = before;
	for (;;) {
		x = set_plan(&r->set, &r->o.s, r->error, sizeof(r->error));
		if (x < 0)
			return x;
		r->o.t.shape.k_dim = r->set->model.k_dim;
		r->o.t.shape.v_dim = r->set->model.v_dim;
		bytes = ops->set_bytes(&r->o.t, &r->set->shape);
		if (bytes <= memory)
			return 0;
		if (before || r->o.s.doc_rows / 4 * 3 < LEAST_DOC_ROWS) {
			snprintf(r->error, sizeof(r->error),
				 "%s: %llu MiB of rows with --doc-rows %u, and %llu MiB of memory: use fewer "
				 "lanes",
				 ops->name, (unsigned long long)bytes >> 20, r->o.s.doc_rows,
				 (unsigned long long)memory >> 20);
			return -ENOMEM;
		}
		r->o.s.doc_rows = r->o.s.doc_rows / 4 * 3;
		set_free(r->set);
		r->set = NULL;
	}
}

/* What the traces say about the model goes into the weight file's header. */
static void take_model(struct run *r)
{
	const struct trace_header *t = &r->set->model;
	struct weights_header *h = &r->o.t.shape;

	memcpy(h->name, t->model, sizeof(h->name));
	h->layers = t->layers;
	h->heads = t->heads;
	h->k_dim = t->k_dim;
	h->v_dim = t->v_dim;
	h->rope_type = t->rope_type;
	h->rope_theta = t->rope_theta;
}

static int on_load(void *arg, uint32_t done, uint32_t docs)
{
	struct run *r = arg;
	char line[96];

	if (progress_due(r->progress)) {
		snprintf(line, sizeof(line), "loading %u/%u documents", done, docs);
		progress_draw(r->progress, line, (double)done / docs);
	}
	return run_stop;
}

static int start_lanes(struct run *r)
{
	const struct train_backend_ops *ops = r->backend->ops;
	int x = 0;

	for (uint32_t lane = 0; x == 0 && lane < r->o.t.lanes; lane++) {
		float *p = r->best + lane * r->net.params;

		net_random(&r->net, r->o.t.seed, r->o.s.lane_first + lane, p);
		r->best_regret[lane] = INFINITY;
		x = ops->set(r->backend, TRAIN_PARAMS, lane, p);
		if (x == 0)
			x = ops->set(r->backend, TRAIN_EMA, lane, p);
	}
	if (x < 0)
		snprintf(r->error, sizeof(r->error), "%s", ops->error(r->backend));
	return x;
}

static int allocate(struct run *r)
{
	size_t lanes = r->o.t.lanes;

	snprintf(r->error, sizeof(r->error), "out of memory");
	r->best = calloc(lanes * r->net.params, sizeof(*r->best));
	r->best_regret = calloc(lanes, sizeof(*r->best_regret));
	r->best_step = calloc(lanes, sizeof(*r->best_step));
	r->curve = calloc((r->o.steps / r->o.validate + 1) * lanes, sizeof(*r->curve));
	if (!r->best || !r->best_regret || !r->best_step || !r->curve)
		return -ENOMEM;
	if (sampler_new(&r->train, r->set, TRACE_TRAIN, &r->o.t) < 0)
		return -ENOMEM;
	return sampler_new(&r->valid, r->set, TRACE_VALID, &r->o.t);
}

int run_open(struct run *r, const struct run_opts *o)
{
	const struct train_backend_ops *ops;
	int x;

	memset(r, 0, sizeof(*r));
	r->o = *o;
	r->opened = now_ns();
	r->progress = progress_new(o->quiet);
	x = run_device(&ops, o->device, r->error, sizeof(r->error));
	if (x == 0)
		x = plan(r, ops);
	if (x < 0)
		return x;
	take_model(r);
	x = net_init(&r->net, &r->o.t.shape, r->error, sizeof(r->error));
	if (x == 0)
		x = ops->open(&r->backend, &r->o.t, &r->set->shape, r->error, sizeof(r->error));
	if (x == 0)
		x = set_load(r->set, r->backend, &r->o.t.shape, on_load, r, r->error, sizeof(r->error));
	if (x == 0)
		x = allocate(r);
	if (x == 0)
		x = start_lanes(r);
	if (x < 0 || !o->checkpoint || !o->resume)
		return x;
	x = checkpoint_load(r);
	return x == -ENOENT ? 0 : x;
}

int run_evaluate(struct run *r, struct sampler *p, enum train_which which, struct train_score *score)
{
	const struct train_backend_ops *ops = r->backend->ops;
	const struct train_batch *t;
	int x = 0;

	memset(score, 0, r->o.t.lanes * sizeof(*score));
	for (uint32_t from = 0; x == 0 && (t = sampler_fixed(p, from)); from += t->units)
		x = ops->evaluate(r->backend, which, t, score);
	if (x < 0)
		snprintf(r->error, sizeof(r->error), "%s", ops->error(r->backend));
	return x;
}

static int validate(struct run *r, uint32_t *improved)
{
	uint32_t lanes = r->o.t.lanes;
	_cleanup_free_ struct train_score *score = calloc(lanes, sizeof(*score));
	float *curve = r->curve + r->validations * lanes;
	int x = score ? run_evaluate(r, r->valid, TRAIN_EMA, score) : -ENOMEM;

	*improved = 0;
	for (uint32_t lane = 0; x == 0 && lane < lanes; lane++) {
		double regret = score[lane].regret / score[lane].counted; /* NaN where nothing counts */

		curve[lane] = (float)regret;
		if (!(regret < r->best_regret[lane]))
			continue;
		r->best_regret[lane] = regret;
		r->best_step[lane] = r->step;
		x = r->backend->ops->get(r->backend, TRAIN_EMA, lane, r->best + lane * r->net.params);
		++*improved;
	}
	r->validations += x == 0;
	return x;
}

struct pace {
	uint64_t began, saved; /* ns */
	uint64_t first_step;
	double before; /* seconds of earlier parts */
	float *loss;   /* [lanes] of the last step that was looked at */
	double train, valid;
	uint32_t improved;
};

static double mean_of(const float *v, uint32_t n)
{
	double sum = 0;
	uint32_t count = 0;

	for (uint32_t i = 0; i < n; i++)
		if (isfinite(v[i])) {
			sum += (double)v[i];
			count++;
		}
	return count ? sum / count : NAN;
}

static void draw(struct run *r, const struct pace *p)
{
	uint64_t done = r->step - p->first_step, left = r->o.steps - r->step;
	double seconds = (double)(now_ns() - p->began) / 1e9;
	unsigned eta = done ? (unsigned)(seconds / (double)done * (double)left + 0.5) : 0;
	char line[160];

	snprintf(line, sizeof(line),
		 "step %llu/%llu  loss %.4f  regret on valid %.4f  improved %u/%u lanes  %um%02us left",
		 (unsigned long long)r->step, (unsigned long long)r->o.steps, p->train, p->valid, p->improved,
		 r->o.t.lanes, eta / 60, eta % 60);
	progress_draw(r->progress, line, (double)r->step / (double)r->o.steps);
}

static int save(struct run *r, struct pace *p)
{
	int x;

	r->seconds = p->before + (double)(now_ns() - p->began) / 1e9;
	p->saved = now_ns();
	x = r->o.checkpoint ? checkpoint_save(r) : 0;
	return x;
}

static int one_step(struct run *r, struct pace *p)
{
	bool last = r->step + 1 == r->o.steps, look = r->step % 16 == 0 || last;
	const struct train_batch *t = sampler_step(r->train, r->step, run_lr(&r->o, r->step));
	int x = r->backend->ops->step(r->backend, t, look ? p->loss : NULL);

	if (x < 0) {
		snprintf(r->error, sizeof(r->error), "%s", r->backend->ops->error(r->backend));
		return x;
	}
	if (look)
		p->train = mean_of(p->loss, r->o.t.lanes);
	r->step++;
	if (last || r->step % r->o.validate == 0) {
		x = validate(r, &p->improved);
		p->valid = mean_of(r->curve + (r->validations - 1) * r->o.t.lanes, r->o.t.lanes);
	}
	return x;
}

int run_train(struct run *r)
{
	_cleanup_free_ float *loss = calloc(r->o.t.lanes, sizeof(*loss));
	struct pace p = {.began = now_ns(),
			 .saved = now_ns(),
			 .first_step = r->step,
			 .before = r->seconds,
			 .loss = loss,
			 .train = NAN,
			 .valid = NAN};
	int x = loss ? 0 : -ENOMEM;

	if (r->validations)
		p.valid = mean_of(r->curve + (r->validations - 1) * r->o.t.lanes, r->o.t.lanes);
	while (x == 0 && r->step < r->o.steps) {
		double here = (double)(now_ns() - r->opened) / 1e9;
		bool late = r->o.stop_after > 0 && here >= r->o.stop_after && r->step > p.first_step;

		if (run_stop || late) {
			x = save(r, &p);
			progress_break(r->progress);
			return x < 0 ? x : RUN_STOPPED;
		}
		x = one_step(r, &p);
		if (x == 0 && r->o.every > 0 && (double)(now_ns() - p.saved) / 1e9 >= r->o.every)
			x = save(r, &p);
		if (progress_due(r->progress))
			draw(r, &p);
	}
	/* What follows (rounding, calibration) can be repeated from here. */
	if (x == 0 && r->step > p.first_step)
		x = save(r, &p);
	if (x == 0 && r->step > p.first_step)
		draw(r, &p);
	progress_break(r->progress);
	return x;
}
