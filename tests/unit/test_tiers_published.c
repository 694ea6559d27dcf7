/* SPDX-License-Identifier: MIT */
/* Published DRAM: whose segments they are, that nobody writes through what is handed out, what comes back when.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>
#include <fcntl.h>
#include <sys/mman.h>

#include "shm/seg.h"
#include "shm/util.h"
#include "tiers/tier.h"

#define MIB (UINT64_C(1) << 20)
#define OPS (&tier_dram_ops)
#define ALL UINT64_MAX

static struct tier *open_tier(uint64_t size, uint64_t segment)
{
	struct tier_cfg cfg = {.size = size, .segment = segment, .node = -1};
	struct tier *t = NULL;
	char err[128];

	assert_int_equal(OPS->open(&t, &cfg, err, sizeof(err)), 0);
	return t;
}

/* A page of `bytes` times `fill`; -ENOSPC. */
static int put(struct tier *t, uint64_t owner, uint64_t room, uint32_t bytes, uint8_t fill, tier_addr *ret)
{
	struct tier_io io = {.op = TIER_WRITE, .bytes = bytes, .owner = owner, .room = room}, *p = &io, *done;
	int r = OPS->prepare(t, &io);

	if (r < 0)
		return r;
	memset(io.buf, fill, bytes);
	OPS->submit(t, &p, 1);
	assert_int_equal(OPS->reap(t, &done, 1), 1);
	*ret = io.addr;
	OPS->release(t, &io);
	return 0;
}

static uint8_t peek(struct tier *t, tier_addr addr, uint32_t bytes)
{
	struct tier_io io = {.op = TIER_READ, .bytes = bytes, .addr = addr}, *p = &io, *done;
	uint8_t first;

	assert_int_equal(OPS->prepare(t, &io), 0);
	OPS->submit(t, &p, 1);
	assert_int_equal(OPS->reap(t, &done, 1), 1);
	first = *(uint8_t *)io.buf;
	assert_int_equal(((uint8_t *)io.buf)[bytes - 1], first);
	OPS->release(t, &io);
	return first;
}

static struct tier_stat sums(struct tier *t)
{
	struct tier_stat st;

	OPS->stat(t, &st);
	assert_int_equal(st.used + st.free + st.overhead, st.capacity);
	assert_true(st.held <= st.published && st.published <= st.capacity);
	assert_int_equal(st.errors, 0);
	return st;
}

static struct tier_owner owner(struct tier *t, uint64_t who)
{
	struct tier_owner o;

	OPS->owner_stat(t, who, &o);
	assert_true(o.used <= o.bytes);
	return o;
}

static int fd_of(struct tier *t, uint64_t who, tier_addr addr, uint64_t *ret_bytes)
{
	assert_true(tier_published(addr));
	return OPS->segment(t, who, tier_segment(addr), ret_bytes);
}

/* What a client does with what it is told: the page's bytes, through its own mapping. */
static void see(struct tier *t, uint64_t who, tier_addr addr, uint32_t bytes, uint8_t fill)
{
	struct seg s;
	uint64_t size;
	int fd = fd_of(t, who, addr, &size);

	assert_true(fd >= 0);
	assert_int_equal(seg_map(&s, SEG_PUBLISHED, dup(fd), size), 0);
	assert_true(tier_offset(addr) + bytes <= size);
	for (uint32_t i = 0; i < bytes; i++)
		assert_int_equal(((uint8_t *)s.addr)[tier_offset(addr) + i], fill);
	seg_close(&s);
}

static void test_clients_see_their_pages(void **state)
{
	struct tier *t = open_tier(64 * MIB, 16 * MIB);
	tier_addr a[40], b[40], c;
	struct tier_stat st;
	uint64_t bytes;

	for (int i = 0; i < 40; i++) {
		assert_int_equal(put(t, 5, ALL, 5000 + 700 * i, (uint8_t)i, &a[i]), 0);
		assert_int_equal(put(t, 6, ALL, 5000 + 700 * i, (uint8_t)(100 + i), &b[i]), 0);
	}
	assert_int_equal(put(t, 0, 0, 5000, 1, &c), 0);
	assert_false(tier_published(c));
	assert_false(tier_published(TIER_ADDR_NONE));
	for (int i = 0; i < 40; i++) {
		assert_int_equal(peek(t, a[i], 5000 + 700 * i), i);
		see(t, 5, a[i], 5000 + 700 * i, (uint8_t)i);
		see(t, 6, b[i], 5000 + 700 * i, (uint8_t)(100 + i));
		/* One answer for what is another's, private and what does not exist. */
		assert_int_equal(fd_of(t, 6, a[i], &bytes), -ENOENT);
		assert_int_equal(fd_of(t, 0, a[i], &bytes), -ENOENT);
	}
	for (uint32_t n = 0; n < 1u << 24; n += 4093)
		assert_int_equal(OPS->segment(t, 9, n, &bytes), -ENOENT);
	assert_int_equal(OPS->segment(t, 5, (uint32_t)(c >> 32), &bytes), -ENOENT);
	assert_int_equal(OPS->segment(t, 5, UINT32_MAX, &bytes), -ENOENT);
	st = sums(t);
	assert_int_equal(st.published, owner(t, 5).bytes + owner(t, 6).bytes);
	assert_int_equal(st.held, st.published - owner(t, 5).used - owner(t, 6).used);
	OPS->close(t);
}

