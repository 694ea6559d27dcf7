/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * What the kernel says of the disk below the NVMe tier and of waiting processes: counted by BPF programs that
 * kvtierd-bpf.service loads, read here from memory that it handed over. Without that service, or where a kernel
 * refuses a program, what it would count stays zero and probes_stat says why. The event loop's.
 */
#include <stdbool.h>
#include <stdint.h>
#include "shm/histogram.h"

#define PROBES_MAX 16u

struct core;

struct probes_stat {
	bool on;          /* the loader is connected */
	char why_off[96]; /* else one line, "kvtierd-bpf.service is not running: connect: ..." */
	struct probe_program {
		char name[32];
		bool on;
		char why_off[96];
	} program[PROBES_MAX];
	uint32_t programs;
	/* Since the loader began; all in nanoseconds. */
	struct histogram disk_read, disk_write; /* issue to completion, requests to the NVMe tier's device */
	uint64_t disk_inflight;                 /* of that device now */
	uint64_t lost;                          /* events that the programs had no room for */
	uint32_t untracked;                     /* clients' processes that found no slot */
	struct histogram uring;                 /* submission to completion, the daemon's io_uring */
	/* Direct reclaim, the host's and control groups', and major page faults in which a thread slept, of
	 * the daemon and its clients. */
	struct histogram reclaim, fault;
	struct histogram sched; /* runnable and not running: threads of the daemon's clients */
};
/* Of the NVMe tier's device, everybody's requests, since the loader began. */
struct probes_disk {
	uint64_t reads, read_ns, writes, write_ns; /* ended, and how long all of them took */
	uint64_t inflight;
};
/* NULL: *ret is set. Else why there is nothing to read, one line that lives until the loop runs again. */
const char *probes_disk(const struct core *c, struct probes_disk *ret);
/*
 * Nanoseconds that threads of the daemon and its clients spent in reclaim because the host was short of memory,
 * and the daemon's because a control group of its was; added up since the loader began. As probes_disk().
 */
const char *probes_short(const struct core *c, uint64_t *ret_ns);
/* Copied. c may have no probes. */
void probes_stat(struct core *c, struct probes_stat *ret);
/* Opened by the first tick; tries again about once a second. Never waits. */
void probes_tick(struct core *c);
void probes_free(struct core *c);
/* A client's stalls, by its process: scheduler delay, major faults and reclaim of all threads of a process.
 * false: nothing known.
 */
struct probes_process {
	uint64_t sched_ns, fault_ns, reclaim_ns; /* since it connected */
	uint64_t faults;                         /* major ones */
};
bool probes_process(struct core *c, int pid, struct probes_process *ret);
