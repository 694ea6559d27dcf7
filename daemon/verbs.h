/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * The admin verbs, once: the daemon makes its dispatch table from this list and
 * kvtierctl its table of renderers and its --help.
 *
 *   V(name, arguments, flags, one line)
 *
 * SEQ is a handle (0x...), a key (32 hex digits) or a unique prefix of one.
 */
#define VERB_ADMIN 1 /* refused on a tenant's socket */
#define VERB_AUDIT 2 /* changes something: one audit line per call */

#define ADMIN_VERBS(V)                                                                                         \
	V(status, "", 0, "what the daemon holds and has done")                                                 \
	V(ls, "[FROM]", 0, "list sequences")                                                                   \
	V(show, "SEQ [lanes]", 0, "one sequence, with its lanes if asked")                                     \
	V(budget, "SEQ TIER=ROWS...", VERB_AUDIT, "set rows per lane: device=, dram=, nvme=N|all")             \
	V(pin, "SEQ POS ROWS", VERB_AUDIT, "keep rows [POS, POS + ROWS) on the device")                        \
	V(unpin, "SEQ POS ROWS", VERB_AUDIT, "undo pin")                                                       \
	V(demote, "SEQ [KEEP]", VERB_AUDIT, "at most KEEP (0) device rows per lane, until promote")            \
	V(promote, "SEQ", VERB_AUDIT, "undo demote: back up to the budget")                                    \
	V(drop, "SEQ", VERB_AUDIT, "end a sequence and free its rows")                                         \
	V(policy, "list | load FILE | set NAME [SEQ]", VERB_AUDIT, "list, load or choose policies")            \
	V(watch, "", VERB_ADMIN, "follow decisions and moves")                                                 \
	V(verify, "[start [SEQ] | status]", 0, "read every stored page and check it")                          \
	V(freeze, "on|off", VERB_ADMIN | VERB_AUDIT, "stop or resume making plans")                            \
	V(drain, "", VERB_ADMIN | VERB_AUDIT, "flush leased sequences and exit")                               \
	V(reload, "", VERB_ADMIN | VERB_AUDIT, "read the configuration file again")                            \
	V(version, "", 0, "version of daemon, protocol and ABI")
