import mlflow
from mlflow import MlflowClient

from longtail_experts.cli import main


def test_data_records_splits_without_an_expert(store, tiny_arguments, capsys):
    assert main(["data", *tiny_arguments]) == 0
    experiment = mlflow.get_experiment_by_name("tests").experiment_id
    (run,) = MlflowClient().search_runs([experiment])
    assert run.data.tags["stage"] == "data"
    assert run.info.run_name == "data images split_seed 42"
    assert "expert" not in run.data.tags
    found = {dataset.dataset.name: dataset for dataset in run.inputs.dataset_inputs}
    assert set(found) == {
        "train", "tuneV", "val_small", "calib", "val_lt", "test_lt", "test_balanced"
    }  # fmt: skip
    for name, dataset in found.items():
        assert [(tag.key, tag.value) for tag in dataset.tags] == [("mlflow.data.context", name)]
        assert run.data.params["splits_sha256"].startswith(dataset.dataset.digest)
    artifacts = {item.path for item in MlflowClient().list_artifacts(run.info.run_id)}
    assert artifacts == {"splits", "figures", "report.md"}
    assert "disjoint by index" in run.data.tags["mlflow.note.content"]
    assert "| train | 63 |" in capsys.readouterr().out
