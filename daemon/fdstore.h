/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * systemd's fd store: memory of ours that it holds while we are away. What it held comes with the listening
 * sockets; what is new is handed over by notification. Without a NOTIFY_SOCKET nothing is kept. Event-loop
 * thread.
 */
#include <stdbool.h>
#include "tiers/tier.h"

/* Descriptors that the unit allows (FileDescriptorStoreMax=); $FDSTORE, where systemd sets it, says it itself.
 */
#define FDSTORE_MAX 4096u

struct fdstore {
	struct tier_keep keep;
	unsigned max, held; /* held: by systemd, as far as we know */
	bool on;
};

/* Look whether there is a store. */
void fdstore_open(struct fdstore *s);
/* A descriptor that systemd passed: true, and taken, when its name says that it was in the store. */
bool fdstore_offer(struct fdstore *s, int fd, const char *name);
/* What the tier is given; NULL: there is no store. */
const struct tier_keep *fdstore_keep(const struct fdstore *s);
/* Nobody wanted the rest: out of the store. */
void fdstore_sweep(struct fdstore *s);
void fdstore_close(struct fdstore *s);
