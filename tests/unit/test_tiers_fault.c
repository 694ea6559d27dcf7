/* SPDX-License-Identifier: MIT */
/* Injected faults: each happens, is the same for the same seed, and cannot pass the page CRC. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>
#include <poll.h>

#include "shm/crc.h"
#include "shm/util.h"
#include "tiers/fault.h"
#include "tiers/tier.h"

#define OPS (&tier_fault_ops)
#define MIB (UINT64_C(1) << 20)
#define N 200u

struct page {
	struct page_ident id;
	uint32_t bytes, crc;
	tier_addr addr;
	int prepared, written; /* results */
};

static struct tier *open_fault(const char *spec)
{
	struct tier_cfg cfg = {.size = 64 * MIB, .node = -1, .fault = spec, .lower_ops = &tier_dram_ops};
	struct tier *t = NULL;
	char err[128] = "";

	assert_int_equal(OPS->open(&t, &cfg, err, sizeof(err)), 0);
	return t;
}

static int finish(struct tier *t, struct tier_io *io)
{
	struct pollfd p = {.fd = OPS->event_fd(t), .events = POLLIN};
	struct tier_io *done = NULL;

	OPS->submit(t, &io, 1);
	while (OPS->reap(t, &done, 1) == 0)
		assert_int_equal(poll(&p, 1, 10000), 1);
	assert_ptr_equal(done, io);
	return io->res;
}

static uint64_t counter(struct tier *t, enum fault_kind k)
{
	struct tier_stat st;
	char key[32];
	const char *at;

	OPS->stat(t, &st);
	snprintf(key, sizeof(key), " %s=", fault_name(k));
	at = strstr(st.note, key);
	return at ? strtoull(at + strlen(key), NULL, 10) : 0;
}

static void write_pages(struct tier *t, struct page *p)
{
	for (uint32_t i = 0; i < N; i++) {
		struct tier_io io = {.op = TIER_WRITE, .bytes = 1 + i * 997 % 40000};
		uint8_t *b;

		p[i] = (struct page){.id = {.page = i, .rows = 3}, .bytes = io.bytes, .addr = TIER_ADDR_NONE};
		p[i].prepared = OPS->prepare(t, &io);
		if (p[i].prepared < 0)
			continue;
		b = io.buf;
		for (uint32_t k = 0; k < io.bytes; k++)
			b[k] = (uint8_t)(k * 31 + i);
		p[i].crc = crc32c(page_crc_seed(&p[i].id), b, io.bytes);
		p[i].written = finish(t, &io);
		p[i].addr = io.addr;
		OPS->release(t, &io);
	}
}

enum outcome { SOUND, CAUGHT, FAILED, ABSENT };

/* Read every page twice; what came of it. */
static void read_pages(struct tier *t, const struct page *p, uint8_t *out)
{
	for (uint32_t k = 0; k < 2 * N; k++) {
		const struct page *g = &p[k % N];
		struct tier_io io = {.op = TIER_READ, .bytes = g->bytes, .addr = g->addr};
		int r;

		out[k] = ABSENT;
		if (g->addr == TIER_ADDR_NONE)
			continue;
		assert_int_equal(OPS->prepare(t, &io), 0);
		r = finish(t, &io);
		out[k] = FAILED;
		if (r == 0)
			out[k] = crc32c(page_crc_seed(&g->id), io.buf, io.bytes) == g->crc ? SOUND : CAUGHT;
		else
			assert_int_equal(r, -EIO);
		OPS->release(t, &io);
	}
}

static unsigned number_of(const uint8_t *out, enum outcome what)
{
	unsigned n = 0;

	for (uint32_t k = 0; k < 2 * N; k++)
		n += out[k] == what;
	return n;
}

static void close_empty(struct tier *t, const struct page *p)
{
	struct tier_stat st;

	for (uint32_t i = 0; i < N; i++)
		if (p[i].addr != TIER_ADDR_NONE)
			OPS->free(t, p[i].addr, p[i].bytes);
	OPS->stat(t, &st);
	assert_int_equal(st.used, 0); /* failed writes hold no place either */
	assert_int_equal(st.inflight, 0);
	OPS->close(t);
}

