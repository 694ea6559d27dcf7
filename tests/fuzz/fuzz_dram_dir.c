/* SPDX-License-Identifier: MIT */
/*
 * A private DRAM segment of an earlier life: words of its head, its records and its sequence records are
 * changed and (byte 0) their checksums made right; then a tier takes it over, is scanned, read, written to and
 * closed. It is refused with one line, or every page found has a place in the payload that no other page has,
 * before and after new ones are written.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
/* Records and heads are forged here, so their layout is needed. */
#include "tiers/dram_dir.c"
#include "shm/bits.h"

#define PAYLOAD (UINT64_C(8) << 20)
#define PAGES 40u
#define NEW_PAGES 12u
#define MAX_FOUND 600u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static struct tier_kept kept;
static char *mem, *good; /* the segment; its directory as it was */
static size_t total;
static uint64_t id;
static uint32_t slots[PAGES], n_slots;
static const char *refusal;
static struct place {
	tier_addr addr;
	uint32_t bytes;
	const char *at;
} place[MAX_FOUND + NEW_PAGES];
static uint32_t n_found;
static unsigned leave; /* one of so many pages that are found is not wanted; 0: all are */

static void must(int ok, const char *what)
{
	if (!ok) {
		fprintf(stderr, "must hold: %s\n", what);
		abort();
	}
}

/* ---- the store that keeps segments ------------------------------------------------------ */

static int keep_store(void *arg, const char *name, int fd)
{
	if (kept.fd >= 0)
		return -ENOSPC; /* one is enough: later ones end with the tier */
	snprintf(kept.name, sizeof(kept.name), "%s", name);
	kept.fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
	return 0;
}

static void keep_drop(void *arg, const char *name)
{
}

static void keep_refused(void *arg, const char *name, const char *why)
{
	refusal = why;
}

static struct tier *open_tier(struct tier_kept *k, unsigned n)
{
	static struct tier_keep keep;
	const struct tier_cfg cfg = {.size = 2 * PAYLOAD + (1 << 20),
				     .segment = PAYLOAD,
				     .node = -1,
				     .no_huge = true,
				     .keep = &keep};
	struct tier *t;
	char err[256];

	keep = (struct tier_keep){
		.store = keep_store, .drop = keep_drop, .refused = keep_refused, .kept = k, .n = n};
	must(!tier_dram_ops.open(&t, &cfg, err, sizeof(err)), err);
	return t;
}

/* ---- pages -------------------------------------------------------------------------------- */

static uint32_t page_bytes(uint32_t i)
{
	return (const uint32_t[]){3000, 8192, 20000, 60000}[i % 4] + i;
}

static bool write_page(struct tier *t, uint32_t no, uint32_t bytes, struct place *ret)
{
	static uint64_t pos[40];
	const struct seq_record seq = {.key = {(uint8_t)(1 + no / 8)}, .tenant = 9, .model = 5, .lanes = 4};
	struct tier_io io = {.op = TIER_WRITE, .bytes = bytes, .life = no % 2, .seq = &seq}, *p = &io, *done;

	memset(pos, 0, sizeof(pos));
	for (uint32_t i = 0; i < 40; i++)
		bits_set(pos, no % 2 ? i * 61 : i);
	io.meta = (struct page_meta){
		.id = {.key = {seq.key[0]}, .tenant = 9, .page = no, .rows = 40, .lane = no % 4},
		.bytes = bytes,
		.pos_words = no % 3 ? 40 : 1,
		.pos = pos};
	if (tier_dram_ops.prepare(t, &io) < 0)
		return false;
	memset(io.buf, (int)no, bytes);
	tier_dram_ops.submit(t, &p, 1);
	must(tier_dram_ops.reap(t, &done, 1) == 1 && !io.res, "a write ends");
	*ret = (struct place){io.addr, bytes, io.buf};
	tier_dram_ops.release(t, &io);
	return true;
}

static void read_page(struct tier *t, struct place *p)
{
	struct tier_io io = {.op = TIER_READ, .bytes = p->bytes, .addr = p->addr}, *one = &io, *done;
	volatile uint8_t sum = 0;

	must(!tier_dram_ops.prepare(t, &io), "what was found has a place");
	tier_dram_ops.submit(t, &one, 1);
	must(tier_dram_ops.reap(t, &done, 1) == 1 && !io.res, "a read ends");
	p->at = io.buf;
	for (uint32_t i = 0; i < p->bytes; i += 97)
		sum += ((const uint8_t *)io.buf)[i];
	tier_dram_ops.release(t, &io);
}

static void apart(uint32_t n)
{
	for (uint32_t i = 0; i < n; i++)
		for (uint32_t k = 0; k < i; k++)
			must(place[i].at + place[i].bytes <= place[k].at ||
				     place[k].at + place[k].bytes <= place[i].at,
			     "a place is one page's");
}

