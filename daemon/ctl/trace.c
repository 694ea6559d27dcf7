/* SPDX-License-Identifier: MIT */
/* kvtierctl trace: a sequence's last plans, one line each; or where a row is, one line a lane. */
#include <stdio.h>
#include <string.h>
#include <time.h>
#include "daemon/ctl/ctl.h"
#include "daemon/ctl/table.h"
#include "shm/util.h"

static uint64_t num(const json_t *o, const char *key)
{
	return (uint64_t)json_integer_value(json_object_get(o, key));
}

static const char *text(const json_t *o, const char *key)
{
	return json_string_value(json_object_get(o, key)) ?: "-";
}

static void clock_text(char buf[16], uint64_t ns)
{
	time_t t = (time_t)(ns / 1000000000u);
	struct tm tm;

	if (!localtime_r(&t, &tm) || !strftime(buf, 16, "%H:%M:%S", &tm))
		strcpy(buf, "-");
}

/* The outcome, and behind it what limited the budgets. */
static void end_text(char *buf, size_t size, const json_t *o)
{
	const json_t *limits = json_object_get(o, "limits"), *v;
	size_t i, n = (size_t)snprintf(buf, size, "%s", text(o, "outcome"));

	json_array_foreach(limits, i, v)
	{
		if (n < size)
			n += (size_t)snprintf(buf + n, size - n, "%s%s", i ? "," : "; ",
					      json_string_value(v) ?: "?");
	}
}

/* All that a process waited for, ns. */
static uint64_t waited(const json_t *stall)
{
	return num(stall, "sched_ns") + num(stall, "fault_ns") + num(stall, "reclaim_ns");
}

static void show_disk(const json_t *probes, const char *key, const char *what)
{
	if (json_is_integer(json_object_get(probes, key)))
		printf("; %s p99 %s", what, fmt_ns(num(probes, key)));
}

/* What the kernel's probes say, below the plans. */
static void show_stalls(const json_t *probes)
{
	const json_t *o = json_object_get(probes, "client");

	if (!probes)
		return;
	if (json_is_object(o))
		printf("stalls  its client: %s for a processor, %s in %llu major faults, %s in reclaim",
		       fmt_ns(num(o, "sched_ns")), fmt_ns(num(o, "fault_ns")),
		       (unsigned long long)num(o, "faults"), fmt_ns(num(o, "reclaim_ns")));
	else
		printf("stalls  off: %s", text(probes, "why_off"));
	show_disk(probes, "disk_read_ns_p99", "disk reads");
	show_disk(probes, "disk_write_ns_p99", "writes");
	show_disk(probes, "uring_ns_p99", "io_uring");
	putchar('\n');
}

static void show_plans(const json_t *j)
{
	bool stalls = json_is_object(json_object_get(json_object_get(j, "probes"), "client"));
	char spec[] = "rPLAN LTIME rROWS rKEPT rOUT rIN rDROP rSCORE rDECIDE rMOVE rACK lEND",
	     with_stalls[] = "rPLAN LTIME rROWS rKEPT rOUT rIN rDROP rDECIDE rMOVE rACK rSTALL lEND";
	const json_t *o;
	struct table t;
	size_t i;

	table_init(&t, stalls ? with_stalls : spec);
	json_array_foreach(json_object_get(j, "plans"), i, o)
	{
		static const char *const rows[] = {"watermark", "kept", "out", "in", "dropped"};
		static const char *const phases[] = {"score_ns", "decide_ns", "move_ns", "ack_ns"};
		char buf[TABLE_CELL];

		table_add(&t, "%llu", (unsigned long long)num(o, "plan"));
		clock_text(buf, num(o, "time_ns"));
		table_add(&t, "%s", buf);
		for (size_t k = 0; k < ARRAY_SIZE(rows); k++)
			table_add(&t, "%s", fmt_count(num(o, rows[k])));
		for (size_t k = stalls; k < ARRAY_SIZE(phases); k++)
			table_add(&t, "%s", fmt_ns(num(o, phases[k])));
		if (stalls)
			table_add(&t, "%s",
				  json_is_object(json_object_get(o, "stall"))
					  ? fmt_ns(waited(json_object_get(o, "stall")))
					  : "-");
		end_text(buf, sizeof(buf), o);
		table_add(&t, "%s", buf);
	}
	table_print(&t);
	table_free(&t);
	show_stalls(json_object_get(j, "probes"));
}

static void show_row(const json_t *lanes)
{
	const json_t *o;
	size_t i;

	printf("LANE       SCORE  WHY\n");
	json_array_foreach(lanes, i, o)
	{
		const json_t *score = json_object_get(o, "score");

		printf("%4llu  %10.4g  %s\n", (unsigned long long)num(o, "lane"), json_number_value(score),
		       text(o, "why"));
	}
}

/* The daemon answers as many lanes at a time as a slice of its loop allows. */
static int trace_row(struct ctl *c, unsigned argc, const char *const argv[])
{
	json_t *all = json_object(), *list = json_array();
	const char *ask[4] = {argv[0], argv[1], argv[2], argc > 3 ? argv[3] : "0+"};
	bool more = false;
	char next[24];
	int r;

	json_object_set_new(all, "lanes", list);
	do {
		json_t *j = NULL;

		r = ctl_call(c, 4, ask, &j, NULL);
		if (r)
			break;
		json_object_set(all, "pos", json_object_get(j, "pos"));
		json_array_extend(list, json_object_get(j, "lanes"));
		more = json_is_integer(json_object_get(j, "next"));
		snprintf(next, sizeof(next), "%llu+", (unsigned long long)num(j, "next"));
		ask[3] = next;
		json_decref(j);
	} while (more && argc < 4);
	if (!r && c->json)
		ctl_print_json(all);
	else if (!r)
		show_row(list);
	json_decref(all);
	return r;
}

int ctl_trace(struct ctl *c, unsigned argc, const char *const argv[])
{
	json_t *j = NULL;
	int r;

	if (argc > 2)
		return trace_row(c, argc, argv);
	r = ctl_call(c, argc, argv, &j, NULL);
	if (!r && c->json)
		ctl_print_json(j);
	else if (!r)
		show_plans(j);
	json_decref(j);
	return r;
}
