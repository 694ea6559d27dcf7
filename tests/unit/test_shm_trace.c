/* SPDX-License-Identifier: MIT */
/* The trace writer: what it refuses, what it leaves behind, and that bytes lie where the format says. */
#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/resource.h>
#include <cmocka.h>
#include "shm/crc.h"
#include "shm/util.h"
#include "tests/unit/trace_fixture.h"

static void test_layout(void **state)
{
	size_t size;
	char *file;
	struct trace_header h;
	const struct trace_chunk *c;
	uint64_t next = TRACE_HEADER;
	uint32_t crc;
	struct stat st;

	fx_write(fx_path("a.kvtr"));
	file = fx_slurp(fx_path("a.kvtr"), &size);
	memcpy(&h, file, sizeof(h));
	assert_memory_equal(h.magic, "KVTRACE1", 8);
	assert_int_equal(h.version, 1);
	assert_int_equal(h.header_size, 512);
	assert_int_equal(h.file_size, size);
	assert_int_equal(h.chunks, 2 + FX_LANES * (4 + 2 * FX_CUTS));
	assert_int_equal(h.table_off + h.chunks * 32, size);
	assert_string_equal(h.source, "page \xc3\xa9 1");
	crc = h.crc;
	h.crc = 0;
	assert_int_equal(crc32c(crc32c(0, &h, 512), file + h.table_off, h.chunks * 32), crc);
	c = (const void *)(file + h.table_off);
	for (uint32_t i = 0; i < h.chunks; i++) {
		assert_int_equal(c[i].off, next);
		assert_int_equal(crc32c(0, file + c[i].off, c[i].bytes), c[i].crc);
		for (uint64_t at = c[i].off + c[i].bytes; at % 64; at++)
			assert_int_equal(file[at], 0);
		next = ALIGN_UP(c[i].off + c[i].bytes, 64u);
		if (c[i].kind == TRACE_V)
			assert_memory_equal(file + c[i].off, fx_v[c[i].lane], sizeof(fx_v[0]));
		if (c[i].kind == TRACE_UMEAN)
			assert_memory_equal(file + c[i].off, fx_umean[c[i].cut][c[i].lane],
					    4 * fx_cuts[c[i].cut].prompt);
	}
	assert_int_equal(h.table_off, next);
	assert_int_equal(stat(fx_path("a.kvtr"), &st), 0);
	assert_int_equal(st.st_mode & 0777, 0600);
	free(file);
}

static void test_chunks_refused(void **state)
{
	struct trace_header h = fx_header();
	struct trace_writer *w;
	char err[256];

	assert_int_equal(trace_writer_open(&w, fx_path("b.kvtr"), &h, fx_cuts, err, sizeof(err)), 0);
	assert_int_equal(trace_writer_chunk(w, TRACE_CUTS, 0, 0, fx_cuts), -EINVAL);
	assert_int_equal(trace_writer_chunk(w, 0, 0, 0, fx_k), -EINVAL);
	assert_int_equal(trace_writer_chunk(w, TRACE_KINDS, 0, 0, fx_k), -EINVAL);
	assert_int_equal(trace_writer_chunk(w, TRACE_GRAM, 0, 0, fx_k), -EINVAL);
	assert_int_equal(trace_writer_chunk(w, TRACE_K, FX_LANES, 0, fx_k), -EINVAL);
	assert_int_equal(trace_writer_chunk(w, TRACE_K, 0, 1, fx_k), -EINVAL);
	assert_int_equal(trace_writer_chunk(w, TRACE_TOKENS, 1, 0, fx_tokens), -EINVAL);
	assert_int_equal(trace_writer_chunk(w, TRACE_UMAX, 0, FX_CUTS, fx_umax), -EINVAL);
	assert_int_equal(trace_writer_chunk(w, TRACE_K, 3, 0, fx_k[3]), 0);
	assert_int_equal(trace_writer_chunk(w, TRACE_K, 3, 0, fx_k[3]), -EINVAL);
	for (uint32_t c = 0; c < FX_CUTS; c++)
		for (uint32_t l = 0; l < FX_LANES; l++) {
			assert_int_equal(trace_writer_bytes(w, TRACE_UMEAN, c), 4 * fx_cuts[c].prompt);
			assert_int_equal(trace_writer_chunk(w, TRACE_UMEAN, l, c, fx_umean[c][l]), 0);
			assert_int_equal(trace_writer_chunk(w, TRACE_UMAX, l, c, fx_umax[c][l]), 0);
			assert_int_equal(trace_writer_chunk(w, TRACE_UMAX, l, c, fx_umax[c][l]), -EINVAL);
		}
	assert_int_equal(fx_count(), 1);
	trace_writer_abort(w);
	assert_int_equal(fx_count(), 0);
}

#define WITH(change, words)                                                                                    \
	do {                                                                                                   \
		struct trace_header h = fx_header();                                                           \
		struct trace_cut cut[FX_CUTS];                                                                 \
		struct trace_writer *w;                                                                        \
		char err[512] = "";                                                                            \
		memcpy(cut, fx_cuts, sizeof(cut));                                                             \
		change;                                                                                        \
		assert_int_equal(trace_writer_open(&w, fx_path("c.kvtr"), &h, cut, err, sizeof(err)),          \
				 -EINVAL);                                                                     \
		if (!strstr(err, words))                                                                       \
			fail_msg("%s does not say %s", err, words);                                            \
		assert_int_equal(fx_count(), 0);                                                               \
	} while (0)

