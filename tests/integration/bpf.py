#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""kvtierd-bpf: real programs in this kernel, their maps in a daemon under load; without it, or with an impostor, the
daemon goes on and says so."""
import array
import mmap
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kvtier import ROWS_ALL, Client
from kvtier.daemon import build_dir

from lib.probes import GROUPS, LOADER, Loader, need, probes, wait_on, world
from lib.rows import Rows
from lib.world import Skip, Tap, World, equal, expect, matches, until


def io(d):
    t = d.tier("nvme")
    return t["reads"] + t["writes"]


def disk_stat(path):
    """Reads and writes that the whole disk below path completed."""
    dev = os.stat(path).st_dev
    at = Path(f"/sys/dev/block/{os.major(dev)}:{os.minor(dev)}")
    if not at.exists():
        raise Skip(f"{path} is on no block device")
    if (at / "partition").exists():
        at = at.resolve().parent
    f = (at / "stat").read_text(encoding="ascii").split()
    return int(f[0]), int(f[4])


def write_blocks(path, n):
    """n requests that nothing merges."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    with mmap.mmap(-1, 4096) as m:
        for i in range(n):
            os.pwrite(fd, m, i * 8192)
    os.close(fd)
    os.unlink(path)


# ---- what it counts -----------------------------------------------------------------------------


def check_table():
    on = need()
    expect("disk" in on, f"the throttle needs disk: {on}")
    p = subprocess.run([LOADER, "--check", "--without", "sched,fault"], capture_output=True, text=True, check=True)
    lines = {line.split()[0]: line for line in p.stdout.splitlines()}
    equal(set(lines), GROUPS, "the table")
    for name in ("sched", "fault"):
        matches(lines[name], r"off: left out by --without$", name)
    p = subprocess.run([LOADER, "--check", "--break", "uring,fault"], capture_output=True, text=True, check=True)
    state = {line.split()[0]: line for line in p.stdout.splitlines()}
    for name in ("uring", "fault"):
        matches(state[name], rf"^{name} +off: {name}_\w+: load: (Invalid argument|Permission denied)$", "what the kernel refused")
    equal({n for n in state if state[n].split()[1] == "on"}, on - {"uring", "fault"}, "the others")
    p = subprocess.run([LOADER, "--check", "--without", "disk"], capture_output=True, text=True, check=False)
    equal(p.returncode, 1, "exit status without the disk's programs")


def disk_and_ring():
    on = need()
    with tempfile.TemporaryDirectory() as t, Loader(t + "/s"), world(t + "/s") as d:
        first = wait_on(d)
        equal({p["name"]: p["on"] for p in first["programs"]}, {n: n in on for n in GROUPS}, "programs")
        before, stat = io(d), disk_stat(d.store)
        with Client(d.socket) as c:
            r = Rows(c, "load")
            for _ in range(20):
                r.truncate(0)
                r.append(150)
                r.plan(device=20, nvme=ROWS_ALL)
                r.plan(device=ROWS_ALL, nvme=ROWS_ALL)
            r.check()
            r.close()
        write_blocks(Path(d.store) / "blocks", 400)
        own = io(d) - before
        expect(own > 20, f"the daemon made {own} reads and writes")
        uring = d.tier("nvme")["io_uring"]
        now = until("the daemon's requests among the disk's",
                    lambda: (lambda p: p if p["disk_read"]["count"] + p["disk_write"]["count"] > 0 and
                             (not uring or p["uring"]["count"] > 0) else None)(probes(d)), 5)
        disk = {k: now[k]["count"] - first[k]["count"] for k in ("disk_read", "disk_write", "uring")}
        print(f"# the daemon: {own} transfers; the kernel: {disk}")
        expect(disk["disk_write"] >= 400 and disk["disk_read"] > 0, f"reads and writes: {disk}")
        # What the daemon wrote may be merged and split, and others use the disk too: its own count says by how much.
        kernel = [y - x for x, y in zip(stat, disk_stat(d.store))]
        print(f"# the disk's own count: {kernel[0]} reads, {kernel[1]} writes")
        for k, n in (("disk_read", kernel[0]), ("disk_write", kernel[1])):
            expect(0.8 * n - 16 <= disk[k] <= 1.2 * n + 16, f"{k}: {disk[k]}, the disk's own count says {n}")
        if uring and "uring" in on:
            expect(own / 8 <= disk["uring"] <= own * 8, f"{own} transfers are {disk['uring']} requests of the ring")
        for k in ("disk_read", "disk_write"):
            expect(1000 < now[k]["ns_p50"] <= now[k]["ns_p99"] <= now[k]["ns_p999"] < 60e9, f"{k}: {now[k]}")
        expect(now["disk_inflight"] < 10000, f"in flight: {now['disk_inflight']}")
        matches(subprocess.run([str(build_dir() / "kvtierctl"), "--socket", d.admin, "status"], capture_output=True,
                               text=True, check=True).stdout, r"probes +disk on .*\n +reads of the disk: \d+, p50", "text")


