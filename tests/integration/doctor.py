#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""kvtierctl doctor on invented hosts: for every check one where it is content, and each finding with its advice."""
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from kvtier.daemon import build_dir
from lib.world import Tap, World, equal, expect, matches

CTL = str(build_dir() / "kvtierctl")
UNIT = (Path(__file__).resolve().parents[2] / "systemd" / "kvtierd.service").read_text()
CONF = "etc/kvtier/kvtierd.conf"
NVME = "[dram]\nsize=1G\n[nvme]\nenabled=yes\nsize=64M\n"
DROP_IN = "etc/systemd/system/kvtierd.service.d/host.conf"
DISK = "sys/devices/pci0000:00/nvme/nvme0/nvme0n1"
GPU = "sys/bus/pci/devices/0000:17:00.0"
THP = "sys/kernel/mm/transparent_hugepage/shmem_enabled"
POOL = "sys/kernel/mm/hugepages/hugepages-2048kB/"
GIB = 1 << 20  # in kB

HOST = {
    CONF: NVME,
    "usr/lib/systemd/system/kvtierd.service": UNIT,
    "etc/systemd/system/sockets.target.wants/kvtierd.socket": "",
    "etc/systemd/system/sockets.target.wants/kvtierd-admin.socket": "",
    "etc/passwd": f"root:x:0:0::/:/bin/sh\nkvtier:x:{os.getuid()}:0::/:/bin/false\n",
    "run/kvtier/admin.sock": "",
    "run/kvtier/kvtierd.sock": "",
    "run/kvtier-bpf/probes.sock": "",
    "usr/sbin/kvtierd-bpf": "",
    "var/lib/kvtier/": None,
    "proc/self/limits": "Max locked memory         8388608              8388608              bytes\n"
                        "Max open files            1024                 524288               files\n",
    "proc/self/mountinfo": "22 1 259:1 / / rw shared:1 - ext4 /dev/nvme0n1p1 rw\n",
    "proc/meminfo": f"MemTotal: {8 * GIB} kB\nMemAvailable: {6 * GIB} kB\nSwapTotal: 0 kB\n",
    "proc/cpuinfo": "processor\t: 0\nflags\t\t: fpu avx fma f16c avx2\n",
    "proc/pressure/memory": "some avg10=0.00\n",
    "proc/sys/kernel/osrelease": "6.1.0-18-amd64\n",
    "proc/sys/kernel/unprivileged_bpf_disabled": "2\n",
    "proc/sys/kernel/io_uring_disabled": "0\n",
    "proc/sys/kernel/numa_balancing": "0\n",
    "proc/sys/vm/zone_reclaim_mode": "0\n",
    "sys/kernel/btf/vmlinux": "",
    THP: "always within_size [advise] never deny force\n",
    POOL + "nr_hugepages": "0\n",
    POOL + "free_hugepages": "0\n",
    "sys/devices/system/node/online": "0-1\n",
    "sys/devices/system/node/node0/meminfo": f"Node 0 MemTotal: {4 * GIB} kB\n",
    "sys/devices/system/node/node1/meminfo": f"Node 1 MemTotal: {4 * GIB} kB\n",
    "sys/devices/system/clocksource/clocksource0/current_clocksource": "tsc\n",
    DISK + "/queue/rotational": "0\n",
    DISK + "/queue/scheduler": "[none] mq-deadline\n",
    DISK + "/queue/discard_max_bytes": "2199023255040\n",
    DISK + "/nvme0n1p1/partition": "1\n",
    "sys/dev/block/259:1": ("link", f"../../../{DISK}/nvme0n1p1"),
}

