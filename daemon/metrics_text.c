/* SPDX-License-Identifier: MIT */
/*
 * What Prometheus is told: the table, and the table as text. Labels are tiers and reasons only, so the number
 * of series does not depend on who uses the daemon.
 */
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "daemon/metrics.h"
#include "shm/util.h"

/* Buckets that are told apart: from 1 us to 2 min, and up to 2 M rows. The rest is in the first and in +Inf. */
#define NS_FIRST 9u
#define NS_LAST 36u
#define ROWS_LAST 20u

#define FIELD(f) .off = offsetof(struct core_stat, f), .size = sizeof(((struct core_stat *)0)->f)
#define ROW(t, u, n, f, h)                                                                                     \
	{                                                                                                      \
		.name = "kvtier_" n, .help = h, .type = METRIC_##t, .unit = METRIC_##u, FIELD(f)               \
	}
#define LABELLED(t, u, n, l, v, f, h)                                                                          \
	{                                                                                                      \
		.name = "kvtier_" n, .help = h, .label = l, .value = v, .type = METRIC_##t,                    \
		.unit = METRIC_##u, FIELD(f)                                                                   \
	}
/* A field of each tier below the device, of each tier; MEMBER names it by tier. */
#define AT_DRAM(t, u, n, f, h) LABELLED(t, u, n, "tier", "dram", f, h)
#define AT_NVME(t, u, n, f, h) LABELLED(t, u, n, "tier", "nvme", f, h)
#define STAT(t, u, n, f, h)                                                                                    \
	AT_DRAM(t, u, n, tier[KVT_TIER_DRAM].f, h), AT_NVME(t, u, n, tier[KVT_TIER_NVME].f, h)
#define LOWER(t, u, n, f, h) AT_DRAM(t, u, n, f[KVT_TIER_DRAM], h), AT_NVME(t, u, n, f[KVT_TIER_NVME], h)
#define TIERS(t, u, n, f, h) LABELLED(t, u, n, "tier", "device", f[KVT_TIER_DEVICE], h), LOWER(t, u, n, f, h)
#define MISS(reason, f)                                                                                        \
	LABELLED(COUNTER, ONE, "misses_total", "reason", reason, f,                                            \
		 "Rows' pages that could not be given back, by cause.")

