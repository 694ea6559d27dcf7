/* SPDX-License-Identifier: MIT */
#pragma once
/* The fake driver (tests/gpu/host/fake_cuda.h) as a test's libcuda.so.1. */
#include <dlfcn.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "ipc/cuda/driver.h"
#include "tests/gpu/host/fake_cuda.h"

struct fake_gpu {
	char path[512], kernels[64];
	void (*set)(const char *words);
	void (*counts)(struct fake_cuda_counts *ret);
	int (*step)(int n);
	const struct cuda_driver *d;
};

/* Name it, and a file that stands for the kernels, in the environment. false: it is not built. */
static inline bool fake_gpu_init(struct fake_gpu *f)
{
	ssize_t n = readlink("/proc/self/exe", f->path, sizeof(f->path) - 64);
	FILE *kernels;

	if (n <= 0)
		return false;
	f->path[n] = 0;
	for (int up = 0; up < 3; up++) /* <build>/tests/unit/this */
		*strrchr(f->path, '/') = 0;
	strcat(f->path, "/fake/libcuda.so.1");
	strcpy(f->kernels, "/tmp/kvt-kernels-XXXXXX");
	n = mkstemp(f->kernels);
	kernels = n < 0 ? NULL : fdopen((int)n, "w");
	if (!kernels)
		return false;
	fputs("kernels of the fake driver", kernels);
	fclose(kernels);
	setenv("KVTIER_LIBCUDA", f->path, 1);
	setenv("KVTIER_CUDA_KERNELS", f->kernels, 1);
	return !access(f->path, R_OK);
}

/* The functions beside CUDA's; the library is loaded for good. */
static inline bool fake_gpu_hooks(struct fake_gpu *f)
{
	void *lib = dlopen(f->path, RTLD_NOW | RTLD_LOCAL);

	if (!lib)
		return false;
	*(void **)&f->set = dlsym(lib, "fake_cuda_set");
	*(void **)&f->counts = dlsym(lib, "fake_cuda_counts");
	*(void **)&f->step = dlsym(lib, "fake_cuda_step");
	return f->set && f->counts && f->step;
}

static inline struct fake_cuda_counts fake_gpu_counts(struct fake_gpu *f)
{
	struct fake_cuda_counts c;

	f->counts(&c);
	return c;
}
