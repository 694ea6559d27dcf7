/* SPDX-License-Identifier: MIT */
/* The index against a model that keeps a byte per row and tier and a list per page. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>
#include <cmocka.h>
#include "daemon/index.h"
#include "shm/util.h"

/* ---- a tier that only counts ---------------------------------------------------- */

struct fake {
	struct tier tier;
	uint32_t live;
	uint64_t bytes;
};
static void fake_free(struct tier *t, tier_addr addr, uint32_t bytes)
{
	struct fake *f = container_of(t, struct fake, tier);

	assert_true(f->live > 0);
	assert_true(addr != TIER_ADDR_NONE);
	f->live--;
	f->bytes -= page_room(bytes);
}
static const struct tier_ops fake_ops = {.name = "fake", .free = fake_free};

struct world {
	struct page_store ps;
	struct fake tier[KVT_TIERS];
};

static void world_open(struct world *w)
{
	memset(w, 0, sizeof(*w));
	assert_int_equal(page_store_init(&w->ps, 2), 0);
	for (int t = 1; t < KVT_TIERS; t++) {
		w->tier[t].tier.ops = &fake_ops;
		w->ps.tier[t] = &w->tier[t].tier;
	}
}

/* Nothing is left: pages, copies, charges and bytes. */
static void world_close(struct world *w)
{
	assert_int_equal(w->ps.count, 0);
	assert_int_equal(w->ps.filled, 0);
	for (int t = 1; t < KVT_TIERS; t++) {
		assert_int_equal(w->tier[t].live, 0);
		assert_int_equal(w->tier[t].bytes, 0);
		assert_int_equal(w->ps.used[t][0] + w->ps.used[t][1], 0);
	}
	assert_int_equal(w->ps.bytes, w->ps.slots ? heap_bytes(w->ps.slots * sizeof(void *)) : 0);
	page_store_free(&w->ps);
}

static void put_copy(struct world *w, struct page *p, int tier)
{
	static tier_addr addr;

	assert_int_equal(page_set_copy(&w->ps, p, tier, ++addr), 0);
	w->tier[tier].live++;
	w->tier[tier].bytes += page_room(p->bytes);
}

/* A page of the rows in rows[n], ascending, with a copy in `tier`. */
static struct page *make(struct world *w, struct origin *o, uint32_t lane, uint32_t epoch, const uint32_t *rows,
			 uint32_t n, int tier)
{
	struct page *p = page_new(&w->ps, o, lane, rows[0], (rows[n - 1] - rows[0]) / 64 + 1);

	assert_non_null(p);
	for (uint32_t i = 0; i < n; i++)
		bits_set(p->pos, rows[i] - rows[0]);
	p->rows = (uint8_t)n;
	p->epoch = epoch;
	p->bytes = n * 100;
	put_copy(w, p, tier);
	return p;
}

/* ---- the model -------------------------------------------------------------------- */

#define LANES 3u
#define ROWS 3000u

struct model {
	uint32_t rows;
	uint8_t on[KVT_TIERS][LANES][ROWS];
};

