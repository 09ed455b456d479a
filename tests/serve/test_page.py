"""The page in a browser: what it shows is what the server answers."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from live_server import running
from PIL import Image

from gendist.serve.http_app import http_app

CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
WAIT_S = 60
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

pytestmark = pytest.mark.skipif(
    not (Path(CHROMIUM).exists() and Path(DRIVER).exists()), reason="no browser: apt-get install chromium chromium-driver"
)


class Page:
    """A browser, and what people do with the page."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, url: str, model: str) -> None:
        self.driver.get("about:blank")  # else another model is no other page
        self.driver.get(f"{url}/#model={model}")

    def until(self, condition: Callable[[], Any]) -> Any:
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        wait = WebDriverWait(self.driver, WAIT_S, 0.05, ignored_exceptions=[StaleElementReferenceException])
        return wait.until(lambda _: condition())

    def find(self, selector: str) -> Any:
        from selenium.webdriver.common.by import By

        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def picture(self, selector: str, earlier: str = "") -> tuple[str, str]:
        """The source of an image, when it is another than an earlier one, and what `pixels_of` says of it."""

        def source() -> Any:
            image = self.find(selector)
            is_whole = self.run("return arguments[0].complete && arguments[0].naturalWidth > 0", image)
            return image.is_displayed() and is_whole and image.get_attribute("src") != earlier and image.get_attribute("src")

        src = self.until(source)
        script = """
            const image = document.querySelector(arguments[0]), done = arguments[1], canvas = document.createElement("canvas");
            [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
            const context = canvas.getContext("2d");
            context.drawImage(image, 0, 0);
            const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
            crypto.subtle.digest("SHA-256", data).then((digest) => {
                const hex = Array.from(new Uint8Array(digest), (byte) => byte.toString(16).padStart(2, "0")).join("");
                done(`${canvas.width} x ${canvas.height} ${hex}`);
            });
        """
        return src, self.driver.execute_async_script(script, selector)

    def fill(self, selector: str, text: str) -> None:
        field = self.find(selector)
        field.clear()
        field.send_keys(text)

    def choose(self, selector: str, text: str) -> None:
        from selenium.webdriver.support.ui import Select

        Select(self.find(selector)).select_by_visible_text(text)

    def asked(self, selector: str) -> dict[str, Any]:
        """The body of the request in a curl line."""
        (body,) = re.findall(r"-d '(.*?)' -o", self.find(selector).text)
        return json.loads(body)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}", "--window-size=1200,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(WAIT_S)
    driver.set_script_timeout(WAIT_S)
    yield driver
    driver.quit()


@pytest.fixture
def page(driver: Any) -> Iterator[Page]:
    yield Page(driver)
    # What a server refuses, the browser notes as "network".
    assert [entry for entry in driver.get_log("browser") if entry["source"] != "network"] == []


def pixels_of(png: bytes) -> str:
    """The size of a picture, and the SHA-256 of its pixels."""
    with Image.open(io.BytesIO(png)) as image:
        return f"{image.width} x {image.height} {hashlib.sha256(image.convert('RGBA').tobytes()).hexdigest()}"


def png_of(url: str, model: str, verb: str, body: dict[str, Any]) -> bytes:
    answer = httpx.post(f"{url}/models/{model}/{verb}?format=png", json=body, timeout=WAIT_S)
    assert answer.status_code == 200, answer.text
    return answer.content


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_samples_are_the_servers_and_so_is_what_curl_gets(page, url, tmp_path):
    page.open(url, "gan")
    first, shown = page.picture("#samples")
    assert shown == pixels_of(png_of(url, "gan", "sample", {"num_samples": 64, "seed": 0}))
    page.choose("#given", "b")
    second, shown = page.picture("#samples", first)
    of_b = {"num_samples": 64, "seed": 0, "given": "b"}
    assert shown == pixels_of(png_of(url, "gan", "sample", of_b))
    page.find("#another").click()
    _, shown = page.picture("#samples", second)
    asked = page.asked("#sample-curl")
    assert asked["seed"] != 0
    assert asked == {"num_samples": 64, "given": "b", "seed": int(page.find("#seed").get_attribute("value"))}
    subprocess.run(["bash", "-c", page.find("#sample-curl").text], cwd=tmp_path, timeout=WAIT_S, check=True)
    got = (tmp_path / "sample.png").read_bytes()
    assert got == png_of(url, "gan", "sample", asked)
    assert shown == pixels_of(got)
    page.choose("#format", "npy")
    subprocess.run(["bash", "-c", page.find("#sample-curl").text], cwd=tmp_path, timeout=WAIT_S, check=True)
    assert np.load(tmp_path / "sample.npy").shape == (64, 16)


def test_a_seed_beyond_the_numbers_of_javascript_is_what_it_is(page, url):
    page.open(url, "gmm")
    first, _ = page.picture("#samples")
    page.fill("#seed", str(2**64 - 1))
    page.find("#sample-form .primary").click()
    _, shown = page.picture("#samples", first)
    assert page.asked("#sample-curl")["seed"] == 2**64 - 1
    expected = png_of(url, "gmm", "sample", {"num_samples": 1000, "seed": str(2**64 - 1)})
    assert shown == pixels_of(expected)


