"""Names, paths, and files and folders that are old or new, never half."""

import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_icm.disk import inside, replacing_file, replacing_folder, safe_name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "...", "a/b", "a\\b", "/etc", "../x", "a\nb", "a\x00b", " a", "a ", "c:x", "x" * 201, "ä" * 101, None, 3]
)
def test_names_that_are_no_plain_file_names_are_refused(name):
    with pytest.raises(ValueError, match="task name"):
        safe_name(name, "task")


@given(st.text(min_size=1, max_size=60))
def test_a_safe_name_stays_in_its_folder(tmp_path_factory, name):
    try:
        safe_name(name, "task")
    except ValueError:
        return
    root = tmp_path_factory.getbasetemp()
    assert (root / name).parent == root
    assert inside(root, name).name == name


def test_a_symbolic_link_out_of_the_folder_is_not_followed(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path)
    for path in ("link", "link/x", "..", "../x", str(tmp_path), "."):
        with pytest.raises(ValueError, match="leads out of"):
            inside(tmp_path / "in", path)


def test_a_file_is_old_or_new_with_the_umasks_permissions(tmp_path):
    file = tmp_path / "f"
    file.write_text("old")
    with pytest.raises(RuntimeError), replacing_file(file) as temporary:
        temporary.write_text("ha")
        raise RuntimeError
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]
    with replacing_file(file) as temporary:
        temporary.write_text("new")
    plain = tmp_path / "plain"
    plain.touch()
    assert file.read_text() == "new"
    assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_a_mount_point_is_refused_before_anything_is_written():
    with pytest.raises(OSError, match="/proc is a mount point, .* choose a folder in it"), replacing_folder("/proc"):
        pytest.fail("it was written to")


def test_a_folder_is_old_or_new_and_keeps_what_is_not_replaced(tmp_path):
    folder = tmp_path / "d"
    with replacing_folder(folder) as new:
        (new / "a").write_text("1")
    (folder / "mine").write_text("m")
    (folder / "sub").mkdir()
    (folder / "sub" / "x").write_text("x")
    with pytest.raises(RuntimeError), replacing_folder(folder) as new:
        (new / "a").write_text("half")
        raise RuntimeError
    assert (folder / "a").read_text() == "1"
    with replacing_folder(folder) as new:
        (new / "a").write_text("2")
    assert {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()} == {
        "a": "2",
        "mine": "m",
        "sub/x": "x",
    }
    assert os.listdir(tmp_path) == ["d"]
    plain = tmp_path / "plain"
    plain.mkdir()
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "f").touch()
    with pytest.raises(OSError, match="is a file"), replacing_folder(tmp_path / "f"):
        raise AssertionError
