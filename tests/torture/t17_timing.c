/* SPDX-License-Identifier: MIT */
/*
 * torture 17: one tenant guesses from the time of an answer what another has
 * pass: a classifier of hits and misses, 10,000 each, has an AUC of at most 0.52
 * quick: 10,000 each, at most 0.52 and three standard errors
 * full: 50,000 each
 * plants: resume-answers-early resume-by-key
 *
 * The names that a client can guess are keys of sequences, handles of sequences and regions, numbers of
 * published segments. Each is asked for where another tenant has it (or, for resume, with a secret that is not
 * its own) and where nobody has; the answer must be the same to the letter, and so must its time: hits and
 * misses take turns by seed, and the AUC (rank statistic over all thresholds, either direction) of round trips
 * says how well the one is told from the other. Labels are shuffled, so that without a difference the AUC of
 * 10,000 strays from 0.5 by a standard error of 0.004, whatever the host does meanwhile.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <sys/socket.h>
#include "tests/unit/direct_fixture.h"
#include "tests/unit/window_double.h"

#define NAMES 4096u
#define EACH 10000u
#define WARM 400u
#define AUC 0.52
#define ERROR 0.0041 /* standard error of 10,000 each: sqrt((2n + 1) / 12n^2) */

struct spy {
	struct fixture f; /* tenant 0: f.rt, whose rows are published, and */
	struct rt_seq open;
	struct runtime victim; /* who has many names */
	struct runtime own;    /* the spy's friend: tenant 1, of the same user, with sequences to resume */
	struct rt_seq own_room;
	struct wlink l; /* the spy: tenant 1 */
	uint64_t region, others_region, never[NAMES];
	uint8_t others[NAMES][16], owns[NAMES][16];
	uint64_t others_seq[NAMES];
	struct kvtier_seq *held[NAMES];
	struct rt_seq room; /* one region serves them all: no row is written */
	uint32_t segment;
	uint64_t rnd;
	bool told; /* hits and misses were answered differently */
};

static uint32_t rnd(struct spy *s, uint32_t n)
{
	s->rnd ^= s->rnd << 13;
	s->rnd ^= s->rnd >> 7;
	s->rnd ^= s->rnd << 17;
	return (uint32_t)((s->rnd >> 11) % n);
}

/* The known key, or one that nobody has, by the same work: what the spy does before it asks must not show. */
static const uint8_t *choose(struct spy *s, bool hit, const uint8_t known[16])
{
	static uint8_t key[2][16];

	for (int i = 0; i < 16; i++) {
		key[0][i] = (uint8_t)rnd(s, 256);
		key[1][i] = known[i];
	}
	return key[hit];
}

/* ---- what is asked ------------------------------------------------------------------ */

union message {
	struct wire_hdr hdr;
	struct wire_seq_open o;
	struct wire_handle handle;
	struct wire_segment segment;
	struct wire_admin admin;
	struct wire_seq_close close;
	_Alignas(8) uint8_t b[4096];
};

struct probe {
	const char *name;
	void (*ask)(struct spy *s, union message *m, bool hit, uint32_t i);
	bool opens; /* the answer is a sequence, to be closed again */
};

static void open_message(struct spy *s, union message *m, uint32_t op, const uint8_t key[16])
{
	const uint32_t cap = 8, row = 16, max = 64;
	uint64_t head = cap * row, off = 0;

	wire_init(&m->hdr, W_SEQ_OPEN, wire_seq_open_len(s->l.layers, 0), 1);
	m->o.op = op;
	m->o.lifetime = KVT_LEASED;
	m->o.ttl_s = 60;
	m->o.max_rows = max;
	m->o.n_layers = s->l.layers;
	m->o.model = s->l.model;
	m->o.region = s->region;
	memcpy(m->o.key, key, 16);
	memset(m->o.secret, 0x77, sizeof(m->o.secret));
	for (uint32_t i = 0; i < s->l.layers; i++, off += 2 * s->l.heads * head)
		wire_open_layouts(&m->o)[i] = (struct wire_layout){.k_off = off,
								   .v_off = off + s->l.heads * head,
								   .k_head_stride = head,
								   .v_head_stride = head,
								   .k_row_stride = row,
								   .v_row_stride = row,
								   .cap = cap};
}

static void resume_others(struct spy *s, union message *m, bool hit, uint32_t i)
{
	open_message(s, m, W_OP_RESUME, choose(s, hit, s->others[i]));
}

static void resume_unknown_secret(struct spy *s, union message *m, bool hit, uint32_t i)
{
	open_message(s, m, W_OP_RESUME, choose(s, hit, s->owns[i]));
}

static void open_others(struct spy *s, union message *m, bool hit, uint32_t i)
{
	open_message(s, m, W_OP_OPEN, choose(s, hit, s->others[i]));
}

static void info_others(struct spy *s, union message *m, bool hit, uint32_t i)
{
	wire_init(&m->hdr, W_SEQ_INFO, sizeof(m->handle), 1);
	m->handle.handle = hit ? s->others_seq[i] : s->never[i];
}

