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
#include <sys/un.h>
#include "daemon/config_keys.h"
#include "policy/policy.h"
#include "shm/util.h"

#define DRAM_MAX_SEGMENTS 4096u /* what the tier's allocator can number */

struct parse {
	struct config *cfg;
	FILE *f;
	unsigned line;
	int tenant;                               /* index of the section being read, -1: not a tenant */
	unsigned key_line[CONFIG_MAX_KEYS];       /* where each global key stands; 0: not given */
	unsigned tenant_line[CONFIG_MAX_TENANTS]; /* of [tenant NAME] */
	unsigned tenant_key_line[CONFIG_MAX_TENANTS][CONFIG_MAX_KEYS];
	bool failed;
	unsigned fail_line;
	char *err;
	size_t errsize;
};

/* The first complaint stands. */
static void __attribute__((format(printf, 3, 4))) refuse(struct parse *p, unsigned line, const char *fmt, ...)
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
		refuse(p, p->line, "[tenant %.40s]: name: must be 1 to %zu letters, digits or . _ -", name,
		       sizeof(c->tenant[0].name) - 1);
		return;
	}
	if (!strcmp(name, "admin")) {
		refuse(p, p->line, "[tenant admin]: name: \"admin\" is the admin socket's");
		return;
	}
	for (unsigned i = 0; i < c->tenants; i++)
		if (!strcmp(c->tenant[i].name, name)) {
			refuse(p, p->line, "[tenant %s]: given twice, first on line %u", name,
			       p->tenant_line[i]);
			return;
		}
	if (c->tenants == CONFIG_MAX_TENANTS) {
		refuse(p, p->line, "[tenant %s]: more than %u tenants", name, CONFIG_MAX_TENANTS);
		return;
	}
	p->tenant = (int)c->tenants++;
	p->tenant_line[p->tenant] = p->line;
	tenant_defaults(&c->tenant[p->tenant], name);
}

static void begin_section(struct parse *p, const char *name)
{
	p->tenant = -1;
	if (!strncmp(name, "tenant ", 7))
		begin_tenant(p, name + 7 + strspn(name + 7, " "));
	else if (!strcmp(name, "tenant"))
		refuse(p, p->line, "[tenant]: must be [tenant NAME]");
	else if (!config_section_known(name))
		refuse(p, p->line, "section [%.40s]: unknown", name);
}

/* A line that begins with a bracket; libinih would not call back for a section without keys. */
static int read_section(struct parse *p, char *line)
{
	const char *end = strchr(line, ']'), *rest = end ? end + 1 + strspn(end + 1, " \t\r\n") : NULL;
	char name[256];

	if (!end || (*rest && !strchr("#;", *rest))) {
		refuse(p, p->line, "neither [section] nor key = value");
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
		refuse(p, p->line, "line longer than %d bytes", num - 2);
		return NULL;
	}
	if ((!n || str[n - 1] != '\n') && !feof(p->f)) {
		refuse(p, p->line, "a NUL byte");
		return NULL;
	}
	if ((*str == ' ' || *str == '\t') && !strchr("#;\r\n", str[strspn(str, " \t")])) {
		refuse(p, p->line, "begins with a blank; lines are not continued");
		return NULL;
	}
	if (*str == '[' && read_section(p, str))
		return NULL;
	return str;
}

/* ---- keys --------------------------------------------------------------------- */

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
			refuse(p, p->line, "key \"%.40s\" in [%.40s]: unknown", name, section);
		else
			refuse(p, p->line, "key \"%.40s\": stands before the first [section]", name);
		return 0;
	}
	seen = p->tenant >= 0 ? &p->tenant_key_line[p->tenant][k - config_keys] : &p->key_line[k - config_keys];
	if (*seen) {
		refuse(p, p->line, "%s: given twice, first on line %u", name, *seen);
		return 0;
	}
	*seen = p->line;
	if (config_value_parse(k, p->tenant >= 0 ? (void *)&c->tenant[p->tenant] : (void *)c, value, why,
			       sizeof(why))) {
		refuse(p, p->line, "%s: %s", name, why);
		return 0;
	}
	return 1;
}

