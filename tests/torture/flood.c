/* SPDX-License-Identifier: MIT */
/*
 * A client that wants too much of one thing, by the rules or nearly so.
 *
 *   flood SOCKET info       16 connections with 64 requests on their way each
 *   flood SOCKET admin      4 connections that ask for status and lists, likewise
 *   flood SOCKET hints      a submit ring that is always full
 *   flood SOCKET plans      8 sequences of 64 lanes, a plan asked for again before it is made
 *   flood SOCKET deaf       requests whose answers nobody reads, until hung up on; then again
 *   flood SOCKET connects   connections that come and go, some with half a hello, 60 left open
 *   flood SOCKET hellos     connections with the largest rings there are, 300 at a time if they may
 *
 * Until SIGTERM; then prints how often it did that.
 */
#include <signal.h>
#include "tests/unit/core_harness.h"
#include "tests/unit/window_double.h"

#define LINKS 16
#define IDLE 60
#define MANY 300 /* more than the tests allow */
#define MOST 64u

static volatile sig_atomic_t stop;
static uint64_t count;
static const char *path;
static struct wlink links[LINKS];
static unsigned flying[LINKS]; /* a client with more answers unread would be hung up on */

static void on_term(int sig)
{
	stop = 1;
}

/* Whatever is there to be read. -1: hung up. */
static int drain(unsigned i)
{
	struct wlink *l = &links[i];
	ssize_t n;

	while ((n = sock_recv(l->fd, l->reply, sizeof(l->reply), l->fds, &l->n_fds)) > 0) {
		count++;
		flying[i]--;
		for (unsigned k = 0; k < l->n_fds; k++)
			close(l->fds[k]);
	}
	return n == -EAGAIN ? 0 : -1;
}

static int open_window(struct wlink *l, struct wseq *q, uint32_t id)
{
	struct wire_budget b = {.set = 1, .device_rows = KVT_ROWS_ALL, .manual = 1};

	strcpy(b.policy, "client");
	if (wl_connect(l, path) || wl_model(l, "flood", 0, 0, 2, 2, 64, 64) ||
	    wq_make(q, l, id, 64, 64, 256, 64 << 10, 64 << 10, 1))
		return -1;
	return wq_open(q, W_OP_OPEN, KVT_EPHEMERAL, 0, 0, &b);
}

/* ---- kinds ------------------------------------------------------------------------------ */

static void info(void)
{
	static struct wseq q[LINKS];
	struct wire_handle m;

	for (unsigned i = 0; i < LINKS; i++)
		if (open_window(&links[i], &q[i], i))
			return;
	while (!stop)
		for (unsigned i = 0; i < LINKS && !stop; i++) {
			wire_init(&m.hdr, W_SEQ_INFO, sizeof(m), 1);
			m.handle = q[i].handle;
			while (flying[i] < MOST && sock_send(links[i].fd, &m, m.hdr.len, NULL, 0) == 0)
				flying[i]++;
			if (drain(i) < 0)
				return;
		}
}

static void deaf(void)
{
	while (!stop) {
		struct wire_handle m;
		struct wseq q;
		int r = open_window(&links[0], &q, 1);

		if (r) {
			usleep(1000);
			continue;
		}
		wire_init(&m.hdr, W_SEQ_INFO, sizeof(m), 1);
		m.handle = q.handle;
		do
			r = sock_send(links[0].fd, &m, m.hdr.len, NULL, 0);
		while (!stop && (r == 0 || r == -EAGAIN));
		count++;
		wl_close(&links[0]);
		wq_free(&q);
	}
}

static void admin(void)
{
	static const char *const verb[] = {"status", "ls"};
	union {
		struct wire_admin m;
		_Alignas(8) uint8_t b[128];
	} u;

	for (unsigned i = 0; i < 4; i++)
		if (wl_connect(&links[i], path))
			return;
	while (!stop)
		for (unsigned i = 0; i < 4 && !stop; i++) {
			const char *v = verb[i % 2];
			size_t n = strlen(v) + 1;

			wire_init(&u.m.hdr, W_ADMIN, sizeof(u.m) + n, 9);
			u.m.argc = 1;
			u.m.argv_bytes = (uint32_t)n;
			memcpy(u.m.argv, v, n);
			while (flying[i] < MOST && sock_send(links[i].fd, &u.m, u.m.hdr.len, NULL, 0) == 0)
				flying[i]++;
			if (drain(i) < 0)
				return;
		}
}

