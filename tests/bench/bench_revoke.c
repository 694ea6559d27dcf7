/* SPDX-License-Identifier: MIT */
/*
 * Published DRAM under pressure: 1 GiB that another process has mapped, and how long it takes from the moment
 * at which the host wants everything until the kernel holds it no more.
 *
 * A willing client unmaps when it is told. A stuck one is stopped (SIGSTOP) with all of it mapped: then 1 GiB
 * of private memory is there as well, and what counts is when all of that is back and the tenant is charged
 * with what its client keeps. The daemon's core and its tiers are real and run in this process; the client is
 * another.
 */
#include <dirent.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include "daemon/pressure.h"
#include "tests/unit/direct_reader.h"

#define MIB (UINT64_C(1) << 20)
#define SEQS 16u
#define ROWS 1024u
#define STEP 256u
#define KEEP 16u
#define ROW 4096u /* of K, and of V, on each of 8 lanes: 64 MiB a sequence */
#define LAYERS 4u
#define HEADS 2u
#define SEGMENTS 256u
#define LIMIT_S 20.0

static const struct kvtier_budget keep_all = {
	.size = sizeof(keep_all), .device_rows = KVT_ROWS_ALL, .manual = 1, .policy = "client"};

static void must(int r, const char *what)
{
	if (r >= 0)
		return;
	fprintf(stderr, "bench_revoke: %s: %s (%d)\n", what, kvtier_last_error(), r);
	exit(1);
}

/* ---- the client ------------------------------------------------------------------------------- */

struct order {
	char sock[128];
	uint32_t n, number[SEGMENTS];
};
struct client_process {
	pid_t pid;
	int order, said; /* pipes */
};

static void unmap(struct seg *seg, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++)
		if (seg[i].addr)
			seg_close(&seg[i]);
}

static void client_main(int order, int said, bool willing)
{
	static struct seg seg[SEGMENTS];
	struct order o;
	struct runtime rt;
	uint32_t sum = 0;

	if (read(order, &o, sizeof(o)) != sizeof(o))
		_exit(1);
	must(rt_open(&rt, o.sock, 4), "the client's connection");
	for (uint32_t i = 0; i < o.n; i++) {
		uint64_t bytes = 0;
		int fd;

		must(ask_segment(rt.c, o.number[i], &fd, &bytes), "a segment");
		must(seg_map(&seg[i], SEG_PUBLISHED, fd, bytes), "mapping it");
		for (uint64_t at = 0; at < bytes; at += 4096)
			sum += ((volatile uint8_t *)seg[i].addr)[at];
	}
	if (write(said, &sum, sizeof(sum)) != sizeof(sum))
		_exit(1);
	if (!willing)
		raise(SIGSTOP);
	for (uint32_t seen = 0;; usleep(2000)) {
		uint32_t asked;

		while (kvtier_process(rt.c) > 0)
			;
		asked = atomic_load(&rt.c->link->revokes);
		if (asked != seen)
			unmap(seg, o.n);
		seen = asked;
	}
}

/* Before there are threads. */
static struct client_process client_fork(bool willing)
{
	struct client_process p;
	int order[2], said[2];

	must(pipe(order) | pipe(said), "pipes");
	p.pid = fork();
	must(p.pid, "fork");
	if (!p.pid) {
		client_main(order[0], said[1], willing);
		_exit(0);
	}
	close(order[0]);
	close(said[1]);
	p.order = order[1];
	p.said = said[0];
	return p;
}

static void client_map(struct client_process *p, const struct order *o)
{
	uint32_t sum;

	if (write(p->order, o, sizeof(*o)) != sizeof(*o) || read(p->said, &sum, sizeof(sum)) != sizeof(sum))
		must(-EPIPE, "the client");
}

static void client_gone(struct client_process *p)
{
	kill(p->pid, SIGKILL);
	waitpid(p->pid, NULL, 0);
	close(p->order);
	close(p->said);
}

/* ---- the daemon -------------------------------------------------------------------------------- */

/* Bytes that the kernel holds for DRAM segments that are still the daemon's. */
static uint64_t held(void)
{
	DIR *d = opendir("/proc/self/fd");
	char path[64], name[64];
	struct dirent *e;
	uint64_t sum = 0;
	struct stat st;
	ssize_t n;

	while (d && (e = readdir(d))) {
		snprintf(path, sizeof(path), "/proc/self/fd/%.20s", e->d_name);
		n = readlink(path, name, sizeof(name) - 1);
		if (n <= 0)
			continue;
		name[n] = 0;
		if ((strstr(name, "memfd:kvtier-dram") || strstr(name, "memfd:kvtier-direct")) &&
		    !stat(path, &st))
			sum += (uint64_t)st.st_blocks * 512;
	}
	closedir(d);
	return sum;
}

static void want_all(struct core *c, void *arg)
{
	c->cfg.pressure_reserve = UINT64_C(64) << 40;
	c->cfg.pressure_floor = 0;
	c->cfg.pressure_shrink = true;
	pressure_tick(c);
}

static void tenant_now(struct core *c, void *arg)
{
	uint32_t at = 0;

	core_tenant_next(c, &at, arg);
}

