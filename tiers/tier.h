/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * What a tier below the device offers: it stores opaque pages and gives them
 * back. A tier decides where a page lies; the mover decides what lies in it; the
 * manager decides whether. Pages are immutable once written.
 *
 * Life of a write:  prepare (place and buffer) → caller fills io->buf → submit →
 *                   reap → release (buffer back; the page stays at io->addr).
 * Life of a read:   prepare (buffer) → submit → reap → caller uses io->buf →
 *                   release.
 * struct tier_io is the caller's memory and must stay put from prepare to
 * release; io->buf is the tier's memory and is the caller's to touch only
 * before submit (writes) or after reap (reads). For a mapped tier the buffer is
 * the page itself, so nothing is copied.
 *
 * Threads: prepare, submit, reap, release, free are called from one owner thread
 * at a time (the event loop); filling io->buf may happen on any thread. None of
 * them blocks on I/O. An fd polls readable when reap has something.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef uint64_t tier_addr; /* opaque but for what follows; TIER_ADDR_NONE = nowhere */
#define TIER_ADDR_NONE UINT64_MAX
/* A page in published memory: this bit, 24 bits of segment number, 32 bits of place in units of 4 KiB. */
#define TIER_ADDR_PUBLISHED (UINT64_C(1) << 62)
#define TIER_MAX_PAGE (1u << 20) /* bytes */

/* Who a page is. Seeds its CRC32C, so a stale or misdirected page cannot pass. 48 bytes, no padding. */
struct page_ident {
	uint8_t key[16]; /* sequence key */
	uint64_t page;   /* page number, unique in the daemon's life and on the disk */
	uint64_t tenant; /* stable hash of the tenant's name */
	uint32_t lane;
	uint32_t epoch;
	uint32_t rows;
	uint32_t first; /* position of the first row */
};
_Static_assert(sizeof(struct page_ident) == 48, "hashed as bytes");

/* What a tier that survives a restart keeps beside a page; opaque to the tier. */
struct page_meta {
	struct page_ident id;
	uint32_t crc;       /* of the payload, seeded with id */
	uint32_t bytes;     /* payload bytes, not rounded */
	uint32_t pos_words; /* position bitmap, relative to id.first */
	uint32_t seq_info;  /* index into the segment's sequence table, set by the tier */
	const uint64_t *pos;
};

enum tier_op { TIER_WRITE = 0, TIER_READ = 1 };
enum tier_class { TIER_SHORT = 0, TIER_LONG = 1 }; /* expected lifetime: ephemeral / leased */

struct tier_io {
	enum tier_op op;
	uint32_t bytes;               /* payload; the tier rounds up to its unit itself */
	tier_addr addr;               /* set by prepare (write); given (read) */
	void *buf;                    /* set by prepare */
	struct page_meta meta;        /* write: what to remember beside the page; read: unused */
	const struct seq_record *seq; /* write: owner of the page, copied by the tier before submit returns */
	uint8_t life;                 /* enum tier_class */
	uint64_t owner; /* write: whose clients may map the page's segment, read-only; 0: nobody, it is private
			 */
	uint64_t room;  /* write, with owner: bytes of new segments that the owner may be charged with */
	uint8_t near;   /* write: 1 + index of the node where it should lie; 0: wherever */
	int32_t res;    /* after reap: 0 or -errno */
	void *user;     /* the caller's */
	struct tier_io *next; /* the tier's while submitted */
	uint64_t priv[4];     /* the tier's */
};

/* What is needed to recognise an orphaned sequence after a restart. */
struct seq_record {
	uint8_t key[16];
	uint8_t secret_hash[32]; /* SHA-256; zero when ephemeral */
	uint64_t tenant;
	uint64_t model; /* fingerprint of the model description */
	uint32_t lanes;
	uint32_t born_lo, born_hi; /* which life of this key it is, see seq_born() */
	uint32_t lifetime;
};
/* Stores of before had rows and epoch in these words, far below any number that is drawn: they count as 0. */
#define SEQ_BORN_LEAST (UINT64_C(1) << 60)
static inline uint64_t seq_born(const struct seq_record *r)
{
	uint64_t born = (uint64_t)r->born_hi << 32 | r->born_lo;

	return born < SEQ_BORN_LEAST ? 0 : born;
}

