/* SPDX-License-Identifier: MIT */
/*
 * The recorder: what comes in is what is in the files, samples are picked evenly,
 * and nothing that happens to the disk reaches the runtime. pwrite() is this
 * test's own, so that a disk can hang, fill up and break.
 */
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <cmocka.h>
#include "ipc/kvtier.h"
#include "policy/trace.h"
#include "shm/util.h"
#include "tests/unit/trace_fixture.h"

/* ---- a disk that misbehaves --------------------------------------------------- */

static _Atomic int disk_hangs, disk_errno, disk_writes;

ssize_t pwrite(int fd, const void *buf, size_t n, off_t off);
ssize_t pwrite(int fd, const void *buf, size_t n, off_t off)
{
	atomic_fetch_add(&disk_writes, 1);
	while (atomic_load(&disk_hangs))
		usleep(1000);
	if (atomic_load(&disk_errno)) {
		errno = atomic_load(&disk_errno);
		return -1;
	}
	return syscall(SYS_pwrite64, fd, buf, n, off);
}

static _Atomic int lines;
static char last_line[1024];

static void note(void *arg, int level, const char *line)
{
	snprintf(last_line, sizeof(last_line), "%s", line);
	atomic_fetch_add(&lines, 1);
}

/* ---- a model, and rows that say where they belong ----------------------------- */

enum { L = 2, H = 2, G = 3, KD = 4, VD = 3, T = 700 };

static struct kvtier_trace_model model(void)
{
	return (struct kvtier_trace_model){.size = sizeof(struct kvtier_trace_model),
					   .name = "made-up",
					   .layers = L,
					   .heads = H,
					   .group = G,
					   .k_dim = KD,
					   .v_dim = VD,
					   .dtype = KVT_DTYPE_F32,
					   .rope = KVT_ROPE_HALF,
					   .post_rope = 1,
					   .rope_theta = 1e4f};
}

static float value(uint32_t seq, int kind, uint32_t layer, uint32_t head, uint32_t row, uint32_t d)
{
	return (float)((((seq * 10 + (uint32_t)kind) * L + layer) * 16 + head) * 8 + d) + (float)row / 1024;
}

/* Rows as a runtime has them, [row][head][element] with some bytes between, for rows [pos, pos + n). */
static int feed(struct kvtier_trace_seq *s, uint32_t seq, uint32_t layer, uint32_t pos, uint32_t n)
{
	enum { GAP = 2 };
	_cleanup_free_ float *k = malloc(n * (H * KD + GAP) * 4 + 1), *v = malloc(n * (H * VD + GAP) * 4 + 1),
			     *q = malloc(n * (H * G * KD + GAP) * 4 + 1);
	struct kvtier_trace_span r = {
		.size = sizeof(r), .layer = layer, .pos = pos, .n = n, .k = k, .v = v, .q = q};

	r.k_head = r.q_head = KD * 4;
	r.v_head = VD * 4;
	r.k_row = (H * KD + GAP) * 4;
	r.v_row = (H * VD + GAP) * 4;
	r.q_row = (H * G * KD + GAP) * 4;
	for (uint32_t i = 0; i < n; i++)
		for (uint32_t h = 0; h < H * G; h++)
			for (uint32_t d = 0; d < KD; d++) {
				q[i * (H * G * KD + GAP) + h * KD + d] = value(seq, 2, layer, h, pos + i, d);
				if (h < H)
					k[i * (H * KD + GAP) + h * KD + d] =
						value(seq, 0, layer, h, pos + i, d);
				if (h < H && d < VD)
					v[i * (H * VD + GAP) + h * VD + d] =
						value(seq, 1, layer, h, pos + i, d);
			}
	return kvtier_trace_rows(s, &r);
}

static struct kvtier_trace *recorder(const struct kvtier_trace_opts *more)
{
	struct kvtier_trace_opts o = *more;
	struct kvtier_trace *t = NULL;

