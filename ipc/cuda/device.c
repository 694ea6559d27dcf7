/* SPDX-License-Identifier: MIT */
/* One GPU: its primary context, our kernels in it, the errors it does not come back from. */
#include <ctype.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include "ipc/client/client.h"
#include "ipc/cuda/kernels.h"
#include "ipc/kvtier_cuda.h"

#define KERNELS_FILE "kvtier-cuda.fatbin"
#define KERNELS_MAX ((off_t)256 << 20)
#define OLDEST_MAJOR 8
#define SHARED_PLAIN (48u << 10) /* what a launch gets without asking */

static const char *const kernel_names[] = {
#define X(name) #name,
	CUDA_KERNELS(X)
#undef X
};

/* ---- errors ---------------------------------------------------------------------------- */

/* After these every call in the context fails, as the driver's manual says of each. */
static bool is_sticky(cuda_result r)
{
	static const short codes[] = {
		214, /* ECC_UNCORRECTABLE */
		220, /* NVLINK_UNCORRECTABLE */
		700, /* ILLEGAL_ADDRESS */
		702, /* LAUNCH_TIMEOUT */
		709, /* CONTEXT_IS_DESTROYED */
		710, /* ASSERT */
		714, /* HARDWARE_STACK_ERROR */
		715, /* ILLEGAL_INSTRUCTION */
		716, /* MISALIGNED_ADDRESS */
		717, /* INVALID_ADDRESS_SPACE */
		718, /* INVALID_PC */
		719, /* LAUNCH_FAILED */
		721, /* TENSOR_MEMORY_LEAK */
		999, /* UNKNOWN */
	};

	for (size_t i = 0; i < ARRAY_SIZE(codes); i++)
		if (codes[i] == r)
			return true;
	return false;
}

int cuda_try(struct kvtier_cuda *g, cuda_result r, const char *call)
{
	int none = 0;

	if (unlikely(is_sticky(r)))
		atomic_compare_exchange_strong(&g->lost, &none, r);
	return cuda_check(g->d, r, call);
}

int cuda_lost(struct kvtier_cuda *g)
{
	int lost = atomic_load_explicit(&g->lost, memory_order_relaxed);

	return likely(!lost) ? 0 : cuda_check(g->d, lost, "GPU lost to an earlier error");
}

int cuda_enter(struct kvtier_cuda *g)
{
	int r = cuda_lost(g);

	if (unlikely(r))
		return r;
	return cuda_try(g, g->d->ctx_push(g->ctx), "cuCtxPushCurrent");
}

void cuda_leave(struct kvtier_cuda *g)
{
	void *ctx;

	(void)g->d->ctx_pop(&ctx);
}

int cuda_launch(struct kvtier_cuda *g, enum cuda_kernel k, unsigned gx, unsigned gy, unsigned block,
		unsigned shared, void *args, void *stream)
{
	void *params[] = {args};
	int r = 0;

	if (shared > SHARED_PLAIN)
		r = cuda_try(g, g->d->function_attribute(g->fn[k], CUDA_FN_SHARED, (int)shared),
			     kernel_names[k]);
	if (!r)
		r = cuda_try(g, g->d->launch(g->fn[k], gx, gy, 1, block, 1, 1, shared, stream, params, NULL),
			     kernel_names[k]);
	return r;
}

/* ---- the kernels' file ------------------------------------------------------------------- */

/* The whole file, NUL behind it; the caller frees it. */
static int read_file(const char *path, char **ret)
{
	_cleanup_close_ int fd = open(path, O_RDONLY | O_CLOEXEC);
	_cleanup_free_ char *buf = NULL;
	struct stat st;
	ssize_t n;
	off_t at = 0;

	if (fd < 0 || fstat(fd, &st) < 0)
		return -errno;
	if (!S_ISREG(st.st_mode) || !st.st_size || st.st_size > KERNELS_MAX)
		return -EINVAL;
	buf = calloc(1, (size_t)st.st_size + 1);
	if (!buf)
		return -ENOMEM;
	while (at < st.st_size && (n = read(fd, buf + at, (size_t)(st.st_size - at))) > 0)
		at += n;
	if (at < st.st_size)
		return -EIO;
	*ret = TAKE_PTR(buf);
	return 0;
}

