/* SPDX-License-Identifier: MIT */
/*
 * The daemon's side of kvtierd-bpf: connect, map what it hands over, say whom to look at, read. After that no
 * system call is made but one look at the connection per tick.
 */
#include <dirent.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <syslog.h>
#include "daemon/internal.h"
#include "daemon/probes.h"
#include "ipc/sock.h"
#include "shm/probe.h"

#define RETRY_NS (UINT64_C(1) * 1000000000u)
#define HOST_PID_NS 0xeffffffcu /* inode of the initial PID namespace, fixed by the kernel */
#define STACKED 8               /* partition, mappings of device-mapper: so deep at most */

struct probes {
	int fd; /* to the loader; -1: off */
	uint64_t retry_ns;
	char why_off[sizeof(((struct probes_stat *)0)->why_off)];
	struct probe_hello hello;
	volatile struct probe_targets *targets;
	const volatile struct probe_counts *counts;
	const volatile struct probe_sums *sums;
	bool foreign_pids; /* the programs know processes by other numbers than we do */
	uint32_t untracked;
	char why_no_disk[64];
	/* As in targets, ours to trust; what each slot's sum was when its process came. */
	uint32_t tgid[PROBE_SLOTS];
	struct probe_sum base[PROBE_SLOTS];
	bool seen[PROBE_SLOTS];
};

/* ---- the disk below a path ----------------------------------------------------------------- */

static bool read_dev(const char *name, unsigned *major, unsigned *minor)
{
	_cleanup_close_ int fd = open(name, O_RDONLY | O_CLOEXEC);
	char text[32] = "";

	return fd >= 0 && read(fd, text, sizeof(text) - 1) > 0 && sscanf(text, "%u:%u", major, minor) == 2;
}

/* A single disk that this mapping lies on, by the name of its link in slaves/. */
static bool only_slave(const char *disk, char *ret, size_t size)
{
	char dir[128];
	_cleanup_free_ struct dirent **v = NULL;
	int n, found = 0;

	snprintf(dir, sizeof(dir), "%s/slaves", disk);
	n = scandir(dir, &v, NULL, NULL);
	for (int i = 0; i < n; i++) {
		if (v[i]->d_name[0] != '.' && !found++)
			snprintf(ret, size, "%s/%.64s/dev", dir, v[i]->d_name);
		free(v[i]);
	}
	return found == 1;
}

/* The whole disk whose requests carry what is written below path. 0: none, and why. */
static uint32_t disk_of(const char *path, char *why, size_t size)
{
	unsigned major, minor;
	char dir[64], name[256];
	struct stat st;

	if (stat(path, &st) < 0) {
		snprintf(why, size, "nvme path: %s", strerror(errno));
		return 0;
	}
	major = major(st.st_dev);
	minor = minor(st.st_dev);
	for (int i = 0; i < STACKED; i++) {
		snprintf(dir, sizeof(dir), "/sys/dev/block/%u:%u", major, minor);
		if (access(dir, F_OK) < 0) {
			snprintf(why, size, "nvme path: device %u:%u is no block device", major, minor);
			return 0;
		}
		snprintf(name, sizeof(name), "%s/partition", dir);
		if (access(name, F_OK) == 0) {
			snprintf(name, sizeof(name), "%s/../dev", dir);
		} else if (!only_slave(dir, name, sizeof(name))) {
			return PROBE_DEV(major, minor);
		}
		if (!read_dev(name, &major, &minor))
			return PROBE_DEV(major, minor);
	}
	return PROBE_DEV(major, minor);
}

/* ---- on and off ------------------------------------------------------------------------------- */

static void __attribute__((format(printf, 2, 3))) turn_off(struct probes *p, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(p->why_off, sizeof(p->why_off), fmt, ap);
	va_end(ap);
	if (p->targets)
		munmap((void *)p->targets, sizeof(*p->targets));
	if (p->counts)
		munmap((void *)p->counts, sizeof(*p->counts));
	if (p->sums)
		munmap((void *)p->sums, sizeof(*p->sums));
	p->targets = NULL;
	p->counts = NULL;
	p->sums = NULL;
	memset(p->tgid, 0, sizeof(p->tgid));
	close_fdp(&p->fd);
	p->fd = -1;
}

