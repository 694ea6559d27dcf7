/* SPDX-License-Identifier: MIT */
/* Opening, resuming and closing sequences. */
#include <string.h>
#include <sys/random.h>
#include "ipc/client/client.h"
#include "ipc/cuda/cuda.h"

int seq_gate(struct kvtier_seq *s)
{
	int gone;

	if (forked(s->c))
		return err_forked();
	gone = atomic_load_explicit(&s->gone, memory_order_relaxed);
	if (unlikely(gone))
		return err_set(KVT_E_STALE, "sequence: ended by the daemon: %s", kvtier_strerror(gone));
	if (unlikely(atomic_load_explicit(&s->link->dead, memory_order_acquire))) {
		if (!atomic_load(&s->c->up))
			return err_set(KVT_E_DAEMON, "%s: daemon not reachable", s->c->path);
		return err_set(KVT_E_STALE,
			       "sequence: opened before the daemon restarted, open or resume it again");
	}
	if (unlikely(atomic_load_explicit(&s->limbo, memory_order_relaxed)))
		return err_set(KVT_E_STALE, "sequence: a truncate got no answer, call it again");
	return 0;
}

int seq_on_host(const struct kvtier_seq *s, const char *instead)
{
	if (likely(!s->cu))
		return 0;
	return err_set(KVT_E_INVAL, "sequence: its rows are in GPU memory, use %s", instead);
}

/* ---- before the daemon is asked ---------------------------------------------------------- */

int seq_budget(const struct kvtier_model *m, const struct kvtier_budget *b, struct wire_budget *ret,
	       uint32_t *table)
{
	struct kvtier_budget o;
	uint32_t want;
	int r;

	memset(ret, 0, sizeof(*ret));
	if (!b)
		return 0;
	r = opts_take(&o, sizeof(o), b, "budget");
	if (r)
		return r;
	if (o.kind > KVT_BUDGET_PER_LANE)
		return err_set(KVT_E_INVAL, "budget.kind: %u, must be 0..%d", o.kind, KVT_BUDGET_PER_LANE);
	if (o.write_through > 1)
		return err_set(KVT_E_INVAL, "budget.write_through: %u, must be 0 or 1", o.write_through);
	want = o.kind == KVT_BUDGET_PER_LAYER ? m->msg->n_layers : m->lanes;
	if (o.kind != KVT_BUDGET_UNIFORM && (!o.device_table || o.table_n != want))
		return err_set(KVT_E_INVAL, "budget.table_n: %u, must be %u with a table", o.table_n, want);
	if (o.policy && strlen(o.policy) >= sizeof(ret->policy))
		return err_set(KVT_E_INVAL, "budget.policy: %zu bytes, must be at most %zu", strlen(o.policy),
			       sizeof(ret->policy) - 1);
	*ret = (struct wire_budget){.kind = o.kind,
				    .device_rows = o.device_rows,
				    .dram_rows = o.dram_rows,
				    .nvme_rows = o.nvme_rows,
				    .slack_rows = o.slack_rows,
				    .manual = o.manual,
				    .write_through = o.write_through,
				    .set = 1};
	wire_string(ret->policy, sizeof(ret->policy), o.policy ? o.policy : "");
	if (o.kind != KVT_BUDGET_UNIFORM) {
		ret->table_n = want;
		memcpy(table, o.device_table, want * sizeof(*table));
	}
	return 0;
}

static void to_wire(const struct kvtier_layout *l, struct wire_layout *ret)
{
	*ret = (struct wire_layout){.k_off = l->k_off,
				    .v_off = l->v_off,
				    .k_head_stride = l->k_head_stride,
				    .v_head_stride = l->v_head_stride,
				    .score_off = l->score_off,
				    .score_head_stride = l->score_head_stride,
				    .k_row_stride = l->k_row_stride,
				    .v_row_stride = l->v_row_stride,
				    .cap = l->cap,
				    .stage = l->stage};
}

static int check_layouts(const struct kvtier_seq *s)
{
	char err[WIRE_TEXT];
	struct wire_layout w;

	for (uint32_t i = 0; i < s->n_layers; i++) {
		to_wire(&s->layouts[i], &w);
		if (wire_layout_check(&w, &s->m->msg->layer[i], i, s->r->seg.size, s->max_rows, err,
				      sizeof(err)))
			return err_set(KVT_E_INVAL, "%s", err);
	}
	return 0;
}

