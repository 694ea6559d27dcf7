/* SPDX-License-Identifier: MIT */
/*
 * What every tier promises in tier.h, checked of each in turn: the same tests over a table of tiers. A new
 * tier gets a line in the table.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>
#include <dirent.h>
#include <poll.h>

#include "shm/crc.h"
#include "shm/util.h"
#include "tiers/tier.h"

#define MIB (UINT64_C(1) << 20)
#define MANY 96u /* requests at a time */

struct target {
	const char *label, *ops, *lower; /* names in the registry */
	struct tier_cfg cfg;
	uint64_t owner; /* of its pages, in tiers with published memory */
};

static const struct target targets[] = {
	{.label = "dram", .ops = "dram", .cfg = {.size = 64 * MIB, .segment = 16 * MIB, .node = -1}},
	{.label = "dram, published",
	 .ops = "dram",
	 .cfg = {.size = 64 * MIB, .segment = 16 * MIB, .node = -1},
	 .owner = 7},
	{.label = "fault(dram)",
	 .ops = "fault",
	 .lower = "dram",
	 .cfg = {.size = 64 * MIB, .segment = 16 * MIB, .node = -1}},
	{.label = "fault(dram), published, delayed",
	 .ops = "fault",
	 .lower = "dram",
	 .cfg = {.size = 64 * MIB, .node = -1, .fault = "delay_us=200"},
	 .owner = 7},
	{.label = "nvme, io_uring",
	 .ops = "nvme",
	 .cfg = {.size = 64 * MIB, .segment = 8 * MIB, .staging = 4 * MIB, .depth = 16}},
	{.label = "nvme, threads",
	 .ops = "nvme",
	 .cfg = {.size = 64 * MIB, .segment = 8 * MIB, .staging = 4 * MIB, .depth = 16, .no_uring = true}},
	{.label = "fault(nvme)",
	 .ops = "fault",
	 .lower = "nvme",
	 .cfg = {.size = 64 * MIB, .segment = 8 * MIB, .staging = 4 * MIB, .depth = 16}},
};

/* One open tier, and the pages that live in it. */
struct page {
	struct page_ident id;
	uint32_t bytes, crc;
	tier_addr addr;
};

struct fixture {
	const struct target *target;
	const struct tier_ops *ops;
	struct tier *t;
	char dir[64];
	struct seq_record seq;
	struct page *page;
	uint32_t pages, room;
	uint64_t number; /* of the next page */
	uint64_t written, payload;
};

/* ---- fixture ------------------------------------------------------------------------- */

static void remove_dir(const char *dir)
{
	DIR *d = opendir(dir);
	struct dirent *e;

	while (d && (e = readdir(d)))
		if (e->d_name[0] != '.')
			unlinkat(dirfd(d), e->d_name, 0);
	if (d)
		closedir(d);
	rmdir(dir);
}

static bool setup(struct fixture *f, const struct target *target)
{
	struct tier_cfg cfg = target->cfg;
	char err[256] = "";
	int r;

	memset(f, 0, sizeof(*f));
	f->target = target;
	f->ops = tier_find(target->ops);
	cfg.lower_ops = target->lower ? tier_find(target->lower) : NULL;
	if (!f->ops || (target->lower && !cfg.lower_ops)) {
		print_message("# SKIP %s: this build has no such tier\n", target->label);
		return false;
	}
	snprintf(f->dir, sizeof(f->dir), "/tmp/kvtier-conform-XXXXXX");
	assert_non_null(mkdtemp(f->dir));
	cfg.path = f->dir;
	r = f->ops->open(&f->t, &cfg, err, sizeof(err));
	if (r < 0)
		fail_msg("%s: %s", target->label, err);
	assert_ptr_equal(f->t->ops, f->ops);
	memset(f->seq.key, 7, sizeof(f->seq.key));
	f->seq.tenant = 3;
	f->seq.lanes = 4;
	return true;
}

static void teardown(struct fixture *f)
{
	f->ops->close(f->t);
	remove_dir(f->dir);
	free(f->page);
}

