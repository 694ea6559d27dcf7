/* SPDX-License-Identifier: MIT */
/*
 * Bytes per second of the kernels that move rows, all lanes of a 7B model (28 layers, 4 KV heads) in one
 * launch, beside what the hardware does: a pinned copy of the same bytes, a copy inside the GPU. Kernel and
 * floor in turns, median of rounds, by events. JSON lines.
 *
 *    bench_move            every figure
 *    bench_move --only W   milliseconds of one kernel, a number alone: in-place, ordered
 * (tests/gpu/bench_gather.py)
 */
#include "shm/bits.h"
#include "shm/window.h"
#include "tests/gpu/gpu.h"

#define LANES 112u
#define ROWS 32768u
#define WORDS (ROWS / 64)
#define STAGE 10240u
#define PAGE_ROWS 128u
#define ROUNDS 9
#define NOISE ((size_t)64 << 20)
#define MIB ((size_t)1 << 20)

struct bench {
	struct gpu u;
	void *from, *to; /* events */
	int (*copy)(uint64_t dst, uint64_t src, size_t bytes, void *stream);
	uint64_t noise, mem, other, d_lane, d_other, lane_bytes;
	uint32_t width;
	struct cuda_maps maps;
	uint32_t *slot_of, *pos_of;
};

static int by_float(const void *a, const void *b)
{
	float x = *(const float *)a, y = *(const float *)b;

	return x < y ? -1 : x > y;
}

/* ---- what is timed ---- */

typedef void (*work)(struct bench *b, void *arg);

static float once(struct bench *b, work before, work f, void *arg)
{
	float ms;

	if (before)
		before(b, arg);
	MUST(&b->u, b->u.d->event_record(b->from, b->u.stream));
	f(b, arg);
	MUST(&b->u, b->u.d->event_record(b->to, b->u.stream));
	MUST(&b->u, b->u.d->event_sync(b->to));
	MUST(&b->u, b->u.d->event_elapsed(&ms, b->from, b->to));
	return ms;
}

/* Medians of both, in turns, one round to warm up. floor may be NULL. */
static void race(struct bench *b, work before, work kernel, work floor, void *arg, float *ret_kernel,
		 float *ret_floor)
{
	float k[ROUNDS + 1], f[ROUNDS + 1];

	for (int i = 0; i <= ROUNDS; i++) {
		k[i] = once(b, before, kernel, arg);
		f[i] = floor ? once(b, NULL, floor, arg) : 0;
	}
	qsort(k + 1, ROUNDS, sizeof(*k), by_float);
	qsort(f + 1, ROUNDS, sizeof(*f), by_float);
	*ret_kernel = k[1 + ROUNDS / 2];
	*ret_floor = f[1 + ROUNDS / 2];
}

static void line(const char *name, double bytes, float ms, const char *rival, double rival_bytes,
		 float rival_ms, double target)
{
	double v = bytes / ms / 1e6, r = rival_bytes / rival_ms / 1e6;

	printf("{\"name\":\"%s\",\"value\":%.4g,\"unit\":\"GB/"
	       "s\",\"rival\":\"%s\",\"rival_value\":%.4g,\"ratio\":%.3f,"
	       "\"target\":\">=%.2f\",\"pass\":%s}\n",
	       name, v, rival, r, v / r, target, v / r >= target ? "true" : "false");
	fflush(stdout);
}

/* ---- a cache ---- */

static void fill(struct bench *b, uint64_t to, size_t bytes)
{
	for (size_t at = 0; at < bytes; at += NOISE)
		MUST(&b->u, b->copy(to + at, b->noise, MIN(NOISE, bytes - at), b->u.stream));
}

static uint64_t put_lanes(struct bench *b, uint64_t mem)
{
	struct cuda_lane lane[LANES];

	for (uint32_t l = 0; l < LANES; l++)
		lane[l] = (struct cuda_lane){mem + 2 * l * b->lane_bytes,
					     mem + (2 * l + 1) * b->lane_bytes,
					     b->width,
					     b->width,
					     b->width,
					     b->width};
	return gpu_new(&b->u, lane, sizeof(lane));
}

