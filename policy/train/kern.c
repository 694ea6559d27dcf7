/* SPDX-License-Identifier: MIT */
/* The portable form, and the choice among the forms. */
#define KERN kern_portable
#define KERN_ISA "portable"
#define KERN_BYTES 16
#define KERN_SQRT _mm_sqrt_ps
#include "policy/train/kern_body.h"

#include <stdlib.h>

const struct kern *kern_best(void)
{
	const struct kern *have[] = {&kern_portable, NULL, NULL};
	const char *wish = getenv("KVT_TRAIN_ISA");
	int n = 1;

	if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
		have[n++] = &kern_avx2;
	if (n == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
	    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
		have[n++] = &kern_avx512;
	for (int i = 0; wish && i < n; i++)
		if (strcmp(wish, have[i]->isa) == 0)
			return have[i];
	return have[n - 1];
}
