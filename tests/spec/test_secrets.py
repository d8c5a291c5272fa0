"""Secrets are found by name, place and form, and the words of every day are none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from piper_hpc.spec.secrets import NOT_SHOWN, has_secret, hidden

GITHUB = "ghp_" + "aB3" * 12


@pytest.mark.parametrize(
    "text",
    [
        "WANDB_API_KEY=hunter2",
        "ALL,HF_TOKEN=hunter2,NCCL_DEBUG=INFO",
        "apptainer exec --env AWS_SECRET_ACCESS_KEY=hunter2 image.sif",
        "+cluster.environment.MY_PASSWORD=hunter2",
        "https://ada:hunter2@example.org/repository.git",
        "https://hunter2@example.org/repository.git",
        "postgresql://ada:hunter2@db/runs",
    ],
)
def test_a_secret_is_hidden_and_what_is_around_it_stays(text):
    assert "hunter2" not in hidden(text, {}) and NOT_SHOWN in hidden(text, {})
    assert hidden(text, {}).replace(NOT_SHOWN, "") in (
        text.replace("ada:hunter2", "").replace("hunter2", ""),
        text.replace("hunter2", ""),
    )


@pytest.mark.parametrize("text", [GITHUB, "hf_" + "a" * 34, "AKIA" + "A1B2" * 4, "local-" + "0f" * 20])
def test_tokens_are_known_by_their_form(text):
    assert hidden(f"run of {text}, again", {}) == f"run of {NOT_SHOWN}, again"


@pytest.mark.parametrize(
    "text",
    [
        *("train.steps=50", "model.groups_per_token=4", "cluster.account=abc123", "data.path=/data/keys/a.txt"),
        *("apptainer exec --bind /a:/b image.sif", "git@github.com:ada/piper.git", "ssh://git@github.com/ada/piper"),
        *("cluster.constraint=gpu&hbm80g", "task.resume=20261129-165040-aabbccdd", "a=b@c", "+x.key=null", ""),
    ],
)
def test_what_is_none_stays(text):
    assert not has_secret(text, {})


def test_the_value_of_a_secret_variable_is_found_wherever_it_went():
    environ = {"WANDB_API_KEY": "0123456789abcdef0123", "PATH": "/usr/bin:/bin:/usr/local/bin", "A_TOKEN": "short"}
    environ["GOOGLE_APPLICATION_CREDENTIALS"] = "/home/ada/credentials.json"
    assert hidden("tracking.entity=0123456789abcdef0123", environ) == f"tracking.entity={NOT_SHOWN}"
    assert not has_secret("short /usr/bin:/bin:/usr/local/bin /home/ada/credentials.json", environ)


@given(st.text())
def test_hiding_twice_is_hiding_once(text):
    once = hidden(text, {})
    assert hidden(once, {}).replace(NOT_SHOWN, "") == once.replace(NOT_SHOWN, "")