/* ROWS rows of every lane, in slots as after a while of filling holes: in no order. */
static void cache_open(struct bench *b, uint32_t width, bool two)
{
	size_t n = (size_t)LANES * ROWS, bytes;

	b->width = width;
	b->lane_bytes = (uint64_t)(ROWS + STAGE) * width;
	bytes = 2 * LANES * b->lane_bytes;
	b->mem = gpu_alloc(&b->u, bytes);
	fill(b, b->mem, bytes);
	b->d_lane = put_lanes(b, b->mem);
	b->other = two ? gpu_alloc(&b->u, bytes) : 0;
	b->d_other = two ? put_lanes(b, b->other) : 0;
	b->slot_of = need(n, 4);
	b->pos_of = need(n, 4);
	for (uint32_t l = 0; l < LANES; l++) {
		uint32_t *s = b->slot_of + (size_t)l * ROWS;

		for (uint32_t i = 0; i < ROWS; i++)
			s[i] = i;
		for (uint32_t i = ROWS - 1; i; i--) {
			uint32_t j = below(i + 1), t = s[i];

			s[i] = s[j];
			s[j] = t;
		}
		for (uint32_t i = 0; i < ROWS; i++)
			b->pos_of[(size_t)l * ROWS + s[i]] = i;
	}
	b->maps = (struct cuda_maps){gpu_new(&b->u, b->slot_of, n * 4), gpu_new(&b->u, b->pos_of, n * 4), ROWS,
				     ROWS};
}

static void cache_close(struct bench *b)
{
	gpu_free(&b->u, b->mem);
	if (b->other)
		gpu_free(&b->u, b->other);
	gpu_free(&b->u, b->maps.slot_of);
	gpu_free(&b->u, b->maps.pos_of);
	free(b->slot_of);
	free(b->pos_of);
}

/* One row of `of` in 1000, every lane anew. */
static uint64_t *some_rows(uint32_t of)
{
	uint64_t *bits = need((size_t)LANES * WORDS, 8);

	for (size_t i = 0; i < (size_t)LANES * ROWS; i++)
		if (below(1000) < of)
			bits[i / 64] |= UINT64_C(1) << i % 64;
	return bits;
}

/* ---- gather ---- */

struct out {
	struct gather_args a;
	struct word_args w;
	struct window_mem *ring;
	size_t useful;
};

static void run_gather(struct bench *b, void *arg)
{
	struct out *o = arg;

	MUST(&b->u, kern_gather(b->u.g, &o->a, b->u.stream));
	MUST(&b->u, kern_word(b->u.g, &o->w, b->u.stream));
}

static void floor_out(struct bench *b, void *arg)
{
	struct out *o = arg;

	MUST(&b->u, b->u.d->copy_out(o->ring->p, b->mem, o->useful, b->u.stream));
}

static uint32_t cut(const struct bench *b, const uint64_t *out, struct plan_page *page)
{
	uint64_t off = 0;
	uint32_t n = 0;

	for (uint32_t l = 0; l < LANES; l++)
		for (uint32_t p = 0; p < ROWS;) {
			struct plan_page g = {.lane = (uint16_t)l, .tier = KVT_TIER_DRAM, .off = off};

			for (;
			     p < ROWS && g.rows < PAGE_ROWS && (!g.rows || p / 64 - g.first / 64 < WINDOW_SPAN);
			     p++)
				if (bits_test(out + (size_t)l * WORDS, p)) {
					g.first = g.rows++ ? g.first : p;
					g.last = p + 1;
				}
			if (!g.rows)
				break;
			off += window_out_bytes(g.rows, 2 * b->width);
			g.end = off;
			page[n++] = g;
		}
	return n;
}

static void bench_gather(struct bench *b, uint32_t width, struct window_mem *ring)
{
	struct plan_page *page = need((size_t)LANES * ROWS / 16, sizeof(*page));
	uint64_t *out, *dram = some_rows(1000), bitmaps[2];
	struct out o = {.ring = ring};
	char name[160];
	uint32_t n;
	float k, f;

	cache_open(b, width, false);
	out = some_rows((uint32_t)(1000.0 * 250 * MIB / (2.0 * LANES * ROWS * width)));
	n = cut(b, out, page);
	bitmaps[0] = gpu_new(&b->u, out, (size_t)LANES * WORDS * 8);
	bitmaps[1] = gpu_new(&b->u, dram, (size_t)LANES * WORDS * 8);
	o.a = (struct gather_args){.maps = b->maps,
				   .lane = b->d_lane,
				   .copy_out = bitmaps[0],
				   .to_dram = bitmaps[1],
				   .page = gpu_new(&b->u, page, n * sizeof(*page)),
				   .plan = 1,
				   .out = ring->addr,
				   .crc = b->u.g->crc,
				   .words = WORDS};
	o.w = (struct word_args){ring->addr + ring->bytes - 64, 1};
	for (int whole = 1; whole >= 0; whole--) {
		o.useful = 0;
		for (o.a.n = 0; o.a.n < n && page[o.a.n].end <= (whole ? ring->bytes - 4096 : 32 * MIB);
		     o.a.n++)
			o.useful += (size_t)page[o.a.n].rows * 2 * width;
		race(b, NULL, run_gather, floor_out, &o, &k, &f);
		snprintf(name, sizeof(name), "demote: gather of %u-byte rows, CRC32C, %zu MiB in one launch",
			 width, o.useful / MIB);
		line(name, (double)o.useful, k, "cudaMemcpyAsync of the same bytes to pinned memory",
		     (double)o.useful, f, 0.93);
	}
	gpu_free(&b->u, o.a.page);
	gpu_free(&b->u, bitmaps[0]);
	gpu_free(&b->u, bitmaps[1]);
	cache_close(b);
	free(page);
	free(out);
	free(dram);
}