	o.size = sizeof(o);
	o.dir = fx_dir;
	o.log = note;
	if (kvtier_trace_open(&o, &t))
		fail_msg("%s", kvtier_last_error());
	return t;
}
#define RECORDER(...) recorder(&(struct kvtier_trace_opts){__VA_ARGS__})

static struct kvtier_trace_seq *begin(struct kvtier_trace *t)
{
	struct kvtier_trace_model m = model();
	struct kvtier_trace_seq *s = NULL;
	int r = kvtier_trace_begin(t, &m, NULL, &s);

	if (r < 0)
		fail_msg("%s", kvtier_last_error());
	assert_int_equal(r, s ? 0 : KVT_AGAIN);
	return s;
}

/* A sequence of n rows in steps, all layers in turn. */
static int play(struct kvtier_trace_seq *s, uint32_t seq, uint32_t n, uint32_t step)
{
	uint32_t tokens[T];
	int r = 0;

	for (uint32_t i = 0; i < n; i++)
		tokens[i] = seq * 1000 + i;
	for (uint32_t pos = 0; pos < n && r == 0; pos += step) {
		uint32_t some = MIN(step, n - pos);

		r = kvtier_trace_tokens(s, pos, tokens + pos, some);
		for (uint32_t layer = 0; layer < L && r == 0; layer++)
			r = feed(s, seq, layer, pos, some);
	}
	return r;
}

static struct kvtier_trace_stats stats(struct kvtier_trace *t)
{
	struct kvtier_trace_stats v = {.size = sizeof(v)};

	assert_int_equal(kvtier_trace_stats(t, &v), 0);
	return v;
}

/* Wait until the thread has given the buffer back. */
static void settle(struct kvtier_trace *t)
{
	for (int i = 0; i < 5000 && stats(t).buffered; i++)
		usleep(1000);
	assert_int_equal(stats(t).buffered, 0);
}

/* The only file in the folder, or the one with this source. */
static struct trace *find(const char *source)
{
	DIR *d = opendir(fx_dir);
	struct trace *t = NULL;
	char err[512];

	for (struct dirent *e; !t && (e = readdir(d));) {
		if (!strstr(e->d_name, ".kvtr"))
			continue;
		if (trace_open(&t, fx_path(e->d_name), err, sizeof(err)) < 0)
			fail_msg("%s", err);
		if (source && strcmp(t->h.source, source) != 0) {
			trace_free(t);
			t = NULL;
		}
	}
	closedir(d);
	assert_non_null(t);
	assert_int_equal(trace_verify(t, err, sizeof(err)), 0);
	return t;
}

static void check_rows(const struct trace *t, uint32_t seq, uint32_t n)
{
	_cleanup_free_ float *x = malloc((size_t)n * G * KD * 4);
	char err[512];

	assert_int_equal(t->h.rows, n);
	for (uint32_t lane = 0; lane < L * H; lane++) {
		uint32_t l = lane / H, h = lane % H;

		assert_int_equal(trace_read(t, TRACE_K, lane, 0, x, err, sizeof(err)), 0);
		for (uint32_t i = 0; i < n * KD; i++)
			assert_true(x[i] == value(seq, 0, l, h, i / KD, i % KD));
		assert_int_equal(trace_read(t, TRACE_V, lane, 0, x, err, sizeof(err)), 0);
		for (uint32_t i = 0; i < n * VD; i++)
			assert_true(x[i] == value(seq, 1, l, h, i / VD, i % VD));
		assert_int_equal(trace_read(t, TRACE_Q, lane, 0, x, err, sizeof(err)), 0);
		for (uint32_t i = 0; i < G * n * KD; i++)
			assert_true(x[i] == value(seq, 2, l, h * G + i / (n * KD), i / KD % n, i % KD));
	}
	assert_int_equal(trace_read(t, TRACE_TOKENS, 0, 0, x, err, sizeof(err)), 0);
	for (uint32_t i = 0; i < n; i++)
		assert_int_equal(((uint32_t *)x)[i], seq * 1000 + i);
}

/* ---- recording ------------------------------------------------------------------ */

