"""The page is one file that is whole, safe and quiet: by its structure, and in a real Chromium where there is one."""

import json
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.html_page import Picture, Section, page
from utils.tables import Table

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> & co"
VOID = {"meta", "link", "img", "br"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Reader(HTMLParser):
    """Collects tags, attributes and text, and what is closed out of turn."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.text, self.wrong = [], Counter(), [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def sections(tmp_path) -> list[Section]:
    Image.fromarray(np.full((300, 2000, 3), 90, np.uint8)).save(tmp_path / "wide.png")
    header = ["method", *(f"class number {i} [%]" for i in range(12))]
    rows = [[name, *(f"{value + i:.2f} ± 0.10 (9.00)" for i in range(12))] for name, value in (("b", 10), ("a", 9))]
    rows.append([HOSTILE, *["-"] * 12])
    published = [["U-Net", *["76.85"] * 12]]
    table = Table(
        "What the numbers are, in a sentence that is long enough to wrap on a phone.",
        header,
        rows,
        published,
        "published",
    )
    picture = Picture(tmp_path / "wide.png", HOSTILE, "below it")
    return [Section(HOSTILE, ["a paragraph", table, picture]), Section("second", [HOSTILE])]


def test_the_page_is_well_formed_and_nothing_in_a_name_is_markup(sections):
    reader = Reader(page(HOSTILE, sections))
    assert not reader.open and not reader.wrong
    assert reader.tags["script"] == reader.tags["table"] == reader.tags["img"] == 1
    assert reader.tags["h1"] == 1 and reader.tags["h2"] == 2
    assert not [name for _, name, _ in reader.attributes if name.startswith("on")]
    assert "".join(reader.text).count(HOSTILE) == 6  # title, heading, link, section, table, paragraph
    assert ("img", "alt", HOSTILE) in reader.attributes


def test_the_page_asks_for_nothing_from_elsewhere(sections):
    reader = Reader(page("title", sections))
    links = [value for _, name, value in reader.attributes if name in ("src", "href", "srcset", "action")]
    assert links and all(link.startswith(("data:", "#")) for link in links)
    targets = {value for _, name, value in reader.attributes if name == "id"}
    assert {link[1:] for link in links if link.startswith("#")} <= targets
    policy = next(value for tag, name, value in reader.attributes if tag == "meta" and "default-src" in value)
    assert "default-src 'none'" in policy
    style = page("title", sections).split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style


def test_published_rows_have_a_part_of_the_table_of_their_own(sections):
    text = page("title", sections)
    ours, theirs = text.split('<tbody class="published">')
    assert "U-Net" in theirs and "U-Net" not in ours


def test_columns_of_words_stand_left_and_those_of_numbers_right():
    table = Table("-", ["run", "p", "K", "why"], [["1st", "< 0.1", "-", "-"], ["2nd", "-", "9", "one case"]])
    reader = Reader(page("title", [Section("-", [table])]))
    assert [tag for tag, name, value in reader.attributes if (name, value) == ("class", "words")] == ["th"] * 2 + [
        "td"
    ] * 4


PROBE = """
<script>
const found = {errors: [], violations: []};
addEventListener("error", e => found.errors.push(e.message || "resource"), true);
addEventListener("securitypolicyviolation", e => found.violations.push(e.blockedURI));
addEventListener("load", () => {
  const images = [...document.images];
  const context = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const pixel = image => {
    if (!image.naturalWidth) return "broken";
    context.drawImage(image, 0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data].join();
  };
  const head = document.querySelector("thead button"), first = () => document.querySelector("tbody td").textContent;
  head.click(); const down = first(); head.click(); const up = first();
  Object.assign(found, {
    pixels: images.map(pixel), down, up, published: document.querySelector("tbody.published td").textContent,
    window: innerWidth, page: document.documentElement.scrollWidth,
    wider: [...document.querySelectorAll("body *:not(.wide *)")].filter(
      e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80)),
    requests: performance.getEntriesByType("resource").map(e => e.name).filter(name => !name.startsWith("data:")),
    background: getComputedStyle(document.body).backgroundColor,
  });
  parent.postMessage(JSON.stringify(found), "*");
});
</script>
"""
FRAME = """<script>addEventListener("message", e => document.documentElement.dataset.found = e.data)</script>
<iframe src="page.html" width="{width}" height="800" style="border: 0"></iframe>"""
"""Chromium's windows are at least 500 pixels wide, a telephone's are not."""


def in_chromium(text: str, folder: Path, width: int, *flags: str) -> tuple[dict, str]:
    """Open a page from a file, as wide as told; returns what a probe in it finds, and what the browser logs."""
    (folder / "page.html").write_text(text.replace("<style>", f"{PROBE}<style>", 1), encoding="utf-8")
    (folder / "frame.html").write_text(FRAME.format(width=width), encoding="utf-8")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
        "--disable-component-update", "--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr", f"--user-data-dir={folder}/profile", "--window-size=1400,900",
        "--virtual-time-budget=10000", *flags, "--dump-dom", (folder / "frame.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    found = [value for _, name, value in Reader(done.stdout).attributes if name == "data-found"]
    assert found, done.stderr
    return json.loads(found[0]), done.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")
@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (1280, "dark")])
def test_a_real_browser_shows_all_of_it_in_its_window_without_a_request(sections, tmp_path, width, scheme):
    flags = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    found, log = in_chromium(page("title", sections), tmp_path, width, *flags)
    assert found["errors"] == found["violations"] == found["requests"] == found["wider"] == []
    assert "CONSOLE" not in log
    assert found["pixels"] == ["90,90,90,255"]
    assert found["page"] <= found["window"] == width
    assert found["background"] == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 29)"}[scheme]
    assert (found["down"], found["up"]) == ("b", HOSTILE)  # sorted either way, published rows left where they are
    assert found["published"] == "U-Net"


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")
def test_the_browser_would_tell_of_a_request_an_error_and_a_wide_page(sections, tmp_path):
    bad = "<img src='https://example.org/x.png'><p style='width: 2000px'>wide</p><script>throw Error('bad')</script>"
    found, log = in_chromium(page("title", sections).replace("<h1>", f"{bad}<h1>", 1), tmp_path, 800)
    assert found["violations"] == ["https://example.org/x.png"]
    assert any("bad" in error for error in found["errors"]) and "CONSOLE" in log
    assert found["page"] > 800 and len(found["wider"]) == 1
    assert found["pixels"] == ["broken", "90,90,90,255"]
