/* SPDX-License-Identifier: MIT */
/* The DRAM tier: contents, limits, segments made and given back, numbers. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>
#include <numaif.h>

#include "shm/crc.h"
#include "shm/util.h"
#include "tiers/tier.h"

#define MIB (UINT64_C(1) << 20)
#define OPS (&tier_dram_ops)

static struct tier *open_tier(uint64_t size, uint64_t segment)
{
	struct tier_cfg cfg = {.size = size, .segment = segment, .node = -1};
	char err[128] = "";
	struct tier *t = NULL;

	assert_int_equal(OPS->open(&t, &cfg, err, sizeof(err)), 0);
	assert_ptr_equal(t->ops, OPS);
	assert_string_equal(err, "");
	return t;
}

static void finish(struct tier *t, struct tier_io *io)
{
	struct tier_io *done[2] = {0};

	OPS->submit(t, &io, 1);
	assert_int_equal(OPS->reap(t, done, 2), 1);
	assert_ptr_equal(done[0], io);
	assert_int_equal(io->res, 0);
	OPS->release(t, io);
}

static void fill_bytes(uint8_t *p, uint32_t bytes, uint32_t seed)
{
	for (uint32_t i = 0; i < bytes; i++)
		p[i] = (uint8_t)((seed = seed * 1664525 + 1013904223) >> 24);
}

static uint32_t page_crc(uint32_t page, const void *buf, uint32_t bytes)
{
	struct page_ident id = {.page = page, .rows = 1, .tenant = 9};

	return crc32c(page_crc_seed(&id), buf, bytes);
}

/* -ENOSPC or the address of a page with contents of its own. */
static int write_page(struct tier *t, uint32_t seed, uint32_t bytes, tier_addr *ret)
{
	struct tier_io io = {.op = TIER_WRITE, .bytes = bytes};
	int r = OPS->prepare(t, &io);

	if (r < 0)
		return r;
	assert_int_equal((uintptr_t)io.buf % KVT_UNIT, 0);
	fill_bytes(io.buf, bytes, seed);
	finish(t, &io);
	*ret = io.addr;
	return 0;
}

static uint32_t read_crc(struct tier *t, uint32_t page, tier_addr addr, uint32_t bytes)
{
	struct tier_io io = {.op = TIER_READ, .bytes = bytes, .addr = addr}, *p = &io, *done;
	uint32_t crc;

	assert_int_equal(OPS->prepare(t, &io), 0);
	OPS->submit(t, &p, 1);
	assert_int_equal(OPS->reap(t, &done, 1), 1);
	crc = page_crc(page, io.buf, bytes);
	OPS->release(t, &io);
	return crc;
}

static void check_sums(struct tier *t)
{
	struct tier_stat st;

	OPS->stat(t, &st);
	assert_int_equal(st.used + st.free + st.overhead, st.capacity);
	assert_int_equal(st.inflight, 0);
}

/* Segments that are mapped in this process, seen by the kernel. */
static unsigned mapped_segments(void)
{
	FILE *f = fopen("/proc/self/maps", "r");
	char line[512];
	unsigned n = 0;

	assert_non_null(f);
	while (fgets(line, sizeof(line), f))
		n += strstr(line, "kvtier-dram") != NULL;
	fclose(f);
	return n;
}

/* The reaper unmaps on its own time. */
static unsigned settle(unsigned want)
{
	unsigned n = mapped_segments();

	for (unsigned i = 0; i < 5000 && n != want; i++) {
		usleep(1000);
		n = mapped_segments();
	}
	return n;
}

