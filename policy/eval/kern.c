/* SPDX-License-Identifier: MIT */
/* Rows of attention on any CPU, and the choice of kernels. */
#include <math.h>
#include "policy/cpu.h"
#include "policy/eval/kern.h"
#include "shm/util.h"

static float exp_row(float *s, uint32_t n, float scale)
{
	float top = -INFINITY;
	double sum = 0;

	for (uint32_t i = 0; i < n; i++)
		top = MAX(top, s[i]);
	for (uint32_t i = 0; i < n; i++) {
		s[i] = expf((s[i] - top) * scale);
		sum += s[i];
	}
	return (float)sum;
}

static void axpy(float *acc, const float *x, float w, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++)
		acc[i] += w * x[i];
}

static void most(float *acc, const float *x, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++)
		acc[i] = MAX(acc[i], x[i]);
}

const struct eval_kern eval_portable = {.isa = "portable", .exp_row = exp_row, .axpy = axpy, .most = most};

const struct eval_kern *eval_kern(void)
{
#if defined(__x86_64__)
	if (cpu_has_avx2())
		return &eval_avx2;
#endif
	return &eval_portable;
}