const struct metric metrics_table[] = {
	ROW(GAUGE, NS, "uptime_seconds", uptime_ns, "Time since the daemon started."),
	ROW(GAUGE, ONE, "clients", clients, "Connected runtimes."),
	ROW(GAUGE, ONE, "sequences", seqs, "Sequences known."),
	ROW(GAUGE, ONE, "sequences_orphaned", orphans,
	    "Sequences found after a restart that wait for a client."),
	ROW(GAUGE, ONE, "models", models, "Models registered."),
	TIERS(GAUGE, ONE, "rows", rows, "Rows whose best copy is in the tier."),
	TIERS(GAUGE, ONE, "tier_bytes", bytes, "Bytes of rows in the tier."),
	TIERS(COUNTER, ONE, "rows_demoted_total", rows_demoted, "Rows moved down into the tier."),
	TIERS(COUNTER, ONE, "rows_promoted_total", rows_promoted,
	      "Rows moved up out of the tier; device: into it."),
	TIERS(COUNTER, ONE, "refaults_total", refaults, "Rows wanted back from the tier soon after they left."),
	ROW(COUNTER, ONE, "rows_dropped_total", rows_dropped, "Rows that no tier kept."),

	STAT(GAUGE, ONE, "tier_capacity_bytes", capacity, "Size of the tier; 0: there is none."),
	STAT(GAUGE, ONE, "tier_used_bytes", used, "Bytes that pages take, padding included."),
	STAT(GAUGE, ONE, "tier_free_bytes", free, "Bytes free for pages."),
	STAT(GAUGE, ONE, "tier_overhead_bytes", overhead, "Headers, footers and buffers of the tier."),
	AT_DRAM(GAUGE, PERMILLE, "tier_free_min_ratio", marks[KVT_TIER_DRAM].min,
		"Free share below which nothing new enters."),
	AT_NVME(GAUGE, PERMILLE, "tier_free_min_ratio", marks[KVT_TIER_NVME].min,
		"Free share below which nothing new enters."),
	AT_DRAM(GAUGE, PERMILLE, "tier_free_low_ratio", marks[KVT_TIER_DRAM].low,
		"Free share below which the background demoter wakes."),
	AT_DRAM(GAUGE, PERMILLE, "tier_free_high_ratio", marks[KVT_TIER_DRAM].high,
		"Free share up to which the background demoter works."),
	STAT(COUNTER, ONE, "tier_reads_total", reads, "Pages read from the tier."),
	STAT(COUNTER, ONE, "tier_writes_total", writes, "Pages written to the tier."),
	STAT(COUNTER, ONE, "tier_read_bytes_total", read_bytes, "Bytes of pages read from the tier."),
	STAT(COUNTER, ONE, "tier_written_bytes_total", write_bytes, "Bytes of pages written to the tier."),
	STAT(COUNTER, ONE, "tier_device_written_bytes_total", device_write_bytes,
	     "Bytes sent to the medium; over tier_written_bytes_total: write amplification."),
	STAT(COUNTER, ONE, "tier_errors_total", errors, "Requests to the tier that failed."),
	STAT(GAUGE, ONE, "tier_requests_in_flight", inflight, "Requests that the tier has not answered."),
	STAT(GAUGE, ONE, "tier_leaked_bytes", leaked_bytes, "Bytes given up for requests that never ended."),
	STAT(COUNTER, ONE, "tier_cleaned_segments_total", cleaned_segments,
	     "Segments emptied to be written anew."),
	AT_DRAM(GAUGE, ONE, "tier_published_bytes", tier[KVT_TIER_DRAM].published,
		"Bytes of segments that clients' GPUs read."),
	AT_DRAM(GAUGE, ONE, "tier_revoked_bytes", tier[KVT_TIER_DRAM].revoked,
		"Of the published bytes, what clients were asked to let go of."),
	AT_DRAM(GAUGE, ONE, "tier_revoked_kept_bytes", tier[KVT_TIER_DRAM].late,
		"Of those, what they keep although their time is over."),
	AT_DRAM(GAUGE, ONE, "tier_published_held_bytes", tier[KVT_TIER_DRAM].held,
		"Of the published bytes, what no page takes."),
	AT_DRAM(GAUGE, ONE, "tier_resident_bytes", tier[KVT_TIER_DRAM].resident,
		"Bytes of the host's memory that it holds."),
	STAT(GAUGE, FLAG, "tier_offline", offline, "1: a deadline passed, the tier takes no new work."),
	AT_DRAM(GAUGE, FLAG, "tier_huge_pages", tier[KVT_TIER_DRAM].huge,
		"1: the tier's memory is huge pages."),
	AT_NVME(GAUGE, FLAG, "tier_io_uring", tier[KVT_TIER_NVME].io_uring, "1: io_uring, 0: the thread pool."),
	AT_DRAM(GAUGE, NODE, "tier_numa_node", tier[KVT_TIER_DRAM].node,
		"NUMA node of the memory, -1: several; see dram_node_."),
	LOWER(GAUGE, ONE, "tier_returned_bytes", returned,
	      "Bytes of pages of an earlier life that the start believed."),
	LOWER(HISTOGRAM, NS, "tier_read_duration_seconds", read_ns,
	      "Reads of pages, from submission until the event loop knew the result."),
	LOWER(HISTOGRAM, NS, "tier_write_duration_seconds", write_ns,
	      "Writes of pages, from submission until the event loop knew the result."),
	LOWER(HISTOGRAM, ONE, "refault_distance_rows", refault_rows,
	      "Rows that a sequence grew by between a refaulting row's leaving and its return."),

	LOWER(GAUGE, ONE, "tier_limbo_bytes", limbo_bytes,
	      "Bytes moved to NVMe that no seal covers yet, by where their sources wait for it."),
	ROW(COUNTER, ONE, "limbo_seals_total", limbo_seals,
	    "Times that segments of NVMe were sealed before they were full, for what waited in limbo."),
	ROW(COUNTER, ONE, "limbo_let_go_bytes_total", limbo_let_go_bytes,
	    "Bytes moved to NVMe whose sources went before a seal covered them."),

	ROW(COUNTER, ONE, "plans_total", plans, "Plans decided."),
	ROW(COUNTER, ONE, "plans_acked_total", plans_acked, "Plans that clients applied."),
	ROW(COUNTER, ONE, "plans_cancelled_total", plans_cancelled, "Plans taken back."),
	ROW(COUNTER, ONE, "plans_nacked_total", plans_nacked, "Plans that clients applied in part."),
	ROW(HISTOGRAM, NS, "plan_duration_seconds", plan_ns, "Plans, from their beginning to the decision."),
	ROW(HISTOGRAM, NS, "plan_decide_duration_seconds", decide_ns,
	    "The decision's part of plans, its wait for a worker included."),
	MISS("corrupt", miss_corrupt),
	MISS("client_mutated", miss_client_mutated),
	MISS("io", miss_io),
	MISS("stale", miss_stale),
	MISS("nospace", miss_nospace),
	ROW(COUNTER, ONE, "recalls_total", recalls, "Searches among demoted rows."),
	ROW(COUNTER, ONE, "rows_recalled_total", rows_recalled, "Rows copied out for searches."),
	ROW(COUNTER, ONE, "direct_demotions_total", direct_demotions,
	    "Pages written past a full DRAM tier straight to NVMe."),
	ROW(COUNTER, ONE, "protocol_hangups_total", hangups_protocol, "Clients cut off for what they sent."),
	ROW(COUNTER, ONE, "admin_mutations_total", admin_mutations, "Changes made with kvtierctl."),
	ROW(GAUGE, ONE, "index_bytes", index_bytes, "Memory of the index of rows and pages."),
	ROW(GAUGE, ONE, "staging_bytes", staging_bytes, "Memory of the I/O buffers."),
	ROW(GAUGE, ONE, "plan_bytes", plan_bytes, "Memory of published plans."),
	ROW(GAUGE, ONE, "directory_bytes", directory_bytes, "Memory of directories of published pages."),
	ROW(GAUGE, ONE, "worker_jobs", worker_jobs, "Jobs given to the workers that are not done."),
	ROW(GAUGE, ONE, "page_requests", page_requests, "Pages on their way between the daemon and a tier."),
	ROW(GAUGE, NS, "loop_slice_max_seconds", loop_max_ns,
	    "Longest slice of the event loop since the start."),
	ROW(GAUGE, NS, "loop_slice_recent_max_seconds", loop_recent_max_ns,
	    "Longest slice of the event loop in the last second or two."),
	ROW(GAUGE, NS, "loop_slice_cpu_max_seconds", loop_cpu_max_ns,
	    "The same since the start by the loop's own processor time; 0: none was long."),
	ROW(GAUGE, NS, "loop_slice_cpu_recent_max_seconds", loop_cpu_recent_max_ns,
	    "The same in the last second or two."),
	ROW(GAUGE, FLAG, "throttle_enabled", throttle_on,
	    "1: writes to NVMe back off when reads that somebody waits for are slow."),
	ROW(GAUGE, ONE, "throttle_window_bytes", throttle_window_bytes,
	    "Bytes of writes to NVMe that may be in flight now."),
	ROW(COUNTER, ONE, "throttle_waits_total", throttle_waits, "Writes to NVMe that waited for the window."),
	ROW(COUNTER, ONE, "throttle_cuts_total", throttle_cuts,
	    "Times that slow reads, slow writes or a slow disk made the window smaller."),
	ROW(COUNTER, ONE, "throttle_disk_cuts_total", throttle_disk_cuts,
	    "Times that only the disk, as the kernel sees it, made the window smaller."),
	ROW(COUNTER, ONE, "throttle_cleaner_bytes_total", throttle_cleaner_bytes,
	    "Bytes that the NVMe tier's cleaner was let copy, in turn with other writes."),
	ROW(GAUGE, FLAG, "throttle_by_disk", throttle_disk,
	    "1: the throttle goes by the disk as the kernel sees it, too; 0: by the tier's own I/O alone."),
	ROW(GAUGE, NS, "throttle_disk_read_seconds", throttle_disk_read_ns,
	    "Mean of the disk's reads, everybody's, when the throttle last looked."),
	ROW(GAUGE, NS, "throttle_disk_write_seconds", throttle_disk_write_ns,
	    "Mean of the disk's writes, everybody's, when the throttle last looked."),
	ROW(GAUGE, NS, "throttle_disk_wait_seconds", throttle_disk_wait_ns,
	    "What a new request would have waited for in the disk's queue when the throttle last looked."),
	ROW(COUNTER, ONE, "throttle_delayed_bytes_total", throttle_delayed_bytes,
	    "Bytes written to NVMe below the full window."),
	ROW(GAUGE, FLAG, "pressure_enabled", pressure_on,
	    "1: the DRAM tier gives memory back before the host runs out."),
	ROW(GAUGE, FLAG, "pressure_squeezed", squeezed,
	    "1: memory pressure holds the DRAM tier below its size."),
	ROW(GAUGE, ONE, "dram_limit_bytes", dram_limit, "Bytes that the DRAM tier may hold now."),
	ROW(GAUGE, ONE, "memory_missing_bytes", memory_missing, "Bytes missing on the host or in a cgroup."),
	ROW(COUNTER, ONE, "squeezes_total", squeezes,
	    "Times that memory pressure made the DRAM tier give back."),
	ROW(COUNTER, ONE, "psi_events_total", psi_events, "Memory pressure events from the kernel."),
	ROW(COUNTER, ONE, "reclaim_events_total", reclaim_events,
	    "Times that the BPF programs counted as much time in reclaim as a memory pressure event takes."),
	ROW(GAUGE, NS, "squeeze_last_seconds", squeeze_ns_last,
	    "The last squeeze, from trigger to memory returned."),
	ROW(GAUGE, NS, "squeeze_max_seconds", squeeze_ns_max,
	    "The longest squeeze, from trigger to memory returned."),
	ROW(COUNTER, ONE, "revokes_total", revokes, "Times that published segments were asked back."),
	ROW(COUNTER, ONE, "revoke_returned_bytes_total", revoke_returned_bytes,
	    "Bytes of published memory given back to the host."),
	ROW(COUNTER, ONE, "squeeze_returned_bytes_total", squeeze_returned_bytes,
	    "Bytes returned in pieces of 2 MiB."),
	ROW(COUNTER, ONE, "squeeze_copied_bytes_total", squeeze_copied_bytes,
	    "Bytes copied to empty memory for squeezes."),
	ROW(COUNTER, ONE, "squeeze_demoted_bytes_total", squeeze_demoted_bytes,
	    "Bytes moved to NVMe for squeezes."),
	ROW(COUNTER, ONE, "squeeze_dropped_bytes_total", squeeze_dropped_bytes, "Bytes dropped for squeezes."),
	ROW(COUNTER, ONE, "squeeze_dropped_rows_total", squeeze_dropped_rows, "Rows dropped for squeezes."),
	ROW(COUNTER, ONE, "node_fallbacks_total", node_fallbacks,
	    "Pages that found no room on their client's NUMA node."),
	ROW(COUNTER, ONE, "migrated_pages_total", migrated_pages, "Pages copied to their client's NUMA node."),
	ROW(COUNTER, ONE, "migrated_bytes_total", migrated_bytes, "Bytes copied to their client's NUMA node."),
	ROW(GAUGE, FLAG, "dram_kept", kept, "1: the DRAM tier outlives the process."),
	ROW(GAUGE, FLAG, "observing", observe, "1: plans are computed and not published."),
	ROW(GAUGE, FLAG, "frozen", frozen, "1: an operator froze all rows where they are."),
	ROW(GAUGE, FLAG, "draining", draining, "1: the daemon is about to end."),
};
const unsigned metrics_n = ARRAY_SIZE(metrics_table);