static void check_stat(struct fixture *f, unsigned inflight)
{
	struct tier_stat st;
	uint64_t least = 0;

	f->ops->stat(f->t, &st);
	for (uint32_t i = 0; i < f->pages; i++)
		least += f->page[i].bytes;
	assert_true(st.capacity > 0 && st.capacity <= f->target->cfg.size);
	assert_true(st.used >= least);
	assert_true(st.used + st.free <= st.capacity);
	assert_int_equal(st.inflight, inflight);
	assert_int_equal(st.leaked_bytes, 0);
	assert_int_equal(st.writes, f->written);
	assert_int_equal(st.write_bytes, f->payload);
	assert_int_equal(st.errors, 0);
	assert_false(st.offline);
	assert_non_null(memchr(st.note, 0, sizeof(st.note)));
}

/* ---- driving a tier as the mover does ------------------------------------------------ */

static bool on_moved(void *arg, const struct page_meta *m, tier_addr from, tier_addr to)
{
	struct fixture *f = arg;

	for (uint32_t i = 0; i < f->pages; i++) {
		if (f->page[i].addr != from)
			continue;
		assert_int_equal(f->page[i].id.page, m->id.page);
		f->page[i].addr = to;
		return true;
	}
	return false;
}

static void tick(struct fixture *f)
{
	if (f->ops->tick)
		f->ops->tick(f->t, on_moved, f);
}

static void wait_some(struct fixture *f)
{
	struct pollfd p = {.fd = f->ops->event_fd(f->t), .events = POLLIN};

	if (p.fd >= 0 && poll(&p, 1, 10000) != 1)
		fail_msg("%s: nothing completes", f->target->label);
}

static void reap_all(struct fixture *f, struct tier_io **done, unsigned n)
{
	unsigned got = 0;

	while (got < n) {
		unsigned k = f->ops->reap(f->t, done + got, n - got);

		if (!k)
			wait_some(f);
		got += k;
	}
}

/* A page of our own making into io, up to but without submit. -ENOSPC, or 0. */
static int prepare_page(struct fixture *f, struct tier_io *io, struct page *p, uint32_t bytes)
{
	static const uint64_t pos = 1;
	uint64_t x = f->number * 0x9e3779b97f4a7c15u + 1;
	uint8_t *b;
	int r;

	*p = (struct page){.id = {.page = f->number, .tenant = 3, .lane = 1, .rows = 1}, .bytes = bytes};
	memcpy(p->id.key, f->seq.key, sizeof(p->id.key));
	*io = (struct tier_io){.op = TIER_WRITE,
			       .bytes = bytes,
			       .seq = &f->seq,
			       .life = TIER_LONG,
			       .user = p,
			       .owner = f->target->owner,
			       .room = UINT64_MAX};
	io->meta = (struct page_meta){.id = p->id, .bytes = bytes, .pos_words = 1, .pos = &pos};
	for (unsigned tries = 0; (r = f->ops->prepare(f->t, io)) == -EAGAIN && tries < 1000; tries++)
		tick(f);
	if (r < 0)
		return r;
	f->number++;
	assert_non_null(io->buf);
	assert_true(io->addr != TIER_ADDR_NONE);
	b = io->buf;
	for (uint32_t i = 0; i < bytes; i++, x = x * 6364136223846793005u + 1442695040888963407u)
		b[i] = (uint8_t)(x >> 56);
	p->crc = io->meta.crc = crc32c(page_crc_seed(&p->id), b, bytes);
	return 0;
}

static void keep(struct fixture *f, const struct page *p)
{
	if (f->pages == f->room) {
		f->room = f->room * 2 + 64;
		f->page = realloc(f->page, f->room * sizeof(*f->page));
		assert_non_null(f->page);
	}
	f->page[f->pages++] = *p;
}

static void finish_writes(struct fixture *f, struct tier_io **ios, unsigned n)
{
	struct tier_io *done[MANY];

	f->ops->submit(f->t, ios, n);
	reap_all(f, done, n);
	for (unsigned i = 0; i < n; i++) {
		struct page *p = done[i]->user;

		assert_int_equal(done[i]->res, 0);
		assert_true(done[i]->addr != TIER_ADDR_NONE);
		p->addr = done[i]->addr;
		f->ops->release(f->t, done[i]);
		f->written++;
		f->payload += p->bytes;
		keep(f, p);
	}
}

static int write_page(struct fixture *f, uint32_t bytes)
{
	struct tier_io io, *p = &io;
	struct page page;
	int r = prepare_page(f, &io, &page, bytes);

	if (r == 0)
		finish_writes(f, &p, 1);
	return r;
}

