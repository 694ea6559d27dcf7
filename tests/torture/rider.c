/* SPDX-License-Identifier: MIT */
/*
 * A busy client of kvtierd that compares every byte of every row it gets, to be killed, or to see the daemon
 * killed.
 *
 *   rider SOCKET STATE SEQS ID [leased|ephemeral|forked] [stays] [until-idle] [ttl=SECONDS]
 *
 * Rows are patterns of (sequence, lane, position, generation); a generation ends with every truncation, drop
 * and restart. What a position must hold is written to STATE, a shared file, before the daemon can know it and
 * after it has answered, so that whoever goes on from STATE (this process after the daemon's death, another one
 * after its own) knows what may come back: rows are appended      their generation is in STATE first rows are
 * cut off       they leave STATE when the daemon has said so; until then both answers are right A row that
 * comes back where STATE has none was cut off, and is as wrong as a changed byte.
 *
 * Counters are in STATE too (struct state, read by tests/integration/lib/riders.py). Standard output: a line
 * for every row that is wrong. `stays`: the daemon is not going to die, so a leased sequence may not be gone.
 * `until-idle`: resume, look, and end well. Ends on SIGTERM with status 0, 1 when anything was wrong, 3 when it
 * could not go on.
 */
#include <fcntl.h>
#include <stdarg.h>
#include <sys/mman.h>
#include "tests/unit/core_harness.h"

#define LAYERS 2u
#define LANES (LAYERS * RT_HEADS)
#define MAX_ROWS 1024u
#define NONE UINT32_MAX /* generation of a position that holds nothing */
#define SEQS 8u

enum life { UNUSED, OPEN, UNSURE };

struct record {
	uint32_t life; /* enum life */
	uint32_t rows; /* no row at or past it was ever appended in this life */
	uint32_t salt; /* generation of what is appended next */
	uint32_t pad;
	uint32_t salts[MAX_ROWS];
};
struct state {
	uint64_t compared, wrong, lost, resumed, gone, cuts, forks, losses, served_ns, steps, began_ns;
	struct record seq[SEQS];
};
_Static_assert(offsetof(struct state, seq) == 88, "read by riders.py");

static struct state *st;
static struct runtime rt;
static struct rt_seq seqs[SEQS];
static unsigned n_seqs;
static uint32_t id_base;
static uint64_t rnd;
static uint32_t ttl_s = 60;
static bool leased = true, stays, until_idle;
static const char *sock_path;
static volatile sig_atomic_t stop;

static void on_term(int sig)
{
	stop = sig;
}

static uint32_t pick(uint32_t n)
{
	rnd = rnd * 6364136223846793005u + 1442695040888963407u;
	return n ? (uint32_t)(rnd >> 33) % n : 0;
}

static void die(const char *what, int r)
{
	printf("stuck: %s: %s: %s\n", what, kvtier_strerror(r), kvtier_last_error());
	exit(3);
}

