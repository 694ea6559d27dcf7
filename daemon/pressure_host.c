/* SPDX-License-Identifier: MIT */
/* What the host says of its memory. Files stay open: a look is one pread each. */
#include <ctype.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include "daemon/pressure.h"
#include "shm/util.h"

#define GROUPS 8u /* of ours, from our own upwards */

/* One cgroup with its limits. -1: no such file. */
struct group {
	int max, high, current, stat;
	bool v1;
};

struct host {
	int meminfo;
	struct group group[GROUPS];
	unsigned n;
	char psi_own[256], psi_all[256];
};

/* ---- reading ------------------------------------------------------------------------- */

static size_t slurp(int fd, char *buf, size_t size)
{
	ssize_t n = fd < 0 ? -1 : pread(fd, buf, size - 1, 0);

	buf[n > 0 ? n : 0] = 0;
	return n > 0 ? (size_t)n : 0;
}

/* A number, "max" or nothing: UINT64_MAX. */
static uint64_t number(int fd)
{
	char buf[64];
	uint64_t v;

	if (!slurp(fd, buf, sizeof(buf)) || !isdigit((unsigned char)*buf))
		return UINT64_MAX;
	v = strtoull(buf, NULL, 10);
	return v >= (uint64_t)INT64_MAX / 2 ? UINT64_MAX : v; /* how v1 writes "no limit" */
}

/* The number behind a key that begins a line; 0: there is none. */
static uint64_t keyed(const char *text, const char *key)
{
	size_t n = strlen(key);

	for (const char *p = text; p; p = strchr(p, '\n')) {
		p += *p == '\n';
		if (!strncmp(p, key, n))
			return strtoull(p + n, NULL, 10);
	}
	return 0;
}

/* ---- our cgroups ---------------------------------------------------------------------- */

static int open_in(const char *dir, const char *name)
{
	char path[512];
	int n = snprintf(path, sizeof(path), "%s/%s", dir, name);

	return n < (int)sizeof(path) ? open(path, O_RDONLY | O_CLOEXEC) : -1;
}

static void group_close(struct group *g)
{
	close_fdp(&g->max);
	close_fdp(&g->high);
	close_fdp(&g->current);
	close_fdp(&g->stat);
}

static void add_group(struct host *h, const char *dir, bool v1)
{
	struct group *g = &h->group[h->n];

	if (h->n == GROUPS)
		return;
	g->v1 = v1;
	g->max = open_in(dir, v1 ? "memory.limit_in_bytes" : "memory.max");
	g->high = v1 ? -1 : open_in(dir, "memory.high");
	g->current = open_in(dir, v1 ? "memory.usage_in_bytes" : "memory.current");
	g->stat = open_in(dir, "memory.stat");
	if (g->current >= 0 && g->max >= 0)
		h->n++;
	else
		group_close(g);
}

/* Our own group and those above it, up to the mount. path begins with a slash. */
static void add_groups(struct host *h, const char *mount, char *path, bool v1)
{
	char dir[512];

	for (char *slash; *path; *slash = 0) {
		if (snprintf(dir, sizeof(dir), "%s%s", mount, path) < (int)sizeof(dir))
			add_group(h, dir, v1);
		slash = strrchr(path, '/');
		if (!slash || slash == path)
			break;
	}
}

/* A line of /proc/self/cgroup: "0::/path" (v2), "4:memory:/path" (v1, among others). */
static void take_line(struct host *h, const char *root, char *line)
{
	char *names = strchr(line, ':'), *path = names ? strchr(names + 1, ':') : NULL, mount[256];

	if (!path)
		return;
	*path++ = 0;
	path[strcspn(path, "\n")] = 0;
	names++;
	if (!*names) {
		snprintf(mount, sizeof(mount), "%s/sys/fs/cgroup", root);
		add_groups(h, mount, path, false);
		snprintf(h->psi_own, sizeof(h->psi_own), "%s/sys/fs/cgroup%s/memory.pressure", root, path);
	} else if (!strcmp(names, "memory")) {
		snprintf(mount, sizeof(mount), "%s/sys/fs/cgroup/memory", root);
		add_groups(h, mount, path, true);
	}
}

int host_open(struct host **ret, const char *root)
{
	struct host *h = calloc(1, sizeof(*h));
	char path[256], line[512];
	FILE *f;

	if (!h)
		return -ENOMEM;
	snprintf(path, sizeof(path), "%s/proc/meminfo", root);
	h->meminfo = open(path, O_RDONLY | O_CLOEXEC);
	snprintf(h->psi_all, sizeof(h->psi_all), "%s/proc/pressure/memory", root);
	snprintf(path, sizeof(path), "%s/proc/self/cgroup", root);
	f = fopen(path, "re");
	while (f && fgets(line, sizeof(line), f))
		take_line(h, root, line);
	if (f)
		fclose(f);
	*ret = h;
	return 0;
}

