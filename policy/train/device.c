/* SPDX-License-Identifier: MIT */
/* Finding a backend. */
#include "policy/train/run.h"
#include "shm/util.h"

#include <dlfcn.h>
#include <libgen.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>

#define CUDA_OBJECT "kvtier-train-cuda.so"

static void *open_in(const char *dir, char *err, size_t errsize)
{
	char path[PATH_MAX + sizeof(CUDA_OBJECT)];
	void *h;

	snprintf(path, sizeof(path), "%s/" CUDA_OBJECT, dir);
	h = dlopen(path, RTLD_NOW | RTLD_LOCAL);
	if (!h)
		snprintf(err, errsize, "cuda: %s", dlerror());
	return h;
}

/* $KVT_LIBDIR alone when it is set; else beside the program, as built, or where it was installed. */
static void *open_object(char *err, size_t errsize)
{
	const char *dir = getenv("KVT_LIBDIR");
	char self[PATH_MAX];
	ssize_t n;
	void *h;

	if (dir)
		return open_in(dir, err, errsize);
	n = readlink("/proc/self/exe", self, sizeof(self) - 1);
	if (n > 0) {
		self[n] = 0;
		h = open_in(dirname(self), err, errsize);
		if (h)
			return h;
	}
	return open_in(KVT_PKGLIBDIR, err, errsize);
}

/* The object stays open: its code is the backend's. */
static int find_cuda(const struct train_backend_ops **ret, char *err, size_t errsize)
{
	void *h = open_object(err, errsize);
	void *symbol;

	if (!h)
		return -ENOTSUP;
	symbol = dlsym(h, TRAIN_CUDA_SYMBOL);
	if (!symbol) {
		snprintf(err, errsize, "cuda: %s has no %s", CUDA_OBJECT, TRAIN_CUDA_SYMBOL);
		dlclose(h);
		return -ENOTSUP;
	}
	*ret = symbol;
	return 0;
}

int run_device(const struct train_backend_ops **ret, const char *name, char *err, size_t errsize)
{
	const struct train_backend_ops *cuda = NULL;

	if (strcmp(name, "cpu") != 0) {
		int r = find_cuda(&cuda, err, errsize);

		if (r == 0 && cuda->memory() > 0) {
			*ret = cuda;
			return 0;
		}
		if (strcmp(name, "cuda") == 0) {
			if (r == 0)
				snprintf(err, errsize, "cuda: no device with free memory");
			return -ENOTSUP;
		}
	}
	*ret = &train_cpu;
	return 0;
}