/* Beside the object that this function is part of, in its folder kvtier/, or where `make install` puts it. */
static int read_beside(char **ret)
{
	Dl_info self;
	char path[4096];
	int dir = 0, r = -ENOENT;

	if (dladdr((void *)kvtier_cuda_open, &self) && self.dli_fname && strrchr(self.dli_fname, '/'))
		dir = (int)(strrchr(self.dli_fname, '/') - self.dli_fname);
	if (dir) {
		snprintf(path, sizeof(path), "%.*s/" KERNELS_FILE, dir, self.dli_fname);
		r = read_file(path, ret);
	}
	if (dir && r == -ENOENT) {
		snprintf(path, sizeof(path), "%.*s/kvtier/" KERNELS_FILE, dir, self.dli_fname);
		r = read_file(path, ret);
	}
	if (r == -ENOENT)
		r = read_file(KVT_PKGLIBDIR "/" KERNELS_FILE, ret);
	return r;
}

static int read_kernels(const char *given, char **ret)
{
	const char *env = secure_getenv("KVTIER_CUDA_KERNELS"), *path = given ? given : env;
	int r;

	if (path && !*path)
		path = NULL;
	r = path ? read_file(path, ret) : read_beside(ret);
	if (r == -ENOMEM)
		return err_errno(r, "kernels");
	if (r)
		return err_set(KVT_E_IO, "kernels: %s: %s",
			       path ? path : KERNELS_FILE " beside the library and in " KVT_PKGLIBDIR,
			       strerrordesc_np(-r));
	return 0;
}

static int load_kernels(struct kvtier_cuda *g, const char *given)
{
	_cleanup_free_ char *image = NULL;
	int r = read_kernels(given, &image);

	if (r)
		return r;
	r = cuda_try(g, g->d->module_load(&g->module, image), "kernels: cuModuleLoadData");
	for (int k = 0; k < CUDA_KERNEL_COUNT && !r; k++)
		r = cuda_try(g, g->d->module_function(&g->fn[k], g->module, kernel_names[k]), kernel_names[k]);
	/* An image for other GPUs, of another version, or none at all: the file is what is wrong. */
	return r == KVT_E_GPU && !atomic_load(&g->lost) ? KVT_E_IO : r;
}

/* ---- opening ------------------------------------------------------------------------------ */

static int numa_node(const char *pci)
{
	char path[96], id[16], line[16] = "";
	_cleanup_close_ int fd = -1;
	size_t i;

	for (i = 0; pci[i] && i < sizeof(id) - 1; i++)
		id[i] = (char)tolower((unsigned char)pci[i]);
	id[i] = 0;
	snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/numa_node", id);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || read(fd, line, sizeof(line) - 1) <= 0)
		return -1;
	return atoi(line);
}

/* What kind of GPU it is; refuses one that is too old. */
static int describe(struct kvtier_cuda *g, int ordinal)
{
	const struct cuda_driver *d = g->d;
	size_t bytes = 0;
	int count = 0, r = cuda_try(g, d->device_count(&count), "cuDeviceGetCount");

	if (!r && (ordinal < 0 || ordinal >= count))
		r = err_set(KVT_E_GPU, "device: %d, must be below the %d that the driver shows", ordinal,
			    count);
	if (!r)
		r = cuda_try(g, d->device_get(&g->device, ordinal), "cuDeviceGet");
	if (!r)
		r = cuda_try(g, d->device_name(g->name, sizeof(g->name), g->device), "cuDeviceGetName");
	if (!r)
		r = cuda_try(g, d->device_pci(g->pci, sizeof(g->pci), g->device), "cuDeviceGetPCIBusId");
	if (!r)
		r = cuda_try(g, d->device_bytes(&bytes, g->device), "cuDeviceTotalMem");
	if (!r)
		r = cuda_try(g, d->device_attribute(&g->major, CUDA_ATTR_MAJOR, g->device),
			     "cuDeviceGetAttribute");
	if (!r)
		r = cuda_try(g, d->device_attribute(&g->minor, CUDA_ATTR_MINOR, g->device),
			     "cuDeviceGetAttribute");
	if (!r)
		r = cuda_try(g, d->device_attribute(&g->sms, CUDA_ATTR_MULTIPROCESSORS, g->device),
			     "cuDeviceGetAttribute");
	if (!r)
		r = cuda_try(g, d->driver_version(&g->driver), "cuDriverGetVersion");
	if (r)
		return r;
	if (g->major < OLDEST_MAJOR)
		return err_set(KVT_E_GPU, "device %d (%s): compute capability %d.%d, must be %d.0 or later",
			       ordinal, g->name, g->major, g->minor, OLDEST_MAJOR);
	g->bytes = bytes;
	g->numa_node = numa_node(g->pci);
	return 0;
}

