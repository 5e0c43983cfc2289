"""Tests of launch/: Accelerate reads its files, and a SLURM job is stopped, requeued and resumed.

Seen to fail when: a YAML has a key Accelerate does not know; the SLURM script leaves out the trap,
`--resume=auto`, or waits for the step only once.
"""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from clipsmall.config.reader import read
from tests import ROOT
from tests.shards_for_tests import config

YAMLS = sorted((ROOT / "launch").glob("*.yaml"))


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.name)
def test_accelerate_reads_each_file_and_its_own_command(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    # refuses unknown keys
    loaded = load_config_from_file(str(path))
    given = yaml.safe_load(path.read_text())
    assert loaded.num_processes == given["num_processes"]
    comment = "".join(
        line.removeprefix("#") for line in path.read_text().splitlines(True) if line.startswith("#")
    )
    command = comment[comment.index("accelerate launch") :].replace("\\\n", " ").splitlines()[0]
    words = shlex.split(command.replace("--machine_rank K", "--machine_rank 1"))
    args = launch_command_parser().parse_args(words[2:])
    assert args.config_file == f"launch/{path.name}"
    assert args.training_script == "clipsmall/train.py"
    # a config of ours that is whole
    read([*args.training_script_args, "--data.train=[x]"])
    # what the launcher makes of it; it looks for cards, which are not here
    args = _validate_launch_command(args)[0]
    assert args.num_processes == given["num_processes"]
    assert args.mixed_precision == given["mixed_precision"]


SRUN = """#!/bin/bash
# stands for two machines: runs the command twice, and hands signals on, as srun does
while [[ $1 == --* ]]; do shift; done
"$@" & one=$!
"$@" & two=$!
trap 'kill -TERM $one $two' TERM
status=0
for each in $one $two; do
    wait $each; mine=$?
    while kill -0 $each 2>/dev/null; do wait $each; mine=$?; done
    ((mine == 0)) || status=$mine
done
exit $status
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$REQUEUED"; fi
"""


def job(folder: Path, words: list[str]) -> subprocess.Popen[str]:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    environment = {
        **os.environ,
        "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "REQUEUED": str(folder / "requeued"),
        "ACCELERATE_USE_CPU": "1",
        "OMP_NUM_THREADS": "1",
        "RANKS": "1",
        "PORT": port,
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "here[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }
    command = ["bash", str(ROOT / "launch/slurm.sh"), *words]
    return subprocess.Popen(
        command, env=environment, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )


def losses(out: Path) -> list[float]:
    return [
        json.loads(line)["loss"]
        for line in (out / "metrics.jsonl").read_text().splitlines()
        if "loss" in line
    ]


def test_a_slurm_job_of_two_machines_is_stopped_requeued_and_resumed(
    glyphs: Path, tmp_path: Path
) -> None:
    """Two launchers of one rank each, which find one another as on two machines."""
    changes = {"optim.pairs": 32 * 3000, "run.checkpoint_every": 3000}
    out = tmp_path / "run"
    first = job(tmp_path, config(glyphs, out, **changes))
    deadline = time.time() + 180
    while not (out / "metrics.jsonl").exists() or len(losses(out)) < 20:
        assert time.time() < deadline
        assert first.poll() is None, first.communicate(timeout=10)
        time.sleep(0.2)
    first.send_signal(signal.SIGTERM)
    said, log = first.communicate(timeout=120)
    assert first.returncode == 0, log
    assert "back into the queue" in said
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    (saved,) = (out / "checkpoints").glob("step_*")
    stopped_at = int(saved.name.removeprefix("step_"))
    assert 20 <= stopped_at < 3000
    assert len(losses(out)) == stopped_at
    steps = stopped_at + 10
    again = job(tmp_path, config(glyphs, out, **{**changes, "optim.pairs": 32 * steps}))
    _, log = again.communicate(timeout=180)
    assert again.returncode == 0, log
    assert f"continuing after step {stopped_at}" in log
    assert len(losses(out)) == steps
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"


def test_a_job_that_fails_is_not_put_back(tmp_path: Path, glyphs: Path) -> None:
    words = config(glyphs, tmp_path / "run", **{"data.train": "[nowhere]"})
    failed = job(tmp_path, words)
    failed.communicate(timeout=180)
    assert failed.returncode != 0
    assert not (tmp_path / "requeued").exists()
