/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Where memory shall come from on a host with several nodes. Of a mapped memfd the kernel keeps the wish with
 * the file: it holds for whoever touches a page first, in whatever process, and for fallocate(). It says
 * nothing about pages that are there already. Any thread.
 *
 * Preferred, never bound: a full node must cost latency, not somebody's life.
 */
#include <stddef.h>

#define PLACE_NODES 1024u /* the kernel's numbers are below */

/* From this node while it has memory. 0, -EINVAL (no such node), -EPERM or -ENOSYS (not for us), -errno. */
int place_near(void *addr, size_t bytes, int node);
/* From these nodes in turn, page by page. Errors as above. */
int place_spread(void *addr, size_t bytes, const int *node, unsigned n);
/* The node that place_near() named for what is at addr, in this life or an earlier one; -1: none. */
int place_wish(const void *addr);