# check, what is different (None: that file is missing), verdict, found, advice
CASES = [
    ("config", {CONF: None}, "note", "not there", "--print-config"),
    ("config", {CONF: "[dram]\nsise=1G\n"}, "problem", r":2: .*sise", "--check-config"),
    ("unit", {"usr/lib/systemd/system/kvtierd.service": None}, "note", "not installed", "apt install kvtierd"),
    ("unit", {"etc/systemd/system/sockets.target.wants/kvtierd-admin.socket": None}, "warning",
     "kvtierd-admin.socket is not enabled", "systemctl enable --now"),
    ("unit", {DROP_IN: "[Service]\nFileDescriptorStoreMax=2\n"}, "warning", "StoreMax=2, .* 4 segments", "=4096"),
    ("unit", {DROP_IN: "[Service]\nWatchdogSec=0\n"}, "note", "no watchdog", "WatchdogSec=30s"),
    ("sockets", {"run/kvtier/admin.sock": None}, "warning", "/run/kvtier/admin.sock: not there",
     "--now kvtierd-admin.socket"),
    ("sockets", {"run/kvtier/kvtierd.sock": None}, "warning", "kvtierd.sock: not there", "--now kvtierd.socket"),
    ("io_uring", {"proc/sys/kernel/io_uring_disabled": "2\n"}, "warning", "= 2: nobody", "io_uring_disabled=0"),
    ("io_uring", {"proc/sys/kernel/io_uring_disabled": "1\n", "proc/sys/kernel/io_uring_group": "77\n"}, "warning",
     "only for group 77", "io_uring_group"),
    ("memlock", {DROP_IN: "[Service]\nLimitMEMLOCK=64K\n"}, "warning", "unit's limit is 64 KiB.* 33 MiB",
     "LimitMEMLOCK=infinity"),
    ("memlock", {"usr/lib/systemd/system/kvtierd.service": None}, "warning", "shell's limit is 8 MiB", "LimitMEMLOCK"),
    ("descriptors", {DROP_IN: "[Service]\nLimitNOFILE=1024:4096\n"}, "warning", "1024 files, .* 1028", "=65536"),
    ("descriptors", {"usr/lib/systemd/system/kvtierd.service": None, "proc/self/limits": "Max open fi"}, "unchecked",
     "no limit", ""),
    ("memory", {CONF: "[dram]\nsize=9G\n"}, "problem", "is 9 GiB, the host has 8 GiB", "size = 4096M"),
    ("memory", {DROP_IN: "[Service]\nMemoryMax=512M\n"}, "problem", "memory.max of the service 512 MiB",
     "MemoryMax=1280M, or .*384M"),
    ("memory", {DROP_IN: "[Service]\nMemoryHigh=512M\n"}, "warning", "memory.high .* 512 MiB", "MemoryHigh=1280M"),
    ("memory", {CONF: "[dram]\nsize=7G\n"}, "warning", "7 GiB, 6 GiB are available", "size = 4608M"),
    ("memory", {"proc/meminfo": "MemTotal: 99999999999999999999999 kB\nMemAv"}, "unchecked", "no MemTotal", ""),
    ("swap", {"proc/meminfo": f"MemTotal: {8 * GIB} kB\nSwapTotal: {GIB} kB\n"}, "note", "1 GiB of swap",
     "MemorySwapMax=0"),
    ("psi", {"proc/pressure/memory": None}, "warning", "not there", "psi=1"),
    ("psi", {"proc/pressure/memory": None, "proc/pressure/memory/": None}, "warning", "directory", "6.5"),
    ("thp", {THP: "always [never]\n"}, "note", r"\[never\]", "echo advise > /sys"),
    ("thp", {THP: None}, "note", "has none", "nr_hugepages=512"),
    ("thp", {THP: "alw"}, "unchecked", "alw", ""),
    ("hugetlb", {POOL + "nr_hugepages": "100\n", POOL + "free_hugepages": "7\n"}, "note",
     r"200 MiB reserved \(7 pages free\)", "nr_hugepages=512"),
    ("hugetlb", {POOL + "nr_hugepages": "18446744073709551615\n"}, "unchecked", "no figures", ""),
    ("numa", {CONF: "[dram]\nsize=1G\nnode=3\n"}, "problem", "node = 3 is not online; 2 nodes", "node = client"),
    ("numa", {CONF: "[dram]\nsize=5G\nnode=1\n"}, "warning", "node = 1 has 4 GiB", "size = 3072M"),
    ("numa", {CONF: "[dram]\nsize=1G\nnode=off\n"}, "note", "2 nodes, .*off", "node = client"),
    ("numa", {"sys/devices/system/node/online": "\xff-99999999999\n"}, "unchecked", "no nodes", ""),
    ("reclaim", {"proc/sys/vm/zone_reclaim_mode": "1\n"}, "warning", "zone_reclaim_mode = 1", "zone_reclaim_mode=0"),
    ("reclaim", {"proc/sys/kernel/numa_balancing": "1\n"}, "note", "numa_balancing = 1", "numa_balancing=0"),
    ("store", {"var/lib/kvtier/": "gone"}, "problem", "No such file", "install -d -o kvtier -g kvtier -m 700"),
    ("store", {CONF: NVME + "path=/srv/kv\n", "srv/kv/": None}, "problem", "may not write outside",
     "ReadWritePaths=/srv/kv"),
    ("store", {"etc/passwd": "kvtier:x:4711:0::/:/bin/false\n"}, "problem", "the daemon is 4711", "chown kvtier"),
    ("filesystem", {"proc/self/mountinfo": "22 1 0:50 / / rw - nfs4 filer:/kv rw\n"}, "problem", "nfs4 .filer:/kv",
     "local disk"),
    ("filesystem", {"proc/self/mountinfo": "22 1 0:50 / / rw - tmpfs none rw\n"}, "warning", "tmpfs.*memory", "xfs"),
    ("filesystem", {"proc/self/mountinfo": "22 1 0:50"}, "unchecked", "nothing holds", ""),
    ("space", {CONF: "[nvme]\nenabled=yes\nsize=64T\n"}, "problem", "is 64 TiB", r"size = \d+M"),
    ("disk", {DISK + "/queue/rotational": "1\n"}, "warning", "nvme0n1 .* rotational", "SSD"),
    ("disk", {DISK + "/queue/scheduler": "none [bfq]\n"}, "note", "bfq", "none > /sys/block/nvme0n1"),
    ("disk", {"sys/dev/block/259:1": None}, "unchecked", "no disk found", ""),
    ("bpf", {"sys/kernel/btf/vmlinux": None}, "note", "no /sys/kernel/btf", "DEBUG_INFO_BTF"),
    ("bpf", {"usr/sbin/kvtierd-bpf": None}, "note", "not installed", "apt install kvtierd-bpf"),
    ("bpf", {"run/kvtier-bpf/probes.sock": None}, "note", "no /run/kvtier-bpf", "kvtierd-bpf.socket"),
    ("bpf", {"proc/sys/kernel/osrelease": "4.19.0\n"}, "note", "Linux 4.19", "newer kernel"),
    ("cuda", {GPU + "/vendor": "0x10de\n", GPU + "/class": "0x030200\n", GPU + "/numa_node": "1\n"}, "warning",
     "0000:17:00.0 on node 1, but no /nowhere", "nvidia-driver"),
    ("cpu", {"proc/cpuinfo": "processor: 0\nflags\t: fpu sse2\n"}, "warning", "neither AVX2", "cpu=host"),
    ("cpu", {"proc/cpuinfo": "processor"}, "unchecked", "no flags", ""),
    ("clock", {"sys/devices/system/clocksource/clocksource0/current_clocksource": "hpet\n"}, "warning", "hpet",
     "tsc"),
]


