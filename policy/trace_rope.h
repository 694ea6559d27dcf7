/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Rotations for rope_undo() and rope_apply(), compiled once for any CPU and once
 * with AVX2. Internal to policy/trace_rope*.c.
 */
#include <math.h>
#include <string.h>
#include "policy/trace.h"

#define ROPE_STEP 8                    /* pairs at a time; the tables are padded to it */
#define ROPE_PAIRS (TRACE_MAX_DIM / 2) /* a multiple of ROPE_STEP */

struct rope_job {
	float *rows;
	const uint32_t *pos;
	uint32_t dim, n;
	enum trace_rope rope;
	float sign;             /* 1 applies, -1 undoes */
	float freq[ROPE_PAIRS]; /* theta^(-2p/dim) */
};

void rope_run_portable(const struct rope_job *job);
void rope_run_avx2(const struct rope_job *job);

/*
 * Cosine and sine of ROPE_STEP angles below 2^21: quarter turns are taken off in
 * double (adding and subtracting 1.5 * 2^52 rounds to an integer), the rest, within
 * pi/4, goes through Taylor polynomials whose next terms are below 3e-9.
 */
static inline void rope_angles(float *restrict co, float *restrict si, const float *restrict freq, uint32_t pos)
{
	for (int i = 0; i < ROPE_STEP; i++) {
		float angle = (float)pos * freq[i];
		double quarters = (double)angle * 0.63661977236758134308;
		double shifted = quarters + 0x1.8p52, whole = shifted - 0x1.8p52;
		float r = (float)((quarters - whole) * 1.57079632679489661923), r2 = r * r, s, c;
		uint32_t q = (uint32_t)(int32_t)whole, swap = 0 - (q & 1), s_bits, c_bits, a, b;

		s = r + r * r2 *
				(-0x1.555556p-3f +
				 r2 * (0x1.111112p-7f + r2 * (-0x1.a01a02p-13f + r2 * 0x1.71de3ap-19f)));
		c = 1.0f +
		    r2 * (-0.5f + r2 * (0x1.555556p-5f + r2 * (-0x1.6c16c2p-10f + r2 * 0x1.a01a02p-16f)));
		memcpy(&s_bits, &s, sizeof(s));
		memcpy(&c_bits, &c, sizeof(c));
		a = (c_bits & swap) | (s_bits & ~swap); /* sine by quarter: s, c, -s, -c */
		b = (s_bits & swap) | (c_bits & ~swap); /* cosine: c, -s, -c, s */
		a ^= (q & 2) << 30;
		b ^= ((q + 1) & 2) << 30;
		memcpy(&si[i], &a, sizeof(a));
		memcpy(&co[i], &b, sizeof(b));
	}
}

static inline void rope_half(float *restrict lo, float *restrict hi, const float *restrict co,
			     const float *restrict si, uint32_t pairs)
{
	for (uint32_t p = 0; p < pairs; p++) {
		float a = lo[p], b = hi[p];

		lo[p] = a * co[p] - b * si[p];
		hi[p] = b * co[p] + a * si[p];
	}
}

static inline void rope_run(const struct rope_job *job)
{
	uint32_t pairs = job->dim / 2;
	float co[ROPE_PAIRS], si[ROPE_PAIRS];

	for (uint32_t i = 0; i < job->n; i++) {
		float *x = job->rows + (size_t)i * job->dim;

		for (uint32_t p = 0; p < pairs; p += ROPE_STEP)
			rope_angles(co + p, si + p, job->freq + p, job->pos[i]);
		for (uint32_t p = 0; p < pairs; p++)
			si[p] *= job->sign;
		if (job->rope == TRACE_ROPE_HALF) {
			rope_half(x, x + pairs, co, si, pairs);
			continue;
		}
		for (uint32_t p = 0; p < pairs; p++) {
			float a = x[2 * p], b = x[2 * p + 1];

			x[2 * p] = a * co[p] - b * si[p];
			x[2 * p + 1] = b * co[p] + a * si[p];
		}
	}
}
