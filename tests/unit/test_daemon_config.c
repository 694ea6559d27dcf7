/* SPDX-License-Identifier: MIT */
/* Configuration: what is accepted, what is refused and in which words, and that printing is the inverse of
 * reading. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <syslog.h>
#include <fcntl.h>
#include <cmocka.h>
#include "daemon/config_keys.h"
#include "shm/util.h"

struct fixture {
	char dir[32], file[64];
	char err[512];
	struct config cfg;
};

static int setup(void **state)
{
	struct fixture *f = calloc(1, sizeof(*f));

	strcpy(f->dir, "/tmp/kvt.XXXXXX");
	assert_non_null(mkdtemp(f->dir));
	snprintf(f->file, sizeof(f->file), "%s/c.conf", f->dir);
	*state = f;
	return 0;
}

static int teardown(void **state)
{
	struct fixture *f = *state;

	unlink(f->file);
	rmdir(f->dir);
	free(f);
	return 0;
}

static int load_bytes(struct fixture *f, const char *text, size_t n)
{
	int fd = open(f->file, O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0600);

	assert_true(fd >= 0);
	assert_int_equal(write(fd, text, n), n);
	close(fd);
	memset(&f->cfg, 0x5a, sizeof(f->cfg));
	f->err[0] = 0;
	return config_load(&f->cfg, f->file, f->err, sizeof(f->err));
}

static int load(struct fixture *f, const char *text)
{
	return load_bytes(f, text, strlen(text));
}

/* The error must be exactly "<file><rest>", and the target untouched. */
static void refused(struct fixture *f, const char *text, const char *rest)
{
	char want[640];

	assert_int_equal(load(f, text), -EINVAL);
	snprintf(want, sizeof(want), "%s%s", f->file, rest);
	assert_string_equal(f->err, want);
	assert_int_equal(*(unsigned char *)&f->cfg, 0x5a);
}

static char *print(const struct config *c)
{
	static char buf[32768];
	FILE *t = tmpfile();
	size_t n;

	assert_non_null(t);
	config_print(c, fileno(t));
	rewind(t);
	n = fread(buf, 1, sizeof(buf) - 1, t);
	buf[n] = 0;
	fclose(t);
	return buf;
}

static void defaults_are_sound(void **state)
{
	struct config c;
	char err[256];

	config_defaults(&c);
	assert_int_equal(config_check(&c, err, sizeof(err)), 0);
	assert_string_equal(c.file, "");
	assert_string_equal(c.run_dir, "/run/kvtier");
	assert_int_equal(c.log_level, LOG_INFO);
	assert_int_equal(c.dram_node, -2); /* each client's */
	assert_int_equal(c.dram_size, 4ull << 30);
	assert_int_equal(c.dram_marks.low, 50);
	assert_false(c.nvme_enabled);
	assert_int_equal(c.protect_first, 4);
	assert_int_equal(c.protect_last, 16);
	assert_int_equal(c.tenants, 1);
	assert_string_equal(c.tenant[0].name, "default");
	assert_string_equal(c.tenant[0].socket, "kvtierd.sock");
	assert_int_equal(c.tenant[0].socket_mode, 0660);
	assert_true(c.tenant[0].dram_bytes == UINT64_MAX);
}

static void empty_file_is_the_defaults(void **state)
{
	struct fixture *f = *state;
	struct config c;

	config_defaults(&c);
	assert_int_equal(load(f, "# nothing\n\n; nothing\n"), 0);
	assert_string_equal(f->cfg.file, f->file);
	strcpy(c.file, f->file);
	assert_memory_equal(&c, &f->cfg, sizeof(c));
}

static void printed_defaults_read_back(void **state)
{
	struct fixture *f = *state;
	struct config c;

	config_defaults(&c);
	assert_int_equal(load(f, print(&c)), 0);
	strcpy(c.file, f->file);
	/* Every key knows where it stands; otherwise nothing differs. */
	for (unsigned i = 0; i < config_n_keys; i++)
		assert_true(strcmp(config_keys[i].section, "tenant") ? f->cfg.line[i]
								     : f->cfg.tenant[0].line[i]);
	memcpy(c.line, f->cfg.line, sizeof(c.line));
	memcpy(c.tenant[0].line, f->cfg.tenant[0].line, sizeof(c.tenant[0].line));
	assert_memory_equal(&c, &f->cfg, sizeof(c));
}