static void hints(void)
{
	struct wseq q;
	struct ring_entry e = {.type = Q_DIRTY};
	uint64_t one = 1;

	if (open_window(&links[0], &q, 1))
		return;
	e.handle = q.handle;
	while (!stop) {
		while (ring_push(&links[0].sq, &e) >= 0)
			count++;
		if (write(links[0].wake, &one, sizeof(one)) < 0)
			return;
	}
}

static void plans(void)
{
	static struct rt_seq q[8];
	struct kvtier_budget b = {.size = sizeof(b), .manual = 1, .policy = "client"};
	struct runtime rt;
	uint64_t id;

	if (rt_open_dims(&rt, path, 16, 4, 64, 64, 16, 64 << 20))
		return;
	for (uint32_t i = 0; i < ARRAY_SIZE(q); i++)
		if (rt_prepare(&q[i], &rt, i + 1, 2048, 64, 4096) || rt_seq_open(&q[i], KVT_EPHEMERAL, NULL) ||
		    kvtier_seq_append(q[i].s, KVT_ALL_LAYERS, 0, 2000)) /* of zeros */
			return;
	for (uint32_t i = 0; !stop; i++) {
		b.device_rows = 2000 - i % 1000;
		b.dram_rows = i % 500;
		if (kvtier_plan_request(q[i % ARRAY_SIZE(q)].s, &b, &id) < 0)
			return;
		count++;
	}
}

static void connects(void)
{
	int idle[IDLE];
	struct wire_hello h;

	memset(idle, -1, sizeof(idle));
	wire_init(&h.hdr, W_HELLO, sizeof(h), 1);
	h.max_seqs = 64;
	h.ring_entries = 1024;
	h.plan_bytes = 64 << 20;
	strcpy(h.name, "storm");
	for (uint32_t i = 0; !stop; i++) {
		int fd = sock_connect(path);

		if (fd < 0) { /* the backlog is full */
			usleep(100);
			continue;
		}
		count++;
		if (i % 3 == 0)
			(void)sock_send(fd, &h, h.hdr.len, NULL, 0);
		else if (i % 3 == 1)
			(void)sock_send(fd, &h, 40, NULL, 0);
		close_fdp(&idle[i % IDLE]);
		idle[i % IDLE] = i % 5 ? -1 : fd;
		if (i % 5)
			close(fd);
	}
}

static void hellos(void)
{
	int fd[MANY];
	struct wire_hello h;

	memset(fd, -1, sizeof(fd));
	wire_init(&h.hdr, W_HELLO, sizeof(h), 1);
	h.max_seqs = WIRE_MAX_SEQS;
	h.ring_entries = WIRE_MAX_RING;
	h.plan_bytes = UINT64_C(1) << 30;
	strcpy(h.name, "large");
	for (uint32_t n = 0; !stop;) {
		int *at = &fd[n % MANY];
		struct wlink *l = &links[0];

		close_fdp(at);
		*at = l->fd = sock_connect(path);
		if (*at < 0 || sock_send(*at, &h, h.hdr.len, NULL, 0) < 0 ||
		    sock_wait(*at, POLLIN, now_ns() + UINT64_C(2000000000)) <= 0 || drain(0) < 0) {
			usleep(1000);
			continue;
		}
		n++;
	}
}

int main(int argc, char **argv)
{
	if (argc != 3)
		return 2;
	path = argv[1];
	signal(SIGTERM, on_term);
	signal(SIGPIPE, SIG_IGN);
	if (!strcmp(argv[2], "info"))
		info();
	else if (!strcmp(argv[2], "deaf"))
		deaf();
	else if (!strcmp(argv[2], "admin"))
		admin();
	else if (!strcmp(argv[2], "hints"))
		hints();
	else if (!strcmp(argv[2], "plans"))
		plans();
	else if (!strcmp(argv[2], "connects"))
		connects();
	else if (!strcmp(argv[2], "hellos"))
		hellos();
	else
		return 2;
	printf("%llu\n", (unsigned long long)count);
	return !stop; /* ended before its time */
}