static void test_round_trip(void **state)
{
	struct kvtier_trace_cut cuts[] = {{.prompt = 500, .queries = 200, .context = 3},
					  {.prompt = 10, .queries = 5, .flags = KVT_CUT_BEFORE}};
	struct kvtier_trace *t = RECORDER(.domain = "chat");
	struct kvtier_trace_seq *s = begin(t);
	struct trace *f;

	assert_int_equal(play(s, 1, T, 37), 0); /* blocks have 256 rows */
	assert_int_equal(kvtier_trace_end(s, cuts, 2), 0);
	assert_int_equal(kvtier_trace_flush(t, 10000), 0);
	assert_int_equal(fx_count(), 1);
	f = find(NULL);
	check_rows(f, 1, T);
	assert_string_equal(f->h.model, "made-up");
	assert_string_equal(f->h.domain, "chat");
	assert_memory_equal(f->h.source, "rec-20", 6); /* the file's own name: a document of its own */
	assert_int_equal(f->h.rope_type, TRACE_ROPE_HALF);
	assert_int_equal(f->h.keys, TRACE_KEYS_CACHED);
	assert_int_equal(f->h.cuts, 2);
	assert_int_equal(f->cut[0].prompt, 500);
	assert_int_equal(f->cut[0].context, 3);
	assert_int_equal(f->cut[1].flags, TRACE_CUT_BEFORE);
	assert_int_equal(stats(t).recorded, 1);
	assert_int_equal(stats(t).bytes, f->h.file_size);
	assert_int_equal(stats(t).dropped, 0);
	settle(t);
	trace_free(f);
	kvtier_trace_close(t);
	assert_int_equal(lines, 0);
}

static void test_short_layers(void **state)
{
	struct kvtier_trace *t = RECORDER(.source = "a page");
	struct kvtier_trace_seq *s = begin(t);
	struct trace *f;

	assert_int_equal(play(s, 2, 30, 30), 0);
	assert_int_equal(feed(s, 2, 0, 30, 4), 0); /* a forward pass that was cut off */
	assert_int_equal(kvtier_trace_end(s, NULL, 0), 0);
	s = begin(t);
	assert_int_equal(feed(s, 3, 0, 0, 8), 0);
	assert_int_equal(kvtier_trace_end(s, NULL, 0), KVT_AGAIN); /* no row is whole */
	assert_int_equal(kvtier_trace_flush(t, 10000), 0);
	f = find("a page");
	check_rows(f, 2, 30);
	trace_free(f);
	assert_int_equal(fx_count(), 1);
	assert_int_equal(stats(t).dropped, 1);
	kvtier_trace_close(t);
}

static void test_no_tokens_no_values(void **state)
{
	struct kvtier_trace *t = RECORDER();
	struct kvtier_trace_model m = model();
	struct kvtier_trace_seq *s;
	uint16_t k[9 * H * KD] = {0}, q[9 * H * G * KD] = {0};
	struct kvtier_trace_span r = {.size = sizeof(r),
				      .n = 9,
				      .k = k,
				      .q = q,
				      .k_row = KD * 2,
				      .q_row = KD * 2,
				      .k_head = 9 * KD * 2,
				      .q_head = 9 * KD * 2};
	struct trace *f;

	m.v_dim = 0;
	m.layers = 1;
	m.dtype = KVT_DTYPE_F16;
	m.post_rope = 0;
	assert_int_equal(kvtier_trace_begin(t, &m, "latent", &s), 0);
	for (size_t i = 0; i < ARRAY_SIZE(k); i++)
		k[i] = (uint16_t)i;
	assert_int_equal(kvtier_trace_rows(s, &r), 0);
	assert_int_equal(kvtier_trace_tokens(s, 0, (uint32_t[]){1, 2}, 2), 0); /* not one for each row */
	assert_int_equal(kvtier_trace_end(s, NULL, 0), 0);
	assert_int_equal(kvtier_trace_flush(t, 10000), 0);
	f = find("latent");
	assert_int_equal(f->h.chunks, 2 * H);
	assert_int_equal(f->h.keys, TRACE_KEYS_UNROTATED);
	assert_int_equal(trace_read(f, TRACE_K, 1, 0, q, last_line, sizeof(last_line)), 0);
	assert_memory_equal(q, k + 9 * KD, 9 * KD * 2);
	trace_free(f);
	kvtier_trace_close(t);
}

