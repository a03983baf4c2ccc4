"""A bench runs each cell once, goes on where it was stopped, and contains what fails."""

import json
import shutil
from pathlib import Path

import pytest

from benches import Here, run_here, tiny_bench, write_bench
from moecl import bench as bench_module
from moecl.bench import Bench, BenchWatcher, Selection
from moecl.bench_cells import Ended
from moecl.bench_config import load_bench
from moecl.errors import BusyError, ConfigError, RunError
from moecl.results import Result
from moecl.train import ContinualTrainer

TWO = {"methods": {"moe-cl": {"rank": 2}, "no discriminator": {"name": "moe-cl", "rank": 2, "alpha": 0}}}
TUNED = {"trials": 2, "seed": 7, "search": {"train.lr": [0.02, 0.05]}}


def record(out: Path) -> dict:
    return json.loads((out / "bench.json").read_text())


def statuses(bench: Bench) -> dict[str, str]:
    return {cell.id: cell.status for cell in bench.cells}


@pytest.fixture
def done(tmp_path, tiny_folder):
    """A bench of two cells that is done: its file and its folder."""
    config = tiny_bench(tmp_path, tiny_folder, **TWO)
    run_here(config, tmp_path / "out")
    return tmp_path / "bench.yaml", tmp_path / "out"


def test_each_cell_is_an_ordinary_run(tmp_path, tiny_folder):
    orders = {"forth": ["task0", "task1"], "back": ["task1", "task0"]}
    config = tiny_bench(tmp_path, tiny_folder, orders=orders, seeds=[0, 3])
    bench, pool = run_here(config, tmp_path / "out")
    assert pool.did == [f"moe-cl.{order}.s{seed}" for order in orders for seed in (0, 3)]
    for cell in bench.cells:
        assert cell.stream is not None
        alone = ContinualTrainer(cell.stream, tmp_path / "alone" / cell.id).run()
        found = Result.load(tmp_path / "out" / "cells" / cell.id / "result.json")
        assert (found.R, found.digests, found.seed) == (alone.R, alone.digests, cell.seed)
        assert found.tasks == orders[cell.order]
    assert not (tmp_path / "out" / "news").exists()


def test_a_finished_cell_is_never_run_again(done):
    file, out = done
    before = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    bench, pool = run_here(load_bench(file), out)
    assert pool.did == []
    assert {*statuses(bench).values()} == {"done"}
    assert {path: path.stat().st_mtime_ns for path in out.rglob("result.json")} == before


def test_also_if_its_result_is_all_that_is_left(done):
    file, out = done
    for path in out.glob("cells/*/*"):
        if path.name != "result.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert run_here(load_bench(file), out)[1].did == []
    with pytest.raises(RunError, match=r"methods.moe-cl.method.rank is 3, it was 2"):
        run_here(load_bench(spoiled(file, "rank: 2", "rank: 3")), out)


def spoiled(file: Path, old: str, new: str) -> Path:
    text = file.read_text()
    assert old in text
    changed = file.with_name("changed.yaml")
    changed.write_text(text.replace(old, new, 1))
    return changed


def test_more_seeds_are_just_more_cells(done):
    file, out = done
    file.write_text(file.read_text() + "seeds: [0, 1]\n")
    bench, pool = run_here(load_bench(file), out, methods=["moe-cl"])
    assert pool.did == ["moe-cl.stream.s1"]
    assert [cell["status"] for cell in record(out)["cells"]] == ["done", "done", "done", "waiting"]
    assert bench.failed() == []


def test_a_setting_that_is_new_in_moecl_changes_nothing(done):
    file, out = done
    found = record(out)
    for method in found["methods"].values():
        del method["stream"]["method"]["warm_start"], method["stream"]["train"]["discriminator_lr"]
    (out / "bench.json").write_text(json.dumps(found))
    assert run_here(load_bench(file), out)[1].did == []