static void test_round_trip(void **state)
{
	enum { N = 600 };
	struct tier *t = open_tier(256 * MIB, 32 * MIB);
	uint32_t bytes[N], crc[N], seed = 5;
	uint8_t *want = malloc(TIER_MAX_PAGE);
	uint64_t used = 0, payload = 0;
	struct tier_stat st;
	tier_addr addr[N];

	for (uint32_t i = 0; i < N; i++) {
		seed = seed * 1664525 + 1013904223;
		bytes[i] = i % 50 == 0 ? TIER_MAX_PAGE : 1 + (seed >> 8) % (64 * KVT_UNIT);
		assert_int_equal(write_page(t, i, bytes[i], &addr[i]), 0);
		fill_bytes(want, bytes[i], i);
		crc[i] = page_crc(i, want, bytes[i]);
		used += ALIGN_UP(bytes[i], KVT_UNIT);
		payload += bytes[i];
	}
	for (uint32_t i = 0; i < N; i++) {
		assert_int_equal(read_crc(t, i, addr[i], bytes[i]), crc[i]);
		/* The same bytes under another page's name do not pass. */
		assert_int_not_equal(read_crc(t, i + 1, addr[i], bytes[i]), crc[i]);
	}
	OPS->stat(t, &st);
	assert_int_equal(st.used, used);
	assert_int_equal(st.writes, N);
	assert_int_equal(st.write_bytes, payload);
	assert_int_equal(st.reads, 2 * N);
	assert_int_equal(st.read_bytes, 2 * payload);
	assert_int_equal(st.device_write_bytes, used);
	assert_int_equal(st.errors, 0);
	check_sums(t);
	for (uint32_t i = 0; i < N; i++) {
		OPS->free(t, addr[i], bytes[i]);
		used -= ALIGN_UP(bytes[i], KVT_UNIT);
		OPS->stat(t, &st);
		assert_int_equal(st.used, used);
	}
	check_sums(t);
	assert_int_equal(st.errors, 0);
	free(want);
	OPS->close(t);
}

static void test_capacity(void **state)
{
	/* 5 MiB: two slabs, the odd MiB is not offered. Segments of 4 MiB: one. */
	struct tier *t = open_tier(5 * MIB, 4 * MIB);
	tier_addr addr[65];
	struct tier_stat st;
	uint32_t n = 0;

	while (n < 65 && write_page(t, n, 64 << 10, &addr[n]) == 0)
		n++;
	assert_int_equal(n, 64);
	assert_int_equal(write_page(t, 0, 1, &addr[64]), -ENOSPC);
	OPS->stat(t, &st);
	assert_int_equal(st.capacity, 4 * MIB);
	assert_int_equal(st.used, 4 * MIB);
	assert_int_equal(st.free, 0);
	assert_int_equal(st.errors, 0); /* being full is no error */
	OPS->free(t, addr[7], 64 << 10);
	assert_int_equal(write_page(t, 7, 64 << 10, &addr[7]), 0);
	assert_int_equal(write_page(t, 0, 64 << 10, &addr[64]), -ENOSPC);
	for (uint32_t i = 0; i < n; i++)
		OPS->free(t, addr[i], 64 << 10);
	/* Space of one size serves another again. */
	for (n = 0; n < 5 && write_page(t, n, TIER_MAX_PAGE, &addr[n]) == 0; n++)
		;
	assert_int_equal(n, 4);
	check_sums(t);
	OPS->close(t);
}

static void test_segments_come_and_go(void **state)
{
	enum { N = 20 }; /* pages of 1 MiB: five segments of 4 MiB; 18 MiB make the last one 2 MiB */
	struct tier *t = open_tier(18 * MIB, 4 * MIB);
	tier_addr addr[N];
	struct tier_stat st;
	uint32_t n = 0;

	assert_int_equal(mapped_segments(), 0); /* opening maps nothing */
	while (n < N && write_page(t, n, TIER_MAX_PAGE, &addr[n]) == 0)
		n++;
	assert_int_equal(n, 18);
	assert_int_equal(mapped_segments(), 5);
	for (uint32_t i = 0; i < n; i++)
		OPS->free(t, addr[i], TIER_MAX_PAGE);
	assert_int_equal(settle(1), 1);
	OPS->stat(t, &st); /* one empty segment stays, and is not merely the last to go */
	assert_non_null(strstr(st.note, "1 segments, 1 empty"));
	/* All of the capacity is there again. */
	for (uint32_t i = 0; i < 18; i++)
		assert_int_equal(write_page(t, i, TIER_MAX_PAGE, &addr[i]), 0);
	assert_int_equal(write_page(t, 0, 1, &addr[18]), -ENOSPC);
	for (uint32_t i = 0; i < 18; i++) {
		struct tier_io io = {.op = TIER_READ, .bytes = TIER_MAX_PAGE, .addr = addr[i]};
		uint8_t want[64];

		fill_bytes(want, sizeof(want), i);
		assert_int_equal(OPS->prepare(t, &io), 0);
		assert_memory_equal(io.buf, want, sizeof(want));
		OPS->release(t, &io);
	}
	/* A workload at the edge of a segment keeps it. */
	for (uint32_t i = 1; i < 18; i++)
		OPS->free(t, addr[i], TIER_MAX_PAGE);
	assert_int_equal(settle(2), 2);
	check_sums(t);
	OPS->close(t);
	assert_int_equal(mapped_segments(), 0);
}

