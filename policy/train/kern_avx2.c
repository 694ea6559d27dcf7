/* SPDX-License-Identifier: MIT */
/* Only called where the CPU has it: see kern_best(). */
#define KERN kern_avx2
#define KERN_ISA "avx2"
#define KERN_BYTES 32
#define KERN_SQRT _mm256_sqrt_ps
#include "policy/train/kern_body.h"
