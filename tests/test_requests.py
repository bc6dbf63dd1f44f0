"""Requests scored: shares by what is done with unknown ones, how they were heard, and the command line round it."""

import json
import math

import pytest
import torch
from command_line import run
from hub_server import TOKEN
from huggingface_hub import ModelCard
from tiny import generator

from peft_icm import AdapterCollection, ICMConfig, ICMGenerator
from peft_icm.adapters.attach import attach
from peft_icm.evaluation import Evaluation
from peft_icm.evaluation.requests import Heard, RequestsReport, card_facts, evaluate_requests, load_requests
from peft_icm.generator.requests import scaled
from peft_icm.hub.cards import generator_card
from peft_icm.tasks import load_tasks
from peft_icm.unknown import ON_UNKNOWN

UNKNOWN = "quantum chromodynamics lattice simulations on supercomputers"


def heard(meant, name, familiarity, known, *gains):
    names = ("generated/warn", "generated/shrink", "retrieved/warn", "retrieved/shrink")
    return Heard(
        "a sentence", meant, meant or "a", name, familiarity, familiarity, familiarity, known, dict(zip(names, gains, strict=True))
    )


@pytest.fixture
def report():
    rows = [
        heard("a", "a", 0.9, True, 1.0, 0.9, 2.0, 1.8),
        heard("b", "a", 0.8, True, -3.0, -2.0, -4.0, -3.0),
        heard("a", "a", 0.3, False, 1.5, 0.5, 2.0, 0.6),
        heard(None, "b", 0.6, True, -1.0, -0.2, -2.0, -0.4),
        heard(None, "b", 0.1, False, -5.0, -0.1, -6.0, -0.1),
    ]
    return RequestsReport(rows, {"a": 2.0, "b": 4.0}, 0.5, "nats", 1.0)


class TestReport:
    def test_shares_by_hand(self, report):
        shares = {mode: report.share("generated", mode, meant=True) for mode in ON_UNKNOWN}
        assert shares == pytest.approx({"warn": -0.5 / 8, "shrink": -0.6 / 8, "base": -2.0 / 8, "raise": -2.0 / 8})
        assert report.share("generated", "warn", meant=False) == pytest.approx(-6 / 4)
        assert report.share("retrieved", "base", meant=False) == pytest.approx(-2 / 4)

    def test_how_they_were_heard(self, report):
        found = report.to_dict()["heard"]
        assert found["right"] == pytest.approx(2 / 3, abs=1e-4) and found["known_of_known"] == pytest.approx(2 / 3, abs=1e-4)
        assert found["known_of_unknown"] == 0.5 and found["auroc"] == pytest.approx(5 / 6, abs=1e-4)
        assert found["unknown_at_95_of_known"] == 0.5  # of 0.6 and 0.1, beside a quantile of 0.35

    def test_risk_and_coverage(self, report):
        coverage, risk = report.risk_coverage()
        assert coverage == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
        assert risk == pytest.approx([1 - 1 / 2, 1 + 2 / 6, 1 + 3 / 8, 1 + 1.5 / 10, 1 + 6.5 / 12])
        assert report.aurc() == pytest.approx(sum(risk) / 5)

    def test_written_and_drawn(self, report, tmp_path):
        assert (report.to_dict()["known"], report.to_dict()["unknown"]) == (3, 2)
        assert [line.split()[-1] for line in report.table().splitlines()[:5]] == ["answered", "0.67", "0.67", "0.50", "0.50"]
        assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["share"].keys() == {"unseen_phrasings", "unknown_requests"}
        assert len({len(line.split()) for line in report.table().splitlines()[1:5]}) == 1
        report.plot(tmp_path / "risk.png")
        assert (tmp_path / "risk.png").read_bytes().startswith(b"\x89PNG")

    def test_without_unknown_ones(self, report):
        some = RequestsReport(report.rows[:3], report.own, 0.5, "nats", 1.0)
        found = some.to_dict()
        assert found["heard"]["auroc"] is None and found["heard"]["unknown_at_95_of_known"] is None
        assert found["share"].keys() == {"unseen_phrasings"} and "n/a" in some.table()


