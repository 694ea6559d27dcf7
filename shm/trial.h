/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * What a trial build (make TRIAL=1) has and every other build has not: bugs that
 * tests must catch, and places to die at. Elsewhere planted() is the constant
 * false and a crash point is nothing, so not a byte of either is left.
 *
 * The environment chooses, once, at the first question:
 *   KVT_PLANT=NAME      this bug is there
 *   KVT_CRASH=NAME[:N]  the process kills itself when it is there the Nth time (default 1)
 *   KVT_CRASH_SEEN=FILE names of crash points are appended to this file as they are first reached
 *
 * Names are listed in the heads of tests/torture/; tests/check-trials holds both sides together.
 * Any thread.
 */
#include <stdbool.h>

#ifdef KVT_TRIAL
bool planted(const char *name);
void crash_point(const char *name);
#else
#define planted(name) false
#define crash_point(name) ((void)0)
#endif
