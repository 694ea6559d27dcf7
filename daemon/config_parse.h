/* SPDX-License-Identifier: MIT */
#pragma once
/* A file being read: shared by the parser (config.c) and the checks between keys (config_check.c). */
#include <stdio.h>
#include "daemon/config_keys.h"

struct parse {
	struct config *cfg;
	FILE *f;
	unsigned line;
	int tenant;                               /* index of the section being read, -1: not a tenant */
	unsigned key_line[CONFIG_MAX_KEYS];       /* where each global key stands; 0: not given */
	unsigned tenant_line[CONFIG_MAX_TENANTS]; /* of [tenant NAME] */
	unsigned tenant_key_line[CONFIG_MAX_TENANTS][CONFIG_MAX_KEYS];
	bool failed;
	unsigned fail_line;
	char *err;
	size_t errsize;
};

/* Line 0: the complaint is about the file as a whole. The first complaint stands. */
void __attribute__((format(printf, 3, 4))) config_refuse(struct parse *p, unsigned line, const char *fmt, ...);
/* A segment that nobody chose follows the size. */
void config_fit(struct parse *p);
/* Check every relation; complains about the line that was written last. */
void config_relations(struct parse *p);
