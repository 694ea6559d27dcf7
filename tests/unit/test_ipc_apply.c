/* SPDX-License-Identifier: MIT */
/*
 * Plan application against a reference that knows, for every row, which bytes
 * it must have: a row's bytes are a hash of (lane, K or V, position, index), so
 * any row in a wrong slot, torn or overwritten is seen.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "ipc/client/client.h"
#include "tests/unit/fake_daemon.h"

#define MAX_LAYERS 3
#define MAX_ROWS 700u
#define WORDS ((MAX_ROWS + 63) / 64)
#define CANARY 0xC5

struct world {
	struct fake *f;
	struct kvtier *c;
	struct kvtier_model *m;
	struct kvtier_region *r;
	struct kvtier_seq *s;
	struct kvtier_layer_desc layer[MAX_LAYERS];
	struct kvtier_layout layout[MAX_LAYERS];
	uint32_t n_layers, lanes, cap, stage;
	uint64_t base, bytes; /* of the layouts; canaries lie around them */
	uint64_t rng;
	uint32_t len;
	uint64_t resident[16][WORDS]; /* what the reference holds in each lane */
};

static uint32_t rnd(struct world *w, uint32_t below)
{
	w->rng ^= w->rng << 13;
	w->rng ^= w->rng >> 7;
	w->rng ^= w->rng << 17;
	return below ? (uint32_t)((w->rng * UINT64_C(0x2545F4914F6CDD1D)) >> 33) % below : 0;
}

static uint8_t byte_of(uint32_t lane, bool v, uint32_t pos, uint32_t i)
{
	uint64_t x = (uint64_t)lane << 40 ^ (uint64_t)v << 39 ^ (uint64_t)pos << 16 ^ i;

	x = (x + 1) * UINT64_C(0x9E3779B97F4A7C15);
	x ^= x >> 29;
	x *= UINT64_C(0xBF58476D1CE4E5B9);
	return (uint8_t)(x >> 56);
}

static uint32_t layer_at(const struct world *w, uint32_t lane, uint32_t *ret_head)
{
	uint32_t i = 0;

	while (lane >= w->layer[i].kv_heads)
		lane -= w->layer[i++].kv_heads;
	*ret_head = lane;
	return i;
}

static uint32_t row_bytes(const struct world *w, uint32_t lane, bool v)
{
	uint32_t head, i = layer_at(w, lane, &head);

	return v ? w->layer[i].v_bytes : w->layer[i].k_bytes;
}

/* Through the runtime's mapping or, with mem, the daemon's. */
static uint8_t *slot_of(const struct world *w, void *mem, uint32_t lane, bool v, uint32_t slot)
{
	uint32_t head, i = layer_at(w, lane, &head);
	const struct kvtier_layout *l = &w->layout[i];
	uint8_t *base = mem;

	return v ? base + l->v_off + head * l->v_head_stride + (uint64_t)slot * l->v_row_stride
		 : base + l->k_off + head * l->k_head_stride + (uint64_t)slot * l->k_row_stride;
}

static void write_row(const struct world *w, void *mem, uint32_t lane, uint32_t slot, uint32_t pos)
{
	for (int v = 0; v < 2; v++)
		for (uint32_t i = 0; i < row_bytes(w, lane, v); i++)
			slot_of(w, mem, lane, v, slot)[i] = byte_of(lane, v, pos, i);
}

static void check_row(const struct world *w, uint32_t lane, uint32_t slot, uint32_t pos)
{
	for (int v = 0; v < 2; v++)
		for (uint32_t i = 0; i < row_bytes(w, lane, v); i++)
			if (slot_of(w, kvtier_region_addr(w->r), lane, v, slot)[i] != byte_of(lane, v, pos, i))
				fail_msg("lane %u %c slot %u: not the bytes of row %u (byte %u)", lane,
					 v ? 'V' : 'K', slot, pos, i);
}

