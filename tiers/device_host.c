/* SPDX-License-Identifier: MIT */
/*
 * Device rows in host memory: a region, that is, an exchange memfd that the
 * client writes at any time. Nothing read from it is believed: rows are copied to
 * private memory first and the checksum runs over the copy. The lane layout came from
 * the client too, so every extent is checked in 64-bit arithmetic before use.
 */
#include "tiers/device_check.h"
#include "tiers/tier.h"
#include "shm/crc.h"
#include "shm/seg.h"
#include "shm/util.h"

#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>

#define CHUNK 4096u          /* bytes copied, then checksummed: well inside L1 */
#define LONG_RUN 8u          /* adjacent slots from which a plain copy beats the row loop */
#define SPARSE_STRIDE 16384u /* from here on scatter commits row by row, not the gaps too */

struct device_mem {
	struct seg seg;
};

/* One plane of a lane as it is mapped here. */
struct plane {
	char *base; /* of slot 0 */
	uint32_t stride, width;
};

static struct plane mapped(const struct device_mem *m, const struct device_plane *p)
{
	return (struct plane){.base = (char *)m->seg.addr + p->off, .stride = p->stride, .width = p->width};
}

static int host_attach(struct device_mem **ret, int fd, size_t bytes)
{
	struct device_mem *m;
	int own, r;

	own = fcntl(fd, F_DUPFD_CLOEXEC, 3);
	if (own < 0)
		return -errno;
	m = malloc(sizeof(*m));
	if (!m) {
		close(own);
		return -ENOMEM;
	}
	m->seg = (struct seg)SEG_INIT;
	r = seg_map(&m->seg, SEG_EXCHANGE, own, bytes); /* verifies size and seals */
	if (r < 0) {
		close(own);
		free(m);
		return r;
	}
	*ret = m;
	return 0;
}

static void host_detach(struct device_mem *m)
{
	if (!m)
		return;
	seg_close(&m->seg);
	free(m);
}

/*
 * Slots up to the next long run, at most max. Slots ascend, so one comparison tells whether LONG_RUN of them
 * are adjacent, and every LONG_RUN-th place is looked at: a run twice as long cannot hide between them, and
 * walking the short ones would cost a misprediction each.
 */
static uint32_t scattered_length(const uint32_t *slots, uint32_t n, uint32_t max)
{
	uint32_t end = MIN(n, max);

	for (uint32_t i = 0; i < end && i + LONG_RUN <= n; i += LONG_RUN)
		if (slots[i + LONG_RUN - 1] - slots[i] == LONG_RUN - 1)
			return i;
	return end;
}

/*
 * Ask for rows before they are needed: they arrive while the checksum keeps the core busy. Inlined by
 * force: gcc takes a function that only prefetches for one without effect and drops the call.
 */
static inline __attribute__((always_inline)) void prefetch_rows(const struct plane *p, const uint32_t *slots,
								uint32_t n)
{
	const char *base = p->base;
	uint64_t stride = p->stride;
	uint32_t last = MIN(p->width, CHUNK) - 1;

	if (!p->width)
		return;
	for (uint32_t i = 0; i < n; i++) {
		const char *row = base + slots[i] * stride;

		/* First, last and what lies between: rows of up to two lines need no loop. */
		__builtin_prefetch(row, 0, 2);
		__builtin_prefetch(row + last, 0, 2);
		for (uint32_t o = KVT_CACHELINE; o < last - last % KVT_CACHELINE; o += KVT_CACHELINE)
			__builtin_prefetch(row + o, 0, 2);
	}
}

static uint32_t copy_run(uint32_t crc, char *dst, const char *src, size_t bytes)
{
	for (size_t o = 0, n; o < bytes; o += n) {
		n = MIN(bytes - o, CHUNK);
		crc = crc32c_gather(crc, dst + o, src + o, n, n, NULL, 1);
	}
	return crc;
}

static uint32_t rows_per_chunk(const struct plane *p)
{
	return p->width ? MAX(CHUNK / p->width, 1u) : 0;
}

/*
 * A chunk at a time: copied, then checksummed while it is in L1. Long runs are plain copies, which the
 * processor fetches ahead by itself; scattered rows are prefetched one chunk ahead, at the end those of the
 * plane that comes `next`.
 */
static char *gather_plane(const struct plane *p, const struct plane *next, const uint32_t *slots, uint32_t n,
			  char *dst, uint32_t *crc)
{
	uint32_t step = rows_per_chunk(p), k;
	bool packed = p->stride == p->width;

	for (uint32_t i = 0; step && i < n; i += k) {
		k = packed ? scattered_length(slots + i, n - i, step) : MIN(n - i, step);
		if (k) {
			if (i + k < n)
				prefetch_rows(p, slots + i + k, MIN(n - i - k, step));
			else if (next)
				prefetch_rows(next, slots, MIN(n, rows_per_chunk(next)));
			*crc = crc32c_gather(*crc, dst, p->base, p->stride, p->width, slots + i, k);
		} else {
			const char *src = p->base + (uint64_t)slots[i] * p->stride;

			k = device_run(slots + i, n - i);
			*crc = copy_run(*crc, dst, src, (size_t)k * p->width);
		}
		dst += (size_t)k * p->width;
	}
	return dst;
}