/* ---- relations between keys ------------------------------------------------------ */

/* The line of the later of two keys, so that the message points at what was written last. */
static unsigned line_of(const struct parse *p, const char *section, const char *a, const char *b)
{
	const struct config_key *ka = config_key_find(section, a), *kb = b ? config_key_find(section, b) : ka;

	return MAX(p->key_line[ka - config_keys], p->key_line[kb - config_keys]);
}

static void check_marks(struct parse *p)
{
	const struct config_watermarks *w = &p->cfg->dram_marks;

	if (w->min > w->low)
		refuse(p, line_of(p, "dram", "free_min", "free_low"),
		       "free_min: %u.%u, must be at most free_low (%u.%u)", w->min / 10, w->min % 10,
		       w->low / 10, w->low % 10);
	else if (w->low > w->high)
		refuse(p, line_of(p, "dram", "free_low", "free_high"),
		       "free_low: %u.%u, must be at most free_high (%u.%u)", w->low / 10, w->low % 10,
		       w->high / 10, w->high % 10);
}

/* A segment that nobody chose follows the size. */
static void fit_segments(struct parse *p)
{
	struct config *c = p->cfg;
	uint64_t least = ALIGN_UP(c->dram_size / DRAM_MAX_SEGMENTS, UINT64_C(256) << 20);

	if (!line_of(p, "dram", "segment", NULL))
		c->dram_segment = MIN(MAX(c->dram_segment, least), c->dram_size / (4u << 20) * (4u << 20));
	if (!line_of(p, "nvme", "segment", NULL))
		c->nvme_segment = MIN(c->nvme_segment, c->nvme_size / 8 / (1u << 20) * (1u << 20));
}

static void check_sizes(struct parse *p)
{
	const struct config *c = p->cfg;

	if (c->dram_segment > c->dram_size)
		refuse(p, line_of(p, "dram", "segment", "size"), "segment: %llu, must be at most size (%llu)",
		       (unsigned long long)c->dram_segment, (unsigned long long)c->dram_size);
	if (c->dram_size / DRAM_MAX_SEGMENTS > c->dram_segment)
		refuse(p, line_of(p, "dram", "segment", "size"),
		       "segment: %llu, must be at least size (%llu) / %u", (unsigned long long)c->dram_segment,
		       (unsigned long long)c->dram_size, DRAM_MAX_SEGMENTS);
	if (c->dram_segment % (2u << 20))
		refuse(p, line_of(p, "dram", "segment", NULL), "segment: %llu, must be a multiple of 2M",
		       (unsigned long long)c->dram_segment);
	if (c->nvme_segment > c->nvme_size / 8)
		refuse(p, line_of(p, "nvme", "segment", "size"),
		       "segment: %llu, must be at most an eighth of size (%llu)",
		       (unsigned long long)c->nvme_segment, (unsigned long long)c->nvme_size);
	if (c->nvme_segment % (1u << 20))
		refuse(p, line_of(p, "nvme", "segment", NULL), "segment: %llu, must be a multiple of 1M",
		       (unsigned long long)c->nvme_segment);
}

static void check_budget(struct parse *p)
{
	const struct config *c = p->cfg;
	unsigned line = MAX(line_of(p, "budget", "device", "dram"), line_of(p, "budget", "nvme", NULL));
	uint32_t sum = c->budget_device + c->budget_dram + c->budget_nvme;

	if (sum > 1000)
		refuse(p, line, "device + dram + nvme: %u.%u, must be at most 100.0", sum / 10, sum % 10);
	else if (sum && !c->budget_device)
		refuse(p, line, "device: 0.0, must be above 0 when dram or nvme is set");
	else if (c->budget_nvme && !c->nvme_enabled)
		refuse(p, line_of(p, "budget", "nvme", NULL),
		       "nvme: %u.%u, must be 0 while [nvme] enabled is no", c->budget_nvme / 10,
		       c->budget_nvme % 10);
}

