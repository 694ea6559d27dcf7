/* SPDX-License-Identifier: MIT */
/*
 * The kernels that move rows, against what is known of the rows: content follows from (lane, position), so
 * after every step all of the GPU's memory can be computed and compared, poison where nothing may have been
 * written included. A case is one sequence through several plans. TAP. --small: few rows, for the fake driver.
 */
#include <isa-l/crc.h>
#include <time.h>
#include "shm/window.h"
#include "tests/gpu/rows.h"

enum keep { RANDOM, EVERYTHING, NOTHING, FRONT, BACK, ONE, KEEPS };
static const char *const keep_names[] = {"half", "everything", "nothing", "front", "back", "one row"};

/* ---- rows are appended ---- */

static void append(struct run *r, uint32_t n)
{
	uint64_t d_count = gpu_new(r->u, r->count, r->s.lanes * 4);
	struct extend_args a = {maps(r), d_count, r->s.lanes, r->rows, n, 0};

	for (uint32_t l = 0; l < r->s.lanes; l++)
		for (uint32_t i = 0; i < n; i++) {
			uint32_t p = r->rows + i, s = r->count[l]++;

			put_row(r, r->now, l, s, p);
			r->h_slot[(size_t)l * r->max_rows + p] = s;
			r->h_pos[(size_t)l * r->s.cap + s] = p;
			bits_set(row_bits(r, r->resident, l), p);
		}
	gpu_put(r->u, r->mem, r->now, r->bytes);
	launch_begin(r->u);
	MUST(r->u, kern_extend(r->u->g, &a, r->u->stream));
	launch_end(r->u);
	ok(maps_are(r), "extend: %u rows from %u", n, r->rows);
	r->rows += n;
	gpu_free(r->u, d_count);
}

/* ---- a plan ---- */

static bool keeps(const struct run *r, enum keep how, uint32_t lane, uint32_t p)
{
	uint32_t slot = r->h_slot[(size_t)lane * r->max_rows + p];

	switch (how) {
	case EVERYTHING:
		return true;
	case NOTHING:
		return false;
	case FRONT:
		return slot < r->count[lane] / 3;
	case BACK:
		return slot >= r->count[lane] / 3;
	case ONE:
		return slot == r->count[lane] / 2;
	default:
		return below(2);
	}
}

static void decide(struct run *r, enum keep how, uint32_t tail)
{
	size_t all = (size_t)r->s.lanes * stride_words(r) * 8;

	r->watermark =
		MAX(r->watermark, r->rows - MIN(tail, r->rows)); /* rows past the last one are all there */
	memset(r->kept, 0, all);
	memset(r->out, 0, all);
	memset(r->dram, 0, all);
	memset(r->bring, 0, all);
	for (uint32_t l = 0; l < r->s.lanes; l++) {
		uint64_t *res = row_bits(r, r->resident, l), *stored = row_bits(r, r->stored, l);
		uint32_t room = below(4) ? r->s.stage : 0;

		uint32_t kept = r->rows - r->watermark;

		r->in[l] = 0;
		for (uint32_t p = 0; p < r->watermark; p++)
			if (bits_test(res, p) && keeps(r, how, l, p)) {
				bits_set(row_bits(r, r->kept, l), p);
				kept++;
			}
		for (uint32_t p = 0; p < r->watermark; p++) {
			bool here = bits_test(res, p);

			if (here && !bits_test(row_bits(r, r->kept, l), p) && !bits_test(stored, p) &&
			    below(8)) {
				bits_set(row_bits(r, r->out, l), p);
			} else if (!here && bits_test(stored, p) && r->in[l] < room &&
				   kept + r->in[l] < r->s.cap && below(2)) {
				bits_set(row_bits(r, r->bring, l), p);
				bits_set(row_bits(r, r->kept, l), p);
				r->in[l]++;
			}
			if (below(3))
				bits_set(row_bits(r, r->dram, l), p);
		}
		r->after[l] = kept + r->in[l];
	}
}

/* [lanes][words of the watermark] in GPU memory. */
static uint64_t upload_bits(struct run *r, uint64_t *bits)
{
	uint32_t words = (uint32_t)BITS_WORDS(r->watermark);
	uint64_t *b = need((size_t)r->s.lanes * words, 8), addr;

	for (uint32_t l = 0; l < r->s.lanes; l++)
		memcpy(b + (size_t)l * words, row_bits(r, bits, l), words * 8);
	addr = gpu_new(r->u, b, (size_t)r->s.lanes * words * 8);
	free(b);
	return addr;
}

