"""The page: self-contained, well-formed, and true to the numbers."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from meancache_trt.calibration.evaluation import EdgeCostMap, Evaluation
from meancache_trt.errors import RuntimeUnavailableError
from meancache_trt.evaluate.pictures import PictureStore, thumbnail
from meancache_trt.evaluate.report import render_report, require_report, write_report
from meancache_trt.meancache.schedule import Evidence
from tests.calibration.test_evaluation import comparison, evaluation, row

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Tags that open and close in order, their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.found if found == tag]


def pixels(frames: int | None) -> np.ndarray:
    rng = np.random.default_rng(0)
    shape = (12, 16, 3) if frames is None else (frames, 12, 16, 3)
    return rng.random((4, *shape)).astype(np.float32)


def complete(directory: Path, frames: int | None = None) -> Evaluation:
    """An evaluation with everything that a page can show, and its pictures."""
    evidence = Evidence(samples=4, seconds=1.5, network_evaluations=48, gamma=2.0)
    fitted = row("fitted", 6, 0.001, fine=comparison(0.02))
    schedule = msgspec.structs.replace(fitted.schedule, calibration=evidence)
    made = evaluation(
        row("euler", 3, 0.05, fine=comparison(0.06)),
        row("euler", 6, 0.01, fine=comparison(0.03)),
        row("fitted", 3, 0.02, fine=comparison(0.04)),
        msgspec.structs.replace(fitted, schedule=schedule),
        against="fitted",
    )
    costs = tuple(tuple(0.1 * (s - t - 1) if s > t else None for s in range(13)) for t in range(12))
    changed = msgspec.structs.replace(
        made,
        setup=msgspec.structs.replace(made.setup, frames=frames, reference_steps=24),
        full=msgspec.structs.replace(made.full, fine=comparison(0.01)),
        edge_costs=EdgeCostMap(
            cost="displacement l2", samples=4, sigmas=(1.0,), mean=costs, median_variation=0.25
        ),
        notes=("said <once>",),
    )
    store = PictureStore(directory)
    for each in (changed.full, *changed.rows):
        store.save(each.key, 0, list(changed.prompts), pixels(frames))
    return changed


@pytest.fixture(params=[None, 9], ids=["pictures", "videos"])
def page(request: pytest.FixtureRequest, tmp_path: Path) -> Page:
    return Page(render_report(complete(tmp_path, request.param), tmp_path))


def test_the_page_is_well_formed(page: Page) -> None:
    assert page.open == []
    identifiers = [attributes["id"] for _, attributes in page.found if "id" in attributes]
    assert len(set(identifiers)) == len(identifiers)


def test_links_and_references_stay_inside(page: Page) -> None:
    identifiers = {attributes.get("id") for _, attributes in page.found}
    for _, attributes in page.found:
        for name in ("href", "src", "clip-path"):
            value = attributes.get(name)
            target = re.fullmatch(r"(?:url\()?#(.+?)\)?", value or "")
            assert value is None or value.startswith("data:image/") or target
            assert target is None or target[1] in identifiers


def test_nothing_is_fetched(tmp_path: Path) -> None:
    text = render_report(complete(tmp_path), tmp_path)
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert "<script" not in text
    assert "default-src 'none'" in text


def test_pictures_and_plots_have_descriptions(page: Page) -> None:
    assert page.all("img")
    assert all(image.get("alt") for image in page.all("img"))
    plots = [each for each in page.all("div") if each.get("role") == "img"]
    assert len(plots) == len(page.all("svg"))
    assert all(plot.get("aria-label") for plot in plots)


def test_every_section_is_there(page: Page) -> None:
    sections = {attributes.get("id") for attributes in page.all("section")}
    assert sections == {
        *("fidelity", "pictures", "each", "fine", "schedules", "costs", "calibration", "setup")
    }


def test_what_was_not_measured_has_no_section(tmp_path: Path) -> None:
    alone = evaluation(row("euler", 6, 0.01))
    page = Page(render_report(alone, tmp_path))
    sections = {attributes.get("id") for attributes in page.all("section")}
    assert sections == {"fidelity", "schedules", "setup"}
    assert page.open == []


def test_the_best_of_each_column_is_marked(tmp_path: Path) -> None:
    found = complete(tmp_path)
    text = render_report(found, tmp_path)
    psnr = found.rows[-1].own
    assert psnr is not None
    assert f'<td class="best"><span>{psnr.psnr.summary.mean:.2f}</span>' in text
    # PSNR, SSIM and latent error against the model's steps, PSNR against the fine ones; two budgets
    assert text.count('<td class="best">') == 4 * 2
    assert "fitted has the highest mean PSNR at every budget" in text


def test_differences_that_are_sure_are_coloured(tmp_path: Path) -> None:
    page = Page(render_report(complete(tmp_path), tmp_path))
    assert [cell.get("class") for cell in page.all("td") if cell.get("class") == "below"]
    assert "−20.0" in page.text  # euler at 6: ten times the error


def test_names_and_notes_are_text(tmp_path: Path) -> None:
    hostile = "<b>$x_1$</b>"
    made = evaluation(row(hostile, 6, 0.01), against=hostile)
    page = Page(render_report(msgspec.structs.replace(made, notes=(hostile,)), tmp_path))
    assert page.open == []
    assert page.text.count(hostile) > 3
    assert not page.all("b") or all(tag != "script" for tag, _ in page.found)


def test_plots_take_their_colours_from_the_page(tmp_path: Path) -> None:
    text = render_report(complete(tmp_path), tmp_path)
    assert "#fe00" not in text
    assert "#fd00" not in text
    assert "stroke: var(--s1)" in text
    assert "prefers-color-scheme: dark" in text


def test_the_same_evaluation_gives_the_same_page(tmp_path: Path) -> None:
    found = complete(tmp_path)
    for name in ("a.html", "b.html"):
        write_report(found, tmp_path / name, tmp_path)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_errors_are_shown_enlarged_on_black(tmp_path: Path) -> None:
    found = complete(tmp_path)
    reference = np.asarray(Image.open(PictureStore(tmp_path).thumbnail_path("full-b12", 0)))
    page = Page(render_report(found, tmp_path))
    shown = [image for image in page.all("img") if str(image["alt"]).startswith("error of")]
    assert len(shown) == 2 * 4  # the worst and the median of two methods at two budgets
    assert reference.shape == (12, 16, 3)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(RuntimeUnavailableError, match=r"install meancache-trt\[evaluate\]"):
        require_report()


def test_a_thumbnail_is_never_enlarged_and_keeps_its_shape() -> None:
    assert thumbnail(np.zeros((12, 16, 3), np.float32)).size == (16, 12)
    assert thumbnail(np.zeros((300, 600, 3), np.float32)).size == (192, 96)


def test_a_strip_has_the_first_and_the_last_frame() -> None:
    video = np.linspace(0, 1, 9, dtype=np.float32).reshape(9, 1, 1, 1) * np.ones((1, 10, 20, 3))
    strip = np.asarray(thumbnail(video.astype(np.float32)))
    assert strip.shape == (10, 6 * 20 + 5 * 3, 4)
    assert strip[0, 0, 0] == 0
    assert strip[0, -1, 0] == 255
    assert strip[0, 21, 3] == 0  # the gap is transparent
