"""The recipes of container images, built where Docker or Apptainer is: they install what the set-up does."""

from __future__ import annotations

import re
import subprocess

import pytest

from ctrl_hpc.config import ROOT

IMAGES = ROOT / "images"


def sections(text: str) -> dict[str, str]:
    """An Apptainer definition's sections, by name."""
    parts = re.split(r"^%(\w+)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def steps() -> dict[str, str]:
    """What each recipe runs as a shell script."""
    docker = (IMAGES / "Dockerfile").read_text().replace("\\\n", "")
    return {
        "Dockerfile": "\n".join(re.findall(r"^RUN (.*)", docker, flags=re.MULTILINE)),
        "ctrl-hpc.def": sections((IMAGES / "ctrl-hpc.def").read_text())["post"],
    }


@pytest.mark.parametrize("recipe", ["Dockerfile", "ctrl-hpc.def"])
def test_an_image_has_the_system_packages_of_the_set_up(recipe: str) -> None:
    (wanted,) = re.findall(r"^scripts/apt-install (.*)", (ROOT / "scripts/setup").read_text(), flags=re.MULTILINE)
    (installed,) = re.findall(r"apt-get install -y --no-install-recommends ([\w+. -]*)", steps()[recipe])
    assert installed.split() == wanted.split()


@pytest.mark.parametrize("recipe", ["Dockerfile", "ctrl-hpc.def"])
def test_a_recipes_steps_are_shell(recipe: str) -> None:
    subprocess.run(["bash", "-n"], input=steps()[recipe], text=True, check=True)


def test_both_start_from_the_same_image_and_run_the_same_command() -> None:
    docker, text = (IMAGES / "Dockerfile").read_text(), (IMAGES / "ctrl-hpc.def").read_text()
    (base,) = re.findall(r"^FROM (.*)", docker, flags=re.MULTILINE)
    assert f"Bootstrap: docker\nFrom: {base}\n" in text
    assert 'ENTRYPOINT ["ctrl-hpc"]' in docker
    assert sections(text)["runscript"].strip() == 'exec ctrl-hpc "$@"'
