/* SPDX-License-Identifier: MIT */
/* The messages of a client, one function each. Every one has passed wire_check(). */
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include "daemon/admin.h"
#include "daemon/internal.h"
#include "ipc/codec.h"
#include "shm/trial.h"
#include "shm/util.h"

#define MAX_MODELS 64u                   /* of one client */
#define POPULATE_MAX (UINT64_C(1) << 20) /* of a control segment */
#define SPARE_REGIONS 16u                /* of one client, besides two for each sequence it may have */

static int refuse(struct client *cl, const struct wire_hdr *m, int status, const char *fmt, ...)
	__attribute__((format(printf, 4, 5)));
static int refuse(struct client *cl, const struct wire_hdr *m, int status, const char *fmt, ...)
{
	char text[WIRE_TEXT];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	client_fail(cl, m, status, text);
	return 0;
}

static int no_memory(struct client *cl, const struct wire_hdr *m, int r)
{
	return refuse(cl, m, r == -ENOSPC ? KVT_E_NOSPC : KVT_E_NOMEM, "daemon: %s", strerror(-r));
}

/* ---- hello, model, region ----------------------------------------------------------- */

static int make_rings(struct client *cl, const struct wire_hello *m, int *ret_notified)
{
	size_t bytes = ctl_bytes(m->ring_entries, m->max_seqs);
	int r, ends[2];

	/* Megabytes at once would hold up the loop, and whoever asks for them may not use them. */
	r = seg_create(&cl->ctl, SEG_EXCHANGE, "kvtier-ctl", bytes, 0);
	if (r < 0)
		return r;
	near_hello(cl);
	near_place(cl->core, cl, &cl->ctl);
	r = bytes <= POPULATE_MAX ? seg_commit(&cl->ctl, 0, cl->ctl.size) : 0;
	if (r < 0)
		return r;
	cl->plans = plan_mem_new(m->plan_bytes, &r);
	if (!cl->plans)
		return r;
	near_place(cl->core, cl, &cl->plans->seg);
	cl->core->stat.plan_bytes += cl->plans->seg.size;
	cl->slot_used = calloc(BITS_WORDS(m->max_seqs), sizeof(uint64_t));
	cl->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (!cl->slot_used)
		return -ENOMEM;
	if (cl->wake_fd < 0 || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends) < 0)
		return -EMFILE;
	cl->notify_fd = ends[0];
	*ret_notified = ends[1];
	cl->slots = (struct seq_slot *)((char *)cl->ctl.addr + ctl_slots_off(m->ring_entries));
	r = ring_attach(&cl->sq, cl->ctl.addr, m->ring_entries, false);
	return r < 0 ? r
		     : ring_attach(&cl->cq, (char *)cl->ctl.addr + ctl_cq_off(m->ring_entries), m->ring_entries,
				   true);
}

static int on_hello(struct client *cl, const struct wire_hello *m)
{
	_cleanup_close_ int notified = -1;
	struct wire_hello_reply a;
	int fds[4], r;

	if (cl->hello || !cl->tenant) {
		client_end(cl, "hello: %s", cl->hello ? "the second one" : "on the admin socket");
		return 0;
	}
	wire_string(cl->name, sizeof(cl->name), m->name);
	r = make_rings(cl, m, &notified);
	if (r >= 0)
		r = session_attach(cl);
	if (r < 0) {
		no_memory(cl, &m->hdr, r);
		log_about(said_of(cl->core, cl->tenant), 3, "client %u pid %d: hello: %s", cl->id, (int)cl->pid,
			  strerror(-r));
		client_end(cl, NULL); /* no fault of its own */
		return 0;
	}
	cl->hello = true;
	cl->entries = m->ring_entries;
	cl->max_seqs = m->max_seqs;
	wire_reply_init(&a.r, &m->hdr, sizeof(a), 0, NULL);
	a.features = m->features & WIRE_FEATURES;
	a.client = cl->id;
	a.max_seqs = cl->max_seqs;
	a.ring_entries = cl->entries;
	a.ctl_bytes = cl->ctl.size;
	a.plan_bytes = cl->plans->seg.size;
	wire_string(a.version, sizeof(a.version), KVT_VERSION);
	fds[0] = cl->ctl.fd;
	fds[1] = cl->plans->seg.fd;
	fds[2] = cl->wake_fd;
	fds[3] = notified;
	core_feed(cl->core, FEED_CLIENT, NULL, cl->id, 1, NULL);
	client_reply(cl, &a.r, fds, 4);
	return 0;
}

