"""The report: what stands in it, and how its page behaves in a browser."""

import csv
import hashlib
import json
import re
import socket
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from bench.report import CHROMIUM, chromium, write_report
from bob.formats.files import read_jsonl
from tests.dvc_project import TINY, dvc, environment, make_project, run

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"

in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (Debian: chromium)")


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium (Debian: chromium)")
    with chromium() as browser:
        yield browser


@pytest.fixture
def open_page(browser):
    """Opens a page of this address; in the end nothing must have gone wrong on any of them."""
    pages, problems, requests = [], [], []

    def open_at(address, width=1400):
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text))
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        page.on("request", lambda request: requests.append(request.url))
        page.requests, page.problems = requests, problems
        page.goto(address)
        page.wait_for_selector("#shown")
        pages.append(page)
        return page

    yield open_at
    for page in pages:
        page.close()
    assert problems == []


def made_up(folder, classes, images=60, shots=6):
    return write_report(folder, classes, images, shots).as_uri()


def listed(page):
    return page.locator("#shown").inner_text()


def choose(page, facet, value):
    values = page.locator(f'.values[data-facet="{facet}"]')
    if not values.is_visible():
        page.locator("details", has=values).locator("summary").click()
    values.get_by_label(value, exact=False).first.click()


# --- the page, of made-up images ----------------------------------------------------------------


def test_a_filter_shows_what_it_names_and_counts_the_others(open_page, tmp_path):
    page = open_page(made_up(tmp_path, ["Condor", "Heron", "Pelican"]))
    assert listed(page) == "60 images"
    choose(page, "class", "Heron")
    assert listed(page) == "20 images"
    assert set(page.locator(".card .name").all_inner_texts()) == {"Heron"}
    choose(page, "obedience", "as asked")
    assert listed(page) == "4 images"  # the captioner was asked of a fifth
    # A value's count is of what choosing it instead, or too, would show.
    counts = page.locator('.values[data-facet="class"] label').all_inner_texts()
    assert [re.sub(r"\s+", " ", text) for text in counts] == ["Condor 4", "Heron 4", "Pelican 4"]
    page.get_by_text("Clear filters").click()
    assert listed(page) == "66 images"


