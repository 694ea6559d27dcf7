/* SPDX-License-Identifier: MIT */
/* From trace files to batches: which rows, what values, in which order. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "policy/learned.h"
#include "policy/train/noise.h"
#include "policy/train/run.h"
#include "policy/train/set.h"
#include "shm/util.h"

#include <ftw.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#define ROWS 300u
#define DIM 16u
#define LANES 2u

static char dir[64];

static float key(uint32_t doc, uint32_t lane, uint32_t i)
{
	return 2 * train_noise(1, doc, lane, 0, 0, i) - 1;
}

static float value(uint32_t doc, uint32_t lane, uint32_t i)
{
	return 2 * train_noise(2, doc, lane, 0, 0, i) - 1;
}

static float utility(uint32_t doc, uint32_t lane, uint32_t cut, uint32_t row)
{
	return train_noise(3, doc, lane, cut, 0, row);
}

static float vnorm(uint32_t doc, uint32_t lane, uint32_t row)
{
	return 1 + train_noise(4, doc, lane, 0, 0, row);
}

/* K after RoPE; UMEAN of a cut is utility() times its queries, UMAX twice that. */
static void write_doc(uint32_t doc, uint32_t split, uint32_t dtype)
{
	struct trace_header h = {.model = "m",
				 .source = "s",
				 .domain = "prose",
				 .layers = 1,
				 .heads = LANES,
				 .group = 1,
				 .k_dim = DIM,
				 .v_dim = DIM,
				 .dtype = dtype,
				 .rope_type = TRACE_ROPE_HALF,
				 .rope_theta = 10000,
				 .rows = ROWS,
				 .cuts = 3,
				 .split = split};
	/* the first is too short to rank anything in */
	const struct trace_cut cuts[3] = {{40, 10, 0, 0}, {150, 20, 1, 0}, {280, 8, 2, 0}};
	float k[ROWS * DIM], v[ROWS * DIM], u[ROWS];
	uint16_t half[ROWS * DIM];
	uint32_t pos[ROWS];
	struct trace_writer *w;
	char path[128], err[200];

	for (uint32_t i = 0; i < ROWS; i++)
		pos[i] = i;
	snprintf(path, sizeof(path), "%s/%u-%u.kvtr", dir, split, doc);
	assert_int_equal(trace_writer_open(&w, path, &h, cuts, err, sizeof(err)), 0);
	for (uint32_t lane = 0; lane < LANES; lane++) {
		for (uint32_t i = 0; i < ROWS * DIM; i++) {
			k[i] = key(doc, lane, i);
			v[i] = value(doc, lane, i);
		}
		rope_apply(k, DIM, ROWS, pos, TRACE_ROPE_HALF, 10000);
		for (uint32_t kind = TRACE_K; kind <= TRACE_V; kind++) {
			for (uint32_t i = 0; i < ROWS * DIM; i++)
				half[i] = float_half(kind == TRACE_K ? k[i] : v[i]);
			assert_int_equal(trace_writer_chunk(w, kind, lane, 0,
							    dtype == TRACE_F16 ? (void *)half
							    : kind == TRACE_K  ? (void *)k
									       : (void *)v),
					 0);
		}
		for (uint32_t c = 0; c < 3; c++)
			for (uint32_t kind = TRACE_UMAX; kind <= TRACE_UMEAN; kind++) {
				for (uint32_t i = 0; i < cuts[c].prompt; i++)
					u[i] = utility(doc, lane, c, i) * (float)cuts[c].queries *
					       (kind == TRACE_UMAX ? 2.0f : 1.0f);
				assert_int_equal(trace_writer_chunk(w, kind, lane, c, u), 0);
			}
		for (uint32_t i = 0; i < ROWS; i++)
			u[i] = vnorm(doc, lane, i);
		assert_int_equal(trace_writer_chunk(w, TRACE_VNORM, lane, 0, u), 0);
	}
	assert_int_equal(trace_writer_finish(w, 0), 0);
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *f)
{
	return remove(path);
}

