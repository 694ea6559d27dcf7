/* SPDX-License-Identifier: MIT */
#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include "ipc/client/client.h"
#include "ipc/cuda/cuda.h"

/* What both ways of getting a region check first. */
static int args_check(const struct kvtier *c, uint64_t bytes, struct kvtier_region **ret)
{
	if (!c || !ret)
		return err_set(KVT_E_INVAL, "%s: NULL, must be given", c ? "ret" : "c");
	if (forked(c))
		return err_forked();
	if (!bytes || bytes > WIRE_MAX_REGION)
		return err_set(KVT_E_INVAL, "bytes: %llu, must be 1..%llu", (unsigned long long)bytes,
			       (unsigned long long)WIRE_MAX_REGION);
	return 0;
}

static struct kvtier_region *region_new(struct kvtier *c)
{
	struct kvtier_region *reg = calloc(1, sizeof(*reg));

	if (!reg) {
		err_set(KVT_E_NOMEM, "region: out of memory");
		return NULL;
	}
	*reg = (struct kvtier_region){.c = c, .refs = 1, .seg = SEG_INIT};
	return reg;
}

/* Ask the daemon for it. From success on it is closed by kvtier_region_close() only. */
static int region_ask(struct kvtier_region *reg, struct call *k, enum wire_type type, uint64_t bytes,
		      struct wire_region_reply *reply)
{
	struct kvtier *c = reg->c;
	struct wire_region req;
	int r;

	wire_init(&req.hdr, type, sizeof(req), 0);
	req.bytes = bytes;
	k->req = &req.hdr;
	k->reply = reply;
	k->reply_size = sizeof(*reply);
	k->ret_link = &reg->link;
	r = call_run(c, k);
	if (r)
		return r;
	reg->handle = reply->region;
	pthread_mutex_lock(&c->lock);
	LIST_INSERT_HEAD(&c->regions, reg, entry);
	pthread_mutex_unlock(&c->lock);
	return 0;
}

int kvtier_region_create(struct kvtier *c, uint64_t bytes, struct kvtier_region **ret)
{
	int fd = -1, r = args_check(c, bytes, ret);
	struct call k = {.fds = &fd, .n_fds = 1};
	struct wire_region_reply reply;
	struct kvtier_region *reg;

	if (r)
		return r;
	reg = region_new(c);
	if (!reg)
		return KVT_E_NOMEM;
	r = region_ask(reg, &k, W_REGION, bytes, &reply);
	if (r) {
		free(reg);
		return r;
	}
	if (reply.bytes < bytes)
		r = err_set(KVT_E_PROTO, "bytes: %llu, must be at least %llu", (unsigned long long)reply.bytes,
			    (unsigned long long)bytes);
	else
		r = seg_map(&reg->seg, SEG_EXCHANGE, fd, reply.bytes);
	if (r) {
		close_fdp(&fd);
		kvtier_region_close(reg);
		return r == KVT_E_PROTO ? r : err_errno(r, "region");
	}
	*ret = reg;
	return 0;
}

/*
 * The daemon checks for itself; here the caller gets the name of what is wrong, and a file system that never
 * answers holds up its own process instead of being passed on.
 */
static int file_check(int fd, uint64_t bytes, bool *ret_huge)
{
	int mode = fcntl(fd, F_GETFL);
	struct statfs fs;
	struct stat st;

	if (mode < 0)
		return err_set(KVT_E_INVAL, "fd: %d, not open", fd);
	if ((mode & (O_PATH | O_APPEND)) || (mode & O_ACCMODE) != O_RDWR)
		return err_set(KVT_E_INVAL,
			       "fd: mode %#o, must be open for reading and writing and not for appending",
			       mode);
	if (fstat(fd, &st) < 0 || fstatfs(fd, &fs) < 0)
		return err_errno(-errno, "fd");
	if (!S_ISREG(st.st_mode) || (fs.f_type != TMPFS_MAGIC && fs.f_type != HUGETLBFS_MAGIC))
		return err_set(KVT_E_INVAL, "fd: file system %#lx, must be tmpfs or hugetlbfs",
			       (unsigned long)fs.f_type);
	if ((uint64_t)st.st_size < bytes)
		return err_set(KVT_E_INVAL, "bytes: %llu, the file has %llu", (unsigned long long)bytes,
			       (unsigned long long)st.st_size);
	*ret_huge = fs.f_type == HUGETLBFS_MAGIC;
	return 0;
}

int kvtier_region_import(struct kvtier *c, int fd, uint64_t bytes, struct kvtier_region **ret)
{
	struct call k = {.send_fds = &fd, .n_send_fds = 1, .needs = WIRE_F_IMPORT};
	struct wire_region_reply reply;
	struct kvtier_region *reg;
	bool huge = false;
	int r = args_check(c, bytes, ret);

	if (!r)
		r = file_check(fd, bytes, &huge);
	if (r)
		return r;
	reg = region_new(c);
	if (!reg)
		return KVT_E_NOMEM;
	reg->seg = (struct seg){.fd = fcntl(fd, F_DUPFD_CLOEXEC, 3),
				.size = bytes,
				.cls = SEG_EXCHANGE,
				.huge = huge,
				.writable = true};
	if (reg->seg.fd < 0) {
		r = err_errno(-errno, "fd");
		free(reg);
		return r;
	}
	/* The runtime may have mapped it in a way of its own, and may move its rows itself. */
	reg->seg.addr = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, reg->seg.fd, 0);
	if (reg->seg.addr == MAP_FAILED)
		reg->seg.addr = NULL;
	r = region_ask(reg, &k, W_REGION_IMPORT, bytes, &reply);
	if (r) {
		seg_close(&reg->seg);
		free(reg);
		return r;
	}
	*ret = reg;
	return 0;
}

void *kvtier_region_addr(struct kvtier_region *r)
{
	return r ? r->seg.addr : NULL;
}

uint64_t kvtier_region_bytes(struct kvtier_region *r)
{
	return r ? r->seg.size : 0;
}

uint64_t kvtier_region_resident(struct kvtier_region *r)
{
	return r ? seg_resident(&r->seg) : 0;
}

void region_free(struct kvtier_region *r)
{
	LIST_REMOVE(r, entry);
	seg_close(&r->seg);
	link_put_locked(r->link);
	free(r);
}

void region_put(struct kvtier_region *r)
{
	struct kvtier *c = r->c;
	struct wire_handle req;
	struct wire_reply reply;
	struct call k = {.req = &req.hdr, .reply = &reply, .reply_size = sizeof(reply), .link = r->link};
	bool last;

	pthread_mutex_lock(&c->lock);
	last = !--r->refs;
	pthread_mutex_unlock(&c->lock);
	if (!last)
		return;
	/* The GPU lets go of it before the daemon may. */
	window_detach(r);
	if (!atomic_load(&r->link->dead)) {
		wire_init(&req.hdr, W_REGION_CLOSE, sizeof(req), 0);
		req.handle = r->handle;
		(void)call_run(
			c,
			&k); /* whatever it answers, the mapping goes; the daemon reclaims at the end of file */
	}
	pthread_mutex_lock(&c->lock);
	region_free(r);
	pthread_mutex_unlock(&c->lock);
}

void kvtier_region_close(struct kvtier_region *r)
{
	if (r && !forked(r->c))
		region_put(r);
}
