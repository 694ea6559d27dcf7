/* SPDX-License-Identifier: MIT */
/*
 * The waterfall over bitmaps. Every step is a top-k of some set in one rank
 * order. Because that order is total, the top j of a set lies inside its top k,
 * so nearly all steps are cuts of one ranking, found from one histogram.
 */
#include <errno.h>
#include <string.h>
#include "policy/place.h"
#include "shm/bits.h"
#include "shm/util.h"

int place_work_init(struct place_work *w, uint32_t n, uint32_t hysteresis_permille)
{
	uint32_t words = (uint32_t)BITS_WORDS(n), maps = CLASSES + 3 + SELECT_CUTS + 2;
	size_t bitmap = ALIGN_UP((size_t)MAX(words, 1) * 8, KVT_CACHELINE), rows = (size_t)words * 64;
	size_t eff = rows * sizeof(uint16_t),
	       pos = ALIGN_UP(SELECT_SPARSE(rows) * sizeof(uint32_t), KVT_CACHELINE);
	size_t bytes = maps * bitmap + eff + 2 * rows + pos;
	char *at = aligned_alloc(KVT_CACHELINE, bytes);

	if (!at)
		return -ENOMEM;
	*w = (struct place_work){.n = n, .words = words, .memory = at};
	w->hysteresis_permille = hysteresis_permille;
	w->select.kern = select_kern();
	memset(at, 0, maps * bitmap);
	for (int i = 0; i < CLASSES; i++, at += bitmap)
		w->cls[i] = (uint64_t *)at;
	for (int i = 0; i < SELECT_CUTS; i++, at += bitmap)
		w->cut[i] = (uint64_t *)at;
	for (int i = 0; i < 2; i++, at += bitmap)
		w->tmp[i] = (uint64_t *)at;
	w->segment = (uint64_t *)at;
	w->select.above = (uint64_t *)(at + bitmap);
	w->select.equal = (uint64_t *)(at + 2 * bitmap);
	at += 3 * bitmap;
	w->select.eff = (uint16_t *)at;
	w->select.bytes = (uint8_t *)at + eff;
	w->select.pos = (uint32_t *)(at + eff + 2 * rows);
	return 0;
}

void place_work_done(struct place_work *w)
{
	free(w->memory);
	w->memory = NULL;
}

void place_work_classes(struct place_work *w)
{
	bits_set_range(w->cls[CLASS_REST], 0, w->n);
	for (int c = 0; c < CLASSES; c++) {
		w->lo[c] = w->words;
		w->hi[c] = 0;
		for (uint32_t i = 0; i < w->words; i++) {
			for (int better = 0; better < c; better++)
				w->cls[c][i] &= ~w->cls[better][i];
			if (w->cls[c][i]) {
				w->lo[c] = MIN(w->lo[c], i);
				w->hi[c] = i + 1;
			}
		}
	}
}

static uint32_t count(const struct place_work *w, const uint64_t *bits)
{
	return w->select.kern->count(bits, w->words);
}

/* Walks the classes: each is below, above or across a cut. */
void place_top(const struct place_work *w, const uint16_t *keys, const uint64_t *mask, const uint32_t *k,
	       uint32_t cuts, uint64_t *const *out)
{
	uint32_t before = 0; /* units of better classes */

	for (uint32_t j = 0; j < cuts; j++)
		memset(out[j], 0, w->words * sizeof(uint64_t));
	for (int c = 0; c < CLASSES; c++) {
		uint32_t lo = w->lo[c], words, here, n, across = 0, part_k[SELECT_CUTS];
		uint64_t *part[SELECT_CUTS], *seg = w->segment;

		if (lo >= w->hi[c])
			continue;
		words = w->hi[c] - lo;
		for (uint32_t i = 0; i < words; i++)
			seg[i] = mask[lo + i] & w->cls[c][lo + i];
		here = w->select.kern->count(seg, words);
		for (uint32_t j = 0; j < cuts; j++) {
			if (k[j] <= before)
				continue;
			if (k[j] - before < here) {
				part_k[across] = k[j] - before;
				part[across++] = out[j] + lo;
				continue;
			}
			for (uint32_t i = 0; i < words; i++)
				out[j][lo + i] |= seg[i];
		}
		n = MIN(w->n - lo * 64, words * 64);
		if (across)
			select_top(&w->select, keys + (size_t)lo * 64, n, seg, here, part_k, across, part);
		before += here;
	}
}