static int setup(void **state)
{
	snprintf(dir, sizeof(dir), "/tmp/kvtier-test.XXXXXX");
	if (!mkdtemp(dir))
		return -1;
	for (uint32_t d = 0; d < 5; d++)
		write_doc(d, TRACE_TRAIN, d % 2 ? TRACE_F16 : TRACE_F32);
	write_doc(7, TRACE_VALID, TRACE_F16);
	return 0;
}

static int teardown(void **state)
{
	return nftw(dir, remove_one, 8, FTW_DEPTH | FTW_PHYS);
}

/* A backend that only remembers what it was given. */
struct keeper {
	struct train_backend base;
	struct set *set;
	uint16_t *k[LANES][8], *v[LANES][8];
	float *u[LANES][16];
};

static int keep_rows(struct train_backend *b, uint32_t lane, uint32_t doc, const uint16_t *k, const uint16_t *v)
{
	struct keeper *x = (struct keeper *)b;
	size_t bytes = (size_t)x->set->doc[doc].stored * DIM * 2;

	x->k[lane][doc] = memcpy(malloc(bytes), k, bytes);
	x->v[lane][doc] = memcpy(malloc(bytes), v, bytes);
	return 0;
}

static int keep_utility(struct train_backend *b, uint32_t lane, uint32_t unit, const float *u)
{
	struct keeper *x = (struct keeper *)b;
	size_t bytes = x->set->unit[unit].rows * sizeof(*u);

	x->u[lane][unit] = memcpy(malloc(bytes), u, bytes);
	return 0;
}

static const struct train_backend_ops keeper_ops = {
	.name = "keeper", .put_rows = keep_rows, .put_utility = keep_utility};

static void keeper_drop(struct keeper *x)
{
	for (uint32_t lane = 0; lane < LANES; lane++) {
		for (uint32_t d = 0; d < 8; d++) {
			free(x->k[lane][d]);
			free(x->v[lane][d]);
		}
		for (uint32_t u = 0; u < 16; u++)
			free(x->u[lane][u]);
	}
}

static struct set_opts options(uint32_t doc_rows, enum set_utility utility)
{
	return (struct set_opts){.dir = dir,
				 .splits = 1u << TRACE_TRAIN | 1u << TRACE_VALID,
				 .doc_rows = doc_rows,
				 .utility = utility,
				 .keep_means = 1u << TRACE_VALID,
				 .lanes = LANES,
				 .threads = 3,
				 .seed = 4};
}

static struct set *planned(const struct set_opts *o)
{
	char err[300] = "";
	struct set *s;

	if (set_plan(&s, o, err, sizeof(err)) != 0)
		fail_msg("%s", err);
	return s;
}

static uint32_t number_of(const char *path)
{
	return (uint32_t)atoi(strrchr(path, '-') + 1);
}

/* Half precision, and un-rotating what was stored in it, each cost up to a thousandth. */
static void check_loaded(const struct set *s, const struct keeper *x, bool unrotated,
			 enum set_utility utility_of)
{
	for (uint32_t lane = 0; lane < LANES; lane++)
		for (uint32_t u = 0; u < s->units; u++) {
			const struct set_unit *unit = &s->unit[u];
			const struct set_doc *d = &s->doc[unit->doc];
			uint32_t doc = number_of(d->path);
			double mean = 0;

			for (uint32_t i = 0; i < ROWS; i++)
				mean += (double)vnorm(doc, lane, i) / ROWS;
			for (uint32_t i = 0; i < unit->rows; i++) {
				uint32_t pos = d->pos[i];
				float want = utility(doc, lane, unit->cut, pos);

				if (unit->split == TRACE_VALID)
					assert_true(fabsf(unit->mean[lane * unit->rows + i] - want) < 1e-6f);
				if (utility_of == SET_MAX)
					want *= 2;
				if (utility_of == SET_VALUE)
					want *= vnorm(doc, lane, pos) / (float)mean;
				assert_true(fabsf(x->u[lane][u][i] - want) < 1e-5f);
				for (uint32_t c = 0; c < DIM; c++) {
					float k = half_float(x->k[lane][unit->doc][i * DIM + c]);
					float v = half_float(x->v[lane][unit->doc][i * DIM + c]);

					assert_true(fabsf(v - value(doc, lane, pos * DIM + c)) < 1e-3f);
					if (unrotated)
						assert_true(fabsf(k - key(doc, lane, pos * DIM + c)) < 2e-3f);
				}
			}
		}
}

