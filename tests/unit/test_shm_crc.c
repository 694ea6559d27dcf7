/* SPDX-License-Identifier: MIT */
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <cmocka.h>
#include "shm/crc.h"
#include "shm/util.h"

static uint64_t rng = 0x9e3779b97f4a7c15;

static uint32_t rnd(uint32_t n)
{
	rng ^= rng << 13;
	rng ^= rng >> 7;
	rng ^= rng << 17;
	return (uint32_t)((rng >> 32) % n);
}

static void fill(uint8_t *p, size_t n)
{
	for (size_t i = 0; i < n; i++)
		p[i] = (uint8_t)rnd(256);
}

/* Bit by bit, from the definition: reflected polynomial 0x1edc6f41. */
static uint32_t reference(uint32_t crc, const uint8_t *p, size_t n)
{
	crc = ~crc;
	for (size_t i = 0; i < n; i++) {
		crc ^= p[i];
		for (int b = 0; b < 8; b++)
			crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0);
	}
	return ~crc;
}

static void known_vectors(void **state)
{
	uint8_t buf[32];

	assert_int_equal(crc32c(0, "123456789", 9), 0xe3069283);
	assert_int_equal(crc32c(0, "", 0), 0);
	/* RFC 3720, appendix B.4 (its bytes are listed in wire order). */
	memset(buf, 0, sizeof(buf));
	assert_int_equal(crc32c(0, buf, 32), 0x8a9136aa);
	memset(buf, 0xff, sizeof(buf));
	assert_int_equal(crc32c(0, buf, 32), 0x62a8ab43);
	for (unsigned i = 0; i < 32; i++)
		buf[i] = (uint8_t)i;
	assert_int_equal(crc32c(0, buf, 32), 0x46dd794e);
	for (unsigned i = 0; i < 32; i++)
		buf[i] = (uint8_t)(31 - i);
	assert_int_equal(crc32c(0, buf, 32), 0x113fdb5c);
}

static void equals_reference_at_every_length(void **state)
{
	uint8_t buf[1200 + 16];

	fill(buf, sizeof(buf));
	for (size_t n = 0; n <= 1200; n++)
		assert_int_equal(crc32c(0x1234, buf + n % 16, n), reference(0x1234, buf + n % 16, n));
}

static void chains(void **state)
{
	static uint8_t buf[40000];
	uint32_t whole;

	fill(buf, sizeof(buf));
	whole = crc32c(7, buf, sizeof(buf));
	for (int i = 0; i < 200; i++) {
		size_t cut = rnd(sizeof(buf) + 1);

		assert_int_equal(crc32c(crc32c(7, buf, cut), buf + cut, sizeof(buf) - cut), whole);
	}
}

/* Any single flipped bit changes the checksum: what the pages rely on. */
static void sees_every_flipped_bit(void **state)
{
	uint8_t buf[512];
	uint32_t good;

	fill(buf, sizeof(buf));
	good = crc32c(0, buf, sizeof(buf));
	for (unsigned i = 0; i < sizeof(buf) * 8; i++) {
		buf[i / 8] ^= (uint8_t)(1u << i % 8);
		assert_int_not_equal(crc32c(0, buf, sizeof(buf)), good);
		buf[i / 8] ^= (uint8_t)(1u << i % 8);
	}
}

#define SRC_BYTES (1u << 20)
#define GUARD 64u

static void check_gather(const uint8_t *src, size_t stride, size_t width, const uint32_t *idx, uint32_t n,
			 size_t skew)
{
	size_t bytes = (size_t)n * width;
	_cleanup_free_ uint8_t *want = malloc(bytes + 1);
	_cleanup_free_ uint8_t *raw = malloc(bytes + 2 * GUARD + skew);
	uint8_t *dst = raw + GUARD + skew;
	uint32_t crc;

	memset(raw, 0xcc, bytes + 2 * GUARD + skew);
	for (uint32_t i = 0; i < n; i++)
		memcpy(want + i * width, src + (idx ? idx[i] : i) * stride, width);
	crc = crc32c_gather(0xabcd, dst, src, stride, width, idx, n);
	assert_int_equal(crc, crc32c(0xabcd, want, bytes));
	assert_memory_equal(dst, want, bytes);
	for (size_t i = 0; i < GUARD; i++) {
		assert_int_equal(dst[bytes + i], 0xcc);
		assert_int_equal(raw[i], 0xcc);
	}
}

