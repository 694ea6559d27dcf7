/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Lives in which memory runs out. A scenario runs once to see what it calls, then once for each call that is to
 * fail, each time in a process of its own, several at a time.
 *
 * quick: one life for each path (oom.h) of each scenario, as many as fit its share of the time; of those that
 * do not fit, every Kth. full: one for each call.
 */
#include <dirent.h>
#include <signal.h>
#include <sys/wait.h>
#include <time.h>
#include "oom_spared.h"

struct oom_scenario {
	const char *name;
	void (*prepare)(void); /* before memory runs out */
	void (*under)(void);   /* while it may */
	void (*after)(void);   /* there is memory again: everything works */
	void (*finish)(void);  /* give everything back */
	bool client;           /* the calling thread is the side under test; else those that it makes are */
	double share;          /* of quick's time */
};

extern void __gcov_dump(void) __attribute__((weak)); /* in a build that counts coverage */

static unsigned oom_bad;

/* A promise that does not hold in this life. */
static void __attribute__((format(printf, 1, 2))) oom_fail(const char *fmt, ...)
{
	va_list ap;

	oom_muted++;
	oom_bad++;
	va_start(ap, fmt);
	dprintf(2, "# ");
	vdprintf(2, fmt, ap);
	dprintf(2, "\n");
	va_end(ap);
	oom_muted--;
}

/* Where there is no memory at all some calls wait until there is: that is a while later. */
static void oom_hung(int sig)
{
	if (oom.sticky && atomic_load(&oom.mode) != OOM_OFF) {
		oom_relieve();
		alarm(60);
		return;
	}
	oom_say_frames("hung: the test's thread");
	_exit(3);
}

/* ---- one life ------------------------------------------------------------------------------ */

struct oom_outside {
	unsigned fds, maps;
};

/* Descriptors, and mappings that are not just memory of this process. */
static struct oom_outside oom_look(void)
{
	struct oom_outside o = {0};
	char line[512];
	FILE *f;
	DIR *d;

	oom_muted++;
	d = opendir("/proc/self/fd");
	while (d && readdir(d))
		o.fds++;
	closedir(d);
	f = fopen("/proc/self/maps", "re");
	while (f && fgets(line, sizeof(line), f))
		o.maps += strstr(line, "memfd:") || strstr(line, "anon_inode:");
	fclose(f);
	oom_muted--;
	return o;
}

static void oom_leaks(const struct oom_outside *base)
{
	struct oom_outside now = oom_look();

	/* A thread that was told to end may still be about to. */
	for (int i = 0; i < 100 && (oom.count || now.fds != base->fds); i++) {
		usleep(2000);
		now = oom_look();
	}
	if (now.fds != base->fds)
		oom_fail("%u descriptors, %u before", now.fds, base->fds);
	if (now.maps != base->maps)
		oom_fail("%u shared mappings, %u before", now.maps, base->maps);
	if (oom.mapped)
		oom_fail("%lld bytes of mmap() are left", (long long)oom.mapped);
	if (!oom.count)
		return;
	oom_fail("%llu allocations of %llu bytes are left", (unsigned long long)oom.count,
		 (unsigned long long)oom.bytes);
	for (uint32_t i = 0, shown = 0; i < OOM_LEDGER && shown < 6; i++)
		if (oom.live[i].p) {
			dprintf(2, "#   %zu bytes by", oom.live[i].n);
			for (int k = 0; k < 6 && oom.live[i].from[k]; k++)
				oom_say_place(oom.live[i].from[k]);
			dprintf(2, "\n");
			shown++;
		}
}

static void oom_live(const struct oom_scenario *s)
{
	struct oom_outside base = oom_look();
	int mode = atomic_exchange(&oom.mode, OOM_OFF);

	oom_inside = s->client;
	oom_children = !s->client;
	oom.tracking = true;
	s->prepare();
	atomic_store(&oom.mode, mode);
	s->under();
	oom_relieve();
	s->after();
	s->finish();
	oom_inside = oom_children = false;
	oom_leaks(&base);
	oom.tracking = false;
}