/* Everything that a process could try with the descriptor it was given, as the same user. */
static void test_nobody_writes(void **state)
{
	struct tier *t = open_tier(64 * MIB, 32 * MIB);
	uint8_t byte = 9, *map;
	tier_addr addr;
	uint64_t size;
	char path[64];
	int fd, again;

	assert_int_equal(put(t, 5, ALL, 8192, 7, &addr), 0);
	fd = fd_of(t, 5, addr, &size);
	assert_int_equal(seg_verify(fd, SEG_PUBLISHED, size), 0);
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	again = open(path, O_RDWR | O_CLOEXEC);
	for (int k = 0; k < 2; k++) {
		int f = k ? again : fd;

		if (f < 0)
			continue; /* not even opened */
		assert_ptr_equal(mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, f, 0), MAP_FAILED);
		assert_int_equal(errno, EPERM);
		map = mmap(NULL, size, PROT_READ, MAP_SHARED, f, 0);
		assert_true(map != MAP_FAILED);
		assert_true(mprotect(map, size, PROT_READ | PROT_WRITE) < 0);
		assert_true(madvise(map, size, MADV_REMOVE) < 0);
		assert_true(pwrite(f, &byte, 1, (off_t)tier_offset(addr)) < 0);
		assert_true(fallocate(f, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)size) < 0);
		assert_true(fallocate(f, FALLOC_FL_ZERO_RANGE, 0, (off_t)size) < 0);
		assert_true(ftruncate(f, 0) < 0);
		assert_true(ftruncate(f, (off_t)size * 2) < 0);
		assert_true(fcntl(f, F_ADD_SEALS, F_SEAL_WRITE) < 0);
		assert_int_equal(map[tier_offset(addr)], 7);
		munmap(map, size);
	}
	assert_true(again < 0 || !close(again));
	/* The daemon still does. */
	assert_int_equal(put(t, 5, ALL, 8192, 8, &addr), 0);
	see(t, 5, addr, 8192, 8);
	OPS->close(t);
}

/* Emptied segments stay with a held owner and go with its last client; a slot's next segment has another
 * number. */
static void test_hold(void **state)
{
	struct tier *t = open_tier(64 * MIB, 32 * MIB);
	tier_addr a[24], b;
	uint64_t size, bytes;
	struct seg kept;
	uint32_t number;
	int fd;

	assert_int_equal(OPS->hold(t, 5, true), 0);
	for (int i = 0; i < 24; i++)
		assert_int_equal(put(t, 5, ALL, TIER_MAX_PAGE, (uint8_t)i, &a[i]), 0);
	bytes = owner(t, 5).bytes;
	number = tier_segment(a[0]);
	fd = fd_of(t, 5, a[0], &size);
	assert_int_equal(seg_map(&kept, SEG_PUBLISHED, dup(fd), size), 0);
	for (int i = 0; i < 24; i++)
		OPS->free(t, a[i], TIER_MAX_PAGE);
	assert_int_equal(owner(t, 5).used, 0);
	assert_int_equal(owner(t, 5).bytes, bytes);
	assert_int_equal(owner(t, 5).empty, owner(t, 5).segments);
	assert_int_equal(sums(t).held, bytes);
	/* Not punched: what was read is there until another page is. */
	assert_int_equal(seg_resident(&kept), size);
	/* Others cannot have them, their owner can, and takes no new ones. */
	assert_int_equal(owner(t, 0).room, 64 * MIB - bytes);
	for (uint64_t left = 64 * MIB - bytes; left; left -= MIB)
		assert_int_equal(put(t, 0, 0, TIER_MAX_PAGE, 1, &b), 0);
	assert_int_equal(put(t, 0, 0, TIER_MAX_PAGE, 1, &b), -ENOSPC);
	assert_int_equal(put(t, 6, ALL, 4096, 1, &b), -ENOSPC);
	assert_int_equal(put(t, 5, 0, TIER_MAX_PAGE, 77, &a[0]), 0);
	see(t, 5, a[0], TIER_MAX_PAGE, 77);
	/* Without clients: empty ones at once, the others with their last page. */
	assert_int_equal(OPS->hold(t, 5, false), 0);
	assert_int_equal(owner(t, 5).segments, 1);
	OPS->free(t, a[0], TIER_MAX_PAGE);
	assert_int_equal(owner(t, 5).bytes, 0);
	assert_int_equal(sums(t).published, 0);
	assert_int_equal(OPS->segment(t, 5, number, &size), -ENOENT);
	/* The mapping outlives it. */
	assert_int_equal(*(volatile uint8_t *)kept.addr, *(volatile uint8_t *)kept.addr);
	seg_close(&kept);
	assert_int_equal(put(t, 5, ALL, 4096, 3, &b), 0);
	assert_int_not_equal(tier_segment(b), number);
	assert_int_equal(OPS->segment(t, 5, number, &size), -ENOENT);
	OPS->close(t);
}

