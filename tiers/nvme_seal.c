/* SPDX-License-Identifier: MIT */
/*
 * What makes pages durable, in order. A segment is reused only after a head
 * with a new sequence number was written and flushed; two are kept ready so that
 * nobody waits for that. Sealing runs one segment at a time:
 *
 *   live maps of every segment in which pages died → flush → table and foot → flush
 *
 * The first flush is for the segment's own pages too: a foot never speaks of pages that are not on the
 * medium. Else a copy made by the cleaner could rule out its source after a power cut, and be none itself.
 *
 * So whatever died before a seal began stays dead in every restart that finds the sealed
 * pages: a page and the one that took its place are never both found. A segment that is reused needs no
 * map, its new head tells the same; the flush waits for heads of that kind. Between seals a timer
 * writes the maps without flushing, which is enough when only the daemon dies; the next seal flushes them.
 */
#include <string.h>

#include "shm/bits.h"
#include "shm/crc.h"
#include "shm/trial.h"
#include "tiers/nvme.h"

#define MAPS_AT_ONCE 128u
#define RETRY_NS 1000000000u

static void advance(struct nvme *t);

static void *unit_alloc(size_t units)
{
	void *p = aligned_alloc(KVT_UNIT, units * KVT_UNIT);

	if (p)
		memset(p, 0, units * KVT_UNIT);
	return p;
}

/* ---- heads ------------------------------------------------------------------------ */

/* The head that was to tell of the deaths in the segment's last use is durable; or it failed, and a map has to.
 */
static void replaced(struct nvme *t, struct nvme_seg *s, int res)
{
	if (!s->replacing)
		return;
	s->replacing = false;
	t->replacing--;
	if (res) {
		s->seq = s->old_seq;
		s->map_generation = s->old_generation;
		nvme_mark_dirty(t, s);
	}
	if (t->sealer.step == STEP_HEADS)
		advance(t);
}

static void head_ended(struct nvme *t, struct nvme_seg *s, int res)
{
	struct io_req *io;

	crash_point("nvme.head.synced");
	s->head_ok = !res;
	s->failed = res != 0;
	while ((io = io_queue_pop(&s->held)))
		io_queue_add(&t->outbox, io);
	if (res) {
		t->stat.errors++;
		t->retry_ns = now_ns() + RETRY_NS;
	}
	if (res && s->state == NVME_IS_READY) {
		TAILQ_REMOVE(&t->ready, s, link);
		s->state = NVME_FREE;
	}
	replaced(t, s, res);
}

static void head_synced(struct nvme *t, struct nvme_req *r)
{
	head_ended(t, r->seg, r->io.res);
}

static void head_written(struct nvme *t, struct nvme_req *r)
{
	struct nvme_req *sync = r->io.res ? NULL : nvme_req_new(t, IO_SYNC, r->seg, 0, 0, NULL, head_synced);

	crash_point("nvme.head.written");

	if (sync)
		nvme_send(t, sync);
	else
		head_ended(t, r->seg, r->io.res ? r->io.res : -ENOMEM);
}

static struct nvme_seg *find_free(struct nvme *t)
{
	for (uint32_t n = 0; n < t->segments; n++) {
		struct nvme_seg *s = &t->seg[t->free_hint++ % t->segments];

		if (s->state == NVME_FREE && !s->pins)
			return s;
	}
	return NULL;
}

struct nvme_seg *nvme_head_start(struct nvme *t)
{
	struct nvme_seg *s = t->retry_ns && now_ns() < t->retry_ns ? NULL : find_free(t);
	_cleanup_free_ struct nvme_head *h = s ? unit_alloc(1) : NULL;
	struct nvme_req *r = h ? nvme_req_new(t, IO_WRITE, s, 0, 1, h, head_written) : NULL;

