/* SPDX-License-Identifier: MIT */
/* W_SEQ_OPEN: open, resume, fork. */
#include <openssl/crypto.h>
#include <openssl/sha.h>
#include <stdio.h>
#include <string.h>
#include "daemon/internal.h"
#include "ipc/codec.h"
#include "shm/trial.h"
#include "shm/util.h"

/* One request on its way; `err` holds the line of what failed. */
struct opening {
	struct client *cl;
	const struct wire_seq_open *m;
	struct model *model;
	struct region *region;
	struct wire_layout *layout;
	struct policy_use *scorer; /* the client's */
	uint32_t slot;
	uint64_t plan_off, plan_bytes;
	char err[WIRE_TEXT];
};

static int fail(struct opening *o, int status, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
static int fail(struct opening *o, int status, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(o->err, sizeof(o->err), fmt, ap);
	va_end(ap);
	return status;
}

/* The same for a sequence with a window: its scorer, its rings and its planes of scores. */
static int check_window(struct opening *o)
{
	const struct wire_seq_open *m = o->m;

	if (!o->region->seg.addr)
		return fail(o, KVT_E_INVAL, "region: imported, a window must be in memory that kvtierd made");
	if (m->scorer) {
		o->scorer = scorer_find(o->cl, m->scorer);
		if (!o->scorer)
			return fail(o, KVT_E_STALE, "scorer: %016llx was not asked for here",
				    (unsigned long long)m->scorer);
		if (o->scorer->model != o->model)
			return fail(o, KVT_E_MODEL, "scorer: %016llx is for another model",
				    (unsigned long long)m->scorer);
	}
	for (uint32_t i = 0; o->scorer && i < m->n_layers; i++)
		if (!wire_open_layouts(m)[i].score_off)
			return fail(o, KVT_E_INVAL, "layout[%u].score_off: 0, the scorer's scores need a place",
				    i);
	return wire_window_check(m, o->model->layer, o->scorer ? o->scorer->scorer.coefs : 1, o->region->bytes,
				 o->err, sizeof(o->err));
}

/* What the message refers to, and whether its layouts lie in the region. */
static int check(struct opening *o)
{
	const struct wire_seq_open *m = o->m;
	struct client *cl = o->cl;

	if (m->model > cl->n_models)
		return fail(o, KVT_E_STALE, "model: %llu is not registered", (unsigned long long)m->model);
	o->model = cl->models[m->model - 1];
	o->region = handle_get(cl->core->regions, m->region, cl);
	if (!o->region)
		return fail(o, KVT_E_STALE, "region: %016llx is gone", (unsigned long long)m->region);
	if (m->n_layers != o->model->n_layers)
		return fail(o, KVT_E_MODEL, "n_layers: %u, the model has %u", m->n_layers, o->model->n_layers);
	if ((m->flags & W_OPEN_DIRECT) && !cl->tenant->limit.direct)
		return fail(o, KVT_E_PERM, "flags: direct reads, tenant %s has direct = no", cl->tenant->name);
	if (m->flags & W_OPEN_WINDOW)
		return check_window(o);
	for (uint32_t i = 0; i < m->n_layers; i++) {
		int r = wire_layout_check(wire_open_layouts(m) + i, &o->model->layer[i], i, o->region->bytes,
					  m->max_rows, o->err, sizeof(o->err));

		if (r < 0)
			return r;
	}
	return 0;
}

/* A slot and a plan area; given back by release(). */
static int take_place(struct opening *o)
{
	struct client *cl = o->cl;
	uint32_t slot = 0;

	if (o->m->op != W_OP_RESUME &&
	    cl->tenant->seqs >= cl->tenant->limit.max_seqs + planted("one-sequence-too-many"))
		return fail(o, KVT_E_LIMIT, "sequences: tenant %s has %u, limit max_seqs %u", cl->tenant->name,
			    cl->tenant->seqs, cl->tenant->limit.max_seqs);
	while (slot < cl->max_seqs && bits_test(cl->slot_used, slot))
		slot = cl->slot_used[slot / 64] == ~UINT64_C(0) ? (slot / 64 + 1) * 64 : slot + 1;
	if (slot >= cl->max_seqs)
		return fail(o, KVT_E_LIMIT, "sequences: this client has %u, limit max_seqs %u", cl->n_seqs,
			    cl->max_seqs);
	o->plan_bytes = o->m->flags & W_OPEN_WINDOW
				? plan_bytes_window(o->model->lanes, o->m->max_rows, page_rows_least(o->model))
				: plan_bytes(o->model->lanes, o->m->max_rows);
	o->plan_off = plan_mem_take(cl->plans, o->plan_bytes);
	if (o->plan_off == UINT64_MAX)
		return fail(o, KVT_E_NOSPC,
			    "plan_bytes: %llu for %u lanes of %u rows do not fit in the client's %llu",
			    (unsigned long long)o->plan_bytes, o->model->lanes, o->m->max_rows,
			    (unsigned long long)cl->plans->seg.size);
	o->layout = malloc(o->m->n_layers * sizeof(*o->layout));
	if (!o->layout) {
		plan_mem_give(cl->plans, o->plan_off, o->plan_bytes);
		return fail(o, KVT_E_NOMEM, "out of memory");
	}
	memcpy(o->layout, wire_open_layouts(o->m), o->m->n_layers * sizeof(*o->layout));
	bits_set(cl->slot_used, slot);
	o->slot = slot;
	return 0;
}

static void release(struct opening *o)
{
	plan_mem_give(o->cl->plans, o->plan_off, o->plan_bytes);
	bits_clear(o->cl->slot_used, o->slot);
	free(o->layout);
}

/* From here on s belongs to this client. */
static void bind(struct opening *o, struct seq *s)
{
	struct client *cl = o->cl;
	struct seq_slot *slot = &cl->slots[o->slot];

	s->client = cl;
	s->slot = o->slot;
	s->plan_off = o->plan_off;
	s->plan_bytes = o->plan_bytes;
	s->layout = o->layout;
	s->region = region_ref(o->region);
	if (!s->model)
		s->model = model_ref(o->model);
	s->fingerprint = o->model->fingerprint;
	s->max_rows = o->m->max_rows;
	s->granularity = o->m->granularity;
	s->equal_lanes = o->m->equal_lanes;
	s->lifetime = o->m->lifetime;
	s->ttl_s = o->m->ttl_s;
	s->plan_id = s->acked = s->requested = s->gathered = s->drained = 0;
	s->flags = o->m->flags;
	s->window = o->m->window;
	s->scorer = o->scorer ? policies_ref(o->scorer) : NULL;
	s->plane_from = seq_windowed(s) ? s->rows : 0;
	s->look_twice = false;
	if (seq_windowed(s))
		s->region->registered = true;
	s->state = SEQ_LIVE;
	near_bind(s);
	handle_set_owner(cl->core->seqs, s->handle, cl);
	LIST_INSERT_HEAD(&cl->seqs, s, of_client);
	cl->n_seqs++;
	for (uint32_t i = 0; i < ARRAY_SIZE(slot->nack); i++)
		slot->nack[i] = 0;
	atomic_store_explicit(&slot->acked, 0, memory_order_relaxed);
	atomic_store_explicit(&slot->gathered, 0, memory_order_relaxed);
	atomic_store_explicit(&slot->drained, 0, memory_order_relaxed);
	atomic_store_explicit(&slot->len, seq_len_pack(s->epoch, s->rows), memory_order_release);
	/* The area may still show a plan of its last owner. */
	atomic_store(&((struct plan_hdr *)((char *)cl->plans->seg.addr + s->plan_off))->id, 0);
	plan_give_up((char *)cl->plans->seg.addr + s->plan_off, 0, 0);
	manager_headroom(s);
	seq_touch(s);
	core_feed(cl->core, FEED_SEQ_OPEN, s, 0, 0, NULL);
}

static int reply(struct opening *o, struct seq *s)
{
	struct wire_seq_open_reply a;

	wire_reply_init(&a.r, &o->m->hdr, sizeof(a), 0, NULL);
	a.seq = s->handle;
	a.plan_off = s->plan_off;
	a.plan_bytes = s->plan_bytes;
	a.slot = s->slot;
	a.epoch = s->epoch;
	a.rows = s->rows;
	client_reply(o->cl, &a.r, NULL, 0);
	return 0;
}

/* False: OpenSSL had no memory for it, and ret says nothing. */
static bool secret_hash(const struct opening *o, uint8_t ret[SHA256_DIGEST_LENGTH])
{
	return SHA256(o->m->secret, sizeof(o->m->secret), ret) || planted("oom-ignored");
}

static int seq_make(struct opening *o, struct seq **ret)
{
	struct client *cl = o->cl;
	uint64_t hash = tenant_hash(cl->tenant, cl->uid);
	struct seq *s = names_find(&cl->core->names, hash, o->m->key);
	uint8_t secret[SHA256_DIGEST_LENGTH];
	int r;

	if (s && s->state != SEQ_CLOSING)
		return fail(o, KVT_E_EXISTS, "key: in use by sequence %016llx", (unsigned long long)s->handle);
	if (s) { /* on its way out: wait for it */
		if (s->waiter)
			return fail(o, KVT_E_BUSY, "key: another client waits for it");
		s->waiter = cl;
		cl->waits = s;
		return KVT_AGAIN;
	}
	r = take_place(o);
	if (r < 0)
		return r;
	s = secret_hash(o, secret) ? seq_create(cl->core, cl->tenant, hash, o->m->key, secret, o->model->lanes)
				   : NULL;
	if (!s) {
		release(o);
		return fail(o, KVT_E_NOMEM, "out of memory");
	}
	s->budget_default = true;
	s->model = model_ref(o->model);
	*ret = s;
	return 0;
}

static int set_budget(struct opening *o, struct seq *s)
{
	return seq_set_budget(s, &o->m->budget, wire_open_table(o->m), o->err, sizeof(o->err));
}

/* What it asked for besides its place: budget, entry in the ledger, directory. */
static int settings(struct opening *o, struct seq *s)
{
	int r = set_budget(o, s);

	if (r < 0)
		return r;
	r = ledger_begin(s);
	if (r < 0)
		return fail(o, KVT_E_IO, "ledger: %s", strerror(-r));
	r = direct_open(s);
	return r < 0 ? fail(o, KVT_E_NOMEM, "directory: %s", strerror(-r)) : 0;
}

static int open_fresh(struct opening *o)
{
	struct seq *s;
	int r = seq_make(o, &s);

	if (r)
		return r;
	bind(o, s);
	r = settings(o, s);
	if (r < 0) {
		seq_end(s);
		return r;
	}
	manager_headroom(s);
	return reply(o, s);
}

static int open_resume(struct opening *o)
{
	struct client *cl = o->cl;
	struct core *c = cl->core;
	uint8_t hash[SHA256_DIGEST_LENGTH];
	uint64_t owner = tenant_hash(cl->tenant, cl->uid);
	struct seq *s;
	int r;

	if (planted("resume-answers-early") && !names_find(&c->names, owner, o->m->key))
		return fail(o, KVT_E_NOENT, "key: no leased sequence of this tenant with this key and secret");
	if (!secret_hash(o, hash))
		return fail(o, KVT_E_NOMEM, "out of memory");
	s = planted("resume-ignores-secret") ? names_find(&c->names, owner, o->m->key)
					     : names_resume(&c->names, owner, o->m->key, hash);
	/* One answer for "not there" and "not yours", in one time. */
	if (!s || s->lifetime != KVT_LEASED || s->state == SEQ_CLOSING)
		return fail(o, KVT_E_NOENT, "key: no leased sequence of this tenant with this key and secret");
	if (s->state == SEQ_LIVE)
		return fail(o, KVT_E_BUSY, "key: its client is still connected");
	if (s->fingerprint != o->model->fingerprint)
		return fail(o, KVT_E_MODEL, "model: not the one that the sequence was opened with");
	if (s->rows > o->m->max_rows)
		return fail(o, KVT_E_INVAL, "max_rows: %u, the sequence has %u", o->m->max_rows, s->rows);
	if (s->state == SEQ_SAVING) {
		if (s->waiter)
			return fail(o, KVT_E_BUSY, "key: another client waits for it");
		s->waiter = cl;
		cl->waits = s;
		return KVT_AGAIN;
	}
	r = take_place(o);
	if (r < 0)
		return r;
	free(s->pinned); /* sized by the old max_rows */
	free(s->wanted);
	s->pinned = s->wanted = NULL;
	TAILQ_REMOVE(&c->gone, s, gone);
	s->in_gone = false;
	s->orphan = false;
	c->n_orphans--;
	bind(o, s);
	owner_count(s);
	r = settings(o, s);
	if (r < 0) {
		seq_leave(s, false);
		return r;
	}
	manager_headroom(s);
	return reply(o, s);
}

static int open_fork(struct opening *o)
{
	struct client *cl = o->cl;
	struct seq *parent = handle_get(cl->core->seqs, o->m->parent, cl), *s;
	int r;

	if (!parent || !seq_poll(parent))
		return cl->dead ? 0
				: fail(o, KVT_E_STALE, "parent: %016llx is gone",
				       (unsigned long long)o->m->parent);
	if (seq_windowed(parent))
		return fail(o, KVT_E_INVAL, "parent: a sequence with a window cannot be forked");
	if (parent->model != o->model)
		return fail(o, KVT_E_MODEL, "model: not the parent's");
	if (parent->epoch == UINT32_MAX) /* a child is one ahead of its parent */
		return fail(o, KVT_E_LIMIT, "parent: epoch %u, no more forks", parent->epoch);
	if (o->m->prefix > parent->rows)
		return fail(o, KVT_E_INVAL, "prefix: %u, the parent has %u rows", o->m->prefix, parent->rows);
	/* Not one that is READY: where this message comes late, the parent's client may be applying it. */
	if (parent->plan && parent->plan->phase != PHASE_READY)
		manager_redo(parent);
	if (parent->cut != ROWS_ALL)
		seq_step(parent);
	if (parent->cut != ROWS_ALL) { /* a worker still reads the index as it was */
		if (parent->waiter)
			return fail(o, KVT_E_BUSY, "parent: another client waits for it");
		parent->waiter = cl;
		cl->waits = parent;
		return KVT_AGAIN;
	}
	r = seq_make(o, &s);
	if (r)
		return r;
	s->epoch = parent->epoch + 1;
	s->rows = s->scored = o->m->prefix;
	s->scored = MIN(parent->scored, o->m->prefix);
	s->keys_use = parent->keys_use ? policies_ref(parent->keys_use) : NULL;
	bind(o, s);
	r = index_fork(&s->ix, &parent->ix, o->m->prefix, s->epoch);
	if (r < 0) {
		seq_end(s);
		return fail(o, KVT_E_NOMEM, "daemon: %s", strerror(-r));
	}
	r = settings(o, s);
	if (r < 0) {
		seq_end(s);
		return r;
	}
	seq_recount(s);
	manager_headroom(s);
	reply(o, s);
	seq_step(parent);
	return 0;
}

int request_open(struct client *cl, const struct wire_seq_open *m)
{
	struct opening o = {.cl = cl, .m = m};
	int r;

	if (cl->core->draining)
		r = fail(&o, KVT_E_BUSY, "kvtierd is draining");
	else
		r = check(&o);
	if (!r)
		r = m->op == W_OP_OPEN     ? open_fresh(&o)
		    : m->op == W_OP_RESUME ? open_resume(&o)
					   : open_fork(&o);
	if (r < 0)
		client_fail(cl, &m->hdr, r, o.err);
	return r == KVT_AGAIN ? r : 0;
}