def test_keys_go_from_image_to_image_and_open_one(open_page, tmp_path):
    page = open_page(made_up(tmp_path, ["Condor", "Heron"]))
    for key in ("ArrowRight", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    detail = page.locator(".detail")
    assert "a aircraft photo of a Condor in the place" in detail.inner_text()
    assert "nearest shot" in detail.inner_text()
    assert page.locator('.card[aria-selected="true"]').get_attribute("data-place") == "2"
    page.keyboard.press("Escape")
    assert not detail.is_visible()


def test_what_is_sorted_by_doubt_comes_with_the_warning(open_page, tmp_path):
    page = open_page(made_up(tmp_path, ["Condor", "Heron"]))
    assert "Nothing is dropped by it" not in page.inner_text("main")
    page.get_by_label("sort").select_option("doubt")
    assert "Nothing is dropped by it" in page.inner_text("main")
    titles = [card.get_attribute("title") for card in page.locator(".card").all()]
    doubts = [float(share) for share in re.findall(r"doubt ([\d.]+) %", " ".join(titles))]
    assert len(doubts) > 10 and doubts == sorted(doubts, reverse=True)


def test_names_that_are_code_run_nothing(open_page, tmp_path):
    classes = ["Condor", HOSTILE, "</script><script>alert(3)</script>", "new\u2028line"]
    page = open_page(made_up(tmp_path, classes))
    for tab in ("Contexts", "Results", "Gallery"):
        page.get_by_role("tab", name=tab).click()
        assert page.locator("main script, main img[onerror]").count() == 0
    choose(page, "class", HOSTILE)
    page.locator(".card").first.click()
    assert page.locator(".detail h2").inner_text() == HOSTILE
    assert page.locator("script").count() == len(page.locator("script").all()) == 7
    assert page.evaluate("report.classes") == classes


def test_a_script_that_is_not_the_page_s_own_is_refused(tmp_path, browser):
    made_up(tmp_path, ["Condor", "Heron"])
    path = tmp_path / "index.html"
    path.write_text(path.read_text().replace("</body>", "<script>window.ran = 1</script></body>"))
    page = browser.new_page()
    page.goto(path.as_uri())
    assert page.evaluate("window.ran") is None
    page.close()


def test_of_twenty_thousand_images_only_those_in_view_are_loaded(open_page, tmp_path):
    address = made_up(tmp_path, [f"Class {n}" for n in range(200)], 20_000, 200)
    assert (tmp_path / "index.html").stat().st_size < 10e6
    page = open_page(address)
    page.wait_for_load_state("networkidle")
    cards = page.locator(".card").count()
    assert 0 < cards < 150
    assert len(page.requests) == cards + 1
    page.evaluate("document.querySelector('.scroll').scrollTop = 1e5")
    page.wait_for_selector('.card[data-place="0"]', state="detached")
    assert page.locator(".card").count() < 150
    assert len(page.requests) < 300
    assert all(url.startswith("file://") for url in page.requests)


def test_on_a_telephone_the_filters_and_one_image_take_the_screen(open_page, tmp_path):
    page = open_page(made_up(tmp_path, ["Condor", "Heron"]), width=390)
    assert not page.locator(".facets").is_visible()
    page.get_by_role("button", name="Filters", exact=True).click()
    choose(page, "class", "Heron")
    assert listed(page) == "30 images"
    page.get_by_role("button", name="Filters", exact=True).click()
    page.locator(".card").first.click()
    assert page.locator(".detail").bounding_box()["width"] == 390
    assert page.evaluate("document.documentElement.scrollWidth") == 390


# --- the stage, on the real pipeline ------------------------------------------------------------


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A tiny run of the whole pipeline."""
    folder = make_project(
        tmp_path_factory.mktemp("report") / "project", TINY | {"audit": {"captioned_per_class": 1}}
    )
    dvc(folder, "repro")
    return folder


def data_of(project):
    page = (project / "results/report/index.html").read_text()
    (data,) = re.findall(r'id="report">(.*?)</script>', page, re.S)
    return json.loads(data)


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_every_image_stands_in_it_with_what_is_known_of_it(project):
    data = data_of(project)
    columns = data["entries"]
    manifest = read_jsonl(project / "results/generate/metadata.jsonl")
    photos = [
        row
        for split in ("train", "val", "test")
        for row in read_jsonl(project / f"results/split/{split}.jsonl")
    ]
    assert columns["key"] == [row["recipe"] for row in manifest] + [p["sha256"] for p in photos]
    assert len(list((project / "results/report/thumbs").iterdir())) == len(columns["key"])
    prompts = [data["texts"]["prompt"][place] for place in columns["prompt"][: len(manifest)]]
    assert prompts == [row["prompt"] for row in manifest]
    assert columns["seed"][: len(manifest)] == [str(row["seed"]) for row in manifest]
    seen = [place >= 0 for place in columns["seenBackground"]]
    assert sum(seen) == 2 and not any(seen[len(manifest) :])  # one of each class was asked about
    assert all(columns["kind"][place] == 1 for place in columns["shot"] if place >= 0)
    for alike, number in zip(columns["alike"], range(len(manifest)), strict=False):
        assert sorted(alike) == sorted(set(range(len(manifest))) - {number})


@pytest.mark.slow
def test_what_the_classifier_says_of_test_is_what_was_evaluated(project):
    data = data_of(project)
    with (project / "results/evaluate/predictions/real_and_synthetic.csv").open() as file:
        named = {row["image"]: row["predicted"] for row in csv.DictReader(file)}
    columns = data["entries"]
    says = {
        file: data["classes"][top[0][0]]
        for file, kind, top in zip(columns["file"], columns["kind"], columns["says"], strict=True)
        if kind == 3
    }
    assert says == named
    wrong = Counter(
        (row["class_name"], named[row["path"]])
        for row in read_jsonl(project / "results/split/test.jsonl")
        if row["class_name"] != named[row["path"]]
    )
    told = {(data["classes"][a], data["classes"][b]): n for a, b, n, _ in data["confusions"]}
    assert told == wrong
    assert data["metrics"]["accuracy"] == json.loads(
        (project / "metrics/accuracy.json").read_text()
    )


@pytest.mark.slow
def test_the_same_run_gives_the_same_bytes(project):
    before = digest(project / "results/report")
    run(project, "python", "-m", "bob", "report")
    assert digest(project / "results/report") == before


@pytest.mark.slow
@in_a_browser
def test_the_page_of_a_run_shows_contexts_and_results(project, open_page):
    page = open_page((project / "results/report/index.html").as_uri())
    page.get_by_role("tab", name="Contexts").click()
    data = data_of(project)
    leakage = data["metrics"]["synthetic"]["leakage"]["real"]["background"]
    assert f"real photos: leakage {leakage:.2f}" in page.inner_text("#contexts-background")
    page.locator("#contexts-background svg").first.locator("rect").first.click()
    columns = data["entries"]
    phrases = page.evaluate("[...gallery.chosen.get('background')]")
    with_it = [data["texts"]["background"].index(phrase) for phrase in phrases]
    rows = zip(columns["kind"], columns["class"], columns["background"], strict=True)
    asked = sum(kind == 1 and number == 0 and place in with_it for kind, number, place in rows)
    assert listed(page).split()[0] == str(asked)
    page.get_by_role("tab", name="Results").click()
    accuracy = data["metrics"]["accuracy"]
    assert f"{accuracy['real_and_synthetic']['top1']:.2f} %" in page.inner_text("main")
    if data["confusions"]:
        page.get_by_text("look").first.click()
        assert listed(page).split()[0] == str(data["confusions"][0][2])


@pytest.mark.slow
def test_without_generated_images_there_is_a_report_too(tmp_path):
    project = make_project(tmp_path / "none", TINY | {"generate": {"images_per_class": 0}})
    dvc(project, "repro", "report")
    data = data_of(project)
    assert set(data["entries"]["kind"]) == {1, 2, 3}
    assert Path(project / "results/audit/generated.jsonl").read_text() == ""


# --- the same page, served by `bob look` --------------------------------------------------------


@pytest.fixture(scope="module")
def port():
    """One for all servers, because what is pending is kept by a browser for one address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def serve(project, port):
    """Starts `bob look`; returns the process and the address that it tells."""
    servers = []

    def start():
        command = ["python", "-m", "bob", "look", "--no-browser", "--port", str(port)]
        server = subprocess.Popen(
            command, cwd=project, env=environment(project), stdout=subprocess.PIPE, text=True
        )
        servers.append(server)
        assert server.stdout
        (address,) = re.findall(r"http://\S+", server.stdout.readline())
        return server, address

    yield start
    for server in servers:
        server.kill()
        server.wait()
    run(project, "git", "checkout", "--quiet", "params.yaml")
    for path in (project / "data").glob("*/miniature.jsonl"):
        path.unlink()


def verdicts(project):
    path = project / "data/review/miniature.jsonl"
    return {row["file"]: row["verdict"] for row in read_jsonl(path)} if path.exists() else {}


def pending(page):
    """What is pending, after its cost was told."""
    page.wait_for_selector("#costs li")
    return page.locator("#pending").inner_text(), page.locator("#costs").inner_text()


def save(page):
    page.get_by_role("button", name="Save").click()
    return page.locator("#saved").inner_text()


@pytest.mark.slow
def test_what_is_filtered_is_rejected_by_keyboard_and_replaced(project, serve, open_page):
    first = data_of(project)["classes"][0]
    rejected = [
        row["file_name"]
        for row in read_jsonl(project / "results/generate/metadata.jsonl")
        if row["class"] == first
    ]
    _, address = serve()
    page = open_page(address)
    choose(page, "class", first)
    page.locator(".grid").click(position={"x": 1, "y": 1}, force=True)
    page.keyboard.press("Shift+X")
    assert pending(page)[0] == "2 rejected"
    page.keyboard.press("u")
    page.wait_for_selector("#decisions", state="hidden")
    assert page.locator(".card.reject").count() == 0
    page.locator("#reject-all").click()
    assert "rejecting 2: 2 new images" in pending(page)[1]
    assert verdicts(project) == {}
    other = open_page(address)
    assert "data/review/miniature.jsonl" in save(page)
    assert verdicts(project) == dict.fromkeys(rejected, "reject")
    other.wait_for_selector(".card.reject")  # whoever looks at the same time sees it

    output = dvc(project, "repro", "report")
    assert "2 rejected by data/review" in output
    page.reload()
    page.wait_for_selector("#shown")
    choose(page, "kind", "generated")  # no more
    choose(page, "kind", "rejected")
    assert sorted(page.locator(".card").evaluate_all("all => all.map(c => c.dataset.key)")) == [
        row["recipe"] for row in read_jsonl(project / "data/review/miniature.jsonl")
    ]
    # Their pictures come from the item cache; one that does not come fails this.
    page.evaluate("Promise.all([...document.querySelectorAll('.card img')].map(i => i.decode()))")
    page.locator(".card").first.click()
    for _ in rejected:
        page.keyboard.press("x")  # which takes it back
    assert pending(page)[0] == "2 taken back"
    save(page)
    assert verdicts(project) == {}
    dvc(project, "repro", "report")
    assert run(project, "git", "status", "--porcelain", "data", "params.yaml") == ""


@pytest.mark.slow
def test_what_is_pending_outlives_a_server_that_is_killed(project, serve, browser):
    context = browser.new_context()
    server, address = serve()
    page = context.new_page()
    page.goto(address)
    page.locator(".card").first.click()
    page.keyboard.press("x")
    assert pending(page)[0] == "1 rejected"
    save(page)
    page.keyboard.press("x")
    assert pending(page)[0] == "1 rejected"
    server.kill()
    server.wait()
    page.wait_for_selector("[role=alert]")
    assert "does not answer" in page.locator("[role=alert]").inner_text()
    assert len(verdicts(project)) == 1
    _, address = serve()
    page.goto(address)
    assert pending(page)[0] == "1 rejected"
    save(page)
    assert len(verdicts(project)) == 2
    context.close()


@pytest.mark.slow
def test_a_caption_is_corrected_in_place(project, serve, open_page):
    _, address = serve()
    page = open_page(address)
    choose(page, "kind", "generated")
    choose(page, "kind", "shot")
    page.locator(".card").first.click()
    page.get_by_label("background").last.fill("hangar of glass")
    page.get_by_label("background").last.press("Tab")
    told = pending(page)
    assert told[0] == "1 caption" and "fine-tuning" in told[1]
    assert "data/contexts/miniature.jsonl" in save(page)
    rows = read_jsonl(project / "data/contexts/miniature.jsonl")
    key = page.locator('.card[aria-selected="true"]').get_attribute("data-key")
    assert [row["image"] for row in rows if row["background"] == "hangar of glass"] == [key]
    assert "bank: data/contexts/miniature.jsonl" in (project / "params.yaml").read_text()


@pytest.mark.slow
def test_the_classifier_is_tried_on_a_photo(project, serve, open_page):
    _, address = serve()
    page = open_page(address)
    page.get_by_role("tab", name="Try").click()
    photo = sorted((project / "results/split/test").rglob("*.png"))[0]
    page.set_input_files("input[type=file]", photo)
    page.wait_for_selector("#answer .says")
    command = ("python", "-m", "bob", "predict", "--format", "csv", "--top", "1")
    (row,) = csv.DictReader(run(project, *command, str(photo)).splitlines())
    assert page.locator("#answer .says .wanted").inner_text() == row["class"]
    assert page.locator("#answer .shots img").count() > 0
    page.set_input_files("input[type=file]", project / "params.yaml")
    page.wait_for_selector("#answer [role=alert]")
    assert ["400" in problem for problem in page.problems] == [True]  # the browser's own word
    page.problems.clear()
