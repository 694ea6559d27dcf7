/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Direct reads: pages of sequences that were opened with W_OPEN_DIRECT lie in published DRAM, and a directory
 * (shm/direct.h) tells the client where. Event-loop thread, but for direct_where().
 */
#include <stdbool.h>
#include <stdint.h>
#include "daemon/pages.h"

/*
 * Where the page lies in published memory: the segment's number and the K plane's offset in it, in bytes.
 * False: it has no DRAM copy, or a private one. Any thread that may look at p->addr.
 */
bool direct_where(const struct page *p, uint32_t *segment, uint64_t *off);
/* CRC32C of its K plane, then its V plane, as directories and windows have it: initial value 0, not inverted.
 */
uint32_t direct_crc(const struct page *p);
