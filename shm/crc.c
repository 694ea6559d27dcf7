/* SPDX-License-Identifier: MIT */
#include <isa-l/crc.h>
#include <string.h>
#include "shm/crc.h"
#include "shm/trial.h"
#include "shm/util.h"

/* Copied bytes are checksummed this many at a time, while they are still in the L1 cache. */
#define CHUNK ((size_t)8192)
#define AHEAD ((size_t)2048)
#define ISAL_MAX ((size_t)1 << 30) /* crc32_iscsi() counts in int */

/* crc32_iscsi() leaves both inversions to its caller; `raw` is the inverted state. */
static uint32_t raw_update(uint32_t raw, const void *buf, size_t len)
{
	unsigned char *p = (unsigned char *)buf; /* its prototype forgets const */

	while (len) {
		size_t n = MIN(len, ISAL_MAX);

		raw = crc32_iscsi(p, (int)n, raw);
		p += n;
		len -= n;
	}
	return raw;
}

uint32_t crc32c(uint32_t crc, const void *buf, size_t len)
{
	if (planted("crc-of-the-first-unit"))
		len = MIN(len, KVT_UNIT);
	return ~raw_update(~crc, buf, len);
}

static uint32_t gather_bytes(uint32_t raw, uint8_t *dst, const uint8_t *src, size_t len)
{
	while (len) {
		size_t n = MIN(len, CHUNK);

		memcpy(dst, src, n);
		raw = raw_update(raw, dst, n);
		dst += n;
		src += n;
		len -= n;
	}
	return raw;
}

static const uint8_t *row_at(const uint8_t *src, size_t stride, const uint32_t *idx, uint32_t i)
{
	return src + (idx ? idx[i] : i) * stride;
}

/*
 * Copy k of the n rows that are left. Which row comes next is data, so the
 * processor's prefetcher cannot know it; we do, and ask AHEAD bytes early.
 */
static void copy_rows(uint8_t *dst, const uint8_t *src, size_t stride, size_t width, const uint32_t *idx,
		      uint32_t k, uint32_t n)
{
	uint32_t ahead = width ? (uint32_t)DIV_UP(AHEAD, width) : 0;

	for (uint32_t i = 0; i < k; i++, dst += width) {
		const uint8_t *row = row_at(src, stride, idx, i);

		if (ahead < n - i) {
			const uint8_t *next = row_at(src, stride, idx, i + ahead);

			for (size_t o = 0; o < width; o += KVT_CACHELINE)
				__builtin_prefetch(next + o);
		}
		if (width % KVT_CACHELINE) {
			memcpy(dst, row, width);
			continue;
		}
		for (size_t o = 0; o < width; o += KVT_CACHELINE) /* four vector moves a line, no call */
			memcpy(dst + o, row + o, KVT_CACHELINE);
	}
}

uint32_t crc32c_gather(uint32_t crc, void *dst, const void *src, size_t stride, size_t width,
		       const uint32_t *idx, uint32_t n)
{
	uint32_t raw = ~crc, step;
	const uint8_t *s = src;
	uint8_t *d = dst;

	if (!idx && stride == width)
		return ~gather_bytes(raw, d, s, (size_t)n * width);
	if (width > CHUNK) {
		for (uint32_t i = 0; i < n; i++, d += width)
			raw = gather_bytes(raw, d, row_at(s, stride, idx, i), width);
		return ~raw;
	}
	step = width ? (uint32_t)(CHUNK / width) : n;
	while (n) {
		uint32_t k = MIN(n, step);

		copy_rows(d, s, stride, width, idx, k, n);
		raw = raw_update(raw, d, k * width);
		d += k * width;
		if (idx)
			idx += k;
		else
			s += k * stride;
		n -= k;
	}
	return ~raw;
}

#define POLY 0x82f63b78u /* bit-reflected: bit 31 is x^0 */

/* a * b modulo P. */
static uint32_t times(uint32_t a, uint32_t b)
{
	uint32_t r = 0;

	for (; a; a <<= 1) {
		r ^= b & (0 - (a >> 31));
		b = b >> 1 ^ (POLY & (0 - (b & 1)));
	}
	return r;
}

/* x^(8 len) modulo P. */
static uint32_t power(uint64_t len)
{
	uint32_t square = UINT32_C(1) << 23, r = UINT32_C(1) << 31; /* x^8; 1 */

	for (; len; len >>= 1) {
		if (len & 1)
			r = times(square, r);
		square = times(square, square);
	}
	return r;
}

uint32_t crc32c_shift(uint32_t crc, uint64_t len)
{
	static _Thread_local struct {
		uint64_t len;
		uint32_t power;
	} last = {0, UINT32_C(1) << 31}; /* pages come in a few sizes, one after the other */

	if (len != last.len) {
		last.power = power(len);
		last.len = len;
	}
	return times(last.power, crc);
}

uint32_t crc32c_plain(uint32_t seed, uint32_t crc, uint64_t len)
{
	return ~crc ^ crc32c_shift(~seed, len);
}

uint32_t crc32c_seeded(uint32_t seed, uint32_t plain, uint64_t len)
{
	return ~(plain ^ crc32c_shift(~seed, len));
}
