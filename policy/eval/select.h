/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * The best heuristic of every lane, chosen on the validation split and then held
 * fixed. Internal to policy/eval.
 */
#include "policy/eval/rivals.h"
#include "policy/eval/set.h"

/*
 * chosen[lane] = index in `rivals` of the RIVAL_STAR with the least mean regret (over source documents) in
 * `table`, whose policies are those of `rivals`; regret[lane] that mean. -ENOMEM.
 */
int select_best(uint32_t *chosen, float *regret, const struct eval_set *set, const struct rivals *rivals,
		const struct eval_table *table);
/*
 * The choice as CSV: lane,policy,regret. Reading finds policies by name in `rivals` (of any run) and needs
 * every lane of the table; -EINVAL with line and reason in err.
 */
int select_write(const char *path, const uint32_t *chosen, const float *regret, const struct rivals *rivals,
		 const uint32_t *lane, uint32_t lanes, char *err, size_t errsize);
int select_read(uint32_t *chosen, const char *path, const struct rivals *rivals, const uint32_t *lane,
		uint32_t lanes, char *err, size_t errsize);
/* Fill the column of HOW_BEST from the chosen policies' columns. */
void select_fill(struct eval_table *table, const struct rivals *rivals, const uint32_t *chosen);