static int on_model(struct client *cl, const struct wire_model *m)
{
	struct wire_model_reply a;
	struct model *mo;
	uint32_t i;

	for (uint32_t k = 0; k < m->n_layers; k++)
		if ((uint64_t)m->layer[k].k_bytes + m->layer[k].v_bytes > TIER_MAX_PAGE)
			return refuse(cl, &m->hdr, KVT_E_INVAL, "layer[%u].k_bytes + v_bytes: %llu, at most %u",
				      k, (unsigned long long)m->layer[k].k_bytes + m->layer[k].v_bytes,
				      TIER_MAX_PAGE);
	mo = model_get(cl->core, m);
	if (!mo)
		return no_memory(cl, &m->hdr, -ENOMEM);
	for (i = 0; i < cl->n_models && cl->models[i] != mo; i++)
		;
	if (i < cl->n_models) {
		model_unref(cl->core, mo);
	} else {
		struct model **v = i < MAX_MODELS ? reallocarray(cl->models, i + 1, sizeof(*v)) : NULL;

		if (!v) {
			model_unref(cl->core, mo);
			return i < MAX_MODELS ? no_memory(cl, &m->hdr, -ENOMEM)
					      : refuse(cl, &m->hdr, KVT_E_LIMIT, "models: %u, limit %u", i + 1,
						       MAX_MODELS);
		}
		cl->models = v;
		v[cl->n_models++] = mo;
	}
	wire_reply_init(&a.r, &m->hdr, sizeof(a), 0, NULL);
	a.model = i + 1;
	a.lanes = mo->lanes;
	client_reply(cl, &a.r, NULL, 0);
	return 0;
}

/* fd: the client's file, or -1: one is to be made. */
static int on_region(struct client *cl, const struct wire_region *m, int fd)
{
	uint64_t have = cl->tenant->region_bytes, limit = cl->tenant->limit.region_bytes;
	struct wire_region_reply a;
	char line[WIRE_TEXT];
	struct region *g;
	int r;

	/* Each costs a descriptor, which all tenants share. */
	if (cl->n_regions >= 2 * cl->max_seqs + SPARE_REGIONS)
		return refuse(cl, &m->hdr, KVT_E_LIMIT, "regions: this client has %u, limit 2 x max_seqs + %u",
			      cl->n_regions, SPARE_REGIONS);
	if (m->bytes > limit || have > limit - (planted("region-quota-by-what-it-has") ? 0 : m->bytes))
		return refuse(cl, &m->hdr, KVT_E_LIMIT, "bytes: %llu, tenant %s has %llu of %llu left",
			      (unsigned long long)m->bytes, cl->tenant->name,
			      (unsigned long long)(have < limit ? limit - have : 0), (unsigned long long)limit);
	if (fd >= 0 && device_fd_check(fd, m->bytes, line, sizeof(line)) < 0)
		return refuse(cl, &m->hdr, KVT_E_INVAL, "%s", line);
	r = region_new(&g, cl, m->bytes, fd);
	if (r < 0)
		return no_memory(cl, &m->hdr, r);
	wire_reply_init(&a.r, &m->hdr, sizeof(a), 0, NULL);
	a.region = g->handle;
	a.bytes = g->bytes;
	client_reply(cl, &a.r, &g->seg.fd, fd < 0);
	return 0;
}

