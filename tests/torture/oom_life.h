/* SPDX-License-Identifier: MIT */
#pragma once
/* A client's life against a core in this process, and what must hold around it whatever memory there was. */
#include "oom_run.h"

#include "tests/unit/core_harness.h"

#define LAYERS 2u

static struct harness host;
static bool up, lingering; /* lingering: memory that a GPU may still write stays until this process ends */

/* ---- errors ------------------------------------------------------------------------ */

static bool clean(int r)
{
	switch (r) {
	case KVT_E_NOMEM: /* here or there */
	case KVT_E_NOSPC: /* a memfd or a file could not be made that large */
	case KVT_E_IO:
	case KVT_E_DAEMON: /* it could not serve this connection */
	case KVT_E_STALE:  /* ... on which this was opened */
	case KVT_E_BUSY:
	case KVT_E_LIMIT:
		return true;
	case KVT_E_TIMEOUT: /* while there is none at all */
		return oom.sticky && atomic_load(&oom.mode) != OOM_OFF;
	default:
		return r >= 0;
	}
}

/* A call of the library: what it says of itself must be fit to be shown. */
static int said(int r, const char *call)
{
	const char *line = kvtier_last_error();

	if (!clean(r))
		oom_fail("%s: %s (%d): %s", call, kvtier_strerror(r), r, line);
	else if (r < 0 && (!*line || strchr(line, '\n')))
		oom_fail("%s: %s, and not one line about it: \"%s\"", call, kvtier_strerror(r), line);
	return r;
}

