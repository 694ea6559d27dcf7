/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Segments: daemon-made memfds in three classes that are never mixed.
 *
 *   private    daemon only, never sent. May use huge pages.
 *   exchange   client and daemon write. Sealed SHRINK|GROW|SEAL, 4 KiB pages.
 *   published  daemon writes, clients map read-only. Sealed
 *              SHRINK|GROW|FUTURE_WRITE|SEAL after the daemon's own mapping. May use
 *              huge pages where the kernel keeps that promise for them too.
 *
 * Creation fails when sealing fails. The fd is owned by the segment until
 * seg_close(). Not thread-safe per segment; distinct segments are independent.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum seg_class {
	SEG_PRIVATE = 0,
	SEG_EXCHANGE = 1,
	SEG_PUBLISHED = 2,
};

enum {
	SEG_F_POPULATE = 1, /* fallocate the whole size now: ENOSPC here, not SIGBUS later */
	SEG_F_HUGE = 2,     /* not exchange: try 2 MiB pages, fall back silently (see seg.huge) */
};

struct seg {
	void *addr;
	size_t size; /* bytes, a multiple of 4096 (of 2 MiB when huge) */
	int fd;
	enum seg_class cls;
	bool huge;
	bool writable;
};

/* Make, size, map and seal. size is rounded up to the page size. Errors: -errno. */
int seg_create(struct seg *ret, enum seg_class cls, const char *name, size_t size, unsigned flags);
/*
 * Client side: map a received fd. Verifies that it is a memfd of exactly
 * `size` bytes carrying the seals of its class; published ones are mapped
 * read-only. Takes fd on success only. Errors: -EPROTO (wrong size or seals), -errno.
 */
int seg_map(struct seg *ret, enum seg_class cls, int fd, size_t size);
/* Check seals and size of an fd without mapping it. 0 or -EPROTO / -errno. */
int seg_verify(int fd, enum seg_class cls, size_t size);
/*
 * Give [off, off+len) back to the kernel (only whole pages inside it). Exchange and private only (-EPERM).
 * A hole in a huge segment must be committed again before it is touched.
 */
int seg_punch(struct seg *s, size_t off, size_t len);
/* Make sure [off, off+len) has memory behind it: 0, -ENOSPC, -errno. Exchange and private only (-EPERM). */
int seg_commit(struct seg *s, size_t off, size_t len);
/*
 * A descriptor of a published segment for a client, to be closed by the caller: read-only, and a file of its own,
 * so that seg_alone() can tell. -errno.
 */
int seg_lend(int fd);
/* Has no process but ours this memfd, open or mapped? 1, 0, or -errno: nobody knows. SIGIO must be ignored. */
int seg_alone(int fd);
/* Bytes that the kernel really holds for this segment (st_blocks). */
size_t seg_resident(const struct seg *s);
/* Unmap and close; safe on a zeroed or half-made segment (fd must be -1 or valid). */
void seg_close(struct seg *s);
#define SEG_INIT                                                                                               \
	{                                                                                                      \
		.fd = -1                                                                                       \
	}
