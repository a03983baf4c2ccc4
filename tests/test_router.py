"""The router of real runs: what it reads of texts, what a store keeps of it, and answers without a task."""

import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from moecl.cli import main
from moecl.config import Task, load_stream
from moecl.data import derived
from moecl.data.task import example, text_alone, text_of_any
from moecl.engine import Engine
from moecl.errors import ConfigError, DataError, StoreError
from moecl.model import MoECL
from moecl.router import MOST_ROWS, TOKENS, Features, Route, Router, Statistics, _some, read
from moecl.routing import Routing
from moecl.run_folder import RunFolder
from moecl.store import Store
from moecl.train import ContinualTrainer, Watcher, learn
from runs import contents
from test_learn import new
from tiny import tiny_model, tiny_tokenizer
from tiny_stream import task, write_stream

TOPICS = ("battery screen phone", "movie story boring", "World Sports Business", "food price service")
TRAIN = {"epochs": 1, "save_steps": 100}


def on_topic(path: Path, topic: str) -> None:
    """Texts that the base can tell by their words."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        first, *rest = row["text"].split()
        row["text"] = " ".join([first, topic, *rest[:-1], topic, rest[-1]])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def topical(folder: Path, name: str, number: int, rows: int = 32) -> dict:
    made = task(folder, name, number, rows)
    for split in ("train", "validation", "test"):
        on_topic(folder / made[split], TOPICS[number])
    return made


@pytest.fixture(scope="module")
def topics(tmp_path_factory, tiny_folder) -> Path:
    """A folder with the stream of three tasks, and `run`. Copy it before changing anything."""
    folder = tmp_path_factory.mktemp("routed")
    tasks = [topical(folder, f"task{number}", number) for number in range(3)]
    ContinualTrainer(load_stream(write_stream(folder, tiny_folder, tasks, train=TRAIN)), folder / "run").run()
    return folder


@pytest.fixture
def run(topics, tmp_path) -> Path:
    return Path(shutil.copytree(topics / "run", tmp_path / "run"))


def texts(folder: Path, name: str, split: str = "test") -> list[str]:
    return [json.loads(line)["text"] for line in (folder / f"{name}.{split}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def router(topics) -> Router:
    return Router.load(MoECL.from_pretrained(topics / "run"), Store.open(topics / "run" / "store"))


@pytest.fixture
def moecl(capsys, monkeypatch):
    def call(*words, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        capsys.readouterr()
        status = main([str(word) for word in words])
        found = capsys.readouterr()
        assert "Traceback" not in found.err
        return status, found.out, found.err.splitlines()[-1] if found.err.strip() else ""

    return call


# What it reads


def test_a_texts_features_do_not_depend_on_its_neighbours(router, topics):
    rows = [*texts(topics, "task0"), "tea", "", " ".join(["movie"] * 300)]
    together = router.features(rows)
    assert np.array_equal(together, router.features(rows[::-1])[::-1])
    assert all(np.array_equal(router.features([row])[0], one) for row, one in zip(rows, together, strict=True))
    assert router.route([]) == []
    longer = router.features([" ".join(["movie"] * 300) + " tea"])
    assert np.array_equal(longer[0], together[-1]), f"{TOKENS} tokens are read"


def test_features_are_the_mean_direction_of_what_enters_the_layer():
    tokenizer = tiny_tokenizer()
    base = tiny_model(layers=4, vocab_size=len(tokenizer))
    model = MoECL.attach(base, tokenizer=tokenizer)
    for layer in (0, 1, 3):
        ids = tokenizer("great movie")["input_ids"]
        states = base(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0]
        expected = torch.stack([one / one.norm() for one in states]).mean(dim=0)
        found = Features(model, tokenizer, layer)(["great movie"])
        torch.testing.assert_close(torch.from_numpy(found[0]), expected)
    assert Statistics.empty(32, 4).layer == 1
    assert Statistics.empty(32, 30).layer == 8
    assert Statistics.empty(32, 1).layer == 0


def test_the_text_alone():
    pair = Task(name="a", kind="classification", labels=["x", "y"], instruction="Does {premise} say {hypothesis}?")
    row = {"premise": "it rains", "hypothesis": "it is wet", "id": 7, "label": "x"}
    assert text_alone(example(row, pair), pair) == text_of_any(row, [pair]) == "it rains\nit is wet"
    plain = Task(name="b", kind="classification", labels=["x", "y"])
    assert text_of_any({"text": "tea"}, [pair, plain]) == text_of_any("tea", [pair, plain]) == "tea"
    chat = {"messages": [{"role": "system", "content": "be"}, {"role": "user", "content": "hello"}]}
    written = Task(name="c", kind="generation")
    assert text_alone(example(chat, written), written) == text_of_any(chat, [plain, written]) == "hello"
    with pytest.raises(DataError, match="rows:3: the row has no field that a task reads; give text"):
        text_of_any({"title": "x"}, [plain], "rows:3")
    for half in ("x \ud800", {"text": "x \ud800"}):
        with pytest.raises(DataError, match=r"row: text: '\\ud800' at character 3 is not valid Unicode"):
            text_of_any(half, [plain])


def test_one_text_is_no_list(router):
    with pytest.raises(DataError, match="texts: 'tea' is one alone; give a list"):
        router.route("tea")


def test_many_rows_are_thinned_evenly():
    rows = [str(number) for number in range(2 * MOST_ROWS + 1)]
    assert len(_some(rows)) <= MOST_ROWS
    assert _some(rows)[:2] == ["0", "3"]
    assert _some(rows[:5]) == rows[:5]


# What it says


def test_texts_find_their_task(router, topics):
    for name in router.tasks:
        routes = router.route(texts(topics, name))
        assert all(isinstance(one, Route) and sum(one.shares.values()) == pytest.approx(1) for one in routes)
        assert all(list(one.shares) == ["task0", "task1", "task2"] for one in routes)
        likeliest = [max(one.shares, key=one.shares.get) for one in routes]
        assert np.mean([one == name for one in likeliest]) > 0.9
        assert np.mean([one.task in (name, None) for one in routes]) > 0.9


def test_unknown_below_the_threshold(router, topics):
    known = router.features(texts(topics, "task1"))
    noise = known.mean(axis=0) + np.random.default_rng(0).normal(size=known.shape).astype(np.float32)
    for features, accepted in ((known, 0.8), (noise, 0.2)):
        shares, familiar = router.see(features)
        routes = router.routes(features)
        assert [one.task is not None for one in routes] == (familiar >= router.calibration.threshold).tolist()
        assert (np.mean([one.task is not None for one in routes]) > 0.5) == (accepted > 0.5)
        assert [list(one.shares.values()) for one in routes] == shares.tolist(), "shares are given either way"


def test_what_lies_beyond_all_tasks_is_unknown_even_with_two(router, topics):
    known = router.features(texts(topics, "task1"))
    two = Router(router.features, router.statistics, dict(zip(router.tasks[:2], router.keys[:2], strict=True)))
    assert two.calibration.threshold is None
    wide = known.mean(axis=0) + 50 * (known - known.mean(axis=0))
    assert all(one.task is None for one in two.routes(wide))
    assert not router.accepts(router.familiar_without("task0", wide)).any(), "what is measured is what is done"
    assert np.mean([one.task is not None for one in two.routes(known)]) > 0.8


# What a store keeps


def test_a_saved_model_routes_as_it_did(router, topics, tmp_path):
    MoECL.from_pretrained(topics / "run").save_pretrained(tmp_path / "copy")
    again = Router.load(MoECL.from_pretrained(tmp_path / "copy"), Store.open(tmp_path / "copy"))
    assert again.route(texts(topics, "task1")) == router.route(texts(topics, "task1"))


def test_statistics_are_kept_with_each_task(topics):
    store = Store.open(topics / "run" / "store")
    statistics = read(store)
    assert list(statistics.train.means) == list(statistics.held.means) == [one.reference for one in store.tasks()]
    assert (statistics.train.freedom, statistics.held.freedom) == (3 * 31, 3 * 7)
    assert store.verify() == []


def test_learning_on_or_again_ends_with_the_same_statistics(topics, run, tmp_path, tiny_folder):
    """From a store's rounded sums as in one go, without the old rows; a version learned again takes the place."""
    (tmp_path / "more").mkdir()
    section = topical(tmp_path / "more", "later", 3)
    files = {split: str(tmp_path / "more" / section[split]) for split in ("train", "validation", "test")}
    config = RunFolder(run).config()
    later = config.tasks[0].model_copy(update={**section, **files, "limit": config.tasks[0].limit})
    learn(run, later)
    whole = config.model_copy(update={"tasks": [*config.tasks, later]})
    ContinualTrainer(whole, tmp_path / "whole").run()
    digests = [Store.open(place / "store").manifest.training["router"] for place in (run, tmp_path / "whole")]
    assert digests[0] == digests[1]
    learn(run, later, replace=True)
    store = Store.open(run / "store")
    statistics = read(store)
    assert "later@2" in statistics.train.means
    assert statistics.known(store.tasks())["later"] == "later@2"
    assert Router.load(MoECL.from_pretrained(run), store).tasks == ("later", "task0", "task1", "task2")


