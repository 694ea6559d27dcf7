/* SPDX-License-Identifier: MIT */
/*
 * Networks that clients run themselves: W_SCORER hands out what a policy object scores with, prepared for a GPU
 * (shm/scorer.h), as published memory. It belongs to the policy object, is made once, by the workers, lane by
 * lane, and lives as long as somebody holds the object: a sequence that scores with it, a client that
 * asked for it. So newer weights change nothing for those who have older ones.
 */
#include <stdio.h>
#include <string.h>
#include "daemon/internal.h"
#include "shm/util.h"

struct policy_use *scorer_find(struct client *cl, uint64_t id)
{
	for (uint32_t i = 0; i < cl->n_scorers; i++)
		if (cl->scorers[i]->scorer.id == id)
			return cl->scorers[i];
	return NULL;
}

void scorer_forget(struct client *cl)
{
	for (uint32_t i = 0; i < cl->n_scorers; i++)
		policies_put(cl->core, cl->scorers[i]);
	free(cl->scorers);
	cl->scorers = NULL;
	cl->n_scorers = 0;
}
