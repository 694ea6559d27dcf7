/* SPDX-License-Identifier: MIT */
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <cmocka.h>
#include "shm/feed.h"
#include "shm/util.h"

#define N 16u

static void *new_mem(uint32_t entries)
{
	void *p = aligned_alloc(64, feed_bytes(entries));

	assert_non_null(p);
	memset(p, 0, feed_bytes(entries));
	return p;
}

/* Every byte of the event follows from n, so a torn one is seen. */
static struct feed_event numbered(uint64_t n)
{
	struct feed_event e;
	uint64_t w[sizeof(e) / 8];

	for (size_t i = 0; i < ARRAY_SIZE(w); i++)
		w[i] = (n + 1) * 0x9e3779b97f4a7c15u ^ (uint64_t)i << 56;
	memcpy(&e, w, sizeof(e));
	e.seq = n;
	return e;
}

static void write_n(struct feed_writer *w, uint64_t from, uint64_t to)
{
	for (; from < to; from++) {
		struct feed_event e = numbered(from);

		feed_write(w, &e);
	}
}

static void read_n(struct feed_reader *r, uint64_t n, uint64_t *lost)
{
	struct feed_event want = numbered(n), got;

	assert_int_equal(feed_read(r, &got, lost), 1);
	assert_memory_equal(&got, &want, sizeof(got));
}

static void sizes_and_refusals(void **state)
{
	void *mem = new_mem(N);
	struct feed_writer w;
	struct feed_reader r = {.entries = 77};

	assert_int_equal(feed_bytes(N), 64 + N * 64);
	assert_int_equal(feed_bytes(0), 0);
	assert_int_equal(feed_bytes(1), 0);
	assert_int_equal(feed_bytes(12), 0);
	assert_int_equal(feed_bytes(UINT32_C(1) << 31), 0);
	assert_int_equal(feed_writer_init(&w, mem, 12), -EINVAL);
	assert_int_equal(feed_writer_init(&w, NULL, N), -EINVAL);
	assert_int_equal(feed_writer_init(&w, (char *)mem + 8, N), -EINVAL);

	assert_int_equal(feed_reader_init(&r, mem, feed_bytes(N), 1), -EPROTO); /* no writer yet */
	assert_int_equal(feed_writer_init(&w, mem, N), 0);
	assert_int_equal(feed_reader_init(&r, NULL, feed_bytes(N), 1), -EPROTO);
	assert_int_equal(feed_reader_init(&r, mem, feed_bytes(N) - 1, 1), -EPROTO);
	assert_int_equal(feed_reader_init(&r, mem, 8, 1), -EPROTO);
	((uint32_t *)mem)[2] = 12; /* the entries word */
	assert_int_equal(feed_reader_init(&r, mem, feed_bytes(N), 1), -EPROTO);
	((uint32_t *)mem)[2] = 2 * N;
	assert_int_equal(feed_reader_init(&r, mem, feed_bytes(N), 1), -EPROTO);
	assert_int_equal(r.entries, 77);
	free(mem);
}

static void reads_in_order(void **state)
{
	void *mem = new_mem(N);
	struct feed_reader late, early;
	struct feed_writer w;
	struct feed_event e;
	uint64_t lost = 0;

	assert_int_equal(feed_writer_init(&w, mem, N), 0);
	assert_int_equal(feed_reader_init(&early, mem, feed_bytes(N), 0), 0);
	assert_int_equal(feed_read(&early, &e, &lost), 0);
	write_n(&w, 0, 5);
	assert_int_equal(feed_reader_init(&late, mem, feed_bytes(N), 0), 0);
	for (uint64_t n = 0; n < 5; n++)
		read_n(&early, n, &lost);
	assert_int_equal(feed_read(&early, &e, &lost), 0);
	assert_int_equal(feed_read(&late, &e, &lost), 0);
	write_n(&w, 5, 8);
	for (uint64_t n = 5; n < 8; n++) {
		read_n(&early, n, &lost);
		read_n(&late, n, NULL);
	}
	assert_int_equal(lost, 0);
	free(mem);
}

static void starts_at_the_oldest(void **state)
{
	void *mem = new_mem(N);
	struct feed_reader r;
	struct feed_writer w;
	uint64_t lost = 0;

	assert_int_equal(feed_writer_init(&w, mem, N), 0);
	write_n(&w, 0, 3 * N + 5);
	assert_int_equal(feed_reader_init(&r, mem, feed_bytes(N), 1), 0);
	for (uint64_t n = 2 * N + 5; n < 3 * N + 5; n++)
		read_n(&r, n, &lost);
	assert_int_equal(lost, 0); /* it never meant to read what was gone before */
	free(mem);
}

