/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Memory and kernel objects that run out, and a ledger of what is not given back.
 *
 * The test's executable defines malloc() and its kin, mmap(), memfd_create() and others, so the libraries that
 * it links (systemd, jansson, OpenSSL, libc itself) call these too. A call counts, and may be made to fail,
 * when it is armed and comes from a thread of the side under test: threads inherit their side from the one that
 * made them. What the test itself allocates is spared (oom_spared.h).
 *
 * A call's path is where it came from: its caller and the four innermost frames of our own code. The nth call
 * fails, or the first one of a path; once, or from then on.
 */
#include <dlfcn.h>
#include <errno.h>
#include <execinfo.h>
#include <fcntl.h>
#include <liburing.h>
#include <link.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <unistd.h>

#define OOM_PATHS 8192u
#define OOM_FRAMES 40
#define OOM_LEDGER (1u << 17)

/* Shared with the child that runs one life. */
struct oom_shared {
	_Atomic uint64_t calls, fired;
	_Atomic uint32_t paths;
	uint64_t path[OOM_PATHS];
};

enum oom_mode { OOM_OFF, OOM_COUNT, OOM_NTH, OOM_PATH };

static struct {
	struct oom_shared *sh;
	_Atomic int mode;
	bool sticky, tracking, explain;
	void *ssl[2]; /* where its code is */
	uint64_t nth, path;
	_Atomic uint64_t met; /* calls by this process */
	_Atomic bool failing;
	/* of the ledger */
	atomic_flag lock;
	struct oom_live {
		void *p;
		size_t n;
		void *from[6];
	} * live; /* [OOM_LEDGER], open addressing */
	uint64_t count, bytes, mapped;
} oom = {.lock = ATOMIC_FLAG_INIT};

static _Thread_local bool oom_inside, oom_children; /* this thread is under test; those it makes are */
static _Thread_local int oom_muted;

extern void *__libc_malloc(size_t n);
extern void *__libc_calloc(size_t n, size_t size);
extern void *__libc_realloc(void *p, size_t n);
extern void *__libc_memalign(size_t align, size_t n);
extern void __libc_free(void *p);
extern char __executable_start, etext;

/* ---- where a call comes from --------------------------------------------------------- */

static inline bool oom_ours(const void *p)
{
	return (const char *)p >= &__executable_start && (const char *)p < &etext;
}

static __attribute__((noinline)) uint64_t oom_path(const void *caller)
{
	void *f[OOM_FRAMES];
	uint64_t h = 0xcbf29ce484222325u ^ (uintptr_t)caller;
	int n, ours = 0;

	oom_muted++;
	n = backtrace(f, OOM_FRAMES);
	oom_muted--;
	for (int i = 3; i < n && ours < 4; i++) /* this, oom_due() and the wrapper say nothing */
		if (oom_ours(f[i])) {
			h = (h ^ (uintptr_t)f[i]) * 0x100000001b3u;
			ours++;
		}
	return h | 1;
}

/* An address for addr2line -e this executable, or a name where another object knows one. */
static void oom_say_place(const void *p)
{
	Dl_info at;

	if (oom_ours(p))
		dprintf(2, " 0x%zx", (size_t)((const char *)p - &__executable_start) - 1);
	else if (dladdr(p, &at) && at.dli_fname)
		dprintf(2, " %s:%s", strrchr(at.dli_fname, '/') ? strrchr(at.dli_fname, '/') + 1 : at.dli_fname,
			at.dli_sname ? at.dli_sname : "?");
}

static void oom_say_frames(const char *what)
{
	void *f[OOM_FRAMES];
	int n;

	oom_muted++;
	n = backtrace(f, OOM_FRAMES);
	dprintf(2, "# %s:", what);
	for (int i = 2; i < n; i++)
		oom_say_place(f[i]);
	dprintf(2, "\n");
	oom_muted--;
}

/* ---- must this call fail? ---------------------------------------------------------------- */

static void oom_meet(uint64_t path)
{
	uint32_t n = atomic_load(&oom.sh->paths);

	for (uint32_t i = 0; i < n; i++)
		if (oom.sh->path[i] == path)
			return;
	while (atomic_flag_test_and_set(&oom.lock))
		;
	n = atomic_load(&oom.sh->paths);
	if (n < OOM_PATHS) {
		oom.sh->path[n] = path;
		atomic_store(&oom.sh->paths, n + 1);
	}
	atomic_flag_clear(&oom.lock);
}

