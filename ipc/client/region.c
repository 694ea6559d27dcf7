/* SPDX-License-Identifier: MIT */
#include "ipc/client/client.h"

int kvtier_region_create(struct kvtier *c, uint64_t bytes, struct kvtier_region **ret)
{
	int fd = -1, r;
	struct kvtier_region *reg;
	struct wire_region req;
	struct wire_region_reply reply;
	struct call k = {.req = &req.hdr, .reply = &reply, .reply_size = sizeof(reply), .fds = &fd, .n_fds = 1};

	if (!c || !ret)
		return err_set(KVT_E_INVAL, "%s: NULL, must be given", c ? "ret" : "c");
	if (forked(c))
		return err_forked();
	if (!bytes || bytes > WIRE_MAX_REGION)
		return err_set(KVT_E_INVAL, "bytes: %llu, must be 1..%llu", (unsigned long long)bytes,
			       (unsigned long long)WIRE_MAX_REGION);
	reg = calloc(1, sizeof(*reg));
	if (!reg)
		return err_set(KVT_E_NOMEM, "region: out of memory");
	*reg = (struct kvtier_region){.c = c, .refs = 1, .seg = SEG_INIT};
	k.ret_link = &reg->link;
	wire_init(&req.hdr, W_REGION, sizeof(req), 0);
	req.bytes = bytes;
	r = call_run(c, &k);
	if (r) {
		free(reg);
		return r;
	}
	reg->handle = reply.region;
	pthread_mutex_lock(&c->lock);
	LIST_INSERT_HEAD(&c->regions, reg, entry);
	pthread_mutex_unlock(&c->lock);
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