static int seq_alloc(struct kvtier_seq *s)
{
	s->layouts = calloc(s->n_layers, sizeof(*s->layouts));
	s->layer_rows = calloc(s->n_layers, sizeof(*s->layer_rows));
	s->layer_slots = calloc(s->n_layers, sizeof(*s->layer_slots));
	s->held = calloc(s->lanes, sizeof(*s->held));
	s->resident = calloc((size_t)s->lanes * s->words, sizeof(*s->resident)); /* memory appears as rows do */
	if (!s->layouts || !s->layer_rows || !s->layer_slots || !s->held || !s->resident)
		return err_set(KVT_E_NOMEM, "sequence: out of memory");
	return 0;
}

int seq_new(struct kvtier *c, struct kvtier_model *m, const struct kvtier_seq_opts *o, struct cuda_seq *cu,
	    struct kvtier_seq **ret)
{
	struct kvtier_seq *s;
	int r;

	if (!o->region || !o->layouts)
		return err_set(KVT_E_INVAL, "%s: NULL, must be given", o->region ? "layouts" : "region");
	if (m->c != c || o->region->c != c)
		return err_set(KVT_E_INVAL, "%s: belongs to another connection",
			       m->c != c ? "model" : "region");
	if (!o->max_rows || o->max_rows > WIRE_MAX_ROWS)
		return err_set(KVT_E_INVAL, "max_rows: %u, must be 1..%u", o->max_rows, WIRE_MAX_ROWS);
	s = calloc(1, sizeof(*s));
	if (!s)
		return err_set(KVT_E_NOMEM, "sequence: out of memory");
	s->c = c;
	s->m = m;
	s->r = o->region;
	s->max_rows = o->max_rows;
	s->lanes = m->lanes;
	s->n_layers = m->msg->n_layers;
	s->words = (uint32_t)BITS_WORDS(o->max_rows);
	pthread_mutex_lock(&c->lock);
	m->refs++;
	s->r->refs++;
	LIST_INSERT_HEAD(&c->seqs, s, entry);
	pthread_mutex_unlock(&c->lock);
	r = seq_alloc(s);
	if (!r) {
		memcpy(s->layouts, o->layouts, s->n_layers * sizeof(*s->layouts));
		r = cu ? 0 : check_layouts(s);
	}
	if (!r && !cu)
		r = planes_build(s);
	if (r) {
		seq_discard(s);
		return r;
	}
	s->cu = cu;
	*ret = s;
	return 0;
}

void seq_free(struct kvtier_seq *s)
{
	LIST_REMOVE(s, entry);
	link_put_locked(s->link);
	model_put_locked(s->m);
	free(s->layouts);
	free(s->layer_rows);
	free(s->layer_slots);
	free(s->held);
	free(s->resident);
	free(s->planes);
	free(s->groups);
	free(s);
}

void seq_discard(struct kvtier_seq *s)
{
	struct kvtier_region *r = s->r;
	struct kvtier *c = s->c;

	cuda_seq_free(s);
	pthread_mutex_lock(&c->lock);
	seq_free(s);
	pthread_mutex_unlock(&c->lock);
	region_put(r);
}

/* ---- asking ------------------------------------------------------------------------------- */