def burn(n, seconds):
    return [subprocess.Popen(["taskset", "-c", "0", sys.executable, "-c",
                              f"import time\ne=time.time()+{seconds}\nwhile time.time()<e: pass"]) for _ in range(n)]


def stalls():
    on = need()
    if "sched" not in on:
        raise Skip("the scheduler's programs do not load here")
    with tempfile.TemporaryDirectory() as t, Loader(t + "/s"), world(t + "/s") as d, Client(d.socket) as c:
        first = wait_on(d)
        r = Rows(c, "waits")
        r.append(8)
        stall = until("the client's stalls", lambda: d.seqs()[0].get("stall"), 5)
        aff = os.sched_getaffinity(0)
        with open("/proc/self/schedstat", encoding="ascii") as f:
            own = int(f.read().split()[1])
        burners = burn(2, 0.8)
        try:
            os.sched_setaffinity(0, {0})
            end = time.monotonic() + 0.8
            while time.monotonic() < end:
                pass
        finally:
            os.sched_setaffinity(0, aff)
            for b in burners:
                b.wait()
        with open("/proc/self/schedstat", encoding="ascii") as f:
            own = int(f.read().split()[1]) - own
        got = d.seqs()[0]["stall"]["sched_ns"] - stall["sched_ns"]
        print(f"# waited for a processor: {got / 1e6:.1f} ms by the probes, {own / 1e6:.1f} ms by schedstat")
        expect(own > 50e6, f"two burners on one processor held this one up for {own} ns only")
        expect(own * 0.7 < got < own * 1.3 + 50e6, f"{got} ns, the kernel's own count says {own}")
        expect(probes(d)["sched"]["count"] > first["sched"]["count"], "the histogram of all clients")
        traced(d, r, stall)
        if "fault" in on:
            major_faults(d, t)
        r.close()


def traced(d, r, before):
    """trace tells the same, in all and between plans."""
    for n in (4, 6, 4):
        r.plan(device=n, dram=8)
    t = d.ctl("trace", d.seqs()[0]["handle"])
    equal((t["probes"]["on"], "why_off" in t["probes"]), (True, False), "probes")
    expect(t["probes"]["client"]["sched_ns"] >= before["sched_ns"] + 50e6, f"{t['probes']} after {before}")
    expect(all(0 <= p["stall"]["sched_ns"] <= t["probes"]["client"]["sched_ns"] for p in t["plans"]), f"{t['plans']}")
    own = d.ctl("trace", d.seqs()[0]["handle"], socket=d.socket)["probes"]
    expect("uring_ns_p99" in t["probes"] and "uring_ns_p99" not in own, "the host's latencies are the operator's")
    text = subprocess.run([str(build_dir() / "kvtierctl"), "--socket", str(d.admin), "trace", d.seqs()[0]["handle"]],
                          capture_output=True, text=True, check=True).stdout
    matches(text, r"ACK +STALL +END\n(.*\n){3}stalls  its client: [0-9.]+ ms for a processor, .* major faults, .* in reclaim", "text")


