/* SPDX-License-Identifier: MIT */
/*
 * A well-behaved neighbour that measures what it gets.
 *
 *   pulse SOCKET PERIOD_US [ID]
 *
 * Every PERIOD_US it appends 16 rows, asks for a plan (demotions and, every other time, promotions), waits for
 * it, applies it and acknowledges; that time is one sample. Then it compares every resident row, byte by byte,
 * with the pattern of its sequence, lane, position and epoch, and now and then everything that lies below.
 * Lines on stdin steer it:
 *
 *   as NAME   samples from now on belong to NAME
 *   tell      print one JSON object: for each name {n, due, p50_us, p99_us, max_us}, and rows compared and
 * wrong
 *
 * It ends with its input, printing the same; exit status 1 when a row was wrong or a call failed.
 */
#include <poll.h>
#include "tests/unit/core_harness.h"

#define NAMES 64
#define BATCH 16u
#define MAX_ROWS 2048u
#define DRAM_ROWS 192u

struct samples {
	char name[32];
	uint32_t *us;
	size_t n, cap;
	uint64_t due;
};

static struct samples pools[NAMES];
static unsigned n_pools, now_in;
static uint64_t rows_seen, rows_wrong;

static void pool(const char *name)
{
	for (now_in = 0; now_in < n_pools && strcmp(pools[now_in].name, name); now_in++)
		;
	if (now_in == NAMES)
		abort();
	if (now_in == n_pools)
		snprintf(pools[n_pools++].name, sizeof(pools[0].name), "%s", name);
}

static void sample(uint64_t ns)
{
	struct samples *p = &pools[now_in];

	if (p->n == p->cap) {
		p->cap = p->cap ? 2 * p->cap : 4096;
		p->us = reallocarray(p->us, p->cap, sizeof(*p->us));
		if (!p->us)
			abort();
	}
	p->us[p->n++] = (uint32_t)MIN(ns / 1000, (uint64_t)UINT32_MAX);
}

static int by_size(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

	return x < y ? -1 : x > y;
}

static void tell(void)
{
	printf("{\"rows\": %llu, \"wrong\": %llu, \"windows\": {", (unsigned long long)rows_seen,
	       (unsigned long long)rows_wrong);
	for (unsigned i = 0; i < n_pools; i++) {
		struct samples *p = &pools[i];

		if (p->n)
			qsort(p->us, p->n, sizeof(*p->us), by_size);
		printf("%s\"%s\": {\"n\": %zu, \"due\": %llu", i ? ", " : "", p->name, p->n,
		       (unsigned long long)p->due);
		if (p->n)
			printf(", \"p50_us\": %u, \"p99_us\": %u, \"max_us\": %u", p->us[p->n / 2],
			       p->us[p->n - 1 - p->n / 100], p->us[p->n - 1]);
		printf("}");
	}
	printf("}}\n");
	fflush(stdout);
}

/* 0 at the end of the input. */
static int listen_to(const char *line)
{
	if (!strncmp(line, "as ", 3))
		pool(line + 3);
	else if (!strcmp(line, "tell"))
		tell();
	else
		return -1;
	return 0;
}

/* Whatever lines are there; false at the end. Waits until `until` at most. */
static bool obey(uint64_t until)
{
	static char buf[256];
	static size_t have;
	struct pollfd p = {.fd = 0, .events = POLLIN};

	for (;;) {
		uint64_t now = now_ns();
		struct timespec left = {};
		char *end;
		ssize_t n;

		if (now < until)
			left = (struct timespec){.tv_sec = (time_t)((until - now) / 1000000000u),
						 .tv_nsec = (long)((until - now) % 1000000000u)};
		if (ppoll(&p, 1, &left, NULL) <= 0)
			return true;
		n = read(0, buf + have, sizeof(buf) - 1 - have);
		if (n <= 0)
			return false;
		have += (size_t)n;
		buf[have] = 0;
		while ((end = strchr(buf, '\n'))) {
			*end = 0;
			if (listen_to(buf) < 0)
				return false;
			have -= (size_t)(end + 1 - buf);
			memmove(buf, end + 1, have + 1);
		}
	}
}

static int look(struct rt_seq *q)
{
	uint32_t bad = rt_wrong(q);

	for (uint32_t l = 0; l < q->rt->lanes; l++)
		rows_seen += (uint64_t)MAX(0, rt_resident(q, l, NULL));
	if (bad)
		fprintf(stderr, "pulse: %u rows wrong\n", bad);
	rows_wrong += bad;
	return bad ? -1 : 0;
}

static int cycle(struct rt_seq *q, uint32_t i)
{
	uint64_t t = now_ns();
	int r = rt_append(q, BATCH);

	if (!r)
		r = rt_plan(q, i % 2 ? 96 : 64, DRAM_ROWS, 0, NULL);
	if (!r)
		sample(now_ns() - t);
	return r;
}

/* Everything comes up and is compared; then the rows begin anew, with another pattern. */
static int turn(struct rt_seq *q)
{
	int r = rt_plan(q, 64 + DRAM_ROWS, 0, 0, NULL);

	if (!r)
		r = look(q);
	if (!r)
		r = kvtier_seq_truncate(q->s, 32);
	q->rows = 32;
	q->salt++;
	return r;
}

int main(int argc, char **argv)
{
	uint64_t period = argc > 2 ? strtoull(argv[2], NULL, 10) * 1000 : 0, next;
	struct runtime rt;
	struct rt_seq q;
	int r = 0;

	if (argc < 3 || !period) {
		fprintf(stderr, "usage: pulse SOCKET PERIOD_US [ID]\n");
		return 2;
	}
	signal(SIGPIPE, SIG_IGN);
	if (rt_open(&rt, argv[1], 2) ||
	    rt_prepare(&q, &rt, argc > 3 ? (uint32_t)atoi(argv[3]) : 1, 512, 512, MAX_ROWS) ||
	    rt_seq_open(&q, KVT_EPHEMERAL, NULL)) {
		fprintf(stderr, "pulse: %s\n", kvtier_last_error());
		return 1;
	}
	pool("start");
	printf("ready\n");
	fflush(stdout);
	next = now_ns();
	for (uint32_t i = 0; !r && obey(next); i++) {
		uint64_t now = now_ns();

		/* What there was no time for was due all the same. */
		next += period;
		pools[now_in].due += 1 + (now > next ? (now - next) / period : 0);
		next = MAX(next, now);
		r = cycle(&q, i);
		if (r < 0)
			fprintf(stderr, "pulse: cycle %u: %s: %s\n", i, kvtier_strerror(r),
				kvtier_last_error());
		else
			r = look(&q);
		if (!r && q.rows + BATCH > MAX_ROWS)
			r = turn(&q);
	}
	tell();
	rt_seq_free(&q, true);
	rt_close(&rt);
	return r || rows_wrong ? 1 : 0;
}
