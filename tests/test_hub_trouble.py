"""A Hub that refuses, breaks off, is silent or is none, and a disk that is full: one line that says what to do, and nothing half."""

import errno
import socket
import threading
import uuid
from pathlib import Path

import pytest
from hub_server import TOKEN, Repo
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from tiny import generator

from peft_icm import AdapterCollection, ICMGenerator
from peft_icm.hub.files import resolve
from peft_icm.hub.reasons import why_not_read

REPO = "org/icm-tiny"
FILES = {"config.json": b"{}", "model.safetensors": b"weights" * 1000}
ASKED = {  # the questions of a download, in their order
    "revision": f"/api/models/{REPO}/revision",
    "tree": f"/api/models/{REPO}/tree",
    "file": f"/{REPO}/resolve",
}
STATUSES = {
    401: "the access token is missing or wrong: pass token=, or log in with `hf auth login`.",
    403: "the access token has no right to it: pass the token= of an account that has it.",
    404: "there is no such repo, revision or file: check the spelling.",
    429: "too many requests: wait a while, or pass token=.",
    500: "try again later.",
    503: "try again later.",
}


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """huggingface_hub asks up to six times; its pauses and its patience are cut short."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.3)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    monkeypatch.setattr("huggingface_hub.file_download._ETAG_RETRY_TIMEOUT", 0.3, raising=False)


@pytest.fixture
def repo(hub):
    """A repo of two files."""
    hub.repos["models", REPO] = Repo()
    hub.repos["models", REPO].commit("main", FILES, "files")
    return hub


@pytest.fixture
def nobody(monkeypatch):
    """No one listens where the Hub should be."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")


def said(cache, name=REPO, **options):
    """What is said of a repo that cannot be read: one line."""
    with pytest.raises(OSError) as error:
        resolve(name, cache_dir=cache, allow_patterns=["*.json", "*.safetensors"], **options)
    assert type(error.value) is OSError and "\n" not in str(error.value)
    return str(error.value)


def whole(cache, **options):
    folder = resolve(REPO, cache_dir=cache, **options)
    return {file.name: file.read_bytes() for file in folder.iterdir()} == FILES


class TestPull:
    @pytest.mark.parametrize("asked", ASKED)
    @pytest.mark.parametrize("status", STATUSES)
    def test_a_status_is_told_with_what_to_do(self, repo, tmp_path, status, asked):
        repo.trouble = {ASKED[asked]: (status, "")}
        assert said(tmp_path) == f"{REPO} could not be read, the Hub answered {status}: {STATUSES[status]}"
        repo.trouble = {}
        assert whole(tmp_path)

    @pytest.mark.parametrize("asked", ASKED)
    @pytest.mark.parametrize(
        ("status", "code", "told"),
        [
            (401, "RepoNotFound", f"{REPO} is neither a folder nor a model repo that you may read: check the spelling, or pass token=."),
            (403, "GatedRepo", f"{REPO} is gated: ask for access on its page of the Hub, and pass the token= of an account that has it."),
            (404, "RevisionNotFound", f"{REPO} has no revision 'v9': pass a branch, a tag or a commit that exists."),
            (418, "", f"{REPO} could not be read, the Hub answered 418: "),
        ],
    )
    def test_so_is_a_code_of_the_hub(self, repo, tmp_path, status, code, told, asked):
        repo.repos["models", REPO].branches["v9"] = repo.repos["models", REPO].branches["main"]
        repo.trouble = {ASKED[asked]: (status, code)}
        assert said(tmp_path, revision="v9").startswith(told)

    def test_no_repo_no_revision_no_file_no_name(self, repo, tmp_path):
        assert "is neither a folder nor a model repo" in said(tmp_path, "org/misspelt")
        assert "org/misspelt is neither a folder nor a dataset repo" in said(tmp_path, "org/misspelt", repo_type="dataset")
        assert "has no revision 'v9'" in said(tmp_path, revision="v9")
        assert said(tmp_path, "a/b/c") == "'a/b/c' is neither an existing folder nor the id of a Hub repo ('org/name')."
        with pytest.raises(OSError, match=f"^{REPO} has no file adapter_. or \\*.txt: is it what was meant"):
            resolve(REPO, cache_dir=tmp_path, allow_patterns=["adapter_*", "*.txt"])

    @pytest.mark.parametrize("asked", ["revision", "file"])
    def test_a_silent_hub_is_not_waited_for(self, repo, tmp_path, asked):
        repo.trouble = {ASKED[asked]: threading.Event()}
        assert said(tmp_path) == f"{REPO} could not be read, the Hub did not answer (ReadTimeout): check the connection."
        repo.trouble.popitem()[1].set()
        assert whole(tmp_path)

    def test_nobody_listens(self, repo, nobody, tmp_path):
        assert said(tmp_path) == f"{REPO} could not be read, the Hub did not answer (ConnectError): check the connection."

    def test_the_page_of_a_proxy_is_no_hub(self, repo, tmp_path):
        repo.trouble = {ASKED["revision"]: b"<html>Please log in"}
        assert said(tmp_path).startswith(f"{REPO} could not be read, what answers at {repo.url} is no Hub: check HF_ENDPOINT")

    def test_cut_in_mid_download(self, repo, tmp_path):
        repo.cut = "model.safetensors"
        assert said(tmp_path) == f"{REPO} could not be read, the Hub did not answer (RemoteProtocolError): check the connection."
        assert not list(tmp_path.rglob("model.safetensors"))
        repo.cut = None
        assert whole(tmp_path)

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
    def test_a_full_disk(self, repo, tmp_path, monkeypatch):
        assert whole(tmp_path / "ample")
        for blob in (tmp_path / "ample").rglob("blobs/*"):  # where the unfinished files will be written
            unfinished = tmp_path / "full" / blob.relative_to(tmp_path / "ample").with_name(f"{blob.name}.{'0' * 8}.incomplete")
            unfinished.parent.mkdir(parents=True, exist_ok=True)
            unfinished.symlink_to("/dev/full")
        monkeypatch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=0))
        full = tmp_path / "full"
        assert said(full) == f"{REPO} could not be downloaded, the disk of {full} is full: make room there, or pass cache_dir= of another."

    def test_a_quota_is_a_full_disk_and_a_cache_that_cannot_be_written_is_named(self, repo, tmp_path):
        facts = {"name": REPO, "repo_type": "model", "revision": None}
        assert "the disk of /cache is full" in why_not_read(OSError(errno.EDQUOT, "Disk quota exceeded"), "/cache", **facts)
        (tmp_path / "file").write_text("mine")
        assert said(tmp_path / "file").startswith(f"{REPO} could not be written to {tmp_path / 'file'} ([Errno 20]")

    @pytest.mark.parametrize("trouble", [(500, ""), (429, ""), (401, ""), threading.Event()])
    def test_what_is_in_the_cache_does_without_the_hub(self, repo, tmp_path, trouble):
        assert whole(tmp_path)
        repo.trouble = {"/": trouble}
        assert whole(tmp_path)

    def test_half_of_it_in_the_cache_does_not(self, repo, tmp_path):
        resolve(REPO, cache_dir=tmp_path, allow_patterns=["config.json"])
        repo.trouble = {"/": (500, "")}
        assert said(tmp_path) == f"{REPO} could not be read, the Hub answered 500: try again later."
        with pytest.raises(OSError, match="the Hub answered 500"):
            resolve(REPO, cache_dir=tmp_path, allow_patterns=["*.txt"])

    def test_offline(self, repo, tmp_path, monkeypatch):
        assert said(tmp_path, local_files_only=True).endswith("not whole: download it first, without local_files_only=.")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert said(tmp_path).endswith("not whole: download it first, without HF_HUB_OFFLINE.")

    @pytest.mark.parametrize("kind", [ICMGenerator, AdapterCollection])
    def test_everything_that_is_loaded_says_it(self, hub, tmp_path, kind):
        with pytest.raises(OSError, match="org/misspelt is neither a folder nor a (model|dataset) repo"):
            kind.from_pretrained("org/misspelt", cache_dir=tmp_path)
        hub.trouble = {"/api": (429, "")}
        with pytest.raises(OSError, match="org/misspelt could not be read, the Hub answered 429: too many requests"):
            kind.from_pretrained("org/misspelt", cache_dir=tmp_path)