def test_a_version_after_a_deleted_one_is_found(run):
    """The number of a deleted version is never given again: the statistics go by the version that the store makes."""
    task = RunFolder(run).config().tasks[0]
    learn(run, task, replace=True)
    store = Store.open(run / "store")
    store.rollback(task.name, 1)
    store.delete(f"{task.name}@2")
    learn(run, task, replace=True)
    store = Store.open(run / "store")
    assert store.record(task.name).version == 3
    assert read(store).known(store.tasks())[task.name] == f"{task.name}@3"


def test_another_order_routes_alike(topics, router, tmp_path):
    config = RunFolder(topics / "run").config()
    turned = config.model_copy(update={"tasks": config.tasks[::-1]})
    ContinualTrainer(turned, tmp_path / "turned").run()
    other = Router.load(MoECL.from_pretrained(tmp_path / "turned"), Store.open(tmp_path / "turned" / "store"))
    rows = [text for name in router.tasks for text in texts(topics, name)]
    for one, same in zip(router.route(rows), other.route(rows), strict=True):
        assert one.task == same.task
        assert list(same.shares.values()) == pytest.approx(list(one.shares.values()), abs=1e-4)


def test_a_run_without_it(topics, tmp_path, moecl):
    config = RunFolder(topics / "run").config().model_copy(update={"router": False})
    ContinualTrainer(config, tmp_path / "without").run()
    run = tmp_path / "without"
    store = Store.open(run / "store")
    assert read(store) is None
    assert Router.load(MoECL.from_pretrained(run), store) is None
    status, out, said = moecl("predict", run, "--task", "auto", stdin="tea\n")
    assert (status, out) == (2, "")
    assert f"{run}/store: has no router statistics of task0, task1, task2, which `auto` needs; make them with" in said
    assert f"`moecl router {run} --fit`" in said
    assert "make them with --fit" in moecl("router", run)[1]
    assert "no router statistics yet; make them with --fit" in moecl("router", run, "--false-accept", "0.2")[2]
    text, config = (run / "config.yaml").read_text(), yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"tasks": config["tasks"][1:]}))
    status, _, said = moecl("router", run, "--fit")
    assert (status, "task 'task0' has no train rows in" in said) == (2, True)
    (run / "config.yaml").write_text(text)
    before = Store.open(run / "store").manifest
    assert moecl("router", run, "--fit")[0] == 0
    after = Store.open(run / "store").manifest
    assert after.training["router"] == Store.open(topics / "run" / "store").manifest.training["router"]
    assert after.model_copy(update={"training": before.training}) == before, "nothing else moved"
    assert moecl("predict", run, "--task", "auto", stdin="tea\n")[0] == 0
    learn(run, new(tmp_path / "n"))
    assert len(read(Store.open(run / "store")).train.means) == 3, "what is there stays, and no more is learned"
    status, _, said = moecl("predict", run, "--task", "auto", stdin="tea\n")
    assert status == 2
    assert "has no router statistics of new" in said


