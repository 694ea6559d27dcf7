/* SPDX-License-Identifier: MIT */
/* What the kernel allows: io_uring, locked memory, descriptors, PSI, BPF; what the processor and the clock are.
 */
#include <fcntl.h>
#include <grp.h>
#include <liburing.h>
#include <stdio.h>
#include <string.h>
#include "daemon/ctl/doctor.h"
#include "daemon/pressure.h"
#include "shm/util.h"

#define MIB (UINT64_C(1) << 20)

/* 0, -errno, or 1: a ring, but not all that the tier asks of it. */
static int try_ring(void)
{
	static const int ops[] = {IORING_OP_READ, IORING_OP_WRITE, IORING_OP_FSYNC, IORING_OP_READ_FIXED,
				  IORING_OP_WRITE_FIXED};
	struct io_uring ring;
	struct io_uring_probe *probe;
	int r = io_uring_queue_init(8, &ring, 0);

	if (r < 0)
		return r;
	probe = io_uring_get_probe_ring(&ring);
	for (size_t i = 0; i < ARRAY_SIZE(ops); i++)
		if (!probe || !io_uring_opcode_supported(probe, ops[i]))
			r = 1;
	io_uring_free_probe(probe);
	io_uring_queue_exit(&ring);
	return r;
}

void check_io_uring(const struct patient *p, struct finding *f)
{
	uint64_t disabled = 0, group = 0;
	int r;

	host_number(p, &disabled, "/proc/sys/kernel/io_uring_disabled");
	if (!p->cfg.nvme_enabled || !p->cfg.nvme_io_uring) {
		say(f, VERDICT_OK, "not asked for ([nvme] %s = no)",
		    p->cfg.nvme_enabled ? "io_uring" : "enabled");
	} else if (p->running && p->io_uring) {
		say(f, VERDICT_OK, "the daemon uses it; kernel.io_uring_disabled = %llu",
		    (unsigned long long)disabled);
	} else if (disabled >= 2) {
		say(f, VERDICT_WARNING, "kernel.io_uring_disabled = %llu: nobody may use it",
		    (unsigned long long)disabled);
		advise(f, "sysctl -w kernel.io_uring_disabled=0, then systemctl restart kvtierd");
	} else if (disabled) {
		host_number(p, &group, "/proc/sys/kernel/io_uring_group");
		say(f, VERDICT_WARNING, "kernel.io_uring_disabled = 1: only for group %llu",
		    (unsigned long long)group);
		advise(f,
		       "sysctl -w kernel.io_uring_disabled=0, or kernel.io_uring_group to the gid of kvtier");
	} else if ((r = try_ring()) < 0) {
		say(f, VERDICT_WARNING, "io_uring_setup: %s%s", strerror(-r),
		    r == -EPERM ? ": a seccomp filter, as of a container" : "");
		advise(f, r == -ENOSYS ? "use a kernel with CONFIG_IO_URING, or [nvme] io_uring = no"
				       : "allow io_uring_setup, io_uring_enter and io_uring_register in the "
					 "container's "
					 "seccomp profile, or [nvme] io_uring = no");
	} else if (r) {
		say(f, VERDICT_WARNING, "a ring, but without READ, WRITE, FSYNC or their fixed forms");
		advise(f, "use Linux 5.6 or later, or [nvme] io_uring = no");
	} else if (p->running) {
		say(f, VERDICT_NOTE, "allowed here, but the daemon runs on threads");
		advise(f, "journalctl -u kvtierd says why; then systemctl restart kvtierd");
	} else {
		say(f, VERDICT_OK, "a ring with READ, WRITE, FSYNC and fixed buffers was made");
	}
}

void check_memlock(const struct patient *p, struct finding *f)
{
	uint64_t limit, need = p->cfg.nvme_staging + MIB;
	const char *whose;

	if (!p->cfg.nvme_enabled || !p->cfg.nvme_io_uring) {
		say(f, VERDICT_OK, "none is needed without io_uring");
	} else if (!limit_of(p, "Max locked memory", "LimitMEMLOCK", &limit, &whose)) {
		say(f, VERDICT_UNCHECKED, "no limit in %s limits", whose);
	} else if (limit < need) {
		say(f, VERDICT_WARNING, "%s limit is %s, [nvme] staging needs %s", whose, human(limit),
		    human(need));
		advise(f, "systemctl edit kvtierd, [Service] LimitMEMLOCK=infinity");
	} else {
		say(f, VERDICT_OK, "%s limit is %s, [nvme] staging needs %s", whose, human(limit), human(need));
	}
}

void check_descriptors(const struct patient *p, struct finding *f)
{
	uint64_t limit, need = p->cfg.dram_size / MAX(p->cfg.dram_segment, 1) + 1024;
	const char *whose;

	if (!limit_of(p, "Max open files", "LimitNOFILE", &limit, &whose)) {
		say(f, VERDICT_UNCHECKED, "no limit in %s limits", whose);
	} else if (limit < need) {
		say(f, VERDICT_WARNING, "%s limit is %llu files, DRAM segments and 250 clients take %llu",
		    whose, (unsigned long long)limit, (unsigned long long)need);
		advise(f, "systemctl edit kvtierd, [Service] LimitNOFILE=65536");
	} else {
		say(f, VERDICT_OK, "%s limit is %llu files", whose, (unsigned long long)limit);
	}
}

