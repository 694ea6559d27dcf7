/* SPDX-License-Identifier: MIT */
/* Only called where the CPU has it: see kern_best(). */
#define KERN kern_avx512
#define KERN_ISA "avx512"
#define KERN_BYTES 64
#define KERN_SQRT _mm512_sqrt_ps
#include "policy/train/kern_body.h"