/* Another legal value for a key, so that a field which is never stored, or stored elsewhere, is noticed. */
static void other_value(const struct config_key *k, const void *base, char *buf, size_t size)
{
	uint64_t v = 0;

	if (k->size <= 8)
		memcpy(&v, (const char *)base + k->off, k->size);
	switch (k->type) {
	case KEY_BOOL:
		snprintf(buf, size, "%s", v ? "no" : "yes");
		break;
	case KEY_SPREAD:
		snprintf(buf, size, "%s", v == 2 ? "lanes" : "tenant");
		break;
	case KEY_OBSERVE:
		snprintf(buf, size, "%s", v ? "publish" : "observe");
		break;
	case KEY_LEVEL:
		snprintf(buf, size, "debug");
		break;
	case KEY_OCTAL:
		snprintf(buf, size, "0600");
		break;
	case KEY_SIZE:
	case KEY_QUOTA:
		snprintf(buf, size, "%lluM", (unsigned long long)(k->min >> 20) + 3);
		break;
	case KEY_SHARE:
		snprintf(buf, size, "%llu.%llu", (unsigned long long)(v + 11) / 10,
			 (unsigned long long)(v + 11) % 10);
		break;
	case KEY_NODE:
		snprintf(buf, size, "7");
		break;
	case KEY_COUNT:
		snprintf(buf, size, "%llu", (unsigned long long)v + 1);
		break;
	case KEY_PATH:
		snprintf(buf, size, "/other/%s", k->name);
		break;
	default:
		snprintf(buf, size, "other-%s", k->name);
	}
}

static void every_key_is_stored_and_printed(void **state)
{
	struct config d, c;
	char text[256], back[CONFIG_PATH], err[256];

	config_defaults(&d);
	for (unsigned i = 0; i < config_n_keys; i++) {
		const struct config_key *k = &config_keys[i];
		bool tenant = !strcmp(k->section, "tenant");
		void *base;

		c = d;
		base = tenant ? (void *)&c.tenant[0] : (void *)&c;
		other_value(k, base, text, sizeof(text));
		if (config_value_parse(k, base, text, err, sizeof(err)))
			fail_msg("[%s] %s = %s: %s", k->section, k->name, text, err);
		config_value_format(k, base, back, sizeof(back));
		assert_string_equal(back, text);
		assert_memory_not_equal(&c, &d, sizeof(c));
		assert_non_null(strstr(print(&c), text));
		/* Nothing but this field changed. */
		memcpy(config_field(base, k),
		       (const char *)(tenant ? (void *)&d.tenant[0] : (void *)&d) + k->off, k->size);
		assert_memory_equal(&c, &d, sizeof(c));
		/* What a reload may change is what the table says. */
		config_value_parse(k, base, text, err, sizeof(err));
		assert_int_equal(config_reloadable(&d, &c, err, sizeof(err)), k->reload ? 0 : -EINVAL);
		if (!k->reload) {
			assert_non_null(strstr(err, k->name));
			assert_non_null(strstr(err, text));
		}
	}
}

