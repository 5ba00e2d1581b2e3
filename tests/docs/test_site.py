"""The site as `make docs` builds it, opened as files in a real browser."""

import importlib.util
import os
import subprocess
import sys

import pytest

from places import REPOSITORY

CUT = """[...document.querySelectorAll("pre > code")]
    .filter(code => code.scrollWidth > code.clientWidth + 1).map(code => code.innerText)"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra docs")
def test_the_site_needs_no_server_and_no_network(browser, tmp_path):
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    subprocess.run(build, cwd=REPOSITORY, env=environment, check=True)
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    wrong: list[str] = []
    page.on("request", lambda request: wrong.append(request.url) if "//" in request.url else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    for path in sorted(tmp_path.rglob("*.html")):
        page.goto(path.as_uri())
        assert page.evaluate(CUT) == [], path
        links = page.evaluate("[...document.links].map(link => link.href.split('#')[0])")
        assert not [link for link in links if link.startswith("file:") and link.endswith("/")], path
    page.goto((tmp_path / "start" / "install.html").as_uri())
    page.locator(".md-search__input").fill("lockstep")
    page.locator(".md-search-result__item", has_text="Lockstep").first.wait_for()
    assert not [url for url in wrong if not url.startswith(("file:", "data:", "blob:"))]
