/* SPDX-License-Identifier: MIT */
/* kvtierctl: options, and what each verb does besides asking the daemon. */
#include <getopt.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include "daemon/ctl/ctl.h"
#include "daemon/ctl/words.h"
#include "shm/util.h"

#define DEFAULT_TIMEOUT_MS 5000
#define VERIFY_POLL_NS 100000000

/* Verbs whose answer is more than yes; the others ask and are silent. */
static const struct {
	const char *name;
	int (*run)(struct ctl *c, unsigned argc, const char *const argv[]);
	void (*show)(const json_t *j);
} special[] = {
	{"status", NULL, show_status},   {"ls", ctl_ls, NULL},           {"trace", ctl_trace, NULL},
	{"map", ctl_map, NULL},          {"plot", ctl_plot, NULL},       {"show", NULL, show_seq},
	{"policy", NULL, show_policies}, {"watch", ctl_watch, NULL},     {"verify", ctl_verify, NULL},
	{"version", NULL, show_version}, {"reload", NULL, show_changes}, {"top", ctl_top, NULL},
	{"doctor", ctl_doctor, NULL},
};

static void print_answer(const struct ctl *c, const json_t *j, void (*show)(const json_t *))
{
	if (c->json && j)
		ctl_print_json(j);
	else if (c->json)
		puts("{\"ok\":true}");
	else if (j && show)
		show(j);
}

/* The sequences of a page, without the brackets around them, and the cursor that follows: -1 after the last. */
static bool page_body(const char *page, const char **ret, size_t *ret_n, long long *ret_next)
{
	static const char head[] = "{\"seqs\":[", tail[] = "],\"next\":";
	size_t n = strlen(page), at = n;
	char *end;

	while (at && page[at] != ']')
		at--;
	if (strncmp(page, head, strlen(head)) || at < strlen(head) || strncmp(page + at, tail, strlen(tail)))
		return false;
	*ret = page + strlen(head);
	*ret_n = at - strlen(head);
	page += at + strlen(tail);
	*ret_next = strtoll(page, &end, 10);
	if (!strcmp(page, "null}")) {
		*ret_next = -1;
		return true;
	}
	return *page >= '0' && *page <= '9' && !strcmp(end, "}");
}

/* The daemon lists a page at a time. Thousands of sequences are not worth a tree that is printed at once. */
int ctl_ls(struct ctl *c, unsigned argc, const char *const argv[])
{
	char next[24], *all = NULL;
	const char *page[2] = {argv[0], argc > 1 ? argv[1] : "0"}, *body;
	size_t bytes = 0, n;
	FILE *f = open_memstream(&all, &bytes);
	long long cursor = 0;
	json_t *j = NULL;
	bool any = false;
	int r = f ? CTL_OK : ctl_fail(CTL_UNREACHABLE, "out of memory");

	if (f)
		fputs("{\"seqs\":[", f);
	while (!r && cursor >= 0) {
		_cleanup_free_ char *text = NULL;

		r = ctl_call_text(c, 2, page, &text, NULL);
		if (r)
			break;
		if (!text || !page_body(text, &body, &n, &cursor)) {
			r = ctl_fail(CTL_UNREACHABLE, "reply: not a list of sequences");
			break;
		}
		if (n && any)
			fputc(',', f);
		any |= n > 0;
		fwrite(body, 1, n, f);
		snprintf(next, sizeof(next), "%lld", cursor);
		page[1] = next;
	}
	if (f)
		fputs("]}", f);
	if (f && fclose(f) && !r)
		r = ctl_fail(CTL_UNREACHABLE, "out of memory");
	if (!r && c->json) {
		puts(all);
	} else if (!r) {
		j = json_loadb(all, bytes, 0, NULL);
		if (j)
			show_seqs(json_object_get(j, "seqs"));
		else
			r = ctl_fail(CTL_UNREACHABLE, "reply: not JSON");
		json_decref(j);
	}
	free(all);
	return r;
}

static int ask_verify(struct ctl *c, json_t **ret)
{
	static const char *const argv[] = {"verify", "status"};
	int r = ctl_call(c, 2, argv, ret, NULL);

	return r ?: *ret ? r : ctl_fail(CTL_UNREACHABLE, "verify: an answer without numbers");
}

/* Start a scrub and wait for its end; `verify status` only looks. */
int ctl_verify(struct ctl *c, unsigned argc, const char *const argv[])
{
	const struct timespec nap = {.tv_nsec = VERIFY_POLL_NS};
	bool only_look = argc == 2 && !strcmp(argv[1], "status");
	json_t *j = NULL;
	int r;

	if (!only_look) {
		r = ctl_call(c, argc, argv, &j, NULL);
		json_decref(j);
		if (r)
			return r;
	}
	for (;;) {
		r = ask_verify(c, &j);
		if (r || only_look || !json_is_true(json_object_get(j, "running")))
			break;
		json_decref(j);
		nanosleep(&nap, NULL);
	}
	if (r)
		return r;
	print_answer(c, j, show_verify);
	r = json_integer_value(json_object_get(j, "bad")) ? CTL_BAD_PAGES : CTL_OK;
	json_decref(j);
	return r;
}

