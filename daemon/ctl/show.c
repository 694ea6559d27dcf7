/* SPDX-License-Identifier: MIT */
/* The daemon's JSON as people read it. A field that is missing reads as 0 or "-": an older daemon is no error.
 */
#include <stdio.h>
#include <string.h>
#include "daemon/ctl/ctl.h"
#include "daemon/ctl/table.h"
#include "shm/util.h"

static const char *const tier_names[] = {"device", "dram", "nvme"};

static uint64_t num(const json_t *o, const char *key)
{
	json_int_t v = json_integer_value(json_object_get(o, key));

	return v > 0 ? (uint64_t)v : 0;
}

static const char *text(const json_t *o, const char *key)
{
	const char *s = json_string_value(json_object_get(o, key));

	return s && *s ? s : "-";
}

static bool flag(const json_t *o, const char *key)
{
	return json_is_true(json_object_get(o, key));
}

/* key: a histogram; which: p50, p99 */
static uint64_t quantile(const json_t *o, const char *key, const char *which)
{
	return num(json_object_get(o, key), which);
}

/* For lines that are not tables: what clients named may hold anything. */
static const char *clean(const char *s)
{
	static char buf[4][128];
	static unsigned n;
	char *b = buf[n++ % ARRAY_SIZE(buf)];
	size_t i;

	for (i = 0; s[i] && i < sizeof(buf[0]) - 1; i++)
		b[i] = s[i] >= 0x20 && s[i] < 0x7f ? s[i] : '?';
	b[i] = 0;
	return b;
}

/* ---- status ----------------------------------------------------------------------------- */

static void show_tier_table(const json_t *tiers)
{
	char spec[] = "lTIER rROWS rBYTES rCAPACITY rFREE rDEMOTED rPROMOTED rREFAULTS";
	struct table t;
	const json_t *o;
	size_t i;

	table_init(&t, spec);
	json_array_foreach(tiers, i, o)
	{
		bool sized = json_object_get(o, "capacity_bytes");
		uint64_t capacity = num(o, "capacity_bytes");

		table_add(&t, "%s", text(o, "name"));
		table_add(&t, "%s", fmt_count(num(o, "rows")));
		table_add(&t, "%s", fmt_bytes(num(o, "bytes")));
		table_add(&t, "%s", sized ? fmt_bytes(capacity) : "-");
		if (capacity)
			table_add(&t, "%.1f %%", 100.0 * (double)num(o, "free_bytes") / (double)capacity);
		else
			table_add(&t, "-");
		table_add(&t, "%s", fmt_count(num(o, "rows_demoted_into")));
		table_add(&t, "%s", fmt_count(num(o, "rows_promoted_out")));
		table_add(&t, "%s", fmt_count(num(o, "refaults")));
	}
	table_print(&t);
	table_free(&t);
}

/* After an empty line, when there is something; frees it. */
static void print_below(struct table *t)
{
	if (t->rows) {
		putchar('\n');
		table_print(t);
	}
	table_free(t);
}

static void show_io_table(const json_t *tiers)
{
	char spec[] = "lTIER rREADS rREAD rWRITES rWRITTEN rTO-DEVICE rERRORS rIN-FLIGHT rLEAKED";
	struct table t;
	const json_t *o;
	size_t i;

	table_init(&t, spec);
	json_array_foreach(tiers, i, o)
	{
		if (!num(o, "capacity_bytes"))
			continue;
		table_add(&t, "%s", text(o, "name"));
		table_add(&t, "%s", fmt_count(num(o, "reads")));
		table_add(&t, "%s", fmt_bytes(num(o, "read_bytes")));
		table_add(&t, "%s", fmt_count(num(o, "writes")));
		table_add(&t, "%s", fmt_bytes(num(o, "write_bytes")));
		table_add(&t, "%s", fmt_bytes(num(o, "device_write_bytes")));
		table_add(&t, "%s", fmt_count(num(o, "errors")));
		table_add(&t, "%s", fmt_count(num(o, "inflight")));
		table_add(&t, "%s", fmt_bytes(num(o, "leaked_bytes")));
	}
	print_below(&t);
}

