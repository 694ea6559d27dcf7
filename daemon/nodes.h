/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Nodes of the host's memory: which there are, which one a client is on, what is placed there, and pages that
 * lie on another one. Event-loop thread.
 *
 *   nodes.c    what the host says: sysfs, what we may use of it, processes
 *   near.c     whose memory goes where; marks of each node
 *   migrate.c  pages of clients that moved, or that found no room, are copied to where they belong
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include "tiers/tier.h"

struct core;
struct client;
struct seg;
struct seq;
struct pio;
struct core_stat;

/* ---- nodes.c ------------------------------------------------------------------------------- */
struct nodes {
	struct tier_nodes table; /* that have memory and that we may use */
	int8_t *of_cpu;          /* [cpus] index into the table, -1: unknown */
	unsigned cpus;
	char root[128];
	/* As nodes_of_process(); NULL: that one. For tests. */
	int (*of_process)(const struct nodes *n, pid_t pid, bool *ret_firm);
};
/* root: "" on a real host; else where its /proc and /sys are, for tests. A host that says nothing has no nodes.
 */
int nodes_open(struct nodes *ret, const char *root); /* 0, -ENOMEM */
void nodes_close(struct nodes *n);
/*
 * The index of the node on which the process may run; firm: on no other. Where it may run on several, that of
 * the processor it was last on. -1: unknown.
 */
int nodes_of_process(const struct nodes *n, pid_t pid, bool *ret_firm);
/* "0-3,7" as bits; numbers past the end are left out. */
void nodes_parse_list(const char *text, uint64_t *bits, unsigned n);

/* ---- near.c -------------------------------------------------------------------------------- */
int near_open(struct core *c); /* before the tiers; 0, -ENOMEM */
void near_close(struct core *c);
/* It said hello: find its node. */
void near_hello(struct client *cl);
/* Memory that we share with the client, before anybody touches it; cl NULL: everybody's. */
void near_place(struct core *c, const struct client *cl, const struct seg *s);
/* The sequence has this client now. */
void near_bind(struct seq *s);
/* From the tick: marks of each node, clients that moved. */
void near_tick(struct core *c);
void near_stat(const struct core *c, struct core_stat *ret);
/* How far the node is below its high mark, when it is being emptied; ret: its index, -1: none is. */
int near_crowded(const struct core *c, uint64_t *ret_bytes);

/* ---- migrate.c ----------------------------------------------------------------------------- */
/* Pages may lie where they should not: look, soon. */
void migrate_look(struct core *c);
/* A page was written: was it where it should be? */
void migrate_saw(struct core *c, const struct tier_io *io);
void migrate_tick(struct core *c);
/* One slice; from the mover's pump. */
void migrate_pump(struct core *c);