#define PROBE(t, u, n, f, h)                                                                                   \
	{                                                                                                      \
		.name = "kvtier_" n, .help = h, .type = METRIC_##t, .unit = METRIC_##u,                        \
		.off = offsetof(struct probes_stat, f), .size = sizeof(((struct probes_stat *)0)->f)           \
	}
const struct metric metrics_probes[] = {
	PROBE(GAUGE, FLAG, "bpf_up", on,
	      "1: kvtierd-bpf.service is connected; else what it counts stands still."),
	PROBE(COUNTER, ONE, "bpf_lost_events_total", lost, "Events that the BPF programs had no room for."),
	PROBE(GAUGE, ONE, "bpf_untracked_processes", untracked, "Clients' processes that found no slot."),
	PROBE(HISTOGRAM, NS, "disk_read_duration_seconds", disk_read,
	      "Reads of the NVMe tier's device, from issue to completion, as the kernel saw them."),
	PROBE(HISTOGRAM, NS, "disk_write_duration_seconds", disk_write,
	      "Writes to the NVMe tier's device, from issue to completion, as the kernel saw them."),
	PROBE(GAUGE, ONE, "disk_requests_in_flight", disk_inflight, "Requests at the NVMe tier's device."),
	PROBE(HISTOGRAM, NS, "io_uring_duration_seconds", uring,
	      "The daemon's io_uring, submission to completion."),
	PROBE(HISTOGRAM, NS, "reclaim_duration_seconds", reclaim,
	      "Direct reclaim that the daemon and its clients waited for."),
	PROBE(HISTOGRAM, NS, "major_fault_duration_seconds", fault,
	      "Major page faults of the daemon and its clients."),
	PROBE(HISTOGRAM, NS, "sched_delay_seconds", sched,
	      "Time that clients' threads were runnable and did not run."),
};
const unsigned metrics_n_probes = ARRAY_SIZE(metrics_probes);

