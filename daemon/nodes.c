/* SPDX-License-Identifier: MIT */
/* What the host says of its nodes. Read once: memory that is plugged in later is used after a restart. */
#include "daemon/nodes.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "shm/bits.h"
#include "shm/place.h"
#include "shm/util.h"

#define MAX_CPUS 8192u
#define WORDS (PLACE_NODES / 64)

/* A file below root as text; false: there is none. */
static bool slurp(const char *root, const char *path, char *buf, size_t size)
{
	_cleanup_close_ int fd = -1;
	char full[320];
	ssize_t n;

	*buf = 0;
	snprintf(full, sizeof(full), "%s%s", root, path);
	fd = open(full, O_RDONLY | O_CLOEXEC);
	n = fd < 0 ? -1 : read(fd, buf, size - 1);
	buf[n > 0 ? n : 0] = 0;
	return n > 0;
}

void nodes_parse_list(const char *text, uint64_t *bits, unsigned n)
{
	while (isdigit((unsigned char)*text)) {
		char *end;
		unsigned long a = strtoul(text, &end, 10), b = a;

		if (*end == '-')
			b = strtoul(end + 1, &end, 10);
		for (; a <= b && a < n; a++)
			bits_set(bits, a);
		text = end + (*end == ',');
	}
}

static void read_list(const char *root, const char *path, uint64_t bits[WORDS])
{
	char text[4096];

	if (slurp(root, path, text, sizeof(text)))
		nodes_parse_list(text, bits, PLACE_NODES);
}

/* What our cpuset leaves us; no word of it: everything. */
static void read_allowed(const char *root, uint64_t bits[WORDS])
{
	char text[8192];
	const char *at = slurp(root, "/proc/self/status", text, sizeof(text))
				 ? strstr(text, "\nMems_allowed_list:")
				 : NULL;

	if (!at) {
		memset(bits, 0xff, WORDS * sizeof(*bits));
		return;
	}
	at = strchr(at, ':') + 1;
	nodes_parse_list(at + strspn(at, " \t"), bits, PLACE_NODES);
}

static uint64_t memory_of(const char *root, unsigned id)
{
	char path[96], text[2048];
	const char *at;

	snprintf(path, sizeof(path), "/sys/devices/system/node/node%u/meminfo", id);
	at = slurp(root, path, text, sizeof(text)) ? strstr(text, "MemTotal:") : NULL;
	return at ? strtoull(at + strlen("MemTotal:"), NULL, 10) * 1024 : 0;
}

/* Distances from node `id` to those in the table; the kernel lists all that are online. */
static void read_distance(const char *root, unsigned id, const uint64_t online[WORDS],
			  const struct tier_nodes *t, uint8_t ret[TIER_NODES])
{
	char path[96], text[8192], *at = text;

	memset(ret, UINT8_MAX, TIER_NODES);
	snprintf(path, sizeof(path), "/sys/devices/system/node/node%u/distance", id);
	slurp(root, path, text, sizeof(text));
	bits_for_each(other, online, PLACE_NODES) {
		unsigned long d = strtoul(at, &at, 10);

		for (unsigned i = 0; d && i < t->n; i++)
			if (t->id[i] == (int)other)
				ret[i] = (uint8_t)MIN(d, (unsigned long)UINT8_MAX);
	}
}

static unsigned nearest(const struct tier_nodes *t, const uint8_t distance[TIER_NODES])
{
	unsigned best = 0;

	for (unsigned i = 1; i < t->n; i++)
		if (distance[i] < distance[best])
			best = i;
	return best;
}

/* Processors of a node without memory count as the nearest one's. */
static void read_cpus(struct nodes *n, unsigned id, const uint64_t online[WORDS])
{
	uint64_t cpus[MAX_CPUS / 64] = {0};
	uint8_t distance[TIER_NODES];
	char path[96], text[4096];
	unsigned node;

	read_distance(n->root, id, online, &n->table, distance);
	node = nearest(&n->table, distance);
	snprintf(path, sizeof(path), "/sys/devices/system/node/node%u/cpulist", id);
	if (slurp(n->root, path, text, sizeof(text)))
		nodes_parse_list(text, cpus, MAX_CPUS);
	bits_for_each(i, cpus, MAX_CPUS) {
		n->of_cpu[i] = (int8_t)node;
		n->cpus = MAX(n->cpus, (unsigned)i + 1);
	}
}

int nodes_open(struct nodes *ret, const char *root)
{
	uint64_t online[WORDS] = {0}, memory[WORDS] = {0}, allowed[WORDS] = {0};
	struct tier_nodes *t = &ret->table;

	memset(ret, 0, sizeof(*ret));
	snprintf(ret->root, sizeof(ret->root), "%s", root);
	ret->of_cpu = malloc(MAX_CPUS);
	if (!ret->of_cpu)
		return -ENOMEM;
	memset(ret->of_cpu, -1, MAX_CPUS);
	read_list(root, "/sys/devices/system/node/online", online);
	read_list(root, "/sys/devices/system/node/has_memory", memory);
	read_allowed(root, allowed);
	for (unsigned w = 0; w < WORDS; w++)
		memory[w] &= online[w] & allowed[w];
	bits_for_each(id, memory, PLACE_NODES) {
		if (t->n == TIER_NODES)
			break; /* what is past them is used by whoever has no wish */
		t->id[t->n] = (int)id;
		t->memory[t->n++] = memory_of(root, (unsigned)id);
	}
	for (unsigned i = 0; i < t->n; i++)
		read_distance(root, (unsigned)t->id[i], online, t, t->distance[i]);
	if (t->n)
		bits_for_each(id, online, PLACE_NODES)
			read_cpus(ret, (unsigned)id, online);
	return 0;
}

void nodes_close(struct nodes *n)
{
	free(n->of_cpu);
	n->of_cpu = NULL;
	n->cpus = 0;
}

/* Where its main thread was last; -1: it is not to be seen. */
static int last_cpu(const struct nodes *n, pid_t pid)
{
	char path[48], text[1024], *at;

	snprintf(path, sizeof(path), "/proc/%d/stat", (int)pid);
	at = slurp(n->root, path, text, sizeof(text)) ? strrchr(text, ')')
						      : NULL; /* its name may hold anything */
	for (int field = 2; at && field < 39; field++)
		at = strchr(at + 1, ' ');
	return at ? atoi(at + 1) : -1;
}

int nodes_of_process(const struct nodes *n, pid_t pid, bool *ret_firm)
{
	uint64_t set[MAX_CPUS / 64] = {0};
	int node = -1, cpu;

	*ret_firm = false;
	if (pid <= 0 || sched_getaffinity(pid, sizeof(set), (cpu_set_t *)set) < 0)
		return -1;
	*ret_firm = true;
	bits_for_each(i, set, n->cpus) {
		if (n->of_cpu[i] < 0)
			continue;
		if (node >= 0 && n->of_cpu[i] != node)
			*ret_firm = false;
		node = n->of_cpu[i];
	}
	if (*ret_firm)
		return node;
	cpu = last_cpu(n, pid);
	return cpu >= 0 && (unsigned)cpu < n->cpus ? n->of_cpu[cpu] : -1;
}
