"""What a person sees: `mlflow ui` in a browser on the finished experts, and the comparison page.

Screenshots are kept in LONGTAIL_SCREENSHOTS where that is set, else in a temporary folder; pytest
says at its end where they are.
"""

import json
import re
import shutil
from pathlib import Path
from urllib.parse import quote

import mlflow
import pytest
from reliability.harness import wait_until
from reliability.servers import Server

from longtail_experts.config import MLFLOW_RUN, load_config
from longtail_experts.tracking.experts import start_expert_run
from longtail_experts.tracking.runs import Run

playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.browser
LOSSES = ("ce", "logit_adjust", "balanced_softmax")
PATIENCE = 90_000  # milliseconds: a page that is being built on a busy machine
IS_DRAWN = "image => image.complete && image.naturalWidth > 300"


@pytest.fixture(scope="module")
def ui(three_experts, tmp_path_factory):
    """`mlflow ui` on the store of the three experts."""
    database = Path(three_experts["folder"]) / "mlflow.db"
    folder = tmp_path_factory.mktemp("ui")
    server = Server(folder, "ui", "--backend-store-uri", f"sqlite:///{database}")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Its profile is on disk, where it keeps MLflow's scripts as compiled for the next window."""
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"),
            executable_path=shutil.which("chromium"),
            args=["--no-sandbox", "--disable-gpu"],
            viewport={"width": 1500, "height": 1200},
        )
        chromium.set_default_timeout(PATIENCE)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, screenshots, request):
    """A window; a picture of what it showed at the end is kept."""
    window = browser.new_page()
    yield window
    window.screenshot(path=screenshots / f"{request.node.name}.png")
    window.close()


@pytest.fixture
def experiment(finished) -> str:
    return mlflow.MlflowClient().get_run(finished["all"]).info.experiment_id


@pytest.fixture
def measured(finished, monkeypatch) -> Run:
    """An expert's run with system metrics, which the other tests do without."""
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "with-system-metrics")
    monkeypatch.delenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.3")
    mlflow.tracking.fluent._active_experiment_id = None
    with start_expert_run(load_config("demo", {}), "main") as run:
        wait_until(lambda: len(run.history("system/cpu_utilization_percentage")) > 1, 60)
    mlflow.tracking.fluent._active_experiment_id = None
    return run


@pytest.fixture
def open_run_page(ui, page, experiment, finished):
    def go(which: str, part: str = "") -> None:
        page.goto(f"{ui.url}/#/experiments/{experiment}/runs/{finished[which]}{part}")

    return go


def see(page, text: str | re.Pattern):
    """Wait until `text` can be seen."""
    found = page.get_by_text(text).first
    found.wait_for(state="visible")
    return found


def test_the_runs_table_and_the_parents_page_name_the_experts(ui, open_run_page, page, experiment):
    page.goto(f"{ui.url}/#/experiments/{experiment}/runs")
    see(page, "all experts images seed 0")
    see(page, re.compile("4.matching runs"))
    open_run_page("all")
    for loss in LOSSES:
        see(page, f"{loss} images seed 0")


def test_an_experts_page_opens_with_its_result(open_run_page, page, finished):
    open_run_page("logit_adjust")
    run = mlflow.MlflowClient().get_run(finished["logit_adjust"])
    balanced = run.data.metrics["test_balanced/balanced_accuracy"]
    see(page, f"logit_adjust: test_balanced balanced accuracy {100 * balanced:.2f} %")
    page.get_by_text("Show more", exact=True).first.click()
    name = page.get_by_role("cell", name="balanced", exact=True).first
    row = name.locator("xpath=..").inner_text()
    assert row.split()[:3] == ["balanced", f"{100 * balanced:.2f}", "±"]
    see(page, "Success checklist")
    see(page, f"{MLFLOW_RUN} -P loss=logit_adjust -P config=cifar100_lt -P source=images")
    see(page, run.data.params["splits_sha256"][:12])
    see(page, run.data.tags["git.commit"][:12] if "git.commit" in run.data.tags else "unknown")


def test_the_curves_on_an_experts_page_fit_beside_the_facts(open_run_page, page):
    """A description shows pictures in their own size: one too wide pushes all else out of sight."""
    open_run_page("logit_adjust")
    page.get_by_text("Show more", exact=True).first.click()
    picture = page.locator("img[src*='learning_curves.png']")  # MLflow drops its alternative text
    picture.scroll_into_view_if_needed()
    page.wait_for_function("i => i.complete && i.naturalWidth", arg=picture.element_handle())
    assert picture.evaluate("i => [i.naturalWidth, i.clientWidth]") == [640, 640]
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    facts = page.get_by_text("About this run").first.bounding_box()
    assert facts["x"] + facts["width"] <= 1500


