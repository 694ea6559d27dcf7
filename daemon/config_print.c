/* SPDX-License-Identifier: MIT */
/* What an operator sees of a configuration: the whole of it, and what a reload may change. */
#include <stdio.h>
#include <string.h>
#include "daemon/config_keys.h"
#include "shm/util.h"

/* What a reader of lines takes of one, without its newline (INI_MAX_LINE of libinih less 2). */
#define LINE_MAX_BYTES 198
#define FILE_SHOWN 64

/* file, line: where it was set; line 0: it was not. What is printed must be read again: no line gets too long.
 */
static void print_key(int fd, const struct config_key *k, const void *base, const char *file, unsigned line)
{
	const char *def = k->def ?: "the tenant's name with .sock, kvtierd.sock for \"default\"";
	size_t n = strlen(file), cut = n > FILE_SHOWN ? n - FILE_SHOWN : 0;
	char value[CONFIG_PATH];
	const char *equals;

	config_value_format(k, base, value, sizeof(value));
	/* After a blank a semicolon begins a comment. */
	equals = !*value || *value == ';' ? " =" : " = ";
	if (strlen(k->name) + strlen(equals) + strlen(value) > LINE_MAX_BYTES)
		equals = "=";
	dprintf(fd, "# %s", k->doc);
	if (k->unit)
		dprintf(fd, " [%s]", k->unit);
	dprintf(fd, "\n# why: %s", k->why);
	dprintf(fd, "\n# default: %s; ", *def ? def : "empty");
	if (line)
		dprintf(fd, "set at %s%s:%u", cut ? "..." : "", file + cut, line);
	else
		dprintf(fd, "%s",
			!k->def || !strcmp(def, value) ? "not set" : "follows from other keys or an option");
	dprintf(fd, "%s", k->reload ? "; follows a reload" : "");
	dprintf(fd, "\n%s%s%s\n", k->name, equals, value);
}

void config_print(const struct config *c, int fd)
{
	const char *section = "";

	for (unsigned i = 0; i < config_n_keys; i++) {
		const struct config_key *k = &config_keys[i];

		if (!strcmp(k->section, "tenant"))
			continue;
		if (strcmp(k->section, section)) {
			dprintf(fd, "%s[%s]\n", *section ? "\n" : "", k->section);
			section = k->section;
		}
		print_key(fd, k, c, c->file, c->line[i]);
	}
	for (unsigned t = 0; t < c->tenants; t++) {
		dprintf(fd, "\n[tenant %s]\n", c->tenant[t].name);
		for (unsigned i = 0; i < config_n_keys; i++)
			if (!strcmp(config_keys[i].section, "tenant"))
				print_key(fd, &config_keys[i], &c->tenant[t], c->file, c->tenant[t].line[i]);
	}
}

/* Why a key that follows no reload does not. */
static const char *why_restart(const struct config_key *k)
{
	static const struct {
		const char *section, *why;
	} reasons[] = {
		{"dram", "the tier lays its memory out when it opens, and rows are in it"},
		{"nvme", "the tier lays its files out when it opens, and rows are in them"},
		{"policy", "policies that are loaded keep what they were loaded with"},
		{"metrics", "its socket is bound at the start"},
		{"tenant", "its socket is bound at the start, and clients are connected to it"},
		{"kvtierd", "sockets and threads are made at the start"},
	};

	for (unsigned i = 0; i < ARRAY_SIZE(reasons); i++)
		if (!strcmp(reasons[i].section, k->section))
			return reasons[i].why;
	return "it is read at the start only";
}

/* 0 when the key may differ or does not. */
static int compare(const struct config_key *k, const void *old, const void *new_, const char *where, char *err,
		   size_t errsize)
{
	char was[CONFIG_PATH], is[CONFIG_PATH];

	if (k->reload || !memcmp((const char *)old + k->off, (const char *)new_ + k->off, k->size))
		return 0;
	config_value_format(k, old, was, sizeof(was));
	config_value_format(k, new_, is, sizeof(is));
	snprintf(err, errsize, "[%s] %s: \"%.96s\" cannot become \"%.96s\" without a restart: %s", where,
		 k->name, was, is, why_restart(k));
	return -EINVAL;
}

int config_reloadable(const struct config *old, const struct config *new_, char *err, size_t errsize)
{
	for (unsigned i = 0; i < config_n_keys; i++) {
		const struct config_key *k = &config_keys[i];

		if (strcmp(k->section, "tenant") && compare(k, old, new_, k->section, err, errsize))
			return -EINVAL;
	}
	if (old->tenants != new_->tenants) {
		snprintf(err, errsize,
			 "tenants: %u cannot become %u without a restart: their sockets are bound at the "
			 "start, and "
			 "sequences count against them",
			 old->tenants, new_->tenants);
		return -EINVAL;
	}
	for (unsigned t = 0; t < old->tenants; t++) {
		char where[48];

		if (strcmp(old->tenant[t].name, new_->tenant[t].name)) {
			snprintf(err, errsize, "tenant %u: \"%s\" cannot become \"%s\" without a restart", t,
				 old->tenant[t].name, new_->tenant[t].name);
			return -EINVAL;
		}
		snprintf(where, sizeof(where), "tenant %s", old->tenant[t].name);
		for (unsigned i = 0; i < config_n_keys; i++) {
			const struct config_key *k = &config_keys[i];

			if (!strcmp(k->section, "tenant") &&
			    compare(k, &old->tenant[t], &new_->tenant[t], where, err, errsize))
				return -EINVAL;
		}
	}
	return 0;
}

static void change(const struct config_key *k, const void *old, const void *new_, const char *where,
		   void (*each)(void *arg, const char *line), void *arg)
{
	char was[CONFIG_PATH], is[CONFIG_PATH], line[2 * CONFIG_PATH + 128];

	if (!memcmp((const char *)old + k->off, (const char *)new_ + k->off, k->size))
		return;
	config_value_format(k, old, was, sizeof(was));
	config_value_format(k, new_, is, sizeof(is));
	snprintf(line, sizeof(line), "[%s] %s: %s -> %s", where, k->name, *was ? was : "empty",
		 *is ? is : "empty");
	each(arg, line);
}

void config_changes(const struct config *old, const struct config *new_,
		    void (*each)(void *arg, const char *line), void *arg)
{
	for (unsigned i = 0; i < config_n_keys; i++) {
		const struct config_key *k = &config_keys[i];

		if (strcmp(k->section, "tenant")) {
			change(k, old, new_, k->section, each, arg);
			continue;
		}
		for (unsigned t = 0; t < old->tenants; t++) {
			char where[48];

			snprintf(where, sizeof(where), "tenant %s", old->tenant[t].name);
			change(k, &old->tenant[t], &new_->tenant[t], where, each, arg);
		}
	}
}