static void close_others_region(struct spy *s, union message *m, bool hit, uint32_t i)
{
	wire_init(&m->hdr, W_REGION_CLOSE, sizeof(m->handle), 1);
	m->handle.handle = s->others_region + (hit ? 0 : (uint64_t)(i + 1) << 32);
}

static void segment_of_others(struct spy *s, union message *m, bool hit, uint32_t i)
{
	wire_init(&m->hdr, W_SEGMENT, sizeof(m->segment), 1);
	m->segment.segment = hit ? s->segment : s->segment + 1 + i;
}

static void show_others(struct spy *s, union message *m, bool hit, uint32_t i)
{
	char name[24];
	int n = snprintf(name, sizeof(name), "0x%016llx",
			 (unsigned long long)(hit ? s->others_seq[i] : s->never[i]));

	wire_init(&m->hdr, W_ADMIN, sizeof(m->admin) + 5 + (size_t)n + 1, 1);
	m->admin.argc = 2;
	m->admin.argv_bytes = 5 + (uint32_t)n + 1;
	memcpy(m->admin.argv, "show", 5);
	memcpy(m->admin.argv + 5, name, (size_t)n + 1);
}

/* ---- how long it takes ---------------------------------------------------------------- */

/* Spins, for a spy would: waking up costs more than what is looked for. */
static uint32_t round_trip(struct spy *s, union message *m)
{
	uint64_t t = now_ns();
	ssize_t n = -1;

	assert_int_equal(sock_send(s->l.fd, m, m->hdr.len, NULL, 0), 0);
	while (n < 0) {
		n = recv(s->l.fd, s->l.reply, sizeof(s->l.reply), MSG_DONTWAIT);
		assert_true(n > 0 || errno == EAGAIN);
	}
	return (uint32_t)MIN(now_ns() - t, (uint64_t)UINT32_MAX);
}

static void close_again(struct spy *s)
{
	union message m;
	uint64_t seq = ((struct wire_seq_open_reply *)s->l.reply)->seq;

	wire_init(&m.hdr, W_SEQ_CLOSE, sizeof(m.close), 1);
	m.close.seq = seq;
	m.close.drop = 1;
	assert_int_equal(wl_call(&s->l, &m.hdr), 0);
}

struct timed {
	uint32_t ns;
	bool hit;
};

static int by_ns(const void *a, const void *b)
{
	uint32_t x = ((const struct timed *)a)->ns, y = ((const struct timed *)b)->ns;

	return x < y ? -1 : x > y;
}

/* Probability that a hit took longer than a miss, ties half; 0.5: they cannot be told apart. */
static double auc(struct timed *v, size_t n)
{
	double wins = 0;
	size_t misses = 0;

	qsort(v, n, sizeof(*v), by_ns);
	for (size_t i = 0, j; i < n; i = j) {
		size_t hit = 0, miss = 0;

		for (j = i; j < n && v[j].ns == v[i].ns; j++)
			v[j].hit ? hit++ : miss++;
		wins += (double)hit * ((double)misses + (double)miss / 2);
		misses += miss;
	}
	return wins / ((double)misses * (double)(n - misses));
}

/* Two answers to the letter, but for what the question itself said. */
static bool same_answer(const struct wire_reply *a, int32_t status, char text[WIRE_TEXT])
{
	char now[WIRE_TEXT];
	size_t n = 0;

	for (const char *p = a->text; *p; p++) /* handles and numbers are quoted back */
		if (!strchr("0123456789abcdefx", *p))
			now[n++] = *p;
	now[n] = 0;
	if (!text[0])
		memcpy(text, now, n + 1);
	return a->status == status && !strcmp(now, text);
}

static double tell_apart(struct spy *s, const struct probe *p, size_t each)
{
	_cleanup_free_ struct timed *v = calloc(2 * each, sizeof(*v));
	char text[WIRE_TEXT] = "";
	int32_t status = 0;
	size_t n = 0;
	double a;

	assert_non_null(v);
	for (uint32_t i = 0; n < 2 * each; i++) {
		bool first = rnd(s, 2);

		for (int k = 0; k < 2; k++) {
			union message m;
			bool hit = k ? !first : first;
			uint32_t ns;

			p->ask(s, &m, hit, rnd(s, NAMES));
			ns = round_trip(s, &m);
			if (!i && !k)
				status = ((struct wire_reply *)s->l.reply)->status;
			s->told |= !same_answer((struct wire_reply *)s->l.reply, status, text);
			if (p->opens && !((struct wire_reply *)s->l.reply)->status)
				close_again(s);
			if (i >= WARM)
				v[n++] = (struct timed){ns, hit};
		}
	}
	a = auc(v, n);
	print_message("# %s: median %u ns, AUC %.4f%s\n", p->name, v[n / 2].ns, a,
		      s->told ? ", answers differ" : "");
	return a > 0.5 ? a : 1 - a;
}

