/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * The listening sockets: handed over by systemd, else made here. Index 0 is the
 * admin socket, 1 + t tenant t.
 */
#include "daemon/config.h"

struct fdstore;

struct listeners {
	int fd[CONFIG_MAX_TENANTS + 1];    /* owned until taken; -1: none */
	bool made[CONFIG_MAX_TENANTS + 1]; /* bound here: unlinked by listeners_close */
	char path[CONFIG_MAX_TENANTS + 1][108];
	unsigned n;
	int metrics; /* a stream socket, owned until taken; -1: none */
	bool made_metrics;
	char metrics_path[108];
};

/*
 * Take what systemd passed (FileDescriptorName "admin", "metrics" or a tenant's name, else
 * the configured path) and bind the rest; what was in the fd store goes to `store`. A socket that is passed but
 * not configured is closed and logged. 0, or -errno with one line in err.
 */
int listeners_open(struct listeners *l, const struct config *cfg, struct fdstore *store, char *err,
		   size_t errsize);
/* Close what was not taken, remove the files of what was made here. */
void listeners_close(struct listeners *l);
