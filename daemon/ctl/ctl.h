/* SPDX-License-Identifier: MIT */
#pragma once
/* kvtierctl: one connection, one verb, one exit status. */
#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "shm/feed.h"

struct seg;

enum ctl_exit {
	CTL_OK = 0,
	CTL_REFUSED = 1, /* by the daemon; its line is on stderr */
	CTL_USAGE = 2,
	CTL_UNREACHABLE = 3, /* no daemon there, or it hung up */
	CTL_TIMEOUT = 4,
	CTL_BAD_PAGES = 5, /* verify found some */
};

struct ctl {
	const char *socket;
	uint32_t timeout_ms; /* of each exchange with the daemon */
	bool json;
	bool past;       /* watch: begin with what the feed still holds */
	bool once;       /* top: one frame, as text */
	double interval; /* top: seconds between two looks at the daemon */
	uint64_t count;  /* watch: end after so many events; 0: never */
	struct {
		const char *out, *lane, *policy; /* NULL: not given */
		uint32_t width, rows;            /* 0: not given */
	} plot;
	const char *config, *root; /* doctor: NULL: the installed file, this host */
	int fd;                    /* the connection, -1: none yet */
	uint32_t cookie;
	int refusal; /* KVT_E_* of the last answer that was one */
};

/*
 * Ask the daemon. *ret is its answer (NULL when it has none; the caller's),
 * *ret_fd the descriptor that came with it, or -1 (ret_fd NULL: any is closed). An
 * enum ctl_exit; when not CTL_OK a line is on stderr.
 */
int ctl_call(struct ctl *c, unsigned argc, const char *const argv[], json_t **ret, int *ret_fd);
/* The same, the answer as it came: free() it. */
int ctl_call_text(struct ctl *c, unsigned argc, const char *const argv[], char **ret, int *ret_fd);
/* Keep the lines of ctl_fail() here, the last one only, instead of printing them; NULL: print again. */
void ctl_fail_into(char *buf, size_t size);
/* A line on stderr, then `status`. */
int __attribute__((format(printf, 2, 3))) ctl_fail(int status, const char *fmt, ...);
/* Print JSON, one line. */
void ctl_print_json(const json_t *j);

/*
 * Ask for the feed and map it: *ret is the caller's to close. past: begin with what the
 * feed still holds. An enum ctl_exit, as of ctl_call().
 */
int ctl_feed_open(struct ctl *c, bool past, struct seg *ret, struct feed_reader *ret_reader);
/* An event as one line, in ASCII; as JSON (the caller's). */
void event_text(const struct feed_event *e, char *buf, size_t size);
json_t *event_json(const struct feed_event *e);

/* One per verb that does more than ask and print. */
int ctl_trace(struct ctl *c, unsigned argc, const char *const argv[]);
int ctl_map(struct ctl *c, unsigned argc, const char *const argv[]);
int ctl_plot(struct ctl *c, unsigned argc, const char *const argv[]);
int ctl_ls(struct ctl *c, unsigned argc, const char *const argv[]);
int ctl_watch(struct ctl *c, unsigned argc, const char *const argv[]);
int ctl_top(struct ctl *c, unsigned argc, const char *const argv[]);
int ctl_doctor(struct ctl *c, unsigned argc, const char *const argv[]);
int ctl_verify(struct ctl *c, unsigned argc, const char *const argv[]);

/* What the daemon's JSON looks like to people. */
void show_status(const json_t *j);
void show_seqs(const json_t *list);
void show_seq(const json_t *j);
void show_policies(const json_t *j);
void show_verify(const json_t *j);
void show_version(const json_t *j);
void show_changes(const json_t *j);
