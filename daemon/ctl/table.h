/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Tables for a terminal of 80 columns: numbers right-aligned with their units,
 * text cut (marked ~) where the line would be too long. Nothing but printable
 * ASCII comes out.
 */
#include <stddef.h>
#include <stdint.h>

#define TABLE_COLUMNS 12
#define TABLE_CELL 80

struct table {
	unsigned columns, rows, cap;
	const char *head[TABLE_COLUMNS];
	char align[TABLE_COLUMNS]; /* 'l' or 'r'; 'L': left and never cut */
	char (*cell)[TABLE_CELL];  /* [rows][columns] */
};

/* spec: "lHANDLE rROWS ...": alignment and heading of each column, separated by blanks. Modified and kept. */
void table_init(struct table *t, char *spec);
/* Append a cell; rows fill from the left. Formatted text is cut to TABLE_CELL - 1. */
void __attribute__((format(printf, 2, 3))) table_add(struct table *t, const char *fmt, ...);
void table_print(struct table *t);
void table_free(struct table *t);

/* Formatted in one of a few static buffers, valid until several more calls. */
const char *fmt_bytes(uint64_t v);     /* 512 B, 1.50 MiB */
const char *fmt_count(uint64_t v);     /* 99999, 123k, 1.23M */
const char *fmt_ns(uint64_t v);        /* 840 ns, 1.23 ms */
const char *fmt_age(uint64_t seconds); /* 42 s, 3:07:09, 5 d 3:07:09 */