static void limits_are_inclusive(void **state)
{
	struct config c;
	char text[64], err[256];

	config_defaults(&c);
	for (unsigned i = 0; i < config_n_keys; i++) {
		const struct config_key *k = &config_keys[i];
		void *base = strcmp(k->section, "tenant") ? (void *)&c : (void *)&c.tenant[0];

		if (k->type != KEY_COUNT && k->type != KEY_SIZE && k->type != KEY_QUOTA)
			continue;
		snprintf(text, sizeof(text), "%llu", (unsigned long long)k->min);
		assert_int_equal(config_value_parse(k, base, text, err, sizeof(err)), 0);
		snprintf(text, sizeof(text), "%llu", (unsigned long long)k->max);
		assert_int_equal(config_value_parse(k, base, text, err, sizeof(err)), 0);
		if (k->min) {
			snprintf(text, sizeof(text), "%llu", (unsigned long long)k->min - 1);
			assert_int_equal(config_value_parse(k, base, text, err, sizeof(err)), -EINVAL);
		}
		if (k->max != UINT64_MAX) {
			snprintf(text, sizeof(text), "%llu", (unsigned long long)k->max + 1);
			assert_int_equal(config_value_parse(k, base, text, err, sizeof(err)), -EINVAL);
		}
		assert_int_equal(config_value_parse(k, base, "18446744073709551616", err, sizeof(err)),
				 -EINVAL);
	}
}

static void values_are_read(void **state)
{
	struct fixture *f = *state;

	assert_int_equal(load(f, "[kvtierd]\nworkers = 3 ; inline\nmode=observe\nlog_level = 7\n"
				 "[dram]\nsize = 512m\nsegment=4M\nnode = 1\nfree_low = 3.5%\nhuge_pages=off\n"
				 "[nvme]\nenabled = yes\n"
				 "[budget]\ndevice = 20\ndram=30.5\nnvme = 49.5\n"
				 "[tenant a]\nmax_dram = 1G\n[tenant b.c]\nsocket=/run/x/b\nmax_nvme = none\n"),
			 0);
	assert_int_equal(f->cfg.workers, 3);
	assert_true(f->cfg.observe);
	assert_int_equal(f->cfg.log_level, LOG_DEBUG);
	assert_int_equal(f->cfg.dram_size, 512 << 20);
	assert_int_equal(f->cfg.dram_node, 1);
	assert_int_equal(f->cfg.dram_marks.low, 35);
	assert_false(f->cfg.dram_huge);
	assert_int_equal(f->cfg.budget_dram, 305);
	assert_int_equal(f->cfg.budget_nvme, 495);
	assert_int_equal(f->cfg.tenants, 2);
	assert_string_equal(f->cfg.tenant[0].name, "a");
	assert_string_equal(f->cfg.tenant[0].socket, "a.sock");
	assert_int_equal(f->cfg.tenant[0].dram_bytes, 1 << 30);
	assert_string_equal(f->cfg.tenant[1].name, "b.c");
	assert_string_equal(f->cfg.tenant[1].socket, "/run/x/b");
}

static void segments_follow_sizes(void **state)
{
	struct fixture *f = *state;

	assert_int_equal(load(f, "[dram]\nsize = 65M\n[nvme]\nsize = 18M\n"), 0);
	assert_int_equal(f->cfg.dram_segment, 64 << 20);
	assert_int_equal(f->cfg.nvme_segment, 2 << 20);
	assert_int_equal(load(f, "[dram]\nsize = 2T\n"), 0);
	assert_int_equal(f->cfg.dram_segment, 512 << 20);
	assert_int_equal(load(f, "[dram]\nsize = 64T\n"), 0);
	assert_int_equal(f->cfg.dram_segment, 16ull << 30);
	assert_int_equal(load(f, "[dram]\nsize = 4M\n[nvme]\nsize = 16M\n"), 0);
	assert_int_equal(f->cfg.dram_segment, 4 << 20);
}

static void a_tenant_needs_no_keys(void **state)
{
	struct fixture *f = *state;

	assert_int_equal(load(f, "[tenant a]\n[tenant b]\n"), 0);
	assert_int_equal(f->cfg.tenants, 2);
	assert_string_equal(f->cfg.tenant[1].socket, "b.sock");
}

