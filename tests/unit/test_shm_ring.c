/* SPDX-License-Identifier: MIT */
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <cmocka.h>
#include "shm/ring.h"
#include "shm/seg.h"
#include "shm/util.h"

/* The shared words where the peer, hostile or not, finds them. */
#define HEAD_OFF 0
#define TAIL_OFF 128
#define SLEEP_OFF 256
#define ENTRY_OFF 384

#define N 8u

struct pair {
	struct ring p, c;
	_Alignas(64) uint8_t mem[ENTRY_OFF + 64 * N];
};

static _Atomic uint32_t *word(void *mem, size_t off)
{
	return (_Atomic uint32_t *)((uint8_t *)mem + off);
}

/* Both ends of a fresh ring whose cursors stand at `start`, as after start pushes and pops. */
static void make_pair(struct pair *x, uint32_t start)
{
	memset(x, 0, sizeof(*x));
	assert_int_equal(ring_bytes(N), sizeof(x->mem));
	assert_int_equal(ring_attach(&x->p, x->mem, N, true), 0);
	assert_int_equal(ring_attach(&x->c, x->mem, N, false), 0);
	*word(x->mem, HEAD_OFF) = *word(x->mem, TAIL_OFF) = start;
	x->p.pos = x->p.peer = x->c.pos = x->c.peer = start;
}

static struct ring_entry numbered(uint64_t n)
{
	struct ring_entry e = {.type = (uint32_t)n, .flags = ~(uint32_t)n, .handle = n * 3};

	for (size_t i = 0; i < ARRAY_SIZE(e.arg); i++)
		e.arg[i] = n * 0x9e3779b97f4a7c15u + i;
	return e;
}

static int push_n(struct ring *r, uint64_t n)
{
	struct ring_entry e = numbered(n);

	return ring_push(r, &e);
}

static void pop_n(struct ring *r, uint64_t n)
{
	struct ring_entry want = numbered(n), got;

	assert_int_equal(ring_pop(r, &got), 1);
	assert_memory_equal(&got, &want, sizeof(got));
}

static void sizes(void **state)
{
	_Alignas(64) uint8_t mem[1024];
	struct ring r;

	assert_int_equal(ring_bytes(2), ENTRY_OFF + 128);
	assert_int_equal(ring_bytes(65536), ENTRY_OFF + 65536 * 64);
	assert_int_equal(ring_bytes(0), 0);
	assert_int_equal(ring_bytes(1), 0);
	assert_int_equal(ring_bytes(3), 0);
	assert_int_equal(ring_bytes(131072), 0);
	assert_int_equal(ring_bytes(UINT32_MAX), 0);
	assert_int_equal(ring_attach(&r, mem, 3, true), -EINVAL);
	assert_int_equal(ring_attach(&r, mem + 8, 2, true), -EINVAL);
	assert_int_equal(ring_attach(&r, NULL, 2, true), -EINVAL);
}

static void fill_and_drain_from(uint32_t start)
{
	struct pair x;
	struct ring_entry e = numbered(0);
	uint64_t in = 0, out = 0;

	make_pair(&x, start);
	assert_int_equal(ring_pop(&x.c, &e), 0);
	for (int lap = 0; lap < 5; lap++) {
		while (in - out < N)
			assert_int_equal(push_n(&x.p, in++), 0);
		assert_int_equal(push_n(&x.p, in), -EAGAIN);
		assert_int_equal(push_n(&x.p, in), -EAGAIN);
		pop_n(&x.c, out++);
		assert_int_equal(push_n(&x.p, in++), 0);
		assert_int_equal(push_n(&x.p, in), -EAGAIN);
		for (int i = 0; i < 3 + lap; i++)
			pop_n(&x.c, out++);
	}
	while (out < in)
		pop_n(&x.c, out++);
	assert_int_equal(ring_pop(&x.c, &e), 0);
	assert_int_equal(*word(x.mem, TAIL_OFF), start + (uint32_t)in);
	assert_int_equal(*word(x.mem, HEAD_OFF), start + (uint32_t)in);
}

static void order_and_capacity(void **state)
{
	fill_and_drain_from(0);
}

static void cursors_wrap(void **state)
{
	for (uint32_t back = 0; back < 3 * N; back++)
		fill_and_drain_from(0u - back);
	fill_and_drain_from(UINT32_MAX / 2);
}

