/* SPDX-License-Identifier: MIT */
/*
 * Our ring between two processes against Concurrency Kit's between two
 * threads of one. Theirs may trust its peer and has no sleep flag; ours must
 * pay for both within the targets. Same two cores, same entries, same depth,
 * same loops; rounds alternate and medians are compared.
 */
#include <ck_ring.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include "shm/ring.h"
#include "shm/seg.h"
#include "shm/util.h"

#define ENTRIES 256u
#define TRIPS 50000u
#define FLOW 500000u
#define ROUNDS 21

CK_RING_PROTOTYPE(entry, ring_entry)

enum { CMD_ECHO = 'e', CMD_DRAIN = 'd' };

/* Between rounds a peer waits in read(2) and leaves its core alone; these words start and end a round. */
struct gate {
	_Alignas(128) _Atomic uint32_t ready;
	_Alignas(128) _Atomic uint64_t done; /* what the peer drained, + 1 */
};

/* What one end of a pair of rings holds. */
struct side {
	struct ring out, in; /* ours */
	ck_ring_t *ck_out, *ck_in;
	struct ring_entry *buf_out, *buf_in;
	struct gate *gate;
	int cmd; /* the end of a pipe: read by the peer, written by us */
};

typedef void step(struct side *s, struct ring_entry *e);

static inline void our_push(struct side *s, struct ring_entry *e)
{
	int r;

	while ((r = ring_push(&s->out, e)) == -EAGAIN)
		ck_pr_stall();
	if (r < 0)
		abort();
}

static inline void our_pop(struct side *s, struct ring_entry *e)
{
	int r;

	while ((r = ring_pop(&s->in, e)) == 0)
		ck_pr_stall();
	if (r < 0)
		abort();
}

static inline void their_push(struct side *s, struct ring_entry *e)
{
	while (!ck_ring_enqueue_spsc_entry(s->ck_out, s->buf_out, e))
		ck_pr_stall();
}

static inline void their_pop(struct side *s, struct ring_entry *e)
{
	while (!ck_ring_dequeue_spsc_entry(s->ck_in, s->buf_in, e))
		ck_pr_stall();
}

#define INLINED static inline __attribute__((always_inline))

INLINED void serve(struct side *s, step push, step pop)
{
	struct ring_entry e;
	uint64_t sum;
	char cmd;

	while (read(s->cmd, &cmd, 1) == 1) {
		sum = 0;
		atomic_store(&s->gate->ready, 1);
		for (uint32_t i = 0; cmd == CMD_ECHO && i < TRIPS; i++) {
			pop(s, &e);
			push(s, &e);
		}
		for (uint32_t i = 0; cmd == CMD_DRAIN && i < FLOW; i++) {
			pop(s, &e);
			sum += e.handle;
		}
		atomic_store(&s->gate->done, sum + 1);
	}
}

static void start_peer(struct side *s, char cmd)
{
	atomic_store(&s->gate->ready, 0);
	atomic_store(&s->gate->done, 0);
	if (write(s->cmd, &cmd, 1) != 1)
		abort();
	while (!atomic_load(&s->gate->ready))
		ck_pr_stall();
}

static void finish(struct side *s, uint64_t sum)
{
	uint64_t done;

	while (!(done = atomic_load(&s->gate->done)))
		ck_pr_stall();
	if (done != sum + 1) {
		fprintf(stderr, "bench_ring: entries were lost\n");
		abort();
	}
}

/* Nanoseconds per round trip. */
INLINED double trip(struct side *s, step push, step pop)
{
	struct ring_entry e = {.type = 1};
	uint64_t t0;

	start_peer(s, CMD_ECHO);
	t0 = now_ns();
	for (uint32_t i = 0; i < TRIPS; i++) {
		e.handle = i;
		push(s, &e);
		pop(s, &e);
		if (e.handle != i)
			abort();
	}
	t0 = now_ns() - t0;
	finish(s, 0);
	return (double)t0 / TRIPS;
}

/* Million entries per second, from the first push until the peer has the last one. */
INLINED double flow(struct side *s, step push)
{
	struct ring_entry e = {.type = 1};
	uint64_t t0, sum = 0;

	start_peer(s, CMD_DRAIN);
	t0 = now_ns();
	for (uint32_t i = 0; i < FLOW; i++) {
		e.handle = i;
		sum += i;
		push(s, &e);
	}
	finish(s, sum);
	return FLOW * 1e3 / (double)(now_ns() - t0);
}

