#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What Prometheus gets: by HTTP from the daemon, judged by promtool, scraped by a real Prometheus, compared with
kvtierctl; and what nobody who connects there can do to the daemon."""
import http.client
import json
import os
import re
import socket
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path

from kvtier import ROWS_ALL, Client
from lib.rows import Rows
from lib.world import Skip, Tap, World, equal, expect, matches, until

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "systemd/prometheus/kvtier.rules.yml"
DASHBOARD = ROOT / "systemd/grafana/kvtier.json"


def tool(name):
    path = ROOT / "build/unpacked/prometheus/usr/bin" / name
    if not path.exists():
        raise Skip(f"no {path.relative_to(ROOT)}: .ci/deps unpacks it")
    return str(path)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Unix(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path):
        super().__init__("localhost", timeout=5)
        self.path = str(path)

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


def get(where, url="/metrics", method="GET"):
    """(status, headers, body); where: a path or a port."""
    c = http.client.HTTPConnection("127.0.0.1", where, timeout=5) if isinstance(where, int) else Unix(where)
    try:
        c.request(method, url)
        r = c.getresponse()
        return r.status, r.headers, r.read().decode()
    finally:
        c.close()


def samples(text):
    """{'name{labels}': value}; every sample must belong to a TYPE before it."""
    out, typed = {}, set()
    for line in text.splitlines():
        if line.startswith("# TYPE"):
            name = line.split()[2]
            expect(name not in typed, f"{name}: typed twice")
            typed.add(name)
        elif not line.startswith("#"):
            key, value = line.rsplit(" ", 1)
            base = key.split("{")[0]
            expect(base in typed or re.sub("_(bucket|sum|count)$", "", base) in typed, f"{base}: without a type")
            expect(key not in out, f"{key}: twice")
            out[key] = float(value)
    return out


def http_rules(where):
    status, headers, body = get(where)
    equal(status, 200, "GET /metrics")
    equal(headers["Content-Type"], "text/plain; version=0.0.4; charset=utf-8", "type")
    status, headers, nothing = get(where, method="HEAD")
    equal((status, nothing), (200, ""), "HEAD /metrics")
    expect(int(headers["Content-Length"]) > len(body) // 2, "HEAD tells the length")
    equal(get(where, "/-/healthy")[::2], (200, "healthy\n"), "/-/healthy")
    for url in ("/", "/metrics/", "/metricsx", "/../etc/passwd", "/-/ready"):
        equal(get(where, url)[0], 404, url)
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        status, headers, _ = get(where, method=method)
        equal((status, headers["Allow"]), (405, "GET, HEAD"), method)


def json_values(st):
    """What `kvtierctl status --json` says, under Prometheus' names: only what does not change by looking."""
    tiers = {t["name"]: t for t in st["tiers"]}
    v = {"kvtier_plans_total": st["plans"]["decided"], "kvtier_plans_acked_total": st["plans"]["acked"],
         "kvtier_clients": st["clients"], "kvtier_sequences": st["sequences"],
         "kvtier_rows_dropped_total": st["rows_dropped"], "kvtier_index_bytes": st["index_bytes"],
         "kvtier_plan_duration_seconds_count": st["plans"]["plan_ns"]["count"],
         "kvtier_plan_duration_seconds_sum": st["plans"]["plan_ns"]["sum"] / 1e9}
    for reason, n in st["misses"].items():
        v[f'kvtier_misses_total{{reason="{reason}"}}'] = n
    for name, t in tiers.items():
        label = f'{{tier="{name}"}}'
        v["kvtier_rows" + label] = t["rows"]
        v["kvtier_rows_demoted_total" + label] = t["rows_demoted_into"]
        v["kvtier_rows_promoted_total" + label] = t["rows_promoted_out"]
        v["kvtier_refaults_total" + label] = t["refaults"]
        if name != "device":
            v["kvtier_tier_used_bytes" + label] = t["used_bytes"]
            v["kvtier_tier_capacity_bytes" + label] = t["capacity_bytes"]
            v["kvtier_tier_reads_total" + label] = t["reads"]
            v["kvtier_tier_written_bytes_total" + label] = t["write_bytes"]
            v["kvtier_tier_free_min_ratio" + label] = t["free_min_permille"] / 1000
            v["kvtier_refault_distance_rows_count" + label] = t["refault_rows"]["count"]
            v["kvtier_tier_write_duration_seconds_count" + label] = t["write_ns"]["count"]
    return v


