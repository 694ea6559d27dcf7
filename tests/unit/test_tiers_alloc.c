/* SPDX-License-Identifier: MIT */
/* The page allocator against a model that marks every unit. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "tiers/alloc.h"
#include "tiers/tier.h"

#define SEGS 3u
#define SLABS 8u
#define SEG_UNITS (SLABS * ALLOC_SLAB_UNITS)

struct page {
	uint64_t addr;
	uint32_t bytes;
};

struct model {
	struct alloc a;
	uint8_t mark[SEGS][SEG_UNITS]; /* units that a page's payload lies in */
	struct page *page;
	uint32_t pages;
	uint64_t payload;
};

static uint64_t rng;

static uint32_t next_random(uint32_t below)
{
	rng ^= rng << 13;
	rng ^= rng >> 7;
	rng ^= rng << 17;
	return (uint32_t)((rng >> 16) % below);
}

static void mark(struct model *m, const struct page *p, uint8_t was, uint8_t is)
{
	uint32_t seg = alloc_addr_seg(p->addr), units = DIV_UP(p->bytes, KVT_UNIT);
	uint64_t at = alloc_addr_off(p->addr) / KVT_UNIT;

	assert_true(seg < SEGS);
	assert_true(at + units <= SEG_UNITS);
	for (uint32_t i = 0; i < units; i++) {
		assert_int_equal(m->mark[seg][at + i], was);
		m->mark[seg][at + i] = is;
	}
}

static void check_stat(const struct model *m)
{
	struct alloc_stat st;

	alloc_stat(&m->a, &st);
	assert_int_equal(st.capacity, SEGS * SLABS * ALLOC_SLAB_BYTES);
	assert_int_equal(st.capacity, st.used + st.free + st.stranded);
	assert_int_equal(st.used, st.payload + st.padding);
	assert_int_equal(st.payload, m->payload);
	assert_int_equal(st.pages, m->pages);
	assert_int_equal(st.segs, SEGS);
}

static void model_get(struct model *m, uint32_t bytes, bool borrow)
{
	struct page p = {.bytes = bytes};
	int r = alloc_get(&m->a, bytes, borrow, &p.addr);

	if (r == -ENOSPC)
		return;
	assert_int_equal(r, 0);
	mark(m, &p, 0, 1);
	m->payload += bytes;
	m->page[m->pages++] = p;
}

static void model_put(struct model *m, uint32_t i)
{
	struct page p = m->page[i];
	int r = alloc_put(&m->a, p.addr, p.bytes);
	bool empty = true;

	assert_true(r == 0 || r == 1);
	mark(m, &p, 1, 0);
	m->payload -= p.bytes;
	m->page[i] = m->page[--m->pages];
	for (uint32_t u = 0; r == 1 && u < SEG_UNITS; u++)
		empty = empty && !m->mark[alloc_addr_seg(p.addr)][u];
	assert_true(empty); /* 1 is said of an empty segment only */
	assert_int_equal(alloc_put(&m->a, p.addr, p.bytes), -EINVAL);
	assert_int_equal(alloc_check(&m->a, p.addr, p.bytes), -EINVAL);
}

/* Sizes as they come: mostly small, some of each class, now and then the largest. */
static uint32_t some_bytes(void)
{
	switch (next_random(8)) {
	case 0:
		return 1 + next_random(ALLOC_MAX_UNITS * KVT_UNIT);
	case 1:
		return KVT_UNIT * (1 + next_random(64));
	case 2:
		return 1 + next_random(KVT_UNIT);
	default:
		return 1 + next_random(16 * KVT_UNIT);
	}
}

