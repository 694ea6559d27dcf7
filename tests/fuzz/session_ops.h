/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * What a client may do, one operation a time, each read from the input: messages as a client builds them, then
 * patched; words, entries and cursors in shared memory; an honest next step, so that inputs get far; slow
 * workers, ends and comebacks at any time.
 */
#include "tests/fuzz/session.h"

#define CAP 160u
#define STAGE 64u
#define MAX_ROWS 512u
#define KEYS 3u

struct input {
	const uint8_t *p, *end;
};

static uint64_t take(struct input *in, unsigned n)
{
	uint64_t v = 0;

	n = (unsigned)MIN((size_t)(in->end - in->p), (size_t)n);
	if (!n)
		return 0;
	memcpy(&v, in->p, n);
	in->p += n;
	return v;
}

static union {
	struct wire_hdr h;
	struct wire_model model;
	struct wire_seq_open open;
	struct wire_plan_request plan;
	struct wire_recall recall;
	struct wire_admin admin;
	_Alignas(8) uint8_t b[WIRE_MAX];
} msg;
static uint32_t cookie;

static const char *const policy_names[] = {"",        "client", "streaming", "knorm",
					   "keydiff", "kvp",    "lagkv",     "random"};

/* ---- models and layouts --------------------------------------------------------------- */

static const struct shape {
	uint32_t layers, kind, dtype, dim, k, v, window;
} shapes[] = {
	{1, KVT_LAYER_FULL, KVT_DTYPE_OPAQUE, 0, 40, 24, 0},
	{2, KVT_LAYER_FULL, KVT_DTYPE_F32, 8, 32, 32, 0},
	{1, KVT_LAYER_FULL, KVT_DTYPE_BF16, 16, 32, 32, 0}, /* the one that there are weights for */
	{1, KVT_LAYER_SLIDING, KVT_DTYPE_OPAQUE, 0, 300, 0, 48},
};

/* Changes to a message: few, and where fields are. */
static void patch(struct input *in, size_t len)
{
	static const uint64_t odd[] = {0,
				       1,
				       2,
				       3,
				       0x7f,
				       0x80,
				       0xff,
				       0x100,
				       0xffff,
				       0x10000,
				       0x7fffffff,
				       0x80000000,
				       0xffffffff,
				       UINT64_C(0x100000000),
				       UINT64_C(0x7fffffffffffffff),
				       UINT64_MAX};
	unsigned n = (unsigned)take(in, 1);

	for (n = n < 160 ? 0 : n % 5; n; n--) {
		size_t at = take(in, 2) % len;
		unsigned how = (unsigned)take(in, 1), bytes = 1u << how % 4;
		uint64_t v = how & 0x80 ? take(in, bytes) : odd[how / 4 % ARRAY_SIZE(odd)];

		at -= at % bytes;
		memcpy(msg.b + at, &v, MIN((size_t)bytes, len - at));
	}
}

static void send_message(struct peer *p, struct input *in)
{
	size_t len = msg.h.len;

	patch(in, len);
	say(p, msg.b, len, NULL, 0);
}

static void begin(enum wire_type type, size_t len)
{
	wire_init(&msg.h, type, len, ++cookie * SEQS);
}

static void op_hello(struct peer *p, struct input *in)
{
	struct wire_hello *m = (void *)&msg;

	begin(W_HELLO, sizeof(*m));
	m->features = WIRE_FEATURES;
	m->max_seqs = SEQS;
	m->ring_entries = 64;
	m->plan_bytes = 128 << 10;
	strcpy(m->name, "fuzz");
	send_message(p, in);
}

static void op_model(struct peer *p, struct input *in, unsigned shape)
{
	const struct shape *s = &shapes[shape % ARRAY_SIZE(shapes)];
	struct wire_model *m = &msg.model;

	begin(W_MODEL, wire_model_len(s->layers));
	strcpy(m->name, MODEL);
	m->n_layers = s->layers;
	m->dtype = s->dtype;
	m->head_dim = s->dim;
	m->world = 1;
	if (s->dtype == KVT_DTYPE_BF16) {
		m->rope = KVT_ROPE_HALF;
		m->post_rope = 1;
		m->rope_theta = 10000;
	}
	for (uint32_t i = 0; i < s->layers; i++)
		m->layer[i] = (struct wire_layer){
			.kind = s->kind, .kv_heads = 2, .k_bytes = s->k, .v_bytes = s->v, .window = s->window};
	send_message(p, in);
}

