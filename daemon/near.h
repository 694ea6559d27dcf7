/* SPDX-License-Identifier: MIT */
#pragma once
/* What near.c and migrate.c keep. Event-loop thread. */
#include "daemon/nodes.h"

struct migrate {
	bool due, walking; /* pages may be on the wrong node; a round is under way */
	bool left, took;   /* of this round: some could not go yet; some did */
	unsigned inflight; /* pages */
	uint64_t next_ns, wait_ns;
	uint32_t cursor, lane, page;
};

struct near {
	struct nodes own;
	const struct nodes *nodes; /* our own, or a test's */
	int err;                   /* -errno of the first wish that the kernel refused */
	bool said;
	uint32_t below_low, shun;  /* bits by node */
	uint64_t room[TIER_NODES]; /* bytes that pages from elsewhere may still take */
	int crowded;               /* the node that is furthest below high, of those that fell below low */
	uint64_t crowded_bytes;
	uint32_t client; /* the next to be asked where it is */
	struct migrate migrate;
};
