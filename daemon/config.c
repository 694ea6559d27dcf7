/* SPDX-License-Identifier: MIT */
/*
 * Reading the configuration file. libinih splits lines; what a line may say is
 * decided by the table in config_keys.c. The reader given to libinih counts
 * lines and refuses what the library would quietly bend (long lines,
 * continuation lines, sections without keys).
 */
#include <ctype.h>
#include <ini.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include "daemon/config_keys.h"
#include "daemon/config_parse.h"
#include "shm/util.h"

void config_refuse(struct parse *p, unsigned line, const char *fmt, ...)
{
	va_list ap;
	int n;

	if (p->failed)
		return;
	p->failed = true;
	p->fail_line = line;
	n = line ? snprintf(p->err, p->errsize, "%s:%u: ", p->cfg->file, line)
		 : snprintf(p->err, p->errsize, "%s: ", p->cfg->file);
	if (n < 0 || (size_t)n >= p->errsize)
		return;
	va_start(ap, fmt);
	vsnprintf(p->err + n, p->errsize - n, fmt, ap);
	va_end(ap);
}

static void tenant_defaults(struct config_tenant *t, const char *name)
{
	char err[256];

	memset(t, 0, sizeof(*t));
	snprintf(t->name, sizeof(t->name), "%s", name);
	for (unsigned i = 0; i < config_n_keys; i++) {
		const struct config_key *k = &config_keys[i];

		if (!strcmp(k->section, "tenant") && k->def &&
		    config_value_parse(k, t, k->def, err, sizeof(err)))
			abort(); /* the table contradicts itself; the unit test meets it first */
	}
	/* The default tenant has the socket that clients try first. */
	snprintf(t->socket, sizeof(t->socket), "%s.sock", strcmp(name, "default") ? name : "kvtierd");
}

void config_defaults(struct config *c)
{
	char err[256];

	memset(c, 0, sizeof(*c));
	for (unsigned i = 0; i < config_n_keys; i++) {
		const struct config_key *k = &config_keys[i];

		if (strcmp(k->section, "tenant") && config_value_parse(k, c, k->def, err, sizeof(err)))
			abort();
	}
	c->nvme_marks.low = c->nvme_marks.high = c->nvme_marks.min;
	tenant_defaults(&c->tenant[0], "default");
	c->tenants = 1;
}

/* ---- sections ---------------------------------------------------------------- */

static bool tenant_name_ok(const char *name)
{
	size_t n = strlen(name);

	if (!n || n >= sizeof(((struct config_tenant *)0)->name) || *name == '.')
		return false;
	for (const char *p = name; *p; p++)
		if (!isascii(*p) || (!isalnum(*p) && !strchr("._-", *p)))
			return false;
	return true;
}

static void begin_tenant(struct parse *p, const char *name)
{
	struct config *c = p->cfg;

	if (!tenant_name_ok(name)) {
		config_refuse(p, p->line, "[tenant %.40s]: name: must be 1 to %zu letters, digits or . _ -",
			      name, sizeof(c->tenant[0].name) - 1);
		return;
	}
	if (!strcmp(name, "admin") || !strcmp(name, "metrics")) {
		config_refuse(p, p->line, "[tenant %s]: name: \"%s\" is the %s socket's", name, name, name);
		return;
	}
	for (unsigned i = 0; i < c->tenants; i++)
		if (!strcmp(c->tenant[i].name, name)) {
			config_refuse(p, p->line, "[tenant %s]: given twice, first on line %u", name,
				      p->tenant_line[i]);
			return;
		}
	if (c->tenants == CONFIG_MAX_TENANTS) {
		config_refuse(p, p->line, "[tenant %s]: more than %u tenants", name, CONFIG_MAX_TENANTS);
		return;
	}
	p->tenant = (int)c->tenants++;
	p->tenant_line[p->tenant] = p->line;
	tenant_defaults(&c->tenant[p->tenant], name);
}

static void refuse_unknown_section(struct parse *p, const char *name)
{
	const char *near = config_section_near(name);

	config_refuse(p, p->line, "section [%.40s]: unknown%s%s%s", name, near ? "; did you mean [" : "",
		      near ?: "", near ? "]?" : "");
}

static void begin_section(struct parse *p, const char *name)
{
	p->tenant = -1;
	if (!strncmp(name, "tenant ", 7))
		begin_tenant(p, name + 7 + strspn(name + 7, " "));
	else if (!strcmp(name, "tenant"))
		config_refuse(p, p->line, "[tenant]: must be [tenant NAME]");
	else if (!config_section_known(name))
		refuse_unknown_section(p, name);
}