def test_the_cache_gives_the_same_and_spares_the_base(topics, tmp_path, monkeypatch):
    config = RunFolder(topics / "run").config()
    assert derived.taken("features")[1] >= 6
    monkeypatch.setattr(Features, "_read", None)
    ContinualTrainer(config, tmp_path / "again").run()
    digests = [
        Store.open(place / "store").manifest.training["router"] for place in (topics / "run", tmp_path / "again")
    ]
    assert digests[0] == digests[1]


def test_stopped_after_a_task_it_ends_the_same(topics, tmp_path):
    class Stopping(Watcher):
        def row(self, after, tasks, scores):
            if after == 2:
                raise KeyboardInterrupt

    config = RunFolder(topics / "run").config()
    with pytest.raises(KeyboardInterrupt):
        ContinualTrainer(config, tmp_path / "run", Stopping()).run()
    ContinualTrainer(config, tmp_path / "run").run()
    digests = [Store.open(place / "store").manifest.training["router"] for place in (topics / "run", tmp_path / "run")]
    assert digests[0] == digests[1]


def test_damaged_statistics_are_one_line(run):
    model = MoECL.from_pretrained(run)
    [path] = (run / "store" / "training").glob("router-*")
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(StoreError, match="altered"):
        Router.load(model, Store.open(run / "store"))


def test_another_bases_statistics_are_refused(run):
    store = Store.open(run / "store")
    narrow = Statistics.empty(8, 2)
    narrow.train.add("task0@1", np.eye(8, dtype=np.float32))
    store.commit(training={**store.training(), "router": narrow.tensors()})
    with pytest.raises(StoreError, match="another base's"):
        Router.load(MoECL.from_pretrained(run), store)


# The commands


