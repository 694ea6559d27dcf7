/* SPDX-License-Identifier: MIT */
/*
 * Does the CUDA backend compute what the CPU backend does? Scores, losses, gradients tensor by tensor,
 * evaluation and 20 steps of training, for every kind of network and every objective; then
 * what is its own: repetition bit by bit, groups of lanes, resuming, refusals, a lane gone
 * bad. TAP on stdout; exit status 0, 1, or 77 without a GPU.
 *
 *    check_train [--small] [--quick] [--object kvtier-train-cuda.so]
 *
 * --small: few rows and lanes, for the host emulation; --quick: three networks alone, for compute-sanitizer.
 */
#include "tests/gpu/made.h"

#include <stdbool.h>

static bool small, quick;
static uint32_t tests, failures;

__attribute__((format(printf, 2, 3))) static void report(bool ok, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	printf("%sok %u - ", ok ? "" : "not ", ++tests);
	vprintf(fmt, ap);
	printf("\n");
	fflush(stdout);
	va_end(ap);
	failures += !ok;
}

/* |a - b| / |b|; NaN, infinity and a reference of zeros never pass a comparison. */
static double distance(const float *a, const float *b, size_t n)
{
	double diff = 0, size = 0;

	for (size_t i = 0; i < n; i++) {
		diff += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
		size += (double)b[i] * (double)b[i];
	}
	return size > 0 ? sqrt(diff / size) : INFINITY;
}

struct pair {
	struct made m;
	struct train_backend *cpu, *gpu;
	bool tf32;
	char name[96];
};

/* The most that two right answers may differ: rounding of the products' operands, 2^-11 in TF32. */
static double limit(const struct pair *p, double fp32, double tf32)
{
	return p->tf32 ? tf32 : fp32;
}

static bool sampled(const struct pair *p)
{
	return p->m.o.objective == TRAIN_RLOO || p->m.o.objective == TRAIN_RLOO_BATCH;
}

static void call(struct train_backend *b, int r, const char *what)
{
	if (r < 0)
		die("%s: %s: %d, %s", b->ops->name, what, r, b->ops->error(b));
}

static void check_scores(struct pair *p, const struct train_batch *t)
{
	size_t n = (size_t)p->m.o.lanes * t->units * p->m.o.rows;
	float *a = made_array(n, 4), *b = made_array(n, 4);
	double d;

	call(p->gpu, p->gpu->ops->scores(p->gpu, TRAIN_PARAMS, t, a), "scores");
	call(p->cpu, p->cpu->ops->scores(p->cpu, TRAIN_PARAMS, t, b), "scores");
	for (size_t x = 0; x < n; x++) { /* past a unit's rows a score means nothing */
		uint32_t unit = (uint32_t)(x / p->m.o.rows % t->units);

		if (x % p->m.o.rows >= t->n[unit])
			a[x] = b[x] = 0;
	}
	d = distance(a, b, n);
	report(d < limit(p, 2e-5, 3e-3), "%s: scores differ by %.1e", p->name, d);
	free(a);
	free(b);
}

/* The worst tensor of all lanes. Small tensors beside large ones: measured by the gradient's whole norm then.
 */
static double worst_tensor(const struct pair *p, const float *a, const float *b, const char **name)
{
	const struct weights_layout *l = &p->m.layout;
	double worst = 0;

	*name = "none";
	for (uint32_t lane = 0; lane < p->m.o.lanes; lane++) {
		const float *ga = a + lane * l->params, *gb = b + lane * l->params;
		double norm = 0;

		for (size_t i = 0; i < l->params; i++)
			norm += (double)gb[i] * (double)gb[i];
		for (uint32_t t = 0; t < l->count; t++) {
			size_t at = l->tensor[t].off / l->elem,
			       n = (size_t)l->tensor[t].rows * l->tensor[t].cols;
			double diff = 0, size = 0;

			for (size_t i = at; i < at + n; i++) {
				diff += ((double)ga[i] - (double)gb[i]) * ((double)ga[i] - (double)gb[i]);
				size += (double)gb[i] * (double)gb[i];
			}
			if (!isfinite(diff))
				diff = INFINITY;
			if (diff == 0)
				continue;
			diff = sqrt(diff / fmax(size, 1e-4 * norm));
			if (!(diff <= worst)) {
				worst = diff;
				*name = l->tensor[t].name;
			}
		}
	}
	return worst;
}

