/* SPDX-License-Identifier: MIT */
#include "tiers/dram_dir.h"
#include "tiers/nvme_format.h"
#include "shm/crc.h"
#include "shm/trial.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define HEAD_MAGIC UINT64_C(0x314d41524454564b) /* "KVTDRAM1" */
#define LIVE UINT32_C(0x4556494c)               /* "LIVE" */
#define NIL UINT32_MAX

struct dir_head { /* in the last unit of the segment, never changed */
	uint64_t magic;
	uint32_t version, check; /* crc of the rest, version included */
	uint64_t id, payload, slots_off, seqs_off;
	uint32_t units, seqs, slot_bytes, seq_bytes;
};

struct dir_seq {
	struct seq_record rec;
	uint32_t check, pad[3];
};
_Static_assert(sizeof(struct dir_seq) == 96, "layout");

struct dir_slot {
	_Atomic uint32_t live;
	uint32_t check; /* crc of all that follows, see slot_check() */
	uint64_t page;
	uint32_t crc, bytes, first, epoch, lane, seq;
	uint16_t rows, pos_words, units, pos_len;
	uint8_t run, run_off, pos_flags, pad;
	uint8_t pos[]; /* as nvme_pos_put() makes them */
};
#define SLOT_HEAD offsetof(struct dir_slot, pos)
#define SLOT_CHECKED offsetof(struct dir_slot, page)
#define POS_MAX (DIR_POS_WORDS * 8)
_Static_assert(SLOT_HEAD == 52, "layout");

static uint64_t slots_bytes(uint64_t payload)
{
	return payload / KVT_UNIT * DIR_SLOT;
}

static uint32_t seqs_of(uint64_t payload)
{
	return (uint32_t)(payload / KVT_UNIT / DIR_SEQ_UNITS);
}

uint64_t dir_bytes(uint64_t payload)
{
	return ALIGN_UP(slots_bytes(payload) + seqs_of(payload) * sizeof(struct dir_seq), KVT_UNIT) + KVT_UNIT;
}

static struct dir_head *head_of(const struct seg *s)
{
	return (void *)((char *)s->addr + s->size - KVT_UNIT);
}

static uint32_t head_check(const struct dir_head *h)
{
	uint32_t crc = crc32c(0, h, offsetof(struct dir_head, check));

	return crc32c(crc, &h->id, sizeof(*h) - offsetof(struct dir_head, id));
}

static struct dir_slot *slot_at(const struct dram_dir *d, uint32_t unit)
{
	return (void *)(d->slots + (size_t)unit * DIR_SLOT);
}

/* Where and whose it is belongs to what is checked: a record in another place, or beside another sequence, is
 * none. */
static uint32_t slot_check(const struct dram_dir *d, uint32_t unit, const struct dir_slot *s,
			   const struct seq_record *seq)
{
	uint32_t crc = crc32c(0, &d->id, sizeof(d->id));

	crc = crc32c(crc, &unit, sizeof(unit));
	crc = crc32c(crc, seq, sizeof(*seq));
	return crc32c(crc, &s->page, SLOT_HEAD - SLOT_CHECKED + s->pos_len);
}

static uint32_t seq_check(const struct dram_dir *d, uint32_t i, const struct seq_record *r)
{
	uint32_t crc = crc32c(0, &d->id, sizeof(d->id));

	return crc32c(crc32c(crc, &i, sizeof(i)), r, sizeof(*r));
}

/* ---- beginning and end ---------------------------------------------------------------- */

static int tables(struct dram_dir *d, const struct seg *s, uint64_t payload, uint64_t id)
{
	uint32_t buckets = 16;

	memset(d, 0, sizeof(*d));
	d->slots = (uint8_t *)s->addr + payload;
	d->units = (uint32_t)(payload / KVT_UNIT);
	d->seqs = seqs_of(payload);
	d->seq = (void *)(d->slots + slots_bytes(payload));
	while (buckets < d->seqs)
		buckets *= 2;
	d->refs = calloc(2 * (size_t)d->seqs + buckets, sizeof(*d->refs));
	if (!d->refs)
		return -ENOMEM;
	d->next = d->refs + d->seqs;
	d->bucket = d->next + d->seqs;
	d->mask = buckets - 1;
	d->free_head = NIL;
	d->id = id;
	/* Small pages: a record must not cost more than it takes. */
	(void)madvise(d->slots, s->size - payload, MADV_NOHUGEPAGE);
	return 0;
}

