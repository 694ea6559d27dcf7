/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Between a move and the seal. A page written to nvme is found by a restart only when its segment is sealed, so
 * the pages that its rows came from stay where they are until then: in limbo, out of the index and read by
 * nobody, but in their tier, where a daemon that is killed leaves them for the next one. That goes for leased
 * sequences and for sources that outlive us: pages of nvme that were rewritten, and pages of dram where systemd
 * holds its memory.
 *
 * Limbo ends when the new page is durable, or dead: dropped, cut off, its sequence ended. A seal is asked for
 * when limbo holds more than a sixteenth of the tier, after LIMBO_NS, and when somebody needs its room: a write
 * that finds none (it waits), the demoter, memory pressure. What cannot be sealed, or not in time, is let go of
 * without: then a kill would lose it, as a disk that fails would.
 *
 * It is charged to the tenant whose page it is, as any copy. Event-loop thread.
 */
#include <stdbool.h>
#include <stdint.h>
#include "daemon/pages.h"

#define LIMBO_ALL UINT32_MAX /* tenants */
#define LIMBO_NS (UINT64_C(10) * 1000000000u)
#define LIMBO_MOST_NS (UINT64_C(30) * 1000000000u) /* then it ends, sealed or not */

struct core;
struct core_stat;
struct limbo_move;
struct seq;

int limbo_open(struct core *c); /* 0, -ENOMEM */
void limbo_free(struct core *c);
/*
 * Before rows of `n` pages src of s in tier `from` are written to nvme: room to keep the sources. *ret is NULL
 * where nothing has to be kept. 0, -ENOMEM.
 */
int limbo_begin(struct seq *s, struct page *const *src, unsigned n, int from, struct limbo_move **ret);
/* The write failed, or is not wanted any more. NULL is fine. */
void limbo_cancel(struct core *c, struct limbo_move *m);
/* dst has its copy on nvme and is listed: its sources stay until that is durable. Takes m. NULL is fine. */
void limbo_enter(struct core *c, struct limbo_move *m, struct page *dst);
/* The nvme copy of dst dies: its sources may go. For pages.c. */
void limbo_over(struct page_store *ps, struct page *dst);
/* Bytes of moves whose sources wait in this tier, of this tenant or of LIMBO_ALL. */
uint64_t limbo_bytes(const struct page_store *ps, int tier, uint32_t tenant);
/* Somebody needs the room that limbo takes in this tier: seal what it waits for, unless that is under way. */
void limbo_hurry(struct core *c, int tier);
/* A write found no room: true when some will come of limbo, which was asked for. tenant: short of quota. */
bool limbo_awaited(struct core *c, int tier, uint32_t tenant);
/* What waits in this tier goes, sealed or not: rows would be lost for want of its room. */
void limbo_let_go(struct core *c, int tier);
/* One slice: end what can end, ask for seals that are due. */
void limbo_pump(struct core *c);
void limbo_stat(const struct core *c, struct core_stat *ret);
/* The next page in limbo; *cursor starts at 0. NULL at the end. Pages come once for each move. */
const struct page *limbo_next(const struct page_store *ps, uint64_t *cursor);
