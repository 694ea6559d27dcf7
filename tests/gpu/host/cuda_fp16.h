/* SPDX-License-Identifier: MIT */
#pragma once
/* Half precision on the CPU (F16C). See cuda_runtime.h beside this. */
#include <immintrin.h>

struct __half {
	unsigned short bits;
};
static inline __half __ushort_as_half(unsigned short bits)
{
	return {bits};
}
static inline float __half2float(__half h)
{
	return _cvtsh_ss(h.bits);
}
