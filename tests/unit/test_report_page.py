"""The report's page in a real browser: no errors, filters that work, nothing wider than a phone or lost on a wall."""

import shutil
from pathlib import Path

import axe_core_python
import pytest
import toy_world
from browser import Browser

from ctrl_hpc import cli, jsonl
from ctrl_hpc.config import ROOT, dump, load
from ctrl_hpc.evaluate.run import run
from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.report import page

pytestmark = pytest.mark.slow
COUNT = 30


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """``(page of one run, page of two runs)``."""
    folder = tmp_path_factory.mktemp("pages")
    problems = toy_world.problems(COUNT)
    for seed, skill in ((0, 0.8), (1, 0.9)):
        run_dir = folder / f"grpo-seed{seed}"
        for place, able in (
            (folder / f"base{seed}", 0.3),
            (run_dir / "sft" / "hf", 0.5),
            (run_dir / "rl" / "hf", skill),
        ):
            toy_world.folder(place, able)
        settings = [f"run_dir={run_dir}", f"seed={seed}", "data.eval_names=[toy]", "eval.critics=[none,base,sft,rl]"]
        settings += [
            f"critic.model={folder / f'base{seed}'}",
            "eval.turns=3",
            "eval.n_samples=2",
            "wandb.mode=disabled",
        ]
        config = load(ROOT / "configs" / "tiny.yaml", [*settings, "eval.bootstrap=100", "eval.report_samples=12"])
        jsonl.write(run_dir / "problems" / "eval-toy.jsonl", problems)
        jsonl.write_text(run_dir / "config.yaml", dump(config))
        run(config, run_dir, toy_world.Connections(), {"toy": problems}, Prompts.load("default"))
        lines = [{"step": step, "rl/reward": (step + seed) / 10, "rl/kl": 0.01 * step} for step in range(6)]
        jsonl.write_text(run_dir / "rl" / "metrics.jsonl", "".join(jsonl.line(line) for line in lines))
        page.write(config, run_dir)
    both = folder / "both"
    assert cli.main(["report", str(folder / "grpo-seed0"), str(folder / "grpo-seed1"), "--out", str(both)]) == 0
    return folder / "grpo-seed0" / "report" / "index.html", both / "index.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    profile = tmp_path_factory.mktemp("profile")
    with Browser(profile) as opened:
        yield opened
    shutil.rmtree(profile, ignore_errors=True)


def choose(browser, field, value):
    """Set a filter as a user does."""
    browser.run(
        f"(() => {{ const field = document.getElementById('{field}'); field.value = '{value}';"
        " field.dispatchEvent(new Event(field.tagName === 'INPUT' ? 'input' : 'change')); })()"
    )
    return browser.run("document.getElementById('count').textContent")


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 900), (3840, 2160)])
def test_it_fits_and_says_no_error(pages, browser, which, width, height, tmp_path):
    browser.errors.clear()
    browser.open(f"file://{pages[which]}", width=width, height=height)
    assert browser.errors == []
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert browser.run("document.querySelectorAll('article.sample').length") > 0
    small = "[...document.querySelectorAll('p, td, pre, button')].map(e => parseFloat(getComputedStyle(e).fontSize))"
    assert browser.run(f"Math.min(...{small})") >= 12
    if width < 600:  # the narrow pictures are shown
        assert browser.run("[...document.images].every(image => image.naturalWidth < 900)")
    browser.screenshot(tmp_path / f"{which}-{width}.png")


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_axe_finds_nothing(pages, browser, which, scheme, width):
    """Contrast, names, order of headings, what a keyboard reaches: the rules of axe-core."""
    axe = (Path(axe_core_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    try:
        browser.open(f"file://{pages[which]}", width=width, height=900)
        browser.run(f"{axe}; 0")
        found = browser.run(
            "axe.run(document).then(r => r.violations.map(v => v.id + ': ' + v.nodes[0].html.slice(0, 200)))"
        )
        assert found == []
        assert browser.run("axe.version") == axe.split("axe v")[1].split()[0]
    finally:
        browser.call("Emulation.setEmulatedMedia", features=[])


def test_a_print_clips_nothing(pages, browser):
    """Every table fits a landscape page of A4 less its margins."""
    browser.open(f"file://{pages[0]}", width=1031, height=700)
    browser.call("Emulation.setEmulatedMedia", media="print")
    try:
        wide = "[...document.querySelectorAll('.wide')].map(e => e.scrollWidth - e.clientWidth)"
        assert max(browser.run(wide)) <= 1
        assert browser.run("document.documentElement.scrollWidth") <= 1031
    finally:
        browser.call("Emulation.setEmulatedMedia", media="")


def test_the_revision_stands_beside_its_draft(pages, browser):
    browser.open(f"file://{pages[0]}", width=1280, height=900)
    place = "document.querySelector('article .first > :nth-child({})').getBoundingClientRect().{}"
    assert browser.run(place.format(2, "top")) == browser.run(place.format(4, "top"))
    assert browser.run(place.format(2, "right")) < browser.run(place.format(4, "left"))
    assert browser.run(place.format(4, "width")) > 500


def test_filters_work(pages, browser):
    browser.errors.clear()
    browser.open(f"file://{pages[0]}", width=1280, height=900)
    total = browser.run("samples.length")
    assert browser.run("document.getElementById('critic').value") == "RL critic"
    everything = choose(browser, "critic", "")
    assert everything == f"{total} of {total} samples"
    browser.run("document.getElementById('more').click()")
    assert browser.run("document.querySelectorAll('article.sample').length") == min(20, total)
    expected = browser.run("samples.filter(s => s.transition === 'fix').length")
    assert choose(browser, "transition", "fix") == f"{expected} of {total} samples"
    shown = "[...document.querySelectorAll('article.sample .tag:nth-of-type(1)')].map(e => e.textContent)"
    assert set(browser.run(shown)) == {"fix"}
    expected = browser.run("samples.filter(s => s.transition === 'fix' && s.difficulty === 'easy').length")
    assert choose(browser, "difficulty", "easy") == f"{expected} of {total} samples"
    choose(browser, "transition", "")
    choose(browser, "difficulty", "")
    expected = browser.run("samples.filter(s => s.turns[0].judgement === 'incorrect').length")
    assert choose(browser, "judgement", "incorrect") == f"{expected} of {total} samples"
    choose(browser, "judgement", "")
    assert choose(browser, "words", "no such words anywhere") == f"0 of {total} samples"
    assert browser.run("document.querySelectorAll('article.sample').length") == 0
    assert browser.errors == []


def test_samples_of_several_runs_are_told_apart(pages, browser):
    browser.open(f"file://{pages[1]}", width=1280, height=900)
    choose(browser, "critic", "")
    total = browser.run("samples.length")
    runs = browser.run("[...document.getElementById('run').options].map(o => o.value)")
    assert runs == ["", "grpo, seed 0", "grpo, seed 1"]
    expected = browser.run("samples.filter(s => s.run === 'grpo, seed 1').length")
    assert choose(browser, "run", "grpo, seed 1") == f"{expected} of {total} samples"
    assert browser.run("document.getElementById('dataset').parentElement.offsetHeight") == 0