static int map_one(void *ret, int fd, size_t size, int prot)
{
	void *m = mmap(NULL, size, prot, MAP_SHARED, fd, 0);

	if (m == MAP_FAILED)
		return -errno;
	*(void **)ret = m;
	return 0;
}

/* Only a BPF map of the size that the message says has a mapping whose pages are all there. */
static bool is_map(int fd, uint32_t bytes)
{
	char path[64], text[512] = "", *at;
	_cleanup_close_ int info = -1;

	snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", fd);
	info = open(path, O_RDONLY | O_CLOEXEC);
	if (info < 0 || read(info, text, sizeof(text) - 1) <= 0)
		return false;
	at = strstr(text, "value_size:");
	return strstr(text, "map_type:") && at && strtoul(at + strlen("value_size:"), NULL, 10) == bytes;
}

static const char *check_hello(const struct probe_hello *h, ssize_t len, unsigned fds)
{
	if (len != sizeof(*h) || h->magic != PROBE_MAGIC)
		return "not kvtierd-bpf";
	if (h->version != PROBE_VERSION)
		return "another version of kvtierd-bpf";
	if (h->busy)
		return "kvtierd-bpf serves another daemon";
	if (fds != PROBE_MAPS || h->names > PROBE_NAMES || h->targets_bytes != sizeof(struct probe_targets) ||
	    h->counts_bytes != sizeof(struct probe_counts) || h->sums_bytes != sizeof(struct probe_sums))
		return "wrong sizes or descriptors";
	return NULL;
}

static void take_maps(struct core *c, struct probes *p, const int fd[PROBE_MAPS])
{
	static const uint32_t bytes[PROBE_MAPS] = {sizeof(struct probe_targets), sizeof(struct probe_counts),
						   sizeof(struct probe_sums)};
	struct stat ns;
	int r;

	for (unsigned i = 0; i < PROBE_MAPS; i++)
		if (!is_map(fd[i], bytes[i])) {
			turn_off(p, "descriptor %u is no BPF map of %u bytes", i, bytes[i]);
			return;
		}
	r = map_one(&p->targets, fd[0], bytes[0], PROT_READ | PROT_WRITE);
	if (r >= 0)
		r = map_one(&p->counts, fd[1], bytes[1], PROT_READ);
	if (r >= 0)
		r = map_one(&p->sums, fd[2], bytes[2], PROT_READ);
	if (r < 0) {
		turn_off(p, "mapping what kvtierd-bpf sent: %s", strerror(-r));
		return;
	}
	for (unsigned i = 0; i < p->hello.names; i++) {
		p->hello.name[i].name[sizeof(p->hello.name[i].name) - 1] = 0;
		p->hello.name[i].why_off[sizeof(p->hello.name[i].why_off) - 1] = 0;
	}
	p->foreign_pids = stat("/proc/self/ns/pid", &ns) < 0 || ns.st_ino != HOST_PID_NS;
	p->why_no_disk[0] = 0;
	p->targets->dev =
		c->cfg.nvme_enabled ? disk_of(c->cfg.nvme_path, p->why_no_disk, sizeof(p->why_no_disk)) : 0;
	if (!c->cfg.nvme_enabled)
		snprintf(p->why_no_disk, sizeof(p->why_no_disk), "no nvme tier");
	p->targets->daemon = p->foreign_pids ? 0 : (uint32_t)getpid();
	p->why_off[0] = 0;
	log_line(LOG_INFO, "kvtierd-bpf is connected");
}

static void hear(struct core *c, struct probes *p)
{
	int fd[WIRE_MAX_FDS];
	unsigned n = 0;
	ssize_t len = sock_recv(p->fd, &p->hello, sizeof(p->hello), fd, &n);
	const char *why;

	if (len == -EAGAIN)
		return;
	if (len <= 0) {
		turn_off(p, "kvtierd-bpf: %s", len ? strerror((int)-len) : "closed the connection");
		return;
	}
	why = check_hello(&p->hello, len, n);
	if (why)
		turn_off(p, "%s", why);
	else
		take_maps(c, p, fd);
	for (unsigned i = 0; i < n; i++)
		close(fd[i]);
}