def major_faults(d, t):
    """Pages of a file that is not in memory, touched one by one."""
    with tempfile.NamedTemporaryFile(dir=build_dir()) as f:
        f.write(os.urandom(64 * 4096))
        f.flush()
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        before = d.seqs()[0]["stall"]
        with mmap.mmap(f.fileno(), 64 * 4096, mmap.MAP_SHARED, mmap.PROT_READ) as m:
            m.madvise(mmap.MADV_RANDOM)
            for i in range(0, 64 * 4096, 4096):
                m[i]  # pylint: disable=pointless-statement
        after = d.seqs()[0]["stall"]
    n, ns = after["faults"] - before["faults"], after["fault_ns"] - before["fault_ns"]
    print(f"# {n} major faults, {ns / 1e6:.2f} ms")
    expect(n >= 32, f"64 pages read from a file are {n} major faults")
    expect(n * 1000 < ns < 30e9, f"{n} major faults took {ns} ns")


def small_group():
    """A control group (version 1) with little memory; its directory."""
    top = Path("/sys/fs/cgroup/memory")
    if not (top / "memory.limit_in_bytes").exists():
        raise Skip("no control group of the memory controller, version 1, here")
    g = top / f"kvt-bpf-{os.getpid()}"
    try:
        g.mkdir()
        (g / "memory.limit_in_bytes").write_text(str(24 << 20), encoding="ascii")
    except OSError as e:
        raise Skip(f"a control group cannot be made here: {e}") from None
    return g


READER = """
import os, sys
from kvtier import Client, Model, Region, Sequence
open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
c = Client(sys.argv[2])
m = Model(c, "reads", 1, 1, 16)
layouts, n = m.layout(64, 16)
s = Sequence(c, m, Region(c, n), layouts, 64)
print("here", flush=True)
sys.stdin.readline()
with open(sys.argv[3], "rb") as f:
    while f.read(1 << 20):
        pass
print("done", flush=True)
sys.stdin.readline()
os._exit(0)
"""


def reclaim():
    if "memcg_reclaim" not in need():
        raise Skip("the programs do not load here")
    group = small_group()
    try:
        with tempfile.TemporaryDirectory() as t, Loader(t + "/s"), world(t + "/s") as d, \
                tempfile.NamedTemporaryFile(dir=build_dir()) as f:
            wait_on(d)
            f.write(bytes(96 << 20))
            f.flush()
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            p = subprocess.Popen([sys.executable, "-c", READER, str(group), d.socket, f.name], stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE, text=True)
            try:
                equal(p.stdout.readline(), "here\n", "the reader")
                until("its stalls", lambda: d.seqs()[0].get("stall"), 5)
                p.stdin.write("go\n")
                p.stdin.flush()
                equal(p.stdout.readline(), "done\n", "the reader")
                stall, now = d.seqs()[0]["stall"], probes(d)["reclaim"]
                print(f"# 96 MiB through a group of 24 MiB: {now['count']} reclaims, {stall['reclaim_ns'] / 1e6:.2f} ms")
                expect(now["count"] > 10 and stall["reclaim_ns"] > 10000, f"reclaims: {now}, the client's: {stall}")
                expect(stall["reclaim_ns"] <= now["ns_total"], "a client's are among all")
            finally:
                p.kill()
                p.wait()
    finally:
        for _ in range(100):
            try:
                group.rmdir()
                break
            except OSError:
                time.sleep(0.05)


# ---- with and without ------------------------------------------------------------------------------


def comes_and_goes():
    need()
    with tempfile.TemporaryDirectory() as t, world(t + "/s") as d, Client(d.socket) as c:
        r = Rows(c, "goes on")
        r.append(50)
        until("why it is off", lambda: "No such file" in probes(d)["why_off"], 5)
        one = Loader(t + "/s", "--without", "sched")
        p = wait_on(d)
        equal([x for x in p["programs"] if not x["on"]], [{"name": "sched", "on": False,
                                                            "why_off": "left out by --without"}], "what is off")
        with World(kvtierd={"bpf_socket": t + "/s"}) as other:
            until("busy", lambda: "another daemon" in probes(other).get("why_off", ""), 5)
            expect(probes(d)["on"], "the first one lost its maps")
        fds = d.fds()
        one.kill()
        until("off", lambda: not probes(d)["on"], 5)
        matches(probes(d)["why_off"], r"kvtierd-bpf", "after it was killed")
        r.append(50)
        r.plan(device=20, nvme=ROWS_ALL)
        with Loader(t + "/s"):
            p = wait_on(d)
            equal(d.fds(), fds, "descriptors after the second loader")
            expect(not [x for x in p["programs"] if x["name"] == "sched" and not x["on"]], "sched is on again")
            r.plan(device=ROWS_ALL, nvme=ROWS_ALL)
            r.check()
        r.close()


