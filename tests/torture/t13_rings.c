/* SPDX-License-Identifier: MIT */
/*
 * torture 13: a ring between two threads under ThreadSanitizer
 * pass: 0 races, losses, duplicates
 * quick: 2,000,000 items
 * full: 100,000,000 items
 * plants: ring-publish-early ring-wakes-nobody
 *
 * Built with -fsanitize=thread whatever the rest is built with. Both threads use one mapping, for the sanitizer
 * knows memory by its address. Every entry carries its number in each of its words. Cursors start shortly
 * before they wrap at 2^32. busy: nobody sleeps, no system call orders anything. sleepy: the consumer sleeps on
 * an eventfd whenever ring_sleep() lets it, the producer pauses at random; a wake-up that does not come in 10 s
 * is a failure.
 */
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>
#include "shm/ring.h"
#include "shm/util.h"

const char *__tsan_default_options(void);
const char *__tsan_default_options(void)
{
	return "halt_on_error=1:exitcode=66";
}

struct run {
	const char *name;
	uint32_t entries;
	uint64_t items;
	bool sleepy;
	struct ring p, c;
	int fd;
	uint64_t wrong, writes, sleeps, full;
};

static uint64_t word(uint64_t n, unsigned i)
{
	return n * UINT64_C(0x9e3779b97f4a7c15) + i;
}

static uint32_t next_random(uint64_t *s)
{
	*s = *s * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
	return (uint32_t)(*s >> 33);
}

/* Let the other side get ahead: now and then long enough for it to sleep. */
static void pause_a_little(uint64_t *seed)
{
	uint32_t r = next_random(seed) % 4096;

	if (!r)
		usleep(50);
	else if (r < 64)
		sched_yield();
}

static void *produce(void *arg)
{
	struct run *r = arg;
	uint64_t seed = 1, one = 1;

	for (uint64_t n = 1; n <= r->items; n++) {
		struct ring_entry e = {.type = (uint32_t)n, .flags = (uint32_t)(n >> 32), .handle = word(n, 6)};
		int got;

		for (unsigned i = 0; i < 6; i++)
			e.arg[i] = word(n, i);
		while ((got = ring_push(&r->p, &e)) == -EAGAIN) {
			r->full++;
			sched_yield();
		}
		if (got < 0) {
			r->wrong++;
			break;
		}
		if (got == 1 && r->sleepy && write(r->fd, &one, sizeof(one)) == sizeof(one))
			r->writes++;
		if (r->sleepy)
			pause_a_little(&seed);
	}
	return NULL;
}

static bool whole(const struct ring_entry *e, uint64_t n)
{
	bool good = e->type == (uint32_t)n && e->flags == (uint32_t)(n >> 32) && e->handle == word(n, 6);

	for (unsigned i = 0; i < 6; i++)
		good = good && e->arg[i] == word(n, i);
	return good;
}

/* false: nobody woke us. */
static bool rest(struct run *r)
{
	struct pollfd p = {.fd = r->fd, .events = POLLIN};
	uint64_t count;

	if (!r->sleepy) {
		sched_yield();
		return true;
	}
	if (!ring_sleep(&r->c))
		return true;
	r->sleeps++;
	if (poll(&p, 1, 10000) != 1) {
		printf("# %s: asleep with entries to come, nobody woke it\n", r->name);
		return false;
	}
	(void)!read(r->fd, &count, sizeof(count));
	ring_awake(&r->c);
	return true;
}

static void *consume(void *arg)
{
	struct run *r = arg;
	uint64_t n = 1;

	while (n <= r->items) {
		struct ring_entry e;
		int got = ring_pop(&r->c, &e);

		if (got < 0 || (got == 1 && !whole(&e, n))) {
			printf("# %s: entry %" PRIu64 " is not whole, or not the next\n", r->name, n);
			r->wrong++;
			_exit(1); /* the producer may be waiting for room */
		}
		n += got == 1;
		if (!got && !rest(r))
			_exit(1);
	}
	return NULL;
}

static bool run(struct run *r)
{
	struct ring_entry left;
	pthread_t t[2];
	uint32_t *shared;
	size_t bytes = ring_bytes(r->entries);
	void *mem = aligned_alloc(KVT_CACHELINE, ALIGN_UP(bytes, KVT_CACHELINE));

	if (!mem)
		return false;
	memset(mem, 0, bytes);
	r->fd = eventfd(0, EFD_CLOEXEC);
	ring_attach(&r->p, mem, r->entries, true);
	ring_attach(&r->c, mem, r->entries, false);
	/* As if 2^32 - 1000 entries had gone through. */
	shared = mem;
	shared[0] = shared[128 / 4] = UINT32_MAX - 999;
	r->p.pos = r->p.peer = r->c.pos = r->c.peer = UINT32_MAX - 999;
	pthread_create(&t[0], NULL, produce, r);
	pthread_create(&t[1], NULL, consume, r);
	pthread_join(t[0], NULL);
	pthread_join(t[1], NULL);
	r->wrong += ring_pop(&r->c, &left) != 0; /* a duplicate */
	close(r->fd);
	free(mem);
	return !r->wrong;
}

int main(void)
{
	const char *mode = getenv("KVT_TORTURE");
	uint64_t all = mode && !strcmp(mode, "full") ? 100000000 : 2000000, sum = 0, sleeps = 0;
	struct run runs[] = {
		{.name = "busy, 2 entries", .entries = 2, .items = all / 10},
		{.name = "busy, 64 entries", .entries = 64, .items = all / 10 * 4},
		{.name = "busy, 1024 entries", .entries = 1024, .items = all / 10 * 4},
		{.name = "sleepy, 2 entries", .entries = 2, .items = all / 100 * 3, .sleepy = true},
		{.name = "sleepy, 64 entries", .entries = 64, .items = all / 100 * 7, .sleepy = true},
	};
	uint64_t start = now_ns();
	int bad = 0;

	setvbuf(stdout, NULL, _IOLBF, 0);
	for (unsigned i = 0; i < ARRAY_SIZE(runs); i++) {
		struct run *r = &runs[i];
		bool good = run(r) && (!r->sleepy || r->sleeps);

		bad += !good;
		sum += r->items;
		sleeps += r->sleeps;
		printf("%s %u - %s: %" PRIu64 " items, %" PRIu64 " times full, %" PRIu64 " sleeps, %" PRIu64
		       " wake-ups\n",
		       good ? "ok" : "not ok", i + 1, r->name, r->items, r->full, r->sleeps, r->writes);
	}
	printf("1..%zu\n", ARRAY_SIZE(runs));
	printf("# figure: ring under ThreadSanitizer: %" PRIu64 " items, %" PRIu64
	       " sleeps, 0 races, %d runs with losses or duplicates, %.0f s\n",
	       sum, sleeps, bad, (double)(now_ns() - start) / 1e9);
	return bad != 0;
}