void check_psi(const struct patient *p, struct finding *f)
{
	char why[128], text[64];
	uint32_t stall, window;
	bool full;
	int n;
	_cleanup_close_ int fd = -1;

	if (!p->cfg.pressure_shrink ||
	    psi_parse(p->cfg.pressure_psi, &full, &stall, &window, why, sizeof(why)) < 0 || !window) {
		say(f, VERDICT_OK, "not asked for ([pressure] %s = no)",
		    p->cfg.pressure_shrink ? "psi" : "shrink");
		return;
	}
	if (!host_there(p, "/proc/pressure/memory")) {
		say(f, VERDICT_WARNING, "/proc/pressure/memory: not there");
		advise(f, "boot with psi=1 (kernel with CONFIG_PSI)");
		return;
	}
	n = snprintf(text, sizeof(text), "%s %u %u", full ? "full" : "some", stall, window) + 1;
	fd = open(host_path(p, "/proc/pressure/memory"), O_RDWR | O_CLOEXEC | O_NONBLOCK);
	if (fd >= 0 && write(fd, text, (size_t)n) == n) {
		say(f, VERDICT_OK, "trigger \"%s\" accepted", p->cfg.pressure_psi);
	} else {
		say(f, VERDICT_WARNING, "trigger \"%s\": %s", p->cfg.pressure_psi, strerror(errno));
		advise(f, "use Linux 6.5 or later, where triggers of whole windows of 2 s need no privilege");
	}
}

void check_bpf(const struct patient *p, struct finding *f)
{
	char release[80], unprivileged[16];
	unsigned major = 0, minor = 0;

	host_read(p, release, sizeof(release), "/proc/sys/kernel/osrelease");
	host_read(p, unprivileged, sizeof(unprivileged), "/proc/sys/kernel/unprivileged_bpf_disabled");
	if (!*p->cfg.bpf_socket) {
		say(f, VERDICT_OK, "not asked for ([kvtierd] bpf_socket is empty)");
	} else if (p->running && p->probes_on) {
		say(f, VERDICT_OK, "the daemon has them; Linux %s", release);
	} else if (sscanf(release, "%u.%u", &major, &minor) != 2) {
		say(f, VERDICT_UNCHECKED, "/proc/sys/kernel/osrelease: \"%s\"", release);
	} else if (major < 5 || (major == 5 && minor < 8)) {
		say(f, VERDICT_NOTE, "Linux %s, CAP_BPF came with 5.8", release);
		advise(f, "use a newer kernel, or [kvtierd] bpf_socket = (empty)");
	} else if (!host_there(p, "/sys/kernel/btf/vmlinux")) {
		say(f, VERDICT_NOTE, "no /sys/kernel/btf/vmlinux");
		advise(f, "use a kernel with CONFIG_DEBUG_INFO_BTF");
	} else if (!host_there(p, "/usr/sbin/kvtierd-bpf") && !host_there(p, "/usr/local/sbin/kvtierd-bpf")) {
		say(f, VERDICT_NOTE, "kvtierd-bpf is not installed");
		advise(f, "apt install kvtierd-bpf; systemctl enable --now kvtierd-bpf.socket");
	} else if (!host_there(p, "%s", p->cfg.bpf_socket)) {
		say(f, VERDICT_NOTE, "kvtierd-bpf is installed, but no %s", p->cfg.bpf_socket);
		advise(f, "systemctl enable --now kvtierd-bpf.socket");
	} else if (p->running && *p->probes_off) {
		say(f, VERDICT_NOTE, "off: %s", p->probes_off);
		advise(f, "journalctl -u kvtierd-bpf");
	} else {
		say(f, VERDICT_OK,
		    "Linux %s with BTF, kvtierd-bpf has its socket (unprivileged_bpf_disabled = %s: "
		    "of no matter, it has CAP_BPF)",
		    release, *unprivileged ? unprivileged : "?");
	}
}

void check_cpu(const struct patient *p, struct finding *f)
{
	char text[16384], *flags;
	bool avx2, avx512;

	host_read(p, text, sizeof(text), "/proc/cpuinfo");
	flags = strstr(text, "\nflags");
	if (!flags) {
		say(f, VERDICT_UNCHECKED, "/proc/cpuinfo: no flags");
		return;
	}
	flags[1 + strcspn(flags + 1, "\n")] = 0;
	avx2 = strstr(flags, " avx2") && strstr(flags, " fma") && strstr(flags, " f16c");
	avx512 = strstr(flags, " avx512f") && strstr(flags, " avx512bw") && strstr(flags, " avx512vl");
	if (avx2 || avx512) {
		say(f, VERDICT_OK, "%s", avx512 ? "AVX-512" : "AVX2");
		return;
	}
	say(f, VERDICT_WARNING, "neither AVX2 with FMA and F16C nor AVX-512");
	advise(f, "in a virtual machine give it the host's processor (cpu=host); else [policy] default = "
		  "streaming");
}

void check_clock(const struct patient *p, struct finding *f)
{
	char text[64];

	if (host_read(p, text, sizeof(text),
		      "/sys/devices/system/clocksource/clocksource0/current_clocksource") <= 0) {
		say(f, VERDICT_UNCHECKED, "no current_clocksource");
	} else if (!strcmp(text, "hpet") || !strcmp(text, "acpi_pm") || !strcmp(text, "jiffies") ||
		   !strcmp(text, "refined-jiffies")) {
		say(f, VERDICT_WARNING, "%s: read by a system call", text);
		advise(f, "see dmesg for why tsc was given up; boot with tsc=reliable where the hardware's is");
	} else {
		say(f, VERDICT_OK, "%s", text);
	}
}