class Host:
    """A tree of files; on the build's disk, where direct I/O works."""

    def __init__(self, **change):
        self.root = Path(tempfile.mkdtemp(prefix="host.", dir=build_dir()))
        for name, text in {**HOST, **change.get("files", {})}.items():
            self.put(name, text)

    def put(self, name, text):
        path = self.root / name
        if name.endswith("/"):
            if text != "gone":
                path.mkdir(parents=True, exist_ok=True)
                path.chmod(0o700)
        elif isinstance(text, tuple):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(text[1])
        elif text is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode("latin-1"))

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        shutil.rmtree(self.root)

    def run(self, *options):
        env = dict(os.environ, KVTIER_LIBCUDA="/nowhere/libcuda.so.1")
        return subprocess.run([CTL, "--root", str(self.root), "--socket", str(self.root / "none"), *options, "doctor"],
                              capture_output=True, text=True, timeout=30, env=env)

    def checks(self, *options):
        p = self.run("--json", *options)
        j = json.loads(p.stdout)
        by = {c["id"]: c for c in j["checks"]}
        equal(len(by), len(j["checks"]), "checks of different names")
        bad = [c["verdict"] for c in j["checks"]]
        equal(p.returncode, 2 if "problem" in bad else 1 if "warning" in bad else 0, "exit status")
        for verdict, n in j["count"].items():
            equal(bad.count(verdict), n, f"count of {verdict}")
        return by