class TestPush:
    """One line of the type that huggingface_hub raises, and nothing is committed."""

    @pytest.mark.parametrize(
        ("asked", "lfs_above", "status"),
        [
            *((f"/api/models/{REPO}/commit", 10**9, status) for status in STATUSES),
            (f"/api/models/{REPO}/preupload", 10**9, 403),
            (f"/{REPO}.git/info/lfs", 0, 403),
            ("/upload", 0, 403),
            ("/upload", 0, 500),
        ],
    )
    @pytest.mark.parametrize("hub", ["lfs"], indirect=True)
    def test_a_failed_upload_commits_nothing(self, hub, asked, lfs_above, status):
        hub.lfs_above = lfs_above
        model = generator()
        model.push_to_hub(REPO, token=TOKEN)
        before = dict(hub.repos["models", REPO].branches)
        model.statistics.mean += 1  # weights that the Hub does not have yet
        hub.trouble = {asked: (status, "")}
        with pytest.raises(HfHubHTTPError) as error:
            model.push_to_hub(REPO, token=TOKEN)
        assert str(error.value) == f"{REPO} was not pushed, the Hub answered {status}: {STATUSES[status]}"
        assert error.value.response.status_code == status and hub.repos["models", REPO].branches == before
        hub.trouble = {}
        model.push_to_hub(REPO, token=TOKEN)
        assert hub.repos["models", REPO].branches != before

    def test_a_repo_that_may_not_be_made(self, hub):
        hub.trouble = {"/api/repos/create": (403, "")}
        with pytest.raises(HfHubHTTPError, match=f"^{REPO} was not pushed, the Hub answered 403: the access token has no right"):
            generator().push_to_hub(REPO, token=TOKEN)
        assert not hub.repos

    def test_no_token(self, hub):
        with pytest.raises(HfHubHTTPError, match=f"^{REPO} was not pushed, the Hub answered 401: the access token is missing or wrong"):
            generator().push_to_hub(REPO, token=False)
        assert not hub.repos

    def test_nobody_listens(self, hub, nobody):
        with pytest.raises(OSError, match=rf"^{REPO} was not pushed, the Hub did not answer \(ConnectError\): check the connection.$"):
            generator().push_to_hub(REPO, token=TOKEN)

    def test_the_page_of_a_proxy_is_no_hub(self, hub):
        hub.trouble = {"/api/repos/create": b"<html>Please log in"}
        with pytest.raises(OSError, match=f"^{REPO} was not pushed, what answers at {hub.url} is no Hub"):
            generator().push_to_hub(REPO, token=TOKEN)
