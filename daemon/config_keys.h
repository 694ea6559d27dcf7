/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * One table describes every configuration key: it drives the defaults, the
 * parser, --print-config, what a reload may change, and the check that the
 * manual page is complete. A key that is not in it does not exist.
 */
#include "daemon/config.h"

enum key_type {
	KEY_BOOL,    /* bool: yes, no */
	KEY_OBSERVE, /* bool: publish, observe */
	KEY_SPREAD,  /* uint32_t: no, lanes (or yes), tenant */
	KEY_LEVEL,   /* uint32_t: emerg .. debug or 0..7 */
	KEY_NODE,    /* int: a node number, or interleave, client, off: -1, -2, -3 */
	KEY_COUNT,   /* uint32_t or uint64_t by size */
	KEY_OCTAL,   /* uint32_t */
	KEY_SIZE,    /* uint64_t bytes, K M G T */
	KEY_QUOTA,   /* uint64_t bytes or none (UINT64_MAX) */
	KEY_SHARE,   /* uint32_t permille, written in percent */
	KEY_NAME,    /* char[]: letters, digits, . _ - */
	KEY_PATH,    /* char[]: absolute path */
	KEY_SOCKET,  /* char[]: file name or absolute path */
	KEY_TEXT,    /* char[]: anything printable */
};

struct config_key {
	const char *section; /* "tenant" stands for every [tenant NAME] */
	const char *name;
	enum key_type type;
	bool reload;   /* SIGHUP may change it */
	bool empty;    /* the empty string is a value */
	uint32_t off;  /* in struct config, or in struct config_tenant */
	uint32_t size; /* bytes of the field */
	uint64_t min, max;
	const char *def;  /* the default, as it would stand in the file; NULL: set by code */
	const char *unit; /* printed after the default, NULL when it has none */
	const char *doc;  /* one line */
	const char *why;  /* one line: why this default, and when to change it */
};

extern const struct config_key config_keys[];
extern const unsigned config_n_keys;

static inline void *config_field(void *base, const struct config_key *k)
{
	return (char *)base + k->off;
}

/* NULL when there is no such key. */
const struct config_key *config_key_find(const char *section, const char *name);
/* True when a section of this name exists ("tenant" included). */
bool config_section_known(const char *section);
/* The name in the table that a mistyped one is nearest to; NULL: none is near. */
const char *config_key_near(const char *section, const char *name);
const char *config_section_near(const char *name);
/* Parse `text` into the field of base. 0, or -EINVAL with `"value", limit` in err. */
int config_value_parse(const struct config_key *k, void *base, const char *text, char *err, size_t errsize);
/* The value as it would stand in the file. */
void config_value_format(const struct config_key *k, const void *base, char *buf, size_t size);
