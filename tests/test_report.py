"""Reports: their numbers are those of metrics and stats, in HTML and in Markdown; nothing is loaded or executed."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from moecl import stats
from moecl._atomic import lock_file
from moecl.cli import main
from moecl.errors import RunError, UserError
from moecl.report import make
from moecl.report.read import read
from moecl.results import Items, Result
from report_data import ENVIRONMENT, METHODS, ORDERS, TASKS, result, write_bench, write_run

SCORES = "R: score on each task (column) after each task learned (row)"
VOID = {"meta", "br", "img", "link", "input", "hr", "path", "use", "image"}


class Outline(HTMLParser):
    """Tags, attributes and tables of a page; complains of tags that are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.found, self.tables, self.text = [], [], {}, []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.rows = []
        elif tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        assert self.open.pop() == tag
        if tag == "table":
            self.tables[self.caption] = self.rows

    def handle_data(self, data):
        self.text.append(data)
        inside = self.open[-2:]
        if inside[-1:] in (["th"], ["td"]):
            self.rows[-1].append(data.strip())
        elif inside == ["caption", "span"]:
            self.caption = data.strip()

    @property
    def said(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return write_bench(
        tmp_path_factory.mktemp("bench") / "mtl5",
        troubles=[
            ("ewc", "order3", 1, "failed", "out of memory: lower train.batch_size"),
            ("o-lora", "order3", 1, "waiting", None),
        ],
    )


@pytest.fixture(scope="module")
def bench_report(bench):
    return make([bench])


def page(written) -> Outline:
    return Outline(written.html.read_text())


def results(bench, label, orders=tuple(ORDERS), seeds=(0, 1)) -> list[Result]:
    return [Result.load(bench / "cells" / f"{label}.{order}.s{s}" / "result.json") for order in orders for s in seeds]


def test_a_run_has_the_numbers_of_its_result(tmp_path):
    written = make([write_run(tmp_path / "run", loss=0.05, learned=True)])
    assert (written.html, written.markdown) == (tmp_path / "run" / "report.html", tmp_path / "run" / "report.md")
    found, kept = page(written), Result.load(tmp_path / "run" / "result.json")
    table = found.tables[SCORES]
    assert table == [["after", *TASKS]] + [
        [name, *(f"{value:.3f}" for value in row)] for name, row in zip(["(before any)", *TASKS], kept.R, strict=True)
    ]
    low, high = stats.interval(stats.bootstrap([kept.items]))
    assert f"95% interval {low:.3f} to {high:.3f}" in found.said
    assert f"backward transfer (BWT) {kept.metrics['bwt']:+.3f}" in found.said
    learned = {row[0]: row for row in found.tables["Score when learned and after the last task"]}
    wrong = sum(np.not_equal(kept.items["dbpedia"].true, kept.items["dbpedia"].given))
    assert learned["dbpedia"][2:4] == [f"{kept.R[1][0]:.3f}", f"{kept.R[-1][0]:.3f}"]
    assert learned["dbpedia"][6] == f"{wrong} lost, 0 won"
    assert ["amazon 0", f"{kept.details['amazon']['per_class_recall']['amazon 0']:.3f}"] in [
        row[1:] for rows in found.tables.values() for row in rows
    ]
    drift = dict(found.tables["At the end: mean absolute change of log shares"][1:])
    assert drift["dbpedia"] == "0.150"
    for title in ("Training", "Inside the model", "Drift of old tasks", "Rows", "Environment and hashes"):
        assert title in found.said


def test_answers_may_hold_any_character(tmp_path):
    run = write_run(tmp_path / "run", learned=True)
    answer = {"row": 1, "label": "one\u2028two", "answer": "one\u2028two\x85", "scores": {}}
    for which in ("learned", "test"):
        line = json.dumps(answer, ensure_ascii=False) + "\n"
        (run / "predictions" / f"amazon.{which}.jsonl").write_text(line, encoding="utf-8")
    learned = {row[0]: row for row in page(make([run])).tables["Score when learned and after the last task"]}
    assert learned["amazon"][6] == "0 lost, 0 won"


def test_markdown_has_the_same_numbers(tmp_path, bench_report):
    for written in (bench_report, make([write_run(tmp_path / "run", loss=0.05)])):
        text = written.markdown.read_text().replace("\\", "").replace("**", "")
        rows = {tuple(cell.strip() for cell in line.strip("| ").split(" | ")) for line in text.splitlines()}
        for table in page(written).tables.values():
            assert {tuple(row) for row in table} <= rows


def test_what_is_not_known_is_left_out_or_said(tmp_path):
    bare = Result(method="moe-cl", seed=0, tasks=["a", "b"], R=[[None, None], [0.5, None], [0.25, 0.0]], seconds=3)
    (tmp_path / "bare").mkdir()
    bare.save(tmp_path / "bare" / "result.json")
    found = page(make([tmp_path / "bare"]))
    assert "forward transfer (FWT) not measured" in found.said
    assert found.tables[SCORES][1:] == [
        ["(before any)", "not measured", "not measured"], ["a", "0.500", "not measured"], ["b", "0.250", "0.000"],
    ]  # fmt: skip
    for title in ("Recall", "Training", "Inside", "Drift", "Rows", "Environment", "macro-F1"):
        assert title not in found.said
    empty = Result(method="moe-cl", seed=0, tasks=[], R=[[]], seconds=0)
    empty.save(tmp_path / "bare" / "result.json")
    make([tmp_path / "bare"])


def test_joint_training_has_one_row(tmp_path):
    found = page(make([write_run(tmp_path / "run", method="joint", bound=True)]))
    rows = found.tables[SCORES]
    assert rows[1] == ["(before any)", *["not measured"] * 4]
    assert "backward transfer (BWT) not measured" in found.said
    assert "not measured" not in rows[-1]


def test_texts_have_scores_and_no_classes(tmp_path):
    made = result(tasks=("a",))
    items = {"a": Items(metric="rouge_l", scores=[0.5, 0.25])}
    (tmp_path / "run").mkdir()
    fields = made.model_dump(by_alias=True) | {"items": items, "details": {}, "R": [[None], [0.375]]}
    Result.model_validate(fields).save(tmp_path / "run" / "result.json")
    found = page(make([tmp_path / "run"]))
    assert found.tables["Score when learned and after the last task"][1][:2] == ["a", "rouge_l"]
    assert "Recall" not in found.said


def test_a_bench_says_who_is_ahead_and_how_sure_that_is(bench, bench_report):
    found = page(bench_report)
    ours, rival = ([one.items for one in results(bench, label)] for label in ("moe-cl", "per-task-lora"))
    difference = stats.paired(ours, rival)
    mean = np.mean([one.metrics["average_accuracy"] for one in results(bench, "moe-cl")])
    points = [f"{100 * value:.1f}" for value in difference[:3]]
    assert (
        f"moe-cl is better than its best rival: {mean:.3f} average accuracy; per-task-lora, the closest rival, is "
        f"{points[0]} points behind (95% interval {points[1]} to {points[2]} points, p = 0.001). "
        "It leads in each of 3 orders, with an interval above 0 in 3." in found.said
    )
    assert "joint (the bound, no rival: sees all tasks' data at once)" in found.said
    assert "replay (not rehearsal-free: keeps rows of old tasks)" in found.said
    assert (
        "1 of 42 cells failed, not in any number: ewc.order3.s1 (out of memory: lower train.batch_size)." in found.said
    )
    assert "1 of 42 cells not run yet, not in any number: o-lora.order3.s1." in found.said
    assert bench_report.headlines[-1] in found.said


def test_a_benchs_tables(bench, bench_report):
    tables = page(bench_report).tables
    head, *rows = tables["Average accuracy after the last task, by order (mean ± SD over seeds)"]
    assert head == ["method", "all orders", "95% interval", "SD over seeds", *ORDERS, "cells"]
    by_name = {row[0].split(" (")[0]: row for row in rows}
    assert by_name.keys() == METHODS.keys()
    cells = results(bench, "moe-cl")
    each = [one.metrics["average_accuracy"] for one in cells]
    low, high = stats.interval(stats.bootstrap([one.items for one in cells]))
    spread = np.std([np.mean(each[::2]), np.mean(each[1::2])], ddof=1)
    first = f"{np.mean(each[:2]):.3f} ± {np.std(each[:2], ddof=1):.3f}"
    assert by_name["moe-cl"][:5] == [
        "moe-cl", f"{np.mean(each):.3f}", f"{low:.3f} to {high:.3f}", f"{spread:.3f}", first
    ]  # fmt: skip
    assert by_name["ewc"][-1] == "5 of 6"
    assert by_name["joint"][0] == "joint (bound)"
    joint = next(row for row in tables["Transfer and forgetting, means over cells"] if row[0] == "joint (bound)")
    assert joint[1:] == [*["not measured"] * 4, "no"]
    told = {row[0]: row[-1] for row in tables["Transfer and forgetting, means over cells"][1:]}
    assert (told["moe-cl"], told["ewc"]) == ("yes", "no")
    ahead = tables["moe-cl, the leader, less each other method"]
    assert not [row for row in ahead if row[0].startswith("joint")]
    assert [row[3] for row in tables["Settings of each method, where not the default"][1:]] == ["2"] * 7


def test_a_close_race_is_called_so(tmp_path):
    folder = write_bench(tmp_path / "b", methods=("moe-cl", "ewc"), orders=("order1",), seeds=(0,))
    same = (folder / "cells" / "moe-cl.order1.s0" / "result.json").read_text()
    (folder / "cells" / "ewc.order1.s0" / "result.json").write_text(same)
    said = page(make([folder])).said
    assert "moe-cl is not shown to be better" in said
    assert "is level with it (95% interval 0.0 to 0.0 points, p = 1)" in said
    assert "They have one order in common." in said


def swap(folder: Path) -> None:
    """What MoE-CL and EWC reach in the first cell."""
    paths = [folder / "cells" / f"{label}.order1.s0" / "result.json" for label in ("moe-cl", "ewc")]
    ours, theirs = (json.loads(path.read_text()) for path in paths)
    for path, swapped, method in zip(paths, (theirs, ours), ("moe-cl", "ewc"), strict=True):
        path.write_text(json.dumps(swapped | {"method": method}))


def test_who_is_ahead_on_few_cells_is_told_with_how_sure_that_is(tmp_path):
    missing = [
        ("ewc", order, seed, "waiting", None) for order in ORDERS for seed in (0, 1) if (order, seed) != ("order1", 0)
    ]
    folder = write_bench(tmp_path / "b", methods=("moe-cl", "ewc"), troubles=missing)
    swap(folder)
    said = page(make([folder])).said
    assert re.search(
        r"ewc is \S+ points ahead of moe-cl on the 1 cell that both have \(95% interval \S+ to \S+ points\)", said
    )


def test_where_another_leads_moe_cl_is_held_against_its_best_rival(tmp_path):
    folder = write_bench(tmp_path / "b", methods=("moe-cl", "ewc"), orders=("order1",), seeds=(0,))
    caption = "moe-cl less its best rival"
    assert caption not in page(make([folder])).tables, "the leader is held against all"
    swap(folder)
    found = page(make([folder])).tables
    assert found[caption][1][2] == "-" + found["ewc, the leader, less each other method"][1][2].lstrip("+")


def altered(folder: Path, id: str, **changes) -> None:
    path = folder / "cells" / id / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_lead_that_a_seed_does_not_bear_out_is_called_so(tmp_path):
    folder = write_bench(tmp_path / "b", methods=("moe-cl", "sequential-lora"), orders=("order1",))
    better = (folder / "cells" / "moe-cl.order1.s0" / "result.json").read_text()
    (folder / "cells" / "sequential-lora.order1.s1" / "result.json").write_text(
        json.dumps(json.loads(better) | {"method": "sequential-lora", "seed": 1})
    )
    altered(folder, "moe-cl.order1.s1", **{key: json.loads(better)[key] for key in ("R", "items")})
    said = page(make([folder])).said
    assert "moe-cl is ahead of its best rival, but not with seed 1: " in said


def test_the_leader_is_behind_no_other_where_cells_are_missing(tmp_path):
    missing = [("moe-cl", "order3", seed, "waiting", None) for seed in (0, 1)]
    folder = write_bench(tmp_path / "b", methods=("moe-cl", "per-task-lora"), troubles=missing)
    assert "moe-cl is better than its best rival" in page(make([folder])).said


def test_benches_that_are_trained_otherwise_stand_apart(tmp_path):
    parts = [write_bench(tmp_path / name, methods=("moe-cl", "ewc"), orders=("order1",)) for name in "ab"]
    caption = "Average accuracy after the last task, by order (mean ± SD over seeds)"
    record = json.loads((tmp_path / "b" / "bench.json").read_text())
    record["methods"]["ewc"]["tuned"] = None  # how a setting was chosen is no other setting
    (tmp_path / "b" / "bench.json").write_text(json.dumps(record))
    assert len(make(parts, tmp_path / "one.html").headlines) == 1
    record["protocol"]["train"]["epochs"] = 20
    (tmp_path / "b" / "bench.json").write_text(json.dumps(record))
    written = make(parts, tmp_path / "two.html")
    assert len(written.headlines) == 2
    assert caption in page(written).tables


def test_a_method_that_is_trained_otherwise_in_another_bench_stands_apart(tmp_path):
    parts = [
        write_bench(tmp_path / name, methods=("moe-cl",), orders=("order1",), seeds=(n,)) for n, name in enumerate("ab")
    ]
    for folder, lr in zip(parts, (1e-3, 2e-3), strict=True):
        record = json.loads((folder / "bench.json").read_text())
        record["protocol"]["train"].pop("lr")
        record["methods"]["moe-cl"]["stream"] = {"head": "lm", "train": {"lr": lr, "epochs": 2}}
        (folder / "bench.json").write_text(json.dumps(record))
    assert len(make(parts, tmp_path / "two.html").headlines) == 2


def test_labels_that_are_one_as_a_files_name_are_not_mixed_up(tmp_path):
    parts = [write_bench(tmp_path / name, methods=("moe-cl",), orders=("order1",), seeds=(0,)) for name in "ab"]
    record = json.loads((parts[1] / "bench.json").read_text())
    record["methods"] = {"MoE CL": record["methods"]["moe-cl"]}
    record["cells"][0]["method"] = "MoE CL"
    (parts[1] / "bench.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match=r"moe-cl.order1.s0 is of moe-cl, order1 in one bench and of MoE CL, order1 in"):
        make(parts, tmp_path / "both.html")


def test_a_bench_that_was_killed_runs_no_more(tmp_path):
    started = [("moe-cl", "order1", 1, "running", None), ("ewc", "order1", 0, "running", None)]
    folder = write_bench(tmp_path / "b", methods=("moe-cl", "ewc"), orders=("order1",), troubles=started)
    with lock_file(folder / ".lock"):
        assert "2 of 4 cells still running" in page(make([folder])).said
    cells = folder / "cells"
    shutil.copytree(cells / "moe-cl.order1.s0", cells / "moe-cl.order1.s1")
    said = page(make([folder])).said
    assert "1 of 4 cells not run yet, not in any number: ewc.order1.s0." in said
    assert "still running" not in said


def test_one_protocol_of_two_benches_says_what_both_have(tmp_path):
    parts = [write_bench(tmp_path / name, methods=(name,), orders=("order1",)) for name in ("moe-cl", "ewc")]
    record = json.loads((parts[1] / "bench.json").read_text())
    del record["protocol"]["train"]["epochs"], record["protocol"]["head"]
    (parts[1] / "bench.json").write_text(json.dumps(record))
    said = page(make(parts, tmp_path / "one.html")).tables["Common to all methods"]
    assert ("train.lr", "0.002") in [tuple(row) for row in said]
    assert not {"train.epochs", "head"} & {row[0] for row in said}


def test_settings_from_before_they_were_known_are_told_as_they_were(tmp_path):
    folder = write_bench(tmp_path / "b", methods=("moe-cl",), orders=("order1",), seeds=(0,))
    [row] = page(make([folder])).tables["Settings of each method, where not the default"][1:]
    assert "nested = False" in row[2]


def test_tasks_of_any_order_are_shown(tmp_path):
    folder = write_bench(tmp_path / "b", methods=("moe-cl",), orders=("order1",), seeds=(0,))
    record = json.loads((folder / "bench.json").read_text())
    record["orders"] = {"short": record["orders"]["order1"][:1], **record["orders"]}
    (folder / "bench.json").write_text(json.dumps(record))
    assert page(make([folder])).tables["Each task's score after the last task, means over cells"][0] == [
        "method",
        *TASKS,
    ]


def test_how_a_method_is_trained_is_told_where_it_is_its_own(tmp_path):
    folder = write_bench(tmp_path / "b", methods=("moe-cl", "ewc"), orders=("order1",), seeds=(0,))
    record = json.loads((folder / "bench.json").read_text())
    for label, lr, head in (("moe-cl", 1e-3, "lm"), ("ewc", 2e-3, "classifier")):
        record["methods"][label]["stream"] = {"head": head, "train": {"lr": lr, "epochs": 2, "seed": 0}}
    (folder / "bench.json").write_text(json.dumps(record))
    rows = page(make([folder])).tables["Settings of each method, where not the default"][1:]
    told = {row[0]: row[2] for row in rows}
    assert ("lr = 0.001" in told["moe-cl"], "head = lm" in told["moe-cl"]) == (True, True)
    assert ("lr = 0.002" in told["ewc"], "head = classifier" in told["ewc"]) == (True, True)
    assert "epochs" not in told["moe-cl"]
    assert "seed" not in told["moe-cl"]


def test_a_bench_without_items_or_results_says_so(tmp_path):
    folder = write_bench(tmp_path / "b", methods=("moe-cl", "ewc"), orders=("order1", "order2"), seeds=(0,))
    for path in folder.rglob("result.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"items": {}, "details": {}}))
    assert (
        "not all results hold test items of the same tasks. It leads in each of 2 orders." in page(make([folder])).said
    )
    for path in folder.rglob("result.json"):
        path.unlink()
    found = page(make([folder]))
    assert "there is no leader" in found.said
    assert "4 of 4 cells not run yet" in found.said


def test_orders_of_different_tasks_have_no_common_interval(tmp_path):
    folder = write_bench(tmp_path / "b", methods=("moe-cl", "ewc"), orders=("order1", "order2"), seeds=(0,))
    record = json.loads((folder / "bench.json").read_text())
    record["orders"]["order2"] = ["dbpedia", "amazon"]
    (folder / "bench.json").write_text(json.dumps(record))
    for label in ("moe-cl", "ewc"):
        method, level, loss = METHODS[label]
        made = result(tasks=("dbpedia", "amazon"), method=method, level=level, loss=loss)
        made.save(folder / "cells" / f"{label}.order2.s0" / "result.json")
    found = page(make([folder]))
    assert "How sure that is cannot be said" in found.said
    assert "It leads in each of 2 orders, with an interval above 0 in 2." in found.said


def test_benches_of_the_same_base_and_tasks_are_one(tmp_path, bench_report):
    parts = [
        write_bench(tmp_path / "a", methods=("moe-cl", "ewc")),
        write_bench(tmp_path / "b", methods=("joint", "ewc")),
    ]
    tables = page(make(parts, tmp_path / "all.html")).tables
    rows = tables["Average accuracy after the last task, by order (mean ± SD over seeds)"][1:]
    whole = page(bench_report).tables["Average accuracy after the last task, by order (mean ± SD over seeds)"]
    assert [row[0] for row in rows] == ["joint (bound)", "moe-cl", "ewc"]
    assert [row for row in rows if row[0] == "moe-cl"] == [row for row in whole if row[0] == "moe-cl"]
    other = write_bench(tmp_path / "c", methods=("moe-cl",), base="another")
    assert page(make([*parts, other], tmp_path / "all.html")).said.count("Environment of all cells") == 2


def test_runs_are_compared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [
        write_run(tmp_path / "a"),
        write_run(tmp_path / "b", level=0.8),
        write_run(tmp_path / "c", tasks=("x", "y")),
    ]
    written = make(folders)
    assert written.html.resolve() == tmp_path / "report.html"
    rows = page(written).tables["Runs"]
    a, b = (Result.load(folder / "result.json").items for folder in folders[:2])
    difference = stats.paired([b], [a])
    assert rows[1][-3:] == ["-", "-", "-"]
    assert rows[2][-3:-1] == [f"{difference.mean:+.3f}", f"{difference.low:+.3f} to {difference.high:+.3f}"]
    assert rows[3][-3] == "other test rows"
    path = folders[1] / "result.json"
    path.write_text(path.read_text().replace(Result.load(path).data["dbpedia"]["test"].sha256, "0" * 64))
    assert page(make(folders)).tables["Runs"][2][-3] == "other test rows", "their number and labels alone say little"


def test_nothing_is_loaded_and_the_same_data_give_the_same_bytes(tmp_path, bench):
    written = make([bench], tmp_path / "a.html")
    text = written.html.read_text()
    assert set(re.findall(r"https?://[^\s\"'<)]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert not re.search(r"url\((?!#)|@import|<script|<link|<img|<iframe", text)
    assert "<text" in text
    assert text == make([bench], tmp_path / "b.html").html.read_text()
    assert "#0072b2" not in text.split("</style>")[1]
    figures = [attributes for tag, attributes in page(written).found if tag == "svg"]
    assert figures
    assert all(one["role"] == "img" and one["aria-label"] for one in figures)
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_what_comes_from_data_stays_text(tmp_path):
    evil = "<script>alert(1)</script>--><b>|`$x$&"
    tasks = (evil, '" onload="x', "# title")
    environment = {**ENVIRONMENT, evil: evil}
    written = make([write_run(tmp_path / "run", tasks=tasks, method="<i>m</i>", environment=environment, loss=0.1)])
    found = page(written)
    assert {tag for tag, _ in found.found} & {"script", "b", "i"} == set()
    assert not [name for _, attributes in found.found for name in attributes if name.startswith("on")]
    assert found.tables[SCORES][0][1:] == list(tasks)
    text = written.markdown.read_text()
    assert not re.search(r"(?<!\\)<", text)
    assert "\\|\\`" in text


def test_many_tasks_stay_small(tmp_path):
    few = make([write_run(tmp_path / "few", tasks=[f"task{n}" for n in range(25)])])
    assert page(few).tables[SCORES][0] == [
        "after",
        *map(str, range(1, 26)),
    ]
    written = make([write_run(tmp_path / "many", tasks=[f"task{n}" for n in range(200)])])
    found = page(written)
    assert SCORES not in found.tables
    assert len(written.html.read_text()) < 1_000_000
    assert [tag for tag, _ in found.found].count("details") >= 5


def test_folders_and_files_that_are_wrong(tmp_path, bench):
    with pytest.raises(RunError, match="neither a run folder"):
        make([tmp_path])
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(RunError, match="not finished"):
        make([tmp_path])
    with pytest.raises(RunError, match=r"ends in \.html"):
        make([bench], tmp_path / "x.pdf")
    with pytest.raises(RunError, match="make it first"):
        make([bench], tmp_path / "none" / "x.html")
    broken = {"{": "cannot be read", "{}": "schema", '{"schema": 1}': "base: Field required"}
    for text, word in broken.items():
        (tmp_path / "bench.json").write_text(text)
        with pytest.raises(RunError, match=word):
            read(tmp_path)
    run = write_run(tmp_path / "run", learned=True)
    (run / "predictions" / "amazon.learned.jsonl").write_text('{"row": 1}\n')
    with pytest.raises(RunError, match=r"amazon.learned.jsonl:1: is no prediction"):
        make([run])


@pytest.mark.parametrize("library", ["matplotlib", "jinja2"])
def test_what_is_not_installed(library, bench, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, library, None)
    with pytest.raises(UserError, match=r"pip install 'moecl\[report\]'"):
        make([bench], tmp_path / "r.html")


@pytest.mark.parametrize("width", [80, 140])
def test_the_command(width, bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("moecl.cli.out", __import__("rich.console").console.Console(width=width))
    assert main(["report", str(bench), "-o", str(tmp_path / "r.html")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("moe-cl is better than its best rival") for line in lines)
    assert any(line.split()[:2] == ["moe-cl", "0.850"] for line in lines)
    assert lines[-2:] == [f"report    {tmp_path / 'r.html'}", f"markdown  {tmp_path / 'r.md'}"]
    assert max(map(len, lines[:-2])) <= width
    assert main(["report", str(tmp_path)]) == 2
