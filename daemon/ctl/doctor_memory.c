/* SPDX-License-Identifier: MIT */
/* Memory: whether the DRAM tier fits, swap, huge pages, nodes. */
#include <stdio.h>
#include <string.h>
#include "daemon/ctl/doctor.h"
#include "shm/util.h"
#include "tiers/tier.h"

#define MIB (UINT64_C(1) << 20)
#define NODES 1024u

/* The least memory.max and memory.high of the daemon's groups, or what the unit says. */
static void group_limits(const struct patient *p, uint64_t *ret_max, uint64_t *ret_high)
{
	char text[4096], *path;
	uint64_t v;

	*ret_max = *ret_high = UINT64_MAX;
	if (!p->pid) {
		if (unit_value(p, "MemoryMax", text, sizeof(text)) && unit_size(text, &v))
			*ret_max = v;
		if (unit_value(p, "MemoryHigh", text, sizeof(text)) && unit_size(text, &v))
			*ret_high = v;
		return;
	}
	host_read(p, text, sizeof(text), "/proc/%d/cgroup", p->pid);
	path = strstr(text, "0::/");
	if (!path)
		return;
	path += 3;
	path[strcspn(path, "\n")] = 0;
	for (char *slash; slash = strrchr(path, '/'), slash && path[1]; *slash = 0) {
		if (host_number(p, &v, "/sys/fs/cgroup%s/memory.max", path))
			*ret_max = MIN(*ret_max, v);
		if (host_number(p, &v, "/sys/fs/cgroup%s/memory.high", path))
			*ret_high = MIN(*ret_high, v);
		if (slash == path)
			break;
	}
}

void check_memory(const struct patient *p, struct finding *f)
{
	uint64_t size = p->cfg.dram_size, total, available, max, high;
	char text[8192];

	host_read(p, text, sizeof(text), "/proc/meminfo");
	if (!text_number(text, "MemTotal:", &total) || !text_number(text, "MemAvailable:", &available)) {
		say(f, VERDICT_UNCHECKED, "/proc/meminfo: no MemTotal or MemAvailable");
		return;
	}
	group_limits(p, &max, &high);
	if (size > total) {
		say(f, VERDICT_PROBLEM, "[dram] size is %s, the host has %s", human(size), human(total));
		advise(f, "in %s: [dram] size = %lluM", p->file, (unsigned long long)(total / 2 / MIB));
	} else if (size > max) {
		say(f, VERDICT_PROBLEM, "[dram] size is %s, memory.max of the service %s", human(size),
		    human(max));
		advise(f, "systemctl edit kvtierd, [Service] MemoryMax=%lluM, or [dram] size = %lluM",
		       (unsigned long long)((size + size / 4) / MIB), (unsigned long long)(max / 4 * 3 / MIB));
	} else if (size > high) {
		say(f, VERDICT_WARNING, "[dram] size is %s, memory.high of the service %s", human(size),
		    human(high));
		advise(f, "systemctl edit kvtierd, [Service] MemoryHigh=%lluM, or [dram] size = %lluM",
		       (unsigned long long)((size + size / 4) / MIB), (unsigned long long)(high / 4 * 3 / MIB));
	} else if (size > available + p->dram_resident) {
		say(f, VERDICT_WARNING, "[dram] size is %s, %s are available and the tier holds %s",
		    human(size), human(available), human(p->dram_resident));
		advise(f, "free memory, or in %s: [dram] size = %lluM", p->file,
		       (unsigned long long)((available + p->dram_resident) / 4 * 3 / MIB));
	} else {
		say(f, VERDICT_OK, "[dram] size is %s; %s of %s available, the service may use %s", human(size),
		    human(available), human(total), human(MIN(max, high)));
	}
}

void check_swap(const struct patient *p, struct finding *f)
{
	char text[8192], value[64];
	uint64_t total;
	bool none;

	host_read(p, text, sizeof(text), "/proc/meminfo");
	if (!text_number(text, "SwapTotal:", &total)) {
		say(f, VERDICT_UNCHECKED, "/proc/meminfo: no SwapTotal");
		return;
	}
	none = unit_value(p, "MemorySwapMax", value, sizeof(value)) && !strcmp(value, "0");
	if (!total || none) {
		say(f, VERDICT_OK, "%s of swap%s", total ? human(total) : "none",
		    none ? ", none of it for the service (MemorySwapMax=0)" : "");
		return;
	}
	say(f, VERDICT_NOTE, "%s of swap, and the service may use it", human(total));
	advise(f, "systemctl edit kvtierd, [Service] MemorySwapMax=0");
}

void check_thp(const struct patient *p, struct finding *f)
{
	static const char file[] = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
	char text[128];

	if (!p->cfg.dram_huge) {
		say(f, VERDICT_OK, "not asked for ([dram] huge_pages = no)");
	} else if (host_read(p, text, sizeof(text), "%s", file) <= 0) {
		say(f, VERDICT_NOTE, "%s: this kernel has none", file);
		advise(f, "reserve pages instead: sysctl -w vm.nr_hugepages=%llu",
		       (unsigned long long)DIV_UP(p->cfg.dram_size, 2 * MIB));
	} else if (strstr(text, "[never]") || strstr(text, "[deny]")) {
		say(f, VERDICT_NOTE, "shared memory: %s", text);
		advise(f, "echo advise > %s", file);
	} else if (strchr(text, '[')) {
		say(f, VERDICT_OK, "shared memory: %s", text);
	} else {
		say(f, VERDICT_UNCHECKED, "%s: \"%s\"", file, text);
	}
}

