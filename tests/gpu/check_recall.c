/* SPDX-License-Identifier: MIT */
/*
 * Recall's kernels against policy/recall.c: the same rows are found, and their bytes, positions and counts are
 * right; what the index says of pages after the directory changed in every way that it can. TAP on stdout.
 *
 *    check_recall [--small] [SEED]     --small: few rows, for the fake driver
 */
#include "tests/gpu/recall_compare.h"

static unsigned tests, failures;

__attribute__((format(printf, 2, 3))) static bool report(bool good, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	printf("%sok %u - ", good ? "" : "not ", ++tests);
	vprintf(fmt, ap);
	printf("\n");
	fflush(stdout);
	va_end(ap);
	failures += !good;
	return good;
}

/* ---- beds --------------------------------------------------------------------------------------------- */

static int prepare(struct bed *b)
{
	struct find_resident r = made_resident(&b->m);

	return find_prepare(b->f, b->d, &r, b->m.lane_addr, b->stream);
}

static void bed_new(struct bed *b, struct kvtier_cuda *g, const struct made_shape *s)
{
	struct direct_source src = made_source(&b->m);
	struct find_shape shape;
	struct seg dir;

	*b = (struct bed){.g = g};
	made_new(&b->m, g, s);
	shape = (struct find_shape){.lane = b->m.lane,
				    .lanes = s->lanes,
				    .max_rows = s->rows,
				    .slots = b->m.cap,
				    .dtype = s->dtype};
	ok(cuda_try(g, g->d->stream_create(&b->stream, 1), "stream"), "stream");
	ok(view_new(g, &src, b->m.lane, s->lanes, &b->d), "view_new");
	dir = made_directory(&b->m);
	ok(view_take(b->d, &dir), "view_take");
	ok(find_new(g, &shape, &b->f), "find_new");
}

static void bed_free(struct bed *b)
{
	ok(cuda_try(b->g, b->g->d->stream_sync(b->stream), "sync"), "the end");
	find_end(b->f);
	view_end(b->d);
	(void)b->g->d->stream_destroy(b->stream);
	made_free(&b->m);
}

/* The GPU's summaries of all pages. */
static bool summaries(struct bed *b)
{
	const struct made *m = &b->m;
	uint64_t each = b->f->ix.sum_bytes;
	char *all = m->hdr->used ? fetch(b, b->f->ix.sum, m->hdr->used * each) : NULL;
	double far = 0;
	bool good = true;

	for (uint32_t i = 0; i < m->hdr->used; i++) {
		const struct direct_page *p = &m->page[i];
		const float *step = (const float *)(all + i * each), *radius = step + FIND_PARTS;
		const uint32_t *right = (const uint32_t *)(radius + FIND_PARTS);
		const int8_t *mean = (const int8_t *)(all + i * each + FIND_SUM_HEAD);
		struct recall_sum *sum;

		if (!p->place)
			continue;
		sum = malloc(recall_sum_bytes(p->rows, m->s.dim));
		recall_summarise(made_k(m, p), p->rows, m->s.dim, (enum row_dtype)m->s.dtype, sum);
		for (uint32_t g = 0; g < sum->groups; g++) {
			float s = sum->v[g], r = sum->v[sum->groups + g];

			far = fmax(far, fabs((double)step[g] - s) / fmax(s, 1e-30));
			/* The reference subtracts what is nearly equal where rows are few: compare with the
			 * keys' squares. */
			far = fmax(far, fabs((double)radius[g] * radius[g] - (double)r * r) / m->s.dim);
			good &= right[g] == recall_good(sum)[g];
			for (uint32_t d = 0; d < m->s.dim; d++)
				good &= abs(mean[g * m->s.dim + d] - recall_centre(sum, g)[d]) <= 1;
		}
		for (uint32_t g = sum->groups; g < FIND_PARTS; g++)
			good &= !right[g];
		free(sum);
	}
	free(all);
	if (far > 1e-5)
		printf("# steps and radii are off by %g\n", far);
	return good && far < 1e-5;
}

