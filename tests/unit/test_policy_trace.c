/* SPDX-License-Identifier: MIT */
/* Reading traces: what was written comes back, nothing damaged or hostile is believed, and lists of splits. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <math.h>
#include <cmocka.h>
#include "policy/trace.h"
#include "shm/crc.h"
#include "shm/util.h"
#include "tests/unit/trace_fixture.h"

static char err[1024];

static struct trace *open_good(const char *path)
{
	struct trace *t;

	if (trace_open(&t, path, err, sizeof(err)) < 0)
		fail_msg("%s", err);
	return t;
}

static void test_round_trip(void **state)
{
	_cleanup_free_ float *buf = malloc(sizeof(fx_q));
	struct trace_view v;
	struct trace *t;

	fx_write(fx_path("a.kvtr"));
	t = open_good(fx_path("a.kvtr"));
	assert_string_equal(t->h.model, "made-up");
	assert_int_equal(t->h.cuts, FX_CUTS);
	assert_memory_equal(t->cut, fx_cuts, sizeof(fx_cuts));
	assert_int_equal(trace_read(t, TRACE_TOKENS, 0, 0, buf, err, sizeof(err)), 0);
	assert_memory_equal(buf, fx_tokens, sizeof(fx_tokens));
	for (uint32_t l = 0; l < FX_LANES; l++) {
		assert_int_equal(trace_read(t, TRACE_Q, l, 0, buf, err, sizeof(err)), 0);
		assert_memory_equal(buf, fx_q[l], sizeof(fx_q[l]));
		assert_int_equal(trace_map(t, TRACE_V, l, 0, &v, err, sizeof(err)), 0);
		assert_int_equal(v.bytes, sizeof(fx_v[l]));
		assert_memory_equal(v.data, fx_v[l], sizeof(fx_v[l]));
		trace_unmap(&v);
		assert_null(v.map);
		trace_unmap(&v);
		for (uint32_t c = 0; c < FX_CUTS; c++) {
			assert_int_equal(trace_read(t, TRACE_UMEAN, l, c, buf, err, sizeof(err)), 0);
			assert_memory_equal(buf, fx_umean[c][l], 4 * fx_cuts[c].prompt);
		}
	}
	assert_int_equal(trace_read(t, TRACE_GRAM, 0, 0, buf, err, sizeof(err)), -ENOENT);
	assert_int_equal(trace_read(t, TRACE_K, FX_LANES, 0, buf, err, sizeof(err)), -ENOENT);
	assert_int_equal(trace_map(t, 99, 0, 0, &v, err, sizeof(err)), -ENOENT);
	assert_int_equal(trace_verify(t, err, sizeof(err)), 0);
	trace_free(t);
	trace_free(NULL);
}

/* A copy of the good file with `size` bytes, changed by the test; it must be refused by open (or verify). */
static void refused(const char *file, size_t size, int at_open, const char *words)
{
	const char *path = fx_path("bad.kvtr");
	struct trace *t;
	int r;

	fx_spill(path, file, size);
	err[0] = 0;
	r = trace_open(&t, path, err, sizeof(err));
	if (at_open || r < 0) {
		assert_int_equal(r, -EBADMSG);
	} else {
		assert_int_equal(trace_verify(t, err, sizeof(err)), -EBADMSG);
		trace_free(t);
	}
	if (strncmp(err, path, strlen(path)) != 0 || !strstr(err, "offset ") || !strstr(err, words))
		fail_msg("'%s' does not name path and offset and say '%s'", err, words);
}

static void test_every_byte_counts(void **state)
{
	size_t size;
	char *file, words[32];

	fx_write(fx_path("a.kvtr"));
	file = fx_slurp(fx_path("a.kvtr"), &size);
	for (size_t i = 0; i < size; i += i < 600 || i > size - 200 ? 1 : 13) {
		file[i] ^= 0x10;
		refused(file, size, i < 512, "");
		file[i] ^= 0x10;
	}
	/* padding: between the first cut's table and what follows it, the byte itself is named */
	file[512 + sizeof(fx_cuts) + 3] = 1;
	snprintf(words, sizeof(words), "offset %zu: 0x01", 512 + sizeof(fx_cuts) + 3);
	refused(file, size, 0, words);
	free(file);
}