def test_scores_are_those_of_the_adapters(work, trained):
    """Every gain computed once more, from the adapters that were asked for."""
    generator = ICMGenerator.from_pretrained(trained)
    collection = AdapterCollection.from_pretrained(work / "collection")
    own = {task: collection.final(task) for task in collection.tasks}
    tasks = load_tasks(work / "tasks")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work / "base")
    line = tasks[0].unseen_descriptions[0]
    report = evaluate_requests(Evaluation, generator, tokenizer, tasks, own, {tasks[0].name: [line]}, [UNKNOWN], progress=False)
    reading = generator.read(line)
    assert [row.meant for row in report.rows] == [tasks[0].name, None] and report.rows[0].heard == reading.task
    model = generator.generate_adapter(tasks[0].descriptions[0])

    def nats(tensors):
        attach(model, generator.layout, {name: tensor.to(generator.layout.torch_dtype) for name, tensor in tensors.items()})
        return Evaluation.score(model, tokenizer, tasks[0])

    with model.disable_adapter():
        base = Evaluation.score(model, tokenizer, tasks[0])
    made = generator.generate_state_dict(line, generator=torch.Generator().manual_seed(0))
    wanted = {
        "generated/warn": made,
        "generated/shrink": scaled(made, reading.worth),
        "retrieved/warn": generator.layout.unflatten(own[reading.task]),
        "retrieved/shrink": scaled(generator.layout.unflatten(own[reading.task]), reading.worth),
    }
    for name, tensors in wanted.items():
        gain = Evaluation.numbers(nats(tensors))["gain"] - Evaluation.numbers(base)["gain"]
        assert report.rows[0].gains[name] == pytest.approx(gain, abs=1e-5)
    assert report.own[tasks[0].name] == pytest.approx(
        Evaluation.numbers(nats(generator.layout.unflatten(own[tasks[0].name])))["gain"] - Evaluation.numbers(base)["gain"], abs=1e-5
    )


@pytest.mark.parametrize("base", [0.5, None, "x", True, math.nan, math.inf, pytest.param(10**400, id="huge")])
def test_a_card_tells_what_can_be_read_of_a_config(base):
    shares = {"unseen_phrasings": {"generated": {"warn": 0.9, "shrink": 0.8, "base": base}, "retrieved": 3}}
    config = generator().config.to_dict()
    config["training"] = {"requests": {"share": shares, "heard": {"known_of_known": 1.0}, "known": 3, "unknown": 0}}
    card = generator_card(config, repo_id="org/icm", folder="nowhere")
    assert ("| unseen phrasings, generated | 0.90 | 0.80 | 0.50 | 1.00 |" in card.text) == (base == 0.5) == bool(card.data.eval_results)
    assert "retrieved |" not in card.text


def test_a_task_without_its_own_lora(work, trained):
    with pytest.raises(ValueError, match="may hear 'sonnet', and the collection has no LoRA of it"):
        evaluate_requests(Evaluation, ICMGenerator.from_pretrained(trained), None, [], {}, {})


def test_nothing_asked(work, trained):
    own = dict.fromkeys(("sonnet", "novel", "genesis"))
    for tasks, unknown in ((load_tasks(work / "tasks"), []), ([], [UNKNOWN])):
        with pytest.raises(ValueError, match="There must be a task and a request"):
            evaluate_requests(Evaluation, ICMGenerator.from_pretrained(trained), None, tasks, own, {}, unknown)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", "is no JSON of the form"),
        ("[]", "is no JSON of the form"),
        ('{"unknown": []}', "is no JSON of the form"),
        ('{"known": {"novella": ["x"]}}', "known names 'novella', which is no task here: sonnet, novel"),
        ('{"known": {"sonnet": "write one"}}', "'sonnet' must have a list of sentences"),
        ('{"known": {"sonnet": [" "]}}', "'sonnet' must have a list of sentences"),
        ('{"known": {"sonnet": ["a"]}, "unknown": [1]}', "'unknown' must have a list of sentences"),
        ('{"known": {"sonnet": ["a"]}, "unknown": "knitting"}', "'unknown' must have a list of sentences"),
        ('{"known": [["sonnet", ["a"]]]}', "is no JSON of the form"),
        ("[" * 200_000, "is no JSON of the form"),
        ('{"known": {}}', "has no sentence under known"),
    ],
)
def test_files_that_hold_no_requests(document, message, tmp_path):
    (tmp_path / "requests.json").write_text(document)
    with pytest.raises(ValueError, match=message) as caught:
        load_requests(tmp_path / "requests.json", ["sonnet", "novel"])
    assert "\n" not in str(caught.value)


