/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * libkvtier for rows in GPU memory.
 *
 * The runtime's own tensors are the device tier; the library finds the driver (libcuda.so.1) and its kernels
 * (kvtier-cuda.fatbin, beside the library) when kvtier_cuda_open() is called, so one library serves hosts with
 * and without a GPU. Everything below works on the caller's stream: nothing waits for the GPU unless its
 * comment says so, and what was launched in one order happens in that order. One sequence belongs to one thread
 * at a time and to one stream; to change streams, make the new one wait for the old.
 *
 * A sequence's life, once the runtime has written rows [pos, pos + n) of all layers to their slots:
 *
 *   kvtier_cuda_append()   host only: the rows exist. A new row's slot is its lane's count of rows.
 *   kvtier_cuda_push()     every so many rows: scores them and has the daemon told when the stream gets there
 *   kvtier_cuda_poll()     between steps: sees what the daemon decided, launches copies; costs two loads when
 * idle kvtier_cuda_apply()    when poll says READY: fills the holes; the counts of the lanes change
 *
 * Slots. A lane's rows are in slots [0, count) in no order: RoPE is in the keys, so order does not matter to
 * attention. kvtier_cuda_map() gives the position of each slot, in GPU memory. Slots [cap, cap + stage) are the
 * library's.
 *
 * Streams are CUstream (cudaStream_t); device addresses are uint64_t. Results as in kvtier.h; a failed CUDA
 * call is KVT_E_GPU and kvtier_last_error() names call, code and meaning. After one that the driver reports as
 * sticky every call on that GPU says so: close the sequences (what the daemon has stays safe) and start again.
 */
#include "kvtier.h"

