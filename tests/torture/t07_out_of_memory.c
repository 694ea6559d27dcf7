/* SPDX-License-Identifier: MIT */
/*
 * torture 7: memory, mappings and descriptors run out at every place, once and for good
 * pass: clean error, no leak
 * quick: places in the code from which they are asked for, once and for good
 * full: every single request
 * io: both
 * plants: oom-leaks-region oom-ignored oom-gives-up
 *
 * Fails malloc and its kin, mmap, memfd_create, ftruncate, fallocate, eventfd, timerfd, epoll, socket, accept,
 * dup, threads and io_uring's setup (oom.h), in the daemon while a healthy client works with it and in the
 * client while a healthy daemon serves it. Each time: nothing crashes or hangs; what fails says so with a
 * documented error and one line; rows that come back are right, byte for byte; when there is memory again a
 * second client is served as if nothing had happened; and afterwards not an allocation, descriptor or mapping
 * is left.
 */
#include "oom_run.h"

#include "oom_life.h"
#include "oom_learned.h"
#include "oom_rooms.h"
#include "oom_window.h"

/* ---- the client -------------------------------------------------------------------------- */

static void prepare_client(void)
{
	bool inside = oom_inside;

	prepare();
	oom_inside = oom_children = false;
	start();
	oom_inside = inside;
}

static void under_client(void)
{
	(void)live(host.sock[0], 7);
}

/* ---- a restart -------------------------------------------------------------------------- */

static _Atomic bool drained;

static void on_drained(void *arg)
{
	atomic_store(&drained, true);
}

static void start_drain(struct core *c, void *arg)
{
	core_drain(c, on_drained, NULL);
}

/* What a restart finds of sequence 5, byte for byte: its rows, or the error. */
static int found(void)
{
	struct kvtier_seq_opts o;
	struct life f;
	int r;

	memset(&f, 0, sizeof(f));
	rt_timeout_ms = oom.sticky && atomic_load(&oom.mode) != OOM_OFF ? 1000 : 10000;
	TRY(rt_open(&f.rt, host.sock[0], LAYERS));
	TRY(rt_prepare(&f.q, &f.rt, 5, 300, 300, 1024));
	o = rt_opts(&f.q, KVT_LEASED, &keep_all);
	r = kvtier_seq_resume(f.rt.c, f.rt.m, &o, &f.q.s, &f.q.rows);
	if (r == KVT_E_NOENT)
		goto out;
	TRY(r);
	TRY(plan(&f.q, KVT_ROWS_ALL, 0, KVT_ROWS_ALL));
	r = kvtier_seq_resident(f.q.s, 0, NULL, 0);
out:
	if (f.q.lay)
		rt_seq_free(&f.q, false);
	if (f.rt.c)
		rt_close(&f.rt);
	return r;
}

static void prepare_restart(void)
{
	struct life f;
	int r;

	prepare();
	start();
	memset(&f, 0, sizeof(f));
	TRY(rt_open(&f.rt, host.sock[0], LAYERS));
	TRY(rt_prepare(&f.q, &f.rt, 5, 300, 300, 1024));
	TRY(rt_seq_open(&f.q, KVT_LEASED, &keep_all));
	TRY(rt_append(&f.q, 160));
	TRY(plan(&f.q, 40, 0, KVT_ROWS_ALL));
	TRY(kvtier_seq_truncate(f.q.s, 150));
	rt_seq_free(&f.q, false);
	rt_close(&f.rt);
	atomic_store(&drained, false);
	harness_call(&host, start_drain, NULL);
	for (int i = 0; i < 3000 && !atomic_load(&drained); i++)
		usleep(1000);
	harness_stop(&host);
	up = false;
	return;
out:
	oom_fail("cannot prepare: %s", kvtier_last_error());
}

static void under_restart(void)
{
	start();
	if (up)
		(void)found();
}

/* With memory again: a daemon that missed the sequence for lack of it has not spoilt what is on disk. */
static void after_restart(void)
{
	int r = up ? found() : KVT_E_NOENT;

	if (!up || r == KVT_E_NOENT) {
		if (up)
			harness_stop(&host);
		start();
		r = up ? found() : r;
	}
	if (r != 150)
		oom_fail("150 rows were stored, %d are found (%s)", r, r < 0 ? kvtier_last_error() : "");
	forget_lease(5);
	served();
}

static const struct oom_scenario scenarios[] = {
	{"daemon: start, a client's life", prepare, under_daemon, served, finish, false, 0.36},
	{"daemon: networks, recall, published pages, an operator", prepare_learned, under_learned,
	 after_learned, finish, false, 0.24},
	{"daemon: a client with a window", prepare, under_window, after_window, finish, false, 0.14},
	{"daemon: a restart", prepare_restart, under_restart, after_restart, finish, false, 0.14},
	{"client: a life with a healthy daemon", prepare_client, under_client, served, finish, true, 0.06},
	{"client: recording traces", prepare_trace, under_trace, after_trace, finish_trace, true, 0.03},
	{"configuration", prepare_config, under_config, after_config, finish_trace, true, 0.03},
};

int main(void)
{
	return oom_main(scenarios, sizeof(scenarios) / sizeof(scenarios[0]));
}