static void check_gradient(struct pair *p, const struct train_batch *t)
{
	size_t n = (size_t)p->m.o.lanes * p->m.layout.params;
	float *a = made_array(n, 4), *b = made_array(n, 4);
	float *la = made_array(p->m.o.lanes, 4), *lb = made_array(p->m.o.lanes, 4);
	double d, tensor, loss;
	const char *name;

	for (size_t i = 0; i < n; i++)
		a[i] = NAN;
	call(p->gpu, p->gpu->ops->gradient(p->gpu, t, a, la), "gradient");
	call(p->cpu, p->cpu->ops->gradient(p->cpu, t, b, lb), "gradient");
	d = distance(a, b, n);
	tensor = worst_tensor(p, a, b, &name);
	loss = distance(la, lb, p->m.o.lanes);
	/* A drawn ranking changes where two scores are close: its gradient jumps. */
	report(d < (sampled(p) ? limit(p, 5e-3, 5e-2) : limit(p, 2e-4, 4e-3)) &&
		       tensor < (sampled(p) ? limit(p, 5e-2, 2e-1) : limit(p, 2e-3, 2e-2)),
	       "%s: gradients differ by %.1e, %s by %.1e", p->name, d, name, tensor);
	report(loss < (sampled(p) ? limit(p, 5e-3, 5e-2) : limit(p, 1e-5, 2e-3)), "%s: losses differ by %.1e",
	       p->name, loss);
	free(a);
	free(b);
	free(la);
	free(lb);
}

static void check_evaluate(struct pair *p, const struct train_batch *t)
{
	struct train_score *a = made_array(p->m.o.lanes, sizeof(*a)), *b = made_array(p->m.o.lanes, sizeof(*b));
	double worst = 0;
	bool counted = true;

	call(p->gpu, p->gpu->ops->evaluate(p->gpu, TRAIN_EMA, t, a), "evaluate");
	call(p->cpu, p->cpu->ops->evaluate(p->cpu, TRAIN_EMA, t, b), "evaluate");
	for (uint32_t i = 0; i < p->m.o.lanes; i++) {
		counted &= a[i].counted == b[i].counted;
		worst = fmax(worst, fabs(a[i].regret - b[i].regret) / fmax(1e-3, fabs(b[i].regret)));
		worst = fmax(worst, fabs(a[i].ratio - b[i].ratio) / fmax(1e-3, fabs(b[i].ratio)));
		counted &= isfinite(a[i].regret) && isfinite(a[i].ratio);
	}
	report(counted && worst < limit(p, 1e-4, 5e-3),
	       "%s: evaluation differs by %.1e, %u units of lane 0 count", p->name, worst, a[0].counted);
	free(a);
	free(b);
}

static void check_training(struct pair *p)
{
	uint32_t lanes = p->m.o.lanes, steps = small ? 5 : 20;
	float *a = made_array(lanes * steps, 4), *b = made_array(lanes * steps, 4);
	double d;

	for (uint32_t i = 0; i < steps; i++) {
		const struct train_batch *t = made_batch(&p->m, 100 + i, 1);

		call(p->gpu, p->gpu->ops->step(p->gpu, t, a + (size_t)i * lanes), "step");
		call(p->cpu, p->cpu->ops->step(p->cpu, t, b + (size_t)i * lanes), "step");
	}
	d = distance(a, b, (size_t)lanes * steps);
	report(d < (sampled(p) ? 0.3 : limit(p, 1e-2, 3e-2)), "%s: losses of %u steps differ by %.1e", p->name,
	       steps, d);
	free(a);
	free(b);
}

static void check_pair(const struct train_backend_ops *cuda, struct weights_header shape, const char *kind,
		       uint32_t objective, uint32_t reward, uint32_t weighting, bool tf32)
{
	static const char *const names[] = {"exact", "rloo", "rloo batch", "mse"};
	struct train_opts o = small ? made_opts(shape, 2, 4, 128) : made_opts(shape, 5, 8, 1024);
	const struct train_batch *t;
	struct pair p = {.tf32 = tf32};
	double start = now();

	o.objective = objective;
	o.reward = reward;
	o.weighting = weighting;
	snprintf(p.name, sizeof(p.name), "%s, %s, %s, %s, %s", kind, names[objective],
		 reward == TRAIN_RATIO ? "ratio" : "regret",
		 weighting == TRAIN_UNIFORM ? "uniform" : "log-uniform", tf32 ? "tf32" : "fp32");
	setenv("KVT_TRAIN_MATH", tf32 ? "tf32" : "fp32", 1);
	made_new(&p.m, &o, small ? 4 : 12, small ? 100 : 600, small ? 200 : 1800);
	p.cpu = made_open(&p.m, &train_cpu);
	p.gpu = made_open(&p.m, cuda);
	t = made_batch(&p.m, 7, 1);
	check_scores(&p, t);
	check_gradient(&p, t);
	check_evaluate(&p, t);
	if (!sampled(&p) || !tf32)
		check_training(&p);
	check_evaluate(&p, made_batch(&p.m, 8, 0));
	p.cpu->ops->close(p.cpu);
	p.gpu->ops->close(p.gpu);
	made_free(&p.m);
	printf("# %.1f s\n", now() - start);
}

