/* SPDX-License-Identifier: MIT */
#include <linux/perf_event.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include "daemon/bpf/load.h"
#include "shm/util.h"
#include "probes.skel.h"

#define PARTS 4
#define MAX_CPUS 1024

/* A part's program and, when a kernel knows its tracepoint by another name, the program for that one. */
struct part {
	const char *program, *or_else;
};

static const struct group {
	const char *name;
	struct part part[PARTS];
} groups[] = {
	{"disk", {{.program = "disk_complete"}, {.program = "disk_requeue"}, {.program = "disk_issue"}}},
	{"uring", {{.program = "uring_complete"}, {.program = "uring_submit", .or_else = "uring_submit_sqe"}}},
	{"reclaim", {{.program = "reclaim_end"}, {.program = "reclaim_begin"}}},
	{"memcg_reclaim", {{.program = "memcg_end"}, {.program = "memcg_begin"}}},
	{"fault", {{.program = "fault_end"}, {.program = "fault_begin"}}},
	{"sched", {{.program = "sched_switch"}, {.program = "sched_wakeup"}, {.program = "sched_wakeup_new"}}},
};
#define GROUPS ARRAY_SIZE(groups)
_Static_assert(GROUPS <= PROBE_NAMES, "the message has room for all");

struct load {
	const char *broken; /* groups that this kernel shall refuse */
	struct probes *skel;
	struct probe_targets *targets;
	struct group_state {
		struct bpf_link *link[PARTS];
		struct bpf_link **cpu; /* of the program on an event of each processor */
		unsigned cpus;
		bool on;
		char why_off[sizeof(((struct probe_name *)0)->why_off)];
	} group[GROUPS];
};

static char said[80]; /* libbpf's last complaint */

static int keep_quiet(enum libbpf_print_level level, const char *fmt, va_list ap)
{
	char line[256];

	if (level != LIBBPF_WARN || said[0])
		return 0;
	vsnprintf(line, sizeof(line), fmt, ap);
	line[strcspn(line, "\n")] = 0;
	snprintf(said, sizeof(said), "%.79s", strncmp(line, "libbpf: ", 8) ? line : line + 8);
	return 0;
}

static void off(struct group_state *g, const char *program, const char *what, int err)
{
	g->on = false;
	snprintf(g->why_off, sizeof(g->why_off), "%.20s: %.12s: %.50s", program, what, strerror(-err));
}

static bool listed(const char *list, const char *name)
{
	size_t n = strlen(name);

	for (const char *p = list; p && *p; p += strcspn(p, ",") + (p[strcspn(p, ",")] == ',')) {
		if (strcspn(p, ",") == n && !strncmp(p, name, n))
			return true;
	}
	return false;
}

/* ---- loading --------------------------------------------------------------------------------- */

/* To be loaded. broken: as a kind of program that may not do what it does. */
static void pick(struct probes *s, const char *name, bool broken)
{
	struct bpf_program *p = name ? bpf_object__find_program_by_name(s->obj, name) : NULL;

	if (!p)
		return;
	bpf_program__set_autoload(p, true);
	if (broken)
		bpf_program__set_type(p, BPF_PROG_TYPE_SOCKET_FILTER);
}

static void choose(struct probes *s, const struct load *l, int only)
{
	struct bpf_program *p;

	bpf_object__for_each_program(p, s->obj) bpf_program__set_autoload(p, false);
	for (unsigned g = 0; g < GROUPS; g++) {
		bool broken = listed(l->broken, groups[g].name);

		if (only < 0 ? !l->group[g].on : (unsigned)only != g)
			continue;
		for (unsigned i = 0; i < PARTS; i++) {
			pick(s, groups[g].part[i].program, broken);
			pick(s, groups[g].part[i].or_else, broken);
		}
	}
}

/* Would the kernel take this group by itself? */
static int try_group(struct load *l, unsigned g)
{
	struct probes *s = probes__open();
	int r = s ? 0 : -errno;

	if (!r) {
		choose(s, l, (int)g);
		r = probes__load(s);
	}
	probes__destroy(s);
	return r;
}

static int load_wanted(struct load *l)
{
	int r;

	l->skel = probes__open();
	if (!l->skel)
		return -errno;
	choose(l->skel, l, -1);
	r = probes__load(l->skel);
	if (r < 0) {
		probes__destroy(l->skel);
		l->skel = NULL;
	}
	return r;
}

/* All at once; where that fails, find the groups that fail and do without them. */
static int load_programs(struct load *l)
{
	int r = load_wanted(l);

	if (r >= 0)
		return 0;
	for (unsigned g = 0; g < GROUPS; g++) {
		int e = l->group[g].on ? try_group(l, g) : 0;

		if (e < 0)
			off(&l->group[g], groups[g].part[0].program, "load", e);
	}
	return load_wanted(l);
}

/* ---- attaching -------------------------------------------------------------------------------- */

static void detach(struct group_state *g)
{
	for (unsigned i = 0; i < PARTS; i++) {
		bpf_link__destroy(g->link[i]);
		g->link[i] = NULL;
	}
	for (unsigned i = 0; i < g->cpus; i++)
		bpf_link__destroy(g->cpu[i]);
	free(g->cpu);
	g->cpu = NULL;
	g->cpus = 0;
}

