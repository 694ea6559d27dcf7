/* SPDX-License-Identifier: MIT */
/* libkvtier against a daemon in a thread. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <sys/stat.h>
#include <sys/mman.h>
#include <fcntl.h>
#include <sys/wait.h>
#include "ipc/kvtier.h"
#include "tests/unit/fake_daemon.h"

#define LAYERS 2
#define HEADS 2
#define LANES (LAYERS * HEADS)
#define ROW 64u
#define CAP 256u
#define STAGE 64u
#define ROWS 512u

struct world {
	struct fake *f;
	struct kvtier *c;
	struct kvtier_model *m;
	struct kvtier_region *r;
	struct kvtier_layout layout[LAYERS];
	struct kvtier_seq *s;
};

static const struct kvtier_layer_desc layers[LAYERS] = {
	{.kv_heads = HEADS, .k_bytes = ROW, .v_bytes = ROW},
	{.kv_heads = HEADS, .k_bytes = ROW, .v_bytes = ROW},
};

static struct kvtier *connect_to(struct fake *f, uint32_t timeout_ms)
{
	struct kvtier_open_opts o = {
		.size = sizeof(o), .socket = f->path, .name = "test", .timeout_ms = timeout_ms, .max_seqs = 8};
	struct kvtier *c = NULL;

	assert_int_equal(kvtier_open(&o, &c), 0);
	return c;
}

static struct kvtier_model_desc model_desc(void)
{
	return (struct kvtier_model_desc){.size = sizeof(struct kvtier_model_desc),
					  .name = "tiny",
					  .layers = layers,
					  .n_layers = LAYERS,
					  .dtype = KVT_DTYPE_F16,
					  .head_dim = ROW / 2,
					  .rope = KVT_ROPE_HALF,
					  .rope_theta = 10000,
					  .world = 1};
}

static struct kvtier_seq_opts seq_opts(struct world *w)
{
	return (struct kvtier_seq_opts){.size = sizeof(struct kvtier_seq_opts),
					.key = {1},
					.max_rows = ROWS,
					.region = w->r,
					.layouts = w->layout};
}

static void open_seq(struct world *w)
{
	struct kvtier_model_desc d = model_desc();
	struct kvtier_seq_opts o;
	uint64_t bytes;

	assert_int_equal(kvtier_model_register(w->c, &d, &w->m), 0);
	assert_int_equal(kvtier_layout_plain(w->m, CAP, STAGE, 0, 0, w->layout, &bytes), 0);
	assert_int_equal(bytes, 2 * LANES * (CAP + STAGE) * ROW);
	assert_int_equal(kvtier_region_create(w->c, bytes, &w->r), 0);
	o = seq_opts(w);
	assert_int_equal(kvtier_seq_open(w->c, w->m, &o, &w->s), 0);
}

static int setup(void **state)
{
	struct world *w = calloc(1, sizeof(*w));

	w->f = fake_new();
	w->c = connect_to(w->f, 1000);
	open_seq(w);
	*state = w;
	return 0;
}

static int teardown(void **state)
{
	struct world *w = *state;

	kvtier_close(w->c);
	fake_free(w->f);
	free(w);
	return 0;
}

static struct kvtier_stats stats(struct kvtier *c)
{
	struct kvtier_stats s = {.size = sizeof(s)};

	assert_int_equal(kvtier_stats(c, &s), 0);
	return s;
}

static void nap(long ms)
{
	nanosleep(&(struct timespec){.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000}, NULL);
}

/* Keep only rows below `keep` of `watermark`, in every lane. */
static uint64_t publish_keep(struct world *w, uint32_t watermark, uint32_t keep, enum plan_state state)
{
	uint64_t bits[LANES][ROWS / 64] = {0};
	uint64_t packed[LANES * (ROWS / 64)] = {0};
	uint32_t words = (uint32_t)BITS_WORDS(watermark);

	for (int l = 0; l < LANES; l++) {
		bits_set_range(bits[l], 0, keep);
		memcpy(packed + l * words, bits[l], words * sizeof(uint64_t));
	}
	return fake_plan(w->f, 0, watermark, packed, NULL, state);
}

/* ---- connection ------------------------------------------------------------------ */

static void test_open_refuses(void **state)
{
	struct kvtier *c = (void *)1;
	struct kvtier_open_opts o = {
		.size = sizeof(o), .socket = "/tmp/kvt-nobody-listens-here", .timeout_ms = 50};
	uint64_t start = now_ns();

	assert_int_equal(kvtier_open(&o, &c), KVT_E_DAEMON);
	assert_true(now_ns() - start < UINT64_C(2000000000));
	assert_ptr_equal(c, (void *)1); /* set only on success */
	assert_non_null(strstr(kvtier_last_error(), "nobody-listens"));
	o.size = 0;
	assert_int_equal(kvtier_open(&o, &c), KVT_E_INVAL);
	o.size = sizeof(o);
	o.max_seqs = 16385;
	assert_int_equal(kvtier_open(&o, &c), KVT_E_INVAL);
	assert_non_null(strstr(kvtier_last_error(), "max_seqs: 16385, must be at most 16384"));
	assert_int_equal(kvtier_open(NULL, NULL), KVT_E_INVAL);
	kvtier_close(NULL);
}

static void test_newer_struct_is_accepted(void **state)
{
	struct fake *f = fake_new();
	struct {
		struct kvtier_open_opts o;
		uint64_t future;
	} big = {.o = {.size = sizeof(big), .socket = f->path}};
	struct kvtier *c;

	assert_int_equal(kvtier_open(&big.o, &c), 0);
	kvtier_close(c);
	big.future = 1; /* asks for what this library does not know */
	assert_int_equal(kvtier_open(&big.o, &c), KVT_E_INVAL);
	fake_free(f);
}

static void test_hello_refused(void **state)
{
	struct fake *f = fake_new();
	struct kvtier_open_opts o = {.size = sizeof(o), .socket = f->path, .timeout_ms = 300};
	struct kvtier *c;

	atomic_store(&f->refuse_status, KVT_E_LIMIT);
	atomic_store(&f->refuse_type, W_HELLO);
	assert_int_equal(kvtier_open(&o, &c), KVT_E_LIMIT);
	assert_string_equal(kvtier_last_error(), "field: 7, must be at most 5");
	atomic_store(&f->garble_type, W_HELLO);
	assert_int_equal(kvtier_open(&o, &c), KVT_E_PROTO);
	atomic_store(&f->stray_type, W_HELLO); /* 2 fds instead of 4 */
	assert_int_equal(kvtier_open(&o, &c), KVT_E_PROTO);
	assert_int_equal(kvtier_open(&o, &c), 0);
	kvtier_close(c);
	fake_free(f);
}

