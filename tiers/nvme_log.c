/* SPDX-License-Identifier: MIT */
/*
 * The log: which segment a page goes to, what lives where. Pages of one
 * sequence die together, so up to four streams per lifetime class keep the
 * sequences that write at the same time in segments of their own; a stream follows a sequence
 * for as long as nobody needs it more. That, and not the cleaner, keeps write amplification low.
 */
#include "tiers/nvme.h"

#include <string.h>

#include "shm/bits.h"
#include "shm/trial.h"

struct nvme_seg *nvme_resolve(struct nvme *t, tier_addr addr, uint32_t *ret_unit)
{
	uint64_t index = addr >> 40;
	uint32_t unit = addr & 0xffff;
	struct nvme_seg *s;

	if (index >= t->segments || unit >= t->units)
		return NULL;
	s = &t->seg[index];
	if (s->state < NVME_OPEN || (addr >> 16 & 0xffffff) != nvme_generation(s->seq) ||
	    !bits_test(s->live, unit))
		return NULL;
	*ret_unit = unit;
	return s;
}

int nvme_log_open(struct nvme *t)
{
	t->map_words = (uint32_t)BITS_WORDS(t->units);
	t->seg = calloc(t->segments, sizeof(*t->seg));
	t->live_words = calloc((size_t)t->segments * t->map_words, sizeof(*t->live_words));
	if (!t->seg || !t->live_words)
		return -ENOMEM;
	for (uint32_t i = 0; i < t->segments; i++) {
		t->seg[i].index = i;
		t->seg[i].live = t->live_words + (size_t)i * t->map_words;
		io_queue_init(&t->seg[i].held);
	}
	t->nfree = t->segments;
	t->reserve = MAX(3u, (uint32_t)DIV_UP(t->segments, 10));
	t->streams = MIN(MAX(t->segments / 64, 1u), NVME_MAX_STREAMS);
	return 0;
}

void nvme_log_close(struct nvme *t)
{
	for (uint32_t i = 0; t->seg && i < t->segments; i++)
		nvme_build_free(&t->seg[i].build);
	free(t->seg);
	free(t->live_words);
}

void nvme_build_free(struct nvme_build *b)
{
	free(b->entry);
	free(b->seq);
	free(b->pos);
	*b = (struct nvme_build){0};
}

struct nvme_stream *nvme_stream_for(struct nvme *t, const uint8_t key[16], unsigned life)
{
	struct nvme_stream *best = NULL;

	for (unsigned i = 0; i < t->streams; i++) {
		struct nvme_stream *st = &t->stream[life][i];

		if (st->used && !memcmp(st->owner, key, sizeof(st->owner))) {
			best = st;
			break;
		}
		if (!best || st->used < best->used)
			best = st;
	}
	memcpy(best->owner, key, sizeof(best->owner));
	best->used = ++t->prepares;
	return best;
}

bool nvme_has_room(const struct nvme *t, const struct nvme_seg *s, uint32_t units, uint32_t need)
{
	const struct nvme_build *b = &s->build;

	return s->cursor + units +
		       nvme_table_units(b->pages, b->seqs, (uint64_t)b->pos_bytes + b->reserved + need) <
	       t->units;
}

static struct nvme_seg *take(struct nvme *t, unsigned life)
{
	struct nvme_seg *s = NULL;

	if (life == NVME_COLD || t->nfree > t->reserve)
		s = TAILQ_FIRST(&t->ready) ? TAILQ_FIRST(&t->ready) : nvme_head_start(t);
	if (!s)
		return NULL;
	crash_point("nvme.segment.take");
	TAILQ_REMOVE(&t->ready, s, link);
	t->nfree--;
	s->state = NVME_OPEN;
	s->life = (uint8_t)life;
	return s;
}

int nvme_place(struct nvme *t, struct nvme_stream *st, unsigned life, uint32_t units, uint32_t need,
	       struct nvme_seg **ret, uint32_t *ret_unit)
{
	if (!st->seg || st->seg->failed || !nvme_has_room(t, st->seg, units, need)) {
		struct nvme_seg *s = take(t, life);

		if (!s) {
			/* What is open stays open while the smallest page still fits. */
			if (st->seg && !nvme_has_room(t, st->seg, 1, sizeof(struct nvme_entry)))
				nvme_stream_close(t, st);
			return -ENOSPC;
		}
		nvme_stream_close(t, st);
		st->seg = s;
	}
	*ret = st->seg;
	*ret_unit = st->seg->cursor;
	st->seg->cursor += units;
	st->seg->prepared++;
	st->seg->build.reserved += need;
	return 0;
}

void nvme_unplace(struct nvme *t, struct nvme_seg *s, uint32_t unit, uint32_t units, uint32_t need)
{
	if (s->cursor == unit + units)
		s->cursor = unit;
	s->prepared--;
	s->build.reserved -= need;
	nvme_seg_settle(t, s);
}

