/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * What checks and benchmarks of the library's kernels share: a GPU (or the fake one) opened by the library,
 * memory on it, random numbers. Failures end the program: exit status 1, or 77 where there is no GPU.
 */
#include <dlfcn.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include "ipc/cuda/kernels.h"
#include "ipc/kvtier_cuda.h"
#include "shm/util.h"

/* CUDA graphs, as far as checks need them; not there in the fake driver. */
struct gpu_graphs {
	int (*begin)(void *stream, int mode);
	int (*end)(void *stream, void **ret);
	int (*instantiate)(void **ret, void *graph, unsigned long long flags);
	int (*launch)(void *exec, void *stream);
	int (*exec_destroy)(void *exec);
	int (*destroy)(void *graph);
};

struct gpu {
	struct kvtier_cuda *g;
	const struct cuda_driver *d;
	void *stream;
	struct gpu_graphs graphs;
	bool capturing;
	unsigned captured;
};

__attribute__((noreturn, format(printf, 1, 2))) static inline void die(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	printf("Bail out! ");
	vprintf(fmt, ap);
	printf("\n");
	exit(1);
}

/* Of a CUDA call or of a kern_*(). */
static inline void must(struct gpu *u, int r, const char *what)
{
	const char *name = "";

	if (r > 0)
		(void)u->d->error_name(r, &name);
	if (r)
		die("%s: %d %s %s", what, r, name, r < 0 ? kvtier_last_error() : "");
}
#define MUST(u, call) must(u, call, #call)

/* A symbol of the driver, or NULL. */
static inline void *gpu_symbol(const char *name)
{
	const char *path = getenv("KVTIER_LIBCUDA");
	void *lib = dlopen(path ? path : "libcuda.so.1", RTLD_NOW);

	return lib ? dlsym(lib, name) : NULL;
}

/* GPU 0, current on this thread. TAP's "skip all" where there is none. */
static inline void gpu_open(struct gpu *u)
{
	struct kvtier_cuda_opts o = {.size = sizeof(o)};
	int r = kvtier_cuda_open(&o, &u->g);

	if (r == KVT_E_GPU) {
		printf("1..0 # SKIP %s\n", kvtier_last_error());
		exit(77);
	}
	if (r)
		die("%s", kvtier_last_error());
	u->d = u->g->d;
	MUST(u, cuda_enter(u->g));
	MUST(u, u->d->stream_create(&u->stream, 1));
	u->graphs.begin = (int (*)(void *, int))gpu_symbol("cuStreamBeginCapture_v2");
	u->graphs.end = (int (*)(void *, void **))gpu_symbol("cuStreamEndCapture");
	u->graphs.instantiate =
		(int (*)(void **, void *, unsigned long long))gpu_symbol("cuGraphInstantiateWithFlags");
	u->graphs.launch = (int (*)(void *, void *))gpu_symbol("cuGraphLaunch");
	u->graphs.exec_destroy = (int (*)(void *))gpu_symbol("cuGraphExecDestroy");
	u->graphs.destroy = (int (*)(void *))gpu_symbol("cuGraphDestroy");
}

static inline void gpu_close(struct gpu *u)
{
	MUST(u, u->d->stream_destroy(u->stream));
	cuda_leave(u->g);
	kvtier_cuda_close(u->g);
}

static inline void gpu_sync(struct gpu *u)
{
	MUST(u, u->d->stream_sync(u->stream));
}

static inline uint64_t gpu_alloc(struct gpu *u, size_t bytes)
{
	uint64_t addr;

	MUST(u, u->d->alloc(&addr, bytes ? bytes : 1));
	return addr;
}

static inline void gpu_put(struct gpu *u, uint64_t to, const void *from, size_t bytes)
{
	if (bytes)
		MUST(u, u->d->copy_in(to, from, bytes, u->stream));
	gpu_sync(u); /* `from` may be a local of the caller's */
}

static inline void gpu_get(struct gpu *u, void *to, uint64_t from, size_t bytes)
{
	if (bytes)
		MUST(u, u->d->copy_out(to, from, bytes, u->stream));
	gpu_sync(u);
}

/* A new allocation with these bytes. */
static inline uint64_t gpu_new(struct gpu *u, const void *from, size_t bytes)
{
	uint64_t addr = gpu_alloc(u, bytes);

	gpu_put(u, addr, from, bytes);
	return addr;
}

static inline void gpu_free(struct gpu *u, uint64_t addr)
{
	MUST(u, u->d->free(addr));
}

/* Host memory that the GPU reads and writes, as a window is: shared, registered. */
struct window_mem {
	uint8_t *p;
	uint64_t addr;
	size_t bytes;
};

static inline struct window_mem window_new(struct gpu *u, size_t bytes)
{
	struct window_mem w = {.bytes = (bytes + 4095) & ~(size_t)4095};

	w.p = mmap(NULL, w.bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (w.p == MAP_FAILED)
		die("mmap of %zu bytes", w.bytes);
	MUST(u, u->d->host_register(w.p, w.bytes, CUDA_HOST_MAPPED));
	MUST(u, u->d->host_address(&w.addr, w.p, 0));
	return w;
}

static inline void window_free(struct gpu *u, struct window_mem *w)
{
	MUST(u, u->d->host_unregister(w->p));
	munmap(w->p, w->bytes);
}

static inline uint64_t mix(uint64_t x)
{
	x += UINT64_C(0x9e3779b97f4a7c15);
	x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
	x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
	return x ^ x >> 31;
}

/* Random numbers of one run; $KVT_SEED repeats it. */
static uint64_t random_state;

static inline uint32_t below(uint32_t n)
{
	random_state = mix(random_state);
	return n ? (uint32_t)((random_state >> 32) * n >> 32) : 0;
}

static inline void *need(size_t n, size_t size)
{
	void *p = calloc(n ? n : 1, size ? size : 1);

	if (!p)
		die("out of memory");
	return p;
}

/* What is launched between these goes through a CUDA graph every other time, where there are graphs. */
static inline void launch_begin(struct gpu *u)
{
	u->capturing = u->graphs.begin && u->graphs.instantiate && below(2);
	if (u->capturing)
		MUST(u, u->graphs.begin(u->stream, 0));
}

static inline void launch_end(struct gpu *u)
{
	void *graph, *exec;

	if (u->capturing) {
		MUST(u, u->graphs.end(u->stream, &graph));
		MUST(u, u->graphs.instantiate(&exec, graph, 0));
		MUST(u, u->graphs.launch(exec, u->stream));
		gpu_sync(u);
		MUST(u, u->graphs.exec_destroy(exec));
		MUST(u, u->graphs.destroy(graph));
		u->captured++;
	}
	gpu_sync(u);
}