static void show_latency_table(const json_t *tiers)
{
	char spec[] = "lTIER rREAD rP99 rWRITE rP99 rREFAULT-AFTER rP99";
	struct table t;
	const json_t *o;
	size_t i;

	table_init(&t, spec);
	json_array_foreach(tiers, i, o)
	{
		if (!num(o, "capacity_bytes"))
			continue;
		table_add(&t, "%s", text(o, "name"));
		table_add(&t, "%s", fmt_ns(quantile(o, "read_ns", "p50")));
		table_add(&t, "%s", fmt_ns(quantile(o, "read_ns", "p99")));
		table_add(&t, "%s", fmt_ns(quantile(o, "write_ns", "p50")));
		table_add(&t, "%s", fmt_ns(quantile(o, "write_ns", "p99")));
		table_add(&t, "%s rows", fmt_count(quantile(o, "refault_rows", "p50")));
		table_add(&t, "%s", fmt_count(quantile(o, "refault_rows", "p99")));
	}
	print_below(&t);
}

static const char *came_back(uint64_t bytes)
{
	static char text[64];

	snprintf(text, sizeof(text), "%s came back from an earlier life", fmt_bytes(bytes));
	return text;
}

/* Where there is more than one. */
static void show_nodes(const json_t *dram)
{
	const json_t *nodes = json_object_get(dram, "nodes"), *n;
	size_t i;

	if (json_array_size(nodes) < 2)
		return;
	json_array_foreach(nodes, i, n)
	{
		printf("           node %s: %s of %s used", fmt_count(num(n, "node")),
		       fmt_bytes(num(n, "used_bytes")), fmt_bytes(num(n, "capacity_bytes")));
		printf(", %s fallbacks\n", fmt_count(num(n, "fallbacks")));
	}
	if (num(dram, "node_fallbacks") || num(dram, "migrated_pages"))
		printf("           %s pages migrated, %s\n", fmt_count(num(dram, "migrated_pages")),
		       fmt_bytes(num(dram, "migrated_bytes")));
}

static void show_tier_notes(const json_t *tiers)
{
	const json_t *o;
	size_t i;

	json_array_foreach(tiers, i, o)
	{
		if (!num(o, "capacity_bytes"))
			continue;
		printf("%-10s ", text(o, "name"));
		if (flag(o, "offline"))
			printf("OFFLINE, ");
		if (!strcmp(text(o, "name"), "nvme"))
			printf("%s, %s segments cleaned, at least %.1f %% stays free\n",
			       flag(o, "io_uring") ? "io_uring" : "no io_uring",
			       fmt_count(num(o, "cleaned_segments")), (double)num(o, "free_min_permille") / 10);
		else
			printf("%s pages, nodes: %s, free marks %.1f %.1f %.1f %%\n",
			       flag(o, "huge_pages") ? "huge" : "small", text(o, "numa"),
			       (double)num(o, "free_min_permille") / 10,
			       (double)num(o, "free_low_permille") / 10,
			       (double)num(o, "free_high_permille") / 10);
		if (flag(o, "kept") || num(o, "returned_bytes"))
			printf("           %s%s%s\n", flag(o, "kept") ? "outlives the daemon" : "",
			       flag(o, "kept") && num(o, "returned_bytes") ? ", " : "",
			       num(o, "returned_bytes") ? came_back(num(o, "returned_bytes")) : "");
		show_nodes(o);
		if (num(o, "published_bytes"))
			printf("           %s published, %s of it held back\n",
			       fmt_bytes(num(o, "published_bytes")), fmt_bytes(num(o, "published_held_bytes")));
		if (strcmp(text(o, "note"), "-"))
			printf("           %s\n", clean(text(o, "note")));
	}
}

static void show_throttle(const json_t *t)
{
	if (!flag(t, "on"))
		return;
	printf("throttle   nvme writes have %s in flight at most, %s cuts, %s waits, %s delayed\n",
	       fmt_bytes(num(t, "window_bytes")), fmt_count(num(t, "cuts")), fmt_count(num(t, "waits")),
	       fmt_bytes(num(t, "delayed_bytes")));
	printf("           by %.66s\n", clean(text(t, "by")));
	if (flag(t, "by_disk"))
		printf("           disk: reads %s, writes %s, queue %s, %s cuts\n",
		       fmt_ns(num(t, "disk_read_ns")), fmt_ns(num(t, "disk_write_ns")),
		       fmt_ns(num(t, "disk_wait_ns")), fmt_count(num(t, "disk_cuts")));
	if (num(t, "cleaner_bytes"))
		printf("           the cleaner had its turn for %s\n", fmt_bytes(num(t, "cleaner_bytes")));
}

static void show_limbo(const json_t *l)
{
	if (num(l, "dram_bytes") || num(l, "nvme_bytes"))
		printf("limbo      moved to nvme and not sealed yet: %s from dram, %s rewritten\n",
		       fmt_bytes(num(l, "dram_bytes")), fmt_bytes(num(l, "nvme_bytes")));
}