/* Room for 129 indices that end where memory ends: reading idx[n] is a fault. */
static uint32_t *index_before_a_wall(uint32_t n)
{
	static uint8_t *page;

	if (!page) {
		page = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		assert_ptr_not_equal(page, MAP_FAILED);
		assert_int_equal(mprotect(page + 4096, 4096, PROT_NONE), 0);
	}
	return (uint32_t *)(page + 4096) - n;
}

static void gather_equals_reference(void **state)
{
	static const size_t width[] = {0,   1,   2,   3,   15,  16,   63,   64,   96,   128,  130,  256,
				       257, 512, 576, 600, 768, 1024, 1152, 4096, 5000, 8192, 8193, 20000};
	static const uint32_t rows[] = {0, 1, 2, 31, 32, 33, 64, 65, 127, 128, 129};
	_cleanup_free_ uint8_t *src = malloc(SRC_BYTES);

	fill(src, SRC_BYTES);
	for (size_t w = 0; w < ARRAY_SIZE(width); w++) {
		size_t stride[] = {width[w], width[w] + 1, width[w] * 2, width[w] * 3 + 64, 0};

		for (size_t s = 0; s < ARRAY_SIZE(stride); s++) {
			uint32_t max = stride[s] ? (uint32_t)((SRC_BYTES - width[w]) / stride[s]) : 500;

			for (size_t r = 0; r < ARRAY_SIZE(rows); r++) {
				uint32_t n = rows[r], *idx = index_before_a_wall(n);

				if (n > max)
					break;
				for (uint32_t i = 0; i < n; i++)
					idx[i] = rnd(max);
				check_gather(src, stride[s], width[w], NULL, n, rnd(64));
				check_gather(src, stride[s], width[w], idx, n, rnd(64));
			}
		}
	}
}

static void gather_chains_with_planes(void **state)
{
	_cleanup_free_ uint8_t *src = malloc(SRC_BYTES);
	_cleanup_free_ uint8_t *page = malloc(65536);
	uint32_t idx[128], crc;

	fill(src, SRC_BYTES);
	for (uint32_t i = 0, p = 0; i < 128; i++, p += 1 + rnd(8))
		idx[i] = p;
	crc = crc32c(0, "identity", 8);
	crc = crc32c_gather(crc, page, src, 256, 256, idx, 128);
	crc = crc32c_gather(crc, page + 32768, src + 1000, 256, 128, idx, 128);
	assert_int_equal(crc, reference(reference(0, (const uint8_t *)"identity", 8), page, 32768 + 16384));
}

/* Bit by bit, as the definition has it. */
static uint32_t slow_plain(const uint8_t *p, size_t n)
{
	uint32_t r = 0;

	while (n--) {
		r ^= *p++;
		for (int b = 0; b < 8; b++)
			r = r >> 1 ^ (r & 1 ? 0x82f63b78u : 0);
	}
	return r;
}

static void shift_moves_the_start(void **state)
{
	uint8_t buf[5000];
	uint32_t seed = 0x12345678;

	for (size_t i = 0; i < sizeof(buf); i++)
		buf[i] = (uint8_t)(i * 131 + i / 7);
	assert_int_equal(crc32c_shift(0, 100), 0);
	assert_int_equal(crc32c_shift(seed, 0), seed);
	for (size_t n = 0; n < sizeof(buf); n = n * 3 + 1, seed = seed * 1664525 + 1) {
		uint32_t plain = slow_plain(buf, n), crc = crc32c(seed, buf, n);

		assert_int_equal(crc32c(seed, buf, n) ^ crc32c(~seed, buf, n), crc32c_shift(UINT32_MAX, n));
		assert_int_equal(crc32c_plain(seed, crc, n), plain);
		assert_int_equal(crc32c_seeded(seed, plain, n), crc);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(known_vectors),
		cmocka_unit_test(equals_reference_at_every_length),
		cmocka_unit_test(chains),
		cmocka_unit_test(sees_every_flipped_bit),
		cmocka_unit_test(gather_equals_reference),
		cmocka_unit_test(gather_chains_with_planes),
		cmocka_unit_test(shift_moves_the_start),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