static void check_policies(struct parse *p)
{
	const struct policy_ops *fallback = policy_find(p->cfg->fallback);

	if (!policy_find(p->cfg->policy))
		refuse(p, line_of(p, "policy", "default", NULL), "default: \"%s\", no such policy",
		       p->cfg->policy);
	if (!fallback)
		refuse(p, line_of(p, "policy", "fallback", NULL), "fallback: \"%s\", no such policy",
		       p->cfg->fallback);
	else if (fallback->caps & POLICY_NEEDS_WEIGHTS || fallback->id == POLICY_CLIENT)
		refuse(p, line_of(p, "policy", "fallback", NULL),
		       "fallback: \"%s\", must run without a weight file and without the client's scores",
		       p->cfg->fallback);
}

int config_socket_path(const struct config *c, int tenant, char *ret, size_t size)
{
	const char *s = tenant < 0 ? c->admin_socket : c->tenant[tenant].socket;
	int n = *s == '/' ? snprintf(ret, size, "%s", s) : snprintf(ret, size, "%s/%s", c->run_dir, s);

	if (n < 0 || (size_t)n >= size || (size_t)n >= sizeof(((struct sockaddr_un *)0)->sun_path))
		return -ENAMETOOLONG;
	return 0;
}

static unsigned socket_line(const struct parse *p, int tenant)
{
	static const char *const global[] = {"admin_socket", "run_dir"};
	const struct config_key *k = config_key_find("tenant", "socket");

	if (tenant < 0)
		return line_of(p, "kvtierd", global[0], global[1]);
	return p->tenant_key_line[tenant][k - config_keys] ?: p->tenant_line[tenant];
}

static void check_sockets(struct parse *p)
{
	const struct config *c = p->cfg;
	char a[CONFIG_PATH + 128], b[CONFIG_PATH + 128];

	for (int i = -1; i < (int)c->tenants; i++) {
		const char *key = i < 0 ? "admin_socket" : "socket";
		const char *val = i < 0 ? c->admin_socket : c->tenant[i].socket;

		if (config_socket_path(c, i, a, sizeof(a))) {
			refuse(p, MAX(socket_line(p, i), line_of(p, "kvtierd", "run_dir", NULL)),
			       "%s: \"%s\", with run_dir \"%s\" must be at most %zu bytes", key, val,
			       c->run_dir, sizeof(((struct sockaddr_un *)0)->sun_path) - 1);
			return;
		}
		for (int j = -1; j < i; j++) {
			if (config_socket_path(c, j, b, sizeof(b)) || strcmp(a, b))
				continue;
			refuse(p, MAX(socket_line(p, i), socket_line(p, j)),
			       "socket: \"%s\", already the socket of %s%s", val,
			       j < 0 ? "kvtierctl (admin_socket)" : "tenant ", j < 0 ? "" : c->tenant[j].name);
			return;
		}
	}
}

static void check_relations(struct parse *p)
{
	check_marks(p);
	check_sizes(p);
	check_budget(p);
	check_policies(p);
	check_sockets(p);
}

int config_check(const struct config *c, char *err, size_t errsize)
{
	struct config copy = *c;
	struct parse p = {.cfg = &copy, .tenant = -1, .err = err, .errsize = errsize};

	if (!*copy.file)
		strcpy(copy.file, "options");
	check_relations(&p);
	return p.failed ? -EINVAL : 0;
}

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
		refuse(p, 0, "%s", strerror(errno));
		return r;
	}
	r = ini_parse_stream(read_line, p, handle, p);
	if (ferror(p->f))
		refuse(p, 0, "cannot be read");
	fclose(p->f);
	if (r > 0 && (unsigned)r < p->fail_line)
		p->failed = false; /* libinih reads on after a line that it could not split */
	if (r > 0)
		refuse(p, (unsigned)r, "neither [section] nor key = value");
	if (!cfg->tenants) {
		tenant_defaults(&cfg->tenant[0], "default");
		cfg->tenants = 1;
	}
	fit_segments(p);
	cfg->nvme_marks.low = cfg->nvme_marks.high = cfg->nvme_marks.min;
	check_relations(p);
	if (p->failed)
		return -EINVAL;
	*c = *cfg;
	return 0;
}
