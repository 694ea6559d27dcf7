/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * A sequence whose rows' content follows from (lane, position), in the GPU's memory and as it must be: what
 * check_move.c compares.
 */
#include "shm/bits.h"
#include "tests/gpu/gpu.h"

/* TAP */
static unsigned tests, failures;

__attribute__((format(printf, 2, 3))) static inline bool ok(bool good, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	printf("%s %u - ", good ? "ok" : "not ok", ++tests);
	vprintf(fmt, ap);
	printf("\n");
	va_end(ap);
	failures += !good;
	return good;
}

#define SWAP(a, b)                                                                                             \
	do {                                                                                                   \
		__typeof__(a) swap = a;                                                                        \
		a = b;                                                                                         \
		b = swap;                                                                                      \
	} while (0)
#define POISON 0xe7
#define PAGE_ROWS 128u

struct shape {
	uint32_t lanes, cap, stage, k, v, rounds, append, ring; /* ring: bytes, 0: ample */
	bool mixed;                                             /* lanes differ in width; strides have gaps */
};

struct run {
	struct gpu *u;
	struct shape s;
	uint64_t salt;
	struct cuda_lane *lane, *other; /* other: the second memory, for ordered compaction */
	uint64_t d_lane, d_other, mem, spare, slot_of, pos_of, scratch;
	uint64_t *lane_off; /* of K, of V in a memory */
	size_t bytes;       /* of a memory */
	uint8_t *now, *want, *got;
	uint32_t rows, watermark, words, max_rows;
	uint32_t *count, *h_slot, *h_pos, *after, *in;           /* maps as they must be */
	uint64_t *resident, *stored, *kept, *out, *dram, *bring; /* [lanes][max words] */
};

static inline uint32_t stride_words(const struct run *r)
{
	return (uint32_t)BITS_WORDS(r->max_rows);
}

static inline uint64_t *row_bits(const struct run *r, uint64_t *bits, uint32_t lane)
{
	return bits + (size_t)lane * stride_words(r);
}

/* What a row holds. */
static inline void row_fill(const struct run *r, uint32_t lane, uint32_t pos, int plane, uint8_t *to)
{
	uint32_t bytes = plane ? r->lane[lane].v_bytes : r->lane[lane].k_bytes;
	uint64_t seed = mix(r->salt ^ mix((uint64_t)lane << 33 | (uint64_t)pos << 1 | (uint64_t)plane));

	for (uint32_t i = 0; i < bytes; i += 8) {
		uint64_t x = mix(seed + i);

		memcpy(to + i, &x, 8);
	}
}

static inline void put_row(const struct run *r, uint8_t *mem, uint32_t lane, uint32_t slot, uint32_t pos)
{
	row_fill(r, lane, pos, 0, mem + r->lane_off[2 * lane] + (size_t)slot * r->lane[lane].k_row);
	row_fill(r, lane, pos, 1, mem + r->lane_off[2 * lane + 1] + (size_t)slot * r->lane[lane].v_row);
}

static inline bool memory_is(struct run *r, uint64_t addr, const uint8_t *want, const char *what)
{
	gpu_get(r->u, r->got, addr, r->bytes);
	if (memcmp(r->got, want, r->bytes) == 0)
		return true;
	for (size_t i = 0; i < r->bytes; i++)
		if (r->got[i] != want[i]) {
			printf("# %s: byte %zu of %zu is %02x, must be %02x\n", what, i, r->bytes, r->got[i],
			       want[i]);
			break;
		}
	return false;
}

/* The GPU's maps are those that must be. */
static inline bool maps_are(struct run *r)
{
	size_t n = (size_t)r->s.lanes * r->max_rows, m = (size_t)r->s.lanes * r->s.cap;
	uint32_t *slot = need(n, 4), *pos = need(m, 4);
	bool good;

	gpu_get(r->u, slot, r->slot_of, n * 4);
	gpu_get(r->u, pos, r->pos_of, m * 4);
	good = memcmp(slot, r->h_slot, n * 4) == 0 && memcmp(pos, r->h_pos, m * 4) == 0;
	free(slot);
	free(pos);
	return good;
}