static void test_random(void **state)
{
	struct model *m = calloc(1, sizeof(*m));

	rng = 42;
	alloc_init(&m->a);
	m->page = calloc(SEGS * SEG_UNITS, sizeof(*m->page));
	for (uint32_t i = 0; i < SEGS; i++)
		assert_int_equal(alloc_add(&m->a, SLABS), i);
	for (uint32_t step = 0; step < 120000; step++) {
		bool grow = step / 10000 % 2 == 0; /* fill and drain in turns */

		if (!m->pages || next_random(100) < (grow ? 70u : 30u))
			model_get(m, some_bytes(), next_random(2));
		else
			model_put(m, next_random(m->pages));
		if (step % 64 == 0)
			check_stat(m);
	}
	while (m->pages)
		model_put(m, m->pages - 1);
	check_stat(m);
	assert_int_equal(m->a.st.stranded, 0);
	assert_int_equal(m->a.st.empty_segs, SEGS);
	for (uint32_t c = 0; c <= ALLOC_MAX_UNITS; c++) {
		assert_int_equal(m->a.cls[c].slabs, 0);
		assert_int_equal(m->a.cls[c].pages, 0);
	}
	alloc_fini(&m->a);
	free(m->page);
	free(m);
}

/* Pages of one class until nothing is left; returns how many. */
static uint32_t fill(struct alloc *a, uint32_t bytes, uint64_t *addr, uint32_t max)
{
	uint32_t n = 0;
	int r;

	while ((r = alloc_get(a, bytes, true, &addr[n])) == 0)
		assert_true(++n < max);
	assert_int_equal(r, -ENOSPC);
	return n;
}

static void test_exhaustion(void **state)
{
	static const uint32_t units[] = {1,  2,  3,   5,   7,   8,   9,   16,  33, 64,
					 65, 86, 103, 128, 129, 171, 200, 255, 256};
	uint64_t *addr = calloc(12 * ALLOC_SLAB_UNITS + 1, sizeof(*addr));
	struct alloc a;

	for (unsigned i = 0; i < ARRAY_SIZE(units); i++) {
		uint32_t bytes = units[i] * KVT_UNIT, n;
		struct alloc_stat st;

		alloc_init(&a);
		assert_int_equal(alloc_add(&a, 12), 0);
		n = fill(&a, bytes, addr, 12 * ALLOC_SLAB_UNITS + 1);
		alloc_stat(&a, &st);
		assert_int_equal(st.pages, n);
		assert_int_equal(a.cls[units[i]].pages, n);
		assert_int_equal(st.padding, 0);
		/* At most an eighth is lost to the ends of slabs (12 slabs divide into runs of 1 to 4). */
		assert_true(st.used * 8 >= st.capacity * 7);
		assert_int_equal(alloc_put(&a, addr[n / 2], bytes), 0);
		assert_int_equal(alloc_get(&a, bytes, false, &addr[n / 2]), 0);
		for (uint32_t k = 0; k < n; k++)
			assert_int_equal(alloc_put(&a, addr[k], bytes), k == n - 1);
		alloc_stat(&a, &st);
		assert_int_equal(st.free, st.capacity);
		alloc_fini(&a);
	}
	free(addr);
}

