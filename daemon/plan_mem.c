/* SPDX-License-Identifier: MIT */
/* The published memory of one client's plans: plan areas by first fit, neighbours merged when given back. */
#include <string.h>
#include "daemon/internal.h"
#include "shm/util.h"

struct plan_mem *plan_mem_new(uint64_t bytes, int *ret_err)
{
	struct plan_mem *m = calloc(1, sizeof(*m));

	*ret_err = -ENOMEM;
	if (!m)
		return NULL;
	m->seg = (struct seg)SEG_INIT;
	m->refs = 1;
	m->cap_free = 8;
	m->free = calloc(m->cap_free, sizeof(*m->free));
	if (m->free)
		*ret_err = seg_create(&m->seg, SEG_PUBLISHED, "kvtier-plans", bytes, 0);
	if (*ret_err < 0) {
		plan_mem_unref(m);
		return NULL;
	}
	m->free[0] = (struct extent){0, m->seg.size};
	m->n_free = 1;
	return m;
}

struct plan_mem *plan_mem_ref(struct plan_mem *m)
{
	m->refs++;
	return m;
}

void plan_mem_unref(struct plan_mem *m)
{
	if (!m || --m->refs)
		return;
	seg_close(&m->seg);
	free(m->free);
	free(m);
}

uint64_t plan_mem_take(struct plan_mem *m, uint64_t bytes)
{
	for (uint32_t i = 0; i < m->n_free; i++) {
		struct extent *e = &m->free[i];
		uint64_t off = e->off;

		if (e->bytes < bytes)
			continue;
		/* Giving back must not fail: there is always room for one more hole per area taken. */
		if (m->n_free + m->taken + 2 > m->cap_free) {
			uint32_t cap = 2 * (m->n_free + m->taken + 2);
			struct extent *v = realloc(m->free, cap * sizeof(*v));

			if (!v)
				return UINT64_MAX;
			m->free = v;
			m->cap_free = cap;
			e = &m->free[i];
		}
		e->off += bytes;
		e->bytes -= bytes;
		if (!e->bytes)
			memmove(e, e + 1, (--m->n_free - i) * sizeof(*e));
		m->taken++;
		return off;
	}
	return UINT64_MAX;
}

void plan_mem_give(struct plan_mem *m, uint64_t off, uint64_t bytes)
{
	struct extent *e = m->free;
	uint32_t i = 0;

	while (i < m->n_free && e[i].off < off)
		i++;
	memmove(&e[i + 1], &e[i], (m->n_free - i) * sizeof(*e));
	e[i] = (struct extent){off, bytes};
	m->n_free++;
	m->taken--;
	if (i + 1 < m->n_free && e[i].off + e[i].bytes == e[i + 1].off) {
		e[i].bytes += e[i + 1].bytes;
		memmove(&e[i + 1], &e[i + 2], (m->n_free - i - 2) * sizeof(*e));
		m->n_free--;
	}
	if (i && e[i - 1].off + e[i - 1].bytes == e[i].off) {
		e[i - 1].bytes += e[i].bytes;
		memmove(&e[i], &e[i + 1], (m->n_free - i - 1) * sizeof(*e));
		m->n_free--;
	}
}