static void test_load(void **state)
{
	for (uint32_t utility_of = SET_MAX; utility_of <= SET_VALUE; utility_of++) {
		struct set_opts o = options(100, utility_of);
		struct set *s = planned(&o);
		struct keeper x = {.base.ops = &keeper_ops, .set = s};
		struct weights_header shape = {.kind = WEIGHTS_KVP, .keys = WEIGHTS_KEYS_UNROTATED};
		char err[300] = "";

		assert_int_equal(s->docs, 6);
		assert_int_equal(s->units, 12); /* two cuts of each are long enough */
		if (set_load(s, &x.base, &shape, NULL, NULL, err, sizeof(err)) != 0)
			fail_msg("%s", err);
		check_loaded(s, &x, true, utility_of);
		keeper_drop(&x);
		memset(&x.k, 0, sizeof(x.k));
		set_free(s);
	}
}

/* Stored rows: as many as allowed, ascending, never protected ones, the same again, others with another seed.
 */
static void test_rows(void **state)
{
	struct set_opts o = options(100, SET_MEAN);
	struct set *a = planned(&o), *b = planned(&o), *c, *all;

	o.seed = 5;
	c = planned(&o);
	o.doc_rows = 1000;
	all = planned(&o);
	for (uint32_t d = 0; d < a->docs; d++) {
		assert_int_equal(a->doc[d].stored, 100);
		assert_int_equal(all->doc[d].stored, 280 - 16 - 4);
		for (uint32_t i = 0; i < 100; i++) {
			uint32_t pos = a->doc[d].pos[i];

			assert_true(pos >= 4 && pos < 280 - 16 && (!i || pos > a->doc[d].pos[i - 1]));
		}
		assert_memory_equal(a->doc[d].pos, b->doc[d].pos, 400);
		assert_memory_not_equal(a->doc[d].pos, c->doc[d].pos, 400);
	}
	for (uint32_t u = 0; u < a->units; u++) {
		const struct set_unit *x = &a->unit[u];

		assert_true(a->doc[x->doc].pos[x->rows - 1] < x->prompt - 16);
		assert_true(x->rows == 100 || a->doc[x->doc].pos[x->rows] >= x->prompt - 16);
	}
	assert_true(a->digest == b->digest && a->digest != c->digest && a->digest != all->digest);
	set_free(a);
	set_free(b);
	set_free(c);
	set_free(all);
}

/* An epoch sees each unit once; rows are within the unit, ascending; a step's batch can be made again. */
static void test_sampler(void **state)
{
	struct set_opts o = options(1000, SET_MEAN);
	struct set *s = planned(&o);
	struct train_opts t = {.batch = 4, .rows = 64, .seed = 9};
	uint32_t seen[16] = {0}, first_unit[4], first_rows[4 * 64], repeated = 0;
	struct sampler *p, *again;

	assert_int_equal(sampler_new(&p, s, TRACE_TRAIN, &t), 0);
	assert_int_equal(sampler_new(&again, s, TRACE_TRAIN, &t), 0);
	for (uint64_t step = 0; step < 10; step++) { /* 40 draws: four epochs of 10 units */
		const struct train_batch *b = sampler_step(p, step, 0.5f);

		assert_true(b->step == step && b->units == 4 && b->lr == 0.5f);
		for (uint32_t i = 0; i < 4; i++) {
			assert_int_equal(s->unit[b->unit[i]].split, TRACE_TRAIN);
			assert_int_equal(b->n[i], 64);
			seen[b->unit[i]]++;
			for (uint32_t j = 0; j < 64; j++) {
				uint32_t r = b->row[i * 64 + j];

				assert_true(r < s->unit[b->unit[i]].rows && (!j || r > b->row[i * 64 + j - 1]));
			}
		}
		if (step == 3) {
			memcpy(first_unit, b->unit, sizeof(first_unit));
			memcpy(first_rows, b->row, sizeof(first_rows));
		}
	}
	for (uint32_t u = 0; u < s->units; u++)
		assert_int_equal(seen[u], s->unit[u].split == TRACE_TRAIN ? 4 : 0);
	assert_memory_equal(sampler_step(again, 3, 0)->unit, first_unit, sizeof(first_unit));
	assert_memory_equal(again->row, first_rows, sizeof(first_rows));
	for (uint64_t step = 4; step < 20; step++)
		repeated += memcmp(sampler_step(again, step, 0)->row, first_rows, sizeof(first_rows)) == 0;
	assert_int_equal(repeated, 0);
	sampler_free(p);
	sampler_free(again);

	assert_int_equal(sampler_new(&p, s, TRACE_VALID, &t), 0);
	assert_int_equal(sampler_fixed(p, 0)->units, 2);
	memcpy(first_rows, p->row, 2 * 64 * sizeof(uint32_t));
	assert_null(sampler_fixed(p, 2));
	assert_int_equal(sampler_fixed(p, 1)->units, 1);
	assert_memory_equal(p->row, first_rows + 64, 64 * sizeof(uint32_t));
	sampler_free(p);
	set_free(s);
}