static int on_region_close(struct client *cl, const struct wire_handle *m)
{
	struct region *g = handle_get(cl->core->regions, m->handle, cl);
	struct wire_reply a;

	if (!g)
		return refuse(cl, &m->hdr, KVT_E_STALE, "handle: %016llx is no region",
			      (unsigned long long)m->handle);
	handle_del(cl->core->regions, g->handle);
	LIST_REMOVE(g, link);
	cl->n_regions--;
	g->client = NULL;
	region_unref(cl->core, g); /* sequences that still use it keep it */
	wire_reply_init(&a, &m->hdr, sizeof(a), 0, NULL);
	client_reply(cl, &a, NULL, 0);
	return 0;
}

/* ---- sequences ------------------------------------------------------------------------- */

struct seq *request_seq(struct client *cl, const struct wire_hdr *m, uint64_t handle)
{
	struct seq *s = handle_get(cl->core->seqs, handle, cl);

	if (!s || s->state != SEQ_LIVE) {
		refuse(cl, m, KVT_E_STALE, "seq: %016llx is gone", (unsigned long long)handle);
		return NULL;
	}
	s->refs++;
	/* The words that the client wrote before this message count before it. */
	if (!seq_poll(s)) {
		if (!cl->dead)
			refuse(cl, m, KVT_E_STALE, "seq: %016llx is gone", (unsigned long long)handle);
		seq_unref(s);
		return NULL;
	}
	return s;
}

static int on_truncate(struct client *cl, const struct wire_seq_truncate *m)
{
	struct seq *s = request_seq(cl, &m->hdr, m->seq);
	struct wire_seq_truncate_reply a;
	int r;

	if (!s)
		return 0;
	if (m->rows > s->rows) {
		refuse(cl, &m->hdr, KVT_E_INVAL, "rows: %u, the sequence has %u", m->rows, s->rows);
	} else if (s->epoch == UINT32_MAX) {
		refuse(cl, &m->hdr, KVT_E_LIMIT, "epoch: %u, no more truncations", s->epoch);
	} else if ((r = seq_truncate(s, m->rows)) < 0) {
		refuse(cl, &m->hdr, KVT_E_IO, "rows: %u, the ledger cannot be written: %s", m->rows,
		       strerror(-r));
	} else {
		wire_reply_init(&a.r, &m->hdr, sizeof(a), 0, NULL);
		a.epoch = s->epoch;
		a.rows = s->rows;
		client_reply(cl, &a.r, NULL, 0);
	}
	seq_unref(s);
	return 0;
}

/* The reply waits until the daemon touches the region no more on behalf of this sequence. */
static int on_close(struct client *cl, const struct wire_seq_close *m)
{
	struct seq *s = request_seq(cl, &m->hdr, m->seq);

	if (!s)
		return 0;
	s->closer = cl;
	s->close_req = m->hdr;
	cl->waits = s;
	seq_leave(s, m->drop);
	seq_unref(s);
	return 0;
}

/* Rows, over all lanes, that nothing below the device tier holds. The index may still have rows that a cut to
 * come takes away. */
static uint64_t unsaved_rows(const struct seq *s)
{
	const struct index *ix = &s->ix;
	uint32_t rows = MIN(ix->rows, s->cut), full = rows / 64;
	uint64_t n = (uint64_t)(s->rows - rows) * ix->lanes, rest = (UINT64_C(1) << rows % 64) - 1;

	for (uint32_t l = 0; l < ix->lanes && rows; l++) {
		const uint64_t *on = index_bits(ix, KVT_TIER_DEVICE, l),
			       *dram = index_bits(ix, KVT_TIER_DRAM, l),
			       *nvme = index_bits(ix, KVT_TIER_NVME, l);

		for (uint32_t w = 0; w < BITS_WORDS(rows); w++)
			n += (uint32_t)__builtin_popcountll(on[w] & ~dram[w] & ~nvme[w] &
							    (w < full ? UINT64_MAX : rest));
	}
	return n;
}