static void get_all(struct made *m, struct train_backend *b, enum train_which which, float *out)
{
	for (uint32_t lane = 0; lane < m->o.lanes; lane++)
		call(b, b->ops->get(b, which, lane, out + lane * m->layout.params), "get");
}

static void steps(struct made *m, struct train_backend *b, uint32_t from, uint32_t to)
{
	for (uint32_t i = from; i < to; i++)
		call(b, b->ops->step(b, made_batch(m, i, 1), NULL), "step");
}

/* Two runs; a run in two halves, its state carried over by get and set; a run with one lane at a time. */
static void check_repeats(const struct train_backend_ops *cuda, struct weights_header shape, uint32_t objective)
{
	struct train_opts o = small ? made_opts(shape, 3, 4, 128) : made_opts(shape, 6, 8, 1024);
	struct train_backend *b;
	size_t n;
	float *first, *other;
	struct made m;

	o.objective = objective;
	setenv("KVT_TRAIN_MATH", "tf32", 1);
	made_new(&m, &o, small ? 4 : 12, small ? 100 : 600, small ? 200 : 1800);
	n = (size_t)o.lanes * m.layout.params;
	first = made_array(n, 4);
	other = made_array(n, 4);

	b = made_open(&m, cuda);
	steps(&m, b, 0, 6);
	get_all(&m, b, TRAIN_EMA, first);
	b->ops->close(b);

	b = made_open(&m, cuda);
	steps(&m, b, 0, 6);
	get_all(&m, b, TRAIN_EMA, other);
	b->ops->close(b);
	report(memcmp(first, other, n * 4) == 0, "objective %u: a second run gives the same bits", objective);

	b = made_open(&m, cuda);
	steps(&m, b, 0, 4);
	for (uint32_t which = TRAIN_PARAMS; which <= TRAIN_V; which++) {
		get_all(&m, b, which, other);
		for (uint32_t i = 0; i < o.lanes; i++)
			call(b, b->ops->set(b, which, (i + 1) % o.lanes, other), "set"); /* not what it was */
		for (uint32_t i = 0; i < o.lanes; i++)
			call(b, b->ops->set(b, which, i, other + i * m.layout.params), "set");
	}
	steps(&m, b, 4, 6);
	get_all(&m, b, TRAIN_EMA, other);
	b->ops->close(b);
	report(memcmp(first, other, n * 4) == 0, "objective %u: a resumed run gives the same bits", objective);

	setenv("KVT_TRAIN_LANES", "2", 1);
	b = made_open(&m, cuda);
	unsetenv("KVT_TRAIN_LANES");
	steps(&m, b, 0, 6);
	get_all(&m, b, TRAIN_EMA, other);
	b->ops->close(b);
	report(distance(other, first, n) < 1e-3, "objective %u: lanes in groups of two differ by %.1e",
	       objective, distance(other, first, n));
	free(first);
	free(other);
	made_free(&m);
}

static void check_refusals(const struct train_backend_ops *cuda, struct weights_header shape)
{
	struct train_opts o = made_opts(shape, 2, 4, 128);
	struct train_backend *b, *none;
	struct train_batch bad;
	char err[256] = "";
	struct made m;
	uint32_t keep;
	float *p, *q;
	bool moved;

	made_new(&m, &o, 4, 100, 200);
	b = made_open(&m, cuda);
	bad = *made_batch(&m, 0, 1);
	keep = m.row[1];
	m.row[1] = m.unit_rows[m.unit[0]];
	report(b->ops->step(b, &bad, NULL) < 0 && *b->ops->error(b), "a row past its unit: %s",
	       b->ops->error(b));
	m.row[1] = m.row[0];
	report(b->ops->step(b, &bad, NULL) < 0 && *b->ops->error(b), "a row twice: %s", b->ops->error(b));
	m.row[1] = keep;
	bad.units = 5;
	report(b->ops->step(b, &bad, NULL) < 0 && *b->ops->error(b), "too many units: %s", b->ops->error(b));
	report(b->ops->put_rows(b, 2, 0, m.pool, m.pool) < 0, "rows of a lane that is not there: %s",
	       b->ops->error(b));
	bad.units = 4;
	report(b->ops->step(b, &bad, NULL) == 0, "and a good batch after those");

	/* A lane whose parameters are broken stays as it is; the others go on. */
	p = made_array(2 * m.layout.params, 4);
	q = made_array(2 * m.layout.params, 4);
	get_all(&m, b, TRAIN_PARAMS, p);
	p[0] = INFINITY;
	call(b, b->ops->set(b, TRAIN_PARAMS, 0, p), "set");
	steps(&m, b, 1, 3);
	get_all(&m, b, TRAIN_PARAMS, q);
	moved = memcmp(p + m.layout.params, q + m.layout.params, m.layout.params * 4) != 0;
	report(memcmp(p, q, m.layout.params * 4) == 0 && moved && isfinite(q[m.layout.params]),
	       "a lane gone bad stays, the other moves");
	b->ops->close(b);
	o.rows = 100;
	report(cuda->open(&none, &o, &m.s, err, sizeof(err)) < 0 && *err, "rows 100: %s", err);
	o.rows = 128;
	o.shape.kind = WEIGHTS_QFILTER;
	report(cuda->open(&none, &o, &m.s, err, sizeof(err)) < 0 && *err, "kind 3: %s", err);
	free(p);
	free(q);
	made_free(&m);
}

