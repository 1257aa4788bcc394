"""Where a job's secret may lie, and what is proved with it."""

import hashlib
import hmac
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slora_dist import secret
from slora_dist.cli import main
from slora_dist.errors import ConfigError

GOOD = "0123456789abcdef" * 4


def test_none_is_found_where_none_is_given() -> None:
    assert secret.find({}) is None and secret.find({"SLORA_DIST_SECRET": ""}) is None


def test_the_environment_and_a_file_give_the_same(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text(GOOD + "\n")
    path.chmod(0o400)
    assert secret.find({"SLORA_DIST_SECRET": GOOD}) == secret.find({"SLORA_DIST_SECRET_FILE": str(path)}) == GOOD.encode()
    assert secret.find({"SLORA_DIST_SECRET": "another one of text", "SLORA_DIST_SECRET_FILE": str(path)}) == b"another one of text"


def test_the_command_makes_a_private_file_that_is_found(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / "one", tmp_path / "two"]
    before = os.umask(0)
    try:
        assert [main(["secret", str(path)]) for path in paths] == [0, 0]
    finally:
        os.umask(before)
    assert paths[0].stat().st_mode & 0o777 == 0o600
    found = [secret.find({"SLORA_DIST_SECRET_FILE": str(path)}) for path in paths]
    assert found[0] and found[1] and len(found[0]) == 64 and found[0] != found[1]
    assert found[0].decode() not in capfd.readouterr().out
    assert main(["secret", str(paths[0])]) == 2 and "cannot be made" in capfd.readouterr().err


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o620, 0o700, 0o666])
def test_a_file_that_others_may_read_is_refused(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text(GOOD)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"has mode 0{mode:o}") as error:
        secret.find({"SLORA_DIST_SECRET_FILE": str(path)})
    assert error.value.setting == "SLORA_DIST_SECRET_FILE"


def test_what_is_no_file_of_the_users_own_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    path = tmp_path / "secret"
    path.write_text(GOOD)
    path.chmod(0o600)
    for name, problem in (("pipe", "no regular file"), (".", "cannot be read"), ("nowhere", "cannot be read")):
        with pytest.raises(ConfigError, match=problem):
            secret.find({"SLORA_DIST_SECRET_FILE": str(tmp_path / name)})
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(ConfigError, match="belongs to another user"):
        secret.find({"SLORA_DIST_SECRET_FILE": str(path)})


@pytest.mark.parametrize("text", ["short", "x" * 5000, " " * 40])
def test_a_secret_is_neither_short_nor_endless(text: str) -> None:
    with pytest.raises(ConfigError, match="16 to 4096 bytes"):
        secret.find({"SLORA_DIST_SECRET": text})


def test_a_proof_is_hmac_sha256() -> None:
    whole = (2).to_bytes(8, "little") + b"ab" + (0).to_bytes(8, "little")
    assert secret.proof(b"key", b"ab", b"") == hmac.new(b"key", whole, hashlib.sha256).digest()


@given(st.lists(st.binary(max_size=6), max_size=4), st.lists(st.binary(max_size=6), max_size=4))
def test_only_the_same_parts_have_the_same_proof(one: list[bytes], other: list[bytes]) -> None:
    assert secret.holds(secret.proof(b"key", *one), b"key", *other) == (one == other)
    assert not secret.holds(secret.proof(b"key", *one), b"another key", *one)
