/* SPDX-License-Identifier: MIT */
#pragma once
/* What the fake driver (fake_cuda.cc) knows of a kernel (kernels.cc). */
#include "cuda_runtime.h"

#define HOST_KERNEL_ADDRESSES 32

struct host_kernel {
	const char *name;
	size_t bytes;            /* of its one argument */
	void (*run)(void *args); /* as one thread, inside host_run() */
	size_t (*addresses)(const void *args, uint64_t *ret /* [HOST_KERNEL_ADDRESSES] */);
};
const struct host_kernel *host_kernel_find(const char *name);
