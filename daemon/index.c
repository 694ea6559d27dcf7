/* SPDX-License-Identifier: MIT */
#include <string.h>
#include "daemon/direct.h"
#include "daemon/index.h"
#include "shm/trial.h"
#include "shm/util.h"

static uint64_t key_heap(const struct index *ix, uint32_t cap)
{
	return cap ? heap_bytes((uint64_t)ix->lanes * cap * sizeof(uint16_t)) : 0;
}

static uint64_t keys_heap(const struct index *ix, uint32_t cap)
{
	return key_heap(ix, cap) * (ix->coef ? 2 : 1);
}

static uint64_t bits_heap(const struct index *ix, uint32_t cap)
{
	return cap ? KVT_TIERS * heap_bytes((uint64_t)ix->lanes * cap / 8) : 0;
}

int index_init(struct index *ix, uint32_t lanes)
{
	memset(ix, 0, sizeof(*ix));
	ix->lane = calloc(lanes, sizeof(*ix->lane));
	ix->resident = calloc(lanes, sizeof(*ix->resident));
	if (!ix->lane || !ix->resident) {
		free(ix->lane);
		free(ix->resident);
		memset(ix, 0, sizeof(*ix));
		return -ENOMEM;
	}
	ix->lanes = lanes;
	ix->bytes = heap_bytes(lanes * sizeof(*ix->lane)) + heap_bytes(lanes * sizeof(*ix->resident));
	return 0;
}

void index_free(struct index *ix, struct page_store *ps)
{
	for (uint32_t l = 0; l < ix->lanes; l++) {
		for (uint32_t i = 0; i < ix->lane[l].n; i++)
			page_unref(ps, ix->lane[l].v[i]);
		free(ix->lane[l].v);
	}
	free(ix->lane);
	free(ix->resident);
	if (!planted("soak-leaks-memory"))
		free(ix->key);
	free(ix->coef);
	for (int t = 0; t < KVT_TIERS; t++)
		free(ix->on[t]);
	free(ix->epochs);
	memset(ix, 0, sizeof(*ix));
}

/* Lane by lane into wider strides. Fresh memory stays untouched until rows are written. */
static int grow(struct index *ix, uint32_t cap)
{
	uint32_t words = cap / 64;
	uint16_t *key = calloc((size_t)ix->lanes * cap, sizeof(*key));
	uint16_t *coef = ix->coef ? calloc((size_t)ix->lanes * cap, sizeof(*coef)) : NULL;
	uint64_t *on[KVT_TIERS];
	bool ok = key && (coef || !ix->coef);

	for (int t = 0; t < KVT_TIERS; t++) {
		on[t] = calloc((size_t)ix->lanes * words, sizeof(uint64_t));
		ok = ok && on[t];
	}
	if (!ok) {
		free(key);
		free(coef);
		for (int t = 0; t < KVT_TIERS; t++)
			free(on[t]);
		return -ENOMEM;
	}
	for (uint32_t l = 0; ix->rows && l < ix->lanes; l++) {
		memcpy(key + (size_t)l * cap, ix->key + (size_t)l * ix->cap, ix->rows * sizeof(*key));
		if (coef)
			memcpy(coef + (size_t)l * cap, ix->coef + (size_t)l * ix->cap,
			       ix->rows * sizeof(*coef));
		for (int t = 0; t < KVT_TIERS; t++)
			memcpy(on[t] + (size_t)l * words, index_bits(ix, t, l),
			       BITS_WORDS(ix->rows) * sizeof(uint64_t));
	}
	ix->bytes += keys_heap(ix, cap) + bits_heap(ix, cap) - keys_heap(ix, ix->cap) - bits_heap(ix, ix->cap);
	free(ix->key);
	free(ix->coef);
	ix->key = key;
	ix->coef = coef;
	for (int t = 0; t < KVT_TIERS; t++) {
		free(ix->on[t]);
		ix->on[t] = on[t];
	}
	ix->cap = cap;
	ix->words = words;
	return 0;
}

int index_extend(struct index *ix, uint32_t rows)
{
	uint32_t n = rows - ix->rows;

	if (rows <= ix->rows)
		return 0;
	if (rows > ix->cap) {
		uint32_t want = MAX(rows, ix->cap + ix->cap / 16);
		int r = grow(ix, ALIGN_UP(want, INDEX_GRAIN));

		if (r < 0)
			return r;
	}
	for (uint32_t l = 0; l < ix->lanes; l++) {
		bits_set_range(index_bits(ix, KVT_TIER_DEVICE, l), ix->rows, rows);
		ix->resident[l] += n;
	}
	ix->rows = rows;
	return 0;
}