/* ---- rows leave ---- */

static uint32_t cut_pages(struct run *r, uint32_t row_limit, struct plan_page *page)
{
	uint64_t off = 0, end = 0;
	uint32_t n = 0;

	for (uint32_t l = 0; l < r->s.lanes; l++)
		for (int tier = KVT_TIER_DRAM; tier <= KVT_TIER_NVME; tier++)
			for (uint32_t p = 0; p < r->watermark;) {
				struct plan_page g = {.lane = (uint16_t)l, .tier = (uint8_t)tier};
				uint64_t bytes;

				for (; p < r->watermark && g.rows < row_limit; p++) {
					if (g.rows && p / 64 - g.first / 64 >= WINDOW_SPAN)
						break;
					if (!bits_test(row_bits(r, r->out, l), p) ||
					    bits_test(row_bits(r, r->dram, l), p) != (tier == KVT_TIER_DRAM))
						continue;
					if (!g.rows++)
						g.first = p;
					g.last = p + 1;
				}
				if (!g.rows)
					break;
				bytes = window_out_bytes(g.rows, r->lane[l].k_bytes + r->lane[l].v_bytes);
				if (off + bytes >
				    r->s.ring) { /* a wrap skips what is left, but no more than waits for all */
					end += MIN(r->s.ring - off, r->s.ring - bytes);
					off = 0;
				}
				g.off = off;
				off += bytes;
				end += bytes;
				g.end = end;
				page[n++] = g;
			}
	return n;
}

/* The page as it must be in the ring. */
static void page_fill(struct run *r, uint8_t *ring, const struct plan_page *g, uint32_t index, uint64_t plan)
{
	struct window_out *h = (struct window_out *)(ring + g->off);
	uint8_t *data = (uint8_t *)(h + 1), *at = data;

	for (int plane = 0; plane < 2; plane++)
		for (uint32_t p = g->first; p < g->last; p++)
			if (bits_test(row_bits(r, r->out, g->lane), p) &&
			    bits_test(row_bits(r, r->dram, g->lane), p) == (g->tier == KVT_TIER_DRAM)) {
				row_fill(r, g->lane, p, plane, at);
				at += plane ? r->lane[g->lane].v_bytes : r->lane[g->lane].k_bytes;
			}
	*h = (struct window_out){.plan = plan, .page = index, .crc = crc32_iscsi(data, (int)(at - data), 0)};
}

static void gather(struct run *r, uint32_t row_limit)
{
	struct plan_page *page = need((size_t)r->s.lanes * (r->watermark + 1) * 2, sizeof(*page));
	uint32_t n = cut_pages(r, row_limit, page), batches = 0;
	struct window_mem ring = window_new(r->u, r->s.ring), word = window_new(r->u, 4096);
	uint8_t *want = need(1, ring.bytes);
	struct gather_args a = {
		.maps = maps(r), .lane = r->d_lane, .plan = UINT64_C(0x7000000000000000) | below(1u << 30)};
	bool good = true, told = true;

	a.copy_out = upload_bits(r, r->out);
	a.to_dram = upload_bits(r, r->dram);
	a.page = gpu_new(r->u, page, n * sizeof(*page));
	a.out = ring.addr;
	a.crc = r->u->g->crc;
	a.words = (uint32_t)BITS_WORDS(r->watermark);
	for (uint32_t first = 0; first < n && good && told; first += a.n, batches++) {
		struct word_args w = {word.addr + 64, a.plan + batches};

		a.first = first;
		for (a.n = 0; first + a.n < n; a.n++)
			if (page[first + a.n].end - (first ? page[first - 1].end : 0) > r->s.ring)
				break;
		memset(ring.p, POISON, ring.bytes);
		memset(want, POISON, ring.bytes);
		for (uint32_t i = first; i < first + a.n; i++)
			page_fill(r, want, &page[i], i, a.plan);
		launch_begin(r->u);
		MUST(r->u, kern_gather(r->u->g, &a, r->u->stream));
		MUST(r->u, kern_word(r->u->g, &w, r->u->stream));
		launch_end(r->u);
		good = memcmp(ring.p, want, ring.bytes) == 0;
		told = *(volatile uint64_t *)(word.p + 64) == w.value;
	}
	ok(good, "gather: %u pages of up to %u rows in %u batches, headers and checksums", n, row_limit,
	   batches);
	ok(told, "word: seen after each batch");
	ok(memory_is(r, r->mem, r->now, "gather"), "gather: the rows are untouched");
	for (uint32_t l = 0; l < r->s.lanes; l++)
		for (uint32_t w = 0; w < stride_words(r); w++)
			row_bits(r, r->stored, l)[w] |= row_bits(r, r->out, l)[w];
	gpu_free(r->u, a.copy_out);
	gpu_free(r->u, a.to_dram);
	gpu_free(r->u, a.page);
	window_free(r->u, &ring);
	window_free(r->u, &word);
	free(want);
	free(page);
}

