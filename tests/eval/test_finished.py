from eval.finished import Finished, number_repeats, request_key


def test_records_survive(tmp_path):
    path = tmp_path / "folder" / "finished.jsonl"
    Finished(path).add([{"key": "a", "text": "né\n"}, {"key": "b", "text": ""}])
    again = Finished(path)
    assert "a" in again and again["a"]["text"] == "né\n" and "c" not in again
    again.add([{"key": "c", "text": "x"}])
    assert set(Finished(path).records) == {"a", "b", "c"}


def test_a_line_that_a_kill_cut_is_skipped_and_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "finished.jsonl"
    Finished(path).add([{"key": "a", "text": "1"}, {"key": "b", "text": "2"}])
    path.write_text(path.read_text()[:-9])
    again = Finished(path)
    assert "a" in again and "b" not in again
    again.add([{"key": "b", "text": "2"}])
    assert set(Finished(path).records) == {"a", "b"}


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finished = Finished()
    finished.add([{"key": "a"}])
    assert "a" in finished and list(tmp_path.iterdir()) == []


def test_keys_tell_requests_and_repeats_apart():
    base = request_key(["NextTokenDecoder()", "model"], "prompt", {"until": ["\n"]})
    assert base == request_key(["NextTokenDecoder()", "model"], "prompt", {"until": ["\n"]})
    others = [
        request_key(["SetBlockDecoder()", "model"], "prompt", {"until": ["\n"]}),
        request_key(["NextTokenDecoder()", "model"], "prompt 2", {"until": ["\n"]}),
        request_key(["NextTokenDecoder()", "model"], "prompt", {"until": []}),
    ]
    assert len({base, *others}) == 4
    assert len(set(number_repeats([base] * 3))) == 3
