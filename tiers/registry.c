/* SPDX-License-Identifier: MIT */
#include "tiers/tier.h"

#include <string.h>

const struct tier_ops *const tier_registry[] = {
	&tier_dram_ops,
	&tier_nvme_ops,
	&tier_fault_ops,
	NULL,
};

const struct tier_ops *tier_find(const char *name)
{
	for (const struct tier_ops *const *t = tier_registry; *t; t++)
		if (name && !strcmp((*t)->name, name))
			return *t;
	return NULL;
}
