"""What a bench file means, and how a wrong one is refused."""

from pathlib import Path

import pytest

from moecl.bench import Bench
from moecl.bench_config import TuneConfig, describe_bench, load_bench, slug
from moecl.bench_tune import chosen, trial_settings, trial_stream, validation_score
from moecl.config import MoECLConfig
from moecl.errors import ConfigError, RunError
from moecl.results import Result

STREAM = """\
base: some-user/some-base
method: {name: moe-cl, rank: 3}
train: {lr: 1e-3, threads: 1}
tasks:
  - {name: a, kind: classification, labels: [x, y], train: a.jsonl, validation: v.jsonl, test: t.jsonl}
  - {name: b, kind: classification, labels: [x, y], train: a.jsonl, validation: v.jsonl, test: t.jsonl}
"""
BENCH = """\
stream: stream.yaml
set: {train.lr: 2e-3, method.rank: 4}
methods:
  moe-cl:
  no discriminator: {name: moe-cl, alpha: 0, rank: 8}
  slow: {name: moe-cl, set: [train.lr=1e-4, tasks.a.limit.train=9]}
orders: {order1: [b, a]}
seeds: [0, 1]
"""
TUNE = "tune: {trials: 3, set: {train.epochs: 1}, search: {train.lr: [2e-3, 1e-3, 5e-3], method.rank: [4, 16]}}\n"
EXAMPLE = Path(__file__).parents[1] / "examples" / "bench-mtl5.yaml"


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("stream.yaml").write_text(STREAM)


def bench(text=BENCH):
    Path("bench.yaml").write_text(text)
    return load_bench("bench.yaml")


def refusal(text: str) -> str:
    Path("bench.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        Bench(load_bench("bench.yaml"), Path("out"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_methods_stream_is_made_of_layers():
    """The stream's method is not taken over; the bench's changes come before a method's own."""
    config = bench()
    assert config.stream_of("moe-cl").method == MoECLConfig(rank=4)
    assert config.stream_of("moe-cl").train.lr == 2e-3
    assert config.stream_of("no discriminator").method == MoECLConfig(rank=8, alpha=0)
    slow = config.stream_of("slow")
    assert (slow.train.lr, slow.method, slow.tasks[0].limit.train) == (1e-4, MoECLConfig(rank=4), 9)
    assert config.stream_of("slow", {"train.lr": 0.5}, {"train.lr": 0.25}).train.lr == 0.25


def test_what_is_left_out():
    config = bench("stream: stream.yaml\nmethods: [moe-cl]\n")
    assert (config.name, config.orders, config.seeds, config.tune) == ("bench", {"stream": ["a", "b"]}, [0], None)


def test_a_list_of_methods_may_hold_settings():
    config = bench("stream: stream.yaml\nmethods: [moe-cl, {ewc: {strength: 10}}]\n")
    assert config.methods == {"moe-cl": {}, "ewc": {"strength": 10}}


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ("[moe-cl, 3]", "bench.yaml:2: methods: 3 is no method; give its name, or name: {its settings}"),
        ("[{moe-cl: {rank: 2}, ewc: {}}]", "methods: {'moe-cl': {'rank': 2}, 'ewc': {}} is no method"),
        ("[ewc, ewc]", "bench.yaml:2: methods: 'ewc' is here twice; give them labels of their own"),
    ],
)
def test_a_wrong_list_of_methods_is_refused(methods, said):
    assert said in refusal(f"stream: stream.yaml\nmethods: {methods}\n")


def test_cells_have_the_order_and_the_seed():
    cells = {cell.id: cell.stream for cell in Bench(bench(), Path("out")).cells}
    assert [*cells] == [f"{name}.order1.s{n}" for name in ("moe-cl", "no-discriminator", "slow") for n in (0, 1)]
    stream = cells["slow.order1.s1"]
    assert stream is not None
    assert ([task.name for task in stream.tasks], stream.train.seed) == (["b", "a"], 1)
    assert stream.tasks[1].limit.train == 9


def test_the_example_is_valid(tmp_path):
    plan = Bench(load_bench(EXAMPLE), tmp_path / "out")
    assert len(plan.cells) == len(plan.config.methods) * 3 * 2
    assert {len(trials) for trials in plan.trials.values()} == {4}
    assert plan.config.stream_of("the paper").head == "classifier"