static void dial(struct core *c, struct probes *p)
{
	char path[CONFIG_PATH + 128];
	struct sock_peer peer = {.pidfd = -1};
	const char *s = c->cfg.bpf_socket;
	int fd;

	if (!*s) {
		snprintf(p->why_off, sizeof(p->why_off), "bpf_socket is empty");
		return;
	}
	snprintf(path, sizeof(path), "%s%s%s", *s == '/' ? "" : c->cfg.run_dir, *s == '/' ? "" : "/", s);
	fd = sock_connect(path);
	if (fd < 0) {
		snprintf(p->why_off, sizeof(p->why_off), "kvtierd-bpf: %.50s: %s", path, strerror(-fd));
		return;
	}
	p->fd = fd;
	if (sock_peer(fd, &peer) < 0 || peer.uid) {
		turn_off(p, "whoever listens at %.50s is not root", path);
		return;
	}
	close_fdp(&peer.pidfd);
	snprintf(p->why_off, sizeof(p->why_off), "kvtierd-bpf has not answered yet");
	hear(c, p);
}

/* Still there? It never speaks again. */
static void look(struct probes *p)
{
	char byte;
	ssize_t n = recv(p->fd, &byte, 1, MSG_DONTWAIT);

	if (n < 0 && errno == EAGAIN)
		return;
	turn_off(p, "kvtierd-bpf: %s", n ? "spoke out of turn" : "closed the connection");
	log_line(LOG_NOTICE, "%s", p->why_off);
}

/* ---- processes ---------------------------------------------------------------------------------- */

static void read_sum(const struct probes *p, uint32_t slot, struct probe_sum *ret)
{
	const volatile struct probe_sum *s = &p->sums->slot[slot];

	*ret = (struct probe_sum){s->sched_ns, s->fault_ns, s->reclaim_ns, s->faults};
}

static int slot_find(const struct probes *p, uint32_t tgid)
{
	uint32_t at = probe_bucket(tgid);

	for (uint32_t i = at; i < at + PROBE_WAYS; i++)
		if (p->tgid[i] == tgid)
			return (int)i;
	return -1;
}

static int slot_free(const struct probes *p, uint32_t tgid)
{
	uint32_t at = probe_bucket(tgid);

	for (uint32_t i = at; i < at + PROBE_WAYS; i++)
		if (!p->tgid[i])
			return (int)i;
	return -1;
}

/* False: its bucket is full. */
static bool want(struct probes *p, pid_t pid)
{
	int slot = slot_find(p, (uint32_t)pid);

	if (slot < 0) {
		slot = slot_free(p, (uint32_t)pid);
		if (slot < 0)
			return false;
		p->tgid[slot] = (uint32_t)pid;
		read_sum(p, (uint32_t)slot, &p->base[slot]);
		p->targets->tgid[slot] = (uint32_t)pid;
	}
	p->seen[slot] = true;
	return true;
}

static void tell_whom(struct core *c, struct probes *p)
{
	const struct client *cl;

	if (p->foreign_pids)
		return;
	memset(p->seen, 0, sizeof(p->seen));
	p->untracked = 0;
	want(p, getpid());
	LIST_FOREACH(cl, &c->clients, link)
		if (cl->hello && cl->pid > 0 && !want(p, cl->pid))
			p->untracked++;
	for (uint32_t i = 0; i < PROBE_SLOTS; i++)
		if (p->tgid[i] && !p->seen[i])
			p->targets->tgid[i] = p->tgid[i] = 0;
}

void probes_tick(struct core *c)
{
	struct probes *p = c->probes;

	if (c->seams.stepped)
		return;
	if (!p) {
		p = c->probes = calloc(1, sizeof(*p));
		if (!p)
			return;
		p->fd = -1;
	}
	if (p->fd >= 0 && !p->targets)
		hear(c, p);
	else if (p->fd >= 0)
		look(p);
	else if (now_ns() >= p->retry_ns) {
		dial(c, p);
		p->retry_ns = now_ns() + RETRY_NS;
	}
	if (p->targets)
		tell_whom(c, p);
}

void probes_free(struct core *c)
{
	if (c->probes)
		turn_off(c->probes, "closed");
	free(c->probes);
	c->probes = NULL;
}

