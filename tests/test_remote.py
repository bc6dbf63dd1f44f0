"""Folders at a URL: in memory, and on an S3 server on 127.0.0.1."""

import json
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

import fsspec
import pytest
import torch
from command_line import run
from huggingface_hub import HfApi
from test_collecting import arguments, lora, same, tasks
from test_collecting_again import own_base
from tiny import CONDITION_DIM, generator, llama_lora

from peft_icm import AdapterCollection, AdapterLayout, ICMGenerator, collect, remote, save_adapter
from peft_icm.adapters.layout import ADAPTER_FILES
from peft_icm.collecting import remote as collecting_remote
from peft_icm.conditioning import load_task_encoder

KEYS = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return own_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def one(base, tmp_path_factory):
    return collect(base, tasks(), lora(), arguments(tmp_path_factory.mktemp("one")))


@pytest.fixture(scope="module")
def s3():
    """boto3's client of an S3 server with an empty bucket, which s3fs finds by its environment."""
    if not find_spec("moto") or not find_spec("s3fs"):
        pytest.skip('moto or s3fs is not installed: pip install "peft-icm[test-cluster]"')
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "a")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield boto3.client("s3", endpoint_url=f"http://{host}:{port}", **KEYS)
    server.stop()


@pytest.fixture(params=["memory", "s3"])
def place(request):
    """A URL with nothing there yet."""
    if request.param == "memory":
        yield "memory://loras"
        fsspec.filesystem("memory").rm("/", recursive=True)
    else:
        client = request.getfixturevalue("s3")
        client.create_bucket(Bucket="loras")
        yield "s3://loras/here"
        for entry in client.list_objects_v2(Bucket="loras").get("Contents", []):
            client.delete_object(Bucket="loras", Key=entry["Key"])
        client.delete_bucket(Bucket="loras")


