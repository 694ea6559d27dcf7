/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * The arithmetic of attention over long rows of floats. The kernels differ by CPU in rounding only. Pure; any
 * thread. Internal to policy/eval.
 */
#include <stdint.h>

struct eval_kern {
	const char *isa;
	/* s[i] = exp(scale * s[i] - largest scaled element); returns their sum. n >= 1, scale > 0. */
	float (*exp_row)(float *s, uint32_t n, float scale);
	/* acc[i] += w * x[i]. */
	void (*axpy)(float *acc, const float *x, float w, uint32_t n);
	/* acc[i] = max(acc[i], x[i]). */
	void (*most)(float *acc, const float *x, uint32_t n);
};
extern const struct eval_kern eval_portable, eval_avx2;

/* The best of this CPU. */
const struct eval_kern *eval_kern(void);