def close_to(a, b):
    return abs(a - b) <= 1e-9 * max(abs(a), abs(b))


def settled(d):
    """A status that does not change any more."""
    last = [None]

    def same():
        now, before = json_values(d.status()), last[0]
        last[0] = now
        time.sleep(0.12)  # a text of a tenth of a second is given again
        return now == before
    until("the counters come to rest", same, 10)
    return last[0]


def same_as_ctl(d, port):
    differ, got = {}, {}

    def agree():
        want = settled(d)
        got.update(samples(get(port)[2]))
        differ.clear()
        differ.update({k: (got.get(k), v) for k, v in want.items() if k not in got or not close_to(got[k], v)})
        return not differ
    until(lambda: f"the text agrees with kvtierctl; (text, kvtierctl): {differ}", agree, 5)
    expect(got["kvtier_plans_total"] > 2 and got['kvtier_refaults_total{tier="nvme"}'] > 0, "something happened")
    expect(got['kvtier_build_info{version="' + d.status()["version"] + '"}'] == 1, "build info")


def promtool(port):
    p = subprocess.run([tool("promtool"), "check", "metrics"], input=get(port)[2], capture_output=True, text=True,
                       timeout=20, check=False)
    equal((p.returncode, p.stdout + p.stderr), (0, ""), "promtool check metrics")


def rules():
    for argv in (["check", "rules", RULES.name], ["test", "rules", "kvtier.test.yml"]):
        p = subprocess.run([tool("promtool"), *argv], cwd=RULES.parent, capture_output=True, text=True, timeout=60,
                           check=False)
        expect(p.returncode == 0, f"promtool {' '.join(argv)}: {p.stdout}{p.stderr}")
    told = re.findall(r"^      - alert: (\w+)$", RULES.read_text(), re.M)
    fires = re.findall(r"alertname: (\w+)\n +exp_alerts:\n", (RULES.parent / "kvtier.test.yml").read_text())
    equal(set(told) - set(fires), set(), "alerts that no test sees fire")


def names_exist(port):
    """Every metric that the dashboard or an alert names is one that is told; every alert says what to do."""
    text = get(port)[2]
    there = {k.split("{")[0] for k in samples(text)}
    board = json.loads(DASHBOARD.read_text())
    exprs = [t["expr"] for p in board["panels"] for t in p["targets"]]
    alerts = re.findall(r"(?ms)^      - alert: (\w+)\n(.*?)(?=^      - alert|\Z)", RULES.read_text())
    expect(len(exprs) > 20 and len(alerts) > 8, "dashboard and rules were read")
    for source, body in [("dashboard", e) for e in exprs] + alerts:
        for name in set(re.findall(r"\bkvtier_\w+", body.split("labels:")[0])):
            expect(name in there, f"{source}: {name} is not among what the daemon tells")
    verbs = set(re.findall(r"^\tV\((\w+),", (ROOT / "daemon/verbs.h").read_text(), re.M))
    for name, body in alerts:
        matches(body, r"summary: \S", name)
        matches(body, r"action: .*(kvtierctl|systemctl)", name)
        for verb in re.findall(r"kvtierctl (\w+)", body):
            expect(verb in verbs, f"{name}: kvtierctl {verb}: no such verb")


def query(port, expr):
    url = f"http://127.0.0.1:{port}/api/v1/query?" + urllib.parse.urlencode({"query": expr})
    with urllib.request.urlopen(url, timeout=5) as r:
        return {m["metric"].get("tier") or m["metric"].get("reason") or "": float(m["value"][1])
                for m in json.load(r)["data"]["result"]}


