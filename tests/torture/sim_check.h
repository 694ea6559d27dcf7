/* SPDX-License-Identifier: MIT */
#pragma once
/* What must hold at any time: bytes charged, rows counted, the index against the client, no faults but those
 * made. */
#include "daemon/limbo.h"
#include "tests/torture/sim_daemon.h"

static int by_address(const void *a, const void *b)
{
	const struct page *const *x = a, *const *y = b;

	return *x < *y ? -1 : *x > *y;
}

/* Charged bytes are those of the pages, when nothing is under way. */
static void check_bytes(const struct core *c)
{
	static const struct page *list[65536];
	uint64_t used[KVT_TIERS][2] = {{0}}, rows[KVT_TIERS] = {0};
	struct tier_stat st;
	size_t n = 0, out = 0;
	struct seq *s;

	if (c->pios || workers_busy(c->workers) || c->background_bytes)
		return;
	TAILQ_FOREACH(s, &c->lru, lru) {
		for (unsigned i = 0; i < ARRAY_SIZE(s->note); i++)
			if (s->note[i])
				list[n++] = s->note[i];
		for (uint32_t l = 0; l < s->ix.lanes; l++)
			for (uint32_t i = 0; i < s->ix.lane[l].n && n < ARRAY_SIZE(list); i++)
				list[n++] = s->ix.lane[l].v[i];
		for (int t = 0; t < KVT_TIERS; t++)
			rows[t] += s->tier_rows[t];
	}
	for (uint64_t at = 0; n < ARRAY_SIZE(list) && (list[n] = limbo_next(&c->pages, &at));)
		n++;
	qsort(list, n, sizeof(*list), by_address);
	for (size_t i = 0; i < n; i++)
		if (!i || list[i] != list[i - 1])
			list[out++] = list[i];
	must(c->pages.count == out, "%llu pages, %zu are somebody's", (unsigned long long)c->pages.count, out);
	for (size_t i = 0; i < out; i++)
		for (int t = KVT_TIER_DRAM; t < KVT_TIERS; t++)
			if (page_in(list[i], t))
				used[t][list[i]->origin->charge] += page_room(list[i]->bytes);
	for (int t = KVT_TIER_DRAM; t < KVT_TIERS; t++) {
		for (uint32_t i = 0; i < c->tenants; i++)
			must(used[t][i] == c->pages.used[t][i],
			     "tenant %u is charged %llu bytes in tier %d, its pages take %llu", i,
			     (unsigned long long)c->pages.used[t][i], t, (unsigned long long)used[t][i]);
		if (!c->pages.tier[t])
			continue;
		c->pages.tier[t]->ops->stat(c->pages.tier[t], &st);
		/* The disk's cleaner copies pages before it says so; small pages borrow larger places. */
		must(scene.over && !n ? !st.used || st.offline : st.used >= used[t][0] + used[t][1],
		     "tier %d says %llu bytes, pages take %llu", t, (unsigned long long)st.used,
		     (unsigned long long)(used[t][0] + used[t][1]));
	}
	for (int t = 0; t < KVT_TIERS; t++)
		must(rows[t] == c->stat.rows[t], "tier %d: %llu rows counted, sequences have %llu", t,
		     (unsigned long long)c->stat.rows[t], (unsigned long long)rows[t]);
}

/* The index says of the device rows what the client says. */
static void check_index(const struct mseq *s)
{
	const struct seq *d = handle_get(side.core->seqs, s->handle, NULL);

	if (s->life != LIVE || s->busy || !d || d->state != SEQ_LIVE || d->cut != ROWS_ALL ||
	    d->acked != s->acked)
		return;
	must(d->epoch == s->epoch && d->rows <= s->rows, "sequence %u: epoch %u rows %u, the client has %u, %u",
	     (unsigned)(s - side.seq), d->epoch, d->rows, s->epoch, s->rows);
	for (uint32_t l = 0; l < d->ix.lanes && d->ix.rows; l++) {
		const uint64_t *on = index_bits(&d->ix, KVT_TIER_DEVICE, l);
		uint32_t n = 0;

		for (uint32_t pos = 0; pos < d->ix.rows; pos++) {
			must(bits_test(on, pos) == bits_test(s->res[l], pos),
			     "sequence %u lane %u row %u: the index says it is %s the device",
			     (unsigned)(s - side.seq), l, pos, bits_test(on, pos) ? "on" : "not on");
			n += bits_test(on, pos);
		}
		must(n == d->ix.resident[l], "sequence %u lane %u: %u resident, counted %u",
		     (unsigned)(s - side.seq), l, n, d->ix.resident[l]);
	}
}

/* Faults that nobody made do not happen. */
static void check_misses(const struct core *c)
{
	if (!scene.flips)
		must(!c->stat.miss_corrupt, "%llu corrupt pages on media without faults",
		     (unsigned long long)c->stat.miss_corrupt);
	if (!scene.faults && !disk.stall)
		must(!c->stat.miss_io, "%llu pages lost on media without faults",
		     (unsigned long long)c->stat.miss_io);
	must(!c->stat.miss_client_mutated, "pages changed by clients that do not");
	must(!c->stat.hangups_protocol, "a client that keeps the rules was ended");
}

static void check_all(void)
{
	check_bytes(side.core);
	check_misses(side.core);
	for (unsigned i = 0; i < MAX_SEQS; i++) {
		check_index(&side.seq[i]);
		if (side.seq[i].life == LIVE && !side.seq[i].applied)
			check_rows(&side.seq[i], "resident");
	}
}