	if (!r)
		return NULL;
	s->replacing = s->map_dirty;
	t->replacing += s->replacing;
	s->old_seq = s->seq;
	s->old_generation = s->map_generation;
	nvme_mark_clean(t, s);
	s->head_ok = s->failed = s->unsealed = false;
	s->seq = t->next_seq++;
	s->map_generation = 0;
	s->cursor = NVME_DATA_UNIT;
	s->state = NVME_IS_READY;
	TAILQ_INSERT_TAIL(&t->ready, s, link);
	memcpy(h->uuid, t->uuid, sizeof(h->uuid));
	h->seq = s->seq;
	h->segment = s->index;
	nvme_unit_seal(h, NVME_MAGIC_HEAD);
	r->owned = TAKE_PTR(h);
	crash_point("nvme.head.write");
	nvme_send(t, r);
	return s;
}

void nvme_head_pump(struct nvme *t)
{
	struct nvme_seg *s;
	unsigned n = 0;

	TAILQ_FOREACH(s, &t->ready, link)
		n++;
	while (n < NVME_READY && n < t->nfree && nvme_head_start(t))
		n++;
}

/* ---- sealing ------------------------------------------------------------------------ */

static void step_done(struct nvme *t, struct nvme_req *r)
{
	struct nvme_sealer *sl = &t->sealer;

	if (r->io.res)
		sl->error = r->io.res;
	if (!--sl->outstanding)
		advance(t);
}

static void map_done(struct nvme *t, struct nvme_req *r)
{
	crash_point("nvme.map.written");
	r->seg->pins--;
	if (r->io.res)
		nvme_mark_dirty(t, r->seg);
	step_done(t, r);
}

static int send_map(struct nvme *t, struct nvme_seg *s)
{
	uint32_t slot = 1 + (uint32_t)((s->map_generation + 1) & 1);
	struct nvme_map *m = unit_alloc(1);
	struct nvme_req *r = m ? nvme_req_new(t, IO_WRITE, s, slot, 1, m, map_done) : NULL;

	if (!r) {
		free(m);
		return -ENOMEM;
	}
	memcpy(m->uuid, t->uuid, sizeof(m->uuid));
	m->seq = s->seq;
	m->generation = ++s->map_generation;
	m->segment = s->index;
	memcpy(m->live, s->live, t->map_words * sizeof(*m->live));
	nvme_unit_seal(m, NVME_MAGIC_MAP);
	r->owned = m;
	nvme_mark_clean(t, s);
	s->pins++;
	t->unflushed |= UINT64_C(1) << r->io.file;
	t->sealer.outstanding++;
	crash_point("nvme.map.write");
	nvme_send(t, r);
	return 0;
}

static uint64_t file_bit(const struct nvme *t, const struct nvme_seg *s)
{
	return UINT64_C(1) << (s->index / t->file_segments);
}

static void send_syncs(struct nvme *t, uint64_t files)
{
	struct nvme_sealer *sl = &t->sealer;

	for (; files; files &= files - 1) {
		struct nvme_seg *s = &t->seg[(uint32_t)__builtin_ctzll(files) * t->file_segments];
		struct nvme_req *r = nvme_req_new(t, IO_SYNC, s, 0, 0, NULL, step_done);

		if (!r) {
			sl->error = -ENOMEM;
			return;
		}
		sl->outstanding++;
		nvme_send(t, r);
	}
}

static int by_unit(const void *a, const void *b)
{
	const struct nvme_entry *x = a, *y = b;

	return x->unit < y->unit ? -1 : x->unit > y->unit;
}

/* Keep of the build what still lives: entries, the records they name, their positions. Returns table units. */
static uint32_t compact(struct nvme_seg *s, struct nvme_foot *f, uint32_t *seq_map)
{
	const struct nvme_build *b = &s->build;

	memset(seq_map, 0xff, b->seqs * sizeof(*seq_map));
	for (uint32_t i = 0; i < b->pages; i++) {
		const struct nvme_entry *e = &b->entry[i];

		if (!bits_test(s->live, e->unit))
			continue;
		f->pages++;
		f->pos_bytes += e->pos_len;
		if (e->seq_index != NVME_NO_SEQ && seq_map[e->seq_index] == NVME_NO_SEQ)
			seq_map[e->seq_index] = f->seqs++;
	}
	return nvme_table_units(f->pages, f->seqs, f->pos_bytes);
}