static void test_no_faults(void **state)
{
	struct tier *t = open_fault(NULL);
	struct page p[N];
	uint8_t out[2 * N];
	struct tier_stat st;

	write_pages(t, p);
	read_pages(t, p, out);
	assert_int_equal(number_of(out, SOUND), 2 * N);
	OPS->stat(t, &st);
	assert_string_equal(st.note, "injects nothing");
	assert_int_equal(st.writes, N);
	assert_int_equal(st.reads, 2 * N);
	assert_int_equal(st.errors, 0);
	close_empty(t, p);
}

/* Faults of writes: with rate 1000 every page is hit, and stays hit. */
static void test_always_spoilt_writes(void **state)
{
	static const enum fault_kind kind[] = {FAULT_TORN, FAULT_LOST};

	for (unsigned i = 0; i < ARRAY_SIZE(kind); i++) {
		char spec[64];
		struct page p[N];
		uint8_t out[2 * N];
		struct tier *t;

		snprintf(spec, sizeof(spec), "seed=3,%s=1000", fault_name(kind[i]));
		t = open_fault(spec);
		write_pages(t, p);
		read_pages(t, p, out);
		assert_int_equal(number_of(out, CAUGHT), 2 * N);
		assert_int_equal(counter(t, kind[i]), N);
		close_empty(t, p);
	}
}

/* A torn page is sound up to some sector and garbage from there. */
static void torn_shape(const char *spec, unsigned bytes)
{
	struct tier *t = open_fault(spec);
	bool partly = false;

	for (unsigned i = 0; i < 50; i++) {
		struct tier_io io = {.op = TIER_WRITE, .bytes = 16 * bytes};
		const uint8_t *b;
		unsigned sector = 0;

		assert_int_equal(OPS->prepare(t, &io), 0);
		memset(io.buf, 0x77, io.bytes);
		assert_int_equal(finish(t, &io), 0);
		OPS->release(t, &io);
		io.op = TIER_READ;
		assert_int_equal(OPS->prepare(t, &io), 0);
		assert_int_equal(finish(t, &io), 0);
		b = io.buf;
		while (sector < 16 && b[sector * bytes] == 0x77)
			sector++;
		assert_true(sector < 16);
		partly = partly || sector > 0;
		for (unsigned k = 0; k < io.bytes; k++)
			assert_int_equal(b[k] == 0x77, k / bytes < sector);
		OPS->release(t, &io);
		OPS->free(t, io.addr, io.bytes);
	}
	assert_true(partly);
	OPS->close(t);
}

static void test_torn_shape(void **state)
{
	torn_shape("torn=1000", 512);
	torn_shape("torn=1000,sector=4096", 4096);
}

/* A place that was used before keeps what the older write put there; one that was not is safe. */
static void test_reorder(void **state)
{
	struct tier *t = open_fault("reorder=1000");
	struct tier_io io = {.op = TIER_WRITE, .bytes = 8192};
	tier_addr first = TIER_ADDR_NONE;

	for (unsigned i = 0; i < 3; i++) {
		io.op = TIER_WRITE;
		assert_int_equal(OPS->prepare(t, &io), 0);
		first = i ? first : io.addr;
		assert_true(io.addr == first);
		memset(io.buf, 0x40 + (int)i, 8192);
		assert_int_equal(finish(t, &io), 0);
		OPS->release(t, &io);
		io.op = TIER_READ;
		assert_int_equal(OPS->prepare(t, &io), 0);
		assert_int_equal(finish(t, &io), 0);
		for (unsigned k = 0; k < 8192; k++)
			assert_int_equal(((uint8_t *)io.buf)[k], 0x40 + (i ? i - 1 : 0));
		OPS->release(t, &io);
		assert_int_equal(counter(t, FAULT_REORDER), i);
		OPS->free(t, io.addr, io.bytes);
	}
	OPS->close(t);
}