int main(int argc, char **argv)
{
	const char *object = "build/kvtier-train-cuda.so";
	const struct train_backend_ops *cuda;
	struct weights_header narrow, one, table, position;

	for (int i = 1; i < argc; i++) {
		if (strcmp(argv[i], "--small") == 0)
			small = true;
		else if (strcmp(argv[i], "--quick") == 0)
			quick = true;
		else if (strcmp(argv[i], "--object") == 0 && i + 1 < argc)
			object = argv[++i];
		else
			die("usage: check_train [--small] [--quick] [--object kvtier-train-cuda.so]");
	}
	cuda = cuda_backend(object);
	narrow = made_shape(WEIGHTS_KVP, 64, small ? 32 : 128, small ? 64 : 128, WEIGHTS_POS_LOG2, 2, 33);
	one = made_shape(WEIGHTS_KVP, 64, small ? 96 : 128, small ? 32 : 128, WEIGHTS_POS_LOG2, 1, 33);
	table = made_shape(WEIGHTS_KVP, 64, small ? 64 : 256, small ? 96 : 256, WEIGHTS_POS_TABLE, 1, 0);
	position = made_shape(WEIGHTS_POSITION, 0, 0, 0, WEIGHTS_POS_LOG2, 1, 0);

	if (quick) {
		check_pair(cuda, narrow, "narrow", TRAIN_EXACT, TRAIN_REGRET, TRAIN_LOG_UNIFORM, true);
		check_pair(cuda, table, "published", TRAIN_RLOO, TRAIN_RATIO, TRAIN_UNIFORM, false);
		check_pair(cuda, position, "position", TRAIN_MSE, TRAIN_REGRET, TRAIN_UNIFORM, true);
		printf("1..%u\n# %u failed\n", tests, failures);
		return failures > 0;
	}
	check_pair(cuda, narrow, "narrow", TRAIN_EXACT, TRAIN_REGRET, TRAIN_UNIFORM, false);
	check_pair(cuda, narrow, "narrow", TRAIN_EXACT, TRAIN_REGRET, TRAIN_UNIFORM, true);
	check_pair(cuda, one, "rank 1", TRAIN_EXACT, TRAIN_REGRET, TRAIN_LOG_UNIFORM, true);
	check_pair(cuda, table, "published", TRAIN_EXACT, TRAIN_RATIO, TRAIN_UNIFORM, true);
	check_pair(cuda, table, "published", TRAIN_RLOO, TRAIN_RATIO, TRAIN_UNIFORM, false);
	check_pair(cuda, narrow, "narrow", TRAIN_RLOO, TRAIN_REGRET, TRAIN_LOG_UNIFORM, false);
	check_pair(cuda, narrow, "narrow", TRAIN_RLOO_BATCH, TRAIN_RATIO, TRAIN_UNIFORM, false);
	check_pair(cuda, narrow, "narrow", TRAIN_RLOO, TRAIN_REGRET, TRAIN_UNIFORM, true);
	check_pair(cuda, one, "rank 1", TRAIN_MSE, TRAIN_REGRET, TRAIN_UNIFORM, false);
	check_pair(cuda, narrow, "narrow", TRAIN_MSE, TRAIN_REGRET, TRAIN_UNIFORM, true);
	check_pair(cuda, position, "position", TRAIN_EXACT, TRAIN_REGRET, TRAIN_UNIFORM, true);
	check_pair(cuda, position, "position", TRAIN_EXACT, TRAIN_REGRET, TRAIN_LOG_UNIFORM, true);
	check_repeats(cuda, narrow, TRAIN_EXACT);
	check_repeats(cuda, narrow, TRAIN_RLOO);
	check_refusals(cuda, narrow);
	printf("1..%u\n# %u failed\n", tests, failures);
	return failures > 0;
}