static void fill_table(const struct nvme_seg *s, const struct nvme_foot *f, const uint32_t *seq_map, void *buf)
{
	const struct nvme_build *b = &s->build;
	struct nvme_entry *entry = buf;
	struct seq_record *seq = (void *)(entry + f->pages);
	uint8_t *pos = (uint8_t *)(seq + f->seqs);
	uint32_t n = 0, off = 0;

	for (uint32_t i = 0; i < b->seqs; i++)
		if (seq_map[i] != NVME_NO_SEQ)
			seq[seq_map[i]] = b->seq[i];
	for (uint32_t i = 0; i < b->pages; i++) {
		struct nvme_entry *e = &entry[n];

		if (!bits_test(s->live, b->entry[i].unit))
			continue;
		n++;
		*e = b->entry[i];
		if (e->seq_index != NVME_NO_SEQ)
			e->seq_index = seq_map[e->seq_index];
		if (e->pos_len)
			memcpy(pos + off, b->pos + e->pos_off, e->pos_len);
		e->pos_off = off;
		off += e->pos_len;
	}
	qsort(entry, n, sizeof(*entry), by_unit);
}

static int send_foot(struct nvme *t, struct nvme_seg *s)
{
	_cleanup_free_ uint32_t *seq_map = malloc((s->build.seqs + 1) * sizeof(*seq_map));
	struct nvme_foot foot = {.seq = s->seq, .segment = s->index, .life = s->life, .data_end = s->cursor};
	_cleanup_free_ char *buf = NULL;
	struct nvme_req *r;

	if (!seq_map)
		return -ENOMEM;
	foot.seal = s->seal = t->next_seq++;
	memcpy(foot.uuid, t->uuid, sizeof(foot.uuid));
	foot.table_units = s->table_units = compact(s, &foot, seq_map);
	buf = unit_alloc(foot.table_units + 1);
	if (!buf)
		return -ENOMEM;
	fill_table(s, &foot, seq_map, buf);
	foot.table_crc = crc32c(0, buf, (size_t)foot.table_units * KVT_UNIT);
	memcpy(buf + (size_t)foot.table_units * KVT_UNIT, &foot, sizeof(foot));
	nvme_unit_seal(buf + (size_t)foot.table_units * KVT_UNIT, NVME_MAGIC_FOOT);
	r = nvme_req_new(t, IO_WRITE, s, t->units - 1 - foot.table_units, foot.table_units + 1, buf, step_done);
	if (!r)
		return -ENOMEM;
	r->owned = TAKE_PTR(buf);
	s->state = NVME_SEALING;
	t->sealer.outstanding++;
	crash_point("nvme.foot.write");
	nvme_send(t, r);
	return 0;
}

/* Without a foot its pages live until the restart, but nothing may rely on it: copies in it are void. */
static void seal_failed(struct nvme *t, struct nvme_seg *s)
{
	t->stat.errors++;
	s->failed = s->unsealed = true;
	for (uint32_t i = 0; s->build.relocated && i < s->build.pages; i++) {
		const struct nvme_entry *e = &s->build.entry[i];

		if (e->from_seq && bits_test(s->live, e->unit))
			nvme_page_dead(t, s, e->unit, nvme_page_units(e->bytes));
	}
	nvme_build_free(&s->build);
}