static void test_daemon_comes_late(void **state)
{
	struct fake *f = fake_new();
	struct kvtier_open_opts o = {.size = sizeof(o), .socket = f->path, .timeout_ms = 5000};
	struct kvtier *c = NULL;
	pid_t pid;
	int st;

	fake_stop(f);
	fflush(NULL);
	pid = fork(); /* the client waits in a process of its own: the thread cannot be started by it */
	if (!pid)
		_exit(kvtier_open(&o, &c) ? 1 : 0);
	nap(100);
	fake_start(f);
	assert_int_equal(waitpid(pid, &st, 0), pid);
	assert_int_equal(st, 0);
	fake_free(f);
}

static void test_refusals_carry_the_daemons_line(void **state)
{
	struct world *w = *state;
	struct kvtier_region *r = (void *)1;

	atomic_store(&w->f->refuse_status, KVT_E_LIMIT);
	atomic_store(&w->f->refuse_type, W_REGION);
	assert_int_equal(kvtier_region_create(w->c, 4096, &r), KVT_E_LIMIT);
	assert_string_equal(kvtier_last_error(), "field: 7, must be at most 5");
	assert_ptr_equal(r, (void *)1);
	/* the connection goes on */
	assert_int_equal(kvtier_region_create(w->c, 5000, &r), 0);
	assert_int_equal(kvtier_region_bytes(r), 8192);
	assert_int_equal(kvtier_region_resident(r), 0);
	((char *)kvtier_region_addr(r))[4096] = 1;
	assert_int_equal(kvtier_region_resident(r), 4096);
	kvtier_region_close(r);
	assert_int_equal(atomic_load(&w->f->region_closes), 1);
}

/* ---- the runtime's own file ------------------------------------------------------------- */

static unsigned open_descriptors(void)
{
	unsigned n = 0;

	for (int fd = 0; fd < 1024; fd++)
		n += fcntl(fd, F_GETFD) >= 0;
	return n;
}

static void import_refused(struct world *w, int fd, uint64_t bytes, const char *line)
{
	int calls = atomic_load(&w->f->calls);
	struct kvtier_region *r = (void *)1;

	assert_int_equal(kvtier_region_import(w->c, fd, bytes, &r), KVT_E_INVAL);
	assert_ptr_equal(r, (void *)1);
	if (!strstr(kvtier_last_error(), line))
		fail_msg("\"%s\" does not say \"%s\"", kvtier_last_error(), line);
	assert_int_equal(atomic_load(&w->f->calls), calls); /* it did not go to the daemon */
}

static void test_import(void **state)
{
	struct world *w = *state;
	int fd = memfd_create("pool", MFD_CLOEXEC), other, closes = atomic_load(&w->f->region_closes);
	char path[] = "/tmp/kvt-import-XXXXXX", self[64];
	struct kvtier_region *r = NULL;
	struct stat st;
	unsigned before;

	assert_int_equal(ftruncate(fd, 10000), 0);
	assert_int_equal(pwrite(fd, "mine", 4, 8100), 4);
	assert_int_equal(fstat(fd, &st), 0);
	before = open_descriptors();
	assert_int_equal(kvtier_region_import(w->c, fd, 9000, &r), 0);
	assert_int_equal(atomic_load(&w->f->imported), st.st_ino);
	assert_int_equal(kvtier_region_bytes(r), 9000);
	assert_int_equal(kvtier_region_resident(r), 4096);
	other = fcntl(fd, F_DUPFD_CLOEXEC, 3);
	close(fd); /* ours to close at once */
	assert_memory_equal((char *)kvtier_region_addr(r) + 8100, "mine", 4);
	memcpy(kvtier_region_addr(r), "back", 4);
	assert_int_equal(pread(other, self, 4, 0), 4);
	assert_memory_equal(self, "back", 4);
	kvtier_region_close(r);
	assert_int_equal(atomic_load(&w->f->region_closes), closes + 1);
	assert_int_equal(open_descriptors(), before);

	/* a refusal of the daemon's keeps nothing; a late answer gives the region back */
	atomic_store(&w->f->refuse_status, KVT_E_LIMIT);
	atomic_store(&w->f->refuse_type, W_REGION_IMPORT);
	assert_int_equal(kvtier_region_import(w->c, other, 9000, &r), KVT_E_LIMIT);
	assert_int_equal(open_descriptors(), before);

	import_refused(w, other, 10001, "bytes: 10001, the file has 10000");
	import_refused(w, other, 0, "bytes: 0, must be 1..");
	import_refused(w, -1, 4096, "fd: -1, not open");
	snprintf(self, sizeof(self), "/proc/self/fd/%d", other);
	fd = open(self, O_RDONLY | O_CLOEXEC);
	import_refused(w, fd, 4096, "fd: mode");
	close(fd);
	fd = open(self, O_RDWR | O_APPEND | O_CLOEXEC);
	import_refused(w, fd, 4096, "fd: mode");
	close(fd);
	fd = open("/dev/null", O_RDWR | O_CLOEXEC);
	import_refused(w, fd, 4096, "must be tmpfs or hugetlbfs");
	close(fd);
	fd = mkstemp(path);
	assert_int_equal(ftruncate(fd, 8192), 0);
	if (fcntl(fd, F_GET_SEALS) < 0) /* /tmp may be tmpfs */
		import_refused(w, fd, 4096, "must be tmpfs or hugetlbfs");
	unlink(path);
	close(fd);
	close(other);
}

/* Too large for the address space: a region all the same, whose rows the runtime moves by itself. */
static void test_import_unmapped(void **state)
{
	struct world *w = *state;
	int fd = memfd_create("pool", MFD_CLOEXEC);
	struct kvtier_region *r[3] = {NULL};
	struct kvtier_seq_opts o = seq_opts(w);
	struct kvtier_seq *s, *child = NULL;
	struct kvtier_plan p = {.size = sizeof(p), .id = 1};
	unsigned n = 0;

	assert_int_equal(ftruncate(fd, (off_t)WIRE_MAX_REGION), 0);
	do
		assert_int_equal(kvtier_region_import(w->c, fd, WIRE_MAX_REGION, &r[n]), 0);
	while (kvtier_region_addr(r[n++]) && n < ARRAY_SIZE(r));
	assert_null(kvtier_region_addr(r[n - 1]));
	assert_int_equal(kvtier_region_bytes(r[n - 1]), WIRE_MAX_REGION);
	assert_int_equal(kvtier_region_resident(r[n - 1]), 0);
	o.region = r[n - 1];
	assert_int_equal(kvtier_seq_open(w->c, w->m, &o, &s), 0);
	assert_int_equal(kvtier_seq_append(s, KVT_ALL_LAYERS, 0, 4), 0);
	assert_int_equal(kvtier_plan_apply(s, &p), KVT_E_INVAL);
	assert_string_equal(kvtier_last_error(), "region: not mapped here, its rows must be moved by hand");
	assert_int_equal(kvtier_seq_fork(s, 2, &o, &child), KVT_E_INVAL);
	assert_null(child);
	kvtier_seq_close(s);
	while (n)
		kvtier_region_close(r[--n]);
	close(fd);
}

