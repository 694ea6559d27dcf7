/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * The same thing for many numbers, spread over processes, and what is said of it: counters in shared memory,
 * TAP, figures. A process that dies or fails is a failed number, and its number is printed: run it
 * alone with KVT_SEED. With root each process has a memory file system of its own for its files.
 */
#include <sched.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>
#include "shm/util.h"

#define MANY_COUNTERS 24u
#define MANY_MAX 256u

struct many_worker {
	uint64_t count[MANY_COUNTERS];
	uint64_t now;  /* the number it is at */
	char what[48]; /* what it does there */
	pid_t pid;
	bool failed;
};

static struct many_worker *many_workers; /* shared */
static uint64_t *many_count;             /* of this process */
static char *many_what;
static char many_top[64] = "/tmp"; /* where this process puts its files */
static unsigned many_tests, many_bad;

static inline bool many_full(void)
{
	const char *mode = getenv("KVT_TORTURE");

	return mode && !strcmp(mode, "full");
}
static inline bool many_threads(void)
{
	const char *io = getenv("KVT_IO");

	return io && !strcmp(io, "threads");
}

/* A result line; remembers a failure for the exit status. */
__attribute__((format(printf, 2, 3))) static inline bool many_tap(bool ok, const char *fmt, ...)
{
	va_list ap;

	printf("%s %u - ", ok ? "ok" : "not ok", ++many_tests);
	va_start(ap, fmt);
	vprintf(fmt, ap);
	va_end(ap);
	putchar('\n');
	fflush(stdout);
	many_bad += !ok;
	return ok;
}
static inline int many_end(void)
{
	printf("1..%u\n", many_tests);
	return many_bad ? 1 : 0;
}

/* 1234567 as 1,234,567; four results stay valid. */
static inline const char *many_comma(uint64_t v)
{
	static char text[4][32];
	static unsigned turn;
	char *p = text[turn++ % 4] + 31;
	unsigned digits = 0;

	*p = '\0';
	do {
		if (digits && digits % 3 == 0)
			*--p = ',';
		*--p = (char)('0' + v % 10);
		digits++;
	} while ((v /= 10));
	return p;
}

/* A memory file system that nobody else sees and that goes with this process; else plain /tmp. */
static inline void many_private_tmp(void)
{
	if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) ||
	    mount("none", "/mnt", "tmpfs", 0, "size=1g"))
		return;
	strcpy(many_top, "/mnt");
}

static inline void many_child(struct many_worker *w, unsigned k, unsigned n, uint64_t from, uint64_t count,
			      void (*one)(uint64_t number))
{
	many_count = w->count;
	many_what = w->what;
	setenv("CMOCKA_TEST_ABORT", "1", 1); /* else CMocka ends us without saying why */
	many_private_tmp();
	for (uint64_t i = k; i < count; i += n) {
		w->now = from + i;
		one(from + i);
	}
	fflush(stdout);
	_exit(0);
}

/*
 * one(number) for `count` numbers from `from` on; it exits or dies when something is wrong. The sums of what
 * the processes counted in many_count[] go to sum[MANY_COUNTERS]. Returns the number of processes that failed,
 * having printed at which number.
 */
static inline unsigned many_run(uint64_t from, uint64_t count, void (*one)(uint64_t number), uint64_t *sum)
{
	unsigned cores = (unsigned)sysconf(_SC_NPROCESSORS_ONLN), n, bad = 0;
	size_t bytes = MANY_MAX * sizeof(struct many_worker);

	n = many_full() ? MIN(cores, MANY_MAX) : MIN(cores, 2u);
	many_workers = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (many_workers == MAP_FAILED)
		abort();
	fflush(stdout);
	for (unsigned k = 0; k < n; k++) {
		pid_t pid = fork();

		if (pid < 0)
			abort();
		if (!pid)
			many_child(&many_workers[k], k, n, from, count, one);
		many_workers[k].pid = pid;
	}
	memset(sum, 0, MANY_COUNTERS * sizeof(*sum));
	for (unsigned k = 0; k < n; k++) {
		struct many_worker *w = &many_workers[k];
		int status;

		if (waitpid(w->pid, &status, 0) != w->pid)
			abort();
		for (unsigned i = 0; i < MANY_COUNTERS; i++)
			sum[i] += w->count[i];
		if (!status)
			continue;
		bad++;
		printf("# failed at number %llu %s (%s %d)\n", (unsigned long long)w->now, w->what,
		       WIFSIGNALED(status) ? "signal" : "exit status",
		       WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
	}
	munmap(many_workers, bytes);
	return bad;
}

/* KVT_SEED=N: this number alone, in this process. */
static inline bool many_only(uint64_t *ret)
{
	const char *seed = getenv("KVT_SEED");

	if (!seed || !*seed)
		return false;
	*ret = strtoull(seed, NULL, 0);
	return true;
}
