/* SPDX-License-Identifier: MIT */
#pragma once
/*
 * The daemon's configuration: one INI file, every key listed in
 * kvtierd.conf(5); an unknown section or key is refused with file, line and
 * key. Sizes accept K, M, G, T (powers of 1024); shares are in percent with one decimal
 * and kept in permille.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define CONFIG_MAX_KEYS 64u
#define CONFIG_MAX_TENANTS 64
#define CONFIG_PATH 256

struct config_tenant { /* [tenant NAME] */
	char name[32];
	char socket[108];                       /* listening socket; a relative path is below run_dir */
	uint32_t socket_mode;                   /* octal */
	char socket_group[32];                  /* empty: the daemon's own */
	uint32_t max_clients_per_uid, max_seqs; /* sequences in the tenant */
	uint64_t region_bytes;                  /* exchange memory of all its clients */
	uint64_t dram_bytes, nvme_bytes;        /* quota per lower tier; UINT64_MAX: none */
	uint16_t line[CONFIG_MAX_KEYS];         /* of the file, by config_keys[]; 0: not given there */
	bool direct;                            /* its clients may map the DRAM pages of their sequences */
};

enum { /* between what rows of a uniform device budget move */
       CONFIG_ADAPTIVE_NO,
       CONFIG_ADAPTIVE_LANES,  /* lanes of a sequence */
       CONFIG_ADAPTIVE_TENANT, /* and sequences of one user in a tenant, of the same model */
};

struct config_watermarks {
	uint32_t min, low, high;
}; /* permille of capacity that must be free */

struct config {
	char file[CONFIG_PATH];         /* where it came from; empty: built-in defaults */
	uint16_t line[CONFIG_MAX_KEYS]; /* where each key of no tenant stands; 0: not given */
	/* [kvtierd] */
	char run_dir[CONFIG_PATH], admin_socket[108], admin_group[32];
	char bpf_socket[108];  /* of kvtierd-bpf; empty: do not ask it */
	uint32_t workers;      /* threads that score, rank and copy; 0: cores - 1, at least 1 */
	uint32_t log_level;    /* syslog(3) */
	bool observe;          /* mode=observe: plans are computed, counted and not published */
	uint32_t orphan_ttl_s; /* sequences found after a restart are kept this long */
	/* [dram] */
	uint64_t dram_size, dram_segment;
	struct config_watermarks dram_marks;
	int dram_node; /* or enum tier_node_* of tiers/tier.h: client, interleave, off */
	bool dram_huge;
	char dram_fault[128]; /* fault spec for tests; empty: none */
	/* [nvme] */
	bool nvme_enabled;
	char nvme_path[CONFIG_PATH];
	uint64_t nvme_size, nvme_segment, nvme_staging;
	struct config_watermarks
		nvme_marks; /* only min is configured: the tier's cleaner has its own reserve */
	uint32_t nvme_depth, nvme_deadline_ms;
	bool nvme_io_uring, nvme_prealloc, nvme_throttle;
	uint32_t nvme_throttle_ms;
	char nvme_fault[128];
	/* [pressure] */
	bool pressure_shrink;
	char pressure_psi[32]; /* "some 150ms/2s", or "no" */
	uint64_t pressure_reserve, pressure_floor;
	uint32_t pressure_deadline_ms;
	/* [policy] */
	char policy[32];             /* default policy */
	char fallback[32];           /* runs when the default cannot (no weight file for the model) */
	char model_dir[CONFIG_PATH]; /* <model name>.kvp */
	uint32_t protect_first, protect_last, hysteresis_permille, slack_rows;
	uint32_t adaptive; /* CONFIG_ADAPTIVE_*: device budgets follow what rows are worth, where scores are
			    * calibrated */
	uint64_t seed;
	/* [budget]: default shares of a sequence's rows, permille of the watermark; all zero: keep everything
	 * on the device */
	uint32_t budget_device, budget_dram, budget_nvme;
	/* [metrics] */
	char metrics_listen[108]; /* path, 127.0.0.1:PORT, [::1]:PORT; empty: nowhere */
	/* [tenant ...] */
	struct config_tenant tenant[CONFIG_MAX_TENANTS];
	uint32_t tenants;
};

/* Fill with the built-in defaults (one tenant, "default"). */
void config_defaults(struct config *c);
/* Read `path` over the defaults. On failure err holds one line: file:line: key: value, limit. */
int config_load(struct config *c, const char *path, char *err, size_t errsize);
/* The same relations that config_load checks, after an option changed a field. 0 or -EINVAL. */
int config_check(const struct config *c, char *err, size_t errsize);
/* Path of a tenant's socket (index) or of the admin socket (-1). 0 or -ENAMETOOLONG. */
int config_socket_path(const struct config *c, int tenant, char *ret, size_t size);
/* What SIGHUP may not change: returns 0, or -EINVAL with the reason (field, old, new). */
int config_reloadable(const struct config *old, const struct config *new_, char *err, size_t errsize);
/* "[section] key: old -> new" for each key that differs; of configurations that are reloadable. */
void config_changes(const struct config *old, const struct config *new_,
		    void (*each)(void *arg, const char *line), void *arg);
/* Print every key with its value, in config syntax; comments tell its meaning, the default and its reason. */
void config_print(const struct config *c, int fd);
/* Log through the journal's level prefixes on stderr (the only logging in the house). */
void log_set_level(uint32_t level);
void log_line(int level, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/*
 * Lines that clients can cause: 100 at once, then two a second; what is more is counted. One bucket for each
 * tenant, so that nobody drowns what is said of others. The loop's.
 */
struct log_bucket {
	uint64_t full_ns, said_ns; /* when it is full again; when left_out was last told */
	uint64_t left_out;
};
/* Take one line's worth; false: too many, counted. */
bool log_may(struct log_bucket *b);
void log_about(struct log_bucket *b, int level, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
/* Say, every ten seconds at most, how many lines about `whom` were left out. Called now and then. */
void log_left_out(struct log_bucket *b, const char *whom);