#define LEFT_OUT(f, text)                                                                                      \
	{                                                                                                      \
		FIELD(f), text                                                                                 \
	}
const struct metric_left_out metrics_left_out[] = {
	LEFT_OUT(plan_ns_last, "one sample says nothing between two scrapes"),
	LEFT_OUT(plan_ns_max, "never falls; the histogram's quantiles do"),
	LEFT_OUT(plan_ns_total, "the sum of plan_ns"),
	LEFT_OUT(tier[KVT_TIER_DEVICE], "the device tier is the clients' memory"),
	LEFT_OUT(marks[KVT_TIER_DEVICE], "the device tier has budgets, not marks"),
	LEFT_OUT(marks[KVT_TIER_NVME].low, "equal to min"),
	LEFT_OUT(marks[KVT_TIER_NVME].high, "equal to min"),
	LEFT_OUT(returned[KVT_TIER_DEVICE], "nothing of the device outlives its client"),
	LEFT_OUT(limbo_bytes[KVT_TIER_DEVICE], "sources on the device are the clients'"),
	LEFT_OUT(read_ns[KVT_TIER_DEVICE], "no pages there"),
	LEFT_OUT(write_ns[KVT_TIER_DEVICE], "no pages there"),
	LEFT_OUT(refault_rows[KVT_TIER_DEVICE], "rows refault from below"),
	LEFT_OUT(tier[KVT_TIER_NVME].published, "published memory is DRAM"),
	LEFT_OUT(tier[KVT_TIER_NVME].revoked, "published memory is DRAM"),
	LEFT_OUT(tier[KVT_TIER_NVME].late, "published memory is DRAM"),
	LEFT_OUT(tier[KVT_TIER_NVME].held, "published memory is DRAM"),
	LEFT_OUT(tier[KVT_TIER_NVME].huge, "a matter of memory"),
	LEFT_OUT(tier[KVT_TIER_DRAM].io_uring, "a matter of disks"),
	LEFT_OUT(tier[KVT_TIER_NVME].node, "a matter of memory"),
	LEFT_OUT(tier[KVT_TIER_DRAM].note, "a line for people: kvtierctl status"),
	LEFT_OUT(tier[KVT_TIER_NVME].note, "a line for people: kvtierctl status"),
	LEFT_OUT(tier[KVT_TIER_NVME].resident, "a matter of memory"),
	LEFT_OUT(tier[KVT_TIER_DRAM].place_err, "a line for people: kvtierctl status"),
	LEFT_OUT(tier[KVT_TIER_DRAM].nodes, "as many as there are series of dram_node_capacity_bytes"),
	LEFT_OUT(tier[KVT_TIER_DRAM].at, "series of their own, by node"),
	LEFT_OUT(tier[KVT_TIER_NVME].place_err, "a matter of memory"),
	LEFT_OUT(tier[KVT_TIER_NVME].nodes, "a matter of memory"),
	LEFT_OUT(tier[KVT_TIER_NVME].at, "a matter of memory"),
	LEFT_OUT(numa, "a line for people: kvtierctl status"),
	LEFT_OUT(throttle_by, "a line for people: kvtierctl status"),
	LEFT_OUT(reclaim, "a line for people: kvtierctl status"),
	LEFT_OUT(psi, "a line for people: kvtierctl status"),
	LEFT_OUT(policy, "a label of kvtier_policy_info"),
};
const unsigned metrics_n_left_out = ARRAY_SIZE(metrics_left_out);