/* ---- what is checked ------------------------------------------------------------------------------------- */

struct kind {
	const char *name;
	struct made_shape s;
	struct search q;
};

static void check_kind(struct kvtier_cuda *g, const struct kind *k)
{
	static const uint32_t probes[] = {250, 1000, 60};
	struct bed b;

	bed_new(&b, g, &k->s);
	ok(prepare(&b), "find_prepare");
	report(summaries(&b), "%s: summaries", k->name);
	for (size_t i = 0; i < ARRAY_SIZE(probes); i++) {
		struct search s = k->q;

		s.probe = probes[i];
		s.first = k->s.lanes - s.heads;
		s.residents = i != 1;
		s.mass = i < 2;
		report(search(&b, &s), "%s: probe %u%s", k->name, s.probe,
		       !s.mass       ? ", plain products"
		       : s.residents ? ", device rows in the mass"
				     : "");
	}
	bed_free(&b);
}

static void check_kinds(struct kvtier_cuda *g, uint32_t by)
{
	const struct kind kinds[] = {
		{"bf16 128",
		 {.lanes = 4,
		  .rows = 1500 * by,
		  .dim = 128,
		  .v_bytes = 256,
		  .dtype = KVT_DTYPE_BF16,
		  .segments = 3,
		  .resident_pc = 30},
		 {.heads = 4, .group = 7, .tokens = 32, .want = 64 * by, .before = 8, .after = 24, .sharp = 3}},
		{"f16 64, dense pages",
		 {.lanes = 3,
		  .rows = 1200 * by,
		  .dim = 64,
		  .v_bytes = 128,
		  .dtype = KVT_DTYPE_F16,
		  .segments = 2,
		  .page_rows = 128,
		  .resident_pc = 0},
		 {.heads = 2, .group = 3, .tokens = 9, .want = 50 * by, .before = 0, .after = 0, .sharp = 3}},
		{"f32 40, wider V, one token",
		 {.lanes = 2,
		  .rows = 700 * by,
		  .dim = 40,
		  .v_bytes = 208,
		  .dtype = KVT_DTYPE_F32,
		  .segments = 1,
		  .resident_pc = 60},
		 {.heads = 1, .group = 1, .tokens = 1, .want = 33, .before = 3, .after = 0, .sharp = 4}},
		{"bf16 256, many queries, no V",
		 {.lanes = 1,
		  .rows = 600 * by,
		  .dim = 256,
		  .v_bytes = 0,
		  .dtype = KVT_DTYPE_BF16,
		  .segments = 1,
		  .resident_pc = 10},
		 {.heads = 1, .group = 32, .tokens = 5, .want = 40, .before = 1, .after = 70, .sharp = 2}},
		{"more wanted than there is",
		 {.lanes = 2,
		  .rows = 90,
		  .dim = 64,
		  .v_bytes = 128,
		  .dtype = KVT_DTYPE_BF16,
		  .segments = 1,
		  .resident_pc = 50},
		 {.heads = 2, .group = 2, .tokens = 3, .want = 200, .before = 8, .after = 24, .sharp = 3}},
		{"nothing demoted",
		 {.lanes = 2,
		  .rows = 70,
		  .dim = 64,
		  .v_bytes = 128,
		  .dtype = KVT_DTYPE_BF16,
		  .segments = 1,
		  .resident_pc = 100},
		 {.heads = 2, .group = 2, .tokens = 3, .want = 20, .before = 8, .after = 24, .sharp = 3}},
		{"wide windows",
		 {.lanes = 1,
		  .rows = 2600 * by,
		  .dim = 64,
		  .v_bytes = 128,
		  .dtype = KVT_DTYPE_BF16,
		  .segments = 1,
		  .page_rows = 77,
		  .resident_pc = 20},
		 {.heads = 1,
		  .group = 1,
		  .tokens = 6,
		  .want = 1500,
		  .before = 1024,
		  .after = 1024,
		  .sharp = 5}},
	};

	for (size_t i = 0; i < ARRAY_SIZE(kinds); i++)
		check_kind(g, &kinds[i]);
}