/* Faults of reads spoil what is returned, never what is stored. */
static void test_spoilt_reads(void **state)
{
	struct tier *t = open_fault("seed=5,flip=500");
	struct page p[N];
	uint8_t out[2 * N];
	unsigned recovered = 0;

	write_pages(t, p);
	read_pages(t, p, out);
	assert_int_equal(number_of(out, CAUGHT), counter(t, FAULT_FLIP));
	assert_int_equal(number_of(out, CAUGHT) + number_of(out, SOUND), 2 * N);
	for (uint32_t i = 0; i < N; i++)
		recovered += out[i] == CAUGHT && out[N + i] == SOUND;
	assert_true(recovered > N / 8); /* a quarter, by chance */
	close_empty(t, p);
}

static void test_misdirected_reads(void **state)
{
	struct tier *t = open_fault("seed=6,misdirect=1000");
	struct page p[N];
	uint8_t out[2 * N];

	write_pages(t, p);
	read_pages(t, p, out);
	assert_int_equal(number_of(out, CAUGHT), 2 * N);
	assert_int_equal(counter(t, FAULT_MISDIRECT), 2 * N);
	close_empty(t, p);
}

/* Bytes of a page that is as long and was written whole: only the identity in the CRC can tell. */
static void test_misdirect_same_size(void **state)
{
	struct tier *t = open_fault("misdirect=1000");
	struct tier_io io[2];
	uint8_t content[2] = {0x11, 0x22};

	for (unsigned i = 0; i < 2; i++) {
		io[i] = (struct tier_io){.op = TIER_WRITE, .bytes = 8192};
		assert_int_equal(OPS->prepare(t, &io[i]), 0);
		memset(io[i].buf, content[i], 8192);
		assert_int_equal(finish(t, &io[i]), 0);
		OPS->release(t, &io[i]);
	}
	for (unsigned i = 0; i < 2; i++) {
		io[i].op = TIER_READ;
		assert_int_equal(OPS->prepare(t, &io[i]), 0);
		assert_int_equal(finish(t, &io[i]), 0);
		for (unsigned k = 0; k < 8192; k++)
			assert_int_equal(((uint8_t *)io[i].buf)[k], content[!i]);
		OPS->release(t, &io[i]);
	}
	OPS->close(t);
}

/* A page is never mistaken for itself: that would heal what an earlier fault spoilt. */
static void test_misdirect_never_heals(void **state)
{
	struct tier *t = open_fault("lost=1000,misdirect=1000");
	struct tier_io io = {.op = TIER_WRITE, .bytes = 4096};

	assert_int_equal(OPS->prepare(t, &io), 0);
	memset(io.buf, 0x33, 4096);
	assert_int_equal(finish(t, &io), 0);
	OPS->release(t, &io);
	io.op = TIER_READ;
	assert_int_equal(OPS->prepare(t, &io), 0);
	assert_int_equal(finish(t, &io), 0);
	for (unsigned k = 0; k < 4096; k++)
		assert_int_not_equal(((uint8_t *)io.buf)[k], 0x33);
	OPS->release(t, &io);
	assert_int_equal(counter(t, FAULT_MISDIRECT), 0);
	OPS->close(t);
}

static void test_errors(void **state)
{
	struct tier *t = open_fault("seed=8,write_eio=300,read_eio=300,enospc=200");
	struct page p[N];
	uint8_t out[2 * N];
	unsigned nospc = 0, eio = 0;
	struct tier_stat st;

	write_pages(t, p);
	for (uint32_t i = 0; i < N; i++) {
		assert_true(p[i].prepared == 0 || p[i].prepared == -ENOSPC);
		assert_true(p[i].written == 0 || p[i].written == -EIO);
		nospc += p[i].prepared < 0;
		eio += p[i].written < 0;
		assert_int_equal(p[i].addr == TIER_ADDR_NONE, p[i].prepared < 0 || p[i].written < 0);
	}
	read_pages(t, p, out);
	assert_true(nospc > 0 && eio > 0 && number_of(out, FAILED) > 0);
	assert_int_equal(nospc, counter(t, FAULT_ENOSPC));
	assert_int_equal(eio, counter(t, FAULT_WRITE_EIO));
	assert_int_equal(number_of(out, FAILED), counter(t, FAULT_READ_EIO));
	assert_int_equal(number_of(out, CAUGHT), 0);
	OPS->stat(t, &st);
	assert_int_equal(st.errors, eio + number_of(out, FAILED));
	close_empty(t, p);
}

