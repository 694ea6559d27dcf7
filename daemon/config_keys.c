/* SPDX-License-Identifier: MIT */
#include <string.h>
#include "daemon/config_keys.h"
#include "shm/util.h"

#define GLOBAL(sec, key, t, re, field, lo, hi, dflt, u, text, reason)                                          \
	{                                                                                                      \
		.section = sec, .name = key, .type = t, .reload = re, .off = offsetof(struct config, field),   \
		.size = sizeof(((struct config *)0)->field), .min = lo, .max = hi, .def = dflt, .unit = u,     \
		.doc = text, .why = reason                                                                     \
	}
#define TEXT(sec, key, t, re, may_be_empty, field, dflt, text, reason)                                         \
	{                                                                                                      \
		.section = sec, .name = key, .type = t, .reload = re, .empty = may_be_empty,                   \
		.off = offsetof(struct config, field), .size = sizeof(((struct config *)0)->field),            \
		.def = dflt, .doc = text, .why = reason                                                        \
	}
#define TENANT(key, t, re, may_be_empty, field, lo, hi, dflt, u, text, reason)                                 \
	{                                                                                                      \
		.section = "tenant", .name = key, .type = t, .reload = re, .empty = may_be_empty,              \
		.off = offsetof(struct config_tenant, field),                                                  \
		.size = sizeof(((struct config_tenant *)0)->field), .min = lo, .max = hi, .def = dflt,         \
		.unit = u, .doc = text, .why = reason                                                          \
	}

#define K (UINT64_C(1) << 10)
#define M (UINT64_C(1) << 20)
#define G (UINT64_C(1) << 30)
#define T (UINT64_C(1) << 40)

