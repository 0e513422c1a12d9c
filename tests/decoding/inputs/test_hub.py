"""A hub that cannot be reached costs no minute of waiting, and what was downloaded before is still found."""

import pytest
from huggingface_hub import constants

from decoding.forward.loading import load_config, load_tokenizer, load_weights
from decoding.inputs import hub
from decoding.inputs.hub import hub_or_cache


class Session:
    """An HTTP client that counts what is asked of it, and gets an answer or none."""

    def __init__(self, answers: bool):
        self.answers, self.asked = answers, 0

    def head(self, url, timeout):
        self.asked += 1
        if not self.answers:
            raise OSError("Name or service not known")


@pytest.fixture
def session(monkeypatch):
    """``session(answers)``: the one that the hub is asked with from now on."""

    def use(answers: bool) -> Session:
        made = Session(answers)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "get_session", lambda: made)
        return made

    return use


@pytest.mark.parametrize("answers", [True, False])
def test_offline_only_where_nothing_answers_and_only_inside(session, answers):
    asked = session(answers)
    with hub_or_cache():
        assert constants.is_offline_mode() == (not answers)
    with pytest.raises(KeyError), hub_or_cache():
        raise KeyError
    assert not constants.is_offline_mode() and asked.asked == 2


def test_nobody_is_asked_for_a_folder_or_offline(session, tmp_path, monkeypatch):
    asked = session(False)
    with hub_or_cache(str(tmp_path)):
        assert not constants.is_offline_mode()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with hub_or_cache():
        assert constants.is_offline_mode()
    assert constants.is_offline_mode() and not asked.asked


@pytest.mark.parametrize("load", [load_tokenizer, load_config, load_weights])
def test_a_model_that_is_not_there_is_said_without_trying_again(session, monkeypatch, load):
    session(False)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it waits to try again"))
    with pytest.raises(ValueError, match="model 'owner/name' cannot be loaded"):
        load("owner/name")


def test_a_data_set_that_is_not_there_is_said_without_trying_again(session, monkeypatch):
    pytest.importorskip("datasets", reason="needs datasets: install the extra [train]")
    from finetune.data import read_texts

    session(False)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it waits to try again"))
    with pytest.raises(ValueError, match="data: 'owner/name' cannot be read"):
        read_texts(["owner/name"])


def test_a_task_whose_data_set_is_not_there_is_said_without_trying_again(session, monkeypatch):
    pytest.importorskip("lm_eval", reason="needs lm_eval: install the extra [eval]")
    from eval.tasks import load_task

    session(False)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it waits to try again"))
    with pytest.raises(ValueError, match="the data set of task 'arc_easy' cannot be loaded"):
        load_task("arc_easy")
