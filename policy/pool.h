/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Adaptive budgets across sequences that plan at different times. A pool is a
 * ledger: every sequence brings the rows of its uniform budgets, and holds as
 * many as its plans gave it. What a row must be worth to stay follows from all
 * demand curves together (adaptive_curve()); a plan moves its sequence's total
 * towards its part. It grows only into rows that nobody holds, so that together
 * they never hold more than they brought: where one leaves that had given rows
 * to others, nobody grows until these have been given back.
 *
 * A plan bids: pool_begin() lends it all rows that are free, pool_choose()
 * decides how many it takes (the only call that needs no ledger and so may run on
 * any thread), pool_claim() takes them and returns the others. Rows that it gives
 * up are free once it was carried out: pool_settle(). Everything else belongs to
 * the owner of the pool. Nothing here allocates.
 */
#include <stdbool.h>
#include <stdint.h>

#include "policy/adaptive.h"

struct pool {
	uint64_t uniform, held, lent; /* rows */
	uint32_t seats, waiting;      /* waiting: seats with a wish */
	uint64_t keep[ADAPTIVE_BINS + 1];
};

struct pool_seat {
	bool seated;
	uint64_t uniform; /* rows that it brought */
	uint64_t held;    /* rows that it has, or that a plan on its way may give it */
	uint64_t wish;    /* rows that are its part and others still hold; 0: it waits for none */
	uint32_t keep[ADAPTIVE_BINS + 1]; /* its demand, as of its newest plan */
};

enum pool_phase { POOL_LENT, POOL_CLAIMED, POOL_OVER };

struct pool_bid {
	enum pool_phase phase;
	bool owed;           /* more is held than was brought: who holds too much gives it back */
	uint64_t total;      /* rows that all brought */
	uint64_t base, lent; /* rows that it holds, rows that it may take besides */
	uint64_t others[ADAPTIVE_BINS + 1]; /* demand of all other seats */
	uint32_t keep[ADAPTIVE_BINS + 1];   /* its own, filled in before pool_choose() */
	uint64_t rows;                      /* chosen */
	uint64_t before;                    /* rows that it held before it claimed these */
};

/* A plan of this seat, which joins if need be and brings `uniform` rows from now on. */
void pool_begin(struct pool *p, struct pool_seat *s, uint64_t uniform, struct pool_bid *bid);
/*
 * bid->rows: its part, but at most base + lent, and base where the difference is less than `permille` of it
 * (rows that are owed are given back to the last one).
 */
void pool_choose(struct pool_bid *bid, uint32_t permille);
/* The plan was made. pool_wish() is due. */
void pool_claim(struct pool *p, struct pool_seat *s, struct pool_bid *bid);
/* It was carried out; not `all`: only in part, what it was to give up is still held. */
void pool_settle(struct pool *p, struct pool_seat *s, struct pool_bid *bid, bool all);
/* Nothing comes of it. Does nothing to a bid that is over. */
void pool_abandon(struct pool *p, struct pool_seat *s, struct pool_bid *bid);
/* The seat and what it holds are gone; its bid, or NULL, is over. */
void pool_leave(struct pool *p, struct pool_seat *s, struct pool_bid *bid);

/* Rows that nobody holds, and whether more are held than were brought. */
uint64_t pool_spare(const struct pool *p);
bool pool_owed(const struct pool *p);
/* The seat's part of all rows, as of everybody's newest plan. */
uint64_t pool_part(const struct pool *p, const struct pool_seat *s);
/*
 * Curves have changed: does it wait for rows now, that is for at least `permille` of what it holds? true: and
 * it did not before.
 */
bool pool_wish(struct pool *p, struct pool_seat *s, uint32_t permille);
/* Does it hold so much less or more than its part? */
bool pool_off(const struct pool *p, const struct pool_seat *s, uint32_t permille);
/* Would a plan now give rows to those that wait, or get it some that are free? */
bool pool_due(const struct pool *p, const struct pool_seat *s, uint32_t permille);
