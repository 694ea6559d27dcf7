/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * The recorder inside. trace.c and trace_seq.c: what the runtime's threads call,
 * none of which waits; trace_write.c: the thread that writes. A recorder lives as long as its
 * handle, its thread and its sequences do, so that a thread which hangs in a
 * write keeps nobody from closing.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/queue.h>
#include "ipc/kvtier.h"
#include "shm/trace.h"

/* Rows of a sequence, in blocks that are mapped when their first row comes. Given up, they are the thread's to
 * unmap. */
struct trace_mem {
	STAILQ_ENTRY(trace_mem) entry;
	char **block; /* [n_blocks] */
	uint32_t n_blocks;
	uint64_t block_bytes;
	uint32_t *tokens; /* [token_room] */
	uint32_t token_room;
	uint64_t held; /* bytes of the buffer */
};

/* At the beginning of a block in the pool. */
struct trace_block {
	struct trace_block *next;
	uint64_t bytes;
};

struct kvtier_trace_seq {
	struct kvtier_trace *t;
	STAILQ_ENTRY(kvtier_trace_seq) entry;
	struct trace_mem *mem; /* NULL: dropped */
	struct trace_header h;
	struct trace_cut cuts[TRACE_MAX_CUTS];
	uint32_t k_bytes, v_bytes; /* of a row */
	uint64_t layer_bytes;      /* of one layer's rows in a block */
	uint32_t block_rows;       /* a power of two */
	uint32_t n_tokens;
	uint32_t len[TRACE_MAX_LAYERS]; /* rows of each layer */
};

struct kvtier_trace {
	uint32_t fork_gen;
	char dir[3968], source[96], domain[24];
	uint64_t max_bytes, buffer_bytes;
	uint32_t every_n;
	kvtier_log_fn log;
	void *log_arg;
	_Atomic uint64_t seen, picked, recorded, dropped, bytes, buffered;
	_Atomic int ended; /* 0 or KVT_E_* */

	pthread_mutex_t lock; /* the rest; never held across I/O */
	pthread_cond_t cond;  /* work came, or was done, or the end */
	STAILQ_HEAD(, kvtier_trace_seq) queue;
	struct trace_block
		*pool;   /* blocks that no sequence has now; stay mapped, for pages cost more than copies */
	uint64_t pooled; /* their bytes; with `buffered` at most buffer_bytes */
	bool stop, busy;
	uint32_t refs; /* handle, thread, sequences */
	uint32_t pick; /* which of the current every_n sequences */
	uint64_t random;
};

/* Copy a string that fits, NULL none: 0 or KVT_E_INVAL. */
int trace_text(char *dst, size_t size, const char *src, const char *what);
/* Where rows [row, ...) of a plane are in their block. Planes of a layer: K heads, V heads, query heads. */
char *trace_seq_at(const struct kvtier_trace_seq *s, uint32_t layer, uint32_t kind, uint32_t head,
		   uint32_t row);
/* Blocks back to the pool. NULL is fine. */
void trace_mem_free(struct kvtier_trace *t, struct trace_mem *m);
/* Unmap the first block of the pool; lock held, or nobody left. false: there is none. */
bool trace_pool_shrink(struct kvtier_trace *t);
/* Frees s and its rows, and the recorder with the last reference. */
void trace_seq_free(struct kvtier_trace_seq *s);
void trace_put(struct kvtier_trace *t);
/* The writing thread; arg: its reference to a struct kvtier_trace. */
void *trace_thread(void *arg);
