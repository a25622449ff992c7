"""What a run is given at its start, and when it goes on."""

from types import SimpleNamespace

from longtail_experts.tracking import experts


def test_a_run_that_is_resumed_by_several_commits_names_all_that_it_was_not_begun_with(
    monkeypatch,
):
    run = SimpleNamespace(tags={"git.commit": "a", "device": "cuda"})
    for number, commit in enumerate(["a", "b", "c", "b", "a"], start=1):
        now = {"git.commit": commit, "device": "cuda"}
        monkeypatch.setattr(experts, "machine_tags", lambda _, now=now: now)
        run.tags |= experts.tags_of_resumed(run, config=None)
        assert run.tags["resumed"] == str(number)
    assert run.tags["resumed.git.commit"] == "b, c"
    assert "resumed.device" not in run.tags
