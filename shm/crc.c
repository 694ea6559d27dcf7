/* SPDX-License-Identifier: MIT */
#include <isa-l/crc.h>
#include <string.h>
#include "shm/crc.h"
#include "shm/util.h"

/* Copied bytes are checksummed this many at a time, while they are still in the L1 cache. */
#define CHUNK ((size_t)8192)
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

/* Inlined once per width, so that the copy of a row is a handful of vector moves. */
static inline __attribute__((always_inline)) void copy_rows(uint8_t *dst, const uint8_t *src, size_t stride,
							    size_t width, const uint32_t *idx, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++)
		memcpy(dst + i * width, src + (idx ? idx[i] : i) * stride, width);
}

static void copy_some(uint8_t *dst, const uint8_t *src, size_t stride, size_t width, const uint32_t *idx,
		      uint32_t n)
{
	switch (width) {
	case 128:
		copy_rows(dst, src, stride, 128, idx, n);
		break;
	case 256:
		copy_rows(dst, src, stride, 256, idx, n);
		break;
	case 512:
		copy_rows(dst, src, stride, 512, idx, n);
		break;
	default:
		copy_rows(dst, src, stride, width, idx, n);
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
			raw = gather_bytes(raw, d, s + (idx ? idx[i] : i) * stride, width);
		return ~raw;
	}
	step = width ? (uint32_t)(CHUNK / width) : n;
	while (n) {
		uint32_t k = MIN(n, step);

		copy_some(d, s, stride, width, idx, k);
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