/* Fill the layouts of a sequence as kvtier_layout_plain() does; returns the bytes of region that it takes. */
static uint64_t lay_out(const struct shape *s, bool window, struct window_place *win, struct wire_layout *l)
{
	uint64_t at = 0, slots = CAP + STAGE, page = 128 * (uint64_t)(s->k + s->v);

	memset(win, 0, sizeof(*win));
	if (window) {
		win->out_off = 0;
		win->out_bytes = ALIGN_UP(sizeof(struct window_out) + page, (uint64_t)KVT_UNIT);
		win->in_off = win->out_bytes;
		win->in_bytes =
			ALIGN_UP(2 * (sizeof(struct window_in) + page + WINDOW_ALIGN), (uint64_t)KVT_UNIT);
		at = win->in_off + win->in_bytes;
	}
	for (uint32_t i = 0; i < s->layers; i++) {
		l[i] = (struct wire_layout){.cap = CAP, .stage = STAGE};
		if (window)
			continue;
		l[i].k_off = at;
		l[i].k_row_stride = s->k;
		l[i].k_head_stride = slots * s->k;
		l[i].v_off = l[i].k_off + 2 * l[i].k_head_stride;
		l[i].v_row_stride = s->v;
		l[i].v_head_stride = slots * s->v;
		at = ALIGN_UP(l[i].v_off + 2 * l[i].v_head_stride, (uint64_t)64);
	}
	for (uint32_t i = 0; i < s->layers; i++) {
		l[i].score_off = at;
		l[i].score_head_stride = 2 * MAX_ROWS * sizeof(float); /* room for two coefficients */
		at += 2 * l[i].score_head_stride;
	}
	return at;
}

static void op_region(struct peer *p, struct input *in, unsigned shape, bool window)
{
	struct wire_layout l[4];
	struct window_place win;
	struct wire_region *m = (void *)&msg;

	begin(W_REGION, sizeof(*m));
	m->bytes = lay_out(&shapes[shape % ARRAY_SIZE(shapes)], window, &win, l);
	send_message(p, in);
}

static void fill_budget(struct wire_budget *b, struct input *in)
{
	unsigned how = (unsigned)take(in, 1);

	b->set = 1;
	b->device_rows = how & 1 ? KVT_ROWS_ALL : (uint32_t)take(in, 1);
	b->dram_rows = how & 2 ? 0 : (uint32_t)take(in, 1) * 2;
	b->nvme_rows = how & 4 ? KVT_ROWS_ALL : 0;
	b->manual = how >> 3 & 1;
	b->write_through = how >> 4 & 1;
	strcpy(b->policy, policy_names[how >> 5]);
}

static void op_open(struct peer *p, struct input *in, unsigned shape, unsigned flags)
{
	const struct shape *s = &shapes[shape % ARRAY_SIZE(shapes)];
	unsigned how = (unsigned)take(in, 1), slot = how % SEQS;
	struct wire_seq_open *m = &msg.open;

	begin(W_SEQ_OPEN, wire_seq_open_len(s->layers, 0));
	m->hdr.cookie = cookie * SEQS + slot;
	m->op = how >> 2 & 3 ? (how >> 2 & 3) - 1 : 0;
	m->lifetime = how >> 4 & 1;
	m->ttl_s = 60;
	m->max_rows = MAX_ROWS;
	m->n_layers = s->layers;
	m->equal_lanes = how >> 5 & 1;
	m->granularity = how >> 6;
	m->flags = flags;
	m->model = p->model;
	m->region = p->region;
	m->key[0] = (uint8_t)(1 + (slot + (how >> 7)) % KEYS);
	if (m->op == W_OP_FORK) {
		m->parent = p->seq[take(in, 1) % SEQS];
		m->prefix = (uint32_t)take(in, 1);
	}
	lay_out(s, flags & W_OPEN_WINDOW, &m->window, wire_open_layouts(m));
	if (flags & W_OPEN_WINDOW) {
		p->win = m->window;
		m->scorer = p->scorer;
	}
	fill_budget(&m->budget, in);
	send_message(p, in);
}