/* A daemon of an earlier version is not sent what it would hang up on. */
static void test_import_unknown_to_daemon(void **state)
{
	struct fake *f = fake_new();
	int fd = memfd_create("pool", MFD_CLOEXEC), calls;
	struct kvtier_region *r;
	struct kvtier *c;

	assert_int_equal(ftruncate(fd, 4096), 0);
	atomic_store(&f->lacks, WIRE_F_IMPORT);
	c = connect_to(f, 1000);
	calls = atomic_load(&f->calls);
	assert_int_equal(kvtier_region_import(c, fd, 4096, &r), KVT_E_VERSION);
	assert_string_equal(kvtier_last_error(), "region-import: not known to this daemon");
	assert_int_equal(atomic_load(&f->calls), calls);
	kvtier_close(c);
	fake_free(f);
	close(fd);
}

static void test_bad_arguments(void **state)
{
	struct world *w = *state;
	struct kvtier_model_desc d = model_desc();
	struct kvtier_seq_opts o = seq_opts(w);
	struct kvtier_layout bad[LAYERS];
	struct kvtier_budget b = {.size = sizeof(b), .kind = KVT_BUDGET_PER_LANE};
	struct kvtier_model *m;
	struct kvtier_seq *s;
	struct kvtier_plan p = {.size = sizeof(p)};
	int calls = atomic_load(&w->f->calls);

	d.name = "../../etc/passwd";
	assert_int_equal(kvtier_model_register(w->c, &d, &m), KVT_E_INVAL);
	assert_non_null(strstr(kvtier_last_error(), "name:"));
	d.name = "x";
	d.world = 0;
	assert_int_equal(kvtier_model_register(w->c, &d, &m), KVT_E_INVAL);
	assert_int_equal(kvtier_model_register(w->c, NULL, &m), KVT_E_INVAL);
	memcpy(bad, w->layout, sizeof(bad));
	bad[1].v_off = 1 << 30;
	o.layouts = bad;
	assert_int_equal(kvtier_seq_open(w->c, w->m, &o, &s), KVT_E_INVAL);
	assert_non_null(strstr(kvtier_last_error(), "layout[1].v_off"));
	o = seq_opts(w);
	o.max_rows = WIRE_MAX_ROWS + 1;
	assert_int_equal(kvtier_seq_open(w->c, w->m, &o, &s), KVT_E_INVAL);
	o = seq_opts(w);
	o.budget = &b;
	assert_int_equal(kvtier_seq_open(w->c, w->m, &o, &s), KVT_E_INVAL);
	assert_non_null(strstr(kvtier_last_error(), "budget.table_n: 0, must be 4"));
	assert_int_equal(kvtier_seq_append(w->s, LAYERS, 0, 1), KVT_E_INVAL);
	assert_int_equal(kvtier_seq_append(w->s, -2, 0, 1), KVT_E_INVAL);
	assert_int_equal(kvtier_seq_append(NULL, 0, 0, 1), KVT_E_INVAL);
	assert_int_equal(kvtier_fetch(w->s, WIRE_MAX_ROWS, 1, NULL), KVT_E_INVAL);
	assert_int_equal(kvtier_plan_wait(w->s, 0, 9, 1, &p), KVT_E_INVAL);
	p.size = 0;
	assert_int_equal(kvtier_plan_wait(w->s, 0, KVT_PLAN_READY, 0, &p), KVT_E_TIMEOUT);
	assert_int_equal(atomic_load(&w->f->calls), calls); /* none of it went to the daemon */
}

/* ---- deadlines --------------------------------------------------------------------- */

static void test_timeout_and_late_reply(void **state)
{
	struct fake *f = fake_new();
	struct world w = {.f = f, .c = connect_to(f, 100)};
	struct kvtier_region *r = NULL;
	uint64_t start;
	int closes;

	open_seq(&w);
	atomic_store(&f->mute_type, W_SEQ_INFO);
	start = now_ns();
	assert_int_equal(
		kvtier_seq_info(w.s, &(struct kvtier_seq_info){.size = sizeof(struct kvtier_seq_info)}),
		KVT_E_TIMEOUT);
	assert_true(now_ns() - start >= 100000000u);
	fake_release(f);
	/* the late reply is not taken for the next call's */
	assert_int_equal(kvtier_region_create(w.c, 4096, &r), 0);
	kvtier_region_close(r);
	assert_int_equal(stats(w.c).timeouts, 1);

	/* an import that came too late is given back to the daemon */
	int fd = memfd_create("pool", MFD_CLOEXEC);

	assert_int_equal(ftruncate(fd, 4096), 0);
	atomic_store(&f->mute_type, W_REGION_IMPORT);
	closes = atomic_load(&f->region_closes);
	assert_int_equal(kvtier_region_import(w.c, fd, 4096, &r), KVT_E_TIMEOUT);
	close(fd);
	fake_release(f);
	assert_int_equal(kvtier_region_create(w.c, 4096, &r), 0);
	assert_true(fake_until(&f->region_closes, closes + 1));
	kvtier_region_close(r);

	/* so is a sequence */
	atomic_store(&f->mute_type, W_SEQ_OPEN);
	closes = atomic_load(&f->seq_closes);
	struct kvtier_seq_opts o = seq_opts(&w);
	struct kvtier_seq *s;
	assert_int_equal(kvtier_seq_open(w.c, w.m, &o, &s), KVT_E_TIMEOUT);
	fake_release(f);
	assert_int_equal(kvtier_region_create(w.c, 4096, &r), 0);
	assert_true(fake_until(&f->seq_closes, closes + 1));
	assert_int_equal(atomic_load(&f->drops), 1);
	kvtier_close(w.c);
	fake_free(f);
}

