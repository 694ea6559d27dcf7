/* SPDX-License-Identifier: MIT */
/* The tables of words.h. */
#include <string.h>
#include "daemon/ctl/words.h"
#include "daemon/verbs.h"
#include "shm/util.h"

const struct ctl_verb ctl_verbs[] = {
#define VERB_ROW(name, args, least, most, flags, doc) {#name, args, doc, least, most},
	ADMIN_VERBS(VERB_ROW)
#undef VERB_ROW
	/* These are made of the daemon's verbs here. */
	{"top", "", "a live view of everything, for a terminal", 0, 0},
	{"doctor", "", "what this host lacks, and what to do about it", 0, 0},
	{"plot", "[SEQ]", "a picture of where rows are and their worth", 0, 1},
};
const size_t ctl_verb_count = ARRAY_SIZE(ctl_verbs);

const struct ctl_option ctl_options[] = {
#define OPTION_ROW(id, name, arg, doc) {name, arg, doc},
	CTL_OPTIONS(OPTION_ROW)
#undef OPTION_ROW
};
const size_t ctl_option_count = ARRAY_SIZE(ctl_options);

const struct ctl_verb *ctl_find_verb(const char *name)
{
	for (size_t i = 0; i < ctl_verb_count; i++)
		if (!strcmp(ctl_verbs[i].name, name))
			return &ctl_verbs[i];
	return NULL;
}
