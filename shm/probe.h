/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Memory between the BPF programs (daemon/bpf/), their loader kvtierd-bpf and the daemon: three array maps of
 * one element each, mapped by the daemon, and the message that brings them. The daemon writes the targets; the
 * programs write counts and sums, which the loader freezes: nobody in user space can.
 */
#include <stdint.h>
#include "shm/histogram.h"

#define PROBE_MAGIC 0x50424b56u /* "VKBP" */
#define PROBE_VERSION 2u
#define PROBE_MAPS 3u /* descriptors of the message: targets, counts, sums */
#define PROBE_NAMES 16u
#define PROBE_WAYS 4u
#define PROBE_BUCKETS 256u
#define PROBE_SLOTS (PROBE_WAYS * PROBE_BUCKETS)
#define PROBE_DEV(major, minor) ((uint32_t)(major) << 20 | (uint32_t)(minor)) /* as the kernel keeps it */

/* Whom the programs look at. Each word is written whole; a program may see any mixture of old and new ones. */
struct probe_targets {
	uint32_t dev;               /* PROBE_DEV of a whole disk; 0: none */
	uint32_t daemon;            /* its process; 0: none */
	uint32_t tgid[PROBE_SLOTS]; /* the daemon and its clients, each in one of its bucket's ways; 0: free */
};
static inline uint32_t probe_bucket(uint32_t tgid)
{
	return (tgid * 0x9e3779b1u >> 24) % PROBE_BUCKETS * PROBE_WAYS;
}

struct probe_counts { /* in nanoseconds, of what ended */
	struct histogram disk_read, disk_write, uring, reclaim, fault, sched;
	uint64_t disk_begun, disk_ended; /* requests of the disk: reads and writes */
	uint64_t lost;                   /* events that found no room to be remembered in */
	uint64_t short_ns; /* of reclaim: the host's, and the daemon's at a limit of its own control groups */
};

struct probe_sum { /* of all threads of the process in that slot, and of those that had it before */
	uint64_t sched_ns, fault_ns, reclaim_ns;
	uint64_t faults; /* major ones */
};
struct probe_sums {
	struct probe_sum slot[PROBE_SLOTS];
};

struct probe_name {
	char name[32];
	uint32_t on;
	char why_off[92];
};

/* The loader's only message, SEQPACKET, with PROBE_MAPS descriptors, or none when `busy`. Then the connection
 * stays open, silent, for as long as the loader lives. */
struct probe_hello {
	uint32_t magic, version;
	uint32_t busy; /* another daemon has them */
	uint32_t names;
	uint32_t targets_bytes, counts_bytes, sums_bytes, reserved;
	struct probe_name name[PROBE_NAMES];
};
