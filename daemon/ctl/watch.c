/* SPDX-License-Identifier: MIT */
/* Follow the feed: a read-only mapping, polled; the daemon does not know that we look. */
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include "daemon/ctl/ctl.h"
#include "daemon/ctl/table.h"
#include "ipc/sock.h"
#include "shm/feed.h"
#include "shm/seg.h"
#include "shm/util.h"

#define POLL_NS 20000000u

static const char *const type_names[FEED_TYPES] = {
	[FEED_NONE] = "none",         [FEED_SEQ_OPEN] = "open", [FEED_SEQ_CLOSE] = "close",
	[FEED_PLAN] = "plan",         [FEED_READY] = "ready",   [FEED_ACK] = "ack",
	[FEED_CANCEL] = "cancel",     [FEED_MOVE] = "move",     [FEED_DROP] = "drop",
	[FEED_MISS] = "miss",         [FEED_CLIENT] = "client", [FEED_ADMIN] = "admin",
	[FEED_PRESSURE] = "pressure",
};

static const char *type_name(const struct feed_event *e)
{
	return e->type < FEED_TYPES ? type_names[e->type] : "?";
}

static const char *tier_name(unsigned t)
{
	static const char *const names[] = {"device", "dram", "nvme"};

	return t < ARRAY_SIZE(names) ? names[t] : "-";
}

json_t *event_json(const struct feed_event *e)
{
	char handle[24];

	snprintf(handle, sizeof(handle), "0x%" PRIx64, e->seq);
	return json_pack("{s:I,s:s,s:s,s:I,s:I,s:[i,i,i,i],s:s,s:s,s:i,s:I}", "time_ns", (json_int_t)e->time_ns,
			 "type", type_name(e), "seq", handle, "plan", (json_int_t)e->plan, "bytes",
			 (json_int_t)e->bytes, "rows", (int)e->rows[0], (int)e->rows[1], (int)e->rows[2],
			 (int)e->rows[3], "from", tier_name(e->from), "to", tier_name(e->to), "lane_low",
			 (int)e->lane_lo, "client", (json_int_t)e->client);
}

static void detail(const struct feed_event *e, char *buf, size_t size)
{
	*buf = 0;
	switch (e->type) {
	case FEED_PLAN:
		snprintf(buf, size, "#%" PRIu64 " keep %u, out %u, in %u, drop %u rows", e->plan, e->rows[0],
			 e->rows[1], e->rows[2], e->rows[3]);
		break;
	case FEED_READY:
	case FEED_ACK:
	case FEED_CANCEL:
		snprintf(buf, size, "#%" PRIu64, e->plan);
		break;
	case FEED_MOVE:
		snprintf(buf, size, "%s to %s, %u rows, %s", tier_name(e->from), tier_name(e->to), e->rows[0],
			 fmt_bytes(e->bytes));
		break;
	case FEED_DROP:
		snprintf(buf, size, "%u rows", e->rows[0]);
		break;
	case FEED_MISS:
		snprintf(buf, size, "%s, %u rows",
			 e->plan == EBADMSG ? "checksum mismatch" : strerror((int)e->plan), e->rows[0]);
		break;
	case FEED_CLIENT:
		snprintf(buf, size, "client %" PRIu64 " %s", e->plan, e->bytes ? "connected" : "left");
		break;
	default:
		if (e->client)
			snprintf(buf, size, "client %u", e->client);
	}
}

void event_text(const struct feed_event *e, char *buf, size_t size)
{
	time_t s = (time_t)(e->time_ns / 1000000000u);
	char clock[16], handle[24] = "-", what[80];
	struct tm tm;

	localtime_r(&s, &tm);
	strftime(clock, sizeof(clock), "%H:%M:%S", &tm);
	if (e->seq)
		snprintf(handle, sizeof(handle), "0x%" PRIx64, e->seq);
	detail(e, what, sizeof(what));
	snprintf(buf, size, "%s.%03u %-6s %-18s %s", clock, (unsigned)(e->time_ns / 1000000u % 1000u),
		 type_name(e), handle, what);
}

static void print_event(const struct ctl *c, const struct feed_event *e)
{
	char line[160];

	if (c->json) {
		json_t *j = event_json(e);

		ctl_print_json(j);
		json_decref(j);
		return;
	}
	event_text(e, line, sizeof(line));
	puts(line);
}

static void print_lost(const struct ctl *c, uint64_t lost)
{
	if (c->json)
		printf("{\"lost\":%" PRIu64 "}\n", lost);
	else
		printf("-- %" PRIu64 " events lost --\n", lost);
}

static int follow(struct ctl *c, struct feed_reader *r)
{
	uint64_t seen = 0;

	for (;;) {
		struct feed_event e;
		uint64_t lost = 0;
		int got = feed_read(r, &e, &lost);

		if (lost)
			print_lost(c, lost);
		if (got) {
			print_event(c, &e);
			if (c->count && ++seen == c->count)
				return CTL_OK;
			continue;
		}
		/* No event wakes a reader of the feed; the socket only tells when the daemon is gone. */
		if (sock_wait(c->fd, POLLIN, now_ns() + POLL_NS))
			return ctl_fail(CTL_UNREACHABLE, "%s: the daemon hung up", c->socket);
	}
}

int ctl_feed_open(struct ctl *c, bool past, struct seg *ret, struct feed_reader *ret_reader)
{
	static const char *const argv[] = {"watch"};
	struct seg seg = SEG_INIT;
	json_t *j = NULL;
	int fd = -1, r = ctl_call(c, 1, argv, &j, &fd);
	size_t bytes = (size_t)json_integer_value(json_object_get(j, "feed_bytes"));

	json_decref(j);
	if (r)
		return r;
	r = fd < 0 ? -EPROTO : seg_map(&seg, SEG_PUBLISHED, fd, bytes);
	if (r < 0) {
		close_fdp(&fd);
		return ctl_fail(CTL_UNREACHABLE, "feed: %s", strerror(-r));
	}
	if (feed_reader_init(ret_reader, seg.addr, seg.size, past) < 0) {
		seg_close(&seg);
		return ctl_fail(CTL_UNREACHABLE, "feed: not a kvtierd's feed");
	}
	*ret = seg;
	return CTL_OK;
}

int ctl_watch(struct ctl *c, unsigned argc, const char *const argv[])
{
	struct feed_reader reader;
	struct seg seg;
	int r;

	(void)argc;
	(void)argv;
	r = ctl_feed_open(c, c->past, &seg, &reader);
	if (r)
		return r;
	r = follow(c, &reader);
	seg_close(&seg);
	return r;
}
