"""The router beside nginx: same TLS settings, same upstream, same core, one after the other in one run. Needs root.

Each proxy has one worker process, on core 0. What asks (wrk) and what answers (another nginx, on a unix socket) are on
core 1, so that what is measured is the proxy. nginx does not buffer either.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.harness import Figure, spread
from controller.security.hpke import ClientKey, Registry, RouterKeys
from controller.security.pki import Pki
from controller.security.router import Limits, Settings, Target
from lab.ovs import LabError, Namespace, die_with_parent

CONNECTIONS = 16
SECONDS = 3
BAR = 0.5
_PORTS = {"nginx": 4431, "router": 4432, "sealed": 4433, "upstream": 4434, "nginx chat": 4435, "router chat": 4436}

_NGINX = """
worker_processes 1;
daemon off;
pid {directory}/{name}.pid;
error_log {directory}/{name}.log crit;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    keepalive_requests 100000000;
    client_body_temp_path {directory}/{name}-1; proxy_temp_path {directory}/{name}-2;
    fastcgi_temp_path {directory}/{name}-3; uwsgi_temp_path {directory}/{name}-4; scgi_temp_path {directory}/{name}-5;
    default_type application/json;
    ssl_protocols TLSv1.3;
    ssl_certificate {pair}/cert.pem;
    ssl_certificate_key {pair}/key.pem;
    {servers}
}}
"""
_TOLD = "x" * 200
_UPSTREAM = f"""
    server {{ listen unix:{{socket}}; listen 127.0.0.1:{_PORTS["upstream"]} ssl; location / {{ return 200 '{_TOLD}'; }} }}
"""
_PROXY = """
    upstream {behind} {{ server unix:{socket}; keepalive 64; keepalive_requests 100000000; }}
    server {{
        listen 127.0.0.1:{port} ssl;
        location / {{
            proxy_pass http://{behind};
            proxy_http_version 1.1;
            proxy_buffering off;
            proxy_request_buffering off;
            proxy_set_header Connection "";
            proxy_set_header X-Forwarded-For $remote_addr;
            proxy_set_header X-Forwarded-Proto https;
        }}
    }}
"""
_ROUTER = (
    "import sys\n"
    "from pathlib import Path\n"
    "from controller.security.router import Settings, supervise\n"
    "supervise(lambda: Settings.from_json(Path(sys.argv[1]).read_text()))\n"
)
_INFERENCE = (
    "import sys\n"
    "from pathlib import Path\n"
    "from controller.security.inference import Inference, serve\n"
    "serve(Inference(socket=Path(sys.argv[1]), token_s=0))\n"
)
TOKENS = 32
_WORDS = " ".join(f"word{number}" for number in range(TOKENS))
_CHAT = f"""
wrk.method = "POST"
wrk.path = "/v1/chat"
wrk.body = '{{"prompt": "{_WORDS}"}}'
wrk.headers["Content-Type"] = "application/json"
"""
# Keeps sealed connections busy; sealing is done by as many processes as there are, and it is they that are slower.
_SEALING = """
import json, sys, time
from pathlib import Path
import ssl
from controller.security.hpke import ClientKey
from controller.security.hpke.client import RouterClient
url, ca, key, seconds = sys.argv[1], sys.argv[2], ClientKey.load(Path(sys.argv[3])), float(sys.argv[4])
took = []
with RouterClient(url, key, tls=ssl.create_default_context(cafile=ca)) as client:
    client.request("GET", "/")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        assert client.request("POST", "/", b"y" * 200, "application/json").status == 200
        took.append(time.perf_counter() - began)