def test_every_key_is_described():
    rows = describe_bench()
    assert all(type_ and default and description for _, type_, default, description in rows)
    assert [key for key, _, default, _ in rows if default == "required"] == ["stream", "methods", "tune.trials"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("seeds:", "seed:", "bench.yaml:8: seed: unknown key (did you mean 'seeds'?)"),
        ("stream.yaml", "nothing.yaml", "nothing.yaml: no such file; check the path"),
        ("[b, a]", "[b, c]", "bench.yaml:7: orders.order1[1]: no task 'c' in stream.yaml"),
        ("[b, a]", "[b, b]", "bench.yaml:7: orders.order1[1]: 'b' is here twice; remove one"),
        ("[b, a]", "[]", "bench.yaml:7: orders.order1: holds nothing; give the tasks' names"),
        ("[0, 1]", "[1, 1]", "bench.yaml:8: seeds: holds a seed twice; remove one"),
        ("[0, 1]", "[-1]", "bench.yaml:8: seeds"),
        (
            "  moe-cl:\n",
            "  moecl:\n",
            "bench.yaml:4: methods: 'moecl' is not a method; give its registry name under `name`",
        ),
        (
            "name: moe-cl, alpha",
            "name: moe, alpha",
            "bench.yaml:5: methods: 'moe' is not a method; use one of: ",
        ),
        ("  slow:", "  No Discriminator:", "would share the folder 'no-discriminator'; rename one"),
        (
            "alpha: 0",
            "alhpa: 0",
            "method 'no discriminator': method.alhpa=0: method.alhpa: unknown key (did you",
        ),
        (
            "method.rank: 4",
            "method.rnak: 4",
            "bench.yaml:2: set: no method of this bench has 'method.rnak' (did you mean",
        ),
        ("train.lr: 2e-3", "train.seed: 2", "bench.yaml:2: set: 'train.seed' is the bench's own to set"),
        ("train.lr=1e-4", "train.lr", "methods.slow.set: 'train.lr' is no setting; write it as key=value"),
        ("train.lr=1e-4", "train.lr=-1", "method 'slow': train.lr=-1: train.lr: -1 is out of range"),
        ("train.lr=1e-4", "train.seed=1", "methods.slow.set: 'train.seed' is the bench's own to set"),
    ],
)
def test_a_wrong_file_is_refused(old, new, said):
    assert old in BENCH
    assert said in refusal(BENCH.replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("trials: 3", "trials: 7", "tune.trials: 7, but method 'moe-cl' has 6 different settings to try"),
        ("train.lr: [2e-3,", "train.lr: [-2,", "method 'moe-cl': train.lr=-2: train.lr: -2 is out of range"),
        ("method.rank: [", "train.seed: [", "bench.yaml:9: tune.search: 'train.seed' cannot be searched"),
        ("method.rank: [", "method.rnak: [", "tune.search: no method of this bench has 'method.rnak' (did you mean"),
        ("train.epochs: 1", "method.rnak: 1", "tune.set: no method of this bench has 'method.rnak' (did you mean"),
        ("method.rank: [4, 16]", "train.epochs: []", "bench.yaml:9: tune.search: holds nothing; give map: key to list"),
        ("set:", "methods: {ewc: {}}, set:", "bench.yaml:9: tune.methods: no method 'ewc' here"),
        ("trials: 3, ", "", "tune.trials: is missing; add it (trials of each method"),
    ],
)
def test_a_wrong_search_is_refused(old, new, said):
    assert old in TUNE
    assert said in refusal(BENCH + TUNE.replace(old, new, 1))


def test_a_trial_needs_validation_rows():
    Path("stream.yaml").write_text(STREAM.replace("validation: v.jsonl, ", "", 1))
    assert "tune: task 'a' has no validation rows to choose by; give it some" in refusal(BENCH + TUNE)
    config = bench(BENCH)
    assert config.tune is None
    tune = TuneConfig(trials=1)
    assert trial_stream(config, tune, "slow", {}, ["b"]), "a trial learns the first order's tasks only"


# Trials


def test_each_method_has_as_many_trials_of_which_the_first_is_plain():
    config = bench(BENCH + TUNE)
    assert config.tune is not None
    for label in config.methods:
        found = trial_settings(config, config.tune, label)
        assert found == trial_settings(config, config.tune, label)
        streams = [config.stream_of(label, changes) for changes in found]
        assert found[0] == {}
        assert len(found) == 3
        assert all(stream not in streams[:place] for place, stream in enumerate(streams))


def test_more_keys_for_one_method():
    config = bench(
        BENCH + TUNE.replace("trials: 3", "trials: 12, methods: {slow: {method.alpha: [0.1, 1]}}").replace("12", "6")
    )
    assert config.tune is not None
    assert all({*changes} <= {"train.lr", "method.rank"} for changes in trial_settings(config, config.tune, "moe-cl"))
    assert {"method.alpha"} <= {*trial_settings(config, config.tune, "slow")[1]}


def test_a_trial_cannot_read_a_test_row():
    config = bench(BENCH + TUNE)
    assert config.tune is not None
    stream = trial_stream(config, config.tune, "slow", {"train.lr": 0.5}, ["a", "b"])
    assert [task.test for task in stream.tasks] == [None, None]
    assert (stream.train.epochs, stream.train.lr) == (1, 0.5)


def result(**details) -> Result:
    R = [[None] * len(details)] * (len(details) + 1)
    return Result(name="x", method="m", seed=0, tasks=[*details], R=R, seconds=1, details=details)


def test_a_trials_score_is_the_mean_on_validation_rows():
    assert validation_score(result(a={"validation_final": 0.5}, b={"validation_final": 1.0})) == 0.75
    with pytest.raises(RunError, match="task 'b' has no validation_final"):
        validation_score(result(a={"validation_final": 0.5}, b={}))


def test_the_first_of_the_best_is_chosen():
    trials = [{"settings": {"train.lr": n}, "score": score} for n, score in enumerate((0.5, 0.75, 0.75, None))]
    assert chosen(trials) == {"train.lr": 1}


@pytest.mark.parametrize(("name", "expected"), [("moe-cl", "moe-cl"), ("ReLU 2.0", "relu-2-0"), ("é!", "")])
def test_slugs(name, expected):
    assert slug(name) == expected