static void test_short_files(void **state)
{
	size_t size;
	char *file;

	fx_write(fx_path("a.kvtr"));
	file = fx_slurp(fx_path("a.kvtr"), &size);
	for (size_t n = 0; n < size; n += n < 520 ? 8 : 997)
		refused(file, n, 1, n < 512 ? "file ends here" : "offset 16: file_size");
	file = realloc(file, size + 1);
	file[size] = 0;
	refused(file, size + 1, 1, "offset 16: file_size");
	free(file);
}

/* Hostile files: fields changed and every checksum right. */
static void reseal(char *file)
{
	struct trace_header *h = (void *)file;

	h->crc = 0;
	h->crc = crc32c(crc32c(0, h, sizeof(*h)), file + h->table_off, h->chunks * 32);
}

#define HOSTILE(change, words)                                                                                 \
	do {                                                                                                   \
		char *copy = malloc(size);                                                                     \
		struct trace_header *h = memcpy(copy, file, size);                                             \
		struct trace_chunk *c = (void *)(copy + h->table_off);                                         \
		struct trace_cut *cut = (void *)(copy + 512);                                                  \
		uint64_t table = h->table_off;                                                                 \
		uint32_t chunks = h->chunks;                                                                   \
		change;                                                                                        \
		c[0].crc = crc32c(0, cut, sizeof(fx_cuts));                                                    \
		if (h->table_off == table && h->chunks == chunks)                                              \
			reseal(copy);                                                                          \
		refused(copy, size, 1, words);                                                                 \
		free(copy);                                                                                    \
	} while (0)

static void test_hostile_tables(void **state)
{
	size_t size;
	char *file;

	fx_write(fx_path("a.kvtr"));
	file = fx_slurp(fx_path("a.kvtr"), &size);
	HOSTILE(h->version = 2, "offset 8: version: 2, must be 1");
	HOSTILE(h->header_size = 0, "offset 12: header_size");
	HOSTILE(h->chunks = 0, "offset 32: chunks: 0");
	HOSTILE(h->chunks = UINT32_MAX, "offset 32: chunks: 4294967295, must be 1..");
	HOSTILE(h->chunks--, "offset 24: table_off");
	HOSTILE(h->table_off += 32, "offset 24: table_off");
	HOSTILE(h->table_off = UINT64_MAX - 63, "offset 24: table_off");
	HOSTILE(h->table_off = 0, "offset 24: table_off");
	HOSTILE(h->group = 2, "bytes");
	HOSTILE(h->rows = TRACE_MAX_ROWS, "must be 4194304");
	HOSTILE(h->dtype = TRACE_BF16, "bytes");
	HOSTILE(h->cuts = 2, "cut: 2, must be below 2");
	HOSTILE(h->cuts = 64, "bytes");
	HOSTILE(h->cuts = 0, "must be below 0");
	HOSTILE(h->k_dim = 0, "k_dim");
	HOSTILE(c[2].kind = 0, "kind: 0, must be 1..9");
	HOSTILE(c[2].kind = 1u << 31, "kind");
	HOSTILE(c[2].kind = TRACE_GRAM, "must be 0");
	HOSTILE(c[2].kind = TRACE_CUTS, "bytes");
	HOSTILE(c[2].lane = FX_LANES, "lane: 4, must be below 4");
	HOSTILE(c[2].cut = 1, "cut: 1, must be below 1");
	HOSTILE(c[2].lane = 1, "a second Q of lane 1, cut 0");
	HOSTILE(c[2].off += 1, "off: ");
	HOSTILE(c[2].off = 0, "off: 0");
	HOSTILE(c[2].off = UINT64_MAX & ~63ull, "off: ");
	HOSTILE(c[2].off = h->table_off, "bytes: ");
	HOSTILE(c[2].bytes = UINT64_MAX, "bytes: ");
	HOSTILE(c[2].bytes -= 4, "bytes: ");
	HOSTILE(c[2].off -= 64, "overlaps");
	HOSTILE(c[3].off = c[2].off, "overlaps");
	HOSTILE(cut[0].prompt = 62, "offset 512: cut 0: prompt: 62");
	HOSTILE(cut[1].queries = 0, "offset 528: cut 1: queries: 0");
	HOSTILE(cut[1].prompt = 24, "bytes: 92, must be 96");
	HOSTILE(cut[2].flags = 0, "offset 544: cut 2: queries: 90");
	free(file);
}

