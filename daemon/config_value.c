/* SPDX-License-Identifier: MIT */
/* Text to field and back, one pair per key type. */
#include <ctype.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>
#include "daemon/config_keys.h"
#include "shm/util.h"

static const char *const levels[] = {"emerg", "alert", "crit", "err", "warning", "notice", "info", "debug"};
static const char units[] = "KMGT";

static void format_size(uint64_t v, char *buf, size_t size)
{
	unsigned u = 0;

	while (u < 4 && v && v % 1024 == 0) {
		v /= 1024;
		u++;
	}
	if (u)
		snprintf(buf, size, "%" PRIu64 "%c", v, units[u - 1]);
	else
		snprintf(buf, size, "%" PRIu64, v);
}

/* Digits only, no sign, no blanks; -ERANGE past 64 bits. */
static int parse_digits(const char **text, unsigned base, uint64_t *ret)
{
	const char *p = *text;
	uint64_t v = 0;

	for (; *p >= '0' && *p < (char)('0' + base); p++) {
		if (__builtin_mul_overflow(v, base, &v) || __builtin_add_overflow(v, *p - '0', &v))
			return -ERANGE;
	}
	if (p == *text)
		return -EINVAL;
	*text = p;
	*ret = v;
	return 0;
}

static int parse_number(const char *text, unsigned base, uint64_t *ret)
{
	int r = parse_digits(&text, base, ret);

	return r ?: *text ? -EINVAL : 0;
}

static int parse_size(const char *text, uint64_t *ret)
{
	uint64_t v;
	int r = parse_digits(&text, 10, &v);

	if (r)
		return r;
	if (*text) {
		const char *u = strchr(units, toupper((unsigned char)*text));

		if (!u || text[1])
			return -EINVAL;
		for (long i = 0; i <= u - units; i++)
			if (__builtin_mul_overflow(v, 1024u, &v))
				return -ERANGE;
	}
	*ret = v;
	return 0;
}

/* 12, 12.5, 12.5% → permille */
static int parse_share(const char *text, uint64_t *ret)
{
	uint64_t whole, tenth = 0;
	int r = parse_digits(&text, 10, &whole);

	if (r)
		return r;
	if (*text == '.') {
		if (!isdigit((unsigned char)text[1]))
			return -EINVAL;
		tenth = (uint64_t)(text[1] - '0');
		text += 2;
	}
	if (*text == '%')
		text++;
	if (*text || whole > 1000000)
		return *text ? -EINVAL : -ERANGE;
	*ret = whole * 10 + tenth;
	return 0;
}

static int parse_word(const char *text, const char *const *words, unsigned n, uint64_t *ret)
{
	for (unsigned i = 0; i < n; i++)
		if (!strcasecmp(text, words[i])) {
			*ret = i;
			return 0;
		}
	return -EINVAL;
}

static int parse_bool(const char *text, uint64_t *ret)
{
	static const char *const words[] = {"no", "yes", "off", "on", "false", "true", "0", "1"};
	int r = parse_word(text, words, ARRAY_SIZE(words), ret);

	*ret &= 1;
	return r;
}

static const char *const spreads[] = {"no", "lanes", "tenant"};

static int parse_spread(const char *text, uint64_t *ret)
{
	return parse_word(text, spreads, ARRAY_SIZE(spreads), ret) ? parse_bool(text, ret) : 0;
}

static int parse_observe(const char *text, uint64_t *ret)
{
	static const char *const words[] = {"publish", "observe"};

	return parse_word(text, words, ARRAY_SIZE(words), ret);
}

static int parse_level(const char *text, uint64_t *ret)
{
	if (isdigit((unsigned char)*text))
		return parse_number(text, 10, ret);
	return parse_word(text, levels, ARRAY_SIZE(levels), ret);
}

static int parse_integer(const struct config_key *k, const char *text, uint64_t *ret)
{
	switch (k->type) {
	case KEY_BOOL:
		return parse_bool(text, ret);
	case KEY_SPREAD:
		return parse_spread(text, ret);
	case KEY_OBSERVE:
		return parse_observe(text, ret);
	case KEY_LEVEL:
		return parse_level(text, ret);
	case KEY_OCTAL:
		return parse_number(text, 8, ret);
	case KEY_SIZE:
	case KEY_QUOTA:
		return parse_size(text, ret);
	case KEY_SHARE:
		return parse_share(text, ret);
	default:
		return parse_number(text, 10, ret);
	}
}

