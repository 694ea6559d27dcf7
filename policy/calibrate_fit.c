/* SPDX-License-Identifier: MIT */
/* Isotonic regression of value on score, reduced to knots. */
#include "policy/calibrate.h"
#include "shm/util.h"

#include <math.h>
#include <string.h>

#define LEAST_PER_KNOT 32u
/* The share of rows above the j-th of K group borders, counted from the top, is (e^(a j / K) - 1) / (e^a - 1).
 */
#define STEEPNESS 4.0

static int by_score(const void *a, const void *b)
{
	float x = ((const struct calibrate_point *)a)->score, y = ((const struct calibrate_point *)b)->score;

	return x < y ? -1 : x > y;
}

struct pool {
	double sum;
	size_t count;
};

/* Pool adjacent violators: fitted[i] for values in the order of their scores; equal scores are one value. */
static void isotonic(const struct calibrate_point *p, size_t n, struct pool *stack, double *fitted)
{
	size_t top = 0, at = 0;

	for (size_t i = 0; i < n;) {
		struct pool x = {0, 0};

		do {
			x.sum += (double)p[i + x.count].value;
			x.count++;
		} while (i + x.count < n && p[i + x.count].score == p[i].score);
		i += x.count;
		while (top && stack[top - 1].sum * (double)x.count >= x.sum * (double)stack[top - 1].count) {
			top--;
			x.sum += stack[top].sum;
			x.count += stack[top].count;
		}
		stack[top++] = x;
	}
	for (size_t k = 0; k < top; k++)
		for (size_t i = 0; i < stack[k].count; i++)
			fitted[at++] = stack[k].sum / (double)stack[k].count;
}

/* Averages of groups of consecutive rows. Averages of ascending numbers ascend; rounding is kept from undoing
 * it. */
static void reduce(const struct calibrate_point *p, const double *fitted, size_t n, uint32_t knots,
		   float *score, float *value)
{
	size_t from = 0;

	for (uint32_t k = 0; k < knots; k++) {
		double above = (exp(STEEPNESS * (knots - 1 - k) / knots) - 1) / (exp(STEEPNESS) - 1);
		size_t least = from + (n >= 4 * (size_t)knots ? 4 : n > from && n >= knots),
		       to = n - (size_t)(above * (double)n);
		double s = 0, v = 0;

		to = k + 1 == knots ? n : MIN(MAX(to, least), n);
		for (size_t i = from; i < to; i++) {
			s += (double)p[i].score;
			v += fitted[i];
		}
		if (to > from) {
			score[k] = (float)(s / (double)(to - from));
			value[k] = (float)(v / (double)(to - from));
		} else {
			score[k] = from ? p[from - 1].score : p[0].score;
			value[k] = (float)(from ? fitted[from - 1] : fitted[0]);
		}
		if (k && score[k] < score[k - 1])
			score[k] = score[k - 1];
		if (k && value[k] < value[k - 1])
			value[k] = value[k - 1];
		from = to;
	}
}

static bool falls_in(const float *edge, uint32_t n, uint32_t b, uint32_t x)
{
	return (b == 0 || (float)x >= edge[b - 1]) && (b + 1 >= n || (float)x < edge[b]);
}

int calibrate_fit(float *table, const struct calibrate_shape *s, uint32_t lane, float sensitivity,
		  struct calibrate_point *points, size_t count)
{
	_cleanup_free_ struct calibrate_point *some = calloc(count + 1, sizeof(*some));
	_cleanup_free_ struct pool *stack = calloc(count + 1, sizeof(*stack));
	_cleanup_free_ double *fitted = calloc(count + 1, sizeof(*fitted));
	float *out = table + calibrate_head(s) + lane * calibrate_stride(s);

	if (!some || !stack || !fitted)
		return -ENOMEM;
	for (size_t i = 0; i < count; i++)
		if (!isfinite(points[i].score) || !isfinite(points[i].value) || points[i].value < 0)
			return -EINVAL;
	if (!count || !isfinite(sensitivity) || sensitivity < 0)
		return -EINVAL;
	qsort(points, count, sizeof(*points), by_score);
	*out++ = sensitivity;
	for (uint32_t b = 0; b < s->lengths * s->distances; b++, out += 2 * s->knots) {
		size_t n = 0;

		for (size_t i = 0; i < count; i++)
			if (falls_in(s->length_edge, s->lengths, b / s->distances, points[i].n) &&
			    falls_in(s->distance_edge, s->distances, b % s->distances, points[i].distance))
				some[n++] = points[i];
		if (n < (size_t)LEAST_PER_KNOT * s->knots) {
			memcpy(some, points, count * sizeof(*points));
			n = count;
		}
		isotonic(some, n, stack, fitted);
		reduce(some, fitted, n, s->knots, out, out + s->knots);
	}
	return 0;
}
