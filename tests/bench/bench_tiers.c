/* SPDX-License-Identifier: MIT */
/*
 * Rows of a region into pages of the DRAM tier, by the calls the mover makes. One thread, 256-byte
 * rows (K 128 + V 128), pages of 128 rows, far more bytes than any cache holds. The rival moves the same bytes
 * from the same region into the same pages; the two take turns.
 */
#include "shm/seg.h"
#include "shm/util.h"
#include "tiers/device.h"
#include "tiers/tier.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ROW 128u /* bytes of K, and of V */
#define PAGE_ROWS 128u
#define PLANE_BYTES ((size_t)PAGE_ROWS * ROW)
#define PAGES 8192u                                   /* 256 MiB of rows in the pages */
#define REGION_ROWS ((uint64_t)PAGES * PAGE_ROWS * 2) /* 512 MiB: the half-kept case passes over all of it */
#define CHUNK_ROWS (4096 / ROW)
#define BLOCK 256u /* pages by one, then by the other */
#define ROUNDS 21

struct bench {
	struct seg region;
	struct device_mem *mem;
	struct device_lane lane;
	struct tier *tier;
	struct tier_io *io;
	uint32_t *slots; /* PAGES x PAGE_ROWS, ascending */
	uint32_t sink;
};

static void die(const char *what, int r)
{
	fprintf(stderr, "bench_tiers: %s: %s\n", what, strerror(-r));
	exit(1);
}

static uint64_t next_random(uint64_t *s)
{
	*s ^= *s << 13;
	*s ^= *s >> 7;
	*s ^= *s << 17;
	return *s;
}

static void setup(struct bench *b)
{
	struct tier_cfg cfg = {.size = (uint64_t)PAGES * PLANE_BYTES * 2, .node = -1};
	char err[256];
	uint64_t *w, seed = 1;
	int r;

	r = seg_create(&b->region, SEG_EXCHANGE, "bench-region", REGION_ROWS * 2 * ROW, SEG_F_POPULATE);
	if (r < 0)
		die("region", r);
	w = b->region.addr;
	for (size_t i = 0; i < b->region.size / sizeof(*w); i++)
		w[i] = next_random(&seed);
	r = device_host_ops.attach(&b->mem, b->region.fd, b->region.size);
	if (r < 0)
		die("attach", r);
	b->lane = (struct device_lane){0, REGION_ROWS * ROW, ROW, ROW, ROW, ROW};
	r = tier_dram_ops.open(&b->tier, &cfg, err, sizeof(err));
	if (r < 0)
		die(err, r);
	b->io = calloc(PAGES, sizeof(*b->io));
	b->slots = malloc((size_t)PAGES * PAGE_ROWS * sizeof(*b->slots));
	if (!b->io || !b->slots)
		die("tables", -ENOMEM);
	for (uint32_t i = 0; i < PAGES; i++) {
		b->io[i] = (struct tier_io){.op = TIER_WRITE, .bytes = PLANE_BYTES * 2};
		r = tier_dram_ops.prepare(b->tier, &b->io[i]);
		if (r < 0)
			die("prepare", r);
		memset(b->io[i].buf, 1, PLANE_BYTES * 2); /* page faults are not what is measured */
	}
}

static void teardown(struct bench *b)
{
	for (uint32_t i = 0; i < PAGES; i++)
		tier_dram_ops.release(b->tier, &b->io[i]);
	tier_dram_ops.close(b->tier);
	device_host_ops.detach(b->mem);
	seg_close(&b->region);
	free(b->io);
	free(b->slots);
}

static void run_gather(struct bench *b, uint32_t from, uint32_t to)
{
	for (uint32_t i = from; i < to; i++) {
		uint32_t crc = i;
		int r = device_host_ops.gather(b->mem, &b->lane, b->slots + (size_t)i * PAGE_ROWS, PAGE_ROWS,
					       b->io[i].buf, &crc);

		if (r < 0)
			die("gather", r);
		b->sink += crc;
	}
}

/* The slots are one run per page, so plain memcpy can do it: two calls a page. */
static void run_memcpy(struct bench *b, uint32_t from, uint32_t to)
{
	const char *k = (const char *)b->region.addr + b->lane.k_off,
		   *v = (const char *)b->region.addr + b->lane.v_off;

	for (uint32_t i = from; i < to; i++) {
		size_t off = (size_t)b->slots[(size_t)i * PAGE_ROWS] * ROW;
		char *page = b->io[i].buf;

		memcpy(page, k + off, PLANE_BYTES);
		memcpy(page + PLANE_BYTES, v + off, PLANE_BYTES);
	}
}