static void unknown_is_refused(void **state)
{
	struct fixture *f = *state;

	refused(f, "[dram]\n\ncolour = 1\n", ":3: key \"colour\" in [dram]: unknown");
	refused(f, "[tenant a]\nsize = 1\n", ":2: key \"size\" in [tenant a]: unknown");
	refused(f, "[dram]\nsiez = 1G\n", ":2: key \"siez\" in [dram]: unknown; did you mean \"size\"?");
	refused(f, "[policy]\nslak = 1\n", ":2: key \"slak\" in [policy]: unknown; did you mean \"slack\"?");
	refused(f, "[tenant a]\nmaxseqs = 1\n",
		":2: key \"maxseqs\" in [tenant a]: unknown; did you mean \"max_seqs\"?");
	refused(f, "[zzzz]\n", ":1: section [zzzz]: unknown");
	refused(f, "[dramm]\nsize = 1G\n", ":1: section [dramm]: unknown; did you mean [dram]?");
	refused(f, "[dramm]\n", ":1: section [dramm]: unknown; did you mean [dram]?");
	refused(f, "[tenant]\nmax_seqs = 1\n", ":1: [tenant]: must be [tenant NAME]");
	refused(f, "size = 1G\n", ":1: key \"size\": stands before the first [section]");
}

static void malformed_lines_are_refused(void **state)
{
	struct fixture *f = *state;
	char text[1024];

	refused(f, "[dram]\nsize 1G\n", ":2: neither [section] nor key = value");
	refused(f, "[dram]\nsize 1G\ncolour = 1\n", ":2: neither [section] nor key = value");
	refused(f, "[dram] size = 1G\n", ":1: neither [section] nor key = value");
	assert_int_equal(load(f, "[dram] # memory\nsize = 1G\n"), 0);
	refused(f, "[dram\nsize = 1G\n", ":1: neither [section] nor key = value");
	refused(f, "[dram]\nsize = 1G\n  2G\n", ":3: begins with a blank; lines are not continued");
	refused(f, "[dram]\nsize = 1G\nnode = 1\nsize = 2G\n", ":4: size: given twice, first on line 2");
	memset(text, 'x', sizeof(text));
	memcpy(text, "[policy]\nmodel_dir = /", 22);
	text[sizeof(text) - 1] = 0;
	assert_int_equal(load(f, text), -EINVAL);
	assert_non_null(strstr(f->err, ":2: line longer than "));
	assert_int_equal(load_bytes(f, "[dram]\nsize = 1G\0\nnode = 1\n", 27), -EINVAL);
	assert_non_null(strstr(f->err, ":2: a NUL byte"));
}

static void bad_values_name_value_and_limit(void **state)
{
	struct fixture *f = *state;

	refused(f, "[kvtierd]\nworkers = 257\n", ":2: workers: \"257\", must be a number from 0 to 256");
	refused(f, "[kvtierd]\nworkers = -1\n", ":2: workers: \"-1\", must be a number from 0 to 256");
	refused(f, "[kvtierd]\nworkers =\n", ":2: workers: \"\", must be a number from 0 to 256");
	refused(f, "[kvtierd]\nworkers = 4x\n", ":2: workers: \"4x\", must be a number from 0 to 256");
	refused(f, "[kvtierd]\nmode = on\n", ":2: mode: \"on\", must be publish or observe");
	refused(f, "[kvtierd]\nrun_dir = run\n",
		":2: run_dir: \"run\", must be an absolute path of at most 255 bytes");
	refused(f, "[dram]\nsize = 12Q\n", ":2: size: \"12Q\", must be bytes (K, M, G, T), 4M to 64T");
	refused(f, "[dram]\nsize = 99999999999T\n",
		":2: size: \"99999999999T\", must be bytes (K, M, G, T), 4M to 64T");
	refused(f, "[dram]\nhuge_pages = maybe\n", ":2: huge_pages: \"maybe\", must be yes or no");
	refused(f, "[dram]\nnode = -1\n", ":2: node: \"-1\", must be client, interleave, off or a node from 0 to 1023");
	refused(f, "[budget]\ndevice = 100.1\n",
		":2: device: \"100.1\", must be percent with at most one decimal, 0.0 to 100.0");
	refused(f, "[budget]\ndevice = 1.25\n",
		":2: device: \"1.25\", must be percent with at most one decimal, 0.0 to 100.0");
	refused(f, "[tenant a]\nsocket_mode = 0888\n", ":2: socket_mode: \"0888\", must be octal, 0 to 777");
	refused(f, "[tenant a]\nsocket =\n", ":2: socket: \"\", must be a path of 1 to 107 bytes");
	refused(f, "[tenant a]\nmax_dram = all\n",
		":2: max_dram: \"all\", must be bytes (K, M, G, T), 0 to 64T, or none");
	refused(f, "[policy]\ndefault = a b\n",
		":2: default: \"a b\", must be 1 to 31 letters, digits or . _ -");
}

