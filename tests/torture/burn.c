/* SPDX-License-Identifier: MIT */
/*
 * Only burns time: the other half of a comparison with somebody who does harm.
 *
 *   burn THREADS PERCENT    each thread is busy for PERCENT of every 10 ms, until it is killed
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>
#include "shm/util.h"

#define SLICE_NS UINT64_C(10000000)

static uint64_t busy_ns;

static void *work(void *arg)
{
	for (;;) {
		uint64_t t = now_ns(), end = t + busy_ns;

		while (now_ns() < end)
			;
		if (busy_ns < SLICE_NS)
			nanosleep(&(struct timespec){.tv_nsec = (long)(SLICE_NS - busy_ns)}, NULL);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	int n = argc == 3 ? atoi(argv[1]) : 0;
	pthread_t t;

	busy_ns = argc == 3 ? (uint64_t)(atof(argv[2]) * (double)SLICE_NS / 100) : 0;
	if (n < 1 || busy_ns > SLICE_NS) {
		fprintf(stderr, "usage: burn THREADS PERCENT\n");
		return 2;
	}
	for (int i = 0; i < n; i++)
		if (pthread_create(&t, NULL, work, NULL))
			return 1;
	pause();
	return 0;
}