/* A line that begins with a bracket; libinih would not call back for a section without keys. */
static int read_section(struct parse *p, char *line)
{
	const char *end = strchr(line, ']'), *rest = end ? end + 1 + strspn(end + 1, " \t\r\n") : NULL;
	char name[256];

	if (!end || (*rest && !strchr("#;", *rest))) {
		config_refuse(p, p->line, "neither [section] nor key = value");
		return -EINVAL;
	}
	snprintf(name, sizeof(name), "%.*s", (int)(end - line - 1), line + 1);
	begin_section(p, name);
	return p->failed ? -EINVAL : 0;
}

/* fgets for libinih; sees every line before it does. */
static char *read_line(char *str, int num, void *arg)
{
	struct parse *p = arg;
	size_t n;

	if (p->failed || !fgets(str, num, p->f))
		return NULL;
	p->line++;
	n = strlen(str);
	if (n == (size_t)num - 1 && str[n - 1] != '\n') {
		config_refuse(p, p->line, "line longer than %d bytes", num - 2);
		return NULL;
	}
	if ((!n || str[n - 1] != '\n') && !feof(p->f)) {
		config_refuse(p, p->line, "a NUL byte");
		return NULL;
	}
	if ((*str == ' ' || *str == '\t') && !strchr("#;\r\n", str[strspn(str, " \t")])) {
		config_refuse(p, p->line, "begins with a blank; lines are not continued");
		return NULL;
	}
	if (*str == '[' && read_section(p, str))
		return NULL;
	return str;
}

/* ---- keys --------------------------------------------------------------------- */

static void refuse_unknown_key(struct parse *p, const char *section, const char *name)
{
	const char *near = config_key_near(p->tenant >= 0 ? "tenant" : section, name);

	config_refuse(p, p->line, "key \"%.40s\" in [%.40s]: unknown%s%s%s", name, section,
		      near ? "; did you mean \"" : "", near ?: "", near ? "\"?" : "");
}

static int handle(void *arg, const char *section, const char *name, const char *value)
{
	struct parse *p = arg;
	struct config *c = p->cfg;
	const struct config_key *k = config_key_find(p->tenant >= 0 ? "tenant" : section, name);
	unsigned *seen;
	char why[256];

	if (p->failed)
		return 0;
	if (!k) {
		if (*section)
			refuse_unknown_key(p, section, name);
		else
			config_refuse(p, p->line, "key \"%.40s\": stands before the first [section]", name);
		return 0;
	}
	seen = p->tenant >= 0 ? &p->tenant_key_line[p->tenant][k - config_keys] : &p->key_line[k - config_keys];
	if (*seen) {
		config_refuse(p, p->line, "%s: given twice, first on line %u", name, *seen);
		return 0;
	}
	*seen = p->line;
	(p->tenant >= 0 ? c->tenant[p->tenant].line : c->line)[k - config_keys] =
		(uint16_t)MIN(p->line, UINT16_MAX);
	if (config_value_parse(k, p->tenant >= 0 ? (void *)&c->tenant[p->tenant] : (void *)c, value, why,
			       sizeof(why))) {
		config_refuse(p, p->line, "%s: %s", name, why);
		return 0;
	}
	return 1;
}

/* ---- the file ---------------------------------------------------------------------- */

int config_load(struct config *c, const char *path, char *err, size_t errsize)
{
	_cleanup_free_ struct config *cfg = malloc(sizeof(*cfg));
	_cleanup_free_ struct parse *p = calloc(1, sizeof(*p));
	int r;

	if (!cfg || !p) {
		snprintf(err, errsize, "%s: out of memory", path);
		return -ENOMEM;
	}
	config_defaults(cfg);
	*p = (struct parse){.cfg = cfg, .tenant = -1, .err = err, .errsize = errsize};
	if (strlen(path) >= sizeof(cfg->file)) {
		snprintf(err, errsize, "%.40s...: path longer than %zu bytes", path, sizeof(cfg->file) - 1);
		return -ENAMETOOLONG;
	}
	strcpy(cfg->file, path);
	cfg->tenants = 0; /* the built-in tenant gives way to the file's */
	p->f = fopen(path, "re");
	if (!p->f) {
		r = -errno;
		config_refuse(p, 0, "%s", strerror(errno));
		return r;
	}
	r = ini_parse_stream(read_line, p, handle, p);
	if (ferror(p->f))
		config_refuse(p, 0, "cannot be read");
	fclose(p->f);
	if (r > 0 && (unsigned)r < p->fail_line)
		p->failed = false; /* libinih reads on after a line that it could not split */
	if (r > 0)
		config_refuse(p, (unsigned)r, "neither [section] nor key = value");
	if (!cfg->tenants) {
		tenant_defaults(&cfg->tenant[0], "default");
		cfg->tenants = 1;
	}
	config_fit(p);
	cfg->nvme_marks.low = cfg->nvme_marks.high = cfg->nvme_marks.min;
	config_relations(p);
	if (p->failed)
		return -EINVAL;
	*c = *cfg;
	return 0;
}
