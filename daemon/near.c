/* SPDX-License-Identifier: MIT */
/*
 * Whose memory goes where. A client is on the node of the GPU that it named; else on the node on whose
 * processors it may run, followed when that changes; where it may run on several, on the one it was on when it
 * said hello. Its sequences' pages, its regions and its rings go there. Without a node they go where there is
 * most room.
 *
 * Each node of the DRAM tier has the tier's marks in its own part of the capacity: below min it gets pages only
 * where no other node has room, below low its cold pages leave for nvme until it is at high.
 */
#include <stdio.h>
#include <string.h>
#include <syslog.h>
#include "daemon/internal.h"
#include "daemon/near.h"
#include "shm/place.h"
#include "shm/util.h"

#define LOOK_CLIENTS 4u /* of which a tick asks where they are */

int near_open(struct core *c)
{
	struct near *n = calloc(1, sizeof(*n));
	int r;

	if (!n)
		return -ENOMEM;
	c->near = n;
	n->crowded = -1;
	r = nodes_open(&n->own, "");
	n->nodes = c->seams.nodes ? c->seams.nodes : &n->own;
	return r;
}

void near_close(struct core *c)
{
	if (c->near)
		nodes_close(&c->near->own);
	free(c->near);
	c->near = NULL;
}

static bool by_client(const struct core *c)
{
	return c->cfg.dram_node == TIER_NODE_CLIENT && c->near->nodes->table.n;
}

/* ---- clients ------------------------------------------------------------------------------- */

static int ask(const struct core *c, pid_t pid, bool *ret_firm)
{
	const struct nodes *n = c->near->nodes;

	return n->of_process ? n->of_process(n, pid, ret_firm) : nodes_of_process(n, pid, ret_firm);
}

void near_hello(struct client *cl)
{
	bool firm;

	if (by_client(cl->core))
		cl->node = (uint8_t)(ask(cl->core, cl->pid, &firm) + 1);
}

/* Its sequences follow it, and so do their pages. */
static void moved_to(struct client *cl, int node)
{
	struct seq *s;

	if (cl->node == node + 1)
		return;
	cl->node = (uint8_t)(node + 1);
	LIST_FOREACH(s, &cl->seqs, of_client)
		s->node = cl->node;
	migrate_look(cl->core);
}

void near_bind(struct seq *s)
{
	if (!s->client->node)
		return;
	if (s->node != s->client->node && s->ix.rows)
		migrate_look(s->core);
	s->node = s->client->node;
}

/* Only one that is held to a node is followed: others come and go with the scheduler. */
static void follow(struct core *c)
{
	struct client *cl;
	uint32_t at = 0;

	LIST_FOREACH(cl, &c->clients, link) {
		bool firm;
		int node;

		if (at++ < c->near->client || !cl->hello)
			continue;
		if (at > c->near->client + LOOK_CLIENTS)
			break;
		node = ask(c, cl->pid, &firm);
		if (node >= 0 && firm)
			moved_to(cl, node);
	}
	c->near->client = cl ? at - 1 : 0;
}

/* ---- memory that is shared ----------------------------------------------------------------- */

void near_place(struct core *c, const struct client *cl, const struct seg *s)
{
	struct near *n = c->near;
	const struct tier_nodes *t = &n->nodes->table;
	int r = 0;

	if (t->n < 2 || !s->addr)
		return;
	if (c->cfg.dram_node == TIER_NODE_SPREAD)
		r = place_spread(s->addr, s->size, t->id, t->n);
	else if (by_client(c) && cl && cl->node)
		r = t->near ? t->near(s->addr, s->size, t->id[cl->node - 1])
			    : place_near(s->addr, s->size, t->id[cl->node - 1]);
	if (r < 0 && !n->err)
		n->err = r;
}

/* ---- marks --------------------------------------------------------------------------------- */

/* What one node has free, against the marks. */
static void weigh(struct core *c, uint32_t i, const struct tier_node_stat *at)
{
	const struct config_watermarks *m = &c->cfg.dram_marks;
	struct near *n = c->near;
	uint64_t unit = at->capacity / 1000, high = unit * m->high;

	if (at->free < unit * m->low)
		n->below_low |= 1u << i;
	if (at->free >= high)
		n->below_low &= ~(1u << i);
	if (at->free < unit * m->min)
		n->shun |= 1u << i;
	n->room[i] = at->free - MIN(at->free, high);
	if ((n->below_low >> i & 1) && high - MIN(high, at->free) > n->crowded_bytes) {
		n->crowded = (int)i;
		n->crowded_bytes = high - MIN(high, at->free);
	}
}

int near_crowded(const struct core *c, uint64_t *ret_bytes)
{
	*ret_bytes = c->near->crowded_bytes;
	return c->near->crowded;
}

static void tell(struct core *c, int place_err)
{
	struct near *n = c->near;

	if (!n->err)
		n->err = place_err;
	if (!n->err || n->said)
		return;
	n->said = true;
	log_line(LOG_WARNING, "numa: the kernel refuses to place memory: %s; it lies where it is first touched",
		 strerror(-n->err));
}

void near_tick(struct core *c)
{
	struct tier *t = c->pages.tier[KVT_TIER_DRAM];
	struct near *n = c->near;
	struct tier_stat st = {0};

	if (t)
		t->ops->stat(t, &st);
	tell(c, st.place_err);
	n->shun = 0;
	n->crowded = -1;
	n->crowded_bytes = 0;
	if (!by_client(c))
		return;
	follow(c);
	if (st.nodes < 2)
		return;
	for (uint32_t i = 0; i < MIN(st.nodes, TIER_NODES); i++)
		weigh(c, i, &st.at[i]);
	if (t->ops->shun)
		t->ops->shun(t, n->shun);
	migrate_tick(c);
}

void near_stat(const struct core *c, struct core_stat *ret)
{
	const struct near *n = c->near;
	unsigned nodes = n->nodes->table.n;
	int mode = c->cfg.dram_node, at = 0;

	if (mode == TIER_NODE_OFF)
		at = snprintf(ret->numa, sizeof(ret->numa), "off");
	else if (!nodes)
		at = snprintf(ret->numa, sizeof(ret->numa), "off: the host names no nodes");
	else if (mode >= 0)
		at = snprintf(ret->numa, sizeof(ret->numa), "node %d of %u", mode, nodes);
	else
		at = snprintf(ret->numa, sizeof(ret->numa), "%s, %u node%s",
			      mode == TIER_NODE_CLIENT ? "client" : "interleave", nodes, nodes == 1 ? "" : "s");
	if (n->err)
		snprintf(ret->numa + at, sizeof(ret->numa) - (size_t)at, ", refused: %s", strerror(-n->err));
	for (uint32_t i = 0; i < ret->tier[KVT_TIER_DRAM].nodes; i++)
		ret->node_fallbacks += ret->tier[KVT_TIER_DRAM].at[i].fallbacks;
}