static void check_all(struct world *w)
{
	uint32_t positions[MAX_ROWS];
	const uint8_t *mem = kvtier_region_addr(w->r);

	for (uint32_t lane = 0; lane < w->lanes; lane++) {
		uint32_t slot = 0;

		assert_int_equal(kvtier_seq_resident(w->s, lane, positions, MAX_ROWS),
				 (int)bits_rank(w->resident[lane], w->len));
		bits_for_each(pos, w->resident[lane], w->len) {
			assert_int_equal(positions[slot], pos);
			check_row(w, lane, slot++, pos);
		}
	}
	for (uint64_t i = 0; i < w->base; i++)
		assert_int_equal(mem[i], CANARY);
	for (uint64_t i = w->base + w->bytes; i < kvtier_region_bytes(w->r); i++)
		assert_int_equal(mem[i], CANARY);
}

/* ---- layouts --------------------------------------------------------------------------- */

enum shape { PLAIN, PADDED_ROWS, TOKEN_MAJOR, FUSED, ALL_IN_ONE, CROSSED, SHAPES };

/* Per lane planes with a stride larger than the row and gaps between heads. */
static void shape_padded(struct world *w)
{
	uint64_t off = w->base;

	for (uint32_t i = 0; i < w->n_layers; i++) {
		struct kvtier_layout *l = &w->layout[i];

		l->k_row_stride = w->layer[i].k_bytes + 24;
		l->v_row_stride = w->layer[i].v_bytes + 8;
		l->k_head_stride = (uint64_t)(w->cap + w->stage) * l->k_row_stride + 100;
		l->v_head_stride = (uint64_t)(w->cap + w->stage) * l->v_row_stride + 4000;
		l->k_off = off;
		l->v_off = off += w->layer[i].kv_heads * l->k_head_stride;
		off += w->layer[i].kv_heads * l->v_head_stride;
	}
	w->bytes = off - w->base;
}

/* [layer][K|V][slot][head], or with fused [layer][slot][K of all heads | V of all heads]. */
static void shape_token_major(struct world *w, bool fused)
{
	uint64_t off = w->base, slots = w->cap + w->stage;

	for (uint32_t i = 0; i < w->n_layers; i++) {
		struct kvtier_layout *l = &w->layout[i];
		uint32_t k = w->layer[i].kv_heads * w->layer[i].k_bytes,
			 v = w->layer[i].kv_heads * w->layer[i].v_bytes;

		l->k_head_stride = w->layer[i].k_bytes;
		l->v_head_stride = w->layer[i].v_bytes;
		l->k_row_stride = fused ? k + v : k;
		l->v_row_stride = fused ? k + v : v;
		l->k_off = off;
		l->v_off = fused ? off + k : off + slots * k;
		off += slots * (k + v);
	}
	w->bytes = off - w->base;
}

/* [slot][layer][head][K|V]: one array of records for the whole sequence. */
static void shape_all_in_one(struct world *w)
{
	uint32_t stride = 0;

	for (uint32_t i = 0; i < w->n_layers; i++) {
		struct kvtier_layout *l = &w->layout[i];

		l->k_off = w->base + stride;
		l->v_off = l->k_off + w->layer[i].k_bytes;
		l->k_head_stride = l->v_head_stride = w->layer[i].k_bytes + w->layer[i].v_bytes;
		stride += w->layer[i].kv_heads * (w->layer[i].k_bytes + w->layer[i].v_bytes);
	}
	for (uint32_t i = 0; i < w->n_layers; i++)
		w->layout[i].k_row_stride = w->layout[i].v_row_stride = stride;
	w->bytes = (uint64_t)(w->cap + w->stage) * stride;
}

/*
 * Extents overlap and strides differ, rows do not: V rows of twice the distance
 * lie in the gaps of the K rows' first half. Nothing may be punched there.
 */
static void shape_crossed(struct world *w)
{
	uint64_t off = w->base, slots = w->cap + w->stage;

	for (uint32_t i = 0; i < w->n_layers; i++) {
		struct kvtier_layout *l = &w->layout[i];
		uint32_t cell = MAX(w->layer[i].k_bytes, w->layer[i].v_bytes);

		l->k_row_stride = 2 * cell;
		l->v_row_stride = 4 * cell;
		l->k_off = off;
		l->v_off = off + cell;
		l->k_head_stride = l->v_head_stride = slots * 4 * cell;
		off += w->layer[i].kv_heads * l->k_head_stride;
	}
	w->bytes = off - w->base;
}

