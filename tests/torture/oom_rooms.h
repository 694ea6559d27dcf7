/* SPDX-License-Identifier: MIT */
#pragma once
/* Parts that work alone: the recorder of traces, the configuration. */
#include "oom_life.h"

#include "policy/trace.h"

static struct config read_into;

/* ---- traces --------------------------------------------------------------------------------- */

static void prepare_trace(void)
{
	memset(&host, 0, sizeof(host));
	strcpy(host.dir, "/tmp/kvt-oom-XXXXXX");
	if (!mkdtemp(host.dir))
		oom_fail("mkdtemp");
}

static void trace_line(void *arg, int level, const char *line)
{
	if (!*line || strchr(line, '\n'))
		oom_fail("the recorder says \"%s\"", line);
}

/* 0 or an error; files that are there are whole. */
static int record(void)
{
	struct kvtier_trace_opts o = {
		.size = sizeof(o), .dir = host.dir, .log = trace_line, .buffer_bytes = 8 << 20};
	struct kvtier_trace_model m = {.size = sizeof(m),
				       .name = "recorded",
				       .layers = 2,
				       .heads = 2,
				       .group = 2,
				       .k_dim = 8,
				       .v_dim = 8,
				       .dtype = KVT_DTYPE_F32,
				       .rope = KVT_ROPE_HALF,
				       .post_rope = 1,
				       .rope_theta = 1e4f};
	const struct kvtier_trace_cut cut = {.prompt = 20, .queries = 10};
	static float rows[64 * 4 * 8];
	struct kvtier_trace_span span = {.size = sizeof(span), .n = 64, .k = rows, .v = rows, .q = rows};
	struct kvtier_trace_seq *s = NULL;
	struct kvtier_trace *t = NULL;
	uint32_t tokens[64] = {0};
	int r = said(kvtier_trace_open(&o, &t), "kvtier_trace_open");

	span.k_head = span.v_head = span.q_head = 32;
	span.k_row = span.v_row = span.q_row = 128;
	if (r >= 0)
		r = said(kvtier_trace_begin(t, &m, NULL, &s), "kvtier_trace_begin");
	for (; r >= 0 && span.pos < 192; span.pos += 64) {
		r = said(kvtier_trace_tokens(s, span.pos, tokens, 64), "kvtier_trace_tokens");
		for (span.layer = 0; r >= 0 && span.layer < 2; span.layer++)
			r = said(kvtier_trace_rows(s, &span), "kvtier_trace_rows");
	}
	if (r >= 0 && s) {
		r = said(kvtier_trace_end(s, &cut, 1), "kvtier_trace_end");
		s = NULL;
	}
	kvtier_trace_discard(s);
	if (t && !r)
		r = kvtier_trace_flush(t, 10000);
	kvtier_trace_close(t);
	return r;
}

static void under_trace(void)
{
	oom_children = true; /* the recorder's thread */
	(void)record();
	oom_children = false;
}

static void after_trace(void)
{
	char **list = NULL, err[256] = "";
	uint32_t n = 0;
	int r;

	oom_inside = false;
	r = record();
	if (r)
		oom_fail("the next recording: %s", kvtier_strerror(r));
	r = trace_list(&list, &n, host.dir, TRACE_TRAIN, err, sizeof(err));
	if (r < 0)
		oom_fail("%s", err);
	if (r >= 0 && !n)
		oom_fail("no trace was written");
	for (uint32_t i = 0; i < n; i++) {
		struct trace *t = NULL;

		if (trace_open(&t, list[i], err, sizeof(err)) < 0 || trace_verify(t, err, sizeof(err)) < 0)
			oom_fail("%s", err);
		trace_free(t);
	}
	trace_list_free(list, n);
}

static void finish_trace(void)
{
	harness_rm(host.dir);
}

/* ---- configuration ----------------------------------------------------------------------------- */

static void prepare_config(void)
{
	FILE *f;

	prepare_trace();
	snprintf(weights_path, sizeof(weights_path), "%s/kvtierd.conf", host.dir);
	f = fopen(weights_path, "we");
	fprintf(f,
		"[kvtierd]\nrun_dir=%s\nworkers=2\n[dram]\nsize=64M\nsegment=4M\n[nvme]\nenabled=yes\npath=%s\n"
		"[policy]\ndefault=random\nfallback=streaming\nmodel_dir=%s\n[tenant default]\n[tenant other]\n"
		"",
		host.dir, host.dir, host.dir);
	fclose(f);
}

static void under_config(void)
{
	char err[256] = "";
	int r;

	config_defaults(&read_into);
	r = config_load(&read_into, weights_path, err, sizeof(err));
	if (r < 0 && (!*err || strchr(err, '\n')))
		oom_fail("%d, and not one line about it: \"%s\"", r, err);
}

static void after_config(void)
{
	char err[256] = "";

	config_defaults(&read_into);
	if (config_load(&read_into, weights_path, err, sizeof(err)) < 0 || read_into.tenants != 2)
		oom_fail("with memory: %s, %u tenants", err, read_into.tenants);
}