def scraped(d, port):
    """A Prometheus of our own reads the daemon; its answers are kvtierctl's."""
    own, binary = free_port(), tool("prometheus")
    want = settled(d)
    with tempfile.TemporaryDirectory(prefix="kvt.prom.") as t:
        Path(t, "p.yml").write_text(
            f"global: {{scrape_interval: 200ms, evaluation_interval: 200ms}}\nrule_files: ['{RULES}']\n"
            f"scrape_configs:\n- job_name: kvtier\n  static_configs: [{{targets: ['127.0.0.1:{port}']}}]\n")
        with open(Path(t, "log"), "wb") as log:
            p = subprocess.Popen([binary, f"--config.file={t}/p.yml", f"--storage.tsdb.path={t}/data",
                                  f"--web.listen-address=127.0.0.1:{own}"], stdout=log, stderr=log)
        try:
            def up():
                try:
                    return query(own, 'up{job="kvtier"}') == {"": 1.0}
                except OSError:
                    expect(p.poll() is None, f"prometheus ended: {Path(t, 'log').read_text()[-400:]}")
                    return False
            until("Prometheus scrapes the daemon", up, 15)
            for key, value in want.items():
                name, label = re.match(r'(\w+)(?:\{\w+="(\w+)"\})?', key).groups()
                got = query(own, name).get(label or "")
                expect(got is not None and close_to(got, value), f"{key}: Prometheus has {got}, kvtierctl {value}")
            with urllib.request.urlopen(f"http://127.0.0.1:{own}/api/v1/rules", timeout=5) as r:
                groups = json.load(r)["data"]["groups"]
            until("all rules were evaluated", lambda: rules_fine(own), 10)
            expect(len(groups) == 1, "the rules are loaded")
        finally:
            p.terminate()
            p.wait(20)


