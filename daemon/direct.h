/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Direct reads: pages of sequences that were opened with W_OPEN_DIRECT lie in published DRAM, and a directory
 * (shm/direct.h) tells the client where. An entry exists while its sequence lists the page and the page has a
 * published copy; a page knows its entries, so that whoever frees the copy finds them without a search.
 *
 * Event-loop thread, but for direct_where().
 */
#include <stdbool.h>
#include <stdint.h>
#include "daemon/pages.h"

struct direct;
struct index;

/*
 * Where the page lies in published memory: the segment's number and the K plane's offset in it, in bytes.
 * False: it has no DRAM copy, or a private one. Any thread that may look at p->addr.
 */
bool direct_where(const struct page *p, uint32_t *segment, uint64_t *off);
/* CRC32C of its K plane, then its V plane, as directories and windows have it: initial value 0, not inverted.
 */
uint32_t direct_crc(const struct page *p);

/* An empty directory. 0, -ENOMEM or why its memory could not be made. */
int direct_new(struct direct **ret, uint32_t lanes, uint32_t max_rows);
/* Withdraw all that it lists, for whoever still has it mapped, and forget it. NULL is fine. */
void direct_free(struct direct *d);
/* Its descriptor, which stays its own, and its size. / Pages listed, and bytes that it takes. */
int direct_fd(const struct direct *d, uint64_t *ret_bytes);
uint64_t direct_pages(const struct direct *d);
uint64_t direct_bytes(const struct direct *d);

/* ix lists the page: enter it, when it is in published memory, unless it is there already. */
void direct_add(const struct index *ix, struct page *p);
/* ix lists it no more. */
void direct_drop(const struct index *ix, struct page *p);
/* Rows of the page were dropped: say so. */
void direct_thin(const struct index *ix, struct page *p);
/* The page's copy is about to be freed: take it out of every directory, before its place may be used again. */
void direct_gone(struct page *p);
/*
 * Rows at and past `rows` are dead from now on, in pages that are listed and in those that will be;
 * UINT32_MAX: the index itself says it now.
 */
void direct_cut(const struct index *ix, uint32_t rows);