static void test_headers_refused(void **state)
{
	WITH(h.model[0] = 0, "model");
	WITH(memset(h.model, 'x', sizeof(h.model)), "offset 40: model");
	WITH(h.source[2] = '\x1b', "offset 106: source: byte 0x1b");
	WITH(h.domain[20] = 'x', "domain: byte 0x78, must be 0");
	WITH(h.task[23] = 'x', "task");
	WITH(h.layers = 0, "offset 248: layers: 0, must be 1..256");
	WITH(h.layers = 257, "layers: 257");
	WITH((h.layers = 256, h.heads = 5), "256 x 5 lanes");
	WITH(h.group = 0, "group");
	WITH(h.k_dim = 1025, "k_dim: 1025, must be 1..1024");
	WITH(h.k_dim = 7, "must be even");
	WITH(h.dtype = 4, "dtype");
	WITH(h.dtype = 0, "dtype");
	WITH(h.rope_type = 3, "rope_type");
	WITH(h.rope_theta = 0, "rope_theta");
	WITH(h.rope_theta = 0.99f, "rope_theta"); /* angles would pass what the rotation can reduce */
	WITH(h.rope_theta = 1.0f / 0.0f, "rope_theta");
	WITH(h.keys = 2, "keys");
	WITH(h.rows = TRACE_MAX_ROWS + 1, "rows");
	WITH(h.rows = 0, "cuts");
	WITH(h.cuts = 65, "cuts: 65, must be 0..64");
	WITH(h.split = 4, "split");
	WITH(h.reserved[100] = 1, "reserved");
	WITH(cut[1].prompt = 0, "cut 1: prompt: 0, must be 1..61");
	WITH(cut[1].prompt = 62, "cut 1: prompt: 62");
	WITH(cut[0].queries = 22, "cut 0: queries: 22, must be 1..21");
	WITH(cut[2].queries = 0, "cut 2: queries: 0");
	WITH(cut[2].queries = TRACE_MAX_ROWS + 1, "cut 2: queries");
	WITH(cut[2].flags = 6, "cut 2: flags");
}

static void test_bad_path(void **state)
{
	struct trace_header h = fx_header();
	struct trace_writer *w;
	char err[256] = "";

	assert_int_equal(trace_writer_open(&w, fx_path("no/such/a.kvtr"), &h, fx_cuts, err, sizeof(err)),
			 -ENOENT);
	assert_non_null(strstr(err, "no/such/a.kvtr"));
}

static void test_replaces_whole(void **state)
{
	struct trace_header h = fx_header();
	struct trace_writer *w;
	char err[256];
	size_t before, after;

	fx_write(fx_path("d.kvtr"));
	free(fx_slurp(fx_path("d.kvtr"), &before));
	/* a second writer that gives up leaves the first file alone ... */
	assert_int_equal(trace_writer_open(&w, fx_path("d.kvtr"), &h, fx_cuts, err, sizeof(err)), 0);
	assert_int_equal(trace_writer_chunk(w, TRACE_K, 0, 0, fx_k[0]), 0);
	assert_true(trace_writer_size(w) >= TRACE_HEADER + sizeof(fx_cuts) + sizeof(fx_k[0]));
	trace_writer_abort(w);
	free(fx_slurp(fx_path("d.kvtr"), &after));
	assert_int_equal(before, after);
	/* ... and one that completes takes its place */
	h.cuts = 0;
	assert_int_equal(trace_writer_open(&w, fx_path("d.kvtr"), &h, NULL, err, sizeof(err)), 0);
	assert_int_equal(trace_writer_chunk(w, TRACE_K, 0, 0, fx_k[0]), 0);
	assert_int_equal(trace_writer_finish(w, 1), 0);
	free(fx_slurp(fx_path("d.kvtr"), &after));
	assert_int_equal(after, 512 + sizeof(fx_k[0]) + (64 - sizeof(fx_k[0]) % 64) % 64 + 32);
	assert_int_equal(fx_count(), 1);
	unlink(fx_path("d.kvtr"));
}

static void test_nothing_is_no_trace(void **state)
{
	struct trace_header h = fx_header();
	struct trace_writer *w;
	char err[256];

	h.cuts = 0;
	assert_int_equal(trace_writer_open(&w, fx_path("e.kvtr"), &h, NULL, err, sizeof(err)), 0);
	assert_int_equal(trace_writer_finish(w, 0), -EINVAL);
	assert_int_equal(fx_count(), 0);
	trace_writer_abort(NULL);
}

static void test_disk_limit(void **state)
{
	struct rlimit old, small;
	struct trace_header h = fx_header();
	struct trace_writer *w;
	char err[256];
	int r = 0;

	signal(SIGXFSZ, SIG_IGN);
	assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
	small = (struct rlimit){.rlim_cur = 8192, .rlim_max = old.rlim_max};
	assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
	assert_int_equal(trace_writer_open(&w, fx_path("f.kvtr"), &h, fx_cuts, err, sizeof(err)), 0);
	for (uint32_t l = 0; l < FX_LANES && r == 0; l++)
		r = trace_writer_chunk(w, TRACE_Q, l, 0, fx_q[l]);
	assert_int_equal(r, -EFBIG);
	assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
	/* room again, but the file has a hole in it: the writer does not go on */
	assert_int_equal(trace_writer_chunk(w, TRACE_K, 0, 0, fx_k[0]), -EFBIG);
	assert_int_equal(trace_writer_finish(w, 0), -EFBIG);
	assert_int_equal(fx_count(), 0);
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
		T(test_layout),         T(test_chunks_refused),      T(test_headers_refused), T(test_bad_path),
		T(test_replaces_whole), T(test_nothing_is_no_trace), T(test_disk_limit),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