static void impossible_tail_ends_the_producer(void **state)
{
	static const uint32_t off[] = {N + 1, N + 2, UINT32_MAX / 2, UINT32_MAX, UINT32_MAX - 1};

	for (size_t i = 0; i < ARRAY_SIZE(off); i++) {
		for (uint32_t start = 0u - 2; start != 3; start++) {
			struct ring_entry e = numbered(99), same = e;
			struct pair x;

			make_pair(&x, start);
			*word(x.mem, TAIL_OFF) = start + off[i];
			assert_int_equal(ring_pop(&x.c, &e), -EPROTO);
			assert_int_equal(ring_pop(&x.c, &e), -EPROTO);
			assert_memory_equal(&e, &same, sizeof(e));
			assert_int_equal(*word(x.mem, HEAD_OFF), start);
			assert_false(ring_sleep(&x.c)); /* never sleep on a liar */
		}
	}
}

static void impossible_head_ends_the_consumer(void **state)
{
	static const uint32_t off[] = {1, 2, N, 0u - N - 1, UINT32_MAX / 2};

	for (size_t i = 0; i < ARRAY_SIZE(off); i++) {
		struct pair x;
		uint8_t before[64 * N];

		make_pair(&x, 0u - 3);
		for (uint64_t n = 0; n < N; n++)
			assert_int_equal(push_n(&x.p, n), 0);
		memcpy(before, x.mem + ENTRY_OFF, sizeof(before));
		/* Claims to have popped what was never pushed, or to have un-popped. */
		*word(x.mem, HEAD_OFF) = x.p.pos + off[i];
		assert_int_equal(push_n(&x.p, N), -EPROTO);
		assert_int_equal(push_n(&x.p, N), -EPROTO);
		assert_memory_equal(before, x.mem + ENTRY_OFF, sizeof(before));
	}
}

/* Our own cursor is private: a peer that scribbles over it changes nothing. */
static void scribbled_own_cursor_is_ignored(void **state)
{
	struct pair x;

	make_pair(&x, 0);
	assert_int_equal(push_n(&x.p, 0), 0);
	*word(x.mem, TAIL_OFF) = 0xdeadbeef;
	assert_int_equal(push_n(&x.p, 1), 0);
	assert_int_equal(*word(x.mem, TAIL_OFF), 2);
	pop_n(&x.c, 0);
	*word(x.mem, HEAD_OFF) = 0xdeadbeef;
	pop_n(&x.c, 1);
	assert_int_equal(*word(x.mem, HEAD_OFF), 2);
}

/* Any words whatsoever in shared memory: calls return something sane and stay inside the ring. */
static void random_shared_words(void **state)
{
	struct {
		uint8_t before[64];
		struct pair x;
		uint8_t after[64];
	} box;
	uint32_t seed = 12345;

	memset(&box, 0x5a, sizeof(box));
	make_pair(&box.x, 0);
	for (int i = 0; i < 200000; i++) {
		struct ring_entry e = numbered(1);
		int r;

		seed = seed * 1664525 + 1013904223;
		if (seed >> 30 == 0)
			*word(box.x.mem, HEAD_OFF) = (seed >> 8 & 1) ? seed : box.x.p.pos - (seed >> 9 & 15);
		if (seed >> 30 == 1)
			*word(box.x.mem, TAIL_OFF) = (seed >> 8 & 1) ? seed : box.x.c.pos + (seed >> 9 & 15);
		if (seed >> 30 == 2)
			*word(box.x.mem, SLEEP_OFF) = seed;
		r = ring_push(&box.x.p, &e);
		assert_true(r == 0 || r == 1 || r == -EAGAIN || r == -EPROTO);
		r = ring_pop(&box.x.c, &e);
		assert_true(r == 0 || r == 1 || r == -EPROTO);
		assert_true(box.x.p.pos - box.x.p.peer <= N);
		assert_true(box.x.c.peer - box.x.c.pos <= N);
	}
	for (size_t i = 0; i < 64; i++) {
		assert_int_equal(box.before[i], 0x5a);
		assert_int_equal(box.after[i], 0x5a);
	}
}

