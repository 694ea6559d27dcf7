/* SPDX-License-Identifier: MIT */
/*
 * The CPU backend: lanes are shared out among threads one at a time, each lane
 * computed by one thread from beginning to end, so that results do not depend on
 * the number of threads.
 */
#include "policy/train/lane.h"
#include "shm/util.h"

#include <cblas.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#define CPU_MAX_THREADS 256u

struct cpu {
	struct train_backend base;
	struct train_opts o;
	struct net net;
	struct lane_set set;
	float *vec[4];           /* by enum train_which: [lanes][params] */
	struct lane_work **work; /* [threads] */
	char error[160];
};

/* One call of the interface, as the threads see it. */
struct job {
	struct cpu *c;
	void (*run)(const struct job *j, struct lane_work *w, uint32_t lane);
	const struct train_batch *t;
	const float *params; /* of all lanes */
	float *loss, *out;
	struct train_score *score;
	atomic_uint next_lane, next_work;
};

static void *work_on(void *arg)
{
	struct job *j = arg;
	struct lane_work *w = j->c->work[atomic_fetch_add(&j->next_work, 1)];

	for (;;) {
		uint32_t lane = atomic_fetch_add(&j->next_lane, 1);

		if (lane >= j->c->o.lanes)
			return NULL;
		j->run(j, w, lane);
	}
}

/* On this thread and as many others as there are; fewer when the system has none to give. */
static void all_lanes(struct job *j)
{
	pthread_t thread[CPU_MAX_THREADS];
	uint32_t started = 0;

	while (started + 1 < j->c->o.threads && pthread_create(&thread[started], NULL, work_on, j) == 0)
		started++;
	work_on(j);
	while (started > 0)
		pthread_join(thread[--started], NULL);
}

static void cpu_close(struct train_backend *b)
{
	struct cpu *c = (struct cpu *)b;

	if (!c)
		return;
	for (uint32_t i = 0; c->work && i < c->o.threads; i++)
		lane_work_free(c->work[i]);
	free(c->work);
	for (int i = 0; i < 4; i++)
		free(c->vec[i]);
	free(c->set.doc_at);
	free(c->set.unit_at);
	free(c->set.k);
	free(c->set.v);
	free(c->set.u);
	free(c);
}

static int check(const struct train_opts *o, const struct train_set_shape *s, char *err, size_t errsize)
{
	const char *what = NULL;

	if (o->lanes < 1)
		what = "lanes: 0";
	else if (o->batch < 1)
		what = "batch: 0";
	else if (o->rows < 64 || o->rows > TRAIN_MAX_ROWS || o->rows % 64)
		what = "rows: must be a multiple of 64 up to 4096";
	else if (o->threads < 1 || o->threads > CPU_MAX_THREADS)
		what = "threads: must be 1 to 256";
	else if (o->objective > TRAIN_MSE || o->reward > TRAIN_RATIO || o->weighting > TRAIN_LOG_UNIFORM)
		what = "objective, reward or weighting: unknown";
	else if (o->objective == TRAIN_RLOO && (o->perms < 2 || o->perms > TRAIN_MAX_PERMS))
		what = "perms: must be 2 to 16";
	else if (!s->docs || !s->units)
		what = "the set is empty";
	if (!what)
		return 0;
	snprintf(err, errsize, "cpu backend: %s", what);
	return -EINVAL;
}

static void place(struct lane_set *set, const struct train_set_shape *s)
{
	set->shape = *s;
	for (uint32_t d = 0; d < s->docs; d++)
		set->doc_at[d + 1] = set->doc_at[d] + s->doc_rows[d];
	for (uint32_t i = 0; i < s->units; i++)
		set->unit_at[i + 1] = set->unit_at[i] + s->unit_rows[i];
}

static int cpu_open(struct train_backend **ret, const struct train_opts *o, const struct train_set_shape *s,
		    char *err, size_t errsize)
{
	struct cpu *c;
	uint64_t rows, utilities;
	int r = check(o, s, err, errsize);

	if (r < 0)
		return r;
	snprintf(err, errsize, "cpu backend: out of memory");
	c = calloc(1, sizeof(*c));
	if (!c)
		return -ENOMEM;
	c->base.ops = &train_cpu;
	c->o = *o;
	r = net_init(&c->net, &o->shape, err, errsize);
	if (r < 0)
		goto fail;
	r = -ENOMEM;
	c->set.doc_at = calloc(s->docs + 1, sizeof(*c->set.doc_at));
	c->set.unit_at = calloc(s->units + 1, sizeof(*c->set.unit_at));
	c->work = calloc(o->threads, sizeof(struct lane_work *));
	if (!c->set.doc_at || !c->set.unit_at || !c->work)
		goto fail;
	place(&c->set, s);
	rows = c->net.h.kind == WEIGHTS_KVP ? c->set.doc_at[s->docs] : 0;
	utilities = c->set.unit_at[s->units];
	c->set.k = calloc(o->lanes * rows * o->shape.k_dim + 1, sizeof(*c->set.k));
	c->set.v = calloc(o->lanes * rows * o->shape.v_dim + 1, sizeof(*c->set.v));
	c->set.u = calloc(o->lanes * utilities + 1, sizeof(*c->set.u));
	if (!c->set.k || !c->set.v || !c->set.u)
		goto fail;
	for (int i = 0; i < 4; i++) {
		c->vec[i] = calloc(o->lanes * c->net.params, sizeof(float));
		if (!c->vec[i])
			goto fail;
	}
	for (uint32_t i = 0; i < o->threads; i++)
		if (lane_work_new(&c->work[i], &c->o, &c->net) < 0)
			goto fail;
	openblas_set_num_threads(1); /* threads are ours */
	*ret = &c->base;
	return 0;
fail:
	cpu_close(&c->base);
	return r;
}