static void test_truncate_in_doubt(void **state)
{
	struct fake *f = fake_new();
	struct world w = {.f = f, .c = connect_to(f, 100)};
	struct kvtier_plan p = {.size = sizeof(p)};

	open_seq(&w);
	assert_int_equal(kvtier_seq_append(w.s, KVT_ALL_LAYERS, 0, 50), 0);
	atomic_store(&f->mute_type, W_SEQ_TRUNCATE);
	assert_int_equal(kvtier_seq_truncate(w.s, 20), KVT_E_TIMEOUT);
	assert_int_equal(kvtier_seq_append(w.s, KVT_ALL_LAYERS, 50, 1), KVT_E_STALE);
	assert_int_equal(kvtier_plan_peek(w.s, &p), KVT_E_STALE);
	assert_int_equal(kvtier_seq_truncate(w.s, 20), 0);
	assert_int_equal(kvtier_seq_rows(w.s), 20);
	assert_int_equal(kvtier_seq_append(w.s, KVT_ALL_LAYERS, 20, 1), 0);
	assert_int_equal(atomic_load(&fake_slot_at(f, 0)->len), seq_len_pack(3, 21));
	kvtier_close(w.c);
	fake_free(f);
}

/* ---- rows --------------------------------------------------------------------------- */

static void test_append(void **state)
{
	struct world *w = *state;
	struct seq_slot *slot = fake_slot_at(w->f, 0);
	uint32_t pos[8];

	assert_int_equal(atomic_load(&slot->len), seq_len_pack(1, 0));
	assert_int_equal(kvtier_seq_append(w->s, 0, 0, 10), 0);
	assert_int_equal(atomic_load(&slot->len), seq_len_pack(1, 0)); /* layer 1 is not there yet */
	assert_int_equal(kvtier_seq_append(w->s, 1, 0, 7), 0);
	assert_int_equal(atomic_load(&slot->len), seq_len_pack(1, 7));
	assert_int_equal(kvtier_seq_append(w->s, KVT_ALL_LAYERS, 7, 1), KVT_E_INVAL); /* layer 0 has 10 */
	assert_non_null(strstr(kvtier_last_error(), "pos: 7, must be 10"));
	assert_int_equal(kvtier_seq_append(w->s, 1, 7, 3), 0);
	assert_int_equal(kvtier_seq_append(w->s, KVT_ALL_LAYERS, 10, CAP - 10), 0);
	assert_int_equal(atomic_load(&slot->len), seq_len_pack(1, CAP));
	assert_int_equal(kvtier_seq_rows(w->s), CAP);
	assert_int_equal(kvtier_seq_append(w->s, KVT_ALL_LAYERS, CAP, 1), KVT_E_NOSPC);
	assert_non_null(strstr(kvtier_last_error(), "cap 256"));
	assert_int_equal(kvtier_seq_append(w->s, KVT_ALL_LAYERS, CAP, ROWS), KVT_E_NOSPC);
	assert_non_null(strstr(kvtier_last_error(), "max_rows 512"));
	assert_int_equal(kvtier_seq_append(w->s, KVT_ALL_LAYERS, CAP, UINT32_MAX), KVT_E_NOSPC);
	assert_int_equal(atomic_load(&slot->len), seq_len_pack(1, CAP));
	assert_int_equal(kvtier_seq_resident(w->s, 3, pos, 8), (int)CAP);
	assert_int_equal(pos[7], 7);
	assert_int_equal(kvtier_seq_resident(w->s, LANES, NULL, 0), KVT_E_INVAL);
	assert_int_equal(stats(w->c).rows_appended, CAP * LANES);
}

static void test_hints_wake_a_sleeping_daemon_only(void **state)
{
	struct world *w = *state;

	assert_int_equal(kvtier_seq_append(w->s, KVT_ALL_LAYERS, 0, 1), 0); /* it slept */
	for (int i = 0; i < 2000 && !atomic_load(&w->f->dirty); i++)
		nap(1);
	assert_int_equal(atomic_load(&w->f->dirty), 1);
	assert_int_equal(stats(w->c).wakeups, 1);
	pthread_mutex_lock(&w->f->lock);
	ring_awake(&w->f->sq); /* a busy daemon */
	pthread_mutex_unlock(&w->f->lock);
	for (uint32_t i = 1; i < 100; i++)
		assert_int_equal(kvtier_seq_append(w->s, KVT_ALL_LAYERS, i, 1), 0);
	assert_int_equal(stats(w->c).wakeups, 1);
}

static void test_truncate(void **state)
{
	struct world *w = *state;
	struct kvtier_plan p = {.size = sizeof(p)};
	uint64_t id;

	assert_int_equal(kvtier_seq_append(w->s, KVT_ALL_LAYERS, 0, 200), 0);
	assert_int_equal(kvtier_seq_append(w->s, 0, 200, 5), 0);
	id = publish_keep(w, 200, 50, PLAN_READY);
	assert_int_equal(kvtier_plan_peek(w->s, &p), 1);
	assert_int_equal(kvtier_seq_truncate(w->s, 201), KVT_E_INVAL);
	assert_int_equal(kvtier_plan_apply(w->s, &p), 0);
	assert_int_equal(kvtier_seq_truncate(w->s, 10), KVT_E_BUSY); /* acknowledge first */
	assert_int_equal(kvtier_plan_ack(w->s, id, NULL), 0);
	assert_int_equal(kvtier_seq_resident(w->s, 0, NULL, 0), 55); /* layer 0 is ahead by 5 */
	assert_int_equal(kvtier_seq_resident(w->s, 3, NULL, 0), 50);
	id = publish_keep(w, 200, 20, PLAN_READY);
	assert_int_equal(kvtier_seq_truncate(w->s, 30), 0);
	assert_int_equal(kvtier_plan_peek(w->s, &p), 0); /* of an older epoch */
	assert_int_equal(kvtier_plan_ack(w->s, id, NULL), KVT_E_STALE);
	assert_int_equal(kvtier_seq_resident(w->s, 0, NULL, 0), 30);
	assert_int_equal(atomic_load(&fake_slot_at(w->f, 0)->len), seq_len_pack(2, 30));
	assert_int_equal(kvtier_seq_append(w->s, KVT_ALL_LAYERS, 30, CAP - 30), 0);
	assert_int_equal(kvtier_seq_append(w->s, KVT_ALL_LAYERS, CAP, 1), KVT_E_NOSPC);
}

/* ---- plans --------------------------------------------------------------------------- */