static void op_plan(struct peer *p, struct input *in, unsigned i)
{
	struct wire_plan_request *m = &msg.plan;

	begin(W_PLAN_REQUEST, sizeof(*m));
	m->seq = p->seq[i % SEQS];
	fill_budget(&m->budget, in);
	send_message(p, in);
}

/* The small ones, by handle. */
static void op_handle(struct peer *p, struct input *in, unsigned i, unsigned what)
{
	struct wire_handle *h = (void *)&msg;
	struct wire_seq_truncate *t = (void *)&msg;
	struct wire_fetch *f = (void *)&msg;
	struct seq *s = seq_of(p, i);

	switch (what % 7) {
	case 0:
		begin(W_SEQ_TRUNCATE, sizeof(*t));
		t->rows = s ? (uint32_t)take(in, 1) * (s->rows + 1) / 256 : 0;
		break;
	case 1:
		begin(W_SEQ_CLOSE, sizeof(struct wire_seq_close));
		((struct wire_seq_close *)h)->drop = what / 7 % 2;
		break;
	case 2:
		begin(W_SEQ_INFO, sizeof(*h));
		break;
	case 3:
		begin(W_FETCH, sizeof(*f));
		f->pos = (uint32_t)take(in, 1);
		f->n = 1 + (uint32_t)take(in, 1) % 64;
		break;
	case 4:
		begin(W_DIRECT, sizeof(*h));
		break;
	case 5:
		begin(W_REGION_CLOSE, sizeof(*h));
		break;
	case 6:
		begin(W_SEGMENT, sizeof(struct wire_segment));
		((struct wire_segment *)h)->segment = (uint32_t)take(in, 1) % 8;
		send_message(p, in);
		return;
	}
	h->handle = what % 7 == 5 ? p->region : p->seq[i % SEQS];
	send_message(p, in);
}

static void op_recall(struct peer *p, struct input *in, unsigned i, unsigned shape)
{
	const struct shape *s = &shapes[shape % ARRAY_SIZE(shapes)];
	uint32_t dim = s->dim ? s->dim : 8, n = 2 * (1 + (uint32_t)take(in, 1) % 3);
	struct wire_recall *m = &msg.recall;
	struct seq *q = seq_of(p, i);

	begin(W_RECALL, wire_recall_len(n, dim, 4));
	m->op = (uint32_t)take(in, 1) % 4 ? W_RECALL_FIND : W_RECALL_PREPARE + cookie % 2;
	m->seq = p->seq[i % SEQS];
	m->epoch = q ? q->epoch : 0;
	if (m->op != W_RECALL_FIND) {
		m->hdr.len = sizeof(*m);
	} else {
		m->layer = (uint32_t)take(in, 1) % s->layers;
		m->rows = 1 + (uint32_t)take(in, 1) % STAGE;
		m->heads = 2;
		m->per_head = n / 2;
		m->dim = dim;
		m->dtype = KVT_DTYPE_F32;
		m->probe = (uint32_t)take(in, 1) * 4 % 1001;
		m->flags = (uint32_t)take(in, 1) % (KVT_RECALL_FLAGS + 1);
		m->before = (uint16_t)take(in, 1);
		m->after = (uint16_t)take(in, 1);
		if (q && q->layout)
			m->window = q->layout[m->layer];
		m->window.k_off += CAP * (uint64_t)s->k; /* the stage slots: free while no plan promotes */
		m->window.v_off += CAP * (uint64_t)s->v;
		m->window.cap = STAGE;
		m->window.stage = 0;
		m->window.score_off = m->window.score_head_stride = 0;
		for (uint32_t k = 0; k < n * dim; k++)
			((float *)wire_recall_queries(m))[k] = (float)(k * 7 % 13) / 4 - 1;
	}
	send_message(p, in);
}

static void op_scorer(struct peer *p, struct input *in)
{
	struct wire_scorer *m = (void *)&msg;

	begin(W_SCORER, sizeof(*m));
	m->model = p->model;
	strcpy(m->policy, policy_names[take(in, 1) % ARRAY_SIZE(policy_names)]);
	send_message(p, in);
}