static int on_info(struct client *cl, const struct wire_handle *m)
{
	struct seq *s = request_seq(cl, &m->hdr, m->handle);
	struct wire_seq_info_reply a;
	struct core_seq_stat st;

	if (!s)
		return 0;
	core_seq_stat(cl->core, s->handle, &st);
	wire_reply_init(&a.r, &m->hdr, sizeof(a), 0, NULL);
	a.rows = st.rows;
	a.epoch = st.epoch;
	a.lanes = st.lanes;
	a.resident_max = st.resident_max;
	memcpy(a.tier_rows, st.tier_rows, sizeof(a.tier_rows));
	memcpy(a.tier_bytes, st.tier_bytes, sizeof(a.tier_bytes));
	a.dropped_rows = st.dropped_rows;
	a.plans = st.plans;
	a.plan_ns_last = st.plan_ns_last;
	a.refaults = st.refaults;
	a.misses = st.misses;
	a.index_bytes = st.index_bytes;
	a.unsaved_rows = unsaved_rows(s);
	wire_string(a.policy, sizeof(a.policy), st.policy);
	client_reply(cl, &a.r, NULL, 0);
	seq_unref(s);
	return 0;
}

/* ---- plans ------------------------------------------------------------------------------- */

int seq_set_budget(struct seq *s, const struct wire_budget *b, const uint32_t *table, char *err, size_t errsize)
{
	const struct model *m = s->model;
	uint32_t *device = NULL;

	if (b->policy[0] && !policy_find(b->policy)) {
		snprintf(err, errsize, "budget.policy: \"%s\" is not known", b->policy);
		return KVT_E_INVAL;
	}
	if (b->set && b->kind != KVT_BUDGET_UNIFORM) {
		uint32_t want = b->kind == KVT_BUDGET_PER_LAYER ? m->n_layers : m->lanes;

		if (b->table_n != want) {
			snprintf(err, errsize, "budget.table_n: %u, must be %u", b->table_n, want);
			return KVT_E_INVAL;
		}
		device = calloc(m->lanes, sizeof(*device));
		if (!device) {
			snprintf(err, errsize, "out of memory");
			return KVT_E_NOMEM;
		}
		for (uint32_t l = 0; l < m->lanes; l++)
			device[l] = table[b->kind == KVT_BUDGET_PER_LAYER ? m->lane_layer[l] : l];
	}
	if (b->policy[0])
		memcpy(s->policy, b->policy, sizeof(s->policy));
	if (!b->set)
		return 0;
	free(s->device_table);
	s->device_table = device;
	s->budget_default = false;
	s->budget[KVT_TIER_DEVICE] = b->device_rows;
	s->budget[KVT_TIER_DRAM] = b->dram_rows;
	s->budget[KVT_TIER_NVME] = b->nvme_rows;
	s->slack = b->slack_rows ? b->slack_rows : s->core->cfg.slack_rows ? s->core->cfg.slack_rows : 64;
	s->manual = b->manual;
	s->write_through |= b->write_through;
	if (s->manual)
		share_leave(s);
	manager_headroom(s);
	return 0;
}

/* Plans from now on have at least this id. A plan that the client may be applying stays. */
static void want_plan(struct client *cl, struct seq *s, const struct wire_hdr *m)
{
	struct wire_plan_reply a;

	if (s->plan && (s->plan->phase != PHASE_READY || planted("reuse-before-ack")))
		manager_redo(s);
	s->requested = s->plan_id + 1;
	s->retries = 0;
	wire_reply_init(&a.r, m, sizeof(a), 0, NULL);
	a.plan_id = s->requested;
	client_reply(cl, &a.r, NULL, 0);
	seq_step(s);
}

static int may_plan(struct client *cl, const struct wire_hdr *m)
{
	struct core *c = cl->core;

	if (!c->draining && !c->frozen && !c->cfg.observe)
		return 1;
	refuse(cl, m, KVT_E_BUSY, "kvtierd is %s",
	       c->draining ? "draining"
	       : c->frozen ? "frozen"
			   : "observing only");
	return 0;
}

static int on_plan_request(struct client *cl, const struct wire_plan_request *m)
{
	struct seq *s = request_seq(cl, &m->hdr, m->seq);
	char err[WIRE_TEXT];
	int r;

	if (!s)
		return 0;
	r = seq_set_budget(s, &m->budget, wire_plan_table(m), err, sizeof(err));
	if (r < 0)
		refuse(cl, &m->hdr, r, "%s", err);
	else if (may_plan(cl, &m->hdr))
		want_plan(cl, s, &m->hdr);
	seq_unref(s);
	return 0;
}