static void make_layout(struct world *w, enum shape shape)
{
	memset(w->layout, 0, sizeof(w->layout));
	switch (shape) {
	case PADDED_ROWS:
		shape_padded(w);
		break;
	case TOKEN_MAJOR:
	case FUSED:
		shape_token_major(w, shape == FUSED);
		break;
	case ALL_IN_ONE:
		shape_all_in_one(w);
		break;
	case CROSSED:
		shape_crossed(w);
		break;
	default:
		assert_int_equal(kvtier_layout_plain(w->m, w->cap, w->stage, 0, w->base, w->layout, &w->bytes),
				 0);
	}
	for (uint32_t i = 0; i < w->n_layers; i++) {
		w->layout[i].cap = w->cap;
		w->layout[i].stage = w->stage;
	}
}

static void world_open(struct world *w, enum shape shape, uint32_t cap, uint32_t stage, uint64_t base)
{
	struct kvtier_open_opts o = {.size = sizeof(o), .socket = w->f->path};
	struct kvtier_model_desc d = {
		.size = sizeof(d), .name = "tiny", .layers = w->layer, .n_layers = w->n_layers, .world = 1};
	struct kvtier_seq_opts so = {.size = sizeof(so), .max_rows = MAX_ROWS, .layouts = w->layout};

	w->cap = cap;
	w->stage = stage;
	w->base = base;
	w->len = 0;
	memset(w->resident, 0, sizeof(w->resident));
	w->lanes = 0;
	for (uint32_t i = 0; i < w->n_layers; i++)
		w->lanes += w->layer[i].kv_heads;
	assert_int_equal(kvtier_open(&o, &w->c), 0);
	assert_int_equal(kvtier_model_register(w->c, &d, &w->m), 0);
	make_layout(w, shape);
	assert_int_equal(kvtier_region_create(w->c, w->base + w->bytes + 5000, &w->r), 0);
	memset(kvtier_region_addr(w->r), CANARY, w->base);
	memset((char *)kvtier_region_addr(w->r) + w->base + w->bytes, CANARY,
	       kvtier_region_bytes(w->r) - w->base - w->bytes);
	so.region = w->r;
	assert_int_equal(kvtier_seq_open(w->c, w->m, &so, &w->s), 0);
}

static void append(struct world *w, uint32_t n)
{
	for (uint32_t lane = 0; lane < w->lanes; lane++)
		for (uint32_t i = 0; i < n; i++) {
			write_row(w, kvtier_region_addr(w->r), lane, bits_rank(w->resident[lane], w->len + i),
				  w->len + i);
			bits_set(w->resident[lane], w->len + i);
		}
	assert_int_equal(kvtier_seq_append(w->s, KVT_ALL_LAYERS, w->len, n), 0);
	w->len += n;
}

/* ---- plans ------------------------------------------------------------------------------- */

struct decision {
	uint32_t watermark, words;
	uint64_t resident[16 * WORDS], bring_in[16 * WORDS];
	uint64_t id;
};

/* Publish d and stage its rows as the daemon does. */
static void publish(struct world *w, struct decision *d)
{
	for (uint32_t lane = 0; lane < w->lanes; lane++) {
		uint32_t slot = w->cap;

		bits_for_each(pos, d->bring_in + lane * d->words, d->watermark)
			write_row(w, w->f->region[0].addr, lane, slot++, pos);
	}
	d->id = fake_plan(w->f, 0, d->watermark, d->resident, d->bring_in, PLAN_READY);
}

static void reference_take(struct world *w, const struct decision *d, uint32_t lane)
{
	for (uint32_t pos = 0; pos < d->watermark; pos++) {
		if (bits_test(d->resident + lane * d->words, pos))
			bits_set(w->resident[lane], pos);
		else
			bits_clear(w->resident[lane], pos);
	}
}

static void apply_and_ack(struct world *w, struct decision *d)
{
	struct kvtier_plan p = {.size = sizeof(p)};

	publish(w, d);
	assert_int_equal(kvtier_plan_peek(w->s, &p), 1);
	assert_int_equal(kvtier_plan_apply(w->s, &p), 0);
	assert_int_equal(kvtier_plan_ack(w->s, d->id, NULL), 0);
	for (uint32_t lane = 0; lane < w->lanes; lane++)
		reference_take(w, d, lane);
}