/* ---- rows come back ---- */

/* Stored rows of a lane, dealt to two runs of pages so that pages overlap. Those with a wanted row are made in
 * `in`. */
static uint32_t stage_pages(struct run *r, uint32_t lane, struct window_mem *in, uint64_t *at,
			    struct scatter_page *page, uint32_t *ret_spoilt)
{
	const uint64_t *stored = row_bits(r, r->stored, lane), *bring = row_bits(r, r->bring, lane);
	uint32_t kb = r->lane[lane].k_bytes, vb = r->lane[lane].v_bytes, n = 0;

	for (uint32_t deal = 0; deal < 2; deal++)
		for (uint32_t p = 0; p < r->watermark;) {
			struct scatter_page g = {.lane = lane};
			uint8_t *k = in->p + *at, *v;
			uint32_t limit = 1 + below(PAGE_ROWS), rows = 0;

			for (uint32_t q = p; q < r->watermark && rows < limit; q++)
				rows += bits_test(stored, q) && (mix(q + r->salt) & 1) == deal;
			v = k + (size_t)rows * kb;
			for (limit = rows; p < r->watermark && g.rows < limit; p++) {
				if (g.rows && p - g.first >= WINDOW_SPAN * 64)
					break;
				if (!bits_test(stored, p) || (mix(p + r->salt) & 1) != deal)
					continue;
				if (!g.rows)
					g.first = p - below(MIN(p, 70) + 1);
				bits_set(g.pos, p - g.first);
				g.span = (uint16_t)((p - g.first) / 64 + 1);
				if (bits_test(bring, p)) {
					bits_set(g.mask, p - g.first);
					g.wanted++;
				}
				row_fill(r, lane, p, 0, k + (size_t)g.rows * kb);
				g.rows++;
			}
			if (!g.rows)
				break;
			v = k + (size_t)g.rows * kb;
			for (uint32_t i = 0, q = 0; i < g.rows; q++)
				if (bits_test(g.pos, q))
					row_fill(r, lane, g.first + q, 1, v + (size_t)i++ * vb);
			if (!g.wanted)
				continue;
			g.k = in->addr + *at;
			g.v = g.k + (size_t)g.rows * kb;
			g.crc = crc32_iscsi(k, (int)(g.rows * (kb + vb)), 0);
			if (g.wanted == g.rows &&
			    below(3) == 0) { /* such a page is read whole, whatever the rule */
				g.crc ^= 1u << below(32);
				++*ret_spoilt;
			}
			*at += ((size_t)g.rows * (kb + vb) + WINDOW_ALIGN - 1) / WINDOW_ALIGN * WINDOW_ALIGN;
			page[n++] = g;
		}
	return n;
}

/* in_gpu: the pages lie in GPU memory, as behind a copy of the ring. */
static void scatter(struct run *r, bool check, bool in_gpu)
{
	size_t most = 0;
	uint32_t n = 0, spoilt = 0, bad = 0, none = 0;
	uint64_t at = 0, copy = 0;
	struct window_mem in;
	struct scatter_page *page = need((size_t)r->s.lanes * 2 * (r->watermark + 1), sizeof(*page));
	struct scatter_args a = {.lane = r->d_lane, .cap = r->s.cap, .crc = r->u->g->crc};

	for (uint32_t l = 0; l < r->s.lanes; l++)
		most += (size_t)r->watermark * (r->lane[l].k_bytes + r->lane[l].v_bytes + WINDOW_ALIGN);
	in = window_new(r->u, most + 4096);
	for (uint32_t l = 0; l < r->s.lanes; l++) {
		uint32_t s = r->s.cap;

		n += stage_pages(r, l, &in, &at, page + n, &spoilt);
		for (uint32_t p = 0; p < r->watermark; p++)
			if (bits_test(row_bits(r, r->bring, l), p))
				put_row(r, r->now, l, s++, p);
	}
	if (in_gpu) {
		copy = gpu_new(r->u, in.p, at);
		for (uint32_t i = 0; i < n; i++) {
			page[i].k += copy - in.addr;
			page[i].v += copy - in.addr;
		}
		memset(in.p, POISON, in.bytes);
	}
	a.n = n;
	a.words = (uint32_t)BITS_WORDS(r->watermark);
	a.page = gpu_new(r->u, page, n * sizeof(*page));
	a.bring_in = upload_bits(r, r->bring);
	a.bad = check ? gpu_new(r->u, &none, 4) : 0;
	launch_begin(r->u);
	MUST(r->u, kern_scatter(r->u->g, &a, r->u->stream));
	launch_end(r->u);
	if (check) {
		gpu_get(r->u, &bad, a.bad, 4);
		ok(bad == spoilt, "scatter: %u of %u pages spoilt, %u found", spoilt, n, bad);
		gpu_free(r->u, a.bad);
	}
	ok(memory_is(r, r->mem, r->now, "scatter"), "scatter: %u pages from %s", n,
	   in_gpu ? "GPU memory" : "the window");
	gpu_free(r->u, a.page);
	gpu_free(r->u, a.bring_in);
	if (copy)
		gpu_free(r->u, copy);
	window_free(r->u, &in);
	free(page);
}