static int upload_tables(struct kvtier_cuda *g)
{
	_cleanup_free_ void *tables = malloc(crc_tables_bytes());
	void *stream = NULL;
	int r;

	if (!tables)
		return err_set(KVT_E_NOMEM, "GPU: out of memory");
	crc_tables_fill(tables);
	r = cuda_try(g, g->d->alloc(&g->crc, crc_tables_bytes()), "checksum tables: cuMemAlloc");
	if (!r)
		r = cuda_try(g, g->d->stream_create(&stream, CUDA_STREAM_NON_BLOCKING), "cuStreamCreate");
	if (!r)
		r = cuda_try(g, g->d->copy_in(g->crc, tables, crc_tables_bytes(), stream), "cuMemcpyHtoDAsync");
	if (stream) {
		int sync = cuda_try(g, g->d->stream_sync(stream), "checksum tables: cuStreamSynchronize");

		r = r ? r : sync;
		(void)g->d->stream_destroy(stream);
	}
	return r;
}

int kvtier_cuda_open(const struct kvtier_cuda_opts *opts, struct kvtier_cuda **ret)
{
	struct kvtier_cuda_opts o = {0};
	struct kvtier_cuda *g;
	int r = 0;

	if (!ret)
		return err_set(KVT_E_INVAL, "ret: NULL, must be given");
	if (opts)
		r = OPTS_TAKE(&o, opts);
	if (r)
		return r;
	g = calloc(1, sizeof(*g));
	if (!g)
		return err_set(KVT_E_NOMEM, "GPU: out of memory");
	r = cuda_driver_get(&g->d);
	if (!r)
		r = describe(g, o.device);
	if (!r)
		r = cuda_try(g, g->d->primary_retain(&g->ctx, g->device), "cuDevicePrimaryCtxRetain");
	if (!r)
		r = cuda_enter(g);
	if (!r) {
		r = load_kernels(g, o.kernels);
		if (!r)
			r = upload_tables(g);
		cuda_leave(g);
	}
	if (r) {
		kvtier_cuda_close(g);
		return r;
	}
	*ret = g;
	return 0;
}

void kvtier_cuda_close(struct kvtier_cuda *g)
{
	if (!g)
		return;
	/* A lost GPU is given back all the same, whatever the driver says to it. */
	if (g->ctx && !g->d->ctx_push(g->ctx)) {
		if (g->crc)
			(void)g->d->free(g->crc);
		if (g->module)
			(void)g->d->module_unload(g->module);
		cuda_leave(g);
	}
	if (g->ctx)
		(void)g->d->primary_release(g->device);
	free(g);
}

int kvtier_cuda_info(struct kvtier_cuda *g, struct kvtier_cuda_info *ret)
{
	struct kvtier_cuda_info v = {0};
	size_t bytes, total;
	int r;

	if (!g || !ret)
		return err_set(KVT_E_INVAL, "%s: NULL, must be given", g ? "ret" : "g");
	r = cuda_enter(g);
	if (r)
		return r;
	r = cuda_try(g, g->d->mem_info(&bytes, &total), "cuMemGetInfo");
	cuda_leave(g);
	if (r)
		return r;
	v.device = g->device;
	v.major = g->major;
	v.minor = g->minor;
	v.numa_node = g->numa_node;
	v.multiprocessors = g->sms;
	v.driver = g->driver;
	v.bytes = g->bytes;
	v.free_bytes = bytes;
	memcpy(v.name, g->name, sizeof(v.name));
	memcpy(v.pci, g->pci, sizeof(v.pci));
	return opts_give(ret, &v, sizeof(v), "info");
}