/* Keys that are not numbers, rows that are dropped, rows that two pages have, cut pages. */
static void spoil(struct made *m)
{
	uint32_t slot = m->hdr->used;

	for (uint32_t i = 0; i < slot; i++) {
		struct direct_page *p = &m->page[i];
		uint16_t *k = (uint16_t *)made_k(m, p);

		if (i % 3 == 0)
			k[below(p->rows) * m->s.dim + below(m->s.dim)] = i % 2 ? 0x7f80 : 0xffc0; /* inf, nan */
		if (i % 4 == 1)
			p->dead[0] = rnd() & rnd();
		if (i % 5 == 2)
			p->limit = p->first + below(p->span * 64);
		if (i % 7 == 3 && p->rows > 4) { /* the same positions, other bytes */
			uint32_t pos[FIND_PAGE], n = 0;

			for (uint32_t b = 0; b < p->span * 64u && n < p->rows - 1u; b++)
				if (bits_test(p->pos, b))
					pos[n++] = p->first + b;
			made_page(m, m->hdr->used, 0, p->lane, pos, n);
		}
	}
}

static void check_change(struct kvtier_cuda *g, uint32_t by)
{
	const struct made_shape shape = {.lanes = 3,
					 .rows = 900 * by,
					 .dim = 64,
					 .v_bytes = 64,
					 .dtype = KVT_DTYPE_BF16,
					 .segments = 3,
					 .resident_pc = 40};
	struct search s = {.heads = 3,
			   .group = 2,
			   .tokens = 8,
			   .want = 48,
			   .probe = 400,
			   .before = 8,
			   .after = 24,
			   .mass = true,
			   .residents = true,
			   .sharp = 3};
	struct direct_source src;
	struct cuda_direct *other;
	struct bed b;
	struct seg dir;
	uint64_t here, there;
	uint32_t used, pos[3] = {700, 701, 705}, maps;

	bed_new(&b, g, &shape);
	spoil(&b.m);
	ok(prepare(&b), "find_prepare");
	report(summaries(&b), "spoilt pages: summaries");
	report(search(&b, &s), "spoilt pages: dead, cut, doubled and broken rows");

	/* What is added invalidates nothing. */
	for (int i = 0; i < 3; i++)
		bits_clear(b.m.resident + b.m.words, pos[i]);
	made_page(&b.m, b.m.hdr->used, 1, 1, pos, 3);
	report(view_still(b.d), "a page that is added moves nothing");
	ok(prepare(&b), "find_prepare");
	report(search(&b, &s), "a page is added, rows have left the device");

	for (uint32_t i = 0; i < b.m.hdr->used; i += 2)
		b.m.page[i].dead[0] |= 1u << below(32);
	report(view_still(b.d), "rows that are dropped move nothing");
	ok(prepare(&b), "find_prepare");
	report(search(&b, &s), "rows were dropped");

	/* Moved: entries go, change, are used again; the last of segment 2 goes. */
	atomic_fetch_add(&b.m.hdr->moved, 1);
	report(!view_still(b.d), "moved pages are noticed");
	used = b.m.hdr->used;
	for (uint32_t i = 0; i < used; i++) {
		struct direct_page *p = &b.m.page[i];
		uint32_t again[2] = {100 + i, 103 + i};

		if (i % 5 == 0 || direct_segment(p->place) == 2)
			atomic_store(&p->place, 0);
		else if (i % 5 == 1)
			p->limit = p->first + 64;
		if (i % 10 == 0)
			made_page(&b.m, i, 0, i % 3, again, 2);
	}
	ok(prepare(&b), "find_prepare");
	report(summaries(&b), "after a move: summaries");
	report(search(&b, &s), "after a move: search");
	ok(cuda_try(g, g->d->stream_sync(b.stream), "sync"), "stream");
	ok(prepare(&b), "find_prepare");
	report(b.d->n_held == 2, "segments that nobody names are let go of: %u of 3 held", b.d->n_held);

	/* Who reads the same segments shares them. */
	maps = b.m.maps;
	src = made_source(&b.m);
	ok(view_new(g, &src, b.m.lane, shape.lanes, &other), "view_new");
	ok(view_address(b.d, 0, 64, 64, &here), "view_address");
	ok(view_address(other, 0, 64, 64, &there), "view_address");
	report(here == there && b.m.maps == maps, "segments are registered once");
	report(view_address(other, 0, b.m.seg[0].size - 32, 64, &there) == KVT_E_PROTO &&
		       view_address(other, 9, 0, 64, &there) == KVT_E_NOENT,
	       "places outside of segments are refused");
	view_end(other);

	/* A truncated sequence: the directory may lag, the end counts. */
	b.m.s.rows = 300;
	ok(prepare(&b), "find_prepare");
	report(search(&b, &s), "rows past the end are not found");

	/* Entries that cannot be. */
	b.m.page[1].place = direct_place(0, 1ull << 39);
	b.m.page[1].serial = b.m.hdr->serial + 1;
	atomic_fetch_add(&b.m.hdr->serial, 1);
	report(prepare(&b) == KVT_E_PROTO, "an entry outside of its segment: %s", kvtier_last_error());
	atomic_store(&b.m.page[1].place, 0);
	atomic_fetch_add(&b.m.hdr->moved, 1);
	ok(prepare(&b), "find_prepare");
	report(search(&b, &s), "and once it is gone all is well");
	b.m.page[1] = b.m.page[2];
	b.m.page[1].rows++;
	b.m.page[1].place = direct_place(0, 0);
	b.m.page[1].serial = b.m.hdr->serial + 1;
	atomic_fetch_add(&b.m.hdr->serial, 1);
	report(prepare(&b) == KVT_E_PROTO, "an entry of other rows than bits: %s", kvtier_last_error());
	dir = made_directory(&b.m);
	b.m.hdr->capacity = 1u << 30;
	report(view_take(b.d, &dir) == KVT_E_PROTO, "a directory that is too small: %s", kvtier_last_error());
	seg_close(&dir);
	bed_free(&b);
}

