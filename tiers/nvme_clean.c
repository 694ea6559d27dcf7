/* SPDX-License-Identifier: MIT */
/*
 * The cleaner. When free segments run low it picks the sealed segment with
 * the best ratio of benefit to cost, (1 - u) * age / (1 + u) with u the live share and age in
 * seals (Rosenblum and Ousterhout, "The Design and Implementation of a
 * Log-Structured File System", 1991, section 3.6), and copies what lives to the cold
 * stream: read into a staging slab, written from the same slab, no copy in between.
 *
 * Nothing is freed on a promise. The source stays the page until the copy's segment is
 * sealed; only then is the owner told, and only then does the source die. A copy whose source dies
 * in the meantime dies with it (reconcile). If the daemon dies in between, the copy's table entry
 * names its source, so that the restart finds one of the two.
 *
 * Copying goes on as completions come in, a chunk at a time as far as the owner lets it; the owner is told of
 * moves from tick() alone.
 */
#include <string.h>

#include "shm/bits.h"
#include "shm/trial.h"
#include "tiers/nvme.h"

#define ANNOUNCE_MAX 2048u /* entries per tick */

static bool source_lives(const struct nvme *t, const struct nvme_entry *e)
{
	const struct nvme_seg *from = &t->seg[e->from_segment];

	return from->seq == e->from_seq && bits_test(from->live, e->from_unit);
}

void nvme_clean_reconcile(struct nvme *t, struct nvme_seg *s)
{
	uint64_t seq = s->seq;

	if (!s->build.relocated)
		return;
	for (uint32_t i = s->build.announced; i < s->build.pages; i++) {
		struct nvme_entry e = s->build.entry[i];

		if (e.from_seq && bits_test(s->live, e.unit) && !source_lives(t, &e))
			nvme_page_dead(t, s, e.unit, nvme_page_units(e.bytes));
		if (s->seq != seq || s->state == NVME_FREE)
			return;
	}
}

void nvme_clean_announce(struct nvme *t,
			 bool (*moved)(void *arg, const struct page_meta *m, tier_addr from, tier_addr to),
			 void *arg)
{
	struct nvme_seg *s;

	for (unsigned n = 0; n < ANNOUNCE_MAX && (s = TAILQ_FIRST(&t->announce)); n++) {
		struct nvme_build *b = &s->build;
		struct page_meta meta;
		struct nvme_entry e;
		bool keep;

		if (b->announced == b->pages) {
			TAILQ_REMOVE(&t->announce, s, link);
			s->announcing = false;
			nvme_build_free(b);
			continue;
		}
		e = b->entry[b->announced++];
		if (!e.from_seq || !bits_test(s->live, e.unit))
			continue;
		keep = source_lives(t, &e) && nvme_entry_meta(&e, b->pos, t->pos, &meta) >= 0;
		if (keep) {
			struct nvme_seg *from = &t->seg[e.from_segment];

			keep = moved(arg, &meta, nvme_addr(from, e.from_unit), nvme_addr(s, e.unit));
			crash_point("nvme.clean.moved");
			if (source_lives(t, &e)) /* or the owner freed it just now */
				nvme_page_dead(t, from, e.from_unit, nvme_page_units(e.bytes));
		}
		if (!keep && bits_test(s->live, e.unit))
			nvme_page_dead(t, s, e.unit, nvme_page_units(e.bytes));
	}
}

/* ---- choosing ------------------------------------------------------------------------- */

static uint32_t low_mark(const struct nvme *t)
{
	return t->reserve + MAX(2u, t->segments / 16);
}

/* Writers will soon find no free segment. */
static bool urgent(const struct nvme *t)
{
	return t->nfree <= t->reserve + (low_mark(t) - t->reserve) / 2;
}

static struct nvme_seg *choose(struct nvme *t)
{
	struct nvme_seg *best = NULL;
	double best_score = 0;

	for (uint32_t i = 0; i < t->segments; i++) {
		struct nvme_seg *s = &t->seg[i];
		double u = (double)s->live_units / t->units, age, score;

		if (s->state != NVME_SEALED || s->victim || s->failed || s->announcing ||
		    s->live_units + t->units / 16 > t->units)
			continue;
		age = (double)MIN(t->next_seq - s->seal, (uint64_t)t->segments * 2);
		score = (1 - u) * age / (1 + u);
		if (score > best_score) {
			best_score = score;
			best = s;
		}
	}
	return best;
}

/* ---- copying -------------------------------------------------------------------------- */