/* As rt_append(), but quick: what the rows hold is of no interest here. */
static int append(struct rt_seq *q, uint32_t n)
{
	for (uint32_t l = 0; l < q->rt->lanes; l++) {
		int have = kvtier_seq_resident(q->s, l, NULL, 0);

		if (have < 0 || have + n > q->cap)
			return have < 0 ? have : KVT_E_NOSPC;
		for (uint32_t i = 0; i < n; i++) {
			memset(rt_row(q, l, (uint32_t)have + i, false), (int)(q->rows + i), ROW);
			memset(rt_row(q, l, (uint32_t)have + i, true), (int)(q->id + l), ROW);
			*rt_score(q, l, q->rows + i) = (float)(rt_random(q) % 10000) / 100.0f;
		}
	}
	q->rows += n;
	return kvtier_seq_append(q->s, KVT_ALL_LAYERS, q->rows - n, n);
}

static void fill(struct harness *h, struct runtime *rt, struct rt_seq *q, uint32_t id, bool published)
{
	must(rt_prepare(q, rt, id, STEP + KEEP, STEP, ROWS + KEEP), "region");
	must(rt_seq_open(q, KVT_EPHEMERAL, &keep_all), "sequence");
	if (published)
		must(harness_direct(h, q), "directory");
	while (q->rows < ROWS) {
		must(append(q, STEP), "append");
		must(rt_plan(q, KEEP, KVT_ROWS_ALL, 0, NULL), "plan");
	}
}

/* Segments in which pages of the sequence lie. */
static void collect(struct order *o, struct rt_seq *q)
{
	const struct direct_page *entry;
	const struct direct_hdr *hdr;
	struct seg dir = SEG_INIT;
	uint64_t bytes = 0;
	int fd;

	must(ask_directory(q->rt->c, q->s->handle, &fd, &bytes), "directory");
	must(seg_map(&dir, SEG_PUBLISHED, fd, bytes), "mapping it");
	hdr = dir.addr;
	entry = (const struct direct_page *)(hdr + 1);
	for (uint32_t e = 0; e < atomic_load(&hdr->used); e++) {
		uint64_t place = atomic_load(&entry[e].place);
		uint32_t i = 0;

		while (i < o->n && o->number[i] != direct_segment(place))
			i++;
		if (place && i == o->n && o->n < SEGMENTS)
			o->number[o->n++] = direct_segment(place);
	}
	seg_close(&dir);
}

static void report(const char *name, double s, bool pass, uint64_t bytes, uint64_t kept, uint64_t charged,
		   const struct core_stat *st)
{
	printf("{\"name\":\"%s\",\"value\":%.4f,\"unit\":\"s\",\"rival\":\"none: the limit\",\"rival_value\":2,"
	       "\"ratio\":%.4f,\"target\":\"<=2\",\"pass\":%s,\"returned_mib\":%llu,\"kept_mib\":%llu,"
	       "\"charged_mib\":%llu,\"demoted_mib\":%llu,\"dropped_rows\":%llu}\n",
	       name, s, s / 2, pass ? "true" : "false", (unsigned long long)(bytes / MIB),
	       (unsigned long long)(kept / MIB), (unsigned long long)(charged / MIB),
	       (unsigned long long)(st->squeeze_demoted_bytes / MIB),
	       (unsigned long long)st->squeeze_dropped_rows);
	fflush(stdout);
}

static void run(bool willing)
{
	struct client_process client = client_fork(willing);
	uint32_t n = willing ? SEQS : 2 * SEQS;
	struct rt_seq *q = calloc(n, sizeof(*q));
	struct core_tenant_stat tenant = {0};
	uint64_t start, before, rest, least = 0;
	struct order o = {0};
	struct core_stat st;
	struct runtime rt;
	struct harness h;
	double took;
	bool done;

	harness_init(&h, true);
	h.cfg.dram_size = n * 80 * MIB;
	h.cfg.nvme_size = n * 128 * MIB;
	h.cfg.nvme_segment = 64 * MIB;
	h.cfg.nvme_staging = 32 * MIB;
	h.cfg.pressure_shrink = false;
	if (!harness_start(&h))
		must(-EIO, "the daemon");
	must(rt_open_dims(&rt, h.sock[0], LAYERS, HEADS, ROW, ROW, 64, 0), "connection");
	for (uint32_t i = 0; i < n; i++)
		fill(&h, &rt, &q[i], i + 1, i < SEQS);
	for (uint32_t i = 0; i < SEQS; i++)
		collect(&o, &q[i]);
	snprintf(o.sock, sizeof(o.sock), "%s", h.sock[0]);
	client_map(&client, &o);
	st = harness_stat(&h);
	if (!willing)
		least = st.tier[KVT_TIER_DRAM].published;
	before = held();
	fprintf(stderr, "%s: %u segments, %llu MiB published, %llu MiB held\n", willing ? "willing" : "stuck",
		o.n, (unsigned long long)(st.tier[KVT_TIER_DRAM].published / MIB),
		(unsigned long long)(before / MIB));
	start = now_ns();
	harness_call(&h, want_all, NULL);
	do {
		usleep(4000);
		took = (double)(now_ns() - start) / 1e9;
		rest = held();
		st = harness_stat(&h);
		harness_call(&h, tenant_now, &tenant);
		done = rest <= least + 8 * MIB + before / 50 && (willing || tenant.late + 8 * MIB >= rest);
	} while (!done && took < LIMIT_S);
	report(willing ? "pressure.published_willing" : "pressure.published_stuck", took, done && took <= 2,
	       before - rest, rest, tenant.late, &st);
	client_gone(&client);
	for (uint32_t i = 0; i < n; i++)
		rt_seq_free(&q[i], true);
	free(q);
	rt_close(&rt);
	harness_stop(&h);
	harness_rm(h.dir);
}

int main(void)
{
	signal(SIGIO, SIG_IGN);
	signal(SIGPIPE, SIG_IGN);
	run(true);
	run(false);
	return 0;
}