static void run_mix(const char *spec, uint8_t out[2 * N], struct page p[N])
{
	struct tier *t = open_fault(spec);

	write_pages(t, p);
	read_pages(t, p, out);
	close_empty(t, p);
}

#define MIX "write_eio=50,read_eio=50,flip=100,torn=100,lost=100,misdirect=100,enospc=50"

static void test_deterministic(void **state)
{
	struct page p[3][N];
	uint8_t out[3][2 * N];

	run_mix("seed=1," MIX, out[0], p[0]);
	run_mix(MIX ",seed=1", out[1], p[1]);
	run_mix("seed=2," MIX, out[2], p[2]);
	assert_memory_equal(out[0], out[1], sizeof(out[0]));
	assert_memory_not_equal(out[0], out[2], sizeof(out[0]));
	for (uint32_t i = 0; i < N; i++) {
		assert_int_equal(p[0][i].prepared, p[1][i].prepared);
		assert_int_equal(p[0][i].written, p[1][i].written);
	}
	for (enum outcome o = SOUND; o <= ABSENT; o++)
		assert_true(number_of(out[0], o) > 0); /* a mix indeed */
}

/* The rate asked for is the rate that comes, for every kind and many seeds. */
static void test_rates(void **state)
{
	for (enum fault_kind k = 0; k < FAULT_KINDS; k++) {
		struct fault_spec s = {.seed = 11 + k};
		unsigned hits = 0;

		assert_false(fault_hits(&s, 1, k));
		s.permille[k] = 100;
		for (uint64_t op = 0; op < 100000; op++)
			hits += fault_hits(&s, op, k);
		assert_in_range(hits, 9500, 10500); /* 10000 expected, sigma 95, and the seeds are fixed */
		s.permille[k] = 1000;
		for (uint64_t op = 0; op < 1000; op++)
			assert_true(fault_hits(&s, op, k));
	}
}

static bool readable(struct tier *t, int ms)
{
	struct pollfd p = {.fd = OPS->event_fd(t), .events = POLLIN};

	return poll(&p, 1, ms) == 1;
}

static void test_delay(void **state)
{
	struct tier *t = open_fault("delay_us=50000");
	struct tier_io io[3], *list[3], *done[3];
	uint64_t start;
	unsigned n = 0;
	struct tier_stat st;

	for (unsigned i = 0; i < 3; i++) {
		io[i] = (struct tier_io){.op = TIER_WRITE, .bytes = 4096};
		list[i] = &io[i];
		assert_int_equal(OPS->prepare(t, &io[i]), 0);
		memset(io[i].buf, 1, 4096);
	}
	start = now_ns();
	OPS->submit(t, list, 3);
	OPS->stat(t, &st);
	assert_int_equal(st.inflight, 3);
	while (n < 3) {
		n += OPS->reap(t, done + n, 1); /* one at a time: the fd must stay readable for the rest */
		assert_true(n == 0 || now_ns() - start >= 50000000u);
		if (n < 3)
			assert_true(readable(t, 10000));
	}
	assert_int_equal(OPS->reap(t, done, 3), 0);
	assert_false(readable(t, 0));
	for (unsigned i = 0; i < 3; i++) {
		assert_ptr_equal(done[i], &io[i]);
		OPS->release(t, &io[i]);
	}
	OPS->close(t);
}