static void assert_same(const struct index *ix, const struct model *m)
{
	assert_int_equal(ix->rows, m->rows);
	for (uint32_t l = 0; l < LANES; l++) {
		uint32_t count[KVT_TIERS] = {0}, dropped = 0, want[KVT_TIERS] = {0}, none = 0, dev = 0;

		for (uint32_t i = 0; i < m->rows; i++) {
			bool any = false;

			for (int t = 0; t < KVT_TIERS; t++) {
				assert_int_equal(bits_test(index_bits(ix, t, l), i), m->on[t][l][i]);
				if (m->on[t][l][i] && !any) {
					want[t]++;
					any = true;
				}
			}
			none += !any;
			dev += m->on[0][l][i];
		}
		for (int t = 0; t < KVT_TIERS; t++)
			for (uint32_t i = m->rows; i < ix->cap; i++)
				assert_false(bits_test(index_bits(ix, t, l), i));
		assert_int_equal(ix->resident[l], dev);
		if (m->rows) {
			index_count(ix, l, count, &dropped);
			assert_memory_equal(count, want, sizeof(want));
			assert_int_equal(dropped, none);
		}
		/* Every row below is in a page that speaks for it. */
		for (int t = 1; t < KVT_TIERS; t++)
			for (uint32_t i = 0; i < m->rows; i++) {
				bool found = false;

				for (uint32_t k = 0; m->on[t][l][i] && k < ix->lane[l].n; k++) {
					const struct page *p = ix->lane[l].v[k];

					found = found || (page_in(p, t) && page_has(p, i) &&
							  i < index_limit(ix, p->epoch));
				}
				assert_int_equal(found, m->on[t][l][i]);
			}
		for (uint32_t k = 1; k < ix->lane[l].n; k++)
			assert_true(ix->lane[l].v[k - 1]->first <= ix->lane[l].v[k]->first);
	}
}

static uint64_t bytes_of(const struct index *ix)
{
	uint64_t n = heap_bytes(ix->lanes * sizeof(*ix->lane)) + heap_bytes(ix->lanes * sizeof(uint32_t));

	if (ix->cap)
		n += heap_bytes((uint64_t)ix->lanes * ix->cap * 2) * (ix->coef ? 2 : 1) +
		     3 * heap_bytes((uint64_t)ix->lanes * ix->cap / 8);
	for (uint32_t l = 0; l < ix->lanes; l++)
		if (ix->lane[l].cap)
			n += heap_bytes(ix->lane[l].cap * sizeof(void *));
	if (ix->cap_epochs)
		n += heap_bytes(ix->cap_epochs * sizeof(struct epoch_mark));
	return n;
}

static uint32_t rnd(uint32_t *seed, uint32_t n)
{
	*seed = *seed * 1664525u + 1013904223u;
	return (*seed >> 8) % n;
}

/* Rows that have no copy in `tier` yet go there as one page. */
static void demote(struct world *w, struct index *ix, struct model *m, struct origin *o, uint32_t epoch,
		   uint32_t *seed)
{
	uint32_t l = rnd(seed, LANES), at = rnd(seed, m->rows), rows[PAGE_ROWS], n = 0;
	int t = 1 + (int)rnd(seed, 2);

	for (uint32_t i = at; i < m->rows && i < at + 1500 && n < 1 + rnd(seed, PAGE_ROWS); i++)
		if (!m->on[t][l][i] && m->on[0][l][i] && rnd(seed, 3))
			rows[n++] = i;
	if (!n)
		return;
	assert_int_equal(index_add_page(ix, make(w, o, l, epoch, rows, n, t), t), 0);
	for (uint32_t k = 0; k < n; k++)
		m->on[t][l][rows[k]] = 1;
}

/* Rows with a copy below leave the device, some rows are lost for good. */
static void leave(struct world *w, struct index *ix, struct model *m, uint32_t *seed)
{
	uint32_t l = rnd(seed, LANES), at = rnd(seed, m->rows), n = rnd(seed, 300);
	bool drop = rnd(seed, 3) == 0;

	for (uint32_t i = at; i < m->rows && i < at + n; i++) {
		if (!drop && !m->on[1][l][i] && !m->on[2][l][i])
			continue;
		for (int t = 0; t < (drop ? KVT_TIERS : 1); t++) {
			m->on[t][l][i] = 0;
			bits_clear(index_bits(ix, t, l), i);
		}
	}
	ix->resident[l] = bits_rank(index_bits(ix, 0, l), ix->rows);
	index_sweep(ix, &w->ps, l);
}