int index_keep_coef(struct index *ix, bool keep)
{
	uint64_t heap = key_heap(ix, ix->cap);
	uint16_t *coef;

	if (keep == (ix->coef != NULL) || !ix->cap)
		return 0;
	if (!keep) {
		free(ix->coef);
		ix->coef = NULL;
		ix->bytes -= heap;
		return 0;
	}
	coef = calloc((size_t)ix->lanes * ix->cap, sizeof(*coef));
	if (!coef)
		return -ENOMEM;
	for (uint32_t l = 0; l < ix->lanes; l++)
		for (uint32_t i = 0; i < ix->rows; i++)
			coef[(size_t)l * ix->cap + i] = INDEX_NO_COEF;
	ix->coef = coef;
	ix->bytes += heap;
	return 0;
}

uint32_t index_limit(const struct index *ix, uint32_t epoch)
{
	uint32_t lo = 0, hi = ix->n_epochs; /* epochs and starts both ascend */

	while (lo < hi) {
		uint32_t mid = lo + (hi - lo) / 2;

		if (ix->epochs[mid].epoch > epoch)
			hi = mid;
		else
			lo = mid + 1;
	}
	return lo < ix->n_epochs ? ix->epochs[lo].start : UINT32_MAX;
}

int index_mark_epoch(struct index *ix, uint32_t epoch, uint32_t start)
{
	while (ix->n_epochs && ix->epochs[ix->n_epochs - 1].start >= start)
		ix->n_epochs--;
	if (ix->n_epochs == ix->cap_epochs) {
		uint32_t cap = ix->cap_epochs + 4;
		struct epoch_mark *e = realloc(ix->epochs, cap * sizeof(*e));

		if (!e)
			return -ENOMEM;
		ix->bytes += heap_bytes(cap * sizeof(*e)) -
			     (ix->cap_epochs ? heap_bytes(ix->cap_epochs * sizeof(*e)) : 0);
		ix->epochs = e;
		ix->cap_epochs = cap;
	}
	ix->epochs[ix->n_epochs++] = (struct epoch_mark){.epoch = epoch, .start = start};
	return 0;
}

static bool page_reaches(const struct index *ix, uint32_t n)
{
	for (uint32_t l = 0; l < ix->lanes; l++)
		for (uint32_t i = 0; i < ix->lane[l].n; i++) {
			const struct page *p = ix->lane[l].v[i];

			if (p->first + p->span * 64u > n && index_limit(ix, p->epoch) > n)
				return true;
		}
	return false;
}

int index_truncate(struct index *ix, struct page_store *ps, uint32_t n, uint32_t epoch, bool mark)
{
	if (n >= ix->rows && !mark)
		return 0;
	/* Cutting costs a list entry only when some page would otherwise speak for what comes next. */
	if ((mark || page_reaches(ix, n)) && index_mark_epoch(ix, epoch, n) < 0)
		return -ENOMEM;
	if (n >= ix->rows)
		return 0;
	for (uint32_t l = 0; l < ix->lanes; l++) {
		for (int t = 0; t < KVT_TIERS; t++)
			bits_clear_range(index_bits(ix, t, l), n, ix->rows);
		memset(ix->key + (size_t)l * ix->cap + n, 0, (ix->rows - n) * sizeof(*ix->key));
		if (ix->coef)
			memset(ix->coef + (size_t)l * ix->cap + n, 0, (ix->rows - n) * sizeof(*ix->coef));
		ix->resident[l] = bits_rank(index_bits(ix, KVT_TIER_DEVICE, l), n);
		index_sweep(ix, ps, l);
	}
	ix->rows = n;
	return 0;
}

int index_list_page(struct index *ix, struct page *p)
{
	struct lane_pages *lp = &ix->lane[p->lane];
	uint32_t i;

	if (lp->n == lp->cap) {
		uint32_t cap = lp->cap + MAX(2u, lp->cap / 4);
		struct page **v = realloc(lp->v, cap * sizeof(*v));

		if (!v)
			return -ENOMEM;
		ix->bytes += heap_bytes(cap * sizeof(*v)) - (lp->cap ? heap_bytes(lp->cap * sizeof(*v)) : 0);
		lp->v = v;
		lp->cap = cap;
	}
	for (i = lp->n; i && lp->v[i - 1]->first > p->first; i--)
		lp->v[i] = lp->v[i - 1];
	lp->v[i] = p;
	lp->n++;
	page_ref(p);
	direct_add(ix, p);
	return 0;
}