static void test_plan_life(void **state)
{
	struct world *w = *state;
	struct kvtier_plan p = {.size = sizeof(p)};
	uint64_t id, ticket, nack[1] = {1};
	uint32_t pos[64];

	assert_int_equal(kvtier_seq_append(w->s, KVT_ALL_LAYERS, 0, 130), 0);
	assert_int_equal(kvtier_plan_peek(w->s, &p), 0);
	assert_int_equal(kvtier_plan_request(w->s, NULL, &ticket), 0);
	id = publish_keep(w, 130, 40, PLAN_DECIDED);
	assert_int_equal(ticket, id);
	assert_int_equal(kvtier_plan_peek(w->s, &p), 1);
	assert_int_equal(p.state, KVT_PLAN_DECIDED);
	assert_int_equal(p.id, id);
	assert_int_equal(p.watermark, 130);
	assert_int_equal(kvtier_plan_kept(&p, 3, pos, 10), 40);
	assert_int_equal(pos[9], 9);
	assert_int_equal(kvtier_plan_kept(&p, LANES, NULL, 0), KVT_E_INVAL);
	assert_int_equal(kvtier_plan_promoted(&p, 0, NULL, 0), 0);
	assert_int_equal(kvtier_plan_apply(w->s, &p), KVT_E_BUSY);
	assert_int_equal(kvtier_plan_ack(w->s, id, NULL), KVT_E_BUSY);
	assert_int_equal(kvtier_plan_ack(w->s, id + 1, NULL), KVT_E_STALE);
	assert_int_equal(kvtier_plan_wait(w->s, id, KVT_PLAN_READY, 30, &p), KVT_E_TIMEOUT);
	fake_plan_state(w->f, 0, PLAN_READY);
	assert_int_equal(kvtier_plan_wait(w->s, id, KVT_PLAN_READY, 1000, &p), 0);
	assert_int_equal(kvtier_plan_wait(w->s, id + 1, KVT_PLAN_READY, 5000, &p), KVT_E_BUSY); /* at once */
	assert_int_equal(kvtier_plan_apply(w->s, &p), 0);
	assert_int_equal(kvtier_plan_apply(w->s, &p), KVT_E_BUSY); /* once is enough */
	assert_int_equal(kvtier_plan_ack(w->s, id, nack), KVT_E_INVAL);
	assert_int_equal(kvtier_plan_ack(w->s, id, NULL), 0);
	assert_int_equal(kvtier_plan_peek(w->s, &p), 0);
	assert_int_equal(kvtier_plan_ack(w->s, id, NULL), KVT_E_STALE);
	assert_int_equal(atomic_load(&fake_slot_at(w->f, 0)->acked), id);
	assert_int_equal(kvtier_seq_resident(w->s, 2, pos, 64), 40);
	assert_int_equal(stats(w->c).plans_seen, 1);
	assert_int_equal(stats(w->c).plans_applied, 1);
	assert_int_equal(stats(w->c).rows_evicted, 90 * LANES);
	/* a cancelled plan is none, and a wait for READY outlives it */
	publish_keep(w, 130, 30, PLAN_DECIDED);
	fake_plan_state(w->f, 0, PLAN_CANCELLED);
	assert_int_equal(kvtier_plan_peek(w->s, &p), 0);
	assert_int_equal(kvtier_plan_wait(w->s, id + 1, KVT_PLAN_READY, 30, &p), KVT_E_TIMEOUT);
	assert_int_equal(kvtier_plan_wait(w->s, id + 1, KVT_PLAN_CANCELLED, 1000, &p), 0);
	assert_int_equal(p.id, id + 1);
	/* none follows: who waits for it learns why, and only that one */
	plan_give_up(w->f->seq[0].area, id + 1, (uint32_t)-KVT_E_NOSPC);
	assert_int_equal(kvtier_plan_wait(w->s, id + 1, KVT_PLAN_READY, 60000, &p), KVT_E_NOSPC);
	assert_int_equal(kvtier_plan_wait(w->s, id + 2, KVT_PLAN_READY, 30, &p), KVT_E_TIMEOUT);
	assert_int_equal(kvtier_plan_wait(w->s, 0, KVT_PLAN_READY, 30, &p), KVT_E_TIMEOUT);
	plan_give_up(w->f->seq[0].area, id + 1, 7);
	assert_int_equal(kvtier_plan_wait(w->s, id + 1, KVT_PLAN_READY, 60000, &p), KVT_E_IO);
	publish_keep(w, 130, 30, PLAN_READY);
	assert_int_equal(kvtier_plan_wait(w->s, id + 1, KVT_PLAN_READY, 1000, &p), 0);
	assert_int_equal(p.id, id + 2);
	kvtier_process(w->c);
	assert_int_equal(stats(w->c).plans_cancelled, 1);
}

static void test_plan_that_does_not_fit_is_refused(void **state)
{
	struct world *w = *state;
	struct kvtier_plan p = {.size = sizeof(p)};
	uint64_t bits[LANES * 2] = {0};

	assert_int_equal(kvtier_seq_append(w->s, KVT_ALL_LAYERS, 0, 100), 0);
	publish_keep(w, 100, 10, PLAN_READY);
	assert_int_equal(kvtier_plan_peek(w->s, &p), 1);
	assert_int_equal(kvtier_plan_apply(w->s, &p), 0);
	assert_int_equal(kvtier_plan_ack(w->s, p.id, NULL), 0);
	/* keeps row 50 of lane 2, which left with the plan before */
	bits_set(&bits[2 * 2], 50);
	fake_plan(w->f, 0, 100, bits, NULL, PLAN_READY);
	assert_int_equal(kvtier_plan_peek(w->s, &p), 1);
	assert_int_equal(kvtier_plan_apply(w->s, &p), KVT_E_PROTO);
	assert_non_null(strstr(kvtier_last_error(), "lane 2, rows 0..63"));
	/* speaks of rows that there are not */
	publish_keep(w, 101, 10, PLAN_READY);
	assert_int_equal(kvtier_plan_peek(w->s, &p), 1);
	assert_int_equal(kvtier_plan_apply(w->s, &p), KVT_E_PROTO);
	assert_int_equal(kvtier_seq_resident(w->s, 2, NULL, 0), 10);
}

static void *publish_later(void *arg)
{
	struct world *w = arg;

	nap(50);
	publish_keep(w, 64, 10, PLAN_DECIDED);
	nap(50);
	fake_plan_state(w->f, 0, PLAN_READY);
	return NULL;
}

static void *wait_too(void *arg)
{
	struct kvtier_plan p = {.size = sizeof(p)};

	return (void *)(intptr_t)kvtier_plan_wait(arg, 1, KVT_PLAN_READY, 5000, &p);
}

