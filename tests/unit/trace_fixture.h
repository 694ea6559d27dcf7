/* SPDX-License-Identifier: MIT */
#pragma once
/* Small made-up traces, and a folder for them. Include after cmocka.h. */
#include <dirent.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "shm/trace.h"

enum { FX_LAYERS = 2, FX_HEADS = 2, FX_LANES = 4, FX_GROUP = 3, FX_K = 8, FX_V = 6, FX_ROWS = 61, FX_CUTS = 3 };

static char fx_dir[64];
static uint64_t fx_seed = 1;

static int fx_setup(void **state)
{
	strcpy(fx_dir, "/tmp/kvtr.XXXXXX");
	return mkdtemp(fx_dir) ? 0 : -1;
}

static int fx_teardown(void **state)
{
	char cmd[128];

	snprintf(cmd, sizeof(cmd), "rm -rf '%s'", fx_dir);
	return system(cmd);
}

static const char *fx_path(const char *name)
{
	static char path[4][512];
	static int turn;
	char *p = path[turn++ % 4];

	snprintf(p, 512, "%s/%s", fx_dir, name);
	return p;
}

static float fx_normal(void)
{
	float sum = -6;

	for (int i = 0; i < 12; i++) {
		fx_seed = fx_seed * 6364136223846793005u + 1442695040888963407u;
		sum += (float)(fx_seed >> 40) / (float)(1 << 24);
	}
	return sum;
}

static const struct trace_cut fx_cuts[FX_CUTS] = {
	{.prompt = 40, .queries = 21, .context = 1},
	{.prompt = 23, .queries = 11, .context = 1, .flags = TRACE_CUT_BEFORE},
	{.prompt = 50, .queries = 90, .context = 2, .flags = TRACE_CUT_BRANCH},
};

static struct trace_header fx_header(void)
{
	return (struct trace_header){
		.model = "made-up",
		.source = "page \xc3\xa9 1",
		.domain = "prose",
		.layers = FX_LAYERS,
		.heads = FX_HEADS,
		.group = FX_GROUP,
		.k_dim = FX_K,
		.v_dim = FX_V,
		.dtype = TRACE_F32,
		.rope_type = TRACE_ROPE_HALF,
		.rope_theta = 1e4f,
		.rows = FX_ROWS,
		.cuts = FX_CUTS,
		.split = TRACE_TEST,
		.seed = 5,
	};
}

static uint32_t fx_tokens[FX_ROWS];
static float fx_k[FX_LANES][FX_ROWS][FX_K], fx_v[FX_LANES][FX_ROWS][FX_V];
static float fx_q[FX_LANES][FX_GROUP][FX_ROWS][FX_K];
static float fx_umax[FX_CUTS][FX_LANES][FX_ROWS], fx_umean[FX_CUTS][FX_LANES][FX_ROWS];
static float fx_vnorm[FX_LANES][FX_ROWS];

static void fx_fill(float *x, size_t n)
{
	for (size_t i = 0; i < n; i++)
		x[i] = fx_normal();
}

static inline void fx_random(void)
{
	for (int i = 0; i < FX_ROWS; i++)
		fx_tokens[i] = (uint32_t)(i * 7919);
	fx_fill(&fx_k[0][0][0], sizeof(fx_k) / 4);
	fx_fill(&fx_v[0][0][0], sizeof(fx_v) / 4);
	fx_fill(&fx_q[0][0][0][0], sizeof(fx_q) / 4);
	fx_fill(&fx_umax[0][0][0], sizeof(fx_umax) / 4);
	fx_fill(&fx_umean[0][0][0], sizeof(fx_umean) / 4);
	fx_fill(&fx_vnorm[0][0], sizeof(fx_vnorm) / 4);
}

/* Everything that a sample may have, in the tables above; K from `k` when it is not NULL. */
static inline void fx_write_as(const char *path, const struct trace_header *h, const float *k)
{
	struct trace_writer *w;
	char err[512];

	if (trace_writer_open(&w, path, h, fx_cuts, err, sizeof(err)) < 0)
		fail_msg("%s", err);
	assert_int_equal(trace_writer_chunk(w, TRACE_TOKENS, 0, 0, fx_tokens), 0);
	for (uint32_t l = 0; l < FX_LANES; l++) {
		assert_int_equal(trace_writer_chunk(w, TRACE_Q, l, 0, fx_q[l]), 0);
		assert_int_equal(
			trace_writer_chunk(w, TRACE_K, l, 0, k ? k + l * FX_ROWS * FX_K : &fx_k[l][0][0]), 0);
		assert_int_equal(trace_writer_chunk(w, TRACE_V, l, 0, fx_v[l]), 0);
		assert_int_equal(trace_writer_chunk(w, TRACE_VNORM, l, 0, fx_vnorm[l]), 0);
		for (uint32_t c = 0; c < h->cuts; c++) {
			assert_int_equal(trace_writer_chunk(w, TRACE_UMAX, l, c, fx_umax[c][l]), 0);
			assert_int_equal(trace_writer_chunk(w, TRACE_UMEAN, l, c, fx_umean[c][l]), 0);
		}
	}
	assert_int_equal(trace_writer_finish(w, 0), 0);
}

static inline void fx_write(const char *path)
{
	struct trace_header h = fx_header();

	fx_write_as(path, &h, NULL);
}

static inline char *fx_slurp(const char *path, size_t *ret_size)
{
	struct stat st;
	int fd = open(path, O_RDONLY);
	char *buf;

	assert_true(fd >= 0 && fstat(fd, &st) == 0);
	buf = malloc((size_t)st.st_size + 1);
	assert_int_equal(read(fd, buf, (size_t)st.st_size), st.st_size);
	close(fd);
	*ret_size = (size_t)st.st_size;
	return buf;
}

static inline void fx_spill(const char *path, const void *buf, size_t size)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);

	assert_true(fd >= 0);
	assert_int_equal(write(fd, buf, size), (ssize_t)size);
	close(fd);
}

/* Files in fx_dir. */
static inline int fx_count(void)
{
	DIR *d = opendir(fx_dir);
	int n = 0;

	assert_non_null(d);
	for (struct dirent *e; (e = readdir(d));)
		n += e->d_name[0] != '.';
	closedir(d);
	return n;
}