void host_close(struct host *h)
{
	if (!h)
		return;
	close_fdp(&h->meminfo);
	for (unsigned i = 0; i < h->n; i++)
		group_close(&h->group[i]);
	free(h);
}

/* ---- how much is left ------------------------------------------------------------------- */

static void count(uint64_t available, uint64_t reserve, uint64_t *missing, uint64_t *spare)
{
	*missing = MAX(*missing, reserve > available ? reserve - available : 0);
	*spare = MIN(*spare, available > reserve ? available - reserve : 0);
}

uint64_t host_missing(const struct host *h, uint64_t reserve, uint64_t *ret_spare)
{
	uint64_t missing = 0, spare = UINT64_MAX;
	char text[8192];

	if (slurp(h->meminfo, text, sizeof(text)))
		count(keyed(text, "MemAvailable:") << 10, reserve, &missing, &spare);
	for (unsigned i = 0; i < h->n; i++) {
		const struct group *g = &h->group[i];
		uint64_t limit = MIN(number(g->max), number(g->high)), used = number(g->current), file;

		if (limit == UINT64_MAX || used == UINT64_MAX)
			continue;
		/* Cache that nobody maps goes by itself. */
		slurp(g->stat, text, sizeof(text));
		file = keyed(text, g->v1 ? "total_inactive_file " : "inactive_file ");
		used -= MIN(used, file);
		count(limit - MIN(limit, used), MIN(reserve, limit / 8), &missing, &spare);
	}
	*ret_spare = spare;
	return missing;
}

/* ---- PSI -------------------------------------------------------------------------------- */

/* "150ms" or "2s" in microseconds; moves *p behind it. */
static bool duration(const char **p, uint32_t *ret)
{
	char *end;
	unsigned long v = isdigit((unsigned char)**p) ? strtoul(*p, &end, 10) : 0;

	if (!v || v > 10000)
		return false;
	if (!strncmp(end, "ms", 2)) {
		*ret = (uint32_t)v * 1000;
		*p = end + 2;
	} else if (*end == 's' && v <= 10) {
		*ret = (uint32_t)v * 1000000;
		*p = end + 1;
	} else {
		return false;
	}
	return true;
}

int psi_parse(const char *spec, bool *ret_full, uint32_t *ret_stall_us, uint32_t *ret_window_us, char *why,
	      size_t size)
{
	const char *p = spec;
	uint32_t stall, window;
	bool full = !strncmp(p, "full ", 5);

	*ret_window_us = 0;
	if (!strcmp(spec, "no"))
		return 0;
	if (!full && strncmp(p, "some ", 5))
		goto bad;
	p += 5;
	if (!duration(&p, &stall) || *p++ != '/' || !duration(&p, &window) || *p)
		goto bad;
	if (window % 2000000) {
		snprintf(why, size, "\"%.40s\", the window must be a multiple of 2 s, up to 10 s", spec);
		return -EINVAL;
	}
	if (stall > window) {
		snprintf(why, size, "\"%.40s\", the stall must be at most the window", spec);
		return -EINVAL;
	}
	*ret_full = full;
	*ret_stall_us = stall;
	*ret_window_us = window;
	return 0;
bad:
	snprintf(why, size,
		 "\"%.40s\", must be \"some STALL/WINDOW\" as in \"some 150ms/2s\", \"full ...\", or no", spec);
	return -EINVAL;
}

int host_psi(const struct host *h, const char *spec, char ret[64])
{
	const char *const at[] = {h->psi_own, h->psi_all};
	uint32_t stall, window;
	char text[64], why[128];
	bool full;
	int r = psi_parse(spec, &full, &stall, &window, why, sizeof(why)), n;

	if (r < 0 || !window)
		return r < 0 ? r : -EOPNOTSUPP;
	n = snprintf(text, sizeof(text), "%s %u %u", full ? "full" : "some", stall, window) + 1;
	r = -ENOENT;
	for (size_t i = 0; i < ARRAY_SIZE(at); i++) {
		int fd = *at[i] ? open(at[i], O_RDWR | O_CLOEXEC | O_NONBLOCK) : -1;

		if (fd >= 0 && write(fd, text, (size_t)n) == n) {
			snprintf(ret, 64, "%s of %s", spec, i ? "the host" : "the cgroup");
			return fd;
		}
		if (*at[i])
			r = -errno;
		close_fdp(&fd);
	}
	return r;
}
