/* SPDX-License-Identifier: MIT */
/* GPU memory that several processes map: made in one, sent to others as a descriptor. */
#include <fcntl.h>
#include <string.h>
#include "ipc/cuda/cuda.h"

#define HANDLE_FD 1 /* POSIX file descriptor */
#define ACCESS_ALL 3u

struct kvtier_cuda_pool {
	struct kvtier_cuda *g;
	uint64_t handle, addr, bytes;
	bool has_handle, mapped;
};

/* The driver's structs, as its interface fixes them. */
struct place {
	int type; /* 1: device */
	int id;
};
struct allocation {
	int type; /* 1: pinned */
	int handles;
	struct place place;
	void *unused;
	unsigned char flags[8];
};
struct permission {
	struct place place;
	unsigned access;
};
_Static_assert(sizeof(struct allocation) == 32 && sizeof(struct permission) == 12, "CUDA's ABI");

static struct allocation describe(const struct kvtier_cuda *g)
{
	return (struct allocation){.type = 1, .handles = HANDLE_FD, .place = {1, g->device}};
}

static int able(const struct kvtier_cuda *g)
{
	const struct cuda_driver *d = g->d;

	if (!d->vmm_granularity || !d->vmm_create || !d->vmm_release || !d->vmm_export || !d->vmm_import ||
	    !d->vmm_reserve || !d->vmm_unreserve || !d->vmm_map || !d->vmm_unmap || !d->vmm_access)
		return err_set(KVT_E_GPU, "driver: has no virtual memory calls (cuMemCreate), must have them");
	return 0;
}

/* An address for the memory behind p->handle, readable and writable. */
static int map(struct kvtier_cuda_pool *p)
{
	const struct permission all = {{1, p->g->device}, ACCESS_ALL};
	const struct cuda_driver *d = p->g->d;
	int r = cuda_try(p->g, d->vmm_reserve(&p->addr, p->bytes, 0, 0, 0), "pool: cuMemAddressReserve");

	if (!r)
		r = cuda_try(p->g, d->vmm_map(p->addr, p->bytes, 0, p->handle, 0), "pool: cuMemMap");
	if (r)
		return r;
	p->mapped = true;
	return cuda_try(p->g, d->vmm_access(p->addr, p->bytes, &all, 1), "pool: cuMemSetAccess");
}

static int round_up(const struct kvtier_cuda *g, uint64_t *bytes)
{
	struct allocation a = describe(g);
	size_t grain = 0;
	int r = cuda_check(g->d, g->d->vmm_granularity(&grain, &a, 0), "pool: cuMemGetAllocationGranularity");

	if (!r && !grain)
		r = err_set(KVT_E_GPU, "pool: granularity: 0, must not be 0");
	if (!r)
		*bytes = ALIGN_UP(*bytes, grain);
	return r;
}

/* By fd, or with fd -1 new memory. */
static int make(struct kvtier_cuda *g, int fd, uint64_t bytes, struct kvtier_cuda_pool **ret)
{
	struct kvtier_cuda_pool *p;
	struct allocation a;
	int r;

	if (!g || !ret)
		return err_set(KVT_E_INVAL, "%s: NULL, must be given", g ? "ret" : "g");
	if (!bytes || bytes > WIRE_MAX_REGION)
		return err_set(KVT_E_INVAL, "bytes: %llu, must be 1..%llu", (unsigned long long)bytes,
			       (unsigned long long)WIRE_MAX_REGION);
	r = able(g);
	if (r)
		return r;
	p = calloc(1, sizeof(*p));
	if (!p)
		return err_set(KVT_E_NOMEM, "pool: out of memory");
	p->g = g;
	p->bytes = bytes;
	a = describe(g);
	r = cuda_enter(g);
	if (r) {
		free(p);
		return r;
	}
	r = round_up(g, &p->bytes);
	if (!r && fd < 0)
		r = cuda_try(g, g->d->vmm_create(&p->handle, p->bytes, &a, 0), "pool: cuMemCreate");
	else if (!r)
		r = cuda_try(g, g->d->vmm_import(&p->handle, (void *)(intptr_t)fd, HANDLE_FD),
			     "pool: cuMemImportFromShareableHandle");
	if (!r) {
		p->has_handle = true;
		r = map(p);
	}
	cuda_leave(g);
	if (r) {
		kvtier_cuda_pool_close(p);
		return r;
	}
	*ret = p;
	return 0;
}

int kvtier_cuda_pool_create(struct kvtier_cuda *g, uint64_t bytes, struct kvtier_cuda_pool **ret)
{
	return make(g, -1, bytes, ret);
}

int kvtier_cuda_pool_import(struct kvtier_cuda *g, int fd, uint64_t bytes, struct kvtier_cuda_pool **ret)
{
	if (fd < 0 || fcntl(fd, F_GETFD) < 0)
		return err_set(KVT_E_INVAL, "fd: %d, not open", fd);
	return make(g, fd, bytes, ret);
}

uint64_t kvtier_cuda_pool_addr(struct kvtier_cuda_pool *p)
{
	return p ? p->addr : 0;
}

uint64_t kvtier_cuda_pool_bytes(struct kvtier_cuda_pool *p)
{
	return p ? p->bytes : 0;
}

int kvtier_cuda_pool_fd(struct kvtier_cuda_pool *p)
{
	int fd = -1, r;

	if (!p)
		return err_set(KVT_E_INVAL, "p: NULL, must be a pool");
	r = cuda_enter(p->g);
	if (r)
		return r;
	r = cuda_try(p->g, p->g->d->vmm_export(&fd, p->handle, HANDLE_FD, 0),
		     "pool: cuMemExportToShareableHandle");
	cuda_leave(p->g);
	if (!r && fcntl(fd, F_SETFD, FD_CLOEXEC) < 0) {
		close(fd);
		r = err_errno(-errno, "pool: fd");
	}
	return r ? r : fd;
}

void kvtier_cuda_pool_close(struct kvtier_cuda_pool *p)
{
	const struct cuda_driver *d;

	if (!p)
		return;
	d = p->g->d;
	if (!d->ctx_push(p->g->ctx)) {
		if (p->mapped)
			(void)d->vmm_unmap(p->addr, p->bytes);
		if (p->addr)
			(void)d->vmm_unreserve(p->addr, p->bytes);
		if (p->has_handle)
			(void)d->vmm_release(p->handle);
		cuda_leave(p->g);
	}
	free(p);
}
