/* SPDX-License-Identifier: MIT */
/* Scores to keys, 16 at a time. F16C rounds as half_bits() does and keeps subnormal halves. */
#include <immintrin.h>
#include "policy/keys.h"

/* Eight scores to eight keys. */
static __m128i keys8(const float *scores)
{
	const __m256 max = _mm256_set1_ps(KEY_SCORE_MAX), min = _mm256_set1_ps(-KEY_SCORE_MAX);
	const __m256i inf_less_one = _mm256_set1_epi32(0x7f7fffff), mag = _mm256_set1_epi32(0x7fffffff);
	__m256 f = _mm256_loadu_ps(scores);
	__m256i bad = _mm256_cmpgt_epi32(_mm256_and_si256(_mm256_castps_si256(f), mag), inf_less_one);
	__m128i bad16 = _mm_packs_epi32(_mm256_castsi256_si128(bad), _mm256_extracti128_si256(bad, 1));
	__m128i half, flip;

	f = _mm256_add_ps(f, _mm256_setzero_ps());
	f = _mm256_max_ps(_mm256_min_ps(f, max), min);
	half = _mm256_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT);
	flip = _mm_or_si128(_mm_srai_epi16(half, 15), _mm_set1_epi16((short)0x8000));
	return _mm_blendv_epi8(_mm_xor_si128(half, flip), _mm_set1_epi16(KEY_LOWEST), bad16);
}

size_t score_keys_avx2(const float *scores, uint16_t *keys, size_t n)
{
	size_t i;

	for (i = 0; i + 16 <= n; i += 16) {
		_mm_storeu_si128((__m128i *)(keys + i), keys8(scores + i));
		_mm_storeu_si128((__m128i *)(keys + i + 8), keys8(scores + i + 8));
	}
	return i;
}

size_t key_scores_avx2(const uint16_t *keys, float *scores, size_t n)
{
	size_t i;

	for (i = 0; i + 8 <= n; i += 8) {
		__m128i key = _mm_loadu_si128((const __m128i *)(keys + i)),
			negative = _mm_cmpgt_epi16(key, _mm_set1_epi16(-1));
		__m128i flip = _mm_or_si128(negative, _mm_set1_epi16((short)0x8000));

		_mm256_storeu_ps(scores + i, _mm256_cvtph_ps(_mm_xor_si128(key, flip)));
	}
	return i;
}