static void relations_are_checked(void **state)
{
	struct fixture *f = *state;

	refused(f, "[dram]\nfree_high = 1\nfree_low = 5\n",
		":3: free_low: 5.0, must be at most free_high (1.0)");
	refused(f, "[dram]\nfree_min = 20\n", ":2: free_min: 20.0, must be at most free_low (5.0)");
	refused(f, "[dram]\nsegment = 256M\nsize = 8M\n",
		":3: segment: 268435456, must be at most size (8388608)");
	refused(f, "[dram]\nsegment = 256M\nsize = 2T\n",
		":3: segment: 268435456, must be at least size (2199023255552) / 4096");
	refused(f, "[nvme]\nsize = 32M\nsegment = 5M\n",
		":3: segment: 5242880, must be at most an eighth of size (33554432)");
	refused(f, "[dram]\nsegment = 5M\n", ":2: segment: 5242880, must be a multiple of 2M");
	refused(f, "[nvme]\nenabled = yes\n[budget]\ndevice = 50\ndram = 30\nnvme = 30\n",
		":6: device + dram + nvme: 110.0, must be at most 100.0");
	refused(f, "[budget]\ndram = 50\n", ":2: device: 0.0, must be above 0 when dram or nvme is set");
	refused(f, "[budget]\ndevice = 50\nnvme = 50\n",
		":3: nvme: 50.0, must be 0 while [nvme] enabled is no");
	refused(f, "[policy]\ndefault = best\n", ":2: default: \"best\", no such policy");
	refused(f, "[policy]\nfallback = best\n", ":2: fallback: \"best\", no such policy");
	refused(f, "[policy]\nfallback = kvp\n",
		":2: fallback: \"kvp\", must run without a weight file and without the client's scores");
	refused(f, "[policy]\nfallback = client\n",
		":2: fallback: \"client\", must run without a weight file and without the client's scores");
	refused(f, "[tenant a]\n[tenant b]\nsocket = a.sock\n",
		":3: socket: \"a.sock\", already the socket of tenant a");
	refused(f, "[kvtierd]\nrun_dir = /x\n[tenant b]\nsocket = /x/admin.sock\n",
		":4: socket: \"/x/admin.sock\", already the socket of kvtierctl (admin_socket)");
	refused(f, "[tenant a]\n[tenant a]\n", ":2: [tenant a]: given twice, first on line 1");
	refused(f, "[tenant admin]\n", ":1: [tenant admin]: name: \"admin\" is the admin socket's");
	refused(f, "[tenant a/b]\n", ":1: [tenant a/b]: name: must be 1 to 31 letters, digits or . _ -");
}

static void socket_paths_fit_the_address(void **state)
{
	struct fixture *f = *state;
	char text[256], dir[101], path[108];

	memset(dir, 'd', sizeof(dir));
	dir[0] = '/';
	dir[100] = 0;
	snprintf(text, sizeof(text),
		 "[kvtierd]\nrun_dir = %s\nadmin_socket = /a\n[tenant a]\nsocket = 7bytes7\n", dir);
	assert_int_equal(load(f, text), -EINVAL); /* 100 + 1 + 7 = 108: no room for the NUL */
	assert_non_null(strstr(f->err, ":5: socket: \"7bytes7\", with run_dir"));
	snprintf(text, sizeof(text),
		 "[kvtierd]\nrun_dir = %s\nadmin_socket = /a\n[tenant a]\nsocket = 6bytes\n", dir);
	assert_int_equal(load(f, text), 0);
	assert_int_equal(config_socket_path(&f->cfg, 0, path, sizeof(path)), 0);
	assert_int_equal(strlen(path), 107);
	assert_int_equal(config_socket_path(&f->cfg, -1, path, sizeof(path)), 0);
	assert_string_equal(path, "/a");
}