/* Each lane keeps each of its rows with chance keep/100 and brings in others with chance in/100. */
static void decide(struct world *w, struct decision *d, uint32_t watermark, uint32_t keep, uint32_t in)
{
	memset(d, 0, sizeof(*d));
	d->watermark = watermark;
	d->words = (uint32_t)BITS_WORDS(watermark);
	for (uint32_t lane = 0; lane < w->lanes; lane++) {
		uint64_t *after = d->resident + lane * d->words, *bring = d->bring_in + lane * d->words;
		uint32_t staged = 0, total = w->len - watermark;

		for (uint32_t pos = 0; pos < watermark; pos++) {
			bool held = bits_test(w->resident[lane], pos);

			if (total >= w->cap ||
			    (held ? rnd(w, 100) >= keep : rnd(w, 100) >= in || staged >= w->stage))
				continue;
			bits_set(after, pos);
			total++;
			if (!held) {
				bits_set(bring, pos);
				staged++;
			}
		}
	}
}

static void random_model(struct world *w)
{
	static const uint32_t sizes[] = {1, 7, 16, 64, 100, 256};

	w->n_layers = 1 + rnd(w, MAX_LAYERS);
	for (uint32_t i = 0; i < w->n_layers; i++)
		w->layer[i] = (struct kvtier_layer_desc){.kv_heads = 1 + rnd(w, 4),
							 .k_bytes = sizes[rnd(w, 6)],
							 .v_bytes = rnd(w, 5) ? sizes[rnd(w, 6)] : 0};
}

static void one_seed(uint64_t seed)
{
	static struct decision d;
	struct world w = {.f = fake_new(), .rng = seed * UINT64_C(0x9E3779B97F4A7C15) | 1};

	random_model(&w);
	world_open(&w, (enum shape)(seed % SHAPES), 40 + rnd(&w, 200), 1 + rnd(&w, 80), rnd(&w, 3) * 1000);
	append(&w, 30 + rnd(&w, w.cap - 30));
	check_all(&w);
	for (int round = 0; round < 6; round++) {
		uint32_t room = w.cap, more;

		decide(&w, &d, w.len - rnd(&w, MIN(w.len, 20)), 20 + rnd(&w, 75), rnd(&w, 60));
		apply_and_ack(&w, &d);
		check_all(&w);
		for (uint32_t lane = 0; lane < w.lanes; lane++)
			room = MIN(room, w.cap - bits_rank(w.resident[lane], w.len));
		more = rnd(&w, MIN(room, MAX_ROWS - w.len) + 1);
		append(&w, more);
		check_all(&w);
	}
	kvtier_close(w.c);
	fake_free(w.f);
}

static void test_random_plans(void **state)
{
	for (uint64_t seed = 1; seed <= 120; seed++)
		one_seed(seed);
}

/* ---- whole sequences out and in -------------------------------------------------------------- */

static void two_by_two(struct world *w, uint32_t bytes)
{
	w->n_layers = 2;
	for (uint32_t i = 0; i < 2; i++)
		w->layer[i] = (struct kvtier_layer_desc){.kv_heads = 2, .k_bytes = bytes, .v_bytes = bytes};
}

static uint64_t released(struct world *w)
{
	struct kvtier_stats s = {.size = sizeof(s)};

	assert_int_equal(kvtier_stats(w->c, &s), 0);
	return s.bytes_released;
}

static void test_swap_out_and_in(void **state)
{
	static struct decision d;
	struct world w = {.f = fake_new(), .rng = 7};
	uint64_t full;

	two_by_two(&w, 256);
	world_open(&w, PLAIN, 512, 512, 0);
	append(&w, 512);
	full = 4 * 2 * 512 * 256 + 2 * 4096; /* rows, and the canary behind them */
	assert_int_equal(kvtier_region_resident(w.r), full);
	decide(&w, &d, 512, 0, 0);
	apply_and_ack(&w, &d);
	check_all(&w);
	assert_int_equal(kvtier_region_resident(w.r), 2 * 4096); /* nothing of the rows is left */
	assert_int_equal(released(&w), full - 2 * 4096);
	decide(&w, &d, 512, 0, 100);
	apply_and_ack(&w, &d);
	check_all(&w);
	assert_int_equal(bits_rank(w.resident[3], 512), 512);
	assert_int_equal(kvtier_region_resident(w.r), full); /* the stage was given back */
	kvtier_close(w.c);
	fake_free(w.f);
}

