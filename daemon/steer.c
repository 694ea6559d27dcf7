/* SPDX-License-Identifier: MIT */
/* Steering: what kvtierctl may change. The audit line is the admin verbs'; the feed entry is ours. */
#include <stdio.h>
#include <string.h>
#include "daemon/internal.h"
#include "shm/util.h"

static struct seq *steer(struct core *c, uint64_t handle, char *err, size_t errsize)
{
	struct seq *s = handle_get(c->seqs, handle, NULL);

	if (!s || s->state == SEQ_CLOSING) {
		snprintf(err, errsize, "sequence %016llx: gone", (unsigned long long)handle);
		return NULL;
	}
	c->stat.admin_mutations++;
	core_feed(c, FEED_ADMIN, s, 0, 0, NULL);
	return s;
}

/* Plan as soon as the client has finished with what it has. */
static void replan(struct seq *s)
{
	if (s->layout)
		manager_headroom(s);
	s->again = true;
	s->retries = 0;
	seq_step(s);
}

int core_seq_budget(struct core *c, uint64_t handle, const uint32_t rows[KVT_TIERS], char *err, size_t errsize)
{
	struct seq *s = steer(c, handle, err, errsize);

	if (!s)
		return KVT_E_STALE;
	memcpy(s->budget, rows, sizeof(s->budget));
	free(s->device_table);
	s->device_table = NULL;
	s->budget_default = false;
	replan(s);
	return 0;
}

int core_seq_pin(struct core *c, uint64_t handle, uint32_t pos, uint32_t n, bool pin, char *err, size_t errsize)
{
	struct seq *s = steer(c, handle, err, errsize);

	if (!s)
		return KVT_E_STALE;
	if (!s->max_rows || pos >= s->max_rows || n > s->max_rows - pos || !n) {
		snprintf(err, errsize, "rows: %u+%u, the sequence may have %u", pos, n, s->max_rows);
		return KVT_E_INVAL;
	}
	if (!s->pinned)
		s->pinned = calloc(BITS_WORDS(s->max_rows), sizeof(uint64_t));
	if (!s->pinned) {
		snprintf(err, errsize, "out of memory");
		return KVT_E_NOMEM;
	}
	if (pin)
		bits_set_range(s->pinned, pos, pos + n);
	else
		bits_clear_range(s->pinned, pos, pos + n);
	replan(s);
	return 0;
}

int core_seq_demote(struct core *c, uint64_t handle, uint32_t keep_rows, char *err, size_t errsize)
{
	struct seq *s = steer(c, handle, err, errsize);

	if (!s)
		return KVT_E_STALE;
	s->device_cap = keep_rows;
	replan(s);
	return 0;
}

int core_seq_promote(struct core *c, uint64_t handle, char *err, size_t errsize)
{
	return core_seq_demote(c, handle, ROWS_ALL, err, errsize);
}

int core_seq_drop(struct core *c, uint64_t handle, char *err, size_t errsize)
{
	struct seq *s = steer(c, handle, err, errsize);

	if (!s)
		return KVT_E_STALE;
	if (s->client) {
		client_notify(s->client, Q_GONE, s->handle, (uint64_t)-KVT_E_STALE, 0);
		s->taken = true;
	}
	seq_end(s);
	return 0;
}

int core_freeze(struct core *c, bool on)
{
	c->frozen = on;
	c->stat.admin_mutations++;
	core_feed(c, FEED_ADMIN, NULL, on, 0, NULL);
	return 0;
}
