/* SPDX-License-Identifier: MIT */
/* Training from beginning to end, and its reports. */
#include "policy/train/fit.h"
#include "policy/train/modes.h"
#include "shm/util.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

int mode_fail(const char *line)
{
	fprintf(stderr, "kvtier-train: %s\n", line);
	return 1;
}

/* The first trace of the train split says how many lanes there are. */
int mode_prepare(struct options *o)
{
	const struct train_backend_ops *ops;
	struct set_opts probe = o->run.s;
	char err[320];
	struct set *s;
	uint32_t all;

	if (run_device(&ops, o->run.device, err, sizeof(err)) < 0)
		return mode_fail(err);
	if (!o->rows_given)
		o->run.t.rows = ops == &train_cpu ? 256 : 1024;
	probe.splits = 1u << TRACE_TRAIN;
	if (o->mode == MODE_CALIBRATE_FILE || o->mode == MODE_CALIBRATE_POLICY)
		probe.splits = 1u << TRACE_CALIB;
	probe.limit = probe.lanes = 1;
	probe.lane_first = 0;
	if (set_plan(&s, &probe, err, sizeof(err)) < 0)
		return mode_fail(err);
	all = s->model.layers * s->model.heads;
	set_free(s);
	if (o->lanes_given && o->lane_last >= all) {
		fprintf(stderr, "kvtier-train: --lanes: %u, the model has 0 to %u\n", o->lane_last, all - 1);
		return 1;
	}
	o->run.s.lanes = o->lanes_given ? o->lane_last - o->run.s.lane_first + 1 : all;
	o->run.t.lanes = o->run.s.lanes;
	o->run.s.splits = 1u << TRACE_TRAIN | 1u << TRACE_VALID;
	if (o->run.calibrate) {
		o->run.s.splits |= 1u << TRACE_CALIB;
		o->run.s.keep_means = 1u << TRACE_CALIB | 1u << TRACE_VALID;
	}
	return 0;
}

static int write_csv(const struct run *r)
{
	uint32_t heads = r->set->model.heads;
	FILE *f = fopen(r->o.csv, "we");
	int bad;

	if (!f)
		return -errno;
	fprintf(f, "step,lane,layer,head,regret\n");
	for (uint64_t v = 0; v < r->validations; v++)
		for (uint32_t i = 0; i < r->o.t.lanes; i++) {
			uint32_t lane = r->o.s.lane_first + i;

			fprintf(f, "%llu,%u,%u,%u,%.6g\n",
				(unsigned long long)MIN((v + 1) * r->o.validate, r->o.steps), lane,
				lane / heads, lane % heads, (double)r->curve[v * r->o.t.lanes + i]);
		}
	bad = ferror(f);
	return fclose(f) != 0 || bad ? -EIO : 0;
}

struct summary {
	double regret, ratio, worst, before;
	uint32_t lanes; /* with units that count */
};

static struct summary summarise(const struct run *r, const struct train_score *score)
{
	struct summary s = {0};

	for (uint32_t i = 0; i < r->o.t.lanes; i++) {
		if (!score[i].counted)
			continue;
		s.lanes++;
		s.regret += score[i].regret / score[i].counted;
		s.ratio += score[i].ratio / score[i].counted;
		s.before += r->best_regret[i];
		s.worst = MAX(s.worst, score[i].regret / score[i].counted);
	}
	if (s.lanes) {
		s.regret /= s.lanes;
		s.ratio /= s.lanes;
		s.before /= s.lanes;
	}
	return s;
}

static void print_json(const struct run *r, const struct summary *s, const struct train_score *score,
		       const struct fit_slopes *slopes)
{
	static const char *const objectives[] = {"exact", "rloo", "rloo-batch", "mse"};
	static const char *const utilities[] = {"max", "mean", "value"};
	const struct train_opts *t = &r->o.t;

	printf("{\"kind\":\"%s\",\"objective\":\"%s\",\"reward\":\"%s\",\"weighting\":\"%s\",\"utility\":\"%"
	       "s\","
	       "\"seed\":%llu,\"batch\":%u,\"rows\":%u,",
	       weights_kind_name(t->shape.kind), objectives[t->objective], t->reward ? "ratio" : "regret",
	       t->weighting ? "log" : "uniform", utilities[r->o.s.utility], (unsigned long long)t->seed,
	       t->batch, t->rows);
	printf("\"model\":\"%s\",\"device\":\"%s\",\"steps\":%llu,\"seconds\":%.1f,\"params\":%zu,"
	       "\"doc_rows\":%u,\"docs\":%u,\"units\":%u,\"regret\":%.6f,\"ratio\":%.6f,\"regret_unrounded\":%."
	       "6f,"
	       "\"regret_worst\":%.6f",
	       r->o.t.shape.name, r->backend->ops->name, (unsigned long long)r->step, r->seconds, r->net.params,
	       r->o.s.doc_rows, r->set->docs, r->set->units, s->regret, s->ratio, s->before, s->worst);
	if (slopes)
		printf(",\"slope_median\":%.4f,\"slope_within\":%.4f", slopes->median, slopes->within);
	printf(",\"lanes\":[");
	for (uint32_t i = 0; i < r->o.t.lanes; i++) {
		uint32_t n = MAX(score[i].counted, 1u);

		printf("%s{\"lane\":%u,\"regret\":%.6f,\"ratio\":%.6f,\"best_step\":%llu,\"units\":%u",
		       i ? "," : "", r->o.s.lane_first + i, score[i].regret / n, score[i].ratio / n,
		       (unsigned long long)r->best_step[i], score[i].counted);
		if (slopes)
			printf(",\"slope\":%.4f", slopes->lane[i]);
		printf("}");
	}
	printf("]}\n");
}

