/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * The device tier: rows where attention reads them. It is not paged like the
 * tiers below; it is a set of strided lanes that belong to the runtime. This
 * table is what differs between a host region and GPU memory.
 */
#include <stddef.h>
#include <stdint.h>

/* Where one lane's rows are, as offsets into the device memory. */
struct device_lane {
	uint64_t k_off, v_off;
	uint32_t k_stride, v_stride; /* between slots */
	uint32_t k_bytes, v_bytes;
};

struct device_mem; /* one mapping of device memory */

struct device_ops {
	const char *name; /* "host", "fd" */
	/* Use `bytes` of client memory behind fd. Does not take the fd; its own copy lasts until detach. */
	int (*attach)(struct device_mem **ret, int fd, size_t bytes);
	void (*detach)(struct device_mem *m);
	/*
	 * Copy rows in the given slots (ascending) to a packed page: K plane then V
	 * plane, and continue crc over it. Any thread. Returns 0 or -errno (-ERANGE: a slot
	 * lies outside the memory, -EIO: the memory was taken away).
	 */
	int (*gather)(struct device_mem *m, const struct device_lane *lane, const uint32_t *slots, uint32_t n,
		      void *page, uint32_t *crc);
	/*
	 * Copy rows from planes to slots [first, first + n): row i comes from plane
	 * row pick[i] (or i when pick is NULL) of a page that holds `rows` rows. Memory behind
	 * the slots is made sure of first: -ENOSPC.
	 */
	int (*scatter)(struct device_mem *m, const struct device_lane *lane, const void *page, uint32_t rows,
		       const uint32_t *pick, uint32_t first, uint32_t n);
	/* Copy plain bytes out (scores; chunks of K and V for scoring). */
	int (*read)(struct device_mem *m, uint64_t off, void *dst, size_t bytes);
	/* Direct pointer for scoring, or NULL when the memory is not mapped here. Contents may change under us.
	 */
	const void *(*peek)(struct device_mem *m, uint64_t off, size_t bytes);
	size_t (*resident)(struct device_mem *m); /* bytes the memory really holds */
};
/* A daemon-made region (exchange class), mapped. */
extern const struct device_ops device_host_ops;
/*
 * A file of the client's own, read and written by offset and never mapped. The client may shrink it, seal it
 * or punch it at any time; rows that are gone are -EIO. attach() takes what device_fd_check() passes.
 */
extern const struct device_ops device_fd_ops;
/*
 * May this descriptor serve as device memory of `bytes`? A regular file of tmpfs or hugetlbfs at least that
 * long, open for reading and writing, not for appending, not sealed against writing. Never waits, whatever
 * the descriptor is. 0, or -errno with one line (field, value, limit) in err.
 */
int device_fd_check(int fd, uint64_t bytes, char *err, size_t size);