static void test_bad_requests(void **state)
{
	struct alloc a;
	uint64_t p, q = 77, other;

	alloc_init(&a);
	assert_int_equal(alloc_get(&a, KVT_UNIT, true, &q), -ENOSPC);
	assert_int_equal(alloc_add(&a, 0), -EINVAL);
	assert_int_equal(alloc_add(&a, ALLOC_MAX_SLABS), -EINVAL);
	assert_int_equal(alloc_add(&a, 2), 0);
	assert_int_equal(alloc_get(&a, 0, true, &q), -EINVAL);
	assert_int_equal(alloc_get(&a, ALLOC_MAX_UNITS * KVT_UNIT + 1, true, &q), -EINVAL);
	assert_int_equal(alloc_get(&a, UINT32_MAX, true, &q), -EINVAL);
	assert_int_equal(q, 77); /* untouched on failure */

	assert_int_equal(alloc_get(&a, 3 * KVT_UNIT, false, &p), 0);
	assert_int_equal(alloc_get(&a, 3 * KVT_UNIT, false, &other), 0);
	assert_int_equal(alloc_put(&a, p, 3 * KVT_UNIT), 0);
	assert_int_equal(alloc_put(&a, p, 3 * KVT_UNIT), -EINVAL);     /* twice */
	assert_int_equal(alloc_put(&a, other, 4 * KVT_UNIT), -EINVAL); /* too large for its class */
	assert_int_equal(alloc_put(&a, other, KVT_UNIT), -EINVAL);     /* far too small */
	assert_int_equal(alloc_put(&a, other, 0), -EINVAL);
	assert_int_equal(alloc_put(&a, other + 1, 3 * KVT_UNIT), -EINVAL); /* inside a page */
	assert_int_equal(alloc_put(&a, other + 300, 3 * KVT_UNIT), -EINVAL);
	assert_int_equal(alloc_put(&a, 510, 3 * KVT_UNIT), -EINVAL);              /* stranded end of the slab */
	assert_int_equal(alloc_put(&a, ALLOC_SLAB_UNITS, 3 * KVT_UNIT), -EINVAL); /* pooled slab */
	assert_int_equal(alloc_put(&a, 2 * ALLOC_SLAB_UNITS, 3 * KVT_UNIT), -EINVAL); /* past the segment */
	assert_int_equal(alloc_put(&a, other | UINT64_C(1) << 32, 3 * KVT_UNIT), -EINVAL); /* no such segment */
	assert_int_equal(alloc_put(&a, other | UINT64_C(1) << 63, 3 * KVT_UNIT), -EINVAL);
	assert_int_equal(alloc_put(&a, TIER_ADDR_NONE, 3 * KVT_UNIT), -EINVAL);
	assert_int_equal(alloc_check(&a, other, 3 * KVT_UNIT), 0); /* and none of that harmed it */
	assert_int_equal(alloc_put(&a, other, 3 * KVT_UNIT), 1);
	assert_int_equal(alloc_put(&a, other, 3 * KVT_UNIT), -EINVAL);
	alloc_fini(&a);
}

static void test_segments(void **state)
{
	struct alloc a;
	uint64_t p[4];

	alloc_init(&a);
	for (int i = 0; i < 3; i++)
		assert_int_equal(alloc_add(&a, 1), i);
	for (uint32_t i = 0; i < 3; i++) { /* half a slab each, so two a segment; lowest segment first */
		assert_int_equal(alloc_get(&a, 256 * KVT_UNIT, false, &p[i]), 0);
		assert_int_equal(alloc_addr_seg(p[i]), i / 2);
	}
	assert_int_equal(a.st.empty_segs, 1);
	assert_int_equal(alloc_remove(&a, 0), -EBUSY);
	assert_int_equal(alloc_remove(&a, 3), -EINVAL);
	assert_int_equal(alloc_remove(&a, UINT32_MAX), -EINVAL);
	assert_int_equal(alloc_put(&a, p[0], 256 * KVT_UNIT), 0);
	assert_int_equal(alloc_put(&a, p[1], 256 * KVT_UNIT), 1);
	assert_int_equal(alloc_remove(&a, 0), 0);
	assert_int_equal(alloc_remove(&a, 0), -EINVAL);
	assert_int_equal(alloc_put(&a, p[0], 256 * KVT_UNIT), -EINVAL);
	assert_int_equal(alloc_check(&a, p[2], 256 * KVT_UNIT), 0);
	assert_int_equal(alloc_remove(&a, 2), 0);
	assert_int_equal(a.st.capacity, ALLOC_SLAB_BYTES);
	assert_int_equal(alloc_add(&a, 5), 0); /* numbers are used again */
	assert_int_equal(alloc_add(&a, 1), 2);
	assert_int_equal(a.st.capacity, 7 * ALLOC_SLAB_BYTES);
	alloc_fini(&a);
	assert_int_equal(a.st.capacity, 0);
}

static void test_segment_limit(void **state)
{
	struct alloc a;

	alloc_init(&a);
	for (uint32_t i = 0; i < ALLOC_MAX_SEGS; i++)
		assert_int_equal(alloc_add(&a, 1), i);
	assert_int_equal(alloc_add(&a, 1), -ENOSPC);
	assert_int_equal(alloc_remove(&a, 1234), 0);
	assert_int_equal(alloc_add(&a, 1), 1234);
	alloc_fini(&a);
}

