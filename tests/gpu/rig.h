/* SPDX-License-Identifier: MIT */
#pragma once
/* A kvtierd of one's own and a GPU, for programs that measure or check the whole way. One thread. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include "ipc/cuda/driver.h"
#include "ipc/kvtier_cuda.h"
#include "shm/util.h"

#define MIB (UINT64_C(1) << 20)
#define RIG_CHUNK (64 * MIB) /* of pinned host memory, for filling and comparing */

struct rig {
	char dir[256], sock[300];
	pid_t daemon;
	const struct cuda_driver *d;
	struct kvtier *c;
	struct kvtier_cuda *gpu;
	void *ctx, *stream;
	uint8_t *pinned; /* RIG_CHUNK bytes */
	struct kvtier_cuda_info info;
};

static struct rig *rig_last; /* for die(): the daemon and its store end with the program */

static inline void rig_stop(struct rig *g);

__attribute__((format(printf, 1, 2), noreturn)) static inline void die(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	fputc('\n', stderr);
	if (rig_last)
		rig_stop(rig_last);
	exit(1);
}

/* A result of libkvtier, or the end. */
static inline int must(int r, const char *what)
{
	if (r < 0)
		die("%s: %s: %s", what, kvtier_strerror(r), kvtier_last_error());
	return r;
}

/* The same for a call of the driver. */
static inline void cu(struct rig *g, cuda_result r, const char *what)
{
	if (r)
		die("%s: %s", what, cuda_check(g->d, r, what) ? kvtier_last_error() : "");
}

/* ---- the daemon ------------------------------------------------------------------------- */

/* build/tests/gpu/PROGRAM → build/kvtierd */
static inline void rig_binary(char *ret, size_t size)
{
	char self[256];
	ssize_t n = readlink("/proc/self/exe", self, sizeof(self) - 1);

	if (n <= 0)
		die("/proc/self/exe: %s", strerror(errno));
	self[n] = '\0';
	for (int i = 0; i < 3; i++)
		*strrchr(self, '/') = '\0';
	snprintf(ret, size, "%s/kvtierd", self);
}

static inline void rig_remove(const char *dir)
{
	pid_t pid = fork();

	if (!pid) {
		execlp("rm", "rm", "-rf", "--", dir, (char *)NULL);
		_exit(127);
	}
	waitpid(pid, NULL, 0);
}

static inline void rig_stop(struct rig *g)
{
	if (g->daemon > 0) {
		kill(g->daemon, SIGKILL); /* nothing of its store is wanted again */
		waitpid(g->daemon, NULL, 0);
	}
	g->daemon = 0;
	if (g->dir[0] && !getenv("KEEP"))
		rig_remove(g->dir);
	g->dir[0] = '\0';
	rig_last = NULL;
}

/* What the daemon is given; bytes are multiples of 1 MiB. */
struct rig_conf {
	const char *base; /* folder on a disk; the store and everything else goes into a new one in it */
	unsigned workers, depth;
	uint64_t dram, nvme, staging;
};

static inline void rig_write_conf(struct rig *g, const struct rig_conf *c, const char *path)
{
	FILE *f = fopen(path, "w");

	if (!f)
		die("%s: %s", path, strerror(errno));
	fprintf(f, "[kvtierd]\nrun_dir=%s\nworkers=%u\n[dram]\nsize=%lluM\n", g->dir, c->workers,
		(unsigned long long)(c->dram / MIB));
	fprintf(f, "[nvme]\nenabled=yes\npath=%s\nsize=%lluM\nstaging=%lluM\ndepth=%u\n", g->dir,
		(unsigned long long)(c->nvme / MIB), (unsigned long long)(c->staging / MIB), c->depth);
	fclose(f);
}

