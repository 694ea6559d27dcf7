/* SPDX-License-Identifier: MIT */
/* Scores to 16-bit sortable keys. */
#include <string.h>
#include "policy/cpu.h"
#include "policy/decide.h"
#include "policy/keys.h"

static uint32_t float_bits(float f)
{
	uint32_t u;

	memcpy(&u, &f, sizeof(u));
	return u;
}

/*
 * |f| <= KEY_SCORE_MAX to IEEE half precision, to nearest, ties to even. The
 * smallest half step below 2^-14 is 2^-24, which is also the step of floats in
 * [0.5, 1): adding 0.5 makes the float unit do the rounding.
 */
static uint16_t half_bits(float f)
{
	uint32_t u = float_bits(f), sign = u >> 16 & 0x8000, mag = u & 0x7fffffff;
	float small;

	if (mag >= 0x38800000) /* 2^-14, the smallest normal half: move the exponent's bias, then round */
		return (uint16_t)(sign | (mag - 0x38000000 + 0xfff + (mag >> 13 & 1)) >> 13);
	memcpy(&small, &mag, sizeof(small));
	return (uint16_t)(sign | (float_bits(small + 0.5f) - 0x3f000000));
}

uint16_t score_key(float score)
{
	uint16_t h;

	if ((float_bits(score) & 0x7fffffff) >= 0x7f800000)
		return KEY_LOWEST;
	score += 0.0f; /* -0 and 0 are one score */
	score = score < KEY_SCORE_MAX ? score : KEY_SCORE_MAX;
	score = score > -KEY_SCORE_MAX ? score : -KEY_SCORE_MAX;
	h = half_bits(score);
	return (uint16_t)(h & 0x8000 ? ~h : h | 0x8000);
}

void score_keys_portable(const float *scores, uint16_t *keys, size_t n)
{
	for (size_t i = 0; i < n; i++)
		keys[i] = score_key(scores[i]);
}

void score_keys(const float *scores, uint16_t *keys, size_t n)
{
	size_t done = cpu_has_avx2() ? score_keys_avx2(scores, keys, n) : 0;

	score_keys_portable(scores + done, keys + done, n - done);
}

/* Half precision to float; halves below 2^-14 have steps of 2^-24. */
static float half_value(uint16_t h)
{
	uint32_t mag = h & 0x7fff, u = mag << 13;
	float f;

	if (mag >= 0x7c00)
		u |= 0x7f800000;
	else if (mag >= 0x400)
		u += 0x38000000;
	memcpy(&f, &u, sizeof(f));
	if (mag < 0x400)
		f = (float)mag * 0x1p-24f;
	return h & 0x8000 ? -f : f;
}

void key_scores_portable(const uint16_t *keys, float *scores, size_t n)
{
	for (size_t i = 0; i < n; i++)
		scores[i] = half_value((uint16_t)(keys[i] & 0x8000 ? keys[i] ^ 0x8000 : ~keys[i]));
}

void key_scores(const uint16_t *keys, float *scores, size_t n)
{
	size_t done = cpu_has_avx2() ? key_scores_avx2(keys, scores, n) : 0;

	key_scores_portable(keys + done, scores + done, n - done);
}