def test_a_setting_that_is_gone_is_named(done):
    file, out = done
    found = record(out)
    found["methods"]["moe-cl"]["stream"]["train"]["momentum"] = 0.5
    (out / "bench.json").write_text(json.dumps(found))
    with pytest.raises(RunError, match=r"methods.moe-cl.train.momentum is null, it was 0.5"):
        run_here(load_bench(file), out)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("alpha: 0", "alpha: 0.5", "methods.no discriminator.method.alpha is 0.5, it was 0.0"),
        ("methods:", "set: {train.lr: 0.5}\nmethods:", "methods.moe-cl.train.lr is 0.5, it was 0.02"),
        ("methods:", "orders: {stream: [task1]}\nmethods:", "orders.stream has 1 entries, it had 2"),
        (
            "methods:",
            "tune: {trials: 2, search: {train.lr: [1e-3]}}\nmethods:",
            "tune of moe-cl is {order: ",
        ),
    ],
)
def test_changed_settings_are_refused_by_name(done, old, new, said):
    file, out = done
    before = (out / "bench.json").read_bytes()
    with pytest.raises(RunError) as caught:
        run_here(load_bench(spoiled(file, old, new)), out)
    assert said in str(caught.value)
    assert "choose another folder with -o, or remove what was run so: cells/" in str(caught.value)
    assert (out / "bench.json").read_bytes() == before


def test_without_its_record_the_run_folders_tell(done):
    file, out = done
    (out / "bench.json").unlink()
    with pytest.raises(RunError, match=r"method.alpha is 0.5, it was 0.0"):
        run_here(load_bench(spoiled(file, "alpha: 0", "alpha: 0.5")), out)
    assert run_here(load_bench(file), out)[1].did == []


def test_a_damaged_result_fails_that_cell_alone(done):
    file, out = done
    folder = out / "cells" / "moe-cl.stream.s0"
    (folder / "result.json").write_text('{"schema": 1')
    bench, pool = run_here(load_bench(file), out)
    assert pool.did == []
    assert statuses(bench) == {"moe-cl.stream.s0": "failed", "no-discriminator.stream.s0": "done"}
    assert f"or remove {folder}, and it is run anew" in str(bench.cells[0].reason)
    shutil.rmtree(folder)
    assert run_here(load_bench(file), out)[1].did == ["moe-cl.stream.s0"]


def test_anothers_result_is_not_taken(done):
    file, out = done
    path = out / "cells" / "moe-cl.stream.s0" / "result.json"
    Result.load(path).model_copy(update={"seed": 9}).save(path)
    bench, _ = run_here(load_bench(file), out)
    assert "its result.json is another's: seed is 9, not 0" in str(bench.cells[0].reason)


def test_a_failed_cell_stops_nothing_and_is_tried_again(tmp_path, tiny_folder):
    config = tiny_bench(tmp_path, tiny_folder, orders={"one": ["task0"], "both": ["task0", "task1"]})
    rows = tmp_path / "task1.train.jsonl"
    rows.rename(tmp_path / "gone")
    bench, _ = run_here(config, tmp_path / "out")
    assert statuses(bench) == {"moe-cl.one.s0": "done", "moe-cl.both.s0": "failed"}
    assert "task1.train.jsonl" in str(bench.cells[1].reason)
    assert record(tmp_path / "out")["cells"][1]["reason"] == bench.cells[1].reason
    assert Bench(config, tmp_path / "out").cells[1].status == "failed"
    (tmp_path / "gone").rename(rows)
    bench, pool = run_here(config, tmp_path / "out")
    assert pool.did == ["moe-cl.both.s0"]
    assert bench.failed() == []


@pytest.mark.parametrize("split", ["test", "train"])
def test_a_methods_cells_have_the_same_rows(tmp_path, tiny_folder, split):
    config = tiny_bench(tmp_path, tiny_folder, seeds=[0, 1])
    run_here(config, tmp_path / "out", seeds=[0])
    rows = tmp_path / f"task1.{split}.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:-1]))
    bench, _ = run_here(config, tmp_path / "out")
    assert f"its {split} rows of task 'task1' are not those of moe-cl.stream.s0" in str(bench.cells[1].reason)


def test_of_two_cells_with_other_rows_that_stays_which_was_done(tmp_path, tiny_folder):
    config, out = tiny_bench(tmp_path, tiny_folder, seeds=[0, 1]), tmp_path / "out"
    run_here(config, out, seeds=[1])
    rows = tmp_path / "task1.test.jsonl"
    whole = rows.read_text()
    rows.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    for _ in range(2):  # it is not tried again, nor is the other blamed
        bench, _ = run_here(config, out)
        assert statuses(bench) == {"moe-cl.stream.s0": "failed", "moe-cl.stream.s1": "done"}
    assert f"restore them, and remove {bench.cells[0].folder}, so that it is run again" in bench.cells[0].reason
    rows.write_text(whole)
    shutil.rmtree(bench.cells[0].folder)
    assert set(statuses(run_here(config, out)[0]).values()) == {"done"}