static void test_wait_wakes_every_waiter(void **state)
{
	struct world *w = *state;
	struct kvtier_plan p = {.size = sizeof(p)};
	pthread_t daemon, other[3];
	uint64_t start;
	void *r;

	assert_int_equal(kvtier_seq_append(w->s, KVT_ALL_LAYERS, 0, 64), 0);
	start = now_ns();
	for (int i = 0; i < 3; i++)
		pthread_create(&other[i], NULL, wait_too, w->s);
	pthread_create(&daemon, NULL, publish_later, w);
	assert_int_equal(kvtier_plan_wait(w->s, 1, KVT_PLAN_READY, 5000, &p), 0);
	assert_int_equal(p.state, KVT_PLAN_READY);
	for (int i = 0; i < 3; i++) {
		pthread_join(other[i], &r);
		assert_int_equal((intptr_t)r, 0);
	}
	assert_true(now_ns() - start < UINT64_C(4000000000));
	pthread_join(daemon, NULL);
}

static void test_event_fd(void **state)
{
	struct world *w = *state;
	struct pollfd p = {.fd = kvtier_event_fd(w->c), .events = POLLIN};

	kvtier_process(w->c);
	assert_int_equal(poll(&p, 1, 0), 0);
	assert_int_equal(kvtier_seq_append(w->s, KVT_ALL_LAYERS, 0, 64), 0);
	publish_keep(w, 64, 10, PLAN_READY);
	assert_int_equal(poll(&p, 1, 2000), 1);
	assert_int_equal(kvtier_process(w->c), 1);
	assert_int_equal(poll(&p, 1, 0), 0);
	publish_keep(w, 64, 9, PLAN_READY); /* armed again */
	assert_int_equal(poll(&p, 1, 2000), 1);
	assert_int_equal(kvtier_process(w->c), 1);
}

static void test_sequence_ended_by_daemon(void **state)
{
	struct world *w = *state;
	struct kvtier_plan p = {.size = sizeof(p)};

	pthread_mutex_lock(&w->f->lock);
	fake_hint(w->f, &w->f->seq[0], Q_GONE, -KVT_E_PERM, 0);
	pthread_mutex_unlock(&w->f->lock);
	assert_int_equal(kvtier_process(w->c), 1);
	assert_int_equal(kvtier_plan_peek(w->s, &p), KVT_E_STALE);
	assert_int_equal(kvtier_seq_append(w->s, KVT_ALL_LAYERS, 0, 1), KVT_E_STALE);
	assert_non_null(strstr(kvtier_last_error(), kvtier_strerror(KVT_E_PERM)));
	kvtier_seq_close(w->s);
	assert_int_equal(atomic_load(&w->f->seq_closes), 0); /* nothing left to close */
}

static void test_budget_on_the_wire(void **state)
{
	struct world *w = *state;
	uint32_t table[LANES] = {4, 3, 2, 1};
	struct kvtier_budget b = {.size = sizeof(b),
				  .kind = KVT_BUDGET_PER_LANE,
				  .device_table = table,
				  .table_n = LANES,
				  .dram_rows = 77,
				  .nvme_rows = KVT_ROWS_ALL,
				  .policy = "recent",
				  .manual = 1};

	assert_int_equal(kvtier_plan_request(w->s, &b, NULL), 0);
	assert_int_equal(w->f->last_request.budget.set, 1);
	assert_int_equal(w->f->last_request.budget.table_n, LANES);
	assert_int_equal(w->f->last_request.budget.dram_rows, 77);
	assert_int_equal(w->f->last_request.budget.manual, 1);
	assert_string_equal(w->f->last_request.budget.policy, "recent");
	assert_int_equal(kvtier_plan_request(w->s, NULL, NULL), 0);
	assert_int_equal(w->f->last_request.budget.set, 0);
}

/* ---- fork and resume ------------------------------------------------------------------ */

static char *slot_of(struct world *w, const struct kvtier_layout *l, int layer, int head, bool v, uint32_t slot)
{
	char *base = kvtier_region_addr(w->r);

	return v ? base + l[layer].v_off + (size_t)head * l[layer].v_head_stride + (size_t)slot * ROW
		 : base + l[layer].k_off + (size_t)head * l[layer].k_head_stride + (size_t)slot * ROW;
}

static void test_fork(void **state)
{
	struct world *w = *state;
	struct kvtier_seq_opts o = seq_opts(w);
	struct kvtier_layout child[LAYERS];
	struct kvtier_region *r2;
	struct kvtier_seq *s2;
	uint64_t bytes, odd[LANES * 2];
	struct kvtier_plan p = {.size = sizeof(p)};
	char *base;

	assert_int_equal(kvtier_layout_plain(w->m, 64, 8, 0, 0, child, &bytes), 0);
	assert_int_equal(kvtier_region_create(w->c, bytes, &r2), 0);
	base = kvtier_region_addr(r2);
	for (uint32_t i = 0; i < 128; i++)
		for (int l = 0; l < LAYERS; l++)
			for (int h = 0; h < HEADS; h++) {
				memset(slot_of(w, w->layout, l, h, false, i), (int)i, ROW);
				memset(slot_of(w, w->layout, l, h, true, i), (int)(255 - i), ROW);
			}
	assert_int_equal(kvtier_seq_append(w->s, KVT_ALL_LAYERS, 0, 128), 0);
	memset(odd, 0xaa, sizeof(odd)); /* rows 1, 3, 5, ... stay */
	fake_plan(w->f, 0, 128, odd, NULL, PLAN_READY);
	assert_int_equal(kvtier_plan_peek(w->s, &p), 1);
	assert_int_equal(kvtier_plan_apply(w->s, &p), 0);
	o.region = r2;
	o.layouts = child;
	assert_int_equal(kvtier_seq_fork(w->s, 100, &o, &s2), KVT_E_BUSY); /* not acknowledged */
	assert_int_equal(kvtier_plan_ack(w->s, p.id, NULL), 0);
	assert_int_equal(kvtier_seq_fork(w->s, 129, &o, &s2), KVT_E_INVAL);
	assert_int_equal(kvtier_seq_fork(w->s, 100, &o, &s2), 0);
	assert_int_equal(w->f->last_open.op, W_OP_FORK);
	assert_int_equal(w->f->last_open.prefix, 100);
	assert_int_equal(w->f->last_open.parent, w->f->seq[0].handle);
	assert_int_equal(kvtier_seq_rows(s2), 100);
	for (uint32_t lane = 0; lane < LANES; lane++) {
		uint32_t pos[64];

		assert_int_equal(kvtier_seq_resident(s2, lane, pos, 64), 50);
		for (uint32_t i = 0; i < 50; i++) {
			size_t off = (lane % HEADS) * child[0].k_head_stride + (size_t)i * ROW;

			assert_int_equal(pos[i], 2 * i + 1);
			assert_int_equal((uint8_t)base[child[lane / HEADS].k_off + off], 2 * i + 1);
			assert_int_equal((uint8_t)base[child[lane / HEADS].v_off + off + ROW - 1],
					 255 - (2 * i + 1));
		}
	}
	/* the child goes its own way, within its own cap of 64 */
	assert_int_equal(kvtier_seq_append(s2, KVT_ALL_LAYERS, 100, 14), 0);
	assert_int_equal(kvtier_seq_append(s2, KVT_ALL_LAYERS, 114, 1), KVT_E_NOSPC);
	assert_int_equal(kvtier_seq_rows(w->s), 128);
	kvtier_seq_close(s2);
	/* a cap that is too small is refused before the daemon hears of it */
	for (int l = 0; l < LAYERS; l++)
		child[l].cap = 49;
	assert_int_equal(kvtier_seq_fork(w->s, 100, &o, &s2), KVT_E_NOSPC);
	assert_int_equal(atomic_load(&w->f->opens), 2);
	kvtier_region_close(r2);
}

