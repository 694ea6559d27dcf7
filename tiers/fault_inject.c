/* SPDX-License-Identifier: MIT */
#include "tiers/fault.h"
#include "shm/util.h"

#include <string.h>

/* The finaliser of splitmix64 (Steele, Lea and Flood, 2014): every input bit moves every output bit. */
static uint64_t mix(uint64_t x)
{
	x += UINT64_C(0x9e3779b97f4a7c15);
	x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
	x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
	return x ^ x >> 31;
}

uint64_t fault_random(const struct fault_spec *s, uint64_t op, enum fault_kind k)
{
	return mix(mix(mix(s->seed) ^ op) + (uint64_t)k);
}

bool fault_hits(const struct fault_spec *s, uint64_t op, enum fault_kind k)
{
	return mix(fault_random(s, op, k)) % 1000 < s->permille[k];
}

bool fault_now(struct fault_inject *f, uint64_t op, enum fault_kind k)
{
	bool hit = fault_hits(&f->spec, op, k);

	f->count[k] += hit;
	return hit;
}

void fault_inject_fini(struct fault_inject *f)
{
	for (unsigned i = 0; i < FAULT_STASH; i++)
		free(f->stash[i].buf);
	memset(f, 0, sizeof(*f));
}

/* Bytes that are none of the caller's: each differs from what it replaces. */
static void garble(uint64_t x, uint8_t *p, size_t from, size_t to)
{
	for (; from < to; from++) {
		x = x * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
		p[from] = (uint8_t)(p[from] ^ (x >> 56 | 1));
	}
}

/* What an earlier page left at this place is the last to arrive there. Counted only when that makes a
 * difference. */
static void reorder(struct fault_inject *f, uint64_t addr, void *dst, uint32_t bytes)
{
	for (uint64_t i = 1; i <= MIN(f->stashed, FAULT_STASH); i++) {
		const struct fault_page *h = &f->stash[(f->stashed - i) % FAULT_STASH];
		uint32_t n = MIN(h->bytes, bytes);

		if (h->addr != addr)
			continue;
		f->count[FAULT_REORDER] += memcmp(dst, h->buf, n) != 0;
		memcpy(dst, h->buf, n);
		return;
	}
}

void fault_spoil_write(struct fault_inject *f, uint64_t op, uint64_t addr, void *dst, const void *src,
		       uint32_t bytes)
{
	uint64_t x;

	memcpy(dst, src, bytes);
	if (fault_now(f, op, FAULT_LOST)) {
		garble(fault_random(&f->spec, op, FAULT_LOST), dst, 0, bytes);
	} else if (fault_now(f, op, FAULT_TORN)) {
		x = fault_random(&f->spec, op, FAULT_TORN);
		garble(x, dst, x % DIV_UP(bytes, f->spec.sector) * f->spec.sector, bytes);
	} else if (fault_hits(&f->spec, op, FAULT_REORDER)) {
		reorder(f, addr, dst, bytes);
	}
}

/* Another page's bytes instead of these. Counted only when that makes a difference. */
static void misdirect(struct fault_inject *f, uint64_t op, uint64_t addr, void *buf, uint32_t bytes)
{
	uint64_t x = fault_random(&f->spec, op, FAULT_MISDIRECT);

	for (unsigned i = 0; i < FAULT_STASH; i++) {
		const struct fault_page *h = &f->stash[(x + i) % FAULT_STASH];
		uint32_t n = MIN(h->bytes, bytes);

		if (!h->buf || h->addr == addr || !memcmp(h->buf, buf, n))
			continue;
		memcpy(buf, h->buf, n);
		f->count[FAULT_MISDIRECT]++;
		return;
	}
}

void fault_spoil_read(struct fault_inject *f, uint64_t op, uint64_t addr, void *buf, uint32_t bytes)
{
	uint64_t bit;

	if (fault_hits(&f->spec, op, FAULT_MISDIRECT))
		misdirect(f, op, addr, buf, bytes);
	if (fault_now(f, op, FAULT_FLIP)) {
		bit = fault_random(&f->spec, op, FAULT_FLIP) % ((uint64_t)bytes * 8);
		((uint8_t *)buf)[bit / 8] ^= (uint8_t)(1u << bit % 8);
	}
}

void fault_remember(struct fault_inject *f, uint64_t addr, const void *buf, uint32_t bytes)
{
	struct fault_page *h = &f->stash[f->stashed % FAULT_STASH];
	void *p;

	if (!f->spec.permille[FAULT_MISDIRECT] && !f->spec.permille[FAULT_REORDER])
		return;
	p = realloc(h->buf, bytes);
	if (!p)
		return;
	memcpy(p, buf, bytes);
	*h = (struct fault_page){.buf = p, .addr = addr, .bytes = bytes};
	f->stashed++;
}