static void test_refusals(void **state)
{
	struct set_opts o = options(100, SET_MEAN);
	struct weights_header shape = {.kind = WEIGHTS_KVP};
	struct keeper x = {.base.ops = &keeper_ops};
	char err[300] = "", path[128];
	struct set *s;

	o.splits = 1u << TRACE_CALIB;
	assert_int_equal(set_plan(&s, &o, err, sizeof(err)), -EINVAL);
	assert_non_null(strstr(err, "split calib"));
	o = options(100, SET_MEAN);
	o.lanes = 3;
	assert_int_equal(set_plan(&s, &o, err, sizeof(err)), -EINVAL);
	assert_non_null(strstr(err, "lanes 0-2"));
	o = options(100, SET_MEAN);
	s = planned(&o);
	x.set = s;
	snprintf(path, sizeof(path), "%s", s->doc[2].path);
	write_doc(2, TRACE_TEST, TRACE_F32);
	assert_int_equal(truncate(path, 5000), 0); /* after it was planned */
	assert_int_equal(set_load(s, &x.base, &shape, NULL, NULL, err, sizeof(err)), -EBADMSG);
	assert_non_null(strstr(err, path));
	keeper_drop(&x);
	set_free(s);
	write_doc(2, TRACE_TRAIN, TRACE_F32);
}

static void test_half(void **state)
{
	for (uint32_t h = 0; h < 0x7c00; h++) {
		assert_int_equal(float_half(half_float((uint16_t)h)), h);
		assert_int_equal(float_half(-half_float((uint16_t)h)), h | 0x8000);
	}
	for (uint32_t h = 0; h < 0x7bff; h++) { /* halves between neighbours go to the even one */
		float low = half_float((uint16_t)h), high = half_float((uint16_t)(h + 1));

		assert_int_equal(float_half(low + (high - low) / 2), h + (h & 1));
		assert_int_equal(float_half(nextafterf(low + (high - low) / 2, INFINITY)), h + 1);
	}
	assert_int_equal(float_half(1e30f), 0x7bff);
	assert_int_equal(float_half(-INFINITY), 0xfbff);
	assert_int_equal(float_half(NAN), 0);
}

static void test_schedule(void **state)
{
	struct run_opts o = {.lr = 1e-3f, .lr_min = 1e-5f, .warmup = 100, .steps = 3000};

	assert_true(fabsf(run_lr(&o, 0) - 1e-5f) < 1e-9f);
	assert_true(fabsf(run_lr(&o, 50) - 5.05e-4f) < 1e-8f);
	assert_true(fabsf(run_lr(&o, 100) - 1e-3f) < 1e-9f);
	assert_true(fabsf(run_lr(&o, 1550) - 5.05e-4f) < 1e-7f);
	assert_true(run_lr(&o, 2999) < 1.001e-5f && run_lr(&o, 2999) >= 1e-5f);
	for (uint64_t s = 101; s < 3000; s++)
		assert_true(run_lr(&o, s) <= run_lr(&o, s - 1));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_load),     cmocka_unit_test(test_rows), cmocka_unit_test(test_sampler),
		cmocka_unit_test(test_refusals), cmocka_unit_test(test_half), cmocka_unit_test(test_schedule),
	};

	return cmocka_run_group_tests(tests, setup, teardown);
}