static void any_history_agrees_with_the_model(void **state)
{
	static struct model m;
	struct world w;
	struct index ix;
	struct origin *o;
	uint32_t epoch = 0, seed = 5;
	uint8_t key[16] = {1};

	world_open(&w);
	assert_int_equal(index_init(&ix, LANES), 0);
	o = origin_new(&w.ps, key, 9, 1);
	memset(&m, 0, sizeof(m));
	for (int step = 0; step < 1500; step++) {
		uint32_t what = rnd(&seed, 20);

		if (what < 4 && m.rows < ROWS - 200) {
			uint32_t n = 1 + rnd(&seed, 150);

			assert_int_equal(index_extend(&ix, m.rows + n), 0);
			for (uint32_t l = 0; l < LANES; l++)
				memset(&m.on[0][l][m.rows], 1, n);
			m.rows += n;
		} else if (what < 14 && m.rows) {
			demote(&w, &ix, &m, o, epoch, &seed);
		} else if (what < 19 && m.rows) {
			leave(&w, &ix, &m, &seed);
		} else if (m.rows) {
			uint32_t n = m.rows - rnd(&seed, m.rows / 2 + 1);

			assert_int_equal(index_truncate(&ix, &w.ps, n, ++epoch, false), 0);
			for (uint32_t l = 0; l < LANES; l++)
				for (int t = 0; t < KVT_TIERS; t++)
					memset(&m.on[t][l][n], 0, ROWS - n);
			m.rows = n;
		}
		assert_int_equal(ix.bytes, bytes_of(&ix));
		if (step % 10 == 0)
			assert_same(&ix, &m);
	}
	assert_same(&ix, &m);
	index_free(&ix, &w.ps);
	origin_unref(&w.ps, o);
	world_close(&w);
}

/* Keys and second coefficients go where their rows go: through growth, truncation and into a fork. */
static void coefficients_follow_their_rows(void **state)
{
	struct world w;
	struct index ix, child;
	uint64_t plain;

	world_open(&w);
	assert_int_equal(index_init(&ix, LANES), 0);
	assert_int_equal(index_init(&child, LANES), 0);
	assert_int_equal(index_keep_coef(&ix, true), 0); /* nothing to keep them for yet */
	assert_null(ix.coef);
	assert_int_equal(index_extend(&ix, 100), 0);
	plain = ix.bytes;
	assert_int_equal(index_keep_coef(&ix, true), 0);
	assert_true(ix.bytes > plain && ix.bytes == bytes_of(&ix));
	for (uint32_t l = 0; l < LANES; l++)
		for (uint32_t i = 0; i < 100; i++) {
			assert_int_equal(ix.coef[(size_t)l * ix.cap + i], INDEX_NO_COEF);
			ix.key[(size_t)l * ix.cap + i] = (uint16_t)(1000 * l + i);
			ix.coef[(size_t)l * ix.cap + i] = (uint16_t)(1000 * l + i + 7);
		}
	assert_int_equal(index_keep_coef(&ix, true), 0); /* already */
	assert_int_equal(index_extend(&ix, 5000), 0);
	assert_int_equal(ix.bytes, bytes_of(&ix));
	assert_int_equal(index_fork(&child, &ix, 60, 9), 0);
	assert_int_equal(child.bytes, bytes_of(&child));
	assert_int_equal(index_truncate(&ix, &w.ps, 80, 3, false), 0);
	for (uint32_t l = 0; l < LANES; l++)
		for (uint32_t i = 0; i < 100; i++) {
			assert_int_equal(ix.key[(size_t)l * ix.cap + i], i < 80 ? 1000 * l + i : 0);
			assert_int_equal(ix.coef[(size_t)l * ix.cap + i], i < 80 ? 1000 * l + i + 7 : 0);
			if (i < 60)
				assert_int_equal(child.coef[(size_t)l * child.cap + i], 1000 * l + i + 7);
		}
	assert_int_equal(index_keep_coef(&ix, false), 0);
	assert_null(ix.coef);
	assert_int_equal(ix.bytes, bytes_of(&ix));
	assert_int_equal(ix.key[79], 79);
	index_free(&ix, &w.ps);
	index_free(&child, &w.ps);
	world_close(&w);
}