class TestCommandLine:
    def test_read(self, capsys):
        assert run("read", "bundled:text", "continue a Shakespeare play", "--top", 3) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("heard: shakespeare (") and lines[1].startswith("shakespeare") and "#" in lines[1]
        assert [line.split()[0] for line in lines[-2:]] == ["familiarity", "threshold"] and lines[-1].endswith("known") and len(lines) == 7
        assert lines[4] == "... and 15 more tasks (--top)"

    def test_read_as_json(self, capsys):
        assert run("read", "bundled:text", UNKNOWN, "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert found["known"] is False and len(found["tasks"]) == 18 and math.isclose(sum(found["tasks"].values()), 1, abs_tol=1e-3)

    def test_an_unknown_request_is_warned_of_in_one_line(self, tmp_path, capsys):
        assert run("generate", "bundled:text", UNKNOWN, "-o", tmp_path / "a") == 0
        printed = capsys.readouterr()
        assert printed.out.startswith("heard: ")
        assert printed.err.count("peft-icm: warning: ") == 1 and "requests.py" not in printed.err

    def test_raise_ends_with_2_and_writes_nothing(self, tmp_path, capsys):
        assert run("generate", "bundled:text", UNKNOWN, "-o", tmp_path / "a", "--on-unknown", "raise") == 2
        assert "is none of this generator's tasks" in capsys.readouterr().err and not (tmp_path / "a").exists()

    def test_its_choices_are_those_of_the_package(self, capsys):
        with pytest.raises(SystemExit):
            run("generate", "bundled:text", "x", "-o", "y", "--on-unknown", "guess")
        error = capsys.readouterr().err
        assert all(mode in error.partition("choose from")[2] for mode in ON_UNKNOWN)

    def test_requests_from_a_file(self, work, trained, tmp_path, capsys):
        (tmp_path / "requests.json").write_text(json.dumps({"known": {"sonnet": ["fourteen lines, please"]}, "unknown": [UNKNOWN]}))
        arguments = ["evaluate", trained, "--tasks", work / "tasks", "--collection", work / "collection"]
        assert run(*arguments, "--requests", tmp_path / "requests.json", "-o", tmp_path / "r.json", "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert found == json.loads((tmp_path / "r.json").read_text()) and len(found["requests"]) == 2
        assert (tmp_path / "r.png").is_file()
        assert run(*arguments, "--requests", tmp_path / "none.json") == 2
        assert run(*arguments, "--requests", tmp_path / "requests.json", "--seeds", 0, 1) == 2
        assert "--seeds 0 1: --requests are scored with one seed" in capsys.readouterr().err

    def test_a_pushed_card_tells_what_was_measured(self, work, trained, hub, tmp_path, capsys):
        known = {name: [f"{name}, quickly"] for name in ("sonnet", "novel", "genesis")}
        (tmp_path / "asked.json").write_text(json.dumps({"known": known, "unknown": [UNKNOWN]}))
        arguments = ["evaluate", trained, "--tasks", work / "tasks", "--collection", work / "collection", "--seeds", 0]
        assert run(*arguments, "--requests", tmp_path / "asked.json", "-o", tmp_path / "r.json") == 0
        assert run("push", trained, "org/icm", "--token", TOKEN, "--with-requests", tmp_path / "r.json") == 0
        files, measured = hub.repos["models", "org/icm"].files(), json.loads((tmp_path / "r.json").read_text())
        card = ModelCard(files["README.md"].decode())
        assert "3 requests that mean one of its tasks, 1 that mean none" in card.text
        for source, shares in measured["share"]["unseen_phrasings"].items():
            cells = [*(shares[mode] for mode in ("warn", "shrink", "base")), measured["heard"]["known_of_known"]]
            assert f"| unseen phrasings, {source} |" + "".join(f" {cell:.2f} |" for cell in cells) in card.text
        assert f"retrieved | {measured['heard']['aurc_retrieved']:.3f} |" in card.text
        figures = {(row.metric_type, row.dataset_name): row.metric_value for row in card.data.eval_results}
        assert figures["share_shrink", "unknown requests"] == measured["share"]["unknown_requests"]["generated"]["shrink"]
        # it stays with the generator, whoever pushes it next
        assert ICMGenerator.from_pretrained("org/icm", cache_dir=tmp_path).config.training["requests"]["heard"] == measured["heard"]

    def test_of_other_weights_a_card_tells_nothing(self, trained, tmp_path, report):
        generator = ICMGenerator.from_pretrained(trained)
        (tmp_path / "r.json").write_text(json.dumps({**report.to_dict(), "weights_sha256": generator.saved_sha256}))
        generator.config.training["requests"] = card_facts(tmp_path / "r.json", generator)
        assert "unit" not in generator.config.training["requests"]
        for told in (True, False):
            generator.save_pretrained(tmp_path / "g")
            card = generator_card(ICMConfig.from_pretrained(tmp_path / "g").to_dict(), repo_id="org/icm", folder=tmp_path / "g")
            assert ("## Asked in other words" in card.text) == told
            next(generator.parameters()).data.mul_(1.5)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ("[1]", "is no report that peft-icm evaluate --requests wrote"),
            ('{"share": {}}', "is no report"),
            ("[" * 200_000, "is no report"),
            ({"heard": {"known_of_known": math.nan}}, "is no report"),
            ({"weights_sha256": "0" * 64}, "on other weights than"),
            ({"share": "abc"}, "has no figures that a card can tell"),
            ({"heard": None}, "has no figures that a card can tell"),
            ({"known": True}, "has no figures that a card can tell"),
        ],
    )
    def test_what_is_no_report_of_this_generator(self, change, message, report, trained, hub, tmp_path, capsys):
        good = {**report.to_dict(), "weights_sha256": ICMGenerator.from_pretrained(trained).saved_sha256}
        (tmp_path / "r.json").write_text(change if isinstance(change, str) else json.dumps({**good, **change}))
        assert run("push", trained, "org/icm", "--token", TOKEN, "--with-requests", tmp_path / "r.json") == 2
        assert message in capsys.readouterr().err and not hub.repos
