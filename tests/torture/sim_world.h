/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * The world of one simulation: where chance, time and the record of what happened come from. Everything follows
 * from the seed.
 *
 * Time is the process's: clock_gettime(), usleep() and poll() are defined here, so that the daemon, its tiers
 * and sd-event (libsystemd finds these symbols first) see a clock that moves only when the simulation moves it,
 * and a little with every look. It lies in a future that no timer of the kernel reaches while a test runs.
 * Whoever waits (a drain, a flush) gets the world moved on instead.
 */
#include <errno.h>
#include <poll.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include "shm/util.h"

#define SIM_EPOCH (UINT64_C(4000000000) * 1000000000u) /* the first moment: a century and more of uptime */

struct world {
	uint64_t seed, rng, now, look_ns; /* look_ns: what one look at the clock takes */
	uint64_t hash, events;            /* of the record so far */
	bool on, verbose, failed;
	void (*wait)(bool loop); /* somebody waits, the loop for what it started or a tier for its disk */
	jmp_buf out;             /* where a failed check goes */
	char why[512];
};
static struct world world;

/* ---- chance ------------------------------------------------------------------------- */

static inline uint64_t mix(uint64_t x)
{
	x ^= x >> 30;
	x *= UINT64_C(0xbf58476d1ce4e5b9);
	x ^= x >> 27;
	x *= UINT64_C(0x94d049bb133111eb);
	return x ^ x >> 31;
}
static inline uint64_t chance(void)
{
	return mix(world.rng += UINT64_C(0x9e3779b97f4a7c15));
}
/* 0 .. n - 1 */
static inline uint32_t below(uint32_t n)
{
	return n ? (uint32_t)((chance() >> 32) * n >> 32) : 0;
}
static inline uint32_t between(uint32_t lo, uint32_t hi)
{
	return lo + below(hi - lo + 1);
}
static inline bool one_in(uint32_t n)
{
	return !below(n);
}
static inline bool permille(uint32_t n)
{
	return below(1000) < n;
}

/* ---- the record ---------------------------------------------------------------------- */

/* One event. Numbers only: nothing that another process would have elsewhere. */
static inline void record(const char *what, uint64_t a, uint64_t b, uint64_t c, uint64_t d)
{
	uint64_t h = world.hash;

	for (const char *p = what; *p; p++)
		h = (h ^ (uint8_t)*p) * UINT64_C(0x100000001b3);
	world.hash = mix(mix(mix(mix(mix(h) ^ a) ^ b) ^ c) ^ d) ^ world.now;
	world.events++;
	if (world.verbose)
		fprintf(stderr, "%12.6f ms %-12s %llx %llx %llx %llx\n", (double)(world.now - SIM_EPOCH) / 1e6,
			what, (unsigned long long)a, (unsigned long long)b, (unsigned long long)c,
			(unsigned long long)d);
}

/* What the seed shows must not be. */
__attribute__((format(printf, 1, 2), noreturn)) static inline void broken(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(world.why, sizeof(world.why), fmt, ap);
	va_end(ap);
	world.failed = true;
	longjmp(world.out, 1);
}

#define must(ok, ...)                                                                                          \
	do {                                                                                                   \
		if (!(ok))                                                                                     \
			broken(__VA_ARGS__);                                                                   \
	} while (0)

/* ---- time -------------------------------------------------------------------------------- */

#define REPLACES __attribute__((visibility("default"))) /* also what libsystemd calls */

REPLACES int clock_gettime(clockid_t id, struct timespec *ts)
{
	if (!world.on)
		return (int)syscall(SYS_clock_gettime, id, ts);
	world.now += world.look_ns;
	ts->tv_sec = (time_t)(world.now / 1000000000u);
	ts->tv_nsec = (long)(world.now % 1000000000u);
	return 0;
}

REPLACES int usleep(useconds_t us)
{
	struct timespec ts = {us / 1000000, us % 1000000 * 1000};

	if (!world.on)
		return nanosleep(&ts, NULL);
	world.now += us * UINT64_C(1000);
	world.wait(true);
	return 0;
}

REPLACES int poll(struct pollfd *fds, nfds_t n, int timeout_ms)
{
	struct timespec none = {0}, ts = {timeout_ms / 1000, timeout_ms % 1000 * 1000000l};
	int r;

	if (!world.on)
		return (int)syscall(SYS_ppoll, fds, n, timeout_ms < 0 ? NULL : &ts, NULL, 0);
	for (int waited = 0;; waited++) {
		r = (int)syscall(SYS_ppoll, fds, n, &none, NULL, 0);
		if (r || waited >= timeout_ms)
			return r;
		world.now += 1000000;
		world.wait(false);
	}
}

REPLACES ssize_t getrandom(void *buf, size_t n, unsigned flags)
{
	if (!world.on)
		return syscall(SYS_getrandom, buf, n, flags);
	for (size_t i = 0; i < n; i++)
		((uint8_t *)buf)[i] = (uint8_t)chance();
	return (ssize_t)n;
}