void dir_free(struct dram_dir *d)
{
	free(d->refs);
	memset(d, 0, sizeof(*d));
}

static void fill_head(struct dir_head *h, uint64_t payload, uint64_t id)
{
	*h = (struct dir_head){
		.magic = HEAD_MAGIC,
		.version = DIR_VERSION,
		.id = id,
		.payload = payload,
		.slots_off = payload,
		.seqs_off = payload + slots_bytes(payload),
		.units = (uint32_t)(payload / KVT_UNIT),
		.seqs = seqs_of(payload),
		.slot_bytes = DIR_SLOT,
		.seq_bytes = sizeof(struct dir_seq),
	};
	h->check = head_check(h);
}

int dir_make(struct dram_dir *ret, const struct seg *s, uint64_t payload, uint64_t id)
{
	int r = tables(ret, s, payload, id);

	if (r < 0)
		return r;
	fill_head(head_of(s), payload, id);
	dir_settle(ret);
	return 0;
}

int dir_adopt(struct dram_dir *ret, const struct seg *s, uint64_t id, uint64_t *ret_payload, const char **why)
{
	struct dir_head h, want;
	int r;

	memcpy(&h, head_of(s), sizeof(h));
	if (h.magic != HEAD_MAGIC) {
		*why = "is no segment of the dram tier";
		return -EPROTO;
	}
	if (h.check != head_check(&h)) {
		*why = "its head is damaged";
		return -EPROTO;
	}
	if (h.version != DIR_VERSION) {
		*why = "another version of kvtierd made it";
		return -EPROTO;
	}
	fill_head(&want, h.payload, id);
	if (!h.payload || h.payload % ALLOC_SLAB_BYTES || h.payload / ALLOC_SLAB_BYTES >= ALLOC_MAX_SLABS ||
	    memcmp(&h, &want, sizeof(h)) ||
	    s->size != ALIGN_UP(h.payload + dir_bytes(h.payload), s->huge ? ALLOC_SLAB_BYTES : KVT_UNIT)) {
		*why = "its head does not fit its name and size";
		return -EPROTO;
	}
	r = tables(ret, s, h.payload, id);
	if (!r)
		*ret_payload = h.payload;
	return r;
}

/* ---- sequence records --------------------------------------------------------------------- */

static uint32_t *bucket_of(const struct dram_dir *d, const struct seq_record *r)
{
	return &d->bucket[crc32c(0, r, sizeof(*r)) & d->mask];
}

/* What is not referred to is free, the rest can be found. bucket and next hold 1 + number, free_head a number.
 */
void dir_settle(struct dram_dir *d)
{
	d->free_head = NIL;
	memset(d->bucket, 0, ((size_t)d->mask + 1) * sizeof(*d->bucket));
	for (uint32_t i = d->seqs; i--;) {
		if (d->refs[i]) {
			uint32_t *b = bucket_of(d, &d->seq[i].rec);

			d->next[i] = *b;
			*b = i + 1;
		} else {
			d->next[i] = d->free_head;
			d->free_head = i;
		}
	}
	d->settled = true;
}

/* The record's number with one more reference, NIL: all are in use. */
static uint32_t seq_get(struct dram_dir *d, const struct seq_record *r)
{
	uint32_t *b = bucket_of(d, r), i;

	for (i = *b; i; i = d->next[i - 1])
		if (!memcmp(&d->seq[i - 1].rec, r, sizeof(*r))) {
			d->refs[i - 1]++;
			return i - 1;
		}
	i = d->free_head;
	if (i == NIL)
		return NIL;
	d->free_head = d->next[i];
	d->seq[i].rec = *r;
	d->seq[i].check = seq_check(d, i, r);
	d->next[i] = *b;
	*b = i + 1;
	d->refs[i] = 1;
	return i;
}

static void seq_put(struct dram_dir *d, uint32_t i)
{
	uint32_t *at;

	if (i >= d->seqs || !d->refs[i] || --d->refs[i] || !d->settled)
		return;
	for (at = bucket_of(d, &d->seq[i].rec); *at && *at != i + 1; at = &d->next[*at - 1])
		;
	if (!*at)
		return; /* the record was damaged: never used again */
	*at = d->next[i];
	d->next[i] = d->free_head;
	d->free_head = i;
}

/* ---- pages -------------------------------------------------------------------------------- */

