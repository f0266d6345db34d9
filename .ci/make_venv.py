"""Make the virtual environment of the Makefile: torch first and pinned, then the rest.

Run by the base interpreter. If that has torch >= 2.11, its packages are seen from the
new environment instead of being installed again (a torch wheel is hundreds of MB; the
one there may be built for this machine's GPUs). Either way pip is then held to that
very torch. Written for old interpreters too, so that they can say what is missing.
"""

import importlib.metadata
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

OLDEST_PYTHON = (3, 11)
OLDEST_TORCH = (2, 11)


def main() -> None:
    """Make ``argv[1]``, with torch ``argv[2]`` if the base interpreter has none.

    Only what is new is installed if ``argv[3]``, the stamp of this interpreter, exists.
    """
    folder, pinned, stamp = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    if sys.version_info[:2] < OLDEST_PYTHON:
        sys.exit(
            f"Python {sys.version.split()[0]} is too old: ringcompile needs "
            f"{'.'.join(map(str, OLDEST_PYTHON))}; name another with make PYTHON=..."
        )
    clear = not stamp.exists()
    venv.EnvBuilder(clear=clear, with_pip=True, symlinks=True).create(folder)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install"]
    found = find_torch()
    if found:
        print(f"using torch {found} of {sys.executable}", flush=True)
        borrow_packages(folder)
    else:
        run([*pip, f"torch=={pinned}"])
    constraint = folder / "constraint.txt"
    constraint.write_text(f"torch=={found or pinned}\n")
    print("installing ringcompile with its hf and dev extras", flush=True)
    run([*pip, "-q", "-c", str(constraint), "-e", ".[hf,dev]"])


def run(command: list[str]) -> None:
    """Run it, or end with its name: its own output has said why."""
    if subprocess.run(command, check=False).returncode:
        sys.exit("failed: " + " ".join(command))


def find_torch() -> str:
    """Version of the base interpreter's torch, or "" if it has none or an old one."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""
    major, minor = version.split(".")[:2]
    return version if (int(major), int(minor)) >= OLDEST_TORCH else ""


def borrow_packages(folder: Path) -> None:
    """Let the environment import the base interpreter's packages, after its own.

    Not ``--system-site-packages``: from a virtual environment, that would give the
    packages of the interpreter below it.
    """
    places = {"base": str(folder.resolve()), "platbase": str(folder.resolve())}
    own = Path(sysconfig.get_path("purelib", "venv", vars=places))
    theirs = [p for p in sys.path if Path(p).name in {"site-packages", "dist-packages"}]
    (own / "base-interpreter.pth").write_text("".join(f"{p}\n" for p in theirs))


if __name__ == "__main__":
    main()
