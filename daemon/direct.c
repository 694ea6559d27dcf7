/* SPDX-License-Identifier: MIT */
/*
 * The directory of one sequence. Its order of stores is what readers rely on, see shm/direct.h:
 *
 *   enter     the entry's words, then its place, then `serial`
 *   withdraw  its place, then `moved`, then all that may follow: another entry there, other bytes in the page
 *
 * Published memory is written in whole words, so that no reader sees half of one.
 */
#include <string.h>
#include "daemon/direct.h"
#include "daemon/index.h"
#include "shm/crc.h"
#include "shm/direct.h"
#include "shm/seg.h"
#include "shm/util.h"

#define ROWS_PER_ENTRY 64u /* of a lane, when it is full: half of a page's */
#define SPARE_ENTRIES 8u   /* and for each lane */
#define MAX_ENTRIES (UINT32_C(1) << 23)
#define MAX_LISTED                                                                                             \
	8u /* directories that list the same page: shared by forks, it would make each removal slow */
#define NONE UINT32_MAX

/* What we know of an entry and clients cannot touch. */
struct direct_link {
	struct page *page; /* NULL: free */
	union {
		struct direct *dir;
		uint32_t next; /* free entry, or NONE */
	};
	LIST_ENTRY(direct_link) listed; /* by the page */
};

struct direct {
	struct seg seg;
	struct direct_hdr *hdr;
	struct direct_page *entry; /* [capacity] */
	struct direct_link *link;  /* [capacity]; what was never used was never touched */
	uint32_t capacity, used, free, count;
	uint32_t cut; /* positions from here on are dead, the index does not know yet */
	uint64_t moved, serial;
};

bool direct_where(const struct page *p, uint32_t *segment, uint64_t *off)
{
	tier_addr at = p->addr[KVT_TIER_DRAM - 1];

	if (!tier_published(at))
		return false;
	*segment = tier_segment(at);
	*off = tier_offset(at);
	return true;
}

uint32_t direct_crc(const struct page *p)
{
	struct page_ident id;

	page_ident(p, &id);
	return crc32c_plain(page_crc_seed(&id), p->crc, p->bytes);
}

/* ---- order ------------------------------------------------------------------------- */

/*
 * What was withdrawn is seen to be before the new value is; what follows in this thread or in whoever hears of
 * it from this thread is seen after it. A full fence, for copies into pages may use stores that pass others.
 */
static void moved(struct direct *d)
{
	atomic_store_explicit(&d->hdr->moved, ++d->moved, memory_order_release);
	__sync_synchronize();
}

static void enter(struct direct *d, uint32_t e, const struct direct_page *from)
{
	uint64_t words[sizeof(*from) / sizeof(uint64_t)], *to = (uint64_t *)&d->entry[e];

	memcpy(words, from, sizeof(words));
	for (uint32_t i = 1; i < ARRAY_SIZE(words); i++)
		__atomic_store_n(&to[i], words[i], __ATOMIC_RELAXED);
	__atomic_store_n(&to[0], words[0], __ATOMIC_RELEASE);
	if (e == d->used)
		atomic_store_explicit(&d->hdr->used, ++d->used, memory_order_release);
	atomic_store_explicit(&d->hdr->serial, d->serial, memory_order_release);
}
_Static_assert(offsetof(struct direct_page, place) == 0, "the word that is written last");

static void withdraw(struct direct *d, uint32_t e)
{
	struct direct_link *l = &d->link[e];

	atomic_store_explicit(&d->entry[e].place, 0, memory_order_relaxed);
	moved(d);
	LIST_REMOVE(l, listed);
	l->page = NULL;
	l->next = d->free;
	d->free = e;
	d->count--;
}

/* ---- life ---------------------------------------------------------------------------- */

int direct_new(struct direct **ret, uint32_t lanes, uint32_t max_rows)
{
	uint64_t n = (uint64_t)lanes * (DIV_UP(max_rows, ROWS_PER_ENTRY) + SPARE_ENTRIES);
	struct direct *d = calloc(1, sizeof(*d));
	int r = -ENOMEM;

	if (!d)
		return r;
	d->seg = (struct seg)SEG_INIT;
	d->capacity = (uint32_t)MIN(n, MAX_ENTRIES);
	d->free = NONE;
	d->cut = UINT32_MAX;
	d->link = calloc(d->capacity, sizeof(*d->link));
	if (d->link)
		r = seg_create(&d->seg, SEG_PUBLISHED, "kvtier-directory",
			       sizeof(*d->hdr) + (uint64_t)d->capacity * sizeof(*d->entry), 0);
	if (r < 0) {
		direct_free(d);
		return r;
	}
	d->hdr = d->seg.addr;
	d->entry = (struct direct_page *)(d->hdr + 1);
	d->hdr->capacity = d->capacity;
	d->hdr->magic = DIRECT_MAGIC;
	*ret = d;
	return 0;
}

void direct_free(struct direct *d)
{
	if (!d)
		return;
	if (d->hdr) {
		atomic_store_explicit(&d->hdr->used, 0, memory_order_relaxed);
		moved(d);
	}
	for (uint32_t e = 0; e < d->used; e++)
		if (d->link[e].page)
			LIST_REMOVE(&d->link[e], listed);
	seg_close(&d->seg);
	free(d->link);
	free(d);
}