static int build_open(const struct kvtier_seq *s, const struct kvtier_seq_opts *o, struct wire_seq_open **ret)
{
	static const uint8_t none[sizeof(o->key)];
	_cleanup_free_ struct wire_seq_open *m = NULL;
	uint32_t table[CTL_MAX_LANES];
	struct wire_budget b;
	int r = seq_budget(s->m, o->budget, &b, table);

	if (r)
		return r;
	m = malloc(wire_seq_open_len(s->n_layers, b.table_n));
	if (!m)
		return err_set(KVT_E_NOMEM, "sequence: out of memory");
	wire_init(&m->hdr, W_SEQ_OPEN, wire_seq_open_len(s->n_layers, b.table_n), 0);
	m->lifetime = o->lifetime;
	m->ttl_s = o->ttl_s;
	m->max_rows = o->max_rows;
	m->granularity = o->granularity;
	m->equal_lanes = o->equal_lanes;
	m->n_layers = s->n_layers;
	m->model = s->m->handle;
	m->region = s->r->handle;
	memcpy(m->key, o->key, sizeof(m->key));
	memcpy(m->secret, o->secret, sizeof(m->secret));
	/* Nobody will ask for an ephemeral sequence by its key. */
	if (o->lifetime == KVT_EPHEMERAL && !memcmp(o->key, none, sizeof(none)) &&
	    getrandom(m->key, sizeof(m->key), 0) != sizeof(m->key))
		return err_set(KVT_E_INTERNAL, "key: no random bytes");
	m->budget = b;
	for (uint32_t i = 0; i < s->n_layers; i++)
		to_wire(&s->layouts[i], &wire_open_layouts(m)[i]);
	memcpy(wire_open_table(m), table, b.table_n * sizeof(*table));
	if (s->cu)
		cuda_seq_wire(s, m);
	*ret = TAKE_PTR(m);
	return 0;
}

/* The places that the daemon named lie in what it gave us. */
static int take_places(struct kvtier_seq *s, const struct wire_seq_open_reply *r, enum wire_open_op op,
		       uint32_t prefix)
{
	struct link *l = s->link;

	if (r->slot >= l->max_seqs)
		return err_set(KVT_E_PROTO, "slot: %u, must be below %u", r->slot, l->max_seqs);
	if (r->plan_off > l->plans.size || r->plan_bytes > l->plans.size - r->plan_off)
		return err_set(KVT_E_PROTO, "plan_off: %llu, its area ends past the %zu bytes of plan memory",
			       (unsigned long long)r->plan_off, l->plans.size);
	if (op == W_OP_RESUME ? r->rows > s->max_rows : r->rows != prefix)
		return err_set(KVT_E_PROTO, "rows: %u, must be %s%u", r->rows,
			       op == W_OP_RESUME ? "at most " : "", op == W_OP_RESUME ? s->max_rows : prefix);
	s->slot = (struct seq_slot *)((char *)l->ctl.addr + ctl_slots_off(l->entries)) + r->slot;
	s->plan_area = (const char *)l->plans.addr + r->plan_off;
	s->plan_bytes = r->plan_bytes;
	s->handle = r->seq;
	atomic_store(&s->epoch, r->epoch);
	return 0;
}

int seq_ask(struct kvtier_seq *s, const struct kvtier_seq_opts *o, enum wire_open_op op,
	    struct kvtier_seq *parent, uint32_t prefix)
{
	_cleanup_free_ struct wire_seq_open *m = NULL;
	struct wire_seq_open_reply reply;
	struct kvtier *c = s->c;
	struct link *l = NULL;
	struct call k = {.reply = &reply, .reply_size = sizeof(reply), .link = s->r->link, .ret_link = &l};
	char err[WIRE_TEXT];
	int r;

	k.deadline_ns = call_deadline(c);
	k.drop_late = op != W_OP_RESUME;
	k.needs = !s->cu ? 0 : s->cu->flags & KVT_CUDA_DIRECT ? WIRE_F_WINDOW | WIRE_F_DIRECT : WIRE_F_WINDOW;
	r = model_ensure(s->m, k.deadline_ns);
	if (!r)
		r = build_open(s, o, &m);
	if (r)
		return r;
	m->op = op;
	m->prefix = prefix;
	m->parent = parent ? parent->handle : 0;
	if (wire_check(m, m->hdr.len, false, err, sizeof(err)))
		return err_set(KVT_E_INVAL, "%s", err);
	k.req = &m->hdr;
	r = call_run(c, &k);
	if (r == KVT_E_TIMEOUT)
		cuda_seq_leak_place(s);
	if (r)
		return r;
	if (s->cu)
		cuda_seq_budget(s, &m->budget, wire_open_table(m));
	pthread_mutex_lock(&c->lock);
	s->link = l;
	r = take_places(s, &reply, op, prefix);
	if (!r)
		rows_start(s, reply.rows);
	pthread_mutex_unlock(&c->lock);
	if (r)
		link_down(c, l, kvtier_last_error());
	return r;
}