/* ---- scatter ---- */

struct in {
	struct scatter_args a;
	struct window_mem *ring;
	uint64_t staging;
	size_t useful, all;
};

static void run_scatter(struct bench *b, void *arg)
{
	MUST(&b->u, kern_scatter(b->u.g, &((struct in *)arg)->a, b->u.stream));
}

static void floor_in(struct bench *b, void *arg)
{
	struct in *i = arg;

	MUST(&b->u, b->u.d->copy_in(i->staging, i->ring->p, i->all, b->u.stream));
}

/* Pages of 128 rows out of 256 positions, `density` percent of each wanted. */
static void bench_scatter(struct bench *b, uint32_t width, uint32_t density, bool check,
			  struct window_mem *ring, double target)
{
	size_t page_bytes = 2 * PAGE_ROWS * (size_t)width, step = page_bytes + sizeof(struct window_in);
	uint32_t most = ROWS / 256, n = (uint32_t)MIN(ring->bytes / step, LANES * most), lanes = LANES;
	struct scatter_page *page = need(n, sizeof(*page));
	uint64_t *bring = need((size_t)LANES * WORDS, 8);
	struct in in = {.ring = ring};
	uint32_t zero = 0, *room = need(LANES, 4);
	char name[160];
	float k, f;

	for (uint32_t i = 0; i < n; i++) {
		struct scatter_page *g = &page[i];
		uint32_t lane = i % lanes;

		*g = (struct scatter_page){
			.lane = lane, .first = i / lanes * 256, .span = 4, .rows = PAGE_ROWS};
		g->k = ring->addr + i * step + sizeof(struct window_in);
		g->v = g->k + PAGE_ROWS * width;
		for (uint32_t r = 0; r < PAGE_ROWS; r++) {
			uint32_t bit = 2 * r + below(2);

			bits_set(g->pos, bit);
			if (below(100) < density && room[lane] < STAGE) {
				bits_set(g->mask, bit);
				bits_set(bring + (size_t)lane * WORDS, g->first + bit);
				g->wanted++;
				room[lane]++;
			}
		}
		in.useful += (size_t)g->wanted * 2 * width;
	}
	in.all = n * page_bytes;
	in.staging = gpu_alloc(&b->u, in.all);
	cache_open(b, width, false);
	in.a = (struct scatter_args){.lane = b->d_lane,
				     .page = gpu_new(&b->u, page, n * sizeof(*page)),
				     .bring_in = gpu_new(&b->u, bring, (size_t)LANES * WORDS * 8),
				     .bad = check ? gpu_new(&b->u, &zero, 4) : 0,
				     .crc = b->u.g->crc,
				     .words = WORDS,
				     .cap = ROWS,
				     .n = n};
	race(b, NULL, run_scatter, floor_in, &in, &k, &f);
	snprintf(name, sizeof(name), "promote: scatter of %u-byte rows, %u %% of each page wanted%s", width,
		 density, check ? ", checked" : "");
	line(name, (double)in.useful, k, "cudaMemcpyAsync of whole pages from pinned memory", (double)in.all, f,
	     target);
	gpu_free(&b->u, in.a.page);
	gpu_free(&b->u, in.a.bring_in);
	if (check)
		gpu_free(&b->u, in.a.bad);
	gpu_free(&b->u, in.staging);
	cache_close(b);
	free(page);
	free(bring);
	free(room);
}

/* ---- compact ---- */

struct close_up {
	struct compact_args a;
	size_t moved;
	uint64_t maps[2];
};

static void restore(struct bench *b, void *arg)
{
	struct close_up *c = arg;

	MUST(&b->u, b->copy(b->maps.slot_of, c->maps[0], (size_t)LANES * ROWS * 4, b->u.stream));
	MUST(&b->u, b->copy(b->maps.pos_of, c->maps[1], (size_t)LANES * ROWS * 4, b->u.stream));
}

static void run_compact(struct bench *b, void *arg)
{
	MUST(&b->u, kern_compact(b->u.g, &((struct close_up *)arg)->a, b->u.stream));
}

static void floor_copy(struct bench *b, void *arg)
{
	struct close_up *c = arg;

	MUST(&b->u, b->copy(b->other, b->mem, c->moved, b->u.stream));
}