static void test_borrow(void **state)
{
	uint64_t addr[ALLOC_SLAB_UNITS], p, q;
	struct alloc a;
	uint32_t n = 0;

	alloc_init(&a);
	assert_int_equal(alloc_add(&a, 1), 0);
	assert_int_equal(alloc_get(&a, 16 * KVT_UNIT, false, &p), 0);
	assert_int_equal(alloc_get(&a, 9 * KVT_UNIT, false, &q), -ENOSPC); /* the slab is of another class */
	assert_int_equal(alloc_get(&a, 7 * KVT_UNIT, true, &q), -ENOSPC);  /* 16 is more than twice 7 */
	while (alloc_get(&a, 9 * KVT_UNIT, true, &addr[n]) == 0)
		n++;
	assert_int_equal(n, 31);
	assert_int_equal(a.st.used, 32 * 16 * KVT_UNIT);
	assert_int_equal(a.st.payload, (16 + 31 * 9) * KVT_UNIT);
	for (uint32_t i = 0; i < n; i++)
		assert_int_equal(alloc_put(&a, addr[i], 9 * KVT_UNIT), 0);
	assert_int_equal(alloc_put(&a, p, 16 * KVT_UNIT), 1);
	alloc_fini(&a);
}

/* A large class takes runs of slabs, and single ones where no run is free. */
static void test_runs(void **state)
{
	uint64_t one[8], p;
	struct alloc a;
	uint32_t n;

	alloc_init(&a);
	assert_int_equal(alloc_add(&a, 8), 0);
	for (uint32_t i = 0; i < 8; i++) /* two a slab: no run is needed */
		assert_int_equal(alloc_get(&a, 256 * KVT_UNIT, false, &one[i]), 0);
	assert_int_equal(a.cls[256].slabs, 4);
	assert_int_equal(alloc_get(&a, 171 * KVT_UNIT, false, &p), 0);
	n = a.cls[171].slabs;
	assert_true(n > 1 && n <= 4);
	/* The place that starts in one slab and ends in the next is found again by its address. */
	for (uint32_t i = 1; i < n * ALLOC_SLAB_UNITS / 171; i++) {
		assert_int_equal(alloc_get(&a, 171 * KVT_UNIT, false, &p), 0);
		assert_int_equal(alloc_check(&a, p, 171 * KVT_UNIT), 0);
		assert_int_equal(alloc_check(&a, p + 1, 171 * KVT_UNIT), -EINVAL);
	}
	alloc_fini(&a);

	alloc_init(&a);
	assert_int_equal(alloc_add(&a, 3), 0);
	assert_int_equal(alloc_get(&a, 256 * KVT_UNIT, false, &one[0]), 0);
	assert_int_equal(alloc_get(&a, 64 * KVT_UNIT, false, &one[1]), 0);
	assert_int_equal(alloc_get(&a, 171 * KVT_UNIT, false, &p), 0);
	assert_int_equal(a.cls[171].slabs, 1);
	alloc_fini(&a);
}

/* Bookkeeping of full segments stays within 16 bytes a page, whatever the size of the pages. */
static void test_meta(void **state)
{
	struct alloc a;
	uint64_t p;

	for (uint32_t units = 1; units <= ALLOC_MAX_UNITS; units = units < 16 ? units + 1 : units + 15) {
		alloc_init(&a);
		for (unsigned i = 0; i < 16; i++)
			assert_true(alloc_add(&a, 128) >= 0);
		while (alloc_get(&a, units * KVT_UNIT, false, &p) == 0)
			;
		assert_true(a.st.meta <= 16 * a.st.pages);
		alloc_fini(&a);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_random),        cmocka_unit_test(test_exhaustion),
		cmocka_unit_test(test_bad_requests),  cmocka_unit_test(test_segments),
		cmocka_unit_test(test_segment_limit), cmocka_unit_test(test_borrow),
		cmocka_unit_test(test_runs),          cmocka_unit_test(test_meta),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