enum {
	TIER_CAP_MAPPED = 1,  /* io->buf is the page */
	TIER_CAP_DURABLE = 2, /* pages survive a restart */
	TIER_CAP_ASYNC = 4,   /* completion comes later, through the fd */
};

#define TIER_NODES 16u /* nodes of memory that are told apart */

/* What a host has. Memory that a client of a node uses is best on that node, else on one at a small distance.
 */
struct tier_nodes {
	unsigned n;                  /* 0: nothing is known of it */
	int id[TIER_NODES];          /* the kernel's numbers, rising */
	uint64_t memory[TIER_NODES]; /* bytes; a capacity is divided in these proportions */
	uint8_t distance[TIER_NODES][TIER_NODES];
	/* As place_near() in shm/place.h; NULL: that one. For tests, on hosts that have one node. */
	int (*near)(void *addr, size_t bytes, int id);
};

struct tier_node_stat {
	int id;
	uint64_t capacity, used, free; /* the tier's are their sums */
	uint64_t resident;             /* bytes of the host's memory, in pieces of 2 MiB */
	uint64_t fallbacks;            /* pages that should have come here and went to another node */
};

struct tier_stat {
	uint64_t capacity, used, free; /* bytes; used counts what pages occupy, padding included */
	uint64_t overhead;             /* headers, footers, staging buffers */
	uint64_t reads, writes, read_bytes, write_bytes;
	uint64_t device_write_bytes; /* bytes really sent to the device: / write_bytes = amplification */
	uint64_t errors, inflight, leaked_bytes;
	uint64_t cleaned_segments;
	uint64_t resident;            /* dram: bytes of the host's memory that it holds, in pieces of 2 MiB */
	uint64_t published;           /* bytes of published segments, which only their owners can use */
	uint64_t held;                /* of that, what no page takes */
	uint64_t revoked, late;       /* of resident: published and to go; of that, for too long already */
	bool offline, huge, io_uring; /* offline: a deadline passed; no new work */
	int node;                     /* NUMA node, -1 interleaved or unknown */
	int place_err;                /* -errno: the host does not let us say where memory shall lie */
	uint32_t nodes;               /* told apart; 0: nothing is known of them */
	struct tier_node_stat at[TIER_NODES]; /* interleaved: equal parts */
	char note[96];                        /* one human line, e.g. why the fallback runs */
};

/* tier_cfg.node: one of the host's nodes, or */
enum {
	TIER_NODE_SPREAD = -1, /* pages of memory from all nodes in turn */
	TIER_NODE_CLIENT = -2, /* segments on each node, pages where tier_io.near says */
	TIER_NODE_OFF = -3,    /* wherever the kernel takes it from */
};

#define TIER_REVOKE_MS 1000u                   /* a client has so long to let go of a revoked segment */
#define TIER_SEGMENT_GRAIN (UINT64_C(2) << 20) /* published segments are multiples */

/* What an owner takes; owner 0: all that is private. */
struct tier_owner {
	uint64_t bytes, used;     /* of its segments; what pages occupy of them, padding included */
	uint64_t room;            /* bytes of pages that could be added, new segments included */
	uint32_t segments, empty; /* empty: kept for its next pages */
	uint64_t revoked, late;   /* as in tier_stat */
};

#define TIER_KEEP_NAME 32 /* bytes, terminator included */

/*
 * Where memory outlives the process: systemd's fd store, behind the daemon. Called on the tier's owner
 * thread. Its segments are ours alone: nobody else writes there.
 */
struct tier_keep {
	void *arg;
	/* Hand over a duplicate under this name. 0, or -errno: the memory ends with the process. */
	int (*store)(void *arg, const char *name, int fd);
	void (*drop)(void *arg, const char *name);
	/* One that an earlier life left is not taken over, and dropped: one line. */
	void (*refused)(void *arg, const char *name, const char *why);
	struct tier_kept {
		char name[TIER_KEEP_NAME];
		int fd; /* set to -1 when taken */
	} * kept;       /* what earlier lives left */
	unsigned n;
};