static inline struct cuda_maps maps(const struct run *r)
{
	return (struct cuda_maps){r->slot_of, r->pos_of, r->max_rows, r->s.cap};
}

/* ---- memory ---- */

static inline void lay_out(struct run *r)
{
	uint64_t off = 256;

	for (uint32_t l = 0; l < r->s.lanes; l++) {
		struct cuda_lane *c = &r->lane[l];

		c->k_bytes = r->s.mixed && l % 3 == 1 ? 48 : r->s.k;
		c->v_bytes = r->s.mixed && l % 3 == 2 ? 0 : r->s.v;
		c->k_row = c->k_bytes + (r->s.mixed ? 16 * (l % 4) : 0);
		c->v_row = c->v_bytes + (r->s.mixed ? 32 * (l % 2) : 0);
		r->lane_off[2 * l] = off;
		off += (uint64_t)c->k_row * (r->s.cap + r->s.stage) + 16 * (l % 5);
		r->lane_off[2 * l + 1] = off;
		off += (uint64_t)c->v_row * (r->s.cap + r->s.stage);
	}
	r->bytes = off + 256;
}

static inline uint64_t place_lanes(struct run *r, struct cuda_lane *lane, uint64_t mem)
{
	for (uint32_t l = 0; l < r->s.lanes; l++) {
		lane[l] = r->lane[l];
		lane[l].k = mem + r->lane_off[2 * l];
		lane[l].v = mem + r->lane_off[2 * l + 1];
	}
	return gpu_new(r->u, lane, r->s.lanes * sizeof(*lane));
}

static inline void run_open(struct run *r, struct gpu *u, const struct shape *s)
{
	size_t words, none = compact_scratch(s->lanes, s->cap);
	uint8_t *zero = need(1, none);

	*r = (struct run){.u = u, .s = *s, .max_rows = s->append * s->rounds + 64};
	r->salt = mix(random_state ^ below(1u << 31));
	words = (size_t)s->lanes * stride_words(r);
	r->lane = need(s->lanes, sizeof(*r->lane));
	r->other = need(s->lanes, sizeof(*r->lane));
	r->lane_off = need(2 * s->lanes, 8);
	lay_out(r);
	r->now = need(1, r->bytes);
	r->want = need(1, r->bytes);
	r->got = need(1, r->bytes);
	memset(r->now, POISON, r->bytes);
	r->mem = gpu_new(u, r->now, r->bytes);
	r->spare = gpu_new(u, r->now, r->bytes);
	r->d_other = place_lanes(r, r->other, r->spare);
	r->d_lane = place_lanes(r, r->lane, r->mem);
	r->h_slot = need((size_t)s->lanes * r->max_rows, 4);
	r->h_pos = need((size_t)s->lanes * s->cap, 4);
	memset(r->h_slot, POISON, (size_t)s->lanes * r->max_rows * 4);
	memset(r->h_pos, POISON, (size_t)s->lanes * s->cap * 4);
	r->slot_of = gpu_new(u, r->h_slot, (size_t)s->lanes * r->max_rows * 4);
	r->pos_of = gpu_new(u, r->h_pos, (size_t)s->lanes * s->cap * 4);
	r->scratch = gpu_new(u, zero, none);
	r->count = need(s->lanes, 4);
	r->after = need(s->lanes, 4);
	r->in = need(s->lanes, 4);
	for (uint64_t ***b =
		     (uint64_t * *[]){&r->resident, &r->stored, &r->kept, &r->out, &r->dram, &r->bring, NULL};
	     *b; b++)
		**b = need(words, 8);
	if (!s->ring)
		r->s.ring = 64u << 20;
	free(zero);
}

static inline void run_close(struct run *r)
{
	for (uint64_t *a = (uint64_t[]){r->d_lane, r->d_other, r->mem, r->spare, r->slot_of, r->pos_of,
					r->scratch, 0};
	     *a; a++)
		gpu_free(r->u, *a);
	for (void **p = (void *[]){r->lane, r->other, r->lane_off, r->now, r->want, r->got, r->h_slot, r->h_pos,
				   r->count, r->after, r->in, r->resident, r->stored, r->kept, r->out, r->dram,
				   r->bring, NULL};
	     *p; p++)
		free(*p);
}