static int open_common(struct kvtier *c, struct kvtier_model *m, const struct kvtier_seq_opts *opts,
		       enum wire_open_op op, struct kvtier_seq **ret)
{
	struct kvtier_seq_opts o;
	struct kvtier_seq *s;
	int r;

	if (!c || !m || !ret)
		return err_set(KVT_E_INVAL, "%s: NULL, must be given", !c ? "c" : !m ? "m" : "ret");
	if (forked(c))
		return err_forked();
	r = opts_take(&o, sizeof(o), opts, "opts");
	if (!r)
		r = seq_new(c, m, &o, NULL, &s);
	if (r)
		return r;
	r = seq_ask(s, &o, op, NULL, 0);
	if (r) {
		seq_discard(s);
		return r;
	}
	*ret = s;
	return 0;
}

int kvtier_seq_open(struct kvtier *c, struct kvtier_model *m, const struct kvtier_seq_opts *o,
		    struct kvtier_seq **ret)
{
	return open_common(c, m, o, W_OP_OPEN, ret);
}

int kvtier_seq_resume(struct kvtier *c, struct kvtier_model *m, const struct kvtier_seq_opts *o,
		      struct kvtier_seq **ret, uint32_t *ret_rows)
{
	int r = open_common(c, m, o, W_OP_RESUME, ret);

	if (!r && ret_rows)
		*ret_rows = kvtier_seq_rows(*ret);
	return r;
}

/* ---- ending and asking about it -------------------------------------------------------------- */

int seq_over(struct kvtier_seq *s, bool drop)
{
	struct wire_seq_close req;
	struct wire_reply reply;
	struct call k = {.req = &req.hdr, .reply = &reply, .reply_size = sizeof(reply), .link = s->link};
	int r = 0;

	if (atomic_load(&s->link->dead)) {
		r = seq_gate(s);
	} else if (!atomic_load(&s->gone)) {
		if (s->cu)
			(void)cuda_quiesce(s); /* what the GPU has done counts */
		wire_init(&req.hdr, W_SEQ_CLOSE, sizeof(req), 0);
		req.seq = s->handle;
		req.drop = drop;
		r = call_run(s->c, &k);
	}
	if (r == KVT_E_TIMEOUT)
		cuda_seq_leak_place(s);
	seq_discard(s);
	return r;
}

void kvtier_seq_close(struct kvtier_seq *s)
{
	if (s && !forked(s->c))
		(void)seq_over(s, false);
}

int kvtier_seq_drop(struct kvtier_seq *s)
{
	if (!s)
		return err_set(KVT_E_INVAL, "s: NULL, must be a sequence");
	return forked(s->c) ? err_forked() : seq_over(s, true);
}

int kvtier_seq_info(struct kvtier_seq *s, struct kvtier_seq_info *ret)
{
	struct wire_handle req;
	struct wire_seq_info_reply v;
	struct call k = {.req = &req.hdr, .reply = &v, .reply_size = sizeof(v)};
	struct kvtier_seq_info info = {0};
	int r;

	if (!s || !ret)
		return err_set(KVT_E_INVAL, "%s: NULL, must be given", s ? "ret" : "s");
	r = seq_gate(s);
	if (r)
		return r;
	wire_init(&req.hdr, W_SEQ_INFO, sizeof(req), 0);
	req.handle = s->handle;
	k.link = s->link;
	r = call_run(s->c, &k);
	if (r)
		return r;
	info.handle = s->handle;
	info.rows = v.rows;
	info.epoch = v.epoch;
	info.lanes = v.lanes;
	info.resident_max = v.resident_max;
	for (int i = 0; i < KVT_TIERS; i++) {
		info.tier_rows[i] = v.tier_rows[i];
		info.tier_bytes[i] = v.tier_bytes[i];
	}
	info.dropped_rows = v.dropped_rows;
	info.plans = v.plans;
	info.plan_ns_last = v.plan_ns_last;
	info.refaults = v.refaults;
	info.misses = v.misses;
	info.index_bytes = v.index_bytes;
	info.unsaved_rows = v.unsaved_rows;
	wire_string(info.policy, sizeof(info.policy), v.policy);
	return opts_give(ret, &info, sizeof(info), "info");
}
