/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * Checking and building of wire messages. Pure: no I/O, no allocation, no
 * state, any thread. Messages lie in 8-byte aligned buffers. A message that
 * passed wire_check() may be read field by field, its tables through the
 * accessors below, without another length, count, enum or string check; what
 * depends on a sequence's or model's state is the reader's to check.
 */
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "ipc/kvtier.h"
#include "ipc/wire.h"

/*
 * Check a whole message of `len` bytes, a reply when `reply`, else a request.
 * 0, or with one line "field: value, limit" in err:
 *   KVT_E_PROTO    framing: magic, type, length, counts, strings, reserved words;
 *                  the connection cannot be trusted any further
 *   KVT_E_VERSION  another protocol version
 *   KVT_E_INVAL    a well-formed message with a value out of its limits
 */
int wire_check(const void *buf, size_t len, bool reply, char *err, size_t errsize);

/*
 * One layer's layout against its model layer, a region of region_bytes and the
 * sequence's max_rows: strides hold a row, every row of [0, cap + stage) and the
 * score plane lie in the region. 0 or KVT_E_INVAL with a line naming layer i.
 */
int wire_layout_check(const struct wire_layout *l, const struct wire_layer *m, uint32_t i,
		      uint64_t region_bytes, uint32_t max_rows, char *err, size_t errsize);

/*
 * A checked W_SEQ_OPEN with a window against its model's layers and a region of region_bytes: both rings lie in
 * the region and hold the largest page of any lane with its header (the in ring two), the planes of `coefs`
 * scores per row lie in the region and apart from rings and from each other. 0 or KVT_E_INVAL with a line.
 */
int wire_window_check(const struct wire_seq_open *m, const struct wire_layer *layers, uint32_t coefs,
		      uint64_t region_bytes, char *err, size_t errsize);

/* Descriptors that a request of this type carries, neither fewer nor more. */
unsigned wire_request_fds(uint16_t type);

/* Name of a request type or of its reply, for log lines; "unknown" when it is none. */
const char *wire_type_name(uint16_t type);

/* ---- building ------------------------------------------------------------- */

/* Zero `len` bytes at hdr and fill the header. */
void wire_init(struct wire_hdr *hdr, enum wire_type type, size_t len, uint32_t cookie);
/*
 * Begin the reply to req: zero `len` bytes and fill the header, cookie included.
 * On failure (status < 0) hdr.len becomes sizeof(struct wire_reply) and the
 * formatted line its text, cut to fit, control bytes replaced; fmt may be NULL.
 */
void wire_reply_init(struct wire_reply *r, const struct wire_hdr *req, size_t len, int status, const char *fmt,
		     ...) __attribute__((format(printf, 5, 6)));
/* Copy a string into a fixed field, cut to fit, always terminated. */
void wire_string(char *dst, size_t size, const char *src);

static inline size_t wire_model_len(uint32_t n_layers)
{
	return sizeof(struct wire_model) + (size_t)n_layers * sizeof(struct wire_layer);
}
static inline size_t wire_seq_open_len(uint32_t n_layers, uint32_t table_n)
{
	return sizeof(struct wire_seq_open) + (size_t)n_layers * sizeof(struct wire_layout) +
	       (size_t)table_n * sizeof(uint32_t);
}
static inline size_t wire_plan_request_len(uint32_t table_n)
{
	return sizeof(struct wire_plan_request) + (size_t)table_n * sizeof(uint32_t);
}
static inline size_t wire_recall_len(uint32_t queries, uint32_t dim, uint32_t elem)
{
	return sizeof(struct wire_recall) + (size_t)queries * dim * elem;
}
static inline size_t wire_recall_reply_len(uint32_t heads, uint32_t rows)
{
	return sizeof(struct wire_recall_reply) + ((size_t)heads + rows) * sizeof(uint32_t);
}

/* ---- tables behind a checked (or freshly built) message --------------------- */

static inline struct wire_layout *wire_open_layouts(const struct wire_seq_open *m) /* [n_layers] */
{
	return (struct wire_layout *)(m + 1);
}
static inline uint32_t *wire_open_table(const struct wire_seq_open *m) /* [budget.table_n] */
{
	return (uint32_t *)(wire_open_layouts(m) + m->n_layers);
}
static inline uint32_t *wire_plan_table(const struct wire_plan_request *m) /* [budget.table_n] */
{
	return (uint32_t *)(m + 1);
}
static inline void *wire_recall_queries(const struct wire_recall *m) /* [heads][per_head][dim] of dtype */
{
	return (void *)(m + 1);
}
static inline uint32_t *wire_recall_counts(const struct wire_recall_reply *m) /* [heads] */
{
	return (uint32_t *)(m + 1);
}
static inline uint32_t *wire_recall_positions(const struct wire_recall_reply *m) /* [rows] */
{
	return wire_recall_counts(m) + m->heads;
}
/* Point argv[0..min(argc, cap)) into the message and return argc; argv[argc] = NULL when it fits. */
uint32_t wire_admin_argv(const struct wire_admin *m, const char **argv, uint32_t cap);
/* Sum of KV heads: the model's lanes. */
uint32_t wire_model_lanes(const struct wire_model *m);
/* Bytes of one element of an enum kvtier_dtype; 0 for opaque. */
uint32_t wire_dtype_bytes(uint32_t dtype);
