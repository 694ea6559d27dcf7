/* SPDX-License-Identifier: MIT */
#include "policy/trace_rope.h"

void rope_run_avx2(const struct rope_job *job)
{
	rope_run(job);
}