static void test_quarter_leaves_a_quarter(void **state)
{
	static struct decision d;
	struct world w = {.f = fake_new(), .rng = 11};
	uint64_t before;

	for (enum shape shape = PLAIN; shape <= ALL_IN_ONE; shape++) {
		two_by_two(&w, 256);
		world_open(&w, shape, 512, 64, 0);
		append(&w, 512);
		before = kvtier_region_resident(w.r);
		memset(&d, 0, sizeof(d));
		d.watermark = 512;
		d.words = 8;
		for (uint32_t i = 0; i < 4 * 8; i++)
			d.resident[i] = 0x1111111111111111;
		apply_and_ack(&w, &d);
		check_all(&w);
		/* 3/4 of the rows' bytes, less at most two cut pages per plane */
		assert_true(before - kvtier_region_resident(w.r) >= 4 * 2 * (384 * 256 - 2 * 4096));
		assert_int_equal(released(&w), before - kvtier_region_resident(w.r));
		/* punched memory comes back when rows are written there */
		append(&w, 100);
		check_all(&w);
		kvtier_close(w.c);
	}
	fake_free(w.f);
}

static void test_rows_past_watermark_survive(void **state)
{
	static struct decision d;
	struct world w = {.f = fake_new(), .rng = 13};

	two_by_two(&w, 64);
	world_open(&w, PLAIN, 300, 50, 4096);
	append(&w, 200);
	decide(&w, &d, 200, 0, 0);
	publish(&w, &d);
	append(&w, 70); /* while the plan waits */
	for (uint32_t lane = 0; lane < w.lanes; lane++)
		reference_take(&w, &d, lane);
	{
		struct kvtier_plan p = {.size = sizeof(p)};

		assert_int_equal(kvtier_plan_peek(w.s, &p), 1);
		assert_int_equal(kvtier_plan_apply(w.s, &p), 0);
		assert_int_equal(kvtier_plan_ack(w.s, d.id, NULL), 0);
	}
	check_all(&w);
	assert_int_equal(bits_rank(w.resident[0], w.len), 70);
	append(&w, 230);
	check_all(&w);
	kvtier_close(w.c);
	fake_free(w.f);
}

/* Room that a plan made may be used between apply and ack. */
static void test_append_between_apply_and_ack(void **state)
{
	static struct decision d;
	struct world w = {.f = fake_new(), .rng = 17};
	struct kvtier_plan p = {.size = sizeof(p)};

	two_by_two(&w, 64);
	world_open(&w, PLAIN, 100, 10, 0);
	append(&w, 100);
	decide(&w, &d, 100, 0, 0);
	publish(&w, &d);
	assert_int_equal(kvtier_seq_append(w.s, KVT_ALL_LAYERS, 100, 1), KVT_E_NOSPC);
	assert_int_equal(kvtier_plan_peek(w.s, &p), 1);
	assert_int_equal(kvtier_plan_apply(w.s, &p), 0);
	for (uint32_t lane = 0; lane < w.lanes; lane++)
		reference_take(&w, &d, lane);
	append(&w, 60);
	assert_int_equal(kvtier_plan_ack(w.s, d.id, NULL), 0);
	check_all(&w);
	append(&w, 40);
	assert_int_equal(kvtier_seq_append(w.s, KVT_ALL_LAYERS, w.len, 1), KVT_E_NOSPC);
	check_all(&w);
	kvtier_close(w.c);
	fake_free(w.f);
}