def rules_fine(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/rules", timeout=5) as r:
        found = [x for g in json.load(r)["data"]["groups"] for x in g["rules"]]
    bad = [(x["name"], x["lastError"]) for x in found if x["health"] == "err"]
    expect(not bad, f"rules that cannot be evaluated: {bad}")
    return all(x["health"] == "ok" for x in found)


def hostile(d, port):
    """Half-open, silent, many, oversized: ended in time, and runtimes are served meanwhile."""
    fds, socks = d.fds(), []
    for n in range(40):
        s = socket.socket()
        s.setblocking(False)
        s.connect_ex(("127.0.0.1", port))  # most of them wait in the backlog, or before it
        try:
            if n % 3 == 0:
                s.send(b"GET /metr")
            elif n % 3 == 1:
                s.send(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 3)  # and never read
        except OSError:
            pass
        socks.append(s)
    time.sleep(0.3)
    expect(d.fds() <= fds + 9, f"{d.fds() - fds} descriptors for scrapers")
    with Client(d.socket, name="meanwhile") as c:
        r = Rows(c, "meanwhile")
        r.append(64)
        r.plan(16, ROWS_ALL, 0)
        r.close(drop=True)
    for s in socks:
        s.close()
    until("they are gone", lambda: d.fds() <= fds, 10)
    with socket.create_connection(("127.0.0.1", port), timeout=30) as s:
        s.sendall(b"GET /metrics HTTP/1.1\r\n" + b"".join(b"X-%d: %s\r\n" % (i, b"y" * 100) for i in range(200)))
        s.sendall(b"\r\n")
        try:
            answer = s.recv(200)
        except ConnectionResetError:
            answer = b""
        expect(not answer or re.match(rb"HTTP/1\.\d 4\d\d", answer), f"20 kB of headers: {answer!r}")
    for junk in (b"\0" * 500, b"\r\n\r\n", b"GET\r\n\r\n", b"GET /metrics HTTP/9.9\r\n\r\n", os.urandom(2000)):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as s:
            s.sendall(junk)
    expect(get(port)[0] == 200 and d.alive(), "it serves on")


def drip(d, port):
    """A byte now and then keeps no connection: five seconds are all there are, and some on a busy machine."""
    with socket.create_connection(("127.0.0.1", port), timeout=2) as s:
        begin = time.monotonic()
        try:
            while time.monotonic() - begin < 40:
                s.send(b"G")
                s.settimeout(0.5)
                try:
                    if not s.recv(100):
                        break
                except TimeoutError:
                    pass
        except (BrokenPipeError, ConnectionResetError):
            pass
        took = time.monotonic() - begin
    expect(took < 39, f"a dripping connection lived {took:.0f} s")
    expect(get(port)[0] == 200 and d.alive(), "it serves on")


def refused_places(d):
    for where in ("0.0.0.0:9100", "[::]:9100", "example.org:80", "127.0.0.1:0", "relative.sock"):
        d.configure(metrics={"listen": where})
        line = d.refuses_to_start(r"kvtierd\.conf:\d+: listen: .*must be empty, a path .*127\.0\.0\.1:PORT")
        expect(where in line, line)


def by_path():
    with World() as d:
        path = Path(d.run) / "m.sock"
        d.configure(metrics={"listen": path})
        d.stop()
        d.start()
        equal(path.stat().st_mode & 0o777, 0o660, "mode")
        http_rules(path)
        d.stop()
        expect(not path.exists(), "its socket is gone with it")


def passed_on():
    """A socket from systemd, by its name; the daemon makes none of its own."""
    with World() as d, socket.socket() as s:
        d.stop()
        s.bind(("127.0.0.1", 0))
        s.listen(8)
        port = s.getsockname()[1]
        script = f"exec 3<&{s.fileno()}; export LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=metrics; exec \"$0\" \"$@\""
        with open(d.log, "wb") as log:
            p = subprocess.Popen(["bash", "-c", script, d.binary, "--config", d.config], stdout=log, stderr=log,
                                 pass_fds=[s.fileno()])
        try:
            until("it answers", lambda: os.path.exists(d.admin), 10)
            equal(get(port)[0], 200, "GET /metrics")
        finally:
            p.terminate()
            equal(p.wait(30), 0, "exit status")


def off(d):
    equal(sorted(p.name for p in Path(d.run).iterdir() if p.is_socket()), ["admin.sock", "kvtierd.sock"], "sockets")
    held = {os.readlink(f"/proc/{d.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{d.pid}/fd")}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            expect(f"socket:[{line.split()[9]}]" not in held, "it has a TCP socket")


def main():
    tap, port = Tap(), free_port()
    tap.case("alerts: promtool checks them, and each fires when it should", rules)
    with World() as d:
        tap.case("off by default", off, d)
    with World() as d:
        d.stop()
        tap.case("anything but loopback is refused with one line", refused_places, d)
        d.configure(metrics={"listen": f"127.0.0.1:{port}"})
        d.start()
        tap.case("paths, methods, types", http_rules, port)
        with Client(d.socket, name="counted") as c:
            r = Rows(c, "counted")
            r.append(600)
            for device in (100, ROWS_ALL, 50):
                r.plan(device, 100, ROWS_ALL)
            r.append(40)
            r.plan(300, 100, ROWS_ALL)
            tap.case("the values are kvtierctl's", same_as_ctl, d, port)
            tap.case("promtool finds nothing wrong with the text", promtool, port)
            tap.case("dashboard and alerts name what exists", names_exist, port)
            tap.case("a real Prometheus reads the same values", scraped, d, port)
            r.close(drop=True)
        tap.case("connections that mean ill cost others nothing", hostile, d, port)
        tap.case("nor does one that drips", drip, d, port)
    tap.case("at a path", by_path)
    tap.case("through a socket from systemd", passed_on)
    tap.done()


if __name__ == "__main__":
    main()