/* ---- the plan is carried out ---- */

/* Position by position: slots, one each, of the right rows; then all of memory follows. */
static bool lane_closed_up(struct run *r, uint32_t l, bool ordered, const uint32_t *slot, const uint32_t *pos)
{
	const uint64_t *bring = row_bits(r, r->bring, l);
	uint32_t *h_slot = r->h_slot + (size_t)l * r->max_rows, *h_pos = r->h_pos + (size_t)l * r->s.cap,
		 rank = 0;

	for (uint32_t p = 0; p < r->rows; p++) {
		uint32_t s = slot[p], old = h_slot[p];
		bool mine = p >= r->watermark || bits_test(row_bits(r, r->kept, l), p);

		if (!mine) {
			if (s != old)
				return false;
			continue;
		}
		if (s >= r->after[l] || pos[s] != p || (ordered && s != rank++))
			return false;
		if (!ordered && old < r->after[l] && (p >= r->watermark || !bits_test(bring, p)) && s != old)
			return false; /* it could have stayed */
		h_slot[p] = s;
	}
	/* after[] rows, each in a slot of its own: all slots below after are taken */
	for (uint32_t s = 0; s < r->s.cap; s++) {
		if (s >= r->after[l] && pos[s] != h_pos[s])
			return false;
		h_pos[s] = pos[s];
		if (s < r->after[l])
			put_row(r, r->want, l, s, pos[s]);
	}
	return true;
}

static void compact(struct run *r, bool ordered)
{
	uint32_t lanes = r->s.lanes;
	uint32_t *slot = need((size_t)lanes * r->max_rows, 4), *pos = need((size_t)lanes * r->s.cap, 4);
	struct compact_args a = {.maps = maps(r), .lane = r->d_lane, .to = ordered ? r->d_other : 0};
	bool good = true;

	a.resident = upload_bits(r, r->kept);
	a.bring_in = upload_bits(r, r->bring);
	a.count = gpu_new(r->u, r->count, lanes * 4);
	a.in = gpu_new(r->u, r->in, lanes * 4);
	a.after = gpu_new(r->u, r->after, lanes * 4);
	a.scratch = r->scratch;
	a.lanes = lanes;
	a.words = (uint32_t)BITS_WORDS(r->watermark);
	a.watermark = r->watermark;
	a.rows = r->rows;
	a.cap = r->s.cap;
	if (ordered) {
		memset(r->want, POISON, r->bytes);
		gpu_put(r->u, r->spare, r->want, r->bytes);
	} else {
		memcpy(r->want, r->now, r->bytes);
	}
	launch_begin(r->u);
	MUST(r->u, kern_compact(r->u->g, &a, r->u->stream));
	launch_end(r->u);
	gpu_get(r->u, slot, r->slot_of, (size_t)lanes * r->max_rows * 4);
	gpu_get(r->u, pos, r->pos_of, (size_t)lanes * r->s.cap * 4);
	for (uint32_t l = 0; l < lanes && good; l++) {
		good = lane_closed_up(r, l, ordered, slot + (size_t)l * r->max_rows,
				      pos + (size_t)l * r->s.cap);
		if (!good)
			printf("# lane %u: %u rows, %u came in, %u afterwards\n", l, r->count[l], r->in[l],
			       r->after[l]);
	}
	ok(good, "compact %s: maps", ordered ? "in order" : "in place");
	ok(memory_is(r, ordered ? r->spare : r->mem, r->want, "compact"), "compact %s: rows, and nothing else",
	   ordered ? "in order" : "in place");
	if (ordered) {
		ok(memory_is(r, r->mem, r->now, "source"), "compact in order: the source is untouched");
		SWAP(r->mem, r->spare);
		SWAP(r->lane, r->other);
		SWAP(r->d_lane, r->d_other);
	}
	SWAP(r->now, r->want);
	for (uint32_t l = 0; l < lanes; l++) {
		r->count[l] = r->after[l];
		for (uint32_t w = 0; w < BITS_WORDS(r->watermark); w++)
			row_bits(r, r->resident, l)[w] = row_bits(r, r->kept, l)[w];
		bits_set_range(row_bits(r, r->resident, l), r->watermark, r->rows);
	}
	gpu_free(r->u, a.resident);
	gpu_free(r->u, a.bring_in);
	gpu_free(r->u, a.count);
	gpu_free(r->u, a.in);
	gpu_free(r->u, a.after);
	free(slot);
	free(pos);
}

