"""The report page: what is embedded in it, and what it does.

The latter needs a headless Chromium; without one those tests are skipped.
"""

import base64
import html
import io
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.results import report
from common.results.paper import POOLED_NOTE
from common.runtime import files

HEIGHT, WIDTH, FRAME, ROUNDS, NAN = 40, 60, 1000, 3, float("nan")
HOSTILE = "</script><b id=broken>x</b><!--<script>.jpg"
HOSTILE_CLASS = "<img src=x onerror=problems.push(1)>"
RESULTS = {
    "task": "demo_<i>shadow</i>", "sam": "demo", "clip": "ViT-B-16/openai", "seed": 7,
    "images": 240, "samples": 240, "rounds": ROUNDS, "branch": "explicit",
    "foreground_rate_attainable": 0.5,
    "rows": {"AlignSAM": {"mIoU": 0.4311, "MAE": 0.0709, "FR": 0.25,
                          "pooled": {"IoU": 0.5, "BER": 0.375},
                          "per_class": {"star": {"mIoU": 0.125, "pooled": {"IoU": 0.75}}}},
             "w/o MSI": {"mIoU": NAN, "MAE": None, "per_class": {"<ring>": {"mIoU": 0.0625}}}},
    "iou_per_round": {"AlignSAM": [0.1, 0.2, 0.3, 0.4311], "w/o MSI": [0.1, 0.2], "PerSAM": [0.9]}}


def log(unknown: float | None) -> list[dict]:
    """Five steps of two quantities, of which one is known at every second step."""
    return [{"step": 10 * row, "loss": 1 / row, "half_known": 0.5 if row % 2 else unknown}
            for row in range(1, 6)]


LOG = log(NAN)


def item(name: str = "a.jpg", target: str | None = None, last_iou: float = 0.5, **other) -> dict:
    """A grey image (40, 60) whose truth is a box.

    Its mask grows by 10 columns a round, from 10 to 40.
    """
    columns, lines = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
    points = [[900, 100], [900, 900], [100, 900], [500, 900], [750, 100]]
    known = {
        "image": np.full((HEIGHT, WIDTH, 3), 128, np.uint8),
        "truth": ((columns >= 30) & (columns < 50) & (lines >= 10) & (lines < 30)).astype(np.uint8),
        "masks": [columns < 10 + 10 * number for number in range(ROUNDS + 1)],
        "ious": [0.1, 0.2, 0.3, last_iou],
        "points": np.array(points, np.float32),
        "labels": np.array([1, 0, 0, 1, 1]), "frame": FRAME} | other
    return report.gallery_item(name, target, **known)


def picture(uri: str) -> Image.Image:
    head, data = uri.split(",")
    opened = Image.open(io.BytesIO(base64.b64decode(data)))
    assert head == f"data:image/{opened.format.lower()};base64"
    return opened


def written(path: Path, results: dict = RESULTS, srm_log: list = LOG, agent_log: list = LOG,
            gallery: list = ()) -> str:
    report.write_report(path, results, srm_log, agent_log, list(gallery))
    return path.read_text(encoding="utf-8")