/* Closing with requests prepared, in flight and held back leaks nothing (the sanitizer looks). */
static void test_close_in_the_middle(void **state)
{
	struct tier *t = open_fault("delay_us=10000000,misdirect=1");
	struct tier_io io[4], *list[4];

	for (unsigned i = 0; i < 4; i++) {
		io[i] = (struct tier_io){.op = TIER_WRITE, .bytes = 4096};
		list[i] = &io[i];
		assert_int_equal(OPS->prepare(t, &io[i]), 0);
		memset(io[i].buf, 1, 4096);
	}
	OPS->submit(t, list, 2);
	OPS->close(t);
	OPS->close(NULL);
}

static void refuse(const char *spec, const char *named)
{
	struct tier_cfg cfg = {.size = 64 * MIB, .node = -1, .fault = spec, .lower_ops = &tier_dram_ops};
	struct tier *t = NULL;
	char err[128] = "";

	assert_int_equal(OPS->open(&t, &cfg, err, sizeof(err)), -EINVAL);
	assert_null(t);
	if (!strstr(err, named))
		fail_msg("\"%s\" does not name \"%s\"", err, named);
}

static void test_bad_specs(void **state)
{
	struct tier_cfg cfg = {.size = 64 * MIB, .node = -1};
	struct tier *t = NULL;
	char err[128] = "";

	refuse("flop=1", "flop");
	refuse("seed=1,fli=1", "fli");
	refuse("flip=1001", "1001");
	refuse("flip=1001", "1000");
	refuse("flip=-1", "flip");
	refuse("flip=", "flip");
	refuse("flip", "flip");
	refuse("flip=1x", "1x");
	refuse("flip= 1", "flip");
	refuse("=5", "unknown");
	refuse("seed=1,,flip=1", "unknown");
	refuse("delay_us=10000001", "10000000");
	refuse("sector=1024", "1024");
	refuse("sector=8192", "4096");
	refuse("seed=18446744073709551616", "seed");
	assert_int_equal(OPS->open(&t, &cfg, err, sizeof(err)), -EINVAL);
	assert_non_null(strstr(err, "wrap"));
	cfg.lower_ops = &tier_fault_ops;
	assert_int_equal(OPS->open(&t, &cfg, err, sizeof(err)), -EINVAL);
	cfg.lower_ops = &tier_dram_ops;
	cfg.size = 1;
	assert_int_equal(OPS->open(&t, &cfg, err, sizeof(err)), -EINVAL);
	assert_non_null(strstr(err, "dram size")); /* the lower tier's own words */
}

static void test_parse(void **state)
{
	struct fault_spec s = {.seed = 99};
	char err[128];

	assert_int_equal(fault_parse(&s,
				     "seed=18446744073709551615,delay_us=10000000,flip=0,lost=1000,enospc=7",
				     err, sizeof(err)),
			 0);
	assert_int_equal(s.seed, UINT64_MAX);
	assert_int_equal(s.delay_us, 10000000);
	assert_int_equal(s.permille[FAULT_FLIP], 0);
	assert_int_equal(s.permille[FAULT_LOST], 1000);
	assert_int_equal(s.permille[FAULT_ENOSPC], 7);
	assert_int_equal(s.permille[FAULT_TORN], 0);
	assert_int_equal(fault_parse(&s, "lost=1,bad=1", err, sizeof(err)), -EINVAL);
	assert_int_equal(s.permille[FAULT_LOST], 1000); /* untouched on failure */
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_no_faults),
		cmocka_unit_test(test_always_spoilt_writes),
		cmocka_unit_test(test_torn_shape),
		cmocka_unit_test(test_reorder),
		cmocka_unit_test(test_spoilt_reads),
		cmocka_unit_test(test_misdirected_reads),
		cmocka_unit_test(test_misdirect_same_size),
		cmocka_unit_test(test_misdirect_never_heals),
		cmocka_unit_test(test_errors),
		cmocka_unit_test(test_deterministic),
		cmocka_unit_test(test_rates),
		cmocka_unit_test(test_delay),
		cmocka_unit_test(test_close_in_the_middle),
		cmocka_unit_test(test_bad_specs),
		cmocka_unit_test(test_parse),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
