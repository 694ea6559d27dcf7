/* SPDX-License-Identifier: MIT */
/*
 * kvtierd: options, signals, what systemd wants to know, and the event loop.
 * The work is behind daemon/core.h.
 */
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <syslog.h>
#include <systemd/sd-daemon.h>
#include "daemon/admin.h"
#include "daemon/fdstore.h"
#include "daemon/listen.h"
#include "daemon/metrics.h"
#include "shm/util.h"

#define CONFIG_FILE KVT_SYSCONFDIR "/kvtier/kvtierd.conf"
#define DRAIN_BOUND_US (25 * 1000000ull) /* the core ends by itself at 20 s; this is the net */
#define TICK_US (10 * 1000000ull)        /* health and status, without a watchdog */
#define TICK_SLACK_US 100000ull

enum { EXIT_OK = 0, EXIT_RUNTIME = 1, EXIT_USAGE = 2 };

struct app {
	sd_event *ev;
	struct core *core;
	struct metrics *metrics; /* NULL: nobody reads them */
	struct config cfg;
	struct listeners listeners;
	struct fdstore store;
	const char *file;    /* -c; NULL: CONFIG_FILE if there is one */
	const char *run_dir; /* --run-dir; overrides the file */
	uint64_t tick_us;
	bool draining, sick;
	char status[160];
};

/* ---- configuration -------------------------------------------------------------- */

static int load_config(const struct app *app, struct config *ret, char *err, size_t errsize)
{
	const char *file = app->file ?: CONFIG_FILE;

	if (!app->file && access(file, F_OK) < 0 && errno == ENOENT) {
		config_defaults(ret);
	} else {
		int r = config_load(ret, file, err, errsize);

		if (r < 0)
			return r;
	}
	if (!app->run_dir)
		return 0;
	if (*app->run_dir != '/' || strlen(app->run_dir) >= sizeof(ret->run_dir)) {
		snprintf(err, errsize, "--run-dir: \"%.64s\", must be an absolute path of at most %zu bytes",
			 app->run_dir, sizeof(ret->run_dir) - 1);
		return -EINVAL;
	}
	strcpy(ret->run_dir, app->run_dir);
	return config_check(ret, err, errsize);
}

static void tell_change(void *arg, const char *line)
{
	log_line(LOG_NOTICE, "configuration: %s", line);
	admin_add_change(line);
}

/* To the log and to who asked. */
static void tell_changes(const struct config *old, const struct config *new_)
{
	admin_no_changes();
	config_changes(old, new_, tell_change, NULL);
}

static int reload(void *arg, char *err, size_t errsize)
{
	struct app *app = arg;
	_cleanup_free_ struct config *cfg = malloc(sizeof(*cfg));
	struct timespec ts;
	int r;

	if (!cfg) {
		snprintf(err, errsize, "out of memory");
		return KVT_E_NOMEM;
	}
	clock_gettime(CLOCK_MONOTONIC, &ts);
	sd_notifyf(0, "RELOADING=1\nMONOTONIC_USEC=%llu",
		   (unsigned long long)ts.tv_sec * 1000000ull + (unsigned long long)ts.tv_nsec / 1000);
	r = load_config(app, cfg, err, errsize) < 0 ? KVT_E_INVAL : 0;
	if (!r && config_reloadable(&app->cfg, cfg, err, errsize) < 0)
		r = KVT_E_INVAL;
	if (!r)
		r = core_reload(app->core, cfg, err, errsize);
	if (!r) {
		tell_changes(&app->cfg, cfg);
		app->cfg = *cfg;
		log_set_level(cfg->log_level);
		log_line(LOG_INFO, "configuration reloaded from %s",
			 *cfg->file ? cfg->file : "the built-in defaults");
	} else {
		log_line(LOG_ERR, "configuration kept as it was: %s", err);
	}
	sd_notify(0, "READY=1");
	return r;
}

/* ---- ending ------------------------------------------------------------------------ */

static void drained(void *arg)
{
	struct app *app = arg;

	log_line(LOG_INFO, "drained");
	sd_event_exit(app->ev, EXIT_OK);
}

static int drain_too_long(sd_event_source *s, uint64_t usec, void *arg)
{
	struct app *app = arg;

	log_line(LOG_WARNING, "drain cut off after %llu s", DRAIN_BOUND_US / 1000000);
	return sd_event_exit(app->ev, EXIT_OK);
}

static int start_drain(sd_event_source *s, void *arg)
{
	struct app *app = arg;

	sd_notify(0, "STOPPING=1\nSTATUS=draining");
	log_line(LOG_INFO, "draining");
	sd_event_add_time_relative(app->ev, NULL, CLOCK_MONOTONIC, DRAIN_BOUND_US, TICK_SLACK_US,
				   drain_too_long, app);
	core_drain(app->core, drained, app);
	return 0;
}