/* ---- as text --------------------------------------------------------------------------- */

struct text {
	char *buf;
	size_t n, cap;
	bool failed;
};

static void __attribute__((format(printf, 2, 3))) put(struct text *t, const char *fmt, ...)
{
	va_list ap;
	int n;

	if (t->cap - t->n < 1024) {
		char *buf = realloc(t->buf, t->cap + 65536);

		t->failed |= !buf;
		if (!buf)
			return;
		t->buf = buf;
		t->cap += 65536;
	}
	va_start(ap, fmt);
	n = vsnprintf(t->buf + t->n, t->cap - t->n, fmt, ap);
	va_end(ap);
	if (n < 0 || (size_t)n >= t->cap - t->n)
		t->failed = true; /* a line of the table is longer than any may be */
	else
		t->n += (size_t)n;
}

static double in_base_unit(const struct metric *m, uint64_t v)
{
	return m->unit == METRIC_NS ? (double)v / 1e9 : (double)v;
}

/* What goes between the braces, `more` behind it; nothing at all: no braces. */
static void put_labels(struct text *t, const struct metric *m, const char *more)
{
	if (!m->label && !*more)
		return;
	put(t, "{");
	if (m->label)
		put(t, "%s=\"%s\"%s", m->label, m->value, *more ? "," : "");
	put(t, "%s}", more);
}

