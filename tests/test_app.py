"""What the page calls: requests of many users on one base, what is shown of them, and what leaves the machine."""

import dataclasses
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
import weakref
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from command_line import run
from packaging.requirements import Requirement
from peft import PeftModel
from PIL import Image
from tiny import generator, llama, llama_layout

from peft_icm import ICMGenerator, bundled_generator, detect
from peft_icm.app import rendering, serving
from peft_icm.app.serving import Request, Scene, Service, Token
from peft_icm.hub.space import GRADIO, write_space
from peft_icm.tasks.language_modeling import nll

SENTENCES = {"text": "continue a Shakespeare play", "detection": "detect sofas"}
OPENING = "Whether 'tis nobler in the mind — ü 🙂 日本 — to suffer\n"
REPO = "me/demo"


@pytest.fixture(scope="module")
def services():
    return {name: Service(ICMGenerator.from_pretrained(bundled_generator(name))) for name in SENTENCES}


@pytest.fixture
def text(services):
    return services["text"]


@pytest.fixture
def adapted(text):
    return text.adapt(Request(SENTENCES["text"]))


class TestRequest:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "Say what the adapter is for"),
            ({"text": "a" * 501}, "501 characters: at most 500"),
            ({"examples": ("a",) * 33}, "33 examples are shown: at most 32"),
            ({"images": (Image.new("RGB", (1, 1)),) * 9}, "9 pictures are shown: at most 8"),
            ({"text": "a", "seed": -1}, "The seed is -1"),
            ({"text": "a", "seed": 2**63}, "it must be a whole number from 0"),
            ({"text": "a", "seed": None}, "The seed is None"),
            ({"text": "a", "strength": float("nan")}, "strength=nan"),
            ({"text": "a", "on_unknown": "shout"}, "on_unknown='shout' is unknown"),
        ],
    )
    def test_what_cannot_be_answered_is_refused(self, options, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            Request(**options)

    def test_the_greatest_seed_is_one(self, text):
        assert isinstance(text.adapt(Request("a novel", seed=serving.MAX_SEED)), PeftModel)
        with pytest.raises(ValueError, match="The seed is"):
            Request("a novel", seed=serving.MAX_SEED + 1)


class TestUsers:
    def logits(self, model):
        with torch.no_grad():
            return model(input_ids=torch.arange(3, 40)[None]).logits

    def test_nobody_meets_the_adapter_of_another(self, text):
        before = self.logits(text.base)
        first = text.adapt(Request(SENTENCES["text"]))
        own = self.logits(first)
        second = text.adapt(Request("model the King James Bible"))
        assert torch.equal(self.logits(first), own) and not torch.equal(self.logits(second), own)
        assert torch.equal(self.logits(text.base), before) and not torch.equal(own, before)
        weights = [model.get_input_embeddings().weight.data_ptr() for model in (text.base, first, second)]
        assert len(set(weights)) == 1

    def test_what_nobody_holds_is_gone(self, text):
        model = text.adapt(Request(SENTENCES["text"]))
        seen = weakref.ref(model.get_base_model())
        del model
        gc.collect()
        assert seen() is None

    def test_strength_and_base_leave_the_base(self, text):
        nothing = text.adapt(Request(SENTENCES["text"], strength=0.0))
        unknown = text.adapt(Request("knitting patterns for beginners", on_unknown="base"))
        for model in (nothing, unknown):
            assert torch.equal(self.logits(model), self.logits(text.base))

    def test_another_base(self, text, tmp_path):
        other = text.generator.load_base()
        other = type(other)(other.config)
        other.save_pretrained(tmp_path / "other")
        text.processor.save_pretrained(tmp_path / "other")
        service = Service(text.generator, str(tmp_path / "other"))
        assert torch.equal(service.base.get_input_embeddings().weight, other.get_input_embeddings().weight)
        assert 'LlamaForCausalLM.from_pretrained("other")' in service.loading_lines()

    def test_without_a_base_or_with_one_that_does_not_fit(self, text, base):
        with pytest.raises(ValueError, match="names no base model"):
            Service(generator())
        with pytest.raises(ValueError, match="expected shape .*, found a base model that needs"):
            Service(text.generator, str(base))


class TestGoingOn:
    def test_the_surprise_is_that_of_the_evaluation(self, text, adapted):
        for model in (text.base, adapted):
            tokens = text.go_on(model, OPENING, seed=0)
            given = [token for token in tokens if not token.new]
            scored = nll(model, text.processor, [OPENING], progress=False)[0]
            assert "".join(token.text for token in given) == OPENING
            assert sum(token.nats for token in given) == pytest.approx(scored.nats, rel=1e-4)
            assert 0 < sum(token.new for token in tokens) <= serving.NEW_TOKENS

    def test_the_seed_decides_and_the_global_generator_is_left_alone(self, text):
        state = torch.get_rng_state()
        same, again, other = (text.go_on(text.base, OPENING, seed) for seed in (1, 1, 2))
        assert same == again != other and torch.equal(torch.get_rng_state(), state)

    def test_of_a_long_text_the_end_is_read(self, text):
        tokens = text.go_on(text.base, "x" * 5000 + " and so it ends", seed=0)
        given = "".join(token.text for token in tokens if not token.new)
        assert given.endswith("and so it ends") and len(given) <= serving.MAX_TEXT
        assert len(tokens) < text.base.config.max_position_embeddings

    def test_no_text(self, text):
        with pytest.raises(ValueError, match="no text to go on from"):
            text.go_on(text.base, " \n", seed=0)


class TestLooking:
    def test_boxes_are_those_of_detect(self, services):
        service = services["detection"]
        request = Request(SENTENCES["detection"])
        reading = service.hear(request)
        pictures = serving.scenes(reading)
        model = service.adapt(request)
        scenes = service.look(model, pictures)
        for scene, found in zip(scenes, detect(model, service.processor, pictures), strict=True):
            assert [label for label, _, _ in scene.adapted] == found["labels"]
            assert [box for _, _, box in scene.adapted] == [pytest.approx(box, abs=0.5) for box in found["boxes"].tolist()]
        assert sum("couch" in [label for label, _, _ in scene.adapted] for scene in scenes) >= 2  # scenes() shows what was heard
        assert any(scene.base != scene.adapted for scene in scenes)

    def test_large_pictures_are_made_smaller_and_five_refused(self, services):
        service = services["detection"]
        model = service.adapt(Request(SENTENCES["detection"]))
        (scene,) = service.look(model, [Image.new("RGB", (4096, 1000))])
        assert scene.picture.size == (1024, 250)
        with pytest.raises(ValueError, match="5 pictures are to be looked at: at most 4"):
            service.look(model, [scene.picture] * 5)

    def test_pictures_instead_of_a_sentence(self, services):
        service = services["detection"]
        assert service.shows == ("images",)
        assert service.hear(Request(images=tuple(serving.scenes(None)))) is not None


class TestTime:
    def test_what_is_written_in_time_is_shown(self, services):
        service = services["text"]
        for model in (service.base, service.adapt(Request(SENTENCES["text"]))):
            assert sum(token.new for token in service.go_on(model, OPENING, seed=0, seconds=0.0)) == 1

    def test_a_request_is_stopped_before_the_next_layer_and_the_page_goes_on(self, services):
        for name, service in services.items():
            request = Request(SENTENCES[name])
            model = service.adapt(request)

            def show(service=service, model=model):
                return service.look(model, serving.scenes(None)) if service.detects else service.go_on(model, OPENING, seed=0)

            for work in (partial(service.hear, request), partial(service.adapt, request), show):
                with pytest.raises(TimeoutError, match="Stopped after 60 seconds"), serving.stopped_at(time.monotonic()):
                    work()
                work()

    @pytest.mark.slow
    def test_pictures_that_were_ready_are_shown(self, services):
        service = services["detection"]
        model = service.adapt(Request(SENTENCES["detection"]))
        end = time.monotonic() + 10

        class Slow(list):
            def __iter__(self):
                yield self[0]
                time.sleep(max(0.0, end - time.monotonic()))
                yield self[1]

        with serving.stopped_at(end):
            assert len(service.look(model, Slow(serving.scenes(None)[:2]))) == 1

    def test_others_are_not_stopped(self, text):
        with serving.stopped_at(time.monotonic()), ThreadPoolExecutor(1) as other:
            assert other.submit(text.hear, Request("a novel")).result() is not None


class TestLeaving:
    def private(self, content):
        return re.findall(rb"/(?:root|home|work|tmp|usr)/[^\s\"']+", content)

    def test_the_zip_is_a_peft_folder_without_paths_and_is_deleted(self, text, adapted, tmp_path):
        with serving.zipped(adapted) as file, zipfile.ZipFile(file) as archive:
            archive.extractall(tmp_path)
            assert not [found for name in archive.namelist() for found in self.private(archive.read(name))]
        assert not file.parent.exists() and str(file).startswith(tempfile.gettempdir())
        assert {path.name for path in (tmp_path / "adapter").iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
        base = type(text.base).from_pretrained(text.base.name_or_path)
        ids = {"input_ids": torch.arange(3, 40)[None]}
        with torch.no_grad():
            assert torch.allclose(PeftModel.from_pretrained(base, tmp_path / "adapter")(**ids).logits, adapted(**ids).logits)

    def test_the_three_lines(self, services):
        for service in services.values():
            assert len(service.loading_lines().splitlines()) == 3 and not self.private(service.loading_lines().encode())
            compile(service.loading_lines(), "lines", "exec")

    def test_a_push_is_private_and_keeps_no_token(self, hub, token, adapted):
        address = serving.push(adapted, f" {REPO} ", f"{token}\n")
        repo = hub.repos["models", REPO]
        assert repo.private and address.startswith(hub.url)
        assert not [name for name, content in repo.files().items() if token.encode() in content or self.private(content)]

    @pytest.mark.parametrize(("token", "message"), [(" ", "There is no token"), ("hf_wrong", "401")])
    def test_without_rights_nothing_is_pushed_whatever_this_machine_may(self, hub, adapted, monkeypatch, token, message):
        monkeypatch.setenv("HF_TOKEN", "hf_test_token")  # of whoever runs the page
        with pytest.raises((ValueError, OSError), match=message):
            serving.push(adapted, REPO, token)
        assert not hub.repos

    @pytest.mark.parametrize(
        ("message", "told"),
        [
            ("/tmp/gradio/3f/cat.png is no\npicture", "cat.png is no picture"),
            ("cannot open '/home/ada/models/x.png'", "cannot open 'x.png'"),
            (f"{Path.cwd()}/a/b: missing", "b: missing"),
            (r"C:\Users\ada\cat.png", "cat.png"),
            ("see https://hf.co/settings/tokens", "see https://hf.co/settings/tokens"),
            ("me/demo and/or 1 / 2", "me/demo and/or 1 / 2"),
        ],
    )
    def test_an_error_names_no_path(self, message, told):
        assert serving.one_line(ValueError(message)) == told


class TestShowing:
    BAD = "<script>alert('1')</script>"

    def test_what_users_wrote_is_escaped(self, text):
        reading = dataclasses.replace(text.hear(Request(self.BAD)), tasks={self.BAD: 1.0}, description=self.BAD)
        tokens = [Token(self.BAD, 1.0, False)]
        scene = Scene(Image.new("RGB", (4, 4)), [(self.BAD, 0.5, [0, 0, 1, 1])], [])
        for shown in (
            rendering.heard(reading, Request(self.BAD)),
            rendering.continued(tokens, tokens),
            rendering.looked_at([scene], 1),
        ):
            assert "<script" not in shown and "&lt;script&gt;" in shown

    def test_every_colour_has_its_number(self):
        shown = rendering.continued([Token("a", 0.25, False), Token("b", 9.5, True)], [Token("a", 1.5, False)])
        assert "title='9.50 nats' style='background:#fb923c'" in shown and "<td class='number'>9.50</td>" in shown
        assert "Base: 0.25 nats a token" in shown and "Adapted: 1.50 nats a token" in shown

    @pytest.mark.parametrize("on_unknown", rendering.VERDICTS)
    def test_what_was_heard(self, text, on_unknown):
        known, unknown = (
            rendering.heard(text.hear(request), request)
            for request in (Request(words, on_unknown=on_unknown) for words in (SENTENCES["text"], "knitting patterns for beginners"))
        )
        assert ">known<" in known and "shakespeare" in known and "familiarity" in known and "threshold" in known
        assert ">unknown<" in unknown and rendering.VERDICTS[on_unknown] in unknown
        assert rendering.heard(None, Request("a")).count("Taken as it is") == 1

    def test_pictures_that_were_left_out_are_told(self):
        assert "2 pictures were left out" in rendering.looked_at([Scene(Image.new("RGB", (4, 4)), [], [])], 3)


class TestSpace:
    def local(self, tmp_path):
        torch.manual_seed(0)
        llama().save_pretrained(tmp_path / "base")
        layout = dataclasses.replace(llama_layout(), base_model_name_or_path=str(tmp_path / "base"))
        generator(layout).save_pretrained(tmp_path / "g")
        return ICMGenerator.from_pretrained(tmp_path / "g")

    def test_a_generator_of_this_machine_goes_along(self, hub, token, tmp_path):
        model = self.local(tmp_path)
        with pytest.raises(ValueError, match="with_base_model=True"):
            model.push_space(REPO, token=token)
        assert not hub.repos
        model.push_space(REPO, token=token, with_base_model=True)
        repo = hub.repos["spaces", REPO]
        files = repo.files()
        assert repo.private and {"app.py", "README.md", "requirements.txt", "peft_icm/app/page.py", "generator/config.json"} <= set(files)
        assert {"generator/base_model/model.safetensors", "peft_icm/hub_cards/adapter.md"} <= set(files)
        assert b"from_pretrained('generator'" in files["app.py"] and b"sdk: gradio" in files["README.md"]
        assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
        for name, content in files.items():
            if name.endswith(".py"):
                compile(content, name, "exec")

    def test_one_of_the_hub_is_named_with_its_commit(self, hub, token, tmp_path):
        info = self.local(tmp_path).push_to_hub("me/icm", token=token, with_base_model=True)
        model = ICMGenerator.from_pretrained("me/icm", cache_dir=tmp_path / "cache")
        model.push_space(REPO, token=token, private=False)
        files = hub.repos["spaces", REPO].files()
        assert f"from_pretrained('me/icm', revision='{info.oid}', subfolder='')" in files["app.py"].decode()
        assert b"- me/icm" in files["README.md"] and not [name for name in files if name.startswith("generator/")]

    def test_it_asks_for_what_the_package_asks_for(self, tmp_path):
        write_space(tmp_path, "me/icm")
        project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
        asked, wanted = (tmp_path / "requirements.txt").read_text().splitlines(), project["dependencies"]
        assert {Requirement(line) for line in asked} == {Requirement(line) for line in wanted}
        assert project["optional-dependencies"]["app"] == [f"gradio>={GRADIO.removesuffix('.0')}"]

    @pytest.mark.slow
    @pytest.mark.parametrize("hub", ["lfs"], indirect=True)
    def test_what_is_pushed_runs_on_its_own(self, hub, token, tmp_path):
        ICMGenerator.from_pretrained(bundled_generator("detection")).push_space(REPO, token=token, with_base_model=True)
        for name, content in hub.repos["spaces", REPO].files().items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(content)
        app = (tmp_path / "app.py").read_text().replace("from peft_icm.app.page import serve\n", "")
        check = (
            "import json, peft_icm\n"
            "from peft_icm.app.serving import Request, scenes, zipped\n"
            "def serve(service):\n"
            "    request = Request('detect sofas')\n"
            "    model = service.adapt(request)\n"
            "    with zipped(model): pass\n"
            "    found = service.look(model, scenes(service.hear(request)))\n"
            "    print(json.dumps([peft_icm.__file__, [label for one in found for label, *_ in one.adapted]]))\n"
        )
        options = {
            "cwd": tmp_path,
            "env": {**os.environ, "PYTHONPATH": str(tmp_path)},
            "capture_output": True,
            "text": True,
            "timeout": 300,
        }
        ran = subprocess.run([sys.executable, "-c", check + app], **options)
        assert ran.returncode == 0, ran.stderr[-2000:]
        file, labels = json.loads(ran.stdout.splitlines()[-1])
        assert file.startswith(str(tmp_path)) and "couch" in labels


def test_without_gradio_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert run("app", "bundled:text") == 2
    assert capsys.readouterr().err.strip() == (
        "peft-icm: error: The page needs gradio, which is not installed: pip install 'peft-icm[app]'."
    )


@pytest.mark.slow
def test_without_gradios_servers_one_line_says_so(tmp_path):
    pytest.importorskip("gradio", reason="--share needs gradio: pip install -e '.[app]'")
    nowhere = {name: "http://127.0.0.1:9" for name in ("HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy")}
    env = {**os.environ, **nowhere, "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
    command = [sys.executable, "-m", "peft_icm.cli", "app", "bundled:text", "--share"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=env)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.splitlines()[-1].startswith("peft-icm: error: Gradio's servers gave no public address")
    assert "Traceback" not in ran.stderr and not list(tmp_path.iterdir())