static void test_sampling(void **state)
{
	struct kvtier_trace *t = RECORDER(.every_n = 4);
	int run = 0, longest = 0, places[4] = {0};

	for (int i = 0; i < 4000; i++) {
		struct kvtier_trace_seq *s = begin(t);

		run = s ? 0 : run + 1;
		longest = MAX(longest, run);
		places[i % 4] += s != NULL;
		kvtier_trace_discard(s);
	}
	assert_int_equal(stats(t).seen, 4000);
	assert_int_equal(stats(t).picked, 1000);
	assert_int_equal(places[0] + places[1] + places[2] + places[3], 1000);
	assert_true(longest > 3 && longest <= 6);
	for (int i = 0; i < 4; i++)
		assert_in_range(places[i], 100, 500);
	settle(t);
	assert_int_equal(fx_count(), 0);
	kvtier_trace_close(t);
}

static void test_off(void **state)
{
	struct kvtier_trace *t = (void *)1;
	struct kvtier_trace_seq *s = (void *)1;
	struct kvtier_trace_model m = model();

	unsetenv("KVTIER_TRACE_DIR");
	assert_int_equal(kvtier_trace_open(NULL, &t), KVT_AGAIN);
	assert_null(t);
	/* a runtime need not ask */
	assert_int_equal(kvtier_trace_begin(t, &m, NULL, &s), KVT_AGAIN);
	assert_null(s);
	assert_int_equal(play(s, 1, 10, 10), KVT_AGAIN);
	assert_int_equal(kvtier_trace_end(s, NULL, 0), KVT_AGAIN);
	kvtier_trace_discard(s);
	assert_int_equal(kvtier_trace_flush(t, 0), 0);
	assert_int_equal(stats(t).seen, 0);
	kvtier_trace_close(t);
	setenv("KVTIER_TRACE_DIR", fx_dir, 1);
	assert_int_equal(kvtier_trace_open(NULL, &t), 0);
	s = begin(t);
	assert_int_equal(play(s, 5, 10, 10), 0);
	assert_int_equal(kvtier_trace_end(s, NULL, 0), 0);
	assert_int_equal(kvtier_trace_flush(t, 10000), 0);
	assert_int_equal(fx_count(), 1);
	kvtier_trace_close(t);
	unsetenv("KVTIER_TRACE_DIR");
}

/* ---- what runtimes get wrong ------------------------------------------------------ */

static void says(int r, int code, const char *words)
{
	assert_int_equal(r, code);
	if (!strstr(kvtier_last_error(), words))
		fail_msg("%s does not say %s", kvtier_last_error(), words);
}