static void test_no_hidden_bytes(void **state)
{
	size_t size;
	char *file, *copy;
	struct trace_header *h;
	struct trace_chunk *c;

	fx_write(fx_path("a.kvtr"));
	file = fx_slurp(fx_path("a.kvtr"), &size);
	/* 64 bytes that no chunk owns, before the table */
	copy = calloc(1, size + 64);
	h = memcpy(copy, file, ((struct trace_header *)file)->table_off);
	memcpy(copy + h->table_off + 64, file + h->table_off, h->chunks * 32);
	h->table_off += 64;
	h->file_size += 64;
	reseal(copy);
	refused(copy, size + 64, 1, "the table begins here");
	free(copy);
	/* a cut table that is missing */
	h = (void *)file;
	c = (void *)(file + h->table_off);
	c[0].kind = TRACE_TOKENS;
	reseal(file);
	refused(file, size, 1, "no CUTS chunk");
	free(file);
}

static void test_one_lane_alone(void **state)
{
	float got[FX_ROWS * FX_K];
	struct trace_view v;
	struct trace *t;
	char words[40];
	uint64_t off;
	int fd;

	fx_write(fx_path("a.kvtr"));
	t = open_good(fx_path("a.kvtr"));
	off = trace_find(t, TRACE_K, 1, 0)->off + 17;
	trace_free(t);
	fd = open(fx_path("a.kvtr"), O_WRONLY);
	assert_int_equal(pwrite(fd, "\xa5", 1, (off_t)off), 1);
	close(fd);
	t = open_good(fx_path("a.kvtr")); /* no chunk is looked at */
	assert_int_equal(trace_read(t, TRACE_K, 0, 0, got, err, sizeof(err)), 0);
	assert_memory_equal(got, fx_k[0], sizeof(got));
	assert_int_equal(trace_map(t, TRACE_K, 2, 0, &v, err, sizeof(err)), 0);
	assert_true(v.map_bytes < 3 * 4096);
	assert_memory_equal(v.data, fx_k[2], sizeof(fx_k[2]));
	trace_unmap(&v);
	snprintf(words, sizeof(words), "offset %llu: K of lane 1", (unsigned long long)off - 17);
	assert_int_equal(trace_read(t, TRACE_K, 1, 0, got, err, sizeof(err)), -EBADMSG);
	assert_non_null(strstr(err, words));
	assert_int_equal(trace_map(t, TRACE_K, 1, 0, &v, err, sizeof(err)), -EBADMSG);
	assert_non_null(strstr(err, words));
	assert_int_equal(trace_verify(t, err, sizeof(err)), -EBADMSG);
	assert_non_null(strstr(err, words));
	trace_free(t);
}

static void test_cut_short_while_open(void **state)
{
	float got[FX_ROWS * FX_K];
	struct trace *t;

	fx_write(fx_path("a.kvtr"));
	t = open_good(fx_path("a.kvtr"));
	assert_int_equal(truncate(fx_path("a.kvtr"), 2000), 0);
	assert_int_equal(trace_read(t, TRACE_K, 3, 0, got, err, sizeof(err)), -EBADMSG);
	assert_non_null(strstr(err, "file ends here"));
	trace_free(t);
}

static void test_not_finite(void **state)
{
	struct trace_header h = fx_header();
	char words[64];
	struct trace *t;

	fx_umean[1][2][5] = NAN;
	fx_write_as(fx_path("a.kvtr"), &h, NULL);
	t = open_good(fx_path("a.kvtr"));
	snprintf(words, sizeof(words), "offset %llu: UMEAN of lane 2, cut 1: element 5: not finite",
		 (unsigned long long)trace_find(t, TRACE_UMEAN, 2, 1)->off + 20);
	assert_int_equal(trace_verify(t, err, sizeof(err)), -EBADMSG);
	assert_non_null(strstr(err, words));
	trace_free(t);
}

