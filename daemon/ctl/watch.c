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

static void print_event_json(const struct feed_event *e)
{
	char handle[24];
	json_t *j;

	snprintf(handle, sizeof(handle), "0x%" PRIx64, e->seq);
	j = json_pack("{s:I,s:s,s:s,s:I,s:I,s:[i,i,i,i],s:s,s:s,s:i,s:I}", "time_ns", (json_int_t)e->time_ns,
		      "type", type_name(e), "seq", handle, "plan", (json_int_t)e->plan, "bytes",
		      (json_int_t)e->bytes, "rows", (int)e->rows[0], (int)e->rows[1], (int)e->rows[2],
		      (int)e->rows[3], "from", tier_name(e->from), "to", tier_name(e->to), "lane_low",
		      (int)e->lane_lo, "client", (json_int_t)e->client);
	ctl_print_json(j);
	json_decref(j);
}

static void print_detail(const struct feed_event *e)
{
	switch (e->type) {
	case FEED_PLAN:
		printf("#%" PRIu64 " keep %u, out %u, in %u, drop %u rows", e->plan, e->rows[0], e->rows[1],
		       e->rows[2], e->rows[3]);
		break;
	case FEED_READY:
	case FEED_ACK:
	case FEED_CANCEL:
		printf("#%" PRIu64, e->plan);
		break;
	case FEED_MOVE:
		printf("%s to %s, %u rows, %s", tier_name(e->from), tier_name(e->to), e->rows[0],
		       fmt_bytes(e->bytes));
		break;
	case FEED_DROP:
		printf("%u rows", e->rows[0]);
		break;
	case FEED_MISS:
		printf("%s, %u rows", e->plan == EBADMSG ? "checksum mismatch" : strerror((int)e->plan),
		       e->rows[0]);
		break;
	case FEED_CLIENT:
		printf("client %" PRIu64 " %s", e->plan, e->bytes ? "connected" : "left");
		break;
	default:
		if (e->client)
			printf("client %u", e->client);
	}
}

static void print_event(const struct feed_event *e)
{
	time_t s = (time_t)(e->time_ns / 1000000000u);
	char clock[16], handle[24] = "-";
	struct tm tm;

	localtime_r(&s, &tm);
	strftime(clock, sizeof(clock), "%H:%M:%S", &tm);
	if (e->seq)
		snprintf(handle, sizeof(handle), "0x%" PRIx64, e->seq);
	printf("%s.%03u %-6s %-18s ", clock, (unsigned)(e->time_ns / 1000000u % 1000u), type_name(e), handle);
	print_detail(e);
	putchar('\n');
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
			if (c->json)
				print_event_json(&e);
			else
				print_event(&e);
			if (c->count && ++seen == c->count)
				return CTL_OK;
			continue;
		}
		/* No event wakes a reader of the feed; the socket only tells when the daemon is gone. */
		if (sock_wait(c->fd, POLLIN, now_ns() + POLL_NS))
			return ctl_fail(CTL_UNREACHABLE, "%s: the daemon hung up", c->socket);
	}
}

int ctl_watch(struct ctl *c, unsigned argc, const char *const argv[])
{
	struct seg seg = SEG_INIT;
	struct feed_reader reader;
	json_t *j = NULL;
	int fd = -1, r = ctl_call(c, argc, argv, &j, &fd);
	size_t bytes = (size_t)json_integer_value(json_object_get(j, "feed_bytes"));

	json_decref(j);
	if (r)
		return r;
	r = fd < 0 ? -EPROTO : seg_map(&seg, SEG_PUBLISHED, fd, bytes);
	if (r < 0) {
		close_fdp(&fd);
		return ctl_fail(CTL_UNREACHABLE, "feed: %s", strerror(-r));
	}
	r = feed_reader_init(&reader, seg.addr, seg.size, c->past);
	r = r < 0 ? ctl_fail(CTL_UNREACHABLE, "feed: not a kvtierd's feed") : follow(c, &reader);
	seg_close(&seg);
	return r;
}