static void speculation_leaves_no_list_behind(void **state)
{
	struct world w;
	struct index ix;
	uint32_t rows[4] = {3, 5, 6, 9};
	struct origin *o;
	uint8_t key[16] = {2};

	world_open(&w);
	assert_int_equal(index_init(&ix, 1), 0);
	o = origin_new(&w.ps, key, 9, 0);
	assert_int_equal(index_extend(&ix, 100), 0);
	assert_int_equal(index_add_page(&ix, make(&w, o, 0, 0, rows, 4, 1), 1), 0);
	/* Ends that move above all pages cost nothing, however many. */
	for (uint32_t e = 1; e < 1000; e++) {
		assert_int_equal(index_extend(&ix, 100 + e), 0);
		assert_int_equal(index_truncate(&ix, &w.ps, 98 + e, e, false), 0);
	}
	assert_int_equal(ix.n_epochs, 0);
	/* Through a page: one mark, and lower cuts replace higher ones. */
	for (uint32_t n = 8; n > 4; n--)
		assert_int_equal(index_truncate(&ix, &w.ps, n, 2000 - n, false), 0);
	assert_int_equal(ix.n_epochs, 1);
	assert_int_equal(index_limit(&ix, 0), 5);
	assert_int_equal(index_alive(&ix, ix.lane[0].v[0], 1, NULL), 1);
	index_free(&ix, &w.ps);
	origin_unref(&w.ps, o);
	world_close(&w);
}

static void a_fork_counts_references_not_rows(void **state)
{
	struct world w;
	struct index a, b, c;
	uint32_t rows[PAGE_ROWS];
	struct origin *o;
	struct page *p, *q;
	uint8_t key[16] = {3};

	world_open(&w);
	o = origin_new(&w.ps, key, 9, 0);
	assert_int_equal(index_init(&a, 2), 0);
	assert_int_equal(index_init(&b, 2), 0);
	assert_int_equal(index_init(&c, 2), 0);
	assert_int_equal(index_extend(&a, 1000), 0);
	for (uint32_t i = 0; i < PAGE_ROWS; i++)
		rows[i] = 100 + 2 * i;
	p = make(&w, o, 1, 0, rows, PAGE_ROWS, 1);
	assert_int_equal(index_add_page(&a, p, 1), 0);
	for (uint32_t i = 0; i < PAGE_ROWS; i++)
		rows[i] = 600 + i;
	q = make(&w, o, 0, 0, rows, PAGE_ROWS, 2);
	assert_int_equal(index_add_page(&a, q, 2), 0);
	assert_int_equal(index_fork(&b, &a, 150, 1), 0);
	assert_int_equal(p->refs, 2);
	assert_int_equal(q->refs, 1); /* past the prefix */
	assert_int_equal(index_alive(&b, p, 1, NULL), 25);
	assert_int_equal(index_fork(&c, &b, 120, 2), 0);
	assert_int_equal(index_alive(&c, p, 1, NULL), 10);
	assert_int_equal(p->refs, 3);
	assert_int_equal(b.rows, 150);
	/* The child grows past its prefix: the parent's rows there are not its own. */
	assert_int_equal(index_extend(&b, 400), 0);
	assert_int_equal(index_alive(&b, p, 1, NULL), 25);
	assert_false(bits_test(index_bits(&b, 1, 1), 200));
	/* What one of them lets go stays for the others, copy and charge included. */
	bits_clear_range(index_bits(&a, 1, 1), 0, 1000);
	index_sweep(&a, &w.ps, 1);
	assert_int_equal(p->refs, 2);
	assert_true(page_in(p, 1));
	assert_int_equal(w.ps.used[1][0], page_room(p->bytes));
	index_free(&b, &w.ps);
	assert_int_equal(p->refs, 1);
	index_free(&c, &w.ps);
	assert_int_equal(w.tier[1].live, 0);
	index_free(&a, &w.ps);
	origin_unref(&w.ps, o);
	world_close(&w);
}