#ifdef __cplusplus
extern "C" {
#endif

struct kvtier_cuda;
struct kvtier_cuda_window;
struct kvtier_cuda_scorer;
struct kvtier_cuda_pool;

/* ---- the GPU --------------------------------------------------------------- */

struct kvtier_cuda_opts {
	size_t size;
	int32_t device;      /* ordinal, as the driver counts (CUDA_VISIBLE_DEVICES applies) */
	const char *kernels; /* NULL: $KVTIER_CUDA_KERNELS, then kvtier-cuda.fatbin beside the library */
};
struct kvtier_cuda_info {
	size_t size;
	int32_t device, major, minor;    /* compute capability */
	int32_t numa_node;               /* of the GPU's PCIe root; -1: unknown */
	int32_t multiprocessors, driver; /* driver: 12080 means 12.8 */
	uint64_t bytes, free_bytes;
	char name[64], pci[16];
};
/*
 * Uses the device's primary context, as the CUDA runtime and PyTorch do. Errors: KVT_E_GPU (no driver, one too
 * old, a broken one, no such device, compute capability below 8.0), KVT_E_IO (no kernels, or not for this GPU).
 */
KVT_PUBLIC int kvtier_cuda_open(const struct kvtier_cuda_opts *o, struct kvtier_cuda **ret);
/* After everything made with it. NULL is fine. */
KVT_PUBLIC void kvtier_cuda_close(struct kvtier_cuda *g);
KVT_PUBLIC int kvtier_cuda_info(struct kvtier_cuda *g, struct kvtier_cuda_info *ret);

/* ---- exchange window ---------------------------------------------------------- */

/*
 * Exchange memory made by the daemon and registered with the GPU, once; sequences take their rings and score
 * planes from it. 32 ms per GiB. Charged to the tenant's region quota. Errors: LIMIT, NOMEM, GPU.
 */
KVT_PUBLIC int kvtier_cuda_window_create(struct kvtier *c, struct kvtier_cuda *g, uint64_t bytes,
					 struct kvtier_cuda_window **ret);
/* After its sequences. NULL is fine. */
KVT_PUBLIC void kvtier_cuda_window_close(struct kvtier_cuda_window *w);

/* ---- scorer ---------------------------------------------------------------------- */

/*
 * The network of a policy for this model, from the daemon into GPU memory. policy NULL: the one that new
 * sequences get. Errors: NOENT (a policy without a network: open sequences without a scorer), VERSION, GPU.
 */
KVT_PUBLIC int kvtier_cuda_scorer_get(struct kvtier *c, struct kvtier_cuda *g, struct kvtier_model *m,
				      const char *policy, struct kvtier_cuda_scorer **ret);
/* After its sequences. NULL is fine. */
KVT_PUBLIC void kvtier_cuda_scorer_put(struct kvtier_cuda_scorer *s);
/* Coefficients it yields per row (1 or 2), and the policy's name. */
KVT_PUBLIC uint32_t kvtier_cuda_scorer_coefs(const struct kvtier_cuda_scorer *s);
KVT_PUBLIC const char *kvtier_cuda_scorer_policy(const struct kvtier_cuda_scorer *s);
/*
 * The network alone, without a sequence: scores of n rows of lanes [lane, lane + lanes), row i of lane l at
 * k + l * k_head_stride + i * k_row_stride (v likewise), position pos + i, to out[(l * coefs + c) * out_stride
 * + i], float32 in memory that the GPU can write. dtype: enum kvtier_dtype, f16 or bf16.
 */
KVT_PUBLIC int kvtier_cuda_scorer_run(struct kvtier_cuda_scorer *s, uint32_t lane, uint32_t lanes, uint64_t k,
				      uint64_t v, uint64_t k_head_stride, uint64_t v_head_stride,
				      uint32_t k_row_stride, uint32_t v_row_stride, uint32_t dtype,
				      uint32_t pos, uint32_t n, uint64_t out, uint64_t out_stride,
				      void *stream);

/* ---- sequences ------------------------------------------------------------------------ */

/* One layer's rows in GPU memory. Row in slot s of head h: K at k + h * k_head_stride + s * k_row_stride, V
 * likewise; all multiples of 16 bytes. */
struct kvtier_cuda_layer {
	uint64_t k, v;
	uint64_t k_head_stride, v_head_stride;
	uint32_t k_row_stride, v_row_stride;
};
enum {
	KVT_CUDA_DIRECT = 1, /* demoted rows in published DRAM: promotion and recall read them without a copy */
};
struct kvtier_cuda_seq_opts {
	size_t size;
	struct kvtier_cuda_window *window;
	struct kvtier_cuda_scorer *scorer;      /* NULL: rows are not scored (budget.policy must need none) */
	const struct kvtier_cuda_layer *layers; /* one per layer, copied; the memory stays the runtime's */
	uint32_t cap, stage;                    /* slots of each lane: rows, and behind them rows coming in */
	uint64_t out_bytes, in_bytes;           /* rings; 0: 32 MiB each */
	uint32_t flags;                         /* KVT_CUDA_* */
};
/*
 * As kvtier_seq_open() and kvtier_seq_resume(); o->region and o->layouts must be NULL. Models whose rows have a
 * type f16 or bf16 and head_dim 64 or 128 can be scored; any row of a multiple of 16 bytes can be moved. The
 * general calls of kvtier.h work on it (info, truncate, plan_request, fetch, close, drop) except append,
 * plan_apply, plan_ack, fork and recall, which are INVAL. Truncate waits for copies in flight. Errors: also
 * GPU, NOSPC (the window is full).
 */
KVT_PUBLIC int kvtier_cuda_seq_open(struct kvtier *c, struct kvtier_model *m, const struct kvtier_seq_opts *o,
				    const struct kvtier_cuda_seq_opts *g, struct kvtier_seq **ret);
KVT_PUBLIC int kvtier_cuda_seq_resume(struct kvtier *c, struct kvtier_model *m, const struct kvtier_seq_opts *o,
				      const struct kvtier_cuda_seq_opts *g, struct kvtier_seq **ret,
				      uint32_t *ret_rows);

/* Rows [pos, pos + n) are written, in all layers, by work before this on the stream. Host only. Errors: INVAL
 * (pos is not the length), NOSPC (a lane is full: cap, rows that a plan is about to bring in counted; or
 * max_rows). */
KVT_PUBLIC int kvtier_cuda_append(struct kvtier_seq *s, uint32_t pos, uint32_t n);
/*
 * Launch the scoring of all appended rows not scored yet, and have the daemon told of them once the stream has
 * come this far and kvtier_cuda_poll() has seen it. One or two kernels whatever the number of rows. 0 also when
 * there is nothing.
 */
KVT_PUBLIC int kvtier_cuda_push(struct kvtier_seq *s, void *stream);

struct kvtier_cuda_state {
	size_t size;
	uint64_t plan;                /* id of the newest plan, or 0 */
	uint32_t state;               /* KVT_PLAN_*; READY: apply may be called */
	uint32_t rows, pushed;        /* appended; known to the daemon */
	uint32_t busy;                /* 1: copies are in flight */
	uint64_t bytes_out, bytes_in; /* so far, of pages through the window or read directly */
};
/* Look, and launch what the newest plan needs next. Never blocks. ret may be NULL. Returns the plan's state. */
KVT_PUBLIC int kvtier_cuda_poll(struct kvtier_seq *s, void *stream, struct kvtier_cuda_state *ret);
/*
 * Carry out a READY plan on the stream: surviving rows and those that came in fill slots [0, count). counts, if
 * not NULL, [lanes]: the rows of each lane from then on, known at once. Acknowledged by a later poll. `to`
 * NULL: in place, the fewest bytes moved. Else rows go, ordered by position, to other memory of the same shape
 * (one per layer), which is the sequence's from then on. Errors: STALE, BUSY (not READY).
 */
KVT_PUBLIC int kvtier_cuda_apply(struct kvtier_seq *s, uint64_t plan, const struct kvtier_cuda_layer *to,
				 uint32_t *counts, void *stream);
/* Rows of each lane in the device tier now: counts[lanes]. Returns the largest. */
KVT_PUBLIC int kvtier_cuda_counts(struct kvtier_seq *s, uint32_t *counts);
/* Device address of uint32_t position[lanes][stride]: of the row in each slot, valid for pushed rows. */
KVT_PUBLIC int kvtier_cuda_map(struct kvtier_seq *s, uint64_t *ret_addr, uint32_t *ret_stride);
/*
 * Poll until everything decided so far is carried out, acknowledged and at rest. With `save`: first have all
 * rows stored below the device tier, so that a leased sequence can be closed and resumed. Waits for the GPU and
 * the daemon. Errors: TIMEOUT, NOSPC (save: rows for which there is no room below stay in GPU memory alone).
 */
KVT_PUBLIC int kvtier_cuda_settle(struct kvtier_seq *s, int save, uint32_t timeout_ms, void *stream);

/* ---- recall ---------------------------------------------------------------------------- */

/*
 * The same search as kvtier_seq_recall(), by the GPU over published DRAM (KVT_CUDA_DIRECT). Summaries of pages
 * (int8 mean and radius of every 32 keys) are made by prepare, in GPU memory, once per page.
 */
struct kvtier_cuda_recall_opts {
	size_t size;
	uint32_t group;         /* query heads of one KV head; 0: 1 */
	uint32_t rows;          /* wanted per KV head */
	uint32_t probe;         /* of 1000 groups of 32 rows, searched row by row; 0: 250 */
	uint32_t flags;         /* KVT_RECALL_* */
	float scale;            /* 0: 1 / sqrt(head_dim) */
	uint32_t before, after; /* as in kvtier_recall_opts */
	uint64_t queries;       /* device: [query head][n_queries][head_dim] of the model's dtype, after RoPE */
	uint64_t token_stride, head_stride; /* bytes; both 0: as packed */
	uint64_t k, v;                      /* device: where the rows go, [KV head][rows], strides below */
	uint64_t k_head_stride, v_head_stride;
	uint32_t k_row_stride, v_row_stride;
	uint64_t counts;    /* device uint32_t [KV heads] */
	uint64_t positions; /* device uint32_t [KV heads][rows], ascending; 0: not wanted */
};
/*
 * Look at the directory and launch what makes it searchable: a cache line of each page when nothing changed,
 * the keys of new pages read once. The first time asks the daemon, as does a page in a segment that is new.
 * KVT_AGAIN: pages move faster than they can be looked at. Errors: INVAL (not DIRECT; keys of more than 512
 * bytes or not of a multiple of 8 elements), MODEL (opaque rows), NOMEM, GPU.
 */
KVT_PUBLIC int kvtier_cuda_recall_prepare(struct kvtier_seq *s, void *stream);
/*
 * Launch the search of one layer. Stream-ordered; results are to be believed once recall_check says so. Queries
 * that are not finite are left out. Errors: INVAL (prepare comes first), STALE (published memory was given back
 * since: prepare again), NOMEM, GPU.
 */
KVT_PUBLIC int kvtier_cuda_recall(struct kvtier_seq *s, uint32_t layer, uint32_t n_queries,
				  const struct kvtier_cuda_recall_opts *o, void *stream);
/*
 * To be called when the stream has passed the recalls of a turn: 0, every page that they read stood still;
 * KVT_AGAIN: the daemon moved pages meanwhile, prepare and recall again.
 *
 * Under memory pressure the daemon wants published DRAM back. kvtier_cuda_poll() then unmaps segments in which no
 * page lies any more, once the stream given to it has passed: recalls of a sequence belong on the stream of its
 * polls, or are waited for before the next one. A process that does not poll its sequences for a second is
 * charged with what it keeps and gets no new pages there.
 */
KVT_PUBLIC int kvtier_cuda_recall_check(struct kvtier_seq *s);

/* ---- memory for several processes ---------------------------------------------------------- */

/*
 * GPU memory that other processes can map, by descriptor: runtimes of one host that share a prefix. The maker
 * and every importer read and write it; it lives until the last of them closes it. bytes is rounded up to the
 * GPU's granularity (2 MiB).
 */
KVT_PUBLIC int kvtier_cuda_pool_create(struct kvtier_cuda *g, uint64_t bytes, struct kvtier_cuda_pool **ret);
/* fd: from kvtier_cuda_pool_fd() of another process, stays the caller's. bytes: as there. */
KVT_PUBLIC int kvtier_cuda_pool_import(struct kvtier_cuda *g, int fd, uint64_t bytes,
				       struct kvtier_cuda_pool **ret);
KVT_PUBLIC uint64_t kvtier_cuda_pool_addr(struct kvtier_cuda_pool *p);
KVT_PUBLIC uint64_t kvtier_cuda_pool_bytes(struct kvtier_cuda_pool *p);
/* A new descriptor, the caller's to send and close; or KVT_E_*. */
KVT_PUBLIC int kvtier_cuda_pool_fd(struct kvtier_cuda_pool *p);
KVT_PUBLIC void kvtier_cuda_pool_close(struct kvtier_cuda_pool *p);

#ifdef __cplusplus
}
#endif
