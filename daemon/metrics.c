/* SPDX-License-Identifier: MIT */
/*
 * HTTP for one reader or a few, with libmicrohttpd inside the event loop: its epoll descriptor is one of ours.
 *
 * What a scraper can cost is bounded: 8 connections of 4 KiB each, one request and at most 5 s for each of
 * them, and one rendering of the text in a tenth of a second however many ask. Runtimes go first.
 */
#include <microhttpd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include "daemon/metrics.h"
#include "shm/util.h"

#define CONNECTIONS 8u
#define CONNECTION_MEMORY ((size_t)4096) /* request line, headers and answer's headers */
#define IDLE_S 3u
#define LIFE_NS UINT64_C(5000000000) /* of a connection, however slowly it reads or writes */
#define FRESH_NS UINT64_C(100000000) /* a text of this age is given again */
#define TICK_US 1000000u
#define PRIORITY (SD_EVENT_PRIORITY_NORMAL + 10)
#define CONTENT_TYPE "text/plain; version=0.0.4; charset=utf-8"

struct metrics {
	struct core *core;
	struct MHD_Daemon *http;
	sd_event_source *io, *tick;
	struct MHD_Response *text; /* the last one, or NULL */
	uint64_t text_ns;
	struct scraper {
		struct MHD_Connection *who; /* NULL: free */
		uint64_t since_ns;
	} scraper[CONNECTIONS];
	unsigned scrapers;
};

/* ---- answers ------------------------------------------------------------------------- */

/* The text as it is now, or was a moment ago; NULL: out of memory. */
static struct MHD_Response *current(struct metrics *m)
{
	uint64_t now = now_ns();
	struct probes_stat p;
	struct core_stat s;
	size_t n = 0;
	char *text;

	if (m->text && now - m->text_ns < FRESH_NS)
		return m->text;
	if (m->text)
		MHD_destroy_response(m->text); /* who still sends it has a reference */
	core_stat(m->core, &s);
	probes_stat(m->core, &p);
	text = metrics_text(&s, &p, &n);
	m->text = text ? MHD_create_response_from_buffer(n, text, MHD_RESPMEM_MUST_FREE) : NULL;
	if (!m->text)
		free(text);
	else
		MHD_add_response_header(m->text, MHD_HTTP_HEADER_CONTENT_TYPE, CONTENT_TYPE);
	m->text_ns = now;
	return m->text;
}

static enum MHD_Result say(struct MHD_Connection *c, unsigned status, const char *line)
{
	struct MHD_Response *r =
		MHD_create_response_from_buffer(strlen(line), (void *)(uintptr_t)line, MHD_RESPMEM_PERSISTENT);
	enum MHD_Result ok;

	if (!r)
		return MHD_NO;
	MHD_add_response_header(r, MHD_HTTP_HEADER_CONTENT_TYPE, "text/plain; charset=utf-8");
	MHD_add_response_header(r, MHD_HTTP_HEADER_CONNECTION, "close");
	if (status == MHD_HTTP_METHOD_NOT_ALLOWED)
		MHD_add_response_header(r, MHD_HTTP_HEADER_ALLOW, "GET, HEAD");
	ok = MHD_queue_response(c, status, r);
	MHD_destroy_response(r);
	return ok;
}

static enum MHD_Result on_request(void *arg, struct MHD_Connection *c, const char *url, const char *method,
				  const char *version, const char *upload, size_t *upload_bytes, void **state)
{
	struct metrics *m = arg;
	struct MHD_Response *r;

	if (strcmp(method, MHD_HTTP_METHOD_GET) && strcmp(method, MHD_HTTP_METHOD_HEAD))
		return say(c, MHD_HTTP_METHOD_NOT_ALLOWED, "GET or HEAD\n");
	if (!strcmp(url, "/-/healthy"))
		return core_healthy(m->core)
			       ? say(c, MHD_HTTP_OK, "healthy\n")
			       : say(c, MHD_HTTP_SERVICE_UNAVAILABLE, "a thread does not answer\n");
	if (strcmp(url, "/metrics"))
		return say(c, MHD_HTTP_NOT_FOUND, "/metrics or /-/healthy\n");
	r = current(m);
	return r ? MHD_queue_response(c, MHD_HTTP_OK, r) : MHD_NO;
}