int direct_fd(const struct direct *d, uint64_t *ret_bytes)
{
	*ret_bytes = d->seg.size;
	return d->seg.fd;
}

uint64_t direct_pages(const struct direct *d)
{
	return d->count;
}

uint64_t direct_bytes(const struct direct *d)
{
	return sizeof(*d) + sizeof(*d->hdr) + (uint64_t)d->used * (sizeof(*d->entry) + sizeof(*d->link));
}

/* ---- entries --------------------------------------------------------------------------- */

/* The page's entry here, or NONE; *ret_listed: directories that list it. */
static uint32_t find(const struct direct *d, const struct page *p, uint32_t *ret_listed)
{
	const struct direct_link *l;
	uint32_t n = 0, e = NONE;

	LIST_FOREACH(l, &p->listed, listed) {
		if (l->dir == d)
			e = (uint32_t)(l - d->link);
		n++;
	}
	if (ret_listed)
		*ret_listed = n;
	return e;
}

static uint32_t take(struct direct *d)
{
	uint32_t e = d->free;

	if (e != NONE)
		d->free = d->link[e].next;
	else if (d->used < d->capacity)
		e = d->used;
	return e;
}

/* Rows of the page that no tier has, by their place in the page. */
static void dropped(const struct index *ix, const struct page *p, uint32_t dead[4])
{
	uint32_t row = 0;

	memset(dead, 0, 4 * sizeof(*dead));
	for (uint32_t w = 0; w < p->span; w++) {
		uint64_t rows = p->pos[w], have = 0;

		for (int t = 0; t < KVT_TIERS; t++)
			have |= index_window(index_bits(ix, t, p->lane), ix->words, p->first + w * 64);
		for (uint64_t lost = rows & ~have; lost; lost &= lost - 1) {
			uint32_t at = row + (uint32_t)__builtin_popcountll(rows & ((lost & -lost) - 1));

			dead[at / 32] |= UINT32_C(1) << (at % 32);
		}
		row += (uint32_t)__builtin_popcountll(rows);
	}
}

void direct_add(const struct index *ix, struct page *p)
{
	struct direct *d = ix->direct;
	struct direct_page x = {.lane = p->lane, .first = p->first, .rows = p->rows, .span = p->span};
	uint32_t segment, listed, e;
	uint64_t off;

	if (!d || !direct_where(p, &segment, &off) || find(d, p, &listed) != NONE)
		return;
	e = listed < MAX_LISTED ? take(d) : NONE;
	if (e == NONE) {
		atomic_store_explicit(&d->hdr->full, 1, memory_order_relaxed);
		return;
	}
	x.place = direct_place(segment, off);
	x.serial = ++d->serial;
	x.limit = MIN(index_limit(ix, p->epoch), d->cut);
	x.crc = direct_crc(p);
	dropped(ix, p, x.dead);
	memcpy(x.pos, p->pos, p->span * sizeof(uint64_t));
	d->link[e].page = p;
	d->link[e].dir = d;
	LIST_INSERT_HEAD(&p->listed, &d->link[e], listed);
	d->count++;
	enter(d, e, &x);
}

void direct_drop(const struct index *ix, struct page *p)
{
	uint32_t e = ix->direct ? find(ix->direct, p, NULL) : NONE;

	if (e != NONE)
		withdraw(ix->direct, e);
}

void direct_gone(struct page *p)
{
	struct direct_link *l;

	while ((l = LIST_FIRST(&p->listed)))
		withdraw(l->dir, (uint32_t)(l - l->dir->link));
}

void direct_thin(const struct index *ix, struct page *p)
{
	uint32_t e = ix->direct ? find(ix->direct, p, NULL) : NONE, dead[4];

	if (e == NONE)
		return;
	dropped(ix, p, dead);
	for (uint32_t i = 0; i < ARRAY_SIZE(dead); i++)
		if (dead[i] != ix->direct->entry[e].dead[i])
			__atomic_store_n(&ix->direct->entry[e].dead[i], dead[i], __ATOMIC_RELAXED);
}

/* Pages of the lane from here on may reach past `rows`. */
static uint32_t first_reaching(const struct lane_pages *lp, uint32_t rows)
{
	uint32_t lo = 0, hi = lp->n;

	while (lo < hi) {
		uint32_t mid = lo + (hi - lo) / 2;

		if (lp->v[mid]->first + PAGE_SPAN * 64 > rows)
			hi = mid;
		else
			lo = mid + 1;
	}
	return lo;
}

void direct_cut(const struct index *ix, uint32_t rows)
{
	struct direct *d = ix->direct;
	bool any = false;

	if (!d)
		return;
	d->cut = rows;
	for (uint32_t lane = 0; rows != UINT32_MAX && lane < ix->lanes; lane++) {
		const struct lane_pages *lp = &ix->lane[lane];

		for (uint32_t i = first_reaching(lp, rows); i < lp->n; i++) {
			uint32_t e = find(d, lp->v[i], NULL);

			if (e == NONE || d->entry[e].limit <= rows)
				continue;
			__atomic_store_n(&d->entry[e].limit, rows, __ATOMIC_RELAXED);
			any = true;
		}
	}
	if (any)
		moved(d);
}
