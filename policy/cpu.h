/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Which kernels this CPU and this operating system can run. Cheap enough to ask
 * on every call: no caching, no globals.
 */
#include <stdbool.h>

#if defined(__x86_64__)
/* AVX2, FMA, F16C and POPCNT together: everything that *_avx2.c files are compiled for. */
static inline bool cpu_has_avx2(void)
{
	__builtin_cpu_init();
	return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
	       __builtin_cpu_supports("popcnt");
}
#else
static inline bool cpu_has_avx2(void)
{
	return false;
}
#endif