static void victim_done(struct nvme *t)
{
	struct nvme_cleaner *c = &t->cleaner;
	struct nvme_seg *v = c->victim;

	crash_point("nvme.clean.done");
	v->pins--;
	if (c->error) { /* left alone from now on; its pages stay where they are */
		t->stat.errors++;
		v->failed = true;
		if (v->victim)
			t->nvictims--;
		v->victim = false;
	} else {
		t->stat.cleaned_segments++;
	}
	free(c->table_buf);
	c->table_buf = NULL;
	c->victim = NULL;
	c->ready = false;
	c->error = 0;
}

static bool grant(struct nvme *t)
{
	struct nvme_cleaner *c = &t->cleaner;

	c->granted = t->pace.take ? t->pace.take(t->pace.arg, NVME_SLAB, urgent(t)) : NVME_SLAB;
	c->write_ns = 0;
	return c->granted > 0;
}

static void give_back(struct nvme *t)
{
	struct nvme_cleaner *c = &t->cleaner;

	if (t->pace.ended && c->granted)
		t->pace.ended(t->pace.arg, c->granted, c->write_ns ? now_ns() - c->write_ns : 0);
	c->granted = 0;
}

void nvme_clean_stop(struct nvme *t)
{
	t->cleaner.write_ns = 0;
	give_back(t);
}

static void chunk_done(struct nvme *t, struct nvme_req *r)
{
	struct nvme_cleaner *c = &t->cleaner;
	struct nvme_seg *to = c->to;
	uint32_t unit = c->to_unit;

	crash_point("nvme.clean.copied");
	c->outstanding--;
	if (r && r->io.res)
		c->error = r->io.res;
	if (to->failed && !to->head_ok)
		c->error = -EIO;
	for (uint32_t i = 0; i < c->picks; i++) {
		const struct nvme_entry *e = &c->table.entry[c->pick[i]];
		uint32_t units = nvme_page_units(e->bytes);

		if (!c->error && c->added[i] && bits_test(c->victim->live, e->unit))
			nvme_page_live(t, to, unit, units);
		if (planted("source-freed-at-copy") && bits_test(c->victim->live, e->unit))
			nvme_page_dead(t, c->victim, e->unit, units);
		unit += units;
		to->prepared--;
	}
	nvme_stage_put(t, c->slab, 1);
	c->slab = NULL;
	c->picks = 0;
	give_back(t);
	nvme_seg_settle(t, to);
}

static uint32_t entry_need(const struct nvme_entry *e)
{
	return (uint32_t)(sizeof(*e) + sizeof(struct seq_record)) + e->pos_len;
}

static void chunk_write(struct nvme *t)
{
	struct nvme_cleaner *c = &t->cleaner;
	uint32_t unit = c->to_unit;
	struct nvme_req *r = NULL;

	for (uint32_t i = 0; i < c->picks; i++) {
		const struct nvme_entry *from = &c->table.entry[c->pick[i]];
		struct nvme_entry e = *from;
		const struct seq_record *seq = NULL;
		int res;

		e.unit = unit;
		e.from_segment = c->victim->index;
		e.from_unit = from->unit;
		e.from_seq = c->seq;
		if (from->seq_index != NVME_NO_SEQ)
			seq = &c->table.seq[from->seq_index];
		res = nvme_build_add(t, c->to, &e, entry_need(from), seq, c->table.pos + from->pos_off);
		c->added[i] = !res;
		if (res)
			c->error = res;
		unit += nvme_page_units(e.bytes);
	}
	c->outstanding = 1;
	if (!c->error)
		r = nvme_req_new(t, IO_WRITE, c->to, c->to_unit, c->units, c->buf, chunk_done);
	if (r) {
		r->data = true;
		crash_point("nvme.clean.copy");
		c->write_ns = now_ns();
		nvme_send(t, r);
		return;
	}
	if (!c->error)
		c->error = -ENOMEM;
	chunk_done(t, NULL);
}

static void chunk_read(struct nvme *t, struct nvme_req *r)
{
	struct nvme_cleaner *c = &t->cleaner;

	if (r->io.res)
		c->error = r->io.res;
	if (!--c->outstanding)
		chunk_write(t);
}

static void read_run(struct nvme *t, uint32_t unit, uint32_t units, char *buf)
{
	struct nvme_cleaner *c = &t->cleaner;
	struct nvme_req *r = nvme_req_new(t, IO_READ, c->victim, unit, units, buf, chunk_read);

	if (!r) {
		c->error = -ENOMEM;
		return;
	}
	c->outstanding++;
	nvme_send(t, r);
}