/*
 * nvme: copies that nobody waits for, the cleaner's, take their turn among the owner's writes. Owner thread.
 *
 * take: how many of these bytes may be copied now; 0: none, and the tier asks again when I/O ends, or at the
 * tick. urgent: places run out, so it must not be 0. A page that is larger is copied all the same. They are
 * under way until ended(), which tells what the write took; ns 0: there was none.
 */
struct tier_pace {
	void *arg;
	uint32_t (*take)(void *arg, uint32_t bytes, bool urgent);
	void (*ended)(void *arg, uint32_t bytes, uint64_t ns);
};

struct tier_cfg {
	const char *path;     /* nvme: directory of the container files */
	uint64_t size;        /* capacity in bytes */
	uint64_t segment;     /* nvme: log segment (default 64 MiB); dram: memfd size (default 256 MiB) */
	uint64_t staging;     /* nvme: bytes of registered buffers (default 32 MiB) */
	unsigned depth;       /* nvme: requests in flight (default 32) */
	unsigned deadline_ms; /* nvme: a request older than this takes the tier offline (default 10000) */
	bool no_uring;        /* nvme: use the thread pool */
	bool prealloc;        /* nvme: write containers over once at creation (default true in the daemon) */
	bool no_huge;         /* dram */
	int node;             /* dram: NUMA node, or TIER_NODE_* */
	const struct tier_nodes *nodes; /* dram: of the host; copied. NULL: nothing is known */
	const struct tier_keep *keep;   /* dram: NULL: its memory ends with the process */
	struct tier_pace pace;          /* nvme; take NULL: as it comes */
	const char *fault; /* fault: "seed=N,write_eio=P,...,delay_us=N", keys in tiers/fault.h, P in 1/1000 */
	const struct tier_ops *lower_ops; /* fault: what it wraps */
};

struct tier;

/* Called once per live page found by the restart scan. Return false to have the page freed. */
typedef bool (*tier_found_fn)(void *arg, tier_addr addr, const struct page_meta *m, const struct seq_record *s);