def test_the_first_screen_of_charts_is_rate_loss_and_validation(ui, open_run_page, page):
    open_run_page("logit_adjust")
    page.get_by_text("Show more", exact=True).first.click()
    link = page.get_by_role("link", name="Learning curves of all experts")
    page.goto(f"{ui.url}/{link.get_attribute('href')}")  # in this window; a click opens another
    see(page, re.compile("^learning curves"))
    page.locator("svg.main-svg").first.wait_for(state="visible")
    for metric in (
        "lr",
        "train/loss",
        *(f"val/{g}_accuracy" for g in ("balanced", "head", "tail")),
    ):
        title = page.get_by_text(metric, exact=True).first
        title.wait_for(state="visible")
        place = title.bounding_box()
        assert place["y"] < 1200, metric  # without scrolling
    for loss in LOSSES:
        see(page, f"{loss} images seed 0")
    folded = page.get_by_text("test_balanced", exact=True).first
    folded.scroll_into_view_if_needed()
    assert page.get_by_text("test_balanced/brier", exact=True).count() == 0


def test_the_view_is_offered_by_name(ui, page, experiment):
    page.goto(f"{ui.url}/#/experiments/{experiment}/runs")
    page.get_by_role("button", name="Views").click()
    see(page, "Learning curves")


def test_data_sets_are_named_with_their_splits(open_run_page, page, finished):
    open_run_page("ce")
    see(page, "Datasets")
    sha256 = mlflow.MlflowClient().get_run(finished["ce"]).data.params["splits_sha256"]
    see(page, f"({sha256[:36]})")
    page.get_by_text("+6", exact=True).click()
    for split in ("tuneV", "val_small", "calib", "val_lt", "test_lt", "test_balanced"):
        see(page, re.compile(f"^{split} "))


def test_system_metrics_are_drawn(ui, page, measured):
    page.goto(
        f"{ui.url}/#/experiments/{measured.experiment_id}/runs/{measured.run_id}/system-metrics"
    )
    for name in ("cpu_utilization_percentage", "system_memory_usage_percentage"):
        see(page, name)
    page.locator("svg.main-svg").first.wait_for(state="visible")


def test_its_metrics_are_drawn(open_run_page, page):
    open_run_page("logit_adjust", "/model-metrics")
    see(page, "val_balanced_accuracy")
    page.locator("svg.main-svg").first.wait_for(state="visible")


def test_its_figures_are_drawn(open_run_page, page):
    names = ("learning_curves", "lr_schedule", "per_class_accuracy", "reliability")
    open_run_page("ce", f"/artifacts/figures/{names[0]}.png")
    image, shown = page.locator("img[src^=blob], img[src*=artifact]").first, set()
    for name in names:
        page.get_by_text(f"{name}.png", exact=True).first.click()  # in the tree of files
        see(page, re.compile(f"figures/{name}.png$"))
        wait_until(lambda: image.get_attribute("src") not in shown, 90, name)
        page.wait_for_function(IS_DRAWN, arg=image.element_handle())
        shown.add(image.get_attribute("src"))


def test_its_report_is_rendered(open_run_page, page):
    open_run_page("ce", "/artifacts/report.md")
    page.get_by_role("heading", name="Success checklist").wait_for(state="visible")
    page.get_by_role("cell", name="test_balanced NLL, nats").wait_for(state="visible")


def test_three_experts_in_mlflows_own_comparison(ui, page, experiment, finished):
    ids = quote(json.dumps([finished[loss] for loss in LOSSES]))
    page.goto(f"{ui.url}/#/compare-runs?runs={ids}&experiments={quote(json.dumps([experiment]))}")
    see(page, "Comparing 3 Runs from 1 Experiment")
    for loss in LOSSES:
        see(page, f"{loss} images seed 0")


def test_the_parents_page_leads_to_the_comparison(ui, open_run_page, page):
    open_run_page("all")
    link = page.get_by_role("link", name="The experts compared, and their ensembles, with figures")
    page.goto(f"{ui.url}/{link.get_attribute('href')}")
    frame = page.frame_locator("iframe")
    frame.get_by_role("heading", name="Comparison of 3 experts").wait_for(state="visible")


def test_the_comparison_page_opens_without_a_network(browser, finished, tmp_path, screenshots):
    file = mlflow.artifacts.download_artifacts(
        run_id=finished["all"], artifact_path="comparison/index.html", dst_path=str(tmp_path)
    )
    browser.set_offline(True)
    window = browser.new_page()
    asked = []
    window.on("request", lambda request: asked.append(request.url))
    window.goto(Path(file).as_uri())
    images = window.locator("img").all()
    assert len(images) == 6
    assert all(image.evaluate(IS_DRAWN) for image in images)
    assert not [url for url in asked if not url.startswith(("file:", "data:"))]
    for heading in ("Experts", "Ensembles under the uniform prior", "What differs", "Runs"):
        assert window.locator("h2", has_text=heading).count() >= 1, heading
    assert window.locator("td.best").count() > 5
    window.screenshot(path=screenshots / "comparison.png", full_page=True)
    window.close()
    browser.set_offline(False)