static void test_not_finite_halves(void **state)
{
	static const struct {
		uint32_t dtype;
		uint16_t fine, wild;
	} cases[] = {{TRACE_F16, 0x7bff, 0xfc00}, {TRACE_F16, 0x3f80, 0x7e00}, {TRACE_BF16, 0x7c00, 0x7f80}};
	uint16_t k[FX_ROWS * FX_K];

	for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
		struct trace_header h = fx_header();
		struct trace_writer *w;
		struct trace *t;

		h.cuts = 0;
		h.dtype = cases[i].dtype;
		for (int bad = 0; bad < 2; bad++) {
			for (size_t j = 0; j < ARRAY_SIZE(k); j++)
				k[j] = cases[i].fine;
			k[77] = bad ? cases[i].wild : k[77];
			assert_int_equal(trace_writer_open(&w, fx_path("h.kvtr"), &h, NULL, err, sizeof(err)),
					 0);
			assert_int_equal(trace_writer_chunk(w, TRACE_K, 1, 0, k), 0);
			assert_int_equal(trace_writer_finish(w, 0), 0);
			t = open_good(fx_path("h.kvtr"));
			assert_int_equal(trace_verify(t, err, sizeof(err)), bad ? -EBADMSG : 0);
			if (bad)
				assert_non_null(strstr(err, "offset 666: K of lane 1, cut 0: element 77"));
			trace_free(t);
		}
	}
}

static void test_cut_says_nothing(void **state)
{
	struct trace_header h = fx_header();
	struct trace_writer *w;
	struct trace *t;

	assert_int_equal(trace_writer_open(&w, fx_path("a.kvtr"), &h, fx_cuts, err, sizeof(err)), 0);
	for (uint32_t l = 0; l < FX_LANES; l++) {
		assert_int_equal(trace_writer_chunk(w, TRACE_K, l, 0, fx_k[l]), 0);
		assert_int_equal(trace_writer_chunk(w, TRACE_Q, l, 0, fx_q[l]), 0);
	}
	assert_int_equal(trace_writer_finish(w, 0), 0);
	t = open_good(fx_path("a.kvtr"));
	assert_int_equal(trace_verify(t, err, sizeof(err)), -EBADMSG);
	assert_non_null(strstr(err, "lane 0, cut 2: has neither"));
	trace_free(t);
}

static void test_model_file(void **state)
{
	enum { WIDE = FX_GROUP * FX_V };
	static float gram[FX_LANES][WIDE * WIDE], got[WIDE * WIDE];
	struct trace_header h = fx_header();
	struct trace_writer *w;
	struct trace *t;

	h.rows = h.cuts = 0;
	fx_fill(&gram[0][0], sizeof(gram) / 4);
	assert_int_equal(trace_writer_open(&w, fx_path("model.kvtr"), &h, NULL, err, sizeof(err)), 0);
	assert_int_equal(trace_writer_chunk(w, TRACE_K, 0, 0, fx_k[0]), -EINVAL);
	for (uint32_t l = 0; l < FX_LANES; l++)
		assert_int_equal(trace_writer_chunk(w, TRACE_GRAM, l, 0, gram[l]), 0);
	assert_int_equal(trace_writer_finish(w, 0), 0);
	t = open_good(fx_path("model.kvtr"));
	assert_int_equal(trace_read(t, TRACE_GRAM, 3, 0, got, err, sizeof(err)), 0);
	assert_memory_equal(got, gram[3], sizeof(got));
	assert_int_equal(trace_verify(t, err, sizeof(err)), 0);
	trace_free(t);
}

static void test_no_files(void **state)
{
	struct trace *t;

	assert_int_equal(trace_open(&t, fx_path("none.kvtr"), err, sizeof(err)), -ENOENT);
	assert_non_null(strstr(err, "none.kvtr: No such file"));
	assert_int_equal(mkfifo(fx_path("fifo.kvtr"), 0600), 0);
	assert_int_equal(trace_open(&t, fx_path("fifo.kvtr"), err, sizeof(err)), -EBADMSG);
	assert_non_null(strstr(err, "not a regular file"));
	assert_true(trace_open(&t, fx_dir, err, sizeof(err)) < 0);
}

static void put(const char *name, uint32_t split, uint32_t rows)
{
	struct trace_header h = fx_header();
	struct trace_writer *w;

	h.split = split;
	h.cuts = 0;
	h.rows = rows;
	assert_int_equal(trace_writer_open(&w, fx_path(name), &h, NULL, err, sizeof(err)), 0);
	assert_int_equal(trace_writer_chunk(w, rows ? TRACE_TOKENS : TRACE_GRAM, 0, 0, fx_q), 0);
	assert_int_equal(trace_writer_finish(w, 0), 0);
}

