/* SPDX-License-Identifier: MIT */
/*
 * Included once per instruction set, with KERN (name of the table), KERN_ISA,
 * KERN_BYTES (of a vector) and KERN_SQRT (of one). Vectors are the compiler's own (gcc and clang), so
 * that one text serves all widths.
 */
#include "policy/train/kern.h"

#include <immintrin.h>
#include <math.h>
#include <string.h>

#define LANES (KERN_BYTES / 4)
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(KERN_BYTES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(KERN_BYTES), aligned(4), may_alias));

INLINE vec load(const float *p)
{
	return *(const vec *)p;
}

INLINE void store(float *p, vec v)
{
	*(vec *)p = v;
}

INLINE vec splat(float x)
{
	return x - (vec){0};
}

INLINE vec pick(ivec mask, vec a, vec b)
{
	return (vec)(((ivec)a & mask) | ((ivec)b & ~mask));
}

INLINE float total(vec v)
{
	float sum = 0;

	for (int i = 0; i < LANES; i++)
		sum += v[i];
	return sum;
}

/*
 * exp for |x| <= 87: 2^k times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes' expf; two units in the last
 * place). Adding 1.5 * 2^23 rounds to the nearest integer.
 */
INLINE vec vexp(vec x)
{
	const float magic = 12582912.0f;
	vec k = x * 1.44269504f + magic, y, r;
	ivec bits;

	k -= magic;
	r = x - k * 0.693359375f;
	r += k * 2.12194440e-4f;
	y = splat(1.9875691500e-4f);
	y = y * r + 1.3981999507e-3f;
	y = y * r + 8.3334519073e-3f;
	y = y * r + 4.1665795894e-2f;
	y = y * r + 1.6666665459e-1f;
	y = y * r + 5.0000001201e-1f;
	y = y * r * r + r + 1.0f;
	bits = __builtin_convertvector(k, ivec) << 23;
	return (vec)((ivec)y + bits);
}

INLINE vec clamped(vec x, float limit)
{
	x = pick(x > limit, splat(limit), x);
	return pick(x < -limit, splat(-limit), x);
}

/* p * q of blocks of 256 are added up before they join the total, so that small terms are not lost in it. */
#define BLOCK 256u

INLINE void pairs_of(const float *e, const float *g, uint32_t n, uint32_t j, float *rank, float *grad,
		     bool with_grad)
{
	vec ej = load(e + j), gj = with_grad ? load(g + j) : splat(0), ranks = {0}, grads = {0};

	for (uint32_t from = 0; from < n; from += BLOCK) {
		uint32_t to = from + BLOCK < n ? from + BLOCK : n;
		vec a = {0}, b = {0};

		for (uint32_t i = from; i < to; i++) {
			vec r = 1.0f / (ej + e[i]), p = r * e[i];

			a += p;
			if (with_grad)
				b += (g[i] - gj) * (p * (ej * r));
		}
		ranks += a;
		grads += b;
	}
	if (rank)
		store(rank + j, ranks);
	if (with_grad)
		store(grad + j, grads);
}

static void pairs(const float *e, const float *g, uint32_t n, float *rank, float *grad)
{
	for (uint32_t j = 0; j < n; j += LANES) {
		if (grad)
			pairs_of(e, g, n, j, rank, grad, true);
		else
			pairs_of(e, g, n, j, rank, NULL, false);
	}
}

static void exponentials(const float *s, uint32_t n, float centre, float *e)
{
	uint32_t i = 0;

	for (; i + LANES <= n; i += LANES)
		store(e + i, vexp(clamped(load(s + i) - centre, 40.0f)));
	if (i < n) {
		float tail[LANES] = {0};

		memcpy(tail, s + i, (n - i) * sizeof(*s));
		store(tail, vexp(clamped(load(tail) - centre, 40.0f)));
		memcpy(e + i, tail, (n - i) * sizeof(*e));
	}
}

INLINE vec sigmoid(vec z)
{
	return 1.0f / (1.0f + vexp(clamped(-z, 80.0f)));
}