/* May be called from inside the core: the drain itself begins in the loop's next turn. */
static void request_drain(void *arg)
{
	struct app *app = arg;

	if (app->draining)
		return;
	app->draining = true;
	if (sd_event_add_defer(app->ev, NULL, start_drain, app) < 0)
		sd_event_exit(app->ev, EXIT_RUNTIME);
}

static int on_terminate(sd_event_source *s, const struct signalfd_siginfo *si, void *arg)
{
	struct app *app = arg;

	if (app->draining) {
		log_line(LOG_WARNING, "second signal: drain cut off");
		return sd_event_exit(app->ev, EXIT_OK);
	}
	request_drain(app);
	return 0;
}

static int on_hangup(sd_event_source *s, const struct signalfd_siginfo *si, void *arg)
{
	char err[512];

	reload(arg, err, sizeof(err));
	return 0;
}

/* ---- what systemd is told ------------------------------------------------------------ */

static void tell_status(struct app *app)
{
	struct core_stat s;
	char text[sizeof(app->status)];

	core_stat(app->core, &s);
	snprintf(text, sizeof(text), "clients %llu, sequences %llu%s%s%s", (unsigned long long)s.clients,
		 (unsigned long long)s.seqs, s.observe ? ", observing" : "", s.frozen ? ", frozen" : "",
		 s.draining ? ", draining" : "");
	if (!strcmp(text, app->status))
		return;
	strcpy(app->status, text);
	sd_notifyf(0, "STATUS=%s", text);
}

static int on_tick(sd_event_source *s, uint64_t usec, void *arg)
{
	struct app *app = arg;
	bool healthy = core_healthy(app->core);

	if (healthy)
		sd_notify(0, "WATCHDOG=1");
	if (healthy == app->sick)
		log_line(healthy ? LOG_NOTICE : LOG_CRIT,
			 healthy ? "healthy again" : "a worker or I/O thread does not answer");
	app->sick = !healthy;
	tell_status(app);
	sd_event_source_set_time_relative(s, app->tick_us);
	return sd_event_source_set_enabled(s, SD_EVENT_ONESHOT);
}

/* ---- starting -------------------------------------------------------------------------- */

static int add_events(struct app *app)
{
	uint64_t watchdog_us = 0;
	int r;

	app->tick_us = sd_watchdog_enabled(0, &watchdog_us) > 0 ? watchdog_us / 3 : TICK_US;
	r = sd_event_add_signal(app->ev, NULL, SIGTERM, on_terminate, app);
	if (r >= 0)
		r = sd_event_add_signal(app->ev, NULL, SIGINT, on_terminate, app);
	if (r >= 0)
		r = sd_event_add_signal(app->ev, NULL, SIGHUP, on_hangup, app);
	if (r >= 0)
		r = sd_event_add_time_relative(app->ev, NULL, CLOCK_MONOTONIC, app->tick_us, TICK_SLACK_US,
					       on_tick, app);
	return r < 0 ? r : 0;
}

static int serve_sockets(struct app *app, char *err, size_t errsize)
{
	struct listeners *l = &app->listeners;

	for (unsigned i = 0; i < l->n; i++) {
		int r = core_listen(app->core, TAKE_FD(l->fd[i]), (int)i - 1);

		if (r < 0) {
			snprintf(err, errsize, "socket %s: cannot be served (%d)", l->path[i], r);
			return r;
		}
	}
	if (l->metrics >= 0) {
		int r = metrics_open(&app->metrics, app->core, app->ev, TAKE_FD(l->metrics));

		if (r < 0) {
			snprintf(err, errsize, "metrics: %s", strerror(-r));
			return r;
		}
	}
	return 0;
}

/* The sockets first: a second daemon must fail before it touches the tiers' files. */
static int start(struct app *app, char *err, size_t errsize)
{
	int r = sd_event_new(&app->ev);

	if (r < 0) {
		snprintf(err, errsize, "event loop: %s", strerror(-r));
		return r;
	}
	fdstore_open(&app->store);
	r = listeners_open(&app->listeners, &app->cfg, &app->store, err, errsize);
	if (r < 0)
		return r;
	r = core_new_with(&app->core, &app->cfg, &(struct core_seams){.keep = fdstore_keep(&app->store)},
			  app->ev, err, errsize);
	if (r < 0)
		return r;
	fdstore_sweep(&app->store);
	admin_set_config(&app->cfg);
	admin_set_hooks(request_drain, reload, app);
	r = add_events(app);
	if (r < 0) {
		snprintf(err, errsize, "event loop: %s", strerror(-r));
		return r;
	}
	return serve_sockets(app, err, errsize);
}

