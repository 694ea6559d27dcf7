/* SPDX-License-Identifier: MIT */
/*
 * The restart scan. First every segment's head, live maps and foot: a head
 * and a foot with one sequence number make a sealed segment, anything else is free. Then the
 * tables, youngest seal first, so that a copy made by the cleaner is seen before its
 * source and can rule it out. A segment whose table does not match its checksum is given up whole:
 * its pages are misses.
 */
#include <stdio.h>
#include <string.h>

#include "shm/bits.h"
#include "tiers/nvme.h"

struct scan {
	struct nvme *t;
	tier_found_fn fn;
	void *arg;
	uint64_t *superseded; /* bit per unit of the store: a younger copy of the page there was found */
	struct nvme_seg **sealed;
	uint32_t nsealed;
	char *buf; /* two units */
	char *table;
	size_t table_cap;
};

static int read_units(struct nvme *t, const struct nvme_seg *s, uint32_t unit, uint32_t units, char *buf)
{
	uint64_t off = NVME_PREAMBLE + (uint64_t)(s->index % t->file_segments) * t->segment_bytes +
		       (uint64_t)unit * KVT_UNIT;
	size_t left = (size_t)units * KVT_UNIT;
	uint8_t tries = 0;

	while (left) {
		ssize_t n = pread(t->fd[s->index / t->file_segments], buf, left, (off_t)off);

		if (n < 0 && io_again(errno, &tries))
			continue;
		if (n <= 0)
			return n < 0 ? -errno : -EIO;
		buf += n;
		off += (uint64_t)n;
		left -= (size_t)n;
	}
	return 0;
}

int nvme_entry_meta(const struct nvme_entry *e, const uint8_t *pos_bytes, uint64_t *pos, struct page_meta *ret)
{
	int r = nvme_pos_get(pos, e->pos_words, pos_bytes + e->pos_off, e->pos_len, e->flags);

	if (r < 0)
		return r;
	*ret = (struct page_meta){
		.id = e->id,
		.crc = e->crc,
		.bytes = e->bytes,
		.pos_words = e->pos_words,
		.seq_info = e->seq_index,
		.pos = e->pos_words ? pos : NULL,
	};
	return 0;
}

/* The newest live map of this use of the segment, in either place. NULL: nothing died after the seal. */
static const struct nvme_map *newest_map(const struct nvme *t, const struct nvme_seg *s, const char *units)
{
	const struct nvme_map *best = NULL;

	for (int i = 0; i < 2; i++) {
		const struct nvme_map *m = (const void *)(units + (size_t)i * KVT_UNIT);

		if (nvme_unit_check(m, NVME_MAGIC_MAP) < 0 || memcmp(m->uuid, t->uuid, sizeof(m->uuid)) != 0 ||
		    m->segment != s->index || m->seq != s->seq)
			continue;
		if (!best || m->generation > best->generation)
			best = m;
	}
	return best;
}

/* 1 the segment is sealed (seq, seal and table_units are set), 0 it is free. */
static int look(struct scan *sc, struct nvme_seg *s)
{
	struct nvme *t = sc->t;
	struct nvme_head head;
	struct nvme_foot foot;
	int r = read_units(t, s, 0, 1, sc->buf);

	if (!r)
		r = read_units(t, s, t->units - 1, 1, sc->buf + KVT_UNIT);
	if (r < 0)
		return r;
	if (nvme_unit_check(sc->buf, NVME_MAGIC_HEAD) < 0)
		return 0;
	memcpy(&head, sc->buf, sizeof(head));
	if (memcmp(head.uuid, t->uuid, sizeof(head.uuid)) != 0 || head.segment != s->index ||
	    nvme_foot_check(sc->buf + KVT_UNIT, t->uuid, s->index, t->units, &foot) < 0 || foot.seq != head.seq)
		return 0;
	s->seq = foot.seq;
	s->seal = foot.seal;
	s->table_units = foot.table_units;
	return 1;
}

static int by_seal(const void *a, const void *b)
{
	const struct nvme_seg *x = *(struct nvme_seg *const *)a, *y = *(struct nvme_seg *const *)b;

	return x->seal > y->seal ? -1 : x->seal < y->seal;
}

/* Note that the source of a copy is no page any more. */
static void supersede(struct scan *sc, const struct nvme_entry *e)
{
	struct nvme *t = sc->t;

	if (!e->from_seq || e->from_segment >= t->segments || e->from_unit >= t->units ||
	    t->seg[e->from_segment].seq != e->from_seq)
		return;
	bits_set(sc->superseded + (size_t)e->from_segment * t->map_words, e->from_unit);
}

