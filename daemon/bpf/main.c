/* SPDX-License-Identifier: MIT */
/*
 * kvtierd-bpf: loads the BPF programs, hands their maps to the daemon, and stays, because programs live as long
 * as who attached them. It needs CAP_BPF and CAP_PERFMON so that the daemon needs nothing.
 */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <poll.h>
#include <pwd.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <systemd/sd-daemon.h>
#include "daemon/bpf/load.h"
#include "ipc/sock.h"
#include "shm/util.h"

#define SOCKET "/run/kvtier-bpf/probes.sock"

static void say(const char *level, const char *text)
{
	fprintf(stderr, "%skvtierd-bpf: %s\n", getenv("JOURNAL_STREAM") ? level : "", text);
}

static void __attribute__((format(printf, 2, 3))) sayf(const char *level, const char *fmt, ...)
{
	char line[300];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(line, sizeof(line), fmt, ap);
	va_end(ap);
	say(level, line);
}

static void usage(FILE *f)
{
	fputs("usage: kvtierd-bpf [--socket PATH] [--user NAME] [--without GROUP,...]\n"
	      "       kvtierd-bpf --check [--without GROUP,...]\n"
	      "  -s, --socket PATH    listen here, unless systemd passes a socket; default " SOCKET "\n"
	      "  -u, --user NAME      who may connect besides root; default kvtier\n"
	      "  -w, --without GROUP  leave these programs out\n"
	      "  -b, --break GROUP    make the kernel refuse these, for tests\n"
	      "  -c, --check          load everything, print what runs, end\n"
	      "  -V, --version        print the version\n"
	      "  -h, --help           print this\n",
	      f);
}

/* The table; 0 when at least what the throttle needs runs. */
static int print_table(const struct load *l)
{
	struct probe_hello h;

	load_hello(l, &h);
	for (unsigned i = 0; i < h.names; i++)
		printf("%-14s %s%s%s\n", h.name[i].name, h.name[i].on ? "on" : "off", h.name[i].on ? "" : ": ",
		       h.name[i].why_off);
	return h.name[0].on ? 0 : 1;
}

static int listen_at(const char *path)
{
	int n = sd_listen_fds(1);

	if (n == 1 && sd_is_socket(SD_LISTEN_FDS_START, AF_UNIX, SOCK_SEQPACKET, 1) > 0) {
		fcntl(SD_LISTEN_FDS_START, F_SETFL, fcntl(SD_LISTEN_FDS_START, F_GETFL) | O_NONBLOCK);
		return SD_LISTEN_FDS_START;
	}
	return n ? -EINVAL : sock_listen(path, 0666, 4); /* who may come in is asked of each */
}

/* Somebody connects. Returns the daemon's connection: the one that is there, or the new one. */
static int greet(struct load *l, int listener, int daemon, uid_t user)
{
	_cleanup_close_ int fd = sock_accept(listener);
	struct sock_peer peer = {.pidfd = -1};
	int maps[PROBE_MAPS], r;
	struct probe_hello h;

	if (fd < 0 || sock_peer(fd, &peer) < 0)
		return daemon;
	close_fdp(&peer.pidfd);
	if (peer.uid && peer.uid != user) {
		sayf("<4>", "process %d of user %u is refused", peer.pid, peer.uid);
		return daemon;
	}
	load_hello(l, &h);
	load_maps(l, maps);
	h.busy = daemon >= 0;
	r = sock_send(fd, &h, sizeof(h), h.busy ? NULL : maps, h.busy ? 0 : PROBE_MAPS);
	if (r < 0 || h.busy)
		return daemon;
	sayf("<6>", "process %d of user %u has the maps", peer.pid, peer.uid);
	return TAKE_FD(fd);
}

static int serve(struct load *l, int listener, uid_t user)
{
	_cleanup_close_ int daemon = -1;
	_cleanup_close_ int sig = -1;
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGINT);
	sigprocmask(SIG_BLOCK, &set, NULL);
	sig = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
	if (sig < 0)
		return -errno;
	sd_notify(0, "READY=1");
	for (;;) {
		struct pollfd p[] = {{.fd = sig, .events = POLLIN},
				     {.fd = listener, .events = POLLIN},
				     {.fd = daemon, .events = POLLIN}};
		char byte;

		if (poll(p, ARRAY_SIZE(p), -1) < 0 && errno != EINTR)
			return -errno;
		if (p[0].revents)
			return 0;
		/* It has nothing to say: whatever comes is its end. */
		if (p[2].revents && (recv(daemon, &byte, 1, MSG_DONTWAIT) >= 0 || errno != EAGAIN)) {
			close(TAKE_FD(daemon));
			load_forget(l);
			say("<6>", "the daemon is gone");
		}
		if (p[1].revents)
			daemon = greet(l, listener, daemon, user);
	}
}

struct options {
	const char *path, *without, *broken, *user;
	bool check;
};

/* -1: go on; else the exit status. */
static int parse(int argc, char **argv, struct options *o)
{
	static const struct option longs[] = {
		{"socket", required_argument, NULL, 's'},  {"user", required_argument, NULL, 'u'},
		{"without", required_argument, NULL, 'w'}, {"break", required_argument, NULL, 'b'},
		{"check", no_argument, NULL, 'c'},         {"version", no_argument, NULL, 'V'},
		{"help", no_argument, NULL, 'h'},          {}};
	int opt;

	while ((opt = getopt_long(argc, argv, "s:u:w:b:cVh", longs, NULL)) >= 0) {
		switch (opt) {
		case 's':
			o->path = optarg;
			break;
		case 'u':
			o->user = optarg;
			break;
		case 'w':
			o->without = optarg;
			break;
		case 'b':
			o->broken = optarg;
			break;
		case 'c':
			o->check = true;
			break;
		case 'V':
			puts("kvtierd-bpf " KVT_VERSION);
			return 0;
		case 'h':
			usage(stdout);
			return 0;
		default:
			usage(stderr);
			return 2;
		}
	}
	if (optind < argc) {
		usage(stderr);
		return 2;
	}
	return -1;
}

/* By name or by number; 0, which may come in anyway, when nobody has that name. */
static uid_t user_id(const char *name)
{
	const struct passwd *pw = getpwnam(name);
	char *rest;
	unsigned long id = strtoul(name, &rest, 10);

	return pw ? pw->pw_uid : *name && !*rest ? (uid_t)id : 0;
}

int main(int argc, char **argv)
{
	struct options o = {.path = SOCKET, .user = "kvtier"};
	_cleanup_close_ int listener = -1;
	struct load *l = NULL;
	char err[256] = "";
	int r = parse(argc, argv, &o);

	if (r >= 0)
		return r;
	r = load_new(&l, o.without, o.broken, err, sizeof(err));
	if (r < 0) {
		sayf("<3>", "%s", err[0] ? err : strerror(-r));
		return 1;
	}
	if (o.check) {
		r = print_table(l);
		load_free(l);
		return r;
	}
	listener = listen_at(o.path);
	if (listener < 0) {
		sayf("<3>", "socket %s: %s", o.path, strerror(-listener));
		load_free(l);
		return 1;
	}
	r = serve(l, listener, user_id(o.user));
	if (r < 0)
		sayf("<3>", "%s", strerror(-r));
	load_free(l);
	return r < 0 ? 1 : 0;
}
