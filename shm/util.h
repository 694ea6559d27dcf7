/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Small helpers every room uses: cleanup attributes, ownership transfer,
 * alignment and little-endian width types. No state, no I/O.
 */
#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "kvtier's shared-memory and on-disk layouts are little-endian"
#endif

#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))
#define ALIGN_UP(x, a) (((x) + (a)-1) / (a) * (a))
#define DIV_UP(x, a) (((x) + (a)-1) / (a))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)
#define container_of(p, type, member) ((type *)((char *)(p)-offsetof(type, member)))

#define KVT_CACHELINE 64
#define KVT_UNIT 4096u /* pages are sized, and disk I/O aligned, in these */

static inline void close_fdp(int *fd)
{
	if (*fd >= 0)
		close(*fd);
}
static inline void free_pp(void *p)
{
	free(*(void **)p);
}
#define _cleanup_(f) __attribute__((cleanup(f)))
#define _cleanup_close_ _cleanup_(close_fdp)
#define _cleanup_free_ _cleanup_(free_pp)
#define TAKE_PTR(p)                                                                                            \
	({                                                                                                     \
		__typeof__(p) *_pp = &(p);                                                                     \
		__typeof__(p) _v = *_pp;                                                                       \
		*_pp = NULL;                                                                                   \
		_v;                                                                                            \
	})
#define TAKE_FD(fd)                                                                                            \
	({                                                                                                     \
		int *_pf = &(fd);                                                                              \
		int _f = *_pf;                                                                                 \
		*_pf = -1;                                                                                     \
		_f;                                                                                            \
	})

/* Monotonic time in nanoseconds; never fails on Linux. */
static inline uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}