static int loop(struct app *app)
{
	int r = 0, code = EXIT_RUNTIME;

	while (r >= 0 && sd_event_get_state(app->ev) != SD_EVENT_FINISHED)
		r = core_turn(app->core);
	if (r >= 0)
		r = sd_event_get_exit_code(app->ev, &code);
	return r < 0 ? r : code;
}

static int run(struct app *app)
{
	char err[512] = "";
	int r = start(app, err, sizeof(err));

	if (r < 0) {
		log_line(LOG_ERR, "%s", err);
		sd_notifyf(0, "STATUS=%s\nERRNO=%d", err, r > -4096 ? -r : EIO);
		r = EXIT_RUNTIME;
	} else {
		log_line(LOG_INFO, "kvtierd %s serves %u tenant%s, configuration: %s", KVT_VERSION,
			 app->cfg.tenants, app->cfg.tenants == 1 ? "" : "s",
			 *app->cfg.file ? app->cfg.file : "built-in defaults");
		sd_notify(0, "READY=1");
		tell_status(app);
		r = loop(app);
		if (r < 0) {
			log_line(LOG_ERR, "event loop: %s", strerror(-r));
			r = EXIT_RUNTIME;
		}
	}
	listeners_close(&app->listeners);
	metrics_close(app->metrics);
	core_free(app->core);
	fdstore_close(&app->store);
	sd_event_unref(app->ev);
	return r;
}

/* Before any thread exists: they inherit the mask. */
static void prepare_process(void)
{
	struct rlimit l;
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGINT);
	sigaddset(&set, SIGHUP);
	sigprocmask(SIG_BLOCK, &set, NULL);
	signal(SIGPIPE, SIG_IGN);
	signal(SIGIO, SIG_IGN); /* of a lease that somebody breaks: seg_alone() */
	umask(0077);
	if (!getrlimit(RLIMIT_NOFILE, &l) && l.rlim_cur < l.rlim_max) {
		l.rlim_cur = l.rlim_max; /* every client costs a handful of descriptors */
		setrlimit(RLIMIT_NOFILE, &l);
	}
}

static void usage(FILE *f)
{
	fprintf(f, "Usage: kvtierd [OPTION]...\n"
		   "Tier KV caches of inference processes over device, DRAM and NVMe.\n\n"
		   "  -c, --config FILE    configuration file (default " CONFIG_FILE ")\n"
		   "      --run-dir DIR    directory of the sockets, instead of the file's run_dir\n"
		   "      --check-config   read the configuration, say whether it is sound, exit\n"
		   "      --print-config   print the whole configuration in effect, exit\n"
		   "      --version        print the version, exit\n"
		   "  -h, --help           print this, exit\n\n"
		   "Exit status: 0 ended as asked, 1 failure while starting or running,\n"
		   "2 bad usage or configuration. See kvtierd(8) and kvtierd.conf(5).\n");
}

int main(int argc, char *argv[])
{
	enum { OPT_RUN_DIR = 256, OPT_CHECK, OPT_PRINT, OPT_VERSION };
	static const struct option options[] = {
		{"config", required_argument, NULL, 'c'},
		{"run-dir", required_argument, NULL, OPT_RUN_DIR},
		{"check-config", no_argument, NULL, OPT_CHECK},
		{"print-config", no_argument, NULL, OPT_PRINT},
		{"version", no_argument, NULL, OPT_VERSION},
		{"help", no_argument, NULL, 'h'},
		{},
	};
	static struct app app;
	bool check = false, print = false;
	char err[512];
	int o;

	while ((o = getopt_long(argc, argv, "c:h", options, NULL)) >= 0) {
		switch (o) {
		case 'c':
			app.file = optarg;
			break;
		case OPT_RUN_DIR:
			app.run_dir = optarg;
			break;
		case OPT_CHECK:
			check = true;
			break;
		case OPT_PRINT:
			print = true;
			break;
		case OPT_VERSION:
			puts("kvtierd " KVT_VERSION);
			return EXIT_OK;
		case 'h':
			usage(stdout);
			return EXIT_OK;
		default:
			fputs("See kvtierd --help.\n", stderr);
			return EXIT_USAGE;
		}
	}
	if (optind < argc) {
		fprintf(stderr, "kvtierd: \"%s\": takes no arguments. See kvtierd --help.\n", argv[optind]);
		return EXIT_USAGE;
	}
	if (load_config(&app, &app.cfg, err, sizeof(err)) < 0) {
		if (check || print)
			fprintf(stderr, "%s\n", err);
		else
			log_line(LOG_ERR, "%s", err);
		return EXIT_USAGE;
	}
	if (print)
		config_print(&app.cfg, STDOUT_FILENO);
	else if (check)
		printf("%s: ok\n", *app.cfg.file ? app.cfg.file : "built-in defaults");
	if (print || check)
		return EXIT_OK;
	log_set_level(app.cfg.log_level);
	prepare_process();
	return run(&app);
}