static uint64_t cpu_set_bytes(const struct train_opts *o, const struct train_set_shape *s)
{
	uint64_t rows = 0, utilities = 0;
	struct weights_layout l = {0};

	weights_lay_out(&l, &o->shape);
	for (uint32_t d = 0; o->shape.kind == WEIGHTS_KVP && d < s->docs; d++)
		rows += s->doc_rows[d];
	for (uint32_t i = 0; i < s->units; i++)
		utilities += s->unit_rows[i];
	return o->lanes * (rows * (o->shape.k_dim + o->shape.v_dim) * 2 + utilities * 4 + l.params * 16);
}

static uint64_t cpu_memory(void)
{
	FILE *f = fopen("/proc/meminfo", "re");
	unsigned long long kib = 0;
	char line[128];

	while (f && fgets(line, sizeof(line), f))
		if (sscanf(line, "MemAvailable: %llu kB", &kib) == 1)
			break;
	if (f)
		fclose(f);
	return kib * 1024 / 4 * 3; /* leave some to the file cache and to others */
}

static int cpu_put_rows(struct train_backend *b, uint32_t lane, uint32_t doc, const uint16_t *k,
			const uint16_t *v)
{
	struct cpu *c = (struct cpu *)b;
	struct lane_set *set = &c->set;
	uint64_t at, rows;

	if (lane >= c->o.lanes || doc >= set->shape.docs)
		return -EINVAL;
	if (c->net.h.kind != WEIGHTS_KVP)
		return 0;
	at = lane * set->doc_at[set->shape.docs] + set->doc_at[doc];
	rows = set->shape.doc_rows[doc];
	memcpy(set->k + at * c->net.h.k_dim, k, rows * c->net.h.k_dim * sizeof(*k));
	memcpy(set->v + at * c->net.h.v_dim, v, rows * c->net.h.v_dim * sizeof(*v));
	return 0;
}

static int cpu_put_utility(struct train_backend *b, uint32_t lane, uint32_t unit, const float *u)
{
	struct cpu *c = (struct cpu *)b;
	struct lane_set *set = &c->set;

	if (lane >= c->o.lanes || unit >= set->shape.units)
		return -EINVAL;
	memcpy(set->u + lane * set->unit_at[set->shape.units] + set->unit_at[unit], u,
	       set->shape.unit_rows[unit] * sizeof(*u));
	return 0;
}

static int no_such_vector(struct cpu *c, enum train_which which, uint32_t lane)
{
	snprintf(c->error, sizeof(c->error), "vector %d of lane %u: there are 4 of %u lanes", (int)which, lane,
		 c->o.lanes);
	return -EINVAL;
}

static int cpu_get(struct train_backend *b, enum train_which which, uint32_t lane, float *out)
{
	struct cpu *c = (struct cpu *)b;

	if ((unsigned)which > TRAIN_V || lane >= c->o.lanes)
		return no_such_vector(c, which, lane);
	memcpy(out, c->vec[which] + lane * c->net.params, c->net.params * sizeof(float));
	return 0;
}

static int cpu_set(struct train_backend *b, enum train_which which, uint32_t lane, const float *in)
{
	struct cpu *c = (struct cpu *)b;

	if ((unsigned)which > TRAIN_V || lane >= c->o.lanes)
		return no_such_vector(c, which, lane);
	memcpy(c->vec[which] + lane * c->net.params, in, c->net.params * sizeof(float));
	return 0;
}

/* A batch from outside is checked before threads index by it. */
static int check_batch(struct cpu *c, const struct train_batch *t)
{
	const struct train_set_shape *s = &c->set.shape;

	if (t->units > c->o.batch)
		goto bad;
	for (uint32_t i = 0; i < t->units; i++) {
		const uint32_t *row = t->row + (size_t)i * c->o.rows;

		if (t->unit[i] >= s->units || t->n[i] < 2 || t->n[i] > c->o.rows)
			goto bad;
		for (uint32_t j = 0; j < t->n[i]; j++)
			if (row[j] >= s->unit_rows[t->unit[i]] || (j && row[j] <= row[j - 1]))
				goto bad;
	}
	return 0;
bad:
	snprintf(c->error, sizeof(c->error), "batch of step %llu: a unit or row is out of its limits",
		 (unsigned long long)t->step);
	return -EINVAL;
}

