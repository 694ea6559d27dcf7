/* SPDX-License-Identifier: MIT */
/*
 * Selection over 16-bit keys: find where each cut falls, then compare. The
 * portable search is a radix selection in two passes of 256 buckets. The first
 * counts high bytes and finds, for every cut, the bucket in which it falls; the
 * second counts low bytes of those buckets only, through a table from high byte to
 * counters, all others going to counters nobody reads. Four interleaved sets of
 * counters in the first pass keep equal neighbours from waiting for each other's store.
 */
#include <string.h>
#include "policy/cpu.h"
#include "policy/select.h"
#include "shm/bits.h"
#include "shm/util.h"

static void mask_portable(const uint16_t *keys, const uint64_t *mask, uint32_t n, uint32_t words, uint16_t *eff)
{
	for (uint32_t i = 0; i < n; i++) {
		uint16_t key = (uint16_t)(keys[i] | (keys[i] == 0));

		eff[i] = (uint16_t)(key & -(mask[i / 64] >> (i % 64) & 1));
	}
	memset(eff + n, 0, ((size_t)words * 64 - n) * sizeof(*eff));
}

static void split_portable(const uint16_t *eff, uint32_t words, uint16_t cut, uint64_t *above, uint64_t *equal)
{
	for (uint32_t w = 0; w < words; w++) {
		uint64_t gt = 0, eq = 0;

		for (uint32_t i = 0; i < 64; i++) {
			gt |= (uint64_t)(eff[w * 64 + i] > cut) << i;
			eq |= (uint64_t)(eff[w * 64 + i] == cut) << i;
		}
		above[w] = gt;
		equal[w] = eq;
	}
}

static uint32_t count_portable(const uint64_t *bits, uint32_t words)
{
	return bits_rank(bits, words * 64);
}

static void count_high(const uint16_t *eff, uint32_t n, uint32_t high[256])
{
	uint32_t part[4][256] = {0}, i;

	for (i = 0; i + 4 <= n; i += 4) {
		uint64_t four;

		memcpy(&four, eff + i, sizeof(four));
		part[0][four >> 8 & 0xff]++;
		part[1][four >> 24 & 0xff]++;
		part[2][four >> 40 & 0xff]++;
		part[3][four >> 56]++;
	}
	for (; i < n; i++)
		part[0][eff[i] >> 8]++;
	for (i = 0; i < 256; i++)
		high[i] = part[0][i] + part[1][i] + part[2][i] + part[3][i];
}

/* The bucket that holds the k-th largest; *ret_rest is its rank inside the bucket (from 1). */
static uint32_t bucket_of(const uint32_t counts[256], uint32_t k, uint32_t *ret_rest)
{
	uint32_t b = 255;

	while (k > counts[b])
		k -= counts[b--];
	*ret_rest = k;
	return b;
}

static void find_portable(const uint16_t *eff, uint32_t words, const uint32_t *k, uint32_t cuts, uint8_t *bytes,
			  struct select_cut *ret)
{
	uint32_t high[256], low[(SELECT_CUTS + 1) * 256] = {0}, rest[SELECT_CUTS], bucket[SELECT_CUTS];
	uint16_t slot[256] = {0}; /* of a high byte: its set of low counters, times 256 */
	uint32_t n = words * 64;

	count_high(eff, n, high);
	for (uint32_t j = 0; j < cuts; j++) {
		bucket[j] = bucket_of(high, k[j], &rest[j]);
		if (!slot[bucket[j]])
			slot[bucket[j]] = (uint16_t)((j + 1) * 256);
	}
	for (uint32_t i = 0; i < n; i++)
		low[slot[eff[i] >> 8] + (eff[i] & 0xff)]++;
	for (uint32_t j = 0; j < cuts; j++) {
		uint32_t b = bucket_of(low + slot[bucket[j]], rest[j], &ret[j].ties);

		ret[j].key = (uint16_t)(bucket[j] << 8 | b);
	}
}

const struct select_kern select_portable = {
	.mask = mask_portable,
	.split = split_portable,
	.count = count_portable,
	.find = find_portable,
};

const struct select_kern *select_kern(void)
{
	return cpu_has_avx2() ? &select_avx2 : &select_portable;
}

/* OR the latest `ties` bits of equal into out. */
static void take_latest(const struct select_kern *kern, const uint64_t *equal, uint32_t words, uint32_t ties,
			uint64_t *out)
{
	uint32_t spare = kern->count(equal, words) - ties; /* earliest ones, left behind */

	for (uint32_t w = 0; w < words; w++) {
		uint64_t e = equal[w];

		if (spare) {
			uint32_t here = (uint32_t)__builtin_popcountll(e), skip = MIN(here, spare);

			spare -= skip;
			e = skip == here ? 0 : e;
			for (; e && skip; skip--)
				e &= e - 1;
		}
		out[w] |= e;
	}
}

static void select_dense(const struct select_scratch *s, const uint16_t *keys, uint32_t n, const uint64_t *mask,
			 const uint32_t *k, uint32_t cuts, uint64_t *const *out)
{
	uint32_t words = (uint32_t)BITS_WORDS(n);
	struct select_cut cut[SELECT_CUTS];

	s->kern->mask(keys, mask, n, words, s->eff);
	s->kern->find(s->eff, words, k, cuts, s->bytes, cut);
	for (uint32_t j = 0; j < cuts; j++) {
		s->kern->split(s->eff, words, cut[j].key, s->above, s->equal);
		for (uint32_t w = 0; w < words; w++)
			out[j][w] |= s->above[w];
		take_latest(s->kern, s->equal, words, cut[j].ties, out[j]);
	}
}

static void select_sparse(const struct select_scratch *s, const uint16_t *keys, uint32_t n,
			  const uint64_t *mask, const uint32_t *k, uint32_t cuts, uint64_t *const *out)
{
	struct select_cut cut[SELECT_CUTS];
	uint32_t count = 0;

	bits_for_each(i, mask, n) {
		s->pos[count] = i;
		s->eff[count++] = (uint16_t)(keys[i] | (keys[i] == 0));
	}
	memset(s->eff + count, 0, (ALIGN_UP(count, 64) - count) * sizeof(*s->eff));
	s->kern->find(s->eff, DIV_UP(count, 64), k, cuts, s->bytes, cut);
	for (uint32_t j = 0; j < cuts; j++) {
		uint32_t ties = cut[j].ties;

		for (uint32_t i = count; i-- > 0;) {
			bool tie = s->eff[i] == cut[j].key && ties > 0;

			ties -= tie;
			out[j][s->pos[i] / 64] |= (uint64_t)(tie || s->eff[i] > cut[j].key) << (s->pos[i] % 64);
		}
	}
}

void select_top(const struct select_scratch *s, const uint16_t *keys, uint32_t n, const uint64_t *mask,
		uint32_t count, const uint32_t *k, uint32_t cuts, uint64_t *const *out)
{
	if (count <= SELECT_SPARSE(n) && count <= n)
		select_sparse(s, keys, n, mask, k, cuts, out);
	else
		select_dense(s, keys, n, mask, k, cuts, out);
}