static void put_bucket(struct text *t, const struct metric *m, const char *le, uint64_t n)
{
	char more[48];

	snprintf(more, sizeof(more), "le=\"%s\"", le);
	put(t, "%s_bucket", m->name);
	put_labels(t, m, more);
	put(t, " %" PRIu64 "\n", n);
}

/* le: the largest value of a bucket, so that the counts are exact. */
static void put_histogram(struct text *t, const struct metric *m, const struct histogram *h)
{
	unsigned first = m->unit == METRIC_NS ? NS_FIRST : 0, last = m->unit == METRIC_NS ? NS_LAST : ROWS_LAST;
	uint64_t below = 0;
	char le[32];

	for (unsigned i = 0; i < HISTOGRAM_BUCKETS; i++) {
		below += h->bucket[i];
		if (i < first || i > last)
			continue;
		snprintf(le, sizeof(le), "%.12g", in_base_unit(m, (UINT64_C(2) << i) - 1));
		put_bucket(t, m, le, below);
	}
	put_bucket(t, m, "+Inf", below);
	put(t, "%s_sum", m->name);
	put_labels(t, m, "");
	put(t, " %.15g\n%s_count", in_base_unit(m, h->sum), m->name);
	put_labels(t, m, "");
	put(t, " %" PRIu64 "\n", below);
}