static int load_table(struct scan *sc, struct nvme_seg *s, struct nvme_foot *foot, struct nvme_table *table)
{
	struct nvme *t = sc->t;
	size_t bytes = (size_t)(s->table_units + 1) * KVT_UNIT;
	int r;

	if (bytes > sc->table_cap) {
		free(sc->table);
		sc->table_cap = 0;
		sc->table = aligned_alloc(KVT_UNIT, bytes);
		if (!sc->table)
			return -ENOMEM;
		sc->table_cap = bytes;
	}
	r = read_units(t, s, t->units - 1 - s->table_units, s->table_units + 1, sc->table);
	if (!r)
		r = nvme_foot_check(sc->table + bytes - KVT_UNIT, t->uuid, s->index, t->units, foot);
	if (!r && (foot->seq != s->seq || foot->table_units != s->table_units))
		r = -EBADMSG;
	return r ? r : nvme_table_check(foot, sc->table, table);
}

static bool claim(struct scan *sc, struct nvme_seg *s, const struct nvme_table *tb, const struct nvme_entry *e)
{
	struct page_meta meta;

	if (!sc->fn || nvme_entry_meta(e, tb->pos, sc->t->pos, &meta) < 0)
		return false;
	return sc->fn(sc->arg, nvme_addr(s, e->unit), &meta,
		      e->seq_index == NVME_NO_SEQ ? NULL : &tb->seq[e->seq_index]);
}

static int take_in(struct scan *sc, struct nvme_seg *s)
{
	struct nvme *t = sc->t;
	const uint64_t *gone = sc->superseded + (size_t)s->index * t->map_words;
	const struct nvme_map *map;
	struct nvme_table table;
	struct nvme_foot foot;
	int r = load_table(sc, s, &foot, &table);

	if (!r)
		r = read_units(t, s, 1, 2, sc->buf);
	if (r == -ENOMEM)
		return r;
	if (r < 0) {
		t->bad_tables++;
		return 0;
	}
	map = newest_map(t, s, sc->buf);
	s->map_generation = map ? map->generation : 0;
	s->life = (uint8_t)MIN(foot.life, NVME_COLD);
	s->cursor = foot.data_end;
	s->head_ok = true;
	s->state = NVME_SEALED;
	t->nfree--;
	for (uint32_t i = 0; i < table.pages; i++) {
		const struct nvme_entry *e = &table.entry[i];

		/* A copy that died speaks for nobody: its source died before it, or it was void and the source
		 * lives. */
		if (map && !bits_test(map->live, e->unit))
			continue;
		supersede(sc, e);
		if (!bits_test(gone, e->unit) && claim(sc, s, &table, e))
			nvme_page_live(t, s, e->unit, nvme_page_units(e->bytes));
		else
			nvme_mark_dirty(t, s);
	}
	if (!s->live_units)
		nvme_seg_free(t, s);
	return 0;
}

int nvme_scan(struct tier *tier, tier_found_fn fn, void *arg)
{
	struct nvme *t = container_of(tier, struct nvme, tier);
	struct scan sc = {.t = t, .fn = fn, .arg = arg};
	int r = -ENOMEM;
	size_t n;

	if (t->scanned)
		return t->fresh ? 0 : -EALREADY;
	t->scanned = true;
	sc.superseded = calloc((size_t)t->segments * t->map_words, sizeof(uint64_t));
	sc.sealed = calloc(t->segments, sizeof(struct nvme_seg *));
	sc.buf = aligned_alloc(KVT_UNIT, 2 * KVT_UNIT);
	if (!sc.superseded || !sc.sealed || !sc.buf)
		goto out;
	for (uint32_t i = 0; i < t->segments; i++) {
		r = look(&sc, &t->seg[i]);
		if (r < 0)
			t->bad_tables++;
		else if (r)
			sc.sealed[sc.nsealed++] = &t->seg[i];
	}
	qsort(sc.sealed, sc.nsealed, sizeof(struct nvme_seg *), by_seal);
	r = 0;
	for (uint32_t i = 0; i < sc.nsealed && !r; i++)
		r = take_in(&sc, sc.sealed[i]);
	n = strlen(t->stat.note);
	if (t->bad_tables)
		snprintf(t->stat.note + n, sizeof(t->stat.note) - n, "%s%u segments unreadable at the restart",
			 n ? "; " : "", t->bad_tables);
out:
	free(sc.superseded);
	free(sc.sealed);
	free(sc.buf);
	free(sc.table);
	if (r < 0) {
		/* What was not looked at counts as free: nothing may be written there, nor a map of what was.
		 */
		t->scanned = false;
		return r;
	}
	nvme_head_pump(t);
	nvme_kick(t);
	return r;
}