static void op_admin(struct peer *p, struct input *in, unsigned i)
{
	static const char *const words[] = {"status",   "ls",      "show",  "budget", "pin",         "unpin",
					    "demote",   "promote", "drop",  "policy", "verify",      "freeze",
					    "version",  "lanes",   "start", "set",    "list",        "device=9",
					    "dram=all", "nvme=0",  "0",     "7",      "99999999999", "-1"};
	unsigned argc = 1 + (unsigned)take(in, 1) % 4;
	struct wire_admin *m = &msg.admin;
	char *at = m->argv;

	begin(W_ADMIN, sizeof(*m) + 200);
	m->argc = argc;
	for (unsigned k = 0; k < argc; k++) {
		unsigned w = (unsigned)take(in, 1);

		at += 1 + sprintf(at, "0x%016llx", (unsigned long long)p->seq[i % SEQS]);
		if (w < 192)
			at = stpcpy(at - 19, words[w % ARRAY_SIZE(words)]) + 1;
	}
	m->argv_bytes = (uint32_t)(at - m->argv);
	m->hdr.len = (uint32_t)(sizeof(*m) + m->argv_bytes);
	send_message(p, in);
}

/* Somebody's file. */
static void op_import(struct peer *p, struct input *in)
{
	struct wire_region *m = (void *)&msg;
	unsigned how = (unsigned)take(in, 1);
	int fd = how % 4 ? memfd_create("import", MFD_CLOEXEC | MFD_ALLOW_SEALING)
			 : open("/dev/null", O_RDWR | O_CLOEXEC);
	size_t len = sizeof(*m);

	begin(W_REGION_IMPORT, len);
	m->bytes = 128 << 10;
	must(fd >= 0 && (how % 4 == 0 || !ftruncate(fd, (off_t)m->bytes)), "a file");
	patch(in, len);
	say(p, msg.b, len, &fd, 1);
	if (how & 16) /* cut under the daemon */
		(void)!ftruncate(fd, (how & 224) * 256);
	close(fd);
}

static void op_raw(struct peer *p, struct input *in)
{
	size_t n = MIN((size_t)take(in, 1), (size_t)(in->end - in->p));
	unsigned how = (unsigned)take(in, 1);
	int fd[2] = {0, 0};

	n = MIN(n, (size_t)(in->end - in->p));
	if (!n)
		return;
	memcpy(msg.b, in->p, n);
	in->p += n;
	if (n >= sizeof(msg.h) && how & 1) { /* spare the fuzzer the guessing of the frame */
		msg.h.magic = WIRE_MAGIC;
		msg.h.version = WIRE_VERSION;
		msg.h.len = (uint32_t)n;
	}
	say(p, msg.b, n, fd, how % 16 == 15 ? 2 : 0);
}

/* ---- shared memory --------------------------------------------------------------------- */

static void op_append(struct peer *p, struct input *in, unsigned i)
{
	struct seq *s = seq_of(p, i);
	uint32_t n = 1 + (uint32_t)take(in, 1) % 100;

	if (!s || s->state != SEQ_LIVE)
		return;
	if (s->cut == ROWS_ALL && s->rows - MIN(s->ix.rows, s->rows) + n > s->room)
		n = s->room - (s->rows - MIN(s->ix.rows, s->rows));
	n = MIN(n, s->max_rows - s->rows);
	atomic_store(&s->client->slots[s->slot].len, seq_len_pack(s->epoch, s->rows + n));
	push_dirty(p, i);
	step();
}

static void op_ack(struct peer *p, struct input *in, unsigned i)
{
	struct seq *s = seq_of(p, i);
	uint64_t nack = take(in, 1);

	if (!s || !s->plan || s->plan->phase != PHASE_READY)
		return;
	s->client->slots[s->slot].nack[0] = nack & 0x80 ? nack & 3 : 0;
	atomic_store(&s->client->slots[s->slot].acked, s->plan->id);
	push_dirty(p, i);
	step();
}