took.sort()
print(json.dumps({"per_s": len(took) / seconds, "p50": took[len(took) // 2], "p99": took[len(took) * 99 // 100]}))
"""


class _Bench:
    """Everything in a private network namespace and one directory."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.directory = directory
        self._stack = stack
        self.space = Namespace()
        stack.callback(self.space.close)
        pki = Pki(directory / "pki")
        pki.init("bench-ca")
        pki.issue("router1", "peer", ["127.0.0.1"], ["localhost"])
        self.ca = directory / "pki/ca.pem"
        self.socket = directory / "inference.sock"
        self.nginx("upstream", _UPSTREAM, core=1)
        self.chat = directory / "chat.sock"
        self.start(1, sys.executable, "-c", _INFERENCE, str(self.chat))
        (directory / "chat.lua").write_text(_CHAT)
        self.wait(lambda: self.socket.exists() and self.chat.exists())
        self.socket.chmod(0o660)
        proxies = (("nginx", self.socket), ("nginx chat", self.chat))
        texts = [_PROXY.format(behind=name.replace(" ", "_"), port=_PORTS[name], socket=path) for name, path in proxies]
        self.proxy = self.nginx("nginx", "".join(texts), core=0)
        self.wait(lambda: self.answers("nginx"))

    def start(self, core: int, *command: str) -> subprocess.Popen[bytes]:
        """A process inside, on one core, until the end."""
        words = self.space.command("taskset", "-c", str(core), *command)
        made = subprocess.Popen(words, preexec_fn=die_with_parent)
        self._stack.callback(made.wait)
        self._stack.callback(made.terminate)
        return made

    def nginx(self, name: str, servers: str, core: int) -> subprocess.Popen[bytes]:
        """An nginx of our own."""
        pair = (self.directory / "pki/current/router1").resolve()
        text = servers.replace("{socket}", str(self.socket))
        config = self.directory / f"{name}.conf"
        config.write_text(_NGINX.format(directory=self.directory, name=name, pair=pair, servers=text))
        return self.start(core, "nginx", "-c", str(config), "-e", "/dev/null", "-g", "user root;")

    def router(self, name: str, hpke: Path | None) -> int:
        """A router; the process id of its worker."""
        settings = Settings(
            name="router1",
            hosts=("127.0.0.1",),
            port=_PORTS[name],
            pki=self.directory / "pki",
            targets=(Target("inference", socket=self.chat if "chat" in name else self.socket),),
            limits=Limits(per_client_per_s=1e9, concurrency=100_000),
            hpke=hpke,
        )
        file = self.directory / f"{name}.json"
        file.write_text(settings.to_json())
        process = self.start(0, sys.executable, "-c", _ROUTER, str(file))
        self.wait(lambda: self.answers(name))
        return worker_of(process)

    def wait(self, what: object, patience_s: float = 20) -> None:
        """Until that is so."""
        deadline = time.monotonic() + patience_s
        while not what():  # type: ignore[operator]
            if time.monotonic() > deadline:
                raise LabError("a server of the measurement does not answer")
            time.sleep(0.05)

    def answers(self, name: str) -> bool:
        """Whether somebody listens there; a refusal is an answer."""
        url = f"https://127.0.0.1:{_PORTS[name]}/"
        command = self.space.command("curl", "-s", "-o", "/dev/null", "--cacert", str(self.ca), url)
        return subprocess.run(command).returncode == 0

    def wrk(self, name: str, connections: int = CONNECTIONS, seconds: float = SECONDS) -> dict[str, float]:
        """Requests a second, and the middle latency."""
        url = f"https://127.0.0.1:{_PORTS[name]}/"
        words = ["taskset", "-c", "1", "wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--latency", url]
        words += ["-s", str(self.directory / "chat.lua")] if "chat" in name else []
        out = subprocess.run(self.space.command(*words), capture_output=True, text=True, check=True).stdout
        if re.search("Non-2xx|Socket errors", out):
            raise LabError(f"{name} failed under load: {out}")
        per_s = re.search(r"Requests/sec:\s+([0-9.]+)", out)
        p50 = re.search(r"50%\s+([0-9.]+)(us|ms|s)", out)
        p99 = re.search(r"99%\s+([0-9.]+)(us|ms|s)", out)
        assert per_s and p50 and p99, out
        unit = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
        return {
            "per_s": float(per_s[1]),
            "p50": float(p50[1]) * unit[p50[2]],
            "p99": float(p99[1]) * unit[p99[2]],
        }

    def sealing(self, key: Path, clients: int, seconds: float = SECONDS) -> dict[str, float]:
        """The same of clients that seal."""
        url = f"https://127.0.0.1:{_PORTS['sealed']}"
        words = ["taskset", "-c", "1", sys.executable, "-c", _SEALING, url, str(self.ca), str(key), str(seconds)]
        running = [
            subprocess.Popen(self.space.command(*words), stdout=subprocess.PIPE, text=True) for _ in range(clients)
        ]
        found = [json.loads(each.communicate(timeout=60)[0]) for each in running]
        return {
            "per_s": sum(each["per_s"] for each in found),
            "p50": statistics.median(each["p50"] for each in found),
            "p99": max(each["p99"] for each in found),
        }


def worker_of(process: subprocess.Popen[bytes]) -> int:
    """The process id of the one worker of a server."""
    return int(subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()[0])


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def _bench() -> Iterator[_Bench]:
    with tempfile.TemporaryDirectory(prefix="bulkhead-bench-") as directory, ExitStack() as stack:
        yield _Bench(Path(directory), stack)


def measure(rounds: int) -> Iterator[Figure]:
    """Every figure of the router. Nothing where there is no nginx or wrk."""
    missing = [name for name in ("nginx", "wrk", "curl") if shutil.which(name) is None]
    if missing:
        print(f"no figures of the router: install {' and '.join(missing)}", file=sys.stderr)
        return
    with _bench() as bench:
        hpke = bench.directory / "hpke"
        RouterKeys(hpke).ensure()
        key = ClientKey.new("auth")
        Registry(hpke).register("bench", key.public)
        file = bench.directory / "client.key"
        file.touch(mode=0o600)
        file.write_text(key.reveal() + "\n")
        workers = {name: bench.router(name, None) for name in ("router", "router chat")}
        workers["sealed"] = bench.router("sealed", hpke)
        workers["nginx"] = workers["nginx chat"] = worker_of(bench.proxy)
        for name in ("nginx", "router", "nginx chat", "router chat"):
            bench.wrk(name, seconds=1)
        yield from _compared(
            bench, workers, rounds, " chat", f"answers of {TOKENS} tokens, streamed by the inference server"
        )
        yield from _compared(bench, workers, rounds, "", "answers of 200 bytes by another nginx")
        alone = {name: [bench.wrk(name, 1, 1.0) for _ in range(rounds)] for name in ("upstream", "nginx", "router")}
        base = statistics.median(each["p50"] for each in alone["upstream"])
        for name in ("nginx", "router"):
            added = [(each["p50"] - base) * 1e6 for each in alone[name]]
            yield Figure(f"{name}, added latency, one connection", statistics.median(added), "us", detail=spread(added))
        before = _cpu_s(workers["sealed"])
        sealed = bench.sealing(file, 4)
        cost = (_cpu_s(workers["sealed"]) - before) / (sealed["per_s"] * SECONDS)
        yield Figure(
            "router, sealed requests, 4 clients", sealed["per_s"], "1/s", detail="it is the clients that are slow"
        )
        detail = f"{1 / cost:.0f} a second on one core"
        yield Figure("router, processor time of a sealed request", cost * 1e6, "us", detail=detail)
        one = bench.sealing(file, 1, 2)
        yield Figure("a sealed request, client and all, one connection", one["p50"] * 1e6, "us")


def _compared(bench: _Bench, workers: dict[str, int], rounds: int, kind: str, what: str) -> Iterator[Figure]:
    """Router and nginx in turn: whatever else the machine does meets both."""
    names = (f"nginx{kind}", f"router{kind}")
    rates: dict[str, list[float]] = {name: [] for name in names}
    costs: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            before = _cpu_s(workers[name])
            rate = bench.wrk(name)["per_s"]
            rates[name].append(rate)
            costs[name].append((_cpu_s(workers[name]) - before) / (rate * SECONDS) * 1e6)
    for name in names:
        yield Figure(f"{name.split()[0]}, {what}", statistics.median(rates[name]), "1/s", detail=spread(rates[name]))
    ratios = [one / other for one, other in zip(rates[names[1]], rates[names[0]], strict=True)]
    ratio = statistics.median(ratios)
    # The bar is for what a router is for. Where nothing but the proxy takes time, the figure says what Python costs.
    bar = (f"at least {BAR}", ratio >= BAR) if kind else ("", None)
    yield Figure(f"router / nginx, {what}", ratio, "ratio", *bar, spread(ratios))
    for name in names:
        middle = statistics.median(costs[name])
        yield Figure(f"{name.split()[0]}, processor time of such a request", middle, "us", detail=spread(costs[name]))