def hello(**wrong):
    """The message as shm/probe.h has it, with sizes as a real loader says them."""
    head = dict(magic=0x50424b56, version=2, busy=0, names=6, targets=4104, counts=2192, sums=32768, reserved=0)
    head.update(wrong)
    return struct.pack("<8I", *head.values()) + bytes(16 * 128)


def impostor(path, message, fds, uid=0):
    """Listens as that user and answers everybody so."""
    pid = os.fork()
    if pid:
        until("the impostor", lambda: os.path.exists(path), 5)
        return pid
    os.setuid(uid)
    s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    s.bind(path)
    s.listen(4)
    kept = []
    while True:
        c, _ = s.accept()
        anc = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            c.sendmsg([message], anc)
        except OSError:
            pass
        kept.append(c)


def impostors():
    need()
    memfd = os.memfd_create("not a map")
    os.ftruncate(memfd, 1 << 20)
    cases = [("not root", hello(), [memfd] * 3, 65534, r"not root"),
             ("another magic", hello(magic=7), [memfd] * 3, 0, r"not kvtierd-bpf"),
             ("cut short", hello()[:-1], [memfd] * 3, 0, r"not kvtierd-bpf"),
             ("another version", hello(version=1), [memfd] * 3, 0, r"another version"),
             ("wrong sizes", hello(counts=8), [memfd] * 3, 0, r"wrong sizes"),
             ("too many names", hello(names=17), [memfd] * 3, 0, r"wrong sizes"),
             ("no descriptors", hello(), [], 0, r"wrong sizes or descriptors"),
             ("a descriptor short", hello(), [memfd] * 2, 0, r"wrong sizes or descriptors"),
             ("no maps", hello(), [memfd] * 3, 0, r"descriptor 0 is no BPF map of 4104 bytes")]
    for name, message, fds, uid, pattern in cases:
        t = tempfile.mkdtemp()
        os.chmod(t, 0o777)
        pid = impostor(t + "/s", message, fds, uid)
        try:
            with world(t + "/s") as d:
                until(lambda: f"{name}: {probes(d)}, must match {pattern}",
                      lambda: re.search(pattern, probes(d).get("why_off", "")), 5)
                expect(not probes(d)["on"], f"{name}: believed")
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            shutil.rmtree(t)
    os.close(memfd)


def strangers():
    """Who is neither root nor the daemon's user gets nothing from the loader."""
    need()
    t = tempfile.mkdtemp()
    os.chmod(t, 0o777)
    try:
        with Loader(t + "/s"):
            pid = os.fork()
            if not pid:
                os.setuid(65534)
                s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                s.connect(t + "/s")
                os._exit(0 if s.recv(4096) == b"" else 1)
            equal(os.waitpid(pid, 0)[1], 0, "exit status of the stranger, who must read an end of file")
            s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            s.connect(t + "/s")
            msg, fds, _, _ = socket.recv_fds(s, 4096, 8)
            equal((len(msg), len(fds)), (len(hello()), 3), "what root gets")
            for fd, size, writable in zip(fds, (4104, 2192, 32768), (True, False, False)):
                try:
                    mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE).close()
                    expect(writable, f"a map of {size} bytes of counts can be written from user space")
                except PermissionError:
                    expect(not writable, f"the targets cannot be written")
                os.close(fd)
            s.close()
    finally:
        shutil.rmtree(t)


# ---- probes of the daemon itself ----------------------------------------------------------------------


def notes(binary):
    """{probe: number of arguments} by the ELF notes."""
    out = subprocess.run(["readelf", "--wide", "--notes", binary], capture_output=True, text=True, check=True).stdout
    found = {}
    for m in re.finditer(r"Provider: kvtierd\n\s+Name: (\w+)\n.*\n\s+Arguments: (.*)", out):
        found.setdefault(m.group(1), set()).add(len(re.findall(r"-?\d+@", m.group(2))))
    return found


