/* SPDX-License-Identifier: MIT */
/*
 * Direct reads and recall, whole: a real daemon core publishes what the library demotes, and the library's
 * kernels find it again there (on the fake driver). Rows are real numbers; what is found is compared with
 * policy/recall.c.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "tests/unit/fake_gpu.h"
#include "tests/unit/gpu_rt.h"

#include "ipc/cuda/recall.h"
#include "policy/recall.h"

#define DIM 64u
#define ROW (DIM * 2) /* bytes of a key, and of a value */
#define LAYERS 2u
#define HEADS 3u
#define LANES (LAYERS * HEADS)
#define GROUP 2u
#define TOKENS 3u
#define MAX_ROWS 1200u
#define WANT 40u

static struct fake_gpu fake;
static struct harness h;
static struct gpu gpu;
static struct runtime rt;
static struct kvtier_cuda_window *window;
static struct fake_cuda_counts base;
static uint16_t *rows; /* [lanes][MAX_ROWS][K, V] */
static uint64_t noise;

static void assert_ok(int r)
{
	if (r < 0)
		fail_msg("%s: %s", kvtier_strerror(r), kvtier_last_error());
	assert_int_equal(r, 0);
}

static float normal(void)
{
	float s = 0;

	for (int i = 0; i < 6; i++) {
		noise = noise * 6364136223846793005u + 1442695040888963407u;
		s += (float)(noise >> 40) * 0x1p-24f - 0.5f;
	}
	return s * 1.41421356f;
}
static uint16_t bf16(float f)
{
	uint32_t u;

	memcpy(&u, &f, 4);
	return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
static uint16_t *row_of(uint32_t lane, uint32_t pos)
{
	return rows + ((size_t)lane * MAX_ROWS + pos) * 2 * DIM;
}

static void open_model(enum kvtier_dtype dtype)
{
	struct kvtier_layer_desc d[LAYERS];
	struct kvtier_open_opts o = {
		.size = sizeof(o), .socket = h.sock[0], .name = "test", .timeout_ms = 10000};
	struct kvtier_model_desc md = {.size = sizeof(md),
				       .name = "numbers",
				       .layers = d,
				       .n_layers = LAYERS,
				       .world = 1,
				       .dtype = dtype,
				       .head_dim = dtype ? DIM : 0};

	memset(&rt, 0, sizeof(rt));
	rt.layers = LAYERS;
	rt.heads = HEADS;
	rt.lanes = LANES;
	rt.k_bytes = rt.v_bytes = ROW;
	for (uint32_t i = 0; i < LAYERS; i++)
		d[i] = (struct kvtier_layer_desc){.kv_heads = HEADS, .k_bytes = ROW, .v_bytes = ROW};
	assert_ok(kvtier_open(&o, &rt.c));
	assert_ok(kvtier_model_register(rt.c, &md, &rt.m));
}

static void begin(const char *words, enum kvtier_dtype dtype)
{
	fake.set(words);
	base = fake_gpu_counts(&fake);
	harness_init(&h, false);
	strcpy(h.cfg.policy, "random");
	assert_true(harness_start(&h));
	open_model(dtype);
	assert_ok(gpu_open(&gpu));
	assert_ok(kvtier_cuda_window_create(rt.c, gpu.g, 1 << 20, &window));
	rows = calloc((size_t)LANES * MAX_ROWS * 2, ROW);
	assert_non_null(rows);
	noise = 42;
	for (size_t i = 0; i < (size_t)LANES * MAX_ROWS * 2 * DIM; i++)
		rows[i] = bf16(normal());
}

static void end(void)
{
	struct fake_cuda_counts c;

	kvtier_cuda_window_close(window);
	gpu_close(&gpu);
	rt_close(&rt);
	harness_stop(&h);
	harness_rm(h.dir);
	free(rows);
	c = fake_gpu_counts(&fake);
	assert_int_equal(c.violations, 0);
	assert_int_equal(c.bytes, base.bytes);
	assert_int_equal(c.host_allocs, base.host_allocs);
	assert_int_equal(c.registrations, base.registrations);
	assert_int_equal(c.events, base.events);
	assert_int_equal(c.streams, base.streams);
}

static void open_seq(struct gpu_seq *q, uint32_t id, uint32_t flags)
{
	struct kvtier_cuda_seq_opts g;
	struct kvtier_seq_opts o;

	assert_ok(gpu_prepare(q, &gpu, &rt, window, id, 1000, 300, MAX_ROWS, 0));
	g = gpu_opts(q, 1 << 17);
	g.flags = flags;
	o = rt_opts(&q->rt, KVT_EPHEMERAL, NULL);
	assert_ok(kvtier_cuda_seq_open(rt.c, rt.m, &o, &g, &q->rt.s));
}

static void append(struct gpu_seq *q, uint32_t n)
{
	assert_true(kvtier_cuda_counts(q->rt.s, q->counts) >= 0);
	assert_ok(cuda_enter(gpu.g));
	for (uint32_t lane = 0; lane < LANES; lane++)
		for (uint32_t i = 0; i < n; i++)
			for (int v = 0; v < 2; v++)
				assert_ok(gpu.d->copy_in(gpu_slot(q, lane, q->counts[lane] + i, v),
							 row_of(lane, q->rt.rows + i) + v * DIM, ROW,
							 q->stream));
	assert_ok(gpu.d->stream_sync(q->stream));
	cuda_leave(gpu.g);
	q->rt.rows += n;
	assert_ok(kvtier_cuda_append(q->rt.s, q->rt.rows - n, n));
	assert_ok(kvtier_cuda_settle(q->rt.s, 0, 10000, q->stream)); /* the daemon knows of them */
}

/* Rows on the GPU are what was written, wherever they are now. */
static void assert_device(struct gpu_seq *q)
{
	uint32_t stride, *map;
	uint64_t addr;
	uint16_t row[DIM];

	assert_true(kvtier_cuda_counts(q->rt.s, q->counts) >= 0);
	assert_ok(kvtier_cuda_map(q->rt.s, &addr, &stride));
	map = malloc((size_t)LANES * stride * sizeof(*map));
	assert_ok(cuda_enter(gpu.g));
	assert_ok(gpu.d->copy_out(map, addr, (size_t)LANES * stride * sizeof(*map), q->stream));
	assert_ok(gpu.d->stream_sync(q->stream));
	for (uint32_t lane = 0; lane < LANES; lane++)
		for (uint32_t i = 0; i < q->counts[lane]; i++)
			for (int v = 0; v < 2; v++) {
				uint32_t pos = map[(size_t)lane * stride + i];

				assert_true(pos < q->rt.rows);
				assert_ok(gpu.d->copy_out(row, gpu_slot(q, lane, i, v), ROW, q->stream));
				assert_ok(gpu.d->stream_sync(q->stream));
				assert_memory_equal(row, row_of(lane, pos) + v * DIM, ROW);
			}
	cuda_leave(gpu.g);
	free(map);
}

/* ---- a search, and the same by the definitions ------------------------------------------------------- */

struct turn {
	uint16_t q[HEADS * GROUP][TOKENS][DIM];
	struct kvtier_cuda_recall_opts o;
	uint32_t layer, counts[HEADS], pos[HEADS][WANT];
	_Alignas(16) uint16_t k[HEADS][WANT][DIM], v[HEADS][WANT][DIM];
};

static int launch(struct gpu_seq *q, struct turn *t)
{
	struct kvtier_cuda_recall_opts *o = &t->o;
	uint64_t mem, bytes = sizeof(*t);
	int r;

	assert_ok(cuda_enter(gpu.g));
	assert_ok(gpu.d->alloc(&mem, bytes));
	assert_ok(gpu.d->copy_in(mem, t, bytes, q->stream));
	*o = (struct kvtier_cuda_recall_opts){.size = sizeof(*o),
					      .group = GROUP,
					      .rows = WANT,
					      .probe = o->probe,
					      .flags = o->flags,
					      .queries = mem + offsetof(struct turn, q),
					      .k = mem + offsetof(struct turn, k),
					      .v = mem + offsetof(struct turn, v),
					      .k_head_stride = sizeof(t->k[0]),
					      .v_head_stride = sizeof(t->v[0]),
					      .k_row_stride = ROW,
					      .v_row_stride = ROW,
					      .counts = mem + offsetof(struct turn, counts),
					      .positions = mem + offsetof(struct turn, pos)};
	r = kvtier_cuda_recall(q->rt.s, t->layer, TOKENS, o, q->stream);
	if (!r) {
		struct kvtier_cuda_recall_opts keep = *o;

		assert_ok(gpu.d->copy_out(t, mem, bytes, q->stream));
		assert_ok(gpu.d->stream_sync(q->stream));
		*o = keep;
	}
	assert_ok(gpu.d->free(mem));
	cuda_leave(gpu.g);
	return r;
}

/* Queries of the layer that want one row of each head. */
static void ask_for(struct turn *t, uint32_t layer, const uint32_t *pos)
{
	memset(t, 0, sizeof(*t));
	t->layer = layer;
	for (uint32_t i = 0; i < HEADS * GROUP; i++)
		for (uint32_t token = 0; token < TOKENS; token++)
			for (uint32_t d = 0; d < DIM; d++) {
				uint32_t u = (uint32_t)row_of(layer * HEADS + i / GROUP, pos[i / GROUP])[d]
					     << 16;
				float key;

				memcpy(&key, &u, 4);
				t->q[i][token][d] = bf16(token == 1 ? 5 * key : normal());
			}
}

static bool is_resident(struct gpu_seq *q, uint32_t lane, uint32_t pos)
{
	return pos >= q->rt.s->watermark || bits_test(q->rt.s->resident + (size_t)lane * q->rt.s->words, pos);
}

/* Positions that policy/recall.c finds, ascending; from the directory and the rows as they were written. */
static uint32_t reference(struct gpu_seq *q, const struct turn *t, uint32_t head, uint32_t *ret)
{
	const struct direct_hdr *dir = q->rt.s->cu->direct->dir.addr;
	const struct direct_page *page = (const struct direct_page *)(dir + 1);
	uint32_t lane = t->layer * HEADS + head, n = 0, held = 0, used = dir->used;
	struct recall_run *run = calloc(used + 1, sizeof(*run));
	struct recall_hit hit[WANT];
	uint16_t *dev = malloc((size_t)q->rt.rows * ROW + 1);
	float sel[GROUP * TOKENS * DIM];
	struct recall_query rq = {.n = GROUP * TOKENS,
				  .dim = DIM,
				  .scale = 1 / sqrtf(DIM),
				  .dtype = ROW_BF16,
				  .norm = t->o.flags & KVT_RECALL_LOGITS ? RECALL_LOGIT : RECALL_MASS,
				  .probe = t->o.probe ? t->o.probe : 250,
				  .want = WANT,
				  .before = 8,
				  .after = 24,
				  .q = sel,
				  .isa = "ref"};
	struct recall_seen seen;
	uint8_t *scratch;
	int got;

	for (uint32_t i = 0; i < used; i++) {
		struct recall_run *u = &run[n];
		struct recall_sum *sum = malloc(recall_sum_bytes(128, DIM));
		uint16_t *keys = malloc(128 * ROW);
		uint32_t r = 0;

		*u = (struct recall_run){.k = keys,
					 .sum = sum,
					 .pos = page[i].pos,
					 .first = page[i].first,
					 .span = page[i].span,
					 .rows = page[i].rows};
		for (uint32_t b = 0; page[i].place && page[i].lane == lane && b < page[i].span * 64u; b++) {
			uint32_t pos = page[i].first + b;

			if (!bits_test(page[i].pos, b))
				continue;
			memcpy(keys + (size_t)r * DIM, row_of(lane, pos), ROW);
			if (pos < page[i].limit && pos < q->rt.rows && !is_resident(q, lane, pos) &&
			    !(page[i].dead[r / 32] >> r % 32 & 1))
				u->alive[r / 32] |= 1u << r % 32;
			r++;
		}
		if (!r) {
			free(sum);
			free(keys);
			continue;
		}
		recall_summarise(keys, r, DIM, ROW_BF16, sum);
		n++;
	}
	for (uint32_t pos = 0; pos < q->rt.rows; pos++)
		if (is_resident(q, lane, pos))
			memcpy(dev + (size_t)held++ * DIM, row_of(lane, pos), ROW);
	if (!(t->o.flags & KVT_RECALL_NO_RESIDENT)) {
		rq.resident = dev;
		rq.resident_stride = ROW;
		rq.resident_n = held;
	}
	recall_load(sel, t->q[head * GROUP], GROUP * TOKENS * DIM,
		    ROW_BF16); /* three tokens: all are selected */
	scratch = malloc(recall_scratch(&rq, run, n));
	got = recall_search(&rq, run, n, scratch, hit, &seen);
	assert_true(got >= 0);
	for (int i = 0; i < got; i++) {
		int at = i;

		for (; at && ret[at - 1] > hit[i].pos; at--)
			ret[at] = ret[at - 1];
		ret[at] = hit[i].pos;
	}
	for (uint32_t i = 0; i < n; i++) {
		free((void *)run[i].k);
		free((void *)run[i].sum);
	}
	free(run);
	free(dev);
	free(scratch);
	return (uint32_t)got;
}

/* A demoted row of each head of the layer; false: there is none. */
static bool demoted(struct gpu_seq *q, uint32_t layer, uint32_t from, uint32_t *ret)
{
	for (uint32_t i = 0; i < HEADS; i++)
		for (ret[i] = from; is_resident(q, layer * HEADS + i, ret[i]); ret[i]++)
			if (ret[i] + 1 >= q->rt.rows)
				return false;
	return true;
}

static void assert_found(struct gpu_seq *q, uint32_t layer, uint32_t from, uint32_t probe, uint32_t flags)
{
	struct turn *t = malloc(sizeof(*t));
	uint32_t want[HEADS], ref[WANT];

	if (!demoted(q, layer, from, want))
		fail_msg("no row of layer %u from %u on is demoted, of %u", layer, from, q->rt.rows);
	ask_for(t, layer, want);
	t->o.probe = probe;
	t->o.flags = flags;
	assert_ok(launch(q, t));
	for (uint32_t i = 0; i < HEADS; i++) {
		uint32_t lane = layer * HEADS + i, n = reference(q, t, i, ref);
		bool there = false;

		assert_int_equal(t->counts[i], n);
		assert_memory_equal(t->pos[i], ref, n * sizeof(*ref));
		for (uint32_t j = 0; j < n; j++) {
			assert_false(is_resident(q, lane, t->pos[i][j]));
			assert_memory_equal(t->k[i][j], row_of(lane, t->pos[i][j]), ROW);
			assert_memory_equal(t->v[i][j], row_of(lane, t->pos[i][j]) + DIM, ROW);
			there |= t->pos[i][j] == want[i];
		}
		assert_true(there || probe < 1000);
	}
	free(t);
}

static void demote(struct gpu_seq *q, uint32_t device)
{
	assert_ok(gpu_plan(q, device, KVT_ROWS_ALL, 0, NULL));
}

/* ---- tests ---------------------------------------------------------------------------------------------- */

static void whole(const char *words)
{
	struct gpu_seq q;

	begin(words, KVT_DTYPE_BF16);
	open_seq(&q, 1, KVT_CUDA_DIRECT);
	append(&q, 600);
	assert_ok(kvtier_cuda_recall_prepare(q.rt.s, q.stream)); /* of nothing */
	demote(&q, 150);
	assert_ok(kvtier_cuda_recall_prepare(q.rt.s, q.stream));
	assert_true(q.rt.s->cu->recall->pages >= LANES * 450 / 128);
	assert_found(&q, 0, 10, 1000, 0);
	assert_found(&q, 1, 200, 250, 0);
	assert_found(&q, 1, 200, 250, KVT_RECALL_LOGITS);
	assert_found(&q, 0, 300, 500, KVT_RECALL_NO_RESIDENT);
	assert_int_equal(kvtier_cuda_recall_check(q.rt.s), 0);
	/* More rows, another plan, without a prepare: what left the device is not found yet, nor anything
	 * wrong. */
	append(&q, 300);
	demote(&q, 100);
	assert_int_equal(kvtier_cuda_recall_check(q.rt.s), 0);
	assert_ok(kvtier_cuda_recall_prepare(q.rt.s, q.stream));
	assert_found(&q, 0, 650, 1000, 0);
	assert_found(&q, 1, 0, 250, 0);
	/* Rows come back straight from published memory, and are not found any more. */
	demote(&q, 700);
	assert_device(&q);
	assert_found(&q, 1, 0, 1000, 0);
	demote(&q, 120);
	assert_found(&q, 0, 400, 1000, 0);
	/* What is cut is gone, and who searched meanwhile hears of it. */
	assert_int_equal(kvtier_cuda_recall_check(q.rt.s), 0);
	assert_ok(kvtier_seq_truncate(q.rt.s, 400));
	q.rt.rows = 400;
	assert_int_equal(kvtier_cuda_recall_check(q.rt.s), KVT_AGAIN);
	assert_ok(kvtier_cuda_recall_prepare(q.rt.s, q.stream));
	assert_found(&q, 0, 100, 1000, 0);
	assert_int_equal(kvtier_cuda_recall_check(q.rt.s), 0);
	gpu_seq_free(&q, false);
	end();
}

static void test_whole(void **state)
{
	whole(NULL);
}

static void test_whole_async(void **state)
{
	whole("async");
}

/* Two sequences of one client read the same segments: one registration each. */
static void test_shared(void **state)
{
	struct fake_cuda_counts one, two;
	struct gpu_seq q[2];

	begin(NULL, KVT_DTYPE_BF16);
	for (uint32_t i = 0; i < 2; i++) {
		open_seq(&q[i], i + 1, KVT_CUDA_DIRECT);
		append(&q[i], 300);
		demote(&q[i], 50);
	}
	assert_ok(kvtier_cuda_recall_prepare(q[0].rt.s, q[0].stream));
	one = fake_gpu_counts(&fake);
	assert_ok(kvtier_cuda_recall_prepare(q[1].rt.s, q[1].stream));
	two = fake_gpu_counts(&fake);
	assert_int_equal(one.registrations, two.registrations);
	assert_true(one.registrations > base.registrations + 1);
	assert_found(&q[1], 0, 100, 1000, 0);
	gpu_seq_free(&q[1], false);
	assert_found(&q[0], 0, 100, 1000, 0); /* and the other one's end does not take them away */
	gpu_seq_free(&q[0], false);
	end();
}

static void test_refused(void **state)
{
	struct gpu_seq q;
	struct turn *t = calloc(1, sizeof(*t));
	struct kvtier_cuda_recall_opts o;

	begin(NULL, KVT_DTYPE_BF16);
	open_seq(&q, 1, 0);
	assert_int_equal(kvtier_cuda_recall_prepare(q.rt.s, q.stream), KVT_E_INVAL);
	assert_int_equal(kvtier_cuda_recall_check(q.rt.s), KVT_E_INVAL);
	gpu_seq_free(&q, false);
	open_seq(&q, 2, KVT_CUDA_DIRECT);
	append(&q, 300);
	demote(&q, 50);
	assert_int_equal(launch(&q, t), KVT_E_INVAL); /* prepare comes first */
	assert_ok(kvtier_cuda_recall_prepare(q.rt.s, q.stream));
	assert_ok(launch(&q, t));
	o = t->o;
#define REFUSED(field, x)                                                                                      \
	do {                                                                                                   \
		struct kvtier_cuda_recall_opts wrong = o;                                                      \
		wrong.field = x;                                                                               \
		assert_int_equal(kvtier_cuda_recall(q.rt.s, 0, TOKENS, &wrong, q.stream), KVT_E_INVAL);        \
	} while (0)
	REFUSED(rows, 0);
	REFUSED(probe, 1001);
	REFUSED(flags, 8);
	REFUSED(flags, KVT_RECALL_ALONE + 64);
	REFUSED(before, 1025);
	REFUSED(after, 1025);
	REFUSED(group, 64);
	REFUSED(scale, -1);
	REFUSED(scale, NAN);
	REFUSED(queries, 0);
	REFUSED(queries, o.queries + 1);
	REFUSED(k, 0);
	REFUSED(v, 0);
	REFUSED(v, o.v + 8);
	REFUSED(counts, 0);
	REFUSED(positions, o.positions + 2);
	REFUSED(k_row_stride, ROW - 16);
	assert_int_equal(kvtier_cuda_recall(q.rt.s, LAYERS, TOKENS, &o, q.stream), KVT_E_INVAL);
	assert_int_equal(kvtier_cuda_recall(q.rt.s, 0, 0, &o, q.stream), KVT_E_INVAL);
	assert_int_equal(kvtier_cuda_recall(NULL, 0, TOKENS, &o, q.stream), KVT_E_INVAL);
	gpu_seq_free(&q, false);
	end();
	begin(NULL, KVT_DTYPE_OPAQUE);
	open_seq(&q, 3, KVT_CUDA_DIRECT);
	assert_int_equal(kvtier_cuda_recall_prepare(q.rt.s, q.stream), KVT_E_MODEL);
	gpu_seq_free(&q, false);
	end();
	free(t);
}

/* Every call of the driver that prepare and recall make may fail: a clear error, nothing leaked, and the next
 * works. */
static void test_failures(void **state)
{
	static const char *const calls[] = {
		"cuMemAlloc_v2",  "cuMemHostRegister_v2", "cuMemHostAlloc", "cuEventCreate",
		"cuLaunchKernel", "cuMemcpyHtoDAsync_v2", "cuEventRecord",  "cuMemHostGetDevicePointer_v2"};
	char words[64];
	struct gpu_seq q;

	begin(NULL, KVT_DTYPE_BF16);
	for (size_t i = 0; i < ARRAY_SIZE(calls); i++)
		for (int n = 1; n <= 3; n++) {
			int r;

			open_seq(&q, (uint32_t)(10 + i * 4) + (uint32_t)n, KVT_CUDA_DIRECT);
			append(&q, 200);
			demote(&q, 50);
			snprintf(words, sizeof(words), "fail=%s:1@%d", calls[i], n);
			fake.set(words);
			r = kvtier_cuda_recall_prepare(q.rt.s, q.stream);
			fake.set(NULL);
			assert_true(r == KVT_E_GPU || (r == 0 && n > 1));
			assert_ok(kvtier_cuda_recall_prepare(q.rt.s, q.stream));
			assert_found(&q, 0, 20, 1000, 0);
			gpu_seq_free(&q, true);
		}
	end();
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_whole),    cmocka_unit_test(test_whole_async),
		cmocka_unit_test(test_shared),   cmocka_unit_test(test_refused),
		cmocka_unit_test(test_failures),
	};
	int r;

	if (!fake_gpu_init(&fake) || !fake_gpu_hooks(&fake)) {
		printf("1..0 # SKIP %s is not built (make tests-bin)\n", fake.path);
		return 0;
	}
	r = cmocka_run_group_tests(tests, NULL, NULL);
	unlink(fake.kernels);
	return r;
}