def test_a_bench_under_way_does_not_change_with_its_files(done):
    file, out = done
    bench, stream = Bench(load_bench(file), out), file.parent / "stream.yaml"
    text = stream.read_text()
    for changed in (text.replace("epochs: 1", "epochs: 2"), "tasks: ["):
        stream.write_text(changed)
        bench.save()
        assert record(out)["protocol"]["train"]["epochs"] == 1
    stream.write_text(text.replace("epochs: 1", "epochs: 2"))
    with pytest.raises(RunError, match=r"train\.epochs is 2, it was 1"):
        Bench(load_bench(file), out)


def test_a_stopped_bench_goes_on(tmp_path, tiny_folder):
    class Stopped(Here):
        def ended(self, seconds: float) -> list[Ended]:
            raise KeyboardInterrupt

    config = tiny_bench(tmp_path, tiny_folder, **TWO)
    with pytest.raises(KeyboardInterrupt):
        Bench(config, tmp_path / "out").run(Stopped(), BenchWatcher())
    assert [cell["status"] for cell in record(tmp_path / "out")["cells"]] == ["waiting", "waiting"]
    assert run_here(config, tmp_path / "out")[1].did == ["no-discriminator.stream.s0"]


def test_a_bench_and_a_run_do_not_share_a_folder(done):
    file, out = done
    cell = next((out / "cells").iterdir())
    with pytest.raises(RunError, match="a run folder; give the bench another with -o"):
        Bench(load_bench(file), cell)


def test_two_benches_do_not_share_a_folder(done):
    file, out = done

    class Nosy(Here):
        def stop(self) -> None:
            with pytest.raises(BusyError, match="in use by pid"):
                run_here(load_bench(file), out)

    Bench(load_bench(file), out).run(Nosy(), BenchWatcher())


def test_keep_result(tmp_path, tiny_folder):
    run_here(tiny_bench(tmp_path, tiny_folder, keep="result"), tmp_path / "out")
    [cell] = (tmp_path / "out" / "cells").iterdir()
    assert {path.name for path in cell.iterdir()} >= {"result.json", "config.yaml"}
    assert not (cell / "store").exists()


def test_looking_at_a_bench_removes_nothing(done):
    file, out = done
    file.write_text(file.read_text() + "keep: result\n")
    stores = list(out.glob("cells/*/store"))
    Bench(load_bench(file), out)
    assert all(path.is_dir() for path in stores)
    run_here(load_bench(file), out)
    assert [path for path in stores if path.exists()] == []


def test_the_record_tells_all_and_names_no_path(done):
    _, out = done
    found = record(out)
    assert (found["schema"], found["name"], found["orders"]) == (1, "bench", {"stream": ["task0", "task1"]})
    method = found["methods"]["no discriminator"]
    assert (method["method"], method["settings"]["alpha"], method["tuned"]) == ("moe-cl", 0.0, None)
    assert method["trained_parameters"]["task1"] > 0
    assert found["protocol"]["train"]["epochs"] == 1
    assert found["protocol"]["rows"]["task0"] == {"train": 16, "validation": 8, "test": 12}
    assert found["cells"][0] == {
        "id": "moe-cl.stream.s0",
        "method": "moe-cl",
        "order": "stream",
        "seed": 0,
        "status": "done",
        "reason": None,
    }
    assert str(out.parent) not in (out / "bench.json").read_text()


def test_threads_are_settled_at_the_first_start(tmp_path, tiny_folder):
    config = tiny_bench(tmp_path, tiny_folder, set={"train.threads": None})
    (tmp_path / "out").mkdir()
    Bench(config, tmp_path / "out", threads=2).save()
    stream = Bench(config, tmp_path / "out", threads=1).cells[0].stream
    assert stream is not None
    assert stream.train.threads == 2


@pytest.mark.parametrize(
    ("selection", "said"),
    [
        ({"methods": ["moe"]}, "--methods: 'moe' is none of moe-cl, no discriminator (did you mean 'moe-cl'?)"),
        ({"orders": ["x"]}, "--orders: 'x' is none of stream"),
        ({"seeds": [4]}, "--seeds: '4' is none of 0"),
        ({"only": "["}, "--only: '[' is no regular expression"),
        ({"only": "s7"}, "no cell of the bench is asked for"),
    ],
)
def test_a_wrong_selection_is_refused(tmp_path, tiny_folder, selection, said):
    config = tiny_bench(tmp_path, tiny_folder, **TWO)
    with pytest.raises(ConfigError) as caught:
        Bench(config, tmp_path / "out", Selection(**selection))
    assert said in str(caught.value)