def test_collecting_goes_on_at_a_url(base, one, place, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    collect(base, tasks(["sonnet"]), lora(), arguments(place))
    snapshots = ["sonnet/epoch-0002.safetensors", "sonnet/epoch-0003.safetensors"]
    assert sorted(remote.files(place)) == ["recipe.json", "sonnet/done.json", *snapshots]
    fs, root = fsspec.core.url_to_fs(place)
    first = fs.modified(f"{root}/{snapshots[0]}")
    assert same(one, collect(base, tasks(), lora(), arguments(f"{place}/")))
    fs.invalidate_cache()
    assert fs.modified(f"{root}/{snapshots[0]}") == first
    fs.rm_file(f"{root}/novel/done.json")
    assert same(one, collect(base, tasks(), lora(), arguments(place)))
    with pytest.raises(ValueError, match="another recipe: learning_rate was"):
        collect(base, tasks(), lora(), arguments(place, learning_rate=1.0))
    fs.rm_file(f"{root}/novel/epoch-0003.safetensors")
    with pytest.raises(ValueError, match="has 1 of 2 snapshots"):
        collect(base, tasks(), lora(), arguments(place))
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_sent_is_kept(base, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("memory://loras/sonnet cannot be written (503).")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(remote, "upload", refuse)
    monkeypatch.setattr(collecting_remote, "PAUSES", (0.0,))
    with pytest.raises(OSError, match=r"\(503\)\. Task 'sonnet' is trained and lies in .*: copy it there, and run again") as error:
        collect(base, tasks(["sonnet"]), lora(), arguments("memory://loras"))
    kept = str(error.value).partition(" lies in ")[2].partition(": copy")[0]
    assert (Path(kept) / "done.json").is_file()
    fsspec.filesystem("memory").rm("/", recursive=True)


def test_a_generator_at_a_url_is_a_folder_like_any_other(tmp_path):
    model = generator()
    model.save_pretrained(tmp_path / "g")
    remote.upload(tmp_path / "g", "memory://g", last="config.json")
    found = ICMGenerator.from_pretrained("memory://g")
    assert os.path.isdir(found.name_or_path) and getattr(found.config, "_commit_hash", None) is None
    vector = torch.randn(CONDITION_DIM)
    torch.testing.assert_close(found.sample(vector, temperature=0.0), model.sample(vector, temperature=0.0))
    with pytest.raises(OSError, match="memory:/+h is a URL, and this is written into folders"):
        found.save_pretrained("memory://h")
    fsspec.filesystem("memory").rm("/", recursive=True)


def test_of_an_adapter_at_a_url_only_its_own_files_are_copied(place, tmp_path):
    model = llama_lora()
    save_adapter(model, tmp_path / "a")
    (tmp_path / "a" / "checkpoint-1").mkdir()
    for name in ("optimizer.pt", "checkpoint-1/optimizer.pt"):
        (tmp_path / "a" / name).write_text("large")
    remote.upload(tmp_path / "a", f"{place}/a", last="adapter_config.json")
    assert AdapterLayout.from_pretrained(f"{place}/a").fingerprint == AdapterLayout.from_peft_model(model).fingerprint
    copies = remote.cached(f"{place}/a", ADAPTER_FILES)
    assert sorted(file.relative_to(copies).as_posix() for file in copies.rglob("*")) == ["adapter_config.json", "adapter_model.safetensors"]
    assert (remote.cached(f"{place}/a") / "optimizer.pt").is_file()
    with pytest.raises(OSError, match=r"a cannot be read \(FileNotFoundError: there is no file x or y\*\)"):
        remote.cached(f"{place}/a", ["x", "y*"])


@pytest.mark.parametrize("checkpoint", ["hf-hub:file:///somewhere/encoder", "s3://bucket/encoder", "hf-hub:http://127.0.0.1:9/x"])
def test_a_repo_names_no_url(checkpoint):
    config = {"kind": "clip", "checkpoint": checkpoint, "sha256": "0"}
    with pytest.raises(ValueError, match="or a URL: a repo may only name other repos"):
        load_task_encoder(config, from_hub=True)


class TestNotThere:
    def test_a_store_that_nobody_knows(self, base):
        with pytest.raises(OSError, match=r"nostore://x cannot be read .*Protocol not known: nostore") as error:
            collect(base, tasks(["sonnet"]), lora(), arguments("nostore://x"))
        assert "\n" not in str(error.value)

    def test_a_bucket(self, base, s3):
        with pytest.raises(
            OSError, match=r"s3://nowhere/x/recipe.json cannot be written .*: check that its bucket or repo is there"
        ) as error:
            collect(base, tasks(["sonnet"]), lora(), arguments("s3://nowhere/x"))
        assert "\n" not in str(error.value)
        assert not [bucket for bucket in s3.list_buckets()["Buckets"] if bucket["Name"] == "nowhere"]

    def test_rights(self, base, s3):
        s3.create_bucket(Bucket="theirs")
        collect(base, tasks(["sonnet"]), lora(), arguments("s3://theirs/x"))
        deny = {"Effect": "Deny", "Principal": "*", "Action": "s3:PutObject", "Resource": "arn:aws:s3:::theirs/*"}
        s3.put_bucket_policy(Bucket="theirs", Policy=json.dumps({"Version": "2012-10-17", "Statement": [deny]}))
        with pytest.raises(OSError, match=r"s3://theirs/x/recipe.json cannot be written \(PermissionError: .*that you may use it") as error:
            collect(base, tasks(), lora(), arguments("s3://theirs/x"))
        assert "\n" not in str(error.value)
        assert "sonnet/done.json" in remote.files("s3://theirs/x")


class TestACollection:
    def test_is_saved_and_loaded(self, one, place):
        one.save_pretrained(place)
        found = AdapterCollection.from_pretrained(place)
        assert same(one, found) and found.descriptions == one.descriptions
        assert remote.cached(place) == remote.cached(place)
        descriptions = {task: ["other words"] for task in one.tasks}
        AdapterCollection(one.layout, one.snapshots, descriptions).save_pretrained(place)
        assert AdapterCollection.from_pretrained(place).descriptions == descriptions

    def test_in_a_folder_that_is_named_as_a_url(self, one, tmp_path):
        one.save_pretrained(f"file://{tmp_path}/c")
        assert same(one, AdapterCollection.from_pretrained(f"file://{tmp_path}/c"))

    def test_that_is_not_there(self, place):
        with pytest.raises(OSError, match=rf"{place}/none cannot be read \(FileNotFoundError: .*\): check that") as error:
            AdapterCollection.from_pretrained(f"{place}/none")
        assert "\n" not in str(error.value)

    def test_in_a_repo_of_the_hub_is_one_commit(self, one, hub, token, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", token)
        HfApi().create_repo("org/loras", repo_type="dataset")
        before = len(hub.repos["datasets", "org/loras"].commits)
        one.save_pretrained("hf://datasets/org/loras")
        assert len(hub.repos["datasets", "org/loras"].commits) == before + 1
        assert same(one, AdapterCollection.from_pretrained("hf://datasets/org/loras"))

    def test_by_the_command_line(self, work, place, capsys):
        arguments = ["collect", work / "base", "--tasks", work / "tasks", "-o", f"{place}/c", "--epochs", 6, "--snapshots", 5,
                     "--block-size", 32, "--learning-rate", 0.01, "--json"]  # fmt: skip
        assert run(*arguments) == 0 and run(*arguments) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["collection"] == f"{place}/c"
        assert same(AdapterCollection.from_pretrained(work / "collection"), AdapterCollection.from_pretrained(f"{place}/c"))
        assert run("train", f"{place}/c", "-o", f"{place}/g") == 2
        assert "is a URL, and only collect writes to one" in capsys.readouterr().err


class TestAFolder:
    def test_a_name_that_leads_out(self, tmp_path):
        fsspec.filesystem("memory").pipe_file("/x", b"")
        with pytest.raises(ValueError, match="leads out of"):
            remote.download("memory://loras", ["../x"], tmp_path)

    def test_what_is_cut_short_is_not_there(self, place, tmp_path):
        """The file that is written last is the only one that says that there is a folder."""
        (tmp_path / "deep").mkdir()
        for name in ("done.json", "deep/tensors"):
            (tmp_path / name).write_text("1")
        remote.upload(tmp_path, place, last="done.json")
        assert sorted(remote.files(place)) == ["deep/tensors", "done.json"]
        (tmp_path / "z").symlink_to("/proc/self/mem")  # cannot be read
        with pytest.raises(OSError, match=f"{place} cannot be written"):
            remote.upload(tmp_path, place, last="done.json")
        assert not remote.has(f"{place}/done.json") and remote.has(f"{place}/deep/tensors")