static void too_many_tenants(void **state)
{
	struct fixture *f = *state;
	char text[4096];
	size_t n = 0;

	for (int i = 0; i <= CONFIG_MAX_TENANTS; i++)
		n += (size_t)snprintf(text + n, sizeof(text) - n, "[tenant t%d]\n", i);
	refused(f, text, ":65: [tenant t64]: more than 64 tenants");
}

static void unreadable_files(void **state)
{
	struct fixture *f = *state;
	struct config c;

	assert_int_equal(config_load(&c, "/nonexistent/k.conf", f->err, sizeof(f->err)), -ENOENT);
	assert_string_equal(f->err, "/nonexistent/k.conf: No such file or directory");
	assert_int_equal(config_load(&c, f->dir, f->err, sizeof(f->err)), -EINVAL);
	assert_non_null(strstr(f->err, "cannot be read"));
}

static void tenants_stay_over_a_reload(void **state)
{
	struct fixture *f = *state;
	struct config a;

	assert_int_equal(load(f, "[tenant a]\n[tenant b]\n"), 0);
	a = f->cfg;
	assert_int_equal(load(f, "[tenant a]\n"), 0);
	assert_int_equal(config_reloadable(&a, &f->cfg, f->err, sizeof(f->err)), -EINVAL);
	assert_string_equal(f->err,
			    "tenants: 2 cannot become 1 without a restart: their sockets are bound at the "
			    "start, and sequences count against them");
	assert_int_equal(load(f, "[tenant b]\n[tenant a]\n"), 0);
	assert_int_equal(config_reloadable(&a, &f->cfg, f->err, sizeof(f->err)), -EINVAL);
	assert_int_equal(load(f, "[tenant a]\nmax_seqs = 5\n[tenant b]\n[budget]\ndevice = 10\n"), 0);
	assert_int_equal(config_reloadable(&a, &f->cfg, f->err, sizeof(f->err)), 0);
	assert_int_equal(load(f, "[tenant a]\n[tenant b]\n[dram]\nsize = 5G\n"), 0);
	assert_int_equal(config_reloadable(&a, &f->cfg, f->err, sizeof(f->err)), -EINVAL);
	assert_string_equal(f->err,
			    "[dram] size: \"4G\" cannot become \"5G\" without a restart: the tier lays its "
			    "memory out when it opens, and rows are in it");
}

static void note_line(void *arg, const char *line)
{
	strcat(strcat(arg, line), "\n");
}

static void changes_are_named_with_old_and_new(void **state)
{
	struct fixture *f = *state;
	char lines[4096] = "";
	struct config a;

	assert_int_equal(load(f, "[tenant a]\n[tenant b]\nmax_dram = 1G\n"), 0);
	a = f->cfg;
	config_changes(&a, &f->cfg, note_line, lines);
	assert_string_equal(lines, "");
	assert_int_equal(load(f, "[kvtierd]\nlog_level = debug\n[policy]\nslack = 10\n[tenant a]\n"
				 "[tenant b]\nmax_dram = none\n"),
			 0);
	config_changes(&a, &f->cfg, note_line, lines);
	assert_string_equal(lines, "[kvtierd] log_level: info -> debug\n[policy] slack: 64 -> 10\n"
				   "[tenant b] max_dram: 1G -> none\n");
}

static void a_print_says_default_and_source(void **state)
{
	struct fixture *f = *state;
	char line[512];

	assert_int_equal(load(f, "[policy]\nslack = 10\n[tenant t]\nmax_seqs = 7\n"), 0);
	snprintf(line, sizeof(line), "# default: 64; set at %s:2; follows a reload\nslack = 10\n", f->file);
	assert_non_null(strstr(print(&f->cfg), line));
	snprintf(line, sizeof(line), "# default: 16384; set at %s:4; follows a reload\nmax_seqs = 7\n",
		 f->file);
	assert_non_null(strstr(print(&f->cfg), line));
	assert_non_null(strstr(print(&f->cfg), "# default: 4G; not set\nsize = 4G\n"));
}