def test_predict_auto(topics, moecl, tmp_path):
    run = topics / "run"
    rows = [{"text": text, "label": "good"} for name in ("task0", "task2") for text in texts(topics, name)[:5]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, out, _ = moecl("predict", run, tmp_path / "rows.jsonl", "--task", "auto")
    found = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert len(found) == 10
    engine = Engine(MoECL.from_pretrained(run))
    for row, one in zip(rows, found, strict=True):
        assert set(one["route"]) == {"task0", "task1", "task2"}
        if one["task"] is None:
            assert (one["label"], one["scores"]) == (None, {})
        else:
            assert one["label"] == engine.predict([row["text"]], one["task"])[0].label
            assert one["true"] == "good"
    assert {one["task"] for one in found} >= {"task0", "task2"}
    plain = moecl("predict", run, "--task", "auto", stdin="".join(row["text"] + "\n" for row in rows))[1]
    assert [json.loads(line)["route"] for line in plain.splitlines()] == [one["route"] for one in found]
    status, out, said = moecl("predict", run, "--task", "auto", stdin='{"title": "tea"}\n')
    assert (status, out) == (2, "")
    assert "stdin:1: the row has no field that a task reads; give text" in said


def test_eval_auto_and_the_report(run, topics, moecl):
    status, out, _ = moecl("eval", run, "--task", "auto", "--json")
    assert status == 0
    found = Routing.load(run)
    assert json.loads(out) == json.loads(found.model_dump_json(by_alias=True))
    known = {row["task"]: row["score"] for row in json.loads(moecl("eval", run, "--json")[1])}
    for one in found.tasks:
        assert one.with_task == known[one.task]
        assert one.routed + one.unknown <= 1.0001
        assert one.without_task <= 1 - one.unknown + 1e-9, "a row of no task is no right answer"
        assert one.left_out is not None
    coverage = [one.coverage for one in found.curve]
    assert coverage == sorted(coverage, reverse=True)
    assert coverage[0] == 1
    assert all(one.false_accept is not None and 0 <= one.false_accept <= 1 for one in found.curve)
    assert moecl("report", run)[0] == 0
    page, text = ((run / f"report.{end}").read_text() for end in ("html", "md"))
    assert "where the router finds the task" in page
    assert "where the router finds the task" in text
    assert "it measures every task; give no other" in moecl("eval", run, "--task", "auto", "--task", "task0")[2]
    shown = moecl("eval", run, "--task", "auto", "--split", "validation")[1]
    assert "false accepts: the task's texts" in shown
    assert Routing.load(run) == found, "the report shows test rows"
    (run / "routing.json").write_text(found.model_dump_json(by_alias=True).replace(found.digests["task0"]["task"], "x"))
    assert moecl("report", run)[0] == 0
    assert "where the router" not in (run / "report.md").read_text(), "measured on other parts"
    (run / "routing.json").write_text("{}")
    assert "measure it again with `moecl eval" in moecl("report", run)[2]


def test_compare_by_route(topics, run, moecl, tmp_path):
    (tmp_path / "texts").write_text("\n".join([*texts(topics, "task0"), *texts(topics, "task1")]) + "\n")
    words = ("compare", topics / "run", run, "--general", tmp_path / "texts", "--json")
    base, routed = (json.loads(moecl(*words, *more)[1])["general"] for more in ((), ("--route", "auto")))
    assert routed["old"] == routed["new"]
    assert routed["old"] != base["old"], "another's words than the base's"
    assert "--route: it is auto or not given" in moecl(*words, "--route", "task0")[2]
    assert "needs --general FILE" in moecl("compare", run, run, "--route", "auto")[2]


def test_router_shows_and_sets_the_rate(run, moecl):
    status, out, _ = moecl("router", run)
    assert status == 0
    assert out.count("yes") == 3
    loosely = Router.load(MoECL.from_pretrained(run), Store.open(run / "store")).calibration.threshold
    found = json.loads(moecl("router", run, "--false-accept", "0.01", "--json")[1])
    assert found["false_accept"] == 0.01
    assert Router.load(MoECL.from_pretrained(run), Store.open(run / "store")).calibration.threshold > loosely
    before = contents(run / "store")
    assert moecl("router", run, "--fit")[0] == 0
    kept, was = ({k: v[0] for k, v in one.items() if k != "audit.jsonl"} for one in (contents(run / "store"), before))
    assert kept == was, "but for the line that tells of it"
    assert [line.what for _, line in Store.open(run / "store").audit()][-2:] == ["router", "router"]
    assert "--false-accept: 1.5 is out of range" in moecl("router", run, "--false-accept", "1.5")[2]
    assert "not a run folder" in moecl("router", run / "store" / "objects")[2]


def test_auto_is_no_tasks_name():
    with pytest.raises(ConfigError, match="stands for whichever task a text is for"):
        Task(name="auto", kind="generation")