bool dir_fits(uint32_t bytes, const uint64_t *pos, uint32_t pos_words)
{
	uint32_t flags;

	return pos_words <= DIR_POS_WORDS &&
	       SLOT_HEAD + nvme_pos_size(pos, pos_words, &flags) <= (size_t)DIV_UP(bytes, KVT_UNIT) * DIR_SLOT;
}

void dir_put(struct dram_dir *d, uint32_t unit, const struct alloc_place *p, const struct page_meta *m,
	     const struct seq_record *seq)
{
	struct dir_slot *s = slot_at(d, unit);
	uint32_t flags, len, i;

	if (!d->settled || m->pos_words > DIR_POS_WORDS || m->id.rows > UINT16_MAX ||
	    memcmp(m->id.key, seq->key, sizeof(seq->key)) || m->id.tenant != seq->tenant)
		return;
	len = nvme_pos_size(m->pos, m->pos_words, &flags);
	if (SLOT_HEAD + len > (size_t)p->units * DIR_SLOT)
		return;
	i = seq_get(d, seq);
	if (i == NIL)
		return;
	s->page = m->id.page;
	s->crc = m->crc;
	s->bytes = m->bytes;
	s->first = m->id.first;
	s->epoch = m->id.epoch;
	s->lane = m->id.lane;
	s->seq = i;
	s->rows = (uint16_t)m->id.rows;
	s->pos_words = (uint16_t)m->pos_words;
	s->units = p->units;
	s->pos_len = (uint16_t)len;
	s->run = p->run;
	s->run_off = p->run_off;
	s->pos_flags = (uint8_t)flags;
	s->pad = 0;
	nvme_pos_put(s->pos, m->pos, m->pos_words, flags);
	s->check = slot_check(d, unit, s, seq);
	atomic_store_explicit(&s->live, LIVE, memory_order_release);
}

void dir_del(struct dram_dir *d, uint32_t unit)
{
	struct dir_slot *s = slot_at(d, unit);

	if (atomic_load_explicit(&s->live, memory_order_relaxed) != LIVE || planted("dram-record-late"))
		return;
	dir_wipe(d, unit);
	seq_put(d, s->seq);
}

void dir_wipe(struct dram_dir *d, uint32_t unit)
{
	atomic_store_explicit(&slot_at(d, unit)->live, 0, memory_order_release);
	/* Before anything that follows: the next page of this place is written there. */
	atomic_thread_fence(memory_order_seq_cst);
}

int dir_get(const struct dram_dir *d, uint32_t unit, struct dir_page *ret)
{
	_Alignas(8) uint8_t copy[SLOT_HEAD + POS_MAX];
	const struct dir_slot *at = slot_at(d, unit);
	struct dir_slot *s = (void *)copy;
	struct dir_seq q;

	if (atomic_load_explicit(&at->live, memory_order_acquire) != LIVE)
		return 0;
	memcpy(s, at, SLOT_HEAD);
	if (!s->units || s->units > ALLOC_MAX_UNITS || s->units > d->units - unit || s->seq >= d->seqs ||
	    s->pos_words > DIR_POS_WORDS || s->pos_len > POS_MAX ||
	    SLOT_HEAD + s->pos_len > (size_t)s->units * DIR_SLOT)
		return -EBADMSG;
	memcpy(s->pos, at->pos, s->pos_len);
	q = d->seq[s->seq];
	if (q.check != seq_check(d, s->seq, &q.rec) ||
	    (s->check != slot_check(d, unit, s, &q.rec) && !planted("dram-record-unchecked")) ||
	    nvme_pos_get(ret->words, s->pos_words, s->pos, s->pos_len, s->pos_flags) < 0)
		return -EBADMSG;
	ret->seq = q.rec;
	ret->place = (struct alloc_place){.units = s->units, .run = s->run, .run_off = s->run_off};
	ret->meta = (struct page_meta){
		.id = {.page = s->page,
		       .tenant = q.rec.tenant,
		       .lane = s->lane,
		       .epoch = s->epoch,
		       .rows = s->rows,
		       .first = s->first},
		.crc = s->crc,
		.bytes = s->bytes,
		.pos_words = s->pos_words,
		.seq_info = s->seq,
		.pos = ret->words,
	};
	memcpy(ret->meta.id.key, q.rec.key, sizeof(q.rec.key));
	return 1;
}

void dir_keep(struct dram_dir *d, const struct dir_page *p)
{
	d->refs[p->meta.seq_info]++;
}