const struct config_key config_keys[] = {
	TEXT("kvtierd", "run_dir", KEY_PATH, false, false, run_dir, "/run/kvtier", "directory of the sockets",
	     "tmpfiles.d makes it at boot; change it to run a second daemon beside this one"),
	TEXT("kvtierd", "admin_socket", KEY_SOCKET, false, false, admin_socket, "admin.sock",
	     "socket of kvtierctl; a relative path is below run_dir",
	     "beside the clients' sockets, so that one directory holds them all; change it when kvtierctl runs "
	     "where that is not seen"),
	TEXT("kvtierd", "admin_group", KEY_NAME, false, true, admin_group, "",
	     "group that may use the admin socket; empty: the daemon's own",
	     "the daemon's own group may steer it until somebody names another; under systemd see "
	     "kvtierd-admin.socket"),
	TEXT("kvtierd", "bpf_socket", KEY_SOCKET, false, true, bpf_socket, "/run/kvtier-bpf/probes.sock",
	     "socket of kvtierd-bpf; empty: do without it",
	     "where kvtierd-bpf.socket listens; empty it on a host that shall not ask the kernel"),
	GLOBAL("kvtierd", "workers", KEY_COUNT, false, workers, 0, 256, "0", "threads",
	       "threads that score, rank and copy; 0: cores it may use - 1, at least 1",
	       "one core is left to the event loop; name a number where runtimes need the cores more than "
	       "plans do"),
	GLOBAL("kvtierd", "log_level", KEY_LEVEL, true, log_level, 0, 7, "info", NULL,
	       "least urgent level that is logged: emerg, alert, crit, err, warning, notice, info, debug",
	       "mutations by kvtierctl come at notice, so info shows them; debug while chasing a fault"),
	GLOBAL("kvtierd", "mode", KEY_OBSERVE, true, observe, 0, 1, "publish", NULL,
	       "publish plans, or observe: compute and count them only",
	       "a daemon that moves nothing saves nothing; observe is good for a first week beside a runtime "
	       "that you know"),
	GLOBAL("kvtierd", "orphan_ttl", KEY_COUNT, true, orphan_ttl_s, 1, 86400, "60", "s",
	       "how long a sequence found after a restart waits for its client",
	       "a minute covers a runtime's restart; longer keeps disk and DRAM for clients that come back "
	       "late"),

	GLOBAL("dram", "size", KEY_SIZE, false, dram_size, 4 * M, 64 * T, "4G", "bytes",
	       "capacity of the DRAM tier",
	       "small enough for any host that serves a model, and memory is taken only as rows arrive; raise "
	       "it to what the host can spare"),
	GLOBAL("dram", "segment", KEY_SIZE, false, dram_segment, 4 * M, 64 * G, "256M", "bytes",
	       "memory is taken and given back in pieces of this size",
	       "smaller ones come back to the system sooner, larger ones cost fewer descriptors; change it "
	       "with sizes far from 4G"),
	GLOBAL("dram", "free_min", KEY_SHARE, true, dram_marks.min, 0, 500, "1.0", "%",
	       "below this much free, nothing new enters: rows pass by to NVMe",
	       "room for pages that moves in flight still fill; raise it when bursts find the tier full"),
	GLOBAL("dram", "free_low", KEY_SHARE, true, dram_marks.low, 0, 500, "5.0", "%",
	       "below this much free, the background demoter wakes",
	       "the distance to free_min is what one burst may take before the demoter has made room; raise it "
	       "for larger bursts"),
	GLOBAL("dram", "free_high", KEY_SHARE, true, dram_marks.high, 0, 500, "10.0", "%",
	       "the background demoter works until this much is free",
	       "the demoter then works in stretches and not for every page; nearer to free_low keeps more rows "
	       "in DRAM"),
	GLOBAL("dram", "node", KEY_NODE, false, dram_node, 0, 1023, "client", NULL,
	       "NUMA node of the memory: each client's, interleave over all, a number, or off: the kernel's "
	       "choice",
	       "a copy within a node is the fastest; interleave when clients move between nodes, it is never "
	       "the worst choice"),
	GLOBAL("dram", "huge_pages", KEY_BOOL, false, dram_huge, 0, 1, "yes", NULL,
	       "use huge pages where the host has them",
	       "copies take fewer TLB misses where vm.nr_hugepages reserved some, elsewhere nothing changes; "
	       "no leaves them to others"),
	TEXT("dram", "fault", KEY_TEXT, false, true, dram_fault, "", "inject faults, for tests; empty: none",
	     "rows of a real host are never damaged on purpose; set it in tests only"),

	GLOBAL("nvme", "enabled", KEY_BOOL, false, nvme_enabled, 0, 1, "no", NULL,
	       "have an NVMe tier; off until a disk is chosen",
	       "the first start writes size bytes with preallocate, which nobody should meet unasked; yes when "
	       "path is on the right disk"),
	TEXT("nvme", "path", KEY_PATH, false, false, nvme_path, "/var/lib/kvtier",
	     "directory of the container files",
	     "StateDirectory= of the unit makes it writable; elsewhere the unit needs ReadWritePaths= in a "
	     "drop-in"),
	GLOBAL("nvme", "size", KEY_SIZE, false, nvme_size, 16 * M, 64 * T, "16G", "bytes",
	       "capacity of the NVMe tier",
	       "four times the DRAM tier, and fits most system disks; raise it to what the disk can spare"),
	GLOBAL("nvme", "segment", KEY_SIZE, false, nvme_segment, 1 * M, 64 * M, "64M", "bytes",
	       "log segment: the unit of writing, sealing and cleaning",
	       "large enough that writes are sequential, small enough that cleaning one is not a burst; less "
	       "on slow disks"),
	GLOBAL("nvme", "staging", KEY_SIZE, false, nvme_staging, 2 * M, 1 * G, "32M", "bytes",
	       "registered I/O buffers",
	       "it is locked memory, and what depth requests of a page need; raise it with depth"),
	GLOBAL("nvme", "free_min", KEY_SHARE, true, nvme_marks.min, 0, 500, "2.0", "%",
	       "this much stays free: below it nothing more is admitted",
	       "the file system and the cleaner's reserve stay out of reach of a burst; raise it where "
	       "restarts must find room at once"),
	GLOBAL("nvme", "depth", KEY_COUNT, false, nvme_depth, 1, 1024, "32", "requests", "requests in flight",
	       "enough to keep one NVMe drive busy, where more only adds waiting; raise it for several drives "
	       "in one volume"),
	GLOBAL("nvme", "deadline", KEY_COUNT, false, nvme_deadline_ms, 100, 600000, "10000", "ms",
	       "a request older than this takes the tier offline",
	       "a drive that hangs must not hang the daemon, and healthy ones answer far sooner; raise it for "
	       "network storage"),
	GLOBAL("nvme", "io_uring", KEY_BOOL, false, nvme_io_uring, 0, 1, "yes", NULL,
	       "use io_uring; no, or where it is refused: a thread pool with the same results",
	       "one system call for many requests; no where a policy of the host forbids it, with the same "
	       "results"),
	GLOBAL("nvme", "preallocate", KEY_BOOL, false, nvme_prealloc, 0, 1, "yes", NULL,
	       "write new container files over once, so that later writes are steady",
	       "the file system never has to find space or convert extents later; no to start at once, with "
	       "unsteadier writes"),
	GLOBAL("nvme", "throttle", KEY_BOOL, true, nvme_throttle, 0, 1, "yes", NULL,
	       "writes back off when reads that somebody waits for become slow",
	       "somebody waits for a read and nobody for a write; no when demoting fast matters more than "
	       "reads"),
	GLOBAL("nvme", "throttle_target", KEY_COUNT, true, nvme_throttle_ms, 1, 60000, "20", "ms",
	       "a read that takes longer halves what writes may have in flight",
	       "far above a healthy drive's read and below what a user notices; lower it for drives that are "
	       "steady"),
	TEXT("nvme", "fault", KEY_TEXT, false, true, nvme_fault, "", "inject faults, for tests; empty: none",
	     "rows of a real host are never damaged on purpose; set it in tests only"),

	GLOBAL("pressure", "shrink", KEY_BOOL, true, pressure_shrink, 0, 1, "yes", NULL,
	       "give DRAM back when the host, or a cgroup of the daemon, runs short of memory",
	       "a cache that is given back costs time, an OOM kill costs the service; no where DRAM is set "
	       "aside for the tier"),
	TEXT("pressure", "psi", KEY_TEXT, true, false, pressure_psi, "some 150ms/2s",
	     "stalls for memory that shrink the DRAM tier by an eighth, or no",
	     "tasks that stall 7.5 % of the time for memory feel it, and 2 s windows need no privilege; no to "
	     "act on reserve alone"),
	GLOBAL("pressure", "reserve", KEY_SIZE, true, pressure_reserve, 0, 64 * T, "512M", "bytes",
	       "what stays available on the host; in a cgroup at most an eighth of its limit",
	       "what a host needs to start a process or two without reclaim; raise it where other services "
	       "grow fast"),
	GLOBAL("pressure", "floor", KEY_SIZE, true, pressure_floor, 0, 64 * T, "64M", "bytes",
	       "what the DRAM tier may keep whatever happens",
	       "what moves in flight need to end; raise it when rows in DRAM matter more than the host's "
	       "comfort"),
	GLOBAL("pressure", "deadline", KEY_COUNT, true, pressure_deadline_ms, 0, 60000, "400", "ms",
	       "what NVMe has not taken by then is dropped while memory is missing, lowest scores first",
	       "memory has to come back soon, and most of it without a loss; raise it with a slow disk"),

	TEXT("policy", "default", KEY_NAME, true, false, policy, "kvp",
	     "policy of sequences that name none; see kvtierctl policy list",
	     "learned for each head of the model; name another when its figures for your model are better"),
	TEXT("policy", "fallback", KEY_NAME, true, false, fallback, "streaming",
	     "runs where the default cannot, for example without a weight file",
	     "measured best of those that need no weights; change it after make bench-policies on your model"),
	TEXT("policy", "model_dir", KEY_PATH, false, false, model_dir, KVT_DATADIR "/models",
	     "directory of weight files, MODEL.kvp",
	     "where packages put weight files, which only root may write; change it to try files of your own"),
	GLOBAL("policy", "protect_first", KEY_COUNT, true, protect_first, 0, 65536, "4", "rows",
	       "first rows of a lane that always stay, inside the budget",
	       "attention sinks: models break without the first few rows; raise it for a system prompt that "
	       "must stay"),
	GLOBAL("policy", "protect_last", KEY_COUNT, true, protect_last, 0, 65536, "16", "rows",
	       "last rows of a lane that always stay, inside the budget",
	       "the running sentence is always asked for next; raise it for models with a sliding window"),
	GLOBAL("policy", "hysteresis", KEY_SHARE, true, hysteresis_permille, 0, 500, "5.0", "% of the budget",
	       "a row this close to the cut stays where it is",
	       "rows must not swing between tiers for noise in their scores; 0 follows the scores exactly, "
	       "with more copying"),
	GLOBAL("policy", "slack", KEY_COUNT, true, slack_rows, 1, 65536, "64", "rows",
	       "plan again when a lane holds this many rows above its budget",
	       "fewer plans against a tighter budget; lower it where device memory is the bottleneck"),
	GLOBAL("policy", "adaptive", KEY_SPREAD, true, adaptive, 0, 2, "no", NULL,
	       "divide uniform device budgets by what rows are worth: no, over the lanes of a sequence, or "
	       "tenant: over its sequences too",
	       "it needs calibrated scores and a runtime whose heads may differ in length; lanes where you "
	       "have both"),
	GLOBAL("policy", "seed", KEY_COUNT, false, seed, 0, UINT64_MAX, "1", NULL,
	       "seed of policies that draw random numbers",
	       "fixed, so that a decision can be repeated; change it to see how much chance decides"),

	GLOBAL("budget", "device", KEY_SHARE, true, budget_device, 0, 1000, "0.0", "% of the rows",
	       "default device budget; all three 0: everything stays on the device",
	       "only the runtime knows what it can spare, so rows stay until somebody says so; set it for "
	       "runtimes that say nothing"),
	GLOBAL("budget", "dram", KEY_SHARE, true, budget_dram, 0, 1000, "0.0", "% of the rows",
	       "default DRAM budget",
	       "as for device: without a device budget nothing is demoted; set it together with device"),
	GLOBAL("budget", "nvme", KEY_SHARE, true, budget_nvme, 0, 1000, "0.0", "% of the rows",
	       "default NVMe budget; rows past the sum of the three are dropped",
	       "as for device; raise the three to 100 in all when nothing may be dropped"),

	TEXT("metrics", "listen", KEY_TEXT, false, true, metrics_listen, "",
	     "where Prometheus reads over HTTP: a path, 127.0.0.1:PORT or [::1]:PORT; empty: nowhere",
	     "what is counted is nobody else's business until asked for; under the unit enable "
	     "kvtierd-metrics.socket instead"),

	TENANT("socket", KEY_SOCKET, false, false, socket, 0, 0, NULL, NULL,
	       "socket of this tenant's clients; a relative path is below run_dir",
	       "one socket is one tenant: whoever can connect is in it; change it to where that tenant's "
	       "containers can see it"),
	TENANT("socket_mode", KEY_OCTAL, false, false, socket_mode, 0, 0777, "0660", "octal",
	       "permissions of the socket",
	       "owner and group and nobody else; under systemd see kvtierd.socket"),
	TENANT("socket_group", KEY_NAME, false, true, socket_group, 0, 0, "", NULL,
	       "group of the socket; empty: the daemon's own",
	       "the daemon's own group is let in and nobody else; name the group that runtimes of this tenant "
	       "run under"),
	TENANT("max_clients_per_uid", KEY_COUNT, true, false, max_clients_per_uid, 1, 16384, "64", "clients",
	       "connections that one user may hold",
	       "one user cannot lock the others out; raise it for hosts with many runtimes under one user"),
	TENANT("max_seqs", KEY_COUNT, true, false, max_seqs, 1, 1048576, "16384", "sequences",
	       "sequences of the tenant, leased ones without a client included",
	       "bounds the index, far above what one host serves at a time; lower it for tenants that you do "
	       "not trust"),
	TENANT("max_region", KEY_SIZE, true, false, region_bytes, 1 * M, 64 * T, "64G", "bytes",
	       "exchange memory of all its clients",
	       "physical memory appears on use, so it may exceed the host's; lower it to bound what one "
	       "tenant's runtimes can take"),
	TENANT("max_dram", KEY_QUOTA, true, false, dram_bytes, 0, 64 * T, "none", "bytes",
	       "what it may hold in the DRAM tier",
	       "one tenant may use the whole tier; set it as soon as there are two"),
	TENANT("max_nvme", KEY_QUOTA, true, false, nvme_bytes, 0, 64 * T, "none", "bytes",
	       "what it may hold in the NVMe tier",
	       "one tenant may use the whole tier; set it as soon as there are two"),
	TENANT("direct", KEY_BOOL, true, false, direct, 0, 1, "yes", NULL,
	       "let its clients' GPUs read demoted rows of their own sequences where they lie in DRAM",
	       "GPUs then read demoted rows without a copy; no for tenants whose processes may keep mappings "
	       "of memory that others need"),
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