/* Read what was picked, neighbours together, packed as it will be written. */
static void chunk_start(struct nvme *t)
{
	struct nvme_cleaner *c = &t->cleaner;
	uint32_t run = 0, run_units = 0, at = 0;

	for (uint32_t i = 0; i < c->picks; i++) {
		const struct nvme_entry *e = &c->table.entry[c->pick[i]];

		if (run_units && e->unit != run + run_units) {
			read_run(t, run, run_units, c->buf + (size_t)at * KVT_UNIT);
			at += run_units;
			run_units = 0;
		}
		if (!run_units)
			run = e->unit;
		run_units += nvme_page_units(e->bytes);
	}
	read_run(t, run, run_units, c->buf + (size_t)at * KVT_UNIT);
	if (!c->outstanding)
		chunk_write(t);
}

/* Pick the next live pages, up to a slab and to what is granted, but one at least, as long as they land side by
 * side in one segment. */
static bool chunk_pick(struct nvme *t)
{
	struct nvme_cleaner *c = &t->cleaner;

	c->units = c->picks = 0;
	for (; c->next < c->table.pages; c->next++) {
		const struct nvme_entry *e = &c->table.entry[c->next];
		uint32_t units = nvme_page_units(e->bytes), unit;
		struct nvme_seg *to;

		if (!bits_test(c->victim->live, e->unit))
			continue;
		if (c->picks && (uint64_t)(c->units + units) * KVT_UNIT > c->granted)
			break;
		if (c->units + units > NVME_SLAB / KVT_UNIT ||
		    nvme_place(t, &t->cold, NVME_COLD, units, entry_need(e), &to, &unit) < 0)
			break;
		if (c->picks && to != c->to) {
			nvme_unplace(t, to, unit, units, entry_need(e));
			break;
		}
		if (!c->picks)
			c->to_unit = unit;
		c->to = to;
		c->pick[c->picks++] = c->next;
		c->units += units;
	}
	return c->picks > 0;
}

static void table_read(struct nvme *t, struct nvme_req *r)
{
	struct nvme_cleaner *c = &t->cleaner;
	const char *buf = c->table_buf;
	uint32_t table_units = c->victim->table_units;
	struct nvme_foot foot;

	c->outstanding--;
	c->error = r->io.res;
	if (!c->error)
		c->error = nvme_foot_check(buf + (size_t)table_units * KVT_UNIT, t->uuid, c->victim->index,
					   t->units, &foot);
	if (!c->error && (foot.seq != c->seq || foot.table_units != table_units))
		c->error = -EBADMSG;
	if (!c->error)
		c->error = nvme_table_check(&foot, buf, &c->table);
	crash_point("nvme.clean.table");
	c->ready = true;
	c->next = 0;
}

static void victim_start(struct nvme *t, struct nvme_seg *v)
{
	struct nvme_cleaner *c = &t->cleaner;
	uint32_t units = v->table_units + 1;
	void *buf = aligned_alloc(KVT_UNIT, (size_t)units * KVT_UNIT);
	struct nvme_req *r = buf ? nvme_req_new(t, IO_READ, v, t->units - units, units, buf, table_read) : NULL;

	if (!r) {
		free(buf);
		return;
	}
	c->victim = v;
	c->seq = v->seq;
	c->table_buf = buf;
	c->outstanding = 1;
	v->victim = true;
	v->pins++;
	t->nvictims++;
	nvme_send(t, r);
}

void nvme_clean_pump(struct nvme *t)
{
	struct nvme_cleaner *c = &t->cleaner;
	struct nvme_seg *v;

	if (!t->can_move || c->outstanding)
		return;
	if (!c->victim && !c->nothing && t->nfree + t->nvictims < low_mark(t)) {
		v = choose(t);
		c->nothing = !v;
		if (v)
			victim_start(t, v);
	} else if (!c->victim && t->nfree <= t->reserve && t->nvictims >= 2 && t->cold.seg) {
		nvme_stream_close(t, &t->cold); /* victims wait for this seal, and writers for the victims */
	}
	if (!c->ready)
		return;
	if (c->error) {
		victim_done(t);
		return;
	}
	if (!grant(t))
		return;
	c->buf = nvme_stage_get(t, &c->slab, NVME_SLAB / KVT_UNIT, SLAB_CLEAN);
	if (!c->buf) {
		give_back(t);
		return;
	}
	if (chunk_pick(t)) {
		chunk_start(t);
		return;
	}
	nvme_stage_put(t, c->slab, 1);
	give_back(t);
	if (c->next == c->table.pages)
		victim_done(t);
	else /* no segment left to copy to: seal what there is, so that its sources become free */
		nvme_stream_close(t, &t->cold);
}