void nvme_stream_close(struct nvme *t, struct nvme_stream *st)
{
	struct nvme_seg *s = st->seg;

	st->seg = NULL;
	if (!s)
		return;
	crash_point("nvme.segment.close");
	s->state = NVME_CLOSING;
	nvme_seg_settle(t, s);
}

static bool grow(void **p, uint32_t *cap, uint64_t want, size_t size)
{
	uint64_t n = MAX((uint64_t)*cap * 2, MAX(want, UINT64_C(64)));
	void *q;

	if (want <= *cap)
		return true;
	if (n > UINT32_MAX || !(q = realloc(*p, n * size)))
		return false;
	*p = q;
	*cap = (uint32_t)n;
	return true;
}

/* Index of the record, added when the last few are others. */
static int64_t build_seq(struct nvme_build *b, const struct seq_record *seq)
{
	uint32_t tries = MIN(b->seqs, 64u);

	for (uint32_t i = 1; i <= tries; i++)
		if (!memcmp(&b->seq[b->seqs - i], seq, sizeof(*seq)))
			return b->seqs - i;
	if (!grow((void **)&b->seq, &b->seq_cap, (uint64_t)b->seqs + 1, sizeof(*b->seq)))
		return -ENOMEM;
	b->seq[b->seqs] = *seq;
	return b->seqs++;
}

int nvme_build_add(struct nvme *t, struct nvme_seg *s, const struct nvme_entry *e, uint32_t need,
		   const struct seq_record *seq, const void *pos)
{
	struct nvme_build *b = &s->build;
	struct nvme_entry *n;
	int64_t index = NVME_NO_SEQ;

	b->reserved -= need;
	if (!nvme_has_room(t, s, 0, (uint32_t)sizeof(*e) + (uint32_t)sizeof(*seq) + e->pos_len))
		return -E2BIG;
	if (!grow((void **)&b->entry, &b->page_cap, (uint64_t)b->pages + 1, sizeof(*b->entry)) ||
	    !grow((void **)&b->pos, &b->pos_cap, (uint64_t)b->pos_bytes + e->pos_len, 1))
		return -ENOMEM;
	if (seq && (index = build_seq(b, seq)) < 0)
		return (int)index;
	n = &b->entry[b->pages++];
	*n = *e;
	n->seq_index = (uint32_t)index;
	n->pos_off = b->pos_bytes;
	/* Encoded already (the cleaner's) or still a bitmap of pos_words words. */
	if (e->pos_len && e->from_seq)
		memcpy(b->pos + b->pos_bytes, pos, e->pos_len);
	else if (e->pos_len)
		nvme_pos_put(b->pos + b->pos_bytes, pos, e->pos_words, e->flags);
	b->pos_bytes += e->pos_len;
	b->relocated += e->from_seq != 0;
	return 0;
}

void nvme_page_live(struct nvme *t, struct nvme_seg *s, uint32_t unit, uint32_t units)
{
	bits_set(s->live, unit);
	s->live_units += units;
	t->live_units += units;
}

void nvme_mark_dirty(struct nvme *t, struct nvme_seg *s)
{
	if (s->map_dirty)
		return;
	TAILQ_INSERT_TAIL(&t->dirty, s, dirty_link);
	t->ndirty++;
	s->map_dirty = true;
}

void nvme_mark_clean(struct nvme *t, struct nvme_seg *s)
{
	if (!s->map_dirty)
		return;
	TAILQ_REMOVE(&t->dirty, s, dirty_link);
	t->ndirty--;
	s->map_dirty = false;
}

void nvme_page_dead(struct nvme *t, struct nvme_seg *s, uint32_t unit, uint32_t units)
{
	units = MIN(units, s->live_units);
	bits_clear(s->live, unit);
	s->live_units -= units;
	t->live_units -= units;
	if (s->state >= NVME_SEALING)
		nvme_mark_dirty(t, s);
	if (!s->live_units && s->state == NVME_SEALED)
		nvme_seg_free(t, s);
}

void nvme_seg_settle(struct nvme *t, struct nvme_seg *s)
{
	if (s->state != NVME_CLOSING || ((s->prepared || s->inflight) && !planted("sealed-before-written")))
		return;
	if (!s->live_units)
		nvme_seg_free(t, s);
	else
		TAILQ_INSERT_TAIL(&t->closing, s, link);
}

void nvme_seg_free(struct nvme *t, struct nvme_seg *s)
{
	crash_point("nvme.segment.free");
	if (s->announcing)
		TAILQ_REMOVE(&t->announce, s, link);
	if (s->victim)
		t->nvictims--;
	s->announcing = s->victim = false;
	nvme_build_free(&s->build);
	memset(s->live, 0, t->map_words * sizeof(*s->live));
	s->live_units = 0;
	s->state = NVME_FREE;
	t->nfree++;
}