static void wakes_once_per_sleep(void **state)
{
	struct pair x;

	make_pair(&x, 0);
	assert_int_equal(push_n(&x.p, 0), 0); /* nobody sleeps */
	assert_false(ring_sleep(&x.c));       /* something is there: stay awake */
	assert_int_equal(*word(x.mem, SLEEP_OFF), 0);
	pop_n(&x.c, 0);
	assert_true(ring_sleep(&x.c));
	assert_int_equal(push_n(&x.p, 1), 1);
	assert_int_equal(push_n(&x.p, 2), 0); /* one eventfd write is enough */
	assert_false(ring_sleep(&x.c));
	pop_n(&x.c, 1);
	pop_n(&x.c, 2);
	assert_true(ring_sleep(&x.c));
	ring_awake(&x.c); /* woken by something else */
	assert_int_equal(push_n(&x.p, 3), 0);
	pop_n(&x.c, 3);
}

/* ---- two threads on one mapping ------------------------------------------------ */

struct stress {
	struct ring p, c;
	uint64_t count;
	int wake; /* eventfd, -1: busy consumer */
	int error;
};

static void wake_peer(int fd)
{
	uint64_t one = 1;

	if (write(fd, &one, sizeof(one)) != sizeof(one))
		abort();
}

/* Wait on the eventfd; a lost wake-up shows as a timeout. */
static bool wait_wake(int fd)
{
	struct pollfd p = {.fd = fd, .events = POLLIN};
	uint64_t v;

	return poll(&p, 1, 10000) == 1 && read(fd, &v, sizeof(v)) == sizeof(v);
}

static void *producer(void *arg)
{
	struct stress *s = arg;

	for (uint64_t n = 0; n < s->count;) {
		int r = push_n(&s->p, n);

		if (r >= 0)
			n++;
		if (r == 1)
			wake_peer(s->wake);
		if (r == -EPROTO) {
			s->error = r;
			break;
		}
		if (r == -EAGAIN)
			sched_yield();
	}
	return NULL;
}

static int consume(struct ring *c, uint64_t count, int wake)
{
	struct ring_entry e, want;

	for (uint64_t n = 0; n < count;) {
		int r = ring_pop(c, &e);

		if (r < 0)
			return r;
		if (r == 1) {
			want = numbered(n++);
			if (memcmp(&e, &want, sizeof(e)))
				return -EBADMSG;
		} else if (wake < 0) {
			sched_yield();
		} else if (ring_sleep(c)) {
			if (!wait_wake(wake))
				return -ETIMEDOUT;
			ring_awake(c);
		}
	}
	return 0;
}

static void two_threads(uint64_t count, uint32_t entries, int wake)
{
	void *mem = aligned_alloc(64, ALIGN_UP(ring_bytes(entries), 64));
	struct stress s = {.count = count, .wake = wake};
	uint32_t start = 0u - (uint32_t)(count / 2); /* the cursors wrap half way */
	pthread_t t;

	assert_non_null(mem);
	memset(mem, 0, ring_bytes(entries));
	assert_int_equal(ring_attach(&s.p, mem, entries, true), 0);
	assert_int_equal(ring_attach(&s.c, mem, entries, false), 0);
	*word(mem, HEAD_OFF) = *word(mem, TAIL_OFF) = start;
	s.p.pos = s.p.peer = s.c.pos = s.c.peer = start;
	assert_int_equal(pthread_create(&t, NULL, producer, &s), 0);
	assert_int_equal(consume(&s.c, count, wake), 0);
	assert_int_equal(pthread_join(t, NULL), 0);
	assert_int_equal(s.error, 0);
	free(mem);
}

static void stress_busy(void **state)
{
	two_threads(1000000, 64, -1);
	two_threads(200000, 2, -1);
}

static void stress_sleeping(void **state)
{
	_cleanup_close_ int fd = eventfd(0, EFD_CLOEXEC);

	assert_true(fd >= 0);
	two_threads(300000, 64, fd);
	two_threads(100000, 2, fd);
}

/* ---- two processes: every entry makes the round trip, both sides sleep ------------- */

static int echo(struct ring *in, struct ring *out, int wake_me, int wake_peer_fd, uint64_t count)
{
	struct ring_entry e;

	for (uint64_t n = 0; n < count;) {
		int r = ring_pop(in, &e);

		if (r < 0)
			return 2;
		if (r == 1) {
			r = ring_push(out, &e);
			if (r < 0)
				return 3;
			if (r == 1)
				wake_peer(wake_peer_fd);
			n++;
		} else if (ring_sleep(in)) {
			if (!wait_wake(wake_me))
				return 4;
			ring_awake(in);
		}
	}
	return 0;
}

