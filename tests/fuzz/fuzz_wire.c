/* SPDX-License-Identifier: MIT */
/*
 * Any bytes as a message: what wire_check() accepts must be readable field by
 * field and table by table inside the packet. The copy has its exact size, so
 * that the sanitizer sees a read past the end.
 */
#include <stdlib.h>
#include <string.h>
#include "ipc/codec.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static volatile uint64_t sink;

static void touch(const void *p, size_t n)
{
	const uint8_t *b = p;
	uint64_t sum = 0;

	for (size_t i = 0; i < n; i++)
		sum += b[i];
	sink = sum;
}

static void must(int ok)
{
	if (!ok)
		abort();
}

static void read_request(const struct wire_hdr *h)
{
	const void *m = h;

	touch(h, h->len);
	if (h->type == W_MODEL) {
		const struct wire_model *v = m;

		must(wire_model_lanes(v) >= 1 && wire_model_lanes(v) <= 1024);
		touch(v->layer, v->n_layers * sizeof(v->layer[0]));
		touch(v->name, strlen(v->name));
	} else if (h->type == W_SEQ_OPEN) {
		const struct wire_seq_open *v = m;
		static const struct wire_layer layer = {.kv_heads = 8, .k_bytes = 64, .v_bytes = 64};
		char err[WIRE_TEXT];

		for (uint32_t i = 0; i < v->n_layers; i++) {
			struct wire_layout *l = wire_open_layouts(v) + i;

			if (!wire_layout_check(l, &layer, i, WIRE_MAX_REGION, v->max_rows, err, sizeof(err)))
				must(l->k_off + 7 * l->k_head_stride +
					     (l->cap + l->stage - 1) * (uint64_t)l->k_row_stride + 64 <=
				     WIRE_MAX_REGION);
		}
		if (v->flags & W_OPEN_WINDOW) {
			static struct wire_layer y[WIRE_MAX_LAYERS];

			for (uint32_t i = 0; i < v->n_layers; i++)
				y[i] = layer;
			if (!wire_window_check(v, y, 2, WIRE_MAX_REGION, err, sizeof(err)))
				must(v->window.out_off + v->window.out_bytes <= WIRE_MAX_REGION &&
				     v->window.in_off + v->window.in_bytes <= WIRE_MAX_REGION);
		}
		touch(wire_open_table(v), v->budget.table_n * sizeof(uint32_t));
		touch(v->budget.policy, strlen(v->budget.policy));
	} else if (h->type == W_PLAN_REQUEST) {
		const struct wire_plan_request *v = m;

		touch(wire_plan_table(v), v->budget.table_n * sizeof(uint32_t));
	} else if (h->type == W_RECALL && ((const struct wire_recall *)m)->op == W_RECALL_FIND) {
		const struct wire_recall *v = m;

		must(v->rows <= v->window.cap && v->heads * v->rows * sizeof(uint32_t) < WIRE_MAX);
		touch(wire_recall_queries(v),
		      (size_t)v->heads * v->per_head * v->dim * wire_dtype_bytes(v->dtype));
	} else if (h->type == W_ADMIN) {
		const char *argv[WIRE_MAX_ARGS + 1];
		uint32_t n = wire_admin_argv(m, argv, WIRE_MAX_ARGS + 1);

		must(n >= 1 && n <= WIRE_MAX_ARGS && !argv[n]);
		for (uint32_t i = 0; i < n; i++)
			touch(argv[i], strlen(argv[i]) + 1);
	}
}

static void read_reply(const struct wire_reply *r)
{
	const struct wire_recall_reply *v = (const void *)r;

	touch(r->text, strlen(r->text));
	if (r->status || r->hdr.type != (W_RECALL | W_REPLY))
		return;
	touch(wire_recall_counts(v), v->heads * sizeof(uint32_t));
	touch(wire_recall_positions(v), v->rows * sizeof(uint32_t));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	char err[WIRE_TEXT];
	bool reply = size && data[0] & 1;
	struct wire_hdr *h;
	void *copy;
	int r;

	if (!size)
		return 0;
	size--;
	copy = malloc(size ? size : 1);
	must(copy != NULL);
	memcpy(copy, data + 1, size);
	h = copy;
	if (size >= sizeof(*h) && data[0] & 2) { /* spare the fuzzer the guessing of the frame */
		h->magic = WIRE_MAGIC;
		h->version = WIRE_VERSION;
		h->len = (uint32_t)size;
	}
	memset(err, 0x55, sizeof(err));
	r = wire_check(copy, size, reply, err, sizeof(err));
	if (r) {
		must(r == KVT_E_PROTO || r == KVT_E_VERSION || r == KVT_E_INVAL);
		must(strnlen(err, sizeof(err)) < sizeof(err) && strchr(err, ':'));
	} else {
		must(h->len == size && wire_type_name(h->type)[0] != 'u');
		if (!reply)
			read_request(h);
		else
			read_reply(copy);
	}
	free(copy);
	return 0;
}