def healthy():
    with Host() as h:
        by = h.checks()
        equal({k: c for k, c in by.items() if c["verdict"] != "ok"}, {}, "findings on a host where all is well")
        expect(all(not c["advice"] and c["found"] and c["why"] for c in by.values()), "what a good check says")
        equal(h.run().stdout.splitlines()[-1],
              f"{len(by)} ok, 0 notes, 0 warnings, 0 problems, 0 could not be checked", "text")
        equal(set(by), {c[0] for c in CASES}, "checks, and those that have a case where they are not content")


def one(check, files, verdict, found, advice):
    with Host(files=files) as h:
        c = h.checks()[check]
        equal(c["verdict"], verdict, f"{check}: {c['found']}")
        matches(c["found"], found, "found")
        matches(c["advice"], advice or "^$", "advice")
        text = h.run().stdout
        expect(c["found"] in text and (not advice or f"do: {c['advice']}" in text), f"the same as text: {text}")


def store_for_all():
    with Host() as h:
        (h.root / "var/lib/kvtier").chmod(0o755)
        c = h.checks()["store"]
        equal((c["verdict"], c["advice"]), ("warning", "chmod 700 /var/lib/kvtier"), "a directory open to all")


def odd():
    """Every file cut off, empty, endless numbers, binary: each check answers, none is ended by a signal."""
    for text in ("", "\0" * 5000, "9" * 40000, "\xff\xfe" * 3000, "- - - :::[[]\n" * 2000):
        files = {k: text for k, v in HOST.items() if isinstance(v, str) and k != CONF}
        with Host(files=files) as h:
            for c in h.checks().values():
                expect("signal" not in c["found"] and "badly" not in c["found"], f"{c}")


def hangs():
    """A configuration that never answers, as of a dead file server: the doctor ends in time and says so."""
    with Host(files={CONF: None}) as h:
        (h.root / CONF).parent.mkdir(parents=True)
        os.mkfifo(h.root / CONF)
        by = h.checks()
        equal(by["config"]["verdict"], "unchecked", "configuration")
        matches(by["config"]["found"], "no answer within 4 s", "configuration")
        equal(by["cpu"]["verdict"], "ok", "a check that needs nothing of it")


def running():
    """Beside a daemon: its own limits, its engine, and no finding about sockets that answer."""
    with World() as d:
        p = subprocess.run([CTL, "--json", "--socket", d.admin, "--config", d.config, "doctor"], capture_output=True,
                           text=True, timeout=30)
        j = json.loads(p.stdout)
        by = {c["id"]: c for c in j["checks"]}
        equal(j["running"], True, "running")
        for check in ("config", "sockets", "space"):
            equal(by[check]["verdict"], "ok", by[check]["found"])
        matches(by["descriptors"]["found"], "^the daemon's limit", "whose limit")
        expect(d.alive(), "the daemon lives")


def main():
    tap = Tap()
    tap.case("all is well, and every check has a case where it is not", healthy)
    for i, c in enumerate(CASES):
        tap.case(f"{c[0]}: {c[2]}, case {i}", one, *c)
    tap.case("a store that everybody may read", store_for_all)
    tap.case("odd files crash no check", odd)
    tap.case("a hung file system does not hang it", hangs)
    tap.case("beside a running daemon", running)
    tap.done()


if __name__ == "__main__":
    main()