static int host_gather(struct device_mem *m, const struct device_lane *lane, const uint32_t *slots, uint32_t n,
		       void *page, uint32_t *crc)
{
	struct device_plane at[2];
	struct plane p[2];
	uint32_t c = *crc;
	char *dst = page;
	int r;

	if (!n)
		return 0;
	r = device_planes(at, m->seg.size, lane, n);
	if (r == 0)
		r = device_slots(at, slots, n);
	if (r < 0)
		return r;
	p[0] = mapped(m, &at[0]);
	p[1] = mapped(m, &at[1]);
	if (slots[n - 1] - slots[0] >= n) /* not one run */
		prefetch_rows(&p[0], slots, MIN(n, rows_per_chunk(&p[0])));
	dst = gather_plane(&p[0], &p[1], slots, n, dst, &c);
	gather_plane(&p[1], NULL, slots, n, dst, &c);
	*crc = c;
	return 0;
}

/* Bytes from slot `first` to the end of slot first + n - 1. */
static size_t extent(const struct plane *p, uint32_t n)
{
	return (uint64_t)(n - 1) * p->stride + p->width;
}

/* Allocate and map in one call where the kernel can (5.14): a fault for every page costs as much as the copy.
 */
static int commit(struct device_mem *m, uint64_t off, size_t len)
{
	uint64_t from = off / KVT_UNIT * KVT_UNIT;

	if (!madvise((char *)m->seg.addr + from, off - from + len, MADV_POPULATE_WRITE))
		return 0;
	return errno == EINVAL ? seg_commit(&m->seg, off, len) : -ENOSPC;
}

/*
 * Put memory behind the slots, so that writing them cannot be what runs out of it. Where the rows of a
 * lane lie far apart only the rows are made sure of.
 */
static int commit_plane(struct device_mem *m, const struct plane *p, uint32_t first, uint32_t n)
{
	uint64_t off = (uint64_t)(p->base - (char *)m->seg.addr) + (uint64_t)first * p->stride;
	int r = 0;

	if (!p->width)
		return 0;
	if (p->stride < SPARSE_STRIDE)
		return commit(m, off, extent(p, n));
	for (uint32_t i = 0; i < n && r == 0; i++)
		r = commit(m, off + (uint64_t)i * p->stride, p->width);
	return r;
}

static void scatter_plane(const struct plane *p, const char *src, const uint32_t *pick, uint32_t first,
			  uint32_t n)
{
	char *dst = p->base + (uint64_t)first * p->stride;

	if (!p->width)
		return;
	for (uint32_t i = 0, k; i < n; i += k) {
		k = pick ? device_run(pick + i, n - i) : n;
		if (p->stride == p->width) {
			memcpy(dst + (size_t)i * p->width, src + (size_t)(pick ? pick[i] : 0) * p->width,
			       (size_t)k * p->width);
			continue;
		}
		for (uint32_t j = i; j < i + k; j++)
			memcpy(dst + (uint64_t)j * p->stride, src + (size_t)(pick ? pick[j] : j) * p->width,
			       p->width);
	}
}

static int host_scatter(struct device_mem *m, const struct device_lane *lane, const void *page, uint32_t rows,
			const uint32_t *pick, uint32_t first, uint32_t n)
{
	struct device_plane at[2];
	struct plane p[2];
	int r;

	if (!n)
		return 0;
	r = device_planes(at, m->seg.size, lane, rows);
	if (r == 0)
		r = device_range(at, rows, pick, first, n);
	if (r < 0)
		return r;
	for (unsigned i = 0; i < 2; i++) {
		p[i] = mapped(m, &at[i]);
		r = commit_plane(m, &p[i], first, n);
		if (r < 0)
			return r;
	}
	scatter_plane(&p[0], page, pick, first, n);
	scatter_plane(&p[1], (const char *)page + (size_t)rows * p[0].width, pick, first, n);
	return 0;
}

static const void *host_peek(struct device_mem *m, uint64_t off, size_t bytes)
{
	if (off > m->seg.size || bytes > m->seg.size - off)
		return NULL;
	return (const char *)m->seg.addr + off;
}

static int host_read(struct device_mem *m, uint64_t off, void *dst, size_t bytes)
{
	const void *src = host_peek(m, off, bytes);

	if (!src)
		return -ERANGE;
	memcpy(dst, src, bytes);
	return 0;
}

static size_t host_resident(struct device_mem *m)
{
	return seg_resident(&m->seg);
}

const struct device_ops device_host_ops = {
	.name = "host",
	.attach = host_attach,
	.detach = host_detach,
	.gather = host_gather,
	.scatter = host_scatter,
	.read = host_read,
	.peek = host_peek,
	.resident = host_resident,
};