static void pin(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (sched_setaffinity(0, sizeof(set), &set) < 0)
		fprintf(stderr, "bench_ring: cannot pin to cpu %d\n", cpu);
}

static void *their_peer(void *arg)
{
	pin(1);
	serve(arg, their_push, their_pop);
	return NULL;
}

static void *zeroed(size_t bytes)
{
	void *p = aligned_alloc(128, ALIGN_UP(bytes, 128));

	if (!p)
		abort();
	return memset(p, 0, bytes);
}

static void start_theirs(struct side *s, struct side *peer, pthread_t *thread)
{
	ck_ring_t *a = zeroed(sizeof(*a)), *b = zeroed(sizeof(*b));
	struct ring_entry *buf_a = zeroed(ENTRIES * sizeof(*buf_a)), *buf_b = zeroed(ENTRIES * sizeof(*buf_b));
	struct gate *gate = zeroed(sizeof(*gate));
	int fd[2];

	if (pipe(fd) < 0)
		abort();
	ck_ring_init(a, ENTRIES);
	ck_ring_init(b, ENTRIES);
	*s = (struct side){
		.ck_out = a, .buf_out = buf_a, .ck_in = b, .buf_in = buf_b, .gate = gate, .cmd = fd[1]};
	*peer = (struct side){
		.ck_out = b, .buf_out = buf_b, .ck_in = a, .buf_in = buf_a, .gate = gate, .cmd = fd[0]};
	if (pthread_create(thread, NULL, their_peer, peer))
		abort();
}

static pid_t start_ours(struct side *s)
{
	size_t ring = ALIGN_UP(ring_bytes(ENTRIES), 128);
	struct seg seg = SEG_INIT, mine = SEG_INIT;
	uint8_t *mem;
	pid_t pid;
	int fd[2];

	if (seg_create(&seg, SEG_EXCHANGE, "bench", 2 * ring + sizeof(struct gate), SEG_F_POPULATE) < 0 ||
	    pipe(fd) < 0 || (pid = fork()) < 0)
		abort();
	if (pid) {
		mem = seg.addr;
		close(fd[0]);
	} else {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		close(fd[1]);
		if (seg_map(&mine, SEG_EXCHANGE, seg.fd, seg.size) < 0)
			abort();
		mem = mine.addr;
	}
	s->gate = (struct gate *)(mem + 2 * ring);
	s->cmd = pid ? fd[1] : fd[0];
	ring_attach(&s->out, mem + (pid ? 0 : ring), ENTRIES, true);
	ring_attach(&s->in, mem + (pid ? ring : 0), ENTRIES, false);
	if (pid)
		return pid;
	pin(1);
	serve(s, our_push, our_pop);
	_exit(0);
}

static int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return x < y ? -1 : x > y;
}

static double median(double *v)
{
	qsort(v, ROUNDS, sizeof(*v), by_value);
	return v[ROUNDS / 2];
}

static void report(const char *name, const char *unit, double ours, double theirs, double target, bool less)
{
	double ratio = ours / theirs;

	printf("{\"name\":\"%s\",\"value\":%.2f,\"unit\":\"%s\",\"rival\":\"ck_ring between two threads\","
	       "\"rival_value\":%.2f,\"ratio\":%.3f,\"target\":\"%s%.2f\",\"pass\":%s}\n",
	       name, ours, unit, theirs, ratio, less ? "<=" : ">=", target,
	       (less ? ratio <= target : ratio >= target) ? "true" : "false");
}

int main(void)
{
	double our_ns[ROUNDS], their_ns[ROUNDS], our_flow[ROUNDS], their_flow[ROUNDS];
	struct side ours = {0}, theirs, peer;
	pthread_t thread;
	pid_t pid;

	pid = start_ours(&ours);
	start_theirs(&theirs, &peer, &thread);
	pin(0);
	for (int i = -1; i < ROUNDS; i++) {
		int k = MAX(i, 0); /* the first round only warms up */

		our_ns[k] = trip(&ours, our_push, our_pop);
		their_ns[k] = trip(&theirs, their_push, their_pop);
		our_flow[k] = flow(&ours, our_push);
		their_flow[k] = flow(&theirs, their_push);
	}
	close(ours.cmd);
	close(theirs.cmd);
	waitpid(pid, NULL, 0);
	pthread_join(thread, NULL);
	report("ring round trip", "ns", median(our_ns), median(their_ns), 1.5, true);
	report("ring throughput", "M entries/s", median(our_flow), median(their_flow), 1.0, false);
	return 0;
}
