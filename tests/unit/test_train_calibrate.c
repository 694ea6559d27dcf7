/* SPDX-License-Identifier: MIT */
/* Calibration: what is fitted, what is looked up, and what a table may not say. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "policy/calibrate.h"
#include "policy/train/noise.h"
#include "shm/util.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static const struct calibrate_shape shape = {
	.lanes = 2,
	.knots = CALIBRATE_KNOTS,
	.lengths = 2,
	.distances = 2,
	.length_edge = {1000},
	.distance_edge = {100},
};

static float truth(float score, uint32_t distance)
{
	return expf(2 * score) * (distance < 100 ? 0.02f : 0.01f);
}

/* Scores roughly normal; values exponential around a truth that grows with the score and halves with distance.
 */
static struct calibrate_point *make(size_t count, uint64_t seed)
{
	struct calibrate_point *p = calloc(count, sizeof(*p));

	for (size_t i = 0; i < count; i++) {
		float s = -2;

		for (uint32_t k = 0; k < 4; k++)
			s += train_noise(seed, i, k, 0, 0, 0);
		p[i].score = s;
		p[i].n = 500 + (uint32_t)(train_hash(seed, i, 9, 0, 0, 0) % 1000);
		p[i].distance = (uint32_t)(train_hash(seed, i, 8, 0, 0, 0) % 200);
		p[i].value = -logf(train_noise(seed, i, 7, 0, 0, 0)) * truth(s, p[i].distance);
	}
	return p;
}

static float *fitted(struct calibration *c, size_t count)
{
	float *table = calloc(1, calibrate_bytes(&shape));
	char err[200] = "";

	calibrate_begin(table, &shape);
	for (uint32_t lane = 0; lane < 2; lane++) {
		struct calibrate_point *p = make(count, lane + 1);

		assert_int_equal(calibrate_fit(table, &shape, lane, 0.5f + (float)lane, p, count), 0);
		free(p);
	}
	if (calibrate_parse(c, table, calibrate_bytes(&shape), 2, err, sizeof(err)) != 0)
		fail_msg("%s", err);
	return table;
}

/* In every bucket the table follows the truth; totals over the best rows of a fresh sample agree within 5 %. */
static void test_fit(void **state)
{
	static const struct {
		uint32_t n, distance;
	} buckets[] = {{600, 50}, {600, 150}, {1400, 50}, {1400, 150}};
	struct calibration c;
	float *table = fitted(&c, 200000);
	struct calibrate_point *p = make(100000, 77);
	double predicted = 0, real = 0;

	for (size_t b = 0; b < ARRAY_SIZE(buckets); b++)
		for (float s = -0.8f; s < 0.85f; s += 0.1f) {
			float want = truth(s, buckets[b].distance);
			float got = calibrate_value(&c, 1, s, buckets[b].distance, buckets[b].n);

			assert_true(fabsf(got - want) < 0.15f * want);
		}
	for (size_t i = 0; i < 100000; i++)
		if (p[i].score > 0.5f) {
			predicted += (double)calibrate_value(&c, 0, p[i].score, p[i].distance, p[i].n);
			real += (double)p[i].value;
		}
	assert_true(fabs(real / predicted - 1) < 0.05);
	assert_true(calibrate_sensitivity(&c, 0) == 0.5f && calibrate_sensitivity(&c, 1) == 1.5f);
	free(table);
	free(p);
}

/* Values never fall as scores rise, not even where the data do, and any float may be asked for. */
static void test_monotone(void **state)
{
	static const float odd[] = {NAN, INFINITY, -INFINITY, 3e38f, -3e38f, 0};
	struct calibration c;
	float *table = fitted(&c, 3000), last = 0, low;

	for (float s = -3; s < 3; s += 0.01f) {
		float v = calibrate_value(&c, 0, s, 10, 600);

		assert_true(v >= last);
		last = v;
	}
	low = calibrate_value(&c, 0, -3, 10, 600);
	assert_true(calibrate_value(&c, 0, NAN, 10, 600) == low);
	assert_true(calibrate_value(&c, 0, INFINITY, 10, 600) == low);
	assert_true(calibrate_value(&c, 0, 3e38f, 10, 600) == last);
	for (size_t i = 0; i < ARRAY_SIZE(odd); i++)
		assert_true(isfinite(calibrate_value(&c, 1, odd[i], UINT32_MAX, UINT32_MAX)));
	free(table);
}

static void test_batch(void **state)
{
	static const uint32_t pos[] = {3, 580, 599};
	static const float scores[] = {0.1f, 0.2f, -0.4f};
	struct calibration c;
	float *table = fitted(&c, 50000), values[3], next[3];

	calibrate_values(&c, 1, scores, pos, 0, 3, 600, values);
	calibrate_values(&c, 1, scores, NULL, 597, 3, 600, next);
	for (uint32_t i = 0; i < 3; i++) {
		assert_true(values[i] == calibrate_value(&c, 1, scores[i], 599 - pos[i], 600));
		assert_true(next[i] == calibrate_value(&c, 1, scores[i], 2 - i, 600));
	}
	free(table);
}