void check_hugetlb(const struct patient *p, struct finding *f)
{
	uint64_t pages, unused, want = DIV_UP(p->cfg.dram_size, 2 * MIB);

	if (!host_number(p, &pages, "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages") ||
	    !host_number(p, &unused, "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages") ||
	    pages > UINT64_MAX / (2 * MIB)) {
		say(f, VERDICT_UNCHECKED, "/sys/kernel/mm/hugepages/hugepages-2048kB: no figures");
	} else if (!p->cfg.dram_huge && pages) {
		say(f, VERDICT_NOTE, "%s reserved, but [dram] huge_pages = no", human(pages * 2 * MIB));
		advise(f, "in %s: [dram] huge_pages = yes, or sysctl -w vm.nr_hugepages=0", p->file);
	} else if (pages && pages < want) {
		say(f, VERDICT_NOTE, "%s reserved (%llu pages free), [dram] size is %s", human(pages * 2 * MIB),
		    (unsigned long long)unused, human(p->cfg.dram_size));
		advise(f, "sysctl -w vm.nr_hugepages=%llu", (unsigned long long)want);
	} else {
		say(f, VERDICT_OK, pages ? "%s reserved, %llu pages free" : "%s reserved, and none are needed",
		    pages ? human(pages * 2 * MIB) : "none", (unsigned long long)unused);
	}
}

/* A list such as 0-1,4; the numbers in it, at most `most`. */
static unsigned nodes_online(const struct patient *p, unsigned *ret, unsigned most)
{
	char text[256];
	unsigned n = 0;

	host_read(p, text, sizeof(text), "/sys/devices/system/node/online");
	for (char *s = text; *s >= '0' && *s <= '9';) {
		unsigned long a = strtoul(s, &s, 10), b = a;

		if (*s == '-')
			b = strtoul(s + 1, &s, 10);
		for (; a <= b && b < NODES && n < most; a++)
			ret[n++] = (unsigned)a;
		s += *s == ',';
	}
	return n;
}

static bool node_total(const struct patient *p, unsigned node, uint64_t *ret)
{
	char text[4096], key[48];

	snprintf(key, sizeof(key), "Node %u MemTotal:", node);
	return host_read(p, text, sizeof(text), "/sys/devices/system/node/node%u/meminfo", node) > 0 &&
	       text_number(text, key, ret);
}

void check_numa(const struct patient *p, struct finding *f)
{
	unsigned node[NODES], n = nodes_online(p, node, NODES);
	uint64_t total = 0, sum = 0;
	bool there = false;

	for (unsigned i = 0; i < n; i++) {
		if (!node_total(p, node[i], &total))
			total = 0;
		sum += total;
		if ((int)node[i] != p->cfg.dram_node)
			continue;
		there = true;
		if (total >= p->cfg.dram_size)
			continue;
		say(f, VERDICT_WARNING, "[dram] node = %d has %s, [dram] size is %s", p->cfg.dram_node,
		    human(total), human(p->cfg.dram_size));
		advise(f, "in %s: [dram] node = client, or size = %lluM", p->file,
		       (unsigned long long)(total / 4 * 3 / MIB));
		return;
	}
	if (!n) {
		say(f, VERDICT_UNCHECKED, "/sys/devices/system/node/online: no nodes");
	} else if (p->cfg.dram_node >= 0 && !there) {
		say(f, VERDICT_PROBLEM, "[dram] node = %d is not online; %u nodes are", p->cfg.dram_node, n);
		advise(f, "in %s: [dram] node = client", p->file);
	} else if (n > 1 && p->cfg.dram_node == TIER_NODE_OFF) {
		say(f, VERDICT_NOTE, "%u nodes, [dram] node = off", n);
		advise(f, "in %s: [dram] node = client", p->file);
	} else {
		say(f, VERDICT_OK, "%u node%s with %s", n, n == 1 ? "" : "s", human(sum));
	}
}

void check_reclaim(const struct patient *p, struct finding *f)
{
	unsigned node[NODES], n = nodes_online(p, node, NODES);
	uint64_t zone = 0, balancing = 0;
	bool any = host_number(p, &zone, "/proc/sys/vm/zone_reclaim_mode");

	any |= host_number(p, &balancing, "/proc/sys/kernel/numa_balancing");
	if (!any) {
		say(f, n > 1 ? VERDICT_UNCHECKED : VERDICT_OK, "this kernel was built without NUMA");
	} else if (n > 1 && zone) {
		say(f, VERDICT_WARNING, "%u nodes, vm.zone_reclaim_mode = %llu", n, (unsigned long long)zone);
		advise(f, "sysctl -w vm.zone_reclaim_mode=0");
	} else if (n > 1 && balancing) {
		say(f, VERDICT_NOTE, "%u nodes, kernel.numa_balancing = %llu", n,
		    (unsigned long long)balancing);
		advise(f, "sysctl -w kernel.numa_balancing=0");
	} else {
		say(f, VERDICT_OK, "%u node%s, vm.zone_reclaim_mode = %llu, kernel.numa_balancing = %llu", n,
		    n == 1 ? "" : "s", (unsigned long long)zone, (unsigned long long)balancing);
	}
}