/* Queries that are not numbers are left out; tokens that are all the same are taken in order. */
static void check_queries(struct kvtier_cuda *g)
{
	const struct made_shape shape = {.lanes = 1,
					 .rows = 400,
					 .dim = 64,
					 .v_bytes = 64,
					 .dtype = KVT_DTYPE_BF16,
					 .segments = 1,
					 .resident_pc = 0};
	struct search s = {
		.heads = 1, .group = 1, .tokens = 5, .want = 16, .probe = 1000, .mass = true, .sharp = 0};
	struct bed b;

	bed_new(&b, g, &shape);
	ok(prepare(&b), "find_prepare");
	report(search(&b, &s), "queries of zeros: all rows score the same, the first are taken");
	s.tokens = 300;
	s.sharp = 3;
	report(search(&b, &s), "more tokens than a block has threads");
	bed_free(&b);
}

int main(int argc, char **argv)
{
	struct kvtier_cuda_opts o = {.size = sizeof(o)};
	struct kvtier_cuda *g;
	bool small = false;

	for (int i = 1; i < argc; i++) {
		if (!strcmp(argv[i], "--small"))
			small = true;
		else
			made_seed = strtoull(argv[i], NULL, 0);
	}
	if (kvtier_cuda_open(&o, &g)) {
		printf("1..0 # SKIP %s\n", kvtier_last_error());
		return 77;
	}
	ok(cuda_enter(g), "cuda_enter");
	check_kinds(g, small ? 1 : 16);
	check_change(g, small ? 1 : 4);
	check_queries(g);
	printf("1..%u\n", tests);
	cuda_leave(g);
	kvtier_cuda_close(g);
	return failures != 0;
}
