"""Pictures for the documentation, from a store and the id of a run in it.

    python tests/browser/screenshots.py --run_id <expert> --out docs/run_page.png
    python tests/browser/screenshots.py --run_id <parent or compare> --page comparison \
        --out docs/comparison_page.png
    python tests/browser/screenshots.py --run_id <expert> --page curves --out curves.png

In the folder of `mlflow.db`, or with --store sqlite:///PATH; needs Chromium and playwright. `run`
(the default): the page in `mlflow ui` down to the success checklist, without MLflow's own columns
beside it. `comparison`: comparison/index.html down to its second figure. `curves`: the saved view
of the experiment.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mlflow
from playwright.sync_api import Page, sync_playwright
from reliability.servers import Server

PATIENCE = 120_000  # milliseconds
WIDTH = {"run": 1100, "comparison": 1100, "curves": 1500}


def run_page(page: Page, address: str, out: str) -> None:
    """Two tall windows: the page scrolls inside of itself."""
    page.set_viewport_size({"width": WIDTH["run"], "height": 2400})
    page.goto(address)
    page.get_by_text("About this run").first.wait_for()
    # A new browser is shown the assistant, which takes a third of the width.
    assistant = page.get_by_role("button", name="Close")
    if assistant.count():
        assistant.first.click()
    page.get_by_text("Show more", exact=True).first.click()
    picture = page.locator("img[src*='learning_curves.png']")
    if picture.count():
        page.wait_for_function("i => i.naturalWidth", arg=picture.element_handle())
    left = page.get_by_text("About this run").first.bounding_box()["x"] - 16
    end = page.get_by_role("heading", name="What was done").bounding_box()["y"] - 8
    clip = {"x": left, "y": 0, "width": WIDTH["run"] - left, "height": end}
    page.screenshot(path=out, clip=clip)


def comparison(page: Page, address: str, out: str) -> None:
    """Down to the second figure."""
    page.goto(address)
    end = page.locator("figure").nth(1).bounding_box()
    clip = {"x": 0, "y": 0, "width": WIDTH["comparison"], "height": end["y"] + end["height"]}
    page.screenshot(path=out, clip=clip, full_page=True)


def curves(page: Page, address: str, out: str) -> None:
    page.goto(address)
    page.locator("svg.main-svg").first.wait_for()
    page.wait_for_timeout(3000)
    page.screenshot(path=out)


def main() -> None:
    told = argparse.ArgumentParser(description=__doc__)
    told.formatter_class = argparse.RawDescriptionHelpFormatter
    told.add_argument("--run_id", required=True)
    told.add_argument("--page", choices=list(WIDTH), default="run")
    told.add_argument("--store", default="sqlite:///mlflow.db")
    told.add_argument("--out", required=True)
    given = told.parse_args()
    mlflow.set_tracking_uri(given.store)
    experiment = mlflow.MlflowClient().get_run(given.run_id).info.experiment_id
    with sync_playwright() as started, tempfile.TemporaryDirectory() as scratch:
        browser = started.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": WIDTH[given.page], "height": 1200})
        page.set_default_timeout(PATIENCE)
        if given.page == "comparison":
            file = mlflow.artifacts.download_artifacts(
                run_id=given.run_id, artifact_path="comparison/index.html", dst_path=scratch
            )
            comparison(page, Path(file).as_uri(), given.out)
        else:
            server = Server(Path(scratch), "ui", "--backend-store-uri", given.store)
            try:
                at = f"{server.url}/#/experiments/{experiment}/runs"
                if given.page == "run":
                    run_page(page, f"{at}/{given.run_id}", given.out)
                else:
                    view = "viewStateShareKey=longtail-curves&compareRunsMode=CHART"
                    curves(page, f"{at}?{view}", given.out)
            finally:
                server.stop()
        browser.close()
    print(given.out)


if __name__ == "__main__":
    main()