static void read_page(struct fixture *f, const struct page *p)
{
	struct tier_io io = {.op = TIER_READ, .bytes = p->bytes, .addr = p->addr}, *list = &io, *done;

	assert_int_equal(f->ops->prepare(f->t, &io), 0);
	f->ops->submit(f->t, &list, 1);
	reap_all(f, &done, 1);
	assert_ptr_equal(done, &io);
	assert_int_equal(io.res, 0);
	assert_int_equal(crc32c(page_crc_seed(&p->id), io.buf, p->bytes), p->crc);
	f->ops->release(f->t, &io);
}

static void free_page(struct fixture *f, uint32_t i)
{
	struct page p = f->page[i];

	f->page[i] = f->page[--f->pages];
	f->ops->free(f->t, p.addr, p.bytes);
}

/* ---- the promises -------------------------------------------------------------------- */

static void check_round_trip(struct fixture *f)
{
	static const uint32_t sizes[] = {
		1,     511,   512,    4095,   4096,   4097,          8192,
		65536, 65537, 100000, 262144, 300001, TIER_MAX_PAGE, TIER_MAX_PAGE - 1};

	for (unsigned i = 0; i < ARRAY_SIZE(sizes); i++)
		assert_int_equal(write_page(f, sizes[i]), 0);
	check_stat(f, 0);
	for (unsigned round = 0; round < 2; round++) /* reading changes nothing */
		for (uint32_t i = f->pages; i-- > 0;)
			read_page(f, &f->page[i]);
	check_stat(f, 0);
	for (uint32_t i = 0; i < f->pages; i++)
		for (uint32_t k = 0; k < i; k++)
			assert_true(f->page[i].addr != f->page[k].addr);
	while (f->pages)
		free_page(f, f->pages / 2);
	check_stat(f, 0);
}

static void check_bad_sizes(struct fixture *f)
{
	struct tier_io io = {.op = TIER_WRITE, .bytes = 0, .seq = &f->seq};

	assert_int_equal(f->ops->prepare(f->t, &io), -EINVAL);
	io.bytes = TIER_MAX_PAGE + 1;
	assert_int_equal(f->ops->prepare(f->t, &io), -EINVAL);
	check_stat(f, 0);
}

/* Many writes, then many reads, submitted together and reaped as they come. */
static void check_many_in_flight(struct fixture *f)
{
	struct tier_io io[MANY], *list[MANY], *done[MANY];
	struct page page[MANY];
	unsigned n = 0;
	int r;

	while (n < MANY && (r = prepare_page(f, &io[n], &page[n], 1 + n * 619 % 40000)) == 0) {
		list[n] = &io[n];
		n++;
	}
	assert_true(n == MANY || r == -EAGAIN); /* out of buffers is an answer */
	assert_true(n >= 8);
	finish_writes(f, list, n);
	check_stat(f, 0);
	for (unsigned i = 0; i < n; i++) {
		const struct page *p = &f->page[f->pages - 1 - i];

		io[i] = (struct tier_io){
			.op = TIER_READ, .bytes = p->bytes, .addr = p->addr, .user = (void *)p};
		r = f->ops->prepare(f->t, &io[i]);
		if (r == -EAGAIN) {
			n = i;
			break;
		}
		assert_int_equal(r, 0);
	}
	assert_true(n >= 8);
	f->ops->submit(f->t, list, n / 2);
	f->ops->submit(f->t, list + n / 2, n - n / 2);
	check_stat(f, n);
	reap_all(f, done, n);
	for (unsigned i = 0; i < n; i++) {
		const struct page *p = done[i]->user;

		assert_int_equal(done[i]->res, 0);
		assert_int_equal(crc32c(page_crc_seed(&p->id), done[i]->buf, p->bytes), p->crc);
	}
	for (unsigned i = 0; i < n; i++)
		f->ops->release(f->t, done[i]);
	assert_int_equal(f->ops->reap(f->t, done, MANY), 0);
	check_stat(f, 0);
}

static void check_release_unsubmitted(struct fixture *f)
{
	struct tier_stat before, after;
	struct tier_io io;
	struct page page;

	assert_int_equal(write_page(f, 5000), 0);
	f->ops->stat(f->t, &before);
	for (unsigned i = 0; i < 2000; i++) { /* more than there is of anything, were it not given back */
		assert_int_equal(prepare_page(f, &io, &page, 64 << 10), 0);
		f->ops->release(f->t, &io);
		assert_true(io.addr == TIER_ADDR_NONE);
		io = (struct tier_io){.op = TIER_READ, .bytes = f->page[0].bytes, .addr = f->page[0].addr};
		assert_int_equal(f->ops->prepare(f->t, &io), 0);
		f->ops->release(f->t, &io);
		tick(f);
	}
	f->ops->stat(f->t, &after);
	assert_int_equal(after.inflight, 0);
	assert_int_equal(after.writes, before.writes);
	read_page(f, &f->page[0]);
}