/* One life in which nothing fails: what is made once for the life of the process (OpenSSL's tables) is made
 * now. */
static void oom_warm_up(const struct oom_scenario *s)
{
	int null = open("/dev/null", O_WRONLY | O_CLOEXEC), err = dup(2);

	dup2(null, 2);
	oom_live(s);
	dup2(err, 2);
	close(err);
	close(null);
	memset(oom.live, 0, OOM_LEDGER * sizeof(*oom.live));
	oom.count = oom.bytes = oom.mapped = 0;
	oom_bad = 0;
}

/* ---- many lives ------------------------------------------------------------------------------ */

static double oom_seconds(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

struct oom_job {
	const struct oom_scenario *s;
	pid_t pid;
	int out;
	bool sticky, path;
	uint64_t which;
	double begin;
};

static void oom_child(const struct oom_job *j)
{
	dup2(j->out, 1);
	dup2(j->out, 2);
	close(j->out);
	oom.nth = oom.path = j->which;
	oom.sticky = j->sticky;
	oom.explain = getenv("KVT_OOM_EXPLAIN") != NULL;
	atomic_store(&oom.met, 0);
	atomic_store(&oom.mode, j->path ? OOM_PATH : OOM_NTH);
	signal(SIGALRM, oom_hung);
	alarm(j->sticky ? 5 : 60);
	oom_live(j->s);
	if (__gcov_dump)
		__gcov_dump();
	_exit(oom_bad ? 1 : 0);
}

static void oom_start(struct oom_job *j)
{
	j->out = (int)syscall(SYS_memfd_create, "log", MFD_CLOEXEC);
	j->begin = oom_seconds();
	j->pid = fork();
	if (!j->pid)
		oom_child(j);
}

/* True: all was well. */
static bool oom_judge(struct oom_job *j, int status)
{
	bool good = WIFEXITED(status) && !WEXITSTATUS(status),
	     slow = getenv("V") && oom_seconds() - j->begin > 0.4;
	char text[3000];
	ssize_t n;

	if (!good || slow) {
		printf("# %s, %s %llx fails %s: ", j->s->name, j->path ? "path" : "call",
		       (unsigned long long)j->which, j->sticky ? "from then on" : "once");
		if (WIFSIGNALED(status))
			printf("died of %s\n", strsignal(WTERMSIG(status)));
		else
			printf("%s (%.1f s)\n",
			       good                       ? "slow"
			       : WEXITSTATUS(status) == 3 ? "hung"
							  : "not well",
			       oom_seconds() - j->begin);
		n = pread(j->out, text, sizeof(text) - 1, 0);
		text[n > 0 ? n : 0] = 0;
		for (char *save, *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save))
			printf("#   %s\n", line);
		fflush(stdout);
	}
	close(j->out);
	j->pid = 0;
	return good;
}

struct oom_result {
	unsigned lives, bad;
};

static void oom_reap(struct oom_job *job, unsigned n, struct oom_result *res)
{
	int status;
	pid_t pid = wait(&status);

	for (unsigned i = 0; i < n; i++)
		if (pid > 0 && job[i].pid == pid)
			res->bad += !oom_judge(&job[i], status);
}

/* Lives for n calls or paths, once and sticky: all, or as many as there is time for, from all over. */
static void oom_lives(const struct oom_scenario *s, bool full, uint64_t n, double until, unsigned at_once,
		      struct oom_result *res)
{
	struct oom_job job[256] = {0};
	unsigned busy = 0, i;
	uint64_t seed = strtoull(getenv("KVT_SEED") ?: "0", NULL, 10);

	for (uint64_t turn = 0; turn < 2 * n && res->bad < 12; turn++) {
		uint64_t k = full ? turn : (turn * 7919 + seed) % (2 * n); /* a prime: each is met once */

		if (!full && oom_seconds() > until)
			break;
		for (i = 0; job[i].pid; i++)
			;
		job[i] = (struct oom_job){.s = s, .sticky = k % 2, .path = !full};
		job[i].which = full ? k / 2 : oom.sh->path[k / 2];
		oom_start(&job[i]);
		res->lives++;
		if (++busy == at_once) {
			oom_reap(job, 256, res);
			busy--;
		}
	}
	while (busy--)
		oom_reap(job, 256, res);
}

