/* SPDX-License-Identifier: MIT */
#pragma once
/* The BPF programs in the kernel, in groups that each tell one thing: either a whole group runs or none of it.
 */
#include <stdbool.h>
#include "shm/probe.h"

struct load;

/*
 * Load and attach what this kernel takes. without: names of groups to leave out, separated by commas, or NULL.
 * broken: such that the kernel refuses, for tests.
 * 0, also when nothing could be loaded but the maps; or -errno with one line in err when not even those could.
 */
int load_new(struct load **ret, const char *without, const char *broken, char *err, size_t errsize);
/* Detaches everything. */
void load_free(struct load *l);
/* What to tell a daemon; busy is left 0. */
void load_hello(const struct load *l, struct probe_hello *ret);
/* Descriptors of the maps, which stay ours, in the order of the message. */
void load_maps(const struct load *l, int ret[PROBE_MAPS]);
/* Nobody to look at any more. */
void load_forget(struct load *l);