static int run(struct ctl *c, unsigned argc, const char *const argv[])
{
	const struct ctl_verb *v = ctl_find_verb(argv[0]);
	void (*show)(const json_t *) = NULL;
	json_t *j = NULL;
	int r;

	if (!v)
		return ctl_fail(CTL_USAGE, "verb \"%s\": unknown; see kvtierctl --help", argv[0]);
	if (argc - 1 < v->least || argc - 1 > v->most)
		return ctl_fail(CTL_USAGE, "usage: kvtierctl %s%s%s", v->name, *v->args ? " " : "", v->args);
	for (unsigned i = 0; i < ARRAY_SIZE(special); i++) {
		if (strcmp(special[i].name, v->name))
			continue;
		if (special[i].run)
			return special[i].run(c, argc, argv);
		show = special[i].show;
	}
	r = ctl_call(c, argc, argv, &j, NULL);
	if (!r)
		print_answer(c, j, show);
	json_decref(j);
	return r;
}

static void usage(void)
{
	printf("Usage: kvtierctl [OPTION]... VERB [ARGUMENT]...\n"
	       "Look at and steer kvtierd.\n\n");
	for (size_t i = 0; i < ctl_option_count; i++) {
		const struct ctl_option *o = &ctl_options[i];
		char left[32];

		snprintf(left, sizeof(left), "--%s%s%s", o->name, *o->arg ? " " : "", o->arg);
		printf("%s%-17s %s\n", strcmp(o->name, "help") ? "      " : "  -h, ", left, o->doc);
	}
	printf("\nVerbs:\n");
	for (size_t i = 0; i < ctl_verb_count; i++) {
		char left[64];

		snprintf(left, sizeof(left), "%s %s", ctl_verbs[i].name, ctl_verbs[i].args);
		if (strlen(left) > 26)
			printf("  %s\n%30s%s\n", left, "", ctl_verbs[i].doc);
		else
			printf("  %-26s  %s\n", left, ctl_verbs[i].doc);
	}
	printf("\nSEQ is a handle (0x...), a key (32 hex digits) or a unique prefix of one.\n"
	       "Exit status: 0 done, 1 refused by the daemon, 2 bad usage, 3 no daemon there,\n"
	       "4 no answer in time, 5 verify found bad pages. doctor ends with\n"
	       "the gravest finding. See kvtierctl(1).\n");
}

/* A decimal number in [min, max]; -1 and a line on stderr otherwise. */
static double number(const char *option, const char *s, double min, double max)
{
	char *end;
	double v = strtod(s, &end);

	if (*end || end == s || !(v >= min && v <= max)) {
		ctl_fail(CTL_USAGE, "--%s: \"%s\", must be a number from %g to %.0f", option, s, min, max);
		return -1;
	}
	return v;
}

int main(int argc, char *argv[])
{
	enum {
		OPT_FIRST = 255,
#define OPTION_ID(id, name, arg, doc) OPT_##id,
		CTL_OPTIONS(OPTION_ID)
	};
	static const struct option options[] = {
#define OPTION_ROW(id, name, arg, doc) {name, sizeof(arg) > 1 ? required_argument : no_argument, NULL, OPT_##id},
		CTL_OPTIONS(OPTION_ROW){},
	};
	struct ctl c = {.fd = -1, .timeout_ms = DEFAULT_TIMEOUT_MS, .interval = 1};
	double v;
	int o, r;

	if (argc > 1 && !strcmp(argv[1], "--complete"))
		return ctl_complete((unsigned)(argc - 2), (const char *const *)argv + 2);
	setvbuf(stdout, NULL, _IOLBF, 0);
	c.socket = getenv("KVTIER_ADMIN_SOCKET");
	if (!c.socket || !*c.socket)
		c.socket = CTL_SOCKET;
	while ((o = getopt_long(argc, argv, "h", options, NULL)) >= 0) {
		switch (o) {
		case OPT_SOCKET:
			c.socket = optarg;
			break;
		case OPT_JSON:
			c.json = true;
			break;
		case OPT_PAST:
			c.past = true;
			break;
		case OPT_ONCE:
			c.once = true;
			break;
		case OPT_INTERVAL:
			c.interval = number("interval", optarg, 0.1, 3600);
			if (c.interval < 0)
				return CTL_USAGE;
			break;
		case OPT_TIMEOUT:
			v = number("timeout", optarg, 0.001, 86400);
			if (v < 0)
				return CTL_USAGE;
			c.timeout_ms = (uint32_t)(v * 1000);
			break;
		case OPT_COUNT:
			v = number("count", optarg, 1, 1e15);
			if (v < 0)
				return CTL_USAGE;
			c.count = (uint64_t)v;
			break;
		case OPT_OUT:
			c.plot.out = optarg;
			break;
		case OPT_LANE:
			c.plot.lane = optarg;
			break;
		case OPT_POLICY:
			c.plot.policy = optarg;
			break;
		case OPT_WIDTH:
		case OPT_ROWS:
			v = number(o == OPT_ROWS ? "rows" : "width", optarg, o == OPT_ROWS ? 2 : 40,
				   o == OPT_ROWS ? 16777216 : 4096);
			if (v < 0)
				return CTL_USAGE;
			*(o == OPT_ROWS ? &c.plot.rows : &c.plot.width) = (uint32_t)v;
			break;
		case OPT_CONFIG:
			c.config = optarg;
			break;
		case OPT_ROOT:
			c.root = optarg;
			break;
		case OPT_VERSION:
			puts("kvtierctl " KVT_VERSION);
			return CTL_OK;
		case OPT_COMPLETE:
			return ctl_fail(CTL_USAGE, "--complete: must be the first word");
		case 'h':
		case OPT_HELP:
			usage();
			return CTL_OK;
		default:
			fputs("See kvtierctl --help.\n", stderr);
			return CTL_USAGE;
		}
	}
	if (optind == argc)
		return ctl_fail(CTL_USAGE, "no verb; see kvtierctl --help");
	r = run(&c, (unsigned)(argc - optind), (const char *const *)argv + optind);
	close_fdp(&c.fd);
	return r;
}