static void show_pressure(const json_t *p)
{
	printf("pressure   %s, dram holds %s of %s, psi %s\n",
	       !flag(p, "shrink")    ? "not watched"
	       : flag(p, "squeezed") ? "SQUEEZED"
				     : "none",
	       fmt_bytes(num(p, "dram_resident_bytes")), fmt_bytes(num(p, "dram_limit_bytes")),
	       clean(text(p, "psi")));
	printf("           events: psi %s, reclaim %s%s\n", fmt_count(num(p, "psi_events")),
	       fmt_count(num(p, "reclaim_events")),
	       strncmp(text(p, "reclaim"), "off", 3) ? "" : " (not seen: probes are off)");
	if (num(p, "squeezes"))
		printf("           %s times, last %s, longest %s; %s were on nvme, %s moved there, %s dropped "
		       "(%s rows)\n",
		       fmt_count(num(p, "squeezes")), fmt_ns(num(p, "ns_last")), fmt_ns(num(p, "ns_max")),
		       fmt_bytes(num(p, "on_nvme_bytes")), fmt_bytes(num(p, "demoted_bytes")),
		       fmt_bytes(num(p, "dropped_bytes")), fmt_count(num(p, "dropped_rows")));
	if (num(p, "revokes"))
		printf("           published: %s given back, %s asked back, %s of that kept by clients\n",
		       fmt_bytes(num(p, "revoke_returned_bytes")), fmt_bytes(num(p, "revoked_bytes")),
		       fmt_bytes(num(p, "kept_by_clients_bytes")));
}

static void show_counters(const json_t *j)
{
	const json_t *plans = json_object_get(j, "plans"), *misses = json_object_get(j, "misses");
	uint64_t decided = num(plans, "decided");

	printf("plans      %s decided, %s acked, %s cancelled, %s nacked\n", fmt_count(decided),
	       fmt_count(num(plans, "acked")), fmt_count(num(plans, "cancelled")),
	       fmt_count(num(plans, "nacked")));
	printf("plan time  last %s, mean %s, longest %s\n", fmt_ns(num(plans, "ns_last")),
	       fmt_ns(decided ? num(plans, "ns_total") / decided : 0), fmt_ns(num(plans, "ns_max")));
	printf("           half within %s, 99 %% within %s; the decision itself %s, %s\n",
	       fmt_ns(quantile(plans, "plan_ns", "p50")), fmt_ns(quantile(plans, "plan_ns", "p99")),
	       fmt_ns(quantile(plans, "decide_ns", "p50")), fmt_ns(quantile(plans, "decide_ns", "p99")));
	printf("misses     %s corrupt, %s changed by clients, %s I/O, %s stale, %s no space\n",
	       fmt_count(num(misses, "corrupt")), fmt_count(num(misses, "client_mutated")),
	       fmt_count(num(misses, "io")), fmt_count(num(misses, "stale")),
	       fmt_count(num(misses, "nospace")));
	printf("dropped    %s rows\n", fmt_count(num(j, "rows_dropped")));
	printf("recalled   %s rows by %s searches\n", fmt_count(num(j, "rows_recalled")),
	       fmt_count(num(j, "recalls")));
	printf("memory     index %s, staging %s, plans %s\n", fmt_bytes(num(j, "index_bytes")),
	       fmt_bytes(num(j, "staging_bytes")), fmt_bytes(num(j, "plan_bytes")));
	printf("loop       longest slice %s (processor: %s), lately %s (%s)\n", fmt_ns(num(j, "loop_max_ns")),
	       fmt_ns(num(j, "loop_cpu_max_ns")), fmt_ns(num(j, "loop_recent_max_ns")),
	       fmt_ns(num(j, "loop_cpu_recent_max_ns")));
	printf("under way  %s jobs of workers, %s pages\n", fmt_count(num(j, "worker_jobs")),
	       fmt_count(num(j, "page_requests")));
	printf("others     %s direct demotions, %s clients cut off\n", fmt_count(num(j, "direct_demotions")),
	       fmt_count(num(j, "hangups_protocol")));
}

static void show_wait(const json_t *probes, const char *name, const char *what)
{
	const json_t *h = json_object_get(probes, name);

	if (num(h, "count"))
		printf("           %s: %s, p50 %s, p99 %s\n", what, fmt_count(num(h, "count")),
		       fmt_ns(num(h, "ns_p50")), fmt_ns(num(h, "ns_p99")));
}