static __attribute__((noinline)) bool oom_due(const char *what, const void *caller)
{
	int mode = atomic_load_explicit(&oom.mode, memory_order_relaxed);
	uint64_t n;
	bool due;

	if (mode == OOM_OFF || !oom_inside || oom_muted)
		return false;
	n = atomic_fetch_add(&oom.met, 1);
	if (mode == OOM_COUNT) {
		atomic_fetch_add(&oom.sh->calls, 1);
		oom_meet(oom_path(caller));
		return false;
	}
	if (atomic_load(&oom.failing))
		return oom.sticky;
	due = mode == OOM_NTH ? n == oom.nth : oom_path(caller) == oom.path;
	if (!due || atomic_exchange(&oom.failing, true))
		return due && oom.sticky;
	atomic_fetch_add(&oom.sh->fired, 1);
	oom_say_frames(what);
	return true;
}

static void oom_relieve(void)
{
	atomic_store(&oom.mode, OOM_OFF);
}

/* ---- the ledger --------------------------------------------------------------------------- */

static uint32_t oom_place(const void *p)
{
	return (uint32_t)(((uintptr_t)p >> 4) * 0x9e3779b97f4a7c15u >> 40) % OOM_LEDGER;
}

/* OpenSSL keeps what it says of an error until its thread ends and later. */
static bool oom_keeps(const void *caller)
{
	return caller >= oom.ssl[0] && caller < oom.ssl[1];
}

static void oom_born(void *p, size_t n, void *caller)
{
	uint32_t i;

	if (!p || !oom.tracking || oom_muted || oom_keeps(caller))
		return;
	while (atomic_flag_test_and_set(&oom.lock))
		;
	for (i = oom_place(p); oom.live[i].p; i = (i + 1) % OOM_LEDGER)
		;
	oom.live[i] = (struct oom_live){.p = p, .n = n, .from = {caller}};
	oom.count++;
	oom.bytes += n;
	atomic_flag_clear(&oom.lock);
	if (oom.explain) {
		void *f[8];
		int got;

		oom_muted++;
		got = backtrace(f, 8);
		oom_muted--;
		for (int k = 2; k < got; k++)
			oom.live[i].from[k - 2] = f[k];
	}
}

static void oom_died(void *p)
{
	uint32_t i, j, want;

	if (!p || !oom.tracking)
		return;
	while (atomic_flag_test_and_set(&oom.lock))
		;
	for (i = oom_place(p); oom.live[i].p && oom.live[i].p != p; i = (i + 1) % OOM_LEDGER)
		;
	if (oom.live[i].p) {
		oom.count--;
		oom.bytes -= oom.live[i].n;
		/* what was pushed past this place moves up */
		for (j = (i + 1) % OOM_LEDGER; oom.live[j].p; j = (j + 1) % OOM_LEDGER) {
			want = oom_place(oom.live[j].p);
			if ((j - want) % OOM_LEDGER >= (j - i) % OOM_LEDGER) {
				oom.live[i] = oom.live[j];
				i = j;
			}
		}
		oom.live[i].p = NULL;
	}
	atomic_flag_clear(&oom.lock);
}

/* ---- what the code under test calls ---------------------------------------------------------- */

#define FROM __builtin_return_address(0)

/* Inline: whoever asks counts frames from the wrapper. */
static inline __attribute__((always_inline)) void *oom_aligned(const char *what, size_t align, size_t n,
							       void *from)
{
	void *p;

	if (oom_due(what, from)) {
		errno = ENOMEM;
		return NULL;
	}
	p = __libc_memalign(align, n);
	oom_born(p, n, from);
	return p;
}

#pragma GCC visibility push(default)
void *malloc(size_t n)
{
	void *p;

	if (oom_due("malloc", FROM)) {
		errno = ENOMEM;
		return NULL;
	}
	p = __libc_malloc(n);
	oom_born(p, n, FROM);
	return p;
}

void *calloc(size_t n, size_t size)
{
	void *p;

	if (oom_due("calloc", FROM)) {
		errno = ENOMEM;
		return NULL;
	}
	p = __libc_calloc(n, size);
	oom_born(p, n * size, FROM);
	return p;
}

void *realloc(void *old, size_t n)
{
	void *p;

	if (oom_due("realloc", FROM)) {
		errno = ENOMEM;
		return NULL;
	}
	oom_died(old); /* before another thread may get the same address */
	p = __libc_realloc(old, n);
	oom_born(p, n, FROM);
	return p;
}

void *memalign(size_t align, size_t n)
{
	return oom_aligned("memalign", align, n, FROM);
}

void *aligned_alloc(size_t align, size_t n)
{
	return oom_aligned("aligned_alloc", align, n, FROM);
}

int posix_memalign(void **ret, size_t align, size_t n)
{
	if (oom_due("posix_memalign", FROM))
		return ENOMEM;
	*ret = __libc_memalign(align, n);
	oom_born(*ret, n, FROM);
	return *ret ? 0 : ENOMEM;
}

