/* SPDX-License-Identifier: MIT */
/*
 * kvtierctl doctor: the table of checks, their processes and what is printed. Every check, and reading the
 * configuration and asking the daemon before them, runs in a child that writes into memory shared with us. A
 * child that is late is killed and not waited for: on a hung network file system it ends when the server
 * answers.
 */
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include "daemon/ctl/ctl.h"
#include "daemon/ctl/doctor.h"
#include "shm/util.h"

#define LIMIT_NS                                                                                               \
	UINT64_C(4000000000) /* for all checks, which run side by side; the same for what goes before */
#define CONFIG_FILE KVT_SYSCONFDIR "/kvtier/kvtierd.conf"

static const struct check {
	const char *id, *what, *why;
	doctor_check *run;
} checks[] = {
	{"config", "configuration file", "a daemon with a wrong file does not start", check_config},
	{"unit", "systemd service",
	 "segments survive a restart in systemd's fd store, and the watchdog ends a stuck daemon", check_unit},
	{"sockets", "sockets and who may use them", "runtimes and kvtierctl come in through them",
	 check_sockets},
	{"io_uring", "asynchronous disk I/O",
	 "without io_uring the nvme tier uses threads, which cost more for each read", check_io_uring},
	{"memlock", "locked memory", "buffers that are not registered are pinned again for each request",
	 check_memlock},
	{"descriptors", "open files", "each client, region and DRAM segment takes descriptors",
	 check_descriptors},
	{"memory", "memory for the DRAM tier",
	 "a tier that does not fit is squeezed all the time, or ends the host's processes", check_memory},
	{"swap", "swap", "rows of the DRAM tier that are swapped out come back slower than from the nvme tier",
	 check_swap},
	{"psi", "pressure stall information", "its trigger tells of short memory before anything is killed",
	 check_psi},
	{"thp", "transparent huge pages", "copies of the DRAM tier miss the TLB more often with 4 KiB pages",
	 check_thp},
	{"hugetlb", "reserved huge pages", "reserved pages are never short and never split", check_hugetlb},
	{"numa", "memory by node", "memory of a far node costs each copy bandwidth", check_numa},
	{"reclaim", "kernel's own NUMA work", "reclaim and page moves of the kernel stall copies",
	 check_reclaim},
	{"store", "directory of the nvme tier", "the daemon keeps its container files there", check_store},
	{"filesystem", "file system of the nvme tier",
	 "without direct I/O rows lie in the page cache a second time", check_filesystem},
	{"space", "room for the nvme tier", "container files take their whole size at the first start",
	 check_space},
	{"disk", "disk of the nvme tier", "a refault waits for one read of it", check_disk},
	{"bpf", "kernel probes", "trace, top and the throttle see the disk and waiting clients through them",
	 check_bpf},
	{"cuda", "CUDA driver", "runtimes with rows in GPU memory need it; the daemon does not", check_cuda},
	{"cpu", "instructions for scoring",
	 "scores are computed with AVX2 or AVX-512, else several times slower", check_cpu},
	{"clock", "clock source", "every step is timed; a clock behind a system call costs each of them",
	 check_clock},
};
#define CHECKS ARRAY_SIZE(checks)

static const char *const verdicts[VERDICTS] = {"ok", "note", "warning", "problem", "unchecked"};

struct ward {
	struct patient p;
	struct finding f[CHECKS];
};