static void norm(const struct kern_norm *k, const float *in, float *hat, float *rstd, float *out,
		 uint32_t out_ld)
{
	const uint32_t w = k->width;

	for (uint32_t r = 0; r < k->rows; r++, in += w, hat += w, out += out_ld) {
		vec sum = {0}, squares = {0};
		float mean, scale;

		for (uint32_t i = 0; i < w; i += LANES) {
			vec x = load(in + i);

			if (k->bias)
				x += load(k->bias + i);
			store(hat + i, x);
			sum += x;
		}
		mean = total(sum) / (float)w;
		for (uint32_t i = 0; i < w; i += LANES) {
			vec x = load(hat + i) - mean;

			squares += x * x;
		}
		scale = 1.0f / sqrtf(total(squares) / (float)w + 1e-5f);
		rstd[r] = scale;
		for (uint32_t i = 0; i < w; i += LANES) {
			vec x = (load(hat + i) - mean) * scale, z;

			store(hat + i, x);
			z = x * load(k->gain + i) + load(k->shift + i);
			if (k->silu)
				z *= sigmoid(z);
			store(out + i, z);
		}
	}
}

static void norm_back(const struct kern_norm *k, const float *hat, const float *rstd, const float *dout,
		      uint32_t dout_ld, float *din, float *dgain, float *dshift, float *dbias)
{
	const uint32_t w = k->width;

	for (uint32_t r = 0; r < k->rows; r++, hat += w, din += w, dout += dout_ld) {
		vec sum = {0}, dot = {0};
		float mean, along;

		for (uint32_t i = 0; i < w; i += LANES) {
			vec x = load(hat + i), dz = load(dout + i), gain = load(k->gain + i);

			if (k->silu) {
				vec z = x * gain + load(k->shift + i), s = sigmoid(z);

				dz *= s * (1.0f + z * (1.0f - s));
			}
			store(dgain + i, load(dgain + i) + dz * x);
			store(dshift + i, load(dshift + i) + dz);
			dz *= gain;
			store(din + i, dz);
			sum += dz;
			dot += dz * x;
		}
		mean = total(sum) / (float)w;
		along = total(dot) / (float)w;
		for (uint32_t i = 0; i < w; i += LANES) {
			vec d = (load(din + i) - mean - load(hat + i) * along) * rstd[r];

			store(din + i, d);
			if (dbias)
				store(dbias + i, load(dbias + i) + d);
		}
	}
}

INLINE void adam_part(const struct kern_adam *a, float *p, const float *grad, float *m, float *v)
{
	vec g = load(grad) * a->scale, first = load(m), second = load(v), x = load(p);

	first += (1.0f - a->beta1) * (g - first);
	second += (1.0f - a->beta2) * (g * g - second);
	store(m, first);
	store(v, second);
	store(p, x - (a->decay * x + a->lr * (first * a->fix1) / ((vec)KERN_SQRT(second * a->fix2) + a->eps)));
}

static void adam(const struct kern_adam *a, float *p, const float *grad, float *m, float *v, size_t n)
{
	float tail[4][LANES] = {{0}};
	size_t i = 0, rest;

	for (; i + LANES <= n; i += LANES)
		adam_part(a, p + i, grad + i, m + i, v + i);
	rest = (n - i) * sizeof(float);
	memcpy(tail[0], p + i, rest);
	memcpy(tail[1], grad + i, rest);
	memcpy(tail[2], m + i, rest);
	memcpy(tail[3], v + i, rest);
	adam_part(a, tail[0], tail[1], tail[2], tail[3]);
	memcpy(p + i, tail[0], rest);
	memcpy(m + i, tail[2], rest);
	memcpy(v + i, tail[3], rest);
}

static void average(float *ema, const float *p, float keep, size_t n)
{
	size_t i = 0;

	for (; i + LANES <= n; i += LANES)
		store(ema + i, load(ema + i) + (1.0f - keep) * (load(p + i) - load(ema + i)));
	for (; i < n; i++)
		ema[i] += (1.0f - keep) * (p[i] - ema[i]);
}

static double sumsq(const float *x, size_t n)
{
	double sum = 0;

	for (size_t i = 0; i < n;) {
		size_t end = i + 1024 < n ? i + 1024 : n;
		vec part = {0};

		for (; i + LANES <= end; i += LANES)
			part += load(x + i) * load(x + i);
		sum += (double)total(part);
		for (; i < end; i++)
			sum += (double)x[i] * (double)x[i];
	}
	return sum;
}

const struct kern KERN = {
	.isa = KERN_ISA,
	.pairs = pairs,
	.exp = exponentials,
	.norm = norm,
	.norm_back = norm_back,
	.adam = adam,
	.average = average,
	.sumsq = sumsq,
};