static void test_release_and_misuse(void **state)
{
	struct tier *t = open_tier(4 * MIB, 0);
	struct tier_io io = {.op = TIER_WRITE, .bytes = 8192}, *done;
	struct tier_stat st;
	tier_addr addr;

	assert_int_equal(OPS->prepare(t, &io), 0);
	addr = io.addr;
	OPS->release(t, &io); /* never submitted: the place is free again */
	assert_true(io.addr == TIER_ADDR_NONE);
	assert_null(io.buf);
	OPS->stat(t, &st);
	assert_int_equal(st.used, 0);
	OPS->release(t, &io); /* twice is harmless */

	io = (struct tier_io){.op = TIER_READ, .bytes = 8192, .addr = addr};
	assert_int_equal(OPS->prepare(t, &io), -EINVAL); /* nothing lives there */
	io.addr = TIER_ADDR_NONE;
	assert_int_equal(OPS->prepare(t, &io), -EINVAL);
	io = (struct tier_io){.op = TIER_WRITE, .bytes = 0};
	assert_int_equal(OPS->prepare(t, &io), -EINVAL);
	io.bytes = TIER_MAX_PAGE + 1;
	assert_int_equal(OPS->prepare(t, &io), -EINVAL);

	assert_int_equal(write_page(t, 1, 8192, &addr), 0);
	OPS->free(t, addr + 1, 8192);
	OPS->free(t, addr, 65536);
	OPS->stat(t, &st);
	assert_int_equal(st.errors, 2);
	assert_int_equal(st.used, 8192);
	OPS->free(t, addr, 8192);
	OPS->free(t, addr, 8192);
	OPS->stat(t, &st);
	assert_int_equal(st.errors, 3);
	assert_int_equal(st.used, 0);
	assert_int_equal(OPS->reap(t, &done, 1), 0);
	OPS->close(t);
	OPS->close(NULL);
}

/* Reads and releases do not disturb the order of completions. */
static void test_completion_order(void **state)
{
	struct tier *t = open_tier(4 * MIB, 0);
	struct tier_io io[9] = {0}, *list[9], *done[9];
	struct tier_stat st;

	for (unsigned i = 0; i < 9; i++) {
		io[i] = (struct tier_io){.op = TIER_WRITE, .bytes = 4096};
		list[i] = &io[i];
		assert_int_equal(OPS->prepare(t, &io[i]), 0);
	}
	OPS->submit(t, list, 5);
	OPS->stat(t, &st);
	assert_int_equal(st.inflight, 5);
	assert_int_equal(OPS->reap(t, done, 3), 3);
	OPS->submit(t, list + 5, 4);
	assert_int_equal(OPS->reap(t, done + 3, 9), 6);
	for (unsigned i = 0; i < 9; i++) {
		assert_ptr_equal(done[i], &io[i]);
		OPS->release(t, done[i]);
		assert_true(io[i].addr != TIER_ADDR_NONE);
	}
	assert_int_equal(OPS->reap(t, done, 9), 0);
	check_sums(t);
	OPS->close(t);
}