def test_a_regular_expression_selects(tmp_path, tiny_folder):
    bench = Bench(tiny_bench(tmp_path, tiny_folder, **TWO), tmp_path / "out", Selection(only=r"^no-.*s0$"))
    assert [cell.id for cell in bench.wanted] == ["no-discriminator.stream.s0"]


# Hyper-parameters


@pytest.fixture
def scored(monkeypatch):
    """Trials scored by their learning rate, whatever their results: what is chosen is known."""

    def score(result: Result) -> float:
        assert all(row == [None] * len(result.tasks) for row in result.R), "a trial has measured a test row"
        assert all("test" not in splits for splits in result.data.values())
        return 0.9 if "trial2" in str(result.name) else 0.4

    monkeypatch.setattr(bench_module, "validation_score", score)


@pytest.mark.usefixtures("scored")
def test_settings_are_chosen_by_trials(tmp_path, tiny_folder):
    config = tiny_bench(tmp_path, tiny_folder, **TWO, tune=TUNED)
    bench, pool = run_here(config, tmp_path / "out")
    trials = [f"{name}.trial{n}" for name in ("moe-cl", "no-discriminator") for n in (1, 2)]
    assert sorted(pool.did) == sorted([*trials, "moe-cl.stream.s0", "no-discriminator.stream.s0"])
    assert {cell.stream.train.lr for cell in bench.cells if cell.stream} == {0.05}
    tuned = record(tmp_path / "out")["methods"]["moe-cl"]["tuned"]
    assert tuned["chosen"] == {"train.lr": 0.05}
    assert [(one["settings"], one["score"]) for one in tuned["trials"]] == [({}, 0.4), ({"train.lr": 0.05}, 0.9)]
    assert Result.load(tmp_path / "out" / "trials" / "moe-cl" / "1" / "result.json").seed == 7


@pytest.mark.usefixtures("scored")
def test_a_choice_is_made_once(tmp_path, tiny_folder):
    config = tiny_bench(tmp_path, tiny_folder, tune=TUNED)
    run_here(config, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "trials")
    assert run_here(config, tmp_path / "out")[1].did == []
    less = write_bench(tmp_path, tiny_folder, tune={**TUNED, "trials": 1})
    with pytest.raises(RunError, match=r"tune of moe-cl\.trials has 1 entries, it had 2"):
        run_here(load_bench(less), tmp_path / "out")


@pytest.mark.usefixtures("scored")
def test_another_grid_is_tried_once_what_was_run_is_removed(tmp_path, tiny_folder):
    out = tmp_path / "out"
    run_here(tiny_bench(tmp_path, tiny_folder, tune=TUNED), out)
    other = load_bench(write_bench(tmp_path, tiny_folder, tune={**TUNED, "search": {"train.lr": [0.02, 0.1]}}))
    with pytest.raises(RunError, match="remove what was run so: trials/moe-cl/1"):
        Bench(other, out)
    for name in ("trials", "cells"):
        shutil.rmtree(out / name)
    assert run_here(other, out)[1].did == ["moe-cl.trial1", "moe-cl.trial2", "moe-cl.stream.s0"]
    assert record(out)["methods"]["moe-cl"]["tuned"]["chosen"] == {"train.lr": 0.1}


GROWN = {**TUNED, "trials": 4, "search": {"train.lr": [0.02, 0.05, 0.1, 0.2]}}


@pytest.mark.usefixtures("scored")
def test_a_grid_may_grow(tmp_path, tiny_folder):
    out = tmp_path / "out"
    run_here(tiny_bench(tmp_path, tiny_folder, tune=TUNED), out)
    grown = load_bench(write_bench(tmp_path, tiny_folder, tune=GROWN))
    bench, pool = run_here(grown, out)
    assert pool.did == ["moe-cl.trial3", "moe-cl.trial4"]
    assert statuses(bench) == {"moe-cl.stream.s0": "done"}
    tuned = record(out)["methods"]["moe-cl"]["tuned"]
    assert tuned["chosen"] == {"train.lr": 0.05}
    assert [one["settings"] for one in tuned["trials"]][:2] == [{}, {"train.lr": 0.05}]
    assert sorted(one["settings"]["train.lr"] for one in tuned["trials"][2:]) == [0.1, 0.2]
    assert run_here(grown, out)[1].did == []


