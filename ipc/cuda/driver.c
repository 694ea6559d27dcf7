/* SPDX-License-Identifier: MIT */
/* The driver's entry points, found once per process, and its errors as lines. */
#include <dlfcn.h>
#include <pthread.h>
#include <string.h>
#include "ipc/client/client.h"
#include "ipc/cuda/driver.h"

#define LIBRARY "libcuda.so.1"
#define OLDEST 12000 /* 12.0, the first with everything below on GPUs of compute capability 9.0 */

struct symbol {
	const char *name;
	size_t slot; /* in struct cuda_driver */
	bool optional;
};
#define NEED(field, symbol)                                                                                    \
	{                                                                                                      \
		symbol, offsetof(struct cuda_driver, field), false                                             \
	}
#define MAY(field, symbol)                                                                                     \
	{                                                                                                      \
		symbol, offsetof(struct cuda_driver, field), true                                              \
	}

/* The names by which programs linked against it would call them. */
static const struct symbol symbols[] = {
	NEED(init, "cuInit"),
	NEED(driver_version, "cuDriverGetVersion"),
	NEED(error_name, "cuGetErrorName"),
	NEED(error_text, "cuGetErrorString"),
	NEED(device_count, "cuDeviceGetCount"),
	NEED(device_get, "cuDeviceGet"),
	NEED(device_name, "cuDeviceGetName"),
	NEED(device_attribute, "cuDeviceGetAttribute"),
	NEED(device_pci, "cuDeviceGetPCIBusId"),
	NEED(device_bytes, "cuDeviceTotalMem_v2"),
	NEED(primary_retain, "cuDevicePrimaryCtxRetain"),
	NEED(primary_release, "cuDevicePrimaryCtxRelease_v2"),
	NEED(ctx_push, "cuCtxPushCurrent_v2"),
	NEED(ctx_pop, "cuCtxPopCurrent_v2"),
	NEED(mem_info, "cuMemGetInfo_v2"),
	NEED(module_load, "cuModuleLoadData"),
	NEED(module_unload, "cuModuleUnload"),
	NEED(module_function, "cuModuleGetFunction"),
	NEED(function_attribute, "cuFuncSetAttribute"),
	NEED(launch, "cuLaunchKernel"),
	NEED(alloc, "cuMemAlloc_v2"),
	NEED(free, "cuMemFree_v2"),
	NEED(host_register, "cuMemHostRegister_v2"),
	NEED(host_unregister, "cuMemHostUnregister"),
	NEED(host_address, "cuMemHostGetDevicePointer_v2"),
	NEED(host_alloc, "cuMemHostAlloc"),
	NEED(host_free, "cuMemFreeHost"),
	NEED(copy_in, "cuMemcpyHtoDAsync_v2"),
	NEED(copy_out, "cuMemcpyDtoHAsync_v2"),
	NEED(set8, "cuMemsetD8Async"),
	NEED(stream_query, "cuStreamQuery"),
	NEED(stream_sync, "cuStreamSynchronize"),
	NEED(stream_create, "cuStreamCreate"),
	NEED(stream_destroy, "cuStreamDestroy_v2"),
	NEED(event_create, "cuEventCreate"),
	NEED(event_destroy, "cuEventDestroy_v2"),
	NEED(event_record, "cuEventRecord"),
	NEED(event_query, "cuEventQuery"),
	NEED(event_elapsed, "cuEventElapsedTime"),
	NEED(event_sync, "cuEventSynchronize"),
	MAY(vmm_granularity, "cuMemGetAllocationGranularity"),
	MAY(vmm_create, "cuMemCreate"),
	MAY(vmm_release, "cuMemRelease"),
	MAY(vmm_export, "cuMemExportToShareableHandle"),
	MAY(vmm_import, "cuMemImportFromShareableHandle"),
	MAY(vmm_reserve, "cuMemAddressReserve"),
	MAY(vmm_unreserve, "cuMemAddressFree"),
	MAY(vmm_map, "cuMemMap"),
	MAY(vmm_unmap, "cuMemUnmap"),
	MAY(vmm_access, "cuMemSetAccess"),
};
_Static_assert(ARRAY_SIZE(symbols) * sizeof(void *) == sizeof(struct cuda_driver), "every entry is found");

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct cuda_driver driver;
static bool opened; /* for good: a driver is never unloaded */

int cuda_check(const struct cuda_driver *d, cuda_result r, const char *call)
{
	const char *name = NULL, *text = NULL;

	if (likely(!r))
		return 0;
	if (d->error_name)
		(void)d->error_name(r, &name);
	if (d->error_text)
		(void)d->error_text(r, &text);
	return err_set(r == CUDA_OUT_OF_MEMORY ? KVT_E_NOMEM : KVT_E_GPU, "%s: %s (%d): %s", call,
		       name ? name : "unknown error", r, text ? text : "the driver has no text for it");
}

static int resolve(struct cuda_driver *d, void *lib, const char *path)
{
	for (size_t i = 0; i < ARRAY_SIZE(symbols); i++) {
		void *fn = dlsym(lib, symbols[i].name);

		if (!fn && !symbols[i].optional)
			return err_set(KVT_E_GPU, "%s: no symbol %s, must be a driver for CUDA %d.%d or later",
				       path, symbols[i].name, OLDEST / 1000, OLDEST % 1000 / 10);
		memcpy((char *)d + symbols[i].slot, &fn, sizeof(fn));
	}
	return 0;
}

/* What a driver's own text does not say about the codes that hosts really meet. */
static int check_init(const struct cuda_driver *d, cuda_result r)
{
	if (r == CUDA_STUB)
		return err_set(KVT_E_GPU,
			       "cuInit: CUDA_ERROR_STUB_LIBRARY (34): this libcuda is a stub for linking, "
			       "the driver itself is not installed");
	return cuda_check(d, r, "cuInit");
}

static int open_driver(struct cuda_driver *d)
{
	const char *env = secure_getenv("KVTIER_LIBCUDA"), *path = env && *env ? env : LIBRARY;
	void *lib = dlopen(path, RTLD_NOW | RTLD_LOCAL);
	int version = 0, r;

	if (!lib)
		return err_set(KVT_E_GPU, "no CUDA driver: %s", dlerror());
	r = resolve(d, lib, path);
	if (r) {
		dlclose(lib);
		return r;
	}
	/* From its first call on the library stays: drivers leave handlers behind. */
	r = check_init(d, d->init(0));
	if (!r)
		r = cuda_check(d, d->driver_version(&version), "cuDriverGetVersion");
	if (!r && version < OLDEST)
		r = err_set(KVT_E_GPU, "driver: for CUDA %d.%d, must be for %d.%d or later", version / 1000,
			    version % 1000 / 10, OLDEST / 1000, OLDEST % 1000 / 10);
	return r;
}

int cuda_driver_get(const struct cuda_driver **ret)
{
	struct cuda_driver d = {0};
	int r = 0;

	/* A driver that is not there yet may be installed while we run: only success is kept. */
	pthread_mutex_lock(&lock);
	if (!opened) {
		r = open_driver(&d);
		if (!r) {
			driver = d;
			opened = true;
		}
	}
	pthread_mutex_unlock(&lock);
	if (!r)
		*ret = &driver;
	return r;
}