/* dst = a without b; returns how many. */
static uint32_t without(const struct place_work *w, uint64_t *dst, const uint64_t *a, const uint64_t *b)
{
	for (uint32_t i = 0; i < w->words; i++)
		dst[i] = a[i] & ~b[i];
	return count(w, dst);
}

/* dst = a and b; returns how many. */
static uint32_t both(const struct place_work *w, uint64_t *dst, const uint64_t *a, const uint64_t *b)
{
	for (uint32_t i = 0; i < w->words; i++)
		dst[i] = a[i] & b[i];
	return count(w, dst);
}

static void add(const struct place_work *w, uint64_t *dst, const uint64_t *src)
{
	for (uint32_t i = 0; i < w->words; i++)
		dst[i] |= src[i];
}

/*
 * Hysteresis. With h = keep * permille / 1000, the best keep - h units (and
 * protected ones up to keep) are in, units past the best keep + h are out. The
 * seats left go to units of the band between that are on the device now, best
 * first, then to the band's others, best first. So a unit only changes place
 * when it is more than h ranks on the other side, and exactly `keep` are in.
 * On entry cut[0] holds the core and cut[1] everything up to the band's end.
 */
static void seat_band(const struct place_work *w, const struct place_units *u, uint32_t seats)
{
	uint64_t *in = u->to_device, *band = w->tmp[0], *some = w->tmp[1], *best = w->cut[1];
	uint32_t have;

	memcpy(in, w->cut[0], w->words * sizeof(*in));
	without(w, band, w->cut[1], w->cut[0]);
	have = both(w, some, band, u->device);
	if (have < seats) {
		add(w, in, some);
		seats -= have;
		without(w, some, band, u->device);
	}
	place_top(w, u->keys, some, &seats, 1, &best);
	add(w, in, best);
}

/*
 * Below the device. Units that only nvme holds do not move up into dram while
 * nvme has room: the best of them go up only when nvme would overflow. Of the
 * others dram takes the best. Both fit: saved has at most dram + nvme units, so
 * when `up` of those in nvme are too many, at most dram - up are others.
 */
static void place_below(const struct place_work *w, const struct place_units *u, const uint64_t *saved,
			uint32_t dram, uint32_t nvme)
{
	uint64_t *only = w->tmp[0], *others = w->tmp[1], *picked = w->cut[0];
	uint32_t n_only = both(w, only, saved, u->nvme_only), up = n_only > nvme ? n_only - nvme : 0;

	without(w, others, saved, only);
	place_top(w, u->keys, others, &dram, 1, &picked);
	memcpy(u->to_dram, picked, w->words * sizeof(*picked));
	if (up) {
		place_top(w, u->keys, only, &up, 1, &picked);
		add(w, u->to_dram, picked);
	}
	without(w, u->to_nvme, saved, u->to_dram);
}

void place(const struct place_work *w, const struct place_units *u, uint32_t keep, uint32_t dram, uint32_t nvme)
{
	uint32_t alive = count(w, u->alive), below = alive - keep;
	uint32_t guarded = alive - both(w, w->segment, u->alive, w->cls[CLASS_REST]);
	uint32_t h = (uint32_t)((uint64_t)keep * w->hysteresis_permille / 1000);
	uint32_t core = MAX(keep - h, MIN(guarded, keep)), edge = core < keep ? MIN(alive, keep + h) : keep;
	uint32_t n_saved = (uint32_t)MIN((uint64_t)below, (uint64_t)dram + nvme);
	uint32_t cuts[SELECT_CUTS] = {core, edge, keep + MIN(below, dram), keep + n_saved};
	uint64_t *saved = w->cut[3];

	place_top(w, u->keys, u->alive, cuts, SELECT_CUTS, w->cut);
	if (core < keep)
		seat_band(w, u, keep - core);
	else
		memcpy(u->to_device, w->cut[0], w->words * sizeof(uint64_t));

	/* What is on the device lies before `edge`, so past it the best of the others need no new ranking. */
	if (cuts[3] >= edge) {
		without(w, saved, saved, u->to_device);
	} else {
		without(w, w->tmp[0], u->alive, u->to_device);
		place_top(w, u->keys, w->tmp[0], &n_saved, 1, &saved);
	}
	if (cuts[2] < edge || both(w, w->segment, saved, u->nvme_only)) {
		place_below(w, u, saved, dram, nvme);
		return;
	}
	without(w, u->to_dram, w->cut[2], u->to_device);
	without(w, u->to_nvme, saved, u->to_dram);
}