static void ask_daemon(struct patient *p, struct ctl *c)
{
	static const char *const argv[] = {"status"};
	struct ucred peer;
	socklen_t n = sizeof(peer);
	char said[256] = "", comm[32];
	json_t *j = NULL, *tier;
	uint64_t pid;
	size_t i;

	ctl_fail_into(said, sizeof(said));
	c->timeout_ms = MIN(c->timeout_ms, 2000);
	if (ctl_call(c, 1, argv, &j, NULL) != CTL_OK || !j)
		return;
	p->running = true;
	p->dram_resident = (uint64_t)json_integer_value(
		json_object_get(json_object_get(j, "pressure"), "dram_resident_bytes"));
	snprintf(p->psi, sizeof(p->psi), "%s",
		 json_string_value(json_object_get(json_object_get(j, "pressure"), "psi")) ?: "");
	p->probes_on = json_is_true(json_object_get(json_object_get(j, "probes"), "on"));
	snprintf(p->probes_off, sizeof(p->probes_off), "%s",
		 json_string_value(json_object_get(json_object_get(j, "probes"), "why_off")) ?: "");
	json_array_foreach(json_object_get(j, "tiers"), i, tier)
	{
		if (strcmp(json_string_value(json_object_get(tier, "name")) ?: "", "nvme"))
			continue;
		p->io_uring = json_is_true(json_object_get(tier, "io_uring"));
		p->nvme_offline = json_is_true(json_object_get(tier, "offline"));
	}
	/* A socket that systemd made has systemd as its peer. */
	if (!getsockopt(c->fd, SOL_SOCKET, SO_PEERCRED, &peer, &n) && peer.pid > 0 &&
	    host_read(p, comm, sizeof(comm), "/proc/%d/comm", peer.pid) > 0 && !strcmp(comm, "kvtierd"))
		p->pid = peer.pid;
	else if (host_number(p, &pid, "/sys/fs/cgroup/system.slice/kvtierd.service/cgroup.procs") &&
		 pid < INT32_MAX)
		p->pid = (int)pid;
}

static void examine(struct patient *p, struct ctl *c)
{
	const char *path = c->config ? c->config : host_path(p, "%s", CONFIG_FILE);

	snprintf(p->file, sizeof(p->file), "%s", path);
	config_defaults(&p->cfg);
	p->file_there = !access(path, F_OK);
	if (p->file_there && config_load(&p->cfg, path, p->error, sizeof(p->error)) < 0)
		config_defaults(&p->cfg);
	ask_daemon(p, c);
	p->ready = true;
}

/* Whoever reads our output must not wait for a child that is stuck. */
static pid_t begin(struct ward *w, size_t i, struct ctl *c)
{
	pid_t pid = fork();
	int null;

	if (pid)
		return pid;
	null = open("/dev/null", O_RDWR);
	for (int fd = 0; fd < 3; fd++)
		if (null < 0 || dup2(null, fd) < 0)
			close(fd);
	if (i == CHECKS)
		examine(&w->p, c);
	else
		checks[i].run(&w->p, &w->f[i]);
	_exit(0);
}

/* True: it ended by itself, well. */
static bool end(pid_t pid, uint64_t until, char *why, size_t size)
{
	const struct timespec nap = {.tv_nsec = 2000000};
	int status;
	pid_t r;

	if (pid < 0) {
		snprintf(why, size, "no process for it: %s", strerror(errno));
		return false;
	}
	while (!(r = waitpid(pid, &status, WNOHANG)) && now_ns() < until)
		nanosleep(&nap, NULL);
	if (!r) {
		kill(pid, SIGKILL);
		snprintf(why, size, "no answer within %llu s: a file system or driver hangs",
			 (unsigned long long)(LIMIT_NS / 1000000000));
		return false;
	}
	if (r > 0 && WIFEXITED(status) && !WEXITSTATUS(status))
		return true;
	if (r > 0 && WIFSIGNALED(status))
		snprintf(why, size, "the check was ended by signal %d", WTERMSIG(status));
	else
		snprintf(why, size, "the check ended badly");
	return false;
}

static void run_all(struct ward *w, struct ctl *c)
{
	pid_t pid[CHECKS];
	char why[160];
	uint64_t until;

	if (!end(begin(w, CHECKS, c), now_ns() + LIMIT_NS, why, sizeof(why)) || !w->p.ready) {
		config_defaults(&w->p.cfg);
		w->p.running = false;
		w->p.pid = 0;
		snprintf(w->p.error, sizeof(w->p.error), "not read: %s", why);
	}
	until = now_ns() + LIMIT_NS;
	for (size_t i = 0; i < CHECKS; i++) {
		say(&w->f[i], VERDICT_UNCHECKED, "no result");
		pid[i] = begin(w, i, c);
	}
	for (size_t i = 0; i < CHECKS; i++)
		if (!end(pid[i], until, why, sizeof(why)))
			say(&w->f[i], VERDICT_UNCHECKED, "%s", why);
}

