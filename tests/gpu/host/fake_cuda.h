/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * A libcuda.so.1 of host memory: the calls of ipc/cuda/driver.h, our kernels by name (compiled by g++, run by
 * fibers.cc), and failures on demand. Fresh memory is poisoned, memory given back is unmapped, registered
 * memory has a device address that is not the host's, and what a kernel or a copy is given must lie in an
 * allocation or a registration. $KVT_FAKE_CUDA, read by cuInit() and fake_cuda_set(), is a list of words:
 *
 *   async        a thread does the streams' work, at its own pace
 *   lazy         nothing is done before a stream is queried (one piece), waited for (all), or fake_cuda_step()
 *   fail=CALL:CODE@N   the Nth call of that name from now on returns CODE, once (a code after which a context
 *                is lost: every call from then on)
 *   crash=CODE@N       the Nth kernel from now on stops halfway: every call from then on returns CODE
 *   oom_after=N  N more allocations succeed
 *   stub, nodev, init=CODE   what cuInit() says
 *   old          a driver for CUDA 11.8
 *   major=N      compute capability
 *   memory=N     MiB of GPU memory
 *
 * The functions below are exported by the library beside CUDA's.
 */
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct fake_cuda_counts {
	/* what exists now */
	uint64_t allocs, bytes, host_allocs, registrations, streams, events, modules, contexts, vmm_handles,
		vmm_maps, vmm_ranges;
	/* so far */
	uint64_t kernels, copies, pageable; /* pageable: copies from or to memory that is not registered */
	uint64_t waits;                     /* calls that may wait for the GPU */
	uint64_t queries;                   /* of streams and events */
	uint64_t alloc_calls;               /* of memory, and registrations */
	uint64_t violations;                /* addresses that are nobody's; each is a line on stderr */
	uint64_t queued;                    /* pieces of work not done yet */
};
void fake_cuda_counts(struct fake_cuda_counts *ret);
/* Take other words; a context that was lost is well again, nothing fails that is not named. NULL: none. */
void fake_cuda_set(const char *words);
/* lazy: do up to n pieces of work, of streams at random. Returns how many were done. */
int fake_cuda_step(int n);

#ifdef __cplusplus
}
#endif