static void print_text(const struct run *r, const struct summary *s, const struct fit_slopes *slopes)
{
	printf("%s: %u lanes, %llu steps on %s in %.0f s\n", r->o.out, r->o.t.lanes,
	       (unsigned long long)r->step, r->backend->ops->name, r->seconds);
	printf("regret on valid: mean %.4f (before rounding %.4f), worst lane %.4f; ratio %.3f\n", s->regret,
	       s->before, s->worst, s->ratio);
	if (slopes)
		printf("calibration: slope of kept on predicted attention, median %.3f, %.0f %% of lanes "
		       "within "
		       "0.9-1.1\n",
		       slopes->median, 100 * slopes->within);
}

/* Prompts longer than any of training come too. */
static void flatten(struct run *r)
{
	uint32_t longest = 1;

	for (uint32_t u = 0; u < r->set->units; u++)
		if (r->set->unit[u].split == TRACE_TRAIN)
			longest = MAX(longest, r->set->unit[u].prompt);
	for (uint32_t lane = 0; lane < r->o.t.lanes; lane++)
		net_flatten(&r->net, longest - 1, r->best + lane * r->net.params);
}

/* Round, calibrate, write, report. The checkpoint goes when the file is there. */
static int finish(struct run *r)
{
	uint32_t lanes = r->o.t.lanes;
	_cleanup_free_ struct train_score *score = calloc(lanes, sizeof(*score));
	_cleanup_free_ uint8_t *image = NULL;
	struct fit_slopes slopes = {0};
	struct summary s;
	int x = -ENOMEM;

	flatten(r);
	if (score)
		x = run_round(r, score);
	if (x == 0)
		x = run_image(r, r->o.calibrate ? fit_bytes(r->set) : 0, &image);
	if (x == 0 && r->o.calibrate)
		x = fit_image(r, image, &slopes);
	if (x == 0) {
		x = weights_image_seal(image, ((struct weights_header *)image)->total_size);
		if (x == 0)
			x = weights_image_write(image, r->o.out);
		if (x < 0)
			snprintf(r->error, sizeof(r->error), "%s: %s", r->o.out, strerror(-x));
	}
	if (x == 0 && r->o.csv) {
		x = write_csv(r);
		if (x < 0)
			snprintf(r->error, sizeof(r->error), "%s: %s", r->o.csv, strerror(-x));
	}
	if (x == 0) {
		unlink(r->o.checkpoint);
		s = summarise(r, score);
		if (r->o.json)
			print_json(r, &s, score, r->o.calibrate ? &slopes : NULL);
		else
			print_text(r, &s, r->o.calibrate ? &slopes : NULL);
	}
	free(slopes.lane);
	return x;
}

int mode_train(struct options *o)
{
	struct run r = {0};
	int x = mode_prepare(o);

	if (x != 0)
		return x;
	x = run_open(&r, &o->run);
	progress_break(r.progress);
	if (x == 0 && !o->run.quiet) {
		fprintf(stderr,
			"kvtier-train: %u lanes on %s, %u documents of up to %u rows, %u units, %zu "
			"parameters\n",
			r.o.t.lanes, r.backend->ops->name, r.set->docs, r.o.s.doc_rows, r.set->units,
			r.net.params);
		if (r.step > 0)
			fprintf(stderr, "kvtier-train: going on at step %llu of %s\n",
				(unsigned long long)r.step, o->run.checkpoint);
	}
	if (x == 0)
		x = run_train(&r);
	if (x == 0)
		x = finish(&r);
	progress_break(r.progress);
	if (x == RUN_STOPPED && !o->run.quiet)
		fprintf(stderr, "kvtier-train: stopped at step %llu, %s holds the state\n",
			(unsigned long long)r.step, o->run.checkpoint);
	if (x < 0)
		mode_fail(*r.error ? r.error : strerror(-x));
	run_close(&r);
	return x < 0 ? 1 : x == RUN_STOPPED ? EXIT_STOPPED : 0;
}
