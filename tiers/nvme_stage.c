/* SPDX-License-Identifier: MIT */
/*
 * Staging: one arena of private memory, on huge pages when the host gives
 * them, registered with the ring as a whole. It is cut into slabs of 1 MiB, and a
 * slab's buffers are handed out one after the other, so that pages that are
 * neighbours on disk are neighbours in memory and go out (or come in) as one request. A slab
 * is free again when its last buffer came back.
 *
 * Shares: reads may hold at most three quarters of the slabs, writes too, both together
 * all but one: a burst of one never starves the other, nor the cleaner.
 */
#include <sys/mman.h>

#include "tiers/nvme.h"

#define HUGE_PAGE (UINT64_C(2) << 20)
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

/* Two megabytes aligned memory: hugetlb pages, else transparent ones, else plain. */
static void *arena_map(size_t bytes, bool *ret_huge)
{
	const int prot = PROT_READ | PROT_WRITE, flags = MAP_PRIVATE | MAP_ANONYMOUS;
	char *p = mmap(NULL, bytes, prot, flags | MAP_HUGETLB | MAP_POPULATE, -1, 0);
	uintptr_t start;

	*ret_huge = p != MAP_FAILED;
	if (*ret_huge)
		return p;
	p = mmap(NULL, bytes + HUGE_PAGE, prot, flags, -1, 0);
	if (p == MAP_FAILED)
		return NULL;
	start = ALIGN_UP((uintptr_t)p, HUGE_PAGE);
	if (start != (uintptr_t)p)
		munmap(p, start - (uintptr_t)p);
	munmap((void *)(start + bytes), (uintptr_t)p + HUGE_PAGE - start);
	(void)madvise((void *)start, bytes, MADV_HUGEPAGE);
	for (size_t i = 0; i < bytes; i += KVT_UNIT)
		((volatile char *)start)[i] = 0;
	*ret_huge = madvise((void *)start, bytes, MADV_COLLAPSE) == 0;
	return (void *)start;
}

int nvme_stage_open(struct nvme *t, size_t bytes)
{
	t->arena_bytes = ALIGN_UP(bytes, HUGE_PAGE);
	t->arena = arena_map(t->arena_bytes, &t->huge);
	if (!t->arena)
		return -ENOMEM;
	t->slabs = (unsigned)(t->arena_bytes / NVME_SLAB);
	t->slab = calloc(t->slabs, sizeof(*t->slab));
	if (!t->slab)
		return -ENOMEM;
	for (unsigned i = t->slabs; i-- > 0;) {
		t->slab[i].mem = t->arena + (size_t)i * NVME_SLAB;
		t->slab[i].next_free = t->free_slabs;
		t->free_slabs = &t->slab[i];
	}
	return 0;
}

void nvme_stage_close(struct nvme *t)
{
	if (t->arena)
		munmap(t->arena, t->arena_bytes);
	free(t->slab);
	t->arena = NULL;
	t->slab = NULL;
}

static bool share_left(const struct nvme *t, enum nvme_slab_kind kind)
{
	unsigned users = t->slabs_used[SLAB_WRITE] + t->slabs_used[SLAB_READ];

	if (kind == SLAB_CLEAN)
		return t->slabs_used[SLAB_CLEAN] < 2;
	return t->slabs_used[kind] < t->slabs * 3 / 4 && users < t->slabs - 1;
}

void *nvme_stage_get(struct nvme *t, struct nvme_slab **current, uint32_t units, enum nvme_slab_kind kind)
{
	struct nvme_slab *s = *current;
	char *buf;

	if (s && s->units + units > NVME_SLAB / KVT_UNIT) {
		s->current = NULL;
		s = *current = NULL;
	}
	if (!s) {
		if (!t->free_slabs || !share_left(t, kind))
			return NULL;
		s = t->free_slabs;
		t->free_slabs = s->next_free;
		t->slabs_used[kind]++;
		s->kind = (uint8_t)kind;
		s->units = s->refs = 0;
		s->current = current;
		*current = s;
	}
	buf = s->mem + (size_t)s->units * KVT_UNIT;
	s->units += units;
	s->refs++;
	return buf;
}

void nvme_stage_put(struct nvme *t, struct nvme_slab *s, unsigned refs)
{
	s->refs -= refs;
	if (s->refs)
		return;
	if (s->current)
		*s->current = NULL;
	s->current = NULL;
	t->slabs_used[s->kind]--;
	s->next_free = t->free_slabs;
	t->free_slabs = s;
}
