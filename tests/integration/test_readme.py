"""What the README says, done: every command and every example in it, in an empty folder."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tests.integration.test_serving import serving

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKE = re.findall(r"^make (\w+)$", README, re.MULTILINE)
COMMANDS = re.findall(r"^shoal .+$", README, re.MULTILINE)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder with the repository's `ops` in it, as the README's commands expect."""
    (tmp_path / "ops").symlink_to(ROOT / "ops")
    return tmp_path


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    bin_folder = Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "SHOAL_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=280
    )


def test_its_commands_do_what_it_says(folder: Path) -> None:
    assert len(COMMANDS) == 4
    for command in COMMANDS:
        done = run(shlex.split(command), folder)
        assert done.returncode == 0, (command, done.stderr)

    rows = (folder / "completions.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(rows) == len((ROOT / "ops/demo/prompts.txt").read_text().splitlines())


def test_its_make_targets_exist() -> None:
    assert MAKE == ["demo", "test", "watch"]
    for target in MAKE:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_make_demo_ends_with_completions_and_throughput(tmp_path: Path) -> None:
    if not (Path(sys.prefix) / ".ready").exists():
        assert "CI" not in os.environ, "CI runs the tests in the environment that make has set up"
        pytest.skip("make has not set this environment up")
    output = tmp_path / "out" / "completions.jsonl"

    done = run(["make", "demo", f"VENV={sys.prefix}", f"DEMO_OUTPUT={output}"], ROOT)

    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stdout
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    prompts = (ROOT / "ops/demo/prompts.txt").read_text(encoding="utf-8").splitlines()
    assert [row["prompt"] for row in rows] == prompts
    assert len(rows) >= 64
    assert all(row["finish_reason"] in ("stop", "length") for row in rows)


def test_its_examples_run(folder: Path, redis_url: str) -> None:
    client_example, rq_example = blocks("python")
    wait = "\nimport time\nwhile not job.is_finished: time.sleep(0.05)\nprint(job.return_value())"
    set_up = f"redis_url = {redis_url!r}\n"
    environment = f"import os\nos.environ['SHOAL_REDIS_URL'] = {redis_url!r}\n"
    with serving(redis_url):
        outputs = [
            run([sys.executable, "-c", code], folder)
            for code in (environment + client_example, set_up + rq_example + wait)
        ]

    assert [output.returncode for output in outputs] == [0, 0], outputs
    assert outputs[0].stdout.count("→") == 3
    assert "'finish_reason'" in outputs[1].stdout


def test_its_tables_are_current() -> None:
    done = run([sys.executable, str(ROOT / "ops/readme_tables.py"), "--check"], ROOT)

    assert done.returncode == 0, done.stderr


def test_its_tree_names_files_that_exist() -> None:
    tree = README.split("## Where things are")[1].split("```")[1]
    folder = ROOT
    for line in tree.strip().splitlines():
        names = line.strip().split("  ")[0].split()
        if not line.startswith(" "):
            folder = ROOT / names[0]
            assert folder.is_dir(), names[0]
            continue
        for name in names:
            assert (folder / name).exists(), f"{folder.name}/{name}"
