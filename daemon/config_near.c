/* SPDX-License-Identifier: MIT */
/* What somebody who mistyped a name probably meant. */
#include <limits.h>
#include <string.h>
#include "daemon/config_keys.h"
#include "shm/util.h"

#define LONGEST 40u /* of names that are compared */

/* Insertions, deletions, replacements and swaps of neighbours that make one of the other. */
static unsigned distance(const char *a, const char *b)
{
	unsigned row[3][LONGEST + 1], n = (unsigned)strlen(a), m = (unsigned)strlen(b);

	if (n > LONGEST || m > LONGEST)
		return UINT_MAX;
	for (unsigned j = 0; j <= m; j++)
		row[0][j] = j;
	for (unsigned i = 1; i <= n; i++) {
		unsigned *now = row[i % 3], *before = row[(i - 1) % 3], *two = row[(i + 1) % 3];

		now[0] = i;
		for (unsigned j = 1; j <= m; j++) {
			now[j] = MIN(MIN(now[j - 1], before[j]) + 1, before[j - 1] + (a[i - 1] != b[j - 1]));
			if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1])
				now[j] = MIN(now[j], two[j - 2] + 1);
		}
	}
	return row[n % 3][m];
}

/* Near enough to be meant: a third of its letters at most. */
static bool nearer(const char *name, const char *candidate, unsigned *best)
{
	unsigned d = distance(name, candidate);

	if (d >= *best || d > MAX(1u, (unsigned)strlen(candidate) / 3))
		return false;
	*best = d;
	return true;
}

const char *config_key_near(const char *section, const char *name)
{
	const char *found = NULL;
	unsigned best = UINT_MAX;

	for (unsigned i = 0; i < config_n_keys; i++)
		if (!strcmp(config_keys[i].section, section) && nearer(name, config_keys[i].name, &best))
			found = config_keys[i].name;
	return found;
}

const char *config_section_near(const char *name)
{
	const char *found = NULL;
	unsigned best = UINT_MAX;

	for (unsigned i = 0; i < config_n_keys; i++)
		if (nearer(name, config_keys[i].section, &best))
			found = config_keys[i].section;
	return found;
}
