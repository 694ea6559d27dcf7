/* SPDX-License-Identifier: MIT */
#include <string.h>
#include "daemon/config_keys.h"
#include "shm/util.h"

#define GLOBAL(sec, key, t, re, field, lo, hi, dflt, u, text)                                                  \
	{                                                                                                      \
		.section = sec, .name = key, .type = t, .reload = re, .off = offsetof(struct config, field),   \
		.size = sizeof(((struct config *)0)->field), .min = lo, .max = hi, .def = dflt, .unit = u,     \
		.doc = text                                                                                    \
	}
#define TEXT(sec, key, t, re, may_be_empty, field, dflt, text)                                                 \
	{                                                                                                      \
		.section = sec, .name = key, .type = t, .reload = re, .empty = may_be_empty,                   \
		.off = offsetof(struct config, field), .size = sizeof(((struct config *)0)->field),            \
		.def = dflt, .doc = text                                                                       \
	}
#define TENANT(key, t, re, may_be_empty, field, lo, hi, dflt, u, text)                                         \
	{                                                                                                      \
		.section = "tenant", .name = key, .type = t, .reload = re, .empty = may_be_empty,              \
		.off = offsetof(struct config_tenant, field),                                                  \
		.size = sizeof(((struct config_tenant *)0)->field), .min = lo, .max = hi, .def = dflt,         \
		.unit = u, .doc = text                                                                         \
	}

#define K (UINT64_C(1) << 10)
#define M (UINT64_C(1) << 20)
#define G (UINT64_C(1) << 30)
#define T (UINT64_C(1) << 40)