/* Found by the random life of a core: a plan dropped a page's rows while the page was being moved. */
static void a_dropped_row_does_not_come_back(void **state)
{
	struct world w;
	struct index ix;
	uint32_t rows[3] = {1, 70, 71};
	struct origin *o;
	struct page *p;
	uint8_t key[16] = {4};

	world_open(&w);
	o = origin_new(&w.ps, key, 9, 0);
	assert_int_equal(index_init(&ix, 1), 0);
	assert_int_equal(index_extend(&ix, 100), 0);
	p = make(&w, o, 0, 0, rows, 3, 1);
	assert_int_equal(index_add_page(&ix, p, 1), 0);
	bits_clear(index_bits(&ix, 1, 0), 70);
	put_copy(&w, p, 2);
	index_move(&ix, p, 1, 2);
	assert_int_equal(index_alive(&ix, p, 1, NULL), 0);
	assert_int_equal(index_alive(&ix, p, 2, NULL), 2);
	assert_false(bits_test(index_bits(&ix, 2, 0), 70));
	/* The copy that serves nobody goes; a pinned one waits. */
	page_pin(p);
	index_sweep(&ix, &w.ps, 0);
	assert_true(page_in(p, 1));
	page_unpin(&w.ps, p);
	index_sweep(&ix, &w.ps, 0);
	assert_false(page_in(p, 1));
	assert_true(page_in(p, 2));
	/* Unlisted while pinned: not this index's page any more. */
	page_pin(p);
	bits_clear_range(index_bits(&ix, 2, 0), 0, 100);
	index_sweep(&ix, &w.ps, 0);
	assert_false(index_lists(&ix, p));
	assert_int_equal(w.tier[2].live, 1);
	page_unpin(&w.ps, p);
	assert_int_equal(w.tier[2].live, 0);
	index_free(&ix, &w.ps);
	origin_unref(&w.ps, o);
	world_close(&w);
}

static void pages_are_found_by_number(void **state)
{
	static struct page *p[3000];
	struct world w;
	struct index ix;
	struct origin *o;
	uint8_t key[16] = {5};
	uint32_t seed = 1;

	world_open(&w);
	o = origin_new(&w.ps, key, 9, 0);
	assert_int_equal(index_init(&ix, 1), 0);
	assert_int_equal(index_extend(&ix, 10), 0);
	for (uint32_t i = 0; i < ARRAY_SIZE(p); i++) {
		uint32_t row = i % 10;

		p[i] = make(&w, o, 0, 0, &row, 1, 2);
		page_ref(p[i]);
	}
	for (int k = 0; k < 20000; k++) {
		uint32_t i = rnd(&seed, ARRAY_SIZE(p));

		if (page_in(p[i], 2)) {
			assert_ptr_equal(page_find(&w.ps, p[i]->number), p[i]);
			page_free_copy(&w.ps, p[i], 2);
			assert_null(page_find(&w.ps, p[i]->number));
		} else {
			put_copy(&w, p[i], 2);
		}
	}
	for (uint32_t i = 0; i < ARRAY_SIZE(p); i++) {
		assert_ptr_equal(page_find(&w.ps, p[i]->number), page_in(p[i], 2) ? p[i] : NULL);
		page_unref(&w.ps, p[i]);
	}
	index_free(&ix, &w.ps);
	origin_unref(&w.ps, o);
	world_close(&w);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(any_history_agrees_with_the_model),
		cmocka_unit_test(speculation_leaves_no_list_behind),
		cmocka_unit_test(a_fork_counts_references_not_rows),
		cmocka_unit_test(a_dropped_row_does_not_come_back),
		cmocka_unit_test(pages_are_found_by_number),
		cmocka_unit_test(coefficients_follow_their_rows),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
