/* SPDX-License-Identifier: MIT */
/* Model descriptions and regions: what a client declares before it opens sequences. */
#include <fcntl.h>
#include <openssl/sha.h>
#include <poll.h>
#include <string.h>
#include <sys/epoll.h>
#include "daemon/internal.h"
#include "ipc/codec.h"
#include "shm/trial.h"
#include "shm/util.h"

#define MAX_LINGERS 256u /* regions whose process is waited for */

/* Names what must agree for rows to be interchangeable: everything in the description. */
static int fingerprint(const struct wire_model *m, uint64_t *ret)
{
	uint8_t digest[SHA256_DIGEST_LENGTH];

	/* Behind the header, which carries a cookie. OpenSSL allocates for it. */
	if (!SHA256((const uint8_t *)m + sizeof(m->hdr), wire_model_len(m->n_layers) - sizeof(m->hdr), digest))
		return -ENOMEM;
	memcpy(ret, digest, sizeof(*ret));
	return 0;
}

static void model_free(struct model *m)
{
	free(m->layer);
	free(m->lane_layer);
	free(m->lane_head);
	free(m);
}

static struct model *model_make(const struct wire_model *w)
{
	uint32_t lanes = wire_model_lanes(w), lane = 0;
	struct model *m = calloc(1, sizeof(*m));

	if (!m)
		return NULL;
	m->layer = calloc(w->n_layers, sizeof(*m->layer));
	m->lane_layer = calloc(lanes, sizeof(*m->lane_layer));
	m->lane_head = calloc(lanes, sizeof(*m->lane_head));
	if (!m->layer || !m->lane_layer || !m->lane_head) {
		model_free(m);
		return NULL;
	}
	memcpy(m->layer, w->layer, w->n_layers * sizeof(*m->layer));
	memcpy(m->name, w->name, sizeof(m->name));
	m->lanes = lanes;
	m->n_layers = w->n_layers;
	m->dtype = w->dtype;
	m->head_dim = w->head_dim;
	m->rope = w->rope;
	m->rank = w->rank;
	m->world = w->world;
	m->first_head = w->first_head;
	for (uint32_t i = 0; i < w->n_layers; i++) {
		m->heads = MAX(m->heads, w->layer[i].kv_heads);
		for (uint32_t h = 0; h < w->layer[i].kv_heads; h++, lane++) {
			m->lane_layer[lane] = (uint16_t)i;
			m->lane_head[lane] = (uint16_t)h;
			m->row_bytes_all += lane_bytes(m, lane);
		}
	}
	return m;
}

struct model *model_get(struct core *c, const struct wire_model *w)
{
	struct model *m;
	uint64_t fp;

	if (fingerprint(w, &fp) < 0)
		return NULL;
	LIST_FOREACH(m, &c->models, link)
		if (m->fingerprint == fp) {
			m->refs++;
			return m;
		}
	m = model_make(w);
	if (!m)
		return NULL;
	m->fingerprint = fp;
	m->refs = 1;
	LIST_INSERT_HEAD(&c->models, m, link);
	c->n_models++;
	return m;
}

struct model *model_ref(struct model *m)
{
	m->refs++;
	return m;
}

void model_unref(struct core *c, struct model *m)
{
	if (--m->refs)
		return;
	/* Plans and keys hold sequences and those hold the model, so no policy object of it is in use. */
	policies_forget_model(c, m);
	LIST_REMOVE(m, link);
	c->n_models--;
	model_free(m);
}

int region_new(struct region **ret, struct client *cl, uint64_t bytes, int fd)
{
	struct core *c = cl->core;
	struct region *g = calloc(1, sizeof(*g));
	int r = -ENOMEM;

	if (!g)
		return -ENOMEM;
	g->seg = (struct seg)SEG_INIT;
	g->refs = 1;
	g->client = cl;
	g->tenant = cl->tenant;
	g->ops = fd >= 0 ? &device_fd_ops : &device_host_ops;
	if (fd >= 0 && !g->tenant->writer &&
	    workers_new(&g->tenant->writer, c->ev, c->seams.stepped ? 0 : 1, 1) < 0)
		goto fail;
	g->bytes = bytes;
	if (fd < 0) {
		r = seg_create(&g->seg, SEG_EXCHANGE, "kvtier-region", bytes, 0);
		if (r < 0)
			goto fail;
		near_place(c, cl, &g->seg);
		g->bytes = g->seg.size;
	}
	r = g->ops->attach(&g->mem, fd < 0 ? g->seg.fd : fd, g->bytes);
	if (r < 0)
		goto fail;
	g->handle = handle_add(c->regions, g, cl);
	if (!g->handle) {
		r = -ENOMEM;
		goto fail;
	}
	g->tenant->region_bytes += g->bytes;
	LIST_INSERT_HEAD(&cl->regions, g, link);
	cl->n_regions++;
	LIST_INSERT_HEAD(&c->all_regions, g, all);
	*ret = g;
	return 0;
fail:
	g->ops->detach(g->mem);
	if (!planted("oom-leaks-region"))
		seg_close(&g->seg);
	free(g);
	return r;
}

struct region *region_ref(struct region *g)
{
	g->refs++;
	return g;
}

void region_unref(struct core *c, struct region *g)
{
	if (--g->refs)
		return;
	LIST_REMOVE(g, all);
	g->tenant->region_bytes -= g->bytes;
	g->ops->detach(g->mem);
	seg_close(&g->seg);
	free(g);
}

/*
 * A GPU writes and reads registered memory as long as its process lives, whatever became of the connection:
 * till then the memory is in use and its tenant is charged with it.
 */
struct linger {
	LIST_ENTRY(linger) link;
	struct core *core;
	struct region *region;
	sd_event_source *death;
	int fd;
};

static void linger_end(struct linger *l)
{
	struct core *c = l->core;

	LIST_REMOVE(l, link);
	c->n_lingers--;
	sd_event_source_disable_unref(l->death);
	close_fdp(&l->fd);
	region_unref(c, l->region);
	free(l);
}

static int on_process_end(sd_event_source *src, int fd, uint32_t revents, void *arg)
{
	linger_end(arg);
	return 0;
}

void region_leave(struct client *cl, struct region *g)
{
	struct core *c = cl->core;
	struct pollfd dead = {.fd = cl->pid_fd, .events = POLLIN};
	struct linger *l = NULL;

	if (planted("client-death-leaks-region"))
		return;
	/* Each costs a descriptor, so there is an end to it. */
	if (g->registered && !c->freeing && cl->pid_fd >= 0 && poll(&dead, 1, 0) == 0 &&
	    c->n_lingers < MAX_LINGERS)
		l = calloc(1, sizeof(*l));
	if (!l) {
		region_unref(c, g);
		return;
	}
	l->core = c;
	l->region = g;
	LIST_INSERT_HEAD(&c->lingers, l, link);
	c->n_lingers++;
	l->fd = fcntl(cl->pid_fd, F_DUPFD_CLOEXEC, 3);
	if (l->fd < 0 || sd_event_add_io(c->ev, &l->death, l->fd, EPOLLIN, on_process_end, l) < 0)
		linger_end(l);
}

void region_linger_end(struct core *c)
{
	while (!LIST_EMPTY(&c->lingers))
		linger_end(LIST_FIRST(&c->lingers));
}
