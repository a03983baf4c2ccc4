"""Cells in processes of their own, on this machine and on a Ray cluster; and the command that runs them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from benches import tiny_bench, write_bench
from moecl import cli
from moecl.bench import Bench, BenchWatcher
from moecl.bench_cells import Processes
from moecl.bench_ray import Cluster
from moecl.errors import ConfigError

LONG = {"methods": {"moe-cl": {"rank": 2, "set": {"train.epochs": 30}}}}
ENDLESS = {"methods": {"moe-cl": {"rank": 2, "set": {"train.epochs": 3000}}}}


class Doing(BenchWatcher):
    """Does something once, when the first cell is learning."""

    def __init__(self, what) -> None:
        self.what, self.did = what, False

    def tick(self, bench: Bench) -> None:
        if not self.did and "learning" in bench.news(bench.cells[0]).get("doing", ""):
            self.did = True
            self.what()


def test_a_killed_cell_fails_and_then_goes_on(tmp_path, tiny_folder):
    """Learning on from its checkpoints."""
    config, pool = tiny_bench(tmp_path, tiny_folder, seeds=[0, 1], **LONG), Processes(2)
    bench = Bench(config, tmp_path / "out", slots=2)
    first = bench.cells[0].id
    watcher = Doing(lambda: pool.running[first][0].kill())
    bench.run(pool, watcher)
    assert watcher.did
    assert [cell.status for cell in bench.cells] == ["failed", "done"]
    assert "its process was killed (signal 9); where memory ran out, use fewer --jobs" in str(bench.cells[0].reason)
    again = Bench(config, tmp_path / "out")
    again.run(Processes(1), BenchWatcher())
    assert [cell.status for cell in again.cells] == ["done", "done"]
    assert again.cells[0].result is not None
    assert again.cells[0].result.resumed == 1


def command(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "moecl", "bench", *words],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a shell's background job ignores it, and so would what such a job starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def until(true) -> None:
    while not true():
        time.sleep(0.05)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_the_bench(tmp_path, tiny_folder, how):
    file, out = write_bench(tmp_path, tiny_folder, **ENDLESS), tmp_path / "out"
    process = command(str(file), "-o", str(out))
    until(lambda: "step" in "".join(path.read_text() for path in (out / "news").glob("*.json")))
    process.send_signal(how)
    _, said = process.communicate()
    assert process.returncode == (130 if how == signal.SIGINT else -how)
    assert ("moecl: stopped; the same command goes on" in said) == (how == signal.SIGINT)
    [cell] = (out / "cells").iterdir()
    holder = json.loads((cell / ".lock").read_text() or "null")

    def gone() -> bool:
        try:
            os.kill(holder["pid"], 0)
        except ProcessLookupError:
            return True
        return "Z" in Path(f"/proc/{holder['pid']}/stat").read_text().split(") ")[1][:1]

    if holder is not None:
        until(gone)


def test_the_streams_own_method_is_told_of(tmp_path, tiny_folder, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_bench(tmp_path, tiny_folder)
    keys = yaml.safe_load(Path("stream.yaml").read_text()) | {"method": {"name": "moe-cl", "alpha": 0.5}}
    Path("stream.yaml").write_text(yaml.safe_dump(keys))
    assert cli.main(["bench", "bench.yaml", "--dry-run"]) == 0
    assert "method: alpha: 0.5 is not used in a bench; put method.* under `set`" in capsys.readouterr().err


def test_the_command(tmp_path, tiny_folder, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_bench(tmp_path, tiny_folder, orders={"one": ["task0"], "both": ["task0", "task1"]})
    assert cli.main(["bench", "bench.yaml", "-o", "out", "--dry-run"]) == 0
    assert "0 of 2 done" in capsys.readouterr().out
    assert not Path("out").exists()
    Path("task1.train.jsonl").unlink()
    assert cli.main(["bench", "bench.yaml", "-o", "out", "--jobs", "2"]) == 1
    told = capsys.readouterr()
    assert "moe-cl.both.s0: failed: " in told.out
    assert "1 of 2 done, 1 failed; out/bench.json" in told.out
    assert "moe-cl.one.s0: average accuracy" in told.err
    assert cli.main(["bench", "bench.yaml", "-o", "out", "--orders", "one", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(Path("out/bench.json").read_text())
    assert cli.main(["bench", "bench.yaml", "--seeds", "x"]) == 2
    assert "--seeds: 'x' is no seed" in capsys.readouterr().err


def test_help_lists_every_key(capsys):
    assert cli.main(["bench", "--help"]) == 0
    found = capsys.readouterr().out
    assert all(
        key in found for key in ("stream <text>", "tune.trials <whole number, 1 or more>", "keep <all | result>")
    )


def test_a_cluster_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="Ray is not installed; pip install"):
        Cluster("auto")


@pytest.mark.slow
def test_two_workers_of_a_ray_cluster(tmp_path, tiny_folder):
    """One cell is killed by a missing file; the other ends as it does here."""
    cluster = pytest.importorskip("ray.cluster_utils").Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    try:
        config = tiny_bench(tmp_path, tiny_folder, orders={"one": ["task0"], "both": ["task0", "task1"]}, seeds=[0, 1])
        (tmp_path / "task1.train.jsonl").unlink()
        pool = Cluster(cluster.address)
        assert pool.slots == 2
        bench = Bench(config, tmp_path / "out", slots=2)
        bench.run(pool, BenchWatcher())
    finally:
        cluster.shutdown()
    assert [cell.status for cell in bench.cells] == ["done", "done", "failed", "failed"]
    assert "task1.train.jsonl" in str(bench.cells[3].reason)
    here = Bench(config, tmp_path / "here")
    here.run(Processes(1), BenchWatcher())
    assert [cell.result and cell.result.R for cell in here.cells] == [
        cell.result and cell.result.R for cell in bench.cells
    ]