static void seal_ended(struct nvme *t)
{
	struct nvme_sealer *sl = &t->sealer;
	struct nvme_seg *s = sl->seg;
	int error = sl->error;

	*sl = (struct nvme_sealer){0};
	if (error)
		t->seal_errors++;
	if (!s)
		return;
	crash_point("nvme.foot.synced");
	t->seals++;
	if (error)
		seal_failed(t, s);
	s->state = NVME_SEALED;
	if (!s->live_units) {
		nvme_seg_free(t, s);
	} else if (s->build.relocated) {
		s->announcing = true;
		TAILQ_INSERT_TAIL(&t->announce, s, link);
	} else {
		nvme_build_free(&s->build);
	}
}

/* One step further; steps without I/O fall through to the next. */
static void advance(struct nvme *t)
{
	struct nvme_sealer *sl = &t->sealer;

	while (sl->step != STEP_IDLE && !sl->outstanding) {
		if (sl->error || sl->step == STEP_FOOT_SYNC) {
			seal_ended(t);
			return;
		}
		switch (sl->step) {
		case STEP_MAPS:
			for (; sl->outstanding < MAPS_AT_ONCE && sl->maps && !sl->error; sl->maps--)
				sl->error = send_map(t, TAILQ_FIRST(&t->dirty));
			if (!sl->outstanding && !sl->error)
				sl->step = STEP_HEADS;
			break;
		case STEP_HEADS:
			if (t->replacing && (sl->seg || sl->sync))
				return; /* the last of them goes on */
			sl->step = STEP_MAP_SYNC;
			break;
		case STEP_MAP_SYNC:
			crash_point("nvme.maps.written");
			sl->step = STEP_FOOT;
			sl->files = sl->seg || sl->sync ? t->unflushed : 0;
			if (sl->seg)
				sl->files |= file_bit(t, sl->seg);
			if (planted("pages-not-flushed"))
				sl->files = 0;
			send_syncs(t, sl->files);
			break;
		case STEP_FOOT:
			crash_point("nvme.maps.synced");
			t->unflushed &= ~sl->files;
			sl->step = STEP_FOOT_SYNC;
			if (!sl->seg || !sl->seg->live_units)
				break;
			sl->error = send_foot(t, sl->seg);
			if (!sl->error)
				sl->step = STEP_FOOT_WRITTEN;
			break;
		case STEP_FOOT_WRITTEN:
			crash_point("nvme.foot.written");
			sl->step = STEP_FOOT_SYNC;
			send_syncs(t, file_bit(t, sl->seg));
			break;
		default:
			return;
		}
	}
}

/* The maps that are dirty now; those that get dirty while these are written wait for the next round. */
static void start(struct nvme *t, struct nvme_seg *s)
{
	t->sealer.seg = s;
	t->sealer.maps = t->ndirty;
	t->sealer.step = STEP_MAPS;
	advance(t);
}

/* Copies whose announcement is still due die with their sources: the maps have to say so. */
static void reconcile_copies(struct nvme *t)
{
	struct nvme_seg *s, *next;

	for (s = TAILQ_FIRST(&t->announce); s; s = next) {
		next = TAILQ_NEXT(s, link);
		nvme_clean_reconcile(t, s);
	}
}

void nvme_seal_pump(struct nvme *t)
{
	struct nvme_sealer *sl = &t->sealer;
	struct nvme_seg *s;

	while (sl->step == STEP_IDLE && (s = TAILQ_FIRST(&t->closing))) {
		TAILQ_REMOVE(&t->closing, s, link);
		nvme_clean_reconcile(t, s);
		reconcile_copies(t);
		start(t, s);
	}
}

void nvme_maps_start(struct nvme *t, bool sync)
{
	struct nvme_sealer *sl = &t->sealer;

	if (sl->step == STEP_IDLE && !planted("copies-not-reconciled"))
		reconcile_copies(t);
	if (sl->step != STEP_IDLE || (TAILQ_EMPTY(&t->dirty) && !(sync && (t->unflushed || t->replacing))))
		return;
	sl->sync = sync;
	start(t, NULL);
}
