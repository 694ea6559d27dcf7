/* SPDX-License-Identifier: MIT */
/* The calls of ipc/cuda/driver.h over host memory: see fake_cuda.h beside this. */
#include "fake_state.h"

#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <memory>

static uint64_t now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

/* ---- driver and device --------------------------------------------------------------------------- */

FAKE_API int cuInit(unsigned)
{
	if (getenv("KVT_FAKE_CUDA"))
		fake_cuda_set(getenv("KVT_FAKE_CUDA"));
	held h(fake.lock);

	fake.initialized = fake.initialized || !fake.init_code;
	return fake.init_code;
}

FAKE_API int cuDriverGetVersion(int *ret)
{
	*ret = fake.version;
	return 0;
}

FAKE_API int cuGetErrorName(int code, const char **ret)
{
	static const std::map<int, const char *> names = {
		{1, "CUDA_ERROR_INVALID_VALUE"},
		{2, "CUDA_ERROR_OUT_OF_MEMORY"},
		{3, "CUDA_ERROR_NOT_INITIALIZED"},
		{34, "CUDA_ERROR_STUB_LIBRARY"},
		{100, "CUDA_ERROR_NO_DEVICE"},
		{101, "CUDA_ERROR_INVALID_DEVICE"},
		{200, "CUDA_ERROR_INVALID_IMAGE"},
		{201, "CUDA_ERROR_INVALID_CONTEXT"},
		{400, "CUDA_ERROR_INVALID_HANDLE"},
		{500, "CUDA_ERROR_NOT_FOUND"},
		{600, "CUDA_ERROR_NOT_READY"},
		{700, "CUDA_ERROR_ILLEGAL_ADDRESS"},
		{719, "CUDA_ERROR_LAUNCH_FAILED"},
		{999, "CUDA_ERROR_UNKNOWN"},
		{712, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"},
		{713, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED"},
	};
	auto it = names.find(code);

	*ret = it == names.end() ? NULL : it->second;
	return it == names.end() ? FAKE_INVALID : 0;
}

FAKE_API int cuGetErrorString(int code, const char **ret)
{
	*ret = code == FAKE_OOM         ? "out of memory"
	       : code == FAKE_NO_DEVICE ? "no device is detected"
					: "so it was asked";
	return 0;
}

FAKE_API int cuDeviceGetCount(int *ret)
{
	*ret = 1;
	return 0;
}
FAKE_API int cuDeviceGet(int *ret, int ordinal)
{
	*ret = ordinal;
	return ordinal ? FAKE_BAD_DEVICE : 0;
}
FAKE_API int cuDeviceGetName(char *ret, int len, int)
{
	snprintf(ret, (size_t)len, "Fake GPU of host memory");
	return 0;
}
FAKE_API int cuDeviceGetAttribute(int *ret, int attr, int)
{
	*ret = attr == 75 ? fake.major : attr == 16 ? 4 : 0;
	return 0;
}
FAKE_API int cuDeviceGetPCIBusId(char *ret, int len, int)
{
	snprintf(ret, (size_t)len, "FFFF:1F:00.0");
	return 0;
}
FAKE_API int cuDeviceTotalMem_v2(size_t *ret, int)
{
	*ret = fake.memory;
	return 0;
}

FAKE_API int cuDevicePrimaryCtxRetain(void **ret, int)
{
	held h(fake.lock);

	if (int r = fake_enter("cuDevicePrimaryCtxRetain", false))
		return r;
	fake.contexts++;
	*ret = &fake;
	return 0;
}
FAKE_API int cuDevicePrimaryCtxRelease_v2(int)
{
	held h(fake.lock);

	if (!fake.contexts)
		return FAKE_BAD_CONTEXT;
	if (fake.contexts == 1)
		fake_drain(h, NULL, true);
	if (!--fake.contexts)
		fake_reset();
	return 0;
}
FAKE_API int cuCtxPushCurrent_v2(void *ctx)
{
	if (ctx != &fake)
		return FAKE_BAD_CONTEXT;
	fake_contexts++;
	return 0;
}
FAKE_API int cuCtxPopCurrent_v2(void **ret)
{
	if (!fake_contexts)
		return FAKE_BAD_CONTEXT;
	fake_contexts--;
	*ret = &fake;
	return 0;
}

FAKE_API int cuMemGetInfo_v2(size_t *free_bytes, size_t *total)
{
	CALL(cuMemGetInfo_v2);
	*total = fake.memory;
	*free_bytes = fake.memory - fake.count.bytes;
	return 0;
}

/* ---- modules and launches --------------------------------------------------------------------------- */

FAKE_API int cuModuleLoadData(void **ret, const void *image)
{
	CALL(cuModuleLoadData);
	/* Any file stands for the kernels except one that says that it is none. */
	if (!strncmp((const char *)image, "not kernels", 11))
		return FAKE_BAD_IMAGE;
	*ret = new char;
	fake.modules.insert(*ret);
	return 0;
}
FAKE_API int cuModuleUnload(void *module)
{
	CALL(cuModuleUnload);
	if (!fake.modules.erase(module))
		return FAKE_BAD_HANDLE;
	delete (char *)module;
	return 0;
}
FAKE_API int cuModuleGetFunction(void **ret, void *module, const char *name)
{
	CALL(cuModuleGetFunction);
	*ret = (void *)host_kernel_find(name);
	return !fake.modules.count(module) ? FAKE_BAD_HANDLE : *ret ? 0 : FAKE_NOT_FOUND;
}

static thread_local size_t allowed_shared = HOST_SHARED_PLAIN; /* real drivers keep it per function */

FAKE_API int cuFuncSetAttribute(void *, int attr, int value)
{
	CALL(cuFuncSetAttribute);
	if (attr == 8 && (value < 0 || (size_t)value > HOST_SHARED_MAX))
		return FAKE_INVALID;
	if (attr == 8)
		allowed_shared = (size_t)value;
	return 0;
}

static void run_kernel(const host_kernel *k, dim3 grid, dim3 block, unsigned shared, void *args)
{
	unsigned blocks = ~0u;
	uint64_t addr[HOST_KERNEL_ADDRESSES];
	size_t n = k->addresses(args, addr);
	int code = 0;

	{
		held h(fake.lock);

		for (size_t i = 0; i < n; i++)
			if (!fake_device_range(addr[i], 1, k->name))
				code = FAKE_BAD_ADDRESS;
		if (!code && fake.crash_left > 0 && --fake.crash_left == 0) {
			code = fake.crash_code;
			blocks = grid.x * grid.y * grid.z / 2;
		}
		fake.count.kernels++;
	}
	struct call {
		const host_kernel *k;
		void *args;
	} c = {k, args};

	if (code != FAKE_BAD_ADDRESS || blocks != ~0u)
		host_run(
			grid, block, shared,
			[](void *p) {
				call *x = (call *)p;
				x->k->run(x->args);
			},
			&c, blocks);
	if (code) {
		held h(fake.lock);

		fake.lost = code;
	}
}

FAKE_API int cuLaunchKernel(void *fn, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
			    unsigned bz, unsigned shared, void *s, void **params, void **)
{
	CALL(cuLaunchKernel);
	const host_kernel *k = (const host_kernel *)fn;
	dim3 grid(gx, gy, gz), block(bx, by, bz);
	const char *bad = host_bad_launch(grid, block, shared);

	if (!bad && shared > allowed_shared)
		bad = "shared memory: more than the function's attribute allows";
	if (bad) {
		fake_complain("%s: %s", k->name, bad);
		return FAKE_INVALID;
	}
	/* Aligned as the stack of a real thread would have it. */
	auto args = std::make_shared<std::vector<uint64_t>>((k->bytes + 7) / 8);

	memcpy(args->data(), params[0], k->bytes);
	return fake_put(h, s,
			[k, grid, block, shared, args] { run_kernel(k, grid, block, shared, args->data()); });
}

/* ---- streams and events -------------------------------------------------------------------------------------
 */

FAKE_API int cuStreamCreate(void **ret, unsigned)
{
	CALL(cuStreamCreate);
	*ret = new stream;
	fake.streams.insert((stream *)*ret);
	return 0;
}
FAKE_API int cuStreamDestroy_v2(void *s)
{
	CALL(cuStreamDestroy_v2);
	if (!fake.streams.count((stream *)s))
		return FAKE_BAD_HANDLE;
	fake_drain(h, (stream *)s, false);
	fake.streams.erase((stream *)s);
	delete (stream *)s;
	return 0;
}
FAKE_API int cuStreamQuery(void *to)
{
	CALL(cuStreamQuery);
	stream *s = fake_stream(to);

	if (!s)
		return FAKE_BAD_HANDLE;
	fake.count.queries++;
	if (fake.mode == fake::LAZY)
		(void)fake_step_one(h, s);
	if (fake.lost)
		return fake.lost;
	return s->work.empty() && !s->running ? 0 : FAKE_NOT_READY;
}
FAKE_API int cuStreamSynchronize(void *to)
{
	CALL(cuStreamSynchronize);
	stream *s = fake_stream(to);

	if (!s)
		return FAKE_BAD_HANDLE;
	fake.count.waits++;
	fake_drain(h, s, false);
	return fake.lost;
}

FAKE_API int cuEventCreate(void **ret, unsigned)
{
	CALL(cuEventCreate);
	*ret = new event;
	fake.events.insert((event *)*ret);
	return 0;
}
FAKE_API int cuEventDestroy_v2(void *e)
{
	CALL(cuEventDestroy_v2);
	if (!fake.events.count((event *)e))
		return FAKE_BAD_HANDLE;
	fake_drain(h, NULL, true);
	fake.events.erase((event *)e);
	delete (event *)e;
	return 0;
}
FAKE_API int cuEventRecord(void *to, void *s)
{
	CALL(cuEventRecord);
	event *e = (event *)to;

	if (!fake.events.count(e))
		return FAKE_BAD_HANDLE;
	e->done = false;
	return fake_put(h, s, [e] {
		held in(fake.lock);

		e->done = true;
		e->ns = now();
	});
}
FAKE_API int cuEventQuery(void *e)
{
	CALL(cuEventQuery);
	if (!fake.events.count((event *)e))
		return FAKE_BAD_HANDLE;
	fake.count.queries++;
	return fake.lost ? fake.lost : ((event *)e)->done ? 0 : FAKE_NOT_READY;
}
FAKE_API int cuEventSynchronize(void *e)
{
	CALL(cuEventSynchronize);
	if (!fake.events.count((event *)e))
		return FAKE_BAD_HANDLE;
	fake.count.waits++;
	fake_drain(h, NULL, true);
	return fake.lost;
}
FAKE_API int cuEventElapsedTime(float *ms, void *from, void *to)
{
	CALL(cuEventElapsedTime);
	*ms = (float)(((event *)to)->ns - ((event *)from)->ns) * 1e-6f;
	return 0;
}