/* The words of a slot as nobody should write them. */
static void op_word(struct peer *p, struct input *in, unsigned i)
{
	struct client *cl = client_of(p);
	struct seq *s = seq_of(p, i);
	unsigned how = (unsigned)take(in, 1), w = how % 8;
	uint64_t v = how & 0x80 ? take(in, 8) : take(in, 1);
	uint64_t *slot;

	if (!cl || !cl->hello)
		return;
	slot = (uint64_t *)&cl->slots[s ? s->slot : how % cl->max_seqs];
	if (!(how & 0x80) && s)
		v = w == 0       ? seq_len_pack(s->epoch, s->rows + (uint32_t)(int8_t)v)
		    : how & 0x40 ? window_cursor(s->plan_id, (uint32_t)v)
				 : s->plan_id + (uint64_t)(int8_t)v;
	w = w < 5 ? (unsigned[]){0, 1, 18, 19, 2}[w] : how / 8 % 24;
	__atomic_store_n(&slot[w], v, __ATOMIC_RELAXED);
	push_dirty(p, i);
	step();
}

static void op_entry(struct peer *p, struct input *in, unsigned i)
{
	unsigned how = (unsigned)take(in, 1);
	struct ring_entry e = {.type = how & 1 ? (uint32_t)take(in, 2) : Q_DIRTY, .handle = p->seq[i % SEQS]};

	if (how & 2)
		e.handle = take(in, 8);
	if (how & 4) /* somebody else's */
		e.handle = peers[how / 8 % PEERS].seq[i % SEQS];
	for (unsigned n = how >> 6; n; n--) /* or many times */
		push_entry(p, &e);
	push_entry(p, &e);
	step();
}

static void op_cursor(struct peer *p, struct input *in)
{
	static const unsigned at[] = {0, 32, 64};
	struct client *cl = client_of(p);
	unsigned how = (unsigned)take(in, 1);
	uint32_t v = (uint32_t)take(in, how & 1 ? 4 : 1), *word;
	uint64_t one = 1;

	if (!cl || !cl->hello)
		return;
	word = (uint32_t *)((char *)cl->ctl.addr + (how & 2 ? ctl_cq_off(cl->entries) : 0)) + at[how / 4 % 3];
	*word = how & 1 ? v : *word + (uint32_t)(int8_t)v;
	(void)!write(cl->wake_fd, &one, sizeof(one));
	step();
}

static void op_scribble(struct peer *p, struct input *in)
{
	size_t at = (size_t)take(in, 2) * 16, n = (size_t)take(in, 1) * 16;
	uint8_t b[8];

	for (unsigned i = 0; i < sizeof(b); i++)
		b[i] = (uint8_t)take(in, 1);
	if (!p->mem)
		return;
	at %= p->bytes;
	n = MIN(n, p->bytes - at);
	for (size_t i = 0; i < n; i++)
		p->mem[at + i] = (char)b[i % sizeof(b)];
}

/* ---- windows --------------------------------------------------------------------------- */

/* Write pages of the plan's list as a GPU does, or nearly, and announce them. */
static void op_gather(struct peer *p, struct input *in, unsigned i)
{
	struct seq *s = seq_of(p, i);
	struct window_plan *win = s && s->plan && s->plan->id ? s->plan->win : NULL;
	unsigned n = 1 + (unsigned)take(in, 1) % 8, lie = (unsigned)take(in, 1);

	if (!win || !p->mem || s->plan->over)
		return;
	for (uint32_t k = win->gathered; k < win->pages && n; k++, n--) {
		const struct plan_page *page = &s->plan->t.page[k];
		size_t bytes = (size_t)page->rows * lane_bytes(s->model, page->lane);
		struct window_out *h = (void *)(p->mem + s->window.out_off + page->off);

		if (page->end - (win->taken ? s->plan->t.page[win->taken - 1].end : 0) > s->window.out_bytes ||
		    s->window.out_off + page->off + sizeof(*h) + bytes > p->bytes)
			break;
		*h = (struct window_out){.plan = s->plan->id, .page = k};
		h->crc = ~crc32c(~UINT32_C(0), h + 1, bytes);
		h->crc ^= lie == 255;
		h->page += lie == 254;
		h->plan += lie == 253;
		atomic_store(&s->client->slots[s->slot].gathered, window_cursor(s->plan->id, k + 1));
	}
	push_dirty(p, i);
	step();
}