static void test_list(void **state)
{
	char **list;
	uint32_t n;

	mkdir(fx_path("train"), 0700);
	mkdir(fx_path("test"), 0700);
	mkdir(fx_path("other"), 0700);
	fx_spill(fx_path("valid"), "a file", 6);
	put("model.kvtr", TRACE_TRAIN, 0);
	put("train/b.kvtr", TRACE_TRAIN, 9);
	put("train/a.kvtr", TRACE_TRAIN, 9);
	put("train/c.kvtr", TRACE_TEST, 9); /* the header decides */
	put("z.kvtr", TRACE_TRAIN, 9);
	put("test/d.kvtr", TRACE_TEST, 9);
	put("other/e.kvtr", TRACE_TRAIN, 9);
	fx_spill(fx_path("train/b.kvtr.x1Y2z3"), "being written", 13);
	fx_spill(fx_path("train/notes.txt"), "text", 4);
	assert_int_equal(trace_list(&list, &n, fx_dir, TRACE_TRAIN, err, sizeof(err)), 0);
	assert_int_equal(n, 3);
	assert_string_equal(list[0], fx_path("train/a.kvtr"));
	assert_string_equal(list[1], fx_path("train/b.kvtr"));
	assert_string_equal(list[2], fx_path("z.kvtr"));
	trace_list_free(list, n);
	assert_int_equal(trace_list(&list, &n, fx_dir, TRACE_TEST, err, sizeof(err)), 0);
	assert_int_equal(n, 2);
	trace_list_free(list, n);
	assert_int_equal(trace_list(&list, &n, fx_dir, TRACE_CALIB, err, sizeof(err)), 0);
	assert_int_equal(n, 0);
	trace_list_free(list, n);
	fx_spill(fx_path("train/bad.kvtr"), "short", 5);
	assert_int_equal(trace_list(&list, &n, fx_dir, TRACE_CALIB, err, sizeof(err)), -EBADMSG);
	assert_non_null(strstr(err, "train/bad.kvtr: offset 5"));
	assert_int_equal(trace_list(&list, &n, fx_path("none"), TRACE_CALIB, err, sizeof(err)), -ENOENT);
}

static void test_same_shape(void **state)
{
	struct trace_header a = fx_header(), b = a;

	b.rows = 7;
	b.dtype = TRACE_F16;
	b.split = TRACE_TRAIN;
	assert_int_equal(trace_same_shape(&a, &b, err, sizeof(err)), 0);
#define OTHER(change, words)                                                                                   \
	do {                                                                                                   \
		b = a;                                                                                         \
		change;                                                                                        \
		assert_int_equal(trace_same_shape(&a, &b, err, sizeof(err)), -EINVAL);                         \
		assert_string_equal(err, words);                                                               \
	} while (0)
	OTHER(strcpy(b.model, "other"), "model: made-up, must be other");
	OTHER(b.layers = 3, "layers: 2, must be 3");
	OTHER(b.heads = 1, "heads: 2, must be 1");
	OTHER(b.group = 4, "group: 3, must be 4");
	OTHER(b.k_dim = 64, "k_dim: 8, must be 64");
	OTHER(b.v_dim = 64, "v_dim: 6, must be 64");
	OTHER(b.rope_type = TRACE_ROPE_PAIRS, "rope_type: 1, must be 2");
	OTHER(b.keys = 1, "keys: 0, must be 1");
	OTHER(b.rope_theta = 5e5f, "rope_theta: 10000, must be 500000");
}

static int each(void **state)
{
	fx_random();
	return fx_setup(state);
}

int main(void)
{
#define T(f) cmocka_unit_test_setup_teardown(f, each, fx_teardown)
	const struct CMUnitTest tests[] = {
		T(test_round_trip),     T(test_every_byte_counts),    T(test_short_files),
		T(test_hostile_tables), T(test_no_hidden_bytes),      T(test_one_lane_alone),
		T(test_not_finite),     T(test_cut_short_while_open), T(test_not_finite_halves),
		T(test_model_file),     T(test_cut_says_nothing),     T(test_no_files),
		T(test_list),           T(test_same_shape),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