struct tier_ops {
	const char *name;
	unsigned caps;
	/* May block. On failure writes one line (field, value, limit) to err. */
	int (*open)(struct tier **ret, const struct tier_cfg *cfg, char *err, size_t errsize);
	/* May block until I/O in flight ends or its deadline passes. NULL is fine. */
	void (*close)(struct tier *t);
	/* Walk what a previous life left. Before any other use. NULL: nothing to find. */
	int (*scan)(struct tier *t, tier_found_fn fn, void *arg);
	/* Reserve place (write) and buffer (both). -ENOSPC no place, -EAGAIN no buffer now: reap and retry. */
	int (*prepare)(struct tier *t, struct tier_io *io);
	/* Start n prepared requests; never fails as a whole: a request's failure is its res. */
	void (*submit)(struct tier *t, struct tier_io *const *ios, unsigned n);
	/* Up to max finished requests. A failed write's place is already free (addr = NONE). */
	unsigned (*reap)(struct tier *t, struct tier_io **ret, unsigned max);
	/* Give back the buffer. Also undoes a prepare that was never submitted (a write's place too). */
	void (*release)(struct tier *t, struct tier_io *io);
	/* The page at addr is dead. `bytes` as given at the write. Never while it is being read. */
	void (*free)(struct tier *t, tier_addr addr, uint32_t bytes);
	/* The page stays, but no later life shall find it. NULL: it can not be had. */
	void (*forget)(struct tier *t, tier_addr addr);
	/*
	 * Would a later life find a private page of so many bytes with these positions, once it is written? NULL:
	 * as durable() says. Pages that a later life finds are not to be traded for one that it would not.
	 */
	bool (*finds)(struct tier *t, uint32_t bytes, const uint64_t *pos, uint32_t pos_words);
	/* Flush what is buffered so that it survives a restart. May block. NULL for volatile tiers. */
	int (*sync)(struct tier *t);
	/*
	 * Would a restart find the page that was written to addr? 1 yes, 0 not yet, -EIO it never will, -ESTALE
	 * no page lives there. soon: what is missing is begun now, at the price of a segment that is not full.
	 * seals: rises when an answer may have changed. Both NULL where pages are found as soon as they are
	 * written, or never.
	 */
	int (*durable)(struct tier *t, tier_addr addr, bool soon);
	uint64_t (*seals)(struct tier *t);
	int (*event_fd)(struct tier *t); /* -1 when everything completes in submit */
	void (*stat)(struct tier *t, struct tier_stat *ret);
	/*
	 * Housekeeping from a timer: cleaning, deadlines. Where the cleaner moves a live page it calls
	 * moved(arg, meta, old, new) once the copy is durable; the owner answers false when the page died.
	 */
	void (*tick)(struct tier *t,
		     bool (*moved)(void *arg, const struct page_meta *m, tier_addr from, tier_addr to),
		     void *arg);
	/*
	 * Published memory, all NULL in tiers that have none. A page written with an owner lies in a segment of
	 * that owner alone: published (shm/seg.h), never punched, and with a number that no other segment has
	 * had while the owner was held.
	 *
	 * hold: from now on clients of the owner may name its segments, so emptied ones stay, for its next
	 * pages. Off: empty ones are closed at once, the others as they become empty. 0 or -ENOMEM.
	 */
	int (*hold)(struct tier *t, uint64_t owner, bool on);
	/* The segment's descriptor, which stays the tier's, and its size; -ENOENT: the owner has no such
	 * segment. */
	int (*segment)(struct tier *t, uint64_t owner, uint32_t number, uint64_t *ret_bytes);
	void (*owner_stat)(struct tier *t, uint64_t owner, struct tier_owner *ret);
	/*
	 * Memory that the host wants back, both NULL in tiers that hold none.
	 *
	 * limit: from now on pages may take this many bytes, whatever the capacity; UINT64_MAX: no limit. What
	 * is there stays. trim: private memory in which no page lies goes back to the host, up to about `bytes`
	 * of it; returns how much did.
	 */
	void (*limit)(struct tier *t, uint64_t bytes);
	uint64_t (*trim)(struct tier *t, uint64_t bytes);
	/*
	 * revoke: choose published segments with about so much memory; returns how much was chosen. From now on
	 * their pages are to be moved and freed, and their owners get no new places until they are gone or the
	 * limit is lifted. revoked: the page at addr lies in one. reclaim: close those in which no page lies
	 * and that no other process has; returns how much memory that was. All NULL without published memory.
	 */
	uint64_t (*revoke)(struct tier *t, uint64_t bytes);
	bool (*revoked)(struct tier *t, tier_addr addr);
	uint64_t (*reclaim)(struct tier *t);
	/*
	 * Nodes, both NULL in tiers that know none. where: the index of the one on which the page at addr
	 * should lie; -1: none in particular. shun: from now on these, a bit for each index, get pages only
	 * where no other node has room.
	 */
	int (*where)(struct tier *t, tier_addr addr);
	void (*shun)(struct tier *t, uint32_t nodes);
};

static inline bool tier_published(tier_addr addr)
{
	return addr != TIER_ADDR_NONE && (addr & TIER_ADDR_PUBLISHED);
}
/* Of a published address: its segment's number, and the page's offset in it, in bytes. */
static inline uint32_t tier_segment(tier_addr addr)
{
	return (uint32_t)(addr >> 32) & 0xffffff;
}
static inline uint64_t tier_offset(tier_addr addr)
{
	return (addr & UINT32_MAX) * 4096;
}

struct tier { /* first member of every tier's own struct */
	const struct tier_ops *ops;
};

/* CRC32C of a page: payload checksum seeded by identity. */
uint32_t page_crc_seed(const struct page_ident *id);

/* The registry: NULL-terminated. */
extern const struct tier_ops *const tier_registry[];
const struct tier_ops *tier_find(const char *name);
extern const struct tier_ops tier_dram_ops, tier_nvme_ops, tier_fault_ops;
