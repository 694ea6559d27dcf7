/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Memory pressure: the DRAM tier takes what the host can spare, and gives it back when others need it, before
 * the kernel has to kill somebody. Event-loop thread.
 *
 *   pressure_host.c  what the host says: MemAvailable, limits of our cgroups, PSI
 *   pressure.c       how much the tier may hold: down at once, up in steps after a quiet time
 *   pressure_stall.c  stalls in reclaim, as the kernel's probes see them
 *   pressure_revoke.c  published memory: whose clients have to let go of it
 *   pressure_give.c  what goes: rows with another copy, then to nvme, then lowest scores
 */
#include <stdbool.h>
#include <stdint.h>
#include "daemon/config.h"
#include "tiers/tier.h"

struct core;
struct seq;
struct core_stat;

/* ---- pressure.c ---------------------------------------------------------------------------- */
int pressure_open(struct core *c); /* 0, -ENOMEM; without PSI it looks at the tick alone */
void pressure_close(struct core *c);
/* The configuration changed. */
void pressure_reload(struct core *c);
/* Look at the host; from the tick. */
void pressure_tick(struct core *c);
/* One slice of giving back; from the mover's pump. */
void pressure_pump(struct core *c);
/* Memory is missing, and DRAM is being moved to nvme for it. */
bool pressure_gives(const struct core *c);
void pressure_stat(const struct core *c, struct core_stat *ret);

/* ---- pressure_stall.c ----------------------------------------------------------------------- */
/* Time in reclaim since `then`, at most a window ago; `next` takes its place after half of one. */
struct stall {
	uint64_t stall_ns, window_ns;          /* as psi says; window 0: off */
	uint64_t then, then_ns, next, next_ns; /* sums, and when they were read; then_ns 0: not yet */
	uint64_t quiet_ns;                     /* nothing is said before */
};
/* What psi says; as psi_parse(). */
void stall_set(struct stall *st, const char *spec);
/* `sum` was spent since the probes began: was it as much in a window as psi asks for? Once in a window. */
bool stall_look(struct stall *st, uint64_t sum, uint64_t now);
/* For people: what is looked at, or why not. */
void stall_says(const struct stall *st, const char *why_off, char *ret, size_t size);

/* ---- pressure_revoke.c ---------------------------------------------------------------------- */
struct revoke {
	uint64_t told_ns, late;
};
/* Of `need` bytes that are to go, choose the share of published memory. */
void revoke_choose(struct core *c, const struct tier_stat *st, uint64_t need);
/* Tell clients, and close what they let go of. False: there is none. */
bool revoke_look(struct core *c, struct revoke *r);

/* ---- pressure_host.c ---------------------------------------------------------------------- */
struct host;
/* root: "" on a real host; else where its /proc and /sys are, for tests. -ENOMEM. */
int host_open(struct host **ret, const char *root);
void host_close(struct host *h);
/*
 * Bytes that are missing until `reserve` is available again: on the host, and in each of our cgroups that has a
 * limit, there at most an eighth of the limit. *ret_spare: what is available beyond, the least of them.
 */
uint64_t host_missing(const struct host *h, uint64_t reserve, uint64_t *ret_spare);
/* Ask the kernel for events (POLLPRI). A descriptor, the caller's, or -errno; ret: where, for people. */
int host_psi(const struct host *h, const char *spec, char ret[64]);
/* "some 150ms/2s": 0, or -EINVAL with the reason. "no": 0 with *ret_window_us 0. */
int psi_parse(const char *spec, bool *ret_full, uint32_t *ret_stall_us, uint32_t *ret_window_us, char *why,
	      size_t size);

/* ---- pressure_give.c ------------------------------------------------------------------------ */
struct give;
struct give *give_new(uint32_t tenants); /* NULL: no memory */
void give_free(struct give *g);
/* Private pages of the tier may hold this much less: start over with what costs least. */
void give_start(struct give *g);
/*
 * One slice towards `need` bytes less. drop: rows whose only copy is in dram may go. False: nothing can be done
 * now.
 */
bool give_some(struct core *c, struct give *g, uint64_t need, bool drop);