static void show_probes(const json_t *probes)
{
	const json_t *o;
	size_t i;

	if (!flag(probes, "on")) {
		printf("probes     off\n           %.69s\n", clean(text(probes, "why_off")));
		return;
	}
	printf("probes    ");
	json_array_foreach(json_object_get(probes, "programs"), i, o)
	{
		printf(" %s %s", clean(text(o, "name")), flag(o, "on") ? "on" : "off");
		if (!flag(o, "on"))
			printf(" (%s)", clean(text(o, "why_off")));
	}
	printf("\n");
	show_wait(probes, "disk_read", "reads of the disk");
	show_wait(probes, "disk_write", "writes to the disk");
	show_wait(probes, "uring", "requests of io_uring");
	show_wait(probes, "reclaim", "waits for reclaimed memory");
	show_wait(probes, "fault", "major page faults");
	show_wait(probes, "sched", "clients' waits for a processor");
}

void show_status(const json_t *j)
{
	const json_t *tiers = json_object_get(j, "tiers");

	printf("kvtierd %s, up %s, mode %s, policy %s%s%s\n", text(j, "version"),
	       fmt_age(num(j, "uptime_ns") / 1000000000u), text(j, "mode"), clean(text(j, "policy")),
	       flag(j, "frozen") ? ", FROZEN" : "", flag(j, "draining") ? ", DRAINING" : "");
	if (json_object_get(j, "tenant"))
		printf("tenant %s, ", clean(text(j, "tenant")));
	else
		printf("clients %s, models %s, ", fmt_count(num(j, "clients")), fmt_count(num(j, "models")));
	printf("sequences %s, orphaned %s\n\n", fmt_count(num(j, "sequences")), fmt_count(num(j, "orphans")));
	show_tier_table(tiers);
	if (json_object_get(j, "tenant")) {
		printf("\n%s plans decided, %s misses, %s rows dropped\n", fmt_count(num(j, "plans_decided")),
		       fmt_count(num(j, "misses_total")), fmt_count(num(j, "rows_dropped")));
		return;
	}
	show_io_table(tiers);
	show_latency_table(tiers);
	putchar('\n');
	show_tier_notes(tiers);
	show_pressure(json_object_get(j, "pressure"));
	show_throttle(json_object_get(j, "throttle"));
	show_limbo(json_object_get(j, "limbo"));
	show_counters(j);
	if (json_object_get(j, "probes"))
		show_probes(json_object_get(j, "probes"));
}

/* ---- sequences --------------------------------------------------------------------------- */

static uint64_t tier_num(const json_t *seq, unsigned t, const char *key)
{
	return num(json_object_get(json_object_get(seq, "tiers"), tier_names[t]), key);
}

void show_seqs(const json_t *list)
{
	char spec[] = "LHANDLE lKEY lTENANT lCLIENT rROWS rDEVICE rDRAM rNVME rDROPPED lLIFE";
	struct table t;
	const json_t *o;
	size_t i;

	table_init(&t, spec);
	json_array_foreach(list, i, o)
	{
		table_add(&t, "%s", text(o, "handle"));
		table_add(&t, "%.8s", text(o, "key"));
		table_add(&t, "%s", text(o, "tenant"));
		table_add(&t, "%s", text(o, "client"));
		table_add(&t, "%s", fmt_count(num(o, "rows")));
		for (unsigned k = 0; k < ARRAY_SIZE(tier_names); k++)
			table_add(&t, "%s", fmt_count(tier_num(o, k, "rows")));
		table_add(&t, "%s", fmt_count(num(o, "rows_dropped")));
		if (strcmp(text(o, "lifetime"), "leased"))
			table_add(&t, "client");
		else
			table_add(&t, "%s",
				  strcmp(text(o, "client"), "-") ? "leased" : fmt_age(num(o, "ttl_left_s")));
	}
	table_print(&t);
	table_free(&t);
}

static void show_lanes(const json_t *lanes)
{
	char spec[] = "rLANE rDEVICE rDRAM rNVME rDROPPED";
	struct table t;
	const json_t *o;
	size_t i;

	if (!lanes)
		return;
	putchar('\n');
	table_init(&t, spec);
	json_array_foreach(lanes, i, o)
	{
		table_add(&t, "%zu", i);
		for (unsigned k = 0; k < ARRAY_SIZE(tier_names); k++)
			table_add(&t, "%s", fmt_count(num(o, tier_names[k])));
		table_add(&t, "%s", fmt_count(num(o, "dropped")));
	}
	table_print(&t);
	table_free(&t);
}

/* Of all threads of the client's process, since it connected. */
static void show_stall(const json_t *o)
{
	if (o)
		printf("stalls     its client: %s for a processor, %s in %s major faults, %s in reclaim\n",
		       fmt_ns(num(o, "sched_ns")), fmt_ns(num(o, "fault_ns")), fmt_count(num(o, "faults")),
		       fmt_ns(num(o, "reclaim_ns")));
	putchar('\n');
}