static bool on_found(void *arg, tier_addr addr, const struct page_meta *m, const struct seq_record *s)
{
	volatile uint32_t sum = 0;

	must(m->bytes && m->bytes <= TIER_MAX_PAGE && m->pos_words <= DIR_POS_WORDS && s,
	     "limits of what is found");
	must(!memcmp(m->id.key, s->key, sizeof(s->key)) && m->id.tenant == s->tenant,
	     "a page and its sequence agree");
	for (uint32_t i = 0; i < m->pos_words; i++)
		sum += (uint32_t)m->pos[i];
	if (n_found == MAX_FOUND || (leave && m->id.page % leave == 0))
		return false;
	place[n_found++] = (struct place){.addr = addr, .bytes = m->bytes};
	return true;
}

/* ---- the segment --------------------------------------------------------------------------- */

static void prepare(void)
{
	struct place p[PAGES];
	struct tier *t;
	off_t end;

	kept.fd = -1;
	t = open_tier(NULL, 0);
	must(!tier_dram_ops.scan(t, on_found, NULL), "a scan");
	for (uint32_t i = 0; i < PAGES; i++)
		must(write_page(t, i, page_bytes(i), &p[i]), "room");
	for (uint32_t i = 0; i < PAGES; i += 5)
		tier_dram_ops.free(t, p[i].addr, p[i].bytes);
	tier_dram_ops.close(t);
	end = lseek(kept.fd, 0, SEEK_END);
	must(kept.fd >= 0 && end > (off_t)PAYLOAD, "a segment was kept");
	total = (size_t)end;
	mem = mmap(NULL, total, PROT_READ | PROT_WRITE, MAP_SHARED, kept.fd, 0);
	good = malloc(total - PAYLOAD);
	must(mem != MAP_FAILED && good, "memory");
	memcpy(good, mem + PAYLOAD, total - PAYLOAD);
	id = ((struct dir_head *)(mem + total - KVT_UNIT))->id;
	for (uint32_t u = 0; u < PAYLOAD / KVT_UNIT && n_slots < PAGES; u++)
		if (((struct dir_slot *)(mem + PAYLOAD + u * DIR_SLOT))->live == LIVE)
			slots[n_slots++] = u;
	must(n_slots > 8, "records are there");
}

static void seal_all(void)
{
	struct dir_head *h = (void *)(mem + total - KVT_UNIT);
	struct dram_dir d = {.id = id, .slots = (uint8_t *)mem + PAYLOAD, .units = PAYLOAD / KVT_UNIT};

	d.seq = (void *)(d.slots + slots_bytes(PAYLOAD));
	d.seqs = seqs_of(PAYLOAD);
	for (uint32_t i = 0; i < d.seqs; i++)
		d.seq[i].check = seq_check(&d, i, &d.seq[i].rec);
	for (uint32_t u = 0; u < d.units; u++) {
		struct dir_slot *s = slot_at(&d, u);

		if (s->live == LIVE && s->seq < d.seqs && (char *)s->pos + s->pos_len <= mem + total)
			s->check = slot_check(&d, u, s, &d.seq[s->seq].rec);
	}
	h->check = head_check(h);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct tier_kept k;
	struct tier *t;
	uint32_t n;

	if (!mem)
		prepare();
	if (size < 2)
		return 0;
	memcpy(mem + PAYLOAD, good, total - PAYLOAD);
	for (size_t i = 2; i + 7 <= size; i += 7) {
		char *at = mem + total - KVT_UNIT; /* head */
		uint32_t off = data[i + 1], value;

		if (data[i] < 200) /* a record, or the slot beside one */
			at = mem + PAYLOAD +
			     MIN(slots[data[i] % n_slots] + (data[i] > 160), PAYLOAD / KVT_UNIT - 1) * DIR_SLOT;
		else if (data[i] < 240) /* a sequence record */
			at = mem + PAYLOAD + slots_bytes(PAYLOAD) + data[i] % 8 * sizeof(struct dir_seq);
		memcpy(&value, data + i + 2, 4);
		memcpy(at + off % 92, &value, 1u << data[i + 6] % 3);
	}
	if (data[0] & 1)
		seal_all();
	leave = data[0] >> 4;
	k = kept;
	k.fd = fcntl(kept.fd, F_DUPFD_CLOEXEC, 3);
	refusal = NULL;
	n_found = 0;
	t = open_tier(&k, 1);
	must(k.fd == -1, "it was taken, or closed");
	must(!refusal || !strchr(refusal, '\n'), "a refusal is one line");
	must(!tier_dram_ops.scan(t, on_found, NULL), "a scan");
	must(!refusal || !n_found, "nothing is found in what was refused");
	for (n = 0; n < n_found; n++)
		read_page(t, &place[n]);
	apart(n);
	for (uint32_t i = 0; i < NEW_PAGES; i++)
		n += write_page(t, 100 + i, page_bytes(i), &place[n]);
	apart(n);
	for (uint32_t i = 0; i < n; i += 2)
		tier_dram_ops.free(t, place[i].addr, place[i].bytes);
	tier_dram_ops.tick(t, NULL, NULL);
	tier_dram_ops.close(t);
	return 0;
}