def test_a_grown_grid_that_chooses_anew_tells_which_cells_to_remove(tmp_path, tiny_folder, monkeypatch):
    out = tmp_path / "out"
    best = {"trial": "trial2"}
    monkeypatch.setattr(bench_module, "validation_score", lambda result: 0.9 if best["trial"] in result.name else 0.4)
    run_here(tiny_bench(tmp_path, tiny_folder, tune=TUNED), out)
    best["trial"] = "trial4"
    grown = load_bench(write_bench(tmp_path, tiny_folder, tune=GROWN))
    bench, pool = run_here(grown, out)
    assert pool.did == ["moe-cl.trial3", "moe-cl.trial4"]
    assert "train.lr is 0" in bench.cells[0].reason
    assert "remove what was run so: cells/moe-cl.stream.s0" in bench.cells[0].reason
    assert record(out)["methods"]["moe-cl"]["tuned"]["chosen"] == {"train.lr": 0.05}
    with pytest.raises(RunError, match="remove what was run so"):
        Bench(grown, out)
    shutil.rmtree(out / "cells" / "moe-cl.stream.s0")
    bench, pool = run_here(grown, out)
    assert pool.did == ["moe-cl.stream.s0"]
    assert bench.cells[0].stream.train.lr != 0.05


@pytest.mark.usefixtures("scored")
def test_a_grown_grid_that_is_cut_off_goes_on(tmp_path, tiny_folder):
    out = tmp_path / "out"
    run_here(tiny_bench(tmp_path, tiny_folder, tune=TUNED), out)
    grown = load_bench(write_bench(tmp_path, tiny_folder, tune=GROWN))
    before = record(out)
    Bench(grown, out).save()  # as where it stops before the first new trial is over
    kept = {key: value for key, value in record(out).items() if key in ("methods", "cells")}
    assert kept.items() <= before.items(), "its cells are of the smaller grid, and done"
    assert run_here(tiny_bench(tmp_path, tiny_folder, tune=TUNED), out)[1].did == [], "which may come back"
    write_bench(tmp_path, tiny_folder, tune=GROWN)
    Bench(grown, out).save()
    bench, pool = run_here(grown, out)
    assert pool.did == ["moe-cl.trial3", "moe-cl.trial4"]
    assert statuses(bench) == {"moe-cl.stream.s0": "done"}


@pytest.mark.usefixtures("scored")
def test_other_methods_trials_are_no_ones_concern(tmp_path, tiny_folder):
    run_here(tiny_bench(tmp_path, tiny_folder, tune=TUNED), tmp_path / "out")
    more = {**TUNED, "methods": {"live": {"method.rank": [2, 4]}}}
    methods = {"moe-cl": {}, "live": {"name": "moe-cl", "retention": "live"}}
    config = load_bench(write_bench(tmp_path, tiny_folder, methods=methods, tune=more))
    assert run_here(config, tmp_path / "out")[1].did == ["live.trial1", "live.trial2", "live.stream.s0"]


@pytest.mark.usefixtures("scored")
def test_a_failed_trial_holds_its_method_up_and_no_other(tmp_path, tiny_folder):
    class Failing(Here):
        def start(self, id, work):
            if id == "moe-cl.trial2":
                self.over.append(Ended(id, "its process was killed", self.kind))
            else:
                super().start(id, work)

    config, out = tiny_bench(tmp_path, tiny_folder, **TWO, tune=TUNED), tmp_path / "out"
    pool, bench = Failing(), Bench(config, out)
    pool.kind = None
    bench.run(pool, BenchWatcher())
    assert statuses(bench) == {"moe-cl.stream.s0": "waiting", "no-discriminator.stream.s0": "done"}
    assert bench.cells[0].reason == "its settings are not chosen: moe-cl.trial2 failed"
    assert [job.id for job in bench.failed()] == ["moe-cl.trial2"]
    # A loss that is not finite is told by the trial's error: it counts, with no score.
    pool.kind, bench = "TrainingError", Bench(config, out)
    bench.run(pool, BenchWatcher())
    assert statuses(bench)["moe-cl.stream.s0"] == "done"
    assert bench.failed() == []
    assert record(out)["methods"]["moe-cl"]["tuned"]["chosen"] == {}


def test_a_trial_without_a_score_is_a_failed_one(tmp_path, tiny_folder, monkeypatch):
    def none(result: Result) -> float:
        raise RunError("no validation_final")

    monkeypatch.setattr(bench_module, "validation_score", none)
    bench, _ = run_here(tiny_bench(tmp_path, tiny_folder, tune=TUNED), tmp_path / "out")
    assert [job.id for job in bench.failed()] == ["moe-cl.trial1", "moe-cl.trial2"]
    assert statuses(bench) == {"moe-cl.stream.s0": "waiting"}