def test_latents_are_moved_by_keys(page, url):
    from selenium.webdriver.common.keys import Keys

    page.open(url, "gan")
    first, _ = page.picture("#decoded")
    assert page.asked("#decode-curl") == {"z": [[0, 0, 0]], "given": "a"}
    page.find("#sliders label:nth-child(2) input").send_keys(Keys.END)
    second, shown = page.picture("#decoded", first)
    asked = page.asked("#decode-curl")
    assert asked == {"z": [[0, 3, 0]], "given": "a"}
    assert shown == pixels_of(png_of(url, "gan", "decode", asked))
    page.choose("#latent-given", "b")
    third, shown = page.picture("#decoded", second)
    assert shown == pixels_of(png_of(url, "gan", "decode", {**asked, "given": "b"}))
    page.find("#origin").click()
    _, shown = page.picture("#decoded", third)
    assert shown == pixels_of(png_of(url, "gan", "decode", {"z": [[0, 0, 0]], "given": "b"}))


def test_what_is_decoded_and_no_image_is_a_table(page, url):
    page.open(url, "labelled_vae")
    page.until(lambda: page.find("#decoded-values").is_displayed())
    answer = httpx.post(f"{url}/models/labelled_vae/decode", json={"z": [[0, 0]]}, timeout=WAIT_S).json()["decode"][0]
    rows = [row.split() for row in page.find("#decoded-values tbody").text.splitlines()]
    assert [name for name, _ in rows] == ["x_0", "x_1", "x_2", "x_3"]
    np.testing.assert_allclose([float(value) for _, value in rows], answer, rtol=1e-3)


def test_a_model_without_free_latents_has_no_sliders_and_shows_its_figures(page, url):
    page.open(url, "hmm")
    page.picture("#samples")
    names = httpx.get(f"{url}/models/hmm", timeout=WAIT_S).json()["figures"]
    assert names
    page.until(lambda: page.run("return document.querySelectorAll('#figures img:not([hidden])').length") == len(names))
    for number, name in enumerate(names, 1):
        _, shown = page.picture(f"#figures figure:nth-child({number}) img")
        png = httpx.get(f"{url}/models/hmm/figures/{name}", timeout=WAIT_S).content
        assert shown == pixels_of(png)
    assert not page.find("#latents").is_displayed()
    page.choose("#model", "gan")
    page.until(lambda: page.find("#latents").is_displayed())


def test_figures_of_a_model_that_is_no_longer_shown_are_let_go(page, url):
    page.open(url, "hmm")
    src, _ = page.picture("#figures img")
    page.run("""
        window.letGo = [];
        const revoke = URL.revokeObjectURL;
        URL.revokeObjectURL = (url) => { letGo.push(url); revoke.call(URL, url); };
    """)
    page.choose("#model", "gmm")
    page.until(lambda: src in page.run("return letGo"))


def test_what_the_server_refuses_is_told_until_it_is_mended(page, url):
    page.open(url, "vae_of_images")
    first, _ = page.picture("#samples")
    page.fill("#count", "100000")
    page.find("#sample-form .primary").click()
    page.until(lambda: page.find("#error").is_displayed())
    refused = httpx.post(
        f"{url}/models/vae_of_images/sample?format=png", json={"num_samples": 100_000, "seed": 0}, timeout=WAIT_S
    ).json()
    assert refused["error"] in page.find("#error").text
    assert refused["allowed"] in page.find("#error").text
    page.fill("#count", "3")
    page.find("#sample-form .primary").click()
    page.picture("#samples", first)
    page.until(lambda: not page.find("#error").is_displayed())


def test_a_token_is_kept_in_the_tab_alone(page, hosted):
    with running(http_app({"gmm": hosted["gmm"]}, tokens=["s3cret"])) as url:
        page.open(url, "gmm")
        page.until(lambda: "token" in page.find("#error").text)
        assert not page.find("#main").is_displayed()
        page.until(lambda: page.find("#token").is_displayed())
        page.fill("#token", "s3cret")
        page.find("#token-form button").click()
        page.picture("#samples")
        assert not page.find("#error").is_displayed()
        assert "s3cret" not in page.find("#sample-curl").text
        kept = page.run("return [localStorage.length, document.cookie, sessionStorage.getItem('token'), location.href]")
        assert kept[:3] == [0, "", "s3cret"]
        assert "s3cret" not in kept[3]
        page.run("sessionStorage.clear()")


def test_nothing_is_fetched_from_elsewhere_and_it_fits_a_phone(page, url):
    page.driver.set_window_size(500, 800)
    try:
        page.open(url, "naive_bayes")
        page.picture("#samples")
        page.picture("#figures img")
        fetched = page.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
        assert fetched
        assert all(name.startswith((f"{url}/", f"blob:{url}/", "data:")) for name in fetched)
        assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    finally:
        page.driver.set_window_size(1200, 900)