#define TRY(call)                                                                                              \
	do {                                                                                                   \
		r = said(call, #call);                                                                         \
		if (r < 0)                                                                                     \
			goto out;                                                                              \
	} while (0)

/* ---- plans ------------------------------------------------------------------------- */

/* As rt_follow(). What memory does not let happen must happen when there is some again. */
static int follow(struct rt_seq *q, uint64_t id)
{
	struct kvtier_plan p = {.size = sizeof(p)};
	int r = kvtier_plan_wait(q->s, id, KVT_PLAN_READY, oom.sticky ? 150 : 10000, &p);

	if (r == KVT_E_TIMEOUT && oom.sticky) {
		oom_relieve();
		r = kvtier_plan_wait(q->s, id, KVT_PLAN_READY, 10000, &p);
	}
	if (!r)
		r = kvtier_plan_apply(q->s, &p);
	return r ? r : kvtier_plan_ack(q->s, p.id, NULL);
}

static int plan(struct rt_seq *q, uint32_t device, uint32_t dram, uint32_t nvme)
{
	struct kvtier_budget b = {.size = sizeof(b), .manual = 1, .policy = "client"};
	uint64_t id;
	int r;

	b.device_rows = device;
	b.dram_rows = dram;
	b.nvme_rows = nvme;
	r = kvtier_plan_request(q->s, &b, &id);
	if (!r)
		r = follow(q, id);
	if (!r && rt_wrong(q))
		oom_fail("%u rows are wrong after a plan", rt_wrong(q));
	return r;
}

/* ---- one client's life ---------------------------------------------------------------- */

static const struct kvtier_budget keep_all = {
	.size = sizeof(keep_all), .device_rows = KVT_ROWS_ALL, .manual = 1, .policy = "client"};

struct life {
	struct runtime rt;
	struct rt_seq q, kid;
};

static void end_life(struct life *f)
{
	if (f->kid.lay)
		rt_seq_free(&f->kid, true);
	if (f->q.lay)
		rt_seq_free(&f->q, true);
	if (f->rt.c)
		rt_close(&f->rt);
}

static int fork_seq(struct life *f, uint32_t id)
{
	struct kvtier_seq_opts o;
	int r = rt_prepare(&f->kid, &f->rt, id, 300, 300, 1024);

	if (r < 0)
		return r;
	f->kid.id = id + 1;
	o = rt_opts(&f->kid, KVT_EPHEMERAL, &keep_all);
	f->kid.id = id; /* its first rows carry the parent's pattern */
	memcpy(f->kid.salts, f->q.salts, 1024 * sizeof(*f->q.salts));
	r = kvtier_seq_fork(f->q.s, 100, &o, &f->kid.s);
	if (!r)
		f->kid.rows = 100;
	return r;
}

static int resume_seq(struct life *f, uint32_t id)
{
	struct kvtier_seq_opts o;
	uint32_t rows = 0, n = f->q.rows, salts[1024];
	int r;

	memcpy(salts, f->q.salts, sizeof(salts));
	rt_seq_free(&f->q, false);
	r = rt_prepare(&f->q, &f->rt, id, 300, 300, 1024);
	if (r < 0)
		return r;
	memcpy(f->q.salts, salts, sizeof(salts));
	o = rt_opts(&f->q, KVT_LEASED, &keep_all);
	r = kvtier_seq_resume(f->rt.c, f->rt.m, &o, &f->q.s, &rows);
	if (r == KVT_E_NOENT) {
		/* A sequence for which there was no memory to save it may be gone; it is never half there. */
		return KVT_E_NOMEM;
	}
	if (!r && rows != n)
		oom_fail("resumed with %u rows, closed with %u", rows, n);
	f->q.rows = rows;
	return r;
}

/* 0 or the first error. */
static int live(const char *sock, uint32_t id)
{
	struct kvtier_seq_info info = {.size = sizeof(info)};
	struct life f;
	uint64_t want;
	int r;

	memset(&f, 0, sizeof(f));
	rt_timeout_ms = oom.sticky && atomic_load(&oom.mode) != OOM_OFF ? 1000 : 10000;
	TRY(rt_open(&f.rt, sock, LAYERS));
	TRY(rt_prepare(&f.q, &f.rt, id, 300, 300, 1024));
	TRY(rt_seq_open(&f.q, KVT_LEASED, &keep_all));
	TRY(rt_append(&f.q, 160));
	TRY(plan(&f.q, 80, KVT_ROWS_ALL, 0));
	TRY(plan(&f.q, 30, 60, KVT_ROWS_ALL));
	TRY(plan(&f.q, 130, 60, KVT_ROWS_ALL));
	TRY(kvtier_fetch(f.q.s, 0, 20, &want));
	TRY(follow(&f.q, want));
	TRY(kvtier_seq_truncate(f.q.s, 110));
	f.q.rows = 110;
	f.q.salt++;
	TRY(rt_append(&f.q, 40));
	TRY(fork_seq(&f, id));
	TRY(rt_append(&f.kid, 20));
	TRY(plan(&f.kid, 40, KVT_ROWS_ALL, 0));
	TRY(kvtier_seq_info(f.q.s, &info));
	TRY(plan(&f.q, 30, 40, KVT_ROWS_ALL));
	TRY(resume_seq(&f, id));
	TRY(plan(&f.q, KVT_ROWS_ALL, 0, KVT_ROWS_ALL));
	TRY(kvtier_seq_drop(f.q.s));
	f.q.s = NULL;
out:
	if (f.q.s && r && rt_wrong(&f.q))
		oom_fail("%u rows are wrong after an error", rt_wrong(&f.q));
	end_life(&f);
	return r;
}

/* What a client that failed left behind under a lease. */
static void forget_lease(uint32_t id)
{
	struct kvtier_seq_opts o;
	struct life f;
	uint32_t rows;

	memset(&f, 0, sizeof(f));
	if (!rt_open(&f.rt, host.sock[0], LAYERS) && !rt_prepare(&f.q, &f.rt, id, 300, 300, 1024)) {
		o = rt_opts(&f.q, KVT_LEASED, &keep_all);
		(void)kvtier_seq_resume(f.rt.c, f.rt.m, &o, &f.q.s, &rows);
	}
	end_life(&f);
}

/* ---- the daemon ------------------------------------------------------------------------- */

static void prepare(void)
{
	harness_init(&host, true);
	host.cfg.dram_size = UINT64_C(8) << 20;
	host.cfg.dram_segment = UINT64_C(2) << 20;
	host.cfg.nvme_size = UINT64_C(16) << 20;
	host.cfg.nvme_segment = UINT64_C(1) << 20;
	host.cfg.nvme_staging = UINT64_C(2) << 20;
	host.cfg.workers = 2;
	up = lingering = false;
}

static void start(void)
{
	for (int t = 0; t < 2; t++)
		unlink(host.sock[t]);
	up = harness_start(&host);
}

static void under_daemon(void)
{
	start();
	if (up)
		(void)live(host.sock[0], 7);
}

/* Whatever happened: a daemon that runs serves, one that could not start starts now. */
static void served(void)
{
	struct core_stat st = {.seqs = 1};
	int r;

	if (!up)
		start();
	if (!up) {
		oom_fail("the daemon does not start although there is memory again");
		return;
	}
	forget_lease(7);
	r = live(host.sock[0], 1007);
	if (r)
		oom_fail("the next client: %s: %s", kvtier_strerror(r), kvtier_last_error());
	for (int i = 0;
	     i < 300 && (st.seqs || st.clients || st.tier[KVT_TIER_DRAM].used || (st.bytes[0] && !lingering));
	     i++) {
		st = harness_stat(&host);
		usleep(2000);
	}
	if (st.seqs || st.clients || st.tier[KVT_TIER_DRAM].used || (st.bytes[0] && !lingering))
		oom_fail(
			"left in the daemon: %llu sequences, %llu clients, %llu bytes of DRAM, %llu of regions",
			(unsigned long long)st.seqs, (unsigned long long)st.clients,
			(unsigned long long)st.tier[KVT_TIER_DRAM].used, (unsigned long long)st.bytes[0]);
	if (st.hangups_protocol || st.miss_corrupt || st.miss_client_mutated)
		oom_fail("%llu clients ended for the protocol, %llu corrupt pages",
			 (unsigned long long)st.hangups_protocol,
			 (unsigned long long)(st.miss_corrupt + st.miss_client_mutated));
}

static void finish(void)
{
	if (up)
		harness_stop(&host);
	harness_rm(host.dir);
}
