/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Admin verbs: argv in, JSON text out. Called by the session code for each
 * W_ADMIN message, on the event-loop thread.
 */
#include <stdbool.h>
#include <stddef.h>
#include "daemon/core.h"

struct admin_peer {
	uint32_t uid;
	int pid;
	uint64_t owner; /* as in core_seq_stat; unused on the admin socket */
	int tenant;     /* -1: came through the admin socket and may do everything */
};
struct admin_result {
	char *json; /* malloc'ed, caller frees; NULL when the verb has none */
	size_t json_bytes;
	int fd;             /* extra read-only fd for the peer (the feed), owned by the core; -1 none. In the
			       reply the JSON memfd is first, this one second. */
	bool drain, reload; /* the verb asked for these; main acts */
};
/* 0 or KVT_E_* with one line in err. Verbs that look are allowed to tenants for their own sequences. */
int admin_dispatch(struct core *c, const struct admin_peer *peer, int argc, char *const argv[],
		   struct admin_result *ret, char *err, size_t errsize);
/* main registers what drain and reload do. */
void admin_set_hooks(void (*drain)(void *), int (*reload)(void *, char *, size_t), void *arg);
/* What the reload under way changes, a line each, for the answer to who asked; what was said before is
 * forgotten.
 */
void admin_no_changes(void);
void admin_add_change(const char *line);
/* The live configuration (tenant names), kept by the caller. Needed before a tenant's call is dispatched. */
void admin_set_config(const struct config *cfg);