def documented():
    page = (Path(__file__).resolve().parents[2] / "daemon/man/kvtierd-bpf.8.scd").read_text(encoding="utf-8")
    page = page[page.index("# PROBES OF THE DAEMON"):page.index("# OPTIONS")]
    return {m.group(1): {len(re.findall(r"_[A-Z]+_", m.group(2)))}
            for m in re.finditer(r"^(?:.*; )?\*([a-z_]+)\* ((?:_[A-Z]+_ ?)+)", page.replace("; *", "\n*"), re.M)}


def list_is_true():
    found = notes(str(build_dir() / "kvtierd"))
    if not found:
        raise Skip("kvtierd was built without <sys/sdt.h>")
    expect(len(found) >= 10, f"the binary's probes: {found}")
    equal(documented(), found, "kvtierd-bpf(8)'s probes and numbers of arguments, and the binary's")


def script(name, d, work):
    """Its output after work()."""
    text = (Path(__file__).resolve().parents[2] / "daemon/bpf" / name).read_text(encoding="utf-8")
    expect("/usr/sbin/kvtierd:" in text, f"{name} names another binary")
    text = text.replace("/usr/sbin/kvtierd:", d.binary + ":")
    with tempfile.NamedTemporaryFile("w", suffix=".bt") as f:
        f.write(text)
        f.flush()
        p = subprocess.Popen(["bpftrace", "-B", "line", "-p", str(d.pid), f.name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            head = p.stdout.readline()
            while "Ctrl-C" not in head:
                expect(head, f"{name} ended by itself")
                if "Attaching" not in head:
                    print(f"# {name}: {head.strip()}")
                head = p.stdout.readline()
            work()
            p.send_signal(signal.SIGINT)
            return p.communicate(timeout=30)[0]
        finally:
            p.kill()
            p.wait()


def scripts_run():
    need()
    if not shutil.which("bpftrace"):
        raise Skip("no bpftrace here")
    if not notes(str(build_dir() / "kvtierd")):
        raise Skip("kvtierd was built without <sys/sdt.h>")
    with World() as d, Client(d.socket) as c:
        r = Rows(c, "traced")

        def work():
            r.append(100)
            r.plan(device=20, dram=40, nvme=ROWS_ALL)
            r.plan(device=ROWS_ALL)
            r.check()

        before = d.status()["plans"]["acked"]
        out = script("plans.bt", d, work)
        for hist in ("decide_us", "move_us", "apply_us", "all_us"):
            matches(out, rf"@{hist}:\s*\n\[", hist)
        acked = d.status()["plans"]["acked"] - before
        all_us = out[out.index("@all_us:"):].split("\n\n")[0]
        equal(sum(int(x) for x in re.findall(r"\)\s+(\d+) \|", all_us)), acked, "plans in @all_us, and acknowledged")
        matches(out, r"@rows_out: [1-9]", "rows written")
        r.truncate(0)
        before = {t: d.tier(t) for t in ("dram", "nvme")}
        out = script("tiers.bt", d, work)
        for t, n in (("nvme", 2), ("dram", 1)):
            matches(out, rf"@write_us\[{n}\]:", f"latencies of {t}")
            got = int(re.search(rf"@write_bytes\[{n}\]: (\d+)", out).group(1))
            own = d.tier(t)["write_bytes"] - before[t]["write_bytes"]
            expect(0 < got <= own, f"{t}: {got} bytes written by the probes, {own} by the daemon's count")
        r.close()


def main():
    tap = Tap()
    tap.case("--check loads every program and names what is off", check_table)
    tap.case("the disk's and the ring's latencies are counted under load", disk_and_ring)
    tap.case("a client's waits for a processor and for pages are counted", stalls)
    tap.case("a client's reclaims at its control group's limit are counted", reclaim)
    tap.case("the loader comes, goes and comes back; the daemon goes on", comes_and_goes)
    tap.case("an impostor is not believed", impostors)
    tap.case("a stranger gets no maps; nobody can write the counts", strangers)
    tap.case("the manual's list of USDT probes is the binary's", list_is_true)
    tap.case("plans.bt and tiers.bt run", scripts_run)
    tap.done()


if __name__ == "__main__":
    main()