uint32_t index_from(const struct lane_pages *lp, uint32_t pos)
{
	uint32_t lo = 0, hi = lp->n;

	while (lo < hi) {
		uint32_t mid = lo + (hi - lo) / 2;

		if (lp->v[mid]->first < pos)
			lo = mid + 1;
		else
			hi = mid;
	}
	return lo;
}

struct page *index_find(const struct index *ix, uint32_t lane, uint32_t first, uint64_t number)
{
	const struct lane_pages *lp = &ix->lane[lane];

	for (uint32_t i = index_from(lp, first); i < lp->n && lp->v[i]->first == first; i++)
		if (lp->v[i]->number == number)
			return lp->v[i];
	return NULL;
}

/* The page's rows in word w for which it speaks: positions below both the cut and the end of the index. */
static uint64_t valid_rows(const struct page *p, uint32_t w, uint32_t end)
{
	uint32_t pos = p->first + w * 64;

	if (pos >= end)
		return 0;
	return end - pos >= 64 ? p->pos[w] : p->pos[w] & ((UINT64_C(1) << (end - pos)) - 1);
}

/* Set or clear the bits v from absolute position pos on; none of them lies past the index. */
static void put_bits(uint64_t *bits, uint32_t pos, uint64_t v, bool set)
{
	uint32_t s = pos % 64;
	uint64_t lo = v << s, hi = s ? v >> (64 - s) : 0;

	bits += pos / 64;
	if (set)
		bits[0] |= lo;
	else
		bits[0] &= ~lo;
	if (hi && set)
		bits[1] |= hi;
	else if (hi)
		bits[1] &= ~hi;
}

void index_mark(struct index *ix, const struct page *p, int tier, bool present)
{
	uint64_t *bits = index_bits(ix, tier, p->lane);
	uint32_t end = MIN(ix->rows, index_limit(ix, p->epoch));

	for (uint32_t w = 0; w < p->span; w++) {
		uint64_t v = valid_rows(p, w, end);

		if (v)
			put_bits(bits, p->first + w * 64, v, present);
	}
}

static void carry(struct index *ix, const struct page *p, int from, int to, bool keep)
{
	uint64_t *src = index_bits(ix, from, p->lane), *dst = index_bits(ix, to, p->lane);
	uint32_t end = MIN(ix->rows, index_limit(ix, p->epoch));

	for (uint32_t w = 0; w < p->span; w++) {
		uint32_t pos = p->first + w * 64;
		uint64_t v = valid_rows(p, w, end);

		if (v)
			v &= index_window(src, ix->words, pos);
		if (!v)
			continue;
		put_bits(dst, pos, v, true);
		if (!keep)
			put_bits(src, pos, v, false);
	}
}

void index_move(struct index *ix, const struct page *p, int from, int to)
{
	carry(ix, p, from, to, from == to);
}

void index_copy(struct index *ix, const struct page *p, int from, int to)
{
	carry(ix, p, from, to, true);
}

bool index_lists(const struct index *ix, const struct page *p)
{
	const struct lane_pages *lp = &ix->lane[p->lane];

	for (uint32_t i = 0; i < lp->n; i++)
		if (lp->v[i] == p)
			return true;
	return false;
}

void index_unlist(struct index *ix, struct page_store *ps, struct page *p)
{
	struct lane_pages *lp = &ix->lane[p->lane];
	uint32_t i = 0;

	while (i < lp->n && lp->v[i] != p)
		i++;
	if (i == lp->n)
		return;
	memmove(&lp->v[i], &lp->v[i + 1], (--lp->n - i) * sizeof(*lp->v));
	direct_drop(ix, p);
	page_unref(ps, p);
}

int index_add_page(struct index *ix, struct page *p, int tier)
{
	int r = index_list_page(ix, p);

	if (r < 0)
		return r;
	index_mark(ix, p, tier, true);
	return 0;
}