static void test_bad_arguments(void **state)
{
	struct kvtier_trace_opts o = {.size = sizeof(o), .dir = fx_path("none")};
	struct kvtier_trace_cut cut = {.prompt = 5, .queries = 6};
	struct kvtier_trace_span none = {.size = sizeof(none), .n = 1};
	struct kvtier_trace_model m = model();
	struct kvtier_trace *t = NULL;
	struct kvtier_trace_seq *s;
	char text[200];

	memset(text, 'x', sizeof(text) - 1);
	text[sizeof(text) - 1] = 0;
	says(kvtier_trace_open(&o, &t), KVT_E_IO, "none: No such file");
	fx_spill(fx_path("none"), "", 0);
	says(kvtier_trace_open(&o, &t), KVT_E_INVAL, "must be a folder");
	unlink(fx_path("none"));
	o.source = text;
	says(kvtier_trace_open(&o, &t), KVT_E_INVAL, "source: 199 bytes, must be at most 95");
	o.size = 3;
	says(kvtier_trace_open(&o, &t), KVT_E_INVAL, "size");
	assert_null(t);
	t = RECORDER();
	m.dtype = KVT_DTYPE_OPAQUE;
	says(kvtier_trace_begin(t, &m, NULL, &s), KVT_E_INVAL, "dtype: 0, must be 1..3");
	assert_null(s);
	m = model();
	m.heads = 600;
	says(kvtier_trace_begin(t, &m, NULL, &s), KVT_E_INVAL, "lanes, must be at most 1024");
	m = model();
	m.name = text;
	says(kvtier_trace_begin(t, &m, NULL, &s), KVT_E_INVAL, "name");
	m.name = "m";
	says(kvtier_trace_begin(t, &m, "a\nb", &s), KVT_E_INVAL, "source: byte 0x0a");
	s = begin(t);
	assert_int_equal(feed(s, 1, 0, 0, 4), 0);
	says(feed(s, 1, 0, 5, 1), KVT_E_INVAL, "pos: 5, must be layer 0's length 4");
	assert_int_equal(feed(s, 1, 0, 4, 1), KVT_AGAIN);
	assert_int_equal(kvtier_trace_end(s, NULL, 0), KVT_AGAIN);
	s = begin(t);
	says(feed(s, 1, L, 0, 4), KVT_E_INVAL, "layer: 2, must be below 2");
	kvtier_trace_discard(s);
	s = begin(t);
	says(kvtier_trace_rows(s, &none), KVT_E_INVAL, "k: NULL");
	kvtier_trace_discard(s);
	s = begin(t);
	none.n = UINT32_MAX;
	says(kvtier_trace_rows(s, &none), KVT_E_INVAL, "n: 4294967295, must be at most 1048576");
	kvtier_trace_discard(s);
	s = begin(t);
	says(kvtier_trace_tokens(s, 1, (uint32_t[]){1}, 1), KVT_E_INVAL, "pos: 1");
	kvtier_trace_discard(s);
	s = begin(t);
	assert_int_equal(play(s, 1, 10, 10), 0);
	says(kvtier_trace_end(s, &cut, 1), KVT_E_INVAL, "cut 0: queries: 6, must be 1..5");
	s = begin(t);
	assert_int_equal(play(s, 1, 10, 10), 0);
	cut = (struct kvtier_trace_cut){.prompt = 5, .queries = 5, .flags = 2};
	says(kvtier_trace_end(s, &cut, 1), KVT_E_INVAL, "flags: 0x2");
	assert_int_equal(kvtier_trace_flush(t, 10000), 0);
	assert_int_equal(stats(t).picked, stats(t).dropped);
	settle(t);
	assert_int_equal(fx_count(), 0);
	kvtier_trace_close(t);
}

static void test_fork(void **state)
{
	struct kvtier_trace *t = RECORDER();
	struct kvtier_trace_seq *s = begin(t);
	int status, ok;
	pid_t pid;

	assert_int_equal(play(s, 4, 20, 20), 0);
	pid = fork();
	if (pid == 0) {
		struct kvtier_trace_model m = model();
		struct kvtier_trace_seq *mine;

		ok = feed(s, 4, 0, 20, 1) == KVT_E_FORKED &&
		     kvtier_trace_begin(t, &m, NULL, &mine) == KVT_E_FORKED &&
		     kvtier_trace_flush(t, 0) == KVT_E_FORKED && kvtier_trace_end(s, NULL, 0) == KVT_E_FORKED;
		kvtier_trace_close(t);
		_exit(ok ? 0 : 1);
	}
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_int_equal(status, 0);
	assert_int_equal(kvtier_trace_end(s, NULL, 0), 0);
	assert_int_equal(kvtier_trace_flush(t, 10000), 0);
	assert_int_equal(fx_count(), 1);
	kvtier_trace_close(t);
}