void free(void *p)
{
	int e = errno;

	oom_died(p);
	__libc_free(p);
	errno = e;
}

void *mmap(void *addr, size_t n, int prot, int flags, int fd, off_t off)
{
	void *p;

	if (oom_due("mmap", FROM)) {
		errno = ENOMEM;
		return MAP_FAILED;
	}
	p = (void *)syscall(SYS_mmap, addr, n, prot, flags, fd, off);
	if (p != MAP_FAILED && oom.tracking)
		__atomic_add_fetch(&oom.mapped, (n + 4095) & ~(size_t)4095, __ATOMIC_RELAXED);
	return p;
}

int munmap(void *addr, size_t n)
{
	int r = (int)syscall(SYS_munmap, addr, n);

	if (!r && oom.tracking)
		__atomic_sub_fetch(&oom.mapped, (n + 4095) & ~(size_t)4095, __ATOMIC_RELAXED);
	return r;
}

static int oom_errno(int e)
{
	errno = e;
	return -1;
}

#define OOM_CALL(name, error, call, ...)                                                                       \
	int name(__VA_ARGS__)                                                                                  \
	{                                                                                                      \
		return oom_due(#name, FROM) ? oom_errno(error) : (int)syscall call;                            \
	}
OOM_CALL(memfd_create, ENOMEM, (SYS_memfd_create, name, flags), const char *name, unsigned flags)
OOM_CALL(ftruncate, ENOSPC, (SYS_ftruncate, fd, n), int fd, off_t n)
OOM_CALL(eventfd, EMFILE, (SYS_eventfd2, n, flags), unsigned n, int flags)
OOM_CALL(timerfd_create, ENFILE, (SYS_timerfd_create, clock, flags), int clock, int flags)
OOM_CALL(epoll_create1, EMFILE, (SYS_epoll_create1, flags), int flags)
OOM_CALL(socket, EMFILE, (SYS_socket, domain, type, proto), int domain, int type, int proto)
OOM_CALL(accept4, EMFILE, (SYS_accept4, fd, a, n, flags), int fd, struct sockaddr *a, socklen_t *n, int flags)

int fallocate(int fd, int mode, off_t off, off_t n)
{
	if (!(mode & FALLOC_FL_PUNCH_HOLE) && oom_due("fallocate", FROM))
		return oom_errno(ENOSPC);
	return (int)syscall(SYS_fallocate, fd, mode, off, n);
}

int fcntl(int fd, int cmd, ...)
{
	va_list ap;
	long arg;

	va_start(ap, cmd);
	arg = va_arg(ap, long);
	va_end(ap);
	if (cmd == F_DUPFD_CLOEXEC && oom_due("fcntl", FROM))
		return oom_errno(EMFILE);
	return (int)syscall(SYS_fcntl, fd, cmd, arg);
}

struct oom_thread {
	void *(*run)(void *);
	void *arg;
	bool inside;
};

static void *oom_thread(void *arg)
{
	struct oom_thread t = *(struct oom_thread *)arg;

	__libc_free(arg);
	oom_inside = oom_children = t.inside;
	return t.run(t.arg);
}

int pthread_create(pthread_t *ret, const pthread_attr_t *a, void *(*run)(void *), void *arg)
{
	static int (*real)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
	struct oom_thread *t;
	int r;

	if (oom_due("pthread_create", FROM))
		return EAGAIN;
	oom_muted++; /* libc keeps a thread's stack and its tables for the next one */
	if (!real)
		*(void **)&real = dlsym(RTLD_NEXT, "pthread_create");
	t = __libc_malloc(sizeof(*t));
	*t = (struct oom_thread){run, arg, oom_children};
	r = real(ret, a, oom_thread, t);
	if (r)
		__libc_free(t);
	oom_muted--;
	return r;
}

#define OOM_URING(name, call, ...)                                                                             \
	int name(__VA_ARGS__)                                                                                  \
	{                                                                                                      \
		static int (*real)();                                                                          \
                                                                                                               \
		if (oom_due(#name, FROM))                                                                      \
			return -ENOMEM;                                                                        \
		if (!real)                                                                                     \
			*(void **)&real = dlsym(RTLD_NEXT, #name);                                             \
		return real call;                                                                              \
	}
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wstrict-prototypes"
OOM_URING(io_uring_queue_init_params, (n, ring, p), unsigned n, struct io_uring *ring,
	  struct io_uring_params *p)
OOM_URING(io_uring_register_buffers, (ring, v, n), struct io_uring *ring, const struct iovec *v, unsigned n)
OOM_URING(io_uring_register_files, (ring, fds, n), struct io_uring *ring, const int *fds, unsigned n)
#pragma GCC diagnostic pop
#pragma GCC visibility pop