/* Half of the rows stay, at random; only: no floor, print milliseconds. */
static void bench_compact(struct bench *b, uint32_t width, bool ordered, bool only)
{
	uint64_t *stay = some_rows(500), *none = need((size_t)LANES * WORDS, 8);
	uint32_t count[LANES], zero[LANES] = {0}, after[LANES];
	struct close_up c = {.moved = 0};
	char name[160];
	float k, f;

	cache_open(b, width, true);
	for (uint32_t l = 0; l < LANES; l++) {
		const uint64_t *bits = stay + (size_t)l * WORDS;

		count[l] = ROWS;
		after[l] = bits_rank(bits, ROWS);
		for (uint32_t p = 0; p < ROWS; p++)
			if (bits_test(bits, p) && (ordered || b->slot_of[(size_t)l * ROWS + p] >= after[l]))
				c.moved += 2 * width;
	}
	c.maps[0] = gpu_new(&b->u, b->slot_of, (size_t)LANES * ROWS * 4);
	c.maps[1] = gpu_new(&b->u, b->pos_of, (size_t)LANES * ROWS * 4);
	c.a = (struct compact_args){.maps = b->maps,
				    .lane = b->d_lane,
				    .to = ordered ? b->d_other : 0,
				    .resident = gpu_new(&b->u, stay, (size_t)LANES * WORDS * 8),
				    .bring_in = gpu_new(&b->u, none, (size_t)LANES * WORDS * 8),
				    .count = gpu_new(&b->u, count, sizeof(count)),
				    .in = gpu_new(&b->u, zero, sizeof(zero)),
				    .after = gpu_new(&b->u, after, sizeof(after)),
				    .scratch = gpu_alloc(&b->u, compact_scratch(LANES, ROWS)),
				    .lanes = LANES,
				    .words = WORDS,
				    .watermark = ROWS,
				    .rows = ROWS,
				    .cap = ROWS};
	MUST(&b->u, b->u.d->set8(c.a.scratch, 0, compact_scratch(LANES, ROWS), b->u.stream));
	race(b, restore, run_compact, only ? NULL : floor_copy, &c, &k, &f);
	if (only) {
		printf("%.4f\n", k);
	} else {
		snprintf(name, sizeof(name),
			 "compact: half of 32k %u-byte rows stay, %s, bytes read and written", width,
			 ordered ? "out of place in order" : "in place, holes filled");
		line(name, 2.0 * (double)c.moved, k, "copy of the same bytes inside the GPU",
		     2.0 * (double)c.moved, f, 0.75);
	}
	for (uint64_t *a = (uint64_t[]){c.maps[0], c.maps[1], c.a.resident, c.a.bring_in, c.a.count, c.a.in,
					c.a.after, c.a.scratch, 0};
	     *a; a++)
		gpu_free(&b->u, *a);
	cache_close(b);
	free(stay);
	free(none);
}

static void bench_open(struct bench *b)
{
	uint64_t *noise = need(NOISE / 8, 8);

	random_state = 20261123;
	gpu_open(&b->u);
	b->copy = (int (*)(uint64_t, uint64_t, size_t, void *))gpu_symbol("cuMemcpyDtoDAsync_v2");
	if (!b->copy)
		die("libcuda.so.1 has no cuMemcpyDtoDAsync_v2");
	MUST(&b->u, b->u.d->event_create(&b->from, 0));
	MUST(&b->u, b->u.d->event_create(&b->to, 0));
	for (size_t i = 0; i < NOISE / 8; i++)
		noise[i] = mix(i);
	b->noise = gpu_new(&b->u, noise, NOISE);
	free(noise);
}

int main(int argc, char **argv)
{
	struct bench b = {0};
	struct window_mem ring;

	bench_open(&b);
	if (argc == 3 && strcmp(argv[1], "--only") == 0) {
		bench_compact(&b, 256, strcmp(argv[2], "ordered") == 0, true);
		return 0;
	}
	ring = window_new(&b.u, 256 * MIB);
	for (size_t at = 0; at < ring.bytes; at += NOISE)
		gpu_get(&b.u, ring.p + at, b.noise, NOISE);
	bench_gather(&b, 256, &ring);
	bench_gather(&b, 128, &ring);
	bench_scatter(&b, 256, 100, false, &ring, 0.90);
	bench_scatter(&b, 256, 75, false, &ring, 0.60);
	bench_scatter(&b, 256, 10, false, &ring, 0.25);
	bench_scatter(&b, 128, 100, false, &ring, 0.90);
	bench_compact(&b, 256, false, false);
	bench_compact(&b, 256, true, false);
	bench_compact(&b, 128, false, false);
	bench_compact(&b, 128, true, false);
	window_free(&b.u, &ring);
	gpu_close(&b.u);
	return 0;
}