/* ---- connections ---------------------------------------------------------------------- */

static void on_connection(void *arg, struct MHD_Connection *c, void **socket_context,
			  enum MHD_ConnectionNotificationCode code)
{
	struct metrics *m = arg;
	struct MHD_Connection *was = code == MHD_CONNECTION_NOTIFY_STARTED ? NULL : c;

	for (unsigned i = 0; i < CONNECTIONS; i++)
		if (m->scraper[i].who == was) {
			m->scraper[i].who = was ? NULL : c;
			m->scraper[i].since_ns = now_ns();
			m->scrapers += was ? -1u : 1u;
			return;
		}
}

/* Who is here too long reads as gone: libmicrohttpd only knows how long a connection was idle. */
static void end_old(struct metrics *m)
{
	uint64_t now = now_ns();

	for (unsigned i = 0; i < CONNECTIONS; i++) {
		struct scraper *s = &m->scraper[i];
		const union MHD_ConnectionInfo *info;

		if (!s->who || now - s->since_ns < LIFE_NS)
			continue;
		info = MHD_get_connection_info(s->who, MHD_CONNECTION_INFO_CONNECTION_FD);
		if (info)
			shutdown(info->connect_fd, SHUT_RDWR);
	}
}

/* Time passes for connections only while there are some. */
static void run(struct metrics *m)
{
	MHD_run(m->http);
	if (!m->scrapers) {
		sd_event_source_set_enabled(m->tick, SD_EVENT_OFF);
	} else if (!sd_event_source_get_enabled(m->tick, NULL)) { /* not put off by what they send */
		sd_event_source_set_time_relative(m->tick, TICK_US);
		sd_event_source_set_enabled(m->tick, SD_EVENT_ONESHOT);
	}
}

static int on_io(sd_event_source *src, int fd, uint32_t revents, void *arg)
{
	run(arg);
	return 0;
}

static int on_tick(sd_event_source *src, uint64_t usec, void *arg)
{
	end_old(arg);
	run(arg);
	return 0;
}

/* ---- life ----------------------------------------------------------------------------- */

static int watch(struct metrics *m, sd_event *ev)
{
	const union MHD_DaemonInfo *info = MHD_get_daemon_info(m->http, MHD_DAEMON_INFO_EPOLL_FD);
	int r = info ? sd_event_add_io(ev, &m->io, info->epoll_fd, EPOLLIN, on_io, m) : -EIO;

	if (r >= 0)
		r = sd_event_add_time_relative(ev, &m->tick, CLOCK_MONOTONIC, TICK_US, TICK_US / 10, on_tick,
					       m);
	if (r >= 0)
		r = sd_event_source_set_priority(m->io, PRIORITY);
	if (r >= 0)
		r = sd_event_source_set_priority(m->tick, PRIORITY);
	if (r >= 0)
		r = sd_event_source_set_enabled(m->tick, SD_EVENT_OFF);
	return r;
}

int metrics_open(struct metrics **ret, struct core *c, sd_event *ev, int fd)
{
	struct metrics *m = calloc(1, sizeof(*m));
	int r;

	if (!m) {
		close(fd);
		return -ENOMEM;
	}
	m->core = c;
	m->http = MHD_start_daemon(MHD_USE_EPOLL, 0, NULL, NULL, on_request, m, MHD_OPTION_LISTEN_SOCKET, fd,
				   MHD_OPTION_CONNECTION_LIMIT, CONNECTIONS, MHD_OPTION_CONNECTION_MEMORY_LIMIT,
				   CONNECTION_MEMORY, MHD_OPTION_CONNECTION_TIMEOUT, IDLE_S,
				   MHD_OPTION_STRICT_FOR_CLIENT, 1, MHD_OPTION_NOTIFY_CONNECTION, on_connection,
				   m, MHD_OPTION_END);
	if (!m->http)
		close(fd);
	r = m->http ? watch(m, ev) : -EIO;
	if (r < 0) {
		metrics_close(m);
		return r;
	}
	*ret = m;
	return 0;
}

void metrics_close(struct metrics *m)
{
	if (!m)
		return;
	sd_event_source_disable_unref(m->io);
	sd_event_source_disable_unref(m->tick);
	if (m->http)
		MHD_stop_daemon(m->http);
	if (m->text)
		MHD_destroy_response(m->text);
	free(m);
}