class Tags(HTMLParser):
    """The tags of a page with their attributes, and what stands in its script elements, by type."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.scripts, self.inside = [], {}, None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = dict(attributes).get("type", "javascript") if tag == "script" else None

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside:
            self.scripts[self.inside] = self.scripts.get(self.inside, "") + data

    @property
    def data(self) -> dict:
        def refuse(name):
            raise AssertionError(f"{name} is no JSON")
        return json.loads(self.scripts["application/json"], parse_constant=refuse)


# ---- what is embedded

def test_pictures_and_masks_of_a_large_image_come_at_one_small_size():
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 2, (1500, 2000), np.uint8)
    image = generator.integers(0, 256, (1500, 2000, 3), np.uint8)
    made = item(image=image, truth=truth, masks=[truth == 1] * 16, ious=[0.5] * 16,
                points=np.zeros((17, 2)), labels=np.zeros(17))
    assert (made["width"], made["height"]) == (320, 240)
    assert picture(made["image"]).format == "JPEG"
    for uri in (made["image"], made["truth"], *made["masks"]):
        assert picture(uri).size == (320, 240)
    assert len(json.dumps(made)) < 400_000  # noise is the worst there is


def test_a_small_image_keeps_its_size_and_its_masks_every_pixel():
    truth = np.zeros((HEIGHT, WIDTH), np.uint8)
    truth[:10, :20], truth[20:, 30:] = 1, 255
    generator = np.random.default_rng(0)
    masks = [generator.random((HEIGHT, WIDTH)) < 0.5 for _ in range(ROUNDS + 1)]
    made = item(truth=truth, masks=masks)
    # ignored is no foreground
    for uri, expected in [(made["truth"], truth == 1), *zip(made["masks"], masks)]:
        assert picture(uri).mode == "1"
        np.testing.assert_array_equal(np.asarray(picture(uri)), expected)
    assert picture(made["masks"][0]).info["transparency"] == 0


def test_a_squashed_picture_is_stretched_to_the_shape_of_its_truth():
    square = np.zeros((256, 256, 3), np.uint8)
    square[:, 128:] = 255
    shown = np.asarray(picture(item(image=square)["image"]).convert("L"))
    assert shown.shape == (HEIGHT, WIDTH)
    assert shown[:, :25].max() < 30 and shown[:, 35:].min() > 225


def test_points_are_shares_of_the_sides_with_their_labels():
    made = item()
    assert made["points"] == [[0.9, 0.1], [0.9, 0.9], [0.1, 0.9], [0.5, 0.9], [0.75, 0.1]]
    assert made["labels"] == [1, 0, 0, 1, 1]


@pytest.mark.parametrize("wrong", [
    {"ious": [0.1] * 3}, {"labels": np.zeros(4)}, {"points": np.zeros((6, 2))}])
def test_rounds_that_do_not_match_are_refused(wrong):
    with pytest.raises(ValueError, match="a.jpg"):
        item(**wrong)


def test_the_page_holds_what_it_was_given_with_null_for_what_is_not_finite(tmp_path):
    ious = [np.float32("nan"), np.float64(0.25), float("inf"), 0.75]
    gallery = [item("a.jpg", "star"), item("b.jpg", ious=ious)]
    data = Tags(written(tmp_path / "report.html", gallery=gallery)).data
    assert data["gallery"] == gallery and gallery[1]["ious"] == [None, 0.25, None, 0.75]
    assert data["srm_log"] == data["agent_log"] == log(None)
    assert data["pooled_note"] == POOLED_NOTE
    rows = data["results"]["rows"]
    assert rows["AlignSAM"] == RESULTS["rows"]["AlignSAM"]
    assert rows["w/o MSI"] == {"mIoU": None, "MAE": None, "per_class": {"<ring>": {"mIoU": 0.0625}}}
    assert {key: value for key, value in data["results"].items() if key != "rows"} == {
        key: value for key, value in RESULTS.items() if key != "rows"}


def test_the_gallery_goes_from_the_worst_to_the_best_with_unknown_last(tmp_path):
    gallery = [item(str(iou), last_iou=iou) for iou in (0.9, NAN, 0.0, 0.4)]
    data = Tags(written(tmp_path / "report.html", gallery=gallery)).data
    assert [each["name"] for each in data["gallery"]] == ["0.0", "0.4", "0.9", "nan"]


@pytest.mark.parametrize("name", [HOSTILE, "\udcff\u2028.jpg", report.PLACE])
def test_no_name_breaks_out_of_the_data(tmp_path, name):
    plain = Tags(written(tmp_path / "plain.html", gallery=[item("a.jpg", "star")]))
    page = Tags(written(tmp_path / "report.html", gallery=[item(name, name)]))
    assert page.tags == plain.tags
    assert page.scripts["javascript"] == plain.scripts["javascript"]
    assert page.data["gallery"][0]["name"] == page.data["gallery"][0]["target"] == name
    assert "<!--" not in page.scripts["application/json"]


def test_nothing_in_the_page_refers_to_the_network(tmp_path):
    text = written(tmp_path / "report.html", gallery=[item()])
    page = Tags(text)
    for tag, attributes in page.tags:
        assert not {"src", "srcset", "href", "action", "data", "poster"} & attributes.keys(), tag
    fetching = (r"url\(|@import|fetch\(|XMLHttpRequest|WebSocket|EventSource|sendBeacon|"
                r"import\(")
    assert not re.search(fetching, text)
    without_pictures = re.sub(r'"data:[^"]*"', "", text)
    addresses = set(re.findall(r"""(?:https?:)?//[\w-]+\.[^"'`\s]*""", without_pictures))
    assert addresses == {"http://www.w3.org/2000/svg"}  # the name of a vocabulary; nobody opens it
    [policy] = [each["content"] for tag, each in page.tags
                if each.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';") and "http" not in policy


def test_a_failed_write_leaves_the_old_page(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    old = written(path)

    def fail(*_):
        raise OSError("no")
    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError):
        written(path, gallery=[item()])
    assert path.read_text(encoding="utf-8") == old and list(tmp_path.iterdir()) == [path]


# ---- what the page does, in a browser

COLLECT = """<script>
const problems = [];
for (const kind of ["error", "unhandledrejection", "securitypolicyviolation"])
  addEventListener(kind, event => {
    problems.push(`${kind}: ${event.message ?? event.reason ?? event.blockedURI}`);
  }, true);
console.error = (...words) => problems.push(words.join(" "));
</script>"""

# What is seen from outside: texts, pixels of the canvas, the state of the controls. The browser
# prints the page once it is loaded. A frame that is still being written holds that up until the
# probe is through, in real time.
PROBE = """<script>
const found = { problems }, hold = document.body.appendChild(document.createElement("iframe"));
hold.contentDocument.open();
const one = selector => document.querySelector(selector);
const all = selector => [...document.querySelectorAll(selector)];
const texts = selector => all(selector).map(each => each.textContent);
const settle = async () => {
  for (let frame = 0; frame < 20; frame++) await new Promise(requestAnimationFrame);
};
const input = async (selector, change) => {
  Object.assign(one(selector), change).dispatchEvent(new Event("input", { bubbles: true }));
  await settle();
};
const pixel = (canvas, x, y) => [...canvas.getContext("2d").getImageData(x, y, 1, 1).data];
(async () => { PLACE })().catch(error => problems.push(`probe: ${error}`)).then(() => {
  document.body.dataset.found = JSON.stringify(found);
  hold.contentDocument.close();
});
</script>"""

READ = """
  Object.assign(found, { title: document.title, heading: one("header").innerText,
    tables: texts("tr"), charts: all("main figure > svg").length,
    labels: texts("#per-round figure > svg text"),
    paths: all("#srm-log path").map(each => each.getAttribute("d")), main: one("main").innerHTML,
    visible: one("main").innerText });
"""

PLAY = READ + """
  const entries = JSON.parse(one("#report-data").textContent).gallery;
  found.sizes = await Promise.all(entries.slice(0, 3)
    .flatMap(({ image, truth, masks }) => [image, truth, ...masks])
    .map(uri => new Promise(done => {
      const image = new Image();
      image.onload = image.onerror = () => done([image.naturalWidth, image.naturalHeight]);
      image.src = uri;
    })));
  const canvas = one("#cards canvas");
  const drawn = () => all("#cards canvas").map(each => each.width > 0);
  const shown = () => all("#cards figure").map(each => each.checkVisibility());
  const read = () => ({ slider: one("#round").value, output: one("#round-now").textContent,
    iou: one("#cards strong").textContent, inMask: pixel(canvas, 280, 160),
    onOutline: pixel(canvas, 238, 160), first: pixel(canvas, 436, 36),
    firstRing: pixel(canvas, 432 + 13, 32), second: pixel(canvas, 436, 292),
    newest: pixel(canvas, 364, 36), newestRing: pixel(canvas, 360 + 13, 32),
    beforeRing: pixel(canvas, 240 + 13, 288) });
  canvas.scrollIntoView();
  await settle();
  const captions = texts("#cards figcaption").slice(0, 3);
  Object.assign(found, { last: read(), captions, drawnAtTop: drawn() });
  await input("#round", { value: 0 });
  found.start = read();
  document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
  await settle();
  found.afterArrow = read();
  one("#round").dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
  found.afterArrowOnSlider = one("#round").value;
  await input("#round", { value: 0 });
  for (const layer of ["mask", "truth", "points"]) {
    await input("#round", { value: layer === "mask" ? 3 : 0 });
    await input(`#show-${layer}`, { checked: false });
    found[`without_${layer}`] = read();
    await input(`#show-${layer}`, { checked: true });
  }
  found.classes = all("#class option").map(each => each.value);
  await input("#class", { value: "star" });
  const count = one("#count").textContent;
  Object.assign(found, { shownStars: shown(), drawnStars: drawn(), count });
  await input("#class", { value: "" });
  found.shownAll = shown();
  all("#cards canvas").at(-1).scrollIntoView();
  await settle();
  found.drawnAtEnd = drawn();
  found.broken = all("#broken, header i, #cards b").length;
  found.unlabelled = all("input, select").filter(each => !each.labels.length).length;
"""


def browse(path: Path, probe: str, *options: str) -> dict:
    """What `probe` finds in the page at `path`, opened in a wide window.

    Skips where there is no browser.
    """
    known = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = [os.environ.get("CHROMIUM"), *map(shutil.which, known)]
    browser = next(filter(None, found), None)
    if not browser:
        pytest.skip("no Chromium found: install one, or name it in the environment variable "
                    "CHROMIUM")
    page = path.read_text(encoding="utf-8")
    probed = path.with_name("probed.html")
    page = page.replace("<head>", "<head>" + COLLECT)
    page = page.replace("</body>", PROBE.replace("PLACE", probe) + "</body>")
    probed.write_text(page, encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu",
               "--window-size=1600,1600", *options,
               f"--user-data-dir={path.parent / 'profile'}", "--dump-dom", probed.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    found = re.search(r'<body[^>]* data-found="([^"]*)"', done.stdout)
    assert found, done.stderr
    return json.loads(html.unescape(found[1]))


def near(colour: list[int], expected: tuple[int, int, int]) -> bool:
    return max(abs(one - other) for one, other in zip(colour, expected)) < 8


GREY, IN_MASK, OUTLINE = (128, 128, 128), (79, 124, 192), (255, 212, 0)
GREEN, RED, WHITE = (40, 220, 60), (240, 40, 40), (255, 255, 255)


@pytest.fixture(scope="module")
def played(tmp_path_factory) -> dict:
    """What was found in a page of 200 images while its controls were moved."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    gallery = [item("unknown.jpg", "star", NAN), item(HOSTILE, HOSTILE_CLASS, 0.02),
               item("worst.jpg", "star", 0.01)]
    written(path, gallery=gallery + [item("other.jpg", "ring")] * 197)
    return browse(path, PLAY)


def test_the_browser_reports_no_problem_and_every_picture_decodes(played):
    assert played["problems"] == []
    assert played["sizes"] == [[WIDTH, HEIGHT]] * 3 * (2 + ROUNDS + 1)


def test_the_heading_names_the_run_and_the_stand_ins(played):
    assert played["title"] == "AlignSAM on demo_<i>shadow</i>"
    assert "SAM demo · CLIP ViT-B-16/openai · seed 7 · 240 test samples" in played["heading"]
    assert "Stand-in models: the SAM of this run" in played["heading"]


def test_tables_are_in_percent_with_dashes_for_what_is_unknown(played):
    assert played["tables"] == ["mIoUMAEFRpooled IoUpooled BER",
                                "AlignSAM43.10.07125.050.037.5", "w/o MSI–––––",
                                "AlignSAMw/o MSI", "star12.5–", "<ring>–6.3",
                                "AlignSAMw/o MSI", "star75.0–", "<ring>––"]
    assert POOLED_NOTE in played["visible"]


def test_the_papers_figures_stand_below_the_results(tmp_path):
    paper = {"SEEM": {"mIoU": 21.5, "MAE": 0.25}, "AlignSAM": {"mIoU": 63.06, "FR": 90.2}}
    report.write_report(tmp_path / "report.html", RESULTS | {"sam": "vit_h"}, LOG, LOG, [], paper)
    found = browse(tmp_path / "report.html", READ)
    assert found["problems"] == [] and "The paper's figures for this data set" in found["main"]
    assert found["tables"][3:6] == ["mIoUMAEFR", "SEEM21.50.250–", "AlignSAM63.1–90.2"]


def test_charts_have_numbers_on_their_axes(played):
    assert played["charts"] == 1 + 2 + 2
    assert played["labels"] == ["10", "20", "30", "40", "50", "0", "1", "2", "3", "round"]


def test_rows_of_rounds_are_told_apart_and_rows_without_rounds_have_no_curve(tmp_path):
    ious = {f"row {number}": [0.1, number / 10] for number in range(8)} | {"PerSAM": [0.9]}
    written(tmp_path / "report.html", RESULTS | {"iou_per_round": ious})
    found = browse(tmp_path / "report.html", """
        const styled = all("#per-round figure > svg path").map(getComputedStyle);
        found.styles = styled.map(style => `${style.stroke} ${style.strokeDasharray}`);
        found.legend = texts("#per-round figcaption span");
        """)
    assert len(found["styles"]) == len(set(found["styles"])) == 8
    assert found["legend"] == [f"row {number} {number * 10} at round 1" for number in range(8)]


def test_a_curve_has_a_gap_where_a_value_is_missing(played):
    assert [re.sub("[^A-Z]", "", path) for path in played["paths"]] == ["MLLLL", "MMM"]


def test_the_slider_moves_the_mask_the_points_and_the_iou(played):
    last, start = played["last"], played["start"]
    assert (last["slider"], last["output"], last["iou"]) == ("3", "3 of 3", "IoU 1.0")
    assert (start["slider"], start["output"], start["iou"]) == ("0", "0 of 3", "IoU 10.0")
    assert near(last["inMask"], IN_MASK) and near(start["inMask"], GREY)
    assert near(last["newest"], GREEN) and near(start["newest"], GREY)
    for when in (last, start):
        assert near(when["first"], GREEN) and near(when["second"], RED)


def test_only_the_newest_point_is_ringed(played):
    assert near(played["last"]["newestRing"], WHITE)
    assert near(played["last"]["firstRing"], GREY) and near(played["last"]["beforeRing"], IN_MASK)
    assert near(played["start"]["firstRing"], WHITE)


def test_the_arrow_keys_move_one_round_and_leave_the_slider_its_own(played):
    assert played["afterArrow"]["output"] == "1 of 3" and played["afterArrow"]["iou"] == "IoU 20.0"
    # the browser itself moves it, and a synthetic key does not
    assert played["afterArrowOnSlider"] == "1"


def test_mask_outline_and_points_can_be_switched_off(played):
    assert near(played["start"]["onOutline"], OUTLINE)
    assert near(played["without_truth"]["onOutline"], GREY)
    assert near(played["without_mask"]["inMask"], GREY)
    assert near(played["without_mask"]["newest"], GREEN)
    assert near(played["without_points"]["first"], GREY)


def test_the_class_filter_hides_the_others(played):
    assert played["classes"] == ["", HOSTILE_CLASS, "ring", "star"]
    # the worst, and the one of unknown IoU, far below the screen until then
    stars = [True] + [False] * 198 + [True]
    assert played["shownStars"] == played["drawnStars"] == stars
    assert played["count"] == "2 of 200 shown"
    assert played["shownAll"] == [True] * 200


def test_of_many_images_only_those_in_sight_are_drawn(played):
    top, end = played["drawnAtTop"], played["drawnAtEnd"]
    assert top[0] and not top[-1] and sum(top) < 100
    assert end[-1] and not end[0] and sum(end) < 100


def test_names_are_shown_as_they_are_and_controls_are_labelled(played):
    assert played["captions"][0] == "IoU 1.0worst.jpg: star"
    assert played["captions"][1] == f"IoU 2.0{HOSTILE}: {HOSTILE_CLASS}"
    assert played["broken"] == 0 and played["unlabelled"] == 0


def test_the_page_fits_a_window_of_400_pixels(tmp_path):
    page = written(tmp_path / "report.html", gallery=[item("long" * 50, HOSTILE)])
    # in a frame, because Chromium's own windows are 500 wide or more
    found = browse(tmp_path / "report.html", """
        const frame = Object.assign(document.createElement("iframe"), { srcdoc: PAGE });
        frame.style = "width: 400px; height: 900px; border: 0";
        await new Promise(done => { frame.onload = done; document.body.append(frame); });
        const inside = frame.contentDocument;
        Object.assign(found, { width: frame.contentWindow.innerWidth,
          needed: inside.documentElement.scrollWidth,
          cards: inside.querySelectorAll("#cards figure").length });
        """.replace("PAGE", json.dumps(page).replace("<", "\\u003c")))
    assert found["problems"] == []
    assert found["cards"] == 1 and found["width"] == 400 and found["needed"] <= 400


def test_all_columns_of_the_results_are_seen_at_once_in_a_window_of_1200_pixels(tmp_path):
    scores = dict.fromkeys(("mIoU", "F", "BER", "E", "MAE", "FR"), 0.5)
    scores["pooled"] = {"IoU": 0.5, "BER": 0.5}
    rows = {"AlignSAM": scores, "labels: CLIP Surgery": scores}
    written(tmp_path / "report.html", results=RESULTS | {"rows": rows})
    found = browse(tmp_path / "report.html", """
        const region = one(".scroll");
        Object.assign(found, { columns: texts(".scroll th[scope=col]").length,
          room: region.clientWidth, needed: region.scrollWidth });
        """, "--window-size=1200,900")
    assert found["columns"] == 8 and found["needed"] <= found["room"]


def test_the_page_follows_the_colour_scheme(tmp_path):
    written(tmp_path / "report.html")
    probe = "found.colour = getComputedStyle(document.body).backgroundColor;"
    assert browse(tmp_path / "report.html", probe)["colour"] == "rgb(255, 255, 255)"
    dark = browse(tmp_path / "report.html", probe, "--blink-settings=preferredColorScheme=0")
    assert dark["colour"] == "rgb(20, 23, 28)"


@pytest.mark.parametrize("results, log", [
    (RESULTS | {"rows": {}, "iou_per_round": {}}, []),
    (RESULTS | {"rows": {"AlignSAM": {"mIoU": NAN}}, "foreground_rate_attainable": NAN,
                "seed": None, "rounds": 1,
                "iou_per_round": {"AlignSAM": [NAN, 0.5], "w/o RL": [NAN, NAN], "w/o SRM": [0.5]}},
     [{"episode": 1, "loss": NAN, "same": 0.0}]),
    (RESULTS | {"sam": "vit_h"}, [{"step": 1, "huge": 1e30}, {"step": 2, "huge": -1e30}])])
def test_a_run_with_little_in_it_gives_a_page_without_errors(tmp_path, results, log):
    written(tmp_path / "report.html", results, log, log)
    found = browse(tmp_path / "report.html", READ)
    assert found["problems"] == []
    assert not re.search("NaN|undefined|Infinity|null", found["main"])
    assert "This report was written without images." in found["visible"]
    assert "arrow keys" not in found["visible"]
    assert (POOLED_NOTE in found["visible"]) == ("pooled" in str(results["rows"]))
    assert ("Stand-in" in found["heading"]) == (results["sam"] == "demo")
    assert found["visible"].count("No log.") == (0 if log else 2)