/* Run it; prints TAP and figures. seconds: quick's time for this one. False: something does not hold. */
static bool oom_scenario(unsigned number, const struct oom_scenario *s, bool full, double seconds)
{
	unsigned at_once = full ? (unsigned)sysconf(_SC_NPROCESSORS_ONLN) : 2;
	double begin = oom_seconds(), one;
	struct oom_result res = {0};
	uint64_t calls, paths, n;

	if (at_once > 250)
		at_once = 250;
	memset(oom.sh, 0, sizeof(*oom.sh));
	oom_warm_up(s);
	begin = oom_seconds();
	atomic_store(&oom.mode, OOM_COUNT);
	oom_live(s);
	oom_relieve();
	one = oom_seconds() - begin;
	calls = oom.sh->calls;
	paths = oom.sh->paths;
	n = full ? calls + calls / 50 : paths;
	if (oom_bad)
		res.bad++;
	else
		oom_lives(s, full, n, begin + seconds, at_once, &res);
	printf("# %s: %llu calls on %llu paths, %.0f ms a life; %u lives of %llu, %llu fell short, %.1f s\n",
	       s->name, (unsigned long long)calls, (unsigned long long)paths, one * 1e3, res.lives,
	       (unsigned long long)n * 2, (unsigned long long)oom.sh->fired, oom_seconds() - begin);
	if (oom.sh->fired < res.lives / 4) {
		printf("# few calls failed: nothing was tried\n");
		res.bad++;
	}
	printf("%sok %u - %s\n", res.bad ? "not " : "", number, s->name);
	fflush(stdout);
	return !res.bad;
}

static int oom_find(struct dl_phdr_info *o, size_t size, void *arg)
{
	for (int i = 0; strstr(o->dlpi_name, "libcrypto") && i < o->dlpi_phnum; i++)
		if (o->dlpi_phdr[i].p_type == PT_LOAD && o->dlpi_phdr[i].p_flags & PF_X) {
			oom.ssl[0] = (void *)(o->dlpi_addr + o->dlpi_phdr[i].p_vaddr);
			oom.ssl[1] = (char *)oom.ssl[0] + o->dlpi_phdr[i].p_memsz;
		}
	return 0;
}

/* All of them; the exit status. */
static int oom_main(const struct oom_scenario *s, unsigned n)
{
	bool full = !strcmp(getenv("KVT_TORTURE") ?: "quick", "full");
	const char *only = getenv("KVT_ONLY"), *path = getenv("KVT_OOM_PATH"), *nth = getenv("KVT_OOM_NTH");
	uint64_t fired = 0, bad = 0;
	unsigned done = 0;

	oom.sh = mmap(NULL, sizeof(*oom.sh), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	oom.live = mmap(NULL, OOM_LEDGER * sizeof(*oom.live), PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	dl_iterate_phdr(oom_find, NULL);
	(void)backtrace((void *[2]){0}, 2); /* loads its library */
	signal(SIGPIPE, SIG_IGN);
	for (unsigned i = 0; i < n; i++) {
		if (only && !strstr(s[i].name, only))
			continue;
		if (path || nth) { /* one life by hand, as a failure named it */
			struct oom_job j = {.s = &s[i], .out = dup(2), .path = path != NULL};

			oom_warm_up(&s[i]);
			j.sticky = getenv("KVT_OOM_STICKY") != NULL;
			j.which = strtoull(path ? path : nth, NULL, 16);
			oom_child(&j);
		}
		bad += !oom_scenario(++done, &s[i], full, 25 * s[i].share);
		fired += oom.sh->fired;
	}
	printf("# figure: memory, mappings or descriptors ran out at %llu places, once or for good: %llu of %u "
	       "scenarios broke\n",
	       (unsigned long long)fired, (unsigned long long)bad, done);
	printf("1..%u\n", done);
	return bad ? 1 : 0;
}
