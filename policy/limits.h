/* SPDX-License-Identifier: MIT */
#pragma once
/* What a decision may speak of; the client ABI allows no more. Internal to policy/. */
#include "policy/decide.h"

#define DECIDE_MAX_LANES 1024u
#define DECIDE_MAX_ROWS 1048576u /* positions of a sequence */

/* 0, or -EINVAL when a field is impossible, alone or with another. */
int decide_check(const struct decide_in *in);