/* On the end of every major fault, on every processor. */
static int attach_faults(struct group_state *g, struct bpf_program *p)
{
	struct perf_event_attr attr = {
		.type = PERF_TYPE_SOFTWARE,
		.size = sizeof(attr),
		.config = PERF_COUNT_SW_PAGE_FAULTS_MAJ,
		.sample_period = 1,
	};
	int n = libbpf_num_possible_cpus();

	if (n < 0)
		return n;
	n = MIN(n, MAX_CPUS);
	g->cpu = calloc((size_t)n, sizeof(*g->cpu));
	if (!g->cpu)
		return -ENOMEM;
	for (int i = 0; i < n; i++) {
		int fd = (int)syscall(SYS_perf_event_open, &attr, -1, i, -1, PERF_FLAG_FD_CLOEXEC);
		struct bpf_link *link;
		int r;

		if (fd < 0 && errno == ENODEV) /* possible, not there */
			continue;
		if (fd < 0)
			return -errno;
		link = bpf_program__attach_perf_event(p, fd);
		if (!link) {
			r = -errno;
			close(fd);
			return r;
		}
		g->cpu[g->cpus++] = link; /* and the event's descriptor */
	}
	return 0;
}

static int attach_part(struct load *l, unsigned g, unsigned i)
{
	const struct part *part = &groups[g].part[i];
	struct bpf_program *p = bpf_object__find_program_by_name(l->skel->obj, part->program);

	if (bpf_program__type(p) == BPF_PROG_TYPE_PERF_EVENT)
		return attach_faults(&l->group[g], p);
	l->group[g].link[i] = bpf_program__attach(p);
	if (!l->group[g].link[i] && errno == ENOENT && part->or_else) {
		p = bpf_object__find_program_by_name(l->skel->obj, part->or_else);
		l->group[g].link[i] = bpf_program__attach(p);
	}
	return l->group[g].link[i] ? 0 : -errno;
}

static void attach_group(struct load *l, unsigned g)
{
	for (unsigned i = 0; i < PARTS && groups[g].part[i].program && l->group[g].on; i++) {
		int r = attach_part(l, g, i);

		if (r < 0) {
			off(&l->group[g], groups[g].part[i].program, "attach", r);
			detach(&l->group[g]);
		}
	}
}

/* ---- all of it --------------------------------------------------------------------------------- */

/* Written by programs alone from now on. */
static int freeze(const struct load *l)
{
	int r = bpf_map_freeze(bpf_map__fd(l->skel->maps.counts));

	return r < 0 ? r : bpf_map_freeze(bpf_map__fd(l->skel->maps.sums));
}

int load_new(struct load **ret, const char *without, const char *broken, char *err, size_t errsize)
{
	struct load *l = calloc(1, sizeof(*l));
	int r;

	if (!l)
		return -ENOMEM;
	l->broken = broken;
	libbpf_set_print(keep_quiet);
	for (unsigned g = 0; g < GROUPS; g++) {
		l->group[g].on = !listed(without, groups[g].name);
		if (!l->group[g].on)
			snprintf(l->group[g].why_off, sizeof(l->group[g].why_off), "left out by --without");
	}
	r = load_programs(l);
	if (r >= 0)
		r = freeze(l);
	if (r < 0) {
		snprintf(err, errsize, "BPF: %s%s%s", strerror(-r), said[0] ? ": " : "", said);
		load_free(l);
		return r;
	}
	l->targets = mmap(NULL, sizeof(*l->targets), PROT_READ | PROT_WRITE, MAP_SHARED,
			  bpf_map__fd(l->skel->maps.targets), 0);
	if (l->targets == MAP_FAILED) {
		r = -errno;
		l->targets = NULL;
		snprintf(err, errsize, "BPF: map of targets: %s", strerror(-r));
		load_free(l);
		return r;
	}
	for (unsigned g = 0; g < GROUPS; g++)
		if (l->group[g].on)
			attach_group(l, g);
	*ret = l;
	return 0;
}

void load_free(struct load *l)
{
	if (!l)
		return;
	for (unsigned g = 0; g < GROUPS; g++)
		detach(&l->group[g]);
	if (l->targets)
		munmap(l->targets, sizeof(*l->targets));
	probes__destroy(l->skel);
	free(l);
}

void load_hello(const struct load *l, struct probe_hello *ret)
{
	*ret = (struct probe_hello){
		.magic = PROBE_MAGIC,
		.version = PROBE_VERSION,
		.names = GROUPS,
		.targets_bytes = sizeof(struct probe_targets),
		.counts_bytes = sizeof(struct probe_counts),
		.sums_bytes = sizeof(struct probe_sums),
	};
	for (unsigned g = 0; g < GROUPS; g++) {
		snprintf(ret->name[g].name, sizeof(ret->name[g].name), "%s", groups[g].name);
		ret->name[g].on = l->group[g].on;
		snprintf(ret->name[g].why_off, sizeof(ret->name[g].why_off), "%s", l->group[g].why_off);
	}
}

void load_maps(const struct load *l, int ret[PROBE_MAPS])
{
	ret[0] = bpf_map__fd(l->skel->maps.targets);
	ret[1] = bpf_map__fd(l->skel->maps.counts);
	ret[2] = bpf_map__fd(l->skel->maps.sums);
}

void load_forget(struct load *l)
{
	memset(l->targets, 0, sizeof(*l->targets));
}