/* A runtime that moves rows itself: odd lanes as planned, even lanes refused. */
static void test_partial_nack(void **state)
{
	static struct decision d;
	struct world w = {.f = fake_new(), .rng = 19};
	uint64_t nack = 0x5;
	struct seq_slot *slot;

	two_by_two(&w, 64);
	world_open(&w, PLAIN, 200, 20, 0);
	append(&w, 200);
	decide(&w, &d, 190, 50, 0);
	publish(&w, &d);
	for (uint32_t lane = 1; lane < w.lanes; lane += 2) {
		uint32_t s = 0;

		reference_take(&w, &d, lane);
		bits_for_each(pos, w.resident[lane], w.len)
			write_row(&w, kvtier_region_addr(w.r), lane, s++, pos);
	}
	assert_int_equal(kvtier_plan_ack(w.s, d.id, &nack), 0);
	slot = fake_slot_at(w.f, 0);
	assert_int_equal(slot->nack[0], 0x5);
	assert_int_equal(atomic_load(&slot->acked), d.id);
	check_all(&w);
	assert_int_equal(bits_rank(w.resident[0], w.len), 200);
	assert_int_equal(kvtier_seq_append(w.s, KVT_ALL_LAYERS, 200, 1),
			 KVT_E_NOSPC); /* lane 0 is still full */
	decide(&w, &d, 200, 40, 0);    /* the next plan begins where each lane is */
	apply_and_ack(&w, &d);
	check_all(&w);
	assert_int_equal(slot->nack[0], 0);
	kvtier_close(w.c);
	fake_free(w.f);
}

/* No memory for the rows that come in: nothing has moved, and the plan can be applied later. */
static void test_no_memory_moves_nothing(void **state)
{
	static struct decision d;
	struct world w = {.f = fake_new(), .rng = 23};
	struct kvtier_plan p = {.size = sizeof(p)};
	int fd;

	two_by_two(&w, 256);
	world_open(&w, PLAIN, 300, 300, 0);
	append(&w, 300);
	decide(&w, &d, 300, 10, 0);
	apply_and_ack(&w, &d);
	decide(&w, &d, 300, 50, 80);
	publish(&w, &d);
	assert_int_equal(kvtier_plan_peek(w.s, &p), 1);
	fd = w.r->seg.fd;
	w.r->seg.fd = -1; /* fallocate fails */
	assert_true(kvtier_plan_apply(w.s, &p) < 0);
	w.r->seg.fd = fd;
	check_all(&w);
	assert_int_equal(kvtier_plan_apply(w.s, &p), 0);
	assert_int_equal(kvtier_plan_ack(w.s, d.id, NULL), 0);
	for (uint32_t lane = 0; lane < w.lanes; lane++)
		reference_take(&w, &d, lane);
	check_all(&w);
	kvtier_close(w.c);
	fake_free(w.f);
}

/* Another sequence in the same region is left alone by every punch. */
static void test_neighbour_is_untouched(void **state)
{
	static struct decision d;
	struct world w = {.f = fake_new(), .rng = 29};
	struct kvtier_layout other[MAX_LAYERS];
	struct kvtier_seq_opts so = {.size = sizeof(so), .max_rows = MAX_ROWS, .layouts = other};
	struct kvtier_seq *s2;
	uint64_t bytes;

	two_by_two(&w, 100); /* planes end within pages */
	w.bytes = 0;
	world_open(&w, PLAIN, 64, 16, 3 * 4 * 2 * 80 * 100);
	assert_int_equal(kvtier_layout_plain(w.m, 64, 16, 0, 0, other, &bytes), 0);
	assert_true(bytes <= w.base);
	so.region = w.r;
	assert_int_equal(kvtier_seq_open(w.c, w.m, &so, &s2), 0);
	append(&w, 64);
	decide(&w, &d, 64, 0, 0);
	apply_and_ack(&w, &d);
	check_all(&w); /* the neighbour's place is canary here */
	kvtier_close(w.c);
	fake_free(w.f);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_random_plans),
		cmocka_unit_test(test_swap_out_and_in),
		cmocka_unit_test(test_quarter_leaves_a_quarter),
		cmocka_unit_test(test_rows_past_watermark_survive),
		cmocka_unit_test(test_append_between_apply_and_ack),
		cmocka_unit_test(test_partial_nack),
		cmocka_unit_test(test_no_memory_moves_nothing),
		cmocka_unit_test(test_neighbour_is_untouched),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