static void op_drain(struct peer *p, struct input *in, unsigned i)
{
	struct seq *s = seq_of(p, i);
	struct window_plan *win = s && s->plan && s->plan->id ? s->plan->win : NULL;
	uint32_t n = 1 + (uint32_t)take(in, 1) % 16;

	if (!win || s->plan->over)
		return;
	atomic_store(&s->client->slots[s->slot].drained,
		     window_cursor(s->plan->id, MIN(win->drained + n, win->staged)));
	push_dirty(p, i);
	step();
}

/* ---- time, and coming and going ---------------------------------------------------------- */

static void op_time(struct input *in)
{
	switch (take(in, 1) % 5) {
	case 0:
		workers_hold(true);
		break;
	case 1:
		workers_hold(false);
		break;
	case 2:
		sd_event_source_set_time_relative(core->tick, 0);
		break;
	case 3:
		sd_event_source_set_time_relative(core->poll, 0);
		break;
	case 4:
		seq_expire(core, now_ns() + UINT64_C(4000000000000));
		break;
	}
	step();
}

/* Whoever this is, connected and with what it needs to open sequences. */
static struct peer *op_peer(struct input *in, unsigned shape, unsigned flags)
{
	unsigned how = (unsigned)take(in, 1);
	struct peer *p = &peers[how % PEERS];
	struct input none = {NULL, NULL};

	if (how & 0x40) {
		peer_close(p);
		step();
	}
	if (p->id && !client_of(p))
		peer_close(p);
	if (p->id)
		return p;
	peer_connect(p, &core->tenant[how >> 7]);
	if (how & 0x20)
		return p;
	op_hello(p, &none);
	op_model(p, &none, shape);
	op_region(p, &none, shape, flags & W_OPEN_WINDOW);
	return p;
}

/* window: most operations are about rings and cursors. */
static void run_input(const uint8_t *data, size_t size, bool window)
{
	struct input in = {data, data + size};
	unsigned first = (unsigned)take(&in, 1), shape = first % 4, flags = 0;
	struct peer *p;

	if (!core)
		core_begin();
	cookie = 0;
	if (window || (first & 0x30) == 0x30)
		flags = W_OPEN_WINDOW | (first & 0x40 ? W_OPEN_DIRECT : 0);
	p = op_peer(&in, shape, flags);
	if (window && first & 0x80)
		op_scorer(p, &in);
	if (window || !(first & 0x80))
		op_open(p, &in, shape, flags);
	while (in.p < in.end) {
		unsigned op = (unsigned)take(&in, 1), i = op >> 6;

		switch (window ? op % 16 : op % 24) {
		case 0:
		case 1:
			op_append(p, &in, i);
			break;
		case 2:
			op_ack(p, &in, i);
			break;
		case 3:
			op_plan(p, &in, i);
			break;
		case 4:
			op_handle(p, &in, i, (unsigned)take(&in, 1));
			break;
		case 5:
			op_word(p, &in, i);
			break;
		case 6:
			op_scribble(p, &in);
			break;
		case 7:
		case 8:
			op_gather(p, &in, i);
			break;
		case 9:
		case 10:
			op_drain(p, &in, i);
			break;
		case 11:
			op_time(&in);
			break;
		case 12:
			op_open(p, &in, shape, take(&in, 1) & 1 ? flags : 0);
			break;
		case 13:
			p = op_peer(&in, shape, flags);
			break;
		case 14:
			op_entry(p, &in, i);
			break;
		case 15:
			op_scorer(p, &in);
			break;
		case 16:
			op_cursor(p, &in);
			break;
		case 17:
			op_recall(p, &in, i, shape);
			break;
		case 18:
			op_raw(p, &in);
			break;
		case 19:
			op_admin(p, &in, i);
			break;
		case 20:
			op_hello(p, &in);
			break;
		case 21:
			op_model(p, &in, (unsigned)take(&in, 1));
			break;
		case 22:
			op_region(p, &in, shape, flags & W_OPEN_WINDOW);
			break;
		case 23:
			op_import(p, &in);
			break;
		}
	}
	everything_gone();
}