static void test_close_first(void **state)
{
	struct kvtier_trace *t = RECORDER();
	struct kvtier_trace_seq *a = begin(t), *b = begin(t), *c = begin(t);

	assert_int_equal(play(a, 1, 20, 20), 0);
	assert_int_equal(play(b, 1, 20, 20), 0);
	kvtier_trace_close(t);
	assert_int_equal(feed(a, 1, 0, 20, 1), KVT_AGAIN);
	assert_int_equal(kvtier_trace_end(a, NULL, 0), KVT_AGAIN);
	assert_int_equal(kvtier_trace_end(b, NULL, 0), KVT_AGAIN);
	kvtier_trace_discard(c);
}

/* ---- full and broken ---------------------------------------------------------------- */

static void test_buffer_full(void **state)
{
	/* a block of 256 rows has 256 * L * H * (KD + VD + G * KD) * 4 bytes: room for one, not for two */
	struct kvtier_trace *t = RECORDER(.buffer_bytes = 256 * L * H * (KD + VD + G * KD) * 4 + 8192);
	struct kvtier_trace_seq *s = begin(t);

	assert_int_equal(play(s, 1, T, 100), KVT_AGAIN);
	assert_int_equal(stats(t).dropped, 1);
	settle(t); /* at once, and not when the runtime is through with it */
	assert_int_equal(feed(s, 1, 0, 0, 1), KVT_AGAIN);
	assert_int_equal(kvtier_trace_end(s, NULL, 0), KVT_AGAIN);
	s = begin(t);
	assert_int_equal(play(s, 7, 200, 100), 0);
	assert_int_equal(kvtier_trace_end(s, NULL, 0), 0);
	assert_int_equal(kvtier_trace_flush(t, 10000), 0);
	assert_int_equal(stats(t).recorded, 1);
	assert_int_equal(stats(t).dropped, 1);
	assert_int_equal(lines, 0);
	kvtier_trace_close(t);
}

/* Memory that was used stays for the next sequence; a model of another shape takes its place. */
static void test_two_models(void **state)
{
	struct kvtier_trace *t = RECORDER(.buffer_bytes = 256 * L * H * (KD + VD + G * KD) * 4 + 8192);
	struct kvtier_trace_model m = model();
	float x[16] = {0};
	struct kvtier_trace_span r = {.size = sizeof(r), .n = 1, .k = x, .v = x, .q = x};

	for (int i = 0; i < 6; i++) {
		struct kvtier_trace_seq *s;

		m.layers = i % 2 ? 1 : L;
		m.heads = i % 2 ? 3 : H;
		assert_int_equal(kvtier_trace_begin(t, &m, NULL, &s), 0);
		for (r.layer = 0; r.layer < m.layers; r.layer++)
			assert_int_equal(kvtier_trace_rows(s, &r), 0);
		assert_int_equal(kvtier_trace_end(s, NULL, 0), 0);
		assert_int_equal(kvtier_trace_flush(t, 10000), 0);
		settle(t);
	}
	assert_int_equal(stats(t).recorded, 6);
	kvtier_trace_close(t);
}

/* Nothing below returns late when no write ever does: the alarm would end the test. */
static void test_disk_hangs(void **state)
{
	struct kvtier_trace *t = RECORDER(.buffer_bytes = 1 << 20);
	int dropped = 0;

	alarm(60);
	atomic_store(&disk_hangs, 1);
	for (int i = 0; i < 50; i++) {
		struct kvtier_trace_seq *s = begin(t);

		assert_non_null(s);
		play(s, 1, 256, 64);
		dropped += kvtier_trace_end(s, NULL, 0) == KVT_AGAIN;
	}
	assert_true(dropped >= 35);
	assert_true(stats(t).buffered <= 1 << 20);
	assert_int_equal(stats(t).recorded, 0);
	assert_int_equal(kvtier_trace_flush(t, 20), KVT_E_TIMEOUT);
	/* a slow disk that comes back: everything that was taken is written */
	atomic_store(&disk_hangs, 0);
	assert_int_equal(kvtier_trace_flush(t, 10000), 0);
	assert_int_equal(stats(t).recorded + stats(t).dropped, 50);
	assert_int_equal(fx_count(), stats(t).recorded);
	assert_true(stats(t).recorded > 0);
	/* and one that does not: close does not wait */
	atomic_store(&disk_writes, 0);
	atomic_store(&disk_hangs, 1);
	for (int i = 0; i < 3; i++) {
		struct kvtier_trace_seq *s = begin(t);

		play(s, 1, 20, 20);
		assert_int_equal(kvtier_trace_end(s, NULL, 0), 0);
	}
	while (!atomic_load(&disk_writes))
		usleep(1000);
	dropped = fx_count();
	kvtier_trace_close(t);
	atomic_store(&disk_hangs, 0);
	while (fx_count() == dropped) /* its thread removes what it had begun */
		usleep(1000);
	alarm(0);
	usleep(20000);
	assert_int_equal(lines, 0);
}

