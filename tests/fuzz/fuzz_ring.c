/* SPDX-License-Identifier: MIT */
/*
 * A ring whose other side writes what it likes at any time, and a table of handles that strangers guess. The
 * ring touches nothing but its memory (it ends where the allocation does), takes each entry once and as it lies
 * there, and never runs ahead of the other side by more than it has places; a handle resolves for its owner,
 * while it lives, and to nothing else.
 */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include "shm/ctl.h"
#include "shm/handle.h"
#include "shm/ring.h"
#include "shm/util.h"

#define HANDLES 64u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void must(int ok)
{
	if (!ok)
		abort();
}

static uint64_t take(const uint8_t **p, const uint8_t *end, unsigned n)
{
	uint64_t v = 0;

	n = (unsigned)MIN((size_t)(end - *p), (size_t)n);
	if (n)
		memcpy(&v, *p, n);
	*p += n;
	return v;
}

static _Atomic uint32_t *word(uint8_t *mem, unsigned i) /* head, tail, need_wakeup */
{
	return (_Atomic uint32_t *)(mem + (size_t)(i % 3) * 128);
}

static void pop(struct ring *r, uint8_t *mem)
{
	uint32_t pos = r->pos, head = *word(mem, 0);
	struct ring_entry e, at;
	int n = ring_pop(r, &e);

	must(r->peer - r->pos <= r->entries);
	if (n == 1) {
		memcpy(&at, mem + 384 + (size_t)(pos & (r->entries - 1)) * sizeof(at), sizeof(at));
		must(!memcmp(&e, &at, sizeof(e)) && r->pos == pos + 1 && *word(mem, 0) == r->pos);
	} else {
		must((n == 0 || n == -EPROTO) && r->pos == pos && *word(mem, 0) == head);
		must((n == 0) == (*word(mem, 1) == pos));
	}
}

static void push(struct ring *r, uint8_t *mem, uint8_t *before, uint64_t v)
{
	size_t bytes = ring_bytes(r->entries), at = 384 + (size_t)(r->pos & (r->entries - 1)) * 64;
	struct ring_entry e = {.type = (uint32_t)v, .handle = v, .arg = {v}};
	uint32_t pos = r->pos;
	int n;

	memcpy(before, mem, bytes);
	n = ring_push(r, &e);
	must(r->pos - r->peer <= r->entries);
	if (n >= 0) {
		must(r->pos == pos + 1 && *word(mem, 1) == r->pos && !memcmp(mem + at, &e, sizeof(e)));
		must(!memcmp(mem + 384, before + 384, at - 384) &&
		     !memcmp(mem + at + 64, before + at + 64, bytes - at - 64));
	} else {
		must((n == -EAGAIN || n == -EPROTO) && r->pos == pos && !memcmp(mem, before, bytes));
	}
}

static void ring(const uint8_t *p, const uint8_t *end)
{
	uint32_t entries = 2u << take(&p, end, 1) % 6, start = (uint32_t)take(&p, end, 4);
	size_t bytes = ring_bytes(entries);
	uint8_t *mem = aligned_alloc(64, ALIGN_UP(bytes, (size_t)64)), *before = malloc(bytes);
	struct ring in, out;

	must(mem && before);
	memset(mem, 0, bytes);
	must(!ring_attach(&in, mem, entries, false) && !ring_attach(&out, mem, entries, true));
	in.pos = in.peer = out.pos = out.peer = start; /* as after as many entries */
	*word(mem, 0) = *word(mem, 1) = start;
	while (p < end) {
		unsigned op = (unsigned)take(&p, end, 1);

		switch (op % 8) {
		case 0:
		case 1:
			pop(&in, mem);
			break;
		case 2:
		case 3:
			push(&out, mem, before, op);
			break;
		case 4: /* near the truth */
			*word(mem, op / 8) += (uint32_t)(int8_t)take(&p, end, 1);
			break;
		case 5:
			*word(mem, op / 8) = (uint32_t)take(&p, end, 4);
			break;
		case 6:
			mem[384 + take(&p, end, 2) % (bytes - 384)] = (uint8_t)op;
			break;
		case 7:
			if (op & 8)
				ring_awake(&in);
			else
				must(!ring_sleep(&in) || in.pos == *word(mem, 1));
			break;
		}
	}
	free(mem);
	free(before);
}

static void handles(const uint8_t *p, const uint8_t *end)
{
	static const char owner[3], object[HANDLES];
	uint64_t given[HANDLES] = {0}, dead[HANDLES] = {0};
	const void *whose[HANDLES] = {NULL};
	struct handle_table *t;
	uint32_t live = 0;

	must(!handle_table_new(&t, HANDLES));
	while (p < end) {
		unsigned op = (unsigned)take(&p, end, 1), i = (unsigned)take(&p, end, 1) % HANDLES,
			 o = op / 8 % 3;
		uint64_t h;

		switch (op % 8) {
		case 0:
		case 1:
			if (given[i])
				break;
			h = handle_add(t, (void *)&object[i], &owner[o]);
			for (unsigned k = 0; h && k < HANDLES; k++)
				must(h != given[k] && h != dead[k]);
			given[i] = h;
			whose[i] = &owner[o];
			live += h != 0;
			break;
		case 2:
			if (!given[i])
				break;
			handle_del(t, given[i]);
			dead[i] = given[i];
			given[i] = 0;
			live--;
			break;
		case 3:
			must(!dead[i] || !handle_get(t, dead[i], NULL));
			handle_del(t, dead[i]); /* twice does nothing */
			break;
		case 4:
			if (given[i])
				handle_set_owner(t, given[i], whose[i] = &owner[o]);
			break;
		default: /* guessed, or a right one changed a little */
			h = op & 16 ? take(&p, end, 8) : given[i] ^ UINT64_C(1) << take(&p, end, 1) % 64;
			for (unsigned k = 0; k < HANDLES; k++)
				if (h && h == given[k])
					break;
				else if (k == HANDLES - 1)
					must(!handle_get(t, h, NULL));
			break;
		}
		if (given[i]) {
			must(handle_get(t, given[i], NULL) == &object[i]);
			must((handle_get(t, given[i], &owner[o]) == &object[i]) == (whose[i] == &owner[o]));
		}
		must(handle_count(t) == live);
	}
	handle_table_free(t);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	if (size > 1)
		(data[0] % 2 ? ring : handles)(data + 1, data + size);
	return 0;
}
