/* SPDX-License-Identifier: MIT */
/*
 * The selection's vector kernels: sixteen keys to a register, 64 rows to a bitmap
 * word. A cut is found bit by bit, first its high byte over the keys' high bytes,
 * then its low byte over the low bytes of the keys that share it: sixteen counts of
 * 32 keys an instruction, which beats counters in memory for the few cuts we need.
 */
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

/* How many of 64 * words bytes are at least t. */
static uint32_t count_from(const uint8_t *x, uint32_t words, uint8_t t)
{
	const __m256i least = _mm256_set1_epi8((char)t);
	__m256i total = _mm256_setzero_si256();

	for (uint32_t w = 0; w < words;) {
		uint32_t stop =
			words - w < 127 ? words : w + 127; /* two per word and lane: no byte overflows */
		__m256i a = _mm256_setzero_si256(), b = a;

		for (; w < stop; w++) {
			__m256i lo = _mm256_loadu_si256((const __m256i *)(x + w * 64));
			__m256i hi = _mm256_loadu_si256((const __m256i *)(x + w * 64 + 32));

			a = _mm256_sub_epi8(a, _mm256_cmpeq_epi8(_mm256_max_epu8(lo, least), lo));
			b = _mm256_sub_epi8(b, _mm256_cmpeq_epi8(_mm256_max_epu8(hi, least), hi));
		}
		total = _mm256_add_epi64(total, _mm256_sad_epu8(a, _mm256_setzero_si256()));
		total = _mm256_add_epi64(total, _mm256_sad_epu8(b, _mm256_setzero_si256()));
	}
	return (uint32_t)(_mm256_extract_epi64(total, 0) + _mm256_extract_epi64(total, 1) +
			  _mm256_extract_epi64(total, 2) + _mm256_extract_epi64(total, 3));
}

/* The k-th largest byte; *ret_rest is its rank among its equals (from 1). Zeros only count when k reaches them.
 */
static uint8_t kth_byte(const uint8_t *x, uint32_t words, uint32_t k, uint32_t *ret_rest)
{
	uint32_t above = 0;
	uint8_t t = 0;

	for (uint32_t bit = 128; bit; bit >>= 1) {
		uint32_t c = count_from(x, words, (uint8_t)(t | bit));

		if (c >= k)
			t |= (uint8_t)bit;
		else
			above = c; /* the last such try is t + 1 */
	}
	*ret_rest = k - above;
	return t;
}

static void high_bytes(const uint16_t *eff, uint32_t words, uint8_t *out)
{
	for (uint32_t i = 0; i < words * 64; i += 32) {
		__m256i a = _mm256_srli_epi16(_mm256_loadu_si256((const __m256i *)(eff + i)), 8);
		__m256i b = _mm256_srli_epi16(_mm256_loadu_si256((const __m256i *)(eff + i + 16)), 8);

		_mm256_storeu_si256((__m256i *)(out + i),
				    _mm256_permute4x64_epi64(_mm256_packus_epi16(a, b), 0xd8));
	}
}

/* Low bytes of the keys whose high byte is `high`, 0 for all others. */
static void low_bytes(const uint16_t *eff, const uint8_t *highs, uint32_t words, uint8_t high, uint8_t *out)
{
	const __m256i low = _mm256_set1_epi16(0xff), want = _mm256_set1_epi8((char)high);

	for (uint32_t i = 0; i < words * 64; i += 32) {
		__m256i a = _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(eff + i)), low);
		__m256i b = _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(eff + i + 16)), low);
		__m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi16(a, b), 0xd8);
		__m256i same = _mm256_cmpeq_epi8(_mm256_loadu_si256((const __m256i *)(highs + i)), want);

		_mm256_storeu_si256((__m256i *)(out + i), _mm256_and_si256(packed, same));
	}
}

static void find_avx2(const uint16_t *eff, uint32_t words, const uint32_t *k, uint32_t cuts, uint8_t *bytes,
		      struct select_cut *ret)
{
	uint8_t *high = bytes, *low = bytes + (size_t)words * 64;

	high_bytes(eff, words, high);
	for (uint32_t j = 0; j < cuts; j++) {
		uint32_t rest;
		uint8_t h = kth_byte(high, words, k[j], &rest);

		low_bytes(eff, high, words, h, low);
		ret[j].key = (uint16_t)(h << 8 | kth_byte(low, words, rest, &ret[j].ties));
	}
}

const struct select_kern select_avx2 = {
	.find = find_avx2,
	.mask = mask_avx2,
	.split = split_avx2,
	.count = count_avx2,
};
