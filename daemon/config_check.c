/* SPDX-License-Identifier: MIT */
/* What keys must be to one another: order of marks, sizes that fit, sockets that differ. */
#include <stdio.h>
#include <string.h>
#include <sys/un.h>
#include "daemon/config_keys.h"
#include "daemon/config_parse.h"
#include "daemon/metrics.h"
#include "daemon/pressure.h"
#include "policy/policy.h"
#include "shm/util.h"

#define DRAM_MAX_SEGMENTS 4096u /* what the tier's allocator can number */

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
		config_refuse(p, line_of(p, "dram", "free_min", "free_low"),
			      "free_min: %u.%u, must be at most free_low (%u.%u)", w->min / 10, w->min % 10,
			      w->low / 10, w->low % 10);
	else if (w->low > w->high)
		config_refuse(p, line_of(p, "dram", "free_low", "free_high"),
			      "free_low: %u.%u, must be at most free_high (%u.%u)", w->low / 10, w->low % 10,
			      w->high / 10, w->high % 10);
}

void config_fit(struct parse *p)
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
		config_refuse(p, line_of(p, "dram", "segment", "size"),
			      "segment: %llu, must be at most size (%llu)", (unsigned long long)c->dram_segment,
			      (unsigned long long)c->dram_size);
	if (c->dram_size / DRAM_MAX_SEGMENTS > c->dram_segment)
		config_refuse(p, line_of(p, "dram", "segment", "size"),
			      "segment: %llu, must be at least size (%llu) / %u",
			      (unsigned long long)c->dram_segment, (unsigned long long)c->dram_size,
			      DRAM_MAX_SEGMENTS);
	if (c->dram_segment % (2u << 20))
		config_refuse(p, line_of(p, "dram", "segment", NULL), "segment: %llu, must be a multiple of 2M",
			      (unsigned long long)c->dram_segment);
	if (c->nvme_segment > c->nvme_size / 8)
		config_refuse(p, line_of(p, "nvme", "segment", "size"),
			      "segment: %llu, must be at most an eighth of size (%llu)",
			      (unsigned long long)c->nvme_segment, (unsigned long long)c->nvme_size);
	if (c->nvme_segment % (1u << 20))
		config_refuse(p, line_of(p, "nvme", "segment", NULL), "segment: %llu, must be a multiple of 1M",
			      (unsigned long long)c->nvme_segment);
}

static void check_pressure(struct parse *p)
{
	uint32_t stall, window;
	char why[128];
	bool full;

	if (psi_parse(p->cfg->pressure_psi, &full, &stall, &window, why, sizeof(why)) < 0)
		config_refuse(p, line_of(p, "pressure", "psi", NULL), "psi: %s", why);
}

static void check_budget(struct parse *p)
{
	const struct config *c = p->cfg;
	unsigned line = MAX(line_of(p, "budget", "device", "dram"), line_of(p, "budget", "nvme", NULL));
	uint32_t sum = c->budget_device + c->budget_dram + c->budget_nvme;

	if (sum > 1000)
		config_refuse(p, line, "device + dram + nvme: %u.%u, must be at most 100.0", sum / 10,
			      sum % 10);
	else if (sum && !c->budget_device)
		config_refuse(p, line, "device: 0.0, must be above 0 when dram or nvme is set");
	else if (c->budget_nvme && !c->nvme_enabled)
		config_refuse(p, line_of(p, "budget", "nvme", NULL),
			      "nvme: %u.%u, must be 0 while [nvme] enabled is no", c->budget_nvme / 10,
			      c->budget_nvme % 10);
}

static void check_policies(struct parse *p)
{
	const struct policy_ops *fallback = policy_find(p->cfg->fallback);

	if (!policy_find(p->cfg->policy))
		config_refuse(p, line_of(p, "policy", "default", NULL), "default: \"%s\", no such policy",
			      p->cfg->policy);
	if (!fallback)
		config_refuse(p, line_of(p, "policy", "fallback", NULL), "fallback: \"%s\", no such policy",
			      p->cfg->fallback);
	else if (fallback->caps & POLICY_NEEDS_WEIGHTS || fallback->id == POLICY_CLIENT)
		config_refuse(
			p, line_of(p, "policy", "fallback", NULL),
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
			config_refuse(p, MAX(socket_line(p, i), line_of(p, "kvtierd", "run_dir", NULL)),
				      "%s: \"%s\", with run_dir \"%s\" must be at most %zu bytes", key, val,
				      c->run_dir, sizeof(((struct sockaddr_un *)0)->sun_path) - 1);
			return;
		}
		for (int j = -1; j < i; j++) {
			if (config_socket_path(c, j, b, sizeof(b)) || strcmp(a, b))
				continue;
			config_refuse(p, MAX(socket_line(p, i), socket_line(p, j)),
				      "socket: \"%s\", already the socket of %s%s", val,
				      j < 0 ? "kvtierctl (admin_socket)" : "tenant ",
				      j < 0 ? "" : c->tenant[j].name);
			return;
		}
	}
}

static void check_metrics(struct parse *p)
{
	char why[256];

	if (metrics_where(p->cfg->metrics_listen, why, sizeof(why)) < 0)
		config_refuse(p, line_of(p, "metrics", "listen", NULL), "listen: %s", why);
}

void config_relations(struct parse *p)
{
	check_metrics(p);
	check_marks(p);
	check_sizes(p);
	check_pressure(p);
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
	config_relations(&p);
	return p.failed ? -EINVAL : 0;
}