static void wrong(const struct rt_seq *q, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void wrong(const struct rt_seq *q, const char *fmt, ...)
{
	va_list ap;

	st->wrong++;
	printf("wrong: sequence %u: ", q->id);
	va_start(ap, fmt);
	vprintf(fmt, ap);
	va_end(ap);
	printf("\n");
	fflush(stdout);
}

/* ---- comparing ------------------------------------------------------------------------- */

/* Whose row is it then? For the line that says so. */
static uint32_t really(struct rt_seq *q, uint32_t lane, uint32_t slot, uint32_t pos)
{
	uint32_t real = q->salts[pos], k, top = st->seq[q - seqs].salt;

	for (k = 0; k <= top; k++) {
		q->salts[pos] = k;
		if (!rt_check(q, lane, slot, pos))
			break;
	}
	q->salts[pos] = real;
	return k <= top ? k : NONE;
}

/* Every resident row of every lane; returns how many there are. */
static uint64_t compare(struct rt_seq *q)
{
	static uint32_t pos[MAX_ROWS];
	uint64_t total = 0;

	for (uint32_t l = 0; l < LANES; l++) {
		int n = rt_resident(q, l, pos);

		for (int i = 0; i < n; i++) {
			if (q->salts[pos[i]] != NONE && !rt_check(q, l, (uint32_t)i, pos[i]))
				continue;
			wrong(q, "lane %u position %u: generation %d, must be %d (%s)", l, pos[i],
			      (int)really(q, l, (uint32_t)i, pos[i]), (int)q->salts[pos[i]],
			      q->salts[pos[i]] == NONE ? "it was cut off" : "changed");
		}
		total += n > 0 ? (uint64_t)n : 0;
	}
	st->compared += total;
	return total;
}

/* ---- sequences ------------------------------------------------------------------------- */

static struct record *record_of(const struct rt_seq *q)
{
	return &st->seq[q - seqs];
}

static void forget(struct record *r, uint32_t from)
{
	for (uint32_t p = from; p < MAX_ROWS; p++)
		__atomic_store_n(&r->salts[p], NONE, __ATOMIC_RELAXED);
	__atomic_store_n(&r->rows, MIN(r->rows, from), __ATOMIC_RELEASE);
	__atomic_store_n(&r->salt, r->salt + 1, __ATOMIC_RELEASE);
}

/* Memory for it on this connection. */
static int prepare(struct rt_seq *q)
{
	uint32_t id = id_base + (uint32_t)(q - seqs);
	int r = rt_prepare(q, &rt, id, MAX_ROWS, MAX_ROWS, MAX_ROWS);

	free(q->salts);
	q->salts = record_of(q)->salts;
	return r;
}

static void let_go(struct rt_seq *q, bool drop)
{
	q->salts = NULL;
	rt_seq_free(q, drop);
}

static struct kvtier_seq_opts opts_of(struct rt_seq *q)
{
	static const struct kvtier_budget manual = {.size = sizeof(manual),
						    .device_rows = KVT_ROWS_ALL,
						    .nvme_rows = KVT_ROWS_ALL,
						    .manual = 1,
						    .policy = "random"};

	struct kvtier_seq_opts o = rt_opts(q, leased ? KVT_LEASED : KVT_EPHEMERAL, &manual);

	o.ttl_s = ttl_s;
	return o;
}

static int open_new(struct rt_seq *q)
{
	struct record *r = record_of(q);
	uint32_t before = r->life;
	struct kvtier_seq_opts o = opts_of(q);
	int res;

	if (!leased)
		memset(o.key, 0, sizeof(o.key)); /* any; what our predecessor had may be on its way out */
	forget(r, 0);
	r->life = UNSURE;
	res = kvtier_seq_open(rt.c, rt.m, &o, &q->s);
	if (res == KVT_E_EXISTS && before == UNUSED)
		wrong(q, "it was dropped, and is back");
	/* It was not heard whether it was opened. */
	r->life = !res ? OPEN : leased && (res == KVT_E_DAEMON || res == KVT_E_TIMEOUT) ? UNSURE : before;
	q->rows = 0;
	q->salt = r->salt;
	return res;
}

/* Who does not know the secret is told what one is told who asks for what is not there. */
static void try_wrong_names(struct rt_seq *q)
{
	struct kvtier_seq_opts o = opts_of(q);
	struct kvtier_seq *s;
	uint32_t rows;
	int r;

	o.secret[31] ^= 1;
	r = kvtier_seq_resume(rt.c, rt.m, &o, &s, &rows);
	if (r != KVT_E_NOENT && r != KVT_E_DAEMON && r != KVT_E_STALE && (r != KVT_E_BUSY || stays)) {
		wrong(q, "resume with another secret: %d, must be %d", r, KVT_E_NOENT);
		if (!r)
			kvtier_seq_close(s);
	}
}

/* After a resume that found `rows`: what is behind them never was, as far as anybody can tell from now on. */
static void take_up(struct rt_seq *q, uint32_t rows)
{
	struct record *r = record_of(q);

	if (rows > r->rows)
		wrong(q, "%u rows, of which only %u were appended", rows, r->rows);
	st->resumed++;
	if (r->rows > rows)
		st->lost += (uint64_t)(r->rows - rows) * LANES;
	forget(r, MIN(rows, r->rows));
	q->rows = rows;
	q->salt = r->salt;
}

/* Everything that is left comes up and is compared; what is not there is counted by the daemon as dropped. */
static int look_at_all(struct rt_seq *q)
{
	struct kvtier_budget b = {
		.size = sizeof(b), .device_rows = KVT_ROWS_ALL, .nvme_rows = KVT_ROWS_ALL, .manual = 1};
	struct kvtier_seq_info i = {.size = sizeof(i)};
	uint64_t there, id;
	int r = q->rows ? kvtier_plan_request(q->s, &b, &id) : 0; /* there are no plans for no rows */

	if (!r && q->rows)
		r = rt_follow(q, id, NULL);
	if (!r)
		r = kvtier_seq_info(q->s, &i);
	if (r)
		return r;
	there = compare(q);
	st->lost += (uint64_t)q->rows * LANES - there;
	if (there + i.dropped_rows != (uint64_t)q->rows * LANES)
		wrong(q, "%llu rows are there and %llu counted as dropped, of %llu", (unsigned long long)there,
		      (unsigned long long)i.dropped_rows, (unsigned long long)q->rows * LANES);
	return 0;
}

/* Open, or go on with what STATE says there is. */
static int begin(struct rt_seq *q)
{
	struct record *r = record_of(q);
	struct kvtier_seq_opts o;
	uint32_t rows = 0;
	int res = prepare(q);

	if (res)
		return res;
	if (r->life == UNUSED || !leased)
		return open_new(q);
	try_wrong_names(q);
	o = opts_of(q);
	for (unsigned tries = 0; tries < 5000;
	     tries++) { /* the daemon may still be saving it, or not know of our end */
		res = kvtier_seq_resume(rt.c, rt.m, &o, &q->s, &rows);
		if (res != KVT_E_BUSY)
			break;
		usleep(1000);
	}
	if (res == KVT_E_NOENT) {
		if (r->life == OPEN && stays)
			wrong(q, "gone, and its daemon lives");
		if (r->life == OPEN) {
			st->gone++;
			st->lost += (uint64_t)r->rows * LANES;
		}
		r->life = UNUSED;
		return open_new(q);
	}
	if (res)
		return res;
	take_up(q, rows);
	return look_at_all(q);
}

/* ---- what it does all day ----------------------------------------------------------------- */

static int append(struct rt_seq *q, uint32_t n)
{
	struct record *r = record_of(q);
	uint32_t most = q->cap, first = q->rows;
	int res;

	for (uint32_t l = 0; l < LANES; l++) {
		int have = rt_resident(q, l, NULL);

		if (have < 0)
			return have;
		most = MIN(most, q->cap - (uint32_t)have);
	}
	n = MIN(n, MIN(most, MAX_ROWS - q->rows));
	if (!n)
		return 0;
	for (uint32_t p = first; p < first + n; p++)
		__atomic_store_n(&r->salts[p], q->salt, __ATOMIC_RELAXED);
	__atomic_store_n(&r->rows, first + n, __ATOMIC_RELEASE);
	res = rt_append(q, n);
	if (res)
		q->rows = first;
	return res;
}

static int demote(struct rt_seq *q)
{
	struct kvtier_budget b = {.size = sizeof(b),
				  .device_rows = pick(3) ? pick(q->rows + 1) : pick(32),
				  .dram_rows = pick(3) ? 0 : pick(300),
				  .nvme_rows = KVT_ROWS_ALL,
				  .manual = 1};
	uint64_t id;
	int r = kvtier_plan_request(q->s, &b, &id);

	if (!r)
		r = rt_follow(q, id, NULL);
	if (!r)
		compare(q);
	return r;
}

static int cut(struct rt_seq *q)
{
	uint32_t n = pick(2) ? pick(q->rows + 1) : q->rows - pick(MIN(q->rows, 40u) + 1);
	struct record *r = record_of(q);
	int res;

	res = kvtier_seq_truncate(q->s, n);
	if (res)
		return res;
	forget(r, n);
	q->rows = n;
	q->salt = r->salt;
	st->cuts++;
	return append(q, 1 + pick(64));
}

/* Let go of it and take it up again, by name; or end it and begin another of the same name. */
static int reopen(struct rt_seq *q)
{
	struct record *r = record_of(q);
	int res;

	if (leased && pick(3)) {
		let_go(q, false);
		return begin(q);
	}
	r->life = UNSURE;
	res = kvtier_seq_drop(q->s);
	q->s = NULL;
	let_go(q, false);
	if (res)
		return res;
	forget(r, 0);
	r->life = UNUSED;
	return begin(q);
}

/* A child shares what is below and must show the same rows. */
static int fork_off(struct rt_seq *q)
{
	struct rt_seq child;
	struct kvtier_seq_opts o;
	uint32_t n = 1 + pick(q->rows);
	int r = rt_prepare(&child, &rt, id_base + 500, MAX_ROWS, MAX_ROWS, MAX_ROWS);

	if (!r) {
		memcpy(child.salts, q->salts, n * sizeof(*child.salts));
		child.id = q->id; /* the pattern's */
		o = rt_opts(&child, KVT_EPHEMERAL, NULL);
		memset(o.key, 0, sizeof(o.key));
		r = kvtier_seq_fork(q->s, n, &o, &child.s);
	}
	if (!r) {
		uint32_t *own = child.salts;

		child.rows = n;
		child.salt = record_of(q)->salt;
		r = rt_plan(&child, KVT_ROWS_ALL, 0, KVT_ROWS_ALL, NULL);
		if (!r && rt_wrong(&child))
			wrong(q, "its child of %u rows has others", n);
		child.salts = own;
		st->compared += r ? 0 : (uint64_t)n * LANES;
		st->forks++;
	}
	rt_seq_free(&child, false);
	return r;
}

static int step(void)
{
	struct rt_seq *q = &seqs[pick(n_seqs)];
	uint32_t what = pick(100);

	st->steps++;
	if (what < 40 || !q->rows)
		return append(q, 1 + pick(200));
	if (what < 75)
		return demote(q);
	if (what < 88)
		return cut(q);
	if (what < 93)
		return reopen(q);
	if (what < 96)
		return fork_off(q);
	return look_at_all(q);
}

/* ---- the daemon's death --------------------------------------------------------------------- */

static bool lost_daemon(int r)
{
	return r == KVT_E_DAEMON || r == KVT_E_STALE;
}

/* Sequences and regions of the old connection go; what is in memory is still right. */
static void detach(void)
{
	for (unsigned i = 0; i < n_seqs; i++) {
		if (seqs[i].s)
			compare(&seqs[i]);
		if (seqs[i].rt)
			let_go(&seqs[i], false);
	}
}

static int begin_all(void)
{
	int r = 0;

	for (unsigned i = 0; i < n_seqs && !r; i++)
		r = begin(&seqs[i]);
	if (!r) {
		st->served_ns = now_ns();
		__atomic_add_fetch(&st->losses, 1, __ATOMIC_RELEASE);
	}
	return r;
}

static int come_back(void)
{
	uint64_t end = now_ns() + UINT64_C(30000000000);
	int r = KVT_E_DAEMON;

	while (!stop && lost_daemon(r) && now_ns() < end) {
		detach();
		kvtier_process(rt.c);
		r = begin_all();
		if (r)
			usleep(1000);
	}
	return stop ? 0 : r;
}

static struct state *map_state(const char *path)
{
	int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	void *p;

	if (fd < 0 || ftruncate(fd, sizeof(struct state)) < 0)
		return NULL;
	p = mmap(NULL, sizeof(struct state), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	close(fd);
	return p == MAP_FAILED ? NULL : p;
}

/* A child that does nothing holds the socket for as long as it lives. */
static void leave_a_child(void)
{
	pid_t parent = getpid(), pid = fork();

	if (pid) {
		printf("child %d\n", (int)pid);
		fflush(stdout);
		return;
	}
	signal(SIGTERM, SIG_DFL);
	while (getppid() == parent)
		usleep(20000);
	sleep(20);
	_exit(0);
}

int main(int argc, char **argv)
{
	bool child = false;
	int r;

	if (argc < 5)
		return 2;
	sock_path = argv[1];
	st = map_state(argv[2]);
	n_seqs = MIN((unsigned)atoi(argv[3]), SEQS);
	id_base = (uint32_t)atoi(argv[4]) * 1000;
	rnd = id_base * UINT64_C(2654435761);
	for (int i = 5; i < argc; i++) {
		leased &= strcmp(argv[i], "ephemeral") && strcmp(argv[i], "forked");
		child |= !strcmp(argv[i], "forked");
		stays |= !strcmp(argv[i], "stays");
		if (!strncmp(argv[i], "ttl=", 4))
			ttl_s = (uint32_t)atoi(argv[i] + 4);
		until_idle |= !strcmp(argv[i], "until-idle");
	}
	signal(SIGTERM, on_term);
	if (!st)
		return 3;
	rnd += (getenv("KVT_SEED") ? (uint64_t)atoi(getenv("KVT_SEED")) : 11) * 7919 + st->steps;
	st->began_ns = now_ns();
	r = rt_open_dims(&rt, sock_path, LAYERS, RT_HEADS, 192, 128, 0, 0);
	if (r)
		die("open", r);
	if (child)
		leave_a_child();
	r = begin_all();
	while (!stop && !(until_idle && !r)) {
		if (r && !lost_daemon(r))
			die("a step", r);
		r = r ? come_back() : step();
	}
	for (unsigned i = 0; i < n_seqs; i++)
		if (seqs[i].rt)
			let_go(&seqs[i], false);
	rt_close(&rt);
	return st->wrong ? 1 : 0;
}