static void update(struct cpu *c, struct lane_work *w, uint32_t lane, const struct train_batch *t, double norm)
{
	const struct train_opts *o = &c->o;
	size_t at = lane * c->net.params;
	struct kern_adam a = {
		.lr = t->lr,
		.beta1 = o->beta1,
		.beta2 = o->beta2,
		.eps = o->eps,
		.scale = o->clip > 0 && norm > (double)o->clip ? o->clip / ((float)norm + 1e-6f) : 1,
		.fix1 = (float)(1 / (1 - pow((double)o->beta1, (double)(t->step + 1)))),
		.fix2 = (float)(1 / (1 - pow((double)o->beta2, (double)(t->step + 1)))),
	};

	for (uint32_t i = 0; i < c->net.layout.count; i++) {
		const struct weights_tensor *x = &c->net.layout.tensor[i];
		size_t p = at + c->net.at[i];

		a.decay = net_decays(&c->net, i) ? t->lr * o->weight_decay : 0;
		c->net.kern->adam(&a, c->vec[TRAIN_PARAMS] + p, w->grad + c->net.at[i], c->vec[TRAIN_M] + p,
				  c->vec[TRAIN_V] + p, (size_t)x->rows * x->cols);
	}
	c->net.kern->average(c->vec[TRAIN_EMA] + at, c->vec[TRAIN_PARAMS] + at,
			     t->step < o->ema_start ? 0 : o->ema, c->net.params);
}

static void step_lane(const struct job *j, struct lane_work *w, uint32_t lane)
{
	struct cpu *c = j->c;
	double loss = lane_gradient(w, &c->set, lane, c->vec[TRAIN_PARAMS] + lane * c->net.params, j->t);
	double norm = sqrt(c->net.kern->sumsq(w->grad, c->net.params));

	if (j->loss)
		j->loss[lane] = (float)loss;
	if (isfinite(loss) && isfinite(norm))
		update(c, w, lane, j->t, norm);
}

static int cpu_step(struct train_backend *b, const struct train_batch *t, float *loss)
{
	struct cpu *c = (struct cpu *)b;
	struct job j = {.c = c, .run = step_lane, .t = t, .loss = loss};
	int r = check_batch(c, t);

	if (r == 0)
		all_lanes(&j);
	return r;
}

static void gradient_lane(const struct job *j, struct lane_work *w, uint32_t lane)
{
	struct cpu *c = j->c;

	j->loss[lane] =
		(float)lane_gradient(w, &c->set, lane, c->vec[TRAIN_PARAMS] + lane * c->net.params, j->t);
	memcpy(j->out + lane * c->net.params, w->grad, c->net.params * sizeof(float));
}

static int cpu_gradient(struct train_backend *b, const struct train_batch *t, float *grad, float *loss)
{
	struct cpu *c = (struct cpu *)b;
	struct job j = {.c = c, .run = gradient_lane, .t = t, .loss = loss, .out = grad};
	int r = check_batch(c, t);

	if (r == 0)
		all_lanes(&j);
	return r;
}

static void evaluate_lane(const struct job *j, struct lane_work *w, uint32_t lane)
{
	lane_evaluate(w, &j->c->set, lane, j->params + lane * j->c->net.params, j->t, &j->score[lane]);
}

static int cpu_evaluate(struct train_backend *b, enum train_which which, const struct train_batch *t,
			struct train_score *out)
{
	struct cpu *c = (struct cpu *)b;
	struct job j = {.c = c, .run = evaluate_lane, .t = t, .score = out};
	int r = (unsigned)which > TRAIN_V ? no_such_vector(c, which, 0) : check_batch(c, t);

	if (r < 0)
		return r;
	j.params = c->vec[which];
	all_lanes(&j);
	return 0;
}

static void scores_lane(const struct job *j, struct lane_work *w, uint32_t lane)
{
	lane_scores(w, &j->c->set, lane, j->params + lane * j->c->net.params, j->t,
		    j->out + (size_t)lane * j->t->units * j->c->o.rows);
}

static int cpu_scores(struct train_backend *b, enum train_which which, const struct train_batch *t, float *out)
{
	struct cpu *c = (struct cpu *)b;
	struct job j = {.c = c, .run = scores_lane, .t = t, .out = out};
	int r = (unsigned)which > TRAIN_V ? no_such_vector(c, which, 0) : check_batch(c, t);

	if (r < 0)
		return r;
	j.params = c->vec[which];
	all_lanes(&j);
	return 0;
}

static const char *cpu_error(struct train_backend *b)
{
	return ((struct cpu *)b)->error;
}

const struct train_backend_ops train_cpu = {
	.name = "cpu",
	.open = cpu_open,
	.close = cpu_close,
	.set_bytes = cpu_set_bytes,
	.memory = cpu_memory,
	.put_rows = cpu_put_rows,
	.put_utility = cpu_put_utility,
	.get = cpu_get,
	.set = cpu_set,
	.step = cpu_step,
	.gradient = cpu_gradient,
	.evaluate = cpu_evaluate,
	.scores = cpu_scores,
	.error = cpu_error,
};
