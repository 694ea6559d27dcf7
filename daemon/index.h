/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * The index of one sequence: what the daemon knows about its rows [0, rows).
 * Per lane a 16-bit key per row and one bitmap per tier that holds a copy; a
 * row with no bit is dropped. Where a policy's scores follow the distance to the
 * end, keys are coefficients, up to two a row (policy_ops.coefs), and a plan
 * makes its scores of them. Below the device tier rows live in pages, sorted
 * by first position. Rows past `rows` have no entry: all are in the device tier.
 *
 * Truncation keeps pages and cuts them by epoch: a page made in epoch e speaks
 * only for positions below the start of the first later epoch still listed.
 * A fork's child starts an epoch at its prefix, so its inherited pages are cut
 * by the same rule and need no copy.
 *
 * Event-loop thread; while a worker decides, nothing here changes.
 */
#include <stdbool.h>
#include <stdint.h>
#include "daemon/pages.h"

#define INDEX_NO_COEF 0x8000u /* the key of 0.0 */
#define INDEX_GRAIN 128u      /* rows; a whole number of bitmap words */

struct lane_pages {
	struct page **v; /* sorted by first */
	uint32_t n, cap;
};
struct epoch_mark {
	uint32_t epoch, start;
};

struct index {
	uint32_t lanes, rows;
	uint32_t cap, words;       /* row capacity per lane; words = cap / 64 */
	uint16_t *key;             /* [lanes][cap], 0: dropped or unscored */
	uint16_t *coef;            /* [lanes][cap] second coefficients, as keys; or NULL */
	uint64_t *on[KVT_TIERS];   /* [lanes][words] */
	struct lane_pages *lane;   /* [lanes] */
	uint32_t *resident;        /* [lanes] rows in the device tier below `rows` */
	struct epoch_mark *epochs; /* rising in epoch and in start */
	uint32_t n_epochs, cap_epochs;
	uint64_t bytes;        /* of heap; shared pages not counted */
	struct direct *direct; /* directory of its pages, see direct.h; the sequence's, or NULL */
};

int index_init(struct index *ix, uint32_t lanes); /* -ENOMEM */
void index_free(struct index *ix, struct page_store *ps);
/* Cover [0, rows); what is new is resident and unscored. -ENOMEM, nothing changed. */
int index_extend(struct index *ix, uint32_t rows);
/* Keep second coefficients from now on, 0.0 for the rows that are there; or keep none. -ENOMEM. */
int index_keep_coef(struct index *ix, bool keep);
/*
 * Forget rows at and past n, cutting pages by `epoch`, the one that begins now; mark: also such as are not
 * listed any more but may be found by a restart. -ENOMEM, nothing changed.
 */
int index_truncate(struct index *ix, struct page_store *ps, uint32_t n, uint32_t epoch, bool mark);
/* First position for which a page of this epoch does not speak. */
uint32_t index_limit(const struct index *ix, uint32_t epoch);
/* The child takes rows [0, prefix) of the parent; its inherited pages are cut by `epoch`. dst is fresh. */
int index_fork(struct index *dst, const struct index *src, uint32_t prefix, uint32_t epoch);

/* A cut: pages of earlier epochs speak for positions below start only. -ENOMEM. */
int index_mark_epoch(struct index *ix, uint32_t epoch, uint32_t start);
/* List the page, taking a reference; its rows are not marked. -ENOMEM. */
int index_list_page(struct index *ix, struct page *p);
/* First of the lane's pages that begins at pos or later; lp->n: none does. */
uint32_t index_from(const struct lane_pages *lp, uint32_t pos);
/* The listed page of this number that begins there, or NULL. */
struct page *index_find(const struct index *ix, uint32_t lane, uint32_t first, uint64_t number);
/* Take a reference on the page and list it; marks its rows present in `tier`. -ENOMEM. */
int index_add_page(struct index *ix, struct page *p, int tier);
/* Set or clear this page's rows (those it speaks for) in the tier's bitmap. */
void index_mark(struct index *ix, const struct page *p, int tier, bool present);
/* The page's rows that are still in `from` are in `to` now instead: a row dropped meanwhile stays dropped. */
void index_move(struct index *ix, const struct page *p, int from, int to);
/* The page's rows that are still in `from` are in `to` as well. */
void index_copy(struct index *ix, const struct page *p, int from, int to);
/* Give up the page, if it is listed; the rows' bits stay: another page holds them. */
void index_unlist(struct index *ix, struct page_store *ps, struct page *p);
/* Is the page one of this index's? */
bool index_lists(const struct index *ix, const struct page *p);
/* Rows of the page that this sequence counts on in `tier`. mask: NULL or uint64_t[page span], the rows. */
uint32_t index_alive(const struct index *ix, const struct page *p, int tier, uint64_t *mask);
/* Unlist pages in which no row is alive; give back unshared copies that serve no row. */
void index_sweep(struct index *ix, struct page_store *ps, uint32_t lane);
/* Words [w, w + 1) of the page's bitmap as they lie over absolute position first + 64 * w. */
static inline uint64_t index_window(const uint64_t *bits, uint32_t words, uint32_t pos)
{
	uint32_t w = pos / 64, s = pos % 64;
	uint64_t v = w < words ? bits[w] >> s : 0;

	if (s && w + 1 < words)
		v |= bits[w + 1] << (64 - s);
	return v;
}
/* Rows of one lane by best tier: ret[0..2] and dropped. */
void index_count(const struct index *ix, uint32_t lane, uint32_t ret[KVT_TIERS], uint32_t *ret_dropped);
static inline uint64_t *index_bits(const struct index *ix, int tier, uint32_t lane)
{
	return ix->on[tier] + (uint64_t)lane * ix->words;
}