/* ---- cases ---- */

/* One sequence: rows, a plan, again. */
static void play(struct gpu *u, const struct shape *s)
{
	struct run r;

	run_open(&r, u, s);
	printf("# %u lanes, rows of %u + %u bytes%s, cap %u, stage %u, %u a round, ring %u\n", s->lanes, s->k,
	       s->v, s->mixed ? " and others" : "", s->cap, s->stage, s->append, r.s.ring);
	for (uint32_t i = 0; i < s->rounds; i++) {
		enum keep how = i == 0 ? RANDOM : (enum keep)below(KEEPS);
		uint32_t room = s->cap;

		for (uint32_t l = 0; l < s->lanes; l++)
			room = MIN(room, s->cap - r.count[l]);
		append(&r, MIN(room, s->append));
		decide(&r, how, below(3) ? below(MIN(r.rows, 70)) : 0);
		printf("# round %u: %u rows, watermark %u, keep %s\n", i, r.rows, r.watermark, keep_names[how]);
		gather(&r, i == 1 ? 1 : 1 + below(PAGE_ROWS));
		scatter(&r, i % 2 == 0 || below(2), i % 3 == 2);
		compact(&r, i % 2);
	}
	run_close(&r);
}

int main(int argc, char **argv)
{
	static const struct shape small[] = {
		{1, 200, 60, 16, 16, 6, 90, 1u << 20, false},   {3, 300, 90, 128, 128, 5, 150, 40960, false},
		{4, 130, 40, 256, 128, 4, 65, 65536, true},     {2, 140, 50, 64, 0, 4, 100, 16384, false},
		{1, 33, 8, 1024, 1024, 6, 16, 1u << 20, false}, {1, 2, 1, 80, 240, 4, 1, 1u << 20, false},
		{11, 90, 20, 32, 16, 4, 50, 1u << 20, true},
	};
	static const struct shape large[] = {
		{112, 4096, 512, 256, 256, 4, 2500, 32u << 20, false},
		{90, 3000, 300, 128, 128, 4, 1500, 8u << 20, false},
		{112, 1500, 200, 64, 128, 4, 700, 1u << 20, true},
		{1, 100000, 4096, 256, 256, 4, 60000, 32u << 20, false},
		{1, 300000, 4096, 16, 16, 3, 150000, 4u << 20, false},
		{8, 2000, 500, 1024, 0, 4, 1000, 4u << 20, false},
	};
	bool few = argc > 1 && strcmp(argv[1], "--small") == 0;
	const char *seed = getenv("KVT_SEED");
	struct gpu u;

	random_state = seed ? strtoull(seed, NULL, 0) : (uint64_t)time(NULL) * 1000003;
	setvbuf(stdout, NULL, _IOLBF, 0);
	gpu_open(&u);
	printf("# %s, KVT_SEED=%llu\n", u.g->name, (unsigned long long)random_state);
	for (size_t i = 0; i < ARRAY_SIZE(small); i++)
		play(&u, &small[i]);
	for (size_t i = 0; i < ARRAY_SIZE(large) && !few; i++)
		play(&u, &large[i]);
	printf("# %u launches through CUDA graphs\n", u.captured);
	if (u.graphs.begin)
		ok(u.captured > 0, "launches can be captured");
	gpu_close(&u);
	printf("1..%u\n", tests);
	return failures ? 1 : 0;
}