/* Isotonic regression by hand: violators are pooled, equal scores are one. Fewer points than knots. */
static void test_pools(void **state)
{
	static const struct calibrate_shape one = {.lanes = 1, .knots = 64, .lengths = 1, .distances = 1};
	struct calibrate_point p[] = {{3, 1, 0, 5}, {1, 4, 0, 5}, {2, 2, 0, 5}, {5, 9, 0, 5}, {5, 7, 0, 5}};
	float table[6 + 1 + 128];
	struct calibration c;
	char err[200];

	calibrate_begin(table, &one);
	assert_int_equal(calibrate_fit(table, &one, 0, 1, p, 5), 0);
	assert_int_equal(calibrate_parse(&c, table, sizeof(table), 1, err, sizeof(err)), 0);
	assert_true(fabsf(calibrate_value(&c, 0, 1, 0, 5) - 7.0f / 3) < 1e-5f); /* 4, 2, 1 pooled */
	assert_true(fabsf(calibrate_value(&c, 0, 3, 0, 5) - 7.0f / 3) < 1e-5f);
	assert_true(fabsf(calibrate_value(&c, 0, 5, 0, 5) - 8) < 1e-5f);
	p[0].value = NAN;
	assert_int_equal(calibrate_fit(table, &one, 0, 1, p, 5), -EINVAL);
	p[0].value = -1;
	assert_int_equal(calibrate_fit(table, &one, 0, 1, p, 5), -EINVAL);
	assert_int_equal(calibrate_fit(table, &one, 0, 1, p, 0), -EINVAL);
}

static void refused(float *table, size_t word, float value, const char *why)
{
	struct calibration c;
	char err[200] = "";
	float before = table[word];

	table[word] = value;
	assert_int_equal(calibrate_parse(&c, table, calibrate_bytes(&shape), 2, err, sizeof(err)), -EBADMSG);
	if (!strstr(err, why))
		fail_msg("\"%s\" does not say \"%s\"", err, why);
	table[word] = before;
}

static void test_hostile(void **state)
{
	struct calibration c;
	float *table = fitted(&c, 20000);
	size_t lane = calibrate_head(&shape);
	char err[200];

	refused(table, 0, 1, "magic");
	refused(table, 1, 2, "version");
	refused(table, 2, 3, "lanes: 3, must be 2");
	refused(table, 2, NAN, "lanes");
	refused(table, 3, 0, "knots");
	refused(table, 3, 63, "bytes");
	refused(table, 3, 64.5f, "knots");
	refused(table, 3, 1e30f, "knots");
	refused(table, 4, 5, "lengths");
	refused(table, 5, -1, "distances");
	refused(table, 6, -5, "length edge");
	refused(table, 7, INFINITY, "distance edge");
	refused(table, lane, -1, "sensitivity");
	refused(table, lane + 5, NAN, "not finite");
	refused(table, lane + 1 + 63, -100, "below the knot");
	refused(table, lane + 1 + 64, -1e-9f, "negative");
	refused(table, lane + 1 + 127, 0, "below the knot");
	for (uint64_t size = 0; size < calibrate_bytes(&shape); size += size < 60 ? 1 : 397)
		assert_int_equal(calibrate_parse(&c, table, size, 2, err, sizeof(err)), -EBADMSG);
	free(table);
}

static void test_file(void **state)
{
	char path[] = "/tmp/kvtier-test.XXXXXX", err[300] = "";
	struct calibration c, back;
	float *table = fitted(&c, 20000);
	FILE *f;

	close(mkstemp(path));
	assert_int_equal(calibrate_write(path, table, &shape, "lagkv", "some-model"), 0);
	if (calibrate_load(&back, path, 2, err, sizeof(err)) != 0)
		fail_msg("%s", err);
	assert_string_equal(back.policy, "lagkv");
	assert_string_equal(back.model, "some-model");
	assert_true(calibrate_value(&back, 1, 0.3f, 5, 700) == calibrate_value(&c, 1, 0.3f, 5, 700));
	calibrate_drop(&back);
	calibrate_drop(&back);
	calibrate_drop(NULL);
	assert_int_equal(calibrate_load(&back, path, 3, err, sizeof(err)), -EBADMSG);
	assert_non_null(strstr(err, "lanes"));
	f = fopen(path, "r+");
	fseek(f, 700, SEEK_SET);
	fputc(0x55, f);
	fclose(f);
	assert_int_equal(calibrate_load(&back, path, 2, err, sizeof(err)), -EBADMSG);
	assert_non_null(strstr(err, "CRC"));
	assert_int_equal(truncate(path, 100), 0);
	assert_int_equal(calibrate_load(&back, path, 2, err, sizeof(err)), -EBADMSG);
	unlink(path);
	assert_int_equal(calibrate_load(&back, path, 2, err, sizeof(err)), -ENOENT);
	free(table);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_fit),   cmocka_unit_test(test_monotone), cmocka_unit_test(test_batch),
		cmocka_unit_test(test_pools), cmocka_unit_test(test_hostile),  cmocka_unit_test(test_file),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