/* Values at the edge of what a line can say, from a file with a name that no line has room for. */
static void odd_values_are_printed_so_that_they_are_read_again(void **state)
{
	struct fixture *f = *state;
	char text[512], *printed;
	struct config c;

	snprintf(text, sizeof(text), "[kvtierd]\nadmin_socket=;x\n[policy]\nmodel_dir=/%0187d\n", 0);
	if (load(f, text) < 0)
		fail_msg("%s", f->err);
	assert_string_equal(f->cfg.admin_socket, ";x");
	memset(f->cfg.file, 'f', sizeof(f->cfg.file) - 1);
	c = f->cfg;
	printed = print(&c);
	for (char *line = printed, *end; (end = strchr(line, '\n')); line = end + 1)
		assert_in_range(end - line, 0, 198);
	assert_int_equal(load(f, printed), 0);
	assert_string_equal(f->cfg.admin_socket, ";x");
	assert_string_equal(f->cfg.model_dir, c.model_dir);
}

/* stderr of fn, in a static buffer. */
static const char *logged(void (*fn)(void))
{
	static char buf[8192];
	int saved = dup(2), p[2];
	ssize_t n;

	assert_int_equal(pipe2(p, O_CLOEXEC | O_NONBLOCK), 0);
	dup2(p[1], 2);
	fn();
	dup2(saved, 2);
	close(saved);
	n = read(p[0], buf, sizeof(buf) - 1);
	buf[n > 0 ? n : 0] = 0;
	close(p[0]);
	close(p[1]);
	return buf;
}

static void say_hostile(void)
{
	log_line(LOG_WARNING, "client \"%s\"", "a\n<0>forged\x1b[31m\xff");
}

static void say_levels(void)
{
	log_set_level(LOG_WARNING);
	log_line(LOG_INFO, "quiet");
	log_line(LOG_ERR, "loud %d", 7);
	log_set_level(LOG_INFO);
}

static void say_long(void)
{
	char text[3000];

	memset(text, '\n', sizeof(text));
	text[sizeof(text) - 1] = 0;
	log_line(LOG_ERR, "%s", text);
}

static void log_lines_cannot_be_forged(void **state)
{
	const char *s;

	assert_string_equal(logged(say_hostile), "<4>client \"a\\x0a<0>forged\\x1b[31m\\xff\"\n");
	assert_string_equal(logged(say_levels), "<3>loud 7\n");
	s = logged(say_long);
	assert_ptr_equal(strchr(s, '\n'), s + strlen(s) - 1);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(defaults_are_sound),
		cmocka_unit_test(empty_file_is_the_defaults),
		cmocka_unit_test(printed_defaults_read_back),
		cmocka_unit_test(every_key_is_stored_and_printed),
		cmocka_unit_test(limits_are_inclusive),
		cmocka_unit_test(values_are_read),
		cmocka_unit_test(segments_follow_sizes),
		cmocka_unit_test(a_tenant_needs_no_keys),
		cmocka_unit_test(unknown_is_refused),
		cmocka_unit_test(changes_are_named_with_old_and_new),
		cmocka_unit_test(odd_values_are_printed_so_that_they_are_read_again),
		cmocka_unit_test(a_print_says_default_and_source),
		cmocka_unit_test(malformed_lines_are_refused),
		cmocka_unit_test(bad_values_name_value_and_limit),
		cmocka_unit_test(relations_are_checked),
		cmocka_unit_test(socket_paths_fit_the_address),
		cmocka_unit_test(too_many_tenants),
		cmocka_unit_test(unreadable_files),
		cmocka_unit_test(tenants_stay_over_a_reload),
		cmocka_unit_test(log_lines_cannot_be_forged),
	};

	return cmocka_run_group_tests(tests, setup, teardown);
}
