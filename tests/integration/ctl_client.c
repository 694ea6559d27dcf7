/* SPDX-License-Identifier: MIT */
/*
 * A small runtime for the command-line tests.
 *
 *   ctl_client SOCKET ROWS [leased]
 *
 * Opens one sequence (2 layers of 2 heads, 16 floats a row), appends ROWS rows,
 * keeps half of them on the device and the rest in DRAM, applies the plan and
 * prints the sequence's key. Then it carries out whatever plan comes, checking
 * that rows hold what was written, until it is killed or the sequence is gone.
 */
#include <err.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "ipc/kvtier.h"

#define LAYERS 2
#define HEADS 2
#define DIM 16

static struct kvtier_layout layout[LAYERS];
static char *base;

static void check(int r, const char *what)
{
	if (r < 0)
		errx(1, "%s: %s: %s", what, kvtier_strerror(r), kvtier_last_error());
}

/* The row tells where it came from. */
static float cell(unsigned layer, unsigned head, unsigned row, int value)
{
	return (float)(row * 8 + layer * 4 + head * 2 + (unsigned)value);
}

static float *plane(unsigned layer, unsigned head, unsigned slot, int value)
{
	const struct kvtier_layout *l = &layout[layer];

	return (float *)(base +
			 (value ? l->v_off + head * l->v_head_stride + (uint64_t)slot * l->v_row_stride
				: l->k_off + head * l->k_head_stride + (uint64_t)slot * l->k_row_stride));
}

static void write_rows(unsigned rows)
{
	for (unsigned i = 0; i < LAYERS * HEADS * 2; i++)
		for (unsigned row = 0; row < rows; row++)
			for (unsigned d = 0; d < DIM; d++)
				plane(i / 4, i / 2 % 2, row, i % 2)[d] = cell(i / 4, i / 2 % 2, row, i % 2);
}

/* Every resident row is where its rank says and holds what was written. */
static void check_rows(struct kvtier_seq *s)
{
	static uint32_t pos[65536];

	for (unsigned i = 0; i < LAYERS * HEADS; i++) {
		int n = kvtier_seq_resident(s, i, pos, 65536);

		check(n, "resident");
		for (int k = 0; k < n; k++)
			for (int v = 0; v < 2; v++)
				if (plane(i / 2, i % 2, (unsigned)k, v)[DIM - 1] !=
				    cell(i / 2, i % 2, pos[k], v))
					errx(1, "lane %u: slot %d does not hold row %u", i, k, pos[k]);
	}
}

static void apply(struct kvtier_seq *s, const struct kvtier_plan *p)
{
	check(kvtier_plan_apply(s, p), "apply");
	check(kvtier_plan_ack(s, p->id, NULL), "ack");
	check_rows(s);
}

static struct kvtier_seq *open_seq(struct kvtier *c, unsigned rows, int leased, uint8_t key[16])
{
	struct kvtier_layer_desc layers[LAYERS];
	struct kvtier_model_desc desc = {
		.size = sizeof(desc),
		.name = "ctl-test",
		.layers = layers,
		.n_layers = LAYERS,
		.dtype = KVT_DTYPE_F32,
		.head_dim = DIM,
		.rope = KVT_ROPE_HALF,
		.rope_theta = 10000.0f,
		.world = 1,
	};
	struct kvtier_budget budget = {.size = sizeof(budget),
				       .device_rows = rows / 2,
				       .dram_rows = KVT_ROWS_ALL,
				       .nvme_rows = 0,
				       .policy = "streaming"};
	struct kvtier_seq_opts o = {.size = sizeof(o), .layouts = layout, .budget = &budget, .max_rows = rows};
	struct kvtier_model *m;
	struct kvtier_seq *s;
	uint64_t bytes;

	for (unsigned i = 0; i < LAYERS; i++)
		layers[i] =
			(struct kvtier_layer_desc){.kv_heads = HEADS, .k_bytes = DIM * 4, .v_bytes = DIM * 4};
	check(kvtier_model_register(c, &desc, &m), "model");
	check(kvtier_layout_plain(m, rows, rows, 0, 0, layout, &bytes), "layout");
	check(kvtier_region_create(c, bytes, &o.region), "region");
	base = kvtier_region_addr(o.region);
	memcpy(o.key, key, 16);
	if (leased) {
		o.lifetime = KVT_LEASED;
		o.ttl_s = 600;
		memset(o.secret, 7, sizeof(o.secret));
	}
	check(kvtier_seq_open(c, m, &o, &s), "open");
	return s;
}

int main(int argc, char *argv[])
{
	struct kvtier_open_opts opts = {
		.size = sizeof(opts), .socket = argc > 1 ? argv[1] : NULL, .name = "ctl-test"};
	unsigned rows = argc > 2 ? (unsigned)atoi(argv[2]) : 0;
	struct kvtier_plan p = {.size = sizeof(p)};
	struct kvtier_seq_info info = {.size = sizeof(info)};
	struct kvtier_seq *s;
	struct kvtier *c;
	uint8_t key[16];

	if (rows < 64 || rows > 65536)
		errx(2, "usage: ctl_client SOCKET ROWS [leased], ROWS from 64 to 65536");
	arc4random_buf(key, sizeof(key));
	check(kvtier_open(&opts, &c), "connect");
	s = open_seq(c, rows, argc > 3, key);
	write_rows(rows);
	check(kvtier_seq_append(s, KVT_ALL_LAYERS, 0, rows), "append");
	check(kvtier_plan_wait(s, 1, KVT_PLAN_READY, 10000, &p), "plan");
	apply(s, &p);
	for (int i = 0; i < 16; i++)
		printf("%02x", key[i]);
	putchar('\n');
	fflush(stdout);
	for (;;) {
		struct pollfd pfd = {.fd = kvtier_event_fd(c), .events = POLLIN};

		poll(&pfd, 1, 50);
		kvtier_process(c);
		if (kvtier_plan_peek(s, &p) == 1 && p.state == KVT_PLAN_READY)
			apply(s, &p);
		if (kvtier_seq_info(s, &info) == KVT_E_STALE)
			errx(3, "the sequence is gone");
	}
}