static void refuse(const struct tier_cfg *cfg, const char *field, const char *value)
{
	char err[128] = "";
	struct tier *t = NULL;

	assert_int_equal(OPS->open(&t, cfg, err, sizeof(err)), -EINVAL);
	assert_null(t);
	assert_non_null(strstr(err, field));
	assert_non_null(strstr(err, value));
	assert_null(strchr(err, '\n'));
}

static void test_bad_config(void **state)
{
	refuse(&(struct tier_cfg){.size = MIB, .node = -1}, "size", "1048576");
	refuse(&(struct tier_cfg){.size = 0, .node = -1}, "size", "0");
	refuse(&(struct tier_cfg){.size = 8 * MIB, .segment = MIB, .node = -1}, "segment", "1048576");
	refuse(&(struct tier_cfg){.size = 8 * MIB, .segment = 3 * MIB, .node = -1}, "segment", "3145728");
	refuse(&(struct tier_cfg){.size = UINT64_C(1) << 40, .segment = 2 * MIB, .node = -1}, "segment",
	       "2097152");
	refuse(&(struct tier_cfg){.size = UINT64_MAX, .node = -1}, "size", "18446744073709551615");
	refuse(&(struct tier_cfg){.size = 8 * MIB, .node = 1000}, "node", "1000");
}

/* Sixteen terabytes are offered without a byte being taken. */
static void test_open_takes_nothing(void **state)
{
	struct tier *t = open_tier(UINT64_C(16) << 40, 0);
	struct tier_stat st;

	OPS->stat(t, &st);
	assert_int_equal(st.capacity, UINT64_C(16) << 40);
	assert_int_equal(mapped_segments(), 0);
	OPS->close(t);
}

static void test_placement(void **state)
{
	struct tier_cfg cfg = {.size = 4 * MIB, .node = 0};
	struct tier_io io = {.op = TIER_WRITE, .bytes = 4096};
	char err[128];
	struct tier *t;
	int mode = -1;

	assert_int_equal(OPS->open(&t, &cfg, err, sizeof(err)), 0);
	assert_int_equal(OPS->prepare(t, &io), 0);
	if (get_mempolicy(&mode, NULL, 0, io.buf, MPOL_F_ADDR) < 0) {
		print_message("# SKIP the kernel has no memory policies\n");
		OPS->release(t, &io);
		OPS->close(t);
		skip();
	}
	assert_int_equal(mode, MPOL_PREFERRED);
	OPS->release(t, &io);
	OPS->close(t);
}

static void test_registry(void **state)
{
	assert_ptr_equal(tier_find("dram"), &tier_dram_ops);
	assert_ptr_equal(tier_find("fault"), &tier_fault_ops);
	assert_null(tier_find("dra"));
	assert_null(tier_find(""));
	assert_null(tier_find(NULL));
	for (unsigned i = 0; tier_registry[i]; i++) {
		assert_ptr_equal(tier_find(tier_registry[i]->name), tier_registry[i]);
		for (unsigned k = 0; k < i; k++)
			assert_string_not_equal(tier_registry[k]->name, tier_registry[i]->name);
	}
}

/* Every byte of the identity counts. */
static void test_crc_seed(void **state)
{
	struct page_ident id = {.page = 1};
	uint32_t base = page_crc_seed(&id);

	assert_int_equal(base, crc32c(0, &id, sizeof(id)));
	for (size_t i = 0; i < sizeof(id); i++) {
		((uint8_t *)&id)[i] ^= 1;
		assert_int_not_equal(page_crc_seed(&id), base);
		((uint8_t *)&id)[i] ^= 1;
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_round_trip),
		cmocka_unit_test(test_capacity),
		cmocka_unit_test(test_segments_come_and_go),
		cmocka_unit_test(test_release_and_misuse),
		cmocka_unit_test(test_completion_order),
		cmocka_unit_test(test_bad_config),
		cmocka_unit_test(test_open_takes_nothing),
		cmocka_unit_test(test_placement),
		cmocka_unit_test(test_registry),
		cmocka_unit_test(test_crc_seed),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
