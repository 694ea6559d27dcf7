/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * The kernels behind score_keys() and key_scores(): each pair gives the same bytes for every input.
 * A key is the score's half-precision pattern, mapped so that unsigned order
 * is numeric order: negative values are inverted, the others get the top bit.
 */
#include <stddef.h>
#include <stdint.h>

#define KEY_DROPPED 0          /* no row of any score has it */
#define KEY_LOWEST 1           /* a score that is not finite: below every finite one */
#define KEY_SCORE_MAX 65504.0f /* largest finite half; larger scores saturate */

void score_keys_portable(const float *scores, uint16_t *keys, size_t n);
/* Needs AVX2 and F16C. Rounds down to whole vectors and returns how many keys it wrote. */
size_t score_keys_avx2(const float *scores, uint16_t *keys, size_t n);
/* The same for the way back. */
void key_scores_portable(const uint16_t *keys, float *scores, size_t n);
size_t key_scores_avx2(const uint16_t *keys, float *scores, size_t n);
