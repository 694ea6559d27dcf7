/* SPDX-License-Identifier: MIT */
#pragma once
/* A client whose rows the daemon never sees: pages pass through its window. */
#include "oom_life.h"

#include "tests/unit/window_gpu.h"

struct wlife {
	struct wlink l;
	struct wseq q;
	bool connected;
};

/* Steps until the plan is applied. 0, -1: a promise was broken or the connection ended, -2: nothing came. */
static int wfollow(struct wseq *q, uint64_t id)
{
	uint64_t begin = now_ns();
	struct pollfd end = {.fd = q->l->fd, .events = POLLIN};

	while (now_ns() - begin < UINT64_C(10000000000)) {
		int r = wq_step(q);

		if (r < 0)
			return -1;
		if (r == 2 && q->applied >= id)
			return 0;
		if (poll(&end, 1, 0) > 0 && end.revents & (POLLHUP | POLLERR))
			return -1; /* it could not serve this connection */
		if (oom.sticky && now_ns() - begin > 150000000u)
			oom_relieve();
		if (!r)
			usleep(50);
	}
	return -2;
}

static int wplan(struct wseq *q, uint32_t device, uint32_t dram, uint32_t nvme)
{
	struct wire_budget b = wq_budget(device, dram, nvme);
	uint64_t id;
	int r = wq_ask(q, &b, &id);

	if (r && r != -1000 && !clean(r))
		oom_fail("plan request: %s: %s", kvtier_strerror(r), wl_text(q->l));
	if (!r)
		r = wfollow(q, id);
	if (r == -2)
		oom_fail("no plan within 10 s");
	if (!r && wq_wrong(q))
		oom_fail("%u rows are wrong after a plan", wq_wrong(q));
	return r;
}

static int wlive(struct wlife *f, uint32_t id)
{
	struct wire_budget b = wq_budget(KVT_ROWS_ALL, 0, 0);

	wl_patience_ns = oom.sticky && atomic_load(&oom.mode) != OOM_OFF ? 300000000u : UINT64_C(10000000000);
	f->l.wake = -1;
	if (wl_connect(&f->l, host.sock[0]))
		return -1;
	f->connected = true;
	strcpy(b.policy, "client");
	if (wl_model(&f->l, "bytes", KVT_DTYPE_OPAQUE, 0, 2, 2, 48, 32) ||
	    wq_make(&f->q, &f->l, id, 300, 300, 1024, 24576, 24576, 1) ||
	    wq_open(&f->q, W_OP_OPEN, KVT_EPHEMERAL, 0, 0, &b) || wq_append(&f->q, 160) ||
	    wplan(&f->q, 60, 100, KVT_ROWS_ALL) || wplan(&f->q, 140, 40, KVT_ROWS_ALL) ||
	    wq_truncate(&f->q, 120) || wq_append(&f->q, 40) || wplan(&f->q, 30, 60, KVT_ROWS_ALL))
		return -1;
	return wq_close(&f->q, true);
}

static int wrun(uint32_t id)
{
	struct wlife *f = calloc(1, sizeof(*f));
	int r, keep = dup(2), null = open("/dev/null", O_WRONLY | O_CLOEXEC);

	f->q.region = (struct seg)SEG_INIT;
	dup2(null, 2); /* the double says which of its expectations memory broke */
	r = wlive(f, id);
	dup2(keep, 2);
	close(keep);
	close(null);
	wq_free(&f->q);
	if (f->connected) {
		wl_close(&f->l);
	} else if (f->l.fd > 0) {
		close(f->l.fd);
		for (unsigned i = 0; i < f->l.n_fds; i++)
			close(f->l.fds[i]);
	}
	free(f);
	return r;
}

static void under_window(void)
{
	lingering = true;
	start();
	if (up)
		(void)wrun(7);
}

static void after_window(void)
{
	if (!up)
		start();
	if (up && wrun(1007))
		oom_fail("the next client's window does not work");
	served();
}