/* What files and drivers say goes to a terminal and into JSON: printable ASCII only. */
static void launder(char *s, size_t size)
{
	s[size - 1] = 0;
	for (; *s; s++)
		if (*s < ' ' || *s > '~')
			*s = *s == '\n' || *s == '\t' ? ' ' : '?';
}

static void print_text(const struct ward *w, const unsigned count[VERDICTS])
{
	for (size_t i = 0; i < CHECKS; i++) {
		const struct finding *f = &w->f[i];

		printf("%-9s  %-11s  %s\n", verdicts[f->verdict], checks[i].id, f->found);
		if (*f->advice)
			printf("%24sdo: %s\n%24swhy: %s\n", "", f->advice, "", checks[i].why);
	}
	printf("%u ok, %u note%s, %u warning%s, %u problem%s, %u could not be checked\n", count[VERDICT_OK],
	       count[VERDICT_NOTE], count[VERDICT_NOTE] == 1 ? "" : "s", count[VERDICT_WARNING],
	       count[VERDICT_WARNING] == 1 ? "" : "s", count[VERDICT_PROBLEM],
	       count[VERDICT_PROBLEM] == 1 ? "" : "s", count[VERDICT_UNCHECKED]);
}

static void print_json(const struct ward *w, const unsigned count[VERDICTS])
{
	json_t *list = json_array(), *j = json_object(), *counts = json_object();

	for (size_t i = 0; i < CHECKS; i++)
		json_array_append_new(list,
				      json_pack("{s:s,s:s,s:s,s:s,s:s,s:s}", "id", checks[i].id, "what",
						checks[i].what, "verdict", verdicts[w->f[i].verdict], "found",
						w->f[i].found, "advice", w->f[i].advice, "why", checks[i].why));
	for (size_t i = 0; i < VERDICTS; i++)
		json_object_set_new(counts, verdicts[i], json_integer(count[i]));
	json_object_set_new(j, "running", json_boolean(w->p.running));
	json_object_set_new(j, "checks", list);
	json_object_set_new(j, "count", counts);
	ctl_print_json(j);
	json_decref(j);
}

int ctl_doctor(struct ctl *c, unsigned argc, const char *const argv[])
{
	struct ward *w = mmap(NULL, sizeof(*w), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	unsigned count[VERDICTS] = {0};
	struct ward *seen;

	if (w == MAP_FAILED)
		return ctl_fail(CTL_UNREACHABLE, "out of memory");
	if (c->root && strlen(c->root) >= sizeof(w->p.root))
		return ctl_fail(CTL_USAGE, "--root: must be at most %zu bytes", sizeof(w->p.root) - 1);
	snprintf(w->p.root, sizeof(w->p.root), "%s", c->root ?: "");
	fflush(NULL);
	run_all(w, c);
	/* A child that could not be killed yet may still write: look at a copy. */
	seen = malloc(sizeof(*seen));
	if (!seen)
		return ctl_fail(CTL_UNREACHABLE, "out of memory");
	memcpy(seen, w, sizeof(*seen));
	for (size_t i = 0; i < CHECKS; i++) {
		if (seen->f[i].verdict >= VERDICTS)
			seen->f[i].verdict = VERDICT_UNCHECKED;
		launder(seen->f[i].found, sizeof(seen->f[i].found));
		launder(seen->f[i].advice, sizeof(seen->f[i].advice));
		count[seen->f[i].verdict]++;
	}
	(c->json ? print_json : print_text)(seen, count);
	free(seen);
	munmap(w, sizeof(*w));
	return count[VERDICT_PROBLEM] ? 2 : count[VERDICT_WARNING] ? 1 : 0;
}
