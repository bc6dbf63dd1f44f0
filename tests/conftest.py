"""One Hub on 127.0.0.1 for the whole session, set up before huggingface_hub reads its environment."""

import os
import tempfile

from hub_server import TOKEN, Hub

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    # Each worker, and each process that it starts, gets its share of the cores: processes that share cores run ten times slower.
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))
_hub = Hub()
_home = tempfile.TemporaryDirectory()
os.environ |= {
    "HF_ENDPOINT": _hub.url,
    "HF_HOME": _home.name,
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
os.environ.pop("HF_TOKEN", None)

import pytest  # noqa: E402


@pytest.fixture(params=["regular", "lfs"])
def hub(request):
    """An empty Hub, in each of the two upload modes."""
    _hub.__dict__ |= {"repos": {}, "objects": {}, "requests": [], "cut": None, "trouble": {}, "pull_requests": 0}
    _hub.lfs_above = 0 if request.param == "lfs" else 10**9
    return _hub


@pytest.fixture
def token():
    return TOKEN


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A folder with a tiny base, tasks of real text, and what `collect` makes of them."""
    from command_line import make_work

    return make_work(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="session")
def trained(work, tmp_path_factory):
    """A small generator of those LoRAs, that hears sentences."""
    from command_line import run

    folder = tmp_path_factory.mktemp("trained") / "generator"
    sizes = ["--latent-size", 4, "--hidden-size", 16, "--epochs", 30]
    assert run("train", work / "collection", "-o", folder, "--encoder", "bundled:text", *sizes, "--json") == 0
    return folder


@pytest.fixture
def base(tmp_path):
    """A tiny Llama in a folder."""
    import torch
    from tiny import llama

    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """A world of text tasks on a tiny Llama."""
    from task_worlds import text_world

    return text_world(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def detection(tmp_path_factory):
    """A world of detection tasks on a tiny Florence-2."""
    from task_worlds import detection_world

    return detection_world(tmp_path_factory.mktemp("florence"))