static const struct probe probes[] = {
	{"resume: a key of another tenant, or of nobody", resume_others, false},
	{"resume: a key with another secret, or of nobody", resume_unknown_secret, false},
	{"open: a key of another tenant, or of nobody", open_others, true},
	{"info: a sequence of another tenant, or of nobody", info_others, false},
	{"region-close: a region of another tenant, or of nobody", close_others_region, false},
	{"segment: of another tenant, or of nobody", segment_of_others, false},
	{"kvtierctl show: a sequence of another tenant, or of nobody", show_others, false},
};

static void guesses_nothing(void **state)
{
	struct spy *s = *state;
	bool full = getenv("KVT_TORTURE") && !strcmp(getenv("KVT_TORTURE"), "full");
	size_t each = full ? 5 * EACH : EACH;
	double worst = 0, limit = full ? AUC : AUC + 3 * ERROR;
	bool told = false;

	for (size_t i = 0; i < ARRAY_SIZE(probes); i++) {
		double a;

		s->told = false;
		a = tell_apart(s, &probes[i], each);
		worst = MAX(worst, a);
		told |= s->told;
	}
	print_message("# figure: %zu kinds of names, %zu hits and %zu misses of each, AUC at most %.4f\n",
		      ARRAY_SIZE(probes), each, each, worst);
	assert_false(told);
	if (worst > limit)
		fail_msg("AUC %.4f, limit %.4f", worst, limit);
}

/* ---- who has what ----------------------------------------------------------------------- */

static void random_keys(struct spy *s, uint8_t key[NAMES][16])
{
	for (uint32_t i = 0; i < NAMES; i++)
		for (int k = 0; k < 16; k++)
			key[i][k] = (uint8_t)rnd(s, 256);
}

/* held: they stay open, else they wait for a resume. */
static void have(struct rt_seq *room, struct spy *s, uint8_t key[NAMES][16], struct kvtier_seq **held)
{
	random_keys(s, key);
	for (uint32_t i = 0; i < NAMES; i++) {
		struct kvtier_seq_opts o = rt_opts(room, KVT_LEASED, NULL);
		struct kvtier_seq *q;

		memcpy(o.key, key[i], 16);
		assert_int_equal(kvtier_seq_open(room->rt->c, room->rt->m, &o, &q), 0);
		if (held)
			held[i] = q;
		else
			kvtier_seq_close(q);
	}
}

static void connect_one(struct runtime *rt, const char *sock, struct rt_seq *room)
{
	assert_int_equal(rt_open_dims(rt, sock, 1, 1, 16, 16, NAMES, 16 << 20), 0);
	assert_int_equal(rt_prepare(room, rt, 1, 8, 0, 64), 0);
}

static uint32_t any_segment(struct spy *s)
{
	struct reader r;
	uint32_t number = UINT32_MAX;

	begin_seq(&s->f, &s->open, 900, KVT_EPHEMERAL, 600);
	assert_int_equal(rt_plan(&s->open, 100, KVT_ROWS_ALL, 0, NULL), 0);
	assert_int_equal(reader_open(&r, &s->open, s->f.eye.c), 0);
	settle(&r, 500 * s->f.rt.lanes);
	if (r.segs)
		number = r.number[0];
	reader_close(&r);
	return number;
}

static int set_up(void **state)
{
	struct spy *s = calloc(1, sizeof(*s));
	const char *seed = getenv("KVT_SEED");
	struct wire_region g;

	*state = s;
	s->rnd = (seed ? strtoull(seed, NULL, 10) : 11) * 0x9e3779b97f4a7c15u | 1;
	begin(&s->f, false);
	s->segment = any_segment(s);
	assert_int_not_equal(s->segment, UINT32_MAX);
	connect_one(&s->victim, s->f.h.sock[0], &s->room);
	have(&s->room, s, s->others, s->held);
	for (uint32_t i = 0; i < NAMES; i++) {
		s->others_seq[i] = s->held[i]->handle;
		s->never[i] = s->others_seq[i] + (UINT64_C(1) << 32);
	}
	s->others_region = s->open.r->handle;
	connect_one(&s->own, s->f.h.sock[1], &s->own_room);
	have(&s->own_room, s, s->owns, NULL);
	assert_int_equal(wl_connect(&s->l, s->f.h.sock[1]), 0);
	assert_int_equal(wl_model(&s->l, "spy", 0, 0, 2, 2, 16, 16), 0);
	wire_init(&g.hdr, W_REGION, sizeof(g), 3);
	g.bytes = 1 << 16;
	assert_int_equal(wl_call(&s->l, &g.hdr), 0);
	s->region = ((struct wire_region_reply *)s->l.reply)->region;
	close(s->l.fds[0]);
	return 0;
}

static int tear_down(void **state)
{
	struct spy *s = *state;

	wl_close(&s->l);
	rt_seq_free(&s->own_room, true);
	rt_close(&s->own);
	for (uint32_t i = 0; i < NAMES; i++)
		kvtier_seq_close(s->held[i]);
	rt_seq_free(&s->room, true);
	rt_close(&s->victim);
	rt_seq_free(&s->open, true);
	finish(&s->f);
	free(s);
	return 0;
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(guesses_nothing, set_up, tear_down),
	};

	setenv("CMOCKA_MESSAGE_OUTPUT", "TAP", 0);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