const struct config_key config_keys[] = {
	TEXT("kvtierd", "run_dir", KEY_PATH, false, false, run_dir, "/run/kvtier", "directory of the sockets"),
	TEXT("kvtierd", "admin_socket", KEY_SOCKET, false, false, admin_socket, "admin.sock",
	     "socket of kvtierctl; a relative path is below run_dir"),
	TEXT("kvtierd", "admin_group", KEY_NAME, false, true, admin_group, "",
	     "group that may use the admin socket; empty: the daemon's own"),
	TEXT("kvtierd", "bpf_socket", KEY_SOCKET, false, true, bpf_socket, "/run/kvtier-bpf/probes.sock",
	     "socket of kvtierd-bpf; empty: do without it"),
	GLOBAL("kvtierd", "workers", KEY_COUNT, false, workers, 0, 256, "0", "threads",
	       "threads that score, rank and copy; 0: cores - 1, at least 1"),
	GLOBAL("kvtierd", "log_level", KEY_LEVEL, true, log_level, 0, 7, "info", NULL,
	       "least urgent level that is logged: emerg, alert, crit, err, warning, notice, info, debug"),
	GLOBAL("kvtierd", "mode", KEY_OBSERVE, true, observe, 0, 1, "publish", NULL,
	       "publish plans, or observe: compute and count them only"),
	GLOBAL("kvtierd", "orphan_ttl", KEY_COUNT, true, orphan_ttl_s, 1, 86400, "60", "s",
	       "how long a sequence found after a restart waits for its client"),

	GLOBAL("dram", "size", KEY_SIZE, false, dram_size, 4 * M, 64 * T, "4G", "bytes",
	       "capacity of the DRAM tier"),
	GLOBAL("dram", "segment", KEY_SIZE, false, dram_segment, 4 * M, 64 * G, "256M", "bytes",
	       "memory is taken and given back in pieces of this size"),
	GLOBAL("dram", "free_min", KEY_SHARE, true, dram_marks.min, 0, 500, "1.0", "%",
	       "below this much free, nothing new enters: rows pass by to NVMe"),
	GLOBAL("dram", "free_low", KEY_SHARE, true, dram_marks.low, 0, 500, "5.0", "%",
	       "below this much free, the background demoter wakes"),
	GLOBAL("dram", "free_high", KEY_SHARE, true, dram_marks.high, 0, 500, "10.0", "%",
	       "the background demoter works until this much is free"),
	GLOBAL("dram", "node", KEY_NODE, false, dram_node, 0, 1023, "client", NULL,
	       "NUMA node of the memory: each client's, interleave over all, a number, or off: the kernel's "
	       "choice"),
	GLOBAL("dram", "huge_pages", KEY_BOOL, false, dram_huge, 0, 1, "yes", NULL,
	       "use huge pages where the host has them"),
	TEXT("dram", "fault", KEY_TEXT, false, true, dram_fault, "", "inject faults, for tests; empty: none"),

	GLOBAL("nvme", "enabled", KEY_BOOL, false, nvme_enabled, 0, 1, "no", NULL,
	       "have an NVMe tier; off until a disk is chosen"),
	TEXT("nvme", "path", KEY_PATH, false, false, nvme_path, "/var/lib/kvtier",
	     "directory of the container files"),
	GLOBAL("nvme", "size", KEY_SIZE, false, nvme_size, 16 * M, 64 * T, "16G", "bytes",
	       "capacity of the NVMe tier"),
	GLOBAL("nvme", "segment", KEY_SIZE, false, nvme_segment, 1 * M, 64 * M, "64M", "bytes",
	       "log segment: the unit of writing, sealing and cleaning"),
	GLOBAL("nvme", "staging", KEY_SIZE, false, nvme_staging, 2 * M, 1 * G, "32M", "bytes",
	       "registered I/O buffers"),
	GLOBAL("nvme", "free_min", KEY_SHARE, true, nvme_marks.min, 0, 500, "2.0", "%",
	       "this much stays free: below it nothing more is admitted"),
	GLOBAL("nvme", "depth", KEY_COUNT, false, nvme_depth, 1, 1024, "32", "requests", "requests in flight"),
	GLOBAL("nvme", "deadline", KEY_COUNT, false, nvme_deadline_ms, 100, 600000, "10000", "ms",
	       "a request older than this takes the tier offline"),
	GLOBAL("nvme", "io_uring", KEY_BOOL, false, nvme_io_uring, 0, 1, "yes", NULL,
	       "use io_uring; no, or where it is refused: a thread pool with the same results"),
	GLOBAL("nvme", "preallocate", KEY_BOOL, false, nvme_prealloc, 0, 1, "yes", NULL,
	       "write new container files over once, so that later writes are steady"),
	GLOBAL("nvme", "throttle", KEY_BOOL, true, nvme_throttle, 0, 1, "yes", NULL,
	       "writes back off when reads that somebody waits for become slow"),
	GLOBAL("nvme", "throttle_target", KEY_COUNT, true, nvme_throttle_ms, 1, 60000, "20", "ms",
	       "a read that takes longer halves what writes may have in flight"),
	TEXT("nvme", "fault", KEY_TEXT, false, true, nvme_fault, "", "inject faults, for tests; empty: none"),

	GLOBAL("pressure", "shrink", KEY_BOOL, true, pressure_shrink, 0, 1, "yes", NULL,
	       "give DRAM back when the host, or a cgroup of the daemon, runs short of memory"),
	TEXT("pressure", "psi", KEY_TEXT, true, false, pressure_psi, "some 150ms/2s",
	     "stalls for memory that shrink the DRAM tier by an eighth, or no"),
	GLOBAL("pressure", "reserve", KEY_SIZE, true, pressure_reserve, 0, 64 * T, "512M", "bytes",
	       "what stays available on the host; in a cgroup at most an eighth of its limit"),
	GLOBAL("pressure", "floor", KEY_SIZE, true, pressure_floor, 0, 64 * T, "64M", "bytes",
	       "what the DRAM tier may keep whatever happens"),
	GLOBAL("pressure", "deadline", KEY_COUNT, true, pressure_deadline_ms, 0, 60000, "400", "ms",
	       "what NVMe has not taken by then is dropped while memory is missing, lowest scores first"),

	TEXT("policy", "default", KEY_NAME, true, false, policy, "kvp",
	     "policy of sequences that name none; see kvtierctl policy list"),
	TEXT("policy", "fallback", KEY_NAME, true, false, fallback, "streaming",
	     "runs where the default cannot, for example without a weight file"),
	TEXT("policy", "model_dir", KEY_PATH, false, false, model_dir, KVT_DATADIR "/models",
	     "directory of weight files, MODEL.kvp"),
	GLOBAL("policy", "protect_first", KEY_COUNT, true, protect_first, 0, 65536, "4", "rows",
	       "first rows of a lane that always stay, inside the budget"),
	GLOBAL("policy", "protect_last", KEY_COUNT, true, protect_last, 0, 65536, "16", "rows",
	       "last rows of a lane that always stay, inside the budget"),
	GLOBAL("policy", "hysteresis", KEY_SHARE, true, hysteresis_permille, 0, 500, "5.0", "% of the budget",
	       "a row this close to the cut stays where it is"),
	GLOBAL("policy", "slack", KEY_COUNT, true, slack_rows, 1, 65536, "64", "rows",
	       "plan again when a lane holds this many rows above its budget"),
	GLOBAL("policy", "adaptive", KEY_SPREAD, true, adaptive, 0, 2, "no", NULL,
	       "divide uniform device budgets by what rows are worth: no, over the lanes of a sequence, or "
	       "tenant: "
	       "over its sequences too"),
	GLOBAL("policy", "seed", KEY_COUNT, false, seed, 0, UINT64_MAX, "1", NULL,
	       "seed of policies that draw random numbers"),

	GLOBAL("budget", "device", KEY_SHARE, true, budget_device, 0, 1000, "0.0", "% of the rows",
	       "default device budget; all three 0: everything stays on the device"),
	GLOBAL("budget", "dram", KEY_SHARE, true, budget_dram, 0, 1000, "0.0", "% of the rows",
	       "default DRAM budget"),
	GLOBAL("budget", "nvme", KEY_SHARE, true, budget_nvme, 0, 1000, "0.0", "% of the rows",
	       "default NVMe budget; rows past the sum of the three are dropped"),

	TEXT("metrics", "listen", KEY_TEXT, false, true, metrics_listen, "",
	     "where Prometheus reads over HTTP: a path, 127.0.0.1:PORT or [::1]:PORT; empty: nowhere"),

	TENANT("socket", KEY_SOCKET, false, false, socket, 0, 0, NULL, NULL,
	       "socket of this tenant's clients; a relative path is below run_dir"),
	TENANT("socket_mode", KEY_OCTAL, false, false, socket_mode, 0, 0777, "0660", "octal",
	       "permissions of the socket"),
	TENANT("socket_group", KEY_NAME, false, true, socket_group, 0, 0, "", NULL,
	       "group of the socket; empty: the daemon's own"),
	TENANT("max_clients_per_uid", KEY_COUNT, true, false, max_clients_per_uid, 1, 16384, "64", "clients",
	       "connections that one user may hold"),
	TENANT("max_seqs", KEY_COUNT, true, false, max_seqs, 1, 1048576, "16384", "sequences",
	       "sequences of the tenant, leased ones without a client included"),
	TENANT("max_region", KEY_SIZE, true, false, region_bytes, 1 * M, 64 * T, "64G", "bytes",
	       "exchange memory of all its clients"),
	TENANT("max_dram", KEY_QUOTA, true, false, dram_bytes, 0, 64 * T, "none", "bytes",
	       "what it may hold in the DRAM tier"),
	TENANT("max_nvme", KEY_QUOTA, true, false, nvme_bytes, 0, 64 * T, "none", "bytes",
	       "what it may hold in the NVMe tier"),
	TENANT("direct", KEY_BOOL, true, false, direct, 0, 1, "yes", NULL,
	       "let its clients' GPUs read demoted rows of their own sequences where they lie in DRAM"),
};
const unsigned config_n_keys = ARRAY_SIZE(config_keys);
_Static_assert(ARRAY_SIZE(config_keys) <= CONFIG_MAX_KEYS, "the parser keeps a line number per key");

const struct config_key *config_key_find(const char *section, const char *name)
{
	for (unsigned i = 0; i < config_n_keys; i++)
		if (!strcmp(config_keys[i].section, section) && !strcmp(config_keys[i].name, name))
			return &config_keys[i];
	return NULL;
}

bool config_section_known(const char *section)
{
	for (unsigned i = 0; i < config_n_keys; i++)
		if (!strcmp(config_keys[i].section, section))
			return true;
	return false;
}
