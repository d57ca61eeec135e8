"""The systemd units: what they are kept from, by systemd's own judgement, and that they are written whole or not at all."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from controller.cli import main
from controller.security import units


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze")
def test_every_unit_is_within_its_score_and_systemd_understands_every_line(tmp_path: Path) -> None:
    for name, text in units.files("/bin/true").items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    directory = tmp_path / "etc/systemd/system"
    found = units.scores([directory / units.service_name(unit) for unit in units.UNITS])
    assert {name: score for name, score in found.items() if score > units.limit(name)} == {}
    for path in directory.iterdir():
        done = subprocess.run(["systemd-analyze", "verify", "--man=no", path], capture_output=True, text=True)
        assert "Unknown" not in done.stderr and "Invalid" not in done.stderr and "Failed to parse" not in done.stderr


def test_every_part_but_root_s_own_has_a_user_and_no_privileges() -> None:
    for unit in units.UNITS:
        text = units.service(unit, "/usr/bin/bulkhead")
        assert "NoNewPrivileges=yes" in text
        if unit.user != "root":
            assert f"u {unit.user} " in units.SYSUSERS
            assert "ProtectSystem=strict" in text and "PrivateDevices=yes" in text
        if unit.name not in ("agent", "chores@", "firewall", "router", "wg"):
            assert "\nCapabilityBoundingSet=\n" in text


def test_a_second_install_writes_nothing_and_a_changed_file_is_mended(tmp_path: Path) -> None:
    assert len(units.install(tmp_path, "/usr/bin/bulkhead")) == len(units.files())
    assert units.install(tmp_path, "/usr/bin/bulkhead") == []
    changed = tmp_path / "etc/systemd/system/bulkhead-router.service"
    changed.write_text("[Service]\nUser=root\n")
    assert units.install(tmp_path, "/usr/bin/bulkhead") == [changed]


def test_the_command_scores_and_refuses_a_loose_unit(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd-analyze")
    units.install(tmp_path, "/bin/true")
    path = tmp_path / "etc/systemd/system/bulkhead-api.service"
    path.write_text("[Service]\nExecStart=/bin/true\n")
    done = CliRunner().invoke(main, ["units", "score", "--root", str(tmp_path), "--json"])
    assert done.exit_code == 1
    loose = [row["unit"] for row in json.loads(done.stdout) if row["score"] > row["limit"]]
    assert loose == ["bulkhead-api.service"]
