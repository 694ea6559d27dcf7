/* SPDX-License-Identifier: MIT */
#pragma once
/* kvtierctl doctor: checks of the host, each in a process of its own, so that none can hang or crash the rest.
 */
#include <stdbool.h>
#include <stdint.h>
#include "daemon/config.h"

enum verdict { VERDICT_OK, VERDICT_NOTE, VERDICT_WARNING, VERDICT_PROBLEM, VERDICT_UNCHECKED, VERDICTS };

struct finding {
	enum verdict verdict;
	char found[320], advice[420]; /* advice: empty when there is nothing to do */
};

/* What the checks go by: made once, before the first of them. */
struct patient {
	char root[256]; /* before every path; empty: this host */
	char file[CONFIG_PATH], error[320];
	struct config cfg; /* built-in defaults where there is no file, or a wrong one */
	bool file_there, ready;
	int pid;      /* of the running daemon; 0: none that could be seen */
	bool running; /* and what it says: */
	uint64_t dram_resident;
	bool io_uring, nvme_offline, probes_on;
	char psi[64], probes_off[160];
};

typedef void doctor_check(const struct patient *p, struct finding *f);
doctor_check check_config, check_unit, check_sockets, check_io_uring, check_memlock, check_descriptors,
	check_psi, check_bpf, check_cpu, check_clock, check_memory, check_swap, check_thp, check_hugetlb,
	check_numa, check_reclaim, check_store, check_filesystem, check_space, check_disk, check_cuda;

/* ---- doctor_read.c: a host's files, cut off, huge or missing as they may be ---------------------- */

#define ROOTED(n) __attribute__((format(printf, n, (n) + 1)))

/* A path below the root, in one of four buffers that take turns. */
const char *ROOTED(2) host_path(const struct patient *p, const char *fmt, ...);
/* A file's beginning, ended by a zero, without the newline at its end. Bytes or -errno; `ret` is "" then. */
int ROOTED(4) host_read(const struct patient *p, char *ret, size_t size, const char *fmt, ...);
/* A file that holds one decimal number. */
bool ROOTED(3) host_number(const struct patient *p, uint64_t *ret, const char *fmt, ...);
/* The number behind `key` at the beginning of a line of text; kB: times 1024. */
bool text_number(const char *text, const char *key, uint64_t *ret);
bool ROOTED(2) host_there(const struct patient *p, const char *fmt, ...);
/* What kvtierd.service and its drop-ins say last of a key; false: no unit, or nothing. */
bool unit_value(const struct patient *p, const char *key, char *ret, size_t size);
bool unit_there(const struct patient *p);
/* As systemd writes them: bytes with K, M, G, T; "infinity" is UINT64_MAX. */
bool unit_size(const char *text, uint64_t *ret);
/* The soft limit of the daemon (of the unit, when it does not run; else our own) by its name in
 * /proc/PID/limits. */
bool limit_of(const struct patient *p, const char *name, const char *unit_key, uint64_t *ret,
	      const char **ret_whose);
/* Bytes for people, in one of eight buffers that take turns. */
const char *human(uint64_t bytes);

/* Fill a finding. The advice follows with advise(). */
void __attribute__((format(printf, 3, 4))) say(struct finding *f, enum verdict v, const char *fmt, ...);
void __attribute__((format(printf, 2, 3))) advise(struct finding *f, const char *fmt, ...);
