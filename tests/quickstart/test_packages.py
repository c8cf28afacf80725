import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("jraph", reason="needs the quickstart's packages")

from quickstart import packages
from quickstart.errors import QuickstartError
from quickstart.packages import PackageFile, fetch, sha256


@pytest.fixture
def served(tmp_path: Path) -> Path:
    (tmp_path / "registry").mkdir()
    path = tmp_path / "registry" / "some-1.0-py3-none-any.whl"
    path.write_bytes(b"content")
    return path


def pip_that(
    monkeypatch: pytest.MonkeyPatch, code: int, file: Path | None, stderr: str
) -> list[list[str]]:
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        options = dict(a.split("=", 1) for a in command if a.startswith("--") and "=" in a)
        commands.append([*command, Path(options["--requirement"]).read_text()])
        if file is not None:
            shutil.copy(file, options["--dest"])
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setattr(packages.subprocess, "run", run)
    return commands


def test_a_file_is_fetched_once(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = PackageFile("some==1.0", served.name, sha256(served))
    commands = pip_that(monkeypatch, 0, served, "")
    path = fetch(wanted, tmp_path / "downloads")
    assert path.read_bytes() == b"content"
    assert commands[0][-1] == f"some==1.0 --hash=sha256:{wanted.sha256}\n"
    assert "--only-binary=:all:" in commands[0]
    assert fetch(wanted, tmp_path / "downloads") == path
    assert len(commands) == 1
    path.write_bytes(b"damaged")
    assert fetch(wanted, tmp_path / "downloads").read_bytes() == b"content"
    assert [file.name for file in path.parent.iterdir()] == [served.name]


def test_a_source_archive_is_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = pip_that(monkeypatch, 1, None, "")
    with pytest.raises(QuickstartError, match="pip ended with code 1"):
        fetch(PackageFile("some==1.0", "some-1.0.tar.gz", "00"), tmp_path)
    assert "--no-binary=:all:" in commands[0]


def test_trouble_is_explained_and_leaves_nothing(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, wanted = tmp_path / "downloads", PackageFile("some==1.0", served.name, "00")
    pip_that(monkeypatch, 0, served, "")
    with pytest.raises(QuickstartError, match=r"damaged or not the expected file \(SHA-256"):
        fetch(wanted, folder)
    pip_that(monkeypatch, 1, None, "WARNING: a\nERROR: No matching distribution\n")
    with pytest.raises(QuickstartError, match=r"No matching distribution.*check the connection"):
        fetch(wanted, folder)
    assert list(folder.iterdir()) == []