static void test_resume_starts_empty(void **state)
{
	struct world *w = *state;
	struct kvtier_seq_opts o = seq_opts(w);
	struct kvtier_seq *s;
	uint32_t rows;

	o.lifetime = KVT_LEASED;
	o.secret[0] = 9;
	assert_int_equal(kvtier_seq_resume(w->c, w->m, &o, &s, &rows), 0);
	assert_int_equal(rows, 100);
	assert_int_equal(w->f->last_open.op, W_OP_RESUME);
	assert_int_equal(w->f->last_open.secret[0], 9);
	assert_int_equal(kvtier_seq_resident(s, 0, NULL, 0), 0);
	assert_int_equal(kvtier_seq_append(s, KVT_ALL_LAYERS, 100, CAP), 0);
	assert_int_equal(kvtier_seq_resident(s, 0, NULL, 0), CAP);
	assert_int_equal(kvtier_seq_drop(s), 0);
	assert_int_equal(atomic_load(&w->f->drops), 1);
}

static void test_ephemeral_key_is_made(void **state)
{
	struct world *w = *state;
	static const uint8_t none[16];
	struct kvtier_seq_opts o = seq_opts(w);
	struct kvtier_seq *s;

	memset(o.key, 0, sizeof(o.key));
	assert_int_equal(kvtier_seq_open(w->c, w->m, &o, &s), 0);
	assert_memory_not_equal(w->f->last_open.key, none, sizeof(none));
	o.lifetime = KVT_LEASED;
	assert_int_equal(kvtier_seq_open(w->c, w->m, &o, &s), KVT_E_INVAL);
}

/* ---- the daemon goes away --------------------------------------------------------------- */

static void reconnect(struct world *w, uint64_t links)
{
	for (int i = 0; i < 400 && stats(w->c).reconnects < links; i++) {
		struct pollfd p = {.fd = kvtier_event_fd(w->c), .events = POLLIN};

		poll(&p, 1, 50);
		assert_true(kvtier_process(w->c) >= 0);
	}
	assert_int_equal(stats(w->c).reconnects, links);
}

static void test_daemon_restart(void **state)
{
	struct world *w = *state;
	struct kvtier_plan p = {.size = sizeof(p)};
	struct kvtier_seq_opts o;
	struct kvtier_region *old = w->r;
	struct kvtier_seq *s;
	struct pollfd ev = {.fd = kvtier_event_fd(w->c), .events = POLLIN};
	uint64_t bytes = kvtier_region_bytes(w->r), start;

	memset(kvtier_region_addr(w->r), 0x5a, 4096);
	assert_int_equal(kvtier_seq_append(w->s, KVT_ALL_LAYERS, 0, 10), 0);
	fake_stop(w->f);
	assert_int_equal(poll(&ev, 1, 2000), 1); /* the end is an event */
	assert_true(kvtier_process(w->c) >= 1);
	start = now_ns();
	for (int i = 0; i < 100; i++) {
		assert_int_equal(kvtier_plan_peek(w->s, &p), KVT_E_DAEMON);
		assert_int_equal(kvtier_seq_append(w->s, KVT_ALL_LAYERS, 10, 1), KVT_E_DAEMON);
		assert_int_equal(kvtier_plan_request(w->s, NULL, NULL), KVT_E_DAEMON);
		assert_int_equal(kvtier_region_create(w->c, 4096, &w->r), KVT_E_DAEMON);
	}
	assert_true(now_ns() - start < UINT64_C(1000000000)); /* at once, not after the deadline */
	assert_int_equal(kvtier_seq_resident(w->s, 0, NULL, 0), 10);
	assert_int_equal(*(uint8_t *)kvtier_region_addr(old), 0x5a);
	fake_start(w->f);
	reconnect(w, 1);
	assert_int_equal(kvtier_plan_peek(w->s, &p), KVT_E_STALE);
	assert_int_equal(kvtier_seq_append(w->s, KVT_ALL_LAYERS, 10, 1), KVT_E_STALE);
	assert_int_equal(*(uint8_t *)kvtier_region_addr(old), 0x5a); /* the runtime's still */
	o = seq_opts(w);
	o.region = old;
	assert_int_equal(kvtier_seq_open(w->c, w->m, &o, &s), KVT_E_STALE);
	/* a new region: the model is registered again by itself */
	assert_int_equal(kvtier_region_create(w->c, bytes, &w->r), 0);
	o.region = w->r;
	assert_int_equal(kvtier_seq_open(w->c, w->m, &o, &s), 0);
	assert_int_equal(atomic_load(&w->f->models), 2);
	assert_int_equal(kvtier_seq_append(s, KVT_ALL_LAYERS, 0, 5), 0);
	kvtier_seq_close(w->s);
	kvtier_region_close(old);
	assert_int_equal(atomic_load(&w->f->seq_closes), 0); /* the new daemon knows nothing of the old ones */
	assert_int_equal(kvtier_seq_rows(s), 5);
}

static void *kill_later(void *arg)
{
	nap(50);
	fake_stop(arg);
	return NULL;
}

static void test_wait_sees_the_daemon_die(void **state)
{
	struct world *w = *state;
	struct kvtier_plan p = {.size = sizeof(p)};
	pthread_t t;
	uint64_t start = now_ns();

	pthread_create(&t, NULL, kill_later, w->f);
	assert_int_equal(kvtier_plan_wait(w->s, 1, KVT_PLAN_READY, 10000, &p), KVT_E_DAEMON);
	assert_true(now_ns() - start < UINT64_C(5000000000));
	pthread_join(t, NULL);
}

