#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What the kernel's probes see moves the daemon: the disk its throttle of writes, time in reclaim its DRAM tier."""
import mmap
import os
import subprocess
import tempfile
import threading
import time

from kvtier import ROWS_ALL, Client
from kvtier.daemon import build_dir

from lib import disk
from lib.big import Big
from lib.group import Group, Within
from lib.probes import Loader, need, probes, wait_on
from lib.world import Skip, Tap, World, equal, expect, matches, until


def io(d):
    t = d.tier("nvme")
    return t["reads"] + t["writes"]


def reclaim_squeezes():
    """A file fills the daemon's control group; each page that the DRAM tier takes then costs reclaim."""
    if "memcg_reclaim" not in need():
        raise Skip("the programs do not load here")
    # What the floor leaves is taken whether or not the host's own PSI speaks first.
    sections = {"dram": {"size": "192M", "segment": "64M"}, "nvme": {"size": "256M", "segment": "4M", "preallocate": "no"},
                "pressure": {"psi": "some 1ms/2s", "floor": "96M", "reserve": "4M"}}
    for on in (False, True):
        with Group() as g, tempfile.TemporaryDirectory() as t, tempfile.NamedTemporaryFile(dir=build_dir()) as f, \
                Within(g, sections | {"kvtierd": {"bpf_socket": t + "/s"}}) as d, Client(d.socket) as c:
            loader = Loader(t + "/s") if on else None
            try:
                if on:
                    wait_on(d)
                g.limit(g.used() + (256 << 20))
                f.truncate(320 << 20)
                with g.inside():
                    while f.read(1 << 20):
                        pass
                b = Big(c, 1)
                b.fill(8192, nvme=ROWS_ALL)
                until(lambda: f"{d.status()['pressure']}",
                      lambda: not on or d.status()["pressure"]["reclaim_events"], 5)
                p = d.status()["pressure"]
                print(f"# {p['reclaim']}: {p['reclaim_events']} events, {p['psi_events']} of psi, {p['squeezes']} squeezes")
                equal(g.killed(), 0, "processes that the OOM killer took")
                if on:
                    equal(p["reclaim"], "1 ms in 2 s", "what is looked at")
                    expect(p["squeezed"] and p["dram_limit_bytes"] < 192 << 20, f"it was not answered: {p}")
                else:
                    matches(p["reclaim"], r"^off: kvtierd-bpf", "what is looked at")
                equal(p["reclaim_events"] > 0, on, "events of reclaim")
                equal(p["dropped_rows"], 0, "rows dropped for stalls")
            finally:
                if loader:
                    loader.kill()


def busy_disk(path, seconds, until_true=lambda: False):
    """Large writes, sixteen at a time, by this process."""
    end = time.monotonic() + seconds

    def write(i):
        fd = os.open(f"{path}.{i}", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        with mmap.mmap(-1, 4 << 20) as m:
            while time.monotonic() < end:
                os.pwrite(fd, m, 0)
        os.close(fd)
        os.unlink(f"{path}.{i}")

    threads = [threading.Thread(target=write, args=(i,)) for i in range(16)]
    for x in threads:
        x.start()
    while time.monotonic() < end and not until_true():
        time.sleep(0.05)
    end = 0
    for x in threads:
        x.join()


def others_slow_the_disk():
    """The throttle acts on what others do to the disk: the daemon itself reads and writes nothing.
    The disk is a loop device: it has a long queue, which many disks of virtual machines have not."""
    need()
    with tempfile.TemporaryDirectory() as t, disk.small_disk(192) as where, \
            World(store=where, kvtierd={"bpf_socket": t + "/s"}, nvme={"throttle_target": 1, "size": "32M"}) as d:
        with Loader(t + "/s"):
            wait_on(d)
            own, before = io(d), d.status()["throttle"]
            equal((before["by_disk"], before["by"]), (True, "the tier's own I/O and the disk's"), "what it goes by")
            busy_disk(d.store + "/others", 10, lambda: d.status()["throttle"]["disk_cuts"] > before["disk_cuts"] + 1)
            now = d.status()["throttle"]
            print(f"# {now}")
            equal(io(d), own, "the daemon's own reads and writes")
            expect(now["disk_cuts"] > before["disk_cuts"], f"sixteen writers of 4 MiB: {now}")
            equal(now["cuts"] - before["cuts"], now["disk_cuts"] - before["disk_cuts"], "cuts")
            text = subprocess.run([str(build_dir() / "kvtierctl"), "--socket", d.admin, "status"], capture_output=True,
                                  text=True, check=True).stdout
            matches(text, r"throttle .*\n +by the tier's own I/O and the disk's\n +disk: reads .*, [1-9]\d* cuts\n",
                    "text")
        until("off", lambda: not probes(d)["on"], 5)
        cuts = d.status()["throttle"]["cuts"]
        busy_disk(d.store + "/others", 0.7)
        now = d.status()["throttle"]
        equal((now["by_disk"], now["cuts"]), (False, cuts), "by the disk, and cuts, without the probes")
        matches(now["by"], r"^the tier's own I/O alone \(kvtierd-bpf", "what it goes by without them")


def main():
    tap = Tap()
    tap.case("the daemon's time in reclaim makes the DRAM tier give, as PSI does", reclaim_squeezes)
    tap.case("others' I/O makes the throttle act, with the probes", others_slow_the_disk)
    tap.done()


if __name__ == "__main__":
    main()
