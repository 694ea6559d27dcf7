/* SPDX-License-Identifier: MIT */
/*
 * How fast the CUDA backend trains at real size: 90 lanes, 32 units of 1,024 rows a step, random data, the
 * exact objective. Beside it the two floors of tests/gpu/NOTES.md, from ceilings measured in the same run: the
 * products' operations at the device's TF32 rate, and the bytes that the backend's passes move at its copy
 * bandwidth. One JSON object a line on stdout; progress on stderr.
 *
 *    bench_train [--object kvtier-train-cuda.so] [--lanes n] [--steps n] [--once]
 *
 * --once: two steps of each network, for a profiler.
 */
#include "tests/gpu/made.h"

#define ROUNDS 3

void ceilings(double *copy, double *tf32);

static const char *object = "build/kvtier-train-cuda.so";
static uint32_t lanes = 90, steps = 40;
static int once;
static double copy_rate, tf32_rate;

/* Multiply-adds of a row, forwards and back (no gradient of K and V). */
static double products(const struct weights_header *h)
{
	double in = 2 * h->proj + h->pos_dim, first = (h->k_dim + h->v_dim) * h->proj,
	       rest = (in + h->hidden) * h->hidden;

	return 2 * first + 3 * rest;
}

/* Floats that the passes over a row read and write: see NOTES.md. */
static double traffic(const struct weights_header *h)
{
	double d = h->k_dim + h->v_dim, p = 2 * h->proj, in = p + h->pos_dim;

	return 3.5 * d + 7 * p + 3 * in + 17 * h->hidden + 4 * h->pos_dim;
}

static void line(const char *name, const char *what, double value, const char *unit, const char *rival,
		 double rival_value, double ratio, const char *target, int pass)
{
	printf("{\"name\":\"%s_%s\",\"value\":%.4g,\"unit\":\"%s\",\"rival\":\"%s\",\"rival_value\":%.4g,"
	       "\"ratio\":%.3f,"
	       "\"target\":\"%s\",\"pass\":%s}\n",
	       name, what, value, unit, rival, rival_value, ratio, target, pass ? "true" : "false");
	fflush(stdout);
}

static int compare(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

static double timed(struct made *m, struct train_backend *b, uint32_t from, uint32_t count, float *loss)
{
	double start = now();

	for (uint32_t i = 0; i < count; i++)
		if (b->ops->step(b, made_batch(m, from + i, 0), i + 1 == count ? loss : NULL) < 0)
			die("step: %s", b->ops->error(b));
	return (now() - start) / count * 1e3;
}

static void bench(const struct train_backend_ops *cuda, const char *name, struct weights_header shape,
		  uint32_t objective, double target)
{
	struct train_opts o = made_opts(shape, lanes, 32, 1024);
	struct train_backend *b;
	double start = now(), round[ROUNDS], ms, minutes, flops, bytes, evaluate;
	struct train_score *score = made_array(lanes, sizeof(*score));
	float *loss = made_array(lanes, sizeof(*loss));
	char wanted[32];
	struct made m;

	o.objective = objective;
	o.perms = 8;
	o.clip = 1;
	setenv("KVT_TRAIN_MATH", "tf32", 1);
	made_new(&m, &o, once ? 8 : 48, 2100, 2600);
	fprintf(stderr, "%s: set of %.1f GB\n", name, (double)cuda->set_bytes(&o, &m.s) * 1e-9);
	b = made_open(&m, cuda);
	fprintf(stderr, "%s: loaded in %.1f s\n", name, now() - start);
	timed(&m, b, 0, once ? 2 : 5, loss);
	for (uint32_t r = 0; r < ROUNDS && !once; r++)
		round[r] = timed(&m, b, 5 + r * steps, steps, loss);
	if (!once) {
		qsort(round, ROUNDS, sizeof(*round), compare);
		ms = round[ROUNDS / 2];
		minutes = ms * 3000 / 60e3;
		flops = 2 * products(&shape) * lanes * 32 * 1024;
		bytes = 4 * traffic(&shape) * lanes * 32 * 1024;
		fprintf(stderr,
			"%s: %.2f ms a step (%.2f to %.2f), %.1f GFLOP and %.1f GB; loss of lane 0 %.3f\n",
			name, ms, round[0], round[ROUNDS - 1], flops * 1e-9, bytes * 1e-9, (double)loss[0]);
		snprintf(wanted, sizeof(wanted), "<=%.3g", target);
		line(name, "3000_steps", minutes, "min", "limit of the whole training", target,
		     minutes / target, wanted, minutes <= target);
		line(name, "of_product_floor", ms, "ms/step", "products at the measured TF32 rate",
		     flops / tf32_rate / 1e9, flops / tf32_rate / 1e9 / ms, "none", 1);
		line(name, "of_traffic_floor", ms, "ms/step",
		     "bytes of all passes at the measured copy bandwidth", bytes / copy_rate / 1e6,
		     bytes / copy_rate / 1e6 / ms, "none", 1);
		start = now();
		for (uint32_t i = 0; i < 5; i++)
			if (b->ops->evaluate(b, TRAIN_EMA, made_batch(&m, 1000 + i, 0), score) < 0)
				die("evaluate: %s", b->ops->error(b));
		evaluate = (now() - start) / 5 * 1e3;
		line(name, "evaluate", evaluate, "ms/batch", "a training step", ms, evaluate / ms, "none", 1);
	}
	b->ops->close(b);
	made_free(&m);
	free(score);
	free(loss);
}

int main(int argc, char **argv)
{
	const struct train_backend_ops *cuda;

	for (int i = 1; i < argc; i++) {
		if (strcmp(argv[i], "--once") == 0)
			once = 1;
		else if (strcmp(argv[i], "--object") == 0 && i + 1 < argc)
			object = argv[++i];
		else if (strcmp(argv[i], "--lanes") == 0 && i + 1 < argc)
			lanes = (uint32_t)atoi(argv[++i]);
		else if (strcmp(argv[i], "--steps") == 0 && i + 1 < argc)
			steps = (uint32_t)atoi(argv[++i]);
		else
			die("usage: bench_train [--object kvtier-train-cuda.so] [--lanes n] [--steps n] "
			    "[--once]");
	}
	if (lanes < 1 || steps < 1)
		die("lanes and steps must be 1 or more");
	cuda = cuda_backend(object);
	if (!once) {
		ceilings(&copy_rate, &tf32_rate);
		if (copy_rate <= 0 || tf32_rate <= 0)
			die("the device's ceilings could not be measured");
		fprintf(stderr, "copy %.0f GB/s (read and written), TF32 products %.0f TFLOP/s\n", copy_rate,
			tf32_rate);
	}
	bench(cuda, "train_narrow", made_shape(WEIGHTS_KVP, 64, 128, 128, WEIGHTS_POS_LOG2, 2, 33), TRAIN_EXACT,
	      2.5);
	bench(cuda, "train_published", made_shape(WEIGHTS_KVP, 64, 256, 256, WEIGHTS_POS_TABLE, 1, 0),
	      TRAIN_EXACT, 6);
	if (!once)
		bench(cuda, "train_narrow_rloo", made_shape(WEIGHTS_KVP, 64, 128, 128, WEIGHTS_POS_LOG2, 2, 33),
		      TRAIN_RLOO, 6);
	return 0;
}
