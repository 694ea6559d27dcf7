/* SPDX-License-Identifier: MIT */
#include "policy/cpu.h"
#include "policy/trace_rope.h"

void rope_run_portable(const struct rope_job *job)
{
	rope_run(job);
}

static void turn(float *rows, uint32_t dim, uint32_t n, const uint32_t *pos, enum trace_rope rope, float theta,
		 float sign)
{
	struct rope_job job = {.rows = rows, .pos = pos, .dim = dim, .n = n, .rope = rope, .sign = sign};

	if (rope == TRACE_ROPE_NONE)
		return;
	for (uint32_t p = 0; p < dim / 2; p++)
		job.freq[p] = (float)pow((double)theta, -2.0 * p / dim);
	if (cpu_has_avx2())
		rope_run_avx2(&job);
	else
		rope_run_portable(&job);
}

void rope_apply(float *rows, uint32_t dim, uint32_t n, const uint32_t *pos, enum trace_rope rope, float theta)
{
	turn(rows, dim, n, pos, rope, theta, 1.0f);
}

void rope_undo(float *rows, uint32_t dim, uint32_t n, const uint32_t *pos, enum trace_rope rope, float theta)
{
	turn(rows, dim, n, pos, rope, theta, -1.0f);
}