static void put_sample(struct text *t, const struct metric *m, const void *field)
{
	uint64_t v = 0;

	if (m->type == METRIC_HISTOGRAM) {
		put_histogram(t, m, field);
		return;
	}
	memcpy(&v, field, m->size); /* little-endian, checked in shm/util.h */
	put(t, "%s", m->name);
	put_labels(t, m, "");
	if (m->unit == METRIC_NS)
		put(t, " %" PRIu64 ".%09" PRIu64 "\n", v / 1000000000u, v % 1000000000u);
	else if (m->unit == METRIC_PERMILLE)
		put(t, " %" PRIu64 ".%03" PRIu64 "\n", v / 1000, v % 1000);
	else if (m->unit == METRIC_NODE)
		put(t, " %d\n", (int)v);
	else
		put(t, " %" PRIu64 "\n", v);
}

static void put_head(struct text *t, const char *name, const char *help, const char *type)
{
	put(t, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, type);
}

static void put_table(struct text *t, const struct metric *table, unsigned n, const void *base)
{
	static const char *const types[] = {"counter", "gauge", "histogram"};

	for (unsigned i = 0; i < n; i++) {
		const struct metric *m = &table[i];

		if (!i || strcmp(m->name, m[-1].name))
			put_head(t, m->name, m->help, types[m->type]);
		put_sample(t, m, (const char *)base + m->off);
	}
}

/* The number of nodes is the host's: a label that no client can add to. */
static void put_nodes(struct text *t, const struct tier_stat *st)
{
	static const struct {
		const char *name, *help;
		size_t off;
	} of[] = {
		{"kvtier_dram_node_capacity_bytes", "The node's part of the DRAM tier.",
		 offsetof(struct tier_node_stat, capacity)},
		{"kvtier_dram_node_used_bytes", "Bytes that pages take on the node, padding included.",
		 offsetof(struct tier_node_stat, used)},
		{"kvtier_dram_node_free_bytes", "Bytes free for pages on the node.",
		 offsetof(struct tier_node_stat, free)},
		{"kvtier_dram_node_resident_bytes", "Bytes of the node's memory that the DRAM tier holds.",
		 offsetof(struct tier_node_stat, resident)},
		{"kvtier_dram_node_fallbacks_total",
		 "Pages that found no room on the node, by the node they wanted.",
		 offsetof(struct tier_node_stat, fallbacks)},
	};

	for (unsigned k = 0; st->nodes && k < ARRAY_SIZE(of); k++) {
		put_head(t, of[k].name, of[k].help,
			 of[k].off == offsetof(struct tier_node_stat, fallbacks) ? "counter" : "gauge");
		for (uint32_t i = 0; i < st->nodes; i++) {
			uint64_t v;

			memcpy(&v, (const char *)&st->at[i] + of[k].off, sizeof(v));
			put(t, "%s{node=\"%d\"} %" PRIu64 "\n", of[k].name, st->at[i].id, v);
		}
	}
}

char *metrics_text(const struct core_stat *s, const struct probes_stat *p, size_t *ret_bytes)
{
	struct text t = {};

	put_head(&t, "kvtier_build_info", "Always 1; the version is a label.", "gauge");
	put(&t, "kvtier_build_info{version=\"%s\"} 1\n", KVT_VERSION);
	/* The configuration allows letters, digits and . _ - in a policy's name. */
	put_head(&t, "kvtier_policy_info", "Always 1; the default policy is a label.", "gauge");
	put(&t, "kvtier_policy_info{policy=\"%.*s\"} 1\n", (int)sizeof(s->policy), s->policy);
	put_table(&t, metrics_table, metrics_n, s);
	put_nodes(&t, &s->tier[KVT_TIER_DRAM]);
	put_table(&t, metrics_probes, metrics_n_probes, p);
	if (t.failed) {
		free(t.buf);
		return NULL;
	}
	*ret_bytes = t.n;
	return t.buf;
}