static void processes_ping_pong(void **state)
{
	enum { ENTRIES = 16, COUNT = 20000 };
	_cleanup_close_ int to_child = eventfd(0, EFD_CLOEXEC), to_parent = eventfd(0, EFD_CLOEXEC);
	struct seg s = SEG_INIT, mine = SEG_INIT;
	struct ring a, b;
	int status;
	pid_t pid;

	assert_true(to_child >= 0 && to_parent >= 0);
	assert_int_equal(seg_create(&s, SEG_EXCHANGE, "ring", 2 * ring_bytes(ENTRIES), SEG_F_POPULATE), 0);
	pid = fork();
	assert_true(pid >= 0);
	if (!pid) {
		/* A mapping of its own, as a real client has. */
		if (seg_map(&mine, SEG_EXCHANGE, s.fd, s.size) < 0)
			_exit(1);
		ring_attach(&a, mine.addr, ENTRIES, false);
		ring_attach(&b, (uint8_t *)mine.addr + ring_bytes(ENTRIES), ENTRIES, true);
		_exit(echo(&a, &b, to_child, to_parent, COUNT));
	}
	ring_attach(&a, s.addr, ENTRIES, true);
	ring_attach(&b, (uint8_t *)s.addr + ring_bytes(ENTRIES), ENTRIES, false);
	for (uint64_t n = 0; n < COUNT; n++) {
		struct ring_entry got, want = numbered(n);
		int r = push_n(&a, n);

		assert_true(r >= 0);
		if (r == 1)
			wake_peer(to_child);
		while ((r = ring_pop(&b, &got)) == 0) {
			if (!ring_sleep(&b))
				continue;
			assert_true(wait_wake(to_parent));
			ring_awake(&b);
		}
		assert_int_equal(r, 1);
		assert_memory_equal(&got, &want, sizeof(got));
	}
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_true(WIFEXITED(status));
	assert_int_equal(WEXITSTATUS(status), 0);
	seg_close(&s);
}

/* A producer killed at any moment leaves a ring with whole entries, in order. */
static void killed_producer_leaves_whole_entries(void **state)
{
	enum { ENTRIES = 64 };
	struct seg s = SEG_INIT;

	for (int round = 0; round < 20; round++) {
		struct ring r;
		struct ring_entry got;
		uint64_t n = 0;
		pid_t pid;
		int k;

		assert_int_equal(seg_create(&s, SEG_EXCHANGE, "ring", ring_bytes(ENTRIES), 0), 0);
		pid = fork();
		assert_true(pid >= 0);
		if (!pid) {
			prctl(PR_SET_PDEATHSIG, SIGKILL); /* a failing test leaves no spinning child */
			ring_attach(&r, s.addr, ENTRIES, true);
			for (uint64_t i = 0;;)
				i += push_n(&r, i) >= 0;
		}
		ring_attach(&r, s.addr, ENTRIES, false);
		for (;;) {
			k = ring_pop(&r, &got);
			assert_true(k >= 0);
			if (k == 1) {
				struct ring_entry want = numbered(n++);

				assert_memory_equal(&got, &want, sizeof(got));
			} else {
				sched_yield();
			}
			if (n == 1000u + 37u * (uint64_t)round)
				kill(pid, SIGKILL);
			if (n >= 1000u + 37u * (uint64_t)round && waitpid(pid, NULL, WNOHANG) == pid)
				break;
		}
		while ((k = ring_pop(&r, &got)) == 1) {
			struct ring_entry want = numbered(n++);

			assert_memory_equal(&got, &want, sizeof(got));
		}
		assert_int_equal(k, 0);
		seg_close(&s);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(sizes),
		cmocka_unit_test(order_and_capacity),
		cmocka_unit_test(cursors_wrap),
		cmocka_unit_test(impossible_tail_ends_the_producer),
		cmocka_unit_test(impossible_head_ends_the_consumer),
		cmocka_unit_test(scribbled_own_cursor_is_ignored),
		cmocka_unit_test(random_shared_words),
		cmocka_unit_test(wakes_once_per_sleep),
		cmocka_unit_test(stress_busy),
		cmocka_unit_test(stress_sleeping),
		cmocka_unit_test(processes_ping_pong),
		cmocka_unit_test(killed_producer_leaves_whole_entries),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