/* New segments never take more than they may. */
static void test_room(void **state)
{
	struct tier *t = open_tier(64 * MIB, 16 * MIB);
	tier_addr a;
	uint64_t had;

	assert_int_equal(put(t, 5, 0, 4096, 1, &a), -ENOSPC);
	assert_int_equal(put(t, 5, 2 * MIB - 1, 4096, 1, &a), -ENOSPC);
	assert_int_equal(owner(t, 5).bytes, 0);
	assert_int_equal(put(t, 5, 3 * MIB, 4096, 1, &a), 0);
	assert_int_equal(owner(t, 5).bytes, 2 * MIB);
	had = owner(t, 5).room;
	for (unsigned n = 0; n < 511; n++)
		assert_int_equal(put(t, 5, 0, 4096, 1, &a), 0);
	assert_int_equal(had - owner(t, 5).room, 511 * 4096);
	assert_int_equal(put(t, 5, 0, 4096, 1, &a), -ENOSPC);
	assert_int_equal(put(t, 5, 4 * MIB, 4096, 1, &a), 0);
	assert_true(owner(t, 5).bytes <= 6 * MIB);
	OPS->close(t);
}

/* The empty segment that private pages keep is worth less than an owner's pages. */
static void test_spare_is_given_up(void **state)
{
	struct tier *t = open_tier(16 * MIB, 16 * MIB);
	tier_addr a;

	assert_int_equal(put(t, 0, 0, 4096, 1, &a), 0);
	assert_int_equal(owner(t, 5).room, 0);
	assert_int_equal(put(t, 5, ALL, 4096, 1, &a), -ENOSPC);
	OPS->free(t, a, 4096);
	assert_int_equal(put(t, 0, 0, 4096, 1, &a), 0);
	OPS->free(t, a, 4096);
	assert_int_equal(owner(t, 0).empty, 1);
	assert_int_equal(owner(t, 5).room, 16 * MIB);
	assert_int_equal(put(t, 5, ALL, 4096, 1, &a), 0);
	assert_int_equal(owner(t, 0).segments, 0);
	OPS->close(t);
}

#define OWNERS 4u /* the first is private */
#define PAGES 3000u

struct live {
	tier_addr addr;
	uint32_t bytes;
	uint64_t owner;
	uint8_t fill;
};

/* Writes and frees of all at random: a segment has had one owner ever, and pages keep their bytes. */
static void test_owners_never_mix(void **state)
{
	struct tier *t = open_tier(96 * MIB, 16 * MIB);
	struct live *p = calloc(PAGES, sizeof(*p));
	uint64_t *had = calloc(1u << 24, sizeof(*had));
	uint32_t seed = 11, n = 0, refused = 0, made = 0;

	assert_true(p && had);
	for (uint64_t o = 1; o < OWNERS; o++)
		assert_int_equal(OPS->hold(t, o, true), 0);
	for (uint32_t step = 0; step < 60000; step++) {
		struct live x = {.fill = (uint8_t)step};
		uint32_t i;

		seed = seed * 1664525 + 1013904223;
		x.owner = (seed >> 8) % OWNERS;
		x.bytes = 1 + (seed >> 12) % 60000;
		if (n < PAGES && (seed >> 30 || !n)) {
			if (put(t, x.owner, ALL, x.bytes, x.fill, &x.addr)) {
				refused++;
			} else {
				assert_int_equal(tier_published(x.addr), x.owner != 0);
				if (x.owner) {
					uint64_t *h = &had[tier_segment(x.addr)];

					assert_true(!*h || *h == x.owner);
					made += !*h;
					*h = x.owner;
				}
				p[n++] = x;
			}
		}
		for (unsigned k = 0; n && k < (step / 4000 % 2 ? 2u : 1u); k++) {
			i = (seed >> 4) % n;
			assert_int_equal(peek(t, p[i].addr, p[i].bytes), p[i].fill);
			if (seed >> 31) {
				OPS->free(t, p[i].addr, p[i].bytes);
				p[i] = p[--n];
			}
		}
		if (step % 9973 == 0) { /* a client of this one leaves and comes back */
			OPS->hold(t, 1 + step % (OWNERS - 1), false);
			OPS->hold(t, 1 + step % (OWNERS - 1), true);
		}
	}
	assert_true(made > OWNERS && n);
	while (n--)
		OPS->free(t, p[n].addr, p[n].bytes);
	assert_int_equal(sums(t).used, 0);
	for (uint64_t o = 1; o < OWNERS; o++)
		OPS->hold(t, o, false);
	assert_int_equal(sums(t).published, 0);
	print_message("# %u published segments, %u writes refused\n", made, refused);
	free(p);
	free(had);
	OPS->close(t);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_clients_see_their_pages),
		cmocka_unit_test(test_nobody_writes),
		cmocka_unit_test(test_hold),
		cmocka_unit_test(test_room),
		cmocka_unit_test(test_spare_is_given_up),
		cmocka_unit_test(test_owners_never_mix),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
