/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * The admin verbs, once: the daemon makes its dispatch table from this list and
 * kvtierctl its table of renderers and its --help.
 *
 *   V(name, arguments, least, most, flags, one line)
 *
 * least and most count the arguments. SEQ is a handle (0x...), a key (32 hex
 * digits) or a unique prefix of one.
 */
#define VERB_ADMIN 1 /* refused on a tenant's socket */
#define VERB_AUDIT 2 /* changes something: one audit line per call */

/* clang-format off */
#define ADMIN_VERBS(V)                                                                                        \
	V(status, "", 0, 0, 0, "what the daemon holds and has done")                                          \
	V(ls, "[FROM]", 0, 1, 0, "list sequences, all or from this cursor on")                                \
	V(show, "SEQ [lanes]", 1, 2, 0, "one sequence, with its lanes if asked")                              \
	V(trace, "SEQ [POS [LANE]]", 1, 3, 0, "its last plans, or why a row is where it is")                      \
	V(map, "SEQ [LANE [COLUMNS [FROM]]]", 1, 4, 0, "which tiers hold each row, and what rows are worth")      \
	V(budget, "SEQ TIER=ROWS...", 2, 4, VERB_AUDIT, "rows per lane: device=, dram=, nvme=N or all")       \
	V(pin, "SEQ POS ROWS", 3, 3, VERB_AUDIT, "keep rows [POS, POS + ROWS) on the device")                 \
	V(unpin, "SEQ POS ROWS", 3, 3, VERB_AUDIT, "undo pin")                                                \
	V(demote, "SEQ [KEEP]", 1, 2, VERB_AUDIT, "at most KEEP (0) device rows a lane, until promote")       \
	V(promote, "SEQ", 1, 1, VERB_AUDIT, "undo demote: back up to the budget")                             \
	V(drop, "SEQ", 1, 1, VERB_AUDIT, "end a sequence and free its rows")                                  \
	V(policy, "list | load FILE | set NAME [SEQ]", 1, 3, VERB_AUDIT, "list, load or choose policies")     \
	V(watch, "", 0, 0, VERB_ADMIN, "follow decisions and moves")                                          \
	V(verify, "[start [SEQ] | status]", 0, 2, 0, "read stored pages and check them")                      \
	V(freeze, "on|off", 1, 1, VERB_ADMIN | VERB_AUDIT, "stop or resume making plans")                     \
	V(drain, "", 0, 0, VERB_ADMIN | VERB_AUDIT, "flush leased sequences, then exit")                      \
	V(reload, "", 0, 0, VERB_ADMIN | VERB_AUDIT, "read the configuration file again")                     \
	V(version, "", 0, 0, 0, "version of daemon, protocol and ABI")
/* clang-format on */

/* What map says of a run of rows is a sum of these; 0: dropped. */
enum map_code { MAP_DEVICE = 1, MAP_DRAM = 2, MAP_NVME = 4, MAP_MOVING = 8, MAP_CODES = 16 };
#define MAP_COLUMNS 4096u /* that scores are summed up in, at most */