/* What a key takes, for the error line. */
static void describe(const struct config_key *k, char *buf, size_t size)
{
	char lo[32], hi[32];

	switch (k->type) {
	case KEY_BOOL:
		snprintf(buf, size, "must be yes or no");
		return;
	case KEY_SPREAD:
		snprintf(buf, size, "must be no, lanes or tenant");
		return;
	case KEY_OBSERVE:
		snprintf(buf, size, "must be publish or observe");
		return;
	case KEY_LEVEL:
		snprintf(buf, size, "must be emerg, alert, crit, err, warning, notice, info, debug or 0 to 7");
		return;
	case KEY_NODE:
		snprintf(buf, size, "must be client, interleave, off or a node from 0 to %" PRIu64, k->max);
		return;
	case KEY_OCTAL:
		snprintf(buf, size, "must be octal, 0 to %" PRIo64, k->max);
		return;
	case KEY_SIZE:
	case KEY_QUOTA:
		format_size(k->min, lo, sizeof(lo));
		format_size(k->max, hi, sizeof(hi));
		snprintf(buf, size, "must be bytes (K, M, G, T), %s to %s%s", lo, hi,
			 k->type == KEY_QUOTA ? ", or none" : "");
		return;
	case KEY_SHARE:
		snprintf(buf, size,
			 "must be percent with at most one decimal, %" PRIu64 ".%" PRIu64 " to %" PRIu64
			 ".%" PRIu64,
			 k->min / 10, k->min % 10, k->max / 10, k->max % 10);
		return;
	case KEY_COUNT:
		snprintf(buf, size, "must be a number from %" PRIu64 " to %" PRIu64, k->min, k->max);
		return;
	case KEY_NAME:
		snprintf(buf, size, "must be %s%u letters, digits or . _ -",
			 k->empty ? "empty or up to " : "1 to ", k->size - 1);
		return;
	case KEY_PATH:
		snprintf(buf, size, "must be an absolute path of at most %u bytes", k->size - 1);
		return;
	case KEY_SOCKET:
		snprintf(buf, size, "must be a path of 1 to %u bytes", k->size - 1);
		return;
	case KEY_TEXT:
		snprintf(buf, size, "must be at most %u printable bytes", k->size - 1);
		return;
	}
}

static bool text_ok(const struct config_key *k, const char *text)
{
	if (strlen(text) >= k->size)
		return false;
	if (!*text)
		return k->empty;
	for (const char *p = text; *p; p++) {
		if (!isascii(*p) || !isprint(*p))
			return false;
		if (k->type == KEY_NAME && !isalnum(*p) && !strchr("._-", *p))
			return false;
	}
	if (k->type == KEY_PATH)
		return *text == '/';
	return true;
}

static bool is_text(const struct config_key *k)
{
	return k->type >= KEY_NAME;
}

/* TIER_NODE_SPREAD, TIER_NODE_CLIENT, TIER_NODE_OFF: -1, -2, -3. */
static const char *const node_words[] = {"interleave", "client", "off"};

static void store(const struct config_key *k, void *base, uint64_t v)
{
	void *f = config_field(base, k);

	if (k->size == sizeof(bool))
		*(bool *)f = v;
	else if (k->size == sizeof(uint32_t))
		*(uint32_t *)f = (uint32_t)v;
	else
		*(uint64_t *)f = v;
}

int config_value_parse(const struct config_key *k, void *base, const char *text, char *err, size_t errsize)
{
	char limit[128];
	uint64_t v = 0;
	int r = 0;

	if (is_text(k)) {
		if (!text_ok(k, text))
			goto bad;
		memset(config_field(base, k), 0, k->size);
		strcpy(config_field(base, k), text);
		return 0;
	}
	for (uint32_t i = 0; k->type == KEY_NODE && i < ARRAY_SIZE(node_words); i++)
		if (!strcasecmp(text, node_words[i])) {
			store(k, base, UINT32_MAX - i); /* -1 - i */
			return 0;
		}
	if (k->type == KEY_QUOTA && !strcasecmp(text, "none")) {
		store(k, base, UINT64_MAX);
		return 0;
	}
	r = parse_integer(k, text, &v);
	if (r || v < k->min || v > k->max)
		goto bad;
	store(k, base, v);
	return 0;
bad:
	describe(k, limit, sizeof(limit));
	snprintf(err, errsize, "\"%.64s\", %s", text, limit);
	return -EINVAL;
}

void config_value_format(const struct config_key *k, const void *base, char *buf, size_t size)
{
	const void *f = (const char *)base + k->off;
	uint64_t v = 0;

	if (is_text(k)) {
		snprintf(buf, size, "%s", (const char *)f);
		return;
	}
	memcpy(&v, f, k->size); /* little-endian, checked in shm/util.h */
	switch (k->type) {
	case KEY_BOOL:
		snprintf(buf, size, "%s", v ? "yes" : "no");
		break;
	case KEY_SPREAD:
		snprintf(buf, size, "%s", v < ARRAY_SIZE(spreads) ? spreads[v] : "tenant");
		break;
	case KEY_OBSERVE:
		snprintf(buf, size, "%s", v ? "observe" : "publish");
		break;
	case KEY_LEVEL:
		snprintf(buf, size, "%s", v < ARRAY_SIZE(levels) ? levels[v] : "debug");
		break;
	case KEY_OCTAL:
		snprintf(buf, size, "0%03" PRIo64, v);
		break;
	case KEY_SHARE:
		snprintf(buf, size, "%" PRIu64 ".%" PRIu64, v / 10, v % 10);
		break;
	case KEY_SIZE:
		format_size(v, buf, size);
		break;
	default:
		if (k->type == KEY_NODE && UINT32_MAX - v < ARRAY_SIZE(node_words))
			snprintf(buf, size, "%s", node_words[UINT32_MAX - v]);
		else if (k->type == KEY_QUOTA && v == UINT64_MAX)
			snprintf(buf, size, "none");
		else if (k->type == KEY_QUOTA)
			format_size(v, buf, size);
		else
			snprintf(buf, size, "%" PRIu64, v);
	}
}
