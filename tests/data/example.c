/* SPDX-License-Identifier: MIT */
/* cc example.c $(pkg-config --cflags --libs libkvtier) */
#include <kvtier.h>
#include <stdio.h>
#include <string.h>

enum { LAYERS = 2, HEADS = 2, ROW = 128, ROWS = 512, KEEP = 128 };

static int failed(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, kvtier_last_error());
	return 1;
}

int main(void)
{
	struct kvtier_layer_desc layer = {.kv_heads = HEADS, .k_bytes = ROW, .v_bytes = ROW};
	struct kvtier_layer_desc layers[LAYERS] = {layer, layer};
	struct kvtier_model_desc desc = {.size = sizeof(desc), .name = "example", .layers = layers, .world = 1};
	struct kvtier_budget budget = {.size = sizeof(budget), .device_rows = KEEP};
	struct kvtier_seq_opts opts = {.size = sizeof(opts), .max_rows = 4096, .budget = &budget};
	struct kvtier_seq_info info = {.size = sizeof(info)};
	struct kvtier_plan plan = {.size = sizeof(plan)};
	struct kvtier_layout at[LAYERS];
	struct kvtier *kvt;
	struct kvtier_model *model;
	struct kvtier_region *region;
	struct kvtier_seq *seq;
	uint64_t bytes;

	desc.n_layers = LAYERS;
	budget.dram_rows = budget.nvme_rows = KVT_ROWS_ALL; /* what leaves the device is kept below */
	if (kvtier_open(NULL, &kvt) || kvtier_model_register(kvt, &desc, &model) ||
	    kvtier_layout_plain(model, ROWS, ROWS, 0, 0, at, &bytes) ||
	    kvtier_region_create(kvt, bytes, &region))
		return failed("open");
	opts.region = region;
	opts.layouts = at;
	if (kvtier_seq_open(kvt, model, &opts, &seq))
		return failed("sequence");
	for (int i = 0; i < LAYERS * HEADS * ROWS; i++) { /* prefill: token t's row goes to slot t */
		const struct kvtier_layout *l = &at[i / (HEADS * ROWS)];
		char *base = kvtier_region_addr(region);
		int h = i / ROWS % HEADS, t = i % ROWS;

		memset(base + l->k_off + h * l->k_head_stride + t * l->k_row_stride, t, ROW);
		memset(base + l->v_off + h * l->v_head_stride + t * l->v_row_stride, -t, ROW);
	}
	if (kvtier_seq_append(seq, KVT_ALL_LAYERS, 0, ROWS) || /* over the budget: a plan will come */
	    kvtier_plan_wait(seq, 1, KVT_PLAN_READY, 10000, &plan) || kvtier_plan_apply(seq, &plan) ||
	    kvtier_plan_ack(seq, plan.id, NULL) || kvtier_seq_info(seq, &info))
		return failed("plan");
	printf("%d of %u rows in lane 0, %llu rows in DRAM, region %llu KiB\n",
	       kvtier_seq_resident(seq, 0, NULL, 0), info.rows,
	       (unsigned long long)info.tier_rows[KVT_TIER_DRAM],
	       (unsigned long long)kvtier_region_resident(region) / 1024);
	kvtier_close(kvt);
	return 0;
}