/* ---- reading --------------------------------------------------------------------------------------- */

static void read_histogram(const volatile struct histogram *h, struct histogram *ret)
{
	for (unsigned i = 0; i < HISTOGRAM_BUCKETS; i++)
		ret->bucket[i] = h->bucket[i];
	ret->sum = h->sum;
}

/* NULL: that one counts. */
static const char *off(const struct probes *p, const struct probe_name *n)
{
	if (!n->on)
		return n->why_off;
	if (!strcmp(n->name, "disk"))
		return p->why_no_disk[0] ? p->why_no_disk : NULL;
	return p->foreign_pids ? "kvtierd is not in the host's PID namespace" : NULL;
}

static const char *off_by_name(const struct probes *p, const char *name)
{
	if (!p || !p->targets)
		return p ? p->why_off : "not asked yet";
	for (uint32_t i = 0; i < p->hello.names; i++)
		if (!strcmp(p->hello.name[i].name, name))
			return off(p, &p->hello.name[i]);
	return "kvtierd-bpf does not count that";
}

static void program_stat(const struct probes *p, unsigned i, struct probe_program *ret)
{
	const char *why = off(p, &p->hello.name[i]);

	snprintf(ret->name, sizeof(ret->name), "%s", p->hello.name[i].name);
	ret->on = !why;
	snprintf(ret->why_off, sizeof(ret->why_off), "%s", why ?: "");
}

/* What is between the two reads has begun and not ended, at most. */
static uint64_t inflight(const struct probes *p)
{
	uint64_t ended = p->counts->disk_ended;

	return p->counts->disk_begun - ended;
}

const char *probes_disk(const struct core *c, struct probes_disk *ret)
{
	const struct probes *p = c->probes;
	const char *why = off_by_name(p, "disk");
	struct histogram h;

	if (why)
		return why;
	read_histogram(&p->counts->disk_read, &h);
	ret->reads = histogram_count(&h);
	ret->read_ns = h.sum;
	read_histogram(&p->counts->disk_write, &h);
	ret->writes = histogram_count(&h);
	ret->write_ns = h.sum;
	ret->inflight = inflight(p);
	return NULL;
}

const char *probes_short(const struct core *c, uint64_t *ret_ns)
{
	const struct probes *p = c->probes;
	const char *why = off_by_name(p, "reclaim");

	if (why && off_by_name(p, "memcg_reclaim"))
		return why;
	*ret_ns = p->counts->short_ns;
	return NULL;
}

void probes_stat(struct core *c, struct probes_stat *ret)
{
	const struct probes *p = c->probes;

	memset(ret, 0, sizeof(*ret));
	if (!p || !p->targets) {
		snprintf(ret->why_off, sizeof(ret->why_off), "%s", p ? p->why_off : "not asked yet");
		return;
	}
	ret->on = true;
	ret->programs = p->hello.names;
	for (unsigned i = 0; i < ret->programs; i++)
		program_stat(p, i, &ret->program[i]);
	read_histogram(&p->counts->disk_read, &ret->disk_read);
	read_histogram(&p->counts->disk_write, &ret->disk_write);
	read_histogram(&p->counts->uring, &ret->uring);
	read_histogram(&p->counts->reclaim, &ret->reclaim);
	read_histogram(&p->counts->fault, &ret->fault);
	read_histogram(&p->counts->sched, &ret->sched);
	ret->disk_inflight = inflight(p);
	ret->lost = p->counts->lost;
	ret->untracked = p->untracked;
}

bool probes_process(struct core *c, int pid, struct probes_process *ret)
{
	const struct probes *p = c->probes;
	struct probe_sum now;
	int slot = p && p->targets && pid > 0 ? slot_find(p, (uint32_t)pid) : -1;

	if (slot < 0)
		return false;
	read_sum(p, (uint32_t)slot, &now);
	*ret = (struct probes_process){
		.sched_ns = now.sched_ns - p->base[slot].sched_ns,
		.fault_ns = now.fault_ns - p->base[slot].fault_ns,
		.reclaim_ns = now.reclaim_ns - p->base[slot].reclaim_ns,
		.faults = now.faults - p->base[slot].faults,
	};
	return true;
}