static void ended(struct kvtier_trace *t, int code, const char *words)
{
	struct kvtier_trace_seq *s = begin(t);
	uint64_t seen = stats(t).seen, recorded = stats(t).recorded;
	int files;

	assert_int_equal(play(s, 1, 100, 50), 0);
	assert_int_equal(kvtier_trace_end(s, NULL, 0), 0);
	assert_int_equal(kvtier_trace_flush(t, 10000), code);
	assert_int_equal(stats(t).ended, code);
	assert_int_equal(stats(t).recorded, recorded);
	assert_int_equal(lines, 1);
	if (!strstr(last_line, words))
		fail_msg("%s does not say %s", last_line, words);
	/* the disk is well again, but the recording has ended, and the runtime goes on as before */
	atomic_store(&disk_errno, 0);
	files = fx_count();
	for (int i = 0; i < 10; i++)
		assert_null(begin(t));
	settle(t);
	assert_int_equal(stats(t).seen, seen + 10);
	assert_int_equal(stats(t).picked, stats(t).recorded + stats(t).dropped);
	assert_int_equal(fx_count(), files);
	assert_int_equal(lines, 1);
}

static void test_disk_errors(void **state)
{
	static const struct {
		int err, code;
		const char *words;
	} cases[] = {{ENOSPC, KVT_E_NOSPC, "No space left on device"},
		     {EDQUOT, KVT_E_NOSPC, "Disk quota exceeded"},
		     {EIO, KVT_E_IO, "Input/output error"}};

	for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
		struct kvtier_trace *t = RECORDER();

		atomic_store(&lines, 0);
		atomic_store(&disk_errno, cases[i].err);
		ended(t, cases[i].code, cases[i].words);
		assert_int_equal(fx_count(), 0);
		kvtier_trace_close(t);
	}
}

static void test_full_file_system(void **state)
{
	struct kvtier_trace_seq *s;
	struct kvtier_trace *t;

	if (unshare(CLONE_NEWNS) < 0 || mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 ||
	    mount("kvtier-test", fx_dir, "tmpfs", 0, "size=48k") < 0) {
		print_message("# SKIP mounting a small file system is not permitted: %s\n", strerror(errno));
		skip();
	}
	t = RECORDER();
	s = begin(t); /* 100 rows need 31 KB: one file fits */
	assert_int_equal(play(s, 1, 100, 50), 0);
	assert_int_equal(kvtier_trace_end(s, NULL, 0), 0);
	assert_int_equal(kvtier_trace_flush(t, 10000), 0);
	ended(t, KVT_E_NOSPC, "No space left on device");
	assert_int_equal(fx_count(), 1);
	trace_free(find(NULL));
	kvtier_trace_close(t);
}

static void test_folder_bound(void **state)
{
	struct kvtier_trace *t;
	static char others[50000];

	fx_spill(fx_path("of-others"), others, sizeof(others));
	t = RECORDER(.max_bytes = 120000); /* 100 rows need 31 KB: two files fit */
	for (int i = 0; i < 2; i++) {
		struct kvtier_trace_seq *s = begin(t);

		play(s, 1, 100, 50);
		assert_int_equal(kvtier_trace_end(s, NULL, 0), 0);
	}
	assert_int_equal(kvtier_trace_flush(t, 10000), 0);
	ended(t, KVT_E_LIMIT, "max_bytes is 120000");
	assert_int_equal(fx_count(), 3);
	assert_true(stats(t).bytes < 70000);
	kvtier_trace_close(t);
}