/* Start kvtierd and connect. The start writes the whole store once, so that later writes find their blocks. */
static inline void rig_daemon(struct rig *g, const struct rig_conf *c)
{
	struct kvtier_open_opts o = {.size = sizeof(o), .socket = g->sock, .name = "e2e", .timeout_ms = 20000};
	char base[PATH_MAX], conf[320], log[320], binary[300];
	int r = 0;

	if (!realpath(c->base, base))
		die("%s: %s", c->base, strerror(errno));
	snprintf(g->dir, sizeof(g->dir), "%.200s/e2e-XXXXXX", base);
	if (!mkdtemp(g->dir))
		die("%s: %s", g->dir, strerror(errno));
	rig_last = g;
	snprintf(g->sock, sizeof(g->sock), "%s/kvtierd.sock", g->dir);
	snprintf(conf, sizeof(conf), "%s/kvtierd.conf", g->dir);
	snprintf(log, sizeof(log), "%s/log", g->dir);
	rig_binary(binary, sizeof(binary));
	rig_write_conf(g, c, conf);
	g->daemon = fork();
	if (!g->daemon) {
		int fd = open(log, O_WRONLY | O_CREAT | O_APPEND, 0600);

		if (fd >= 0) {
			dup2(fd, 1);
			dup2(fd, 2);
		}
		execl(binary, binary, "--config", conf, (char *)NULL);
		_exit(127);
	}
	for (int i = 0; i < 600; i++) { /* a minute */
		r = access(g->sock, F_OK) ? KVT_E_DAEMON : kvtier_open(&o, &g->c);
		if (!r)
			return;
		if (waitpid(g->daemon, NULL, WNOHANG) == g->daemon) {
			char line[512] = "";
			int fd = open(log, O_RDONLY);

			g->daemon = 0;
			if (fd >= 0 && read(fd, line, sizeof(line) - 1) < 0)
				line[0] = '\0';
			die("kvtierd ended: %s", line);
		}
		usleep(100000);
	}
	must(r, "kvtier_open");
}

/* Seconds of CPU that the daemon's threads have used so far. */
struct rig_cpu {
	double loop, workers, io;
};
static inline struct rig_cpu rig_cpu(const struct rig *g)
{
	struct rig_cpu ret = {0};
	struct dirent *e;
	char path[300];
	DIR *d;

	snprintf(path, sizeof(path), "/proc/%d/task", g->daemon);
	d = opendir(path);
	while (d && (e = readdir(d))) {
		char comm[32] = "";
		double ns = 0;
		FILE *f;

		snprintf(path, sizeof(path), "/proc/%d/task/%.20s/comm", g->daemon, e->d_name);
		f = fopen(path, "r");
		if (!f || !fgets(comm, sizeof(comm), f))
			comm[0] = '\0';
		if (f)
			fclose(f);
		snprintf(path, sizeof(path), "/proc/%d/task/%.20s/schedstat", g->daemon, e->d_name);
		f = fopen(path, "r");
		if (f && fscanf(f, "%lf", &ns) != 1)
			ns = 0;
		if (f)
			fclose(f);
		*(atoi(e->d_name) == g->daemon       ? &ret.loop
		  : !strncmp(comm, "kvt-worker", 10) ? &ret.workers
						     : &ret.io) += ns / 1e9;
	}
	if (d)
		closedir(d);
	return ret;
}

/* ---- the GPU --------------------------------------------------------------------------------- */

/* 0, or KVT_E_GPU: there is none that works. */
static inline int rig_gpu(struct rig *g)
{
	struct kvtier_cuda_opts o = {.size = sizeof(o)};
	int dev, r = cuda_driver_get(&g->d);

	if (!r)
		r = kvtier_cuda_open(&o, &g->gpu);
	if (r < 0)
		return r;
	g->info.size = sizeof(g->info);
	must(kvtier_cuda_info(g->gpu, &g->info), "kvtier_cuda_info");
	cu(g, g->d->device_get(&dev, 0), "cuDeviceGet");
	cu(g, g->d->primary_retain(&g->ctx, dev), "cuDevicePrimaryCtxRetain");
	cu(g, g->d->ctx_push(g->ctx), "cuCtxPushCurrent");
	cu(g, g->d->stream_create(&g->stream, 1), "cuStreamCreate");
	cu(g, g->d->host_alloc((void **)&g->pinned, RIG_CHUNK, 0), "cuMemHostAlloc");
	return 0;
}