uint32_t index_alive(const struct index *ix, const struct page *p, int tier, uint64_t *mask)
{
	const uint64_t *bits = index_bits(ix, tier, p->lane);
	uint32_t end = MIN(ix->rows, index_limit(ix, p->epoch)), n = 0;
	bool here = page_in(p, tier);

	for (uint32_t w = 0; w < p->span; w++) {
		uint64_t v = here ? valid_rows(p, w, end) : 0;

		if (v)
			v &= index_window(bits, ix->words, p->first + w * 64);
		if (mask)
			mask[w] = v;
		n += (uint32_t)__builtin_popcountll(v);
	}
	return n;
}

void index_sweep(struct index *ix, struct page_store *ps, uint32_t lane)
{
	struct lane_pages *lp = &ix->lane[lane];
	uint32_t out = 0;

	for (uint32_t i = 0; i < lp->n; i++) {
		struct page *p = lp->v[i];
		bool alive = false, whole = false;

		for (int t = KVT_TIER_DRAM; t < KVT_TIERS; t++) {
			uint32_t n = index_alive(ix, p, t, NULL);

			whole |= n == p->rows;
			if (n)
				alive = true;
			else if (p->refs == 1 && !p->pins)
				page_free_copy(ps, p, t);
		}
		if (alive && !whole)
			direct_thin(ix, p);
		if (alive) {
			lp->v[out++] = p;
		} else {
			direct_drop(ix, p);
			page_unref(ps, p);
		}
	}
	lp->n = out;
}

int index_fork(struct index *dst, const struct index *src, uint32_t prefix, uint32_t epoch)
{
	uint32_t n = MIN(prefix, src->rows);
	int r = grow(dst, ALIGN_UP(MAX(n, 1u), INDEX_GRAIN));

	if (!r && src->coef)
		r = index_keep_coef(dst, true);
	if (r < 0)
		return r;
	for (uint32_t i = 0; i < src->n_epochs; i++)
		if (src->epochs[i].start < prefix) {
			r = index_mark_epoch(dst, src->epochs[i].epoch, src->epochs[i].start);
			if (r < 0)
				return r;
		}
	r = index_mark_epoch(dst, epoch, prefix);
	if (r < 0)
		return r;
	dst->rows = n;
	for (uint32_t l = 0; n && l < src->lanes; l++) { /* an index without rows has no arrays */
		memcpy(dst->key + (size_t)l * dst->cap, src->key + (size_t)l * src->cap, n * sizeof(*dst->key));
		if (src->coef)
			memcpy(dst->coef + (size_t)l * dst->cap, src->coef + (size_t)l * src->cap,
			       n * sizeof(*dst->coef));
		for (int t = 0; t < KVT_TIERS; t++) {
			memcpy(index_bits(dst, t, l), index_bits(src, t, l), BITS_WORDS(n) * sizeof(uint64_t));
			if (n % 64)
				bits_clear_range(index_bits(dst, t, l), n, ALIGN_UP(n, 64));
		}
		dst->resident[l] = bits_rank(index_bits(dst, KVT_TIER_DEVICE, l), n);
		for (uint32_t i = 0; i < src->lane[l].n; i++) {
			struct page *p = src->lane[l].v[i];

			if (!index_alive(dst, p, KVT_TIER_DRAM, NULL) &&
			    !index_alive(dst, p, KVT_TIER_NVME, NULL))
				continue;
			r = index_list_page(dst, p);
			if (r < 0)
				return r;
		}
	}
	return index_extend(dst, prefix);
}

void index_count(const struct index *ix, uint32_t lane, uint32_t ret[KVT_TIERS], uint32_t *ret_dropped)
{
	uint32_t n[KVT_TIERS] = {0}, words = (uint32_t)BITS_WORDS(ix->rows);
	const uint64_t *dev = index_bits(ix, 0, lane), *dram = index_bits(ix, 1, lane),
		       *nvme = index_bits(ix, 2, lane);

	for (uint32_t w = 0; w < words; w++) {
		n[0] += (uint32_t)__builtin_popcountll(dev[w]);
		n[1] += (uint32_t)__builtin_popcountll(dram[w] & ~dev[w]);
		n[2] += (uint32_t)__builtin_popcountll(nvme[w] & ~dram[w] & ~dev[w]);
	}
	memcpy(ret, n, sizeof(n));
	*ret_dropped = ix->rows - n[0] - n[1] - n[2];
}
