/* SPDX-License-Identifier: MIT */
/* The selection's vector kernels: sixteen keys to a register, 64 rows to a bitmap word. */
#include <immintrin.h>
#include <string.h>
#include "policy/select.h"

/* Lane i of the result is all ones when bit i of the low 16 bits is set. */
static __m256i spread16(uint64_t bits)
{
	const __m256i one = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192,
					      16384, (short)32768);

	return _mm256_cmpeq_epi16(_mm256_and_si256(_mm256_set1_epi16((short)bits), one), one);
}

/* Sign bits of 32 lanes of 16 bits, in order. */
static uint64_t gather32(__m256i lo, __m256i hi)
{
	__m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi16(lo, hi), 0xd8);

	return (uint32_t)_mm256_movemask_epi8(packed);
}

static void mask64(const uint16_t *keys, uint64_t mask, uint16_t *eff)
{
	for (uint32_t i = 0; i < 64; i += 16) {
		__m256i k = _mm256_loadu_si256((const __m256i *)(keys + i));

		k = _mm256_max_epu16(k, _mm256_set1_epi16(1));
		_mm256_storeu_si256((__m256i *)(eff + i), _mm256_and_si256(k, spread16(mask >> i)));
	}
}

static void mask_avx2(const uint16_t *keys, const uint64_t *mask, uint32_t n, uint32_t words, uint16_t *eff)
{
	uint32_t whole = n / 64;

	for (uint32_t w = 0; w < whole; w++)
		mask64(keys + w * 64, mask[w], eff + w * 64);
	for (uint32_t w = whole; w < words; w++) {
		uint16_t tail[64] = {0};
		uint32_t have = w == whole ? n % 64 : 0;

		memcpy(tail, keys + (size_t)whole * 64, have * sizeof(*tail));
		mask64(tail, have ? mask[w] & ((UINT64_C(1) << have) - 1) : 0, eff + w * 64);
	}
}

static void split_avx2(const uint16_t *eff, uint32_t words, uint16_t cut, uint64_t *above, uint64_t *equal)
{
	const __m256i c = _mm256_set1_epi16((short)cut), zero = _mm256_setzero_si256();

	for (uint32_t w = 0; w < words; w++) {
		__m256i eq[4], le[4];

		for (uint32_t i = 0; i < 4; i++) {
			__m256i k = _mm256_loadu_si256((const __m256i *)(eff + w * 64 + i * 16));

			eq[i] = _mm256_cmpeq_epi16(k, c);
			le[i] = _mm256_cmpeq_epi16(_mm256_subs_epu16(k, c), zero);
		}
		equal[w] = gather32(eq[0], eq[1]) | gather32(eq[2], eq[3]) << 32;
		above[w] = ~(gather32(le[0], le[1]) | gather32(le[2], le[3]) << 32);
	}
}

static uint32_t count_avx2(const uint64_t *bits, uint32_t words)
{
	uint64_t c = 0;

	for (uint32_t w = 0; w < words; w++)
		c += (uint64_t)_mm_popcnt_u64(bits[w]);
	return (uint32_t)c;
}

const struct select_kern select_avx2 = {
	.mask = mask_avx2,
	.split = split_avx2,
	.count = count_avx2,
};
