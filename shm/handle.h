/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Handles: 64-bit, index in the low half, generation in the high half. The
 * owner is checked at every use. A slot's generation rises on free and a slot
 * whose generation would wrap is retired, so a stale handle never resolves. Generations begin at
 * random, so that handles of an earlier process are stale too.
 * Private memory; event-loop thread only.
 */
#include <stdint.h>

struct handle_table;
int handle_table_new(struct handle_table **ret, uint32_t max); /* -ENOMEM */
void handle_table_free(struct handle_table *t);
/* Returns the handle (never 0), or 0 when the table is full or memory is out. */
uint64_t handle_add(struct handle_table *t, void *obj, const void *owner);
/* The object, or NULL when the handle is stale, foreign or nonsense. owner NULL matches any (admin). */
void *handle_get(const struct handle_table *t, uint64_t handle, const void *owner);
void handle_set_owner(struct handle_table *t, uint64_t handle, const void *owner);
void handle_del(struct handle_table *t, uint64_t handle);
uint32_t handle_count(const struct handle_table *t);
/* Iterate live objects: *cursor starts at 0; NULL at the end. */
void *handle_next(const struct handle_table *t, uint32_t *cursor, uint64_t *ret_handle);