static inline __attribute__((always_inline)) void prefetch_rows(const char *src, const uint32_t *slots)
{
	for (uint32_t i = 0; i < CHUNK_ROWS; i++) {
		__builtin_prefetch(src + (size_t)slots[i] * ROW, 0, 2);
		__builtin_prefetch(src + (size_t)slots[i] * ROW + 64, 0, 2);
	}
}

static char *copy_rows(char *dst, const char *src, const char *next, const uint32_t *slots)
{
	for (uint32_t c = 0; c < PAGE_ROWS; c += CHUNK_ROWS) {
		if (c + CHUNK_ROWS < PAGE_ROWS)
			prefetch_rows(src, slots + c + CHUNK_ROWS);
		else if (next)
			prefetch_rows(next, slots);
		for (uint32_t i = c; i < c + CHUNK_ROWS; i++, dst += ROW)
			memcpy(dst, src + (size_t)slots[i] * ROW, ROW);
	}
	return dst;
}

/* The same gather without a checksum: row by row, prefetching 4 KiB ahead just as device_host does. */
static void run_plain_gather(struct bench *b, uint32_t from, uint32_t to)
{
	const char *k = (const char *)b->region.addr + b->lane.k_off,
		   *v = (const char *)b->region.addr + b->lane.v_off;

	for (uint32_t i = from; i < to; i++) {
		const uint32_t *slots = b->slots + (size_t)i * PAGE_ROWS;

		prefetch_rows(k, slots);
		copy_rows(copy_rows(b->io[i].buf, k, v, slots), v, NULL, slots);
	}
}

static int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

static uint64_t time_of(struct bench *b, void (*fn)(struct bench *b, uint32_t from, uint32_t to), uint32_t from)
{
	uint64_t t = now_ns();

	fn(b, from, from + BLOCK);
	return now_ns() - t;
}

/*
 * The two take turns block by block, so that both see the same machine; the rival is half the pages away,
 * so that neither finds in the cache what the other left there.
 */
static void compare(struct bench *b, const char *name, const char *rival_name, double target,
		    void (*rival)(struct bench *b, uint32_t from, uint32_t to))
{
	double bytes = (double)PAGES * PLANE_BYTES * 2, a[ROUNDS], r[ROUNDS], q[ROUNDS], ratio;

	for (unsigned i = 0; i < ROUNDS; i++) {
		uint64_t ours = 0, theirs = 0;

		for (uint32_t from = 0; from < PAGES; from += BLOCK) {
			ours += time_of(b, run_gather, from);
			theirs += time_of(b, rival, (from + PAGES / 2) % PAGES);
		}
		a[i] = bytes / (double)ours;
		r[i] = bytes / (double)theirs;
		q[i] = a[i] / r[i];
	}
	qsort(a, ROUNDS, sizeof(*a), by_value);
	qsort(r, ROUNDS, sizeof(*r), by_value);
	qsort(q, ROUNDS, sizeof(*q), by_value);
	ratio = q[ROUNDS / 2];
	printf("{\"name\":\"%s\",\"value\":%.2f,\"unit\":\"GB/s\",\"rival\":\"%s\",\"rival_value\":%.2f,"
	       "\"ratio\":%.3f,\"target\":\">=%.2f\",\"pass\":%s}\n",
	       name, a[ROUNDS / 2], rival_name, r[ROUNDS / 2], ratio, target,
	       ratio >= target ? "true" : "false");
	fflush(stdout);
}

/* PAGE_ROWS slots out of the next 2 * PAGE_ROWS, each equally likely (selection sampling). */
static void choose_half(uint32_t *slots, uint32_t base, uint64_t *seed)
{
	uint32_t got = 0;

	for (uint32_t i = 0; got < PAGE_ROWS; i++)
		if ((next_random(seed) >> 32) % (2 * PAGE_ROWS - i) < PAGE_ROWS - got)
			slots[got++] = base + i;
}

int main(void)
{
	struct bench b = {.region = SEG_INIT};
	uint64_t seed = 7;

	setup(&b);
	for (uint32_t i = 0; i < PAGES * PAGE_ROWS; i++)
		b.slots[i] = i;
	compare(&b, "region rows to dram page, contiguous", "memcpy of the same bytes", 0.80, run_memcpy);
	for (uint32_t i = 0; i < PAGES; i++)
		choose_half(b.slots + (size_t)i * PAGE_ROWS, i * PAGE_ROWS * 2, &seed);
	compare(&b, "region rows to dram page, half of the rows kept", "the same gather without checksum", 0.85,
		run_plain_gather);
	fprintf(stderr, "bench_tiers: checksums folded to %08x\n", b.sink);
	teardown(&b);
	return 0;
}
