"""The agent is a program of its own: it runs where nothing of this project is, on Python 3.9."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.export.devices import made_up_bundle as made_up
from tests.export.devices.cuts import ROOT

AGENT = ROOT / "export" / "devices" / "agent"
FILES = sorted(AGENT.glob("*.py"))
ALLOWED = {"cryptography", "numpy", "onnxruntime", "tuf"}
"""What it may need besides the standard library; the last two only for what they are for."""


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_its_syntax_is_that_of_python_3_9(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    assert ast.dump(ast.parse(source, feature_version=(3, 9))) == ast.dump(ast.parse(source))
    with pytest.raises(SyntaxError):  # what is newer is noticed
        ast.parse(source + "\nmatch 1:\n    case _: pass\n", feature_version=(3, 9))


def test_it_calls_nothing_newer_than_python_3_9(tmp_path: Path) -> None:
    def found(place: Path) -> int:
        command = [sys.executable, "-c", "from vermin.main import main; main()", "-t=3.9-", "--no-tips", str(place)]
        return subprocess.run(command, capture_output=True, check=False).returncode

    assert found(AGENT) == 0
    (tmp_path / "newer.py").write_text("import os\nos.path.realpath('.', strict=True)\n")
    assert found(tmp_path) == 1


def test_it_imports_the_standard_library_and_little_else() -> None:
    found = set()
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {name.name.partition(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add((node.module or "").partition(".")[0])
    assert found - sys.stdlib_module_names <= ALLOWED


def test_a_copy_of_the_folder_runs_under_another_name(tmp_path: Path) -> None:
    shutil.copytree(AGENT, tmp_path / "place" / "edge_agent", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "trust.json").write_bytes(made_up.canonical(made_up.trust()))
    bundle = made_up.write(tmp_path / "x.edgepkg")

    def agent(*arguments: str) -> tuple[int, dict]:
        command = [sys.executable, "-m", "edge_agent", "--root", str(tmp_path / "device"), *arguments]
        done = subprocess.run(command, cwd=tmp_path / "place", capture_output=True, text=True, check=False)
        return done.returncode, json.loads(done.stdout)

    assert agent("init", "--device", "lab-1", "--trust", str(tmp_path / "trust.json"))[0] == 0
    assert agent("install", str(bundle))[1]["phase"] == "committed"
    assert agent("status")[1]["active"]["seq"] == 1
    assert agent("install", str(tmp_path / "absent"))[0] == 2


def test_without_cryptography_openssl_checks_signatures(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    code = (
        "import sys; sys.modules['cryptography'] = None\n"
        "from pathlib import Path; from export.devices.agent import envelope, package; import json\n"
        "trust = envelope.Trust(json.loads(sys.argv[1]))\n"
        "for path in sys.argv[2:]:\n"
        "    try: print(package.read(Path(path), trust).statement['seq'])\n"
        "    except package.Refused as error: print(error.code)\n"
    )
    good = made_up.write(tmp_path / "good.edgepkg", seq=5)
    bad = tmp_path / "bad.edgepkg"
    data = bytearray(good.read_bytes())
    place = data.index(b'"sig":"') + 20
    data[place] = ord("A") if data[place] != ord("A") else ord("B")
    bad.write_bytes(data)
    command = [sys.executable, "-c", code, json.dumps(made_up.trust()), str(good), str(bad)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["5", "signature"], done.stderr