void show_seq(const json_t *j)
{
	char spec[] = "lTIER rBUDGET rROWS rBYTES";
	const json_t *budget = json_object_get(j, "budget");
	struct table t;

	printf("handle     %s\nkey        %s\n", text(j, "handle"), text(j, "key"));
	printf("tenant     %s, client %s\n", clean(text(j, "tenant")), clean(text(j, "client")));
	printf("model      %s, policy %s\n", clean(text(j, "model")), clean(text(j, "policy")));
	if (json_object_get(j, "policy_reason"))
		printf("           not as asked: %s\n", clean(text(j, "policy_reason")));
	printf("rows       %s in %s lanes, epoch %s, longest device lane %s\n", fmt_count(num(j, "rows")),
	       fmt_count(num(j, "lanes")), fmt_count(num(j, "epoch")), fmt_count(num(j, "resident_max")));
	if (json_is_true(json_object_get(j, "adaptive")))
		printf("budgets    adaptive, %s to %s device rows a lane",
		       fmt_count(num(j, "device_rows_least")), fmt_count(num(j, "device_rows_most")));
	else
		printf("budgets    the same for all lanes, or as the client set them");
	if (json_object_get(j, "device_rows_held"))
		printf("; shared: holds %s rows, brought %s", fmt_count(num(j, "device_rows_held")),
		       fmt_count(num(j, "device_rows_brought")));
	putchar('\n');
	printf("lifetime   %s", text(j, "lifetime"));
	if (num(j, "ttl_left_s"))
		printf(", %s left", fmt_age(num(j, "ttl_left_s")));
	printf("\nplans      %s, the last %s (%s) took %s\n", fmt_count(num(j, "plans")),
	       fmt_count(num(j, "plan_id")), clean(text(j, "plan_state")), fmt_ns(num(j, "plan_ns_last")));
	printf("counters   %s rows pinned, %s dropped, %s refaults, %s misses, index %s\n",
	       fmt_count(num(j, "rows_pinned")), fmt_count(num(j, "rows_dropped")),
	       fmt_count(num(j, "refaults")), fmt_count(num(j, "misses")), fmt_bytes(num(j, "index_bytes")));
	show_stall(json_object_get(j, "stall"));
	table_init(&t, spec);
	for (unsigned k = 0; k < ARRAY_SIZE(tier_names); k++) {
		const json_t *b = json_object_get(budget, tier_names[k]);

		table_add(&t, "%s", tier_names[k]);
		table_add(&t, "%s", json_is_null(b) ? "all" : fmt_count((uint64_t)json_integer_value(b)));
		table_add(&t, "%s", fmt_count(tier_num(j, k, "rows")));
		table_add(&t, "%s", fmt_bytes(tier_num(j, k, "bytes")));
	}
	table_print(&t);
	table_free(&t);
	show_lanes(json_object_get(j, "lane"));
}

/* ---- the rest ------------------------------------------------------------------------------ */

void show_policies(const json_t *j)
{
	const json_t *list = json_object_get(j, "policies"), *o;
	char spec[] = "lNAME rSEQS lWHAT";
	struct table t;
	size_t i;

	table_init(&t, spec);
	json_array_foreach(list, i, o)
	{
		table_add(&t, "%s%s", text(o, "name"), flag(o, "default") ? "*" : "");
		table_add(&t, "%s", fmt_count(num(o, "sequences")));
		table_add(&t, "%s", text(o, "doc"));
	}
	table_print(&t);
	table_free(&t);
	puts("* default");
	json_array_foreach(list, i, o)
	{
		if (strcmp(text(o, "weights"), "-"))
			printf("%s: %s\n", text(o, "name"), clean(text(o, "weights")));
	}
}

void show_verify(const json_t *j)
{
	printf("%s: %s of %s pages, %s, %s bad\n", flag(j, "running") ? "running" : "done",
	       fmt_count(num(j, "pages")), fmt_count(num(j, "total")), fmt_bytes(num(j, "bytes")),
	       fmt_count(num(j, "bad")));
}

void show_version(const json_t *j)
{
	printf("kvtierd %s, protocol %llu, ABI %llu\n", text(j, "version"),
	       (unsigned long long)num(j, "protocol"), (unsigned long long)num(j, "abi"));
}

void show_changes(const json_t *j)
{
	const json_t *list = json_object_get(j, "changed"), *line;
	size_t i;

	json_array_foreach(list, i, line) puts(json_string_value(line) ?: "-");
	if (!json_array_size(list))
		puts("nothing changed");
}