/* Fill it up, get -ENOSPC, lose nothing, and have the space again after free. */
static void check_exhaustion(struct fixture *f)
{
	struct tier_stat st;
	uint32_t full, refused = 0;
	int r;

	while ((r = write_page(f, 256 << 10)) == 0)
		assert_true(f->pages <= f->target->cfg.size / (256 << 10));
	assert_int_equal(r, -ENOSPC);
	full = f->pages;
	f->ops->stat(f->t, &st);
	assert_true(full * (UINT64_C(256) << 10) * 2 >= st.capacity); /* at least half of it is for pages */
	assert_int_equal(write_page(f, 256 << 10), -ENOSPC);
	for (uint32_t i = 0; i < f->pages; i += 7)
		read_page(f, &f->page[i]);
	while (f->pages)
		free_page(f, f->pages - 1);
	f->ops->stat(f->t, &st);
	assert_int_equal(st.used, 0);
	/* A tier that cleans may need a moment, but then all of it is there. */
	while (f->pages < full / 2) {
		r = write_page(f, 256 << 10);
		assert_true(r == 0 || r == -ENOSPC);
		if (r < 0) {
			assert_true(++refused < 2000);
			tick(f);
			usleep(1000);
		}
	}
	for (uint32_t i = 0; i < f->pages; i++)
		read_page(f, &f->page[i]);
	check_stat(f, 0);
}

/* Pages come and go in any order; what lives stays what it was. */
static void check_churn(struct fixture *f)
{
	uint64_t x = 12345;
	int r;

	for (unsigned step = 0; step < 1500; step++) {
		x = x * 6364136223846793005u + 1442695040888963407u;
		tick(f);
		if (f->pages > 150 || (f->pages && x >> 62 == 0)) {
			uint32_t i = (uint32_t)(x >> 33) % f->pages;

			read_page(f, &f->page[i]);
			free_page(f, i);
			continue;
		}
		r = write_page(f, 1 + (uint32_t)(x >> 40) % 90000);
		assert_true(r == 0 || r == -ENOSPC);
		if (r < 0)
			free_page(f, 0);
	}
	check_stat(f, 0);
	for (uint32_t i = 0; i < f->pages; i++)
		read_page(f, &f->page[i]);
	if (f->ops->sync)
		assert_int_equal(f->ops->sync(f->t), 0);
	for (uint32_t i = 0; i < f->pages; i++)
		read_page(f, &f->page[i]);
}

/* Closing with pages alive, requests prepared and requests done but not reaped. */
static void check_close_busy(struct fixture *f)
{
	static struct tier_io io[8];
	static struct page page[8];
	struct tier_io *list[8];

	assert_int_equal(write_page(f, 10000), 0);
	for (unsigned i = 0; i < 8; i++) {
		assert_int_equal(prepare_page(f, &io[i], &page[i], 8192), 0);
		list[i] = &io[i];
	}
	f->ops->submit(f->t, list, 5);
}

static void over_all(void (*check)(struct fixture *f))
{
	for (unsigned i = 0; i < ARRAY_SIZE(targets); i++) {
		struct fixture f;

		if (!setup(&f, &targets[i]))
			continue;
		check(&f);
		teardown(&f);
	}
}

#define CONFORM(what)                                                                                          \
	static void test_##what(void **state)                                                                  \
	{                                                                                                      \
		over_all(check_##what);                                                                        \
	}

CONFORM(round_trip)
CONFORM(bad_sizes)
CONFORM(many_in_flight)
CONFORM(release_unsubmitted)
CONFORM(exhaustion)
CONFORM(churn)
CONFORM(close_busy)

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_round_trip),     cmocka_unit_test(test_bad_sizes),
		cmocka_unit_test(test_many_in_flight), cmocka_unit_test(test_release_unsubmitted),
		cmocka_unit_test(test_exhaustion),     cmocka_unit_test(test_churn),
		cmocka_unit_test(test_close_busy),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