static void test_folder_gone(void **state)
{
	struct kvtier_trace *t = RECORDER();
	struct kvtier_trace_seq *s = begin(t);

	assert_int_equal(rmdir(fx_dir), 0);
	assert_int_equal(play(s, 1, 10, 10), 0);
	assert_int_equal(kvtier_trace_end(s, NULL, 0), 0);
	assert_int_equal(kvtier_trace_flush(t, 10000), KVT_E_IO);
	assert_int_equal(lines, 1);
	assert_non_null(strstr(last_line, fx_dir));
	kvtier_trace_close(t);
}

/* ---- threads -------------------------------------------------------------------------- */

enum { THREADS = 4, EACH = 5 };

struct job {
	struct kvtier_trace *t;
	uint32_t id;
};

static void *runtime(void *arg)
{
	const struct job *j = arg;

	for (uint32_t i = 0; i < EACH; i++) {
		struct kvtier_trace_model m = model();
		struct kvtier_trace_seq *s = NULL;
		uint32_t seq = j->id * EACH + i;
		char name[32];

		snprintf(name, sizeof(name), "seq %u", seq);
		if (kvtier_trace_begin(j->t, &m, name, &s) || play(s, seq, 100 + seq, 30) ||
		    kvtier_trace_end(s, NULL, 0))
			return "failed";
	}
	return NULL;
}

static void test_threads(void **state)
{
	struct kvtier_trace *t = RECORDER();
	pthread_t thread[THREADS];
	struct job job[THREADS];
	char name[32];

	for (uint32_t i = 0; i < THREADS; i++) {
		job[i] = (struct job){t, i};
		assert_int_equal(pthread_create(&thread[i], NULL, runtime, &job[i]), 0);
	}
	for (uint32_t i = 0; i < THREADS; i++) {
		void *r;

		pthread_join(thread[i], &r);
		assert_null(r);
	}
	assert_int_equal(kvtier_trace_flush(t, 20000), 0);
	assert_int_equal(stats(t).recorded, THREADS * EACH);
	for (uint32_t seq = 0; seq < THREADS * EACH; seq++) {
		struct trace *f;

		snprintf(name, sizeof(name), "seq %u", seq);
		f = find(name);
		check_rows(f, seq, 100 + seq);
		trace_free(f);
	}
	kvtier_trace_close(t);
}

static int each(void **state)
{
	atomic_store(&lines, 0);
	atomic_store(&disk_errno, 0);
	atomic_store(&disk_hangs, 0);
	return fx_setup(state);
}

static int unmounted(void **state)
{
	umount2(fx_dir, MNT_DETACH);
	return fx_teardown(state);
}

/* Within one second two recorders of a process name their files apart. */
static void test_two_recorders(void **state)
{
	for (int i = 0; i < 2; i++) {
		struct kvtier_trace *t = RECORDER();
		struct kvtier_trace_seq *s = begin(t);

		assert_int_equal(play(s, 1, 100, 50), 0);
		assert_int_equal(kvtier_trace_end(s, NULL, 0), 0);
		assert_int_equal(kvtier_trace_flush(t, 10000), 0);
		kvtier_trace_close(t);
	}
	assert_int_equal(fx_count(), 2);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, each, fx_teardown)
	const struct CMUnitTest tests[] = {
		TEST(test_round_trip),
		TEST(test_short_layers),
		TEST(test_no_tokens_no_values),
		TEST(test_sampling),
		TEST(test_off),
		TEST(test_bad_arguments),
		TEST(test_fork),
		TEST(test_close_first),
		TEST(test_buffer_full),
		TEST(test_disk_hangs),
		TEST(test_two_recorders),
		TEST(test_disk_errors),
		TEST(test_folder_bound),
		TEST(test_folder_gone),
		TEST(test_two_models),
		TEST(test_threads),
		cmocka_unit_test_setup_teardown(test_full_file_system, each, unmounted),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