static void test_hangup_in_a_call(void **state)
{
	struct world *w = *state;
	struct kvtier_seq_info i = {.size = sizeof(i)};

	assert_int_equal(kvtier_seq_info(w->s, &i), 0);
	assert_string_equal(i.policy, "fake");
	atomic_store(&w->f->hangup_type, W_SEQ_INFO);
	assert_int_equal(kvtier_seq_info(w->s, &i), KVT_E_DAEMON);
	reconnect(w, 1);
	assert_int_equal(kvtier_seq_info(w->s, &i), KVT_E_STALE);
}

static void test_garbled_reply_ends_the_connection(void **state)
{
	struct world *w = *state;
	struct kvtier_seq_info i = {.size = sizeof(i)};

	atomic_store(&w->f->garble_type, W_SEQ_INFO);
	assert_int_equal(kvtier_seq_info(w->s, &i), KVT_E_PROTO);
	assert_int_equal(kvtier_seq_info(w->s, &i), KVT_E_DAEMON);
	reconnect(w, 1);
}

static int open_fds(void)
{
	int n = 0;

	for (int i = 0; i < 256; i++)
		n += fcntl(i, F_GETFD) >= 0;
	return n;
}

static void test_stray_fds_are_closed(void **state)
{
	struct world *w = *state;
	struct kvtier_seq_info i = {.size = sizeof(i)};
	int before = open_fds();

	atomic_store(&w->f->stray_type, W_SEQ_INFO);
	assert_int_equal(kvtier_seq_info(w->s, &i), KVT_E_PROTO);
	nap(50);
	assert_true(open_fds() <= before);
}

static void test_apply_then_daemon_dies(void **state)
{
	struct world *w = *state;
	struct kvtier_plan p = {.size = sizeof(p)};

	assert_int_equal(kvtier_seq_append(w->s, KVT_ALL_LAYERS, 0, 100), 0);
	publish_keep(w, 100, 10, PLAN_READY);
	assert_int_equal(kvtier_plan_peek(w->s, &p), 1);
	assert_int_equal(kvtier_plan_apply(w->s, &p), 0);
	fake_stop(w->f);
	kvtier_process(w->c);
	assert_int_equal(kvtier_plan_ack(w->s, p.id, NULL), KVT_E_DAEMON);
	assert_int_equal(kvtier_seq_resident(w->s, 0, NULL, 0), 10); /* as memory is */
}

static void test_fork_of_the_process(void **state)
{
	struct world *w = *state;
	struct kvtier_plan p = {.size = sizeof(p)};
	struct kvtier_stats s = {.size = sizeof(s)};
	pid_t pid;
	int st;

	fflush(NULL);
	pid = fork();
	if (!pid) {
		int bad = 0;

		bad |= kvtier_plan_peek(w->s, &p) != KVT_E_FORKED;
		bad |= kvtier_seq_append(w->s, KVT_ALL_LAYERS, 0, 1) != KVT_E_FORKED;
		bad |= kvtier_process(w->c) != KVT_E_FORKED;
		bad |= kvtier_event_fd(w->c) != KVT_E_FORKED;
		bad |= kvtier_stats(w->c, &s) != KVT_E_FORKED;
		bad |= kvtier_seq_drop(w->s) != KVT_E_FORKED;
		bad |= kvtier_plan_ack(w->s, 1, NULL) != KVT_E_FORKED;
		bad |= kvtier_region_create(w->c, 4096, &w->r) != KVT_E_FORKED;
		kvtier_seq_close(w->s);
		kvtier_close(w->c); /* frees the copy, tells nobody */
		_exit(bad);
	}
	assert_int_equal(waitpid(pid, &st, 0), pid);
	assert_int_equal(st, 0);
	assert_int_equal(kvtier_seq_append(w->s, KVT_ALL_LAYERS, 0, 1), 0);
	assert_int_equal(atomic_load(&w->f->seq_closes), 0);
	assert_int_equal(
		kvtier_seq_info(w->s, &(struct kvtier_seq_info){.size = sizeof(struct kvtier_seq_info)}), 0);
}

struct busy {
	struct kvtier *c;
	_Atomic int bad;
};

static void *call_often(void *arg)
{
	struct busy *b = arg;
	struct kvtier_region *r;

	for (int i = 0; i < 5; i++) {
		if (kvtier_region_create(b->c, 4096, &r))
			atomic_fetch_add(&b->bad, 1);
	}
	return NULL;
}

static void test_threads_share_a_connection(void **state)
{
	struct world *w = *state;
	struct busy b = {.c = w->c};
	pthread_t t[2];

	for (int i = 0; i < 2; i++)
		pthread_create(&t[i], NULL, call_often, &b);
	for (uint32_t i = 0; i < CAP; i++)
		assert_int_equal(kvtier_seq_append(w->s, KVT_ALL_LAYERS, i, 1), 0);
	for (int i = 0; i < 2; i++)
		pthread_join(t[i], NULL);
	assert_int_equal(atomic_load(&b.bad), 0);
}

#define WORLD(t) cmocka_unit_test_setup_teardown(t, setup, teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_open_refuses),
		cmocka_unit_test(test_newer_struct_is_accepted),
		cmocka_unit_test(test_hello_refused),
		cmocka_unit_test(test_daemon_comes_late),
		WORLD(test_refusals_carry_the_daemons_line),
		WORLD(test_import),
		WORLD(test_import_unmapped),
		WORLD(test_bad_arguments),
		cmocka_unit_test(test_import_unknown_to_daemon),
		cmocka_unit_test(test_timeout_and_late_reply),
		cmocka_unit_test(test_truncate_in_doubt),
		WORLD(test_append),
		WORLD(test_hints_wake_a_sleeping_daemon_only),
		WORLD(test_truncate),
		WORLD(test_plan_life),
		WORLD(test_plan_that_does_not_fit_is_refused),
		WORLD(test_wait_wakes_every_waiter),
		WORLD(test_event_fd),
		WORLD(test_sequence_ended_by_daemon),
		WORLD(test_budget_on_the_wire),
		WORLD(test_fork),
		WORLD(test_resume_starts_empty),
		WORLD(test_ephemeral_key_is_made),
		WORLD(test_daemon_restart),
		WORLD(test_wait_sees_the_daemon_die),
		WORLD(test_hangup_in_a_call),
		WORLD(test_garbled_reply_ends_the_connection),
		WORLD(test_stray_fds_are_closed),
		WORLD(test_apply_then_daemon_dies),
		WORLD(test_fork_of_the_process),
		WORLD(test_threads_share_a_connection),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
