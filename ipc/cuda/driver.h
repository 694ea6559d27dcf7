/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * The CUDA driver, opened at run time. No header of the toolkit is needed: the calls used here are part of a
 * stable binary interface. Codes are CUresult; handles are pointers; device addresses are 64-bit.
 */
#include <stddef.h>
#include <stdint.h>

typedef int cuda_result; /* 0: success; the only typedef, to tell these codes from KVT_E_* */

struct cuda_driver {
	cuda_result (*init)(unsigned flags);
	cuda_result (*driver_version)(int *ret);
	cuda_result (*device_count)(int *ret);
	cuda_result (*device_get)(int *ret, int ordinal);
	cuda_result (*device_name)(char *ret, int len, int dev);
	cuda_result (*device_attribute)(int *ret, int attr, int dev);
	cuda_result (*device_pci)(char *ret, int len, int dev);
	cuda_result (*device_bytes)(size_t *ret, int dev);
	cuda_result (*primary_retain)(void **ret_ctx, int dev);
	cuda_result (*primary_release)(int dev);
	cuda_result (*ctx_push)(void *ctx);
	cuda_result (*ctx_pop)(void **ret_ctx);
	cuda_result (*mem_info)(size_t *free, size_t *total);
	cuda_result (*module_load)(void **ret, const void *image);
	cuda_result (*module_unload)(void *module);
	cuda_result (*module_function)(void **ret, void *module, const char *name);
	cuda_result (*function_attribute)(void *fn, int attr, int value);
	cuda_result (*launch)(void *fn, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
			      unsigned bz, unsigned shared, void *stream, void **params, void **extra);
	cuda_result (*alloc)(uint64_t *ret, size_t bytes);
	cuda_result (*free)(uint64_t addr);
	cuda_result (*host_register)(void *p, size_t bytes, unsigned flags);
	cuda_result (*host_unregister)(void *p);
	cuda_result (*host_address)(uint64_t *ret, void *p, unsigned flags);
	cuda_result (*host_alloc)(void **ret, size_t bytes, unsigned flags);
	cuda_result (*host_free)(void *p);
	cuda_result (*copy_in)(uint64_t dst, const void *src, size_t bytes, void *stream); /* HtoDAsync */
	cuda_result (*copy_out)(void *dst, uint64_t src, size_t bytes, void *stream);      /* DtoHAsync */
	cuda_result (*set8)(uint64_t dst, unsigned char v, size_t bytes, void *stream);    /* async */
	cuda_result (*stream_query)(void *stream); /* 0, or CUDA_NOT_READY */
	cuda_result (*stream_sync)(void *stream);
	cuda_result (*stream_create)(void **ret, unsigned flags);
	cuda_result (*stream_destroy)(void *stream);
	cuda_result (*event_create)(void **ret, unsigned flags);
	cuda_result (*event_destroy)(void *event);
	cuda_result (*event_record)(void *event, void *stream);
	cuda_result (*event_query)(void *event);
	cuda_result (*event_elapsed)(float *ms, void *from, void *to);
	cuda_result (*event_sync)(void *event);
	cuda_result (*error_name)(cuda_result r, const char **ret);
	cuda_result (*error_text)(cuda_result r, const char **ret);
	/* virtual memory; NULL in drivers without it */
	cuda_result (*vmm_granularity)(size_t *ret, const void *prop, int option);
	cuda_result (*vmm_create)(uint64_t *ret_handle, size_t bytes, const void *prop, uint64_t flags);
	cuda_result (*vmm_release)(uint64_t handle);
	cuda_result (*vmm_export)(void *ret_fd, uint64_t handle, int type, uint64_t flags);
	cuda_result (*vmm_import)(uint64_t *ret_handle, void *fd, int type);
	cuda_result (*vmm_reserve)(uint64_t *ret, size_t bytes, size_t align, uint64_t at, uint64_t flags);
	cuda_result (*vmm_unreserve)(uint64_t addr, size_t bytes);
	cuda_result (*vmm_map)(uint64_t addr, size_t bytes, size_t off, uint64_t handle, uint64_t flags);
	cuda_result (*vmm_unmap)(uint64_t addr, size_t bytes);
	cuda_result (*vmm_access)(uint64_t addr, size_t bytes, const void *desc, size_t n);
};

enum {
	CUDA_NOT_READY = 600,
	CUDA_OUT_OF_MEMORY = 2,
	CUDA_STUB = 34, /* the driver's files are there, the driver is not */
	CUDA_NO_DEVICE = 100,
	CUDA_HOST_MAPPED = 2,    /* host_register, host_alloc: DEVICEMAP */
	CUDA_HOST_READ_ONLY = 8, /* host_register */
	CUDA_STREAM_NON_BLOCKING = 1,
	CUDA_EVENT_NO_TIMING = 2,
	CUDA_ATTR_MULTIPROCESSORS = 16,
	CUDA_ATTR_MAJOR = 75,
	CUDA_ATTR_MINOR = 76,
	CUDA_FN_SHARED = 8, /* function_attribute: MAX_DYNAMIC_SHARED_SIZE_BYTES */
};

/*
 * Open the driver, once per process: $KVTIER_LIBCUDA (for tests; ignored in privileged programs), else
 * libcuda.so.1. 0, or KVT_E_GPU with a line. Any thread.
 */
int cuda_driver_get(const struct cuda_driver **ret);
/* Keep a line "call: NAME (code): text" and return KVT_E_GPU (KVT_E_NOMEM for out of memory); 0 for success. */
int cuda_check(const struct cuda_driver *d, cuda_result r, const char *call);
