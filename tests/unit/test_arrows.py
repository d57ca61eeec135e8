"""Who may import whom. Read from the source, so that an import inside a function counts as well."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("controller", "apps", "lab")

# From the bottom up. A module may import what stands in lower ranks, and in its own.
RANKS = (
    ("problems", "model", "events", "notes", "hostmodel", "records", "wgkeys"),
    ("store", "realized", "vpnpool"),
    ("fields", "ofparse", "statetext", "eventfiles", "grants"),
    ("flow", "stateschema", "ofrules", "eventlog", "eventread", "eventverify", "eventview"),
    ("frame", "securityderive", "hostderive", "statederive", "flownames", "flowwrites"),
    ("flowmatch",),
    ("flowactions",),
    ("flowtext",),
    ("pipeline", "statefile"),
    ("desired",),
    ("apps",),
    ("compile", "diff", "codec", "packets"),
    ("verify",),
    ("ovsctl",),
    ("signals", "offenders"),
    ("reconcile",),
    ("switch",),
    ("watch", "wording"),
    ("status",),
    ("core",),
    ("upkeep",),
    ("hub", "wire", "unixsocket"),
    ("asking", "api_socket", "client"),
    ("api",),
    ("security",),
    ("link", "listen", "ovsdb", "control"),
    ("shell",),
    ("terminal", "storeoptions"),
    ("apiterm", "joinedevents"),
    ("agent",),
    ("lab",),
    ("apicli", "checkcli", "hostcli", "proofcli", "agentcli", "vpncli", "firewallcli", "storecli", "pkicli", "wgcli"),
    ("containercli", "grantcli", "tokencli", "completioncli", "mcpcli", "clientcli", "routercli"),
    ("unitscli", "networkcli", "incidentcli", "controllercli", "eventscli"),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}

KNOWS_OS_KEN = {"shell", "listen", "link", "hub", "wire", "packets"}
# Between these nothing may be imported but what is named: the reader of state files, the log and the flows are apart.
APART = {
    "eventfiles": {"events", "problems"},
    "eventlog": {"events", "eventfiles"},
    "eventread": {"events", "eventfiles"},
    "eventverify": {"events", "eventfiles"},
    "eventview": {"events"},
    "events": set(),
    "model": set(),
    "problems": set(),
    "records": {"model"},
    "store": {"model", "problems", "records"},
    "realized": {"records"},
    "desired": {"problems", "records", "statefile"},
    "fields": {"model"},
    "grants": {"model"},
    "flow": {"fields", "model"},
    "flownames": {"fields", "flow"},
    "flowwrites": {"fields", "flow"},
    "flowmatch": {"fields", "flow", "flownames"},
    "flowactions": {"fields", "flow", "flownames", "flowmatch", "flowwrites"},
    "flowtext": {"problems", "flow", "flownames", "flowmatch", "flowactions", "flowwrites"},
    "statefile": {"model", "hostmodel", "problems", "records", "statetext", "stateschema", "statederive", "ofrules"},
    "statederive": {"model", "hostmodel", "hostderive", "notes", "problems", "statetext", "stateschema", "ofrules"},
    "hostderive": {"model", "hostmodel", "notes", "securityderive", "stateschema"},
    "securityderive": {"model", "hostmodel", "notes", "stateschema"},
    "agent": {
        *("api_socket", "asking", "desired", "eventfiles", "eventlog", "events", "grants", "hostmodel", "model"),
        *("problems", "records", "security", "statefile", "store", "unixsocket", "vpnpool", "wgkeys"),
    },
    "ofrules": {"model", "problems", "ofparse"},
    "client": {"problems"},
    "apiterm": {"client", "problems", "terminal"},
}


def modules() -> Iterator[tuple[str, str, Path]]:
    """(package, name, file) of every module."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield package, path.relative_to(ROOT / package).parts[0].removesuffix(".py"), path


def imports(source: str, package: str) -> set[str]:
    """Every module a source imports, by its full name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package if node.level else ""
            base = ".".join(filter(None, (base, node.module)))
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def ranked(name: str) -> str | None:
    """The name of an imported module of ours as RANKS has it."""
    package, *rest = name.split(".")
    if package == "controller" and rest:
        return rest[0]
    return package if package in ("apps", "lab") else None


def wrong(package: str, name: str, source: str) -> list[str]:
    """The edges of one module that are not allowed."""
    own = name if package == "controller" else package
    found = imports(source, package)
    out = []
    for imported in sorted(found):
        theirs = ranked(imported)
        if theirs is None or theirs == own or theirs not in RANK:
            continue
        if RANK[theirs] > RANK.get(own, -1):
            out.append(f"{package}.{name} imports {imported}: against the arrows")
        if own in APART and theirs not in APART[own]:
            out.append(f"{package}.{name} imports {imported}: it stands apart")
    tops = {imported.split(".")[0] for imported in found}
    if "os_ken" in tops and own not in KNOWS_OS_KEN:
        out.append(f"{package}.{name} imports os_ken")
    if "pyroute2" in tops and own != "agent":
        out.append(f"{package}.{name} imports pyroute2")
    if "mininet" in tops and package != "lab":
        out.append(f"{package}.{name} imports mininet")
    return out


def test_every_import_follows_the_arrows() -> None:
    assert [edge for package, name, path in modules() for edge in wrong(package, name, path.read_text())] == []


def test_every_module_has_a_place() -> None:
    unplaced = {name for package, name, _ in modules() if package == "controller"} - set(RANK) - {"__init__"}
    assert not unplaced, f"say in RANKS where these stand: {sorted(unplaced)}"


def test_apps_import_no_other_app_than_their_base() -> None:
    shared = {"base", "learning"}
    for package, name, path in modules():
        if package == "apps" and name != "__init__":
            others = {i.split(".")[1] for i in imports(path.read_text(), "apps") if i.startswith("apps.")}
            constants = {"admission", "packet_in"} if name == "crossover" else set()
            assert others <= shared | constants, f"apps.{name} imports {others - shared}"


@pytest.mark.parametrize(
    "package, name, source",
    [
        ("controller", "model", "from controller.flow import Flow"),
        ("controller", "pipeline", "import apps.base"),
        ("apps", "egress", "from controller.compile import BridgeCompiler"),
        ("apps", "egress", "import os_ken"),
        ("apps", "egress", "def late():\n    from os_ken.lib import packet"),
        ("controller", "compile", "from controller import core"),
        ("controller", "core", "from controller.shell import serve"),
        ("controller", "core", "from os_ken.base import app_manager"),
        ("controller", "shell", "from controller.cli import main"),
        ("controller", "shell", "import pyroute2"),
        ("controller", "eventlog", "from controller.flow import Flow"),
        ("lab", "manager", "from pyroute2 import IPRoute"),
    ],
)
def test_a_wrong_import_is_seen(package: str, name: str, source: str) -> None:
    assert wrong(package, name, source)


@pytest.mark.parametrize(
    "package, name, source",
    [
        ("controller", "core", "from controller import diff, fields"),
        ("apps", "egress", "from controller.pipeline import EGRESS"),
        ("controller", "shell", "from os_ken import cfg"),
        ("controller", "compile", "from apps import SOCKET_APPS"),
    ],
)
def test_a_right_import_is_not(package: str, name: str, source: str) -> None:
    assert wrong(package, name, source) == []
