"""Packages for a machine without a network: a folder of wheels, made where there is one (gpu.py)."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

from plumbing.common import ROOT, InputError

# What a machine with torch 2.11, triton 3.6, transformers 5.17, peft, pytest and Python 3.12 lacks.
CARRIED = ["omegaconf", "math-verify", "latex2sympy2_extended", "antlr4-python3-runtime"]
CARRIED += ["lmdeploy", "addict", "annotated-types", "apache-tvm-ffi", "mmengine-lite", "platformdirs"]
CARRIED += ["pybase64", "pydantic", "pydantic_core", "pyzmq", "shortuuid", "termcolor", "typing-inspection"]
CARRIED += ["xgrammar", "yapf"]
TURBOMIND = re.compile(r"lmdeploy/turbomind/(.*\.so\b|(lib|lib64|include)/)|lmdeploy/(lib|lib64|include)/")


def add_options(parser: argparse.ArgumentParser) -> None:
    """--wheels and --collect-wheels."""
    parser.add_argument("--wheels", type=Path, help="install these first, to OUT/site")
    parser.add_argument("--collect-wheels", type=Path, metavar="FOLDER", help="make that folder, and end")


def prepare(options: argparse.Namespace) -> None:
    """Do what these options ask; ends the process after --collect-wheels."""
    if options.collect_wheels:
        collect(options.collect_wheels)
        sys.exit(0)
    if options.wheels:
        install(options.wheels, options.out / "site")


def collect(folder: Path) -> None:
    """Download CARRIED for Python 3.12 on Linux x86-64, in the versions of the requirement files.

    One that they do not pin is taken as it is installed here. LMDeploy's other engine, 100 MB of compiled
    code, is left out of its wheel.
    """
    pinned: dict[str, str] = {}
    for file in ("requirements.txt", "requirements-lmdeploy.txt"):
        pinned |= dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / file).read_text(), re.MULTILINE))
    wanted = [f"{name}=={pinned.get(name) or importlib.metadata.version(name)}" for name in CARRIED]
    platforms = [f"--platform=manylinux{tag}_x86_64" for tag in ("_2_28", "_2_27", "_2_17", "2014", "1")]
    target = ["--python-version=3.12", "--implementation=cp", *platforms, f"--dest={folder}"]
    run_pip("download", "--no-deps", "--only-binary=:all:", *target, *wanted)
    (lmdeploy,) = folder.glob("lmdeploy-*.whl")
    without_turbomind(lmdeploy)
    found = [file.stat().st_size for file in folder.glob("*.whl")]
    print(f"{folder}: {len(found)} wheels, {sum(found) / 1e6:.1f} MB")


def without_turbomind(wheel: Path) -> None:
    """Rewrite LMDeploy's wheel without its compiled engine, which is not used here."""
    part = wheel.with_suffix(".part")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(part, "w") as new:
        for item in old.infolist():
            content = old.read(item)
            if item.filename.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines(keepends=True)
                content = "".join(line for line in lines if not TURBOMIND.match(line)).encode()
            if not TURBOMIND.match(item.filename):
                new.writestr(item, content, zipfile.ZIP_DEFLATED)
    part.replace(wheel)


def install(wheels: Path, site: Path) -> None:
    """Install a folder of wheels into `site`, for this process and for those that it starts.

    Raises:
        InputError: no wheels there, or pip fails.
    """
    found = sorted(map(str, wheels.glob("*.whl")))
    if not found:
        raise InputError(f"argument --wheels: {wheels} has no wheels")
    run_pip("install", "--no-index", "--no-deps", "--no-compile", "--upgrade", f"--target={site}", *found)
    sys.path.append(str(site))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(site)]))


def run_pip(command: str, *arguments: str) -> None:
    """Run pip, which says itself what is wrong."""
    if subprocess.run([sys.executable, "-m", "pip", command, "--quiet", *arguments]).returncode:
        raise InputError(f"pip {command} failed")
