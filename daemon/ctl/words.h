/* SPDX-License-Identifier: MIT */
#pragma once
/* kvtierctl's verbs and options, once: --help, the parser and the shells' completion are made of these. */
#include <stddef.h>

#define CTL_SOCKET "/run/kvtier/admin.sock"
#define CTL_COLUMN "\n                        " /* where --help's descriptions stand */

/*
 *   O(ID, name, argument, description)
 *
 * The description of what is of use to one verb alone begins with that verb and a colon.
 */
/* clang-format off */
#define CTL_OPTIONS(O)                                                                                        \
	O(SOCKET, "socket", "PATH", "the daemon's socket: the admin socket, or a tenant's"                    \
	  CTL_COLUMN "(default $KVTIER_ADMIN_SOCKET, then" CTL_COLUMN CTL_SOCKET ")")                         \
	O(JSON, "json", "", "print JSON instead of tables")                                                   \
	O(TIMEOUT, "timeout", "SECONDS", "give up when the daemon is silent this long (default 5)")           \
	O(COUNT, "count", "N", "watch: end after N events")                                                   \
	O(PAST, "past", "", "watch: begin with events that are already over")                                 \
	O(ONCE, "once", "", "top: print one frame as text and end")                                           \
	O(INTERVAL, "interval", "SECONDS", "top: between two looks at the daemon (default 1)")                \
	O(OUT, "out", "FILE", "plot: into FILE, .png or .svg, instead of the terminal")                       \
	O(WIDTH, "width", "N", "plot: pixels of the file, or columns of text")                                \
	O(LANE, "lane", "LANE", "plot: this lane only, or LANE+: it and those after it")                      \
	O(POLICY, "policy", "NAME", "plot: what a policy or a weight file prefers, no SEQ")                   \
	O(ROWS, "rows", "N", "plot: what it prefers among N rows")                                            \
	O(CONFIG, "config", "FILE", "doctor: this configuration, not the installed")              \
	O(ROOT, "root", "DIR", "doctor: files of the host are below DIR, for tests")                          \
	O(COMPLETE, "complete", "WORD...", "what may stand for the last WORD, for shells")                    \
	O(VERSION, "version", "", "print the version, exit")                                                  \
	O(HELP, "help", "", "print this, exit")
/* clang-format on */

struct ctl_verb {
	const char *name, *args, *doc;
	unsigned least, most; /* arguments */
};

struct ctl_option {
	const char *name, *arg, *doc; /* arg: "" when it takes none */
};

extern const struct ctl_verb ctl_verbs[];
extern const size_t ctl_verb_count;
extern const struct ctl_option ctl_options[];
extern const size_t ctl_option_count;

const struct ctl_verb *ctl_find_verb(const char *name);

/*
 * Print what may stand for the last of these words of a command line, of which kvtierctl is not one: a
 * candidate, a tab and what it is on each line; ":files" or ":dirs" for names of those. Sequences and policies
 * are asked from the daemon, which is given little time. Silent about every failure; always CTL_OK.
 */
int ctl_complete(unsigned argc, const char *const argv[]);