/* Whatever the gap, lost + read = written, and what is read is the newest part, whole. */
static void lapped_reader_counts_exactly(void **state)
{
	for (uint64_t gap = 0; gap < 5 * N; gap++) {
		void *mem = new_mem(N);
		struct feed_writer w;
		struct feed_reader r;
		uint64_t lost = 0;

		assert_int_equal(feed_writer_init(&w, mem, N), 0);
		assert_int_equal(feed_reader_init(&r, mem, feed_bytes(N), 1), 0);
		write_n(&w, 0, 3);
		read_n(&r, 0, &lost);
		write_n(&w, 3, 3 + gap);
		uint64_t left = 2 + gap, want_lost = left > N ? left - N : 0;

		for (uint64_t n = 1 + want_lost; n < 3 + gap; n++)
			read_n(&r, n, &lost);
		assert_int_equal(lost, want_lost);
		struct feed_event e;

		assert_int_equal(feed_read(&r, &e, &lost), 0);
		free(mem);
	}
}

/* An entry that the writer is busy with is not there yet; the one it replaces is gone. */
static void busy_entry(void **state)
{
	void *mem = new_mem(N);
	_Atomic uint64_t *seq0 = (_Atomic uint64_t *)((char *)mem + 64);
	struct feed_reader r, behind;
	struct feed_writer w;
	struct feed_event e;
	uint64_t lost = 0;

	assert_int_equal(feed_writer_init(&w, mem, N), 0);
	write_n(&w, 0, N);
	assert_int_equal(feed_reader_init(&behind, mem, feed_bytes(N), 1), 0);
	assert_int_equal(feed_reader_init(&r, mem, feed_bytes(N), 0), 0);
	*seq0 = UINT64_C(1) << 63 | (N + 1); /* as if stopped in the middle of entry N */
	assert_int_equal(feed_read(&r, &e, &lost), 0);
	assert_int_equal(lost, 0);
	read_n(&behind, 1, &lost);
	assert_int_equal(lost, 1);
	write_n(&w, N, N + 1);
	read_n(&r, N, &lost);
	assert_int_equal(lost, 1);
	free(mem);
}

struct race {
	void *mem;
	uint32_t entries;
	uint64_t count;
	bool pace;
};

static void *writer(void *arg)
{
	struct race *x = arg;
	struct feed_writer w;

	w = (struct feed_writer){.mem = x->mem, .entries = x->entries};
	for (uint64_t n = 0; n < x->count; n++) {
		struct feed_event e = numbered(n);

		feed_write(&w, &e);
		if (x->pace && n % 64 == 63)
			sched_yield();
	}
	return NULL;
}

/* A live writer laps a reader: nothing is torn, nothing is counted twice or not at all. */
static void race_once(uint32_t entries, uint64_t count, bool pace)
{
	struct race x = {.mem = new_mem(entries), .entries = entries, .count = count, .pace = pace};
	uint64_t lost = 0, got = 0, t0 = now_ns();
	struct feed_writer w;
	struct feed_reader r;
	pthread_t t;

	assert_int_equal(feed_writer_init(&w, x.mem, entries), 0);
	assert_int_equal(feed_reader_init(&r, x.mem, feed_bytes(entries), 1), 0);
	assert_int_equal(pthread_create(&t, NULL, writer, &x), 0);
	while (got + lost < count) {
		struct feed_event e, want;

		assert_true(now_ns() - t0 < 20000000000u);
		if (!feed_read(&r, &e, &lost))
			continue;
		want = numbered(got + lost); /* entries come in order, after those lost */
		assert_memory_equal(&e, &want, sizeof(e));
		got++;
	}
	assert_int_equal(got + lost, count);
	assert_int_equal(pthread_join(t, NULL), 0);
	free(x.mem);
}

static void races(void **state)
{
	race_once(2, 300000, false);
	race_once(16, 300000, false);
	race_once(1024, 300000, true);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(sizes_and_refusals),   cmocka_unit_test(reads_in_order),
		cmocka_unit_test(starts_at_the_oldest), cmocka_unit_test(lapped_reader_counts_exactly),
		cmocka_unit_test(busy_entry),           cmocka_unit_test(races),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