static int on_fetch(struct client *cl, const struct wire_fetch *m)
{
	struct seq *s = request_seq(cl, &m->hdr, m->seq);

	if (!s)
		return 0;
	if (m->pos >= s->rows || m->n > s->rows - m->pos) {
		refuse(cl, &m->hdr, KVT_E_INVAL, "pos: %u, n: %u, the sequence has %u rows", m->pos, m->n,
		       s->rows);
	} else if (may_plan(cl, &m->hdr)) {
		if (!s->wanted)
			s->wanted = calloc(BITS_WORDS(s->max_rows), sizeof(uint64_t));
		if (s->wanted) {
			bits_set_range(s->wanted, m->pos, m->pos + m->n);
			want_plan(cl, s, &m->hdr);
		} else {
			no_memory(cl, &m->hdr, -ENOMEM);
		}
	}
	seq_unref(s);
	return 0;
}

/* ---- admin ---------------------------------------------------------------------------------- */

static int on_admin(struct client *cl, const struct wire_admin *m)
{
	struct admin_peer peer = {.uid = cl->uid,
				  .pid = (int)cl->pid,
				  .tenant = cl->tenant ? (int)cl->tenant->index : -1,
				  .owner = cl->tenant ? tenant_hash(cl->tenant, cl->uid) : 0};
	struct admin_result res = {.fd = -1};
	struct seg json = SEG_INIT;
	const char *argv[65];
	char err[WIRE_TEXT] = "";
	struct wire_admin_reply a;
	int fds[2], r;
	unsigned n = 0;
	uint32_t argc = wire_admin_argv(m, argv, ARRAY_SIZE(argv));

	r = admin_dispatch(cl->core, &peer, (int)argc, (char *const *)argv, &res, err, sizeof(err));
	if (r < 0) {
		free(res.json);
		return refuse(cl, &m->hdr, r, "%s", err);
	}
	wire_reply_init(&a.r, &m->hdr, sizeof(a), 0, NULL);
	if (res.json_bytes) {
		r = seg_create(&json, SEG_PUBLISHED, "kvtier-json", res.json_bytes, SEG_F_POPULATE);
		if (r < 0) {
			free(res.json);
			return no_memory(cl, &m->hdr, r);
		}
		memcpy(json.addr, res.json, res.json_bytes);
		a.json_bytes = res.json_bytes;
		fds[n++] = json.fd;
	}
	if (res.fd >= 0)
		fds[n++] = res.fd;
	client_reply(cl, &a.r, fds, n);
	seg_close(&json);
	free(res.json);
	return 0;
}

int request_handle(struct client *cl, const struct wire_hdr *m, int fd)
{
	switch (m->type) {
	case W_HELLO:
		return on_hello(cl, (const void *)m);
	case W_MODEL:
		return on_model(cl, (const void *)m);
	case W_REGION:
	case W_REGION_IMPORT:
		return on_region(cl, (const void *)m, fd);
	case W_REGION_CLOSE:
		return on_region_close(cl, (const void *)m);
	case W_SEQ_OPEN:
		return request_open(cl, (const void *)m);
	case W_SEQ_TRUNCATE:
		return on_truncate(cl, (const void *)m);
	case W_SEQ_CLOSE:
		return on_close(cl, (const void *)m);
	case W_SEQ_INFO:
		return on_info(cl, (const void *)m);
	case W_PLAN_REQUEST:
		return on_plan_request(cl, (const void *)m);
	case W_FETCH:
		return on_fetch(cl, (const void *)m);
	case W_DIRECT:
		return request_direct(cl, (const void *)m);
	case W_SEGMENT:
		return request_segment(cl, (const void *)m);
	case W_RECALL:
		return request_recall(cl, (const void *)m);
	case W_SCORER:
		return request_scorer(cl, (const void *)m);
	case W_ADMIN:
		return on_admin(cl, (const void *)m);
	}
	return refuse(cl, m, KVT_E_INVAL, "type: %u is not known", m->type);
}
