"""The Ray that a job runs on: its token is for its owner."""

from __future__ import annotations

from pathlib import Path

import pytest

from vladva.core.ray_tasks import protect_token


def test_the_token_is_for_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = tmp_path / "auth_token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    protect_token()  # there is none
    token.write_text("secret")
    token.chmod(0o644)
    protect_token()
    assert token.stat().st_mode & 0o777 == 0o600
    token.chmod(0o400)
    protect_token()
    assert token.stat().st_mode & 0o777 == 0o400
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    default = tmp_path / ".ray" / "auth_token"
    default.write_text("secret")
    default.chmod(0o644)
    protect_token()
    assert default.stat().st_mode & 0o777 == 0o600
