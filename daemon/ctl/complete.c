/* SPDX-License-Identifier: MIT */
/*
 * Completion for shells. What a verb takes is read from its line of arguments in verbs.h, so that a new verb or
 * option is completed as soon as --help knows it: words in lower case stand for themselves, those in capitals
 * are kinds.
 */
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "daemon/ctl/ctl.h"
#include "daemon/ctl/words.h"
#include "shm/util.h"

#define ASK_MS 300u                 /* each exchange with the daemon */
#define LIST_NS UINT64_C(500000000) /* all pages of a listing */
#define WORDS_MAX 16u               /* of a verb's arguments */

struct line {
	struct ctl ctl;
	const struct ctl_verb *verb;
	const char *last, *args[WORDS_MAX];
	unsigned n_args;
};

/* Nothing that a shell would take for more than a word. */
static bool plain(const char *s)
{
	if (!isalnum((unsigned char)*s) && *s != '-')
		return false;
	return strspn(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._/=+-") == strlen(s);
}

static void offer(const struct line *l, const char *value, const char *doc)
{
	if (!plain(value) || strncmp(value, l->last, strlen(l->last)))
		return;
	fputs(value, stdout);
	putchar('\t');
	for (; *doc && *doc != '\n'; doc++) /* a tenant's name is not ours: nothing for the terminal in it */
		putchar(iscntrl((unsigned char)*doc) ? '?' : *doc);
	putchar('\n');
}

static const char *text_of(const json_t *o, const char *name)
{
	return json_string_value(json_object_get(o, name)) ?: "";
}

static void offer_seq(const struct line *l, const json_t *o)
{
	const char *key = text_of(o, "key");
	char doc[160];

	snprintf(doc, sizeof(doc), "%.8s tenant %.40s, client %.40s, %lld rows", key, text_of(o, "tenant"),
		 text_of(o, "client"), (long long)json_integer_value(json_object_get(o, "rows")));
	offer(l, text_of(o, "handle"), doc);
	if (*l->last && strlen(key) == 32)
		offer(l, key, doc + 9);
}

static void offer_seqs(struct line *l)
{
	uint64_t end = now_ns() + LIST_NS;
	char from[24] = "0";
	bool more = true;

	while (more && now_ns() < end) {
		const char *argv[] = {"ls", from};
		json_t *j, *o, *next;
		size_t i;

		if (ctl_call(&l->ctl, 2, argv, &j, NULL))
			return;
		json_array_foreach(json_object_get(j, "seqs"), i, o) offer_seq(l, o);
		next = json_object_get(j, "next");
		more = json_is_integer(next);
		snprintf(from, sizeof(from), "%lld", (long long)json_integer_value(next));
		json_decref(j);
	}
}

static void offer_policies(struct line *l)
{
	const char *argv[] = {"policy", "list"};
	json_t *j, *o;
	size_t i;

	if (ctl_call(&l->ctl, 2, argv, &j, NULL))
		return;
	json_array_foreach(json_object_get(j, "policies"), i, o)
		offer(l, text_of(o, "name"), text_of(o, "doc"));
	json_decref(j);
}

/* TIER=ROWS: the tiers that the line does not name yet, then their one word. */
static void offer_tiers(const struct line *l)
{
	static const char *const tiers[] = {"device=", "dram=", "nvme="};
	char all[16];

	for (unsigned t = 0; t < ARRAY_SIZE(tiers); t++) {
		bool named = false;

		for (unsigned i = 0; i < l->n_args; i++)
			named |= !strncmp(l->args[i], tiers[t], strlen(tiers[t]));
		if (named)
			continue;
		snprintf(all, sizeof(all), "%sall", tiers[t]);
		if (strchr(l->last, '='))
			offer(l, all, "no limit");
		else
			offer(l, tiers[t], "rows per lane");
	}
}

static void offer_kind(struct line *l, const char *kind)
{
	if (!strcmp(kind, "SEQ"))
		offer_seqs(l);
	else if (!strcmp(kind, "NAME"))
		offer_policies(l);
	else if (!strncmp(kind, "TIER=", 5))
		offer_tiers(l);
	else if (!strcmp(kind, "FILE") || !strcmp(kind, "PATH"))
		puts(":files");
	else if (!strcmp(kind, "DIR"))
		puts(":dirs");
}

/* word is "on|off" or the like: is s one of its words; s NULL: offer them. */
static bool one_of(const struct line *l, const char *word, const char *s)
{
	char copy[64], *save = NULL;

	snprintf(copy, sizeof(copy), "%s", word);
	for (char *w = strtok_r(copy, "|", &save); w; w = strtok_r(NULL, "|", &save)) {
		if (!s)
			offer(l, w, l->verb->doc);
		else if (!strcmp(w, s))
			return true;
	}
	return false;
}

/* One of the forms that a verb's arguments may have, as "set NAME SEQ": what stands where the line ends. */
static void offer_form(struct line *l, char *form)
{
	char *words[WORDS_MAX], *save = NULL;
	bool repeats = false;
	unsigned n = 0, at;

	for (char *w = strtok_r(form, " ", &save); w && n < WORDS_MAX; w = strtok_r(NULL, " ", &save)) {
		repeats = strchr(w, '.');
		w[strcspn(w, ".")] = '\0';
		words[n++] = w;
	}
	for (unsigned i = 0; n && i <= l->n_args; i++) {
		at = i < n ? i : n - 1;
		if (i >= n && !repeats)
			return;
		if (i == l->n_args && islower((unsigned char)*words[at]))
			one_of(l, words[at], NULL);
		else if (i == l->n_args)
			offer_kind(l, words[at]);
		else if (islower((unsigned char)*words[at]) && !one_of(l, words[at], l->args[i]))
			return;
	}
}

static void offer_args(struct line *l)
{
	char forms[128], *form = forms, *end;
	size_t n = 0;

	for (const char *s = l->verb->args; *s && n < sizeof(forms) - 1; s++)
		if (*s != '[' && *s != ']')
			forms[n++] = *s;
	forms[n] = '\0';
	do {
		end = strstr(form, " | ");
		if (end)
			*end = '\0';
		offer_form(l, form);
		form = end + 3;
	} while (end);
}

/* Options that are of no use to the verb of the line are left out. */
static bool useful(const struct line *l, const struct ctl_option *o)
{
	size_t n = strcspn(o->doc, ":");
	char verb[32];

	snprintf(verb, sizeof(verb), "%.*s", (int)n, o->doc);
	if (!l->verb || !o->doc[n] || !ctl_find_verb(verb))
		return strcmp(o->name, "complete");
	return !strcmp(verb, l->verb->name);
}

static void offer_options(const struct line *l)
{
	char name[32];

	for (size_t i = 0; i < ctl_option_count; i++) {
		snprintf(name, sizeof(name), "--%s", ctl_options[i].name);
		if (useful(l, &ctl_options[i]))
			offer(l, name, ctl_options[i].doc);
	}
}

/* The option that this word is, if its argument must be the next word. */
static const struct ctl_option *wants_word(const char *word)
{
	for (size_t i = 0; i < ctl_option_count; i++)
		if (!strncmp(word, "--", 2) && *ctl_options[i].arg && !strcmp(word + 2, ctl_options[i].name))
			return &ctl_options[i];
	return NULL;
}

/* Take in a word that is neither the last nor an option's argument. False: nothing can follow. */
static bool take_word(struct line *l, const char *word)
{
	if (!strncmp(word, "--socket=", 9))
		l->ctl.socket = word + 9;
	if (*word == '-')
		return true;
	if (!l->verb) {
		l->verb = ctl_find_verb(word);
		return l->verb != NULL;
	}
	if (l->n_args == WORDS_MAX)
		return false;
	l->args[l->n_args++] = word;
	return true;
}

/* Take in all words but the last. False: what could follow is offered, or nothing can. */
static bool take_words(struct line *l, unsigned argc, const char *const argv[])
{
	for (unsigned i = 0; i + 1 < argc; i++) {
		const struct ctl_option *o = wants_word(argv[i]);

		if (!o && !take_word(l, argv[i]))
			return false;
		if (!o)
			continue;
		if (++i + 1 == argc) {
			offer_kind(l, o->arg);
			if (!strcmp(o->arg, "NAME")) /* --policy: or the file of its weights */
				puts(":files");
			return false;
		}
		if (!strcmp(o->name, "socket"))
			l->ctl.socket = argv[i];
	}
	return true;
}

int ctl_complete(unsigned argc, const char *const argv[])
{
	struct line l = {.ctl = {.fd = -1, .timeout_ms = ASK_MS}, .last = argc ? argv[argc - 1] : ""};
	char silent[256];

	ctl_fail_into(silent, sizeof(silent));
	l.ctl.socket = getenv("KVTIER_ADMIN_SOCKET");
	if (!l.ctl.socket || !*l.ctl.socket)
		l.ctl.socket = CTL_SOCKET;
	if (!take_words(&l, argc, argv))
		goto out;
	if (*l.last == '-')
		offer_options(&l);
	else if (l.verb)
		offer_args(&l);
	else
		for (size_t i = 0; i < ctl_verb_count; i++)
			offer(&l, ctl_verbs[i].name, ctl_verbs[i].doc);
out:
	close_fdp(&l.ctl.fd);
	return CTL_OK;
}
