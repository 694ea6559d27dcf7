#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""A reload under a running client: it takes effect, says what changed, and no row is lost; what needs a restart is
refused as a whole."""
import os
import signal
import subprocess

from kvtier import ROWS_ALL, Client
from kvtier.daemon import build_dir
from lib.rows import Rows
from lib.world import Tap, World, equal, expect, matches, until



def reload(d, rc=0):
    p = subprocess.run([str(build_dir() / "kvtierctl"), "--socket", str(d.admin), "reload"], capture_output=True,
                       text=True, timeout=20, check=False)
    equal(p.returncode, rc, f"exit status ({p.stderr})")
    return p.stderr.strip() if rc else p.stdout.splitlines()


def printed(d):
    """What a daemon that started with this file would hold."""
    return subprocess.run([d.binary, "--config", d.config, "--print-config"], capture_output=True, text=True,
                          timeout=20, check=True).stdout


def takes_effect(d):
    with Client(d.socket, name="runs") as c:
        r = Rows(c, "runs")
        r.append(400)
        r.plan(100, 100, ROWS_ALL)
        r.append(50)
        d.configure(kvtierd={"log_level": "debug"}, dram={"free_min": "3.0", "free_low": "20.0", "free_high": "30.0"},
                    nvme={"free_min": "4.0"}, policy={"default": "streaming", "slack": "16"},
                    budget={"device": "40.0", "dram": "20.0", "nvme": "40.0"},
                    tenant_default={"max_dram": "32M", "max_nvme": "48M"})
        r.check()
        got = reload(d)
        equal(sorted(got), sorted([
            "[kvtierd] log_level: info -> debug", "[dram] free_min: 1.0 -> 3.0", "[dram] free_low: 5.0 -> 20.0",
            "[dram] free_high: 10.0 -> 30.0", "[nvme] free_min: 2.0 -> 4.0", "[policy] default: random -> streaming",
            "[policy] slack: 64 -> 16", "[budget] device: 0.0 -> 40.0", "[budget] dram: 0.0 -> 20.0",
            "[budget] nvme: 0.0 -> 40.0", "[tenant default] max_dram: none -> 32M",
            "[tenant default] max_nvme: none -> 48M"]), "what changed")
        log = "\n".join(d.log_lines())
        for line in got:
            expect(f"configuration: {line}" in log, f"the log says {line}")
        st, dram = d.status(), d.tier("dram")
        equal(st["policy"], "streaming", "policy in effect")
        equal((dram["free_min_permille"], dram["free_low_permille"], dram["free_high_permille"]), (30, 200, 300), "marks")
        r.append(100)
        r.plan(60, 200, ROWS_ALL)
        r.check()
        r.whole()
        equal(sum(d.status()["misses"].values()), 0, "misses")
        r.close(drop=True)


def by_signal(d):
    d.configure(policy={"default": "random"})
    os.kill(d.pid, signal.SIGHUP)
    until("the policy is back", lambda: d.status()["policy"] == "random", 10)
    equal(reload(d), ["nothing changed"], "a second time")


def refused_as_a_whole(d):
    for sections, why in (
            ({"policy": {"slack": "7", "default": "streaming"}, "dram": {"size": "128M"}},
             r'\[dram\] size: "64M" cannot become "128M" without a restart: .+'),
            ({"policy": {"slack": "7", "default": "streaming"}, "tenant_other": {}},
             r"tenants: 1 cannot become 2 without a restart: .+"),
            ({"policy": {"slack": "7", "default": "streaming"}, "metrics": {"listen": "127.0.0.1:9"}},
             r'\[metrics\] listen: "" cannot become "127\.0\.0\.1:9" without a restart: .+'),
            ({"policy": {"default": "streaming", "slakc": "7"}},
             r'key "slakc" in \[policy\]: unknown; did you mean "slack"\?')):
        before = d.status()
        d.configure(**sections)
        matches(reload(d, rc=1), why, "the line")
        equal(d.status()["policy"], before["policy"], "policy")
        d.configure()
        equal(reload(d), ["nothing changed"], "nothing was half applied")


def print_is_whole(d):
    d.configure(policy={"slack": "9"})
    text = printed(d)
    line = next(i for i, x in enumerate(open(d.config), 1) if x.startswith("slack"))
    expect(f"# default: 64; set at {d.config}:{line}; follows a reload\nslack = 9\n" in text, "slack")
    keys = [x for x in text.splitlines() if x and x[0] not in "#["]
    expect(len(keys) > 40 and text.count("# default: ") == len(keys), "every key has its default and its source")
    d.configure()


def main():
    tap = Tap()
    with World() as d:
        tap.case("budgets, marks, quotas, policy, log level: in effect, told, no row lost", takes_effect, d)
        tap.case("by SIGHUP", by_signal, d)
    with World() as d:
        tap.case("what needs a restart is refused as a whole, with the reason", refused_as_a_whole, d)
        tap.case("--print-config: default, source, unit of every key", print_is_whole, d)
    tap.done()


if __name__ == "__main__":
    main()
