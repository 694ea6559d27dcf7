/* SPDX-License-Identifier: MIT */
/*
 * Who uses much of the loop is served after who uses little. Time spent on a client's requests and hints is
 * counted for it and for its tenant, and halved every 10 ms; past a share of that the client's events are
 * dispatched only when nobody else's wait. So a client that floods us slows down itself, however many
 * connections it has, and what others notice is one slice of it at most. Nobody starves: who is not served
 * spends nothing, and is light again soon.
 */
#include "daemon/internal.h"
#include "shm/util.h"

#define HEAVY_NS UINT64_C(1000000) /* of a client, in the last 10 ms or so */
#define CROWD_NS UINT64_C(2000000) /* of its tenant: from then on */
#define PART_NS UINT64_C(30000)    /* this much of it makes a client one of the crowd */

static int set_priority(struct client *cl)
{
	int64_t p = cl->heavy ? FAIR_HEAVY : SD_EVENT_PRIORITY_NORMAL;
	sd_event_source *of[] = {cl->io, cl->wake, cl->again, cl->retry};

	for (size_t i = 0; i < ARRAY_SIZE(of); i++)
		if (of[i] && sd_event_source_set_priority(of[i], p) < 0)
			return -1;
	return 0;
}

static void weigh(struct client *cl)
{
	const struct tenant *t = cl->tenant;
	bool heavy = cl->spent_ns > HEAVY_NS || (t && t->spent_ns > CROWD_NS && cl->spent_ns > PART_NS);

	/* The operator's requests are few, and matter most when there is trouble. */
	if (heavy == cl->heavy || !t)
		return;
	cl->heavy = heavy;
	set_priority(cl);
}

void fair_spent(struct client *cl, uint64_t since_ns)
{
	uint64_t ns = now_ns() - since_ns;

	cl->spent_ns += ns;
	if (cl->tenant)
		cl->tenant->spent_ns += ns;
	if (!cl->dead)
		weigh(cl);
}

void fair_tick(struct core *c)
{
	struct client *cl;

	for (uint32_t i = 0; i < c->tenants; i++)
		c->tenant[i].spent_ns /= 2;
	LIST_FOREACH(cl, &c->clients, link) {
		cl->spent_ns /= 2;
		if (cl->heavy)
			weigh(cl);
	}
}
